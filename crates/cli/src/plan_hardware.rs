//! The machines of a plan: profiles by name or file, and this machine as it is measured now.

use crate::disk::{self, Target};
use crate::errors::{Kind, Outcome, stop};
use crate::{machine, progress};
use overspill::DType;
use overspill_infer::kernels::ops::{KeyValues, attend, rms_norm};
use overspill_infer::kernels::{Activations, Input, Pool, WeightRows, matmul};
use overspill_sim::hardware::{Disk, Hardware, Host, SHIPPED};
use std::cell::RefCell;
use std::fmt::Write as _;
use std::fs;
use std::hint::black_box;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// Stands for this machine.
pub const THIS: &str = "this";
/// Stands for all profiles that come with the program.
const ALL: &str = "all";
/// A longer file is no profile.
const PROFILE_BYTES_MAX: u64 = 1 << 20;
/// How long each speed of the CPU is measured.
const KERNEL_TIME: Duration = Duration::from_millis(100);
const NORMS_TIME: Duration = Duration::from_millis(5);
/// Weights that are beyond caches, and those of a step.
const STREAM_BYTES: usize = 96 << 20;
const STEP_BYTES: usize = 4 << 20;
/// Columns of a matrix where no model is known, and the most that are measured.
const COLS: usize = 4096;
const COLS_MAX: usize = 16_384;
/// Most tokens that are multiplied at once where operations are measured.
const BATCH_MAX: usize = 128;
/// As a mixture's experts get of a prompt.
const BATCH_FEW: usize = 8;
/// A product of a step's weights and one of so many tell apart what a byte costs and what a product costs beside.
const PRODUCT_BYTES: usize = 512 << 10;
const SMALL_A_TURN: u32 = 8;
/// Passes over a layer's state beside products and attention: norms, the rotary embedding, gates, sums.
const LAYER_PASSES: u32 = 8;
/// Rows of a product, at least.
const ROWS_MIN: usize = 16;
/// Keys and values that are beyond caches too, since a token's weights come between two tokens' attention.
const PAST_BYTES: usize = 32 << 20;
/// Positions that attention is measured over, and elements of its heads.
const PAST: usize = 256;
const HEAD_DIM: usize = 64;
/// Heads of keys and values, and of queries for each of them, where no model is known, and at most.
const KV_HEADS: usize = 8;
const HEADS_MAX: usize = 64;
/// Kernels are measured in turn, so often, and the middle counts: what else a machine does comes and goes.
const ROUNDS: usize = 7;

/// What measuring this machine depends on.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// Where the model is, or would be: whose disk.
    pub path: &'a Path,
    /// The element type whose kernels count.
    pub dtype: DType,
    /// Columns of the model's matrices.
    pub cols: u64,
    /// Elements of a token's keys and values, and of its queries, in one layer.
    pub attention: (u64, u64),
    /// Tokens of a prompt that are computed together.
    pub chunk: u64,
    /// Threads that compute.
    pub threads: usize,
}

/// The machines that these words name; this machine if there are none.
///
/// # Errors
/// A file that is not there or is no profile, or a disk that cannot be measured.
pub fn machines(names: &[String], here: Here<'_>) -> Outcome<Vec<Hardware>> {
    if names.is_empty() {
        return Ok(vec![this_machine(here)?]);
    }
    let mut machines = Vec::new();
    for name in names {
        match name.trim() {
            THIS => machines.push(this_machine(here)?),
            ALL => {
                for (name, text) in SHIPPED {
                    machines.push(parsed(name, text)?);
                }
            }
            name => machines.push(profile(name)?),
        }
    }
    Ok(machines)
}

