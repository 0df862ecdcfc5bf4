//! Slabs, and the claims that make sharing one safe.
//!
//! A slab keeps one bit a granule (taken or not) and, at a claim's first granule, the number of its holders. A claim
//! sets its bits or fails; a [`SlotBuf`] is its single holder and may write; frozen, it becomes a [`SlotView`], which
//! may be cloned and only reads. The last holder clears the bits.

use super::map::Mapping;
use crate::pool::Tally;
use crate::{GRANULE_BYTES, HUGE_BYTES, HostError, HugePages, SlabOptions};
use overspill_core::seam::Buffer;
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

const BITS: usize = u64::BITS as usize;

/// A stretch of page-aligned anonymous memory, zero at first, backed by the system as it is touched.
pub struct Slab {
    map: Mapping,
    taken: Box<[AtomicU64]>,
    holders: Box<[AtomicU32]>,
    locked: Result<bool, String>,
    /// What is known of the pages of each stretch of [`HUGE_BYTES`] that lies wholly in the slab.
    pages: Box<[AtomicU8]>,
    tally: Arc<Tally>,
}

/// Up to here the state counts how much was read into the piece once more, in [`WEAR_BYTES`]; it is not backed yet, or
/// in small pages as far as is known. With so much it is worn: weights stream through it. What is read once more since
/// other weights are to stay comes less far.
const WORN: u8 = (WORN_READS * HUGE_BYTES / WEAR_BYTES) as u8;
const WEAR_BYTES: usize = 128 << 10;
const WORN_READS: usize = 3;
/// One huge page.
const HUGE: u8 = u8::MAX;
/// The system would not have it in one.
const REFUSED: u8 = u8::MAX - 1;

/// How moving a piece into a huge page ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Collapse {
    Done,
    /// Its pages are in use by a read, or memory is short for the moment.
    Busy,
    /// The system will not do it; it is not asked again.
    Refused,
}

