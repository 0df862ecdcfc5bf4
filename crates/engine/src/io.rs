//! Reads of blocks: a block of one part is read straight into its slot; a bundle is gathered from its parts through
//! bounce buffers, since parts lie anywhere in the files.

use crate::shared::Shared;
use overspill_core::catalog::ALIGN_BYTES;
use overspill_core::seam::{Buffer, Completion, Read, ReadFault, Storage};
use overspill_core::{BlockId, Catalog, FileId, TransferId};
use overspill_host::{AlignedBuf, HostError, SlotBuf};
use overspill_nvme::{FileSet, IoChoice, NvmeError, Probe, Sink, StorageOptions, open_storage};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Where a read's bytes go.
#[doc(hidden)]
pub enum IoBuf {
    /// A slot.
    Slot(SlotBuf),
    /// Memory on the way to a slot.
    Bounce(AlignedBuf),
}

impl Buffer for IoBuf {
    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Slot(slot) => slot.bytes_mut(),
            Self::Bounce(buffer) => buffer.bytes_mut(),
        }
    }
}

/// Makes the engine's reader, given where its completions go.
#[doc(hidden)]
pub type MakeStorage<'a> = Box<dyn FnOnce(Sink<IoBuf>) -> Result<Opened, NvmeError> + 'a>;
/// A reader of blocks.
#[doc(hidden)]
pub type Opened = Box<dyn Storage<IoBuf>>;

/// Puts something around the engine's reader: a wire of known speed, a count, faults.
#[derive(Clone)]
pub(crate) struct Decorator(pub(crate) Arc<Decorate>);

pub(crate) type Decorate = dyn Fn(Sink<IoBuf>, MakeStorage<'_>) -> Result<Opened, NvmeError> + Send + Sync;

impl std::fmt::Debug for Decorator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decorator").finish_non_exhaustive()
    }
}

/// Opens the reader of blocks, with what belongs around it.
pub(crate) fn open_decorated(
    decorator: Option<&Decorator>,
    io: IoChoice,
    files: &Arc<FileSet>,
    options: &StorageOptions,
    sink: Sink<IoBuf>,
) -> Result<(Opened, Probe), NvmeError> {
    let Some(decorator) = decorator else { return open_storage(io, Arc::clone(files), options, sink) };
    let mut probe = None;
    let make = Box::new(|sink: Sink<IoBuf>| {
        let (storage, found) = open_storage(io, Arc::clone(files), options, sink)?;
        probe = Some(found);
        Ok(storage)
    });
    let storage = (decorator.0)(sink, make)?;
    let none = || NvmeError::Resources { what: "reader", source: std::io::Error::other("the decorator made none") };
    Ok((storage, probe.ok_or_else(none)?))
}

/// Ids of partial reads have this bit; the brain's never do.
const PARTIAL: u64 = 1 << 63;

/// A bundle that is being gathered.
struct Bundle {
    slot: SlotBuf,
    pending: usize,
    failed: Option<Failure>,
}

/// A part of a bundle that is being read.
struct Partial {
    transfer: TransferId,
    block: BlockId,
    part: usize,
}

/// Bounce buffers to be used again, so that a bundle that streams allocates nothing.
#[derive(Default)]
struct Bounces {
    buffers: Vec<AlignedBuf>,
    bytes: usize,
}

/// Bytes of bounce buffers kept.
const BOUNCES_BYTES_MAX: usize = 2 << 20;

impl Bounces {
    /// A buffer of `len` bytes or more: the smallest that will do.
    fn take(&mut self, len: usize) -> Result<AlignedBuf, HostError> {
        let fitting = self.buffers.iter().enumerate().filter(|(_, buffer)| buffer.len() >= len);
        match fitting.min_by_key(|(_, buffer)| buffer.len()).map(|(index, _)| index) {
            Some(index) => {
                let buffer = self.buffers.swap_remove(index);
                self.bytes -= buffer.len();
                Ok(buffer)
            }
            None => AlignedBuf::new(len),
        }
    }

    fn give_back(&mut self, buffer: AlignedBuf) {
        if self.bytes + buffer.len() <= BOUNCES_BYTES_MAX {
            self.bytes += buffer.len();
            self.buffers.push(buffer);
        }
    }
}

/// Why a block did not come.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) part: usize,
    pub(crate) fault: ReadFault,
}

/// A block's read has ended.
pub(crate) struct Finished {
    pub(crate) transfer: TransferId,
    pub(crate) result: Result<SlotBuf, Failure>,
    /// Bytes that crossed the wire.
    pub(crate) bytes: u64,
}

/// Turns blocks into reads and completions into blocks. Used by the driver only.
pub(crate) struct BlockReader {
    catalog: Arc<Catalog>,
    shared: Arc<Shared>,
    storage: Box<dyn Storage<IoBuf>>,
    batch: Vec<Read<IoBuf>>,
    singles: HashMap<TransferId, BlockId>,
    bundles: HashMap<TransferId, Bundle>,
    partials: HashMap<u64, Partial>,
    next_partial: u64,
    bounces: Bounces,
    /// Those of one bundle while it is prepared; empty in between.
    taken: Vec<AlignedBuf>,
}

