//! What policies promise, measured in simulated cycles: invariants 5 and 6, Belady's optimum, LRU's fate.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill_core::{BlockId, BlockSize, Config, Evict, Prefetch, Schedule, Step, TierConfig, TierId};
use overspill_sim::{
    Checks, Choice, Faults, Habit, Options, Passes, Profile, Program, Rng, ScheduleModel, Setup, TierProfile,
    WireModel, Work, Workload, World, belady, simulate,
};

const SLOT: u64 = 1 << 20;

/// One sequence, one tier, one disk.
fn cycle(blocks: Vec<BlockSize>, steps: Vec<Vec<BlockId>>, slots: u64, config: impl FnOnce(&mut Config)) -> Setup {
    let step = |blocks: Vec<BlockId>| Step { tier: TierId(0), blocks, choice_max: 0 };
    let schedule = Schedule {
        label: "cycle".into(),
        cyclic: true,
        steps: steps.into_iter().map(step).collect(),
        standing: vec![],
    };
    let compute_ns = vec![100_000; schedule.steps.len()];
    let mut setup = Setup {
        config: Config {
            slot_bytes: SLOT,
            tiers: vec![TierConfig {
                label: "host".into(),
                budget_bytes: slots * SLOT,
                slots_per_slab: 64,
                parent: None,
            }],
            blocks,
            evict: Evict::Auto,
            prefetch: Prefetch::Auto,
            window_bytes: Config::WINDOW_BYTES_DEFAULT,
        },
        disks: vec![WireModel {
            label: "disk".into(),
            bytes_per_s: 2_000_000_000,
            latency_ns: 100_000,
            depth: 16,
            burst_ns: 0,
        }],
        uploads: vec![WireModel { label: String::new(), bytes_per_s: 1, latency_ns: 0, depth: 1, burst_ns: 0 }],
        schedules: vec![ScheduleModel { schedule, compute_ns, choices: vec![] }],
        programs: vec![Program::sequence(vec![Passes { schedule: 0, passes: 6 }], Habit::Uniform)],
        faults: Faults::default(),
        seed: 0,
        checks: Checks::Audit,
        lazy: false,
        events_max: 10_000_000,
    };
    config(&mut setup.config);
    setup
}

fn equal(count: usize) -> Vec<BlockSize> {
    vec![BlockSize { bytes: SLOT, slots: 1, wire: 0 }; count]
}

/// Steps of random lengths that use every block once.
fn random_steps(rng: &mut Rng, blocks: usize, longest: u64) -> Vec<Vec<BlockId>> {
    let mut order: Vec<BlockId> = (0..blocks as u32).map(BlockId).collect();
    rng.shuffle(&mut order, blocks);
    let mut steps = Vec::new();
    while !order.is_empty() {
        let count = rng.between(1, longest).min(order.len() as u64) as usize;
        steps.push(order.split_off(order.len() - count));
    }
    steps
}

/// Bytes read in each pass after the second, and R.
fn steady_bytes(setup: Setup) -> (Vec<u64>, u64) {
    let mut world = World::new(setup).unwrap();
    world.run().unwrap_or_else(|violation| panic!("{violation}"));
    assert_eq!(world.marks.len(), 6);
    let bytes = world.marks.windows(2).skip(1).map(|m| m[1].wire_bytes[0] - m[0].wire_bytes[0]).collect();
    (bytes, world.brain().tier_stats(TierId(0)).ring_bytes)
}

