//! What subscribers are told, and how: events are put into a place that was set aside beforehand and taken out in
//! batches. Nobody is woken for an event, so watching costs the engine a few dozen nanoseconds each.

use overspill_core::{BlockId, SequenceId, StepId, TierId};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Something that happened in the engine, told when it ended. Times are nanoseconds since the engine was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A block was read from disk.
    Read {
        /// From when.
        from_ns: u64,
        /// To when.
        at_ns: u64,
        /// What.
        block: BlockId,
        /// Into which tier.
        tier: TierId,
        /// Bytes that came from the disk, padding included; 0 if it failed or was given up.
        bytes: u64,
        /// Whether nobody waited for it when it began.
        speculative: bool,
    },
    /// A block was copied up to a GPU.
    Uploaded {
        /// From when: it was handed to the uploader.
        from_ns: u64,
        /// To when.
        at_ns: u64,
        /// What.
        block: BlockId,
        /// Into which tier.
        tier: TierId,
    },
    /// A block went to make room.
    Evicted {
        /// When.
        at_ns: u64,
        /// What.
        block: BlockId,
        /// From which tier.
        tier: TierId,
    },
    /// Somebody waited for blocks.
    Stalled {
        /// When the wait ended.
        at_ns: u64,
        /// How long it was.
        ns: u64,
        /// Blocks of the set that was waited for.
        blocks: usize,
    },
    /// A sequence computed a step: the time between its getting blocks of the step and giving them back. A step that
    /// chooses its blocks may be told several times.
    Step {
        /// From when.
        from_ns: u64,
        /// To when.
        at_ns: u64,
        /// Whose.
        sequence: SequenceId,
        /// Which step of its schedule.
        step: StepId,
        /// How many blocks it had.
        blocks: usize,
    },
    /// A sequence said what a later step will probably use.
    Expected {
        /// When.
        at_ns: u64,
        /// Whose.
        sequence: SequenceId,
        /// Which step.
        step: StepId,
        /// How many blocks.
        blocks: usize,
        /// How likely, in thousandths.
        probability_milli: u16,
    },
}

/// Events that a subscriber may lag behind; later ones are missed.
const EVENTS_MAX: usize = 65_536;
/// A subscriber that waits is woken when there are so many, and not before.
const EVENTS_MANY: usize = EVENTS_MAX / 2;

#[derive(Debug)]
struct Queue {
    kept: Mutex<Vec<Event>>,
    /// Signalled when there are many, and at the end.
    many: Condvar,
    missed: AtomicU64,
    /// Nothing is told any more: the subscriber has had enough, or the engine is gone.
    ended: AtomicBool,
}

impl Queue {
    fn end(&self) {
        // Under the lock, so that a subscriber that is about to wait cannot miss it.
        let _kept = self.kept.lock();
        self.ended.store(true, Ordering::Relaxed);
        self.many.notify_all();
    }

    fn push(&self, event: Event) {
        let mut kept = self.kept.lock();
        if kept.len() >= EVENTS_MAX {
            self.missed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        kept.push(event);
        if kept.len() == EVENTS_MANY {
            self.many.notify_one();
        }
    }
}

/// What an engine does, for one subscriber ([`crate::Engine::subscribe`]). Dropping it ends the subscription.
#[derive(Debug)]
pub struct Events(Arc<Queue>);

impl Events {
    /// Takes what has happened since the last time, instead of what is in `batch`, in the order in which it ended. Waits
    /// for `patience` first, less if a great deal happens or [`Self::end`] is called. False if this is the last: the
    /// subscription has ended, or the engine is gone.
    ///
    /// `batch` is given room for all that may be kept, and comes to the engine's use: hand the same one in each time.
    #[must_use]
    pub fn take(&self, batch: &mut Vec<Event>, patience: Duration) -> bool {
        batch.clear();
        batch.reserve(EVENTS_MAX);
        let deadline = Instant::now() + patience;
        let mut kept = self.0.kept.lock();
        while kept.len() < EVENTS_MANY && !self.0.ended.load(Ordering::Relaxed) {
            if self.0.many.wait_until(&mut kept, deadline).timed_out() {
                break;
            }
        }
        std::mem::swap(&mut *kept, batch);
        !self.0.ended.load(Ordering::Relaxed)
    }

