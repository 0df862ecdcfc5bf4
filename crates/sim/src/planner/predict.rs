//! What a model does on a machine: its schedule in virtual time, by the brain that runs the engine.

use super::cut::{Cut, CutModel, Phase, cut};
use super::machine::Machine;
use super::shape::{ModelShape, PartKind};
use crate::router::Habit;
use crate::simulate::{Bound, Options, Outcome, SimulateError, simulate};
use overspill_core::TierId;

/// What one could have more of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resources {
    /// GPU memory.
    Vram,
    /// Host memory.
    Ram,
    /// Disk bandwidth.
    Disk,
}

/// Why there is no prediction.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A budget has no room for the work.
    #[error("{setting} {budget_bytes} bytes is too small for {what}: the smallest that works is {bytes_min} bytes")]
    TooSmall {
        /// The option that sets it.
        setting: &'static str,
        /// What it is.
        budget_bytes: u64,
        /// What it must be.
        bytes_min: u64,
        /// What needs it.
        what: String,
    },
    /// The disks are too small for the model.
    #[error(
        "the disks of '{machine}' hold {capacity_bytes} bytes and the model has {bytes_min}: put it on larger ones"
    )]
    NoDisk {
        /// The machine.
        machine: String,
        /// What its disks hold.
        capacity_bytes: u64,
        /// What the model has.
        bytes_min: u64,
    },
    /// The machine computes on a GPU that it has not got.
    #[error("'{machine}' has no GPU: plan for its CPU")]
    NoGpu {
        /// The machine.
        machine: String,
    },
    /// The simulator refused.
    #[error(transparent)]
    Simulate(#[from] SimulateError),
}

/// How a pass turns out.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// Tokens of a pass.
    pub tokens: u64,
    /// Seconds of a pass, steady.
    pub seconds_per_pass: f64,
    /// Seconds of the first pass, from empty memories.
    pub first_pass_seconds: f64,
    /// What binds.
    pub bound: Bound,
    /// The fastest that the wires and the processor that computes allow, in seconds.
    pub limit_seconds: f64,
    /// Bytes of weights that a pass uses.
    pub touched_bytes: u64,
    /// Bytes read from the disks in a pass.
    pub disk_bytes: u64,
    /// Bytes that cross the links to GPUs in a pass.
    pub bus_bytes: u64,
    /// Seconds of a pass in which nothing was computed since blocks were missing.
    pub stall_seconds: f64,
    /// Seconds of computing in a pass.
    pub compute_seconds: f64,
    /// Blocks that were there when they were needed, of all that were.
    pub hit_rate: f64,
    /// R of the engine, by tier.
    pub ring_bytes: Vec<u64>,
    /// Names of the tiers.
    pub tiers: Vec<String>,
    /// By kind of part: bytes in each tier at the end of a pass, and on disk alone.
    pub places: Vec<(PartKind, Vec<u64>)>,
    /// The policy in force.
    pub evict: &'static str,
    /// Whether the passes at the end were all alike; else figures are means.
    pub steady: bool,
    /// Events simulated.
    pub events: u64,
}

impl Prediction {
    /// Tokens a second.
    #[must_use]
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.seconds_per_pass.max(1e-12)
    }
}

/// What a prediction is for.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// Positions that there is room for.
    pub context: u64,
    /// Tokens of a prompt that are computed together.
    pub chunk: u64,
    /// What a pass is.
    pub phase: Phase,
    /// How finely the model is cut.
    pub cut: Cut,
    /// How routers choose.
    pub habit: &'a Habit,
    /// Policies, and how long to simulate.
    pub options: Options,
}

