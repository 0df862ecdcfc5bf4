//! What every [`Storage`] must do, as one body of checks, for the tests of whoever implements it.
//!
//! It does no I/O: a [`Subject`] makes files and readers. Each check panics, as tests do, if the reader is wrong.

use super::{Buffer, Completion, Read, ReadFault, Storage};
use crate::ids::{FileId, TransferId};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Where completions go.
pub type Sink<B> = Box<dyn Fn(Completion<B>) + Send + Sync>;

/// A kind of reader under test.
pub trait Subject {
    /// The buffers that it is tested with.
    type Buffer: Buffer;

    /// Makes files of these contents and a reader of them. The files last at least until the next call.
    fn open(&self, files: &[&[u8]], sink: Sink<Self::Buffer>) -> Box<dyn Storage<Self::Buffer>>;

    /// A buffer of at least `len` bytes.
    fn buffer(&self, len: usize) -> Self::Buffer;

    /// Cuts a file of the last [`Self::open`] short, behind the reader's back.
    fn truncate(&self, file: FileId, len: u64);
}

/// A check: its name, and the function that panics if the subject fails it.
pub type Check<S> = (&'static str, fn(&S));

/// All checks.
#[must_use]
pub fn checks<S: Subject>() -> Vec<Check<S>> {
    vec![
        ("aligned_reads_deliver_the_bytes", aligned::<S>),
        ("unaligned_reads_deliver_the_bytes", unaligned::<S>),
        ("reads_may_reach_past_the_end", past_the_end::<S>),
        ("bytes_that_are_not_there_are_an_end_of_file", beyond_the_end::<S>),
        ("nothing_is_read_where_nothing_is_asked", nothing::<S>),
        ("requests_without_sense_fail_and_harm_nobody", senseless::<S>),
        ("memory_behind_the_request_is_left_alone", left_alone::<S>),
        ("more_reads_than_the_queue_is_deep_all_complete", many::<S>),
        ("an_idle_reader_wakes", idle::<S>),
        ("several_files_are_not_mixed_up", several_files::<S>),
        ("threads_may_submit_at_once", threads::<S>),
        ("cancelled_reads_complete_once", cancelled::<S>),
        ("dropping_the_reader_completes_every_read", dropped::<S>),
        ("a_file_cut_short_is_an_error_and_no_more", cut_short::<S>),
        ("a_file_cut_short_under_load_harms_nobody", cut_short_under_load::<S>),
    ]
}

/// How long a check waits for a completion before it calls the read lost.
const PATIENCE: Duration = Duration::from_secs(60);
const PAGE: u64 = 4096;

/// The test files' content: no two pages, and no two files, are alike.
fn content(file: u32, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| byte(file, at)).collect()
}

fn byte(file: u32, at: u64) -> u8 {
    let mixed = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(file) << 40);
    (mixed >> 29) as u8 ^ (mixed >> 51) as u8
}

/// Small numbers that look random and are always the same.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Collects what completes.
struct Arrivals<B> {
    completions: Mutex<BTreeMap<TransferId, Completion<B>>>,
    arrived: Condvar,
}

impl<B: Buffer> Arrivals<B> {
    fn new() -> Arc<Self> {
        Arc::new(Self { completions: Mutex::default(), arrived: Condvar::new() })
    }

