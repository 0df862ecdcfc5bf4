//! What this machine has: adapters, free memory, and how fast its RAM is. Disks are measured by the engine's probe.

use overspill::AlignedBuf;
use serde::Serialize;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// A GPU, or a program that pretends to be one.
#[derive(Clone, Debug, Serialize)]
pub struct Adapter {
    /// Its name; part of it serves as `--adapter`.
    pub name: String,
    /// The graphics API.
    pub backend: String,
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: &'static str,
    /// Driver and version.
    pub driver: String,
    /// Whether the CPU does the work; such an adapter is used only when it is named.
    pub software: bool,
    /// Whether it shares its memory with the CPU.
    pub unified: bool,
    /// The largest buffer that it makes.
    pub buffer_bytes_max: u64,
    /// The largest part of a buffer that a kernel sees at once.
    pub binding_bytes_max: u64,
    /// Whether kernels exchange values within a subgroup.
    pub subgroups: bool,
}

/// All adapters, real GPUs first.
#[cfg(feature = "gpu")]
pub fn adapters() -> Vec<Adapter> {
    let adapter = |a: overspill::device::AdapterSummary| Adapter {
        name: a.name,
        backend: a.backend,
        kind: a.kind,
        driver: a.driver,
        software: a.is_software,
        unified: a.is_unified,
        buffer_bytes_max: a.buffer_bytes_max,
        binding_bytes_max: a.binding_bytes_max,
        subgroups: a.has_subgroups,
    };
    overspill::device::adapters().into_iter().map(adapter).collect()
}

/// None: this build has no GPU support.
#[cfg(not(feature = "gpu"))]
pub fn adapters() -> Vec<Adapter> {
    Vec::new()
}

/// Host memory that this process could take now, if the system says.
pub fn free_host_bytes() -> Option<u64> {
    overspill::limits::memory_limits().available_bytes()
}

/// Threads that can run at once.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bandwidth of RAM, all threads together, in bytes per second.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct RamSpeed {
    /// Threads that took part.
    pub threads: usize,
    /// Reading (a sum over a buffer larger than caches).
    pub read_bytes_per_s: f64,
    /// Copying, counted in bytes copied.
    pub copy_bytes_per_s: f64,
}

/// Each thread's buffer: beyond the last-level cache of most machines, together with the others'.
const BUFFER_BYTES: usize = 64 << 20;

/// Measures reading for `time`, then copying for `time`. `None` if there is no memory for the buffers.
pub fn ram_speed(threads: usize, time: Duration) -> Option<RamSpeed> {
    let read_bytes_per_s = ram_read_bytes_per_s(threads, time)?;
    let copy_bytes_per_s = on_threads(
        threads,
        2,
        || {
            let (source, mut target) = (buffer(1)?, buffer(2)?);
            Some(move || {
                target.copy_from_slice(black_box(&source));
                black_box(&mut target);
            })
        },
        time,
    )?;
    Some(RamSpeed { threads, read_bytes_per_s, copy_bytes_per_s })
}

/// Measures reading, a sum over memory that has been touched before, for `time`, in bytes per second of all threads.
pub fn ram_read_bytes_per_s(threads: usize, time: Duration) -> Option<f64> {
    on_threads(
        threads,
        1,
        || {
            let source = buffer(1)?;
            Some(move || {
                black_box(sum(black_box(&source)));
            })
        },
        time,
    )
}

/// Memory of the kind that weights lie in, touched.
fn buffer(value: u8) -> Option<AlignedBuf> {
    let mut buffer = AlignedBuf::new(BUFFER_BYTES).ok()?;
    buffer.fill(value);
    Some(buffer)
}

/// Runs what `prepare` makes on every thread at once, again and again for `time`; bytes per second together. `None` if
/// so many buffers a thread would take more than half of what is free, or cannot be had.
fn on_threads<P: FnMut()>(
    threads: usize,
    buffers: u64,
    prepare: impl Fn() -> Option<P> + Sync,
    time: Duration,
) -> Option<f64> {
    let need = (threads as u64).saturating_mul(buffers * BUFFER_BYTES as u64);
    if free_host_bytes().is_some_and(|free| free / 2 < need) {
        return None;
    }
    let start = Barrier::new(threads);
    let work = || {
        let pass = prepare();
        // All wait, so that one without memory keeps nobody waiting.
        start.wait();
        pass.map(|mut pass| rate(time, &mut pass))
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).sum()
    })
}

/// Bytes per second of a pass over one buffer, repeated for `time`.
fn rate(time: Duration, mut pass: impl FnMut()) -> f64 {
    pass();
    let start = Instant::now();
    let mut passes = 0u64;
    while passes == 0 || start.elapsed() < time {
        pass();
        passes += 1;
    }
    (passes * BUFFER_BYTES as u64) as f64 / start.elapsed().as_secs_f64().max(1e-9)
}

/// A sum in independent lanes, so that memory and not the adder sets the pace.
fn sum(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in bytes.as_chunks::<{ 32 * 8 }>().0 {
        for (lane, value) in lanes.iter_mut().zip(chunk.as_chunks().0) {
            *lane = lane.wrapping_add(u64::from_ne_bytes(*value));
        }
    }
    lanes.iter().fold(0, |total, lane| total.wrapping_add(*lane))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_reads_every_value() {
        let bytes: Vec<u8> = (0..320u64).flat_map(u64::to_ne_bytes).collect();
        assert_eq!(sum(&bytes), 319 * 320 / 2);
    }

    #[test]
    fn ram_is_faster_than_a_disk_of_the_eighties() {
        if let Some(speed) = ram_speed(1, Duration::from_millis(5)) {
            assert!(speed.read_bytes_per_s > 1e6 && speed.copy_bytes_per_s > 1e6, "{speed:?}");
        }
    }
}