/// Refuses budgets that cannot work.
pub(super) fn check(shape: &ModelShape, machine: &Machine, context: u64, chunk: u64) -> Result<(), PlanError> {
    let name = || machine.hardware.name.clone();
    let computes = machine.computes(shape, context, chunk);
    if computes.is_empty() {
        return Err(PlanError::NoGpu { machine: name() });
    }
    let capacity_bytes = machine.hardware.disks.iter().map(|d| d.capacity_bytes).fold(0, u64::saturating_add);
    if capacity_bytes < shape.bytes {
        return Err(PlanError::NoDisk { machine: name(), capacity_bytes, bytes_min: shape.bytes });
    }
    let least = shape.least_bytes();
    let too_small = |setting, budget_bytes, bytes_min, what: &str| {
        let what = what.to_owned();
        Err(PlanError::TooSmall { setting, budget_bytes, bytes_min, what })
    };
    let budgets = machine.weight_bytes(&computes);
    let feeds = budgets.len() > computes.len();
    if machine.device == super::Device::Cpu {
        let ram = machine.budgets.ram_bytes;
        return if ram < least { too_small("--ram", ram, least, "the norms and a block") } else { Ok(()) };
    }
    for (compute, &bytes) in computes.iter().zip(&budgets) {
        if bytes < least {
            let needed = u128::from(least.saturating_add(compute.apart_bytes)) * 1_000_000;
            let bytes_min = (needed.div_ceil(u128::from(compute.share.max(1)))).min(u128::from(u64::MAX)) as u64;
            let what = format!("{context} positions, a chunk of {chunk} and a block");
            return too_small("--vram", machine.budgets.vram_bytes, bytes_min, &what);
        }
    }
    // What feeds a GPU holds two blocks: one that goes up, one that comes in.
    let feed = shape.slot_bytes.saturating_mul(2);
    match budgets.last() {
        Some(&ram) if feeds && ram < feed => too_small("--ram", ram, feed, "the blocks on their way to the GPU"),
        _ => Ok(()),
    }
}

/// Predicts a pass.
///
/// # Errors
/// [`PlanError::TooSmall`] names the smallest budget that works; see there for the rest.
pub fn predict(shape: &ModelShape, machine: &Machine, question: &Question<'_>) -> Result<Prediction, PlanError> {
    let &Question { context, chunk, phase, cut: finely, habit, .. } = question;
    check(shape, machine, context, chunk)?;
    let cut = cut(shape, machine, finely, phase, context, chunk, habit);
    let options = Options { window_bytes: Some(cut.window_bytes), ..question.options };
    let outcome = simulate(&cut.profile, &cut.workload, &options)?;
    let disks = cut.profile.disks.len();
    let tiers = cut.profile.tiers.len();
    let all = outcome.hits_per_pass + outcome.misses_per_pass;
    Ok(Prediction {
        tokens: phase.tokens,
        seconds_per_pass: outcome.seconds_per_pass(),
        first_pass_seconds: outcome.first_pass_ns as f64 / 1e9,
        bound: bound(&outcome),
        limit_seconds: outcome.limit.ns_per_pass as f64 / 1e9,
        touched_bytes: outcome.touched_bytes_per_pass + shape.standing_bytes + shape.row_bytes,
        disk_bytes: outcome.disk_bytes_per_pass(disks),
        bus_bytes: outcome.wires.iter().skip(disks).map(|w| w.bytes_per_pass).sum(),
        stall_seconds: outcome.stall_ns_per_pass as f64 / 1e9,
        compute_seconds: outcome.compute_ns_per_pass as f64 / 1e9,
        hit_rate: if all == 0 { 1.0 } else { outcome.hits_per_pass as f64 / all as f64 },
        ring_bytes: cut.ring_bytes.clone(),
        tiers: cut.profile.tiers.iter().map(|t| t.label.clone()).collect(),
        places: places(&outcome, &cut, tiers),
        evict: outcome.decision.evict,
        steady: outcome.steady,
        events: outcome.events,
    })
}

/// What is busiest: a wire, or the processor.
fn bound(outcome: &Outcome) -> Bound {
    let disks = outcome.wires.len().saturating_sub(outcome.bus_tiers.len());
    let disk = outcome.wires.iter().take(disks).map(|w| (w.busy_ns_per_pass, Bound::Disk));
    let bus = outcome.wires.iter().skip(disks).zip(&outcome.bus_tiers);
    let bus = bus.map(|(w, tier)| (w.busy_ns_per_pass, Bound::Bus(*tier)));
    let compute = (outcome.compute_ns_per_pass, Bound::Compute);
    disk.chain(bus).chain([compute]).max_by_key(|(ns, _)| *ns).map_or(Bound::Compute, |(_, bound)| bound)
}

fn places(outcome: &Outcome, cut: &CutModel, tiers: usize) -> Vec<(PartKind, Vec<u64>)> {
    let mut sums = vec![vec![0u64; tiers + 1]; PartKind::ALL.len()];
    for (block, kind) in cut.part_of.iter().enumerate() {
        let Some(row) = kind.and_then(|kind| PartKind::ALL.iter().position(|k| *k == kind)) else { continue };
        let tier = outcome.places.get(block).copied().flatten().map_or(tiers, TierId::index);
        sums[row][tier] += cut.workload.blocks[block].bytes;
    }
    let kinds = PartKind::ALL.into_iter().zip(sums);
    kinds.filter(|(_, sums)| sums.iter().any(|bytes| *bytes > 0)).collect()
}
