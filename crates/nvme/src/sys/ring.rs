//! A ring of io_uring's that owns what is in flight, so that nobody can touch memory that the kernel may write.
//!
//! It knows how to read into memory and how to be woken. What to read, and what to do with what came, is its caller's.

use io_uring::{IoUring, opcode, types};
use std::cell::UnsafeCell;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;

/// Something with memory to read into.
pub(crate) trait Target {
    /// Its memory.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Names the wake-up call among the completions; slots are numbered from 0.
const WAKE: u64 = u64::MAX;

/// The ring, with room for a fixed number of reads in flight.
pub(crate) struct Ring<T> {
    ring: IoUring,
    slots: Box<[UnsafeCell<Option<T>>]>,
    free: Vec<u32>,
    files: Files,
    wake: Arc<EventFd>,
    wake_armed: bool,
}

/// How a file is named to the kernel.
enum Files {
    /// By its place in a table that the kernel keeps, which saves it a look-up a read.
    Registered,
    /// By its descriptor.
    Plain(Vec<RawFd>),
}

impl<T: Target> Ring<T> {
    /// A ring for `depth` reads in flight, of these files. The caller keeps the files open as long as the ring lives.
    pub(crate) fn new(depth: u32, files: &[RawFd], wake: Arc<EventFd>) -> io::Result<Self> {
        // One entry more, for the wake-up call.
        let mut ring = build(depth + 1)?;
        check_support(&mut ring)?;
        let files = match ring.submitter().register_files(files) {
            Ok(()) => Files::Registered,
            Err(_) => Files::Plain(files.to_vec()),
        };
        let slots = (0..depth).map(|_| UnsafeCell::new(None)).collect();
        Ok(Self { ring, slots, free: (0..depth).rev().collect(), files, wake, wake_armed: false })
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Starts reading a file (by its place in the list given to [`Self::new`]) into `range` of the target's memory.
    ///
    /// Gives the target back if the ring is full, or the range not in its memory.
    pub(crate) fn start(&mut self, mut target: T, file: usize, offset: u64, range: Range<usize>) -> Result<(), T> {
        if target.bytes_mut().get(range.clone()).is_none() {
            return Err(target);
        }
        let Some(slot) = self.free.pop() else { return Err(target) };
        // SAFETY: the slot is free, so neither the kernel nor anybody else has a pointer to what it holds (nothing).
        let place = unsafe { &mut *self.slots[slot as usize].get() };
        let bytes = &mut place.insert(target).bytes_mut()[range];
        let (address, len) = (bytes.as_mut_ptr(), u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        let read = match &self.files {
            Files::Registered => opcode::Read::new(types::Fixed(file as u32), address, len),
            Files::Plain(descriptors) => opcode::Read::new(types::Fd(descriptors[file]), address, len),
        };
        // SAFETY: `address..+len` is borrowed exclusively from the target, which now lies in the slot. It is neither
        // moved nor touched there until its completion has been taken off the ring (`take`), or the ring is gone
        // (`drop` waits for what is in flight), so the borrow's promise holds while the kernel writes.
        unsafe { self.push(&read.offset(offset).build().user_data(u64::from(slot))) };
        Ok(())
    }

    /// Submits what was started, waits until something has completed or the ring was woken, and moves what completed
    /// to `finished`, each with its bytes or its negated error number.
    pub(crate) fn wait(&mut self, finished: &mut Vec<(T, i32)>) -> io::Result<()> {
        if !self.wake_armed {
            let poll = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), libc::POLLIN as u32);
            // SAFETY: polling takes no memory; the descriptor is kept open by `self.wake`.
            unsafe { self.push(&poll.build().user_data(WAKE)) };
            self.wake_armed = true;
        }
        self.enter(finished)
    }

    fn enter(&mut self, finished: &mut Vec<(T, i32)>) -> io::Result<()> {
        let result = self.ring.submit_and_wait(1);
        self.take(finished);
        match result.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::EINTR | libc::EAGAIN | libc::EBUSY), _)) => Ok(()),
            Err((_, error)) => Err(error),
        }
    }

    fn take(&mut self, finished: &mut Vec<(T, i32)>) {
        for entry in self.ring.completion() {
            if entry.user_data() == WAKE {
                self.wake_armed = false;
                self.wake.drain();
                continue;
            }
            let slot = entry.user_data() as usize;
            // SAFETY: the kernel has completed the slot's read, so it no longer writes to its target; each slot is
            // used for one read at a time, and this is the only place that takes a target out.
            if let Some(target) = unsafe { &mut *self.slots[slot].get() }.take() {
                self.free.push(slot as u32);
                finished.push((target, entry.result()));
            }
        }
    }

    /// # Safety
    /// What the entry points to must stay valid until its completion.
    unsafe fn push(&mut self, entry: &io_uring::squeue::Entry) {
        // There is an entry for every slot and one for the wake-up call; the queue is only ever full of entries that
        // the kernel has not looked at yet, because it was busy.
        // SAFETY: passed on to the caller.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            if self.ring.submit().is_err() {
                std::thread::yield_now();
            }
        }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // Only a panic leaves reads in flight here. Their memory must outlive the kernel's use of it: better to leak.
        if self.free.len() != self.slots.len() {
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// Builds a ring with the cheapest notifications that this kernel has.
fn build(entries: u32) -> io::Result<IoUring> {
    // Completions are worked off when this thread enters the kernel, not by interrupting it (kernel 6.1 on).
    let deferred = IoUring::builder().setup_single_issuer().setup_defer_taskrun().dontfork().build(entries);
    match deferred {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().dontfork().build(entries),
        result => result,
    }
}

/// Some sandboxes let a ring be made and then refuse its use.
fn check_support(ring: &mut IoUring) -> io::Result<()> {
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::PollAdd::CODE) {
        return Err(io::Error::other("this kernel's io_uring has no plain read; it needs Linux 5.6"));
    }
    let nop = opcode::Nop::new().build().user_data(WAKE);
    // SAFETY: a no-op takes no memory.
    unsafe { ring.submission().push(&nop) }.map_err(io::Error::other)?;
    loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(_) if ring.completion().next().is_some() => return Ok(()),
            Ok(_) => {}
        }
    }
}

/// A counter of the kernel's that wakes whoever polls it.
pub(crate) struct EventFd(File);

impl EventFd {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: takes no memory; gives a new descriptor or -1.
        let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { File::from_raw_fd(descriptor) }))
    }

    /// Wakes the ring, now or when it next waits.
    pub(crate) fn signal(&self) {
        // It fails only where 2^64 signals are pending already.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    fn drain(&self) {
        let _ = (&self.0).read(&mut [0; 8]);
    }

    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