/// Invariant 5: in a known cycle of equal blocks, bytes read per cycle ≤ T − (B − R) plus one block.
#[test]
fn nothing_is_read_that_memory_could_have_kept_equal_blocks() {
    for seed in 0..150 {
        let rng = &mut Rng::new(seed);
        let blocks = rng.between(8, 120) as usize;
        let longest = rng.between(1, 5);
        let steps = random_steps(rng, blocks, longest);
        let slots = rng.between(longest, blocks as u64 + 2);
        let window = rng.between(1, 16) * SLOT;
        let prefetch = if rng.chance(700) { Prefetch::Auto } else { Prefetch::Off };
        let setup = cycle(equal(blocks), steps, slots, |c| (c.window_bytes, c.prefetch) = (window, prefetch));
        let (bytes, ring) = steady_bytes(setup);
        assert!(ring <= longest * SLOT + window, "seed {seed}: R is {ring}");
        let bound = (blocks as u64 * SLOT).saturating_sub(slots * SLOT - ring);
        let bound = if bound == 0 { 0 } else { bound + SLOT };
        assert!(
            bytes.iter().all(|&b| b <= bound),
            "seed {seed}: {blocks} blocks, {slots} slots, R {}: {:?} > {}",
            ring / SLOT,
            bytes.iter().map(|b| b / SLOT).collect::<Vec<_>>(),
            bound / SLOT
        );
    }
}

/// Invariant 5: for unequal sizes, bytes read per cycle ≤ the fractional bound plus the largest block.
#[test]
fn nothing_is_read_that_memory_could_have_kept_unequal_blocks() {
    for seed in 0..150 {
        let rng = &mut Rng::new(seed);
        let most = if seed % 50 == 0 { 1200 } else { 120 };
        let count = rng.between(8, most) as usize;
        // From a handful of sizes to all different.
        let sizes = rng.between(1, 3);
        let size = |rng: &mut Rng| match sizes {
            1 => *rng.pick(&[SLOT, SLOT / 2, SLOT / 10]),
            2 => SLOT - rng.below(SLOT / 20),
            _ => rng.between(1, SLOT),
        };
        let blocks: Vec<BlockSize> = (0..count).map(|_| BlockSize { bytes: size(rng), slots: 1, wire: 0 }).collect();
        let steps = random_steps(rng, count, 3);
        let slots = rng.between(3, count as u64 + 2);
        let window = rng.between(1, 16) * SLOT;
        let mut by_size: Vec<u64> = blocks.iter().map(|b| b.bytes).collect();
        by_size.sort_unstable_by(|a, b| b.cmp(a));
        let (bytes, ring) = steady_bytes(cycle(blocks, steps, slots, |c| c.window_bytes = window));
        let kept = (slots - ring / SLOT) as usize;
        let rest: u64 = by_size.iter().skip(kept).sum();
        let bound = if rest == 0 { 0 } else { rest + by_size[0] };
        assert!(bytes.iter().all(|&b| b <= bound), "seed {seed}: {bytes:?} > {bound}, {kept} kept of {count}");
    }
}

fn misses_of(evict: Evict, order: &[BlockId], blocks: usize, slots: u64) -> u64 {
    let steps = order.iter().map(|&b| vec![b]).collect();
    let setup = cycle(equal(blocks), steps, slots, |c| (c.evict, c.prefetch) = (evict, Prefetch::Off));
    let mut world = World::new(setup).unwrap();
    world.run().unwrap_or_else(|violation| panic!("{violation}"));
    world.summary().figures[0].misses
}

/// Next-use without prefetch misses exactly as often as Belady's optimum, blocks that come several times in a cycle
/// included.
#[test]
fn next_use_is_belady_s_optimum() {
    for seed in 0..150 {
        let rng = &mut Rng::new(seed);
        let blocks = rng.between(2, 40) as usize;
        let mut order: Vec<BlockId> = (0..blocks as u32).map(BlockId).collect();
        for _ in 0..if rng.chance(500) { rng.below(30) } else { 0 } {
            order.push(BlockId(rng.below(blocks as u64) as u32));
        }
        let length = order.len();
        rng.shuffle(&mut order, length);
        let slots = rng.between(1, blocks as u64 + 1);
        let optimum = belady::misses(&order, slots as usize, true, 6).into_iter().filter(|m| *m).count() as u64;
        assert_eq!(misses_of(Evict::NextUse, &order, blocks, slots), optimum, "seed {seed}: {order:?} in {slots}");
    }
}

