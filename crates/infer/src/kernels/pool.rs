//! A fixed set of threads that share the tasks of one job at a time, the caller among them.
//!
//! Idle workers spin for a moment, because the next matrix product usually follows at once, then sleep: while the main
//! thread waits for the disk they cost nothing. Tasks are dealt out one by one through a counter, so a slow core does
//! not hold up the others. What is not here: futures, work stealing, priorities; and results never depend on which
//! thread ran what.

use super::sys::columns::for_each_chunk;
use super::sys::scope::Lender;
use core::any::Any;
use core::cell::Cell;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use parking_lot::{Condvar, Mutex};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps. Longer than the gap between two products of one layer, far shorter
/// than a read from disk.
const SPIN: Duration = Duration::from_micros(20);

std::thread_local! {
    /// Whether this thread runs a task of some pool now. A job started from within a task runs in that task.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// Threads that run the tasks of one job at a time.
///
/// `Send + Sync`; jobs of several callers queue up. Dropping it ends the threads.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    running: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    lender: Lender,
    /// Counts jobs, so that a worker knows a new one from the one that it has finished.
    epoch: AtomicU64,
    quit: AtomicBool,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    left: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl core::fmt::Debug for Shared {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Shared").field("jobs", &self.epoch).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Self::run`] included, so `threads - 1` are started (0 counts as 1).
    /// If the system refuses a thread the pool is smaller; see [`Self::threads`].
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            lender: Lender::new(),
            epoch: AtomicU64::new(0),
            quit: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            left: Condvar::new(),
            panic: Mutex::new(None),
        });
        let start = |index: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("compute-{index}")).spawn(move || shared.work()).ok()
        };
        let workers = (1..threads).map_while(start).collect();
        Self { shared, running: Mutex::new(()), workers }
    }

    /// Threads that compute, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(task)` once for each task below `tasks`, on all threads, and returns when all calls have returned.
    /// With one thread, or from within a task, this is a plain loop.
    ///
    /// # Panics
    /// If a task panicked: with the first panic's payload, when the other threads have stopped. Tasks not begun by then
    /// are left undone.
    pub fn run(&self, tasks: usize, job: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || tasks <= 1 || IN_TASK.get() {
            (0..tasks).for_each(job);
            return;
        }
        let alone = self.running.lock();
        let shared = &*self.shared;
        shared.lender.lend(job, tasks, &|| shared.wait_until_left(), |drain| {
            shared.announce();
            shared.guarded(drain);
        });
        let panic = shared.panic.lock().take();
        drop(alone);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Calls `job` for the parts of `0..items` that have `step` items (the last perhaps fewer), on all threads.
    pub fn for_ranges(&self, items: usize, step: usize, job: &(dyn Fn(core::ops::Range<usize>) + Sync)) {
        let step = step.max(1);
        self.run(items.div_ceil(step), &|task| job(task * step..items.min((task + 1) * step)));
    }

    /// Calls `job(index, chunk)` for the chunks of `data` that have `chunk` items (the last perhaps fewer), on all
    /// threads.
    pub fn for_chunks<T: Send>(&self, data: &mut [T], chunk: usize, job: &(dyn Fn(usize, &mut [T]) + Sync)) {
        for_each_chunk(self, data, chunk, job);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        self.shared.announce();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks; there is nothing to learn from its end.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Tells the workers that there is something new. SeqCst pairs with [`Self::sleep`]: either the worker sees the
    /// new epoch, or we see the sleeper.
    fn announce(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _lock = self.lock.lock();
            self.wake.notify_all();
        }
    }

    /// A worker's life.
    fn work(&self) {
        let mut seen = 0;
        loop {
            if !spin(|| self.epoch.load(Ordering::Acquire) != seen) {
                self.sleep(seen);
            }
            seen = self.epoch.load(Ordering::Acquire);
            if self.quit.load(Ordering::Acquire) {
                return;
            }
            self.lender.help(&|drain| self.guarded(drain), &|| {
                let _lock = self.lock.lock();
                self.left.notify_all();
            });
        }
    }

    fn sleep(&self, seen: u64) {
        let mut lock = self.lock.lock();
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.epoch.load(Ordering::SeqCst) == seen {
            self.wake.wait(&mut lock);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Runs tasks, and keeps their first panic.
    fn guarded(&self, drain: &dyn Fn()) {
        let outer = IN_TASK.replace(true);
        let result = catch_unwind(AssertUnwindSafe(drain));
        IN_TASK.set(outer);
        if let Err(payload) = result {
            self.lender.give_up();
            self.panic.lock().get_or_insert(payload);
        }
    }

    fn wait_until_left(&self) {
        if !spin(|| self.lender.is_empty()) {
            let mut lock = self.lock.lock();
            while !self.lender.is_empty() {
                self.left.wait(&mut lock);
            }
        }
    }
}

/// Waits for `done` for about [`SPIN`]; whether it came.
fn spin(done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..32 {
            if done() {
                return true;
            }
            core::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}
