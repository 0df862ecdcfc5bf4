//! Modelled wires: a disk, or the link by which a tier is filled from another.
//!
//! Up to `depth` requests are under way at once. Their latencies overlap; their bytes go one after the other. What
//! somebody waits for goes before what is brought ahead, unless that has begun.

use overspill_core::{BlockId, Nanos, SlotId, TierId, TransferId};
use std::collections::VecDeque;

/// What a wire can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireModel {
    /// Its name in reports.
    pub label: String,
    /// Bytes per second when it is never idle; at least 1.
    pub bytes_per_s: u64,
    /// Nanoseconds from a request to its first byte.
    pub latency_ns: Nanos,
    /// Requests under way at once; at least 1.
    pub depth: u32,
    /// How long it saves up, while it is idle, what it could have carried: a volume or a control group whose speed is
    /// bounded does so, and makes good for short pauses. 0: a wire that is idle has lost that time.
    pub burst_ns: Nanos,
}

impl WireModel {
    /// Nanoseconds for so many bytes, without latency.
    #[must_use]
    pub fn duration_ns(&self, bytes: u64) -> Nanos {
        let ns = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_s.max(1));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }
}

/// Where the bytes of a transfer come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) tier: TierId,
    pub(crate) slot: SlotId,
}

/// A transfer as the body knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) transfer: TransferId,
    pub(crate) block: BlockId,
    pub(crate) tier: TierId,
    pub(crate) slot: SlotId,
    /// `None`: from disk.
    pub(crate) from: Option<Source>,
    pub(crate) bytes: u64,
    pub(crate) speculative: bool,
}

