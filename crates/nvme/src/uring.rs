//! The fast reader of Linux: io_uring with direct I/O. One thread keeps the queue deep and otherwise sleeps.

use crate::Sink;
use crate::files::FileSet;
use crate::open::StorageOptions;
use crate::progress::{Call, EINVAL, Progress};
use crate::sys::{EventFd, Ring, Target};
use overspill_core::TransferId;
use overspill_core::seam::{Buffer, Completion, Read, ReadFault, Storage};
use overspill_host::GRANULE_BYTES;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

/// Reads that may wait without a queue having to grow.
const QUEUED: usize = 1024;

/// io_uring, driven by one thread.
pub(crate) struct Uring<B: Buffer> {
    shared: Arc<Shared<B>>,
    thread: Option<JoinHandle<()>>,
    alignment_bytes: usize,
}

struct Shared<B> {
    inbox: Mutex<Inbox<B>>,
    wake: Arc<EventFd>,
}

/// What the thread has not seen yet.
struct Inbox<B> {
    reads: VecDeque<Read<B>>,
    cancels: Vec<TransferId>,
    closed: bool,
    /// The thread has emptied the inbox and sleeps, or is about to: it must be woken.
    asleep: bool,
}

impl<B> Shared<B> {
    fn post(&self, fill: impl FnOnce(&mut Inbox<B>)) {
        let mut inbox = self.inbox.lock();
        fill(&mut inbox);
        let wake = std::mem::take(&mut inbox.asleep);
        drop(inbox);
        if wake {
            self.wake.signal();
        }
    }
}

impl<B: Buffer> Uring<B> {
    /// Makes the ring and its thread.
    ///
    /// # Errors
    /// Why it cannot be, in words.
    pub(crate) fn start(files: Arc<FileSet>, options: &StorageOptions, sink: Arc<Sink<B>>) -> Result<Self, String> {
        let direct = options.direct && files.any_direct();
        let wake = Arc::new(EventFd::new().map_err(|error| format!("no eventfd: {error}"))?);
        let reads = VecDeque::with_capacity(QUEUED);
        let inbox = Inbox { reads, cancels: Vec::new(), closed: false, asleep: false };
        let shared = Arc::new(Shared { inbox: Mutex::new(inbox), wake });
        let (report, made) = mpsc::channel();
        let (depth, call_bytes_max) = (options.depth as u32, options.call_bytes_max);
        let flight_bytes_max = options.flight_bytes;
        let of_thread = Arc::clone(&shared);
        // The ring is made on the thread that uses it: the kernel holds a single issuer to that.
        let run = move || {
            let ring = Ring::new(depth, &descriptors(&files), Arc::clone(&of_thread.wake));
            match ring {
                Err(error) => report.send(Err(error)).unwrap_or_default(),
                Ok(ring) => {
                    report.send(Ok(())).unwrap_or_default();
                    let (pending, finished) = (VecDeque::with_capacity(QUEUED), Vec::with_capacity(depth as usize));
                    let shared = of_thread;
                    let (flight_bytes, limits) = (0, (call_bytes_max, flight_bytes_max));
                    Driver { ring, files, shared, sink, direct, limits, flight_bytes, pending, finished }.run();
                }
            }
        };
        let thread = std::thread::Builder::new().name("overspill-uring".into()).spawn(run);
        let thread = thread.map_err(|error| format!("no thread: {error}"))?;
        match made.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(explain(&error)),
            Err(_) => return Err("its thread ended at once".to_owned()),
        }
        Ok(Self { shared, thread: Some(thread), alignment_bytes: if direct { GRANULE_BYTES } else { 1 } })
    }
}

/// All descriptors: for each file, the one past the page cache (or the other in its place), then the one through it.
fn descriptors(files: &FileSet) -> Vec<RawFd> {
    let mut all = Vec::with_capacity(files.len() * 2);
    for index in 0..files.len() {
        let file = overspill_core::FileId(index as u32);
        if let Some(buffered) = files.buffered(file) {
            all.push(files.direct_file(file).unwrap_or(buffered).as_raw_fd());
            all.push(buffered.as_raw_fd());
        }
    }
    all
}

fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel, or the container's seccomp profile, has no io_uring".to_owned(),
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden (seccomp profile, or kernel.io_uring_disabled)".to_owned()
        }
        Some(libc::ENOMEM) => format!("io_uring got no memory ({error}); ulimit -l may be too small for the ring"),
        _ => format!("io_uring: {error}"),
    }
}

impl<B: Buffer> Storage<B> for Uring<B> {
    fn submit(&self, reads: &mut Vec<Read<B>>) {
        if !reads.is_empty() {
            self.shared.post(|inbox| inbox.reads.extend(reads.drain(..)));
        }
    }

    fn cancel(&self, id: TransferId) {
        self.shared.post(|inbox| inbox.cancels.push(id));
    }

    fn alignment_bytes(&self) -> usize {
        self.alignment_bytes
    }

