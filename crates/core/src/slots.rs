//! The address space of a tier: which slots are taken, by whom, and which lie above a lowered budget.
//!
//! Slots are handed out lowest first, so that the last slabs fall empty first when a budget shrinks. A block of
//! several slots gets adjacent ones within one slab.

use crate::bitset::BitSet;
use crate::ids::{BlockId, SlotId};
use std::ops::Range;

const NOBODY: u32 = u32::MAX;

/// The slots of a tier.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    owners: Vec<u32>,
    /// Free slots below the limit.
    free: BitSet,
    /// Slots from here on are not handed out: the budget was lowered.
    limit: usize,
    per_slab: usize,
    used: usize,
    /// Of these, at or above the limit.
    used_above: usize,
    used_peak: usize,
    /// Slots in use in each slab.
    used_in_slab: Vec<u32>,
}

impl Slots {
    pub(crate) fn new(count: usize, per_slab: usize) -> Self {
        let mut slots = Self {
            owners: Vec::new(),
            free: BitSet::new(0),
            limit: 0,
            per_slab: per_slab.max(1),
            used: 0,
            used_above: 0,
            used_peak: 0,
            used_in_slab: Vec::new(),
        };
        slots.set_limit(count);
        slots
    }

    /// Slots that may be handed out.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }

    pub(crate) fn used_peak(&self) -> usize {
        self.used_peak
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len().min(self.limit.saturating_sub(self.used))
    }

    pub(crate) fn per_slab(&self) -> usize {
        self.per_slab
    }

    /// Raises or lowers the number of slots. Slots above a lowered limit stay with their owners until they are given
    /// back.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        if limit > self.owners.len() {
            self.owners.resize(limit, NOBODY);
            let mut free = BitSet::new(limit);
            let mut at = self.free.next(0);
            while let Some(slot) = at {
                free.set(slot, true);
                at = self.free.next(slot + 1);
            }
            self.free = free;
            self.used_in_slab.resize(limit.div_ceil(self.per_slab), 0);
        }
        for slot in self.limit.min(limit)..self.limit.max(limit) {
            self.free.set(slot, slot < limit && self.owners[slot] == NOBODY);
        }
        self.limit = limit;
        self.used_above = self.owners[limit..].iter().filter(|&&owner| owner != NOBODY).count();
    }

    /// Takes `count` adjacent slots in one slab. Not while slots above a lowered limit and those below it would
    /// together be more than the limit.
    pub(crate) fn take(&mut self, count: u32, block: BlockId) -> Option<SlotId> {
        let count = count as usize;
        if self.used + count > self.limit {
            return None;
        }
        let start = if count == 1 { self.free.next(0)? } else { self.find_run(count)? };
        for slot in start..start + count {
            self.owners[slot] = block.0;
            self.free.set(slot, false);
            self.used_in_slab[slot / self.per_slab] += 1;
        }
        self.used += count;
        self.used_peak = self.used_peak.max(self.used);
        Some(SlotId(start as u32))
    }

    fn find_run(&self, count: usize) -> Option<usize> {
        let mut start = self.free.next(0)?;
        loop {
            let mut end = start + 1;
            while end < start + count && end % self.per_slab != 0 && self.free.next(end) == Some(end) {
                end += 1;
            }
            if end == start + count {
                return Some(start);
            }
            start = self.free.next(end)?;
        }
    }

    /// Gives slots back. Returns the slab if it is empty now and lies wholly above the limit.
    pub(crate) fn give_back(&mut self, start: SlotId, count: u32) -> Option<usize> {
        let (start, count) = (start.index(), count as usize);
        for slot in start..start + count {
            self.owners[slot] = NOBODY;
            self.used_in_slab[slot / self.per_slab] -= 1;
            self.free.set(slot, slot < self.limit);
            self.used_above -= usize::from(slot >= self.limit);
        }
        self.used -= count;
        let slab = start / self.per_slab;
        (self.used_in_slab[slab] == 0 && slab * self.per_slab >= self.limit).then_some(slab)
    }

    /// Slabs above the limit that hold nothing.
    pub(crate) fn empty_slabs_above_limit(&self) -> impl Iterator<Item = usize> + '_ {
        (self.limit.div_ceil(self.per_slab)..self.used_in_slab.len()).filter(|&slab| self.used_in_slab[slab] == 0)
    }

    pub(crate) fn owner(&self, slot: usize) -> Option<BlockId> {
        self.owners.get(slot).filter(|&&owner| owner != NOBODY).map(|&owner| BlockId(owner))
    }

    /// The first owner of a slot at or above the limit, from `from` on.
    pub(crate) fn owner_above_limit(&self, from: usize) -> Option<(usize, BlockId)> {
        if self.used_above == 0 {
            return None;
        }
        (from.max(self.limit)..self.owners.len()).find_map(|slot| self.owner(slot).map(|owner| (slot, owner)))
    }

    /// Every stretch of `count` slots in one slab that a run could use.
    pub(crate) fn windows(&self, count: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let per_slab = self.per_slab;
        (0..self.limit)
            .map(move |start| start..start + count)
            .filter(move |w| w.end <= self.limit && w.start / per_slab == (w.end - 1) / per_slab)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_stay_within_a_slab_and_lowered_slabs_fall_empty() {
        let mut slots = Slots::new(8, 4);
        let a = slots.take(3, BlockId(0)).unwrap();
        let b = slots.take(2, BlockId(1)).unwrap();
        assert_eq!((a, b), (SlotId(0), SlotId(4)), "a run does not straddle slabs");
        assert_eq!(slots.take(1, BlockId(2)), Some(SlotId(3)));
        slots.set_limit(4);
        assert_eq!(slots.free(), 0);
        assert_eq!(slots.owner_above_limit(0), Some((4, BlockId(1))));
        assert_eq!(slots.give_back(b, 2), Some(1), "the slab is to be released");
        assert_eq!(slots.give_back(a, 3), None);
        slots.set_limit(12);
        assert_eq!((slots.free(), slots.used()), (11, 1));
    }

    /// Slots above a lowered limit were still leased while those below it were handed out anew: more than the budget
    /// was in use.
    #[test]
    fn a_lowered_limit_holds_for_the_sum_of_what_is_used() {
        let mut slots = Slots::new(4, 2);
        let taken: Vec<SlotId> = (0..4).map(|b| slots.take(1, BlockId(b)).unwrap()).collect();
        slots.set_limit(2);
        slots.give_back(taken[0], 1);
        assert_eq!((slots.take(1, BlockId(9)), slots.free()), (None, 0));
        slots.give_back(taken[3], 1);
        assert_eq!(slots.take(1, BlockId(9)), None);
        slots.give_back(taken[2], 1);
        assert_eq!(slots.take(1, BlockId(9)), Some(SlotId(0)));
    }
}