impl Slab {
    pub(crate) fn new(bytes: usize, options: SlabOptions, tally: Arc<Tally>) -> Result<Self, HostError> {
        if bytes == 0 || !bytes.is_multiple_of(GRANULE_BYTES) || !bytes.is_multiple_of(super::page_bytes()) {
            return Err(HostError::SlabSize { bytes });
        }
        let map = Mapping::anonymous(bytes).map_err(|source| HostError::Map { bytes, source })?;
        #[cfg(target_os = "linux")]
        if options.huge_pages == HugePages::Always && options.huge_pages.wanted() {
            // Whoever touches a piece first gets a huge page then, the disk included.
            let _ = map.allow_huge(0..bytes);
        }
        let locked = match options.lock.then(|| map.lock()) {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(error)) => Err(error.to_string()),
        };
        let granules = bytes / GRANULE_BYTES;
        let taken = (0..granules.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        let holders = (0..granules).map(|_| AtomicU32::new(0)).collect();
        let pages = (0..bytes / HUGE_BYTES).map(|_| AtomicU8::new(0)).collect();
        tally.mapped_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Self { map, taken, holders, locked, pages, tally })
    }

    /// Where the slab begins: a page boundary. For importing the memory elsewhere (a GPU, a ring of the kernel's).
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.address().as_ptr()
    }

    /// Its length in bytes: a multiple of the page size, never 0.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a slab is never empty")]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether its memory is locked against swapping; or why not, if that was asked for.
    ///
    /// # Errors
    /// What the system said.
    pub fn locked(&self) -> Result<bool, &str> {
        self.locked.as_ref().copied().map_err(String::as_str)
    }

    /// Backs the slab's pages now, with huge ones where the system has them and they are asked for, so that the first
    /// who touches them need not wait. It is as good as done where the system knows no such thing.
    pub fn back(&self, huge: HugePages) {
        let huge = huge.wanted();
        for start in (0..self.len()).step_by(HUGE_BYTES) {
            if self.back_piece(start, huge).is_err() {
                return;
            }
        }
    }

    /// Backs the pages from `start` (a multiple of [`HUGE_BYTES`]) up to the next such multiple or the slab's end.
    #[cfg(target_os = "linux")]
    pub(crate) fn back_piece(&self, start: usize, huge: bool) -> std::io::Result<()> {
        let range = start..(start + HUGE_BYTES).min(self.len());
        let page = self.pages.get(start / HUGE_BYTES).filter(|_| huge);
        let advised = page.is_some() && self.map.allow_huge(range.clone()).is_ok();
        // One fault for all of it is a huge page; pages that somebody has touched before make more of them, or none.
        if self.map.populate(range)? == 1
            && advised
            && let Some(page) = page
        {
            self.note_huge(page);
        }
        Ok(())
    }

    /// Not done on this system.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn back_piece(&self, _start: usize, _huge: bool) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    /// The first piece that may lie in small pages, and that the system has not refused to collapse.
    pub(crate) fn small_piece(&self) -> Option<usize> {
        self.first_piece(0, |state| state <= WORN)
    }

    /// The first piece from `start` on that is [worn](Self::wear).
    pub(crate) fn worn_piece(&self, start: usize) -> Option<usize> {
        self.first_piece(start, |state| state == WORN)
    }

    fn first_piece(&self, start: usize, wanted: impl Fn(u8) -> bool) -> Option<usize> {
        let first = start.div_ceil(HUGE_BYTES);
        let states = self.pages.get(first..)?;
        states.iter().position(|page| wanted(page.load(Ordering::Relaxed))).map(|index| (first + index) * HUGE_BYTES)
    }

    /// Says that a range was read into once more. True if it touches pieces that should rather be huge pages.
    pub(crate) fn wear(&self, range: Range<usize>) -> bool {
        let first = range.start / HUGE_BYTES;
        let pieces = first..range.end.div_ceil(HUGE_BYTES).min(self.pages.len());
        let mut worn = false;
        for (page, piece) in self.pages.get(pieces).unwrap_or_default().iter().zip(first..) {
            let (start, end) = (piece * HUGE_BYTES, (piece + 1) * HUGE_BYTES);
            let wear = (range.end.min(end) - range.start.max(start)).div_ceil(WEAR_BYTES) as u8;
            let before = page.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |state| {
                (state < WORN).then(|| state.saturating_add(wear).min(WORN))
            });
            worn |= before.map_or_else(|state| state == WORN, |state| state.saturating_add(wear) >= WORN);
        }
        worn
    }

    /// Moves the pages of a piece (as above) into a huge one.
    #[cfg(target_os = "linux")]
    pub(crate) fn collapse_piece(&self, start: usize) -> Collapse {
        let Some(page) = self.pages.get(start / HUGE_BYTES) else { return Collapse::Refused };
        let range = start..start + HUGE_BYTES;
        // So that the slab stays one mapping to the kernel, whatever its parts were advised.
        let _ = self.map.allow_huge(range.clone());
        match self.map.collapse(range) {
            Ok(()) => {
                self.note_huge(page);
                Collapse::Done
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => Collapse::Busy,
            Err(_) => {
                page.store(REFUSED, Ordering::Relaxed);
                Collapse::Refused
            }
        }
    }

    /// Not done on this system.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn collapse_piece(&self, start: usize) -> Collapse {
        if let Some(page) = self.pages.get(start / HUGE_BYTES) {
            page.store(REFUSED, Ordering::Relaxed);
        }
        Collapse::Refused
    }

    fn note_huge(&self, page: &AtomicU8) {
        if page.swap(HUGE, Ordering::Relaxed) != HUGE {
            self.tally.huge_bytes.fetch_add(HUGE_BYTES as u64, Ordering::Relaxed);
        }
    }

    /// Claims `bytes` bytes from `offset` on, for writing. Both are multiples of [`GRANULE_BYTES`].
    ///
    /// # Errors
    /// [`HostError::NoRoom`] if they are no such multiples, or not in the slab; [`HostError::InUse`] if any of the
    /// bytes has a holder.
    pub fn claim(self: &Arc<Self>, offset: usize, bytes: usize) -> Result<SlotBuf, HostError> {
        let aligned = offset.is_multiple_of(GRANULE_BYTES) && bytes.is_multiple_of(GRANULE_BYTES) && bytes > 0;
        if !aligned || offset.checked_add(bytes).is_none_or(|end| end > self.len()) {
            return Err(HostError::NoRoom { offset, bytes, slab_bytes: self.len() });
        }
        let granules = offset / GRANULE_BYTES..(offset + bytes) / GRANULE_BYTES;
        if !self.take(granules.clone()) {
            return Err(HostError::InUse { offset, bytes });
        }
        self.holders[granules.start].store(1, Ordering::Relaxed);
        Ok(SlotBuf(Claim { slab: Arc::clone(self), granules }))
    }

    /// Sets the bits of all these granules, or none.
    fn take(&self, granules: Range<usize>) -> bool {
        for (word, mask) in words(granules.clone()) {
            let before = self.taken[word].fetch_or(mask, Ordering::Acquire);
            if before & mask != 0 {
                self.taken[word].fetch_and(!(mask & !before), Ordering::Release);
                self.free(granules.start..(word * BITS).max(granules.start));
                return false;
            }
        }
        true
    }

    fn free(&self, granules: Range<usize>) {
        for (word, mask) in words(granules) {
            self.taken[word].fetch_and(!mask, Ordering::Release);
        }
    }
}

