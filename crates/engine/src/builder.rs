//! Settings of an engine, and its opening.

use crate::budget::{Budget, Reserving, TierBudget, budget_for_blocks, row_cache_bytes};
use crate::driver::Driver;
use crate::engine::{Engine, Inner};
use crate::error::Error;
use crate::gather::Gather;
use crate::io::{BlockReader, Decorator, IoBuf, MakeStorage, Opened, open_decorated};
use crate::shared::{Note, Shared};
use crate::window::Window;
use overspill_core::{BlockSize, Brain, Catalog, Config, Evict, Prefetch, TierConfig, TierId};
use overspill_host::limits::{MemoryLimits, memory_limits};
use overspill_host::{Backing, SlabOptions, SlabPool};
use overspill_nvme::remember::Remembered;
use overspill_nvme::{FileSet, IoChoice, NvmeError, Sink, StorageOptions};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Settings of an engine. Each has a default that works.
#[derive(Clone, Debug)]
pub struct EngineBuilder {
    ram: Budget,
    kv_bytes: Option<u64>,
    beside_bytes: u64,
    evict: Evict,
    prefetch: Prefetch,
    io: IoChoice,
    storage: StorageOptions,
    slabs: SlabOptions,
    patience: Duration,
    window_bytes: Option<u64>,
    disks: Option<overspill_nvme::remember::Memory>,
    decorator: Option<Decorator>,
    #[cfg(feature = "gpu")]
    gpu: Option<Arc<overspill_gpu::GpuContext>>,
    #[cfg(feature = "gpu")]
    vram: Budget,
}

impl Default for EngineBuilder {
    fn default() -> Self {
        Self {
            ram: Budget::Auto,
            kv_bytes: None,
            beside_bytes: 0,
            evict: Evict::Auto,
            prefetch: Prefetch::Auto,
            io: IoChoice::Auto,
            storage: StorageOptions::default(),
            slabs: SlabOptions::default(),
            patience: Duration::from_secs(30),
            window_bytes: None,
            disks: None,
            decorator: None,
            #[cfg(feature = "gpu")]
            gpu: None,
            #[cfg(feature = "gpu")]
            vram: Budget::Auto,
        }
    }
}

/// Host memory that [`Budget::Auto`] leaves to the process besides weights and what it was told of: code, stacks, page
/// tables, the reader's rings. Within a control group nobody else has to live off it.
const GROUP_RESERVE_BYTES: u64 = 24 << 20;
const GROUP_RESERVE_SHARE: u64 = 128;
/// The same where the whole machine is free: others need memory too, and a page cache.
const MACHINE_RESERVE_BYTES: u64 = 256 << 20;
const MACHINE_RESERVE_SHARE: u64 = 16;
/// Drivers of a GPU keep tables and copies in host memory.
#[cfg(feature = "gpu")]
const GPU_RESERVE_BYTES: u64 = 128 << 20;
/// Largest slab; smaller budgets have smaller slabs, so that they can shrink by a sixteenth.
const SLAB_BYTES_MAX: u64 = 64 << 20;
const SLABS_MIN: u64 = 16;
/// Steps of more than this gain nothing.
const STEP_BYTES_MAX: u64 = 64 << 20;
const STEP_BYTES_STREAMING_MAX: u64 = 8 << 20;
const STEP_SHARE: u64 = 32;

impl EngineBuilder {
    /// Host bytes for weights, what is in flight included. Default: what is free, less a reserve.
    #[must_use]
    pub fn ram(mut self, budget: Budget) -> Self {
        self.ram = budget;
        self
    }

    /// Most bytes that reservations in host RAM may take (the KV cache on CPU). Default: no bound.
    #[must_use]
    pub fn kv_bytes(mut self, bytes: u64) -> Self {
        self.kv_bytes = Some(bytes);
        self
    }

    /// Host memory that the program will take beside weights (activations, a KV cache whose size is known):
    /// [`Budget::Auto`] leaves so much more free. Default: none.
    #[must_use]
    pub fn beside_bytes(mut self, bytes: u64) -> Self {
        self.beside_bytes = bytes;
        self
    }

