//! A fixed pool of threads that serve reads one after the other, first come first served.

use crate::{NvmeError, Sink};
use overspill_core::TransferId;
use overspill_core::seam::{Buffer, Completion, Read, ReadFault};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Reads that may wait without the queue having to grow.
const QUEUED: usize = 1024;

/// Serves one read, on a worker's thread.
pub(crate) trait Serve<B>: Send + Sync + 'static {
    fn serve(&self, read: &mut Read<B>) -> Result<usize, ReadFault>;
}

/// The pool. Dropping it cancels what has not begun, and waits for the rest.
pub(crate) struct Workers<B: Buffer> {
    shared: Arc<Shared<B>>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared<B> {
    queue: Mutex<Queue<B>>,
    wake: Condvar,
}

struct Queue<B> {
    waiting: VecDeque<Read<B>>,
    cancelled: VecDeque<Read<B>>,
    closed: bool,
}

impl<B: Buffer> Workers<B> {
    pub(crate) fn start(
        name: &str,
        threads: usize,
        server: Arc<dyn Serve<B>>,
        sink: Arc<Sink<B>>,
    ) -> Result<Self, NvmeError> {
        let queue = Queue { waiting: VecDeque::with_capacity(QUEUED), cancelled: VecDeque::new(), closed: false };
        let shared = Arc::new(Shared { queue: Mutex::new(queue), wake: Condvar::new() });
        let mut pool = Self { shared, threads: Vec::with_capacity(threads) };
        for index in 0..threads {
            let (shared, server, sink) = (Arc::clone(&pool.shared), Arc::clone(&server), Arc::clone(&sink));
            let thread = std::thread::Builder::new()
                .name(format!("overspill-{name}-{index}"))
                .spawn(move || shared.work(&*server, &*sink))
                .map_err(|source| NvmeError::Resources { what: "thread", source })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    pub(crate) fn submit(&self, reads: &mut Vec<Read<B>>) {
        if reads.is_empty() {
            return;
        }
        self.shared.queue.lock().waiting.extend(reads.drain(..));
        self.shared.wake.notify_all();
    }

    pub(crate) fn cancel(&self, id: TransferId) {
        let mut queue = self.shared.queue.lock();
        if let Some(at) = queue.waiting.iter().position(|read| read.id == id)
            && let Some(read) = queue.waiting.remove(at)
        {
            queue.cancelled.push_back(read);
            drop(queue);
            self.shared.wake.notify_one();
        }
    }
}

impl<B: Buffer> Shared<B> {
    fn work(&self, server: &dyn Serve<B>, sink: &Sink<B>) {
        while let Some((mut read, cancelled)) = self.next() {
            let result = if cancelled { Err(ReadFault::Cancelled) } else { checked(&mut read, server) };
            sink(Completion { id: read.id, buffer: read.buffer, result });
        }
    }

    /// The next read and whether it is cancelled; `None` when all is done.
    fn next(&self) -> Option<(Read<B>, bool)> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(read) = queue.cancelled.pop_front() {
                return Some((read, true));
            }
            if let Some(read) = queue.waiting.pop_front() {
                return Some((read, queue.closed));
            }
            if queue.closed {
                return None;
            }
            self.wake.wait(&mut queue);
        }
    }
}

fn checked<B: Buffer>(read: &mut Read<B>, server: &dyn Serve<B>) -> Result<usize, ReadFault> {
    if read.len_min > read.len {
        return Err(ReadFault::System { errno: crate::progress::EINVAL });
    }
    server.serve(read)
}

impl<B: Buffer> Drop for Workers<B> {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A worker that panicked (in the sink) has said so on stderr already.
            let _ = thread.join();
        }
    }
}
