//! What the disk gives: bandwidth and latency of real reads of the model's own ranges, and the request size and depth
//! that it takes to get it.
//!
//! Disks are noisy: what one short probe says may be off by a fifth. Whoever derives a limit from it should probe for
//! ten seconds or more, before and after, and compare.

use crate::files::FileSet;
use crate::open::{IoChoice, StorageOptions, open_storage};
use crate::{NvmeError, Probe};
use overspill_core::seam::{Read, ReadFault};
use overspill_core::{FileId, TransferId};
use overspill_host::limits::memory_limits;
use overspill_host::{GRANULE_BYTES, HostError, HugePages, Slab, SlabOptions, SlabPool, SlotBuf};
use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of a file that may be read by a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which file.
    pub file: FileId,
    /// Which bytes.
    pub bytes: Range<u64>,
}

/// How a probe reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of each read: a multiple of 4096, at most 64 MiB.
    pub request_bytes: usize,
    /// Reads in flight, 1 to 256.
    pub depth: usize,
}

/// What a probe measured.
#[derive(Clone, Debug)]
pub struct Bandwidth {
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// How it read.
    pub shape: Shape,
    /// Bytes read.
    pub read_bytes: u64,
    /// Reads made.
    pub reads: u64,
    /// How long that took.
    pub elapsed: Duration,
    /// Mean time from submission to completion of a read; at depth 1 it is the disk's latency.
    pub latency: Duration,
    /// Which reader served. If it does not read directly, the page cache may have helped, although it was dropped first.
    pub reader: Probe,
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// No extent has a whole aligned request in it.
    #[error("there is nothing to measure: no stretch of a file has {request_bytes} bytes between its aligned ends")]
    TooSmall {
        /// The request's size.
        request_bytes: usize,
    },
    /// No reader.
    #[error(transparent)]
    Reader(#[from] NvmeError),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] HostError),
    /// A read failed.
    #[error("{}: cannot be read at byte {offset}: {fault}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Why.
        fault: ReadFault,
    },
}

/// The whole of all files, for probes that may read anything.
#[must_use]
pub fn whole(files: &FileSet) -> Vec<Extent> {
    let extent = |index| {
        let file = FileId(index as u32);
        Extent { file, bytes: 0..files.bytes(file) }
    };
    (0..files.len()).map(extent).collect()
}

/// Of a measurement's time, what is read before the clock starts: a disk that has been idle answers the first requests
/// from its caches, and one that is throttled has saved up for them (a Linux control group, for several tenths of a second).
const WARM_UP_SHARE: u32 = 2;
const WARM_UP_MAX: Duration = Duration::from_millis(500);

/// Requests are read into so much memory, one place after the other: more than processors' caches hold, as weights are.
/// A virtual disk, whose host copies what it has read, is up to a tenth faster into the same few places again and again.
const MEMORY_BYTES: usize = 128 << 20;

/// Reads the extents in order, again and again, for this long and a short while before, and says how fast it went.
///
/// # Errors
/// Any [`ProbeError`].
pub fn bandwidth(
    files: &Arc<FileSet>,
    extents: &[Extent],
    io: IoChoice,
    shape: Shape,
    duration: Duration,
) -> Result<Bandwidth, ProbeError> {
    check(shape)?;
    bandwidth_into(&memory(shape.request_bytes * shape.depth)?, files, extents, io, shape, duration)
}

fn check(Shape { request_bytes, depth }: Shape) -> Result<(), ProbeError> {
    let setting = |setting, value, range| NvmeError::Setting { setting, value, range };
    if request_bytes == 0 || request_bytes > 64 << 20 || !request_bytes.is_multiple_of(GRANULE_BYTES) {
        return Err(setting("request_bytes", request_bytes, "a multiple of 4096, at most 64 MiB").into());
    }
    if !(1..=256).contains(&depth) {
        return Err(setting("depth", depth, "1 to 256").into());
    }
    Ok(())
}

