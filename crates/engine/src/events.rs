//! What subscribers are told.

use overspill_core::{BlockId, SequenceId, StepId, TierId};

/// Something that happened in the engine. Times are nanoseconds since the engine was opened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// A read from disk began.
    ReadStarted {
        /// When.
        at_ns: u64,
        /// What.
        block: BlockId,
        /// Into which tier.
        tier: TierId,
        /// Whether nobody waited for it yet.
        speculative: bool,
    },
    /// A read ended.
    ReadEnded {
        /// When.
        at_ns: u64,
        /// What.
        block: BlockId,
        /// Into which tier.
        tier: TierId,
        /// Bytes that came from the disk, padding included; 0 if it failed.
        bytes: u64,
    },
    /// A copy up to a GPU was handed to the uploader.
    UploadStarted {
        /// When.
        at_ns: u64,
        /// What.
        block: BlockId,
        /// Into which tier.
        tier: TierId,
    },
    /// A block was copied up to a GPU.
    Uploaded {
        /// When.
        at_ns: u64,
        /// What.
        block: BlockId,
        /// Into which tier.
        tier: TierId,
    },
    /// A block went to make room.
    Evicted {
        /// When.
        at_ns: u64,
        /// What.
        block: BlockId,
        /// From which tier.
        tier: TierId,
    },
    /// Somebody waited for blocks.
    Stalled {
        /// When the wait ended.
        at_ns: u64,
        /// How long it was.
        ns: u64,
        /// Blocks of the set that was waited for.
        blocks: usize,
    },
    /// A sequence got the blocks of a step, and can compute it.
    StepBegan {
        /// When.
        at_ns: u64,
        /// Whose.
        sequence: SequenceId,
        /// Which step of its schedule.
        step: StepId,
        /// How many blocks it got.
        blocks: usize,
    },
    /// A sequence gave the blocks of a step back. A step that chooses its blocks may begin and end several times.
    StepEnded {
        /// When.
        at_ns: u64,
        /// Whose.
        sequence: SequenceId,
        /// Which step of its schedule.
        step: StepId,
    },
    /// A sequence said what a later step will probably use.
    Expected {
        /// When.
        at_ns: u64,
        /// Whose.
        sequence: SequenceId,
        /// Which step.
        step: StepId,
        /// How many blocks.
        blocks: usize,
        /// How likely, in thousandths.
        probability_milli: u16,
    },
}
