//! The GPU tier's body: slabs in VRAM, uploads into them, and leases that end with the GPU's work.

use crate::driver::{Driver, UnderWay};
use crate::error::Error;
use crate::events::Event as Told;
use crate::lease::{Lease, LeaseSet};
use crate::shared::{Held, Note, Shared};
use overspill_core::{BlockId, Catalog, Event, SlotId, TierId, TransferId};
use overspill_gpu::{GpuContext, GpuError, Poller, RingConfig, RingPath, Upload, Uploader, VramSlabs};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use overspill_gpu::GpuSlice;

/// The GPUs of an engine: today one, or none.
#[derive(Debug, Default)]
pub(crate) struct Gpus(Option<Gpu>);

#[derive(Debug)]
struct Gpu {
    tier: TierId,
    slabs: VramSlabs,
    slots_per_slab: u32,
    // Dropped in this order: no upload is begun any more, then what was begun completes.
    uploader: Uploader,
    _poller: Poller,
}

/// Memory of a GPU that `Budget::Auto` takes: what its driver reports, less a reserve for other programs.
pub(crate) fn free_bytes(gpu: &GpuContext) -> u64 {
    let memory = gpu.memory_bytes();
    memory - memory / 8
}

/// Slots of a VRAM slab.
pub(crate) fn slots_per_slab(gpu: &GpuContext, catalog: &Catalog, budget_bytes: u64) -> Result<u32, Error> {
    let slab_bytes_max = overspill_gpu::DEFAULT_SLAB_BYTES.min(gpu.binding_bytes_max());
    let slots = crate::builder::slots_per_slab(catalog, budget_bytes, slab_bytes_max);
    let slots = least_left_over(slots, budget_bytes / catalog.slot_bytes(), crate::builder::largest_run(catalog));
    if u64::from(slots) * catalog.slot_bytes() > gpu.binding_bytes_max() {
        return Err(Error::Device(format!(
            "{} binds at most {} bytes at once, less than the largest block of this model: use --device cpu",
            gpu.info.name,
            gpu.binding_bytes_max()
        )));
    }
    Ok(slots)
}

/// Slots of a slab, at most `slots` and not much fewer, of which a budget of `total` slots has whole slabs with the
/// fewest left over: what is left over cannot be used. At least `least`.
fn least_left_over(slots: u32, total: u64, least: u32) -> u32 {
    let from = (slots - slots / 4).max(least).min(slots);
    (from..=slots).rev().min_by_key(|&slots| total % u64::from(slots.max(1))).unwrap_or(slots)
}

pub(crate) fn device_error(error: &GpuError) -> Error {
    Error::Device(error.to_string())
}

impl Gpus {
    pub(crate) fn start(
        context: Option<&Arc<GpuContext>>,
        shared: &Arc<Shared>,
        catalog: &Catalog,
        slots_per_slab: u32,
    ) -> Result<Self, Error> {
        let Some(context) = context else { return Ok(Self(None)) };
        let poller = Poller::new(context).map_err(|e| device_error(&e))?;
        let path = RingPath::new(context, &poller.completion(), RingConfig::default()).map_err(|e| device_error(&e))?;
        let mail = Arc::downgrade(shared);
        let sink = Arc::new(move |transfer: TransferId, result: Result<(), GpuError>| {
            if let Some(shared) = mail.upgrade() {
                shared.mailbox.post(Note::Uploaded { transfer, result }, true);
            }
        });
        let uploader = Uploader::new(Box::new(path), sink).map_err(|e| device_error(&e))?;
        let _ = shared.completion.set(poller.completion());
        let slabs = VramSlabs::new(context, u64::from(slots_per_slab) * catalog.slot_bytes());
        Ok(Self(Some(Gpu { tier: TierId(0), slabs, slots_per_slab, uploader, _poller: poller })))
    }

    pub(crate) fn release_slab(&self, tier: TierId, slab: u32) {
        if let Some(gpu) = self.0.as_ref().filter(|gpu| gpu.tier == tier) {
            gpu.slabs.release(slab);
        }
    }

    pub(crate) fn cancel(&self, transfer: TransferId) {
        if let Some(gpu) = &self.0 {
            gpu.uploader.cancel(transfer);
        }
    }

    /// Ends all uploads.
    pub(crate) fn close(&mut self) {
        self.0 = None;
    }
}

impl Driver {
    pub(crate) fn start_upload(
        &mut self,
        transfer: TransferId,
        block: BlockId,
        from: TierId,
        to: TierId,
        slot: SlotId,
    ) {
        let from_ns = self.shared.now();
        self.under_way.insert(transfer, UnderWay { tier: to, block, from_ns, speculative: false, again: false });
        self.bus_busy.begin(from_ns);
        tracing::trace!(block = block.0, tier = to.0, "uploading");
        if let Err(error) = self.try_upload(transfer, block, from, slot) {
            self.shared.remember_failure(block, error);
            self.under_way.remove(&transfer);
            self.bus_busy.end(self.shared.now(), &self.shared.bus.busy_ns);
            self.brain.handle(Event::TransferFailed { transfer, cancelled: false }, self.shared.now());
        }
    }

