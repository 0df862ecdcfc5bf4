//! Which reader serves: the one that was asked for, or the best of those that work here, with the reasons.

use crate::files::FileSet;
use crate::pread::Pread;
use crate::wires::ByWire;
use crate::{NvmeError, Sink};
use overspill_core::seam::{Buffer, Storage};
use overspill_host::GRANULE_BYTES;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// Which reader to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IoChoice {
    /// The best one that works here.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// Positional reads on a pool of threads.
    Pread,
    /// A memory map.
    Mmap,
}

impl IoChoice {
    /// All choices, `Auto` first.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Uring, Self::Pread, Self::Mmap];

    /// Its name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Pread => "pread",
            Self::Mmap => "mmap",
        }
    }
}

impl fmt::Display for IoChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for IoChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|choice| choice.name() == text);
        known.ok_or_else(|| format!("'{text}' is no reader: use auto, uring, pread or mmap"))
    }
}

/// Settings of the readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageOptions {
    /// Reads in flight in the ring of `uring`. Default 64; 1 to 4096. More may be submitted; they wait.
    pub depth: usize,
    /// Bytes in flight in the ring of `uring`; one read is always let through. Default 8 MiB, which keeps a disk of 14
    /// GB/s busy that answers in half a millisecond. More may be submitted; they wait, in order: a disk that is given
    /// everything at once serves all of it at the same time, and what is needed first arrives as late as the last.
    pub flight_bytes: usize,
    /// Threads of `pread` and `mmap`, and so their reads in flight. Default 8; 1 to 256.
    pub threads: usize,
    /// Whether `uring` and `pread` read past the page cache where they can. Default true.
    pub direct: bool,
    /// Most bytes of one system call; longer reads take several. Default 1 GiB; 4096 to 1 GiB, a multiple of 4096.
    pub call_bytes_max: usize,
}

impl Default for StorageOptions {
    fn default() -> Self {
        Self { depth: 64, flight_bytes: 8 << 20, threads: 8, direct: true, call_bytes_max: 1 << 30 }
    }
}

impl StorageOptions {
    fn check(&self) -> Result<(), NvmeError> {
        let error = |setting, value, range| Err(NvmeError::Setting { setting, value, range });
        if !(1..=4096).contains(&self.depth) {
            return error("depth", self.depth, "1 to 4096");
        }
        if !(1..=256).contains(&self.threads) {
            return error("threads", self.threads, "1 to 256");
        }
        if self.flight_bytes < GRANULE_BYTES {
            return error("flight_bytes", self.flight_bytes, "4096 or more");
        }
        let bytes = self.call_bytes_max;
        if !(GRANULE_BYTES..=1 << 30).contains(&bytes) || !bytes.is_multiple_of(GRANULE_BYTES) {
            return error("call_bytes_max", bytes, "4096 to 1 GiB, and a multiple of 4096");
        }
        Ok(())
    }
}

/// What was chosen, and why nothing better.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The reader that serves; where disks have different ones, that of the first.
    pub chosen: IoChoice,
    /// Whether it reads past the page cache, at least some of the files.
    pub direct: bool,
    /// Readers that would have been preferred, each with the reason why it was not taken.
    pub rejected: Vec<(IoChoice, String)>,
    /// Why some files are read through the page cache although they were not to be.
    pub direct_refusal: Option<String>,
    /// The disks that the files lie on, by wire: each has a reader, and so a queue, of its own.
    pub disks: Vec<DiskProbe>,
}

/// What was chosen for one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskProbe {
    /// The reader that serves.
    pub chosen: IoChoice,
    /// Whether it reads past the page cache, at least some of the files.
    pub direct: bool,
    /// Files of the model on this disk.
    pub files: usize,
    /// The first of them; empty if there is none.
    pub first: PathBuf,
    /// Reads in flight at most.
    pub depth: usize,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.disks[..] {
            [] | [_] => write!(f, "{}{}", self.chosen, direct_text(self.direct))?,
            disks => {
                write!(f, "{} disks: ", disks.len())?;
                for (index, disk) in disks.iter().enumerate() {
                    let separator = if index > 0 { ", " } else { "" };
                    let more = if disk.files > 1 { format!(" and {} more", disk.files - 1) } else { String::new() };
                    let name = disk.first.file_name().unwrap_or_default().display();
                    write!(f, "{separator}{name}{more} by {}{}", disk.chosen, direct_text(disk.direct))?;
                }
            }
        }
        for (choice, reason) in &self.rejected {
            write!(f, "; not {choice}: {reason}")?;
        }
        self.direct_refusal.iter().try_for_each(|reason| write!(f, "; not direct: {reason}"))
    }
}

fn direct_text(direct: bool) -> &'static str {
    if direct { " with direct I/O" } else { "" }
}