/// In a cycle larger than the budget, LRU never hits; the plan keeps what it can.
#[test]
fn lru_never_hits_in_a_cycle_larger_than_memory_and_the_plan_does() {
    let order: Vec<BlockId> = (0..20).map(BlockId).collect();
    assert_eq!(misses_of(Evict::Lru, &order, 20, 19), 6 * 20);
    let (optimum, planned) = (misses_of(Evict::NextUse, &order, 20, 19), misses_of(Evict::Planned, &order, 20, 19));
    assert!(planned < 60 && optimum <= planned, "{optimum} {planned}");
}

fn machine(budget: u64, disk: WireModel) -> Profile {
    Profile {
        label: "machine".into(),
        tiers: vec![TierProfile {
            label: "host".into(),
            budget_bytes: budget,
            slab_bytes: 64 << 20,
            parent: None,
            read_bytes_per_s: 20_000_000_000,
            flops_per_s: 0,
            step_ns: 5_000,
        }],
        disks: vec![disk],
    }
}

fn dense(layers: u32, blocks_of: &[u32]) -> Workload {
    let mut steps = Vec::new();
    let mut next = 0;
    for _ in 0..layers {
        for &count in blocks_of {
            steps.push(Step { tier: TierId(0), blocks: (next..next + count).map(BlockId).collect(), choice_max: 0 });
            next += count;
        }
    }
    Workload {
        slot_bytes: SLOT,
        blocks: equal(next as usize),
        schedule: Schedule { label: "dense".into(), cyclic: true, steps, standing: vec![] },
        ..Workload::default()
    }
}

/// Invariant 6: the wire never idles while there is something useful to move and room to put it. A model that is bound
/// by its disk runs at the disk's speed, less what the plan's ring keeps from being kept.
#[test]
fn a_model_bound_by_its_disk_runs_at_the_disk_s_speed() {
    for seed in 0..60 {
        let rng = &mut Rng::new(seed);
        let layers = rng.between(8, 40) as u32;
        let blocks_of: Vec<u32> = (0..rng.between(1, 4)).map(|_| rng.between(1, 6) as u32).collect();
        let workload = dense(layers, &blocks_of);
        let total = workload.blocks.len() as u64 * SLOT;
        let budget = total * rng.between(40, 90) / 100;
        let disk = WireModel {
            label: "disk".into(),
            bytes_per_s: rng.between(300, 3000) * 1_000_000,
            latency_ns: rng.between(10_000, 200_000),
            depth: 32,
            burst_ns: 0,
        };
        let profile = machine(budget, disk.clone());
        let outcome = simulate(&profile, &workload, &Options { checked: true, ..Options::default() }).unwrap();
        let wire = &outcome.wires[0];
        let moved = disk.duration_ns(wire.bytes_per_pass);
        println!(
            "seed {seed}: {layers} × {blocks_of:?} blocks, {}%, steady {}, ratio {:.3}, wire busy {:.3}, R {} of {}",
            100 * budget / total,
            outcome.steady,
            outcome.ratio(),
            moved as f64 / outcome.ns_per_pass as f64,
            outcome.tiers[0].ring_bytes / SLOT,
            total / SLOT,
        );
        let longest = moved.max(outcome.compute_ns_per_pass);
        assert!(
            outcome.ns_per_pass <= longest + longest / 20,
            "seed {seed}: {} ns, of which the wire needs {moved}, computing {}",
            outcome.ns_per_pass,
            outcome.compute_ns_per_pass
        );
    }
}

fn gpu_machine(gpu: u64, host: u64, disk: WireModel, bus: WireModel) -> Profile {
    let mut profile = machine(host, disk);
    let gpu = TierProfile {
        label: "gpu".into(),
        budget_bytes: gpu,
        slab_bytes: 64 << 20,
        parent: Some((1, bus)),
        read_bytes_per_s: 500_000_000_000,
        flops_per_s: 0,
        step_ns: 5_000,
    };
    profile.tiers.insert(0, gpu);
    profile
}

