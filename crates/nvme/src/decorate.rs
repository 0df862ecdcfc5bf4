//! Readers around readers: they count, slow down, or fail. For reports, and for tests of whoever uses a reader.
//!
//! Each is made around a sink and a function that makes the inner reader, since what it changes passes through both.

use crate::{NvmeError, Sink};
use overspill_core::seam::{Buffer, Completion, Read, ReadFault, Storage};
use overspill_core::{FileId, TransferId};
use parking_lot::{Condvar, Mutex};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Counts what passes.
#[derive(Debug)]
pub struct Counted<S> {
    inner: S,
    counters: Arc<Counters>,
}

/// What a [`Counted`] has seen so far.
#[derive(Debug, Default)]
pub struct Counters {
    submitted: AtomicU64,
    requested_bytes: AtomicU64,
    done: AtomicU64,
    read_bytes: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
}

/// A moment's values of [`Counters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoCounts {
    /// Reads submitted.
    pub submitted: u64,
    /// Bytes that these asked for, padding included.
    pub requested_bytes: u64,
    /// Reads that delivered.
    pub done: u64,
    /// Bytes that these delivered.
    pub read_bytes: u64,
    /// Reads that failed.
    pub failed: u64,
    /// Reads that were cancelled.
    pub cancelled: u64,
}

impl IoCounts {
    /// Reads submitted and not completed.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.submitted.saturating_sub(self.done + self.failed + self.cancelled)
    }
}

impl Counters {
    /// The values now. They are read one by one, so they may be apart by what happens meanwhile.
    #[must_use]
    pub fn snapshot(&self) -> IoCounts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        IoCounts {
            submitted: load(&self.submitted),
            requested_bytes: load(&self.requested_bytes),
            done: load(&self.done),
            read_bytes: load(&self.read_bytes),
            failed: load(&self.failed),
            cancelled: load(&self.cancelled),
        }
    }

    fn note(&self, result: &Result<usize, ReadFault>) {
        let counter = match result {
            Ok(bytes) => {
                self.read_bytes.fetch_add(*bytes as u64, Ordering::Relaxed);
                &self.done
            }
            Err(ReadFault::Cancelled) => &self.cancelled,
            Err(_) => &self.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl<S> Counted<S> {
    /// Counts around the reader that `make` makes.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn around<B: Buffer, E>(sink: Sink<B>, make: impl FnOnce(Sink<B>) -> Result<S, E>) -> Result<Self, E> {
        let counters = Arc::<Counters>::default();
        let noted = Arc::clone(&counters);
        let inner = make(Box::new(move |completion| {
            noted.note(&completion.result);
            sink(completion);
        }))?;
        Ok(Self { inner, counters })
    }

    /// The counters, which outlive the reader.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

impl<B: Buffer, S: Storage<B>> Storage<B> for Counted<S> {
    fn submit(&self, reads: &mut Vec<Read<B>>) {
        let bytes = reads.iter().map(|read| read.len as u64).sum();
        self.counters.submitted.fetch_add(reads.len() as u64, Ordering::Relaxed);
        self.counters.requested_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.inner.submit(reads);
    }

    fn cancel(&self, id: TransferId) {
        self.inner.cancel(id);
    }

    fn alignment_bytes(&self) -> usize {
        self.inner.alignment_bytes()
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

/// What shall happen to a read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It fails, and leaves rubbish in its buffer.
    Fail(ReadFault),
    /// It delivers no more than it must.
    Short,
}

/// A read, as a [`FaultPlan`] sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// How many reads were submitted before it.
    pub ordinal: u64,
    /// Which file.
    pub file: FileId,
    /// Where in the file.
    pub offset: u64,
    /// Bytes asked for.
    pub len: usize,
}

/// Which reads shall go wrong, and how.
pub struct FaultPlan(Box<Decide>);

type Decide = dyn Fn(&Planned) -> Option<Fault> + Send + Sync;

impl FaultPlan {
    /// Asks `decide` about every read.
    pub fn new(decide: impl Fn(&Planned) -> Option<Fault> + Send + Sync + 'static) -> Self {
        Self(Box::new(decide))
    }

    /// Nothing goes wrong.
    #[must_use]
    pub fn none() -> Self {
        Self::new(|_| None)
    }

    /// The reads of these ordinals go wrong: `5..6` for the sixth, `5..u64::MAX` for all after five.
    #[must_use]
    pub fn reads(ordinals: Range<u64>, fault: Fault) -> Self {
        Self::new(move |read| ordinals.contains(&read.ordinal).then(|| fault.clone()))
    }

    /// Reads that touch these bytes of a file go wrong, every time.
    #[must_use]
    pub fn place(file: FileId, bytes: Range<u64>, fault: Fault) -> Self {
        Self::new(move |read| {
            let end = read.offset.saturating_add(read.len as u64);
            (read.file == file && read.offset < bytes.end && bytes.start < end).then(|| fault.clone())
        })
    }
}

impl std::fmt::Debug for FaultPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultPlan").finish_non_exhaustive()
    }
}

