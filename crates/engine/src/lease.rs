//! Leases: pins on resident blocks, as values.

use crate::error::Error;
use crate::shared::{Held, Holder, Note, Shared};
use crate::wait::Waiter;
use overspill_core::{BlockId, Piece, SequenceId, StepId, Ticket, TierId};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Instant;

/// A pin on one block: as long as it lives, the block's bytes stay where they are (invariant 3). It may be sent to
/// other threads and may outlive the engine.
pub struct Lease {
    holder: Arc<Holder>,
    tier: TierId,
    block: BlockId,
    /// Always there until the drop.
    held: Option<Held>,
}

impl Lease {
    /// Pins a block if it is resident.
    pub(crate) fn try_take(holder: &Arc<Holder>, tier: TierId, block: BlockId) -> Option<Self> {
        let cell = holder.shared.cell(tier, block)?;
        cell.word.pin().ok()?;
        Self::of_pinned(holder, tier, block)
    }

    /// The lease of a block that has been pinned for it. `None` (with the pin dropped) if the block has no bytes, which
    /// the order of the transitions rules out.
    pub(crate) fn of_pinned(holder: &Arc<Holder>, tier: TierId, block: BlockId) -> Option<Self> {
        let cell = holder.shared.cell(tier, block)?;
        holder.held.fetch_add(1, Ordering::Relaxed);
        let held = cell.held.read().clone();
        let found = held.is_some();
        let lease = Self { holder: Arc::clone(holder), tier, block, held };
        debug_assert!(found, "a resident block has bytes");
        found.then_some(lease)
    }

    #[cfg(feature = "gpu")]
    pub(crate) fn shared(&self) -> &Shared {
        &self.holder.shared
    }

    /// Which block.
    #[must_use]
    pub fn block(&self) -> BlockId {
        self.block
    }

    /// In which tier.
    #[must_use]
    pub fn tier(&self) -> TierId {
        self.tier
    }

    /// The bytes of the block's whole slot, alignment padding included, if it is in host memory; empty if it is in a
    /// GPU's. Weights begin at a [`Piece`]'s `slot_offset` and have no alignment.
    #[must_use]
    pub fn slot(&self) -> &[u8] {
        match &self.held {
            Some(Held::Host(view)) => view,
            #[cfg(feature = "gpu")]
            Some(Held::Gpu(_)) => &[],
            None => &[],
        }
    }

    /// The rows of a piece of this block, as they are in the file: `rows × row_bytes` bytes, unaligned. Empty if the
    /// block is not in host memory or the piece is another block's.
    #[must_use]
    pub fn piece(&self, piece: &Piece) -> &[u8] {
        let start = piece.slot_offset as usize;
        let ours = piece.block == self.block;
        self.slot().get(start..start + piece.bytes as usize).filter(|_| ours).unwrap_or_default()
    }

    /// Where the block is in a GPU's memory, if it is there.
    #[cfg(feature = "gpu")]
    #[must_use]
    pub fn gpu(&self) -> Option<&crate::gpu::GpuSlice> {
        match &self.held {
            Some(Held::Gpu(slice)) => Some(slice),
            _ => None,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The view first: when the pin is gone, the slot may be claimed at once.
        self.held = None;
        self.holder.held.fetch_sub(1, Ordering::Relaxed);
        let shared = &self.holder.shared;
        let Some(cell) = shared.cell(self.tier, self.block) else { return };
        if cell.word.unpin() == Ok(true) {
            shared.mailbox.post(Note::LastPinDropped { tier: self.tier, block: self.block }, true);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("tier", &self.tier).field("block", &self.block).finish_non_exhaustive()
    }
}

/// Who is told when a set of leases ends.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Use {
    /// A step of a sequence.
    Step(SequenceId, StepId),
    /// Some blocks of a step that chooses. They are told one by one, the step is for subscribers only.
    Chosen(SequenceId, StepId),
    /// Blocks of no schedule.
    Blocks,
}

impl Use {
    fn step(self) -> Option<(SequenceId, StepId)> {
        match self {
            Self::Step(sequence, step) | Self::Chosen(sequence, step) => Some((sequence, step)),
            Self::Blocks => None,
        }
    }

