//! Scattered small reads, such as the rows of an embedding table: sorted, deduplicated, joined where they lie close, read
//! at a deep queue past the page cache, and copied to where they belong.
//!
//! What was read is not kept: a cache of rows is its user's business.

use crate::files::FileSet;
use crate::open::{IoChoice, StorageOptions, open_storage};
use crate::{NvmeError, Probe};
use overspill_core::seam::{Completion, Read, ReadFault, Storage};
use overspill_core::{FileId, TransferId};
use overspill_host::{AlignedBuf, GRANULE_BYTES, HostError};
use parking_lot::{Condvar, Mutex, RwLock};
use std::path::PathBuf;
use std::sync::Arc;

/// Ranges no farther apart than this are read as one: the disk moves so much in the time that one more request takes.
const GAP_BYTES: u64 = 16 << 10;
/// Longest read; longer ranges take several.
const SPAN_BYTES_MAX: u64 = 256 << 10;

/// A stretch of a file, and where its bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// Which file.
    pub file: FileId,
    /// Where in the file.
    pub offset: u64,
    /// How many bytes.
    pub bytes: usize,
    /// Where in the destination.
    pub to: usize,
}

/// Why rows could not be gathered. The destination's content is then unspecified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GatherError {
    /// A row that the file does not have.
    #[error("{}: bytes {offset}..+{bytes} were asked for but the file has {file_bytes}: the row does not exist", path.display())]
    Beyond {
        /// The file; empty if there is no such file.
        path: PathBuf,
        /// Where the row would begin.
        offset: u64,
        /// Its length.
        bytes: usize,
        /// The file's length.
        file_bytes: u64,
    },
    /// The destination has no room, or the wrong size.
    #[error("the destination has {had_bytes} bytes where {wanted_bytes} are needed")]
    Destination {
        /// What is needed.
        wanted_bytes: usize,
        /// What there is.
        had_bytes: usize,
    },
    /// The disk did not deliver.
    #[error("{}: rows at byte {offset} could not be read: {fault}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where the failed read began.
        offset: u64,
        /// Why.
        fault: ReadFault,
    },
    /// No memory to read into.
    #[error("no memory for gathering rows: {0}")]
    Memory(#[from] HostError),
}

/// Gathers rows. May be used by several threads at once; each has the whole depth of the queue.
pub struct Gatherer {
    storage: Box<dyn Storage<AlignedBuf>>,
    files: Arc<FileSet>,
    mailboxes: Arc<RwLock<Vec<Arc<Mailbox>>>>,
    idle: Mutex<Vec<Desk>>,
    depth: usize,
    unit: u64,
    probe: Probe,
}

/// Where one caller's completions arrive.
#[derive(Default)]
struct Mailbox {
    completions: Mutex<Vec<Completion<AlignedBuf>>>,
    arrived: Condvar,
}

/// What one caller needs, kept between calls so that nothing is allocated once it is warm.
struct Desk {
    mailbox: Arc<Mailbox>,
    /// Distinguishes this desk's reads from others': the upper half of their ids.
    tag: u64,
    buffers: Vec<AlignedBuf>,
    ranges: Vec<FileRange>,
    spans: Vec<Span>,
    reads: Vec<Read<AlignedBuf>>,
    taken: Vec<Completion<AlignedBuf>>,
}

/// One read: it serves the ranges `first..last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    file: FileId,
    offset: u64,
    end: u64,
    first: usize,
    last: usize,
}

impl Gatherer {
    /// A gatherer on these files. It has a reader of its own, so rows do not queue behind blocks; `options.depth` is
    /// how many reads each caller has in flight (of at most 256 KiB, in memory that is kept for the next call).
    ///
    /// # Errors
    /// Those of [`open_storage`].
    pub fn new(files: Arc<FileSet>, io: IoChoice, options: &StorageOptions) -> Result<Self, NvmeError> {
        let mailboxes: Arc<RwLock<Vec<Arc<Mailbox>>>> = Arc::default();
        let sink = {
            let mailboxes = Arc::clone(&mailboxes);
            Box::new(move |completion: Completion<AlignedBuf>| {
                let mailbox = mailboxes.read().get((completion.id.0 >> 32) as usize).cloned();
                if let Some(mailbox) = mailbox {
                    mailbox.completions.lock().push(completion);
                    mailbox.arrived.notify_one();
                }
            })
        };
        let (storage, probe) = open_storage(io, Arc::clone(&files), options, sink)?;
        let unit = storage.alignment_bytes() as u64;
        Ok(Self { storage, files, mailboxes, idle: Mutex::default(), depth: options.depth, unit, probe })
    }

