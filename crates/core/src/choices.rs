//! What steps choose at run time (experts): how likely each candidate is to be chosen when its step comes round again.
//!
//! Recency over all uses is a poor guide. The experts of the next layer were used longest ago of all, a whole cycle, so
//! as soon as memory holds less than one token chooses, the least recently used is always what is needed next, and
//! nothing is ever hit. What counts is how many *visits of its own step* ago an expert was chosen, and how often it
//! used to be. How much each of the two says differs from router to router (some stick to their choices, some have
//! favourites), so it is learned: for every pair of an age and a rate, both in steps of √2, how many of the candidates
//! that stood there were chosen at the next visit. All steps learn together, so a few tokens suffice.
//!
//! What this module does not do: prefetch. It only says which candidate is missed least.

use crate::brain::Brain;
use crate::ids::{BlockId, StepId, TierId};
use crate::lru::List;
use crate::schedule::Schedule;

/// No group.
const NONE: u32 = u32::MAX;
/// Classes of age, and as many of rate.
const CLASSES: usize = 16;
/// The rate of choices is halved in 45 visits of silence: an exponential average over 64.
const RATE_VISITS: u32 = 64;
/// Rates are told as −64 · log2; an average over 64 visits loses 93/64 of these units a visit.
const COLD_PER_OCTAVE: u32 = 64;
const COLD_PER_64_VISITS: u32 = 93;
/// Rarer than all that is told apart.
const COLD_MAX: u32 = COLD_PER_OCTAVE * 8;
/// A cell that has seen so many candidates forgets half, so that it follows a router that changes.
const SEEN_MAX: u32 = 1 << 14;
/// In so many visits of each group all that were not chosen are looked at, then only in one of [`TEACH_EVERY`], and each
/// counts for as many: there are many of them, and it takes time.
const TEACH_FIRST: u32 = 16;
const TEACH_EVERY: u32 = 4;
/// Visits after which what was learned is worked out anew.
const LEARN_EVERY: u32 = 16;
/// One time round the schedule, in the unit of waits.
const CYCLE: u64 = 1 << 16;
/// Candidates remembered for each group and tier, those that are missed least.
const OFFERS: usize = 8;

/// Candidates of one step, or of several steps (of several schedules) that choose among the same.
#[derive(Clone, Debug)]
struct Group {
    start: u32,
    end: u32,
    visits: u32,
    /// Where it is visited: the schedule, and where in its round, in 65536ths.
    at: Vec<(u32, u16)>,
}

/// How many candidates of an age and a rate were seen at a visit, and how many of them were chosen.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    seen: u32,
    chosen: u32,
}

/// What is known of candidates and their steps.
#[derive(Clone, Debug)]
pub(crate) struct Choices {
    groups: Vec<Group>,
    members: Vec<BlockId>,
    /// By block.
    group_of: Vec<u32>,
    /// Visit of the group in which the block was chosen last; 0: never.
    last: Vec<u32>,
    /// Its rate then.
    cold: Vec<u16>,
    /// By schedule: steps that choose, in order, with each of the groups that they visit.
    by_step: Vec<Vec<(u32, u32)>>,
    cells: Vec<Cell>,
    /// By cell: times round the schedule until a candidate is chosen, beyond the next one, in 65536ths.
    waits: Vec<u32>,
    visits: u32,
}

/// Of one group in one tier, the blocks that could go and are missed least, the least first.
#[derive(Clone, Debug)]
pub(crate) struct Offers {
    best: [(u64, BlockId); OFFERS],
    len: u8,
    /// There are no others.
    whole: bool,
    stale: bool,
}

impl Offers {
    fn new() -> Self {
        Self { best: [(0, BlockId(0)); OFFERS], len: 0, whole: false, stale: true }
    }

    /// Something has changed for all of them.
    pub(crate) fn forget(&mut self) {
        self.stale = true;
    }

    fn list(&self) -> &[(u64, BlockId)] {
        &self.best[..usize::from(self.len)]
    }

    /// Puts a block in its place, if it has one.
    fn insert(&mut self, wait: u64, block: BlockId) {
        let len = usize::from(self.len);
        let at = self.list().partition_point(|&(other, _)| other >= wait);
        if at == len && (len == OFFERS || !self.whole) {
            self.whole = false;
            return;
        }
        if len == OFFERS {
            self.whole = false;
        } else {
            self.len += 1;
        }
        let end = usize::from(self.len);
        self.best[at..end].rotate_right(1);
        self.best[at] = (wait, block);
    }

