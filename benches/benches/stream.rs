//! The whole way of a block: a cyclic schedule over a file of which a quarter fits into memory, by each reader. What is
//! measured is a cycle: the bytes that have to be read over the time that it takes, with the engine's threads and all.
//!
//! `cargo bench -p overspill-benches --bench stream`; `OVERSPILL_BENCH_DIR` chooses the disk (default: the system's
//! temporary directory). Under `cargo test` it runs tiny.
#![allow(missing_docs, reason = "criterion's macros make undocumented items")]
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use overspill::{
    Budget, CatalogBuilder, DType, Engine, IoChoice, RawTensor, Role, Schedule, Sequence, Step, StepId, TensorId,
};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

const BLOCK_BYTES: u64 = 1 << 20;
/// Blocks of a step.
const STEP_BLOCKS: usize = 4;

/// A file that no file system can compress or leave out.
fn file(bytes: u64) -> PathBuf {
    let directory = std::env::var_os("OVERSPILL_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let path = directory.join(format!("overspill-bench-stream-{}", std::process::id()));
    let mut out = std::io::BufWriter::new(std::fs::File::create(&path).unwrap());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..bytes / 8 {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes()).unwrap();
    }
    out.into_inner().unwrap().sync_all().unwrap();
    path
}

/// An engine that holds a quarter of the file, and a sequence through all of it.
fn open(path: &Path, bytes: u64, io: IoChoice) -> Option<(Engine, Sequence, u32)> {
    let mut catalog = CatalogBuilder::new();
    let file = catalog.file(path, bytes);
    catalog.payload_bytes(BLOCK_BYTES);
    let shape = vec![bytes / BLOCK_BYTES, BLOCK_BYTES / 4];
    catalog.tensor(RawTensor { name: "w".into(), dtype: DType::F32, shape, file, offset: 0, role: Role::Matrix });
    let engine = Engine::builder().ram(Budget::Percent(25.0)).io(io).open_catalog(catalog.build().unwrap()).ok()?;
    let pieces = engine.catalog().pieces(TensorId(0), 0);
    let step = |pieces: &[overspill::Piece]| Step {
        tier: engine.compute_tier(),
        blocks: pieces.iter().map(|piece| piece.block).collect(),
        choice_max: 0,
    };
    let steps: Vec<Step> = pieces.chunks(STEP_BLOCKS).map(step).collect();
    let count = steps.len() as u32;
    let schedule = Schedule { label: "cycle".into(), cyclic: true, steps, standing: vec![] };
    let schedule = engine.register(schedule).unwrap();
    let sequence = engine.sequence(schedule, "bench").unwrap();
    Some((engine, sequence, count))
}

fn cycle(sequence: &mut Sequence, steps: u32) {
    for step in 0..steps {
        drop(sequence.acquire(StepId(step)).unwrap());
    }
}

fn stream(criterion: &mut Criterion) {
    let tiny = std::env::args().any(|a| a == "--test") || !std::env::args().any(|a| a == "--bench");
    let bytes = if tiny { 64 << 20 } else { 512 << 20 };
    let path = file(bytes);
    let mut group = criterion.benchmark_group("stream a cycle, a quarter fits");
    for io in [IoChoice::Uring, IoChoice::Pread, IoChoice::Mmap] {
        // A reader that this system has not got is left out, and told.
        let Some((engine, mut sequence, steps)) = open(&path, bytes, io) else {
            println!("{}: not available here", io.name());
            continue;
        };
        cycle(&mut sequence, steps);
        let before = engine.stats().unwrap().disk.read_bytes;
        cycle(&mut sequence, steps);
        let read = engine.stats().unwrap().disk.read_bytes - before;
        println!("{}: {} MiB a cycle of {}", io.name(), read >> 20, bytes >> 20);
        group.throughput(Throughput::Bytes(read));
        group.bench_function(BenchmarkId::new(io.name(), bytes >> 20), |b| b.iter(|| cycle(&mut sequence, steps)));
    }
    group.finish();
    std::fs::remove_file(path).unwrap();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(4));
    targets = stream
}
criterion_main!(benches);
