//! Who waits for what, and the search for room.
//!
//! Demands are served in order: the first that has not got all its slots takes what can be freed, and none behind it
//! may free anything until it has. So no two demands can each hold what the other needs.

use super::{Brain, NO_SLOT, State};
use crate::config::{Evict, TooSmall};
use crate::evict::{self, Limit};
use crate::ids::{BlockId, Nanos, SlotId, Ticket, TierId};
use crate::protocol::{Command, Refusal};

/// Somebody who waits.
#[derive(Debug)]
pub(crate) struct Demand {
    pub(crate) ticket: Ticket,
    pub(crate) tier: TierId,
    pub(crate) blocks: Vec<BlockId>,
    /// Blocks that are not resident yet.
    pub(crate) missing: usize,
    /// So many of its blocks, from the first on, are resident or on their way.
    pub(crate) served: usize,
    /// All of them are.
    pub(crate) assigned: bool,
    pub(crate) deadline: Nanos,
}

impl Brain {
    pub(crate) fn demand(&mut self, ticket: Ticket, tier: TierId, blocks: &[BlockId], deadline: Nanos) {
        let slots: usize = blocks.iter().map(|b| self.blocks[b.index()].slots as usize).sum();
        if slots > self.tiers[tier.index()].slots.limit() {
            let bytes_min = self.slots_bytes(slots);
            self.out.push_back(Command::Fail { ticket, reason: Refusal::TooSmall { bytes_min } });
            return;
        }
        let mut list = self.spare.pop().unwrap_or_default();
        for &block in blocks {
            // A block named twice is needed once.
            if !list.contains(&block) {
                list.push(block);
                self.claim(tier, block);
            }
        }
        let missing = list.iter().filter(|&&b| self.place(tier, b).state != State::Resident).count();
        self.demands.push_back(Demand { ticket, tier, blocks: list, missing, served: 0, assigned: false, deadline });
        if missing == 0 {
            self.finish_demand(self.demands.len() - 1, None);
        }
    }

    pub(crate) fn withdraw(&mut self, ticket: Ticket) {
        if let Some(index) = self.demands.iter().position(|d| d.ticket == ticket)
            && let Some(demand) = self.demands.remove(index)
        {
            let tier = demand.tier;
            let blocks = self.drop_claims(demand);
            self.not_awaited(tier, &blocks);
            self.recycle(blocks);
            self.cancel_unwanted();
        }
    }

    /// A demand's blocks that came, or still come, without being used: they must not count as brought ahead, or the
    /// window would stay full of what nobody comes for.
    fn not_awaited(&mut self, tier: TierId, blocks: &[BlockId]) {
        let mut at = Some(tier);
        while let Some(tier) = at {
            for &block in blocks {
                if self.place(tier, block).claims == 0 {
                    self.not_ahead(tier, block);
                }
            }
            at = self.tiers[tier.index()].parent;
        }
    }

    /// Ends a demand: granted, or failed with a reason.
    pub(crate) fn finish_demand(&mut self, index: usize, failure: Option<Refusal>) {
        let Some(demand) = self.demands.remove(index) else { return };
        let (ticket, tier) = (demand.ticket, demand.tier);
        match failure {
            Some(reason) => {
                self.out.push_back(Command::Fail { ticket, reason });
                let blocks = self.drop_claims(demand);
                self.not_awaited(tier, &blocks);
                self.recycle(blocks);
            }
            None => {
                for &block in &demand.blocks {
                    self.mark_used(tier, block);
                    self.note_choice(block);
                }
                self.out.push_back(Command::Grant { ticket });
                let blocks = self.drop_claims(demand);
                self.recycle(blocks);
            }
        }
    }

    fn drop_claims(&mut self, demand: Demand) -> Vec<BlockId> {
        for &block in &demand.blocks {
            self.unclaim(demand.tier, block);
        }
        demand.blocks
    }

    fn recycle(&mut self, mut blocks: Vec<BlockId>) {
        blocks.clear();
        self.spare.push(blocks);
    }

    /// Fails the demands that pins have kept waiting for too long.
    pub(crate) fn expire(&mut self, now: Nanos) {
        let mut index = 0;
        while index < self.demands.len() {
            if !self.demands[index].assigned && self.demands[index].deadline <= now {
                self.finish_demand(index, Some(Refusal::PinnedOut));
            } else {
                index += 1;
            }
        }
    }