    fn remove(&mut self, block: BlockId) {
        let Some(at) = self.list().iter().position(|&(_, b)| b == block) else { return };
        self.best[at..usize::from(self.len)].rotate_left(1);
        self.len -= 1;
        self.stale |= self.len == 0 && !self.whole;
    }
}

/// The class of an age of so many visits, at least 1: √2 wide.
fn age_class(age: u32) -> usize {
    let octave = age.max(1).ilog2();
    let half = if octave == 0 { 0 } else { age >> (octave - 1) & 1 };
    ((2 * octave + half) as usize).min(CLASSES - 2)
}

/// For how many each candidate that a visit did not choose counts. There is no visit before the first.
fn weight(visit: u32, group: u32) -> u32 {
    match visit {
        0 => 0,
        1..=TEACH_FIRST => 1,
        _ if visit.wrapping_add(group).is_multiple_of(TEACH_EVERY) => TEACH_EVERY,
        _ => 0,
    }
}

/// The rate, in 65536ths, that `cold` stands for; between whole octaves on a straight line.
fn rate_of(cold: u32) -> u32 {
    let (octaves, rest) = (cold / COLD_PER_OCTAVE, cold % COLD_PER_OCTAVE);
    (65_536 - rest * 65_536 / (2 * COLD_PER_OCTAVE)) >> octaves.min(31)
}

/// The inverse of [`rate_of`].
fn cold_of(rate: u32) -> u32 {
    let rate = rate.clamp(1, 65_536);
    let octaves = 16 - (2 * rate - 1).ilog2();
    let within = rate << octaves;
    octaves * COLD_PER_OCTAVE + (65_536 - within) * 2 * COLD_PER_OCTAVE / 65_536
}

impl Choices {
    pub(crate) fn new(blocks: usize) -> Self {
        let mut choices = Self {
            groups: Vec::new(),
            members: Vec::new(),
            group_of: vec![NONE; blocks],
            last: Vec::new(),
            cold: Vec::new(),
            by_step: Vec::new(),
            cells: vec![Cell::default(); CLASSES * CLASSES],
            waits: vec![0; CLASSES * CLASSES],
            visits: 0,
        };
        choices.work_out();
        choices
    }

    /// Makes groups of a schedule's candidates that are in none.
    fn register(&mut self, id: usize, schedule: &Schedule) {
        if self.by_step.len() <= id {
            self.by_step.resize(id + 1, Vec::new());
        }
        self.by_step[id].clear();
        self.groups.iter_mut().for_each(|g| g.at.retain(|(s, _)| *s as usize != id));
        let steps = schedule.steps.len().max(1);
        for (index, step) in schedule.steps.iter().enumerate().filter(|(_, s)| s.choice_max > 0) {
            if self.last.is_empty() {
                let blocks = self.group_of.len();
                (self.last, self.cold) = (vec![0; blocks], vec![COLD_MAX as u16; blocks]);
            }
            let (new, start) = (self.groups.len() as u32, self.members.len() as u32);
            let first = self.by_step[id].len();
            for &block in &step.blocks {
                let group = &mut self.group_of[block.index()];
                if *group == NONE {
                    *group = new;
                    self.members.push(block);
                }
                let visited = (index as u32, *group);
                // Candidates of one group lie together, so this is the last one nearly always.
                if !self.by_step[id][first..].iter().rev().any(|v| *v == visited) {
                    self.by_step[id].push(visited);
                }
            }
            let end = self.members.len() as u32;
            if end > start {
                self.groups.push(Group { start, end, visits: 0, at: Vec::new() });
            }
            let fraction = (index * CYCLE as usize / steps) as u16;
            for &(_, group) in &self.by_step[id][first..] {
                self.groups[group as usize].at.push((id as u32, fraction));
            }
        }
    }

    /// Groups that a step visits.
    fn visited(&self, schedule: usize, step: StepId) -> std::ops::Range<usize> {
        let Some(steps) = self.by_step.get(schedule) else { return 0..0 };
        let from = steps.partition_point(|&(s, _)| s < step.0);
        from..from + steps[from..].iter().take_while(|&&(s, _)| s == step.0).count()
    }

