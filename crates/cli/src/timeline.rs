//! What an engine's events amount to: stretches of time on rows (compute, waiting, each wire), and moments (evictions,
//! predictions). The trace file and the report's picture are both made of these.

use overspill::{BlockId, Catalog, Engine, Event, SequenceId, StepId, TierId};
use overspill_infer::generate::Runtime;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Where a span is drawn. Spans of one row never overlap; transfers that do are on different lanes of their wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    /// A sequence computes.
    Compute(u32),
    /// Somebody waits for blocks.
    Stall(usize),
    /// Reads from disk.
    Disk(usize),
    /// Copies up to a GPU.
    Bus(usize),
    /// Blocks that go.
    Evictions,
    /// What a sequence expects.
    Predictions,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A step was computed.
    Step {
        /// Which.
        step: StepId,
        /// With how many blocks.
        blocks: usize,
    },
    /// A set of blocks was waited for.
    Wait {
        /// How many they are.
        blocks: usize,
    },
    /// A block crossed a wire.
    Transfer {
        /// Which.
        block: BlockId,
        /// Into which tier.
        tier: TierId,
        /// Bytes, padding included; 0 if it failed, absent if it was a copy.
        bytes: Option<u64>,
        /// Whether nobody had asked for it when it began.
        speculative: bool,
    },
    /// A block went.
    Evicted {
        /// Which.
        block: BlockId,
        /// From which tier.
        tier: TierId,
    },
    /// A step will probably use some blocks.
    Expected {
        /// Which step.
        step: StepId,
        /// How many blocks.
        blocks: usize,
        /// In thousandths.
        probability_milli: u16,
    },
}

/// A stretch of time on a row; a moment if it ends where it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where.
    pub row: Row,
    /// From, in nanoseconds since the engine was opened.
    pub start_ns: u64,
    /// To.
    pub end_ns: u64,
    /// What.
    pub what: What,
}

/// Puts beginnings and ends together.
#[derive(Debug, Default)]
pub struct Collector {
    reads: BTreeMap<(TierId, BlockId), Open>,
    uploads: BTreeMap<(TierId, BlockId), Open>,
    steps: BTreeMap<(SequenceId, StepId), (u64, usize)>,
    disk_lanes: Lanes,
    bus_lanes: Lanes,
    /// When each row of stalls is free again.
    stalls: Vec<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    at_ns: u64,
    lane: usize,
    speculative: bool,
}

/// Rows of a wire that are taken.
#[derive(Debug, Default)]
struct Lanes(Vec<bool>);

impl Lanes {
    fn take(&mut self) -> usize {
        let free = self.0.iter().position(|taken| !taken);
        let lane = free.unwrap_or(self.0.len());
        match self.0.get_mut(lane) {
            Some(taken) => *taken = true,
            None => self.0.push(true),
        }
        lane
    }

    fn give(&mut self, lane: usize) {
        if let Some(taken) = self.0.get_mut(lane) {
            *taken = false;
        }
    }
}