    /// For who watches: the set's beginning, and a span that lasts as long as the set does.
    fn watched(self, shared: &Shared, blocks: usize) -> Watched {
        let Some((sequence, step)) = self.step() else { return Watched::default() };
        Watched {
            from_ns: shared.subscribers.any().then(|| shared.now()),
            _span: tracing::trace_span!("step", sequence = sequence.0, step = step.0, blocks),
        }
    }
}

/// What is noted of a set for who watches.
struct Watched {
    /// When it was leased, if anybody is to be told.
    from_ns: Option<u64>,
    _span: tracing::Span,
}

impl Default for Watched {
    fn default() -> Self {
        Self { from_ns: None, _span: tracing::Span::none() }
    }
}

/// Leases of all blocks of a set, in the order in which they were asked for.
pub struct LeaseSet {
    leases: Vec<Lease>,
    shared: Arc<Shared>,
    used: Use,
    watched: Watched,
}

impl LeaseSet {
    /// Pins all blocks if all are resident.
    pub(crate) fn try_take(holder: &Arc<Holder>, tier: TierId, blocks: &[BlockId], used: Use) -> Option<Self> {
        let mut leases = holder.shared.spare.lock().pop().unwrap_or_default();
        for &block in blocks {
            match Lease::try_take(holder, tier, block) {
                Some(lease) => leases.push(lease),
                None => {
                    leases.clear();
                    holder.shared.spare.lock().push(leases);
                    return None;
                }
            }
        }
        let watched = used.watched(&holder.shared, blocks.len());
        Some(Self { leases, shared: Arc::clone(&holder.shared), used, watched })
    }

    /// The leases of a granted demand.
    fn of_pinned(holder: &Arc<Holder>, waiter: &Waiter, used: Use) -> Self {
        let mut leases = holder.shared.spare.lock().pop().unwrap_or_default();
        leases.extend(waiter.blocks.iter().filter_map(|&block| Lease::of_pinned(holder, waiter.tier, block)));
        let watched = used.watched(&holder.shared, leases.len());
        Self { leases, shared: Arc::clone(&holder.shared), used, watched }
    }

    #[cfg(feature = "gpu")]
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The lease of a set of one.
    pub(crate) fn take_single(&mut self) -> Option<Lease> {
        let lease = self.leases.pop()?;
        self.shared.mailbox.post_quietly(Note::Touched { tier: lease.tier, block: lease.block });
        Some(lease)
    }

    /// The lease of the set's `index`th block.
    ///
    /// # Panics
    /// If the set is smaller, as indexing a slice does.
    #[must_use]
    pub fn lease(&self, index: usize) -> &Lease {
        &self.leases[index]
    }

    /// All leases.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Lease> {
        self.leases.iter()
    }

    /// How many blocks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether the set has no blocks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }
}

impl Drop for LeaseSet {
    fn drop(&mut self) {
        let mut leases = std::mem::take(&mut self.leases);
        if let (Some(from_ns), Some((sequence, step))) = (self.watched.from_ns, self.used.step()) {
            let (shared, blocks) = (&self.shared, leases.len());
            shared.tell(|| crate::Event::Step { from_ns, at_ns: shared.now(), sequence, step, blocks });
        }
        match self.used {
            Use::Step(sequence, step) => {
                leases.clear();
                self.shared.mailbox.post(Note::StepTouched { sequence, step }, false);
            }
            Use::Chosen(..) | Use::Blocks => {
                for lease in leases.drain(..) {
                    let (tier, block) = (lease.tier, lease.block);
                    drop(lease);
                    self.shared.mailbox.post_quietly(Note::Touched { tier, block });
                }
                if self.shared.mailbox.follow.load(Ordering::Relaxed) {
                    self.shared.mailbox.wake();
                }
            }
        }
        self.shared.spare.lock().push(leases);
    }
}

impl fmt::Debug for LeaseSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.leases.iter().map(|l| l.block)).finish()
    }
}

/// A demand that has been made and is to be waited for: blocking ([`Pending::wait`]), with a deadline, or as a future.
/// Dropping it withdraws the demand.
#[derive(Debug)]
pub struct Pending {
    holder: Arc<Holder>,
    used: Use,
    ready: Option<LeaseSet>,
    asked: Option<(Ticket, Arc<Waiter>)>,
    since: Instant,
}

