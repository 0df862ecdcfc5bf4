//! What must hold after every event, checked against a second set of books that only the commands write.
//!
//! The checker knows nothing of how the brain decides. It knows which slot was given to which block, what is being
//! written, and what the budgets are.

use crate::wire::Request;
use overspill_core::{BlockId, BlockSize, Brain, Config, Nanos, TierId, TransferId};
use std::collections::{BTreeMap, BTreeSet};

const NOBODY: u32 = u32::MAX;

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("after event {event}, at {at_ns} ns: {what}")]
pub struct Violation {
    /// Events until then.
    pub event: u64,
    /// When.
    pub at_ns: Nanos,
    /// What is wrong.
    pub what: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Absent,
    Loading(u32),
    Resident(u32),
}

#[derive(Clone, Debug)]
struct Shadow {
    owner: Vec<u32>,
    phase: Vec<Phase>,
    /// Uploads that read the block.
    sources: Vec<u16>,
    budget_bytes: u64,
    used_bytes: u64,
    per_slab: usize,
    parent: Option<TierId>,
    /// Slabs that were written since they were given back last.
    backed: Vec<bool>,
}

/// A demand that the brain was told of.
#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    pub(crate) tier: TierId,
    pub(crate) blocks: Vec<BlockId>,
}

/// The second set of books.
#[derive(Clone, Debug)]
pub(crate) struct Checker {
    slot_bytes: u64,
    blocks: Vec<BlockSize>,
    tiers: Vec<Shadow>,
    flying: BTreeMap<TransferId, Request>,
    /// Of these, those that the brain wishes dropped.
    unwanted: BTreeSet<TransferId>,
    /// Failed transfers in a row of a block into a tier, and the last of them.
    failures: BTreeMap<(TierId, BlockId), (u32, TransferId)>,
    /// Also compare the brain's own books, which takes longer.
    audit: bool,
}

type Check = Result<(), String>;

impl Checker {
    pub(crate) fn new(config: &Config, audit: bool) -> Self {
        let blocks = config.blocks.len();
        let tier = |t: &overspill_core::TierConfig| Shadow {
            owner: Vec::new(),
            phase: vec![Phase::Absent; blocks],
            sources: vec![0; blocks],
            budget_bytes: t.budget_bytes,
            used_bytes: 0,
            per_slab: t.slots_per_slab as usize,
            parent: t.parent,
            backed: Vec::new(),
        };
        Self {
            slot_bytes: config.slot_bytes,
            blocks: config.blocks.clone(),
            tiers: config.tiers.iter().map(tier).collect(),
            flying: BTreeMap::new(),
            unwanted: BTreeSet::new(),
            failures: BTreeMap::new(),
            audit,
        }
    }

    pub(crate) fn begin(&mut self, request: &Request) -> Check {
        let Request { transfer, block, tier, slot, from, .. } = *request;
        let what = || format!("transfer {transfer} of block {block} into tier {tier}, slot {slot}");
        if self.flying.insert(transfer, *request).is_some() {
            return Err(format!("{}: its name is in use", what()));
        }
        if request.speculative && self.failed_twice(tier, block) {
            return Err(format!("{}: it failed twice, and nobody asks for it", what()));
        }
        if let Some(from) = from {
            let source = &mut self.tiers[from.tier.index()];
            if source.phase[block.index()] != Phase::Resident(from.slot.0) {
                return Err(format!("{}: slot {} of tier {} does not hold it", what(), from.slot, from.tier));
            }
            source.sources[block.index()] += 1;
        }
        let count = self.blocks[block.index()].slots as usize;
        let t = &mut self.tiers[tier.index()];
        if t.phase[block.index()] != Phase::Absent {
            return Err(format!("{}: it is {:?} already", what(), t.phase[block.index()]));
        }
        let slots = slot.index()..slot.index() + count;
        t.owner.resize(t.owner.len().max(slots.end), NOBODY);
        t.backed.resize(t.owner.len().div_ceil(t.per_slab), false);
        if let Some(taken) = slots.clone().find(|&s| t.owner[s] != NOBODY) {
            return Err(format!("{}: slot {taken} is block {}'s", what(), t.owner[taken]));
        }
        if slots.start / t.per_slab != (slots.end - 1) / t.per_slab {
            return Err(format!("{}: a run of {count} straddles slabs", what()));
        }
        t.backed[slots.start / t.per_slab] = true;
        t.owner[slots].fill(block.0);
        t.phase[block.index()] = Phase::Loading(slot.0);
        Ok(())
    }

