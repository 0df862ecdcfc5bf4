//! The driver: the one thread that owns the brain, tells it what happens, and carries out what it decides.

use crate::error::Error;
use crate::events::Event as Told;
use crate::io::{BlockReader, Failure, Finished};
use crate::shared::{Held, LAZY_NOTES_MAX, Note, Shared};
use crate::wait::Waiter;
use crate::window::Window;
use overspill_core::catalog::ALIGN_BYTES;
use overspill_core::{BlockId, Brain, Command, Event, Refusal, SlotId, Ticket, TierId, TransferId};
use overspill_host::{Backing, SlabPool, SlotBuf};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the driver works with.
pub(crate) struct Driver {
    pub(crate) brain: Brain,
    pub(crate) shared: Arc<Shared>,
    pub(crate) reader: BlockReader,
    pub(crate) pool: Arc<SlabPool>,
    /// The host tier: where reads go.
    pub(crate) host: TierId,
    pub(crate) slots_per_slab: u32,
    /// Backs slabs ahead of reads, where the system lets it.
    pub(crate) backing: Option<Backing>,
    /// Slots that all blocks take together.
    pub(crate) slots_of_all: u64,
    #[cfg(feature = "gpu")]
    pub(crate) gpus: crate::gpu::Gpus,
    /// Hashed, since these maps are never walked in an order that matters, and allocate nothing once they are warm.
    pub(crate) waiters: HashMap<Ticket, Arc<Waiter>>,
    pub(crate) under_way: HashMap<TransferId, UnderWay>,
    /// The block whose read failed last, if nothing has been read since: the brain tries such a block once more.
    pub(crate) failed: Option<BlockId>,
    pub(crate) disk_busy: Busy,
    /// None where its size was set.
    pub(crate) window: Option<Window>,
    #[cfg(feature = "gpu")]
    pub(crate) bus_busy: Busy,
}

/// A transfer that has begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnderWay {
    pub(crate) tier: TierId,
    pub(crate) block: BlockId,
    pub(crate) from_ns: u64,
    pub(crate) speculative: bool,
    /// Into a slot that was read into before.
    pub(crate) again: bool,
}

/// How long a wire has had something to carry.
#[derive(Debug, Default)]
pub(crate) struct Busy {
    in_flight: usize,
    since_ns: u64,
}

impl Busy {
    pub(crate) fn begin(&mut self, now_ns: u64) {
        if self.in_flight == 0 {
            self.since_ns = now_ns;
        }
        self.in_flight += 1;
    }

    /// Adds up after each transfer, so that a look at the figures is never far behind.
    pub(crate) fn end(&mut self, now_ns: u64, total_ns: &AtomicU64) {
        total_ns.fetch_add(now_ns.saturating_sub(self.since_ns), Ordering::Relaxed);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.since_ns = now_ns;
    }
}

