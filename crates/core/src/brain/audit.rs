//! The brain's books against each other: every index and counter that is kept up to date by small steps, worked out
//! anew from what it stands for. For simulators and tests; it takes time in proportion to everything that there is.

use super::{Brain, NO_SLOT, State};
use crate::ids::{BlockId, TierId};

impl Brain {
    /// Checks that what the brain keeps by small steps agrees with what it stands for.
    ///
    /// # Errors
    /// The first disagreement, in words.
    pub fn audit(&self) -> Result<(), String> {
        for tier in 0..self.tiers.len() {
            self.audit_tier(TierId(tier as u32))?;
            self.audit_offers(TierId(tier as u32))?;
        }
        self.audit_ahead()?;
        self.audit_demands()?;
        self.audit_coverage()
    }

    fn audit_tier(&self, tier: TierId) -> Result<(), String> {
        let t = &self.tiers[tier.index()];
        let (mut used, mut loading, mut kept) = (0, 0, 0);
        let linked = t.lru.linked();
        let mut is_linked = vec![false; self.blocks.len()];
        linked.iter().for_each(|&block| is_linked[block] = true);
        for (index, place) in t.places.iter().enumerate() {
            let block = BlockId(index as u32);
            let slots = self.blocks[index].slots;
            let wrong = |what: &str| Err(format!("tier {tier}, block {block}: {what} ({place:?})"));
            if place.state == State::Absent {
                if place.slot != NO_SLOT || place.unused || place.expected || place.pinned {
                    return wrong("absent, yet something is noted of it");
                }
            } else {
                used += slots as usize;
                if (place.slot..place.slot + slots).any(|slot| t.slots.owner(slot as usize) != Some(block)) {
                    return wrong("its slots have another owner");
                }
            }
            loading += usize::from(place.state == State::Loading);
            let here = matches!(place.state, State::Resident | State::Retiring);
            if is_linked[index] != here {
                return wrong("in the list of last uses, or not, against its state");
            }
            if t.could_go.contains(index) != self.could_go(tier, block) {
                return wrong("could go, or not, against the books");
            }
            let guesses = self.guesses.iter().filter(|g| g.tier == tier && g.block == block).count();
            if guesses != usize::from(place.expected) {
                return wrong(&format!("{guesses} guesses"));
            }
            if place.pinned && !here {
                return wrong("pinned, yet not here");
            }
            if (t.awaiting == Some(block)) != (place.state == State::Retiring) {
                return wrong("being retired, or not, against the books");
            }
            let demands = self.demands.iter().filter(|d| d.tier == tier && d.blocks.contains(&block)).count();
            let moving = |&&child: &&TierId| matches!(self.place(child, block).state, State::Waiting | State::Loading);
            let claims = demands + t.children.iter().filter(moving).count();
            if usize::from(place.claims) != claims {
                return wrong(&format!("should have {claims} claims"));
            }
            if t.kept.contains(index) {
                kept += slots as usize;
            }
        }
        if used != t.slots.used() {
            return Err(format!("tier {tier}: {used} slots are used, {} are noted", t.slots.used()));
        }
        if kept + t.ring_slots > t.slots.limit() {
            return Err(format!("tier {tier}: plans {kept} + {} slots of {}", t.ring_slots, t.slots.limit()));
        }
        let flying = self.transfers.iter().filter(|t| t.tier == tier);
        if flying.clone().count() != loading {
            return Err(format!("tier {tier}: {loading} blocks are loading, {} transfers fly", flying.count()));
        }
        match flying.clone().find(|f| self.place(tier, f.block).state != State::Loading) {
            Some(lost) => Err(format!("tier {tier}: a transfer of block {} flies for nobody", lost.block)),
            None => Ok(()),
        }
    }

    fn audit_ahead(&self) -> Result<(), String> {
        let mut disks = vec![0u64; self.disk_ahead_bytes.len()];
        for (index, tier) in self.tiers.iter().enumerate() {
            let unused = || tier.places.iter().zip(&self.blocks).filter(|(place, _)| place.unused).map(|(_, b)| b);
            if tier.parent.is_none() {
                unused().for_each(|b| disks[b.wire as usize] += b.bytes);
                continue;
            }
            let ahead: u64 = unused().map(|b| b.bytes).sum();
            if ahead != tier.ahead_bytes {
                return Err(format!("tier {index}: {ahead} bytes are ahead, {} are noted", tier.ahead_bytes));
            }
        }
        if disks != self.disk_ahead_bytes {
            return Err(format!("disks: {disks:?} bytes are ahead, {:?} are noted", self.disk_ahead_bytes));
        }
        Ok(())
    }

    fn audit_demands(&self) -> Result<(), String> {
        for demand in &self.demands {
            let state = |block: &BlockId| self.place(demand.tier, *block).state;
            let missing = demand.blocks.iter().filter(|b| state(b) != State::Resident).count();
            if missing != demand.missing || missing == 0 {
                return Err(format!("demand {} lacks {missing} blocks, {} noted", demand.ticket, demand.missing));
            }
            if demand.assigned && demand.served < demand.blocks.len()
                || demand.blocks[..demand.served].iter().any(|b| state(b) == State::Absent)
            {
                return Err(format!("demand {} is said to be served, but a block is absent", demand.ticket));
            }
        }
        Ok(())
    }

    fn audit_coverage(&self) -> Result<(), String> {
        for (id, registered) in self.schedules.iter().enumerate() {
            let Some(registered) = registered else { continue };
            for (tier, coverage) in registered.coverage.iter().enumerate() {
                let (Some(coverage), here) = (coverage, TierId(tier as u32)) else { continue };
                for (position, &block) in registered.order.iter().enumerate() {
                    let Some((covered, _)) = self.covered(registered.tier_at(position), here, block) else { continue };
                    let free_to_go = self.could_go(here, block) && !self.is_kept(here, block);
                    if coverage.absent.contains(position) == covered {
                        return Err(format!("schedule {id}, tier {tier}, use {position}: covered is {covered}"));
                    }
                    if coverage.evictable.contains(position) != free_to_go {
                        return Err(format!("schedule {id}, tier {tier}, use {position}: free to go is {free_to_go}"));
                    }
                }
            }
        }
        Ok(())
    }
}
