//! What is brought before it is asked for: the nearest uses whose blocks are absent, across step and token boundaries,
//! as long as the window of each wire has room and nothing that is used sooner must go.

use super::{Brain, State};
use crate::config::Prefetch;
use crate::evict::Limit;
use crate::ids::{BlockId, SequenceId, StepId, TierId};

/// Absent uses that are looked at beyond one that cannot be moved yet (its disk's window is full, its parent has not
/// got it): others may have a wire that idles.
const LOOK_PAST_MAX: usize = 64;

/// Blocks that are expected and wait for room; what is expected beyond them is not heeded.
const WISHES_MAX: usize = 64;

/// From this probability on, in thousandths, it is no guess.
const CERTAIN_MILLI: u16 = 1000;

/// A set of wires; those from the 64th on count as one.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Wires(u64);

impl Wires {
    const NONE: Self = Self(0);

    fn of(wire: u32) -> Self {
        Self(1 << wire.min(63))
    }

    fn below(count: u32) -> Self {
        Self(u64::MAX >> (64 - count.clamp(1, 64)))
    }

    fn contains(self, wire: Self) -> bool {
        self.0 & wire.0 != 0
    }
}

impl Brain {
    pub(crate) fn prefetch_into(&mut self, tier: TierId) {
        if self.prefetch == Prefetch::Off {
            return;
        }
        let mut slots_max = u32::MAX;
        while self.tiers[tier.index()].awaiting.is_none() && slots_max > 0 {
            let Some((distance, block)) = self.nearest_movable(tier, slots_max) else { return };
            match self.take_slot(tier, block, Limit::FurtherThan(distance)) {
                Some(slot) => self.start_load(tier, block, slot, true),
                // No run of slots can be freed for it, nor for any as long that is used later, since less may go for
                // that; what needs a shorter run shall not wait.
                None => slots_max = self.blocks[block.index()].slots.saturating_sub(1),
            }
        }
    }

    /// The absent block of up to `slots_max` slots that is used soonest, among those that could be moved now.
    fn nearest_movable(&self, tier: TierId, slots_max: u32) -> Option<(u64, BlockId)> {
        let mut best: Option<(u64, BlockId)> = None;
        let wires = match self.tiers[tier.index()].parent {
            None => Wires::below(self.disk_ahead_bytes.len() as u32),
            Some(_) => Wires::of(0),
        };
        for registered in self.schedules.iter().flatten() {
            let Some(Some(coverage)) = registered.coverage.get(tier.index()) else { continue };
            let absent = &coverage.absent;
            for sequence in &registered.sequences {
                let Some(Some(cursor)) = self.cursors.get(sequence.index()) else { continue };
                let mut from = cursor.position;
                let mut wrapped = false;
                let mut full = Wires::NONE;
                for _ in 0..LOOK_PAST_MAX {
                    let position = match absent.next(from) {
                        Some(position) if !wrapped || position < cursor.position => position,
                        None if registered.cyclic && !wrapped => {
                            (from, wrapped) = (0, true);
                            continue;
                        }
                        _ => break,
                    };
                    let distance = registered.distance_to(position, cursor.position);
                    if best.is_some_and(|(best, _)| distance >= best) {
                        break;
                    }
                    let block = registered.order[position];
                    if self.place(tier, block).broken {
                        // Nobody waits for room for it.
                    } else if self.window_is_full(tier, block, &mut full) {
                        if full == wires {
                            break;
                        }
                    } else if self.blocks[block.index()].slots <= slots_max && self.movable(tier, block) {
                        best = Some((distance, block));
                        break;
                    }
                    from = position + 1;
                }
            }
        }
        best
    }

    /// Whether the window of the block's wire has no room for it. If so, nothing that is used later may come by that
    /// wire before it, be it ever so small: it would take the room of what is used sooner.
    fn window_is_full(&self, tier: TierId, block: BlockId, full: &mut Wires) -> bool {
        let t = &self.tiers[tier.index()];
        let size = self.blocks[block.index()];
        let (wire, ahead) = match t.parent {
            None => (Wires::of(size.wire), self.disk_ahead_bytes[size.wire as usize]),
            Some(_) => (Wires::of(0), t.ahead_bytes),
        };
        if !full.contains(wire) && ahead != 0 && ahead + size.bytes > t.window_bytes {
            full.0 |= wire.0;
        }
        full.contains(wire)
    }

