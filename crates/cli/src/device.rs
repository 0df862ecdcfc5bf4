//! What computes: the choice between CPU and GPU, and the engine's settings that follow from it.

use crate::args::{DeviceArg, EvictArg, HugePagesArg, IoArg, PlacementArgs, PrefetchArg};
use crate::errors::{Kind, Outcome, stop};
use crate::sizes::Size;
use overspill::remember::Memory;
use overspill::{Budget, Engine, EngineBuilder, Evict, HugePages, IoChoice, Prefetch, SlabOptions};

/// What computes.
#[derive(Debug)]
pub enum Device {
    /// The CPU.
    Cpu,
    /// A GPU, opened.
    #[cfg(feature = "gpu")]
    Gpu(std::sync::Arc<overspill::device::GpuContext>),
}

impl Device {
    /// Opens what the arguments ask for.
    ///
    /// # Errors
    /// Arguments that contradict each other, no such adapter, or an adapter that gives no device.
    pub fn choose(args: &PlacementArgs) -> Outcome<Self> {
        let named = match (&args.vram, &args.adapter) {
            (Some(_), _) => Some("--vram"),
            (None, Some(_)) => Some("--adapter"),
            (None, None) => None,
        };
        match (args.device, named) {
            (DeviceArg::Cpu, Some(option)) => {
                let message = format!("{option} is about a GPU, and --device cpu uses none; leave one of them out");
                Err(stop(Kind::Usage, message))
            }
            (DeviceArg::Cpu, None) => Ok(Self::Cpu),
            (DeviceArg::Gpu | DeviceArg::Auto, _) => {
                let reason = match (args.device, named) {
                    (_, Some(option)) => Some(option),
                    (DeviceArg::Gpu, None) => Some("--device gpu"),
                    _ => None,
                };
                Self::open(args.adapter.as_deref(), reason)
            }
        }
    }

    /// Opens an adapter; `reason` is the option that asked for one, and without it the CPU will do.
    #[cfg(feature = "gpu")]
    fn open(adapter: Option<&str>, reason: Option<&str>) -> Outcome<Self> {
        use overspill::device::{Choice, GpuContext, GpuError};
        match (GpuContext::choose(Choice { name: adapter, ..Choice::default() }), reason) {
            (Ok(context), _) => Ok(Self::Gpu(std::sync::Arc::new(context))),
            (Err(GpuError::NoAdapter { .. } | GpuError::NoBackend), None) => Ok(Self::Cpu),
            (Err(error @ (GpuError::NoAdapter { .. } | GpuError::NoBackend)), Some(reason)) => {
                Err(stop(Kind::Config, format!("{reason}: {error}")))
            }
            (Err(error), _) => Err(stop(Kind::Device, error.to_string())),
        }
    }

    #[cfg(not(feature = "gpu"))]
    fn open(_adapter: Option<&str>, reason: Option<&str>) -> Outcome<Self> {
        match reason {
            None => Ok(Self::Cpu),
            Some(reason) => {
                let message =
                    format!("{reason}: this build has no GPU support; leave it out, or build with the feature gpu");
                Err(stop(Kind::Config, message))
            }
        }
    }

    /// `cpu` or `gpu`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            #[cfg(feature = "gpu")]
            Self::Gpu(_) => "gpu",
        }
    }

    /// An engine's settings for this device.
    pub fn builder(&self, args: &PlacementArgs, kv_bytes: Option<u64>) -> EngineBuilder {
        let mut builder = Engine::builder()
            .ram(budget(args.ram))
            .disks(Memory::of_user())
            .evict(match args.evict {
                EvictArg::Auto => Evict::Auto,
                EvictArg::Lru => Evict::Lru,
                EvictArg::NextUse => Evict::NextUse,
                EvictArg::Planned => Evict::Planned,
            })
            .slab_options(SlabOptions {
                huge_pages: match args.huge_pages {
                    HugePagesArg::Auto => HugePages::Auto,
                    HugePagesArg::Always => HugePages::Always,
                    HugePagesArg::Off => HugePages::Off,
                },
                ..SlabOptions::default()
            })
            .prefetch(match args.prefetch {
                PrefetchArg::Auto => Prefetch::Auto,
                PrefetchArg::Off => Prefetch::Off,
            })
            .io(match args.io {
                IoArg::Auto => IoChoice::Auto,
                IoArg::Uring => IoChoice::Uring,
                IoArg::Pread => IoChoice::Pread,
                IoArg::Mmap => IoChoice::Mmap,
            });
        if let Some(bytes) = kv_bytes {
            builder = builder.kv_bytes(bytes);
        }
        match self {
            Self::Cpu => builder,
            #[cfg(feature = "gpu")]
            Self::Gpu(context) => builder.gpu(std::sync::Arc::clone(context), budget(args.vram)),
        }
    }
}

fn budget(size: Option<Size>) -> Budget {
    match size {
        None => Budget::Auto,
        Some(Size::Bytes(bytes)) => Budget::Bytes(bytes),
        Some(Size::Percent(share)) => Budget::Percent(share),
    }
}

/// A size in bytes, where a percentage is of the model's weights.
pub fn bytes_of(size: Size, weight_bytes: u64) -> u64 {
    match size {
        Size::Bytes(bytes) => bytes,
        Size::Percent(share) => (weight_bytes as f64 * share / 100.0).ceil() as u64,
    }
}
