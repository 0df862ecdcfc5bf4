//! Waiting for a demand: blocking, with a deadline of one's own, or as a future.

use crate::error::Error;
use overspill_core::{BlockId, TierId};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

/// Waiters to be used again, so that a demand allocates nothing once as many have been made as wait at a time.
#[derive(Debug)]
pub(crate) struct Waiters(Mutex<VecDeque<Arc<Waiter>>>);

/// Waiters kept at a time.
const SPARE_MAX: usize = 256;
/// Waiters made at the start: one for the demand at hand, and some of which the driver may not have let go yet.
const SPARE_MIN: usize = 4;

impl Default for Waiters {
    fn default() -> Self {
        let mut all = VecDeque::with_capacity(SPARE_MAX);
        all.extend((0..SPARE_MIN).map(|_| Arc::new(Waiter::new())));
        Self(Mutex::new(all))
    }
}

impl Waiters {
    /// A waiter for these blocks.
    pub(crate) fn take(&self, tier: TierId, blocks: &[BlockId]) -> Arc<Waiter> {
        let mut all = self.0.lock();
        // Those given back first come first: the driver has let go of them.
        for _ in 0..all.len() {
            let Some(mut waiter) = all.pop_front() else { break };
            if let Some(free) = Arc::get_mut(&mut waiter) {
                free.reset(tier, blocks);
                return waiter;
            }
            all.push_back(waiter);
        }
        drop(all);
        let mut waiter = Waiter::new();
        waiter.reset(tier, blocks);
        Arc::new(waiter)
    }

    /// Takes back a waiter whose demand has ended.
    pub(crate) fn give_back(&self, waiter: Arc<Waiter>) {
        let mut all = self.0.lock();
        if all.len() < SPARE_MAX {
            all.push_back(waiter);
        }
    }
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Waiting,
    /// All blocks are resident, and the driver has pinned them for the waiter.
    Granted,
    Failed(Error),
    /// The waiter has gone; nothing must be pinned for it.
    Abandoned,
}

#[derive(Debug, Default)]
struct Inner {
    state: State,
    waker: Option<Waker>,
}

/// A demand, between its caller and the driver.
#[derive(Debug)]
pub(crate) struct Waiter {
    pub(crate) tier: TierId,
    pub(crate) blocks: Vec<BlockId>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Waiter {
    fn new() -> Self {
        Self { tier: TierId(0), blocks: Vec::new(), inner: Mutex::default(), changed: Condvar::new() }
    }

    /// Begins anew, for another demand.
    fn reset(&mut self, tier: TierId, blocks: &[BlockId]) {
        self.tier = tier;
        self.blocks.clear();
        self.blocks.extend_from_slice(blocks);
        *self.inner.get_mut() = Inner::default();
    }

    /// Driver: pins and grants, unless the waiter has gone.
    pub(crate) fn grant(&self, pin: impl FnOnce() -> Result<(), Error>) {
        self.end(|| match pin() {
            Ok(()) => State::Granted,
            Err(error) => State::Failed(error),
        });
    }

    /// Driver: fails.
    pub(crate) fn fail(&self, error: Error) {
        self.end(|| State::Failed(error));
    }

    fn end(&self, state: impl FnOnce() -> State) {
        let waker = {
            let mut inner = self.inner.lock();
            if !matches!(inner.state, State::Waiting) {
                return;
            }
            inner.state = state();
            inner.waker.take()
        };
        self.changed.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits until granted or failed; `None` if the deadline comes first.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<Result<(), Error>> {
        let mut inner = self.inner.lock();
        loop {
            if let Some(result) = Self::result(&inner.state) {
                return Some(result);
            }
            match deadline {
                None => self.changed.wait(&mut inner),
                Some(deadline) => {
                    if self.changed.wait_until(&mut inner, deadline).timed_out() {
                        return Self::result(&inner.state);
                    }
                }
            }
        }
    }

    pub(crate) fn poll(&self, context: &Context<'_>) -> Poll<Result<(), Error>> {
        let mut inner = self.inner.lock();
        match Self::result(&inner.state) {
            Some(result) => Poll::Ready(result),
            None => {
                inner.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// The waiter goes. True if the blocks had been pinned for it; it must drop these pins.
    pub(crate) fn abandon(&self) -> bool {
        let mut inner = self.inner.lock();
        matches!(std::mem::replace(&mut inner.state, State::Abandoned), State::Granted)
    }

    fn result(state: &State) -> Option<Result<(), Error>> {
        match state {
            State::Waiting => None,
            State::Granted => Some(Ok(())),
            State::Failed(error) => Some(Err(error.clone())),
            State::Abandoned => Some(Err(Error::Closed)),
        }
    }
}
