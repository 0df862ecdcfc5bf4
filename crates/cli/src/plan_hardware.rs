//! The machines of a plan: profiles by name or file, and this machine as it is measured now.

use crate::disk::{self, Target};
use crate::errors::{Kind, Outcome, stop};
use crate::{machine, progress};
use overspill::DType;
use overspill_infer::kernels::{Activations, Input, Pool, WeightRows, matmul};
use overspill_sim::hardware::{Disk, Hardware, Host, SHIPPED};
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
const KERNEL_TIME: Duration = Duration::from_millis(120);
/// Weights that are beyond caches, and those of a step.
const STREAM_BYTES: usize = 96 << 20;
const STEP_BYTES: usize = 4 << 20;
/// Columns of a matrix where no model is known, and the most that are measured.
const COLS: usize = 4096;
const COLS_MAX: usize = 16_384;
/// Most tokens that are multiplied at once where operations are measured.
const BATCH_MAX: usize = 128;
/// Products of a layer: so often threads are given work and waited for.
const LAYER_PRODUCTS: u32 = 8;
/// Rows of a product that takes no time by itself.
const SMALL_ROWS: usize = 16;
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
    let kernels = kernel_rates(&pool, dtype, cols, batch);
    let (stream, flops) = (kernels.stream, kernels.batch);
    spinner.set_message(format!("measuring the disk of {}", here.path.display()));
    crate::doctor::check_interrupt()?;
    let disk = disk_here(here.path)?;
    spinner.finish_and_clear();
    let Some(memory_bytes) = machine::free_host_bytes() else {
        let message = "the system does not say how much memory is free; name a profile with --hardware";
        return Err(stop(Kind::Failed, message));
    };
    let row_bytes = dtype.row_bytes(cols as u64).unwrap_or(1) as f64;
    Ok(Hardware {
        name: THIS.to_owned(),
        description: format!("this machine, {} threads, measured now with {dtype}", here.threads),
        unified_memory: false,
        gpus: Vec::new(),
        host: Host {
            name: "CPU".to_owned(),
            memory_bytes,
            memory_bytes_per_s: (stream as u64).max(1),
            // Bytes a second, times the weights of a byte, two operations for each token.
            flops_per_s: ((flops * cols as f64 / row_bytes * 2.0 * batch as f64) as u64).max(1),
            layer_ns: kernels.layer_ns,
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

/// What kernels reach: bytes of weights per second for a token and for a chunk, and what a layer costs beside.
#[derive(Clone, Copy, Debug)]
struct KernelRates {
    stream: f64,
    batch: f64,
    layer_ns: u64,
}

/// Measures products with one token and with `batch`, step by step through more weights than caches hold, as a model's
/// are.
fn kernel_rates(pool: &Pool, dtype: DType, cols: usize, batch: usize) -> KernelRates {
    let row_bytes = dtype.row_bytes(cols as u64).map_or(1, |bytes| bytes as usize).max(1);
    let rows = (STEP_BYTES / row_bytes).max(SMALL_ROWS);
    // No element type reads a NaN out of such bytes.
    let weights = vec![0x11u8; rows * row_bytes * (STREAM_BYTES / (rows * row_bytes)).max(1)];
    let mut measured: [Vec<f64>; 3] = Default::default();
    // The first round wakes threads up and fills caches.
    for round in 0..=ROUNDS {
        let found = [
            products_per_s(pool, dtype, cols, &weights, rows, 1),
            products_per_s(pool, dtype, cols, &weights, rows, batch),
            products_per_s(pool, dtype, cols, &weights[..SMALL_ROWS * row_bytes], SMALL_ROWS, 1),
        ];
        if round > 0 {
            measured.iter_mut().zip(found).for_each(|(all, rate)| all.push(rate));
        }
    }
    let middle = |mut rates: Vec<f64>| {
        rates.sort_unstable_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or(0.0).max(1.0)
    };
    let [one, many, small] = measured.map(middle);
    let step = (rows * row_bytes) as f64;
    KernelRates { stream: one * step, batch: many * step, layer_ns: (1e9 / small * f64::from(LAYER_PRODUCTS)) as u64 }
}

/// Products per second of `rows` rows at a time, one step of the weights after the other, with `batch` tokens.
fn products_per_s(pool: &Pool, dtype: DType, cols: usize, weights: &[u8], rows: usize, batch: usize) -> f64 {
    let step = rows * dtype.row_bytes(cols as u64).map_or(1, |bytes| bytes as usize).max(1);
    let x = vec![0.5f32; batch * cols];
    let mut input = Input::new();
    // As `run` does by default.
    let activations = if dtype.is_float() { Activations::F32 } else { Activations::Q8 };
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