    /// Which block goes when room is needed. Default: [`Evict::Auto`].
    #[must_use]
    pub fn evict(mut self, evict: Evict) -> Self {
        self.evict = evict;
        self
    }

    /// Whether blocks are read before they are asked for. Default: [`Prefetch::Auto`].
    #[must_use]
    pub fn prefetch(mut self, prefetch: Prefetch) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// How the disk is read. Default: the best way that works here.
    #[must_use]
    pub fn io(mut self, io: IoChoice) -> Self {
        self.io = io;
        self
    }

    /// Queue depth, threads and the like of the reader.
    #[must_use]
    pub fn storage_options(mut self, options: StorageOptions) -> Self {
        self.storage = options;
        self
    }

    /// Locked or huge pages for host slabs. Default: not locked, huge pages where they are to be had.
    #[must_use]
    pub fn slab_options(mut self, options: SlabOptions) -> Self {
        self.slabs = options;
        self
    }

    /// How long a demand waits when leases hold all the room. Default: 30 s.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Bytes that may be in flight on each wire, or brought and not yet used; at least a slot. Default: 16 MiB, or twice
    /// what keeps the disks busy if that is more and known ([`Self::disks`]); it grows, up to 64 MiB, where the disks
    /// turn out to be fast ([`Config::disk_window_bytes`]).
    #[must_use]
    pub fn window_bytes(mut self, bytes: u64) -> Self {
        self.window_bytes = Some(bytes);
        self
    }

    /// Where findings about disks are kept ([`crate::remember`]). Default: nowhere.
    #[must_use]
    pub fn disks(mut self, memory: Option<overspill_nvme::remember::Memory>) -> Self {
        self.disks = memory;
        self
    }

