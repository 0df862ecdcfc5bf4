//! The pool of slabs: which exist, by number. Which slot of which slab holds what is the brain's business.

use crate::sys::{Slab, SlotBuf};
use crate::{GRANULE_BYTES, HostError};
use parking_lot::RwLock;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A pool has at most this many slabs: 64 TiB of the default size.
const SLABS_MAX: usize = 1 << 20;

/// Whether slabs lie in huge pages (2 MiB).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Where the system allows them (`transparent_hugepage/enabled` is not `never`) and has them: before the first read
    /// as far as that does not hold it up, else later, when nothing is read. Linux only.
    #[default]
    Auto,
    /// Asked for whenever memory is first touched, however long it takes: the first pass over the weights may be slower,
    /// every later one is faster. For programs that run long. Linux only.
    Always,
    /// Never asked for.
    Off,
}

impl HugePages {
    /// Whether they are asked for, and the system allows it.
    #[must_use]
    pub(crate) fn wanted(self) -> bool {
        self != Self::Off && crate::limits::huge_pages_allowed()
    }
}

/// How slabs are mapped. Default: not locked, huge pages where they are to be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlabOptions {
    /// Lock the memory against swapping. If the system refuses, slabs stay unlocked and
    /// [`SlabPool::lock_refusal`] says why.
    pub lock: bool,
    /// Huge pages; a [`crate::Backing`] brings them.
    pub huge_pages: HugePages,
}

/// What a pool's slabs amount to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) mapped_bytes: AtomicU64,
    pub(crate) huge_bytes: AtomicU64,
}

/// Slabs of one size, numbered from 0, each mapped when it is first wanted.
#[derive(Debug)]
pub struct SlabPool {
    slab_bytes: usize,
    options: SlabOptions,
    slabs: RwLock<Vec<Option<Arc<Slab>>>>,
    tally: Arc<Tally>,
    lock_refusal: RwLock<Option<String>>,
}

impl SlabPool {
    /// An empty pool of slabs of `slab_bytes` bytes: a multiple of the page size and of [`GRANULE_BYTES`].
    ///
    /// # Errors
    /// [`HostError::SlabSize`] if it is no such multiple, or 0.
    pub fn new(slab_bytes: usize, options: SlabOptions) -> Result<Self, HostError> {
        let unit = GRANULE_BYTES.max(crate::sys::page_bytes());
        if slab_bytes == 0 || !slab_bytes.is_multiple_of(unit) || isize::try_from(slab_bytes).is_err() {
            return Err(HostError::SlabSize { bytes: slab_bytes });
        }
        Ok(Self {
            slab_bytes,
            options,
            slabs: RwLock::default(),
            tally: Arc::default(),
            lock_refusal: RwLock::default(),
        })
    }

    /// Bytes of one slab.
    #[must_use]
    pub fn slab_bytes(&self) -> usize {
        self.slab_bytes
    }

    /// A slab, mapped now if it was not.
    ///
    /// # Errors
    /// [`HostError::Map`] if the system has no memory for it; [`HostError::SlabIndex`] if no machine has.
    pub fn ensure(&self, index: usize) -> Result<Arc<Slab>, HostError> {
        if let Some(slab) = self.get(index) {
            return Ok(slab);
        }
        if index >= SLABS_MAX {
            return Err(HostError::SlabIndex { index });
        }
        let mut slabs = self.slabs.write();
        if slabs.len() <= index {
            slabs.resize(index + 1, None);
        }
        if let Some(slab) = &slabs[index] {
            return Ok(Arc::clone(slab));
        }
        let slab = Arc::new(Slab::new(self.slab_bytes, self.options, Arc::clone(&self.tally))?);
        if let Err(refusal) = slab.locked() {
            self.lock_refusal.write().get_or_insert_with(|| lock_refusal_text(refusal));
        }
        slabs[index] = Some(Arc::clone(&slab));
        Ok(slab)
    }

