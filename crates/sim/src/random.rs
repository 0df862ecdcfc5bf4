//! Random worlds: sizes, budgets, orders, several sequences, faults, cancels and budget changes, all from one seed.

use crate::faults::{BudgetChange, Faults, Slow, Stop};
use crate::program::{Choice, Passes, Program, ScheduleModel, Work};
use crate::rng::Rng;
use crate::router::Habit;
use crate::wire::WireModel;
use crate::world::{Checks, Setup};
use overspill_core::{BlockId, BlockSize, Config, Evict, Prefetch, Step, TierConfig, TierId};

const SLOT_BYTES: u64 = 1 << 16;
const MS: u64 = 1_000_000;

/// The world of a seed, with every check on; the brain's own books are audited in one world of eight.
#[must_use]
pub fn setup(seed: u64) -> Setup {
    let mut rng = Rng::new(seed);
    let rng = &mut rng;
    let config = config(rng);
    let schedules: Vec<ScheduleModel> = (0..rng.between(1, 3)).map(|_| schedule(rng, &config)).collect();
    let programs: Vec<Program> = (0..rng.between(1, 4)).map(|_| program(rng, &config, &schedules)).collect();
    let disks = (0..config.blocks.iter().map(|b| b.wire + 1).max().unwrap_or(1)).map(|_| wire(rng, "disk")).collect();
    let uploads = config.tiers.iter().map(|_| wire(rng, "bus")).collect();
    let faults = if rng.chance(250) { Faults::default() } else { faults(rng, &config, programs.len()) };
    Setup {
        disks,
        uploads,
        schedules,
        programs,
        faults,
        seed: rng.bits(),
        checks: if seed.is_multiple_of(8) { Checks::Audit } else { Checks::On },
        lazy: rng.chance(300),
        events_max: 100_000,
        config,
    }
}

fn config(rng: &mut Rng) -> Config {
    let most = if rng.chance(200) { 40 } else { 14 };
    let blocks = rng.between(2, most);
    let (equal, runs, wires) = (rng.chance(500), rng.chance(150), rng.between(1, 3) as u32);
    let slots_per_slab = rng.between(2, 6) as u32;
    let block = |rng: &mut Rng| {
        let slots = if runs && rng.chance(250) { rng.between(1, u64::from(slots_per_slab.min(3))) as u32 } else { 1 };
        let most = u64::from(slots) * SLOT_BYTES;
        let bytes = if equal { most } else { rng.between(1, most) };
        BlockSize { bytes, slots, wire: rng.below(u64::from(wires)) as u32 }
    };
    let blocks: Vec<BlockSize> = (0..blocks).map(|_| block(rng)).collect();
    let parents: &[Option<u32>] = match rng.below(6) {
        0..=2 => &[None],
        3 => &[Some(1), None],
        4 => &[Some(2), Some(2), None],
        _ => &[None, Some(2), None],
    };
    let all: u64 = blocks.iter().map(|b| u64::from(b.slots)).sum();
    let least = blocks.iter().map(|b| u64::from(b.slots)).max().unwrap_or(1);
    let tier = |parent: &Option<u32>| TierConfig {
        label: "tier".into(),
        budget_bytes: rng.between(least, (all + 2).max(least)) * SLOT_BYTES + rng.below(SLOT_BYTES),
        slots_per_slab,
        parent: parent.map(TierId),
    };
    let tiers = parents.iter().map(tier).collect();
    Config {
        slot_bytes: SLOT_BYTES,
        tiers,
        blocks,
        evict: *rng.pick(&[Evict::Auto, Evict::Auto, Evict::Lru, Evict::NextUse, Evict::Planned]),
        prefetch: if rng.chance(800) { Prefetch::Auto } else { Prefetch::Off },
        window_bytes: rng.between(1, 8) * SLOT_BYTES,
    }
}

/// Different blocks, `count` of them at most.
fn some_blocks(rng: &mut Rng, config: &Config, count: u64) -> Vec<BlockId> {
    let mut all: Vec<BlockId> = (0..config.blocks.len() as u32).map(BlockId).collect();
    let count = (count as usize).min(all.len());
    rng.shuffle(&mut all, count);
    all.truncate(count);
    all
}

