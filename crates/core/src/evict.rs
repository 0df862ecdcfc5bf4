//! Which block goes. One seam, [`Evictor`]; LRU, and next-use, which is also what streams between the blocks that a
//! plan keeps.

use crate::brain::Brain;
use crate::ids::{BlockId, SequenceId, TierId};
use crate::lru::List;
use crate::schedule::{Coverage, Registered};

/// For whose sake a block may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Somebody waits: anything that can go may go.
    Demand,
    /// A block that will be used in so many uses is to be brought: only what is used later, or perhaps never, may go.
    FurtherThan(u64),
}

impl Limit {
    pub(crate) fn allows(self, distance: Option<u64>) -> bool {
        match self {
            Self::Demand => true,
            Self::FurtherThan(limit) => distance.is_none_or(|distance| distance > limit),
        }
    }
}

/// Chooses a victim among what can go.
pub(crate) trait Evictor {
    /// A resident block that nobody claims, pins, or plans to keep; `None` if there is none under the limit.
    fn victim(&self, brain: &Brain, tier: TierId, limit: Limit) -> Option<BlockId>;
}

/// Blocks that could go, and that are looked at for the sake of one that nobody waits for.
const LOOK_MAX: usize = 64;

/// The least recently used goes. What was brought ahead and not used yet goes last.
pub(crate) struct LeastRecentlyUsed;

impl Evictor for LeastRecentlyUsed {
    fn victim(&self, brain: &Brain, tier: TierId, limit: Limit) -> Option<BlockId> {
        let lru = &brain.tiers[tier.index()].lru;
        let oldest = |list, unused_too: bool| {
            lru.oldest_first(list)
                .map(|index| BlockId(index as u32))
                .filter(|&block| brain.could_go(tier, block) && (unused_too || !brain.place(tier, block).unused))
                .take(LOOK_MAX)
                .find(|&block| limit == Limit::Demand || limit.allows(brain.distance(tier, block)))
        };
        for unused_too in [false, true] {
            if unused_too && limit != Limit::Demand {
                break;
            }
            let lists = [List::Scheduled, List::Free, List::Chosen].map(|list| oldest(list, unused_too));
            let older = lists.into_iter().flatten().min_by_key(|block| lru.stamp(block.index()));
            if older.is_some() {
                return older;
            }
        }
        None
    }
}

/// Uses that are looked at behind each cursor.
const LOOK_BACK_MAX: usize = 64;

/// The one used furthest in the future goes (Belady's MIN). The exact choice needs no search: between two cursors the
/// block with the longest time to its next use is the one that the cursor ahead has just passed.
pub(crate) struct NextUse;

impl Evictor for NextUse {
    fn victim(&self, brain: &Brain, tier: TierId, limit: Limit) -> Option<BlockId> {
        let best = furthest(brain, tier, |_, coverage, before| coverage.evictable.prev(before));
        let half = brain.longest_order(tier) / 2;
        // Just used and needed again only in half a cycle: surely later than an expert that was used a while ago.
        match best {
            Some((distance, block)) if distance > half && limit.allows(Some(distance)) => Some(block),
            Some((distance, block)) => {
                unscheduled(brain, tier, limit).or_else(|| limit.allows(Some(distance)).then_some(block))
            }
            None => unscheduled(brain, tier, limit),
        }
    }
}

/// Of the blocks whose use no schedule foretells, the one that is missed least.
fn unscheduled(brain: &Brain, tier: TierId, limit: Limit) -> Option<BlockId> {
    let lru = &brain.tiers[tier.index()].lru;
    let oldest = |list, unused_too: bool| {
        lru.oldest_first(list)
            .map(|index| BlockId(index as u32))
            .find(|&block| brain.could_go(tier, block) && (unused_too || !brain.place(tier, block).unused))
    };
    let demand = limit == Limit::Demand;
    let pair = [oldest(List::Free, demand), brain.least_missed(tier)];
    let older = pair.into_iter().flatten().min_by_key(|block| lru.stamp(block.index()));
    // What was brought on expectation is not sent away for another, or for what is brought ahead.
    older.or_else(|| if demand { oldest(List::Chosen, true) } else { None })
}

/// Among the candidates, that is blocks at positions that `prev` finds before another position of a schedule, the one
/// that is used furthest in the future, and in how many uses.
fn furthest(
    brain: &Brain,
    tier: TierId,
    prev: impl Fn(&Registered, &Coverage, usize) -> Option<usize>,
) -> Option<(u64, BlockId)> {
    let mut best: Option<(u64, BlockId)> = None;
    let mut offer = |distance: Option<u64>, block: BlockId| {
        let distance = distance.unwrap_or(u64::MAX);
        if best.is_none_or(|(furthest, _)| distance > furthest) {
            best = Some((distance, block));
        }
    };
    for registered in brain.schedules.iter().flatten() {
        let Some(Some(coverage)) = registered.coverage.get(tier.index()) else { continue };
        let length = registered.order.len();
        if registered.sequences.is_empty()
            && let Some(at) = prev(registered, coverage, length)
        {
            let block = registered.order[at];
            offer(brain.distance(tier, block), block);
        }
        for sequence in &registered.sequences {
            let Some(cursor) = brain.cursors[sequence.index()] else { continue };
            let mut at = cursor.position;
            let mut wrapped = false;
            for _ in 0..LOOK_BACK_MAX {
                at = match prev(registered, coverage, at) {
                    Some(at) if !wrapped || at >= cursor.position => at,
                    None if !wrapped => {
                        (at, wrapped) = (length, true);
                        continue;
                    }
                    _ => break,
                };
                let block = registered.order[at];
                let distance = brain.distance(tier, block);
                offer(distance, block);
                // A block that comes several times may come again before this use; then the next one back may be used
                // later than it.
                let reached = |&s: &SequenceId| {
                    let cursor = brain.cursors[s.index()]?;
                    Some(registered.distance_to(at, cursor.position))
                };
                if distance.is_none_or(|d| registered.sequences.iter().filter_map(reached).any(|r| d >= r)) {
                    break;
                }
            }
        }
    }
    best
}

