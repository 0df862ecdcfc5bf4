//! What stays: the kept set of each tier.
//!
//! In a cycle of T bytes under a budget of B, at least T − B bytes must be read per cycle. That is reached by keeping a
//! fixed set and streaming the rest through a ring of R bytes: T − (B − R). The kept set is spread evenly over the
//! cycle, so that what streams is needed at an even pace and the disk never has to wait for the cursor.

use super::{Brain, State};
use crate::bitset::BitSet;
use crate::config::{Evict, TooSmall};
use crate::ids::{BlockId, TierId};
use crate::schedule::{Coverage, Registered};

/// Blocks whose bytes differ by less than this part of a slot count as equally worth keeping; the first that is good
/// enough.
const SIZE_CLASSES: [u64; 3] = [16, 128, 1024];
/// Blocks that differ by a byte differ.
const SIZE_CLASSES_EXACT: u64 = u64::MAX;
/// Uses per cycle of a block that is leased all the time: more than any other has.
const STANDING_USES: u64 = u32::MAX as u64;

/// What a tier must hold at once, in slots.
#[derive(Clone, Copy, Debug, Default)]
struct Needs {
    standing: usize,
    /// Of the largest step.
    step: usize,
}

/// A disk's part of a class of blocks, in slots.
#[derive(Clone, Copy, Debug, Default)]
struct Share {
    all: u64,
    take: u64,
    seen: u64,
    taken: u64,
}

impl Brain {
    /// The policy that is really applied.
    pub(crate) fn evict_in_force(&self) -> Evict {
        match self.evict {
            Evict::Auto if self.cycles().next().is_some() => Evict::Planned,
            Evict::Auto => Evict::Lru,
            chosen => chosen,
        }
    }

    fn cycles(&self) -> impl Iterator<Item = &Registered> {
        self.schedules.iter().flatten().filter(|s| s.cyclic)
    }

    /// Which eviction policy is in force, and why.
    #[must_use]
    pub fn decision(&self) -> super::Decision {
        let auto = self.evict == Evict::Auto;
        let evict = match self.evict_in_force() {
            Evict::Lru => "lru",
            Evict::Planned if auto && self.streams_apart() => "next-use",
            Evict::NextUse => "next-use",
            _ => "planned",
        };
        let why = if self.evict != Evict::Auto {
            "as asked".to_owned()
        } else if self.cycles().next().is_none() {
            "no order of use is known yet, so recency is the best guide".to_owned()
        } else if self.streams_apart() {
            "sequences are far apart in a cycle; they come together, and share what is read, if none of it is kept"
                .to_owned()
        } else {
            let learned = if self.learner.cycle.is_some() { "learned from use" } else { "declared" };
            let tiers: Vec<String> = self.tiers.iter().map(|t| self.explain(t)).collect();
            format!("the order of use is a cycle ({learned}); {}", tiers.join("; "))
        };
        super::Decision { evict, why }
    }

    /// Whether cursors are apart and some of what they use is not kept for that.
    fn streams_apart(&self) -> bool {
        self.apart && self.tiers.iter().any(|t| t.ring_slots > 0 && t.kept.len() == 0)
    }

    fn explain(&self, tier: &super::Tier) -> String {
        let kept = self.slots_bytes(tier.kept.len()) >> 20;
        if tier.ring_slots == 0 {
            return format!("tier {} holds all that it needs", tier.label);
        }
        let ring = self.slots_bytes(tier.ring_slots) as f64 / f64::from(1 << 20);
        format!(
            "tier {} keeps {} blocks ({kept} MiB) and streams the rest through {ring:.1} MiB",
            tier.label,
            tier.kept.len()
        )
    }

    /// Distance from a tier down to another by parents; `None` if the other is not below.
    pub(crate) fn feeds(&self, tier: TierId, consumer: TierId) -> bool {
        let mut at = Some(consumer);
        while let Some(here) = at {
            if here == tier {
                return true;
            }
            at = self.tiers[here.index()].parent;
        }
        false
    }

    fn needs(&self, registered: &Registered, tier: TierId) -> Needs {
        let slots = |blocks: &[BlockId]| blocks.iter().map(|b| self.blocks[b.index()].slots as usize).sum::<usize>();
        let mut needs = Needs::default();
        if registered.steps.first().is_some_and(|s| s.tier == tier) {
            needs.standing = slots(&registered.standing);
        }
        for step in &registered.steps {
            let here = if step.tier != tier {
                // A feeding tier holds one block at a time, at least.
                if self.feeds(tier, step.tier) { 1 } else { 0 }
            } else if step.choice_max > 0 {
                let mut sizes: Vec<usize> =
                    registered.choices(step).iter().map(|b| self.blocks[b.index()].slots as usize).collect();
                sizes.sort_unstable_by(|a, b| b.cmp(a));
                sizes.iter().take(step.choice_max as usize).sum()
            } else {
                let blocks = &registered.order[step.start as usize..step.end as usize];
                let fresh: Vec<BlockId> = blocks.iter().copied().filter(|b| !registered.standing.contains(b)).collect();
                slots(&fresh)
            };
            needs.step = needs.step.max(here);
        }
        needs
    }

