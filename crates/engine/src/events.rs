//! What subscribers are told.

use overspill_core::{BlockId, TierId};

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
}
