//! Decode and prefill speed of the matrix products, beside a plain read loop over the same bytes with the same threads.
//!
//! `cargo bench -p overspill-infer --bench kernels`. `OVERSPILL_BENCH_THREADS` sets the threads (default: all cores),
//! a filter on the command line picks cases (`decode/q4_k`). Under `--test` every case runs once, on a tiny matrix.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use overspill::DType;
use overspill_infer::kernels::{Activations, Input, Pool, WeightRows, dequantise, matmul};
use std::hint::black_box;
use std::time::Duration;

const COLS: usize = 2048;

fn threads() -> usize {
    let asked = std::env::var("OVERSPILL_BENCH_THREADS").ok().and_then(|n| n.parse().ok());
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
}

/// Bytes of no meaning, but no NaN as f16, bf16 or f32: weights whose values do not matter.
fn bytes(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (0..length)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8 & 0x2f
        })
        .collect()
}

/// The sum of all 64-bit words: as fast as memory can be read.
fn read(pool: &Pool, bytes: &[u8]) {
    pool.for_ranges(bytes.len(), 256 << 10, &|range| {
        let mut sums = [0u64; 16];
        for chunk in bytes[range].chunks_exact(128) {
            for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
                *sum = sum.wrapping_add(u64::from_le_bytes(*word));
            }
        }
        black_box(sums);
    });
}

fn cases() -> Vec<(DType, Activations, &'static str)> {
    use Activations::{F32, Q8};
    let mut cases: Vec<_> = [DType::F32, DType::F16, DType::BF16].map(|dtype| (dtype, F32, "")).into();
    let quantised =
        [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::Q4_K, DType::Q5_K, DType::Q6_K];
    cases.extend(quantised.map(|dtype| (dtype, Q8, "-q8")));
    cases.extend(quantised.map(|dtype| (dtype, F32, "-f32")));
    cases
}

fn decode(c: &mut Criterion) {
    let pool = Pool::new(threads());
    let mut group = c.benchmark_group("decode");
    // Far beyond every cache, so that memory is what is measured.
    let target_bytes = if std::env::args().any(|arg| arg == "--test") { 1 << 20 } else { 256 << 20 };
    for (dtype, activations, suffix) in cases() {
        let row_bytes = dtype.row_bytes(COLS as u64).map_or(0, |bytes| bytes as usize);
        let rows = target_bytes / row_bytes;
        let weights = bytes(rows * row_bytes);
        let x: Vec<f32> = (0..COLS).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut input = Input::new();
        input.prepare(&pool, &x, 1, COLS, dtype, activations);
        let mut y = vec![0.0; rows];
        group.throughput(Throughput::Bytes(weights.len() as u64));
        let name = format!("{dtype}{suffix}");
        group.bench_function(BenchmarkId::new(&name, "read loop"), |b| b.iter(|| read(&pool, &weights)));
        let pieces = [WeightRows { row: 0, rows, bytes: &weights }];
        group.bench_function(BenchmarkId::new(&name, "matmul"), |b| {
            b.iter(|| matmul(&pool, dtype, COLS, &pieces, &input, &mut y, rows));
        });
        println!("{name}: result {:08x}", hash(&y));
    }
    group.finish();
}

fn prefill(c: &mut Criterion) {
    let pool = Pool::new(threads());
    let mut group = c.benchmark_group("prefill");
    let rows = if std::env::args().any(|arg| arg == "--test") { 64 } else { 2048 };
    for (dtype, activations, suffix) in cases() {
        let row_bytes = dtype.row_bytes(COLS as u64).map_or(0, |bytes| bytes as usize);
        let weights = bytes(rows * row_bytes);
        for batch in [2, 8, 32, 128, 512] {
            let x: Vec<f32> = (0..batch * COLS).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut input = Input::new();
            let mut y = vec![0.0; batch * rows];
            // Multiplications, so that "Gelem/s" reads as thousand million of them.
            group.throughput(Throughput::Elements((batch * rows * COLS) as u64));
            let pieces = [WeightRows { row: 0, rows, bytes: &weights }];
            group.bench_function(BenchmarkId::new(format!("{dtype}{suffix}"), batch), |b| {
                b.iter(|| {
                    input.prepare(&pool, &x, batch, COLS, dtype, activations);
                    matmul(&pool, dtype, COLS, &pieces, &input, &mut y, rows);
                });
            });
        }
    }
    group.finish();
}

fn rows(c: &mut Criterion) {
    let mut group = c.benchmark_group("dequantise");
    for dtype in [DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_K, DType::Q6_K] {
        let weights = bytes(dtype.row_bytes(COLS as u64).map_or(0, |bytes| bytes as usize));
        let mut out = vec![0.0; COLS];
        group.throughput(Throughput::Elements(COLS as u64));
        group.bench_function(dtype.name(), |b| b.iter(|| dequantise(dtype, black_box(&weights), &mut out)));
    }
    group.finish();
}

/// FNV-1a of the results' bits: a changed kernel shows.
fn hash(values: &[f32]) -> u32 {
    values
        .iter()
        .flat_map(|y| y.to_le_bytes())
        .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = decode, prefill, rows
}
criterion_main!(benches);
