//! What leases, sequences and the driver share: the words and places of all blocks, the mailbox to the driver, and
//! the counters. It outlives the engine as long as a lease does.

use crate::error::Error;
use crate::events::{Event, Events, Subscribers};
use crate::wait::{Waiter, Waiters};
use crate::word::Word;
use overspill_core::{BlockId, Brain, Catalog, SequenceId, StepId, Ticket, TierId};
use overspill_host::SlotView;
use parking_lot::{Condvar, Mutex, RwLock};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The bytes of a resident block.
#[derive(Clone, Debug)]
pub(crate) enum Held {
    /// In host RAM.
    Host(SlotView),
    /// In a GPU's memory.
    #[cfg(feature = "gpu")]
    Gpu(crate::gpu::GpuSlice),
}

/// A block in a tier.
#[derive(Debug, Default)]
pub(crate) struct Cell {
    pub(crate) word: Word,
    /// Set before the word says "resident", cleared after it says "absent": whoever has a pin finds it set.
    pub(crate) held: RwLock<Option<Held>>,
}

/// A tier as the fast path sees it.
#[derive(Debug)]
pub(crate) struct TierTable {
    /// What the command line calls its budget: `--ram`, `--vram`.
    pub(crate) setting: &'static str,
    pub(crate) cells: Vec<Cell>,
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
}

/// A message to the driver.
pub(crate) enum Note {
    Entered {
        sequence: SequenceId,
        step: StepId,
    },
    StepTouched {
        sequence: SequenceId,
        step: StepId,
    },
    Touched {
        tier: TierId,
        block: BlockId,
    },
    Demand {
        ticket: Ticket,
        waiter: Arc<Waiter>,
    },
    Withdrawn {
        ticket: Ticket,
    },
    LastPinDropped {
        tier: TierId,
        block: BlockId,
    },
    Expected {
        sequence: SequenceId,
        step: StepId,
        blocks: Vec<BlockId>,
        probability_milli: u16,
    },
    Read(overspill_core::seam::Completion<crate::io::IoBuf>),
    #[cfg(feature = "gpu")]
    Uploaded {
        transfer: overspill_core::TransferId,
        result: Result<(), overspill_gpu::GpuError>,
    },
    /// Something to do with the brain itself; its result travels by the closure's own means.
    Ask(Box<dyn FnOnce(&mut Brain) + Send>),
    Close,
}

struct Mail {
    notes: Vec<Note>,
    closed: bool,
}

/// The way to the driver.
pub(crate) struct Mailbox {
    mail: Mutex<Mail>,
    arrived: Condvar,
    /// The driver wants to hear of steps at once; otherwise they may wait for the next urgent note.
    pub(crate) follow: AtomicBool,
}

/// Steps told while nobody listens are delivered when there are so many.
pub(crate) const LAZY_NOTES_MAX: usize = 4096;

impl Mailbox {
    fn new() -> Self {
        let mail = Mail { notes: Vec::with_capacity(LAZY_NOTES_MAX), closed: false };
        Self { mail: Mutex::new(mail), arrived: Condvar::new(), follow: AtomicBool::new(true) }
    }

    /// Puts a note in. False if the driver is gone.
    pub(crate) fn post(&self, note: Note, urgent: bool) -> bool {
        let wake = {
            let mut mail = self.mail.lock();
            if mail.closed {
                return false;
            }
            mail.notes.push(note);
            urgent || self.follow.load(Ordering::Relaxed) || mail.notes.len() >= LAZY_NOTES_MAX
        };
        if wake {
            self.arrived.notify_one();
        }
        true
    }

    /// Puts a note in without waking anybody: something urgent follows, or nothing depends on it yet.
    pub(crate) fn post_quietly(&self, note: Note) {
        let mut mail = self.mail.lock();
        if !mail.closed {
            mail.notes.push(note);
            if mail.notes.len() >= LAZY_NOTES_MAX {
                self.arrived.notify_one();
            }
        }
    }

    /// Wakes the driver for notes that were put in quietly.
    pub(crate) fn wake(&self) {
        self.arrived.notify_one();
    }

    /// Swaps the notes into an empty vector, waiting for some until the deadline.
    pub(crate) fn take(&self, into: &mut Vec<Note>, deadline: Option<Instant>) {
        let mut mail = self.mail.lock();
        while mail.notes.is_empty() {
            match deadline {
                None => self.arrived.wait(&mut mail),
                Some(deadline) => {
                    if self.arrived.wait_until(&mut mail, deadline).timed_out() {
                        break;
                    }
                }
            }
        }
        std::mem::swap(&mut mail.notes, into);
    }

    /// Refuses notes from now on, and returns those that were left.
    pub(crate) fn close(&self) -> Vec<Note> {
        let mut mail = self.mail.lock();
        mail.closed = true;
        std::mem::take(&mut mail.notes)
    }
}

