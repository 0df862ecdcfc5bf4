//! The state machine: [`Brain`].
//!
//! Its parts: this file has the state, the calling order and the small transitions; `demand` the queue of waiters and
//! the search for room; `transfer` what happens when transfers end; `prefetch` what is brought ahead of need; `plan`
//! which blocks stay; `sequence` cursors and what they touch; `rounds` which of them take part.

mod audit;
mod demand;
mod plan;
mod prefetch;
mod rounds;
mod sequence;
mod transfer;

use crate::bitset::BitSet;
use crate::choices::{Choices, Offers};
use crate::config::{BlockSize, Config, Evict, Prefetch, TooSmall};
use crate::ids::{BlockId, Nanos, ScheduleId, SequenceId, SlotId, TierId};
use crate::learn::Learner;
use crate::lru::{List, Lru};
use crate::protocol::{Command, Event};
use crate::schedule::{Cursor, Registered};
use crate::slots::Slots;
use demand::Demand;
use std::collections::VecDeque;
use transfer::Transfers;

pub(crate) const NO_SLOT: u32 = u32::MAX;

/// Where a block is in a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Not here.
    Absent,
    /// Has a slot; the parent tier is still being filled.
    Waiting,
    /// Being read or uploaded into its slot.
    Loading,
    /// Here.
    Resident,
    /// The body was asked to retire it.
    Retiring,
}

/// What the brain knows of a block in a tier.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) slot: u32,
    /// Demands and uploads that need it to stay.
    pub(crate) claims: u16,
    pub(crate) state: State,
    /// A lease was seen on it; until its end is told, it cannot be evicted.
    pub(crate) pinned: bool,
    /// Brought, and not used since: counts against the window.
    pub(crate) unused: bool,
    /// Brought only because a step was expected to choose it.
    pub(crate) expected: bool,
    /// The transfer under way is the second try.
    pub(crate) retried: bool,
    /// Both tries failed the last time: it is not brought again until somebody asks for it.
    pub(crate) broken: bool,
}

const ABSENT: Place = Place {
    slot: NO_SLOT,
    claims: 0,
    state: State::Absent,
    pinned: false,
    unused: false,
    expected: false,
    retried: false,
    broken: false,
};

/// A caching tier.
#[derive(Clone, Debug)]
pub(crate) struct Tier {
    pub(crate) label: String,
    pub(crate) budget_bytes: u64,
    pub(crate) parent: Option<TierId>,
    pub(crate) children: Vec<TierId>,
    pub(crate) slots: Slots,
    pub(crate) places: Vec<Place>,
    pub(crate) lru: Lru,
    /// Blocks that the plan keeps here.
    pub(crate) kept: BitSet,
    /// Blocks that could be retired now, kept or not.
    pub(crate) could_go: BitSet,
    /// Resident blocks that a child has too, and that nobody needs here.
    pub(crate) surplus: BitSet,
    /// By group of candidates: which of them could go.
    pub(crate) offers: Vec<Offers>,
    /// The block that the body was asked to retire; one at a time.
    pub(crate) awaiting: Option<BlockId>,
    /// Bytes brought from the parent and not yet used.
    pub(crate) ahead_bytes: u64,
    /// How much `ahead_bytes` (or a disk's) may be.
    pub(crate) window_bytes: u64,
    /// Slots that are not the kept set's, while something streams.
    pub(crate) ring_slots: usize,
    pub(crate) evictions: u64,
    pub(crate) wasted: u64,
    pub(crate) loads: u64,
}

/// A tier's figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Bytes for blocks.
    pub budget_bytes: u64,
    /// Bytes of the slots in use, those being filled included.
    pub used_bytes: u64,
    /// Bytes of the free slots below the budget.
    pub free_bytes: u64,
    /// The most that `used_bytes` has been.
    pub peak_bytes: u64,
    /// Blocks that went to make room.
    pub evictions: u64,
    /// Blocks brought in.
    pub loads: u64,
    /// Blocks brought in and evicted before they were used.
    pub wasted: u64,
    /// Blocks that the plan keeps.
    pub kept_blocks: u64,
    /// Bytes in flight plus leased while something streams (R); 0 when everything fits.
    pub ring_bytes: u64,
}

