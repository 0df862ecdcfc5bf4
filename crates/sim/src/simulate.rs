//! What a model does on a machine: a schedule in virtual time until it repeats itself, set against what physics allows.

use crate::belady;
use crate::checker::Violation;
use crate::faults::Faults;
use crate::profile::{Profile, ProfileError, Workload};
use crate::program::{Mark, Passes, Program, ScheduleModel, Work};
use crate::wire::WireModel;
use crate::world::{Checks, Setup, World};
use overspill_core::{BlockId, Config, Decision, Evict, Nanos, Prefetch, TierConfig, TierId, TierStats, TooSmall};

/// How to simulate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Eviction policy.
    pub evict: Evict,
    /// Prefetch policy.
    pub prefetch: Prefetch,
    /// See [`Config::window_bytes`]. Default: what invariant 6 says for the profile's wires.
    pub window_bytes: Option<u64>,
    /// Passes after which it counts as steady, whether it repeats itself or not; at least 4. Default: 24, and 96 where
    /// steps choose, since chance never repeats itself.
    pub passes_max: Option<u32>,
    /// Where chance (of choices) begins.
    pub seed: u64,
    /// Whether every invariant is checked after every event, which takes longer.
    pub checked: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            evict: Evict::Auto,
            prefetch: Prefetch::Auto,
            window_bytes: None,
            passes_max: None,
            seed: 0,
            checked: false,
        }
    }
}

/// What binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// The disks.
    Disk,
    /// The link into a tier.
    Bus(TierId),
    /// Computing.
    Compute,
}

impl Bound {
    /// As the command line says it: `disk`, `bus` or `compute`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Bus(_) => "bus",
            Self::Compute => "compute",
        }
    }
}

/// The fastest that physics allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Nanoseconds for a pass.
    pub ns_per_pass: Nanos,
    /// What they are spent on.
    pub bound: Bound,
}

/// A wire's share in a pass, when steady.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireOutcome {
    /// Its name.
    pub label: String,
    /// Bytes that cross it in a pass.
    pub bytes_per_pass: u64,
    /// Nanoseconds of a pass in which it carries bytes.
    pub busy_ns_per_pass: Nanos,
}

/// What has come of a simulation. Figures of passes are those of the steady state.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Nanoseconds of a pass (a token, when a pass is one).
    pub ns_per_pass: Nanos,
    /// Nanoseconds of the first pass, from empty memories (those of mixtures are steady only after thousands of tokens,
    /// so their later passes begin with memories that have seen every expert).
    pub first_pass_ns: Nanos,
    /// Disks first, then the links of the tiers that have one.
    pub wires: Vec<WireOutcome>,
    /// Blocks that were there when they were needed, in a pass.
    pub hits_per_pass: u64,
    /// Blocks that were not.
    pub misses_per_pass: u64,
    /// Nanoseconds of a pass in which computing waited for blocks.
    pub stall_ns_per_pass: Nanos,
    /// Nanoseconds of computing in a pass.
    pub compute_ns_per_pass: Nanos,
    /// T: bytes of the blocks that a pass uses.
    pub touched_bytes_per_pass: u64,
    /// Of the last of the wires, those of links: the tiers that they fill.
    pub bus_tiers: Vec<TierId>,
    /// By block: the first tier that holds it at the end; `None`: only the disk does.
    pub places: Vec<Option<TierId>>,
    /// By tier.
    pub tiers: Vec<TierStats>,
    /// The policy in force, and why.
    pub decision: Decision,
    /// Whether the last passes were all alike; else the figures are means.
    pub steady: bool,
    /// Passes simulated.
    pub passes: u64,
    /// Events simulated.
    pub events: u64,
    /// What physics allows.
    pub limit: Limit,
}

impl Outcome {
    /// Seconds of a pass.
    #[must_use]
    pub fn seconds_per_pass(&self) -> f64 {
        self.ns_per_pass as f64 / 1e9
    }