    fn name(&self) -> &'static str {
        "uring"
    }
}

impl<B: Buffer> Drop for Uring<B> {
    fn drop(&mut self) {
        self.shared.post(|inbox| inbox.closed = true);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked (in the sink) has said so on stderr already.
            let _ = thread.join();
        }
    }
}

/// A read in flight.
struct Op<B> {
    read: Read<B>,
    progress: Progress,
    call: Call,
}

impl<B: Buffer> Target for Op<B> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self.read.buffer.bytes_mut()
    }
}

/// The thread's own.
struct Driver<B: Buffer> {
    // First, so that it goes before the files that it reads.
    ring: Ring<Op<B>>,
    files: Arc<FileSet>,
    shared: Arc<Shared<B>>,
    sink: Arc<Sink<B>>,
    direct: bool,
    /// Most bytes of a system call, and in flight.
    limits: (usize, usize),
    flight_bytes: usize,
    pending: VecDeque<Read<B>>,
    finished: Vec<(Op<B>, i32)>,
}

impl<B: Buffer> Driver<B> {
    fn run(mut self) {
        loop {
            let closed = self.empty_inbox();
            while self.ring.has_room()
                && self.pending.front().is_some_and(|read| self.may_fly(read.len))
                && let Some(read) = self.pending.pop_front()
            {
                self.begin(read);
            }
            if closed && self.ring.in_flight() == 0 {
                return;
            }
            if let Err(error) = self.ring.wait(&mut self.finished) {
                self.give_up_pending(&error);
            }
            let mut finished = std::mem::take(&mut self.finished);
            for (op, result) in finished.drain(..) {
                self.advance(op, result);
            }
            self.finished = finished;
        }
    }

    /// Takes what was posted. Returns whether the reader is closed, and then nothing is pending.
    fn empty_inbox(&mut self) -> bool {
        let mut inbox = self.shared.inbox.lock();
        self.pending.append(&mut inbox.reads);
        let cancels = std::mem::take(&mut inbox.cancels);
        let closed = inbox.closed;
        inbox.asleep = true;
        drop(inbox);
        for id in cancels {
            if let Some(at) = self.pending.iter().position(|read| read.id == id)
                && let Some(read) = self.pending.remove(at)
            {
                self.complete(read, Err(ReadFault::Cancelled));
            }
        }
        if closed {
            while let Some(read) = self.pending.pop_front() {
                self.complete(read, Err(ReadFault::Cancelled));
            }
        }
        closed
    }

    fn may_fly(&self, bytes: usize) -> bool {
        self.flight_bytes == 0 || self.flight_bytes.saturating_add(bytes) <= self.limits.1
    }

    fn begin(&mut self, mut read: Read<B>) {
        let address = match read.buffer.bytes_mut().get(..read.len) {
            Some(bytes) if read.len_min <= read.len && read.file.index() < self.files.len() => bytes.as_ptr().addr(),
            _ => return self.complete(read, Err(ReadFault::System { errno: EINVAL })),
        };
        let direct = self.direct && self.files.direct_file(read.file).is_some();
        let lens = (read.len, read.len_min);
        let progress = Progress::new(read.offset, lens, address, direct, self.limits.0);
        self.flight_bytes += read.len;
        self.go_on(read, progress);
    }

    fn advance(&mut self, op: Op<B>, result: i32) {
        let Op { read, mut progress, call } = op;
        let result = usize::try_from(result).map_err(|_| result.saturating_neg());
        match progress.advance(&call, result) {
            Some(outcome) => self.end(read, outcome),
            None => self.go_on(read, progress),
        }
    }

    fn go_on(&mut self, read: Read<B>, progress: Progress) {
        let Some(call) = progress.next_call() else {
            let outcome = progress.at_end();
            return self.end(read, outcome);
        };
        let file = read.file.index() * 2 + usize::from(!call.direct);
        let (offset, range) = (call.offset, call.range.clone());
        if let Err(op) = self.ring.start(Op { read, progress, call }, file, offset, range) {
            // Not while there is room, and the range was checked: but a read never goes without an answer.
            self.end(op.read, Err(ReadFault::System { errno: EINVAL }));
        }
    }

    /// Of a read that has begun.
    fn end(&mut self, read: Read<B>, result: Result<usize, ReadFault>) {
        self.flight_bytes -= read.len;
        self.complete(read, result);
    }

    /// The kernel refuses to be entered. What it has will complete; what it has not will not begin.
    fn give_up_pending(&mut self, error: &io::Error) {
        tracing::error!(%error, "io_uring refuses to take more reads");
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        while let Some(read) = self.pending.pop_front() {
            self.complete(read, Err(ReadFault::System { errno }));
        }
        std::thread::sleep(Duration::from_millis(1));
    }

    fn complete(&self, read: Read<B>, result: Result<usize, ReadFault>) {
        (self.sink)(Completion { id: read.id, buffer: read.buffer, result });
    }
}