    fn cold_at(&self, block: usize, visit: u32) -> u32 {
        let silent = (visit - self.last[block]).min(RATE_VISITS * 16);
        (u32::from(self.cold[block]) + silent * COLD_PER_64_VISITS / 64).min(COLD_MAX - 1)
    }

    /// Where a block stands at a visit in which nothing has been chosen yet.
    fn cell(&self, block: usize, visit: u32) -> usize {
        if self.last[block] == 0 {
            return CLASSES * CLASSES - 1;
        }
        let rate = self.cold_at(block, visit) * 2 / COLD_PER_OCTAVE;
        age_class(visit - self.last[block]) * CLASSES + rate as usize
    }

    /// A step that chooses was entered.
    fn visit(&mut self, group: usize) {
        let Group { start, end, visits, .. } = self.groups[group];
        let weight = weight(visits, group as u32);
        if weight > 0 {
            for at in start..end {
                let block = self.members[at as usize].index();
                if self.last[block] != visits {
                    let cell = self.cell(block, visits);
                    self.cells[cell].seen += weight;
                }
            }
        }
        self.groups[group].visits = visits.saturating_add(1);
        self.visits = self.visits.wrapping_add(1);
        if self.visits.is_multiple_of(LEARN_EVERY) {
            self.work_out();
        }
    }

    /// A candidate was chosen. False if that was known.
    fn choose(&mut self, block: usize, group: usize) -> bool {
        let visit = self.groups[group].visits.max(1);
        self.groups[group].visits = visit;
        if self.last[block] == visit {
            return false;
        }
        let cell = self.cell(block, visit);
        self.cells[cell].seen += 1;
        self.cells[cell].chosen += 1;
        let rate = if self.last[block] == 0 { 0 } else { rate_of(self.cold_at(block, visit)) };
        self.cold[block] = cold_of(rate + 65_536 / RATE_VISITS).min(COLD_MAX - 1) as u16;
        self.last[block] = visit;
        true
    }

    /// Times round that candidates wait, from what was seen. A cell that has seen little is taken for what its age says.
    fn work_out(&mut self) {
        for (index, cell) in self.cells.iter_mut().enumerate() {
            if cell.seen > SEEN_MAX {
                (cell.seen, cell.chosen) = (cell.seen / 2, cell.chosen / 2);
            }
            let guess = u64::from(rate_of((index / CLASSES) as u32 * COLD_PER_OCTAVE / 2)).max(1);
            // Half a candidate was seen, so to speak, and chosen with that probability.
            let (seen, chosen) = (u64::from(cell.seen) * 2 * CYCLE + CYCLE, u64::from(cell.chosen) * 2 * CYCLE + guess);
            let wait = (seen - chosen.min(seen)) * CYCLE / chosen;
            self.waits[index] = u32::try_from(wait).unwrap_or(u32::MAX);
        }
    }

    /// How little a block is missed: the wait; of equal ones, the rate.
    fn wait(&self, block: usize, group: usize) -> u64 {
        let next = self.groups[group].visits.saturating_add(1);
        u64::from(self.waits[self.cell(block, next)]) << 16 | u64::from(self.cold_at(block, next))
    }

    fn group_of(&self, block: BlockId) -> Option<usize> {
        let group = self.group_of[block.index()];
        (group != NONE).then_some(group as usize)
    }
}

impl Brain {
    /// Learns which candidates there are, when a schedule has been registered.
    pub(crate) fn register_choices(&mut self, id: usize, schedule: &Schedule) {
        self.choices.register(id, schedule);
        for tier in &mut self.tiers {
            tier.offers.resize(self.choices.groups.len(), Offers::new());
        }
    }

    /// Whether some step chooses the block.
    pub(crate) fn is_candidate(&self, block: BlockId) -> bool {
        self.choices.group_of(block).is_some()
    }

    /// A sequence comes to a step anew.
    pub(crate) fn visit_choices(&mut self, schedule: usize, step: StepId) {
        for at in self.choices.visited(schedule, step) {
            let group = self.choices.by_step[schedule][at].1 as usize;
            self.choices.visit(group);
            // All its candidates are a visit older.
            self.tiers.iter_mut().for_each(|t| t.offers[group].stale = true);
        }
    }