/// This machine as a profile that [`Hardware::parse`] reads: measured once, planned for often.
///
/// # Errors
/// As [`machines`].
pub fn this_text(here: Here<'_>) -> Outcome<String> {
    let machine = this_machine(here)?;
    let (host, gib, giga) = (&machine.host, f64::from(1 << 30), 1e9);
    let quoted = |text: &str| format!("\"{}\"", text.replace('\\', "/").replace(['"', '\n', '\r'], " "));
    let mut text = format!("name = {}\ndescription = {}\n", quoted(THIS), quoted(&machine.description));
    let _ = writeln!(text, "\n[host]\nname = {}", quoted(&host.name));
    let _ = writeln!(text, "memory_gib = {}", host.memory_bytes as f64 / gib);
    let _ = writeln!(text, "memory_gb_per_s = {}", host.memory_bytes_per_s as f64 / giga);
    let _ = writeln!(text, "tflops = {}", host.flops_per_s as f64 / 1e12);
    let _ = writeln!(text, "few_tflops = {}", host.few_flops_per_s as f64 / 1e12);
    let _ = writeln!(text, "attention_tflops = {}", host.attention_flops_per_s as f64 / 1e12);
    let _ = writeln!(text, "product_us = {}", host.product_ns as f64 / 1e3);
    let _ = writeln!(text, "layer_us = {}", host.layer_ns as f64 / 1e3);
    for disk in &machine.disks {
        let _ = writeln!(text, "\n[[disk]]\nname = {}", quoted(&disk.name));
        let _ = writeln!(text, "gb_per_s = {}", disk.bytes_per_s as f64 / giga);
        let _ = writeln!(text, "latency_us = {}\ndepth = {}", disk.latency_ns as f64 / 1e3, disk.depth);
    }
    Ok(text)
}

/// The text of a profile that comes with the program.
///
/// # Errors
/// An unknown name; the message lists all.
pub fn shipped_text(name: &str) -> Outcome<&'static str> {
    SHIPPED.iter().find(|(known, _)| *known == name).map(|(_, text)| *text).ok_or_else(|| unknown(name))
}

fn unknown(name: &str) -> crate::errors::Stop {
    let known: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
    let message = format!(
        "--hardware {name}: neither a file nor a profile; name a .toml file, {THIS}, {ALL}, or one of {}",
        known.join(", ")
    );
    stop(Kind::Config, message)
}

fn parsed(file: &str, text: &str) -> Outcome<Hardware> {
    Hardware::parse(file, text).map_err(|error| stop(Kind::Config, error.to_string()))
}

fn profile(name: &str) -> Outcome<Hardware> {
    if let Some((name, text)) = SHIPPED.iter().find(|(known, _)| *known == name) {
        return parsed(name, text);
    }
    let file = match fs::File::open(name) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(unknown(name)),
        Err(error) => {
            return Err(stop(Kind::Io, format!("--hardware {name}: cannot open it: {error}; check the path")));
        }
    };
    let mut text = Vec::new();
    file.take(PROFILE_BYTES_MAX + 1)
        .read_to_end(&mut text)
        .map_err(|error| stop(Kind::Io, format!("--hardware {name}: cannot read it: {error}; check the path")))?;
    let text = String::from_utf8(text)
        .map_err(|_| stop(Kind::Config, format!("{name}: it is no text; write a profile in TOML")))?;
    parsed(name, &text)
}

/// This machine: what is free of its memory, its disk and its CPU's kernels measured now.
fn this_machine(here: Here<'_>) -> Outcome<Hardware> {
    crate::interrupt::install();
    let spinner = progress::spinner("measuring RAM and kernels");
    let pool = Pool::new(here.threads);
    let dtype = here.dtype;
    let cols = cols_of(dtype, here.cols);
    let batch = usize::try_from(here.chunk).unwrap_or(BATCH_MAX).clamp(2, BATCH_MAX);
    let kernels = kernel_rates(&pool, dtype, cols, batch, here.attention);
    spinner.set_message(format!("measuring the disk of {}", here.path.display()));
    crate::doctor::check_interrupt()?;
    let disk = disk_here(here.path)?;
    spinner.finish_and_clear();
    let Some(memory_bytes) = machine::free_host_bytes() else {
        let message = "the system does not say how much memory is free; name a profile with --hardware";
        return Err(stop(Kind::Failed, message));
    };
    let row_bytes = dtype.row_bytes(cols as u64).unwrap_or(1) as f64;
    // Bytes a second, times the weights of a byte, two operations for each token.
    let flops = |bytes: f64, tokens: usize| ((bytes * cols as f64 / row_bytes * 2.0 * tokens as f64) as u64).max(1);
    Ok(Hardware {
        name: THIS.to_owned(),
        description: format!("this machine, {} threads, measured now with {dtype}", here.threads),
        unified_memory: false,
        gpus: Vec::new(),
        host: Host {
            name: "CPU".to_owned(),
            memory_bytes,
            memory_bytes_per_s: (kernels.stream as u64).max(1),
            flops_per_s: flops(kernels.batch, batch),
            few_flops_per_s: flops(kernels.few, BATCH_FEW),
            attention_flops_per_s: (kernels.attention as u64).max(1),
            product_ns: (kernels.product_s * 1e9) as u64,
            layer_ns: (kernels.layer_s * 1e9) as u64,
        },
        disks: vec![disk],
        price: None,
    })
}