    /// The fewest slots of a tier with which a schedule can run.
    pub(crate) fn slots_needed(&self, registered: &Registered, tier: TierId) -> usize {
        let needs = self.needs(registered, tier);
        needs.standing + needs.step
    }

    pub(crate) fn check_fits(&self, registered: &Registered) -> Result<(), TooSmall> {
        for (index, tier) in self.tiers.iter().enumerate() {
            let slots = self.slots_needed(registered, TierId(index as u32));
            if slots > tier.slots.limit() {
                let bytes_min = self.slots_bytes(slots);
                return Err(TooSmall { tier: tier.label.clone(), budget_bytes: tier.budget_bytes, bytes_min });
            }
        }
        Ok(())
    }

    /// Gives a new schedule its indices, and brings those of all blocks up to date.
    pub(crate) fn index_schedule(&mut self, id: usize) {
        let tiers = self.tiers.len();
        let takes_part: Vec<bool> = (0..tiers)
            .map(|tier| {
                let Some(registered) = &self.schedules[id] else { return false };
                registered.steps.iter().any(|s| self.feeds(TierId(tier as u32), s.tier))
            })
            .collect();
        let in_all: Vec<bool> = (0..tiers)
            .map(|tier| {
                let Some(registered) = &self.schedules[id] else { return false };
                let mut reading = registered.steps.iter().filter(|s| s.start < s.end);
                reading.all(|s| self.feeds(TierId(tier as u32), s.tier))
            })
            .collect();
        if let Some(registered) = &mut self.schedules[id] {
            let uses = registered.order.len();
            let coverage = |(part, all): (&bool, &bool)| {
                let empty = || BitSet::new(uses);
                part.then(|| Coverage { absent: empty(), evictable: empty(), partial: !all })
            };
            registered.coverage = takes_part.iter().zip(&in_all).map(coverage).collect();
        }
        self.relink();
    }

    /// Chooses the kept sets anew. Children come before parents, so that a parent keeps what its children do not.
    pub(crate) fn replan(&mut self) {
        for tier in 0..self.tiers.len() {
            self.replan_tier(TierId(tier as u32));
        }
        for block in 0..self.blocks.len() {
            for tier in 0..self.tiers.len() {
                self.refresh(TierId(tier as u32), BlockId(block as u32));
            }
        }
    }

    fn replan_tier(&mut self, tier: TierId) {
        let wanted = self.wanted(tier);
        let slots_of = |block: &BlockId| self.blocks[block.index()].slots as usize;
        let mut needs = Needs::default();
        let mut choices = 0;
        for registered in self.schedules.iter().flatten().filter(|s| !s.idle) {
            let n = self.needs(registered, tier);
            needs = Needs { standing: needs.standing.max(n.standing), step: needs.step.max(n.step) };
            choices = choices.max(self.choice_slots(registered, tier));
        }
        let limit = self.tiers[tier.index()].slots.limit();
        let total: usize = wanted.iter().map(|(b, _)| slots_of(b)).sum();
        let window = (self.window_bytes / self.slot_bytes.max(1)).max(1) as usize * self.disk_ahead_bytes.len().max(1);
        let everything = total + choices <= limit;
        let ring = if everything {
            0
        } else {
            // A budget of few slots is not all spent on the ring.
            let room = limit.saturating_sub(needs.standing);
            (needs.step + window).min((room / 2).max(needs.step)).min(room)
        };
        // Where all that is in order fits, cursors need not come together.
        let together = !self.apart || total + ring <= limit;
        let planned = self.evict_in_force() == Evict::Planned && together;
        let kept = if planned { self.spread(&wanted, limit - ring) } else { BitSet::new(self.blocks.len()) };
        let window_bytes = match ring {
            0 => self.window_bytes,
            ring => self.window_bytes.min(self.slots_bytes(ring.saturating_sub(needs.step).max(1))),
        };
        let t = &mut self.tiers[tier.index()];
        (t.kept, t.ring_slots, t.window_bytes) = (kept, ring, window_bytes);
    }

    fn choice_slots(&self, registered: &Registered, tier: TierId) -> usize {
        let steps = registered.steps.iter().filter(|s| s.choice_max > 0 && self.feeds(tier, s.tier));
        steps.flat_map(|s| registered.choices(s)).map(|b| self.blocks[b.index()].slots as usize).sum()
    }

