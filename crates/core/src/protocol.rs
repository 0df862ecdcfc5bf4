//! What the brain and its body say to each other.

use crate::ids::{BlockId, Nanos, SequenceId, SlotId, StepId, Ticket, TierId, TransferId};

/// What happened, told by the body.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A sequence begins a step.
    StepEntered {
        /// Which sequence.
        sequence: SequenceId,
        /// Which step of its schedule.
        step: StepId,
    },
    /// A sequence has let go of a step's blocks.
    StepTouched {
        /// Which sequence.
        sequence: SequenceId,
        /// Which step of its schedule.
        step: StepId,
    },
    /// Blocks were used outside of any schedule, in this order.
    Touched {
        /// In which tier.
        tier: TierId,
        /// Which.
        blocks: &'a [BlockId],
    },
    /// Somebody waits for all of these blocks.
    Demand {
        /// Comes back in the grant.
        ticket: Ticket,
        /// Where they are needed.
        tier: TierId,
        /// Which; each at most once.
        blocks: &'a [BlockId],
        /// Until when to wait if only pins are in the way.
        deadline: Nanos,
    },
    /// Somebody no longer waits.
    Withdrawn {
        /// Who.
        ticket: Ticket,
    },
    /// A read or an upload has ended well; the body has made the block resident.
    TransferDone {
        /// Which.
        transfer: TransferId,
    },
    /// A read or an upload has failed.
    TransferFailed {
        /// Which.
        transfer: TransferId,
        /// Whether it was cancelled at the brain's wish.
        cancelled: bool,
    },
    /// A block was retired as asked: nobody can lease it any more.
    Retired {
        /// From which tier.
        tier: TierId,
        /// Which.
        block: BlockId,
    },
    /// A block could not be retired, since a lease pins it. The last pin's end will be told.
    RetireRefused {
        /// In which tier.
        tier: TierId,
        /// Which.
        block: BlockId,
    },
    /// The last pin of a block that refused to be retired has dropped.
    LastPinDropped {
        /// In which tier.
        tier: TierId,
        /// Which.
        block: BlockId,
    },
    /// A tier's budget is now another.
    BudgetChanged {
        /// Which tier.
        tier: TierId,
        /// Its bytes for blocks.
        bytes: u64,
    },
    /// A sequence believes that a step will use these blocks.
    Expected {
        /// Which sequence.
        sequence: SequenceId,
        /// At which step.
        step: StepId,
        /// Which blocks.
        blocks: &'a [BlockId],
        /// How likely, in thousandths; 1000: it has chosen already.
        probability_milli: u16,
    },
    /// Time has passed ([`crate::Brain::next_deadline`] is due).
    Tick,
}

/// What the body must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// Read a block from its disk.
    Read {
        /// Name of the transfer.
        transfer: TransferId,
        /// What.
        block: BlockId,
        /// Into which tier.
        tier: TierId,
        /// Into which slot.
        slot: SlotId,
        /// Whether nobody waits for it yet.
        speculative: bool,
    },
    /// Copy a block from one tier up to another.
    Upload {
        /// Name of the transfer.
        transfer: TransferId,
        /// What.
        block: BlockId,
        /// From which tier.
        from: TierId,
        /// From which slot.
        from_slot: SlotId,
        /// Into which tier.
        to: TierId,
        /// Into which slot.
        to_slot: SlotId,
    },
    /// Make a block impossible to lease, unless it is pinned, and answer at once with `Retired` or `RetireRefused`.
    Retire {
        /// From which tier.
        tier: TierId,
        /// Which.
        block: BlockId,
    },
    /// Drop a transfer if it has not begun; it must still be answered.
    Cancel {
        /// Which.
        transfer: TransferId,
    },
    /// All blocks of a demand are resident: pin them now, before the next command, and wake the waiter.
    Grant {
        /// Which demand.
        ticket: Ticket,
    },
    /// A demand cannot be met: wake the waiter with the reason.
    Fail {
        /// Which demand.
        ticket: Ticket,
        /// Why.
        reason: Refusal,
    },
    /// Give a slab's memory back: its slots lie above the budget and are empty.
    ReleaseSlab {
        /// In which tier.
        tier: TierId,
        /// Which slab.
        slab: u32,
    },
}

/// Why a demand is not met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// A block could not be read or uploaded, even at the second try.
    Transfer {
        /// Which block.
        block: BlockId,
        /// Into which tier.
        tier: TierId,
    },
    /// Leases held the room until the deadline.
    PinnedOut,
    /// The set is larger than the tier.
    TooSmall {
        /// Bytes that the tier must have for this set.
        bytes_min: u64,
    },
}
