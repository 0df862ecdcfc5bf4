//! The fast path: leasing a block that is resident. It must cost less than a microsecond and must not depend on how
//! many blocks there are.
//!
//! `cargo bench -p overspill-benches --bench acquire`; under `cargo test` it runs tiny.
#![allow(missing_docs, reason = "criterion's macros make undocumented items")]
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use overspill::{Budget, CatalogBuilder, DType, Engine, RawTensor, Role};
use std::hint::black_box;
use std::path::PathBuf;

const BLOCK_BYTES: u64 = 4096;

/// An engine over a sparse file of so many blocks, all resident.
fn resident(blocks: u64) -> (Engine, PathBuf) {
    let path = std::env::temp_dir().join(format!("overspill-bench-acquire-{}-{blocks}", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(blocks * BLOCK_BYTES).unwrap();
    let mut catalog = CatalogBuilder::new();
    let file = catalog.file(&path, blocks * BLOCK_BYTES);
    catalog.payload_bytes(BLOCK_BYTES);
    let shape = vec![blocks, BLOCK_BYTES / 4];
    catalog.tensor(RawTensor { name: "w".into(), dtype: DType::F32, shape, file, offset: 0, role: Role::Matrix });
    let engine = Engine::builder().ram(Budget::Percent(250.0)).open_catalog(catalog.build().unwrap()).unwrap();
    for piece in engine.catalog().pieces(overspill::TensorId(0), 0) {
        drop(engine.acquire(piece.block).unwrap());
    }
    (engine, path)
}

fn acquire(criterion: &mut Criterion) {
    let tiny = std::env::args().any(|a| a == "--test") || !std::env::args().any(|a| a == "--bench");
    let mut group = criterion.benchmark_group("acquire resident");
    for blocks in [1_000u64, 10_000, 100_000] {
        if tiny && blocks > 1_000 {
            continue;
        }
        let (engine, path) = resident(blocks);
        let ids: Vec<_> = engine.catalog().pieces(overspill::TensorId(0), 0).iter().map(|p| p.block).collect();
        let mut at = 0;
        group.bench_function(BenchmarkId::new("lease and drop", blocks), |b| {
            b.iter(|| {
                at = (at + 7919) % ids.len();
                black_box(engine.try_acquire(ids[at]).unwrap())
            });
        });
        drop(engine);
        std::fs::remove_file(path).unwrap();
    }
    group.finish();
}

criterion_group!(benches, acquire);
criterion_main!(benches);
