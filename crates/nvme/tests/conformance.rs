//! The conformance body of the seam, over every reader, kind of buffer and decorator. Readers that this system does not
//! allow are reported as ignored.

use libtest_mimic::{Arguments, Trial};
use overspill_core::FileId;
use overspill_core::seam::conformance::{Sink, Subject, checks};
use overspill_core::seam::{Buffer, Storage};
use overspill_host::AlignedBuf;
use overspill_nvme::decorate::{Counted, FaultPlan, Faulty, Throttled, Wire};
use overspill_nvme::{FileSet, IoChoice, NvmeError, StorageOptions, open_storage};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What goes around the reader.
type Around<B> = fn(Sink<B>, &dyn Fn(Sink<B>) -> Box<dyn Storage<B>>) -> Box<dyn Storage<B>>;

/// A reader, with settings, under a kind of buffer.
struct Reader<B: Buffer> {
    io: IoChoice,
    options: StorageOptions,
    buffer: fn(usize) -> B,
    around: Around<B>,
    /// As if each file lay on a disk of its own.
    disk_each: bool,
    directory: PathBuf,
    paths: Mutex<Vec<PathBuf>>,
}

impl<B: Buffer> Reader<B> {
    fn new(io: IoChoice, options: StorageOptions, buffer: fn(usize) -> B, around: Around<B>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("conformance-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // Below the target directory, not in a temporary one: that may be memory, where nothing is read directly.
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&directory).expect("the directory can be made");
        Self { io, options, buffer, around, disk_each: false, directory, paths: Mutex::default() }
    }
}

/// Files are named by their numbers.
fn paths_index(path: &Path) -> u64 {
    path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()).expect("a number")
}

impl<B: Buffer> Drop for Reader<B> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl<B: Buffer> Subject for Reader<B> {
    type Buffer = B;

    fn open(&self, files: &[&[u8]], sink: Sink<B>) -> Box<dyn Storage<B>> {
        let paths: Vec<_> = (0..files.len()).map(|index| self.directory.join(index.to_string())).collect();
        let mut opened = Vec::new();
        for (path, bytes) in paths.iter().zip(files) {
            let _ = std::fs::remove_file(path);
            std::fs::write(path, bytes).expect("the file can be written");
            opened.push((path.clone(), bytes.len() as u64));
        }
        *self.paths.lock().expect("no panic before") = paths;
        let own_disk = |path: &Path| paths_index(path);
        let files = if self.disk_each { FileSet::open_on(&opened, own_disk) } else { FileSet::open(&opened) };
        let files = Arc::new(files.expect("the files can be opened"));
        assert!(!self.disk_each || files.wires() as usize == opened.len());
        (self.around)(sink, &|sink| {
            open_storage(self.io, Arc::clone(&files), &self.options, sink).expect("the reader can be opened").0
        })
    }

    fn buffer(&self, len: usize) -> B {
        (self.buffer)(len)
    }

    fn truncate(&self, file: FileId, len: u64) {
        let path = &self.paths.lock().expect("no panic before")[file.index()];
        let file = std::fs::OpenOptions::new().write(true).open(path).expect("the file can be opened");
        file.set_len(len).expect("the file can be cut");
    }
}

fn aligned_buffer(len: usize) -> AlignedBuf {
    AlignedBuf::new(len).expect("there is memory")
}

fn plain_buffer(len: usize) -> Box<[u8]> {
    vec![0; len].into()
}

/// Why a reader cannot be tested here.
fn refusal(io: IoChoice) -> Option<String> {
    let files = Arc::new(FileSet::open(&[]).expect("no file is no problem"));
    let sink = Box::new(|_| ());
    open_storage::<Box<[u8]>>(io, files, &StorageOptions::default(), sink).err().map(|error| error.to_string())
}

fn add<B: Buffer>(
    trials: &mut Vec<Trial>,
    name: &str,
    io: IoChoice,
    options: StorageOptions,
    buffer: fn(usize) -> B,
    around: Around<B>,
) {
    let refusal = refusal(io);
    if let Some(refusal) = &refusal {
        eprintln!("{name}: ignored: {refusal}");
    }
    for (check, run) in checks::<Reader<B>>() {
        let trial = Trial::test(format!("{name}::{check}"), move || {
            run(&Reader::new(io, options, buffer, around));
            Ok(())
        });
        trials.push(trial.with_ignored_flag(refusal.is_some()));
        let trial = Trial::test(format!("{name}::disk_each::{check}"), move || {
            let mut reader = Reader::new(io, options, buffer, around);
            reader.disk_each = true;
            run(&reader);
            Ok(())
        });
        trials.push(trial.with_ignored_flag(refusal.is_some()));
    }
}

fn main() {
    let arguments = Arguments::from_args();
    let defaults = StorageOptions::default();
    // A queue of 3, calls of a page: every read is cut, queued and continued.
    let tight = StorageOptions { depth: 3, flight_bytes: 8192, threads: 2, call_bytes_max: 4096, ..defaults };
    let through_cache = StorageOptions { direct: false, ..defaults };
    let mut trials = Vec::new();
    for io in [IoChoice::Uring, IoChoice::Pread, IoChoice::Mmap] {
        add(&mut trials, &format!("{io}::aligned"), io, defaults, aligned_buffer, |sink, open| open(sink));
        add(&mut trials, &format!("{io}::plain"), io, defaults, plain_buffer, |sink, open| open(sink));
        add(&mut trials, &format!("{io}::tight"), io, tight, aligned_buffer, |sink, open| open(sink));
        if io != IoChoice::Mmap {
            add(&mut trials, &format!("{io}::cached"), io, through_cache, aligned_buffer, |sink, open| open(sink));
        }
    }
    let pread = IoChoice::Pread;
    add(&mut trials, "counted", pread, defaults, aligned_buffer, |sink, open| {
        Box::new(Counted::around(sink, |sink| Ok::<_, NvmeError>(open(sink))).expect("counting needs nothing"))
    });
    add(&mut trials, "faultless", pread, defaults, aligned_buffer, |sink, open| {
        let faulty = Faulty::around(FaultPlan::none(), sink, |sink| Ok::<_, NvmeError>(open(sink)));
        Box::new(faulty.expect("faults need nothing"))
    });
    add(&mut trials, "throttled", pread, defaults, aligned_buffer, |sink, open| {
        let wire = Wire { bytes_per_s: 2e9, latency: Duration::from_micros(50) };
        Box::new(Throttled::around(wire, sink, |sink| Ok::<_, NvmeError>(open(sink))).expect("there is a thread"))
    });
    libtest_mimic::run(&arguments, trials).exit();
}
