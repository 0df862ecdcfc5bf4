//! A machine for a plan: a hardware profile, what computes, and budgets.

use super::predict::Resources;
use super::shape::ModelShape;
use crate::hardware::Hardware;
use crate::profile::{Profile, TierProfile};
use crate::wire::WireModel;

/// Slabs of the engine.
const SLAB_BYTES: u64 = 64 << 20;
/// As the engine: the cache of rows takes this part of a budget, at most …
const ROW_CACHE_SHARE: u64 = 64;
/// … so much.
const ROW_CACHE_BYTES_MAX: u64 = 1 << 20;
/// What drivers, displays and other programs keep of a GPU's memory: a twentieth, at least this much.
const VRAM_RESERVE_BYTES: u64 = 512 << 20;
/// What the system and the process keep of host memory: a sixteenth, at least this much.
const RAM_RESERVE_BYTES: u64 = 1 << 30;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// The GPUs, each its part of the layers.
    Gpu,
    /// The CPU; there is no GPU tier.
    Cpu,
}

impl Device {
    /// As the command line says it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Cpu => "cpu",
        }
    }
}

/// Bytes for a model, as the command line's options give them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// Of all GPUs together: weights, cache of keys and values, activations. `--vram`.
    pub vram_bytes: u64,
    /// Of the host, for weights alone. `--ram`.
    pub ram_bytes: u64,
}

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// The hardware.
    pub hardware: Hardware,
    /// What computes.
    pub device: Device,
    /// The budgets.
    pub budgets: Budgets,
}

impl Budgets {
    /// What a machine has, less what others need of it: the default of the command line on an idle machine. The cache
    /// of keys and values of a CPU comes off the host's memory, `kv_bytes`.
    #[must_use]
    pub fn of(hardware: &Hardware, device: Device, kv_bytes: u64) -> Self {
        let gpu = |bytes: u64| bytes.saturating_sub((bytes / 20).max(VRAM_RESERVE_BYTES));
        let host = hardware.host.memory_bytes;
        let host = host.saturating_sub((host / 16).max(RAM_RESERVE_BYTES));
        let vram_bytes = match device {
            Device::Cpu => 0,
            Device::Gpu if hardware.unified_memory => host,
            Device::Gpu => hardware.gpus.iter().map(|g| gpu(g.memory_bytes)).sum(),
        };
        let ram_bytes = match device {
            Device::Cpu => host.saturating_sub(kv_bytes),
            Device::Gpu if hardware.unified_memory => 0,
            Device::Gpu => host,
        };
        Self { vram_bytes, ram_bytes }
    }
}

/// A tier that computes, for a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Computes {
    pub(super) memory_bytes_per_s: u64,
    pub(super) flops_per_s: u64,
    pub(super) few_flops_per_s: u64,
    pub(super) attention_flops_per_s: u64,
    pub(super) product_ns: u64,
    pub(super) layer_ns: u64,
    /// Its share of the layers, in millionths.
    pub(super) share: u64,
    /// Bytes apart from weights.
    pub(super) apart_bytes: u64,
}

impl Machine {
    /// A machine whose budgets are [`Budgets::of`] it.
    #[must_use]
    pub fn new(hardware: &Hardware, device: Device, kv_bytes: u64) -> Self {
        Self { hardware: hardware.clone(), device, budgets: Budgets::of(hardware, device, kv_bytes) }
    }

    /// The same with one budget more.
    #[must_use]
    pub fn with_more(&self, resource: Resources, amount: u64) -> Self {
        let mut more = self.clone();
        match resource {
            Resources::Vram => more.budgets.vram_bytes = more.budgets.vram_bytes.saturating_add(amount),
            Resources::Ram if more.hardware.unified_memory && more.device == Device::Gpu => {
                more.budgets.vram_bytes = more.budgets.vram_bytes.saturating_add(amount);
            }
            Resources::Ram => more.budgets.ram_bytes = more.budgets.ram_bytes.saturating_add(amount),
            Resources::Disk => more.hardware = more.hardware.with_faster_disks(amount),
        }
        more
    }