impl Pending {
    /// Asks for blocks: at once if all are resident, else through the brain.
    pub(crate) fn ask(holder: &Arc<Holder>, tier: TierId, blocks: &[BlockId], used: Use) -> Result<Self, Error> {
        let shared = &holder.shared;
        let table = shared.tiers.get(tier.index()).ok_or_else(|| missing("tier", tier.0))?;
        if let Some(block) = blocks.iter().find(|b| b.index() >= table.cells.len()) {
            return Err(missing("block", block.0));
        }
        let since = Instant::now();
        if let Some(set) = LeaseSet::try_take(holder, tier, blocks, used) {
            table.hits.fetch_add(blocks.len() as u64, Ordering::Relaxed);
            return Ok(Self { holder: Arc::clone(holder), used, ready: Some(set), asked: None, since });
        }
        let resident = blocks.iter().filter(|b| table.cells[b.index()].word.is_resident()).count() as u64;
        table.hits.fetch_add(resident, Ordering::Relaxed);
        table.misses.fetch_add(blocks.len() as u64 - resident, Ordering::Relaxed);
        let ticket = Ticket(shared.tickets.fetch_add(1, Ordering::Relaxed));
        let waiter = shared.waiters.take(tier, blocks);
        if !shared.mailbox.post(Note::Demand { ticket, waiter: Arc::clone(&waiter) }, true) {
            return Err(Error::Closed);
        }
        Ok(Self { holder: Arc::clone(holder), used, ready: None, asked: Some((ticket, waiter)), since })
    }

    /// Blocks until the leases are there.
    ///
    /// # Errors
    /// What kept the blocks from coming: [`Error::Read`], [`Error::PinnedOut`], [`Error::TooSmall`],
    /// [`Error::Closed`].
    pub fn wait(mut self) -> Result<LeaseSet, Error> {
        match self.end(None) {
            Some(result) => result,
            None => Err(Error::Closed),
        }
    }

    /// Blocks until the leases are there or the deadline has come; then the demand is withdrawn and the result is
    /// `None`.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn wait_until(mut self, deadline: Instant) -> Result<Option<LeaseSet>, Error> {
        self.end(Some(deadline)).transpose()
    }

    fn end(&mut self, deadline: Option<Instant>) -> Option<Result<LeaseSet, Error>> {
        if let Some(set) = self.ready.take() {
            return Some(Ok(set));
        }
        let (ticket, waiter) = self.asked.as_ref()?;
        let span = tracing::debug_span!("wait", ticket = ticket.0, tier = waiter.tier.0, blocks = waiter.blocks.len());
        let result = span.in_scope(|| waiter.wait(deadline))?;
        Some(self.finish(result))
    }

    fn finish(&mut self, result: Result<(), Error>) -> Result<LeaseSet, Error> {
        let Some((_, waiter)) = self.asked.take() else { return Err(Error::Closed) };
        let ns = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let shared = &self.holder.shared;
        shared.stall_ns.fetch_add(ns, Ordering::Relaxed);
        let blocks = waiter.blocks.len();
        shared.tell(|| crate::Event::Stalled { at_ns: shared.now(), ns, blocks });
        let set = result.map(|()| LeaseSet::of_pinned(&self.holder, &waiter, self.used));
        shared.waiters.give_back(waiter);
        set
    }
}

impl Future for Pending {
    type Output = Result<LeaseSet, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(set) = self.ready.take() {
            return Poll::Ready(Ok(set));
        }
        let Some((_, waiter)) = self.asked.as_ref() else { return Poll::Ready(Err(Error::Closed)) };
        match waiter.poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(result) => Poll::Ready(self.finish(result)),
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Some((ticket, waiter)) = self.asked.take() else { return };
        if waiter.abandon() {
            drop(LeaseSet::of_pinned(&self.holder, &waiter, self.used));
        } else {
            self.holder.shared.mailbox.post(Note::Withdrawn { ticket }, true);
        }
    }
}

pub(crate) fn missing(what: &str, number: u32) -> Error {
    Error::NotFound { what: format!("{what} {number}"), cure: format!("use a {what} of this engine's own catalog") }
}