/// Which policy is in force, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// `lru`, `next-use` or `planned`.
    pub evict: &'static str,
    /// The reason, for people.
    pub why: String,
}

/// The brain: decides what is where, what moves and what goes.
///
/// # Calling order
/// - Set-up: [`Brain::new`], then [`Brain::add_schedule`] and [`Brain::open_sequence`] at any time.
/// - Whatever happens is told through [`Brain::handle`], in the order in which it happened.
/// - After each of these, [`Brain::poll`] until it returns `None`, and carry out every [`Command`] in order.
///   `Retire` must be answered before the next `poll`.
/// - When [`Brain::next_deadline`] is due, tell [`Event::Tick`].
///
/// The rest are getters. Nothing here blocks, and nothing reads a clock.
#[derive(Debug)]
pub struct Brain {
    pub(crate) slot_bytes: u64,
    pub(crate) blocks: Vec<BlockSize>,
    pub(crate) tiers: Vec<Tier>,
    pub(crate) schedules: Vec<Option<Registered>>,
    pub(crate) cursors: Vec<Option<Cursor>>,
    pub(crate) demands: VecDeque<Demand>,
    pub(crate) transfers: Transfers,
    /// Bytes read from each disk and not yet used.
    pub(crate) disk_ahead_bytes: Vec<u64>,
    pub(crate) out: VecDeque<Command>,
    pub(crate) evict: Evict,
    pub(crate) prefetch: Prefetch,
    pub(crate) window_bytes: u64,
    pub(crate) learner: Learner,
    pub(crate) choices: Choices,
    /// Rounds begun, by all sequences.
    pub(crate) rounds: u64,
    /// Whether a cycle's cursors are far apart, so that none of its blocks is kept.
    pub(crate) apart: bool,
    /// Vectors to be used again.
    pub(crate) spare: Vec<Vec<BlockId>>,
    pub(crate) governor: prefetch::Governor,
    /// What was brought because a step was expected to choose it, until that step has chosen.
    pub(crate) guesses: Vec<prefetch::Guess>,
    /// What is expected, and not brought yet for want of room; the first first.
    pub(crate) wishes: VecDeque<prefetch::Guess>,
}

/// More slots than all blocks need, the ends of slabs in which no run fits included, would only cost memory.
pub(crate) fn slots_useful(blocks: &[BlockSize], per_slab: u32) -> u64 {
    let all: u64 = blocks.iter().map(|b| u64::from(b.slots)).sum();
    let largest = u64::from(blocks.iter().map(|b| b.slots).max().unwrap_or(1));
    if largest > 1 { all + all.div_ceil(u64::from(per_slab.max(1))) * largest } else { all }
}

impl Brain {
    /// A brain with empty tiers.
    ///
    /// # Errors
    /// If a tier's budget has no room for the largest block.
    pub fn new(config: Config) -> Result<Self, TooSmall> {
        let blocks = config.blocks.len();
        let largest = config.blocks.iter().map(|b| b.slots).max().unwrap_or(1);
        let mut tiers: Vec<Tier> = Vec::new();
        for tier in &config.tiers {
            let bytes_min = u64::from(largest) * config.slot_bytes;
            if tier.budget_bytes < bytes_min {
                return Err(TooSmall { tier: tier.label.clone(), budget_bytes: tier.budget_bytes, bytes_min });
            }
            let slots = (tier.budget_bytes / config.slot_bytes).min(slots_useful(&config.blocks, tier.slots_per_slab));
            tiers.push(Tier {
                label: tier.label.clone(),
                budget_bytes: tier.budget_bytes,
                parent: tier.parent,
                children: Vec::new(),
                slots: Slots::new(slots as usize, tier.slots_per_slab as usize),
                places: vec![ABSENT; blocks],
                lru: Lru::new(blocks),
                kept: BitSet::new(blocks),
                could_go: BitSet::new(blocks),
                surplus: BitSet::new(blocks),
                offers: Vec::new(),
                awaiting: None,
                ahead_bytes: 0,
                window_bytes: config.window_bytes,
                ring_slots: 0,
                evictions: 0,
                wasted: 0,
                loads: 0,
            });
        }
        for child in 0..tiers.len() {
            if let Some(parent) = tiers[child].parent {
                tiers[parent.index()].children.push(TierId(child as u32));
            }
        }
        let wires = config.blocks.iter().map(|b| b.wire as usize + 1).max().unwrap_or(0);
        let mut brain = Self {
            slot_bytes: config.slot_bytes,
            blocks: config.blocks,
            tiers,
            schedules: Vec::new(),
            cursors: Vec::new(),
            demands: VecDeque::new(),
            transfers: Transfers::default(),
            disk_ahead_bytes: vec![0; wires],
            out: VecDeque::new(),
            evict: config.evict,
            prefetch: config.prefetch,
            window_bytes: config.window_bytes,
            learner: Learner::new(blocks),
            choices: Choices::new(blocks),
            rounds: 0,
            apart: false,
            spare: Vec::new(),
            governor: prefetch::Governor::default(),
            guesses: Vec::new(),
            wishes: VecDeque::new(),
        };
        brain.replan();
        Ok(brain)
    }