/// Who holds leases, for errors about room.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) label: String,
    pub(crate) shared: Arc<Shared>,
    pub(crate) held: AtomicU64,
}

/// Counters of reads.
#[derive(Debug, Default)]
pub(crate) struct DiskCounters {
    pub(crate) read_bytes: AtomicU64,
    pub(crate) padding_bytes: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) gathered_bytes: AtomicU64,
    /// Nanoseconds in which a read of blocks was under way.
    pub(crate) busy_ns: AtomicU64,
}

/// Counters of copies up to GPUs.
#[derive(Debug, Default)]
pub(crate) struct BusCounters {
    pub(crate) uploaded_bytes: AtomicU64,
    pub(crate) uploads: AtomicU64,
    pub(crate) busy_ns: AtomicU64,
}

/// See the module.
pub(crate) struct Shared {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) tiers: Vec<TierTable>,
    pub(crate) mailbox: Mailbox,
    pub(crate) disk: DiskCounters,
    pub(crate) bus: BusCounters,
    pub(crate) stall_ns: AtomicU64,
    pub(crate) tickets: AtomicU64,
    pub(crate) patience: Duration,
    pub(crate) start: Instant,
    holders: Mutex<Vec<Weak<Holder>>>,
    /// The latest failure of each block that could not be brought, so that the waiters' error can say why.
    failures: Mutex<Vec<(BlockId, Error)>>,
    pub(crate) subscribers: Subscribers,
    /// Emptied vectors of leases, to be used again.
    pub(crate) spare: Mutex<Vec<Vec<crate::Lease>>>,
    /// Emptied vectors of blocks, likewise.
    pub(crate) spare_blocks: Mutex<Vec<Vec<BlockId>>>,
    pub(crate) waiters: Waiters,
    /// Turns the GPU's completion into the end of leases.
    #[cfg(feature = "gpu")]
    pub(crate) completion: std::sync::OnceLock<overspill_gpu::Completion>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("blocks", &self.catalog.blocks().len()).finish_non_exhaustive()
    }
}

/// Failures remembered at a time.
const FAILURES_MAX: usize = 64;

impl Shared {
    pub(crate) fn new(catalog: Arc<Catalog>, settings: &[&'static str], patience: Duration) -> Self {
        let blocks = catalog.blocks().len();
        let tiers = settings
            .iter()
            .map(|&setting| TierTable {
                setting,
                cells: (0..blocks).map(|_| Cell::default()).collect(),
                hits: AtomicU64::new(0),
                misses: AtomicU64::new(0),
            })
            .collect();
        Self {
            catalog,
            tiers,
            mailbox: Mailbox::new(),
            disk: DiskCounters::default(),
            bus: BusCounters::default(),
            stall_ns: AtomicU64::new(0),
            tickets: AtomicU64::new(0),
            patience,
            start: Instant::now(),
            holders: Mutex::default(),
            failures: Mutex::default(),
            subscribers: Subscribers::default(),
            spare: Mutex::default(),
            spare_blocks: Mutex::default(),
            waiters: Waiters::default(),
            #[cfg(feature = "gpu")]
            completion: std::sync::OnceLock::new(),
        }
    }

    pub(crate) fn cell(&self, tier: TierId, block: BlockId) -> Option<&Cell> {
        self.tiers.get(tier.index())?.cells.get(block.index())
    }

    /// Nanoseconds since the start.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) fn holder(self: &Arc<Self>, label: &str) -> Arc<Holder> {
        let holder = Arc::new(Holder { label: label.to_owned(), shared: Arc::clone(self), held: AtomicU64::new(0) });
        let mut holders = self.holders.lock();
        holders.retain(|h| h.strong_count() > 0);
        holders.push(Arc::downgrade(&holder));
        holder
    }

    /// Who holds leases now, for people.
    pub(crate) fn holders_text(&self) -> String {
        let mut texts = Vec::new();
        for holder in self.holders.lock().iter().filter_map(Weak::upgrade) {
            let held = holder.held.load(Ordering::Relaxed);
            if held > 0 {
                texts.push(format!("'{}' holds {held} blocks", holder.label));
            }
        }
        if texts.is_empty() { "none are known now".to_owned() } else { texts.join(", ") }
    }

    pub(crate) fn remember_failure(&self, block: BlockId, error: Error) {
        let mut failures = self.failures.lock();
        failures.retain(|(other, _)| *other != block);
        if failures.len() >= FAILURES_MAX {
            failures.remove(0);
        }
        failures.push((block, error));
    }

    pub(crate) fn failure(&self, block: BlockId) -> Option<Error> {
        self.failures.lock().iter().find(|(other, _)| *other == block).map(|(_, error)| error.clone())
    }

    pub(crate) fn subscribe(&self) -> Events {
        self.subscribers.subscribe()
    }

    /// Tells subscribers, if there are any.
    pub(crate) fn tell(&self, event: impl FnOnce() -> Event) {
        self.subscribers.tell(event);
    }
}