    fn sink(self: &Arc<Self>) -> Sink<B> {
        let arrivals = Arc::clone(self);
        Box::new(move |completion| {
            let before = arrivals.lock().insert(completion.id, completion);
            assert!(before.is_none(), "a read completed twice");
            arrivals.arrived.notify_all();
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<TransferId, Completion<B>>> {
        self.completions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, id: u64) -> Completion<B> {
        let mut completions = self.lock();
        loop {
            if let Some(completion) = completions.remove(&TransferId(id)) {
                return completion;
            }
            let (guard, timeout) =
                self.arrived.wait_timeout(completions, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            assert!(!timeout.timed_out(), "read {id} never completed");
            completions = guard;
        }
    }
}

/// A reader of these files, and what it delivers.
struct Bench<'a, S: Subject> {
    subject: &'a S,
    arrivals: Arc<Arrivals<S::Buffer>>,
    storage: Box<dyn Storage<S::Buffer>>,
}

impl<'a, S: Subject> Bench<'a, S> {
    fn new(subject: &'a S, lens: &[usize]) -> Self {
        let contents: Vec<_> = (0..).zip(lens).map(|(file, &len)| content(file, len)).collect();
        let contents: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
        let arrivals = Arrivals::new();
        let storage = subject.open(&contents, arrivals.sink());
        Self { subject, arrivals, storage }
    }

    fn request(&self, id: u64, file: u32, offset: u64, len: usize, len_min: usize) -> Read<S::Buffer> {
        let buffer = self.subject.buffer(len);
        Read { id: TransferId(id), file: FileId(file), offset, len, len_min, buffer }
    }

    fn submit(&self, mut reads: Vec<Read<S::Buffer>>) {
        self.storage.submit(&mut reads);
        assert!(reads.is_empty(), "submitting takes all reads");
    }

    /// Reads, and compares what came with what is in the file. Returns the result.
    fn read(&self, file: u32, offset: u64, len: usize, len_min: usize) -> Result<usize, ReadFault> {
        self.submit(vec![self.request(0, file, offset, len, len_min)]);
        let mut completion = self.arrivals.wait(0);
        check(&mut completion, file, offset, len, len_min);
        completion.result
    }
}

/// Compares what a read delivered with what is in the file.
fn check<B: Buffer>(completion: &mut Completion<B>, file: u32, offset: u64, len: usize, len_min: usize) {
    if let Ok(bytes) = completion.result {
        assert!((len_min..=len).contains(&bytes), "{bytes} of {len_min}..={len} bytes at {offset} of file {file}");
        let wrong = (offset..).zip(&completion.buffer.bytes_mut()[..bytes]).find(|&(at, &got)| got != byte(file, at));
        assert_eq!(wrong, None, "wrong byte in the {bytes} from {offset} on of file {file}");
    }
}

fn aligned<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[1 << 20]);
    for (page, pages) in [(0, 1), (1, 1), (3, 7), (0, 256), (255, 1), (128, 128)] {
        let (offset, len) = (page * PAGE, (pages * PAGE) as usize);
        assert_eq!(bench.read(0, offset, len, len), Ok(len));
    }
}

fn unaligned<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[300_000]);
    for offset in [0, 1, 511, 512, 4095, 4096, 4097, 100_000] {
        for len in [1, 2, 100, 511, 512, 4095, 4096, 4097, 5000, 100_001] {
            assert_eq!(bench.read(0, offset, len, len), Ok(len), "{len} bytes at {offset}");
        }
    }
}

fn past_the_end<S: Subject>(subject: &S) {
    for bytes in [1, 777, 4096, 4097, 12_288, 70_000] {
        let bench = Bench::new(subject, &[bytes]);
        for offset in (0..bytes as u64).step_by(PAGE as usize) {
            let left = bytes - offset as usize;
            let got = bench.read(0, offset, left.next_multiple_of(PAGE as usize), left);
            assert_eq!(got, Ok(left), "at {offset} of {bytes}");
            assert_eq!(bench.read(0, offset, left + 10_000, left), Ok(left));
        }
    }
}

fn beyond_the_end<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[10_000]);
    for (offset, len) in [(0, 10_001), (0, 12_288), (8192, 4096), (9_999, 2), (10_000, 1), (12_288, 4096), (1 << 40, 1)]
    {
        let there = 10_000usize.saturating_sub(offset as usize);
        match bench.read(0, offset, len, len) {
            Err(ReadFault::EndOfFile { got_bytes }) => assert!(got_bytes <= there, "{got_bytes} at {offset}"),
            other => panic!("{other:?} at {offset}"),
        }
    }
    let huge = bench.read(0, u64::MAX - 4095, 4096, 4096);
    assert!(huge.is_err(), "{huge:?}");
    assert_eq!(bench.read(0, 0, 10_000, 10_000), Ok(10_000), "the reader goes on");
}