/// As [`bandwidth`], into this memory, which holds all requests in flight at least.
fn bandwidth_into(
    memory: &Arc<Slab>,
    files: &Arc<FileSet>,
    extents: &[Extent],
    io: IoChoice,
    shape: Shape,
    duration: Duration,
) -> Result<Bandwidth, ProbeError> {
    let Shape { request_bytes, depth } = shape;
    let mut requests = Requests::new(extents, request_bytes as u64)?;
    let (done, arrived) = crossbeam_channel::unbounded();
    let sink = Box::new(move |completion| done.send(completion).unwrap_or_default());
    let options =
        StorageOptions { depth, flight_bytes: request_bytes * depth, threads: depth, ..StorageOptions::default() };
    let (storage, reader) = open_storage::<SlotBuf>(io, Arc::clone(files), &options, sink)?;
    if !reader.direct {
        files.drop_cache();
    }
    let buffers = (0..memory.len() / request_bytes).map(|index| memory.claim(index * request_bytes, request_bytes));
    let mut buffers = buffers.collect::<Result<VecDeque<_>, _>>()?;
    let begin = Instant::now();
    let mut start = begin;
    let warm_up = (duration / WARM_UP_SHARE).min(WARM_UP_MAX);
    let mut begun = vec![(FileId(0), 0, begin); depth];
    let (mut reads, mut latency, mut batch) = (0u64, Duration::ZERO, Vec::with_capacity(depth));
    let mut request = |slot: usize, buffer, begun: &mut [(FileId, u64, Instant)]| {
        let (file, offset) = requests.next();
        begun[slot] = (file, offset, Instant::now());
        let len = request_bytes;
        Read { id: TransferId(slot as u64), file, offset, len, len_min: len, buffer }
    };
    for slot in 0..depth {
        batch.extend(buffers.pop_front().map(|buffer| request(slot, buffer, &mut begun)));
    }
    let mut in_flight = batch.len();
    storage.submit(&mut batch);
    let mut elapsed = None;
    while in_flight > 0
        && let Ok(completion) = arrived.recv()
    {
        let slot = completion.id.index();
        let (file, offset, since) = begun[slot];
        completion.result.map_err(|fault| ProbeError::Read { path: files.path(file).to_owned(), offset, fault })?;
        if elapsed.is_some() {
            // Only waited for, since it writes to a buffer: what was in flight when the clock started has been counted.
            in_flight -= 1;
            continue;
        }
        reads += 1;
        latency += since.elapsed();
        if start == begin && begin.elapsed() >= warm_up {
            (start, reads, latency) = (Instant::now(), 0, Duration::ZERO);
        } else if start != begin && start.elapsed() >= duration {
            elapsed = Some(start.elapsed());
            in_flight -= 1;
            continue;
        }
        buffers.push_back(completion.buffer);
        batch.extend(buffers.pop_front().map(|buffer| request(slot, buffer, &mut begun)));
        storage.submit(&mut batch);
    }
    let elapsed = elapsed.unwrap_or_else(|| start.elapsed());
    let read_bytes = reads * request_bytes as u64;
    let bytes_per_s = read_bytes as f64 / elapsed.as_secs_f64().max(1e-9);
    let latency = latency.checked_div(u32::try_from(reads).unwrap_or(u32::MAX)).unwrap_or_default();
    Ok(Bandwidth { bytes_per_s, shape, read_bytes, reads, elapsed, latency, reader })
}