    /// Which reader serves, and why.
    #[must_use]
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// The most memory that one caller's reads take.
    #[must_use]
    pub fn bytes_per_caller_max(&self) -> u64 {
        SPAN_BYTES_MAX.saturating_mul(self.depth as u64)
    }

    /// Reads rows of a table that begins at `base_offset` of a file, each of `row_bytes` bytes, into `to`, one after
    /// the other in the order asked. A row that is asked for several times is read once.
    ///
    /// # Errors
    /// [`GatherError::Destination`] unless `to` has `rows.len() * row_bytes` bytes; [`GatherError::Beyond`] for a row
    /// past the end of the file; [`GatherError::Read`] if the disk fails.
    pub fn read(
        &self,
        file: FileId,
        rows: &[u64],
        row_bytes: usize,
        base_offset: u64,
        to: &mut [u8],
    ) -> Result<(), GatherError> {
        let wanted_bytes = rows.len().saturating_mul(row_bytes);
        if to.len() != wanted_bytes {
            return Err(GatherError::Destination { wanted_bytes, had_bytes: to.len() });
        }
        let ranges = rows.iter().enumerate().map(|(index, &row)| {
            let offset = row.checked_mul(row_bytes as u64).and_then(|offset| offset.checked_add(base_offset));
            FileRange { file, offset: offset.unwrap_or(u64::MAX), bytes: row_bytes, to: index * row_bytes }
        });
        self.run(ranges, to)
    }

    /// Reads ranges of any files, in any order, to their places in `to`.
    ///
    /// # Errors
    /// As [`Self::read`]; [`GatherError::Destination`] if a range's place is not in `to`.
    pub fn read_ranges(&self, ranges: &[FileRange], to: &mut [u8]) -> Result<(), GatherError> {
        self.run(ranges.iter().copied(), to)
    }

    fn run(&self, ranges: impl Iterator<Item = FileRange>, to: &mut [u8]) -> Result<(), GatherError> {
        let mut desk = self.desk();
        desk.ranges.clear();
        desk.ranges.extend(ranges.filter(|range| range.bytes > 0));
        let result = self.check(&desk.ranges, to.len()).and_then(|()| {
            desk.ranges.sort_unstable_by_key(|range| (range.file, range.offset, range.bytes, range.to));
            plan(&desk.ranges, self.unit, &mut desk.spans);
            self.read_spans(&mut desk, to)
        });
        self.idle.lock().push(desk);
        result
    }

    fn check(&self, ranges: &[FileRange], room: usize) -> Result<(), GatherError> {
        for &FileRange { file, offset, bytes, to } in ranges {
            let file_bytes = self.files.bytes(file);
            if offset.checked_add(bytes as u64).is_none_or(|end| end > file_bytes) {
                let path = self.files.path(file).to_owned();
                return Err(GatherError::Beyond { path, offset, bytes, file_bytes });
            }
            let wanted_bytes = to.saturating_add(bytes);
            if wanted_bytes > room {
                return Err(GatherError::Destination { wanted_bytes, had_bytes: room });
            }
        }
        Ok(())
    }

