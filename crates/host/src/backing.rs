//! A thread that backs slabs with pages before they are read into, and moves what lies in small pages into huge ones
//! once nothing is read any more.
//!
//! Why huge pages: a processor reads weights that lie in them a sixth faster, and a disk fills them faster too, since a
//! request of 1 MiB is one piece of memory to it and not 256. Why not always: the system clears a huge page as a whole
//! (and a hypervisor may first have to find memory for it), so whoever touches it first waits. So they are taken ahead of
//! the reader: huge ones while there is time or they come quickly, small ones when the reader is close behind.
//!
//! The rest is collapsed later. Pieces that are read into again and again, since weights stream through them, come
//! first, as soon as a read into them has ended: they are few, and all of the streaming goes through them (a virtual
//! disk reads into them twice as fast). What is read once and stays is collapsed slowly, when the disk has been quiet
//! for a while, since somebody is likely to compute.

use crate::sys::Collapse;
use crate::{HUGE_BYTES, HugePages, Slab, SlabPool, SlotBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pages are backed so far ahead of the latest read.
const AHEAD_BYTES: u64 = 64 << 20;
/// With so much backed there is time for huge pages, however long they take.
const AT_EASE_BYTES: u64 = AHEAD_BYTES / 2;
/// A huge page that comes in this time, 1.4 GB/s, holds up few disks, and makes up for it.
const CHEAP_NS: u64 = 1_500_000;
/// Nothing is read for so long before pages are collapsed; when something is read then, the wait doubles up to the other.
const QUIET: Duration = Duration::from_millis(250);
const QUIET_MAX: Duration = Duration::from_secs(4);
/// After a collapse the thread sleeps so many times as long as that took: a fiftieth of a processor, since it cannot know
/// whether somebody computes. At a fifth, the first 48 tokens on two cores came 18 % slower than without huge pages.
const REST: u32 = 49;
/// So much is collapsed without a rest of what weights stream through: the windows of the fastest disks, whose processors
/// wait for them. More are worn where experts come and go, whose processors may have better to do.
const WORN_BYTES_AT_ONCE: u64 = 128 << 20;
const REST_WORN: u32 = 9;
/// After a round in which all such pieces were busy, or memory short; it doubles up to [`QUIET_MAX`].
const PAUSE_WORN: Duration = Duration::from_millis(10);
/// Collapsing stops while limits leave less than this; a collapse takes [`HUGE_BYTES`] for a moment.
const ROOM_BYTES_MIN: u64 = 64 << 20;
/// The same for pieces that weights stream through: memory is full then, by intention.
const ROOM_WORN_BYTES_MIN: u64 = 4 * HUGE_BYTES as u64;
/// After so many refusals in a row the system has no room for huge pages, and looking for it costs others time.
const REFUSALS_MAX: usize = 8;
/// Limits are looked at after so many collapses.
const LOOK_EVERY: usize = 16;

/// See the module. Ends when it is dropped.
#[derive(Debug)]
pub struct Backing {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
    /// Slabs up to here exist; known to whoever maps them only.
    mapped: u64,
}

/// Positions are bytes from the beginning of slab 0 on, as if all slabs lay one after the other.
#[derive(Debug)]
struct State {
    pool: Arc<SlabPool>,
    huge: bool,
    /// Huge pages are taken at any price.
    always: bool,
    /// Slots are given out up to here.
    end: AtomicU64,
    /// The end of the highest slot that was read into.
    reached: AtomicU64,
    /// Pages are backed up to here.
    backed: AtomicU64,
    /// Reads begun, and those that have not ended.
    reads: AtomicU64,
    in_flight: AtomicU64,
    /// There are pieces in small pages that are read into again and again, and none of them is being read into.
    worn: AtomicBool,
    asleep: AtomicBool,
    closed: AtomicBool,
}

impl Backing {
    /// Starts the thread. None where the system knows nothing of the kind, or slabs are smaller than a huge page.
    #[must_use]
    pub fn start(pool: &Arc<SlabPool>) -> Option<Self> {
        if !cfg!(target_os = "linux") || pool.slab_bytes() < HUGE_BYTES {
            return None;
        }
        let state = Arc::new(State {
            pool: Arc::clone(pool),
            huge: pool.options().huge_pages.wanted(),
            always: pool.options().huge_pages == HugePages::Always,
            end: AtomicU64::new(0),
            reached: AtomicU64::new(0),
            backed: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            worn: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&state);
        let thread = std::thread::Builder::new().name("overspill-pages".into()).spawn(move || of_thread.run());
        // Without it everything works, more slowly.
        Some(Self { state, thread: Some(thread.ok()?), mapped: 0 })
    }

    /// Says that slots lie within the first `bytes` bytes, and no more than that may be backed.
    pub fn set_end(&mut self, bytes: u64) {
        if self.state.end.swap(bytes, Ordering::Relaxed) < bytes {
            self.map_ahead();
        }
    }

    /// A read into a slot begins, which ends at this position. True if the slot may have been read into before.
    pub fn read_begins(&mut self, slot_end: u64) -> bool {
        self.state.reads.fetch_add(1, Ordering::Relaxed);
        self.state.in_flight.fetch_add(1, Ordering::Relaxed);
        let again = self.state.reached.fetch_max(slot_end, Ordering::Relaxed) >= slot_end;
        if !again {
            self.map_ahead();
        }
        again
    }

    /// A read that was told has ended.
    pub fn read_ends(&self) {
        self.state.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// A slot was read into once more: weights stream through it.
    pub fn read_again(&self, slot: &SlotBuf) {
        let state = &self.state;
        if !state.huge || !slot.slab().wear(slot.offset()..slot.offset() + slot.bytes()) {
            return;
        }
        if !state.worn.swap(true, Ordering::Relaxed) {
            fence(Ordering::SeqCst);
            if state.asleep.swap(false, Ordering::Relaxed) {
                self.wake();
            }
        }
    }

    /// A slab has gone back to the system.
    pub fn released(&mut self, slab: usize) {
        let start = slab as u64 * self.state.slab_bytes();
        self.mapped = self.mapped.min(start);
        self.state.reached.fetch_min(start, Ordering::Relaxed);
        self.state.backed.fetch_min(start, Ordering::Relaxed);
    }

    /// Maps the slabs that are to be backed, and wakes the thread if it has something to do. Slabs are mapped by one
    /// thread alone, so that none comes back that has just been released.
    fn map_ahead(&mut self) {
        let (state, slab_bytes) = (&self.state, self.state.slab_bytes());
        let target = state.target();
        while self.mapped < target && state.pool.ensure((self.mapped / slab_bytes) as usize).is_ok() {
            self.mapped += slab_bytes;
        }
        // The position, then the word; the thread does it the other way round, so one of them sees the other.
        fence(Ordering::SeqCst);
        if state.backed.load(Ordering::Relaxed) < target && state.asleep.swap(false, Ordering::Relaxed) {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        self.state.closed.store(true, Ordering::Relaxed);
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What pages have cost lately, in nanoseconds for [`HUGE_BYTES`].
#[derive(Debug, Default)]
struct Costs {
    huge_ns: u64,
    small_ns: u64,
}

impl Costs {
    /// Whether huge pages should be taken with so much backed ahead of the reader.
    fn huge(&self, ahead_bytes: u64) -> bool {
        ahead_bytes >= AT_EASE_BYTES || self.huge_ns <= CHEAP_NS.max(self.small_ns + self.small_ns / 4)
    }

    fn note(&mut self, huge: bool, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let mean = if huge { &mut self.huge_ns } else { &mut self.small_ns };
        *mean = if *mean == 0 { ns } else { *mean - *mean / 4 + ns / 4 };
    }
}

/// How a round over the slabs ended.
enum Round {
    /// There is nothing left to collapse.
    Settled,
    /// Something was read, or memory is short: later.
    Later,
    /// There are pages to back, or the thread is to end.
    Called,
}

impl State {
    fn slab_bytes(&self) -> u64 {
        self.pool.slab_bytes() as u64
    }

    fn target(&self) -> u64 {
        (self.reached.load(Ordering::Relaxed) + AHEAD_BYTES).min(self.end.load(Ordering::Relaxed))
    }

    fn run(&self) {
        let mut costs = Costs::default();
        let (mut quiet, mut pause) = (QUIET, PAUSE_WORN);
        let mut at_once = WORN_BYTES_AT_ONCE;
        while !self.closed.load(Ordering::Relaxed) {
            if self.back_next(&mut costs) {
                quiet = QUIET;
                continue;
            }
            if self.worn.swap(false, Ordering::Relaxed) {
                quiet = QUIET;
                if self.collapse_worn(&mut at_once) {
                    pause = PAUSE_WORN;
                } else {
                    self.rest(pause);
                    pause = (pause * 2).min(QUIET_MAX);
                }
                continue;
            }
            match self.wait_for_quiet(quiet) {
                Round::Settled => self.sleep(None),
                Round::Later => quiet = (quiet * 2).min(QUIET_MAX),
                Round::Called => {}
            }
        }
    }

    /// Sleeps until it is woken, or for so long.
    fn sleep(&self, time: Option<Duration>) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !self.called() && !self.worn.load(Ordering::Relaxed) {
            match time {
                Some(time) => std::thread::park_timeout(time),
                None => std::thread::park(),
            }
        }
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Sleeps so long, unless there are pages to back or the thread is to end.
    fn rest(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.called()
            && let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            self.asleep.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if !self.called() {
                std::thread::park_timeout(left);
            }
            self.asleep.store(false, Ordering::Relaxed);
        }
    }

    fn called(&self) -> bool {
        self.closed.load(Ordering::Relaxed) || self.next().is_some()
    }

    /// The slab and the place in it that is to be backed next.
    fn next(&self) -> Option<(Arc<Slab>, u64)> {
        let (reached, backed) = (self.reached.load(Ordering::Relaxed), self.backed.load(Ordering::Relaxed));
        let slab_bytes = self.slab_bytes();
        // The reader has overtaken: what it reads into, it backs itself.
        let at = if backed < reached { piece_after(reached, slab_bytes) } else { backed };
        // Only whole pieces, and the rest of a slab: never beyond the end.
        let piece_end = piece_after(at + 1, slab_bytes);
        if at >= self.target() || piece_end > self.end.load(Ordering::Relaxed) {
            return None;
        }
        self.pool.get((at / slab_bytes) as usize).map(|slab| (slab, at))
    }

    /// Backs the next piece. False if there is none.
    fn back_next(&self, costs: &mut Costs) -> bool {
        let Some((slab, at)) = self.next() else { return false };
        let ahead = at.saturating_sub(self.reached.load(Ordering::Relaxed));
        let huge = self.always || self.huge && costs.huge(ahead);
        let begin = Instant::now();
        let done = slab.back_piece((at % self.slab_bytes()) as usize, huge);
        costs.note(huge, begin.elapsed());
        // A kernel that cannot do it (before Linux 5.14) will not be asked again.
        let to = if done.is_ok() { piece_after(at + 1, self.slab_bytes()) } else { u64::MAX };
        self.backed.store(to, Ordering::Relaxed);
        true
    }

    /// Collapses the pieces that weights stream through, each once. False if some could not be for the moment, and none
    /// was. It rests once `at_once` bytes are collapsed.
    fn collapse_worn(&self, at_once: &mut u64) -> bool {
        let (mut done, mut busy) = (false, false);
        let slabs = self.end.load(Ordering::Relaxed).div_ceil(self.slab_bytes());
        for slab in (0..slabs).filter_map(|index| self.pool.get(index as usize)) {
            let mut start = 0;
            while let Some(piece) = slab.worn_piece(start) {
                if self.called() || !room(ROOM_WORN_BYTES_MIN) {
                    // The next read tells of it again.
                    return done;
                }
                // One after the other: the processors wait for the disk meanwhile, and the disk is slow until it is done.
                // The next read tells again of a piece that is busy.
                let begin = Instant::now();
                match slab.collapse_piece(piece) {
                    Collapse::Done => done = true,
                    Collapse::Busy => busy = true,
                    Collapse::Refused => {}
                }
                if *at_once == 0 {
                    self.rest(begin.elapsed() * REST_WORN);
                }
                *at_once = at_once.saturating_sub(HUGE_BYTES as u64);
                start = piece + HUGE_BYTES;
            }
        }
        done || !busy
    }

    /// Collapses what is left, once nothing has been read for some time.
    fn wait_for_quiet(&self, time: Duration) -> Round {
        if !self.huge {
            return Round::Settled;
        }
        let reads = self.reads.load(Ordering::Relaxed);
        let is_quiet = || self.reads.load(Ordering::Relaxed) == reads && self.in_flight.load(Ordering::Relaxed) == 0;
        self.sleep(Some(time));
        let (mut tried, mut refused) = (0, 0);
        while refused < REFUSALS_MAX
            && let Some((slab, start)) = self.small_piece()
        {
            if self.called() || self.worn.load(Ordering::Relaxed) {
                return Round::Called;
            }
            if !is_quiet() || (tried % LOOK_EVERY == 0 && !room(ROOM_BYTES_MIN)) {
                return Round::Later;
            }
            let begin = Instant::now();
            let done = slab.collapse_piece(start);
            if done == Collapse::Busy {
                return Round::Later;
            }
            (tried, refused) = (tried + 1, if done == Collapse::Done { 0 } else { refused + 1 });
            self.rest(begin.elapsed() * REST);
        }
        Round::Settled
    }

    /// The first piece in use that may lie in small pages.
    fn small_piece(&self) -> Option<(Arc<Slab>, usize)> {
        let used = self.reached.load(Ordering::Relaxed).max(self.backed.load(Ordering::Relaxed));
        let end = used.min(self.end.load(Ordering::Relaxed));
        (0..end.div_ceil(self.slab_bytes())).find_map(|index| {
            let slab = self.pool.get(index as usize)?;
            let start = slab.small_piece()?;
            let piece_end = index * self.slab_bytes() + (start + HUGE_BYTES) as u64;
            (piece_end <= end).then_some((slab, start))
        })
    }
}

fn room(bytes_min: u64) -> bool {
    crate::limits::memory_limits().available_bytes().is_none_or(|bytes| bytes >= bytes_min)
}

/// The first place from `at` on where a piece of a slab begins: pieces are as long as a huge page, but for the last.
fn piece_after(at: u64, slab_bytes: u64) -> u64 {
    let slab = at / slab_bytes;
    let within = (at % slab_bytes).next_multiple_of(HUGE_BYTES as u64);
    slab * slab_bytes + within.min(slab_bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::SlabOptions;

    const SLAB: usize = (9 << 20) + 8192;

    fn pool(huge_pages: HugePages) -> Arc<SlabPool> {
        Arc::new(SlabPool::new(SLAB, SlabOptions { huge_pages, ..SlabOptions::default() }).unwrap())
    }

    fn until(what: &str, mut done: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Pages of a range that the system has backed.
    #[cfg(target_os = "linux")]
    fn resident(slab: &Slab) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (start, end) = (slab.as_ptr().addr(), slab.as_ptr().addr() + slab.len());
        let (mut within, mut sum) = (false, 0);
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            let first = words.next().unwrap_or("");
            if let Some((from, to)) = first.split_once('-')
                && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
            {
                within = from < end && to > start;
            } else if first == "Rss:" && within {
                sum += words.next().unwrap().parse::<u64>().unwrap() << 10;
            }
        }
        sum
    }

    #[test]
    fn pieces_begin_on_huge_pages_and_at_slabs() {
        let (slab, piece) = (SLAB as u64, HUGE_BYTES as u64);
        for (at, expected) in [
            (0, 0),
            (1, piece),
            (piece, piece),
            (4 * piece + 1, slab),
            (slab, slab),
            (slab + 1, slab + piece),
            (2 * slab - 1, 2 * slab),
        ] {
            assert_eq!(piece_after(at, slab), expected, "{at}");
        }
    }

    #[test]
    fn huge_pages_are_taken_while_they_hold_nobody_up() {
        let mut costs = Costs::default();
        assert!(costs.huge(0), "nothing is known yet");
        costs.note(true, Duration::from_millis(6));
        assert!(!costs.huge(AT_EASE_BYTES - 1) && costs.huge(AT_EASE_BYTES));
        costs.note(false, Duration::from_millis(5));
        assert!(costs.huge(0), "small ones take as long");
        (0..40).for_each(|_| costs.note(false, Duration::from_micros(500)));
        assert!(!costs.huge(0));
        (0..40).for_each(|_| costs.note(true, Duration::from_micros(200)));
        assert!(costs.huge(0), "they have become cheap");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pages_are_there_ahead_of_the_reader_and_never_beyond_the_end() {
        for huge in [HugePages::Auto, HugePages::Off] {
            let pool = pool(huge);
            let mut backing = Backing::start(&pool).unwrap();
            // The end lies in the second slab, and in the middle of a huge page.
            let end = SLAB as u64 + (5 << 20);
            backing.set_end(end);
            until("the thread backs what lies ahead", || backing.state.next().is_none());
            assert_eq!(pool.backed_bytes(), 2 * SLAB as u64);
            let (first, second) = (pool.get(0).unwrap(), pool.get(1).unwrap());
            assert!(resident(&first) >= SLAB as u64, "{}", resident(&first));
            assert!(backing.state.backed.load(Ordering::Relaxed) <= end);
            backing.read_begins(end);
            backing.read_ends();
            if huge == HugePages::Off {
                assert_eq!(pool.huge_bytes(), 0);
            }
            // A lowered end is obeyed, and a slab that was released comes back with a raised one only.
            backing.set_end(SLAB as u64);
            drop(second);
            pool.release(1);
            backing.released(1);
            backing.read_begins(SLAB as u64);
            backing.read_ends();
            assert!(pool.get(1).is_none());
            assert!(pool.huge_bytes() <= SLAB as u64, "a slab's huge pages go with it");
            backing.set_end(end);
            assert!(pool.get(1).is_some());
            drop((first, backing));
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_read_while_it_is_collapsed_stays_what_it_is() {
        let pool = pool(HugePages::Auto);
        let slab = pool.ensure(0).unwrap();
        let mut all = slab.claim(0, SLAB).unwrap();
        let value = |at: usize| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8;
        overspill_core::seam::Buffer::bytes_mut(&mut all).iter_mut().enumerate().for_each(|(at, b)| *b = value(at));
        let view = all.freeze();
        let mut backing = Backing::start(&pool).unwrap();
        backing.set_end(SLAB as u64);
        backing.read_begins(SLAB as u64);
        std::thread::sleep(QUIET * 2);
        let before = pool.huge_bytes();
        backing.read_ends();
        let settled = || slab.small_piece().is_none() || backing.state.asleep.load(Ordering::Relaxed);
        let begin = Instant::now();
        while begin.elapsed() < QUIET * 4 || !settled() {
            assert!(view.iter().enumerate().all(|(at, &b)| b == value(at)));
            assert!(begin.elapsed() < Duration::from_secs(60));
        }
        eprintln!("{before} bytes in huge pages while a read was under way, {} afterwards", pool.huge_bytes());
        assert_eq!(before, 0, "nothing is collapsed while something is read");
    }

    /// Slabs in small pages, as if memory had been short when they were first read into.
    #[test]
    #[cfg(target_os = "linux")]
    fn what_weights_stream_through_comes_into_huge_pages_while_reads_go_on() {
        let pool = pool(HugePages::Auto);
        let mut backing = Backing::start(&pool).unwrap();
        let slab = pool.ensure(0).unwrap();
        // Touched here, before any huge page was allowed.
        let mut all = slab.claim(0, SLAB).unwrap();
        overspill_core::seam::Buffer::bytes_mut(&mut all).fill(1);
        drop(all);
        assert!(!backing.read_begins(SLAB as u64), "the first time");
        backing.set_end(SLAB as u64);
        let other = pool.ensure(1).unwrap();
        overspill_core::seam::Buffer::bytes_mut(&mut other.claim(0, HUGE_BYTES).unwrap()).fill(1);
        if !backing.state.huge || other.collapse_piece(0) != Collapse::Done {
            return eprintln!("this system has no huge pages, or does not collapse small ones");
        }
        let before = pool.huge_bytes();
        // Another read is under way all the time: it is never quiet.
        let slot = slab.claim(HUGE_BYTES, HUGE_BYTES).unwrap();
        until("the piece that is read into again is collapsed", || {
            backing.read_again(&slot);
            pool.huge_bytes() > before
        });
        assert_eq!(slab.worn_piece(0), None);
        let untouched = slab.small_piece();
        assert_eq!(untouched, Some(0), "the others wait until it is quiet");
        backing.read_ends();
    }

    #[test]
    fn a_piece_is_worn_by_three_reads_of_all_of_it() {
        let pool = pool(HugePages::Off);
        let slab = pool.ensure(0).unwrap();
        let half = HUGE_BYTES / 2;
        assert!(!slab.wear(0..HUGE_BYTES) && !slab.wear(0..HUGE_BYTES) && !slab.wear(0..half));
        assert_eq!(slab.worn_piece(0), None);
        assert!(slab.wear(half..HUGE_BYTES + half), "its other half; the next piece has half of one");
        assert_eq!((slab.worn_piece(0), slab.worn_piece(HUGE_BYTES)), (Some(0), None));
        assert!((0..300).all(|_| slab.wear(0..HUGE_BYTES)), "it stays worn");
        assert!((0..300).any(|_| slab.wear(HUGE_BYTES..HUGE_BYTES + 4096)), "small slots wear it too");
        assert_eq!(slab.worn_piece(HUGE_BYTES), Some(HUGE_BYTES));
        assert!(!slab.wear(slab.len() - 4096..slab.len()), "no whole piece");
    }

    #[test]
    fn a_slot_below_the_highest_was_read_into_before() {
        let mut backing = Backing::start(&pool(HugePages::Off)).unwrap();
        for (end, again) in [(4 << 20, false), (8 << 20, false), (4 << 20, true), (8 << 20, true), (9 << 20, false)] {
            assert_eq!(backing.read_begins(end), again, "{end}");
        }
        backing.released(0);
        assert!(!backing.read_begins(4 << 20), "a slab that is new again");
    }
}