    pub(crate) fn assign_demands(&mut self) {
        for index in 0..self.demands.len() {
            if self.demands[index].assigned {
                continue;
            }
            let tier = self.demands[index].tier;
            for at in self.demands[index].served..self.demands[index].blocks.len() {
                let block = self.demands[index].blocks[at];
                if !self.ensure(tier, block) {
                    return;
                }
                self.demands[index].served = at + 1;
            }
            self.demands[index].assigned = true;
        }
    }

    /// Sees to it that a block is in a tier or on its way there. False if room must be found first.
    fn ensure(&mut self, tier: TierId, block: BlockId) -> bool {
        match self.place(tier, block).state {
            State::Resident | State::Loading => true,
            State::Retiring => false,
            State::Waiting => match self.tiers[tier.index()].parent {
                Some(parent) => self.ensure(parent, block),
                None => true,
            },
            State::Absent => {
                if let Some(parent) = self.tiers[tier.index()].parent
                    && !self.ensure(parent, block)
                {
                    return false;
                }
                let Some(slot) = self.take_slot(tier, block, Limit::Demand) else { return false };
                self.start_load(tier, block, slot, false);
                true
            }
        }
    }

    /// A free slot for a block; or asks the body to retire a block that may go under `limit`, and returns `None`.
    pub(crate) fn take_slot(&mut self, tier: TierId, block: BlockId, limit: Limit) -> Option<SlotId> {
        let slots = self.blocks[block.index()].slots;
        if let Some(slot) = self.tiers[tier.index()].slots.take(slots, block) {
            return Some(slot);
        }
        let t = &self.tiers[tier.index()];
        if t.awaiting.is_none() && t.could_go.len() > 0 {
            if self.evict_in_force() != Evict::Lru {
                self.refresh_offers(tier);
            }
            let victim =
                if slots == 1 { self.victim(tier, limit) } else { self.victim_for_run(tier, slots as usize, limit) };
            if let Some(victim) = victim {
                self.begin_retire(tier, victim);
            }
        }
        None
    }

    fn victim(&self, tier: TierId, limit: Limit) -> Option<BlockId> {
        if let Some(surplus) = self.tiers[tier.index()].surplus.next(0) {
            return Some(BlockId(surplus as u32));
        }
        let evictor = self.evictor();
        if let Some(victim) = evictor.victim(self, tier, limit) {
            return Some(victim);
        }
        // A demand may take even what the plan keeps.
        (limit == Limit::Demand).then(|| evict::any(self, tier)).flatten()
    }

    /// The run of slots that costs least: it holds nothing that must stay, and as little as possible.
    fn victim_for_run(&self, tier: TierId, slots: usize, limit: Limit) -> Option<BlockId> {
        let t = &self.tiers[tier.index()];
        let may_go = |owner: BlockId| {
            let kept = || t.kept.contains(owner.index());
            self.could_go(tier, owner)
                && (limit == Limit::Demand || !kept() && limit.allows(self.distance(tier, owner)))
        };
        let mut best: Option<(usize, usize, usize)> = None;
        for window in t.slots.windows(slots) {
            let start = window.start;
            let owners = || window.clone().filter_map(|slot| t.slots.owner(slot));
            if owners().all(may_go) {
                let kept = owners().filter(|owner| t.kept.contains(owner.index())).count();
                let cost = (kept, owners().count(), start);
                best = Some(best.map_or(cost, |best| best.min(cost)));
            }
        }
        let (_, _, start) = best?;
        (start..start + slots).find_map(|slot| t.slots.owner(slot))
    }

