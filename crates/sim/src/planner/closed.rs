//! The same in closed form: what a dense model's decode takes, and what no engine can beat.

use super::cut::Phase;
use super::machine::{Budgets, Device, Machine};
use super::shape::ModelShape;
use crate::hardware::Hardware;
use crate::simulate::Bound;
use overspill_core::TierId;

/// A pass of a dense model, if everything overlaps perfectly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Seconds: those of the slowest.
    pub seconds: f64,
    /// Which that is.
    pub bound: Bound,
    /// Bytes from the disks: T − (B − R), of all memories.
    pub disk_bytes: f64,
    /// Bytes over the links to GPUs: T − (B − R), of their memories.
    pub bus_bytes: f64,
}

/// The closed form for a dense model (for a mixture, as if each expert were as likely as any other, which real ones
/// are not). Rings are those that [`super::predict`] reports.
#[must_use]
pub fn estimate(
    shape: &ModelShape,
    machine: &Machine,
    context: u64,
    chunk: u64,
    ring_bytes: &[u64],
    compute_seconds: f64,
) -> Estimate {
    let computes = machine.computes(shape, context, chunk);
    let weights = machine.weight_bytes(&computes);
    let total = shape.block_bytes() as f64;
    let slots = |tier: usize| weights[tier].saturating_sub(ring_bytes.get(tier).copied().unwrap_or(0));
    let keeps = |tier: usize| {
        let feeds = tier >= computes.len();
        let before = if feeds { (0..tier).map(slots).fold(0, u64::saturating_add) } else { 0 };
        shape.bytes_in_slots(before, before.saturating_add(slots(tier))) as f64
    };
    let missed = |share: f64, kept: f64| (share * total - kept).max(0.0);
    let mut found = Estimate { seconds: compute_seconds, bound: Bound::Compute, disk_bytes: 0.0, bus_bytes: 0.0 };
    let mut offer = |seconds: f64, bound| {
        if seconds > found.seconds {
            (found.seconds, found.bound) = (seconds, bound);
        }
    };
    let mut from_below = 0.0;
    for (tier, compute) in computes.iter().enumerate() {
        let bytes = missed(compute.share as f64 / 1e6, keeps(tier));
        from_below += bytes;
        if let Some(gpu) =
            machine.hardware.gpus.get(tier).filter(|gpu| gpu.link_bytes_per_s > 0 && machine.device == Device::Gpu)
        {
            offer(bytes / gpu.link_bytes_per_s as f64, Bound::Bus(TierId(tier as u32)));
        }
    }
    let feeds = weights.len() > computes.len();
    let disk_bytes = if feeds { (from_below - keeps(weights.len() - 1)).max(0.0) } else { from_below };
    offer(disk_bytes / machine.hardware.disk_bytes_per_s().max(1) as f64, Bound::Disk);
    Estimate { disk_bytes, bus_bytes: if feeds { from_below } else { 0.0 }, ..found }
}

/// How much of what tokens ask of experts a memory of some of them can answer at best, by its share of all experts.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptCurve {
    /// Share of the experts, share of the uses; ascending, from (0, 0) to (1, 1).
    points: Vec<(f64, f64)>,
}

impl KeptCurve {
    /// No expert comes more often than another, and none stays.
    #[must_use]
    pub fn uniform() -> Self {
        Self { points: vec![(0.0, 0.0), (1.0, 1.0)] }
    }

    /// Belady's MIN on recorded routing of Qwen3-30B-A3B, Gemma-4-26B-A4B and gpt-oss-120b, the best of the three at
    /// each share: an upper bound of what caches reach, not a forecast.
    #[must_use]
    pub fn best_seen() -> Self {
        let points = vec![(0.0, 0.0), (0.05, 0.682), (0.1, 0.812), (0.2, 0.901), (0.3, 0.955), (0.5, 0.99), (1.0, 1.0)];
        Self { points }
    }

    /// Share of the uses that a memory of so many of the experts answers.
    #[must_use]
    pub fn at(&self, share: f64) -> f64 {
        let share = share.clamp(0.0, 1.0);
        let after = self.points.iter().position(|(x, _)| *x >= share).unwrap_or(self.points.len() - 1);
        let (x1, y1) = self.points[after];
        let (x0, y0) = self.points[after.saturating_sub(1)];
        if x1 > x0 { y0 + (y1 - y0) * (share - x0) / (x1 - x0) } else { y1 }
    }
}

/// Seconds of a pass that no engine on this hardware can beat, whatever computes where: each weight that a pass touches
/// is read once, by whoever holds it, and all memories, disks and processors work at once without waiting. What of
/// experts memory can hold is what `curve` says.
#[must_use]
pub fn physical_limit(
    shape: &ModelShape,
    hardware: &Hardware,
    budgets: Budgets,
    phase: Phase,
    curve: &KeptCurve,
) -> (f64, Bound) {
    let (vram, ram) = (budgets.vram_bytes as f64, budgets.ram_bytes as f64);
    let common = shape.common_bytes() as f64;
    let experts = shape.expert_bytes() as f64;
    let chosen: f64 = if phase.tokens > 1 {
        // At least those of one token; how many more is the router's secret.
        shape.touched_bytes() as f64 - common - shape.row_bytes as f64
    } else {
        shape.parts.iter().filter(|p| p.units > 1).map(|p| p.bytes as f64 * f64::from(p.used)).sum()
    };
    // Answered by memories of so many bytes: the common part first.
    let answered = |memory: f64| {
        let rest = (memory - common).max(0.0);
        let share = if experts > 0.0 { rest / experts } else { 0.0 };
        memory.min(common) + chosen * curve.at(share)
    };
    let (fast, both) = (answered(vram), answered(vram + ram));
    let host = &hardware.host;
    let gpu_rate: u64 = hardware.gpus.iter().map(|g| g.memory_bytes_per_s).sum();
    let gpu_flops: u64 = hardware.gpus.iter().map(|g| g.flops_per_s).sum();
    let over = |bytes: f64, rate: u64| if bytes > 0.0 { bytes / rate.max(1) as f64 } else { 0.0 };
    let touched = common + chosen;
    let memory = if hardware.unified_memory {
        over(touched, gpu_rate.max(host.memory_bytes_per_s))
    } else {
        // Either memory may serve less than it could hold, so the slower must not be made to wait for the faster.
        let together = over(touched.min(both), gpu_rate.saturating_add(host.memory_bytes_per_s));
        over(both - fast, host.memory_bytes_per_s).max(together)
    };
    let flops = shape.flops_per_token() as f64 * phase.tokens as f64;
    let compute = flops / gpu_flops.saturating_add(host.flops_per_s).max(1) as f64;
    let disk = over(touched - both, hardware.disk_bytes_per_s());
    let slowest = if memory >= compute { memory } else { compute };
    if disk > slowest { (disk, Bound::Disk) } else { (slowest, Bound::Compute) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_pass_through_their_points() {
        let curve = KeptCurve::best_seen();
        for (share, kept) in [(-1.0, 0.0), (0.0, 0.0), (0.1, 0.812), (0.15, 0.8565), (1.0, 1.0), (2.0, 1.0)] {
            assert!((curve.at(share) - kept).abs() < 1e-9, "{share}: {}", curve.at(share));
        }
        assert!((KeptCurve::uniform().at(0.37) - 0.37).abs() < 1e-9);
    }
}
