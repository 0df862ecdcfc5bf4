//! From a shape to a workload: parts are cut into blocks, blocks into steps, and steps are timed.
//!
//! A plan needn't move blocks as small as the engine's: what counts is bytes. Larger blocks make simulations fast, and
//! bring two errors. The ring of blocks in flight and leased (R) would be larger than the engine's; that is taken out of
//! the budgets, so bytes per token stay those of the engine to within a block. And time is counted in larger steps; how
//! much that matters is measured by the test `coarse_blocks_cost_little` of `tests/planner.rs`.

use super::machine::{Computes, Machine};
use super::shape::{ModelShape, Part, PartKind};
use crate::profile::{Profile, Workload};
use crate::program::Choice;
use crate::router::Habit;
use overspill_core::{BlockId, BlockSize, Schedule, Step, TierId};
use std::collections::BTreeMap;

/// About so many blocks, where budgets allow it.
const BLOCKS_WANTED: u64 = 800;
/// A tier that streams has room for at least so many blocks of a plan.
const SLOTS_MIN: u64 = 64;
/// What a tier lacks is so many blocks of a plan: the ring of larger ones would be no part of what is missing, but all.
const MISSING_MIN: u64 = 64;
/// As the engine: a step takes so much of a small budget at most …
const STEP_SHARE: u64 = 32;
/// … and so much of a large one.
const STEP_BYTES_MAX: u64 = 8 << 20;
/// Candidates for the size of a slot, between one and two times the least.
const SIZES_TRIED: u64 = 64;

/// What a pass is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Tokens that are computed together: 1 to decode, more for a chunk of a prompt.
    pub tokens: u64,
    /// Positions before them that they see.
    pub past: u64,
}

/// How finely a model is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// As finely as the engine does it.
    Fine,
    /// As coarsely as the question allows.
    Coarse,
}

/// A model cut for a machine.
#[derive(Clone, Debug)]
pub(super) struct CutModel {
    pub(super) profile: Profile,
    pub(super) workload: Workload,
    /// By block: the part it belongs to; `None` for what is held all the time.
    pub(super) part_of: Vec<Option<PartKind>>,
    /// See [`overspill_core::Config::window_bytes`].
    pub(super) window_bytes: u64,
    /// R of the engine, by tier.
    pub(super) ring_bytes: Vec<u64>,
}

/// Blocks of a unit.
fn blocks_of(bytes: u64, slot_bytes: u64) -> u64 {
    bytes.div_ceil(slot_bytes.max(1)).max(1)
}

/// The slot, of one to two times the least, in which blocks waste fewest bytes.
fn choose_slot(shape: &ModelShape, least: u64) -> u64 {
    let mut sizes: Vec<(u64, u64)> = shape.parts.iter().map(|p| (p.bytes, u64::from(p.units))).collect();
    sizes.push((shape.standing_bytes, 1));
    sizes.sort_unstable();
    let sizes: Vec<(u64, u64)> = sizes
        .chunk_by(|a, b| a.0 == b.0)
        .map(|alike| (alike[0].0, alike.iter().map(|(_, units)| units).sum()))
        .filter(|(bytes, _)| *bytes > 0)
        .collect();
    let all = |slot: u64| {
        let slots = sizes.iter().map(|(bytes, units)| blocks_of(*bytes, slot).saturating_mul(*units));
        slots.fold(0, u64::saturating_add).saturating_mul(slot)
    };
    let tried = (0..=SIZES_TRIED).map(|step| least.saturating_add((least / SIZES_TRIED).max(1).saturating_mul(step)));
    // A unit's own size wastes nothing on it.
    let exact = sizes.iter().map(|(bytes, _)| *bytes).filter(|bytes| (least..=2 * least).contains(bytes));
    let tried = tried.chain(exact).map(|slot| (all(slot), slot));
    tried.min().map_or(least, |(_, slot)| slot)
}

/// R as the engine plans it: a step and a window.
fn ring(budget: u64, step: u64, window: u64) -> u64 {
    step.saturating_add(window).min((budget / 2).max(step)).min(budget)
}

/// Experts of a part that so many tokens use.
#[derive(Default)]
struct Distinct(BTreeMap<(u32, u32), u32>);

