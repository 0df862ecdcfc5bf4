//! Several schedules, and several sequences of one, in the same brain; and what mixtures read at any routing: each
//! against the fewest reads that are possible.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill_core::{BlockId, BlockSize, Config, Evict, Prefetch, Schedule, Step, TierConfig, TierId};
use overspill_sim::{
    Cache, Checks, Choice, Faults, Habit, Passes, Program, ScheduleModel, Setup, WireModel, World, belady, caches,
};

const SLOT: u64 = 1 << 20;

fn setup(blocks: u32, slots: u64, schedules: Vec<ScheduleModel>, programs: Vec<Program>) -> Setup {
    Setup {
        config: Config {
            slot_bytes: SLOT,
            tiers: vec![TierConfig {
                label: "host".into(),
                budget_bytes: slots * SLOT,
                slots_per_slab: 64,
                parent: None,
            }],
            blocks: vec![BlockSize { bytes: SLOT, slots: 1, wire: 0 }; blocks as usize],
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
        schedules,
        programs,
        faults: Faults::default(),
        seed: 5,
        checks: Checks::On,
        lazy: false,
        events_max: 100_000_000,
    }
}

fn sequence(passes: Vec<Passes>, habit: &Habit) -> Program {
    let deadline_ns = 3_600_000_000_000;
    Program { deadline_ns, ..Program::sequence(passes, habit.clone()) }
}

fn model(steps: Vec<(Vec<BlockId>, Option<Choice>)>, compute_ns: u64) -> ScheduleModel {
    let step = |(blocks, choice): &(Vec<BlockId>, Option<Choice>)| Step {
        tier: TierId(0),
        blocks: blocks.clone(),
        choice_max: choice.map_or(0, |c| c.pick),
    };
    ScheduleModel {
        compute_ns: vec![compute_ns; steps.len()],
        choices: steps.iter().map(|(_, choice)| *choice).collect(),
        schedule: Schedule {
            label: "model".into(),
            cyclic: true,
            steps: steps.iter().map(step).collect(),
            standing: vec![],
        },
    }
}

const LAYERS: u32 = 12;
const CHOICE: Choice = Choice { experts: 32, pick: 4, together: 0 };
const DENSE: u32 = 2;
const HEAD: u32 = 4;
const EXPERTS: u32 = LAYERS * CHOICE.experts;
const MIXTURE: u32 = EXPERTS + LAYERS * DENSE + HEAD;

/// A mixture as the runtime declares it: with the head for tokens, without it for all but the last of a prompt.
fn mixture(head: bool) -> ScheduleModel {
    let (mut steps, mut next) = (Vec::new(), 0);
    let mut push = |count: u32, choice| {
        steps.push(((next..next + count).map(BlockId).collect(), choice));
        next += count;
    };
    for _ in 0..LAYERS {
        push(DENSE, None);
        push(CHOICE.experts, Some(CHOICE));
    }
    if head {
        push(HEAD, None);
    }
    model(steps, 100_000)
}

fn is_expert(block: BlockId) -> bool {
    block.0 < LAYERS * (DENSE + CHOICE.experts) && block.0 % (DENSE + CHOICE.experts) >= DENSE
}

/// Of the bytes of the chosen experts, the part that is read, in the second half of the first program's passes; and the
/// uses of experts.
fn expert_reads(percent: u64, programs: Vec<Program>) -> (f64, Vec<BlockId>) {
    let slots = u64::from(EXPERTS) * percent / 100 + u64::from(MIXTURE - EXPERTS);
    let mut world = World::new(setup(MIXTURE, slots, vec![mixture(true), mixture(false)], programs)).unwrap();
    world.record_uses(true);
    let (mut half, mut read) = (0, 0);
    while world.step().unwrap_or_else(|violation| panic!("{violation}")) {
        let passes = world.marks.iter().filter(|m| m.actor == 0).count();
        if half == 0 && passes == PASSES as usize / 2 {
            (half, read) = (world.uses().len(), world.marks[world.marks.len() - 1].wire_bytes[0]);
        }
    }
    let chosen = world.uses()[half..].iter().filter(|(_, b)| is_expert(*b)).count() as u64 * SLOT;
    let read = world.marks[world.marks.len() - 1].wire_bytes[0] - read;
    let uses = world.uses().iter().map(|(_, b)| *b).filter(|b| is_expert(*b)).collect();
    (read as f64 / chosen as f64, uses)
}

const PASSES: u32 = 120;
const HABITS: [Habit; 4] = [Habit::Uniform, Habit::Zipf, Habit::Sticky { stay_milli: 700 }, Habit::Recency];

fn only(schedule: usize) -> Vec<Passes> {
    vec![Passes { schedule, passes: PASSES }]
}

/// The bug: as soon as a token and a prompt chose more than memory holds, the least recently used expert was always
/// what the next layer needed, and of a mixture that read 0.33 of its experts' bytes all were read.
#[test]
fn a_second_schedule_costs_a_mixture_nothing_while_idle_and_nothing_in_turn() {
    for habit in HABITS {
        for percent in [10, 25, 50, 75] {
            let (one, _) = expert_reads(percent, vec![sequence(only(0), &habit)]);
            let once = vec![Passes { schedule: 1, passes: 1 }];
            let (idle, _) = expert_reads(percent, vec![sequence(only(0), &habit), sequence(once, &habit)]);
            let turns = (0..PASSES as usize).map(|pass| Passes { schedule: pass % 2, passes: 1 }).collect();
            let (turns, _) = expert_reads(percent, vec![sequence(turns, &habit)]);
            println!(
                "{habit:?}, {percent} %: {one:.3} of the chosen bytes, {idle:.3} beside an idle one, {turns:.3} in turn"
            );
            assert!(idle < one * 1.03 + 0.01, "{habit:?}, {percent} %: {one} alone, {idle} beside an idle one");
            assert!(turns < one * 1.03 + 0.01, "{habit:?}, {percent} %: {one} alone, {turns} in turn");
        }
    }
}

/// Two tokens at once choose from the same experts. Visits of both count as one router's, so where each of them sticks to
/// its own choices the better of LRU and LFU, known only afterwards, may read up to a fifth less.
#[test]
fn two_schedules_walked_at_once_share_experts() {
    for habit in HABITS {
        let programs = vec![sequence(only(0), &habit), sequence(only(1), &habit)];
        let room = u64::from(EXPERTS) * 25 / 100;
        let (read, uses) = expert_reads(25, programs);
        let [lru, lfu] = [Cache::Lru, Cache::Lfu].map(|cache| late(&caches::misses(cache, &uses, room as usize)));
        println!("{habit:?}: {read:.3} of the chosen bytes, LRU {lru:.3}, LFU {lfu:.3}");
        assert!(read < lru.min(lfu) * 1.25, "{habit:?}: {read}, LRU {lru}, LFU {lfu}");
    }
}

fn late(missed: &[bool]) -> f64 {
    let late = &missed[missed.len() / 2..];
    late.iter().filter(|m| **m).count() as f64 / late.len() as f64
}

/// Whatever the router's habit, what is learned from it comes within a twentieth of the better of LRU and LFU, known only
/// afterwards; and where less fits than a token chooses, which LRU never hits, much is hit.
#[test]
fn no_simple_cache_beats_what_is_learned_of_the_router() {
    for habit in HABITS {
        for percent in [10, 25, 50, 75] {
            let (read, uses) = expert_reads(percent, vec![sequence(only(0), &habit)]);
            let room = (u64::from(EXPERTS) * percent / 100) as usize;
            let [lru, lfu] = [Cache::Lru, Cache::Lfu].map(|cache| late(&caches::misses(cache, &uses, room)));
            let least = late(&belady::misses(&uses, room, false, 1));
            println!("{habit:?}, {percent} %: {read:.3} of the chosen, LRU {lru:.3}, LFU {lfu:.3}, least {least:.3}");
            assert!(read < lru.min(lfu) * 1.05 + 0.01, "{habit:?}, {percent} %: {read}, LRU {lru}, LFU {lfu}");
            assert!(percent > 10 || habit == Habit::Uniform || (lru > 0.99 && read < 0.75), "{habit:?}: {read}");
        }
    }
}

fn dense(first: u32, blocks: u32, step: u32, compute_ns: u64) -> ScheduleModel {
    let steps = (0..blocks / step).map(|s| first + s * step).map(|at| ((at..at + step).map(BlockId).collect(), None));
    model(steps.collect(), compute_ns)
}

/// A batch: sequences that began at different times come together, and what one reads serves all. The bound is what
/// Belady's MIN reads on the merged uses in a memory without the ring.
#[test]
fn sequences_of_one_schedule_read_what_one_would() {
    const BLOCKS: u32 = 600;
    const ROUNDS: u32 = 14;
    for percent in [25, 50, 75] {
        for sequences in [1u64, 2, 3, 4, 8] {
            for (apart_ns, compute_ns) in [(3_000_000, 1_000_000), (160_000_000, 1_000_000), (160_000_000, 10_000)] {
                let slots = u64::from(BLOCKS) * percent / 100;
                let passes = || vec![Passes { schedule: 0, passes: ROUNDS }];
                let program =
                    |at: u64| Program { begins_at: at * apart_ns / sequences, ..sequence(passes(), &Habit::Uniform) };
                let programs: Vec<_> = (0..sequences).map(program).collect();
                let mut setup = setup(BLOCKS, slots, vec![dense(0, BLOCKS, 5, compute_ns)], programs);
                setup.checks = Checks::Off;
                let mut world = World::new(setup).unwrap();
                world.record_uses(true);
                let (mut half, mut read) = (0, 0);
                while world.step().unwrap() {
                    if half == 0 && world.marks.len() as u64 == sequences * u64::from(ROUNDS) / 2 {
                        (half, read) = (world.uses().len(), world.marks[world.marks.len() - 1].wire_bytes[0]);
                    }
                }
                let read = (world.marks[world.marks.len() - 1].wire_bytes[0] - read) / SLOT;
                let ring = world.brain().tier_stats(TierId(0)).ring_bytes / SLOT;
                let uses: Vec<_> = world.uses().iter().map(|(_, block)| *block).collect();
                let missed = belady::misses(&uses, (slots - ring) as usize, false, 1);
                let least = missed[half..].iter().filter(|m| **m).count() as u64;
                // What one sequence alone would read in as many rounds.
                let alone = u64::from(ROUNDS / 2 + 1) * (u64::from(BLOCKS) + ring - slots);
                println!("{percent} %, {sequences} sequences: {read} blocks read, at least {least}, alone {alone}");
                assert!(read <= least + least / 20, "{percent} %, {sequences} sequences: {read} of {least}");
                assert!(read <= alone + alone / 20, "{percent} %, {sequences} sequences: {read}, alone {alone}");
            }
        }
    }
}

/// A schedule that was walked once keeps nothing of the memory that another walks in.
#[test]
fn a_schedule_that_is_not_walked_any_more_is_not_planned_for() {
    const BLOCKS: u32 = 100;
    let slots = 80;
    let passes = |schedule, passes| vec![Passes { schedule, passes }];
    let schedules = vec![dense(0, BLOCKS, 2, 10_000), dense(BLOCKS, BLOCKS, 2, 10_000)];
    let walk = vec![passes(1, 3).remove(0), passes(0, 90).remove(0)];
    let mut world = World::new(setup(2 * BLOCKS, slots, schedules, vec![sequence(walk, &Habit::Uniform)])).unwrap();
    world.run().unwrap_or_else(|violation| panic!("{violation}"));
    let ring = world.brain().tier_stats(TierId(0)).ring_bytes / SLOT;
    let last = &world.marks[world.marks.len() - 2..];
    let read = (last[1].wire_bytes[0] - last[0].wire_bytes[0]) / SLOT;
    assert!(read <= u64::from(BLOCKS) - (slots - ring) + 1, "{read} blocks read, R is {ring}");
}

/// The head of a model is in the plan of tokens, and not in that of prompts; it is kept as its layers are, not last, or
/// all that streams would come at the end of a token.
#[test]
fn what_only_one_schedule_uses_is_kept_as_evenly_as_the_rest() {
    const BLOCKS: u32 = 400;
    let (token, mut prompt) = (dense(0, BLOCKS, 4, 10_000), dense(0, BLOCKS, 4, 10_000));
    prompt.schedule.steps.truncate(75);
    prompt.compute_ns.truncate(75);
    prompt.choices.truncate(75);
    let walk = vec![Passes { schedule: 1, passes: 2 }, Passes { schedule: 0, passes: 4 }];
    let mut world = World::new(setup(BLOCKS, 200, vec![token, prompt], vec![sequence(walk, &Habit::Uniform)])).unwrap();
    world.run().unwrap_or_else(|violation| panic!("{violation}"));
    let kept = |blocks: std::ops::Range<u32>| blocks.filter(|&b| world.brain().is_kept(TierId(0), BlockId(b))).count();
    let (layers, head) = (kept(0..300), kept(300..400));
    assert!((head * 3).abs_diff(layers) <= 6, "{layers} of 300 and {head} of 100");
}