    /// A block was used: if it is a candidate, it was chosen.
    pub(crate) fn note_choice(&mut self, block: BlockId) {
        let Some(group) = self.choices.group_of(block) else { return };
        if self.choices.choose(block.index(), group) {
            for tier in 0..self.tiers.len() {
                self.tiers[tier].offers[group].remove(block);
                self.offer(TierId(tier as u32), block);
            }
        }
    }

    fn is_on_offer(&self, tier: TierId, block: BlockId) -> bool {
        let t = &self.tiers[tier.index()];
        t.could_go.contains(block.index())
            && !t.places[block.index()].unused
            && !t.kept.contains(block.index())
            && t.lru.is_in(block.index(), List::Chosen)
    }

    /// A candidate can go now, or can't any more.
    pub(crate) fn offer(&mut self, tier: TierId, block: BlockId) {
        let Some(group) = self.choices.group_of(block) else { return };
        if self.tiers[tier.index()].offers[group].stale {
            return;
        }
        let on_offer = self.is_on_offer(tier, block);
        let wait = if on_offer { self.choices.wait(block.index(), group) } else { 0 };
        let offers = &mut self.tiers[tier.index()].offers[group];
        if !on_offer {
            offers.remove(block);
        } else if !offers.list().iter().any(|&(_, b)| b == block) {
            offers.insert(wait, block);
        }
    }

    /// Brings the offers of all groups up to date.
    pub(crate) fn refresh_offers(&mut self, tier: TierId) {
        for group in 0..self.choices.groups.len() {
            if !self.tiers[tier.index()].offers[group].stale {
                continue;
            }
            let mut offers = Offers { whole: true, stale: false, ..Offers::new() };
            let Group { start, end, .. } = self.choices.groups[group];
            for at in start..end {
                let block = self.choices.members[at as usize];
                if self.is_on_offer(tier, block) {
                    offers.insert(self.choices.wait(block.index(), group), block);
                }
            }
            self.tiers[tier.index()].offers[group] = offers;
        }
    }

    /// The candidate that is missed least of those that can go, were used, and are not kept: by the time until its step
    /// comes, and how often that must come until it is chosen. Offers must be up to date.
    pub(crate) fn least_missed(&self, tier: TierId) -> Option<BlockId> {
        let mut best: Option<(u64, BlockId)> = None;
        for (group, offers) in self.choices.groups.iter().zip(&self.tiers[tier.index()].offers) {
            let Some(&(wait, block)) = offers.list().first() else { continue };
            let wait = (wait >> 16) + self.until(group);
            if best.is_none_or(|(longest, _)| wait > longest) {
                best = Some((wait, block));
            }
        }
        best.map(|(_, block)| block)
    }

    /// Until a sequence comes to a group's steps, in 65536ths of a time round; without any sequence, for ever.
    fn until(&self, group: &Group) -> u64 {
        let mut nearest = None;
        for &(schedule, fraction) in &group.at {
            let Some(Some(registered)) = self.schedules.get(schedule as usize) else { continue };
            for sequence in &registered.sequences {
                let Some(Some(cursor)) = self.cursors.get(sequence.index()) else { continue };
                // The step that it stands at is behind it.
                let until = u64::from(fraction.wrapping_sub(cursor.fraction).wrapping_sub(1));
                nearest = Some(nearest.map_or(until, |nearest: u64| nearest.min(until)));
            }
        }
        nearest.unwrap_or(u64::from(u32::MAX))
    }
}

