//! Completion: one thread that turns "the GPU is done with this submission" into a call.
//!
//! A queue runs its submissions in order, so waiting for them in the order in which they were registered is enough.

use crate::context::GpuContext;
use crate::error::GpuError;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One wait inside wgpu. Bounded, because a wait holds a lock that the destruction of resources needs.
const WAIT_SLICE: Duration = Duration::from_millis(20);
/// How long a poller that is being dropped waits for a GPU that does not finish.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);

type Callback = Box<dyn FnOnce(Result<(), GpuError>) + Send>;

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(wgpu::SubmissionIndex, Callback)>,
    closed_at: Option<Instant>,
}

struct Shared {
    context: GpuContext,
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Registers callbacks with a [`Poller`]. Clones share it; it works, with [`GpuError::Closed`], after the poller's end.
#[derive(Clone)]
pub struct Completion {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Completion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Completion").field("waiting", &self.shared.queue.lock().waiting.len()).finish()
    }
}

impl Completion {
    /// Calls `f` when the GPU is done with the submission, from the poller's thread; it must not block. Called exactly
    /// once, with an error if the device is lost or the poller is closed (then from this thread).
    pub fn after(&self, submission: wgpu::SubmissionIndex, f: impl FnOnce(Result<(), GpuError>) + Send + 'static) {
        {
            let mut queue = self.shared.queue.lock();
            if queue.closed_at.is_none() {
                queue.waiting.push_back((submission, Box::new(f)));
                self.shared.changed.notify_one();
                return;
            }
        }
        f(Err(GpuError::Closed));
    }
}

/// The thread. Dropping it waits for what is registered (20 s at most), completes it all, and ends.
#[derive(Debug)]
pub struct Poller {
    completion: Completion,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`GpuError::Refused`] if the system gives no thread.
    pub fn new(context: &GpuContext) -> Result<Self, GpuError> {
        let shared = Arc::new(Shared { context: context.clone(), queue: Mutex::default(), changed: Condvar::new() });
        let completion = Completion { shared: Arc::clone(&shared) };
        let thread =
            std::thread::Builder::new().name("overspill-gpu-poll".to_owned()).spawn(move || shared.run()).map_err(
                |e| GpuError::Refused { what: "a thread for the GPU's completions".into(), message: e.to_string() },
            )?;
        Ok(Self { completion, thread: Some(thread) })
    }

    /// A handle to register callbacks with.
    #[must_use]
    pub fn completion(&self) -> Completion {
        self.completion.clone()
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.completion.shared.queue.lock().closed_at = Some(Instant::now());
        self.completion.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join(); // Its callbacks are caught, so it does not panic.
        }
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let (submission, callback) = {
                let mut queue = self.queue.lock();
                loop {
                    if let Some(next) = queue.waiting.pop_front() {
                        break next;
                    }
                    if queue.closed_at.is_some() {
                        return;
                    }
                    self.changed.wait(&mut queue);
                }
            };
            let result = self.wait(&submission);
            if catch_unwind(AssertUnwindSafe(|| callback(result))).is_err() {
                tracing::error!("a callback of the GPU's completion panicked");
            }
        }
    }

    fn wait(&self, submission: &wgpu::SubmissionIndex) -> Result<(), GpuError> {
        while !self.context.wait(submission, WAIT_SLICE)? {
            let closed_at = self.queue.lock().closed_at;
            if closed_at.is_some_and(|at| at.elapsed() > CLOSE_TIMEOUT) {
                return Err(GpuError::Closed);
            }
        }
        Ok(())
    }
}