/// So many candidates are compared one by one.
const COMPARE_MAX: usize = 64;

/// Any block that can go, kept or not: the one used furthest in the future. Only for demands that find nothing else.
pub(crate) fn any(brain: &Brain, tier: TierId) -> Option<BlockId> {
    let could_go = &brain.tiers[tier.index()].could_go;
    if could_go.len() > COMPARE_MAX {
        let prev = |registered: &Registered, coverage: &Coverage, before: usize| {
            (0..before).rev().find(|&at| {
                could_go.contains(registered.order[at].index())
                    && (!coverage.partial || brain.feeds(tier, registered.tier_at(at)))
            })
        };
        if let Some((_, block)) = furthest(brain, tier, prev) {
            return Some(block);
        }
    }
    let members = std::iter::successors(could_go.next(0), |&member| could_go.next(member + 1));
    let mut best: Option<(u64, BlockId)> = None;
    for block in members.map(|member| BlockId(member as u32)) {
        let distance = brain.distance(tier, block).unwrap_or(u64::MAX);
        if best.is_none_or(|(furthest, _)| distance > furthest) {
            best = Some((distance, block));
        }
    }
    best.map(|(_, block)| block)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::{
        BlockSize, Command, Config, Event, Evict, Prefetch, Schedule, ScheduleId, Step, StepId, Ticket, TierConfig,
    };

    fn tell(brain: &mut Brain, event: Event<'_>) {
        brain.handle(event, 0);
        while let Some(command) = brain.poll() {
            match command {
                Command::Read { transfer, .. } => brain.handle(Event::TransferDone { transfer }, 0),
                Command::Retire { tier, block } => brain.handle(Event::Retired { tier, block }, 0),
                _ => {}
            }
        }
    }

    /// Walking back from the cursors finds the same as comparing all, whatever is pinned.
    #[test]
    fn the_walk_finds_what_is_used_furthest_in_the_future() {
        const BLOCKS: u32 = 400;
        let tier = TierId(0);
        let mut chance = 7u32;
        let mut random = move |below: u32| {
            chance = chance.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (chance >> 8) % below
        };
        for round in 0..60 {
            let config = Config {
                slot_bytes: 1,
                tiers: vec![TierConfig { label: "t".into(), budget_bytes: 300, slots_per_slab: 16, parent: None }],
                blocks: vec![BlockSize { bytes: 1, slots: 1, wire: 0 }; BLOCKS as usize],
                evict: if round % 2 == 0 { Evict::Planned } else { Evict::NextUse },
                prefetch: Prefetch::Off,
                window_bytes: 8,
            };
            let mut brain = Brain::new(config).unwrap();
            let mut order: Vec<u32> = (0..BLOCKS).collect();
            (0..BLOCKS).for_each(|at| order.swap(at as usize, random(BLOCKS) as usize));
            // Some come again, to show that the nearest use counts.
            (0..round % 3 * 40).for_each(|_| order.insert(random(BLOCKS) as usize, random(BLOCKS)));
            let steps = order.iter().map(|&b| Step { tier, blocks: vec![BlockId(b)], choice_max: 0 }).collect();
            let schedule = Schedule { label: "cycle".into(), cyclic: true, steps, standing: Vec::new() };
            let id = brain.add_schedule(&schedule).unwrap();
            assert_eq!(id, ScheduleId(0));
            for _ in 0..=round % 4 {
                let sequence = brain.open_sequence(id).unwrap();
                let step = StepId(random(BLOCKS));
                tell(&mut brain, Event::StepEntered { sequence, step });
            }
            for ticket in 0..300 {
                let (ticket, blocks) = (Ticket(ticket), [BlockId(random(BLOCKS))]);
                tell(&mut brain, Event::Demand { ticket, tier, blocks: &blocks, deadline: 1 });
            }
            for block in (0..BLOCKS).map(BlockId).filter(|_| random(100) < round) {
                if brain.is_resident(tier, block) {
                    brain.place_mut(tier, block).pinned = true;
                    brain.refresh(tier, block);
                }
            }
            brain.audit().unwrap();
            let candidates = (0..BLOCKS).map(BlockId).filter(|&b| brain.could_go(tier, b));
            let distance = |block: BlockId| brain.distance(tier, block).unwrap_or(u64::MAX);
            let furthest = candidates.map(distance).max();
            assert!(brain.tiers[0].could_go.len() > COMPARE_MAX, "the walk is not tried");
            assert_eq!(any(&brain, tier).map(distance), furthest, "round {round}");
        }
    }
}