fn schedule(rng: &mut Rng, config: &Config) -> ScheduleModel {
    let tiers = config.tiers.len() as u64;
    let (mixture, one_tier, in_order) = (rng.chance(300), rng.chance(600), rng.chance(500));
    let home = TierId(rng.below(tiers) as u32);
    let mut model = ScheduleModel::default();
    let mut next = rng.below(config.blocks.len() as u64) as u32;
    for _ in 0..rng.between(1, 8) {
        let tier = if one_tier { home } else { TierId(rng.below(tiers) as u32) };
        let mut step = Step { tier, ..Step::default() };
        let mut choice = None;
        if mixture && rng.chance(500) {
            let experts = rng.between(2, 4) as u32;
            let candidates = rng.between(2, 8);
            step.blocks = some_blocks(rng, config, candidates);
            let share = step.blocks.len() as u32 / experts;
            if share > 0 {
                let pick = rng.between(1, 2) as u32;
                step.blocks.truncate((share * experts) as usize);
                step.choice_max = pick * share;
                choice = Some(Choice { experts, pick, together: rng.below(4) as u32 });
            }
        } else if in_order {
            let count = rng.between(1, 3).min(config.blocks.len() as u64);
            for _ in 0..count {
                step.blocks.push(BlockId(next));
                next = (next + 1) % config.blocks.len() as u32;
            }
        } else {
            let count = rng.between(0, 4);
            step.blocks = some_blocks(rng, config, count);
        }
        model.choices.push(choice);
        model.compute_ns.push(if rng.chance(100) { 0 } else { rng.below(MS / 2) });
        model.schedule.steps.push(step);
    }
    if rng.chance(250) {
        let count = rng.between(1, 2);
        model.schedule.standing = some_blocks(rng, config, count);
    }
    model.schedule.cyclic = rng.chance(750);
    model.schedule.label = "random".into();
    model
}

fn program(rng: &mut Rng, config: &Config, schedules: &[ScheduleModel]) -> Program {
    let tier = TierId(rng.below(config.tiers.len() as u64) as u32);
    let work = match rng.below(10) {
        0..=6 => Work::Sequence {
            passes: (0..rng.between(1, 2))
                .map(|_| Passes {
                    schedule: rng.below(schedules.len() as u64) as usize,
                    passes: rng.between(1, 4) as u32,
                })
                .collect(),
            habit: rng.pick(&[Habit::Uniform, Habit::Zipf, Habit::Sticky { stay_milli: 600 }]).clone(),
            foresight_milli: if rng.chance(500) { rng.between(300, 1000) as u16 } else { 0 },
            warm: rng.chance(200),
        },
        7..=8 => {
            let largest = if rng.chance(100) { 8 } else { 2 };
            Work::Acquire {
                tier,
                sets: (0..rng.between(1, 8))
                    .map(|_| {
                        let count = rng.between(1, largest);
                        some_blocks(rng, config, count)
                    })
                    .collect(),
                rounds: rng.between(1, 5) as u32,
                compute_ns: rng.below(MS / 2),
            }
        }
        // A lease held for long.
        _ => {
            let count = rng.between(1, 4);
            Work::Acquire {
                tier,
                sets: vec![some_blocks(rng, config, count)],
                rounds: 1,
                compute_ns: rng.between(MS, 60 * MS),
            }
        }
    };
    Program {
        begins_at: if rng.chance(500) { 0 } else { rng.below(10 * MS) },
        work,
        deadline_ns: rng.between(MS, 30 * MS),
        patience_ns: rng.chance(150).then(|| rng.below(2 * MS)),
        lag_ns: if rng.chance(300) { rng.below(2 * MS) } else { 0 },
    }
}

fn wire(rng: &mut Rng, label: &str) -> WireModel {
    WireModel {
        label: label.into(),
        bytes_per_s: rng.between(100, 4000) * 1_000_000,
        latency_ns: rng.below(200_000),
        depth: rng.between(1, 8) as u32,
        burst_ns: 0,
    }
}

fn faults(rng: &mut Rng, config: &Config, programs: usize) -> Faults {
    let mut faults = Faults::default();
    if rng.chance(300) {
        faults.fail_milli = rng.between(1, 200) as u16;
    }
    if rng.chance(200) {
        let count = rng.between(1, 2);
        faults.cursed = some_blocks(rng, config, count);
    }
    if rng.chance(200) {
        let from = rng.below(10 * MS);
        let wire = rng.below(4) as usize;
        faults.slow.push(Slow { wire, from, until: from + rng.below(20 * MS), factor: 10 });
    }
    if rng.chance(400) {
        (faults.spike_milli, faults.spike_ns_max) = (rng.between(10, 500) as u16, rng.between(1, 2 * MS));
    }
    if rng.chance(400) {
        faults.late_ns_max = rng.between(1, MS / 5);
    }
    if rng.chance(350) {
        let all: u64 = config.blocks.iter().map(|b| u64::from(b.slots)).sum();
        for _ in 0..rng.between(1, 4) {
            let tier = TierId(rng.below(config.tiers.len() as u64) as u32);
            let bytes = rng.below(all + 4) * SLOT_BYTES + rng.below(SLOT_BYTES);
            faults.budgets.push(BudgetChange { at: rng.below(20 * MS), tier, bytes });
        }
    }
    if rng.chance(300) {
        faults.stops.push(Stop { at: rng.below(15 * MS), actor: rng.below(programs as u64) as usize });
    }
    faults
}
