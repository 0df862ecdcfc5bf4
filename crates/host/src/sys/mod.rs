//! The unsafe part of the host tier: mappings, claims on them, and system calls that Rust has no safe name for.

mod aligned;
mod map;
mod os;
mod slab;

pub use aligned::AlignedBuf;
pub(crate) use slab::Collapse;
pub use slab::{Slab, SlotBuf, SlotView};

#[cfg(unix)]
pub(crate) use os::{memlock_limit_bytes, peak_resident_bytes};
pub(crate) use os::{page_bytes, physical_bytes};