/// The words and masks that a range of bits falls into.
fn words(bits: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let last = if bits.is_empty() { 0 } else { bits.end.div_ceil(BITS) };
    (bits.start / BITS..last).map(move |word| {
        let from = bits.start.saturating_sub(word * BITS);
        let to = (bits.end - word * BITS).min(BITS);
        (word, (u64::MAX >> (BITS - (to - from))) << from)
    })
}

impl Drop for Slab {
    fn drop(&mut self) {
        let huge = self.pages.iter().filter(|page| page.load(Ordering::Relaxed) == HUGE).count();
        self.tally.huge_bytes.fetch_sub((huge * HUGE_BYTES) as u64, Ordering::Relaxed);
        self.tally.mapped_bytes.fetch_sub(self.map.len() as u64, Ordering::Relaxed);
    }
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab").field("bytes", &self.len()).field("locked", &self.locked).finish_non_exhaustive()
    }
}

/// One holder of claimed granules.
struct Claim {
    slab: Arc<Slab>,
    granules: Range<usize>,
}

impl Claim {
    fn address(&self) -> *mut u8 {
        self.slab.as_ptr().wrapping_add(self.offset())
    }

    fn offset(&self) -> usize {
        self.granules.start * GRANULE_BYTES
    }

    fn bytes(&self) -> usize {
        self.granules.len() * GRANULE_BYTES
    }

    fn holders(&self) -> &AtomicU32 {
        &self.slab.holders[self.granules.start]
    }

    fn debug(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(name).field("offset", &self.offset()).field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // AcqRel: what any holder read or wrote happens before the next claim of these granules.
        if self.holders().fetch_sub(1, Ordering::AcqRel) == 1 {
            self.slab.free(self.granules.clone());
        }
    }
}

/// Room in a slab, held by nobody else, for writing. It keeps its slab mapped.
pub struct SlotBuf(Claim);

impl SlotBuf {
    /// Ends the writing: from here on the bytes are only read.
    #[must_use]
    pub fn freeze(self) -> SlotView {
        SlotView(self.0)
    }

    /// Where in its slab it begins.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.0.offset()
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// The slab.
    #[must_use]
    pub fn slab(&self) -> &Arc<Slab> {
        &self.0.slab
    }
}

impl Buffer for SlotBuf {
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the granules lie in the mapping, which the claim keeps alive, and are initialised (anonymous memory
        // is zeroed). This value is their only holder: the bits kept everybody else from claiming them, and a SlotBuf
        // is not cloned. The borrow is exclusive because `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.0.address(), self.0.bytes()) }
    }
}

impl fmt::Debug for SlotBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("SlotBuf", f)
    }
}

/// Room in a slab, for reading. Clones share it; it is free again when the last of them is gone. It keeps its slab
/// mapped.
pub struct SlotView(Claim);

impl SlotView {
    /// The way back to writing.
    ///
    /// # Errors
    /// The view itself, if it has clones.
    pub fn into_buf(self) -> Result<SlotBuf, Self> {
        // Acquire: the reads of clones that are gone happen before the writes to come.
        if self.0.holders().load(Ordering::Acquire) == 1 { Ok(SlotBuf(self.0)) } else { Err(self) }
    }

