//! Invariant 8, its third part: no lock is held across I/O. A disk swallows the read of one block; whatever does not
//! need that block goes on, from other threads too. Everything runs under a watchdog, so that a lock that is held shows
//! as a failure and not as a test that never ends.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill::{BlockId, Budget, CatalogBuilder, DType, Engine, Error, FileId, IoBuf, RawTensor, Role};
use overspill_core::TransferId;
use overspill_core::seam::{Completion, Read, ReadFault, Storage};
use overspill_nvme::Sink;
use parking_lot::{Condvar, Mutex};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

const MATRICES: u64 = 16;
const ROWS: u64 = 64;
const COLUMNS: u64 = 512;
const MATRIX: u64 = ROWS * COLUMNS * 2;
/// Longer than anything takes that does not wait for the disk.
const WATCHDOG: Duration = Duration::from_secs(60);

/// What the disk has swallowed, and whether it gives it back.
#[derive(Default)]
struct Gate {
    held: Mutex<(Vec<Read<IoBuf>>, bool)>,
    changed: Condvar,
}

impl Gate {
    fn until_one_is_held(&self) {
        let mut held = self.held.lock();
        while held.0.is_empty() {
            assert!(!self.changed.wait_for(&mut held, WATCHDOG).timed_out(), "the read never came");
        }
    }

    fn open(&self) {
        self.held.lock().1 = true;
        self.changed.notify_all();
    }
}

/// A reader that never answers reads at one offset until its gate opens. Like a real one it does not go before its
/// reads have ended, since a device may still write to their memory.
struct Stuck {
    inner: Box<dyn Storage<IoBuf>>,
    sink: Arc<Sink<IoBuf>>,
    gate: Arc<Gate>,
    offset: u64,
}

impl Storage<IoBuf> for Stuck {
    fn submit(&self, reads: &mut Vec<Read<IoBuf>>) {
        if let Some(at) = reads.iter().position(|read| read.offset == self.offset) {
            self.gate.held.lock().0.push(reads.remove(at));
            self.gate.changed.notify_all();
        }
        self.inner.submit(reads);
    }

    fn cancel(&self, id: TransferId) {
        self.inner.cancel(id);
    }

    fn alignment_bytes(&self) -> usize {
        self.inner.alignment_bytes()
    }

    fn name(&self) -> &'static str {
        "stuck"
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        let mut held = self.gate.held.lock();
        while !held.1 && !held.0.is_empty() {
            self.gate.changed.wait(&mut held);
        }
        for Read { id, buffer, .. } in held.0.drain(..) {
            (self.sink)(Completion { id, buffer, result: Err(ReadFault::Cancelled) });
        }
    }
}

/// Does something on another thread and gives its result, or fails if it does not come.
fn watched<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, finished) = mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    finished.recv_timeout(WATCHDOG).unwrap_or_else(|_| panic!("{what} waits for a read that it has no need of"))
}

struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn invariant_8_no_lock_is_held_across_io() {
    let file = Temporary(std::env::temp_dir().join(format!("overspill-locks-{}", std::process::id())));
    let bytes: Vec<u8> = (0..MATRICES * MATRIX).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 11) as u8).collect();
    std::fs::write(&file.0, &bytes).unwrap();
    let mut builder = CatalogBuilder::new();
    builder.file(&file.0, bytes.len() as u64);
    builder.payload_bytes(MATRIX);
    for index in 0..MATRICES {
        let (name, offset) = (format!("m{index}"), index * MATRIX);
        let shape = vec![ROWS, COLUMNS];
        builder.tensor(RawTensor { name, dtype: DType::F16, shape, file: FileId(0), offset, role: Role::Matrix });
    }
    let catalog = builder.build().unwrap();
    let stuck = BlockId(3);
    let part = catalog.parts(stuck)[0];
    let gate = Arc::new(Gate::default());
    let of_reader = Arc::clone(&gate);
    let engine = Engine::builder().ram(Budget::Percent(150.0)).decorate_storage(move |sink, make| {
        let sink = Arc::new(sink);
        let to_engine = Arc::clone(&sink);
        let inner = make(Box::new(move |completion| to_engine(completion)))?;
        Ok(Box::new(Stuck { inner, sink, gate: Arc::clone(&of_reader), offset: part.file_offset }))
    });
    let engine = engine.open_catalog(catalog).unwrap();
    let resident = BlockId(0);
    let lease = engine.acquire(resident).unwrap();

    let waiting = engine.request_set(&[stuck]).unwrap();
    gate.until_one_is_held();
    let of = |work: fn(&Engine, BlockId) -> Result<(), Error>, block: BlockId| {
        let engine = engine.clone();
        move || work(&engine, block)
    };
    watched("a lease of a resident block", of(|engine, block| engine.acquire(block).map(drop), resident)).unwrap();
    for block in [BlockId(4), BlockId(9)] {
        watched("another block's read", of(|engine, block| engine.acquire(block).map(drop), block)).unwrap();
    }
    let stats = engine.clone();
    let stats = watched("stats()", move || stats.stats()).unwrap();
    assert_eq!(stats.tiers[0].misses, 4);
    let full = stats.tiers[0].budget_bytes;
    for budget_bytes in [full / 2, full] {
        let engine = engine.clone();
        watched("set_budget()", move || engine.set_budget(engine.host_tier(), budget_bytes)).unwrap();
    }
    let reserving = engine.clone();
    drop(watched("reserve()", move || reserving.reserve(reserving.host_tier(), 4096, "cache")).unwrap());
    watched("a lease after all that", of(|engine, block| engine.acquire(block).map(drop), BlockId(9))).unwrap();

    // Closing fails who waits at once; it returns when the device has let go of the memory, and not before.
    let (closing, closed) = (engine.clone(), mpsc::channel());
    let closer = std::thread::spawn(move || {
        closing.close();
        closed.0.send(()).unwrap();
    });
    let failed = watched("the end of a demand", move || waiting.wait().map(drop));
    assert!(matches!(failed, Err(Error::Closed)), "{failed:?}");
    assert_eq!(lease.slot()[..MATRIX as usize], bytes[..MATRIX as usize], "a lease outlives it");
    assert!(closed.1.try_recv().is_err(), "closing waits for what is being written to");
    gate.open();
    closed.1.recv_timeout(WATCHDOG).unwrap();
    closer.join().unwrap();
}
