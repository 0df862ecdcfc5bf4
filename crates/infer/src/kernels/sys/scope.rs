//! The pool's unsafe heart: a job that borrows from its caller's stack is lent to threads that outlive the call.
//!
//! The gate makes this sound. A worker touches the job only between [`Gate::enter`] and [`Gate::leave`], and enters
//! only while the gate is open; the caller closes the gate and waits until everybody has left before it returns, also
//! when it unwinds. What is not here: spinning, sleeping and panics, which `pool.rs` does in safe code.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicUsize, Ordering};

const OPEN: usize = 1 << (usize::BITS - 1);

/// Open or closed, and how many workers are inside.
struct Gate(AtomicUsize);

impl Gate {
    /// Goes in if the gate is open.
    fn enter(&self) -> bool {
        self.0
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |state| (state & OPEN != 0).then_some(state + 1))
            .is_ok()
    }

    /// Goes out; true if the gate is closed and nobody is left inside.
    fn leave(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Release) == 1
    }
}

/// A job: called once for each task.
type Job<'a> = &'a (dyn Fn(usize) + Sync);

/// Lends one job at a time, with the counter that deals out its tasks.
pub(in super::super) struct Lender {
    gate: Gate,
    job: UnsafeCell<Option<(Job<'static>, usize)>>,
    next: AtomicUsize,
}

// SAFETY: `job` is written only by the one caller that holds the pool's `running` lock, and only while the gate is
// closed and empty; it is read only inside the gate. The job itself is `Sync`.
unsafe impl Sync for Lender {}

/// Takes the job back when the caller is done or unwinds.
struct Loan<'a> {
    lender: &'a Lender,
    wait: &'a dyn Fn(),
}

impl Lender {
    pub(in super::super) fn new() -> Self {
        Self { gate: Gate(AtomicUsize::new(0)), job: UnsafeCell::new(None), next: AtomicUsize::new(0) }
    }

    /// Runs `inside` while `job` (for `tasks` tasks) is on loan; what it is given calls the job until no task is left.
    /// `wait` blocks until [`Self::is_empty`]. The caller must be the only one to lend: a second one panics.
    pub(in super::super) fn lend<R>(
        &self,
        job: Job<'_>,
        tasks: usize,
        wait: &dyn Fn(),
        inside: impl FnOnce(&dyn Fn()) -> R,
    ) -> R {
        let alone = self.gate.0.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed);
        assert!(alone.is_ok(), "a pool lends one job at a time");
        // SAFETY: only the lifetime changes. `Loan::drop` closes the gate and waits until no worker is inside before
        // this function returns or unwinds, so nobody calls the job after its borrow ends.
        let job: Job<'static> = unsafe { core::mem::transmute::<Job<'_>, Job<'static>>(job) };
        // SAFETY: the gate held 0 (closed, empty) and now holds 1 (closed, only us), so nobody else reads or writes.
        unsafe { *self.job.get() = Some((job, tasks)) };
        self.next.store(0, Ordering::Relaxed);
        let loan = Loan { lender: self, wait };
        // The caller itself counts as inside until the loan is dropped.
        self.gate.0.fetch_or(OPEN, Ordering::Release);
        let result = inside(&|| self.drain());
        drop(loan);
        result
    }

    /// Calls the job for tasks until none is left. Returns false if there is no job now. `left` is called if this was
    /// the last one to leave after the loan was taken back.
    pub(in super::super) fn help(&self, run: &dyn Fn(&dyn Fn()), left: &dyn Fn()) -> bool {
        if !self.gate.enter() {
            return false;
        }
        // `run` catches panics, so `leave` is always reached; were it not, the caller would wait for ever, not unsoundly.
        run(&|| self.drain());
        if self.gate.leave() {
            left();
        }
        true
    }

    /// Calls the job for tasks until none is left. Only inside the gate.
    fn drain(&self) {
        // SAFETY: called between enter and leave (or by the lender itself, between opening and closing), while nobody
        // writes the job.
        let Some((job, tasks)) = (unsafe { *self.job.get() }) else { return };
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            job(task);
        }
    }

    /// Leaves the remaining tasks undone: one of them panicked.
    pub(in super::super) fn give_up(&self) {
        self.next.store(usize::MAX / 2, Ordering::Relaxed);
    }

    /// Whether nobody is inside a closed gate any more.
    pub(in super::super) fn is_empty(&self) -> bool {
        self.gate.0.load(Ordering::Acquire) == 0
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        // Closes the gate and takes the caller itself off the count.
        let before = self.lender.gate.0.fetch_sub(OPEN | 1, Ordering::AcqRel);
        debug_assert!(before & OPEN != 0);
        while !self.lender.is_empty() {
            (self.wait)();
        }
    }
}