    /// Whether a block could be moved into a tier, if the window has room.
    fn movable(&self, tier: TierId, block: BlockId) -> bool {
        let place = self.place(tier, block);
        let parent = self.tiers[tier.index()].parent;
        let ready = |parent: TierId| self.place(parent, block).state == State::Resident;
        place.state == State::Absent && parent.is_none_or(ready)
    }

    /// Speculation gets a quarter of the window, and nothing while the wire is busy with more; what is certain, all of
    /// it.
    fn room_to_speculate(&mut self, tier: TierId, block: BlockId, certain: bool) -> bool {
        let bytes = self.blocks[block.index()].bytes;
        let window = self.tiers[tier.index()].window_bytes / if certain { 1 } else { 4 };
        let ahead = *self.ahead_mut(tier, block);
        ahead == 0 || ahead + bytes <= window
    }
}

/// A block that was brought because a sequence's step was expected to choose it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guess {
    pub(crate) sequence: SequenceId,
    pub(crate) step: StepId,
    pub(crate) tier: TierId,
    pub(crate) block: BlockId,
    /// The sequence has chosen already and is yet to come to it: no guess, and no credit to those who guess.
    pub(crate) certain: bool,
    /// The step has been left, but the sequence has not said what it used there.
    pub(crate) left: bool,
}

impl Brain {
    /// A sequence believes that a step will choose these blocks.
    pub(crate) fn expected(&mut self, sequence: SequenceId, step: StepId, blocks: &[BlockId], probability_milli: u16) {
        let Some(Some(cursor)) = self.cursors.get(sequence.index()).copied() else { return };
        let Some(registered) = &self.schedules[cursor.schedule] else { return };
        let Some(tier) = registered.step(step).map(|s| s.tier) else { return };
        let certain = probability_milli >= CERTAIN_MILLI;
        if self.prefetch == Prefetch::Off || !certain && !self.governor.allows(probability_milli) {
            return;
        }
        for &block in blocks.iter().filter(|b| b.index() < self.blocks.len()) {
            if self.wishes.len() == WISHES_MAX {
                return;
            }
            let known = |wish: &Guess| (wish.tier, wish.block) == (tier, block);
            if self.place(tier, block).state == State::Absent && !self.wishes.iter().any(known) {
                self.wishes.push_back(Guess { sequence, step, tier, block, certain, left: false });
            }
        }
    }

    /// Brings what is expected: behind all that somebody waits for or that is known to be used soon, while little is
    /// under way.
    pub(crate) fn speculate(&mut self) {
        while let Some(&wish) = self.wishes.front() {
            let Guess { tier, block, certain, .. } = wish;
            let place = self.place(tier, block);
            let ready = |parent: TierId| self.place(parent, block).state == State::Resident;
            if place.state != State::Absent || place.broken || !self.tiers[tier.index()].parent.is_none_or(ready) {
                self.wishes.pop_front();
                continue;
            }
            if self.demands.iter().any(|d| !d.assigned) || !self.room_to_speculate(tier, block, certain) {
                return;
            }
            match self.take_slot(tier, block, Limit::FurtherThan(u64::MAX - 1)) {
                Some(slot) => {
                    self.wishes.pop_front();
                    self.place_mut(tier, block).expected = true;
                    self.guesses.push(wish);
                    self.start_load(tier, block, slot, true);
                }
                // Room is being made.
                None if self.tiers[tier.index()].awaiting.is_some() => return,
                None => {
                    self.wishes.pop_front();
                }
            }
        }
    }

    /// What a sequence expected of a step, or of any if none is given, need not be brought any more.
    pub(crate) fn drop_wishes(&mut self, sequence: SequenceId, step: Option<StepId>) {
        self.wishes.retain(|wish| wish.sequence != sequence || step.is_some_and(|step| step != wish.step));
    }