/// The columns to measure with: the model's, where the element type can store rows of so many.
fn cols_of(dtype: DType, wanted: u64) -> usize {
    let wanted = usize::try_from(wanted).unwrap_or(COLS).clamp(1, COLS_MAX);
    if dtype.row_bytes(wanted as u64).is_some() { wanted } else { COLS }
}

/// What kernels reach: bytes of weights per second for a token, for a chunk and for a few tokens, operations per second of attention, and
/// the seconds that a product and a layer cost beside.
#[derive(Clone, Copy, Debug, PartialEq)]
struct KernelRates {
    stream: f64,
    batch: f64,
    few: f64,
    attention: f64,
    product_s: f64,
    layer_s: f64,
}

/// Measures products with one token, with a few and with `batch`, step by step through more weights than caches hold, as a model's
/// are; attention over a past of its own; and passes over a state.
fn kernel_rates(pool: &Pool, dtype: DType, cols: usize, batch: usize, attention: (u64, u64)) -> KernelRates {
    let row_bytes = dtype.row_bytes(cols as u64).map_or(1, |bytes| bytes as usize).max(1);
    let rows = |bytes: usize| (bytes / row_bytes).max(ROWS_MIN);
    let (rows_small, rows) = (rows(PRODUCT_BYTES), rows(STEP_BYTES));
    // No element type reads a NaN out of such bytes.
    let weights = vec![0x11u8; rows * row_bytes * (STREAM_BYTES / (rows * row_bytes)).max(1)];
    let mut past = Past::new(attention);
    let bytes = |rows: usize| (rows * row_bytes) as f64;
    let mut measured: [Vec<f64>; 6] = Default::default();
    // The first round wakes threads up and fills caches.
    for round in 0..=ROUNDS {
        let (small_s, large_s) = two_products_s(pool, dtype, cols, &weights, (rows_small, rows));
        let (stream, product_s) = line((bytes(rows_small), small_s), (bytes(rows), large_s));
        let found = [
            stream,
            product_s,
            products_per_s(pool, dtype, cols, &weights, rows, batch),
            products_per_s(pool, dtype, cols, &weights, rows, BATCH_FEW),
            past.tokens_per_s(pool),
            norms_per_s(pool, cols),
        ];
        if round > 0 {
            measured.iter_mut().zip(found).for_each(|(all, rate)| all.push(rate));
        }
    }
    let middle = |mut rates: Vec<f64>| {
        rates.sort_unstable_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or(0.0)
    };
    let [stream, product_s, many, few, tokens, norms] = measured.map(middle);
    KernelRates {
        stream,
        batch: many * bytes(rows),
        few: few * bytes(rows),
        attention: tokens * past.flops(),
        product_s,
        layer_s: f64::from(LAYER_PASSES) / norms.max(1.0),
    }
}

/// Seconds of a product of so many rows and of one of more, with one token. They take turns product by product, so that
/// what else the machine does meets both alike: their difference is small.
fn two_products_s(pool: &Pool, dtype: DType, cols: usize, weights: &[u8], rows: (usize, usize)) -> (f64, f64) {
    let row_bytes = dtype.row_bytes(cols as u64).map_or(1, |bytes| bytes as usize).max(1);
    let x = vec![0.5f32; cols];
    let mut input = Input::new();
    let mut y = vec![0f32; rows.1];
    let mut at = 0;
    let mut product = |rows: usize| {
        if at + rows * row_bytes > weights.len() {
            at = 0;
        }
        let bytes = &weights[at..at + rows * row_bytes];
        at += bytes.len();
        let start = Instant::now();
        input.prepare(pool, &x, 1, cols, dtype, activations(dtype));
        matmul(pool, dtype, cols, &[WeightRows { row: 0, rows, bytes }], &input, black_box(&mut y), rows);
        start.elapsed().as_secs_f64()
    };
    let start = Instant::now();
    let (mut small_s, mut large_s) = (0.0, 0.0);
    let mut turns = 0u32;
    while turns == 0 || start.elapsed() < 2 * KERNEL_TIME {
        for _ in 0..SMALL_A_TURN {
            small_s += product(rows.0);
        }
        large_s += product(rows.1);
        turns += 1;
    }
    (small_s / f64::from(turns * SMALL_A_TURN), large_s / f64::from(turns))
}