    /// Where in its slab it begins.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.0.offset()
    }

    /// The slab.
    #[must_use]
    pub fn slab(&self) -> &Arc<Slab> {
        &self.0.slab
    }
}

impl Clone for SlotView {
    fn clone(&self) -> Self {
        if self.0.holders().fetch_add(1, Ordering::Relaxed) > u32::MAX / 2 {
            // As `Arc` does: only a program that forgets views in a loop comes here, and going on would be unsound.
            std::process::abort();
        }
        Self(Claim { slab: Arc::clone(&self.0.slab), granules: self.0.granules.clone() })
    }
}

impl Deref for SlotView {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the granules lie in the mapping, which the claim keeps alive, and are initialised. All holders are
        // views, which only read: a SlotBuf exists only where it is the single holder.
        unsafe { std::slice::from_raw_parts(self.0.address(), self.0.bytes()) }
    }
}

impl fmt::Debug for SlotView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("SlotView", f)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn slab(bytes: usize) -> Arc<Slab> {
        Arc::new(Slab::new(bytes, SlabOptions::default(), Arc::default()).unwrap())
    }

    #[test]
    fn invariant_3_a_slot_is_never_written_while_somebody_reads_it() {
        let slab = slab(1 << 20);
        let view = slab.claim(64 << 10, 512 << 10).unwrap().freeze();
        let other = view.clone();
        for (offset, bytes) in [(64 << 10, 4096), (0, 1 << 20), (572 << 10, 4096), (60 << 10, 8192)] {
            assert!(matches!(slab.claim(offset, bytes), Err(HostError::InUse { .. })), "{offset}");
        }
        // A failed claim leaves nothing behind.
        drop(slab.claim(0, 64 << 10).unwrap());
        drop(slab.claim(576 << 10, 448 << 10).unwrap());
        let view = view.into_buf().unwrap_err();
        drop(other);
        let buf = view.into_buf().unwrap();
        assert!(slab.claim(64 << 10, 4096).is_err());
        drop(buf);
        drop(slab.claim(0, 1 << 20).unwrap());
    }

    #[test]
    fn impossible_room_is_refused() {
        let slab = slab(1 << 20);
        for (offset, bytes) in
            [(0, 0), (1, 4096), (0, 100), (1 << 20, 4096), (usize::MAX - 4095, 8192), (4096, 1 << 20)]
        {
            assert!(matches!(slab.claim(offset, bytes), Err(HostError::NoRoom { .. })), "{offset} {bytes}");
        }
        for bytes in [0, 4095, 1] {
            assert!(matches!(
                Slab::new(bytes, SlabOptions::default(), Arc::default()),
                Err(HostError::SlabSize { .. })
            ));
        }
    }

    #[test]
    fn masks_cover_each_bit_once() {
        for range in [0..0, 0..1, 63..65, 64..128, 5..300, 64..64, 128..129] {
            let mut bits = Vec::new();
            for (word, mask) in words(range.clone()) {
                bits.extend((0..BITS).filter(|bit| mask >> bit & 1 == 1).map(|bit| word * BITS + bit));
            }
            assert_eq!(bits, range.collect::<Vec<_>>());
        }
    }

    #[test]
    fn claims_race_without_overlap() {
        let slab = slab(1 << 20);
        let won: usize = std::thread::scope(|scope| {
            let race = |seed: usize| {
                let slab = &slab;
                move || {
                    let (mut won, mut at) = (0, seed);
                    for _ in 0..20_000 {
                        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let (offset, granules) = ((at >> 33) % 250, 1 + (at >> 50) % 6);
                        if let Ok(mut buf) = slab.claim(offset * GRANULE_BYTES, granules * GRANULE_BYTES) {
                            won += 1;
                            buf.bytes_mut()[0] = seed as u8;
                            let view = buf.freeze();
                            let clone = view.clone();
                            drop(view);
                            assert_eq!(clone[0], seed as u8);
                        }
                    }
                    won
                }
            };
            let threads: Vec<_> = (1..=3).map(|seed| scope.spawn(race(seed))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert!(won > 0);
        drop(slab.claim(0, 1 << 20).unwrap());
    }
}