    /// Blocks that cycles use from this tier, in the order of their first use, with their uses per cycle: of several
    /// cycles the most, since one may be walked a thousand times as often as another. Standing blocks come first, with as many uses as it takes to be kept before all others.
    fn wanted(&self, tier: TierId) -> Vec<(BlockId, u64)> {
        let mut uses = vec![0u64; self.blocks.len()];
        let mut order = Vec::new();
        let child_keeps = |block: BlockId| {
            self.tiers[tier.index()].children.iter().any(|c| self.tiers[c.index()].kept.contains(block.index()))
        };
        let mut here = vec![0u64; self.blocks.len()];
        for registered in self.cycles().filter(|s| !s.idle) {
            let standing_here = registered.steps.first().is_some_and(|s| s.tier == tier);
            for &block in registered.standing.iter().filter(|_| standing_here) {
                if uses[block.index()] == 0 {
                    order.push(block);
                }
                uses[block.index()] = STANDING_USES;
            }
            here.fill(0);
            for (position, &block) in registered.order.iter().enumerate() {
                if self.feeds(tier, registered.tier_at(position)) && !child_keeps(block) {
                    if uses[block.index()] == 0 {
                        order.push(block);
                    }
                    here[block.index()] += 1;
                    uses[block.index()] = uses[block.index()].max(here[block.index()]);
                }
            }
        }
        order.into_iter().map(|block| (block, uses[block.index()])).collect()
    }

    /// Chooses blocks worth the most bytes per slot and cycle for `room` slots; among equals, evenly along the cycle.
    /// What counts as equal is made finer until no more is lost by it than the largest block (invariant 5).
    fn spread(&self, wanted: &[(BlockId, u64)], room: usize) -> BitSet {
        let worth = |&(block, uses): &(BlockId, u64)| u128::from(self.blocks[block.index()].bytes) * u128::from(uses);
        let largest = wanted.iter().filter(|w| w.1 < STANDING_USES).map(worth).max().unwrap_or(0);
        let best = self.most_worth(wanted, room);
        for classes in SIZE_CLASSES {
            let (kept, kept_worth) = self.spread_by_class(wanted, room, classes);
            if kept_worth + largest >= best {
                return kept;
            }
        }
        self.spread_by_class(wanted, room, SIZE_CLASSES_EXACT).0
    }

    /// The most bytes per cycle that `room` slots could save if blocks could be split.
    fn most_worth(&self, wanted: &[(BlockId, u64)], room: usize) -> u128 {
        let (mut room, mut best) = (room as u128, 0);
        let mut order: Vec<(u64, u128, u128)> = Vec::with_capacity(wanted.len());
        for &(block, uses) in wanted {
            let size = self.blocks[block.index()];
            let slots = u64::from(size.slots.max(1));
            order.push((
                size.bytes.saturating_mul(uses) / slots,
                u128::from(size.bytes) * u128::from(uses),
                slots.into(),
            ));
        }
        order.sort_unstable_by(|a, b| b.cmp(a));
        for (_, worth, slots) in order {
            let take = slots.min(room);
            best += worth * take / slots;
            room -= take;
        }
        best
    }

    /// Keeps the classes worth most, and of the class that does not fit whole, blocks evenly along the cycle. Also
    /// tells what they are worth, in bytes per cycle.
    fn spread_by_class(&self, wanted: &[(BlockId, u64)], room: usize, classes: u64) -> (BitSet, u128) {
        let mut kept = BitSet::new(self.blocks.len());
        let (mut room, mut worth) = (room as u64, 0u128);
        let mut wires = vec![Share::default(); self.disk_ahead_bytes.len()];
        let class = |&(block, uses): &(BlockId, u64)| {
            let size = self.blocks[block.index()];
            let slot_bytes = u128::from(size.slots) * u128::from(self.slot_bytes);
            let class = u128::from(size.bytes) * u128::from(classes) / slot_bytes.max(1);
            class * u128::from(uses)
        };
        let mut order: Vec<(u128, usize)> = wanted.iter().enumerate().map(|(at, w)| (class(w), at)).collect();
        order.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        for members in order.chunk_by(|a, b| a.0 == b.0) {
            // Each disk by itself, or a rhythm of the plan could meet a rhythm of the disks and leave all to one of them.
            wires.fill(Share::default());
            for &(_, at) in members {
                let size = self.blocks[wanted[at].0.index()];
                wires[size.wire as usize].all += u64::from(size.slots);
            }
            let all: u64 = wires.iter().map(|w| w.all).sum();
            let (take, mut before) = (all.min(room), 0);
            for wire in &mut wires {
                wire.take = (before + wire.all) * take / all - before * take / all;
                before += wire.all;
            }
            // Bresenham's line: a block is kept where the running share passes a whole slot.
            for &(_, at) in members {
                let (block, uses) = wanted[at];
                let (size, slots) = (self.blocks[block.index()], u64::from(self.blocks[block.index()].slots));
                let wire = &mut wires[size.wire as usize];
                wire.seen += slots;
                if wire.taken + slots <= wire.seen * wire.take / wire.all {
                    kept.set(block.index(), true);
                    wire.taken += slots;
                    room -= slots;
                    worth += u128::from(size.bytes) * u128::from(uses);
                }
            }
        }
        (kept, worth)
    }

    /// Blocks that a plan keeps in a tier, for reports.
    #[must_use]
    pub fn is_kept(&self, tier: TierId, block: BlockId) -> bool {
        self.tiers[tier.index()].kept.contains(block.index())
    }

    /// Blocks of which a tier has, or is getting, a copy.
    #[must_use]
    pub fn held_blocks(&self, tier: TierId) -> usize {
        self.tiers[tier.index()].places.iter().filter(|p| p.state != State::Absent).count()
    }
}