    /// Ends the subscription: what is still to be taken is what has happened so far.
    pub fn end(&self) {
        self.0.end();
    }

    /// Events that were missed, because too many had not been taken.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.0.missed.load(Ordering::Relaxed)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// All who are told. When it is dropped, they hear of nothing more.
#[derive(Debug, Default)]
pub(crate) struct Subscribers {
    queues: Mutex<Vec<Arc<Queue>>>,
    /// Whether there may be any: one look that costs nothing if there are none.
    any: AtomicBool,
}

impl Subscribers {
    pub(crate) fn subscribe(&self) -> Events {
        let queue = Arc::new(Queue {
            kept: Mutex::new(Vec::with_capacity(EVENTS_MAX)),
            many: Condvar::new(),
            missed: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let mut queues = self.queues.lock();
        queues.push(Arc::clone(&queue));
        self.any.store(true, Ordering::Relaxed);
        Events(queue)
    }

    pub(crate) fn any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// Tells everybody. The engine never waits for a subscriber.
    pub(crate) fn tell(&self, event: impl FnOnce() -> Event) {
        if !self.any() {
            return;
        }
        let event = event();
        let mut queues = self.queues.lock();
        queues.retain(|queue| {
            let listens = !queue.ended.load(Ordering::Relaxed);
            if listens {
                queue.push(event);
            }
            listens
        });
        self.any.store(!queues.is_empty(), Ordering::Relaxed);
    }
}

impl Drop for Subscribers {
    fn drop(&mut self) {
        self.queues.get_mut().iter().for_each(|queue| queue.end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evicted(at_ns: u64) -> Event {
        Event::Evicted { at_ns, block: BlockId(0), tier: TierId(0) }
    }

    #[test]
    fn events_are_taken_in_order_and_those_too_many_are_counted() {
        let subscribers = Subscribers::default();
        subscribers.tell(|| unreachable!("nobody listens, so nothing is made up"));
        let (events, other) = (subscribers.subscribe(), subscribers.subscribe());
        let mut batch = vec![evicted(9)];
        assert!(events.take(&mut batch, Duration::ZERO));
        assert_eq!(batch, []);
        for at_ns in 0..EVENTS_MAX as u64 + 5 {
            subscribers.tell(|| evicted(at_ns));
        }
        // Many are there, so it does not wait.
        assert!(events.take(&mut batch, Duration::from_secs(3600)));
        assert_eq!((batch.len(), events.missed()), (EVENTS_MAX, 5));
        assert!(batch.iter().enumerate().all(|(at, event)| *event == evicted(at as u64)));
        subscribers.tell(|| evicted(7));
        assert!(events.take(&mut batch, Duration::ZERO));
        assert_eq!(batch, [evicted(7)]);
        drop(other);
        subscribers.tell(|| evicted(8));
        assert_eq!(subscribers.queues.lock().len(), 1, "who has gone is forgotten");
    }

    #[test]
    fn an_end_wakes_and_leaves_what_was_told() {
        let subscribers = Subscribers::default();
        let (ended, orphaned) = (subscribers.subscribe(), subscribers.subscribe());
        subscribers.tell(|| evicted(1));
        ended.end();
        subscribers.tell(|| evicted(2));
        let mut batch = Vec::new();
        assert!(!ended.take(&mut batch, Duration::from_secs(3600)));
        assert_eq!(batch, [evicted(1)]);
        let waiting = std::thread::spawn(move || {
            let mut batch = Vec::new();
            let more = orphaned.take(&mut batch, Duration::from_secs(3600));
            (more, batch.len())
        });
        drop(subscribers);
        assert_eq!(waiting.join().ok(), Some((false, 2)), "without an engine there is nothing to wait for");
    }
}