    fn try_upload(&mut self, transfer: TransferId, block: BlockId, from: TierId, slot: SlotId) -> Result<(), Error> {
        let gone = || Error::Device("an upload was asked for without a GPU".into());
        let gpu = self.gpus.0.as_ref().ok_or_else(gone)?;
        let source = self.shared.cell(from, block).and_then(|cell| cell.held.read().clone());
        let Some(Held::Host(view)) = source else { return Err(gone()) };
        let slice = gpu_slot(gpu, &self.shared.catalog, block, slot).map_err(|e| device_error(&e))?;
        gpu.uploader.submit(Upload {
            id: transfer,
            source: Box::new(HostBytes(view)),
            source_offset: overspill_gpu::payload_shift(&self.shared.catalog, block) as usize,
            dst: Arc::clone(&slice.buffer),
            dst_offset: slice.offset,
            len: overspill_gpu::payload_bytes(&self.shared.catalog, block) as usize,
        });
        Ok(())
    }

    pub(crate) fn upload_ended(&mut self, transfer: TransferId, result: Result<(), GpuError>) {
        let Some(UnderWay { tier, block, from_ns, .. }) = self.under_way.remove(&transfer) else { return };
        let slice = match (result, self.gpus.0.as_ref(), self.brain.slot(tier, block)) {
            (Ok(()), Some(gpu), Some(slot)) => gpu_slot(gpu, &self.shared.catalog, block, slot),
            (Err(error), ..) => Err(error),
            _ => Err(GpuError::Closed),
        };
        let now = self.shared.now();
        self.bus_busy.end(now, &self.shared.bus.busy_ns);
        let event = match slice {
            Ok(slice) => {
                let bytes = overspill_gpu::payload_bytes(&self.shared.catalog, block);
                self.shared.bus.uploaded_bytes.fetch_add(bytes, Ordering::Relaxed);
                self.shared.bus.uploads.fetch_add(1, Ordering::Relaxed);
                self.shared.tell(|| Told::Uploaded { from_ns, at_ns: now, block, tier });
                self.publish(tier, block, Held::Gpu(slice));
                Event::TransferDone { transfer }
            }
            Err(error) => {
                let cancelled = matches!(error, GpuError::Cancelled);
                if !cancelled {
                    tracing::warn!(%error, block = block.0, "an upload failed");
                    self.shared.remember_failure(block, device_error(&error));
                }
                Event::TransferFailed { transfer, cancelled }
            }
        };
        self.tell(event);
    }
}

fn gpu_slot(gpu: &Gpu, catalog: &Catalog, block: BlockId, slot: SlotId) -> Result<GpuSlice, GpuError> {
    let buffer = gpu.slabs.ensure(slot.0 / gpu.slots_per_slab)?;
    let offset = u64::from(slot.0 % gpu.slots_per_slab) * catalog.slot_bytes();
    let bytes = u64::from(catalog.blocks()[block.index()].slots) * catalog.slot_bytes();
    Ok(GpuSlice { buffer, offset, bytes })
}

/// Bytes of a host slot, owned by an upload until they have been copied.
struct HostBytes(overspill_host::SlotView);

impl AsRef<[u8]> for HostBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Lease {
    /// Ends the lease when the GPU has done all that was submitted up to `submission`, and not before. Returns at once.
    pub fn release_after(self, submission: overspill_gpu::wgpu::SubmissionIndex) {
        let completion = self.shared().completion.get().cloned();
        match completion {
            Some(completion) => completion.after(submission, move |_| drop(self)),
            None => drop(self),
        }
    }
}

impl LeaseSet {
    /// Ends the leases when the GPU has done all that was submitted up to `submission`, and not before. Returns at
    /// once.
    pub fn release_after(self, submission: overspill_gpu::wgpu::SubmissionIndex) {
        let completion = self.shared().completion.get().cloned();
        match completion {
            Some(completion) => completion.after(submission, move |_| drop(self)),
            None => drop(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::least_left_over;

    #[test]
    fn slabs_fill_a_budget() {
        assert_eq!(least_left_over(63, 1000, 1), 50);
        assert_eq!(least_left_over(64, 1024, 1), 64, "of those that fill it, the largest");
        assert_eq!(least_left_over(1, 7, 1), 1);
        assert_eq!(least_left_over(8, 17, 8), 8, "a run of slots has to fit");
    }
}