fn nothing<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[5000, 0]);
    for offset in [0, 17, 4096, 5000, 9000] {
        assert_eq!(bench.read(0, offset, 0, 0), Ok(0));
    }
    assert_eq!(bench.read(1, 0, 100, 0), Ok(0), "an empty file");
    assert_eq!(bench.read(1, 0, 100, 1), Err(ReadFault::EndOfFile { got_bytes: 0 }));
}

fn senseless<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[5000]);
    let mut too_long = bench.request(1, 0, 0, 100, 100);
    too_long.len = too_long.buffer.bytes_mut().len() + 1;
    let more_than_all = bench.request(3, 0, 0, 100, 101);
    bench.submit(vec![too_long, bench.request(2, 9, 0, 100, 100), more_than_all]);
    for id in 1..=3 {
        assert!(matches!(bench.arrivals.wait(id).result, Err(ReadFault::System { .. })), "request {id}");
    }
    bench.storage.cancel(TransferId(77));
    bench.submit(Vec::new());
    assert_eq!(bench.read(0, 0, 5000, 5000), Ok(5000));
}

fn left_alone<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[40_000]);
    for (id, (offset, len)) in (1..).zip([(0, 4096), (0, 5000), (3, 5000), (36_864, 4096), (39_990, 100)]) {
        let buffer = subject.buffer(len + 8192);
        let mut read = Read { id: TransferId(id), file: FileId(0), offset, len, len_min: 1, buffer };
        read.buffer.bytes_mut().fill(0xa5);
        let address = read.buffer.bytes_mut().as_ptr();
        bench.submit(vec![read]);
        let mut completion = bench.arrivals.wait(id);
        check(&mut completion, 0, offset, len, 1);
        let rest = &completion.buffer.bytes_mut()[len..];
        assert!(rest.iter().all(|&b| b == 0xa5), "{len} bytes at {offset}");
        assert_eq!(completion.buffer.bytes_mut().as_ptr(), address, "the buffer is the one that was given");
    }
}

fn many<S: Subject>(subject: &S) {
    const BYTES: usize = 1 << 20;
    let bench = Bench::new(subject, &[BYTES]);
    let mut dice = Dice(1);
    let wanted: Vec<_> = (0..400)
        .map(|id| {
            let unit = if dice.below(4) == 0 { 1 } else { PAGE };
            let offset = dice.below(BYTES as u64 / unit) * unit;
            let len = ((1 + dice.below(16)) * PAGE) as usize;
            (id, offset, len, len.min(BYTES - offset as usize))
        })
        .collect();
    bench.submit(wanted.iter().map(|&(id, offset, len, min)| bench.request(id, 0, offset, len, min)).collect());
    for (id, offset, len, min) in wanted {
        let mut completion = bench.arrivals.wait(id);
        assert_eq!(completion.result.clone().map(|bytes| bytes >= min), Ok(true));
        check(&mut completion, 0, offset, len, min);
    }
}

fn idle<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[100_000]);
    for round in 0..20 {
        std::thread::sleep(Duration::from_micros(round * 300));
        assert_eq!(bench.read(0, round * PAGE, 4096, 4096), Ok(4096));
    }
}

fn several_files<S: Subject>(subject: &S) {
    let lens = [9000, 40_960, 1, 123_456];
    let bench = Bench::new(subject, &lens);
    let wanted: Vec<_> = (0..200u64).map(|id| (id, (id % 4) as u32)).collect();
    bench.submit(wanted.iter().map(|&(id, file)| bench.request(id, file, 0, 128 << 10, lens[file as usize])).collect());
    for (id, file) in wanted {
        let mut completion = bench.arrivals.wait(id);
        assert_eq!(completion.result, Ok(lens[file as usize]));
        check(&mut completion, file, 0, 128 << 10, lens[file as usize]);
    }
}