impl Driver {
    /// Runs until the engine is closed.
    pub(crate) fn run(mut self) {
        // The mailbox swaps its notes with these.
        let mut notes = Vec::with_capacity(LAZY_NOTES_MAX);
        self.set_backing_end();
        loop {
            let deadline = self.brain.next_deadline().map(|ns| self.shared.start + Duration::from_nanos(ns));
            self.shared.mailbox.take(&mut notes, deadline);
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                self.tell(Event::Tick);
            }
            for note in notes.drain(..) {
                if !self.take(note) {
                    return self.close();
                }
            }
            self.reader.submit();
            self.shared.mailbox.follow.store(!self.brain.is_quiet(), Ordering::Relaxed);
        }
    }

    /// Tells the brain, and does what it says.
    pub(crate) fn tell(&mut self, event: Event<'_>) {
        self.brain.handle(event, self.shared.now());
        self.obey();
    }

    fn obey(&mut self) {
        while let Some(command) = self.brain.poll() {
            self.carry_out(command);
        }
    }

    /// Takes a note. False if it was the last.
    fn take(&mut self, note: Note) -> bool {
        match note {
            Note::Entered { sequence, step } => self.tell(Event::StepEntered { sequence, step }),
            Note::StepTouched { sequence, step } => self.tell(Event::StepTouched { sequence, step }),
            Note::Touched { tier, block } => self.tell(Event::Touched { tier, blocks: &[block] }),
            Note::Demand { ticket, waiter } => {
                let patience = u64::try_from(self.shared.patience.as_nanos()).unwrap_or(u64::MAX);
                let deadline = self.shared.now().saturating_add(patience);
                self.waiters.insert(ticket, Arc::clone(&waiter));
                self.tell(Event::Demand { ticket, tier: waiter.tier, blocks: &waiter.blocks, deadline });
            }
            Note::Withdrawn { ticket } => {
                self.waiters.remove(&ticket);
                self.tell(Event::Withdrawn { ticket });
            }
            Note::LastPinDropped { tier, block } => self.tell(Event::LastPinDropped { tier, block }),
            Note::Expected { sequence, step, mut blocks, probability_milli } => {
                self.tell(Event::Expected { sequence, step, blocks: &blocks, probability_milli });
                blocks.clear();
                self.shared.spare_blocks.lock().push(blocks);
            }
            Note::Read(completion) => {
                if let Some(finished) = self.reader.complete(completion) {
                    self.read_ended(finished);
                }
            }
            #[cfg(feature = "gpu")]
            Note::Uploaded { transfer, result } => self.upload_ended(transfer, result),
            Note::Ask(question) => {
                question(&mut self.brain);
                // Before slabs are released, so that none of them is backed again.
                self.set_backing_end();
                self.obey();
            }
            Note::Close => return false,
        }
        true
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Read { transfer, block, tier, slot, speculative } => {
                self.start_read(transfer, block, tier, slot, speculative);
            }
            Command::Upload { transfer, block, from, from_slot: _, to, to_slot } => {
                self.start_upload(transfer, block, from, to, to_slot);
            }
            Command::Retire { tier, block } => self.retire(tier, block),
            Command::Cancel { transfer } => {
                self.reader.cancel(transfer);
                #[cfg(feature = "gpu")]
                self.gpus.cancel(transfer);
            }
            Command::Grant { ticket } => {
                if let Some(waiter) = self.waiters.remove(&ticket) {
                    waiter.grant(|| self.pin_all(&waiter));
                }
            }
            Command::Fail { ticket, reason } => {
                if let Some(waiter) = self.waiters.remove(&ticket) {
                    let error = self.explain(&waiter, reason);
                    tracing::warn!(%error, blocks = waiter.blocks.len(), "a demand failed");
                    waiter.fail(error);
                }
            }
            Command::ReleaseSlab { tier, slab } => self.release_slab(tier, slab),
            _ => debug_assert!(false, "a command that this body does not know"),
        }
    }

    fn start_read(&mut self, transfer: TransferId, block: BlockId, tier: TierId, slot: SlotId, speculative: bool) {
        let from_ns = self.shared.now();
        self.under_way.insert(transfer, UnderWay { tier, block, from_ns, speculative, again: false });
        self.disk_busy.begin(from_ns);
        tracing::trace!(block = block.0, tier = tier.0, speculative, "reading");
        if self.failed.take() == Some(block) {
            tracing::info!(block = block.0, "reading it a second time");
        }
        let begun = self.room(block, slot).and_then(|room| self.reader.read(transfer, block, room));
        if begun.is_ok() {
            let slots = self.shared.catalog.blocks()[block.index()].slots as usize;
            let slot_end = self.position(slot.index() + slots);
            if let (Some(backing), Some(transfer)) = (&mut self.backing, self.under_way.get_mut(&transfer)) {
                transfer.again = backing.read_begins(slot_end);
            }
        }
        if let Err(error) = begun {
            self.shared.remember_failure(block, Error::Memory(error.to_string()));
            self.under_way.remove(&transfer);
            self.disk_busy.end(self.shared.now(), &self.shared.disk.busy_ns);
            self.brain.handle(Event::TransferFailed { transfer, cancelled: false }, self.shared.now());
        }
    }

    /// Where a slot begins, counted from the first slab's beginning on; or the end of the one before.
    fn position(&self, slot: usize) -> u64 {
        let per_slab = self.slots_per_slab as usize;
        (slot / per_slab * self.pool.slab_bytes()) as u64 + (slot % per_slab) as u64 * self.shared.catalog.slot_bytes()
    }

    /// How far slots can be given out: as far as the budget goes, or all blocks of the model.
    fn set_backing_end(&mut self) {
        let Some(mut backing) = self.backing.take() else { return };
        let budget_bytes = self.brain.tier_stats(self.host).budget_bytes;
        let slots = self.slots_of_all.min(budget_bytes / self.shared.catalog.slot_bytes());
        backing.set_end(self.position(slots as usize));
        self.backing = Some(backing);
    }

    /// The slot's memory, mapped on first use.
    fn room(&self, block: BlockId, slot: SlotId) -> Result<SlotBuf, overspill_host::HostError> {
        let slot_bytes = self.shared.catalog.slot_bytes() as usize;
        let slots = self.shared.catalog.blocks()[block.index()].slots as usize;
        let per_slab = self.slots_per_slab as usize;
        let (slab, within) = (slot.index() / per_slab, slot.index() % per_slab);
        self.pool.slot_buf(slab, within * slot_bytes, slots * slot_bytes)
    }

    fn read_ended(&mut self, finished: Finished) {
        let Finished { transfer, result, bytes } = finished;
        let Some(UnderWay { tier, block, from_ns, speculative, again }) = self.under_way.remove(&transfer) else {
            return;
        };
        let shared = &self.shared;
        let at_ns = shared.now();
        self.disk_busy.end(at_ns, &shared.disk.busy_ns);
        self.backing.iter().for_each(Backing::read_ends);
        let busy_ns = shared.disk.busy_ns.load(Ordering::Relaxed);
        let window = self.window.as_mut().and_then(|window| window.read(bytes, busy_ns));
        shared.tell(|| Told::Read { from_ns, at_ns, block, tier, bytes, speculative });
        match result {
            Ok(slot) => {
                if let Some(backing) = self.backing.as_ref().filter(|_| again) {
                    backing.read_again(&slot);
                }
                self.publish(tier, block, Held::Host(slot.freeze()));
                self.tell(Event::TransferDone { transfer });
            }
            Err(failure) => {
                let cancelled = failure.fault == overspill_core::seam::ReadFault::Cancelled;
                if !cancelled {
                    self.remember(block, &failure);
                    self.failed = Some(block);
                }
                self.tell(Event::TransferFailed { transfer, cancelled });
            }
        }
        if let Some(bytes) = window {
            tracing::debug!(bytes, "the disk is fast: more may be in flight");
            self.brain.set_window(bytes);
        }
    }

    pub(crate) fn publish(&self, tier: TierId, block: BlockId, held: Held) {
        let Some(cell) = self.shared.cell(tier, block) else { return };
        *cell.held.write() = Some(held);
        let published = cell.word.publish();
        debug_assert!(published.is_ok(), "a block is published once");
    }

    fn remember(&self, block: BlockId, failure: &Failure) {
        let catalog = &self.shared.catalog;
        let Some(part) = catalog.parts(block).get(failure.part) else { return };
        let error = Error::Read {
            path: catalog.path(part.file).to_owned(),
            tensor: catalog.tensor(part.tensor).name.clone(),
            offset: part.file_offset - part.file_offset % ALIGN_BYTES,
            bytes: part.bytes,
            fault: failure.fault.clone(),
        };
        tracing::warn!(%error, "a read failed");
        self.shared.remember_failure(block, error);
    }

    #[cfg(not(feature = "gpu"))]
    fn start_upload(&mut self, transfer: TransferId, _: BlockId, _: TierId, _: TierId, _: SlotId) {
        debug_assert!(false, "without a GPU nothing is uploaded");
        self.brain.handle(Event::TransferFailed { transfer, cancelled: false }, self.shared.now());
    }

    fn retire(&mut self, tier: TierId, block: BlockId) {
        let done = self.shared.cell(tier, block).is_some_and(|cell| {
            let done = cell.word.retire() == Ok(true);
            if done {
                // The word first, then the bytes: nobody finds a resident block without them.
                *cell.held.write() = None;
            }
            done
        });
        let event = if done {
            let shared = &self.shared;
            shared.tell(|| Told::Evicted { at_ns: shared.now(), block, tier });
            tracing::trace!(block = block.0, tier = tier.0, "evicted");
            Event::Retired { tier, block }
        } else {
            Event::RetireRefused { tier, block }
        };
        self.brain.handle(event, self.shared.now());
    }

    /// Pins all blocks of a granted demand for its waiter.
    fn pin_all(&self, waiter: &Waiter) -> Result<(), Error> {
        for (index, &block) in waiter.blocks.iter().enumerate() {
            let pinned = self.shared.cell(waiter.tier, block).is_some_and(|cell| cell.word.pin().is_ok());
            if !pinned {
                debug_assert!(false, "a granted block is resident");
                for &block in &waiter.blocks[..index] {
                    if let Some(cell) = self.shared.cell(waiter.tier, block) {
                        let _ = cell.word.unpin();
                    }
                }
                return Err(Error::Memory(format!("block {block} has more leases than can be counted")));
            }
        }
        Ok(())
    }

    fn explain(&self, waiter: &Waiter, reason: Refusal) -> Error {
        let setting = self.shared.tiers.get(waiter.tier.index()).map_or("a budget", |t| t.setting).to_owned();
        match reason {
            Refusal::Transfer { block, .. } => self.shared.failure(block).unwrap_or_else(|| {
                Error::Storage(format!("block {block} could not be brought, and no cause was told"))
            }),
            Refusal::TooSmall { bytes_min } => {
                let budget_bytes = self.brain.tier_stats(waiter.tier).budget_bytes;
                Error::TooSmall { setting, budget_bytes, bytes_min }
            }
            _ => Error::PinnedOut {
                blocks: waiter.blocks.len(),
                waited_ms: u64::try_from(self.shared.patience.as_millis()).unwrap_or(u64::MAX),
                holders: self.shared.holders_text(),
                setting,
            },
        }
    }

    fn release_slab(&mut self, tier: TierId, slab: u32) {
        if tier == self.host {
            self.pool.release(slab as usize);
            self.backing.iter_mut().for_each(|backing| backing.released(slab as usize));
        }
        #[cfg(feature = "gpu")]
        if tier != self.host {
            self.gpus.release_slab(tier, slab);
        }
    }

    /// Fails everybody who waits, and returns when nothing writes to memory any more.
    fn close(mut self) {
        let left = self.shared.mailbox.close();
        for note in left {
            if let Note::Demand { waiter, .. } = note {
                waiter.fail(Error::Closed);
            }
        }
        for waiter in std::mem::take(&mut self.waiters).into_values() {
            waiter.fail(Error::Closed);
        }
        #[cfg(feature = "gpu")]
        self.gpus.close();
        self.reader.close();
        drop(self.backing);
        // Nothing can be leased any more; what is leased stays until its lease ends.
        for cell in self.shared.tiers.iter().flat_map(|table| &table.cells) {
            if cell.word.retire() == Ok(true) {
                *cell.held.write() = None;
            }
        }
    }
}