    fn desk(&self) -> Desk {
        if let Some(desk) = self.idle.lock().pop() {
            return desk;
        }
        let mailbox = Arc::<Mailbox>::default();
        let mut mailboxes = self.mailboxes.write();
        mailboxes.push(Arc::clone(&mailbox));
        Desk {
            mailbox,
            tag: (mailboxes.len() as u64 - 1) << 32,
            buffers: Vec::new(),
            ranges: Vec::new(),
            spans: Vec::new(),
            reads: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// Keeps `depth` reads in flight until all spans are read, or one failed and the others have come back.
    fn read_spans(&self, desk: &mut Desk, to: &mut [u8]) -> Result<(), GatherError> {
        let (mut next, mut in_flight, mut error) = (0, 0, None);
        loop {
            while error.is_none() && in_flight < self.depth && next < desk.spans.len() {
                match self.request(desk, next) {
                    Ok(read) => desk.reads.push(read),
                    Err(memory) => {
                        error = Some(memory);
                        break;
                    }
                }
                next += 1;
                in_flight += 1;
            }
            self.storage.submit(&mut desk.reads);
            if in_flight == 0 {
                return error.map_or(Ok(()), Err);
            }
            desk.mailbox.take(&mut desk.taken);
            in_flight -= desk.taken.len();
            for completion in desk.taken.drain(..) {
                let span = desk.spans[completion.id.0 as u32 as usize];
                match completion.result {
                    Ok(_) => scatter(&desk.ranges, span, &completion.buffer, to),
                    Err(fault) => {
                        let path = self.files.path(span.file).to_owned();
                        error.get_or_insert(GatherError::Read { path, offset: span.offset, fault });
                    }
                }
                desk.buffers.push(completion.buffer);
            }
        }
    }

    fn request(&self, desk: &mut Desk, index: usize) -> Result<Read<AlignedBuf>, GatherError> {
        let buffer = match desk.buffers.pop() {
            Some(buffer) => buffer,
            None => AlignedBuf::new(SPAN_BYTES_MAX as usize)?,
        };
        let Span { file, offset, end, .. } = desk.spans[index];
        let len = (end.next_multiple_of(self.unit) - offset) as usize;
        let id = TransferId(desk.tag | index as u64);
        Ok(Read { id, file, offset, len, len_min: (end - offset) as usize, buffer })
    }
}

impl Mailbox {
    /// Waits until something has arrived and takes it.
    fn take(&self, taken: &mut Vec<Completion<AlignedBuf>>) {
        let mut completions = self.completions.lock();
        while completions.is_empty() {
            self.arrived.wait(&mut completions);
        }
        std::mem::swap(&mut *completions, taken);
    }
}

/// Cuts sorted ranges into reads that begin on multiples of `unit` (a divisor of [`SPAN_BYTES_MAX`]).
fn plan(ranges: &[FileRange], unit: u64, spans: &mut Vec<Span>) {
    debug_assert!(SPAN_BYTES_MAX.is_multiple_of(unit) && unit <= GRANULE_BYTES as u64);
    spans.clear();
    for (index, range) in ranges.iter().enumerate() {
        let (mut at, end) = (range.offset, range.offset + range.bytes as u64);
        let same =
            |other: &FileRange| (other.file, other.offset, other.bytes) == (range.file, range.offset, range.bytes);
        if index.checked_sub(1).is_some_and(|before| same(&ranges[before])) {
            // The spans of the range before are the latest ones, and end with it.
            spans.iter_mut().rev().take_while(|span| span.last == index).for_each(|span| span.last = index + 1);
            continue;
        }
        if let Some(span) = spans.last_mut()
            && span.file == range.file
            && (span.offset..=span.end.saturating_add(GAP_BYTES)).contains(&at)
            && end - span.offset <= SPAN_BYTES_MAX
        {
            span.end = span.end.max(end);
            span.last = index + 1;
            continue;
        }
        while at < end {
            let offset = at / unit * unit;
            let reach = end.min(offset.saturating_add(SPAN_BYTES_MAX));
            spans.push(Span { file: range.file, offset, end: reach, first: index, last: index + 1 });
            at = reach;
        }
    }
}

/// Copies what a span delivered to the ranges that it serves.
fn scatter(ranges: &[FileRange], span: Span, bytes: &[u8], to: &mut [u8]) {
    for range in &ranges[span.first..span.last] {
        let start = range.offset.max(span.offset);
        let end = (range.offset + range.bytes as u64).min(span.end);
        if start < end {
            let from = (start - span.offset) as usize..(end - span.offset) as usize;
            let at = range.to + (start - range.offset) as usize;
            to[at..at + from.len()].copy_from_slice(&bytes[from]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, bytes: usize) -> FileRange {
        FileRange { file: FileId(0), offset, bytes, to: 0 }
    }

    fn planned(ranges: &[FileRange], unit: u64) -> Vec<(u64, u64, usize, usize)> {
        let mut spans = Vec::new();
        plan(ranges, unit, &mut spans);
        spans.iter().map(|span| (span.offset, span.end, span.first, span.last)).collect()
    }

    #[test]
    fn near_rows_are_joined_far_ones_are_not_and_doubles_are_read_once() {
        let ranges = [range(5000, 100), range(5000, 100), range(9000, 100), range(90_000, 100)];
        assert_eq!(planned(&ranges, 4096), [(4096, 9100, 0, 3), (86_016, 90_100, 3, 4)]);
        assert_eq!(planned(&ranges, 1), [(5000, 9100, 0, 3), (90_000, 90_100, 3, 4)]);
        let mut two_files = [range(0, 10), range(10, 10)];
        two_files[1].file = FileId(1);
        assert_eq!(planned(&two_files, 4096).len(), 2);
    }

    #[test]
    fn long_rows_take_several_reads_also_when_asked_for_twice() {
        let max = SPAN_BYTES_MAX;
        let ranges = [range(100, 600_000), range(100, 600_000), range(600_200, 10)];
        let spans = [(0, max, 0, 2), (max, 2 * max, 0, 2), (2 * max, 600_210, 0, 3)];
        assert_eq!(planned(&ranges, 4096), spans);
        // A row that would only half fit is not cut.
        assert_eq!(planned(&[range(0, 200_000), range(200_000, 100_000)], 1).len(), 2);
    }
}