    /// A sequence has chosen at a step, or, if none is given, will not choose any more: what was guessed and not used
    /// was wrong, and must not fill the window.
    pub(crate) fn settle_guesses(&mut self, sequence: SequenceId, step: Option<StepId>) {
        self.drop_wishes(sequence, step);
        let mut at = 0;
        while let Some(&guess) = self.guesses.get(at) {
            if guess.sequence != sequence || step.is_some_and(|step| step != guess.step) {
                at += 1;
                continue;
            }
            self.settle(guess);
        }
    }

    /// A step was left. If its demand failed, nobody will say what was used there, so what was guessed no longer counts
    /// as brought ahead; whether it was wrong shows when the step is done with, or left once more.
    pub(crate) fn leave_guesses(&mut self, sequence: SequenceId, step: StepId) {
        self.drop_wishes(sequence, Some(step));
        let mut at = 0;
        while let Some(guess) = self.guesses.get_mut(at) {
            if guess.sequence != sequence || guess.step != step {
                at += 1;
                continue;
            }
            let left_before = std::mem::replace(&mut guess.left, true);
            let guess = *guess;
            if left_before {
                self.settle(guess);
                continue;
            }
            if self.place(guess.tier, guess.block).claims == 0 {
                self.not_ahead(guess.tier, guess.block);
            }
            at += 1;
        }
    }

    /// Nobody has used it. If it is still under way, it need not come.
    fn settle(&mut self, guess: Guess) {
        let Guess { tier, block, certain, .. } = guess;
        self.drop_guess(tier, block);
        if self.place(tier, block).claims == 0 {
            if !certain {
                self.governor.wasted();
            }
            self.not_ahead(tier, block);
            if self.place(tier, block).state == State::Loading {
                self.cancel_if(|t, b| (t, b) == (tier, block));
            }
        }
    }

    /// The guess that brought a block is over: it came true, turned out wrong, or the block is gone. Tells whether
    /// there was one that could have been wrong.
    pub(crate) fn drop_guess(&mut self, tier: TierId, block: BlockId) -> bool {
        if !std::mem::take(&mut self.place_mut(tier, block).expected) {
            return false;
        }
        let at = self.guesses.iter().position(|g| g.tier == tier && g.block == block);
        at.is_some_and(|at| !self.guesses.swap_remove(at).certain)
    }
}

/// Stops speculation that does not pay (invariant 7): counts what was used and what was evicted unused, forgets slowly,
/// and lets one guess in [`Governor::PROBE_EVERY`] through to see whether things have changed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Governor {
    used: u32,
    wasted: u32,
    refused: u32,
}

impl Governor {
    const MEMORY: u32 = 256;
    const PROBE_EVERY: u32 = 64;
    /// Guesses less likely than this are not worth a slot.
    const PROBABILITY_MILLI_MIN: u16 = 500;

    pub(crate) fn used(&mut self) {
        self.used += 1;
        self.forget();
    }

    pub(crate) fn wasted(&mut self) {
        self.wasted += 1;
        self.forget();
    }

    fn forget(&mut self) {
        if self.used + self.wasted > Self::MEMORY {
            self.used /= 2;
            self.wasted /= 2;
        }
    }

    pub(crate) fn allows(&mut self, probability_milli: u16) -> bool {
        if probability_milli < Self::PROBABILITY_MILLI_MIN {
            return false;
        }
        if self.wasted <= self.used + 16 {
            return true;
        }
        self.refused += 1;
        self.refused.is_multiple_of(Self::PROBE_EVERY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Invariant 7: speculation stops by itself when it does not pay.
    #[test]
    fn the_governor_stops_what_does_not_pay_and_probes() {
        let mut governor = Governor::default();
        assert!(governor.allows(900) && !governor.allows(100));
        for _ in 0..40 {
            governor.wasted();
        }
        let allowed = (0..640).filter(|_| governor.allows(900)).count();
        assert_eq!(allowed, 10);
        for _ in 0..60 {
            governor.used();
        }
        assert!(governor.allows(900));
    }
}
