//! Weights of models larger than memory, paged between tiers just before they are needed.
//!
//! An [`Engine`] keeps a model's weights on disk, in host RAM and in GPU memory, each under a hard budget, and has
//! every block in the tier that computes on it by the time it is leased. It is made for inference runtimes: register
//! the order in which steps read blocks ([`Engine::register`]), walk through it ([`Engine::sequence`]), and lease what
//! each step needs ([`Sequence::acquire`]). Without a schedule the engine learns the order from use.
//!
//! # Your own tensors, your own loop
//! ```
//! use overspill::{Budget, CatalogBuilder, DType, Engine, FileId, RawTensor, Role, Schedule, Step, StepId};
//!
//! // A file of two matrices of 256 × 256 f32.
//! let path = std::env::temp_dir().join(format!("overspill-doc-{}.bin", std::process::id()));
//! std::fs::write(&path, (0..2 * 256 * 256).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<u8>>())?;
//! let mut catalog = CatalogBuilder::new();
//! let file = catalog.file(&path, 2 * 256 * 256 * 4);
//! let matrix = |name: &str, offset| RawTensor {
//!     name: name.into(), dtype: DType::F32, shape: vec![256, 256], file, offset, role: Role::Matrix,
//! };
//! let (a, b) = (catalog.tensor(matrix("a", 0)), catalog.tensor(matrix("b", 256 * 256 * 4)));
//!
//! // Half of it in memory.
//! let engine = Engine::builder().ram(Budget::Percent(50.0)).open_catalog(catalog.build()?)?;
//! let blocks = |tensor| engine.catalog().pieces(tensor, 0);
//! let steps: Vec<_> = [a, b].into_iter().flat_map(blocks).collect();
//! let schedule = engine.register(Schedule {
//!     label: "both".into(),
//!     cyclic: true,
//!     steps: steps.iter().map(|p| Step { tier: engine.compute_tier(), blocks: vec![p.block], choice_max: 0 }).collect(),
//!     standing: vec![],
//! })?;
//! let mut sequence = engine.sequence(schedule, "example")?;
//! let mut sum = 0.0;
//! for _token in 0..3 {
//!     for (step, piece) in steps.iter().enumerate() {
//!         let leases = sequence.acquire(StepId(step as u32))?;
//!         let bytes = leases.lease(0).piece(piece);
//!         sum += f64::from(f32::from_le_bytes(bytes[..4].try_into()?));
//!     }
//! }
//! assert!(sum > 0.0);
//! # std::fs::remove_file(path)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Threads
//! One driver, one GPU poller, and the reader's own. Leasing a resident block is one compare-and-swap and never enters
//! the driver. [`Engine`] is `Send + Sync`; several sequences may run at once.
//!
//! # Watching
//! [`Engine::stats`] has counters ([`metrics`] renders them for Prometheus), [`Engine::subscribe`] tells what happens when,
//! and [`Engine::residency`] what is where. Besides, everything that is rare is told through [`tracing`]: spans `open`,
//! `reserve`, `wait` (debug), `step` (trace); budgets that change (info), what fails (warn), each transfer (trace). The
//! library installs no subscriber, and without one this costs nothing.
#![forbid(unsafe_code)]

mod budget;
mod builder;
mod driver;
mod engine;
mod error;
mod events;
mod gather;
#[cfg(feature = "gpu")]
mod gpu;
mod io;
mod lease;
pub mod metrics;
mod rows;
mod sequence;
mod shared;
mod stats;
mod wait;
mod window;
mod word;

pub use budget::Budget;
pub use builder::EngineBuilder;
pub use engine::{Engine, Reservation};
pub use error::{Error, ErrorKind};
pub use events::{Event, Events};
#[cfg(feature = "gpu")]
pub use gpu::GpuSlice;
#[doc(hidden)]
pub use io::{IoBuf, MakeStorage, Opened};
pub use lease::{Lease, LeaseSet, Pending};
pub use overspill_core::catalog::ALIGN_BYTES;
pub use overspill_core::{
    Block, BlockId, Catalog, CatalogBuilder, CatalogError, DType, Decision, Evict, FileId, Layout, Part, Piece,
    Prefetch, RawTensor, Role, RowTable, Schedule, ScheduleId, SequenceId, Step, StepId, TableId, Tensor, TensorId,
    TierId, TierStats,
};
pub use overspill_formats as formats;
#[cfg(feature = "gpu")]
pub use overspill_gpu::{self as device, wgpu};
pub use overspill_host::limits;
pub use overspill_host::{AlignedBuf, HugePages, SlabOptions};
pub use overspill_nvme::{DiskProbe, FileSet, IoChoice, Probe, StorageOptions, probe, remember};
pub use sequence::Sequence;
pub use stats::{BusStats, DiskStats, Stats, TierFigures};