/// [`MEMORY_BYTES`], or a quarter of what is free, but so much at least; of the kind that models are read into: with huge
/// pages, where the system has them, a disk may be half as fast again.
fn memory(bytes_min: usize) -> Result<Arc<Slab>, HostError> {
    /// Slabs are whole pages, of whatever size.
    const PAGE_BYTES_MAX: usize = 64 << 10;
    let free =
        memory_limits().available_bytes().map_or(usize::MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    let bytes = MEMORY_BYTES.min(free / 4).max(bytes_min).next_multiple_of(PAGE_BYTES_MAX);
    let slab = SlabPool::new(bytes, SlabOptions::default())?.ensure(0)?;
    slab.back(HugePages::Auto);
    Ok(slab)
}

/// Finds the smallest reads and the shallowest queue that come within 5 % of the best measured, in about this time.
/// Less in flight means less memory and a sooner answer to what is demanded.
///
/// # Errors
/// Any [`ProbeError`].
pub fn best_shape(
    files: &Arc<FileSet>,
    extents: &[Extent],
    io: IoChoice,
    duration: Duration,
) -> Result<Bandwidth, ProbeError> {
    const REQUEST_BYTES: [usize; 3] = [256 << 10, 512 << 10, 1 << 20];
    const DEPTHS: [usize; 4] = [2, 4, 8, 16];
    /// Of the best, how much is enough.
    const ENOUGH: f64 = 0.95;
    let each = duration / (REQUEST_BYTES.len() * DEPTHS.len()) as u32;
    let mut measured: Vec<Bandwidth> = Vec::new();
    let memory = memory(REQUEST_BYTES[REQUEST_BYTES.len() - 1] * DEPTHS[DEPTHS.len() - 1])?;
    for request_bytes in REQUEST_BYTES {
        for depth in DEPTHS {
            match bandwidth_into(&memory, files, extents, io, Shape { request_bytes, depth }, each) {
                Ok(found) => measured.push(found),
                // The files are smaller than this request.
                Err(ProbeError::TooSmall { .. }) if !measured.is_empty() => {}
                Err(error) => return Err(error),
            }
        }
    }
    let best = measured.iter().map(|found| found.bytes_per_s).fold(0.0, f64::max);
    let in_flight = |found: &Bandwidth| found.shape.request_bytes * found.shape.depth;
    let enough = measured.into_iter().filter(|found| found.bytes_per_s >= best * ENOUGH);
    enough.min_by_key(in_flight).ok_or(ProbeError::TooSmall { request_bytes: REQUEST_BYTES[0] })
}

/// The extents' requests, in order, without end.
struct Requests {
    /// Aligned, and each long enough for one request.
    extents: Vec<Extent>,
    at: usize,
    offset: u64,
    request_bytes: u64,
}

impl Requests {
    fn new(extents: &[Extent], request_bytes: u64) -> Result<Self, ProbeError> {
        const ALIGN: u64 = GRANULE_BYTES as u64;
        let aligned = extents.iter().filter_map(|extent| {
            let start = extent.bytes.start.checked_next_multiple_of(ALIGN)?;
            let end = extent.bytes.end / ALIGN * ALIGN;
            let fits = end.checked_sub(start)? >= request_bytes;
            fits.then_some(Extent { file: extent.file, bytes: start..end })
        });
        let extents: Vec<_> = aligned.collect();
        let Some(first) = extents.first() else {
            return Err(ProbeError::TooSmall { request_bytes: request_bytes as usize });
        };
        let offset = first.bytes.start;
        Ok(Self { extents, at: 0, offset, request_bytes })
    }

    fn next(&mut self) -> (FileId, u64) {
        let extent = &self.extents[self.at];
        if extent.bytes.end - self.offset < self.request_bytes {
            self.at = (self.at + 1) % self.extents.len();
            self.offset = self.extents[self.at].bytes.start;
        }
        let (file, offset) = (self.extents[self.at].file, self.offset);
        self.offset += self.request_bytes;
        (file, offset)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn extent(file: u32, bytes: Range<u64>) -> Extent {
        Extent { file: FileId(file), bytes }
    }

    #[test]
    fn requests_are_aligned_stay_in_their_extents_and_go_round() {
        let extents = [extent(0, 100..20_000), extent(1, 0..8000), extent(2, 4096..12_288)];
        let mut requests = Requests::new(&extents, 8192).unwrap();
        let next: Vec<_> = (0..4).map(|_| requests.next()).map(|(file, offset)| (file.0, offset)).collect();
        assert_eq!(next, [(0, 4096), (2, 4096), (0, 4096), (2, 4096)]);
        assert!(matches!(Requests::new(&extents, 1 << 20), Err(ProbeError::TooSmall { .. })));
        assert!(Requests::new(&[extent(0, u64::MAX - 5..u64::MAX)], 4096).is_err());
    }

    #[test]
    fn what_is_measured_is_what_was_read() {
        let path = std::env::temp_dir().join(format!("overspill-probe-{}", std::process::id()));
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let files = Arc::new(FileSet::open(&[(path.clone(), 1 << 20)]).unwrap());
        let shape = Shape { request_bytes: 64 << 10, depth: 4 };
        let found = bandwidth(&files, &whole(&files), IoChoice::Auto, shape, Duration::from_millis(30)).unwrap();
        assert_eq!(found.read_bytes, found.reads * (64 << 10));
        assert!(found.reads >= 4 && found.elapsed >= Duration::from_millis(30) && !found.latency.is_zero());
        let best = best_shape(&files, &whole(&files), IoChoice::Auto, Duration::from_millis(24)).unwrap();
        assert!(best.bytes_per_s > 0.0);
        let wrong = Shape { request_bytes: 1000, depth: 4 };
        assert!(bandwidth(&files, &whole(&files), IoChoice::Auto, wrong, Duration::ZERO).is_err());
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
        let error = bandwidth(&files, &whole(&files), IoChoice::Pread, shape, Duration::ZERO).unwrap_err();
        assert!(matches!(error, ProbeError::Read { fault: ReadFault::EndOfFile { .. }, .. }), "{error}");
        std::fs::remove_file(&path).unwrap();
    }
}