/// Makes reads go wrong as a plan says. Ids of reads in flight must differ.
#[derive(Debug)]
pub struct Faulty<S> {
    inner: S,
    plan: FaultPlan,
    submitted: AtomicU64,
    doomed: Arc<Doomed>,
}

/// Reads in flight that shall go wrong, with the fewest bytes that they must deliver.
type Doomed = Mutex<BTreeMap<TransferId, (Fault, usize)>>;

impl<S> Faulty<S> {
    /// Injects the plan's faults around the reader that `make` makes.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn around<B: Buffer, E>(
        plan: FaultPlan,
        sink: Sink<B>,
        make: impl FnOnce(Sink<B>) -> Result<S, E>,
    ) -> Result<Self, E> {
        let doomed = Arc::<Doomed>::default();
        let of_sink = Arc::clone(&doomed);
        let inner = make(Box::new(move |mut completion| {
            let fault = of_sink.lock().remove(&completion.id);
            if let Some((fault, len_min)) = fault {
                spoil(&mut completion, fault, len_min);
            }
            sink(completion);
        }))?;
        Ok(Self { inner, plan, submitted: AtomicU64::new(0), doomed })
    }
}

fn spoil<B: Buffer>(completion: &mut Completion<B>, fault: Fault, len_min: usize) {
    /// Recognisable in a dump, and no weight.
    const RUBBISH: u8 = 0xdd;
    match fault {
        _ if completion.result.is_err() => {}
        Fault::Fail(fault) => {
            completion.buffer.bytes_mut().fill(RUBBISH);
            completion.result = Err(fault);
        }
        Fault::Short => {
            completion.buffer.bytes_mut()[len_min..].fill(RUBBISH);
            completion.result = Ok(len_min);
        }
    }
}

impl<B: Buffer, S: Storage<B>> Storage<B> for Faulty<S> {
    fn submit(&self, reads: &mut Vec<Read<B>>) {
        for read in &*reads {
            let ordinal = self.submitted.fetch_add(1, Ordering::Relaxed);
            let planned = Planned { ordinal, file: read.file, offset: read.offset, len: read.len };
            if let Some(fault) = (self.plan.0)(&planned) {
                self.doomed.lock().insert(read.id, (fault, read.len_min));
            }
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
        self.inner.name()
    }
}

/// How slow a [`Throttled`] reader is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wire {
    /// Bytes a second, over all reads; more than 0.
    pub bytes_per_s: f64,
    /// Time that each read takes besides; reads in flight share it.
    pub latency: Duration,
}

/// A handle on the wire of a [`Throttled`] reader, by which it gets faster or slower while it is used.
#[derive(Clone, Debug)]
pub struct WireControl(Arc<Mutex<Wire>>);

impl WireControl {
    /// Changes the wire for reads submitted from now on; those that wait keep their times.
    pub fn set(&self, wire: Wire) {
        *self.0.lock() = wire;
    }

    /// The wire as it is.
    #[must_use]
    pub fn get(&self) -> Wire {
        *self.0.lock()
    }
}

impl From<Wire> for WireControl {
    fn from(wire: Wire) -> Self {
        Self(Arc::new(Mutex::new(wire)))
    }
}

/// Makes a reader behave as one on a slower wire. Reads pass in order, each when the wire could have delivered it.
pub struct Throttled<B: Buffer, S> {
    line: Arc<Line<B>>,
    thread: Option<JoinHandle<()>>,
    // After the thread: it is dropped when the thread has passed on all that it will.
    inner: Arc<S>,
}

