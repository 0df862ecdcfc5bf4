//! [`Engine`], the public face, and the work that needs no brain: copies, gathers, reservations, figures.

use crate::budget::TierBudget;
use crate::error::Error;
use crate::events::Events;
use crate::gather::Gather;
use crate::lease::{Lease, LeaseSet, Pending, Use, missing};
use crate::sequence::Sequence;
use crate::shared::{Holder, Note, Shared};
use crate::stats::{BusStats, DiskStats, Stats, TierFigures};
use overspill_core::{BlockId, Brain, Catalog, Layout, Schedule, ScheduleId, StepId, TableId, TensorId, TierId};
use overspill_nvme::{FileSet, Probe};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

/// A model's weights, paged between tiers. Clones are handles on the same engine; it closes when the last is gone, or
/// at [`Engine::close`]. Leases may outlive it.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) files: Arc<FileSet>,
    pub(crate) metadata: Option<overspill_formats::Metadata>,
    pub(crate) format: Option<overspill_formats::Format>,
    pub(crate) probe: Probe,
    /// Held while the brain is asked, so that budgets change one after the other; the driver never takes it.
    pub(crate) budgets: Mutex<Vec<TierBudget>>,
    pub(crate) kv_bytes: Option<u64>,
    pub(crate) compute: TierId,
    pub(crate) host: TierId,
    pub(crate) gather: Gather,
    pub(crate) schedules: Mutex<BTreeMap<ScheduleId, Arc<Schedule>>>,
    pub(crate) holder: Arc<Holder>,
    pub(crate) step_bytes: u64,
    pub(crate) pool: Arc<overspill_host::SlabPool>,
    pub(crate) prefetch: overspill_core::Prefetch,
    #[cfg(feature = "gpu")]
    pub(crate) gpu: Option<Arc<overspill_gpu::GpuContext>>,
    pub(crate) driver: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("blocks", &self.catalog.blocks().len()).finish_non_exhaustive()
    }
}

impl Inner {
    fn close(&self) {
        self.shared.mailbox.post(Note::Close, true);
        if let Some(driver) = self.driver.lock().take()
            && driver.thread().id() != std::thread::current().id()
        {
            let _ = driver.join();
        }
    }

    /// Asks the driver's brain something and waits for the answer.
    fn ask<T: Send + 'static>(&self, question: impl FnOnce(&mut Brain) -> T + Send + 'static) -> Result<T, Error> {
        let (answer, answered) = crossbeam_channel::bounded(1);
        let ask = Note::Ask(Box::new(move |brain| {
            let _ = answer.send(question(brain));
        }));
        if !self.shared.mailbox.post(ask, true) {
            return Err(Error::Closed);
        }
        answered.recv().map_err(|_| Error::Closed)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}

/// Bytes of a tier set aside for something that is no block (a KV cache, scratch). They are given back when this is
/// dropped.
#[derive(Debug)]
pub struct Reservation {
    engine: Engine,
    tier: TierId,
    bytes: u64,
    label: String,
}

impl Reservation {
    /// How many bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What for.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.engine.give_back(self.tier, self.bytes);
    }
}

impl Engine {
    /// Settings for a new engine.
    #[must_use]
    pub fn builder() -> crate::EngineBuilder {
        crate::EngineBuilder::default()
    }

    /// The model's tensors, blocks and row tables.
    #[must_use]
    pub fn catalog(&self) -> &Catalog {
        &self.inner.catalog
    }

    /// What the model's files say besides tensors, if the engine was opened on a model.
    #[must_use]
    pub fn metadata(&self) -> Option<&overspill_formats::Metadata> {
        self.inner.metadata.as_ref()
    }

    /// How the model is stored, if the engine was opened on a model.
    #[must_use]
    pub fn format(&self) -> Option<overspill_formats::Format> {
        self.inner.format
    }

    /// The tier in which steps are computed: the GPU if there is one, else host RAM.
    #[must_use]
    pub fn compute_tier(&self) -> TierId {
        self.inner.compute
    }