    /// Measured time over the limit's; 1 is perfect.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        self.ns_per_pass as f64 / self.limit.ns_per_pass.max(1) as f64
    }

    /// Bytes read from disks in a pass.
    #[must_use]
    pub fn disk_bytes_per_pass(&self, disks: usize) -> u64 {
        self.wires.iter().take(disks).map(|w| w.bytes_per_pass).sum()
    }
}

/// Why there is no outcome.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SimulateError {
    /// The profile or the workload can't be.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// It does not fit: says the smallest budget that works.
    #[error(transparent)]
    TooSmall(#[from] TooSmall),
    /// A bug of the brain.
    #[error("an invariant is broken: {0}")]
    Broken(#[from] Violation),
    /// No pass was completed.
    #[error("no pass of schedule '{label}' was completed: leases or budgets don't allow it")]
    Stuck {
        /// Which schedule.
        label: String,
    },
}

/// Simulates a workload on a machine until it is steady.
///
/// # Errors
/// [`SimulateError::TooSmall`] if it does not fit; see there for the rest.
pub fn simulate(profile: &Profile, workload: &Workload, options: &Options) -> Result<Outcome, SimulateError> {
    run(profile, workload, options, workload.is_mixture()).map(|(outcome, _)| outcome)
}

/// As [`simulate`]; also tells every use of a block, in order, to compare policies on.
///
/// # Errors
/// As [`simulate`].
pub fn simulate_uses(
    profile: &Profile,
    workload: &Workload,
    options: &Options,
) -> Result<(Outcome, Vec<(TierId, BlockId)>), SimulateError> {
    run(profile, workload, options, true).map(|(outcome, world)| (outcome, world.uses().to_vec()))
}

fn run(
    profile: &Profile,
    workload: &Workload,
    options: &Options,
    record: bool,
) -> Result<(Outcome, World), SimulateError> {
    profile.validate()?;
    workload.validate(profile)?;
    let mixture = workload.is_mixture();
    let mut world = World::new(setup(profile, workload, options, mixture))?;
    world.record_uses(record);
    let passes_max = options.passes_max.unwrap_or(if mixture { 96 } else { 24 }).max(4) as usize;
    let mut steady = None;
    while steady.is_none() && world.marks.len() < passes_max {
        let before = world.marks.len();
        world.run_to_marks(before + 1)?;
        if let Some(refused) = world.refused_schedule() {
            return Err(refused.into());
        }
        if world.marks.len() == before {
            return Err(SimulateError::Stuck { label: workload.schedule.label.clone() });
        }
        steady = if mixture { None } else { steady_from(&world.marks) };
    }
    let mut outcome = outcome(profile, workload, &world, steady);
    if mixture {
        let mut cold = World::new(setup(profile, workload, options, false))?;
        cold.run_to_marks(1)?;
        outcome.first_pass_ns = cold.marks.first().map_or(outcome.first_pass_ns, |mark| mark.at);
        outcome.events += cold.events();
    }
    Ok((outcome, world))
}

fn setup(profile: &Profile, workload: &Workload, options: &Options, warm: bool) -> Setup {
    let tier = |t: &crate::profile::TierProfile| TierConfig {
        label: t.label.clone(),
        budget_bytes: t.budget_bytes,
        slots_per_slab: u32::try_from(t.slab_bytes / workload.slot_bytes.max(1)).unwrap_or(u32::MAX).max(1),
        parent: t.parent.as_ref().map(|(parent, _)| TierId(*parent)),
    };
    let config = Config {
        slot_bytes: workload.slot_bytes,
        tiers: profile.tiers.iter().map(tier).collect(),
        blocks: workload.blocks.clone(),
        evict: options.evict,
        prefetch: options.prefetch,
        window_bytes: options.window_bytes.unwrap_or_else(|| profile.window_bytes()),
    };
    let none = || WireModel { label: String::new(), bytes_per_s: 1, latency_ns: 0, depth: 1, burst_ns: 0 };
    let schedule = ScheduleModel {
        schedule: workload.schedule.clone(),
        compute_ns: (0..workload.schedule.steps.len()).map(|step| workload.compute_ns(profile, step)).collect(),
        choices: workload.choices.clone(),
    };
    let passes = vec![Passes { schedule: 0, passes: u32::MAX }];
    let mut program = Program::sequence(passes, workload.habit.clone());
    if let Work::Sequence { warm: begins_warm, .. } = &mut program.work {
        *begins_warm = warm;
    }
    Setup {
        config,
        disks: profile.disks.clone(),
        uploads: profile.tiers.iter().map(|t| t.parent.as_ref().map_or_else(none, |(_, wire)| wire.clone())).collect(),
        schedules: vec![schedule],
        programs: vec![program],
        faults: Faults::default(),
        seed: options.seed,
        checks: if options.checked { Checks::On } else { Checks::Off },
        lazy: true,
        events_max: u64::MAX,
    }
}

/// The mark from which on passes are alike: the last three are the same in bytes, and in time to a thousandth.
fn steady_from(marks: &[Mark]) -> Option<usize> {
    let from = marks.len().checked_sub(4)?;
    let span = |at: usize| (&marks[at], &marks[at + 1]);
    let same = |a: (&Mark, &Mark), b: (&Mark, &Mark)| {
        let bytes =
            |s: (&Mark, &Mark)| s.0.wire_bytes.iter().zip(&s.1.wire_bytes).map(|(a, b)| b - a).collect::<Vec<_>>();
        let ns = |s: (&Mark, &Mark)| s.1.at - s.0.at;
        bytes(a) == bytes(b) && ns(a).abs_diff(ns(b)) <= ns(a) / 1000
    };
    let alike = same(span(from), span(from + 1)) && same(span(from + 1), span(from + 2));
    alike.then_some(from)
}

fn outcome(profile: &Profile, workload: &Workload, world: &World, steady: Option<usize>) -> Outcome {
    let marks = &world.marks;
    // Not steady: the mean of the later half.
    let from = steady.unwrap_or(marks.len() / 2 - 1);
    let (first, last) = (&marks[from], &marks[marks.len() - 1]);
    let passes = (marks.len() - 1 - from).max(1) as u64;
    let each = |a: u64, b: u64| (b - a) / passes;
    let labels = profile.disks.iter().map(|w| Some(&w.label));
    let labels = labels.chain(profile.tiers.iter().map(|t| t.parent.as_ref().map(|(_, w)| &w.label)));
    let wires = labels.enumerate().filter_map(|(wire, label)| {
        Some(WireOutcome {
            label: label?.clone(),
            bytes_per_pass: each(first.wire_bytes[wire], last.wire_bytes[wire]),
            busy_ns_per_pass: each(first.wire_busy_ns[wire], last.wire_busy_ns[wire]),
        })
    });
    let brain = world.brain();
    let tiers = || (0..profile.tiers.len() as u32).map(TierId);
    Outcome {
        ns_per_pass: each(first.at, last.at),
        first_pass_ns: marks[0].at,
        wires: wires.collect(),
        hits_per_pass: each(first.figures.hits, last.figures.hits),
        misses_per_pass: each(first.figures.misses, last.figures.misses),
        stall_ns_per_pass: each(first.figures.stall_ns, last.figures.stall_ns),
        compute_ns_per_pass: each(first.figures.compute_ns, last.figures.compute_ns),
        touched_bytes_per_pass: each(first.figures.touched_bytes, last.figures.touched_bytes),
        bus_tiers: tiers().filter(|t| profile.tiers[t.index()].parent.is_some()).collect(),
        places: (0..workload.blocks.len() as u32)
            .map(|block| tiers().find(|&tier| brain.is_resident(tier, BlockId(block))))
            .collect(),
        tiers: (0..profile.tiers.len()).map(|t| brain.tier_stats(TierId(t as u32))).collect(),
        decision: brain.decision(),
        steady: steady.is_some(),
        passes: marks.len() as u64,
        events: world.events(),
        limit: limit(profile, workload, world, from),
    }
}

/// Bytes for weights that a tier fills from a disk or a parent.
fn feeds(profile: &Profile, tier: usize, consumer: usize) -> bool {
    let mut at = Some(consumer);
    while let Some(here) = at {
        if here == tier {
            return true;
        }
        at = profile.tiers[here].parent.as_ref().map(|(parent, _)| *parent as usize);
    }
    false
}

fn limit(profile: &Profile, workload: &Workload, world: &World, from: usize) -> Limit {
    let steps = &workload.schedule.steps;
    let compute = (0..steps.len()).map(|step| workload.compute_ns(profile, step)).fold(0, u64::saturating_add);
    let mut limit = Limit { ns_per_pass: compute, bound: Bound::Compute };
    let mut offer = |ns_per_pass, bound| {
        if ns_per_pass > limit.ns_per_pass {
            limit = Limit { ns_per_pass, bound };
        }
    };
    for (tier, t) in profile.tiers.iter().enumerate() {
        if let Some((_, wire)) = &t.parent {
            let fed = |consumer: usize| feeds(profile, tier, consumer);
            let must = crossing_bytes(workload, world, from, fed, t.budget_bytes, 1, |_| 0);
            offer(wire.duration_ns(must[0]), Bound::Bus(TierId(tier as u32)));
        }
    }
    let memory = profile.tiers.iter().map(|t| t.budget_bytes).fold(0, u64::saturating_add);
    let wire_of = |block: usize| workload.blocks[block].wire as usize;
    let mixture = workload.is_mixture();
    // What is kept is kept from the disk that would take longest, so that all end together.
    let room = if mixture { 0 } else { memory };
    let used =
        crossing_bytes(workload, world, from, |_| true, if mixture { memory } else { 0 }, profile.disks.len(), wire_of);
    offer(even_ns(&profile.disks, &used, room), Bound::Disk);
    limit
}

/// Nanoseconds in which disks read what they hold, if so many bytes need not be read.
fn even_ns(disks: &[WireModel], bytes: &[u64], kept: u64) -> Nanos {
    let over = |ns: u64| -> u128 {
        let could = |w: &WireModel| u128::from(w.bytes_per_s) * u128::from(ns) / 1_000_000_000;
        disks.iter().zip(bytes).map(|(w, &b)| u128::from(b).saturating_sub(could(w))).sum()
    };
    let (mut low, mut high) = (0, disks.iter().zip(bytes).map(|(w, &b)| w.duration_ns(b)).max().unwrap_or(0) + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        if over(middle) <= u128::from(kept) { high = middle } else { low = middle + 1 }
    }
    low
}

/// Bytes that must cross in a pass, by wire. In a cycle: what is used, less what memory can keep. Where steps choose:
/// the misses of Belady's MIN on what was chosen.
fn crossing_bytes(
    workload: &Workload,
    world: &World,
    from: usize,
    consumer: impl Fn(usize) -> bool,
    memory: u64,
    wires: usize,
    wire_of: impl Fn(usize) -> usize,
) -> Vec<u64> {
    let mut bytes = vec![0u64; wires];
    if !workload.is_mixture() {
        let mut used = vec![false; workload.blocks.len()];
        for step in workload.schedule.steps.iter().filter(|s| consumer(s.tier.index())) {
            step.blocks.iter().for_each(|b| used[b.index()] = true);
        }
        for (block, _) in used.iter().enumerate().filter(|(_, used)| **used) {
            bytes[wire_of(block)] += workload.blocks[block].bytes;
        }
        // Only one wire is asked about when something is kept here.
        bytes[0] = bytes[0].saturating_sub(memory);
        return bytes;
    }
    let uses: Vec<_> = world.uses().iter().filter(|(tier, _)| consumer(tier.index())).map(|(_, b)| *b).collect();
    let seen = |uses: &[(TierId, BlockId)]| uses.iter().filter(|(tier, _)| consumer(tier.index())).count();
    let passes = world.marks.len();
    let missed = belady::misses(&uses, (memory / workload.slot_bytes.max(1)) as usize, false, 1);
    let begin = world.marks.get(from).map_or(0, |mark| seen(&world.uses()[..mark.uses]));
    let measured = (passes - 1 - from).max(1) as u64;
    for (block, _) in uses.iter().zip(&missed).skip(begin).filter(|(_, missed)| **missed) {
        bytes[wire_of(block.index())] += workload.blocks[block.index()].bytes;
    }
    bytes.iter().map(|b| b / measured).collect()
}
