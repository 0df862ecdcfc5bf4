//! What to ask the system for next, so that a read is served in full: one state machine for all readers.
//!
//! The system may deliver less than asked for, be interrupted, or refuse a direct read of one place; and requests need
//! not be aligned. It has no I/O of its own, so each of these can be tested.

use overspill_core::seam::ReadFault;
use overspill_host::GRANULE_BYTES;
use std::ops::Range;

/// A read that is refused for now is tried again so often.
const RETRIES_MAX: u32 = 100;

/// A system call to make: read `range` of the buffer from `offset` of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// Past the page cache, or through it.
    pub(crate) direct: bool,
    pub(crate) offset: u64,
    pub(crate) range: Range<usize>,
}

/// How far a read has come.
#[derive(Debug)]
pub(crate) struct Progress {
    offset: u64,
    len: usize,
    len_min: usize,
    done: usize,
    /// Where the buffer begins, as far as alignment goes.
    address: usize,
    direct: bool,
    call_bytes_max: usize,
    retries: u32,
}

impl Progress {
    /// A read of `len` bytes, at least `len_min`, into memory at `address`; `direct` if the file can be read so.
    /// `call_bytes_max` is a multiple of [`GRANULE_BYTES`].
    pub(crate) fn new(
        offset: u64,
        (len, len_min): (usize, usize),
        address: usize,
        direct: bool,
        call_bytes_max: usize,
    ) -> Self {
        Self { offset, len, len_min, done: 0, address, direct, call_bytes_max, retries: 0 }
    }

    /// The call to make, unless there is nothing to read.
    pub(crate) fn next_call(&self) -> Option<Call> {
        let left = self.len - self.done;
        if left == 0 {
            return None;
        }
        let offset = self.offset.checked_add(self.done as u64)?;
        let bytes = left.min(self.call_bytes_max);
        let whole = bytes / GRANULE_BYTES * GRANULE_BYTES;
        let aligned = offset.is_multiple_of(GRANULE_BYTES as u64)
            && self.address.wrapping_add(self.done).is_multiple_of(GRANULE_BYTES);
        let direct = self.direct && aligned && whole > 0;
        let bytes = if direct { whole } else { bytes };
        Some(Call { direct, offset, range: self.done..self.done + bytes })
    }

    /// Takes note of what a call gave: bytes, or an error number. Returns the outcome once there is one.
    pub(crate) fn advance(&mut self, call: &Call, result: Result<usize, i32>) -> Option<Result<usize, ReadFault>> {
        match result {
            Ok(0) if call.direct => self.direct = false,
            Ok(0) => return Some(self.at_end()),
            Ok(bytes) => {
                let bytes = bytes.min(call.range.len());
                self.done += bytes;
                self.retries = 0;
                let short = bytes < call.range.len();
                if self.done == self.len || (short && self.done >= self.len_min) {
                    return Some(Ok(self.done));
                }
            }
            Err(errno) if is_transient(errno) && self.retries < RETRIES_MAX => self.retries += 1,
            Err(errno) if call.direct && is_misalignment(errno) => self.direct = false,
            Err(errno) => return Some(Err(ReadFault::System { errno })),
        }
        None
    }

    /// The outcome of a read that has nothing (more) to ask for, because the file, or the numbers, end.
    pub(crate) fn at_end(&self) -> Result<usize, ReadFault> {
        if self.done >= self.len_min { Ok(self.done) } else { Err(ReadFault::EndOfFile { got_bytes: self.done }) }
    }
}

/// Interrupted, or refused for this moment.
#[cfg(unix)]
fn is_transient(errno: i32) -> bool {
    errno == libc::EINTR || errno == libc::EAGAIN
}

#[cfg(not(unix))]
fn is_transient(_errno: i32) -> bool {
    false
}

/// What file systems say to a direct read that they cannot do.
#[cfg(unix)]
fn is_misalignment(errno: i32) -> bool {
    errno == libc::EINVAL || errno == libc::EOPNOTSUPP
}

#[cfg(not(unix))]
fn is_misalignment(_errno: i32) -> bool {
    false
}