/// What chance does to a request when it begins.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Luck {
    pub(crate) fails: bool,
    /// Added to the latency; lets others end first.
    pub(crate) delay_ns: Nanos,
    /// The wire is so many times slower; 0 counts as 1.
    pub(crate) slower: u32,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Flying {
    pub(crate) request: Request,
    pub(crate) done_at: Nanos,
    pub(crate) fails: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Wire {
    pub(crate) model: WireModel,
    demanded: VecDeque<Request>,
    speculative: VecDeque<Request>,
    /// In the order in which they end.
    flying: VecDeque<Flying>,
    /// When all that has begun is carried, by a clock that is ahead by what the wire may save up. It was idle before, so it
    /// begins with something saved; with half, since what counts in slices carries a slice's bytes at the slice's begin
    /// and then nothing, so a long read is half a slice ahead on average.
    free_at: Nanos,
    /// Bytes and their duration, since most requests are alike.
    last: (u64, Nanos),
    pub(crate) bytes_done: u64,
    pub(crate) busy_ns: Nanos,
}

impl Wire {
    pub(crate) fn new(model: WireModel) -> Self {
        Self {
            free_at: model.burst_ns / 2,
            model,
            demanded: VecDeque::new(),
            speculative: VecDeque::new(),
            flying: VecDeque::new(),
            last: (0, 0),
            bytes_done: 0,
            busy_ns: 0,
        }
    }

    pub(crate) fn submit(&mut self, request: Request) {
        if request.speculative { self.speculative.push_back(request) } else { self.demanded.push_back(request) }
    }

    /// Whether a request waits and could begin.
    pub(crate) fn can_begin(&self) -> bool {
        self.flying.len() < self.model.depth.max(1) as usize
            && !(self.demanded.is_empty() && self.speculative.is_empty())
    }

    /// The request that begins next.
    pub(crate) fn peek(&self) -> Option<&Request> {
        self.demanded.front().or_else(|| self.speculative.front())
    }

    /// Begins a request. True if it is now the first to end.
    pub(crate) fn begin(&mut self, now: Nanos, luck: Luck) -> bool {
        let Some(request) = self.demanded.pop_front().or_else(|| self.speculative.pop_front()) else { return false };
        if self.last.0 != request.bytes {
            self.last = (request.bytes, self.model.duration_ns(request.bytes));
        }
        let duration = self.last.1.saturating_mul(u64::from(luck.slower.max(1)));
        let arrives = now.saturating_add(self.model.latency_ns);
        let saved = self.model.burst_ns;
        let earliest = if saved > 0 { now } else { arrives };
        self.free_at = earliest.max(self.free_at).saturating_add(duration);
        self.busy_ns += duration;
        let done_at = self.free_at.saturating_sub(saved).max(arrives).saturating_add(luck.delay_ns);
        let at = self.flying.iter().rposition(|f| f.done_at <= done_at).map_or(0, |at| at + 1);
        self.flying.insert(at, Flying { request, done_at, fails: luck.fails });
        at == 0
    }

    /// When the first transfer under way ends.
    pub(crate) fn next_done(&self) -> Option<Nanos> {
        self.flying.front().map(|f| f.done_at)
    }

    pub(crate) fn finish(&mut self) -> Option<Flying> {
        let flying = self.flying.pop_front()?;
        self.bytes_done += flying.request.bytes;
        Some(flying)
    }

    /// Takes back a request that has not begun.
    pub(crate) fn cancel(&mut self, transfer: TransferId) -> Option<Request> {
        for queue in [&mut self.speculative, &mut self.demanded] {
            if let Some(at) = queue.iter().position(|r| r.transfer == transfer) {
                return queue.remove(at);
            }
        }
        None
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.flying.is_empty() && self.demanded.is_empty() && self.speculative.is_empty()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn request(id: u64, speculative: bool) -> Request {
        Request {
            transfer: TransferId(id),
            block: BlockId(0),
            tier: TierId(0),
            slot: SlotId(0),
            from: None,
            bytes: 1000,
            speculative,
        }
    }

    /// A throttled disk that was idle carries at once what it has saved up, but not more, and not before the latency.
    #[test]
    fn what_was_saved_up_is_carried_at_once() {
        let done_at = |burst_ns: Nanos, begun_at: Nanos| {
            let disk =
                WireModel { label: "disk".into(), bytes_per_s: 1_000_000_000, latency_ns: 500, depth: 8, burst_ns };
            let mut wire = Wire::new(disk);
            (0..4).for_each(|id| wire.submit(request(id, false)));
            while wire.can_begin() {
                wire.begin(begun_at, Luck::default());
            }
            let ended = std::iter::from_fn(|| wire.finish().map(|flying| flying.done_at - begun_at));
            ended.collect()
        };
        let done: [Vec<Nanos>; 3] = [done_at(0, 10_000), done_at(2000, 10_000), done_at(2000, 0)];
        // Before the clock began it was idle, too.
        let (all, half) = (vec![500, 500, 1000, 2000], vec![500, 1000, 2000, 3000]);
        assert_eq!(done, [vec![1500, 2500, 3500, 4500], all, half]);
    }

    fn run(depth: u32, requests: &[Request]) -> Vec<(u64, Nanos)> {
        let model = WireModel { label: "disk".into(), bytes_per_s: 1_000_000_000, latency_ns: 500, depth, burst_ns: 0 };
        let mut wire = Wire::new(model);
        requests.iter().for_each(|r| wire.submit(*r));
        let (mut now, mut done) = (0, Vec::new());
        while !wire.is_idle() {
            while wire.can_begin() {
                wire.begin(now, Luck::default());
            }
            now = wire.next_done().unwrap();
            done.push((wire.finish().unwrap().request.transfer.0, now));
        }
        done
    }

    #[test]
    fn latencies_overlap_with_depth_and_bytes_do_not() {
        let three = [request(1, false), request(2, false), request(3, false)];
        assert_eq!(run(1, &three), [(1, 1500), (2, 3000), (3, 4500)]);
        assert_eq!(run(8, &three), [(1, 1500), (2, 2500), (3, 3500)]);
    }

    /// Invariant 7: what somebody waits for goes before what is brought ahead.
    #[test]
    fn demanded_requests_overtake_speculative_ones() {
        let mixed = [request(1, true), request(2, true), request(3, false)];
        assert_eq!(run(1, &mixed).iter().map(|d| d.0).collect::<Vec<_>>(), [3, 1, 2]);
    }
}