struct Line<B> {
    state: Mutex<LineState<B>>,
    changed: Condvar,
    wire: WireControl,
}

struct LineState<B> {
    /// Each with the time at which it may pass.
    waiting: VecDeque<(Instant, Read<B>)>,
    cancelled: Vec<Read<B>>,
    free_at: Instant,
    closed: bool,
}

impl<B: Buffer, S: Storage<B> + 'static> Throttled<B, S> {
    /// Slows down the reader that `make` makes, to a [`Wire`] or to what a [`WireControl`] says at the time.
    ///
    /// # Errors
    /// [`NvmeError::Resources`] if there is no thread to be had; those of `make`.
    pub fn around<E: From<NvmeError>>(
        wire: impl Into<WireControl>,
        sink: Sink<B>,
        make: impl FnOnce(Sink<B>) -> Result<S, E>,
    ) -> Result<Self, E> {
        let sink = Arc::new(sink);
        let of_inner = Arc::clone(&sink);
        let inner = Arc::new(make(Box::new(move |completion| of_inner(completion)))?);
        let state =
            LineState { waiting: VecDeque::new(), cancelled: Vec::new(), free_at: Instant::now(), closed: false };
        let line = Arc::new(Line { state: Mutex::new(state), changed: Condvar::new(), wire: wire.into() });
        let (of_thread, to) = (Arc::clone(&line), Arc::clone(&inner));
        let thread = std::thread::Builder::new()
            .name("overspill-throttle".into())
            .spawn(move || of_thread.run(&*to, &sink))
            .map_err(|source| NvmeError::Resources { what: "thread", source })?;
        Ok(Self { line, thread: Some(thread), inner })
    }
}

impl<B: Buffer> Line<B> {
    fn run(&self, inner: &dyn Storage<B>, sink: &Sink<B>) {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                let LineState { waiting, cancelled, .. } = &mut *state;
                cancelled.extend(waiting.drain(..).map(|(_, read)| read));
            }
            if !state.cancelled.is_empty() {
                let cancelled = std::mem::take(&mut state.cancelled);
                drop(state);
                for read in cancelled {
                    sink(Completion { id: read.id, buffer: read.buffer, result: Err(ReadFault::Cancelled) });
                }
                state = self.state.lock();
                continue;
            }
            if state.closed {
                return;
            }
            match state.waiting.front().map(|&(due, _)| due) {
                None => self.changed.wait(&mut state),
                Some(due) if due > Instant::now() => {
                    self.changed.wait_until(&mut state, due);
                }
                Some(_) => {
                    let mut reads: Vec<_> = state.waiting.pop_front().map(|(_, read)| read).into_iter().collect();
                    drop(state);
                    inner.submit(&mut reads);
                    state = self.state.lock();
                }
            }
        }
    }
}

impl<B: Buffer, S: Storage<B>> Storage<B> for Throttled<B, S> {
    fn submit(&self, reads: &mut Vec<Read<B>>) {
        let mut state = self.line.state.lock();
        let (now, wire) = (Instant::now(), self.line.wire.get());
        for read in reads.drain(..) {
            // A day is long enough for any test, and no wire is so slow that the sum overflows.
            let seconds = (read.len as f64 / wire.bytes_per_s).clamp(0.0, 86_400.0);
            state.free_at = state.free_at.max(now) + Duration::from_secs_f64(seconds);
            let due = state.free_at + wire.latency;
            state.waiting.push_back((due, read));
        }
        self.line.changed.notify_one();
    }

    fn cancel(&self, id: TransferId) {
        let mut state = self.line.state.lock();
        let at = state.waiting.iter().position(|(_, read)| read.id == id);
        if let Some((_, read)) = at.and_then(|at| state.waiting.remove(at)) {
            state.cancelled.push(read);
            self.line.changed.notify_one();
        } else {
            drop(state);
            self.inner.cancel(id);
        }
    }

    fn alignment_bytes(&self) -> usize {
        self.inner.alignment_bytes()
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

impl<B: Buffer, S> Drop for Throttled<B, S> {
    fn drop(&mut self) {
        self.line.state.lock().closed = true;
        self.line.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked (in the sink) has said so on stderr already.
            let _ = thread.join();
        }
    }
}