impl Distinct {
    fn of(&mut self, part: &Part, phase: Phase, habit: &Habit) -> u32 {
        if phase.tokens <= 1 || part.used >= part.units {
            return part.used;
        }
        let kind = (part.units, part.used);
        *self.0.entry(kind).or_insert_with(|| habit.distinct(part.units, part.used, phase.tokens))
    }
}

/// Tokens of a product for which a [`Computes::few_flops_per_s`] is, and from which on more of them bring nothing.
const FEW: f64 = 8.0;
const MANY: f64 = 64.0;

/// Seconds in which so many weights are multiplied with so many tokens: what reading them takes with one, and with more
/// what lies between the speeds that are known, at least.
fn products_s(bytes: f64, parameters: f64, tokens: f64, compute: &Computes) -> f64 {
    let read = bytes / compute.memory_bytes_per_s as f64;
    let operate = |tokens: f64, flops_per_s: u64| 2.0 * parameters * tokens / flops_per_s as f64;
    if tokens >= MANY {
        return read.max(operate(tokens, compute.flops_per_s));
    }
    let few = read.max(operate(FEW, compute.few_flops_per_s));
    let ((from, from_s), (to, to_s)) =
        if tokens < FEW { ((1.0, read), (FEW, few)) } else { ((FEW, few), (MANY, operate(MANY, compute.flops_per_s))) };
    read.max(from_s + (to_s - from_s) * (tokens - from) / (to - from))
}

/// Nanoseconds that a part computes: its weights, and the past where there is attention, which is read, or operated on,
/// whichever takes longer; and what its products cost beside.
fn part_ns(shape: &ModelShape, part: &Part, distinct: u32, phase: Phase, compute: &Computes) -> u64 {
    let tokens = phase.tokens as f64;
    let units = f64::from(distinct);
    // Only the last token's logits are wanted.
    let of_each = if part.kind == PartKind::Head { 1.0 } else { f64::from(part.used) * tokens / units.max(1.0) };
    let mut fixed = compute.product_ns as f64 * f64::from(part.products) * units;
    let mut seconds = units * products_s(part.bytes as f64, part.parameters as f64, of_each, compute);
    if part.kind == PartKind::Attention
        && let Some(kv) = shape.kv.get(part.layer as usize)
    {
        let past = kv.window.map_or(phase.past, |window| phase.past.min(window)) as f64;
        let read = past * kv.elements as f64 * shape.kv_element_bytes as f64;
        let flops = 4.0 * (past + tokens / 2.0) * kv.query_elements as f64 * tokens;
        seconds += (read / compute.memory_bytes_per_s as f64).max(flops / compute.attention_flops_per_s as f64);
        fixed += compute.layer_ns as f64;
    }
    (fixed + seconds * 1e9) as u64
}

struct Cutter<'a> {
    shape: &'a ModelShape,
    disks: u32,
    slot_bytes: u64,
    step_blocks: usize,
    workload: Workload,
    part_of: Vec<Option<PartKind>>,
}

impl Cutter<'_> {
    /// Blocks of one unit.
    fn unit(&mut self, bytes: u64, kind: Option<PartKind>) -> Vec<BlockId> {
        let count = blocks_of(bytes, self.slot_bytes);
        let block = |at: u64| {
            let bytes = (bytes * (at + 1) / count - bytes * at / count).max(1);
            let id = self.workload.blocks.len() as u32;
            self.workload.blocks.push(BlockSize { bytes, slots: 1, wire: id % self.disks.max(1) });
            self.part_of.push(kind);
            BlockId(id)
        };
        (0..count).map(block).collect()
    }

    fn step(&mut self, tier: TierId, blocks: Vec<BlockId>, ns: u64, choice: Option<Choice>) {
        let chosen = choice.map_or(0, |c| blocks.len() as u32 / c.experts.max(1) * c.pick);
        let choice_max = choice.map_or(0, |c| chosen.min(c.together));
        self.workload.schedule.steps.push(Step { tier, blocks, choice_max });
        self.workload.choices.push(choice);
        self.workload.flops.push(ns);
    }

    /// Steps of blocks that are all read.
    fn dense(&mut self, tier: TierId, blocks: &[BlockId], ns: u64) {
        let count = blocks.len().div_ceil(self.step_blocks).max(1);
        for (at, part) in blocks.chunks(blocks.len().div_ceil(count).max(1)).enumerate() {
            let (at, count) = (at as u64, count as u64);
            self.step(tier, part.to_vec(), ns * (at + 1) / count - ns * at / count, None);
        }
    }

    fn part(&mut self, part: &Part, distinct: u32, tier: TierId, ns: u64) {
        let units: Vec<Vec<BlockId>> = (0..part.units).map(|_| self.unit(part.bytes, Some(part.kind))).collect();
        if part.used < part.units {
            let together = u32::try_from(self.step_blocks).unwrap_or(u32::MAX);
            let choice = Choice { experts: part.units, pick: distinct, together };
            self.step(tier, units.concat(), ns, Some(choice));
        } else {
            self.dense(tier, &units.concat(), ns);
        }
    }
}

