//! Cursors: where each request stands in its schedule, and what its steps touch.

use super::Brain;
use crate::ids::{BlockId, SequenceId, StepId, TierId};
use crate::schedule::Cursor;

impl Brain {
    pub(crate) fn step_entered(&mut self, sequence: SequenceId, step: StepId) {
        let Some(Some(cursor)) = self.cursors.get(sequence.index()).copied() else { return };
        let Some(registered) = &self.schedules[cursor.schedule] else { return };
        let Some(place) = registered.step(step).copied() else { return };
        let steps = registered.steps.len() as u32;
        if step != cursor.step {
            self.leave_step(cursor.schedule, cursor.step);
            self.leave_guesses(sequence, cursor.step);
        }
        let in_order = step == cursor.step || step.0 == (cursor.step.0 + 1) % steps;
        let position = place.start as usize;
        let fraction = (u64::from(step.0) * 65_536 / u64::from(steps.max(1))) as u16;
        self.cursors[sequence.index()] = Some(Cursor { position, step, fraction, round: self.rounds, ..cursor });
        self.take_part(cursor.schedule);
        if step.0 < cursor.step.0 || steps == 1 {
            self.begin_round();
        }
        // Several sets of one step, as of a prompt's tokens, are one visit.
        if place.choice_max > 0 && (step != cursor.step || steps == 1) {
            self.visit_choices(cursor.schedule, step);
        }
        for position in place.start..place.end {
            let Some(registered) = &self.schedules[cursor.schedule] else { return };
            let block = registered.order[position as usize];
            self.mark_used(place.tier, block);
        }
        self.drop_wishes(sequence, Some(step));
        if !in_order {
            self.settle_guesses(sequence, None);
            self.forget_unwanted();
        }
    }

    /// What was brought for a step, into its tier or those that feed it, and was not used (its demand may have failed),
    /// no longer counts as brought ahead.
    fn leave_step(&mut self, schedule: usize, step: StepId) {
        let Some(registered) = &self.schedules[schedule] else { return };
        let Some(&place) = registered.step(step) else { return };
        let mut at = Some(place.tier);
        while let Some(tier) = at {
            for position in place.start..place.end {
                let Some(registered) = &self.schedules[schedule] else { return };
                let block = registered.order[position as usize];
                if self.place(tier, block).claims == 0 {
                    self.not_ahead(tier, block);
                }
            }
            at = self.tiers[tier.index()].parent;
        }
    }

    pub(crate) fn step_touched(&mut self, sequence: SequenceId, step: StepId) {
        let Some(Some(cursor)) = self.cursors.get_mut(sequence.index()) else { return };
        if cursor.step == step
            && let Some(registered) = &self.schedules[cursor.schedule]
        {
            cursor.position = registered.positions(step).end;
        }
        // A runtime may let go of a step's blocks when it is in the next step already.
        self.settle_guesses(sequence, Some(step));
    }

    pub(crate) fn touched(&mut self, tier: TierId, blocks: &[BlockId]) {
        for &block in blocks {
            if block.index() >= self.blocks.len() {
                continue;
            }
            self.mark_used(tier, block);
            self.note_choice(block);
            self.learn(tier, block);
        }
    }

    /// Uses until a block is used next in a step in which the tier plays a part, over all cursors; `None` if no cursor
    /// comes to it.
    pub(crate) fn distance(&self, tier: TierId, block: BlockId) -> Option<u64> {
        let mut nearest = None;
        for registered in self.schedules.iter().flatten() {
            let Some(Some(coverage)) = registered.coverage.get(tier.index()) else { continue };
            for sequence in &registered.sequences {
                let Some(Some(cursor)) = self.cursors.get(sequence.index()) else { continue };
                let distance = if coverage.partial {
                    registered.distance_where(block, cursor.position, |consumer| self.feeds(tier, consumer))
                } else {
                    registered.distance(block, cursor.position)
                };
                nearest = match (nearest, distance) {
                    (Some(a), Some(b)) => Some(u64::min(a, b)),
                    (a, b) => a.or(b),
                };
            }
        }
        nearest
    }

    /// Uses in the longest schedule in which a tier plays a part; at least 1.
    pub(crate) fn longest_order(&self, tier: TierId) -> u64 {
        let here = |s: &&crate::schedule::Registered| matches!(s.coverage.get(tier.index()), Some(Some(_)));
        self.schedules.iter().flatten().filter(here).map(|s| s.order.len() as u64).max().unwrap_or(0).max(1)
    }
}
