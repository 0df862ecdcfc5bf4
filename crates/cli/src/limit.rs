//! How far a run was from what physics allows: every wire at the bandwidth measured for it right after the run, with
//! the bytes that had to cross it for each token; wires work at the same time, so the slowest is the limit.
//!
//! - The disk must bring what a token touches (T) less what the budgets can keep (B − R). Which experts of a mixture are
//!   touched is not known ahead, so there the bytes that were really read count.
//! - The bus to a GPU must bring what VRAM cannot keep.
//! - Compute on a CPU must read T from RAM once. For a GPU the time without stalls counts, since its memory cannot be
//!   measured from here.

use overspill::probe::{self, Shape};
use overspill::{Catalog, FileSet, IoChoice, Stats};
use overspill_infer::arch::{Ffn, ModelSpec};
use overspill_infer::plan::{FfnPlan, Plan};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// The distance from the limit.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limit {
    /// The fastest that a token could have been decoded.
    pub seconds_per_token: f64,
    /// `disk`, `bus` or `compute`.
    pub bound_by: &'static str,
    /// Measured seconds per decoded token over the limit.
    pub ratio: f64,
    /// What was measured for each wire, in bytes per second.
    pub disk_bytes_per_s: Option<f64>,
    /// The way to the GPU.
    pub bus_bytes_per_s: Option<f64>,
    /// RAM, read by all threads that compute.
    pub ram_bytes_per_s: Option<f64>,
}

/// What of a run the limit depends on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Distinct weight bytes that a token touches (T).
    pub touched_bytes: u64,
    /// Whether which of them is decided anew for each token.
    pub is_mixture: bool,
    /// Bytes read from disk for each decoded token.
    pub read_bytes: f64,
    /// Measured seconds of each decoded token.
    pub seconds: f64,
    /// Of these, waiting for blocks.
    pub stall_seconds: f64,
    /// What GPU tiers can keep besides what is in flight.
    pub gpu_keeps_bytes: Option<u64>,
    /// What all tiers can keep besides what is in flight.
    pub keeps_bytes: u64,
}

/// Bandwidths of the wires, in bytes per second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wires {
    /// The disk.
    pub disk: Option<f64>,
    /// The way to the GPU.
    pub bus: Option<f64>,
    /// RAM.
    pub ram: Option<f64>,
}

/// T: distinct weight bytes that one decode step reads, one row of the embeddings included, padding apart.
pub fn touched_bytes(spec: &ModelSpec, plan: &Plan, catalog: &Catalog) -> u64 {
    let size = |block: overspill::BlockId| catalog.blocks().get(block.index()).map_or(0, |block| block.bytes);
    let always: u64 =
        plan.steps.iter().filter(|step| step.choice_max == 0).flat_map(|step| &step.blocks).map(|&b| size(b)).sum();
    let standing: u64 = plan.standing.iter().map(|&b| size(b)).sum();
    let chosen: u64 = (plan.layers.iter().zip(&spec.layers))
        .map(|(layer, described)| match (&layer.ffn, &described.ffn) {
            (FfnPlan::Experts { pieces, .. }, Ffn::Experts(experts)) => {
                let all: u64 =
                    pieces.iter().flat_map(|e| e.gate_up.iter().flatten().chain(&e.down)).map(|p| p.bytes).sum();
                all / (pieces.len() as u64).max(1) * experts.used as u64
            }
            _ => 0,
        })
        .sum();
    always + standing + chosen + spec.embedding.row_bytes as u64
}

/// What tiers can keep besides what is in flight: of GPUs alone (if there are any), and of all.
pub fn kept_bytes(stats: &Stats) -> (Option<u64>, u64) {
    let keeps = |tier: &overspill::TierFigures| tier.blocks.budget_bytes.saturating_sub(tier.blocks.ring_bytes);
    let gpus: Vec<u64> = stats.tiers.iter().filter(|tier| tier.label != "host").map(keeps).collect();
    let gpu = if gpus.is_empty() { None } else { Some(gpus.iter().sum()) };
    (gpu, stats.tiers.iter().map(keeps).sum())
}

