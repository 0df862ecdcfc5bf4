//! Schedules: the order in which a model's steps read blocks, and where each block is used next.

use crate::bitset::BitSet;
use crate::ids::{BlockId, SequenceId, StepId, TierId};
use std::ops::Range;

/// One unit of execution and the blocks that it reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// The tier that computes it.
    pub tier: TierId,
    /// What it reads, all at once. For a choice: the candidates.
    pub blocks: Vec<BlockId>,
    /// If not 0, the step chooses among its blocks at run time (experts), at most this many of them at once.
    pub choice_max: u32,
}

/// The steps of a model in the order of execution.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// Its name in reports.
    pub label: String,
    /// Whether it starts over when it ends (decode), or runs once.
    pub cyclic: bool,
    /// The steps.
    pub steps: Vec<Step>,
    /// Blocks that the runtime holds leases on all the time (norms, biases), in the tier of the first step.
    pub standing: Vec<BlockId>,
}

/// Where a step's blocks stand in a schedule's order of uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepPlace {
    pub(crate) tier: TierId,
    pub(crate) start: u32,
    pub(crate) end: u32,
    pub(crate) choice_start: u32,
    pub(crate) choice_end: u32,
    pub(crate) choice_max: u32,
}

/// What a tier has of a schedule's uses, by position.
#[derive(Clone, Debug)]
pub(crate) struct Coverage {
    /// Uses for which the block must still be brought.
    pub(crate) absent: BitSet,
    /// Uses whose block could be evicted.
    pub(crate) evictable: BitSet,
    /// Whether the tier plays no part in some of the steps that use blocks.
    pub(crate) partial: bool,
}

/// A registered schedule, with its index.
#[derive(Clone, Debug)]
pub(crate) struct Registered {
    pub(crate) cyclic: bool,
    pub(crate) steps: Vec<StepPlace>,
    pub(crate) standing: Vec<BlockId>,
    /// Blocks in the order of use; a position is an index into this.
    pub(crate) order: Vec<BlockId>,
    /// Step of each position.
    step_of: Vec<u32>,
    choices: Vec<BlockId>,
    uses_start: Vec<u32>,
    uses: Vec<u32>,
    /// By tier; `None` where the tier plays no part.
    pub(crate) coverage: Vec<Option<Coverage>>,
    /// The round of the brain in which a step of it was entered last.
    pub(crate) round: u64,
    /// Whether that is long ago, so that it is not planned for.
    pub(crate) idle: bool,
    /// Cursors that run through it.
    pub(crate) sequences: Vec<SequenceId>,
}

impl Registered {
    pub(crate) fn new(schedule: &Schedule, blocks: usize) -> Self {
        let (mut steps, mut order, mut step_of, mut choices) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (index, step) in schedule.steps.iter().enumerate() {
            let (start, choice_start) = (order.len() as u32, choices.len() as u32);
            if step.choice_max == 0 {
                order.extend_from_slice(&step.blocks);
            } else {
                choices.extend_from_slice(&step.blocks);
            }
            step_of.resize(order.len(), index as u32);
            steps.push(StepPlace {
                tier: step.tier,
                start,
                end: order.len() as u32,
                choice_start,
                choice_end: choices.len() as u32,
                choice_max: step.choice_max,
            });
        }
        let mut uses_start = vec![0u32; blocks + 1];
        for block in &order {
            uses_start[block.index() + 1] += 1;
        }
        for block in 0..blocks {
            uses_start[block + 1] += uses_start[block];
        }
        let mut fill = uses_start.clone();
        let mut uses = vec![0u32; order.len()];
        for (position, block) in order.iter().enumerate() {
            uses[fill[block.index()] as usize] = position as u32;
            fill[block.index()] += 1;
        }
        let standing = schedule.standing.clone();
        let sequences = Vec::new();
        Self {
            cyclic: schedule.cyclic,
            steps,
            standing,
            order,
            step_of,
            choices,
            uses_start,
            uses,
            coverage: Vec::new(),
            round: 0,
            idle: false,
            sequences,
        }
    }

    pub(crate) fn uses(&self, block: BlockId) -> &[u32] {
        let range = self.uses_start[block.index()] as usize..self.uses_start[block.index() + 1] as usize;
        &self.uses[range]
    }

    pub(crate) fn tier_at(&self, position: usize) -> TierId {
        self.steps[self.step_of[position] as usize].tier
    }

    pub(crate) fn step(&self, step: StepId) -> Option<&StepPlace> {
        self.steps.get(step.index())
    }

    pub(crate) fn positions(&self, step: StepId) -> Range<usize> {
        self.step(step).map_or(0..0, |s| s.start as usize..s.end as usize)
    }

    pub(crate) fn choices(&self, step: &StepPlace) -> &[BlockId] {
        &self.choices[step.choice_start as usize..step.choice_end as usize]
    }

    /// Uses from the cursor to the block's next use; `None` if it is not used again.
    pub(crate) fn distance(&self, block: BlockId, cursor: usize) -> Option<u64> {
        let uses = self.uses(block);
        let next = uses.partition_point(|&position| (position as usize) < cursor);
        match uses.get(next) {
            Some(&position) => Some(u64::from(position) - cursor as u64),
            None if self.cyclic => uses.first().map(|&first| u64::from(first) + (self.order.len() - cursor) as u64),
            None => None,
        }
    }

    /// As [`Self::distance`], of the uses that `counts` says yes to.
    pub(crate) fn distance_where(&self, block: BlockId, cursor: usize, counts: impl Fn(TierId) -> bool) -> Option<u64> {
        let uses = self.uses(block);
        let next = uses.partition_point(|&position| (position as usize) < cursor);
        let counts = |&&position: &&u32| counts(self.tier_at(position as usize));
        let ahead = uses[next..].iter().find(counts).map(|&position| u64::from(position) - cursor as u64);
        if !self.cyclic {
            return ahead;
        }
        let round = (self.order.len() - cursor) as u64;
        ahead.or_else(|| uses[..next].iter().find(counts).map(|&position| u64::from(position) + round))
    }

    /// Uses from the cursor to a position, going round if need be.
    pub(crate) fn distance_to(&self, position: usize, cursor: usize) -> u64 {
        if position >= cursor { (position - cursor) as u64 } else { (position + self.order.len() - cursor) as u64 }
    }
}

/// A cursor through a schedule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    pub(crate) schedule: usize,
    /// Position from which on uses lie in the future.
    pub(crate) position: usize,
    /// The step that was entered last.
    pub(crate) step: StepId,
    /// Where in its round that step is, in 65536ths.
    pub(crate) fraction: u16,
    /// The round of the brain in which a step was entered last.
    pub(crate) round: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_uses_go_round_a_cycle() {
        let step = |blocks: &[u32]| Step { blocks: blocks.iter().map(|&b| BlockId(b)).collect(), ..Step::default() };
        let schedule = Schedule { cyclic: true, steps: vec![step(&[0, 1]), step(&[2, 0])], ..Schedule::default() };
        let mut r = Registered::new(&schedule, 4);
        assert_eq!(r.uses(BlockId(0)), [0, 3]);
        assert_eq!(r.distance(BlockId(0), 1), Some(2));
        assert_eq!(r.distance(BlockId(1), 2), Some(3));
        assert_eq!(r.distance(BlockId(3), 0), None);
        r.cyclic = false;
        assert_eq!(r.distance(BlockId(1), 2), None);
    }
}