    /// The tiers that compute, in the order of layers.
    pub(super) fn computes(&self, shape: &ModelShape, context: u64, chunk: u64) -> Vec<Computes> {
        let host = &self.hardware.host;
        if self.device == Device::Cpu {
            return vec![Computes {
                memory_bytes_per_s: host.memory_bytes_per_s,
                flops_per_s: host.flops_per_s,
                few_flops_per_s: host.few_flops_per_s,
                attention_flops_per_s: host.attention_flops_per_s,
                product_ns: host.product_ns,
                layer_ns: host.layer_ns,
                share: 1_000_000,
                // The cache of keys and values is beside --ram.
                apart_bytes: 0,
            }];
        }
        let total = u128::from(self.hardware.vram_bytes()).max(1);
        let unified = self.hardware.unified_memory;
        let share = |bytes: u64| if unified { 1_000_000 } else { (u128::from(bytes) * 1_000_000 / total) as u64 };
        let apart = shape.kv_bytes(context, chunk);
        let gpu = |gpu: &crate::hardware::Gpu| {
            let share = share(gpu.memory_bytes);
            let kv_bytes = (u128::from(apart) * u128::from(share) / 1_000_000) as u64;
            Computes {
                memory_bytes_per_s: gpu.memory_bytes_per_s,
                flops_per_s: gpu.flops_per_s,
                few_flops_per_s: gpu.flops_per_s,
                attention_flops_per_s: gpu.flops_per_s,
                // Launches are what a layer costs.
                product_ns: 0,
                layer_ns: gpu.layer_ns,
                share,
                apart_bytes: kv_bytes.saturating_add(shape.scratch_bytes(chunk)),
            }
        };
        self.hardware.gpus.iter().map(gpu).collect()
    }

    /// Bytes for weights of each tier: those that compute, then the host if it only feeds them.
    pub(super) fn weight_bytes(&self, computes: &[Computes]) -> Vec<u64> {
        if self.device == Device::Cpu {
            // As the engine: the cache of rows comes off it.
            let ram = self.budgets.ram_bytes;
            return vec![ram - (ram / ROW_CACHE_SHARE).min(ROW_CACHE_BYTES_MAX)];
        }
        let part = |c: &Computes| {
            let bytes = u128::from(self.budgets.vram_bytes) * u128::from(c.share) / 1_000_000;
            (bytes as u64).saturating_sub(c.apart_bytes)
        };
        let gpus = computes.iter().map(part);
        if self.hardware.unified_memory { gpus.collect() } else { gpus.chain([self.budgets.ram_bytes]).collect() }
    }

    /// As the simulator sees it, with these bytes for weights by tier. Steps bring their own times, in nanoseconds.
    pub(super) fn profile(&self, computes: &[Computes], weight_bytes: &[u64]) -> Profile {
        let host = weight_bytes.len() as u32 - 1;
        let feeds = weight_bytes.len() > computes.len();
        let tier = |(index, bytes): (usize, &u64)| {
            let compute = computes.get(index);
            let gpu = self.hardware.gpus.get(index).filter(|_| feeds && compute.is_some());
            TierProfile {
                label: match (compute, gpu) {
                    (_, Some(gpu)) => gpu.name.clone(),
                    (Some(_), None) if self.device == Device::Gpu => "unified memory".to_owned(),
                    _ => "host".to_owned(),
                },
                budget_bytes: *bytes,
                slab_bytes: SLAB_BYTES,
                parent: gpu.map(|gpu| {
                    let wire = WireModel {
                        label: format!("bus to {}", gpu.name),
                        bytes_per_s: gpu.link_bytes_per_s.max(1),
                        latency_ns: gpu.link_latency_ns,
                        depth: 16,
                        burst_ns: 0,
                    };
                    (host, wire)
                }),
                read_bytes_per_s: compute.map_or(self.hardware.host.memory_bytes_per_s, |c| c.memory_bytes_per_s),
                flops_per_s: 1_000_000_000,
                step_ns: 0,
            }
        };
        let disk = |disk: &crate::hardware::Disk| WireModel {
            label: disk.name.clone(),
            bytes_per_s: disk.bytes_per_s,
            latency_ns: disk.latency_ns,
            depth: disk.depth,
            burst_ns: disk.burst_ns,
        };
        Profile {
            label: self.hardware.name.clone(),
            tiers: weight_bytes.iter().enumerate().map(tier).collect(),
            disks: self.hardware.disks.iter().map(disk).collect(),
        }
    }
}