    /// Registers a schedule.
    ///
    /// # Errors
    /// If a tier has no room for the schedule's largest step beside its standing blocks; nothing is registered then.
    pub fn add_schedule(&mut self, schedule: &crate::Schedule) -> Result<ScheduleId, TooSmall> {
        let mut registered = Registered::new(schedule, self.blocks.len());
        self.check_fits(&registered)?;
        self.forget_learned();
        // A schedule that was learned and forgotten leaves its place; nobody outside knows its id.
        let id = self.schedules.iter().position(Option::is_none).unwrap_or_else(|| {
            self.schedules.push(None);
            self.schedules.len() - 1
        });
        registered.round = self.rounds;
        self.schedules[id] = Some(registered);
        self.register_choices(id, schedule);
        self.index_schedule(id);
        self.replan();
        self.pump();
        Ok(ScheduleId(id as u32))
    }

    /// Starts a cursor at the beginning of a schedule; `None` if there is no such schedule.
    pub fn open_sequence(&mut self, schedule: ScheduleId) -> Option<SequenceId> {
        let index = schedule.index();
        self.schedules.get(index)?.as_ref()?;
        let cursor = Cursor { schedule: index, position: 0, step: crate::StepId(0), fraction: 0, round: self.rounds };
        let id = self.cursors.iter().position(Option::is_none).unwrap_or_else(|| {
            self.cursors.push(None);
            self.cursors.len() - 1
        });
        self.cursors[id] = Some(cursor);
        let sequence = SequenceId(id as u32);
        if let Some(registered) = &mut self.schedules[index] {
            registered.sequences.push(sequence);
        }
        self.begin_round();
        self.pump();
        Some(sequence)
    }

    /// Ends a cursor. What was being read only for it is cancelled.
    pub fn close_sequence(&mut self, sequence: SequenceId) {
        let Some(cursor) = self.cursors.get_mut(sequence.index()).and_then(Option::take) else { return };
        if let Some(registered) = &mut self.schedules[cursor.schedule] {
            registered.sequences.retain(|&s| s != sequence);
        }
        self.settle_guesses(sequence, None);
        self.forget_unwanted();
        self.pump();
    }

