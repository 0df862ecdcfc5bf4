//! The machines of a plan: profiles by name or file, and this machine as it is measured now.

use crate::disk::{self, Target};
use crate::errors::{Kind, Outcome, stop};
use crate::{machine, progress};
use overspill::DType;
use overspill_infer::kernels::{Activations, Input, Pool, WeightRows, matmul};
use overspill_sim::hardware::{Disk, Hardware, Host, SHIPPED};
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
const KERNEL_TIME: Duration = Duration::from_millis(300);
/// Weights that are beyond caches, and weights for operations.
const STREAM_BYTES: usize = 96 << 20;
const BLOCK_BYTES: usize = 2 << 20;
const COLS: usize = 4096;
/// Tokens that are multiplied at once where operations are measured.
const BATCH: usize = 64;
/// Fixed costs of a layer on a CPU: dealing out a dozen tasks.
const LAYER_NS: u64 = 20_000;

/// What measuring this machine depends on.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// Where the model is, or would be: whose disk.
    pub path: &'a Path,
    /// The element type whose kernels count.
    pub dtype: DType,
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
    let read = machine::ram_read_bytes_per_s(here.threads, KERNEL_TIME);
    let stream = kernel_rate(&pool, dtype, STREAM_BYTES, 1);
    let flops = kernel_rate(&pool, dtype, BLOCK_BYTES, BATCH);
    spinner.set_message(format!("measuring the disk of {}", here.path.display()));
    crate::doctor::check_interrupt()?;
    let disk = disk_here(here.path)?;
    spinner.finish_and_clear();
    let Some(memory_bytes) = machine::free_host_bytes() else {
        let message = "the system does not say how much memory is free; name a profile with --hardware";
        return Err(stop(Kind::Failed, message));
    };
    let row_bytes = dtype.row_bytes(COLS as u64).unwrap_or(1) as f64;
    // Kernels may read weights slower than a loop that only adds them up; never faster.
    let memory_rate = read.unwrap_or(f64::INFINITY).min(stream);
    Ok(Hardware {
        name: THIS.to_owned(),
        description: format!("this machine, {} threads, measured now with {dtype}", here.threads),
        unified_memory: false,
        gpus: Vec::new(),
        host: Host {
            name: "CPU".to_owned(),
            memory_bytes,
            memory_bytes_per_s: (memory_rate as u64).max(1),
            // Bytes a second, times the weights of a byte, two operations for each token.
            flops_per_s: ((flops * COLS as f64 / row_bytes * 2.0 * BATCH as f64) as u64).max(1),
            layer_ns: LAYER_NS,
        },
        disks: vec![disk],
        price: None,
    })
}

/// Bytes of weights per second that the product with so many tokens goes through.
fn kernel_rate(pool: &Pool, dtype: DType, weight_bytes: usize, batch: usize) -> f64 {
    let row_bytes = dtype.row_bytes(COLS as u64).map_or(1, |bytes| bytes as usize).max(1);
    let rows = (weight_bytes / row_bytes).max(1);
    // No element type reads a NaN out of such bytes.
    let weights = vec![0x11u8; rows * row_bytes];
    let x = vec![0.5f32; batch * COLS];
    let mut input = Input::new();
    // As `run` does by default.
    let activations = if dtype.is_float() { Activations::F32 } else { Activations::Q8 };
    input.prepare(pool, &x, batch, COLS, dtype, activations);
    let mut y = vec![0f32; batch * rows];
    let pieces = [WeightRows { row: 0, rows, bytes: &weights }];
    matmul(pool, dtype, COLS, &pieces, &input, &mut y, rows);
    let start = Instant::now();
    let mut passes = 0u32;
    while passes == 0 || start.elapsed() < KERNEL_TIME {
        matmul(pool, dtype, COLS, &pieces, &input, black_box(&mut y), rows);
        passes += 1;
    }
    f64::from(passes) * weights.len() as f64 / start.elapsed().as_secs_f64().max(1e-9)
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
    let report = disk::report(target, true)?;
    let fastest = report.readers.iter().filter(|reader| reader.bytes_per_s.is_some());
    let fastest = fastest.max_by(|a, b| a.bytes_per_s.unwrap_or(0.0).total_cmp(&b.bytes_per_s.unwrap_or(0.0)));
    let Some((reader, rate)) = fastest.and_then(|reader| Some((reader, reader.bytes_per_s?))) else {
        let cause = report.error.unwrap_or_else(|| "no reader works".to_owned());
        return Err(stop(Kind::Io, format!("the disk of {} cannot be measured: {cause}", path.display())));
    };
    let depth = reader.depth.unwrap_or(1).max(1);
    Ok(Disk {
        name: report.what,
        capacity_bytes: u64::MAX,
        bytes_per_s: (rate as u64).max(1),
        // A read's time has the others' in it.
        latency_ns: (reader.latency_s.unwrap_or(0.0) * 1e9 / depth as f64) as u64,
        depth: depth as u32,
    })
}