/// Which of the tiers that compute a layer is on.
fn tier_of(computes: &[Computes], layer: u32, layers: u32) -> usize {
    let place = (u64::from(layer) * 1_000_000 + 500_000) / u64::from(layers.max(1));
    let mut sum = 0;
    for (index, compute) in computes.iter().enumerate() {
        sum += compute.share;
        if place < sum {
            return index;
        }
    }
    computes.len().saturating_sub(1)
}

/// Cuts a model for a machine.
pub(super) fn cut(
    shape: &ModelShape,
    machine: &Machine,
    cut: Cut,
    phase: Phase,
    context: u64,
    chunk: u64,
    habit: &Habit,
) -> CutModel {
    let computes = machine.computes(shape, context, chunk);
    let budgets = machine.weight_bytes(&computes);
    let mut profile = machine.profile(&computes, &budgets);
    let window = profile.window_bytes();
    let total = shape.block_bytes();
    let tightest = budgets.iter().map(|bytes| (*bytes as f64 / shape.padding) as u64);
    let tightest = tightest.filter(|held| *held < total).min().unwrap_or(total);
    let fine = shape.slot_bytes.max(1);
    let missing = total.saturating_sub(tightest).max(1);
    // An expert is the least that moves alone, so no slot is larger than that.
    let expert = shape.parts.iter().filter(|p| p.units > 1).map(|p| p.bytes).min().unwrap_or(u64::MAX);
    let least = match cut {
        Cut::Fine => fine,
        Cut::Coarse => {
            (total / BLOCKS_WANTED).min(tightest / SLOTS_MIN).min(missing / MISSING_MIN).min(expert).max(fine)
        }
    };
    let slot_bytes = choose_slot(shape, least);
    // Only the tier that computes first decides about steps, in the engine too.
    let step_bytes = (budgets.first().copied().unwrap_or(0) / STEP_SHARE).clamp(fine, STEP_BYTES_MAX.max(fine));
    let mut cutter = Cutter {
        shape,
        disks: profile.disks.len() as u32,
        slot_bytes,
        step_blocks: (step_bytes / slot_bytes).max(1) as usize,
        workload: Workload { slot_bytes, habit: habit.clone(), ..Workload::default() },
        part_of: Vec::new(),
    };
    let standing = if shape.standing_bytes > 0 { cutter.unit(shape.standing_bytes, None) } else { Vec::new() };
    let mut distinct = Distinct::default();
    for part in &shape.parts {
        let used = distinct.of(part, phase, habit);
        let tier = tier_of(&computes, part.layer, cutter.shape.layers + 1);
        let ns = computes.get(tier).map_or(0, |compute| part_ns(shape, part, used, phase, compute));
        cutter.part(part, used, TierId(tier as u32), ns);
    }
    let Cutter { mut workload, part_of, .. } = cutter;
    workload.schedule = Schedule { label: "plan".into(), cyclic: true, standing, ..workload.schedule };
    let coarse_window = window.div_ceil(slot_bytes).max(2) * slot_bytes;
    let ring_bytes = fit_budgets(&mut profile, &workload, shape, &budgets, Rings { window, coarse_window, step_bytes });
    CutModel { profile, workload, part_of, window_bytes: coarse_window, ring_bytes }
}