impl BlockReader {
    /// With room for about so many reads in flight.
    pub(crate) fn new(
        catalog: Arc<Catalog>,
        shared: Arc<Shared>,
        storage: Box<dyn Storage<IoBuf>>,
        in_flight: usize,
    ) -> Self {
        Self {
            catalog,
            shared,
            storage,
            batch: Vec::with_capacity(in_flight),
            singles: HashMap::with_capacity(2 * in_flight),
            bundles: HashMap::new(),
            partials: HashMap::new(),
            next_partial: 0,
            bounces: Bounces::default(),
            taken: Vec::new(),
        }
    }

    /// Prepares the read of a block into its slot; [`Self::submit`] sends it.
    ///
    /// # Errors
    /// If there is no memory for a bounce buffer.
    pub(crate) fn read(&mut self, transfer: TransferId, block: BlockId, slot: SlotBuf) -> Result<(), HostError> {
        if self.catalog.is_single(block) {
            let part = self.catalog.parts(block)[0];
            self.singles.insert(transfer, block);
            self.push(transfer, part.file, part.file_offset, part.bytes, IoBuf::Slot(slot));
            return Ok(());
        }
        let catalog = Arc::clone(&self.catalog);
        let parts = catalog.parts(block);
        for part in parts {
            match self.bounces.take(aligned_len(part.file_offset, part.bytes)) {
                Ok(buffer) => self.taken.push(buffer),
                Err(error) => {
                    self.taken.drain(..).for_each(|buffer| self.bounces.give_back(buffer));
                    return Err(error);
                }
            }
        }
        let mut taken = std::mem::take(&mut self.taken);
        self.bundles.insert(transfer, Bundle { slot, pending: parts.len(), failed: None });
        for (index, (part, buffer)) in parts.iter().zip(taken.drain(..)).enumerate() {
            self.next_partial += 1;
            let id = PARTIAL | self.next_partial;
            self.partials.insert(id, Partial { transfer, block, part: index });
            self.push(TransferId(id), part.file, part.file_offset, part.bytes, IoBuf::Bounce(buffer));
        }
        self.taken = taken;
        Ok(())
    }

    fn push(&mut self, id: TransferId, file: FileId, offset: u64, bytes: u64, buffer: IoBuf) {
        let shift = offset % ALIGN_BYTES;
        let len = aligned_len(offset, bytes);
        let len_min = (shift + bytes) as usize;
        self.batch.push(Read { id, file, offset: offset - shift, len, len_min, buffer });
    }

    /// Sends what was prepared.
    pub(crate) fn submit(&mut self) {
        if !self.batch.is_empty() {
            self.shared.disk.reads.fetch_add(self.batch.len() as u64, Ordering::Relaxed);
            self.storage.submit(&mut self.batch);
        }
    }

    /// Asks to drop a block's read.
    pub(crate) fn cancel(&mut self, transfer: TransferId) {
        self.submit();
        self.storage.cancel(transfer);
        let partials = self.partials.iter().filter(|(_, p)| p.transfer == transfer);
        partials.for_each(|(&id, _)| self.storage.cancel(TransferId(id)));
    }

    /// Takes a completion; returns the block's end if this was its last.
    pub(crate) fn complete(&mut self, completion: Completion<IoBuf>) -> Option<Finished> {
        let Completion { id, buffer, result } = completion;
        if id.0 & PARTIAL != 0 {
            return self.complete_partial(id, buffer, result);
        }
        let block = self.singles.remove(&id)?;
        let bytes = *result.as_ref().unwrap_or(&0) as u64;
        let payload = self.catalog.parts(block)[0].bytes;
        self.count(bytes, payload);
        let IoBuf::Slot(slot) = buffer else { return None };
        let result = result.map(|_| slot).map_err(|fault| Failure { part: 0, fault });
        Some(Finished { transfer: id, result, bytes })
    }

    fn complete_partial(
        &mut self,
        id: TransferId,
        mut buffer: IoBuf,
        result: Result<usize, ReadFault>,
    ) -> Option<Finished> {
        let Partial { transfer, block, part } = self.partials.remove(&id.0)?;
        let place = self.catalog.parts(block)[part];
        let bundle = self.bundles.get_mut(&transfer)?;
        match result {
            Ok(bytes) => {
                let shift = (place.file_offset % ALIGN_BYTES) as usize;
                let (from, len) = (buffer.bytes_mut(), place.bytes as usize);
                let at = place.slot_offset as usize;
                bundle.slot.bytes_mut()[at..at + len].copy_from_slice(&from[shift..shift + len]);
                self.count(bytes as u64, place.bytes);
            }
            Err(fault) => bundle.failed = Some(Failure { part, fault }),
        }
        if let IoBuf::Bounce(buffer) = buffer {
            self.bounces.give_back(buffer);
        }
        let bundle = self.bundles.get_mut(&transfer)?;
        bundle.pending -= 1;
        if bundle.pending > 0 {
            return None;
        }
        let Bundle { slot, failed, .. } = self.bundles.remove(&transfer)?;
        let bytes = self.catalog.blocks()[block.index()].bytes;
        Some(Finished { transfer, result: failed.map_or(Ok(slot), Err), bytes })
    }

    fn count(&self, bytes: u64, payload: u64) {
        self.shared.disk.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.shared.disk.padding_bytes.fetch_add(bytes.saturating_sub(payload), Ordering::Relaxed);
    }

    /// Ends all reading: returns when no device writes to any slot any more.
    pub(crate) fn close(self) {
        drop(self.storage);
    }
}

fn aligned_len(offset: u64, bytes: u64) -> usize {
    (offset % ALIGN_BYTES + bytes).next_multiple_of(ALIGN_BYTES) as usize
}
