//! What share of the chosen experts' bytes a token reads, by habit of the router and share of the experts that memory
//! holds: the brain's policy beside LRU, LFU, and Belady's MIN, which knows the future:
//! `cargo run --release -p overspill-sim --example mixture -- [TRACE.csv …]`.

use overspill_core::{BlockId, BlockSize, Schedule, Step, TierId};
use overspill_sim::{Cache, Choice, Habit, Options, Profile, RoutingTrace, TierProfile, WireModel, Workload};
use overspill_sim::{belady, caches, simulate_uses};

const SLOT: u64 = 2 << 20;
const DENSE: u32 = 4;

fn workload(layers: u32, experts: u32, pick: u32, habit: Habit) -> Workload {
    let mut workload = Workload { slot_bytes: SLOT, habit, ..Workload::default() };
    let mut next = 0;
    for _ in 0..layers {
        for (count, choice) in [(DENSE, None), (experts, Some(Choice { experts, pick, together: 0 }))] {
            let blocks = (next..next + count).map(BlockId).collect();
            let choice_max = if choice.is_some() { pick } else { 0 };
            workload.schedule.steps.push(Step { tier: TierId(0), blocks, choice_max });
            workload.choices.push(choice);
            next += count;
        }
    }
    workload.blocks = vec![BlockSize { bytes: SLOT, slots: 1, wire: 0 }; next as usize];
    workload.schedule = Schedule { label: "mixture".into(), cyclic: true, ..workload.schedule };
    workload
}

fn machine(budget_bytes: u64) -> Profile {
    Profile {
        label: "host".into(),
        tiers: vec![TierProfile {
            label: "host".into(),
            budget_bytes,
            slab_bytes: 64 << 20,
            parent: None,
            read_bytes_per_s: 60_000_000_000,
            flops_per_s: 0,
            step_ns: 20_000,
        }],
        disks: vec![WireModel {
            label: "nvme".into(),
            bytes_per_s: 6_000_000_000,
            latency_ns: 80_000,
            depth: 32,
            burst_ns: 0,
        }],
    }
}

/// Missed in the later half.
fn share(missed: &[bool]) -> f64 {
    let late = &missed[missed.len() / 2..];
    late.iter().filter(|m| **m).count() as f64 / late.len().max(1) as f64
}

fn rows(label: &str, layers: u32, experts: u32, pick: u32, habit: &Habit, passes: u32) {
    let workload = workload(layers, experts, pick, habit.clone());
    for percent in [5u64, 10, 25, 50, 75] {
        let room = u64::from(layers * experts) * percent / 100;
        let profile = machine((room + u64::from(layers * DENSE)) * SLOT);
        let options = Options { passes_max: Some(passes), ..Options::default() };
        match simulate_uses(&profile, &workload, &options) {
            Ok((outcome, uses)) => {
                let is_dense = |b: &BlockId| b.0 % (DENSE + experts) < DENSE;
                let chosen: Vec<BlockId> = uses.into_iter().map(|(_, b)| b).filter(|b| !is_dense(b)).collect();
                let [lru, lfu] = [Cache::Lru, Cache::Lfu].map(|cache| caches::misses(cache, &chosen, room as usize));
                let least = belady::misses(&chosen, room as usize, false, 1);
                let read = outcome.disk_bytes_per_pass(1) as f64 / (u64::from(layers * pick) * SLOT) as f64;
                println!(
                    "| {label} | {percent} % | {:.3} | {:.3} | **{read:.3}** | {:.3} |",
                    share(&lru),
                    share(&lfu),
                    share(&least)
                );
            }
            Err(e) => println!("| {label} | {percent} % | {e} |"),
        }
    }
}

fn main() {
    println!("| router | experts in memory | LRU | LFU | overspill | Belady's MIN |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let habits = [
        ("uniform", Habit::Uniform),
        ("Zipf", Habit::Zipf),
        ("sticky, 7 of 10 stay", Habit::Sticky { stay_milli: 700 }),
        ("recency as recorded", Habit::Recency),
    ];
    for (label, habit) in &habits {
        rows(label, 24, 64, 4, habit, 300);
    }
    for path in std::env::args().skip(1) {
        let text = std::fs::read_to_string(&path).map_err(|e| e.to_string());
        match text.and_then(|text| RoutingTrace::parse(&text).map_err(|e| e.to_string())) {
            Ok(trace) => {
                let (layers, passes) = (trace.layers as u32, trace.tokens() as u32);
                let name = std::path::Path::new(&path).file_stem().and_then(|s| s.to_str()).unwrap_or(&path);
                rows(name, layers, 128, 6, &Habit::Trace(trace), passes);
            }
            Err(e) => println!("{path}: {e}"),
        }
    }
}
