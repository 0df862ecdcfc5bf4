//! A buffer that begins on a page, for reads that are not made for a slot.

use super::map::Mapping;
use crate::{GRANULE_BYTES, HUGE_BYTES, HostError};
use overspill_core::seam::Buffer;
use std::alloc::Layout;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Zeroed bytes that begin on a multiple of [`GRANULE_BYTES`], so that a disk can write them directly. Buffers of 2 MiB and
/// more lie in huge pages where the system has them, as slabs do.
pub struct AlignedBuf {
    address: NonNull<u8>,
    layout: Layout,
    /// What holds the bytes, if it is not the heap.
    map: Option<Mapping>,
}

// SAFETY: plain memory owned by this value.
unsafe impl Send for AlignedBuf {}
// SAFETY: a shared reference gives shared access to the bytes only.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// Allocates `len` zeroed bytes.
    ///
    /// # Errors
    /// [`HostError::Map`] if there is no such memory.
    pub fn new(len: usize) -> Result<Self, HostError> {
        let no_memory = || HostError::Map { bytes: len, source: std::io::ErrorKind::OutOfMemory.into() };
        let layout = Layout::from_size_align(len, GRANULE_BYTES).map_err(|_| no_memory())?;
        if len == 0 {
            return Ok(Self { address: NonNull::<u8>::dangling(), layout, map: None });
        }
        if len >= HUGE_BYTES && len.is_multiple_of(super::page_bytes()) {
            let map = Mapping::anonymous(len).map_err(|source| HostError::Map { bytes: len, source })?;
            #[cfg(target_os = "linux")]
            if crate::limits::huge_pages_allowed() {
                let _ = map.allow_huge(0..len);
            }
            return Ok(Self { address: map.address(), layout, map: Some(map) });
        }
        // SAFETY: the layout's size is not 0.
        let address = unsafe { std::alloc::alloc_zeroed(layout) };
        NonNull::new(address).map(|address| Self { address, layout, map: None }).ok_or_else(no_memory)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.layout.size() > 0 && self.map.is_none() {
            // SAFETY: allocated in `new` with this layout, freed once.
            unsafe { std::alloc::dealloc(self.address.as_ptr(), self.layout) };
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: initialised (zeroed) memory of this length, owned by this value (or its mapping) and borrowed with it.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the borrow is exclusive because `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.layout.size()) }
    }
}

impl Buffer for AlignedBuf {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlignedBuf").field("bytes", &self.layout.size()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn buffers_of_every_size_are_zero_aligned_and_their_own() {
        for len in [1, 4096, 5000, HUGE_BYTES, HUGE_BYTES + 1, HUGE_BYTES + 4096] {
            let (mut one, other) = (AlignedBuf::new(len).unwrap(), AlignedBuf::new(len).unwrap());
            assert!(
                one.len() == len && one.as_ptr().addr().is_multiple_of(GRANULE_BYTES) && one.iter().all(|&b| b == 0)
            );
            one.fill(7);
            assert!(other.iter().all(|&b| b == 0) && one.iter().all(|&b| b == 7));
        }
        assert!(AlignedBuf::new(0).unwrap().is_empty());
    }
}
