//! Rounds: which schedules and cursors take part at present, and whether the cursors of a cycle go together.
//!
//! Sequences that are far apart in a cycle each stream what is not kept for themselves. If instead the block that is
//! used furthest in the future goes, whatever the plan, those behind find what those ahead have just read; they catch
//! up, and in the end a block is read once for all of them. So no set is kept while cursors are apart.

use super::Brain;
use crate::schedule::Registered;

/// A schedule that no sequence has walked for so many rounds of others is not planned for. Long, since the plan moves.
const IDLE_ROUNDS: u64 = 64;
/// A cursor that stood still for so many rounds of each of the others waits for something else than blocks.
const PARKED_ROUNDS: u64 = 2;
/// Cursors further apart than so many rings are apart, and together once they are within one.
const APART_RINGS: u64 = 4;
/// Cursors compared with each other.
const COMPARE_MAX: usize = 64;

impl Brain {
    /// A sequence begins, or comes round to its beginning.
    pub(crate) fn begin_round(&mut self) {
        self.rounds += 1;
        let mut moved = false;
        for registered in self.schedules.iter_mut().flatten() {
            let idle = self.rounds - registered.round > IDLE_ROUNDS;
            moved |= idle && !registered.idle;
            registered.idle |= idle;
        }
        let apart = self.are_apart();
        if moved || apart != self.apart {
            self.apart = apart;
            self.replan();
        }
    }

    /// A schedule is walked: it is planned for again.
    pub(crate) fn take_part(&mut self, schedule: usize) {
        let Some(registered) = &mut self.schedules[schedule] else { return };
        registered.round = self.rounds;
        if std::mem::take(&mut registered.idle) {
            self.replan();
        }
    }

    fn are_apart(&self) -> bool {
        let ring = self.tiers.iter().map(|t| t.ring_slots as u64).max().unwrap_or(0).max(1);
        let most = if self.apart { ring } else { ring * APART_RINGS };
        self.schedules.iter().flatten().filter(|s| s.cyclic && !s.idle).any(|s| self.span(s) > most)
    }

    /// Uses from the hindmost of a cycle's cursors to the foremost, those that are parked left out.
    fn span(&self, registered: &Registered) -> u64 {
        let open = registered.sequences.len() as u64;
        let positions = || {
            let cursors = registered.sequences.iter().take(COMPARE_MAX).filter_map(|s| self.cursors[s.index()]);
            cursors.filter(|c| self.rounds - c.round <= PARKED_ROUNDS * open).map(|c| c.position)
        };
        // The widest gap between neighbours is outside.
        let to_next = |at: usize| {
            let others = positions().map(|other| registered.distance_to(other, at)).filter(|&distance| distance > 0);
            others.min().unwrap_or(0)
        };
        let widest = positions().map(to_next).max().unwrap_or(0);
        if widest == 0 { 0 } else { registered.order.len() as u64 - widest }
    }
}