/// Invariants 5 and 6 with a GPU: tiers are exclusive, so what the disk must read is what neither memory keeps; disk,
/// bus and computing run at the same time.
#[test]
fn disk_bus_and_computing_overlap_and_tiers_are_exclusive() {
    for seed in 0..40 {
        let rng = &mut Rng::new(seed);
        let blocks_of: Vec<u32> = (0..rng.between(1, 4)).map(|_| rng.between(1, 6) as u32).collect();
        let workload = dense(rng.between(30, 60) as u32, &blocks_of);
        let total = workload.blocks.len() as u64 * SLOT;
        let (gpu, host) = (total * rng.between(20, 60) / 100, total * rng.between(20, 70) / 100);
        let wire = |label: &str, mb: u64, latency_ns| WireModel {
            label: label.into(),
            bytes_per_s: mb * 1_000_000,
            latency_ns,
            depth: 32,
            burst_ns: 0,
        };
        let disk = wire("disk", rng.between(300, 3000), 100_000);
        let bus = wire("bus", rng.between(2000, 12000), 10_000);
        let profile = gpu_machine(gpu, host, disk.clone(), bus.clone());
        let outcome = simulate(&profile, &workload, &Options { checked: true, ..Options::default() }).unwrap();
        let moved =
            [disk.duration_ns(outcome.wires[0].bytes_per_pass), bus.duration_ns(outcome.wires[1].bytes_per_pass)];
        let kept = |tier: usize, budget: u64| budget - budget % SLOT - outcome.tiers[tier].ring_bytes;
        let (disk_most, bus_most) =
            ((total + SLOT).saturating_sub(kept(0, gpu) + kept(1, host)), total + SLOT - kept(0, gpu));
        println!(
            "seed {seed}: {} blocks, gpu {gpu} host {host}: steady {}, ratio {:.3} bound {:?}, disk {} of {} bus {} of {}, \
             disk busy {:.3}, bus busy {:.3}, computing {:.3} {:?}",
            total / SLOT,
            outcome.steady,
            outcome.ratio(),
            outcome.limit.bound,
            outcome.wires[0].bytes_per_pass / SLOT,
            disk_most / SLOT,
            outcome.wires[1].bytes_per_pass / SLOT,
            bus_most / SLOT,
            moved[0] as f64 / outcome.ns_per_pass as f64,
            moved[1] as f64 / outcome.ns_per_pass as f64,
            outcome.compute_ns_per_pass as f64 / outcome.ns_per_pass as f64,
            outcome.tiers.iter().map(|t| (t.kept_blocks, t.ring_bytes / SLOT)).collect::<Vec<_>>(),
        );
        // One block more for each tier.
        assert!(outcome.wires[0].bytes_per_pass <= disk_most + SLOT, "seed {seed}");
        assert!(outcome.wires[1].bytes_per_pass <= bus_most, "seed {seed}");
        let longest = moved[0].max(moved[1]).max(outcome.compute_ns_per_pass);
        assert!(outcome.ns_per_pass <= longest + longest / 20, "seed {seed}: nothing is busy all the time");
    }
}

/// Several disks run at once: two that hold every other block each are twice as fast as one.
#[test]
fn disks_run_at_the_same_time() {
    let mut workload = dense(40, &[4, 8]);
    let disk =
        WireModel { label: "disk".into(), bytes_per_s: 1_000_000_000, latency_ns: 50_000, depth: 32, burst_ns: 0 };
    let mut profile = machine(240 * SLOT, disk.clone());
    let one = simulate(&profile, &workload, &Options::default()).unwrap();
    workload.blocks.iter_mut().enumerate().for_each(|(index, b)| b.wire = index as u32 % 2);
    profile.disks.push(disk);
    let two = simulate(&profile, &workload, &Options::default()).unwrap();
    let (one, two) = (one.ns_per_pass as f64, two.ns_per_pass as f64);
    // The ring of two disks is twice as large, so a little more is read.
    assert!(two < one * 0.58, "{two} of {one}");
}

