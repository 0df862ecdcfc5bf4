//! A buffer on the heap that begins on a page, for reads that are not made for a slot.

use crate::{GRANULE_BYTES, HostError};
use overspill_core::seam::Buffer;
use std::alloc::Layout;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Zeroed bytes that begin on a multiple of [`GRANULE_BYTES`], so that a disk can write them directly.
pub struct AlignedBuf {
    address: NonNull<u8>,
    layout: Layout,
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
            return Ok(Self { address: NonNull::<u8>::dangling(), layout });
        }
        // SAFETY: the layout's size is not 0.
        let address = unsafe { std::alloc::alloc_zeroed(layout) };
        NonNull::new(address).map(|address| Self { address, layout }).ok_or_else(no_memory)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: allocated in `new` with this layout, freed once.
            unsafe { std::alloc::dealloc(self.address.as_ptr(), self.layout) };
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: initialised (zeroed) memory of this length, owned by this value and borrowed with it.
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