    fn land(&mut self, request: &Request) -> Check {
        let Request { transfer, block, tier, from, .. } = *request;
        self.unwanted.remove(&transfer);
        if self.flying.remove(&transfer).is_none() {
            return Err(format!("transfer {transfer} ends, but never began"));
        }
        if let Some(from) = from {
            let source = &mut self.tiers[from.tier.index()];
            source.sources[block.index()] -= 1;
            if source.phase[block.index()] != Phase::Resident(from.slot.0) {
                return Err(format!("block {block} left tier {} while it was uploaded to {tier}", from.tier));
            }
        }
        Ok(())
    }

    pub(crate) fn done(&mut self, request: &Request) -> Check {
        self.land(request)?;
        self.failures.remove(&(request.tier, request.block));
        self.tiers[request.tier.index()].phase[request.block.index()] = Phase::Resident(request.slot.0);
        Ok(())
    }

    /// The brain wishes a transfer dropped. However it ends, if not well, it then counts as dropped; also if it has
    /// ended already, and the brain is yet to be told.
    pub(crate) fn unwanted(&mut self, transfer: TransferId) -> Check {
        if self.flying.contains_key(&transfer) {
            let again = !self.unwanted.insert(transfer);
            return if again { Err(format!("transfer {transfer} is to be dropped twice")) } else { Ok(()) };
        }
        let failed = self.failures.iter_mut().find(|(_, (_, last))| *last == transfer);
        if let Some((&key, (count, _))) = failed {
            *count -= 1;
            self.begin_anew(key);
        }
        Ok(())
    }

    /// A load was dropped before its second try came to its end: the next has two again.
    fn begin_anew(&mut self, key: (TierId, BlockId)) {
        if self.failures.get(&key).is_some_and(|(count, _)| *count < 2) {
            self.failures.remove(&key);
        }
    }

    pub(crate) fn failed(&mut self, request: &Request, cancelled: bool) -> Check {
        let key = (request.tier, request.block);
        let dropped = cancelled || self.unwanted.contains(&request.transfer);
        self.land(request)?;
        if dropped {
            self.begin_anew(key);
        } else {
            let (count, last) = self.failures.entry(key).or_insert((0, request.transfer));
            (*count, *last) = (*count + 1, request.transfer);
        }
        self.free(request.tier, request.block, request.slot.0);
        Ok(())
    }

    fn free(&mut self, tier: TierId, block: BlockId, slot: u32) {
        let count = self.blocks[block.index()].slots as usize;
        let t = &mut self.tiers[tier.index()];
        t.owner[slot as usize..slot as usize + count].fill(NOBODY);
        t.phase[block.index()] = Phase::Absent;
    }

    pub(crate) fn retired(&mut self, tier: TierId, block: BlockId) -> Check {
        let t = &self.tiers[tier.index()];
        if t.sources[block.index()] > 0 {
            return Err(format!("block {block} is retired from tier {tier} while an upload reads it"));
        }
        let Phase::Resident(slot) = t.phase[block.index()] else {
            return Err(format!("block {block} is retired from tier {tier}, where it is not"));
        };
        self.free(tier, block, slot);
        Ok(())
    }

    /// Invariant 3, from a lease's side.
    pub(crate) fn leased(&self, tier: TierId, block: BlockId) -> Check {
        let t = &self.tiers[tier.index()];
        match t.phase[block.index()] {
            Phase::Resident(slot) if t.owner[slot as usize] == block.0 => Ok(()),
            other => Err(format!("block {block} is leased in tier {tier}, but is {other:?}")),
        }
    }

