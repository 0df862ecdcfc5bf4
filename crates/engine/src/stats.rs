//! The engine's figures.

use overspill_core::{Decision, TierStats};

/// A tier's figures.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TierFigures {
    /// Its name: `gpu0`, `host`.
    pub label: &'static str,
    /// What its budget setting allows; reservations that come on top of a share of the model included.
    pub budget_bytes: u64,
    /// What that can become at most when more is reserved.
    pub budget_bytes_max: u64,
    /// The most that blocks, what is in flight and the row cache have taken.
    pub peak_bytes: u64,
    /// Bytes set aside by reservations (KV cache, scratch).
    pub reserved_bytes: u64,
    /// The most that reservations have been.
    pub reserved_peak_bytes: u64,
    /// Blocks that were there when they were asked for.
    pub hits: u64,
    /// Blocks that had to be waited for.
    pub misses: u64,
    /// What the brain counts.
    pub blocks: TierStats,
}

/// Figures of the disks.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct DiskStats {
    /// Bytes read, alignment padding included.
    pub read_bytes: u64,
    /// Of these, padding.
    pub padding_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes of table rows that were handed out.
    pub gathered_bytes: u64,
    /// Nanoseconds in which at least one read of blocks was under way: the disk's share of the time, whether anybody
    /// waited for it or not.
    pub busy_ns: u64,
}

/// Figures of the way to the GPUs.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct BusStats {
    /// Bytes copied up.
    pub uploaded_bytes: u64,
    /// Copies.
    pub uploads: u64,
    /// Nanoseconds in which at least one copy was under way.
    pub busy_ns: u64,
}

/// Everything that the engine counts. Counters run from its opening; take differences.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Stats {
    /// The tiers, GPUs first.
    pub tiers: Vec<TierFigures>,
    /// The disks.
    pub disk: DiskStats,
    /// The way to the GPUs; all zero without one.
    pub bus: BusStats,
    /// Nanoseconds in which callers waited for blocks, summed over callers.
    pub stall_ns: u64,
    /// Host memory mapped for slabs.
    pub mapped_bytes: u64,
    /// Of these, bytes that lie in huge pages, as far as is known.
    pub huge_page_bytes: u64,
    /// The policy in force, and why.
    pub decision: Decision,
    /// `auto` or `off`.
    pub prefetch: &'static str,
    /// How the disk is read: `uring`, `pread`, `mmap`.
    pub io: &'static str,
}

impl Stats {
    /// The figures of the tier of this name.
    #[must_use]
    pub fn tier(&self, label: &str) -> Option<&TierFigures> {
        self.tiers.iter().find(|t| t.label == label)
    }

    /// Bytes in flight plus leased while something streams (R), over all tiers.
    #[must_use]
    pub fn in_flight_bytes(&self) -> u64 {
        self.tiers.iter().map(|t| t.blocks.ring_bytes).sum()
    }
}