impl Brain {
    /// Checks what is on offer in a tier against the books.
    pub(crate) fn audit_offers(&self, tier: TierId) -> Result<(), String> {
        for (index, (group, offers)) in self.choices.groups.iter().zip(&self.tiers[tier.index()].offers).enumerate() {
            if offers.stale {
                continue;
            }
            let wrong = |what: String| Err(format!("tier {tier}, group {index}: {what}"));
            let listed = |block: BlockId| offers.list().iter().filter(|(_, b)| *b == block).count();
            if !offers.list().is_sorted_by(|a, b| a.0 >= b.0) {
                return wrong(format!("offers are not in order: {:?}", offers.list()));
            }
            for &block in &self.choices.members[group.start as usize..group.end as usize] {
                let on_offer = self.is_on_offer(tier, block);
                let found = listed(block);
                let forgotten = on_offer && found == 0 && (offers.whole || offers.len == 0);
                if found > usize::from(on_offer) || forgotten {
                    return wrong(format!("block {block} is listed {found} times, on offer: {on_offer}"));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Step;
    use proptest::prelude::*;

    #[test]
    fn rates_and_their_logarithms_are_inverse_to_each_other() {
        for cold in 0..COLD_MAX {
            assert!(cold_of(rate_of(cold)).abs_diff(cold) <= 1, "{cold}");
        }
        assert_eq!((rate_of(0), rate_of(COLD_PER_OCTAVE), cold_of(65_536)), (65_536, 32_768, 0));
        assert!((1..65_536).all(|rate| cold_of(rate) >= cold_of(rate + 1)));
    }

    #[test]
    fn classes_of_age_widen_by_a_factor_of_two_every_second() {
        assert_eq!([1, 2, 3, 4, 6, 8, 12, 100, u32::MAX].map(age_class), [0, 2, 3, 4, 5, 6, 7, 13, 14]);
    }

    fn choose_among(steps: &[&[u32]]) -> Schedule {
        let step = |blocks: &&[u32]| Step {
            blocks: blocks.iter().map(|&b| BlockId(b)).collect(),
            choice_max: 1,
            ..Step::default()
        };
        Schedule { cyclic: true, steps: steps.iter().map(step).collect(), ..Schedule::default() }
    }

    /// Two schedules that choose among the same (a prompt's and a token's) share what is known of them.
    #[test]
    fn the_same_candidates_are_one_group_in_every_schedule() {
        let mut choices = Choices::new(9);
        choices.register(0, &choose_among(&[&[0, 1, 2], &[3, 4, 5]]));
        choices.register(1, &choose_among(&[&[0, 1, 2], &[3, 4, 5, 6], &[7]]));
        assert_eq!(choices.groups.len(), 4);
        assert_eq!(choices.by_step[1], [(0, 0), (1, 1), (1, 2), (2, 3)]);
        assert_eq!(choices.visited(1, StepId(1)), 1..3);
        assert_eq!(choices.groups[0].at.len(), 2);
        // Registered anew in the same place, it is not visited twice.
        choices.register(1, &choose_among(&[&[0, 1, 2]]));
        assert_eq!((choices.groups[0].at.len(), choices.groups[3].at.len()), (2, 0));
    }

    /// A router that has favourites and one that never chooses the same twice teach opposite things.
    #[test]
    fn what_is_chosen_again_is_learned_from_what_was_chosen() {
        let waits = |favourites: bool| {
            let mut choices = Choices::new(16);
            choices.register(0, &choose_among(&[&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]));
            for turn in 0..400 {
                choices.visit(0);
                choices.choose(if favourites { turn / 2 % 2 } else { turn % 16 }, 0);
            }
            choices.work_out();
            let latest = if favourites { 1 } else { 15 };
            let longest_ago = if favourites { 9 } else { 0 };
            (choices.wait(latest, 0), choices.wait(longest_ago, 0))
        };
        let (latest, longest_ago) = waits(true);
        assert!(latest < longest_ago, "{latest} {longest_ago}");
        let (latest, longest_ago) = waits(false);
        assert!(latest > longest_ago, "{latest} {longest_ago}");
    }

    proptest! {
        /// As long as the list is not used up, its first is what a full list would have first.
        #[test]
        fn offers_know_the_first_of_all(ops in proptest::collection::vec((0u32..24, any::<bool>(), 0u64..50), 0..120)) {
            let mut offers = Offers { whole: true, stale: false, ..Offers::new() };
            let mut model: Vec<(u64, BlockId)> = Vec::new();
            for (block, insert, wait) in ops {
                let block = BlockId(block);
                let known = model.iter().position(|(_, b)| *b == block);
                match (insert, known) {
                    (true, None) => {
                        model.push((wait, block));
                        offers.insert(wait, block);
                    }
                    (false, Some(at)) => {
                        model.swap_remove(at);
                        offers.remove(block);
                    }
                    _ => {}
                }
                if offers.stale {
                    offers = Offers { whole: true, stale: false, ..Offers::new() };
                    model.iter().for_each(|&(wait, block)| offers.insert(wait, block));
                }
                let first = offers.list().first().map(|(wait, _)| *wait);
                prop_assert_eq!(first, model.iter().map(|(wait, _)| *wait).max());
                prop_assert!(offers.list().is_sorted_by(|a, b| a.0 >= b.0));
                prop_assert!(!offers.whole || usize::from(offers.len) == model.len());
            }
        }
    }
}