/// The limit of this work on these wires; `None` if a wire that must carry something was not measured, or no token was
/// decoded.
pub fn limit(work: &Work, wires: Wires) -> Option<Limit> {
    let touched = work.touched_bytes as f64;
    let disk_bytes =
        if work.is_mixture { work.read_bytes } else { work.touched_bytes.saturating_sub(work.keeps_bytes) as f64 };
    let disk = if disk_bytes >= 1.0 { disk_bytes / wires.disk? } else { 0.0 };
    let bus = match work.gpu_keeps_bytes {
        Some(keeps) if !work.is_mixture && work.touched_bytes > keeps => {
            (work.touched_bytes - keeps) as f64 / wires.bus?
        }
        _ => 0.0,
    };
    let compute = match work.gpu_keeps_bytes {
        Some(_) => (work.seconds - work.stall_seconds).max(0.0),
        None => touched / wires.ram?,
    };
    let slowest = [("disk", disk), ("bus", bus), ("compute", compute)].into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let (bound_by, seconds_per_token) = slowest.filter(|(_, seconds)| *seconds > 0.0)?;
    Some(Limit {
        seconds_per_token,
        bound_by,
        ratio: work.seconds / seconds_per_token,
        disk_bytes_per_s: wires.disk,
        bus_bytes_per_s: wires.bus,
        ram_bytes_per_s: wires.ram,
    })
}

/// How long each wire is measured after a run of this length: a twentieth of it, within reason.
pub fn probe_time(run: Duration) -> Duration {
    (run / 20).clamp(Duration::from_millis(40), Duration::from_secs(1))
}

/// Measures the disk over the model's own files; `None` if they are too small or cannot be read.
pub fn disk_bytes_per_s(files: &ModelPaths, io: IoChoice, time: Duration) -> Option<f64> {
    let files = Arc::new(FileSet::open(files).ok()?);
    let extents = probe::whole(&files);
    let shapes = [(1 << 20, 16), (128 << 10, 16), (16 << 10, 16)];
    shapes.into_iter().find_map(|(request_bytes, depth)| {
        let shape = Shape { request_bytes, depth };
        probe::bandwidth(&files, &extents, io, shape, time).ok().map(|found| found.bytes_per_s)
    })
}

/// Paths and lengths of a model's files.
pub type ModelPaths = [(std::path::PathBuf, u64)];

/// Measures uploads the way the engine does them.
#[cfg(feature = "gpu")]
pub fn bus_bytes_per_s(context: &overspill::device::GpuContext) -> Option<f64> {
    let rates = overspill::device::probe_uploads(context, 2 << 20, 64 << 20).ok()?;
    rates.iter().find(|rate| rate.path == "ring").map(|rate| rate.bytes as f64 / rate.seconds.max(1e-9))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const WORK: Work = Work {
        touched_bytes: 1000,
        is_mixture: false,
        read_bytes: 700.0,
        seconds: 2.0,
        stall_seconds: 1.5,
        gpu_keeps_bytes: None,
        keeps_bytes: 400,
    };
    const WIRES: Wires = Wires { disk: Some(600.0), bus: Some(100.0), ram: Some(10_000.0) };

    #[test]
    fn the_slowest_wire_is_the_limit() {
        let found = limit(&WORK, WIRES).unwrap();
        assert_eq!((found.bound_by, found.seconds_per_token, found.ratio), ("disk", 1.0, 2.0));
        let found = limit(&Work { keeps_bytes: 1000, ..WORK }, WIRES).unwrap();
        assert_eq!((found.bound_by, found.seconds_per_token), ("compute", 0.1));
        let found = limit(&Work { is_mixture: true, ..WORK }, WIRES).unwrap();
        assert_eq!(found.seconds_per_token, 700.0 / 600.0);
        let found = limit(&Work { gpu_keeps_bytes: Some(500), ..WORK }, WIRES).unwrap();
        assert_eq!((found.bound_by, found.seconds_per_token), ("bus", 5.0));
    }

    #[test]
    fn what_was_not_measured_gives_no_limit() {
        assert!(limit(&WORK, Wires { disk: None, ..WIRES }).is_none());
        assert!(limit(&Work { keeps_bytes: 1000, ..WORK }, Wires { disk: None, ..WIRES }).is_some());
        assert_eq!(probe_time(Duration::from_secs(1000)), Duration::from_secs(1));
        assert_eq!(probe_time(Duration::ZERO), Duration::from_millis(40));
    }
}