    /// Puts something between the engine and its reader of blocks (not of rows): `overspill_nvme::decorate` has wires of
    /// known speed, counters and faults. For tests and measurements.
    #[doc(hidden)]
    #[must_use]
    pub fn decorate_storage(
        mut self,
        decorate: impl Fn(Sink<IoBuf>, MakeStorage<'_>) -> Result<Opened, NvmeError> + Send + Sync + 'static,
    ) -> Self {
        self.decorator = Some(Decorator(Arc::new(decorate)));
        self
    }

    /// Computes on a GPU: its memory becomes a tier above host RAM.
    #[cfg(feature = "gpu")]
    #[must_use]
    pub fn gpu(mut self, context: Arc<overspill_gpu::GpuContext>, vram: Budget) -> Self {
        self.gpu = Some(context);
        self.vram = vram;
        self
    }

    /// Opens a model: a Hugging Face directory or a GGUF file. Reads headers only.
    ///
    /// # Errors
    /// [`Error::Format`] if there is no model or it is damaged; otherwise as [`Self::open_catalog`].
    pub fn open(self, path: &Path) -> Result<Engine, Error> {
        self.open_model(overspill_formats::open(path)?)
    }

    /// Opens a model whose headers have been read.
    ///
    /// # Errors
    /// As [`Self::open_catalog`].
    pub fn open_model(self, model: overspill_formats::ModelFiles) -> Result<Engine, Error> {
        self.start(model.catalog, Some((model.metadata, model.format)))
    }

    /// Opens tensors that the caller describes ([`overspill_core::CatalogBuilder`]).
    ///
    /// # Errors
    /// [`Error::Storage`] if a file cannot be opened or the reader that was named cannot work; [`Error::TooSmall`] if a
    /// budget has no room for the largest block; [`Error::Config`].
    pub fn open_catalog(self, catalog: Catalog) -> Result<Engine, Error> {
        self.start(catalog, None)
    }

    fn start(
        mut self,
        catalog: Catalog,
        model: Option<(overspill_formats::Metadata, overspill_formats::Format)>,
    ) -> Result<Engine, Error> {
        let catalog = Arc::new(catalog);
        let span = tracing::info_span!("open", weight_bytes = catalog.weight_bytes(), blocks = catalog.blocks().len());
        let _entered = span.entered();
        let paths: Vec<_> = catalog.files().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
        let files = Arc::new(FileSet::open(&paths).map_err(|e| storage_error(&e))?);
        let window_is_set = self.window_bytes.is_some();
        self.window_bytes = Some(self.window(&catalog, &files));
        let flight_bytes = self.remembered(&files).iter().map(|found| found.in_flight_bytes() as usize).max();
        self.storage.flight_bytes = self.storage.flight_bytes.max(flight_bytes.unwrap_or(0));
        let plan = self.plan(&catalog, &files)?;
        for TierPlan { budget, slots_per_slab } in &plan {
            tracing::info!(tier = budget.label, budget_bytes = budget.bytes(), slots_per_slab, "a tier");
        }
        let settings: Vec<&'static str> = plan.iter().map(|t| t.budget.setting).collect();
        let shared = Arc::new(Shared::new(Arc::clone(&catalog), &settings, self.patience));
        let host = TierId(plan.len() as u32 - 1);
        let brain = self.brain(&catalog, &files, &plan)?;

        let mail = Arc::clone(&shared);
        let sink = Box::new(move |completion| {
            mail.mailbox.post(Note::Read(completion), true);
        });
        let opened = open_decorated(self.decorator.as_ref(), self.io, &files, &self.storage, sink);
        let (storage, probe) = opened.map_err(|e| storage_error(&e))?;
        let gather =
            Gather::new(&catalog, Arc::clone(&files), plan[host.index()].budget.apart_bytes, self.io, &self.storage)?;
        let slab_bytes = u64::from(plan[host.index()].slots_per_slab) * catalog.slot_bytes();
        let pool = SlabPool::new(slab_bytes as usize, self.slabs).map_err(|e| Error::Memory(e.to_string()))?;
        let pool = Arc::new(pool);
        #[cfg(feature = "gpu")]
        let gpus = crate::gpu::Gpus::start(self.gpu.as_ref(), &shared, &catalog, plan[0].slots_per_slab)?;
        let in_flight = self.in_flight(&catalog, &files);
        let slots_of_all: u64 = catalog.blocks().iter().map(|block| u64::from(block.slots)).sum();
        let driver = Driver {
            brain,
            shared: Arc::clone(&shared),
            reader: BlockReader::new(Arc::clone(&catalog), Arc::clone(&shared), storage, in_flight),
            backing: Backing::start(&pool),
            slots_of_all,
            pool: Arc::clone(&pool),
            host,
            slots_per_slab: plan[host.index()].slots_per_slab,
            #[cfg(feature = "gpu")]
            gpus,
            waiters: HashMap::new(),
            under_way: HashMap::with_capacity(2 * in_flight),
            failed: None,
            disk_busy: Default::default(),
            // Where all blocks fit into it, it need not grow: planning anew allocates.
            window: (!window_is_set && slots_of_all * catalog.slot_bytes() > self.window(&catalog, &files))
                .then(|| Window::new(self.window(&catalog, &files), files.wires())),
            #[cfg(feature = "gpu")]
            bus_busy: Default::default(),
        };
        let driver = std::thread::Builder::new()
            .name("overspill-driver".into())
            .spawn(move || driver.run())
            .map_err(|e| Error::Memory(format!("the driver's thread cannot be started ({e}): raise ulimit -u")))?;
        let step_bytes = step_bytes(&catalog, &plan);
        let (metadata, format) = model.map_or((None, None), |(metadata, format)| (Some(metadata), Some(format)));
        let budgets = plan.into_iter().map(|tier| tier.budget).collect();
        Ok(Engine {
            inner: Arc::new(Inner {
                holder: shared.holder("engine"),
                budgets: Mutex::new(budgets),
                shared,
                catalog,
                files,
                metadata,
                format,
                probe,
                kv_bytes: self.kv_bytes,
                compute: TierId(0),
                host,
                gather,
                schedules: Mutex::default(),
                step_bytes,
                pool,
                prefetch: self.prefetch,
                #[cfg(feature = "gpu")]
                gpu: self.gpu,
                driver: Mutex::new(Some(driver)),
            }),
        })
    }

    fn plan(&self, catalog: &Catalog, _files: &FileSet) -> Result<Vec<TierPlan>, Error> {
        let weights = catalog.weight_bytes();
        let slots: u64 = catalog.blocks().iter().map(|b| u64::from(b.slots)).sum();
        // More than all slots, the row cache and some fragmentation is of no use.
        let useful = budget_for_blocks((slots + u64::from(largest_run(catalog))) * catalog.slot_bytes());
        let mut tiers = Vec::new();
        #[cfg(feature = "gpu")]
        if let Some(gpu) = &self.gpu {
            let free = crate::gpu::free_bytes(gpu);
            let given_bytes = self.vram.resolve("--vram", weights, free)?;
            let (given_bytes, reserving) = match self.vram {
                Budget::Percent(_) => (given_bytes.min(free), Reserving::OnTop { bytes_max: free }),
                _ => (given_bytes, Reserving::Inside),
            };
            let slots_per_slab = crate::gpu::slots_per_slab(gpu, catalog, given_bytes)?;
            let slab_bytes = u64::from(slots_per_slab) * catalog.slot_bytes();
            let budget = TierBudget::new("gpu0", "--vram", given_bytes, 0, reserving).in_units(slab_bytes);
            tiers.push(TierPlan { budget, slots_per_slab });
        }
        let limits = memory_limits();
        let beside = self.beside_bytes.saturating_add(self.kv_bytes.unwrap_or(0)).saturating_add(self.reserve(&limits));
        let free = limits.available_bytes().unwrap_or(u64::MAX).saturating_sub(beside);
        let budget_bytes = match self.ram {
            Budget::Auto => free.min(useful),
            // All of the weights, and the rounding that they need in memory.
            all @ Budget::Percent(share) if share >= 100.0 => all.resolve("--ram", weights, free)?.max(useful),
            given => given.resolve("--ram", weights, free)?,
        };
        let apart_bytes = if catalog.tables().is_empty() { 0 } else { row_cache_bytes(budget_bytes) };
        let slots_per_slab = slots_per_slab(catalog, budget_bytes - apart_bytes, SLAB_BYTES_MAX);
        let budget = TierBudget::new("host", "--ram", budget_bytes, apart_bytes, Reserving::Apart);
        tiers.push(TierPlan { budget, slots_per_slab });
        Ok(tiers)
    }

    /// What [`Budget::Auto`] does not touch.
    fn reserve(&self, limits: &MemoryLimits) -> u64 {
        let available = limits.available_bytes().unwrap_or(0);
        let in_group = limits.cgroup.as_ref().is_some_and(|group| group.available_bytes() <= available);
        let bytes = if in_group {
            GROUP_RESERVE_BYTES + available / GROUP_RESERVE_SHARE
        } else {
            MACHINE_RESERVE_BYTES + available / MACHINE_RESERVE_SHARE
        };
        #[cfg(feature = "gpu")]
        let bytes = bytes + if self.gpu.is_some() { GPU_RESERVE_BYTES } else { 0 };
        bytes
    }

    /// What is known of the disks that the files lie on.
    fn remembered(&self, files: &FileSet) -> Vec<Remembered> {
        let Some(memory) = &self.disks else { return Vec::new() };
        let paths = (0..files.len()).map(|index| files.path(overspill_core::FileId(index as u32)));
        paths.filter_map(overspill_nvme::remember::disk_name).filter_map(|disk| memory.recall(&disk)).collect()
    }

    /// Bytes in flight on a wire: twice what the disks need, so that the next is there while one is computed with.
    fn window(&self, catalog: &Catalog, files: &FileSet) -> u64 {
        let of_disk =
            |found: &Remembered| (2 * found.in_flight_bytes()).max(Config::disk_window_bytes(found.bytes_per_s as u64));
        let default =
            || self.remembered(files).iter().map(of_disk).max().unwrap_or(0).max(Config::WINDOW_BYTES_DEFAULT);
        self.window_bytes.unwrap_or_else(default).max(catalog.slot_bytes())
    }

    /// About the most reads that the brain lets be under way.
    fn in_flight(&self, catalog: &Catalog, files: &FileSet) -> usize {
        let by_window = self.window(catalog, files) / catalog.slot_bytes().max(1) * u64::from(files.wires().max(1));
        usize::try_from(by_window).unwrap_or(usize::MAX).min(catalog.blocks().len()).saturating_add(64)
    }

    fn brain(&self, catalog: &Catalog, files: &FileSet, plan: &[TierPlan]) -> Result<Brain, Error> {
        let blocks = catalog.blocks().iter().enumerate().map(|(index, block)| {
            let first = catalog.parts(overspill_core::BlockId(index as u32)).first();
            BlockSize { bytes: block.bytes, slots: block.slots, wire: first.map_or(0, |p| files.wire_of(p.file)) }
        });
        let host = plan.len() as u32 - 1;
        let tiers = plan.iter().enumerate().map(|(index, tier)| TierConfig {
            label: tier.budget.label.to_owned(),
            budget_bytes: tier.budget.blocks_bytes(),
            slots_per_slab: tier.slots_per_slab,
            parent: (index as u32 != host).then_some(TierId(host)),
        });
        let config = Config {
            slot_bytes: catalog.slot_bytes(),
            tiers: tiers.collect(),
            blocks: blocks.collect(),
            evict: self.evict,
            prefetch: self.prefetch,
            window_bytes: self.window(catalog, files),
        };
        Brain::new(config).map_err(|e| {
            // What is needed in every token stays in the tier that computes, beside the block that is worked on.
            let computes = plan.first().is_some_and(|t| t.budget.label == e.tier);
            let standing = if computes { bundles(catalog) * catalog.slot_bytes() } else { 0 };
            let needed = overspill_core::TooSmall { bytes_min: e.bytes_min + standing, ..e };
            match plan.iter().find(|t| t.budget.label == needed.tier) {
                Some(tier) => tier.budget.too_small(&needed),
                None => Error::Config { setting: needed.tier.clone(), cause: needed.to_string() },
            }
        })
    }
}

/// A tier before it exists.
struct TierPlan {
    budget: TierBudget,
    slots_per_slab: u32,
}

/// Blocks that hold small tensors of the whole model.
fn bundles(catalog: &Catalog) -> u64 {
    let all = 0..catalog.blocks().len() as u32;
    all.filter(|&block| !catalog.is_single(overspill_core::BlockId(block))).count() as u64
}

pub(crate) fn largest_run(catalog: &Catalog) -> u32 {
    catalog.blocks().iter().map(|b| b.slots).max().unwrap_or(1)
}

/// Slots of a slab: of at most `slab_bytes_max`, and such that a small budget has several slabs; never fewer than the
/// longest run of adjacent slots.
pub(crate) fn slots_per_slab(catalog: &Catalog, budget_bytes: u64, slab_bytes_max: u64) -> u32 {
    let slot = catalog.slot_bytes();
    let by_size = slab_bytes_max / slot;
    let by_budget = (budget_bytes / slot).div_ceil(SLABS_MIN);
    by_size.min(by_budget).max(1).max(u64::from(largest_run(catalog))) as u32
}

fn step_bytes(catalog: &Catalog, plan: &[TierPlan]) -> u64 {
    let slots: u64 = catalog.blocks().iter().map(|b| u64::from(b.slots)).sum();
    let Some(compute) = plan.first() else { return STEP_BYTES_MAX };
    let room = compute.budget.blocks_bytes();
    if slots * catalog.slot_bytes() <= room {
        return STEP_BYTES_MAX;
    }
    (room / STEP_SHARE).clamp(1, STEP_BYTES_STREAMING_MAX)
}

pub(crate) fn storage_error(error: &NvmeError) -> Error {
    match error {
        NvmeError::Unavailable { choice, reason, cure } => Error::Config {
            setting: format!("--io {choice}"),
            cause: format!("is not possible here: {reason}: {cure}"),
        },
        NvmeError::Setting { setting, .. } => {
            Error::Config { setting: (*setting).to_owned(), cause: error.to_string() }
        }
        other => Error::Storage(other.to_string()),
    }
}