/// A mixture whose router is sticky is cached far better than its share, and within reach of Belady's optimum; one
/// whose router is uniform no better than its share.
#[test]
fn experts_that_come_again_stay() {
    let misses = |habit: Habit, evict: Evict| {
        let mut workload = dense(12, &[2]);
        let first = workload.blocks.len() as u32;
        let mut steps = Vec::new();
        for (layer, step) in workload.schedule.steps.drain(..).enumerate() {
            let experts = (0..32).map(|e| BlockId(first + layer as u32 * 32 + e)).collect();
            steps.extend([step, Step { tier: TierId(0), blocks: experts, choice_max: 4 }]);
            workload.choices.extend([None, Some(Choice { experts: 32, pick: 4, together: 0 })]);
        }
        workload.schedule.steps = steps;
        workload.habit = habit;
        workload.blocks = equal(first as usize + 12 * 32);
        let disk =
            WireModel { label: "disk".into(), bytes_per_s: 1_000_000_000, latency_ns: 50_000, depth: 32, burst_ns: 0 };
        // Room for everything dense and half of the experts.
        let profile = machine((u64::from(first) + 12 * 16) * SLOT, disk.clone());
        let options = Options { evict, passes_max: Some(120), checked: true, ..Options::default() };
        let outcome = simulate(&profile, &workload, &options).unwrap();
        let least = outcome.limit.ns_per_pass as f64 / disk.duration_ns(SLOT) as f64;
        println!(
            "{evict:?}: {} misses, at least {least:.1}, ratio {:.2} {:?}",
            outcome.misses_per_pass,
            outcome.ratio(),
            outcome.tiers[0]
        );
        (outcome.misses_per_pass as f64, least)
    };
    let (uniform, _) = misses(Habit::Uniform, Evict::Auto);
    assert!((22.0..27.0).contains(&uniform), "{uniform} of 48");
    for evict in [Evict::Auto, Evict::Lru] {
        let (sticky, least) = misses(Habit::Sticky { stay_milli: 800 }, evict);
        assert!(sticky < 12.0 && sticky < 3.0 * least, "{sticky}, at least {least}");
    }
}

/// What a runtime foresees of its router's choices is brought while the step before computes, into a tier that is full
/// as it always is; and the guesses pay.
#[test]
fn foreseen_experts_are_there_when_they_are_chosen() {
    let run = |foresight_milli: u16| {
        let (layers, experts) = (12u32, 32u32);
        let mut steps = Vec::new();
        let mut next = 0;
        for count in (0..layers).flat_map(|_| [2, experts]) {
            steps.push((next..next + count).map(BlockId).collect());
            next += count;
        }
        let slots = u64::from(layers * (2 + experts / 2));
        let mut setup = cycle(equal(next as usize), steps, slots, |c| c.evict = Evict::Auto);
        let model = &mut setup.schedules[0];
        for step in model.schedule.steps.iter_mut().skip(1).step_by(2) {
            step.choice_max = 4;
        }
        model.choices = (0..layers).flat_map(|_| [None, Some(Choice { experts, pick: 4, together: 0 })]).collect();
        // Computing a dense step takes as long as reading four experts.
        model.compute_ns = (0..layers).flat_map(|_| [2_500_000, 100_000]).collect();
        setup.programs[0].work = Work::Sequence {
            passes: vec![Passes { schedule: 0, passes: 40 }],
            habit: Habit::Uniform,
            foresight_milli,
            warm: false,
        };
        let mut world = World::new(setup).unwrap();
        world.run().unwrap_or_else(|violation| panic!("{violation}"));
        let (early, late) = (&world.marks[9], &world.marks[39]);
        let misses = late.figures.misses - early.figures.misses;
        (misses, late.wire_bytes[0] - early.wire_bytes[0], late.figures.stall_ns - early.figures.stall_ns)
    };
    let (blind, seeing, certain) = (run(0), run(950), run(1000));
    println!("misses, bytes, stall: {blind:?} blind, {seeing:?} with foresight, {certain:?} with certainty");
    assert!(seeing.0 * 4 < blind.0, "{seeing:?} of {blind:?}");
    assert!(seeing.1 < blind.1 + blind.1 / 8, "guessing reads too much: {seeing:?} of {blind:?}");
    assert!(certain.0 * 20 < blind.0 && certain.1 < seeing.1, "{certain:?} of {blind:?}");
}
