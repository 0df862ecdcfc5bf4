//! What the brain is told at its start: tiers, blocks, policies.

use crate::ids::TierId;

/// A block as the brain sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Weight bytes.
    pub bytes: u64,
    /// Adjacent slots that it takes.
    pub slots: u32,
    /// The disk that it lies on, numbered from 0.
    pub wire: u32,
}

/// A caching tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierConfig {
    /// Its name in reports.
    pub label: String,
    /// Bytes for blocks.
    pub budget_bytes: u64,
    /// Slots of one slab.
    pub slots_per_slab: u32,
    /// The tier that it is filled from; `None` means from disk.
    pub parent: Option<TierId>,
}

/// Which block goes when room is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Evict {
    /// `Planned` where a cycle is known, declared or learned; else `Lru`.
    #[default]
    Auto,
    /// The least recently used (for comparison: in a cycle larger than the budget it never hits).
    Lru,
    /// The one used furthest in the future (Belady's MIN, IBM Systems Journal 5:2, 1966), as far as the future is
    /// known; the least recently used of the rest.
    NextUse,
    /// A set of blocks that stays, spread evenly over the cycle; next-use for what streams between them.
    Planned,
}

/// Whether blocks are read before they are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefetch {
    /// As far ahead as keeps the wire busy.
    #[default]
    Auto,
    /// Only what is asked for.
    Off,
}

/// Everything the brain needs to know at its start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of a slot, the same in every tier.
    pub slot_bytes: u64,
    /// The tiers. A parent comes after its children (GPUs first, then host RAM).
    pub tiers: Vec<TierConfig>,
    /// The blocks.
    pub blocks: Vec<BlockSize>,
    /// Eviction policy.
    pub evict: Evict,
    /// Prefetch policy.
    pub prefetch: Prefetch,
    /// Bytes that may be under way or waiting to be used for the first time, for each wire: two times bandwidth ×
    /// latency of the wire, or [`Config::WINDOW_BYTES_DEFAULT`], whichever is more (invariant 6); of a fast disk what
    /// [`Config::disk_window_bytes`] says.
    pub window_bytes: u64,
}

impl Config {
    /// 16 MiB.
    pub const WINDOW_BYTES_DEFAULT: u64 = 16 << 20;
    /// A fast disk's window holds what it brings in this time, up to 64 MiB. Reads that were issued together arrive
    /// together, and those after them are issued as the processor works through these; with less, a disk of 2 GB/s was
    /// seen to have nothing to do for a tenth of the time.
    const WINDOW_NS: u64 = 16_000_000;
    const WINDOW_BYTES_MAX: u64 = 64 << 20;

    /// The window of a disk of this speed, in bytes.
    #[must_use]
    pub fn disk_window_bytes(bytes_per_s: u64) -> u64 {
        let bytes = u128::from(bytes_per_s) * u128::from(Self::WINDOW_NS) / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX).clamp(Self::WINDOW_BYTES_DEFAULT, Self::WINDOW_BYTES_MAX)
    }
}

/// A tier's budget is too small for the work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tier {tier} has {budget_bytes} bytes for blocks; this needs at least {bytes_min}")]
pub struct TooSmall {
    /// The tier's label.
    pub tier: String,
    /// What it has.
    pub budget_bytes: u64,
    /// What it must have.
    pub bytes_min: u64,
}
