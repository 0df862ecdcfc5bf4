//! Learning a cycle from use, for runtimes that declare none: when the blocks used repeat an earlier stretch for one
//! whole period, that stretch becomes a schedule; when use departs from it for long enough, it is forgotten.

use crate::brain::Brain;
use crate::ids::{BlockId, ScheduleId, SequenceId, StepId, TierId};
use crate::schedule::{Schedule, Step};

/// A period longer than this is not looked for.
const PERIOD_MAX: usize = 1 << 17;
/// A period of fewer uses is a loop over one matrix, not a model.
const PERIOD_MIN: usize = 4;

/// Watches uses and finds their period.
#[derive(Debug)]
pub(crate) struct Learner {
    /// The uses so far, the latest last; cut to two periods.
    history: Vec<BlockId>,
    /// Index in `history` of each block's latest use, or `NEVER`.
    last: Vec<u32>,
    /// The period that the latest uses agree with, and for how many uses they have.
    period: usize,
    agreed: usize,
    tier: TierId,
    /// What was learned, while it holds.
    pub(crate) cycle: Option<Cycle>,
}

/// A learned cycle and where use stands in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cycle {
    schedule: ScheduleId,
    sequence: SequenceId,
    period: usize,
    /// The step that should be used next.
    next: usize,
    /// Uses that were not the expected ones, less those that were; at least 0.
    surprises: usize,
}

const NEVER: u32 = u32::MAX;

impl Learner {
    pub(crate) fn new(blocks: usize) -> Self {
        Self { history: Vec::new(), last: vec![NEVER; blocks], period: 0, agreed: 0, tier: TierId(0), cycle: None }
    }

    fn clear(&mut self) {
        self.history.clear();
        self.last.fill(NEVER);
        self.period = 0;
        self.agreed = 0;
    }

    /// Notes a use. Returns the cycle's blocks, in order, when one whole period has been repeated.
    fn watch(&mut self, tier: TierId, block: BlockId) -> Option<Vec<BlockId>> {
        if tier != self.tier || self.history.len() >= 4 * PERIOD_MAX {
            self.clear();
            self.tier = tier;
        }
        let index = self.history.len();
        let last = std::mem::replace(&mut self.last[block.index()], index as u32);
        self.history.push(block);
        if self.period != 0 && index >= self.period && self.history[index - self.period] == block {
            self.agreed += 1;
        } else if last == NEVER {
            (self.period, self.agreed) = (0, 0);
        } else {
            (self.period, self.agreed) = (index - last as usize, 1);
        }
        let whole = (PERIOD_MIN..=PERIOD_MAX).contains(&self.period) && self.agreed >= self.period;
        whole.then(|| self.history[index + 1 - self.period..].to_vec())
    }
}

impl Brain {
    pub(crate) fn learn(&mut self, tier: TierId, block: BlockId) {
        if let Some(mut cycle) = self.learner.cycle {
            self.follow(&mut cycle, block);
            self.learner.cycle = Some(cycle);
            if cycle.surprises > cycle.period / 8 + 8 {
                self.forget_learned();
            }
            return;
        }
        // What the runtime declares is better than what we could learn.
        if self.schedules.iter().any(Option::is_some) {
            return;
        }
        let Some(blocks) = self.learner.watch(tier, block) else { return };
        self.learner.clear();
        let period = blocks.len();
        let steps = blocks.into_iter().map(|block| Step { tier, blocks: vec![block], choice_max: 0 }).collect();
        let schedule = Schedule { label: "learned".into(), cyclic: true, steps, standing: Vec::new() };
        let Ok(id) = self.add_schedule(&schedule) else { return };
        let Some(sequence) = self.open_sequence(id) else { return };
        self.learner.cycle = Some(Cycle { schedule: id, sequence, period, next: 0, surprises: 0 });
        self.replan();
    }

    /// Moves the learned cursor to where the use of this block says that it is.
    fn follow(&mut self, cycle: &mut Cycle, block: BlockId) {
        let Some(Some(registered)) = self.schedules.get(cycle.schedule.index()) else { return };
        let cursor = cycle.next;
        let Some(distance) = registered.distance(block, cursor) else {
            cycle.surprises += 2;
            return;
        };
        let at = (cursor + distance as usize) % cycle.period;
        if distance == 0 {
            cycle.surprises = cycle.surprises.saturating_sub(1);
        } else {
            cycle.surprises += 2;
        }
        cycle.next = (at + 1) % cycle.period;
        self.step_entered(cycle.sequence, StepId(at as u32));
        self.step_touched(cycle.sequence, StepId(at as u32));
    }

    /// Drops a learned schedule, so that another can be learned or declared.
    pub(crate) fn forget_learned(&mut self) {
        let Some(cycle) = self.learner.cycle.take() else { return };
        self.close_sequence(cycle.sequence);
        self.schedules[cycle.schedule.index()] = None;
        self.relink();
        self.learner.clear();
        self.replan();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_is_found_when_it_has_been_repeated_once() {
        let mut learner = Learner::new(10);
        let uses = [9, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0];
        let found: Vec<_> = uses.iter().map(|&b| learner.watch(TierId(0), BlockId(b))).collect();
        let at = found.iter().position(Option::is_some);
        assert_eq!(at, Some(10));
        assert_eq!(found[10].as_ref().map(Vec::len), Some(5));
    }

    #[test]
    fn no_period_is_found_where_there_is_none() {
        let mut learner = Learner::new(64);
        let mut x = 1u32;
        for _ in 0..1000 {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            assert!(learner.watch(TierId(0), BlockId(x >> 26)).is_none());
        }
    }
}