struct Rings {
    window: u64,
    coarse_window: u64,
    step_bytes: u64,
}

/// Gives tiers the budgets under which coarse blocks read as many bytes as fine ones would: room for the blocks that make
/// up what the engine would keep, and for the coarse ring. Returns R of the engine, by tier.
fn fit_budgets(
    profile: &mut Profile,
    workload: &Workload,
    shape: &ModelShape,
    budgets: &[u64],
    rings: Rings,
) -> Vec<u64> {
    let slot = workload.slot_bytes;
    let wires = profile.disks.len() as u64;
    let mut lists = blocks_by_tier(workload, budgets.len());
    let mut result = Vec::with_capacity(budgets.len());
    let mut below: Vec<u64> = Vec::new();
    // Slots that the tiers so far keep.
    let mut taken = 0u64;
    // The engine counts in slots.
    let whole = |bytes: u64| (bytes / shape.slot_bytes.max(1)).max(1) * shape.slot_bytes;
    for (index, &budget) in budgets.iter().enumerate() {
        let steps = workload.schedule.steps.iter().filter(|s| s.tier.index() == index);
        let reads = |s: &Step| if s.choice_max > 0 { u64::from(s.choice_max) } else { s.blocks.len() as u64 };
        let coarse_step = steps.map(reads).max();
        let fine_step = if coarse_step.is_some() { whole(rings.step_bytes) } else { shape.slot_bytes };
        let mut list = std::mem::take(&mut lists[index]);
        if coarse_step.is_none() {
            // It feeds the others, and keeps of what they don't.
            list.append(&mut below);
        }
        let all: u64 = list.iter().sum();
        let everything = list.len() as u64 * slot;
        // GPUs keep of their own layers, what feeds them of the rest.
        let from = if coarse_step.is_some() { 0 } else { taken };
        let held = shape.bytes_in_slots(from, from.saturating_add(budget));
        profile.tiers[index].budget_bytes = if held >= all {
            result.push(0);
            taken = taken.saturating_add(budget.min((all as f64 * shape.padding) as u64));
            everything.max(slot)
        } else {
            let fine = ring(budget, fine_step, whole(rings.window) * wires);
            result.push(fine);
            let kept = keep(&list, shape.bytes_in_slots(from, from.saturating_add(budget - fine)));
            taken = taken.saturating_add(budget - fine);
            below.extend_from_slice(&list[kept..]);
            let step = coarse_step.unwrap_or(1) * slot;
            let kept_bytes = kept as u64 * slot;
            // The brain gives the ring no more than half of a small budget.
            let coarse = (step + rings.coarse_window * wires).min(kept_bytes.max(step));
            // Never room for everything: something streams.
            (kept_bytes + coarse).min(everything.saturating_sub(slot)).max(step + slot)
        };
    }
    result
}

/// By tier: bytes of the blocks that it computes on, in the order in which the brain would keep them.
fn blocks_by_tier(workload: &Workload, tiers: usize) -> Vec<Vec<u64>> {
    let mut lists = vec![Vec::new(); tiers];
    let bytes = |block: &BlockId| workload.blocks[block.index()].bytes;
    for chosen in [false, true] {
        let mut part = vec![Vec::new(); tiers];
        for step in workload.schedule.steps.iter().filter(|s| (s.choice_max > 0) == chosen) {
            part[step.tier.index()].extend(step.blocks.iter().map(bytes));
        }
        for (list, mut part) in lists.iter_mut().zip(part) {
            part.sort_unstable_by(|a, b| b.cmp(a));
            list.append(&mut part);
        }
    }
    if let Some(first) = workload.schedule.steps.first() {
        let standing = workload.schedule.standing.iter().map(bytes);
        lists[first.tier.index()].splice(0..0, standing);
    }
    lists
}

/// How many of the first blocks make up so many bytes, to the nearest block.
fn keep(list: &[u64], bytes: u64) -> usize {
    let mut sum = 0u64;
    let fits = |block: &&u64| {
        sum += **block;
        sum - **block / 2 <= bytes
    };
    list.iter().take_while(fits).count()
}