impl Collector {
    /// The span that an event ends, if it ends one. Ends without a beginning (the trace began between them) are left out.
    pub fn take(&mut self, event: &Event) -> Option<Span> {
        match *event {
            Event::ReadStarted { at_ns, block, tier, speculative } => {
                let lane = self.disk_lanes.take();
                self.reads.insert((tier, block), Open { at_ns, lane, speculative });
                None
            }
            Event::ReadEnded { at_ns, block, tier, bytes } => {
                let open = self.reads.remove(&(tier, block))?;
                self.disk_lanes.give(open.lane);
                Some(transfer(Row::Disk(open.lane), open, at_ns, block, tier, Some(bytes)))
            }
            Event::UploadStarted { at_ns, block, tier } => {
                let lane = self.bus_lanes.take();
                self.uploads.insert((tier, block), Open { at_ns, lane, speculative: false });
                None
            }
            Event::Uploaded { at_ns, block, tier } => {
                let open = self.uploads.remove(&(tier, block))?;
                self.bus_lanes.give(open.lane);
                Some(transfer(Row::Bus(open.lane), open, at_ns, block, tier, None))
            }
            Event::Evicted { at_ns, block, tier } => {
                let what = What::Evicted { block, tier };
                Some(Span { row: Row::Evictions, start_ns: at_ns, end_ns: at_ns, what })
            }
            Event::Stalled { at_ns, ns, blocks } => {
                let start_ns = at_ns.saturating_sub(ns);
                let free = self.stalls.iter().position(|&until| until <= start_ns);
                let lane = free.unwrap_or(self.stalls.len());
                match self.stalls.get_mut(lane) {
                    Some(until) => *until = at_ns,
                    None => self.stalls.push(at_ns),
                }
                Some(Span { row: Row::Stall(lane), start_ns, end_ns: at_ns, what: What::Wait { blocks } })
            }
            Event::StepBegan { at_ns, sequence, step, blocks } => {
                self.steps.insert((sequence, step), (at_ns, blocks));
                None
            }
            Event::StepEnded { at_ns, sequence, step } => {
                let (start_ns, blocks) = self.steps.remove(&(sequence, step))?;
                let what = What::Step { step, blocks };
                Some(Span { row: Row::Compute(sequence.0), start_ns, end_ns: at_ns, what })
            }
            Event::Expected { at_ns, step, blocks, probability_milli, .. } => {
                let what = What::Expected { step, blocks, probability_milli };
                Some(Span { row: Row::Predictions, start_ns: at_ns, end_ns: at_ns, what })
            }
            _ => None,
        }
    }
}

fn transfer(row: Row, open: Open, end_ns: u64, block: BlockId, tier: TierId, bytes: Option<u64>) -> Span {
    let what = What::Transfer { block, tier, bytes, speculative: open.speculative };
    Span { row, start_ns: open.at_ns, end_ns, what }
}

/// What numbers of blocks, steps and tiers stand for.
#[derive(Debug)]
pub struct Names {
    engine: Engine,
    first_blocks: Vec<Option<BlockId>>,
}

impl Names {
    /// Of a model that is ready to run.
    pub fn of(runtime: &Runtime) -> Self {
        let steps = &runtime.model().plan().steps;
        let first_blocks = steps.iter().map(|step| step.blocks.first().copied()).collect();
        Self { engine: runtime.engine().clone(), first_blocks }
    }

    /// The model's tensors and blocks.
    pub fn catalog(&self) -> &Catalog {
        self.engine.catalog()
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The tensor that a block begins with.
    pub fn block(&self, block: BlockId) -> &str {
        let catalog = self.engine.catalog();
        if block.index() >= catalog.blocks().len() {
            return "?";
        }
        catalog.parts(block).first().map_or("?", |part| catalog.tensor(part.tensor).name.as_str())
    }

    /// The tensor that a step begins with.
    pub fn step(&self, step: StepId) -> &str {
        self.first_blocks.get(step.index()).copied().flatten().map_or("?", |block| self.block(block))
    }

    /// `host` or `gpu`.
    pub fn tier(&self, tier: TierId) -> &'static str {
        if tier == self.engine.host_tier() { "host" } else { "gpu" }
    }
}

/// Keeps the spans of an engine, for a picture.
#[derive(Debug)]
pub struct Recorder {
    stop: Arc<AtomicBool>,
    worker: JoinHandle<Vec<Span>>,
}

/// Spans that are kept: enough for any few tokens, and no more than some tens of MiB.
const SPANS_MAX: usize = 400_000;

impl Recorder {
    /// Begins. `None` if there is no thread to be had.
    pub fn start(engine: &Engine) -> Option<Self> {
        let events = engine.subscribe();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let record = move || {
            let (mut collector, mut spans) = (Collector::default(), Vec::new());
            loop {
                match events.recv_timeout(Duration::from_millis(20)) {
                    Ok(event) => {
                        let span = collector.take(&event);
                        if spans.len() < SPANS_MAX {
                            spans.extend(span);
                        }
                    }
                    Err(error) if error.is_disconnected() || asked.load(Ordering::Acquire) => return spans,
                    Err(_) => {}
                }
            }
        };
        let worker = std::thread::Builder::new().name("overspill-record".into()).spawn(record).ok()?;
        Some(Self { stop, worker })
    }