/// As `run` does by default.
fn activations(dtype: DType) -> Activations {
    if dtype.is_float() { Activations::F32 } else { Activations::Q8 }
}

/// Bytes per second and seconds at no bytes, of the line through two products (bytes, seconds); where there is no such
/// line, the second product's bytes per second.
fn line((small, small_s): (f64, f64), (large, large_s): (f64, f64)) -> (f64, f64) {
    let seconds_per_byte = (large_s - small_s) / (large - small);
    let beside = small_s - small * seconds_per_byte;
    if large > small && seconds_per_byte > 0.0 && beside >= 0.0 {
        (1.0 / seconds_per_byte, beside)
    } else {
        (large / large_s, 0.0)
    }
}

/// Keys and values of a long past, and queries.
struct Past {
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    out: Vec<f32>,
    kv_heads: usize,
    positions: usize,
    /// Where the next token's past begins.
    at: usize,
}

impl Past {
    /// For a model of so many elements of keys and values, and of queries.
    fn new((kv_elements, query_elements): (u64, u64)) -> Self {
        let heads = |elements: u64| usize::try_from(elements).unwrap_or(usize::MAX) / HEAD_DIM;
        let (kv_heads, heads) = match (heads(kv_elements) / 2, heads(query_elements)) {
            (0, _) | (_, 0) => (KV_HEADS, KV_HEADS),
            (kv_heads, heads) => (kv_heads.min(HEADS_MAX), heads.min(HEADS_MAX)),
        };
        let kv_heads = kv_heads.min(heads);
        let positions = PAST_BYTES / (2 * size_of::<f32>() * kv_heads * HEAD_DIM);
        let of_all = |value: f32| vec![value; positions * kv_heads * HEAD_DIM];
        let queries = heads / kv_heads * kv_heads * HEAD_DIM;
        Self {
            keys: of_all(0.5),
            values: of_all(0.25),
            queries: vec![0.125; queries],
            out: vec![0.0; queries],
            kv_heads,
            positions,
            at: 0,
        }
    }

    /// Operations of a token.
    fn flops(&self) -> f64 {
        4.0 * (PAST * self.queries.len()) as f64
    }

    /// Tokens per second, each with a past that the ones before have not seen.
    fn tokens_per_s(&mut self, pool: &Pool) -> f64 {
        let Self { keys, values, queries, out, kv_heads, positions, at } = self;
        let group = queries.len() / *kv_heads;
        let start = Instant::now();
        let mut done = 0u32;
        while done == 0 || start.elapsed() < KERNEL_TIME {
            let seen = *at..*at + PAST;
            pool.for_chunks(out, group, &|head, out| {
                let stride = *kv_heads * HEAD_DIM;
                let kv = KeyValues { keys, values, stride, offset: head * HEAD_DIM, capacity: *positions };
                let q = &queries[head * group..(head + 1) * group];
                SCORES.with_borrow_mut(|scores| attend(q, HEAD_DIM, &kv, seen.clone(), 0.125, scores, out));
            });
            black_box(&mut *out);
            *at = if *at + 2 * PAST <= *positions { *at + PAST } else { 0 };
            done += 1;
        }
        f64::from(done) / start.elapsed().as_secs_f64().max(1e-9)
    }
}

