//! Legal faults, all by seed. What can go wrong in a world:
//!
//! - **a read or an upload fails once**: any request, with a probability; the next try may do better;
//! - **a read fails always**: of chosen blocks;
//! - **a wire is slow for a while**: ten times, say, from one moment to another;
//! - **latency spikes**: a request's end is put off; **completions come in another order** than requests for the same
//!   reason;
//! - **messages are late**: what the brain is told comes after a while, in the order in which it was said, so that it
//!   acts on what was true;
//! - **cancelled requests**: dropped if they have not begun, completed (well or not) if they have;
//! - **budgets change**: up, down, below the need of a demand that waits;
//! - **sequences end** in the middle of a step, waiting or holding leases;
//! - **demands are withdrawn** by those who have waited too long;
//! - **leases are held for long**, so that demands run into their deadlines.
//!
//! What can't happen, since no body may do it: a lost completion, a refused `Retire` of a block without a lease,
//! messages out of order, a grant that isn't carried out.

use crate::rng::Rng;
use crate::wire::{Luck, Request};
use overspill_core::{BlockId, Nanos, TierId};

/// What goes wrong, and how often.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Requests that fail, in thousandths.
    pub fail_milli: u16,
    /// Blocks of which every read fails.
    pub cursed: Vec<BlockId>,
    /// Times in which a wire is slower.
    pub slow: Vec<Slow>,
    /// Requests that end late, in thousandths.
    pub spike_milli: u16,
    /// By up to so many nanoseconds.
    pub spike_ns_max: Nanos,
    /// Messages to the brain are up to so many nanoseconds late; 0: told at once.
    pub late_ns_max: Nanos,
    /// Budgets that change.
    pub budgets: Vec<BudgetChange>,
    /// Programs that end early: which, and when.
    pub stops: Vec<Stop>,
}

/// A wire that is slow for a while.
#[derive(Clone, Copy, Debug)]
pub struct Slow {
    /// Which wire: disks first, then tiers' uploads in the order of tiers.
    pub wire: usize,
    /// From when.
    pub from: Nanos,
    /// Until when.
    pub until: Nanos,
    /// So many times.
    pub factor: u32,
}

/// A budget that changes.
#[derive(Clone, Copy, Debug)]
pub struct BudgetChange {
    /// When.
    pub at: Nanos,
    /// Whose.
    pub tier: TierId,
    /// To how many bytes.
    pub bytes: u64,
}

/// A program that ends early.
#[derive(Clone, Copy, Debug)]
pub struct Stop {
    /// When.
    pub at: Nanos,
    /// Which.
    pub actor: usize,
}

impl Faults {
    pub(crate) fn luck(&self, rng: &mut Rng, wire: usize, request: &Request, now: Nanos) -> Luck {
        let mut luck = Luck::default();
        if self.fail_milli > 0 {
            luck.fails = rng.chance(u64::from(self.fail_milli));
        }
        if request.from.is_none() && !self.cursed.is_empty() {
            luck.fails |= self.cursed.contains(&request.block);
        }
        if self.spike_milli > 0 && rng.chance(u64::from(self.spike_milli)) {
            luck.delay_ns = rng.below(self.spike_ns_max);
        }
        for slow in self.slow.iter().filter(|s| s.wire == wire && (s.from..s.until).contains(&now)) {
            luck.slower = luck.slower.max(1).saturating_mul(slow.factor);
        }
        luck
    }
}