    /// What was recorded.
    pub fn finish(self) -> Vec<Span> {
        self.stop.store(true, Ordering::Release);
        self.worker.join().unwrap_or_default()
    }
}

/// The spans of the last token that was decoded whole, cut at its ends; times count from its beginning. `None` if there
/// is none.
pub fn last_token(spans: &[Span]) -> Option<(u64, Vec<Span>)> {
    let mut begins: Vec<u64> = spans
        .iter()
        .filter(|span| matches!(span.what, What::Step { step, .. } if step == StepId(0)))
        .map(|span| span.start_ns)
        .collect();
    begins.sort_unstable();
    // Waiting for a token's first step belongs to that token.
    let begin = |at: u64| {
        let waited = spans.iter().find(|span| matches!(span.row, Row::Stall(_)) && span.end_ns.abs_diff(at) < 50_000);
        waited.filter(|span| span.end_ns <= at + 50_000).map_or(at, |span| span.start_ns)
    };
    let [.., from, to] = begins.as_slice() else { return None };
    let (from, to) = (begin(*from), begin(*to));
    if to <= from {
        return None;
    }
    let inside = spans.iter().filter(|span| span.start_ns < to && span.end_ns >= from);
    let cut = inside.map(|span| Span {
        start_ns: span.start_ns.max(from) - from,
        end_ns: span.end_ns.min(to).max(from) - from,
        ..*span
    });
    Some((to - from, cut.collect()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn read(at_ns: u64, block: u32) -> Event {
        Event::ReadStarted { at_ns, block: BlockId(block), tier: TierId(0), speculative: block == 2 }
    }

    fn read_end(at_ns: u64, block: u32) -> Event {
        Event::ReadEnded { at_ns, block: BlockId(block), tier: TierId(0), bytes: 4096 }
    }

    fn step(from: u64, to: u64, step: u32) -> [Event; 2] {
        let (sequence, step) = (SequenceId(0), StepId(step));
        [Event::StepBegan { at_ns: from, sequence, step, blocks: 1 }, Event::StepEnded { at_ns: to, sequence, step }]
    }

    #[test]
    fn reads_that_overlap_are_on_lanes_of_their_own() {
        let mut collector = Collector::default();
        let events = [read(0, 1), read(5, 2), read_end(10, 1), read(11, 3), read_end(20, 2), read_end(21, 3)];
        let spans: Vec<Span> = events.iter().filter_map(|event| collector.take(event)).collect();
        let rows: Vec<_> = spans.iter().map(|span| (span.row, span.start_ns, span.end_ns)).collect();
        assert_eq!(rows, [(Row::Disk(0), 0, 10), (Row::Disk(1), 5, 20), (Row::Disk(0), 11, 21)]);
        assert!(matches!(spans[1].what, What::Transfer { speculative: true, bytes: Some(4096), .. }));
        assert_eq!(collector.take(&read_end(30, 9)), None, "an end without a beginning");
    }

    #[test]
    fn the_last_whole_token_is_cut_out() {
        let mut collector = Collector::default();
        let mut events = Vec::new();
        for token in 0..3u64 {
            let at = token * 1_000_000;
            events.push(Event::Stalled { at_ns: at + 400_000, ns: 400_000, blocks: 2 });
            events.extend(step(at + 400_000, at + 500_000, 0));
            events.extend(step(at + 500_000, at + 1_000_000, 1));
        }
        events.insert(4, read(900_000, 7));
        events.push(read_end(1_300_000, 7));
        let spans: Vec<Span> = events.iter().filter_map(|event| collector.take(event)).collect();
        let (length, token) = last_token(&spans).unwrap();
        assert_eq!(length, 1_000_000);
        let of = |row: Row| token.iter().filter(|s| s.row == row).map(|s| (s.start_ns, s.end_ns)).collect::<Vec<_>>();
        assert_eq!(of(Row::Compute(0)).last(), Some(&(500_000, 1_000_000)));
        assert_eq!(of(Row::Disk(0)), [(0, 300_000)], "cut at the token's beginning");
        assert!(of(Row::Stall(0)).contains(&(0, 400_000)));
        assert!(last_token(&spans[..2]).is_none());
    }
}
