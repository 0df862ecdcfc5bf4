//! VRAM slabs: large buffers, made when their first slot is needed and given back whole.

use crate::context::GpuContext;
use crate::error::GpuError;
use parking_lot::Mutex;
use std::sync::{Arc, Weak};

/// Bytes of a slab unless the adapter's limits or the caller say less.
pub const DEFAULT_SLAB_BYTES: u64 = 64 << 20;

/// Copies move whole words, so a slab has room for the padding of its last one.
const USAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_DST).union(wgpu::BufferUsages::COPY_SRC);

/// A stretch of a buffer. Keeps the buffer alive.
#[derive(Clone, Debug)]
pub struct GpuSlice {
    /// The buffer.
    pub buffer: Arc<wgpu::Buffer>,
    /// Where the stretch begins, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// The slabs of one GPU, numbered from 0.
#[derive(Debug)]
pub struct VramSlabs {
    context: GpuContext,
    slab_bytes: u64,
    slabs: Mutex<Slabs>,
}

#[derive(Debug, Default)]
struct Slabs {
    backed: Vec<Option<Arc<wgpu::Buffer>>>,
    /// Given back, but perhaps still held by a lease.
    released: Vec<Weak<wgpu::Buffer>>,
}

impl VramSlabs {
    /// Slabs of `slab_bytes`, cut down to what one binding can show (a multiple of 256). Backs nothing yet.
    #[must_use]
    pub fn new(context: &GpuContext, slab_bytes: u64) -> Self {
        let slab_bytes = slab_bytes.next_multiple_of(256).clamp(256, context.binding_bytes_max());
        Self { context: context.clone(), slab_bytes, slabs: Mutex::default() }
    }

    /// Bytes of each slab.
    #[must_use]
    pub fn slab_bytes(&self) -> u64 {
        self.slab_bytes
    }

    /// The slab's buffer, made now if need be. Its content is zero at first.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], [`GpuError::DeviceLost`].
    pub fn ensure(&self, index: u32) -> Result<Arc<wgpu::Buffer>, GpuError> {
        let index = index as usize;
        let mut slabs = self.slabs.lock();
        if let Some(Some(buffer)) = slabs.backed.get(index) {
            return Ok(Arc::clone(buffer));
        }
        let label = format!("VRAM slab {index}");
        let buffer = Arc::new(self.context.buffer(&label, self.slab_bytes, USAGE)?);
        if slabs.backed.len() <= index {
            slabs.backed.resize(index + 1, None);
        }
        slabs.backed[index] = Some(Arc::clone(&buffer));
        Ok(buffer)
    }

    /// The slab's buffer if it is backed.
    #[must_use]
    pub fn get(&self, index: u32) -> Option<Arc<wgpu::Buffer>> {
        self.slabs.lock().backed.get(index as usize).cloned().flatten()
    }

    /// Gives the slab back. Its memory is free when nobody holds its buffer and the GPU is done with it; until then
    /// [`Self::backed_bytes`] counts it.
    pub fn release(&self, index: u32) {
        let mut slabs = self.slabs.lock();
        slabs.released.retain(|slab| slab.strong_count() > 0);
        if let Some(buffer) = slabs.backed.get_mut(index as usize).and_then(Option::take) {
            slabs.released.push(Arc::downgrade(&buffer));
        }
    }

    /// Bytes of the slabs that exist: backed, or given back and still held by someone.
    #[must_use]
    pub fn backed_bytes(&self) -> u64 {
        let mut slabs = self.slabs.lock();
        slabs.released.retain(|slab| slab.strong_count() > 0);
        (slabs.backed.iter().flatten().count() + slabs.released.len()) as u64 * self.slab_bytes
    }
}