std::thread_local! {
    /// Scores of one head, once a thread.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Norms of a state of `cols` elements per second.
fn norms_per_s(pool: &Pool, cols: usize) -> f64 {
    let (x, weight, mut out) = (vec![0.5f32; cols], vec![1.0f32; cols], vec![0.0f32; cols]);
    let start = Instant::now();
    let mut done = 0u32;
    while done == 0 || start.elapsed() < NORMS_TIME {
        pool.for_chunks(&mut out, cols, &|_, out| rms_norm(black_box(&x), &weight, 1e-6, out));
        black_box(&mut out);
        done += 1;
    }
    f64::from(done) / start.elapsed().as_secs_f64().max(1e-9)
}

/// Products per second of `rows` rows at a time, one step of the weights after the other, with `batch` tokens.
fn products_per_s(pool: &Pool, dtype: DType, cols: usize, weights: &[u8], rows: usize, batch: usize) -> f64 {
    let step = rows * dtype.row_bytes(cols as u64).map_or(1, |bytes| bytes as usize).max(1);
    let x = vec![0.5f32; batch * cols];
    let mut input = Input::new();
    let activations = activations(dtype);
    let mut y = vec![0f32; batch * rows];
    let mut steps = weights.chunks_exact(step).cycle();
    let start = Instant::now();
    let mut done = 0u32;
    while done == 0 || start.elapsed() < KERNEL_TIME {
        let Some(bytes) = steps.next() else { break };
        input.prepare(pool, &x, batch, cols, dtype, activations);
        matmul(pool, dtype, cols, &[WeightRows { row: 0, rows, bytes }], &input, black_box(&mut y), rows);
        done += 1;
    }
    f64::from(done) / start.elapsed().as_secs_f64().max(1e-9)
}

/// The disk with the reader that `auto` takes. What is too small to measure is measured by a temporary file beside it.
fn disk_here(path: &Path) -> Outcome<Disk> {
    let target = match Target::of(path) {
        Ok(target) => target,
        Err(error) => {
            let directory = if path.is_dir() { Some(path) } else { path.parent() };
            match directory.filter(|directory| directory.is_dir()) {
                Some(directory) => Target::Directory(directory.to_owned()),
                None => return Err(error),
            }
        }
    };
    let (name, found) = disk::rate(target)?;
    let depth = found.shape.depth.max(1);
    Ok(Disk {
        name,
        capacity_bytes: u64::MAX,
        bytes_per_s: (found.bytes_per_s as u64).max(1),
        // A read's time has the others' in it.
        latency_ns: (found.latency.as_secs_f64() * 1e9 / depth as f64) as u64,
        depth: depth as u32,
        burst_ns: 0,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn two_products_tell_a_byte_s_time_from_a_product_s() {
        let seconds = |bytes: f64| 3e-6 + bytes / 20e9;
        let (rate, beside) = line((5e5, seconds(5e5)), (4e6, seconds(4e6)));
        assert!((rate / 20e9 - 1.0).abs() < 1e-9 && (beside / 3e-6 - 1.0).abs() < 1e-6, "{rate} {beside}");
        // Noise that makes the large one the cheaper by the byte than a line allows, and sizes that are one.
        assert_eq!(line((5e5, 1e-5), (4e6, 1e-4)), (4e10, 0.0));
        assert_eq!(line((4e6, 1e-4), (4e6, 1e-4)), (4e10, 0.0));
    }

    #[test]
    fn attention_is_measured_on_the_model_s_heads() {
        let heads = |kv, queries| {
            let past = Past::new((kv, queries));
            (past.kv_heads, past.queries.len() / HEAD_DIM)
        };
        assert_eq!(heads(512, 1024), (4, 16));
        assert_eq!(heads(0, 0), (8, 8));
        assert_eq!(heads(u64::MAX, u64::MAX), (64, 64));
        let pool = Pool::new(2);
        let mut past = Past::new((512, 1024));
        assert!(past.tokens_per_s(&pool) > 0.0);
        // Every value is a quarter, so every mean of them is.
        assert!(past.out.iter().all(|out| (out - 0.25).abs() < 1e-5), "{:?}", &past.out[..4]);
    }

    #[test]
    fn kernels_have_every_rate() {
        let rates = kernel_rates(&Pool::new(1), DType::Q8_0, 256, 2, (512, 1024));
        let KernelRates { stream, batch, few, attention, product_s, layer_s } = rates;
        assert!(
            [stream, batch, few, attention, layer_s].iter().all(|rate| rate.is_finite() && *rate > 0.0),
            "{rates:?}"
        );
        assert!(product_s.is_finite() && product_s >= 0.0, "{rates:?}");
    }
}