    /// Tells what happened.
    pub fn handle(&mut self, event: Event<'_>, now: Nanos) {
        match event {
            Event::StepEntered { sequence, step } => self.step_entered(sequence, step),
            Event::StepTouched { sequence, step } => self.step_touched(sequence, step),
            Event::Touched { tier, blocks } => self.touched(tier, blocks),
            Event::Demand { ticket, tier, blocks, deadline } => self.demand(ticket, tier, blocks, deadline),
            Event::Withdrawn { ticket } => self.withdraw(ticket),
            Event::TransferDone { transfer } => self.transfer_done(transfer),
            Event::TransferFailed { transfer, cancelled } => self.transfer_failed(transfer, cancelled),
            Event::Retired { tier, block } => self.retired(tier, block),
            Event::RetireRefused { tier, block } => self.retire_refused(tier, block),
            Event::LastPinDropped { tier, block } => {
                self.place_mut(tier, block).pinned = false;
                self.refresh(tier, block);
            }
            Event::BudgetChanged { tier, bytes } => self.budget_changed(tier, bytes),
            Event::Expected { sequence, step, blocks, probability_milli } => {
                self.expected(sequence, step, blocks, probability_milli);
            }
            Event::Tick => self.expire(now),
        }
        self.pump();
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Command> {
        self.out.pop_front()
    }

    /// When [`Event::Tick`] is due, if ever.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Nanos> {
        self.demands.iter().filter(|d| !d.assigned).map(|d| d.deadline).min()
    }