/// The number for a request that makes no sense.
pub(crate) const EINVAL: i32 = 22;

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    type Outcome = Result<usize, ReadFault>;

    /// Runs a read against scripted results; returns the outcome and the calls made.
    fn play(mut progress: Progress, script: &[Result<usize, i32>]) -> (Outcome, Vec<Call>) {
        let mut calls = Vec::new();
        let mut script = script.iter();
        loop {
            let Some(call) = progress.next_call() else { return (progress.at_end(), calls) };
            let result = *script.next().expect("the script ends before the read does");
            calls.push(call.clone());
            if let Some(outcome) = progress.advance(&call, result) {
                assert_eq!(script.next(), None);
                return (outcome, calls);
            }
        }
    }

    fn call(direct: bool, offset: u64, range: Range<usize>) -> Call {
        Call { direct, offset, range }
    }

    fn progress(offset: u64, len: usize, len_min: usize) -> Progress {
        Progress::new(offset, (len, len_min), 0, true, 1 << 30)
    }

    #[test]
    fn a_read_interrupted_goes_on_where_it_was() {
        let (outcome, calls) =
            play(progress(4096, 16384, 16384), &[Err(libc::EINTR), Ok(8192), Err(libc::EAGAIN), Ok(8192)]);
        assert_eq!(outcome, Ok(16384));
        let (first, rest) = (call(true, 4096, 0..16384), call(true, 12288, 8192..16384));
        assert_eq!(calls, [first.clone(), first, rest.clone(), rest]);
    }

    #[test]
    fn a_short_read_off_the_alignment_ends_through_the_page_cache() {
        let (outcome, calls) = play(progress(0, 16384, 16384), &[Ok(4608), Ok(11776)]);
        assert_eq!(outcome, Ok(16384));
        assert_eq!(calls[1], call(false, 4608, 4608..16384));
    }

    #[test]
    fn padding_past_the_end_of_the_file_costs_no_second_call() {
        assert_eq!(play(progress(0, 8192, 5000), &[Ok(5000)]).0, Ok(5000));
    }

    #[test]
    fn a_file_that_ends_early_is_told_from_a_read_cut_short() {
        let (outcome, calls) = play(progress(0, 16384, 16384), &[Ok(8192), Ok(0), Ok(0)]);
        assert_eq!(outcome, Err(ReadFault::EndOfFile { got_bytes: 8192 }));
        assert!(!calls[2].direct);
    }

    #[test]
    fn a_place_that_cannot_be_read_directly_is_read_through_the_page_cache() {
        let (outcome, calls) = play(progress(0, 4096, 4096), &[Err(libc::EINVAL), Ok(4096)]);
        assert_eq!(outcome, Ok(4096));
        assert!(calls[0].direct && !calls[1].direct);
        let (outcome, _) = play(progress(0, 4096, 4096), &[Err(libc::EINVAL), Err(libc::EINVAL)]);
        assert_eq!(outcome, Err(ReadFault::System { errno: libc::EINVAL }));
    }

    #[test]
    fn errors_end_the_read() {
        let (outcome, _) = play(progress(0, 8192, 4096), &[Err(libc::EIO)]);
        assert_eq!(outcome, Err(ReadFault::System { errno: libc::EIO }));
        let in_two = Progress::new(0, (8192, 8192), 0, true, 4096);
        let (outcome, _) = play(in_two, &[Ok(4096), Err(libc::EIO)]);
        assert_eq!(outcome, Err(ReadFault::System { errno: libc::EIO }));
        let endless = vec![Err(libc::EAGAIN); RETRIES_MAX as usize + 1];
        assert_eq!(play(progress(0, 8192, 1), &endless).0, Err(ReadFault::System { errno: libc::EAGAIN }));
    }

    #[test]
    fn unaligned_ends_are_split_off_and_unaligned_starts_are_not_direct() {
        let (outcome, calls) = play(progress(8192, 9000, 9000), &[Ok(8192), Ok(808)]);
        assert_eq!(
            (outcome, &calls[0], &calls[1]),
            (Ok(9000), &call(true, 8192, 0..8192), &call(false, 16384, 8192..9000))
        );
        assert!(!progress(8193, 8192, 1).next_call().unwrap().direct);
        assert!(!Progress::new(0, (8192, 1), 64, true, 1 << 30).next_call().unwrap().direct);
        assert!(!Progress::new(0, (8192, 1), 0, false, 1 << 30).next_call().unwrap().direct);
        assert!(!progress(0, 100, 1).next_call().unwrap().direct);
    }

    #[test]
    fn long_reads_are_cut_and_vast_offsets_end() {
        let (outcome, calls) = play(Progress::new(0, (20480, 1), 0, true, 8192), &[Ok(8192), Ok(8192), Ok(4096)]);
        assert_eq!((outcome, calls.len()), (Ok(20480), 3));
        let (outcome, calls) = play(progress(u64::MAX - 10, 4096, 1), &[Ok(0)]);
        assert_eq!((outcome, calls.len()), (Err(ReadFault::EndOfFile { got_bytes: 0 }), 1));
        assert_eq!(play(progress(5, 0, 0), &[]), (Ok(0), vec![]));
    }
}