    /// A slab, if it is mapped.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Arc<Slab>> {
        self.slabs.read().get(index)?.clone()
    }

    /// Room in a slab for writing; the slab is mapped if it was not.
    ///
    /// # Errors
    /// Those of [`Self::ensure`] and of [`Slab::claim`].
    pub fn slot_buf(&self, index: usize, offset: usize, bytes: usize) -> Result<SlotBuf, HostError> {
        self.ensure(index)?.claim(offset, bytes)
    }

    /// Lets go of a slab. Its memory goes back when the last view, buffer or other user of it is gone; a later
    /// [`Self::ensure`] maps a new one.
    pub fn release(&self, index: usize) {
        // Unmapped outside of the lock: giving back 64 MiB takes a while.
        let slab = self.slabs.write().get_mut(index).and_then(Option::take);
        drop(slab);
    }

    /// Bytes of the slabs that exist, released ones included while somebody still uses them.
    #[must_use]
    pub fn backed_bytes(&self) -> u64 {
        self.tally.mapped_bytes.load(Ordering::Relaxed)
    }

    /// Of these, bytes that lie in huge pages, as far as is known: pages that the system has split or merged by itself
    /// are not noticed.
    #[must_use]
    pub fn huge_bytes(&self) -> u64 {
        self.tally.huge_bytes.load(Ordering::Relaxed)
    }

    /// How slabs are mapped.
    #[must_use]
    pub fn options(&self) -> SlabOptions {
        self.options
    }

    /// Why memory is not locked although it was to be, with the cure.
    #[must_use]
    pub fn lock_refusal(&self) -> Option<String> {
        self.lock_refusal.read().clone()
    }
}

fn lock_refusal_text(error: &str) -> String {
    let limit = match crate::limits::memlock_bytes() {
        Some(bytes) => format!("the limit is {bytes} bytes"),
        None => "though no limit is set".to_owned(),
    };
    format!("memory is not locked ({error}; {limit}): raise it with `ulimit -l`, or run without locking")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use overspill_core::seam::Buffer;

    #[test]
    fn a_released_slab_goes_back_with_its_last_user() {
        let pool = SlabPool::new(1 << 20, SlabOptions::default()).unwrap();
        assert!(pool.get(3).is_none());
        let mut slot = pool.slot_buf(3, 4096, 4096).unwrap();
        assert!(Arc::ptr_eq(slot.slab(), &pool.ensure(3).unwrap()));
        slot.bytes_mut().fill(7);
        let view = slot.freeze();
        pool.release(3);
        pool.release(99);
        assert!(pool.get(3).is_none());
        assert_eq!((view[0], view.len(), pool.backed_bytes()), (7, 4096, 1 << 20));
        drop(view);
        assert_eq!(pool.backed_bytes(), 0);
        assert_eq!(pool.slot_buf(3, 4096, 4096).unwrap().bytes_mut()[0], 0, "a new slab is zero");
    }

    #[test]
    fn a_view_outlives_its_pool() {
        let pool = SlabPool::new(1 << 20, SlabOptions::default()).unwrap();
        let mut slot = pool.slot_buf(0, 0, 4096).unwrap();
        slot.bytes_mut().fill(9);
        let view = slot.freeze();
        drop(pool);
        assert!(std::thread::spawn(move || view.iter().all(|&b| b == 9)).join().unwrap());
    }

    #[test]
    fn slabs_begin_where_a_huge_page_can_and_hold_their_bytes() {
        let pool = SlabPool::new(4 << 20, SlabOptions::default()).unwrap();
        let slab = pool.ensure(0).unwrap();
        assert_eq!(slab.as_ptr().addr() % GRANULE_BYTES, 0);
        #[cfg(target_os = "linux")]
        assert_eq!(slab.as_ptr().addr() % (2 << 20), 0);
        let mut all = slab.claim(0, 4 << 20).unwrap();
        all.bytes_mut().fill(1);
        assert_eq!(all.freeze().iter().map(|&b| usize::from(b)).sum::<usize>(), 4 << 20);
    }

    #[test]
    fn locking_is_done_or_its_refusal_is_told() {
        let pool = SlabPool::new(64 << 10, SlabOptions { lock: true, ..SlabOptions::default() }).unwrap();
        match pool.ensure(0).unwrap().locked() {
            Ok(locked) => assert!(locked && pool.lock_refusal().is_none()),
            Err(_) => assert!(pool.lock_refusal().unwrap().contains("ulimit -l")),
        }
    }

    #[test]
    fn impossible_pools_and_slabs_are_refused() {
        assert!(SlabPool::new(0, SlabOptions::default()).is_err());
        assert!(SlabPool::new(4097, SlabOptions::default()).is_err());
        let pool = SlabPool::new(1 << 20, SlabOptions::default()).unwrap();
        assert!(matches!(pool.ensure(usize::MAX), Err(HostError::SlabIndex { .. })));
        let vast = SlabPool::new(1 << 62, SlabOptions::default()).unwrap();
        let error = vast.ensure(0).unwrap_err();
        assert!(matches!(error, HostError::Map { .. }) && error.to_string().contains("--ram"));
    }
}
