//! Events per second, and what a sweep costs: `cargo run --release -p overspill-sim --example speed`. A routing trace
//! (CSV) may be named, which then drives a mixture of 48 layers and 128 experts.

use overspill_core::{BlockId, BlockSize, Evict, Schedule, Step, TierId};
use overspill_sim::{Choice, Habit, Options, Profile, RoutingTrace, TierProfile, WireModel, Workload, simulate};
use std::time::Instant;

const SLOT: u64 = 2 << 20;

fn wire(label: &str, mb_per_s: u64, latency_ns: u64) -> WireModel {
    WireModel { label: label.into(), bytes_per_s: mb_per_s * 1_000_000, latency_ns, depth: 32, burst_ns: 0 }
}

fn tier(label: &str, budget_bytes: u64, parent: Option<(u32, WireModel)>, gb_per_s: u64) -> TierProfile {
    TierProfile {
        label: label.into(),
        budget_bytes,
        slab_bytes: 64 << 20,
        parent,
        read_bytes_per_s: gb_per_s * 1_000_000_000,
        flops_per_s: 0,
        step_ns: 20_000,
    }
}

fn cards(gpu_gb: u64, host_gb: u64) -> Profile {
    Profile {
        label: "card".into(),
        tiers: vec![
            tier("gpu", gpu_gb << 30, Some((1, wire("pcie", 24_000, 10_000))), 900),
            tier("host", host_gb << 30, None, 60),
        ],
        disks: vec![wire("nvme", 6_000, 80_000)],
    }
}

fn host_only(host_gb: u64) -> Profile {
    Profile {
        label: "host".into(),
        tiers: vec![tier("host", host_gb << 30, None, 60)],
        disks: vec![wire("nvme", 6_000, 80_000)],
    }
}

/// About 40 GB: 80 layers of four steps.
fn dense() -> Workload {
    let (mut steps, mut next) = (Vec::new(), 0);
    for _ in 0..80 {
        for count in [30, 20, 130, 65] {
            steps.push(Step { tier: TierId(0), blocks: (next..next + count).map(BlockId).collect(), choice_max: 0 });
            next += count;
        }
    }
    Workload {
        slot_bytes: SLOT,
        blocks: vec![BlockSize { bytes: SLOT, slots: 1, wire: 0 }; next as usize],
        schedule: Schedule { label: "70B, 4 bits".into(), cyclic: true, steps, standing: vec![] },
        ..Workload::default()
    }
}

fn mixture(habit: Habit) -> Workload {
    let mut workload = Workload { slot_bytes: SLOT, habit, ..Workload::default() };
    let mut next = 0;
    for _ in 0..48 {
        for (count, choice) in [(6, None), (128 * 2, Some(Choice { experts: 128, pick: 6, together: 4 }))] {
            let blocks = (next..next + count).map(BlockId).collect();
            let choice_max = if choice.is_some() { 12 } else { 0 };
            workload.schedule.steps.push(Step { tier: TierId(0), blocks, choice_max });
            workload.choices.push(choice);
            next += count;
        }
    }
    workload.blocks = vec![BlockSize { bytes: SLOT, slots: 1, wire: 0 }; next as usize];
    workload.schedule.cyclic = true;
    workload
}

/// Nanoseconds that this thread has run, so that what else the machine does hardly matters; where the system doesn't
/// tell, those on the clock.
fn cpu_ns(started: Instant) -> u64 {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let ran = schedstat.and_then(|text| text.split(' ').next()?.parse().ok());
    ran.unwrap_or_else(|| started.elapsed().as_nanos() as u64)
}

fn run(label: &str, profile: &Profile, workload: &Workload, evict: Evict) {
    let started = Instant::now();
    let before = cpu_ns(started);
    match simulate(profile, workload, &Options { evict, ..Options::default() }) {
        Ok(o) => {
            let took_ns = (cpu_ns(started) - before).max(1);
            println!(
                "{label:<32} {:>7.1} ms/token, ratio {:.3} ({}), {:>2} passes, {:>8} events in {:>6.1} ms: {:.2} M/s",
                o.ns_per_pass as f64 / 1e6,
                o.ratio(),
                o.limit.bound.name(),
                o.passes,
                o.events,
                took_ns as f64 / 1e6,
                o.events as f64 * 1e3 / took_ns as f64
            );
        }
        Err(e) => println!("{label:<32} {e}"),
    }
}

fn main() {
    let dense = dense();
    run("dense, host 20 GB", &host_only(20), &dense, Evict::Auto);
    run("dense, host 20 GB, next-use", &host_only(20), &dense, Evict::NextUse);
    run("dense, host 20 GB, lru", &host_only(20), &dense, Evict::Lru);
    run("dense, host 36 GB", &host_only(36), &dense, Evict::Auto);
    run("dense, gpu 16, host 16 GB", &cards(16, 16), &dense, Evict::Auto);
    run("dense, gpu 24, host 64 GB", &cards(24, 64), &dense, Evict::Auto);
    run("dense, gpu 48, host 64 GB", &cards(48, 64), &dense, Evict::Auto);
    for (label, habit) in [("uniform", Habit::Uniform), ("sticky", Habit::Sticky { stay_milli: 700 })] {
        run(&format!("mixture {label}, host 12 GB"), &host_only(12), &mixture(habit.clone()), Evict::Auto);
        run(&format!("mixture {label}, host 12 GB, lru"), &host_only(12), &mixture(habit.clone()), Evict::Lru);
        run(&format!("mixture {label}, gpu 8, host 8"), &cards(8, 8), &mixture(habit), Evict::Auto);
    }
    if let Some(path) = std::env::args().nth(1) {
        let trace = std::fs::read_to_string(&path).map_err(|e| e.to_string());
        match trace.and_then(|text| RoutingTrace::parse(&text).map_err(|e| e.to_string())) {
            Ok(trace) => run(
                &format!("trace of {} tokens, host 12", trace.tokens()),
                &host_only(12),
                &mixture(Habit::Trace(trace)),
                Evict::Auto,
            ),
            Err(e) => println!("{path}: {e}"),
        }
    }
}