    pub(crate) fn released(&mut self, brain: &Brain, tier: TierId, slab: u32) -> Check {
        let t = &mut self.tiers[tier.index()];
        let slots = slab as usize * t.per_slab..(slab as usize + 1) * t.per_slab;
        if slots.end as u64 * self.slot_bytes <= t.budget_bytes {
            return Err(format!("slab {slab} of tier {tier} is given back, but lies within the budget"));
        }
        for (index, block) in self.blocks.iter().enumerate() {
            if let Some(slot) = brain.slot(tier, BlockId(index as u32))
                && slot.index() < slots.end
                && slot.index() + block.slots as usize > slots.start
            {
                return Err(format!("slab {slab} of tier {tier} is given back with block {index} in it"));
            }
        }
        if let Some(backed) = t.backed.get_mut(slab as usize) {
            *backed = false;
        }
        Ok(())
    }

    pub(crate) fn budget(&mut self, tier: TierId, bytes: u64) {
        self.tiers[tier.index()].budget_bytes = bytes;
    }

    fn failed_twice(&self, tier: TierId, block: BlockId) -> bool {
        self.failures.get(&(tier, block)).is_some_and(|(count, _)| *count > 1)
    }

    /// Whether a refusal tells the truth.
    pub(crate) fn refused_transfer(&self, tier: TierId, block: BlockId) -> Check {
        if self.failed_twice(tier, block) {
            return Ok(());
        }
        Err(format!("block {block} is said not to come to tier {tier}, but did not fail twice"))
    }

    /// Whether a set is really too large for its tier. After a budget was lowered, only whole slabs count.
    pub(crate) fn refused_size(&self, tier: TierId, blocks: &[BlockId]) -> Check {
        let t = &self.tiers[tier.index()];
        let need: u64 = blocks.iter().map(|b| u64::from(self.blocks[b.index()].slots)).sum();
        let slab = t.per_slab as u64;
        let whole = t.budget_bytes / self.slot_bytes / slab * slab;
        if need > whole { Ok(()) } else { Err(format!("{need} slots are refused in tier {tier}, which has {whole}")) }
    }

    /// All that must hold after an event has been dealt with.
    pub(crate) fn after_event(&mut self, brain: &Brain) -> Check {
        for (index, t) in self.tiers.iter_mut().enumerate() {
            let used = brain.tier_stats(TierId(index as u32)).used_bytes;
            if used > t.budget_bytes && used > t.used_bytes {
                return Err(format!("tier {index} uses {used} bytes, {} before, of {}", t.used_bytes, t.budget_bytes));
            }
            t.used_bytes = used;
        }
        if self.audit { brain.audit() } else { Ok(()) }
    }