    /// The tier of host RAM.
    #[must_use]
    pub fn host_tier(&self) -> TierId {
        self.inner.host
    }

    /// How the disk is read, and why not otherwise.
    #[must_use]
    pub fn io(&self) -> &Probe {
        &self.inner.probe
    }

    /// Looks whether the model's files are still those that were opened, and still have their names: two system calls a
    /// file. Sequences look too, but only mind what changes the bytes that they read; whoever named a file may want to
    /// know that its name means another one now.
    ///
    /// # Errors
    /// [`Error::Changed`] for the first file that was written to, truncated or replaced. A file that was removed can
    /// still be read and is no error.
    pub fn check_unchanged(&self) -> Result<(), Error> {
        match self.inner.files.check_unchanged() {
            Err(changed) if changed.what != overspill_nvme::Change::Removed => {
                Err(Error::Changed { path: changed.path, what: changed.what.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// The GPU, if the engine has one.
    #[cfg(feature = "gpu")]
    #[must_use]
    pub fn gpu(&self) -> Option<&overspill_gpu::GpuContext> {
        self.inner.gpu.as_deref()
    }

    /// The largest set of blocks that a step should have under these budgets, in bytes: enough work to keep the
    /// threads busy, little enough that most of the budget keeps blocks. A runtime cuts its schedule into such steps.
    #[must_use]
    pub fn step_bytes_hint(&self) -> u64 {
        self.inner.step_bytes
    }

    /// Registers a schedule. From then on the brain plans for it.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if a budget has no room for the largest step beside the standing blocks, with the smallest
    /// budget that has; [`Error::NotFound`] for blocks or tiers that are not there; [`Error::Closed`].
    pub fn register(&self, schedule: Schedule) -> Result<ScheduleId, Error> {
        let (blocks, tiers) = (self.catalog().blocks().len(), self.inner.shared.tiers.len());
        let all = schedule.steps.iter().flat_map(|s| &s.blocks).chain(&schedule.standing);
        if let Some(block) = all.clone().find(|b| b.index() >= blocks) {
            return Err(missing("block", block.0));
        }
        if let Some(step) = schedule.steps.iter().find(|s| s.tier.index() >= tiers) {
            return Err(missing("tier", step.tier.0));
        }
        let schedule = Arc::new(schedule);
        let planned = Arc::clone(&schedule);
        let id = self.inner.ask(move |brain| brain.add_schedule(&planned))?.map_err(|e| self.too_small(&e))?;
        self.inner.schedules.lock().insert(id, schedule);
        Ok(id)
    }

    fn too_small(&self, error: &overspill_core::TooSmall) -> Error {
        let budgets = self.inner.budgets.lock();
        match budgets.iter().find(|budget| budget.label == error.tier) {
            Some(budget) => budget.too_small(error),
            None => Error::TooSmall {
                setting: error.tier.clone(),
                budget_bytes: error.budget_bytes,
                bytes_min: error.bytes_min,
            },
        }
    }

    /// Starts a sequence at the beginning of a schedule. The label names it in errors about room.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a schedule that is not registered; [`Error::Closed`].
    pub fn sequence(&self, schedule: ScheduleId, label: &str) -> Result<Sequence, Error> {
        let steps = self.inner.schedules.lock().get(&schedule).cloned();
        let steps = steps.ok_or_else(|| missing("schedule", schedule.0))?;
        let id = self.inner.ask(move |brain| brain.open_sequence(schedule))?;
        let id = id.ok_or_else(|| missing("schedule", schedule.0))?;
        let (holder, files) = (self.inner.shared.holder(label), Arc::clone(&self.inner.files));
        Ok(Sequence { id, schedule: steps, holder, files })
    }

    /// Leases a block in the compute tier, waiting until it is there.
    ///
    /// # Errors
    /// What kept the block from coming ([`Pending::wait`]).
    pub fn acquire(&self, block: BlockId) -> Result<Lease, Error> {
        if let Some(lease) = self.try_acquire(block) {
            return Ok(lease);
        }
        let mut set = self.request_set(&[block])?.wait()?;
        set.take_single().ok_or(Error::Closed)
    }

    /// Leases a block in the compute tier if it is there.
    #[must_use]
    pub fn try_acquire(&self, block: BlockId) -> Option<Lease> {
        let tier = self.inner.compute;
        let lease = Lease::try_take(&self.inner.holder, tier, block)?;
        self.inner.shared.tiers[tier.index()].hits.fetch_add(1, Ordering::Relaxed);
        self.inner.shared.mailbox.post(Note::Touched { tier, block }, false);
        Some(lease)
    }

    /// Leases blocks in the compute tier, all or none, waiting until all are there.
    ///
    /// # Errors
    /// What kept the blocks from coming ([`Pending::wait`]).
    pub fn acquire_set(&self, blocks: &[BlockId]) -> Result<LeaseSet, Error> {
        self.request_set(blocks)?.wait()
    }

    /// As [`Self::acquire_set`], without waiting.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Closed`].
    pub fn request_set(&self, blocks: &[BlockId]) -> Result<Pending, Error> {
        Pending::ask(&self.inner.holder, self.inner.compute, blocks, Use::Blocks)
    }

    /// As [`Self::request_set`], in a tier of one's choice.
    ///
    /// # Errors
    /// As there.
    pub fn request_set_in(&self, tier: TierId, blocks: &[BlockId]) -> Result<Pending, Error> {
        Pending::ask(&self.inner.holder, tier, blocks, Use::Blocks)
    }

    /// Leases a whole tensor under one pointer.
    ///
    /// # Errors
    /// [`Error::NotContiguous`] if it is cut into several blocks; [`Error::NotFound`]; otherwise as [`Self::acquire`].
    pub fn acquire_tensor(&self, tensor: TensorId) -> Result<(Lease, overspill_core::Piece), Error> {
        let info = self.catalog().tensors().get(tensor.index()).ok_or_else(|| missing("tensor", tensor.0))?;
        let units = match info.layout {
            Layout::Cut { units, .. } => units,
            _ => 1,
        };
        match self.catalog().pieces(tensor, 0).as_slice() {
            [piece] if units == 1 => Ok((self.acquire(piece.block)?, *piece)),
            pieces => {
                let blocks = pieces.len() * units as usize;
                Err(Error::NotContiguous { tensor: info.name.clone(), blocks })
            }
        }
    }

    /// Copies bytes of a tensor, from `offset` on, wherever they are: from resident blocks of the host tier if it
    /// computes, else from disk.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the tensor has no such bytes; otherwise as [`Self::acquire`].
    pub fn fill(&self, tensor: TensorId, offset: u64, destination: &mut [u8]) -> Result<(), Error> {
        let info = self.catalog().tensors().get(tensor.index()).ok_or_else(|| missing("tensor", tensor.0))?;
        let end = offset.checked_add(destination.len() as u64).filter(|&end| end <= info.bytes);
        let Some(end) = end else {
            return Err(Error::NotFound {
                what: format!("bytes {offset} and on ({}) of tensor '{}'", destination.len(), info.name),
                cure: format!("it has {} bytes", info.bytes),
            });
        };
        if info.layout == Layout::TableOnly || self.inner.compute != self.inner.host {
            return self.inner.gather.range(tensor, offset, destination);
        }
        let unit_bytes = match info.layout {
            Layout::Cut { units, .. } => info.bytes / u64::from(units),
            _ => info.bytes,
        };
        for unit in (offset / unit_bytes)..=(end.saturating_sub(1) / unit_bytes) {
            for piece in self.catalog().pieces(tensor, unit as u32) {
                let start = unit * unit_bytes + piece.row * info.row_bytes;
                let (from, to) = (start.max(offset), (start + piece.bytes).min(end));
                if from < to {
                    let lease = self.acquire(piece.block)?;
                    let bytes = &lease.piece(&piece)[(from - start) as usize..(to - start) as usize];
                    destination[(from - offset) as usize..(to - offset) as usize].copy_from_slice(bytes);
                }
            }
        }
        Ok(())
    }

    /// Copies rows of a table, in this order, as they are in the file: `rows.len() × row_bytes` bytes. Rows are read
    /// once each however often they are named, in one batch, through a small cache.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a table or row that is not there; [`Error::Config`] if the destination has another
    /// size; [`Error::Read`].
    pub fn gather(&self, table: TableId, rows: &[u64], destination: &mut [u8]) -> Result<(), Error> {
        let info = *self.catalog().tables().get(table.index()).ok_or_else(|| missing("table", table.0))?;
        if let Some(row) = rows.iter().find(|&&row| row >= info.rows) {
            return Err(Error::NotFound {
                what: format!("row {row} of '{}'", self.catalog().tensor(info.tensor).name),
                cure: format!("it has {} rows", info.rows),
            });
        }
        if destination.len() as u64 != rows.len() as u64 * info.row_bytes {
            return Err(Error::Config {
                setting: "gather".into(),
                cause: format!("{} rows of {} bytes do not fill {}", rows.len(), info.row_bytes, destination.len()),
            });
        }
        let shared = &self.inner.shared;
        shared.disk.gathered_bytes.fetch_add(destination.len() as u64, Ordering::Relaxed);
        self.inner.gather.rows(table, rows, destination)
    }

    /// Sets bytes of a tier aside for something that is no block. On a GPU they come out of `--vram`, or on top of it
    /// if that is a share of the model ([`crate::Budget::Percent`]), as far as the GPU's memory goes; in host RAM they
    /// are bounded by `--kv`.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if they do not fit, or a registered schedule could not run beside them; then nothing has
    /// changed. [`Error::NotFound`]; [`Error::Closed`].
    pub fn reserve(&self, tier: TierId, bytes: u64, label: &str) -> Result<Reservation, Error> {
        let kv_bytes = self.inner.kv_bytes;
        let _span = tracing::debug_span!("reserve", tier = tier.0, bytes, label).entered();
        self.change_budget(tier, |budget| budget.reserve(bytes, kv_bytes))?;
        tracing::debug!("set aside");
        Ok(Reservation { engine: self.clone(), tier, bytes, label: label.to_owned() })
    }

    /// Changes a tier's budget. It is obeyed as fast as leases allow: blocks above it go, then whole slabs. What was a
    /// share of the model is a number of bytes from then on, reservations of a GPU included.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if a registered schedule could not run any more; then nothing has changed.
    /// [`Error::NotFound`]; [`Error::Closed`].
    pub fn set_budget(&self, tier: TierId, bytes: u64) -> Result<(), Error> {
        self.change_budget(tier, |budget| budget.set(bytes))
    }

    /// Changes the books of a tier, unless what is left for blocks would not do.
    fn change_budget(
        &self,
        tier: TierId,
        change: impl FnOnce(&mut TierBudget) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut budgets = self.inner.budgets.lock();
        let budget = budgets.get_mut(tier.index()).ok_or_else(|| missing("tier", tier.0))?;
        let mut changed = budget.clone();
        change(&mut changed)?;
        let bytes = changed.blocks_bytes();
        let before = budget.blocks_bytes();
        if bytes != before {
            let told = self.inner.ask(move |brain| brain.set_budget(tier, bytes))?;
            told.map_err(|error| changed.refused(&error))?;
            tracing::info!(
                tier = budget.label,
                from_bytes = before,
                to_bytes = bytes,
                "blocks may take other bytes now"
            );
        }
        *budget = changed;
        Ok(())
    }

    /// Ends a reservation. A closed engine has no use for the bytes.
    fn give_back(&self, tier: TierId, bytes: u64) {
        let given_back = self.change_budget(tier, |budget| {
            budget.give_back(bytes);
            Ok(())
        });
        debug_assert!(matches!(given_back, Ok(()) | Err(Error::Closed)), "more room is never refused");
    }

    /// The engine's figures now.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn stats(&self) -> Result<Stats, Error> {
        let tiers = self.inner.shared.tiers.len();
        let (brain_tiers, decision) = self.inner.ask(move |brain| {
            let tiers: Vec<_> = (0..tiers).map(|t| brain.tier_stats(TierId(t as u32))).collect();
            (tiers, brain.decision())
        })?;
        let shared = &self.inner.shared;
        let budgets = self.inner.budgets.lock();
        let figures = brain_tiers.into_iter().enumerate().map(|(index, brain)| TierFigures {
            label: budgets[index].label,
            budget_bytes: budgets[index].bytes(),
            budget_bytes_max: budgets[index].bytes_max(),
            peak_bytes: brain.peak_bytes + budgets[index].apart_bytes,
            reserved_bytes: budgets[index].reserved_bytes,
            reserved_peak_bytes: budgets[index].reserved_peak_bytes,
            hits: shared.tiers[index].hits.load(Ordering::Relaxed),
            misses: shared.tiers[index].misses.load(Ordering::Relaxed),
            blocks: brain,
        });
        let disk = &shared.disk;
        Ok(Stats {
            tiers: figures.collect(),
            disk: DiskStats {
                read_bytes: disk.read_bytes.load(Ordering::Relaxed) + self.inner.gather.read_bytes(),
                padding_bytes: disk.padding_bytes.load(Ordering::Relaxed),
                reads: disk.reads.load(Ordering::Relaxed) + self.inner.gather.reads(),
                gathered_bytes: disk.gathered_bytes.load(Ordering::Relaxed),
                busy_ns: disk.busy_ns.load(Ordering::Relaxed),
            },
            bus: BusStats {
                uploaded_bytes: shared.bus.uploaded_bytes.load(Ordering::Relaxed),
                uploads: shared.bus.uploads.load(Ordering::Relaxed),
                busy_ns: shared.bus.busy_ns.load(Ordering::Relaxed),
            },
            stall_ns: shared.stall_ns.load(Ordering::Relaxed),
            mapped_bytes: self.inner.pool.backed_bytes(),
            huge_page_bytes: self.inner.pool.huge_bytes(),
            decision,
            prefetch: match self.inner.prefetch {
                overspill_core::Prefetch::Off => "off",
                _ => "auto",
            },
            io: self.inner.probe.chosen.name(),
        })
    }

    /// Which blocks are in a tier now, one entry for each block of the catalog; empty for a tier that is not there. It
    /// looks at each block's word and disturbs nobody, so blocks may come and go while it looks.
    #[must_use]
    pub fn residency(&self, tier: TierId) -> Vec<bool> {
        let table = self.inner.shared.tiers.get(tier.index());
        table.map(|t| t.cells.iter().map(|cell| cell.word.is_resident()).collect()).unwrap_or_default()
    }

    /// Tells what happens from now on. A subscriber that falls far behind misses events; the engine waits for none.
    #[must_use]
    pub fn subscribe(&self) -> Events {
        self.inner.shared.subscribe()
    }

    /// Closes the engine: everybody who waits gets [`Error::Closed`], and when this returns no device writes to the
    /// engine's memory. Leases stay valid.
    pub fn close(&self) {
        self.inner.close();
    }

    /// The steps of a registered schedule that read a block, for reports.
    #[must_use]
    pub fn steps_of(&self, schedule: ScheduleId, block: BlockId) -> Vec<StepId> {
        let schedules = self.inner.schedules.lock();
        let Some(schedule) = schedules.get(&schedule) else { return Vec::new() };
        let steps = schedule.steps.iter().enumerate().filter(|(_, s)| s.blocks.contains(&block));
        steps.map(|(index, _)| StepId(index as u32)).collect()
    }
}