    pub(crate) fn evictor(&self) -> &'static dyn evict::Evictor {
        match self.evict_in_force() {
            Evict::Lru => &evict::LeastRecentlyUsed,
            _ => &evict::NextUse,
        }
    }

    pub(crate) fn begin_retire(&mut self, tier: TierId, block: BlockId) {
        self.set_state(tier, block, State::Retiring);
        self.tiers[tier.index()].awaiting = Some(block);
        self.out.push_back(Command::Retire { tier, block });
    }

    pub(crate) fn retired(&mut self, tier: TierId, block: BlockId) {
        self.tiers[tier.index()].awaiting = None;
        self.tiers[tier.index()].evictions += 1;
        if self.place(tier, block).unused {
            self.tiers[tier.index()].wasted += 1;
        }
        if self.drop_guess(tier, block) {
            self.governor.wasted();
        }
        self.free_place(tier, block);
    }

    pub(crate) fn retire_refused(&mut self, tier: TierId, block: BlockId) {
        self.tiers[tier.index()].awaiting = None;
        self.place_mut(tier, block).pinned = true;
        self.set_state(tier, block, State::Resident);
    }

    /// Takes a block out of the books of a tier and gives its slot back.
    pub(crate) fn free_place(&mut self, tier: TierId, block: BlockId) {
        self.not_ahead(tier, block);
        let slots = self.blocks[block.index()].slots;
        let place = self.place_mut(tier, block);
        let slot = SlotId(place.slot);
        place.slot = NO_SLOT;
        place.retried = false;
        self.drop_guess(tier, block);
        self.tiers[tier.index()].lru.remove(block.index());
        self.set_state(tier, block, State::Absent);
        if let Some(slab) = self.tiers[tier.index()].slots.give_back(slot, slots) {
            self.out.push_back(Command::ReleaseSlab { tier, slab: slab as u32 });
        }
        // Whoever counted on it must be served again; who does has a claim on it.
        if self.place(tier, block).claims == 0 {
            return;
        }
        for demand in &mut self.demands {
            if demand.tier == tier
                && let Some(at) = demand.blocks[..demand.served].iter().position(|&b| b == block)
            {
                (demand.assigned, demand.served) = (false, at);
            }
        }
    }

    pub(crate) fn budget_changed(&mut self, tier: TierId, bytes: u64) {
        if bytes == self.tiers[tier.index()].budget_bytes {
            return;
        }
        let slots = self.slots_within(tier, bytes);
        let t = &mut self.tiers[tier.index()];
        t.budget_bytes = bytes;
        t.slots.set_limit(slots);
        let empty: Vec<usize> = t.slots.empty_slabs_above_limit().collect();
        for slab in empty {
            self.out.push_back(Command::ReleaseSlab { tier, slab: slab as u32 });
        }
        self.replan();
        // A demand that no longer fits must not wait for ever.
        let mut index = 0;
        while index < self.demands.len() {
            let demand = &self.demands[index];
            let need: usize = demand.blocks.iter().map(|b| self.blocks[b.index()].slots as usize).sum();
            if demand.tier == tier && need > slots {
                let bytes_min = self.slots_bytes(need);
                self.finish_demand(index, Some(Refusal::TooSmall { bytes_min }));
            } else {
                index += 1;
            }
        }
    }

    /// Slots of a tier whose budget becomes `bytes`.
    fn slots_within(&self, tier: TierId, bytes: u64) -> usize {
        let t = &self.tiers[tier.index()];
        let per_slab = t.slots.per_slab() as u64;
        let mut slots = bytes / self.slot_bytes;
        // Memory is given back by whole slabs, so a lowered budget counts only whole ones.
        if bytes < t.budget_bytes {
            slots = slots / per_slab * per_slab;
        }
        slots.min(super::slots_useful(&self.blocks, per_slab as u32)) as usize
    }

    /// Changes a tier's budget, unless a registered schedule could not run any more. More is never refused.
    ///
    /// # Errors
    /// With the smallest budget that does; then nothing has changed.
    pub fn set_budget(&mut self, tier: TierId, bytes: u64) -> Result<(), TooSmall> {
        let largest = self.blocks.iter().map(|b| b.slots as usize).max().unwrap_or(1);
        let needed = self.schedules.iter().flatten().map(|s| self.slots_needed(s, tier)).fold(largest, usize::max);
        let t = &self.tiers[tier.index()];
        let slots = self.slots_within(tier, bytes);
        if slots < needed && bytes < t.budget_bytes {
            let whole_slabs = self.slots_bytes(needed.next_multiple_of(t.slots.per_slab()));
            let bytes_min = whole_slabs.min(t.budget_bytes.max(self.slots_bytes(needed)));
            return Err(TooSmall { tier: t.label.clone(), budget_bytes: bytes, bytes_min });
        }
        self.budget_changed(tier, bytes);
        self.pump();
        Ok(())
    }

    /// Changes [`crate::Config::window_bytes`]; at least a slot.
    pub fn set_window(&mut self, bytes: u64) {
        self.window_bytes = bytes.max(self.slot_bytes);
        self.replan();
        self.pump();
    }

    /// Empties the slots above a lowered limit, one at a time.
    pub(crate) fn shrink(&mut self, tier: TierId) {
        let mut from = 0;
        while self.tiers[tier.index()].awaiting.is_none() {
            let Some((slot, block)) = self.tiers[tier.index()].slots.owner_above_limit(from) else { return };
            if self.could_go(tier, block) {
                self.begin_retire(tier, block);
            }
            from = slot + 1;
        }
    }
}
