//! Which block goes. One seam, [`Evictor`]; LRU, and next-use, which is also what streams between the blocks that a
//! plan keeps.

use crate::brain::Brain;
use crate::ids::{BlockId, SequenceId, TierId};
use crate::lru::List;

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

/// The least recently used goes. What was brought ahead and not used yet goes last.
pub(crate) struct LeastRecentlyUsed;

impl Evictor for LeastRecentlyUsed {
    fn victim(&self, brain: &Brain, tier: TierId, limit: Limit) -> Option<BlockId> {
        let lru = &brain.tiers[tier.index()].lru;
        let oldest = |list, unused_too: bool| {
            lru.oldest_first(list).map(|index| BlockId(index as u32)).find(|&block| {
                brain.could_go(tier, block)
                    && (unused_too || !brain.place(tier, block).unused)
                    && limit.allows(brain.distance(tier, block))
            })
        };
        for unused_too in [false, true] {
            if unused_too && limit != Limit::Demand {
                break;
            }
            let pair = [oldest(List::Scheduled, unused_too), oldest(List::Free, unused_too)];
            let older = pair.into_iter().flatten().min_by_key(|block| lru.stamp(block.index()));
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
        let mut best: Option<(u64, BlockId)> = None;
        let mut offer = |distance: Option<u64>, block: BlockId| {
            let distance = distance.unwrap_or(u64::MAX);
            if best.is_none_or(|(furthest, _)| distance > furthest) {
                best = Some((distance, block));
            }
        };
        let mut cycle = 1;
        for registered in brain.schedules.iter().flatten() {
            let Some(Some(coverage)) = registered.coverage.get(tier.index()) else { continue };
            let evictable = &coverage.evictable;
            let length = registered.order.len();
            cycle = cycle.max(length as u64);
            if registered.sequences.is_empty()
                && let Some(at) = evictable.prev(length)
            {
                let block = registered.order[at];
                offer(brain.distance(tier, block), block);
            }
            for sequence in &registered.sequences {
                let Some(cursor) = brain.cursors[sequence.index()] else { continue };
                let mut at = cursor.position;
                let mut wrapped = false;
                for _ in 0..LOOK_BACK_MAX {
                    at = match evictable.prev(at) {
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
                    // A block that comes several times may come again before this use; then the next one back may be
                    // used later than it.
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
        let unscheduled = brain.tiers[tier.index()].lru.oldest_first(List::Free).map(|b| BlockId(b as u32));
        let mut unscheduled = unscheduled.filter(|&block| brain.could_go(tier, block));
        // Just used and needed again only in half a cycle: surely later than an expert that was used a while ago.
        match best {
            Some((distance, block)) if distance > cycle / 2 && limit.allows(Some(distance)) => Some(block),
            Some((distance, block)) => unscheduled.next().or_else(|| limit.allows(Some(distance)).then_some(block)),
            None => unscheduled.next(),
        }
    }
}

/// Any block that can go, kept or not: the one used furthest in the future. Only for demands that find nothing else.
pub(crate) fn any(brain: &Brain, tier: TierId) -> Option<BlockId> {
    let mut best: Option<(u64, BlockId)> = None;
    for index in 0..brain.blocks.len() {
        let block = BlockId(index as u32);
        if brain.could_go(tier, block) {
            let distance = brain.distance(tier, block).unwrap_or(u64::MAX);
            if best.is_none_or(|(furthest, _)| distance > furthest) {
                best = Some((distance, block));
            }
        }
    }
    best.map(|(_, block)| block)
}
