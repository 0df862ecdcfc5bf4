//! Runs a range of seeds to the end and groups what breaks, or one seed and says what happens:
//! `cargo run --release -p overspill-sim --example survey -- 0 100000`, `… --example survey -- 17`. After a range, `audit`
//! also compares the brain's own books after every event, and `certain` lets every sequence foresee all its choices.

use overspill_sim::{Checks, Work, World, random};
use std::collections::BTreeMap;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|a| a.parse::<u64>().ok());
    let (from, to) = (number(0).unwrap_or(0), number(1));
    let Some(to) = to else {
        replay(from);
        return;
    };
    let asked = |word: &str| arguments.iter().any(|a| a == word);
    let (audit, certain) = (asked("audit"), asked("certain"));
    let mut kinds: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let (mut events, mut granted, mut hits, mut pinned_out) = (0, 0, 0, 0);
    let started = std::time::Instant::now();
    for seed in from..to {
        let run = std::panic::catch_unwind(|| {
            let mut setup = random::setup(seed);
            if audit {
                setup.checks = Checks::Audit;
            }
            for program in setup.programs.iter_mut().filter(|_| certain) {
                if let Work::Sequence { foresight_milli, .. } = &mut program.work {
                    *foresight_milli = 1000;
                }
            }
            World::new(setup).map(|mut world| world.run())
        });
        let kind = match run {
            Ok(Ok(Ok(summary))) => {
                events += summary.events;
                granted += summary.figures.iter().map(|f| f.granted).sum::<u64>();
                hits += summary.figures.iter().map(|f| f.hits).sum::<u64>();
                pinned_out += summary.figures.iter().map(|f| f.pinned_out).sum::<u64>();
                continue;
            }
            Ok(Ok(Err(violation))) => violation.what,
            Ok(Err(too_small)) => too_small.to_string(),
            Err(_) => "panic".into(),
        };
        let kind = kind.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).collect();
        kinds.entry(kind).or_default().push(seed);
    }
    for (kind, seeds) in &kinds {
        println!("{:>6} × {kind}: seeds {:?}", seeds.len(), &seeds[..seeds.len().min(5)]);
    }
    println!(
        "{events} events, {granted} grants, {hits} hits, {pinned_out} pinned out, {:.1} s",
        started.elapsed().as_secs_f64()
    );
}

fn replay(seed: u64) {
    let setup = random::setup(seed);
    println!("{setup:#?}");
    let Ok(mut world) = World::new(setup) else { return };
    world.keep_log();
    let outcome = world.run();
    world.log().iter().for_each(|line| println!("{line}"));
    println!("{outcome:?}");
}