    /// Whether telling steps as they happen gains nothing now: nobody waits, nothing moves, and nothing is left to
    /// bring. They may then be told late, in order, before the next demand.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        let idle =
            self.demands.is_empty() && self.transfers.is_empty() && self.out.is_empty() && self.wishes.is_empty();
        let complete = || {
            self.schedules
                .iter()
                .flatten()
                .filter(|s| !s.sequences.is_empty())
                .all(|s| s.coverage.iter().flatten().all(|c| c.absent.len() == 0))
        };
        idle && (self.prefetch == Prefetch::Off || complete())
    }

    /// A tier's figures.
    #[must_use]
    pub fn tier_stats(&self, tier: TierId) -> TierStats {
        let t = &self.tiers[tier.index()];
        TierStats {
            budget_bytes: t.budget_bytes,
            used_bytes: t.slots.used() as u64 * self.slot_bytes,
            free_bytes: t.slots.free() as u64 * self.slot_bytes,
            peak_bytes: t.slots.used_peak() as u64 * self.slot_bytes,
            evictions: t.evictions,
            loads: t.loads,
            wasted: t.wasted,
            kept_blocks: t.kept.len() as u64,
            ring_bytes: t.ring_slots as u64 * self.slot_bytes,
        }
    }

    /// Slot of a block that the body was told to fill, until the block is retired.
    #[must_use]
    pub fn slot(&self, tier: TierId, block: BlockId) -> Option<SlotId> {
        let slot = self.place(tier, block).slot;
        (slot != NO_SLOT).then_some(SlotId(slot))
    }

    /// Whether a block is in a tier, ready to be leased.
    #[must_use]
    pub fn is_resident(&self, tier: TierId, block: BlockId) -> bool {
        self.place(tier, block).state == State::Resident
    }

    pub(crate) fn place(&self, tier: TierId, block: BlockId) -> &Place {
        &self.tiers[tier.index()].places[block.index()]
    }

    pub(crate) fn place_mut(&mut self, tier: TierId, block: BlockId) -> &mut Place {
        &mut self.tiers[tier.index()].places[block.index()]
    }

    pub(crate) fn set_state(&mut self, tier: TierId, block: BlockId, state: State) {
        self.place_mut(tier, block).state = state;
        self.refresh(tier, block);
    }

    pub(crate) fn claim(&mut self, tier: TierId, block: BlockId) {
        let could_go = self.could_go(tier, block);
        self.place_mut(tier, block).claims += 1;
        if could_go {
            self.refresh_one(tier, block);
        }
    }

    pub(crate) fn unclaim(&mut self, tier: TierId, block: BlockId) {
        let place = self.place_mut(tier, block);
        debug_assert!(place.claims > 0, "a claim is dropped once");
        place.claims = place.claims.saturating_sub(1);
        if self.could_go(tier, block) {
            self.refresh_one(tier, block);
        }
    }

    /// Whether the block could be retired now, kept or not.
    pub(crate) fn could_go(&self, tier: TierId, block: BlockId) -> bool {
        let place = self.place(tier, block);
        place.state == State::Resident && place.claims == 0 && !place.pinned
    }

    /// Brings the indices of a block up to date in a tier and in the tiers that feed it.
    pub(crate) fn refresh(&mut self, tier: TierId, block: BlockId) {
        let mut at = Some(tier);
        while let Some(tier) = at {
            self.refresh_one(tier, block);
            at = self.tiers[tier.index()].parent;
        }
    }

    fn refresh_one(&mut self, tier: TierId, block: BlockId) {
        let could_go = self.could_go(tier, block);
        let t = &mut self.tiers[tier.index()];
        t.could_go.set(block.index(), could_go);
        let free_to_go = could_go && !t.kept.contains(block.index());
        self.offer(tier, block);
        let mut needed_here = false;
        for index in 0..self.schedules.len() {
            let Some(registered) = &self.schedules[index] else { continue };
            if registered.coverage.get(tier.index()).is_none_or(Option::is_none) {
                continue;
            }
            for use_index in 0..registered.uses(block).len() {
                let Some(registered) = &self.schedules[index] else { continue };
                let position = registered.uses(block)[use_index] as usize;
                let consumer = registered.tier_at(position);
                let Some((covered, above)) = self.covered(consumer, tier, block) else { continue };
                // By this tier's own steps, or by a child that hasn't got it (another may have).
                needed_here |= !above;
                let Some(registered) = &mut self.schedules[index] else { continue };
                if let Some(coverage) = &mut registered.coverage[tier.index()] {
                    coverage.absent.set(position, !covered);
                    coverage.evictable.set(position, free_to_go);
                }
            }
        }
        let t = &self.tiers[tier.index()];
        if !t.children.is_empty() {
            let above = t.children.iter().any(|&c| self.place(c, block).state == State::Resident);
            let surplus = free_to_go && above && !needed_here;
            self.tiers[tier.index()].surplus.set(block.index(), surplus);
        }
    }

    /// Whether a use by `consumer` needs nothing brought into `tier`: the block is there or on its way, or nearer. And
    /// whether it is nearer, so that `tier` need not have it. `None` if `tier` does not feed `consumer`.
    fn covered(&self, consumer: TierId, tier: TierId, block: BlockId) -> Option<(bool, bool)> {
        let mut above = false;
        let mut at = consumer;
        while at != tier {
            // A slot that waits for its parent needs the parent still.
            above |= !matches!(self.place(at, block).state, State::Absent | State::Waiting);
            at = self.tiers[at.index()].parent?;
        }
        Some((above || self.place(tier, block).state != State::Absent, above))
    }

    /// Whether some schedule uses the block from this tier.
    pub(crate) fn list_of(&self, tier: TierId, block: BlockId) -> List {
        let scheduled = self.schedules.iter().flatten().any(|s| match s.coverage.get(tier.index()) {
            Some(Some(coverage)) if coverage.partial => {
                s.uses(block).iter().any(|&position| self.feeds(tier, s.tier_at(position as usize)))
            }
            Some(Some(_)) => !s.uses(block).is_empty(),
            _ => false,
        });
        match scheduled {
            true => List::Scheduled,
            false if self.is_candidate(block) => List::Chosen,
            false => List::Free,
        }
    }

    /// Puts every block into the list where it belongs, after schedules have changed.
    pub(crate) fn relink(&mut self) {
        for tier in 0..self.tiers.len() {
            for block in self.tiers[tier].lru.linked() {
                let list = self.list_of(TierId(tier as u32), BlockId(block as u32));
                self.tiers[tier].lru.touch(block, list);
            }
            self.tiers[tier].offers.iter_mut().for_each(Offers::forget);
        }
    }

    /// Bytes of slots.
    pub(crate) fn slots_bytes(&self, slots: usize) -> u64 {
        slots as u64 * self.slot_bytes
    }

    /// Puts demands first, then what is brought ahead: farthest tiers first, since their wire is the slowest.
    pub(crate) fn pump(&mut self) {
        for tier in 0..self.tiers.len() {
            self.shrink(TierId(tier as u32));
        }
        self.assign_demands();
        for tier in (0..self.tiers.len()).rev() {
            self.prefetch_into(TierId(tier as u32));
        }
        self.speculate();
    }
}
