//! Decisions: what a step of a cyclic schedule costs the brain, by the number of blocks. Half of the blocks fit, so half
//! of the steps bring a block and retire another; the body is instant, so nothing but the brain is measured.
//!
//! `cargo bench -p overspill-benches --bench brain`; under `cargo test` it runs tiny.
#![allow(missing_docs, reason = "criterion's macros make undocumented items")]
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use overspill_core::{
    BlockId, BlockSize, Brain, Command, Config, Event, Evict, Prefetch, Schedule, SequenceId, Step, StepId, Ticket,
    TierConfig, TierId, TransferId,
};
use std::collections::VecDeque;
use std::time::Duration;

const SLOT_BYTES: u64 = 1 << 20;
const HOST: TierId = TierId(0);
/// Steps that one measured iteration walks.
const STEPS: u32 = 1000;

/// A brain and a body that does everything at once.
struct World {
    brain: Brain,
    sequence: SequenceId,
    blocks: u32,
    position: u32,
    tickets: u64,
    now: u64,
    transfers: VecDeque<TransferId>,
    granted: u64,
    reads: u64,
}

impl World {
    fn new(blocks: u32, evict: Evict) -> Self {
        let mut brain = Brain::new(Config {
            slot_bytes: SLOT_BYTES,
            tiers: vec![TierConfig {
                label: "host".into(),
                budget_bytes: u64::from(blocks / 2) * SLOT_BYTES,
                slots_per_slab: 64,
                parent: None,
            }],
            blocks: vec![BlockSize { bytes: SLOT_BYTES, slots: 1, wire: 0 }; blocks as usize],
            evict,
            prefetch: Prefetch::Auto,
            window_bytes: Config::WINDOW_BYTES_DEFAULT,
        })
        .unwrap();
        let step = |block| Step { tier: HOST, blocks: vec![BlockId(block)], choice_max: 0 };
        let steps = (0..blocks).map(step).collect();
        let schedule = Schedule { label: "cycle".into(), cyclic: true, steps, standing: vec![] };
        let schedule = brain.add_schedule(&schedule).unwrap();
        let sequence = brain.open_sequence(schedule).unwrap();
        let transfers = VecDeque::new();
        let mut world =
            Self { brain, sequence, blocks, position: 0, tickets: 0, now: 0, transfers, granted: 0, reads: 0 };
        // To the steady state.
        (0..blocks * 2).for_each(|_| world.step());
        world
    }

    fn tell(&mut self, event: Event<'_>) {
        self.now += 1000;
        self.brain.handle(event, self.now);
        while let Some(command) = self.brain.poll() {
            match command {
                Command::Read { transfer, .. } => {
                    self.reads += 1;
                    self.transfers.push_back(transfer);
                }
                Command::Retire { tier, block } => self.brain.handle(Event::Retired { tier, block }, self.now),
                Command::Grant { .. } => self.granted += 1,
                _ => {}
            }
        }
    }

    fn step(&mut self) {
        let (step, block) = (StepId(self.position), BlockId(self.position));
        self.position = (self.position + 1) % self.blocks;
        self.tell(Event::StepEntered { sequence: self.sequence, step });
        if !self.brain.is_resident(HOST, block) {
            let granted = self.granted;
            self.tickets += 1;
            let deadline = u64::MAX;
            self.tell(Event::Demand { ticket: Ticket(self.tickets), tier: HOST, blocks: &[block], deadline });
            while self.granted == granted {
                let transfer = self.transfers.pop_front().unwrap();
                self.tell(Event::TransferDone { transfer });
            }
        }
        if let Some(transfer) = self.transfers.pop_front() {
            self.tell(Event::TransferDone { transfer });
        }
        self.tell(Event::StepTouched { sequence: self.sequence, step });
    }
}

fn decisions(criterion: &mut Criterion) {
    let tiny = std::env::args().any(|a| a == "--test") || !std::env::args().any(|a| a == "--bench");
    let mut group = criterion.benchmark_group("brain, steps of a cycle");
    group.throughput(Throughput::Elements(u64::from(STEPS)));
    for (name, evict) in [("planned", Evict::Planned), ("next-use", Evict::NextUse), ("lru", Evict::Lru)] {
        for blocks in [1_000u32, 10_000, 100_000, 1_000_000] {
            if tiny && blocks > 1_000 {
                continue;
            }
            let mut world = World::new(blocks, evict);
            group.bench_function(BenchmarkId::new(name, blocks), |b| {
                b.iter(|| (0..STEPS).for_each(|_| world.step()));
            });
            // What is decided does not depend on how fast it was decided.
            println!("{name}, {blocks} blocks: {} reads a cycle", reads_of_a_cycle(&mut world));
        }
    }
    group.finish();
}

fn reads_of_a_cycle(world: &mut World) -> u64 {
    let before = world.reads;
    (0..world.blocks).for_each(|_| world.step());
    world.reads - before
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    targets = decisions
}
criterion_main!(benches);