/// Opens a reader of these files: one for each disk that they lie on, each with its own queue, behind one face.
///
/// `Auto` takes io_uring where the kernel allows it and the disk's files can be read directly; else positional reads.
/// The [`Probe`] says which and why.
///
/// # Errors
/// [`NvmeError::Unavailable`] if a reader was named that does not work here; [`NvmeError::Setting`] for options out of
/// their range; [`NvmeError::Resources`] if there is no thread to be had.
pub fn open_storage<B: Buffer>(
    io: IoChoice,
    files: Arc<FileSet>,
    options: &StorageOptions,
    sink: Sink<B>,
) -> Result<(Box<dyn Storage<B>>, Probe), NvmeError> {
    options.check()?;
    let sink = Arc::new(sink);
    let mut probe = Probe { chosen: io, direct: false, rejected: Vec::new(), direct_refusal: None, disks: Vec::new() };
    let mut readers = Vec::new();
    // Without files there is nothing to read, and still a reader to be probed.
    for wire in 0..files.wires().max(1) {
        readers.push(open_wire(io, &files, wire, options, &sink, &mut probe)?);
    }
    probe.chosen = probe.disks.first().map_or(io, |disk| disk.chosen);
    tracing::debug!(reader = %probe, "opened a reader");
    let storage: Box<dyn Storage<B>> = match (readers.len(), readers.pop()) {
        (1, Some(only)) => only,
        (_, last) => {
            readers.extend(last);
            match ByWire::new(files, readers) {
                Some(all) => Box::new(all),
                None => return Err(NvmeError::Setting { setting: "disks", value: 0, range: "1 or more" }),
            }
        }
    };
    Ok((storage, probe))
}

/// Opens the reader of one disk, and says so in the probe.
fn open_wire<B: Buffer>(
    io: IoChoice,
    files: &Arc<FileSet>,
    wire: u32,
    options: &StorageOptions,
    sink: &Arc<Sink<B>>,
    probe: &mut Probe,
) -> Result<Box<dyn Storage<B>>, NvmeError> {
    let past_cache = options.direct && io != IoChoice::Mmap;
    let direct = past_cache && files.on_wire(wire).any(|file| files.direct(file).is_ok());
    let refusal = files.on_wire(wire).find_map(|file| {
        let reason = files.direct(file).err().filter(|_| past_cache)?;
        Some(format!("{}: {reason}", files.path(file).display()))
    });
    let pread = || Pread::start(Arc::clone(files), options, Arc::clone(sink)).map(|reader| Box::new(reader) as Box<_>);
    let (chosen, storage): (_, Box<dyn Storage<B>>) = match io {
        IoChoice::Pread => (io, pread()?),
        IoChoice::Uring => (io, start_uring(files, options, Arc::clone(sink)).map_err(|reason| NvmeError::Unavailable {
            choice: io,
            reason,
            cure: "allow io_uring to this process (Linux 5.6, the container's seccomp profile, kernel.io_uring_disabled) or use --io pread",
        })?),
        IoChoice::Mmap => (io, start_mmap(files, options, Arc::clone(sink)).map_err(|reason| NvmeError::Unavailable {
            choice: io,
            reason,
            cure: "allow process_vm_readv to this process or use --io pread",
        })?),
        IoChoice::Auto => {
            let uring = match refusal.as_ref().filter(|_| !direct) {
                Some(refusal) => Err(format!("no direct I/O: {refusal}")),
                None => start_uring(files, options, Arc::clone(sink)),
            };
            match uring {
                Ok(storage) => (IoChoice::Uring, storage),
                Err(reason) => {
                    let rejection = (IoChoice::Uring, reason);
                    if !probe.rejected.contains(&rejection) {
                        probe.rejected.push(rejection);
                    }
                    (IoChoice::Pread, pread()?)
                }
            }
        }
    };
    probe.direct |= direct;
    probe.direct_refusal = probe.direct_refusal.take().or(refusal);
    let depth = if chosen == IoChoice::Uring { options.depth } else { options.threads };
    let first = files.on_wire(wire).next().map_or_else(PathBuf::new, |file| files.path(file).to_owned());
    probe.disks.push(DiskProbe { chosen, direct, files: files.on_wire(wire).count(), first, depth });
    Ok(storage)
}

#[cfg(target_os = "linux")]
fn start_uring<B: Buffer>(
    files: &Arc<FileSet>,
    options: &StorageOptions,
    sink: Arc<Sink<B>>,
) -> Result<Box<dyn Storage<B>>, String> {
    Ok(Box::new(crate::uring::Uring::start(Arc::clone(files), options, sink)?))
}

#[cfg(not(target_os = "linux"))]
fn start_uring<B: Buffer>(
    _files: &Arc<FileSet>,
    _options: &StorageOptions,
    _sink: Arc<Sink<B>>,
) -> Result<Box<dyn Storage<B>>, String> {
    Err("only Linux has io_uring".to_owned())
}

#[cfg(target_os = "linux")]
fn start_mmap<B: Buffer>(
    files: &Arc<FileSet>,
    options: &StorageOptions,
    sink: Arc<Sink<B>>,
) -> Result<Box<dyn Storage<B>>, String> {
    Ok(Box::new(crate::mmap::Mmap::start(Arc::clone(files), options, sink)?))
}

#[cfg(not(target_os = "linux"))]
fn start_mmap<B: Buffer>(
    _files: &Arc<FileSet>,
    _options: &StorageOptions,
    _sink: Arc<Sink<B>>,
) -> Result<Box<dyn Storage<B>>, String> {
    Err(crate::mmap::REFUSAL.to_owned())
}