fn threads<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[1 << 20]);
    let (storage, arrivals) = (&bench.storage, &bench.arrivals);
    let mut reads: Vec<Vec<_>> = (0..4)
        .map(|thread| (0..100).map(|n| bench.request(thread * 100 + n, 0, n * 2 * PAGE, 8192, 8192)).collect())
        .collect();
    std::thread::scope(|scope| {
        for batch in &mut reads {
            scope.spawn(move || {
                for read in batch.drain(..) {
                    let (id, offset) = (read.id.0, read.offset);
                    storage.submit(&mut vec![read]);
                    if id % 3 == 0 {
                        let mut completion = arrivals.wait(id);
                        check(&mut completion, 0, offset, 8192, 8192);
                        assert_eq!(completion.result, Ok(8192));
                    }
                }
            });
        }
    });
    for id in (0..400).filter(|id| id % 3 != 0) {
        assert_eq!(arrivals.wait(id).result, Ok(8192));
    }
}

fn cancelled<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[1 << 20]);
    bench.submit((0..600).map(|id| bench.request(id, 0, (id % 250) * PAGE, 8192, 8192)).collect());
    for id in (0..600).rev().filter(|id| id % 2 == 1) {
        bench.storage.cancel(TransferId(id));
        bench.storage.cancel(TransferId(id));
    }
    for id in 0..600 {
        let mut completion = bench.arrivals.wait(id);
        match completion.result {
            Err(ReadFault::Cancelled) => assert!(id % 2 == 1, "read {id} was not cancelled"),
            _ => assert_eq!(completion.result, Ok(8192)),
        }
        check(&mut completion, 0, (id % 250) * PAGE, 8192, 8192);
    }
    assert_eq!(bench.read(0, 0, 4096, 4096), Ok(4096));
}

fn dropped<S: Subject>(subject: &S) {
    for round in 0..4 {
        let bench = Bench::new(subject, &[512 << 10]);
        bench.submit((0..200).map(|id| bench.request(id, 0, (id % 100) * PAGE, 16_384, 16_384)).collect());
        std::thread::sleep(Duration::from_micros(round * 60));
        let Bench { storage, arrivals, .. } = bench;
        drop(storage);
        let mut completions = std::mem::take(&mut *arrivals.lock());
        assert_eq!(completions.len(), 200, "every read has completed when the drop returns");
        for (id, completion) in &mut completions {
            assert!(matches!(completion.result, Ok(16_384) | Err(ReadFault::Cancelled)), "{:?}", completion.result);
            check(completion, 0, (id.0 % 100) * PAGE, 16_384, 16_384);
        }
    }
}

fn cut_short<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[1 << 20, 100_000]);
    assert_eq!(bench.read(0, 0, 1 << 20, 1 << 20), Ok(1 << 20));
    subject.truncate(FileId(0), 300_000);
    for (offset, len) in [(0, 1 << 20), (262_144, 65_536), (299_008, 4096), (524_288, 8192), (1_044_480, 4096)] {
        let result = bench.read(0, offset, len, len);
        assert!(matches!(result, Err(ReadFault::EndOfFile { .. })), "{result:?} at {offset}");
    }
    assert_eq!(bench.read(0, 0, 294_912, 294_912), Ok(294_912), "what is left can be read");
    assert_eq!(bench.read(1, 0, 100_000, 100_000), Ok(100_000), "other files can be read");
}

fn cut_short_under_load<S: Subject>(subject: &S) {
    let bench = Bench::new(subject, &[4 << 20]);
    bench.submit((0..256).map(|id| bench.request(id, 0, (id % 64) * (16 * PAGE), 65_536, 65_536)).collect());
    for kept in (0..8).rev() {
        subject.truncate(FileId(0), kept * 500_000);
    }
    for id in 0..256 {
        let completion = bench.arrivals.wait(id);
        assert!(matches!(completion.result, Ok(65_536) | Err(ReadFault::EndOfFile { .. })), "{:?}", completion.result);
    }
    let result = bench.read(0, 0, 4096, 4096);
    assert_eq!(result, Err(ReadFault::EndOfFile { got_bytes: 0 }));
}