    /// Invariants 4 and 7: the first demand that lacks a block has what room there is, whatever else is brought.
    /// Only to be asked when the brain has been told everything.
    pub(crate) fn starved<'a>(
        &self,
        brain: &Brain,
        pins: impl Fn(TierId, BlockId) -> u32,
        waiting: impl Iterator<Item = &'a Waiting> + Clone,
    ) -> Check {
        for wait in waiting.clone() {
            let Some(&block) = wait.blocks.iter().find(|&&b| brain.slot(wait.tier, b).is_none()) else { continue };
            let mut tier = wait.tier;
            while let Some(parent) = self.tiers[tier.index()].parent
                && brain.slot(parent, block).is_none()
            {
                tier = parent;
            }
            if self.blocks[block.index()].slots != 1 {
                return Ok(());
            }
            let stats = brain.tier_stats(tier);
            if stats.free_bytes > 0 {
                return Err(format!("block {block} is waited for, and tier {tier} has room, but it isn't fetched"));
            }
            let claimed = |victim: BlockId| {
                let moves_on = |&(index, t): &(usize, &Shadow)| {
                    let child = TierId(index as u32);
                    t.parent == Some(tier) && brain.slot(child, victim).is_some() && !brain.is_resident(child, victim)
                };
                waiting.clone().any(|w| w.tier == tier && w.blocks.contains(&victim))
                    || self.tiers.iter().enumerate().any(|t| moves_on(&t))
            };
            for index in 0..self.blocks.len() {
                let victim = BlockId(index as u32);
                if brain.is_resident(tier, victim) && pins(tier, victim) == 0 && !claimed(victim) {
                    return Err(format!("block {block} is waited for in tier {tier}, where {victim} could go"));
                }
            }
            return Ok(());
        }
        Ok(())
    }

    /// The tier that feeds another from disk.
    fn root(&self, mut tier: TierId) -> TierId {
        while let Some(parent) = self.tiers[tier.index()].parent {
            tier = parent;
        }
        tier
    }

    /// Invariant 6, as far as it needs no knowledge of the plan: a wire on which nothing is under way and by which
    /// nothing was brought that still waits for its use must not idle while a block that a sequence will use could
    /// come by it, into room that is free or that holds what nobody will use. `future` are blocks that sequences will
    /// use, with the tier that they will use them in, `guessed` those that they expect to use; `used` are blocks in any schedule.
    pub(crate) fn idle(
        &self,
        brain: &Brain,
        pins: impl Fn(TierId, BlockId) -> u32,
        wire_is_idle: impl Fn(usize) -> bool,
        future: &[(TierId, BlockId)],
        guessed: &[(TierId, BlockId)],
        used: &[bool],
    ) -> Check {
        for &(consumer, block) in future {
            let size = self.blocks[block.index()];
            let mut tier = consumer;
            let mut absent = brain.slot(tier, block).is_none();
            while let Some(parent) = self.tiers[tier.index()].parent {
                tier = parent;
                absent &= brain.slot(tier, block).is_none();
            }
            let by_this_wire = |b: &BlockId| self.blocks[b.index()].wire == size.wire;
            let ahead =
                future.iter().chain(guessed).any(|(t, b)| by_this_wire(b) && brain.slot(self.root(*t), *b).is_some());
            let broken = self.failed_twice(tier, block);
            if !absent || ahead || broken || size.slots != 1 || !wire_is_idle(size.wire as usize) {
                continue;
            }
            if brain.tier_stats(tier).free_bytes > 0 {
                return Err(format!("disk {} idles, tier {tier} has room, block {block} will be used", size.wire));
            }
            let feeds = |&(_, t): &(usize, &Shadow)| t.parent == Some(tier);
            for (index, _) in used.iter().enumerate().filter(|(_, used)| !**used) {
                let victim = BlockId(index as u32);
                let moves_on = self.tiers.iter().enumerate().filter(feeds).any(|(child, _)| {
                    let child = TierId(child as u32);
                    brain.slot(child, victim).is_some() && !brain.is_resident(child, victim)
                });
                let expected = guessed.iter().any(|(_, block)| *block == victim);
                if brain.is_resident(tier, victim) && pins(tier, victim) == 0 && !moves_on && !expected {
                    return Err(format!(
                        "disk {} idles, tier {tier} has block {victim} for nobody, block {block} will be used",
                        size.wire
                    ));
                }
            }
        }
        Ok(())
    }

    /// What must hold when nothing moves any more.
    pub(crate) fn at_rest(&self, brain: &Brain) -> Check {
        brain.audit()?;
        if let Some(transfer) = self.flying.keys().next() {
            return Err(format!("transfer {transfer} was never answered"));
        }
        for (index, t) in self.tiers.iter().enumerate() {
            if t.used_bytes > t.budget_bytes {
                return Err(format!("tier {index} rests with {} bytes of {}", t.used_bytes, t.budget_bytes));
            }
            for (block, phase) in t.phase.iter().enumerate() {
                let here = brain.is_resident(TierId(index as u32), BlockId(block as u32));
                if here != matches!(phase, Phase::Resident(_)) {
                    return Err(format!("tier {index}: block {block} is {phase:?}, the brain says {here}"));
                }
            }
            let slots = (t.budget_bytes / self.slot_bytes) as usize;
            let kept = t.backed.iter().enumerate().find(|&(slab, backed)| *backed && slab * t.per_slab >= slots);
            if let Some((slab, _)) = kept {
                return Err(format!("tier {index}: slab {slab} lies above the budget and was not given back"));
            }
        }
        Ok(())
    }
}
