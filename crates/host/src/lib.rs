//! The host RAM tier of overspill: page-aligned anonymous memory in slabs, and what the system lets us have of it.
//!
//! A [`SlabPool`] maps slabs (64 MiB by default) on first use and gives each back when its last user is gone. Room in
//! a slab is claimed, not taken on trust: a [`SlotBuf`] is the only way to write, a [`SlotView`] the only way to read,
//! and the two never overlap. A claim costs a few atomic operations and no allocation.
//!
//! A slab's pages come from the system when they are first touched, which takes as long as reading them from a fast
//! disk. [`Backing`] is a thread that does it ahead of the reader, with huge pages where they can be had cheaply.
//!
//! This crate decides nothing: which block lies where, and when a slab goes back, is the brain's business.
//!
//! ```
//! use overspill_core::seam::Buffer;
//! use overspill_host::{SlabOptions, SlabPool};
//!
//! let pool = SlabPool::new(1 << 20, SlabOptions::default())?;
//! let slab = pool.ensure(0)?;
//! let mut slot = slab.claim(8192, 4096)?;
//! slot.bytes_mut()[..3].copy_from_slice(b"abc");
//! assert!(slab.claim(4096, 8192).is_err(), "those bytes are being written");
//! let view = slot.freeze();
//! assert_eq!(&view[..3], b"abc");
//! # Ok::<(), overspill_host::HostError>(())
//! ```

mod backing;
pub mod limits;
mod pool;
mod sys;

pub use backing::Backing;
pub use pool::{HugePages, SlabOptions, SlabPool};
pub use sys::{AlignedBuf, Slab, SlotBuf, SlotView};

/// Size of the slabs that budgets are given out and taken back in, unless the caller wants another.
pub const SLAB_BYTES_DEFAULT: usize = 64 << 20;

/// Size of a huge page, on every platform that has them under a transparent name.
pub(crate) const HUGE_BYTES: usize = 2 << 20;

/// Claims begin and end on multiples of this, and slabs on pages of at least this size.
pub const GRANULE_BYTES: usize = overspill_core::catalog::ALIGN_BYTES as usize;

/// Why host memory could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The system has no such memory.
    #[error(
        "the system gave no {bytes} bytes of host memory ({source}): lower --ram, or raise the memory limit (ulimit -v, \
         the container's or cgroup's)"
    )]
    Map {
        /// How much was asked for.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A slab of a size that is no multiple of [`GRANULE_BYTES`], or none at all.
    #[error("slabs of {bytes} bytes are impossible: the size must be a multiple of {GRANULE_BYTES}, and not 0")]
    SlabSize {
        /// The size.
        bytes: usize,
    },
    /// A slab number that no machine has the memory for.
    #[error("slab {index} is beyond the last possible one")]
    SlabIndex {
        /// The number.
        index: usize,
    },
    /// Room outside of the slab, or not on granules.
    #[error("bytes {offset}..+{bytes} are no room in a slab of {slab_bytes} bytes (multiples of {GRANULE_BYTES} only)")]
    NoRoom {
        /// Where it would begin.
        offset: usize,
        /// How long it would be.
        bytes: usize,
        /// The slab's size.
        slab_bytes: usize,
    },
    /// Somebody still reads or writes there. It is a mistake in the caller's bookkeeping, noticed before it did harm.
    #[error("bytes {offset}..+{bytes} of the slab are still in use")]
    InUse {
        /// Where.
        offset: usize,
        /// How much.
        bytes: usize,
    },
}
