//! What an engine's events amount to: stretches of time on rows (compute, waiting, each wire), and moments (evictions,
//! predictions). The trace file and the report's picture are both made of these.

use overspill::{BlockId, Catalog, Engine, Event, Events, SequenceId, StepId, TierId};
use overspill_infer::generate::Runtime;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Where a span is drawn. Spans of one row never overlap; transfers that do are on different lanes of their wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    /// A sequence computes. On a GPU the next step may begin before the one before has ended.
    Compute(SequenceId, usize),
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

/// Puts what happened on rows.
#[derive(Debug, Default)]
pub struct Collector {
    disk: Lanes,
    bus: Lanes,
    stalls: Lanes,
    /// A sequence's at its number.
    compute: Vec<Lanes>,
}

/// When each lane of a row is free again. What is put on them comes in the order in which it ended.
#[derive(Debug, Default)]
struct Lanes(Vec<u64>);

impl Lanes {
    /// The lane of a stretch: of those that are free, the one that has been so for the shortest time, which takes the
    /// fewest lanes.
    fn put(&mut self, from_ns: u64, to_ns: u64) -> usize {
        let free = self.0.iter().enumerate().filter(|&(_, &until)| until <= from_ns);
        let lane = free.max_by_key(|&(lane, &until)| (until, std::cmp::Reverse(lane))).map(|(lane, _)| lane);
        let lane = lane.unwrap_or(self.0.len());
        match self.0.get_mut(lane) {
            Some(until) => *until = to_ns,
            None => self.0.push(to_ns),
        }
        lane
    }
}

/// Sequences that have rows of their own; what is beyond shares the last.
const SEQUENCES_MAX: usize = 256;

impl Collector {
    /// The span of an event; `None` for events that this does not know.
    pub fn take(&mut self, event: &Event) -> Option<Span> {
        let moment = |row, at_ns, what| Span { row, start_ns: at_ns, end_ns: at_ns, what };
        Some(match *event {
            Event::Read { from_ns, at_ns, block, tier, bytes, speculative } => Span {
                row: Row::Disk(self.disk.put(from_ns, at_ns)),
                start_ns: from_ns,
                end_ns: at_ns,
                what: What::Transfer { block, tier, bytes: Some(bytes), speculative },
            },
            Event::Uploaded { from_ns, at_ns, block, tier } => Span {
                row: Row::Bus(self.bus.put(from_ns, at_ns)),
                start_ns: from_ns,
                end_ns: at_ns,
                what: What::Transfer { block, tier, bytes: None, speculative: false },
            },
            Event::Evicted { at_ns, block, tier } => moment(Row::Evictions, at_ns, What::Evicted { block, tier }),
            Event::Stalled { at_ns, ns, blocks } => {
                let start_ns = at_ns.saturating_sub(ns);
                let row = Row::Stall(self.stalls.put(start_ns, at_ns));
                Span { row, start_ns, end_ns: at_ns, what: What::Wait { blocks } }
            }
            Event::Step { from_ns, at_ns, sequence, step, blocks } => {
                let index = (sequence.0 as usize).min(SEQUENCES_MAX - 1);
                if self.compute.len() <= index {
                    self.compute.resize_with(index + 1, Lanes::default);
                }
                let row = Row::Compute(SequenceId(index as u32), self.compute[index].put(from_ns, at_ns));
                Span { row, start_ns: from_ns, end_ns: at_ns, what: What::Step { step, blocks } }
            }
            Event::Expected { at_ns, step, blocks, probability_milli, .. } => {
                moment(Row::Predictions, at_ns, What::Expected { step, blocks, probability_milli })
            }
            _ => return None,
        })
    }
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

    /// The block that a step begins with.
    pub fn first_block(&self, step: StepId) -> Option<BlockId> {
        self.first_blocks.get(step.index()).copied().flatten()
    }

    /// `host` or `gpu`.
    pub fn tier(&self, tier: TierId) -> &'static str {
        if tier == self.engine.host_tier() { "host" } else { "gpu" }
    }
}

/// Hands a watched engine's spans out as they come, from a thread of its own.
#[derive(Debug)]
pub struct Follower<T> {
    events: Arc<Events>,
    worker: JoinHandle<T>,
}

impl<T: Send + 'static> Follower<T> {
    /// Begins. About every `period`, `take` gets what happened, and it makes the result when there is no more.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(
        engine: &Engine,
        name: &str,
        period: Duration,
        mut take: impl FnMut(&mut Collector, &[Event], End) -> Option<T> + Send + 'static,
    ) -> io::Result<Self> {
        let events = Arc::new(engine.subscribe());
        let mine = Arc::clone(&events);
        let follow = move || {
            let (mut collector, mut batch) = (Collector::default(), Vec::new());
            loop {
                let more = mine.take(&mut batch, period);
                let end = if more { End::NotYet } else { End::Now { missed: mine.missed() } };
                if let Some(result) = take(&mut collector, &batch, end) {
                    mine.end();
                    return result;
                }
            }
        };
        let worker = std::thread::Builder::new().name(name.to_owned()).spawn(follow)?;
        Ok(Self { events, worker })
    }

    /// Ends at once; what was made of all that happened so far.
    ///
    /// # Errors
    /// The thread broke off.
    pub fn finish(self) -> std::thread::Result<T> {
        self.events.end();
        self.worker.join()
    }
}

/// Whether a batch of events is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// There are more to come.
    NotYet,
    /// It is, and so many were missed.
    Now {
        /// Too many came at once.
        missed: u64,
    },
}

/// Keeps the spans of an engine, for a picture.
#[derive(Debug)]
pub struct Recorder(Follower<Vec<Span>>);

/// Spans that are kept: enough for any few tokens, and no more than some tens of MiB.
const SPANS_MAX: usize = 400_000;

impl Recorder {
    /// Begins. `None` if there is no thread to be had.
    pub fn start(engine: &Engine) -> Option<Self> {
        let mut spans = Vec::new();
        let record = move |collector: &mut Collector, batch: &[Event], end| {
            for span in batch.iter().filter_map(|event| collector.take(event)) {
                if spans.len() < SPANS_MAX {
                    spans.push(span);
                }
            }
            (end != End::NotYet).then(|| std::mem::take(&mut spans))
        };
        Follower::start(engine, "overspill-record", Duration::from_millis(100), record).ok().map(Self)
    }

    /// What was recorded.
    pub fn finish(self) -> Vec<Span> {
        self.0.finish().unwrap_or_default()
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

    fn read(from_ns: u64, at_ns: u64, block: u32) -> Event {
        let (block, tier) = (BlockId(block), TierId(0));
        Event::Read { from_ns, at_ns, block, tier, bytes: 4096, speculative: block.0 == 2 }
    }

    fn step(from_ns: u64, at_ns: u64, step: u32) -> Event {
        Event::Step { from_ns, at_ns, sequence: SequenceId(0), step: StepId(step), blocks: 1 }
    }

    #[test]
    fn what_overlaps_is_on_lanes_of_its_own_and_no_more_than_it_takes() {
        let mut collector = Collector::default();
        let events = [read(0, 10, 1), read(11, 12, 4), read(5, 20, 2), read(12, 21, 3), read(20, 22, 5)];
        let spans: Vec<Span> = events.iter().filter_map(|event| collector.take(event)).collect();
        let rows: Vec<_> = spans.iter().map(|span| (span.row, span.start_ns, span.end_ns)).collect();
        let (a, b) = (Row::Disk(0), Row::Disk(1));
        assert_eq!(rows, [(a, 0, 10), (a, 11, 12), (b, 5, 20), (a, 12, 21), (b, 20, 22)]);
        assert!(matches!(spans[2].what, What::Transfer { speculative: true, bytes: Some(4096), .. }));
        let overlap =
            [step(0, 10, 0), step(8, 20, 1), step(20, 30, 2)].map(|event| collector.take(&event).unwrap().row);
        let row = |lane| Row::Compute(SequenceId(0), lane);
        assert_eq!(overlap, [row(0), row(1), row(1)]);
        let late = Event::Step { from_ns: 0, at_ns: 1, sequence: SequenceId(u32::MAX), step: StepId(0), blocks: 1 };
        assert!(matches!(collector.take(&late).unwrap().row, Row::Compute(SequenceId(255), 0)), "memory is bounded");
    }

    #[test]
    fn the_last_whole_token_is_cut_out() {
        let mut collector = Collector::default();
        let mut events = Vec::new();
        for token in 0..3u64 {
            let at = token * 1_000_000;
            events.push(Event::Stalled { at_ns: at + 400_000, ns: 400_000, blocks: 2 });
            events.extend([step(at + 400_000, at + 500_000, 0), step(at + 500_000, at + 1_000_000, 1)]);
        }
        events.push(read(900_000, 1_300_000, 7));
        let spans: Vec<Span> = events.iter().filter_map(|event| collector.take(event)).collect();
        let (length, token) = last_token(&spans).unwrap();
        assert_eq!(length, 1_000_000);
        let of = |row: Row| token.iter().filter(|s| s.row == row).map(|s| (s.start_ns, s.end_ns)).collect::<Vec<_>>();
        assert_eq!(of(Row::Compute(SequenceId(0), 0)).last(), Some(&(500_000, 1_000_000)));
        assert_eq!(of(Row::Disk(0)), [(0, 300_000)], "cut at the token's beginning");
        assert!(of(Row::Stall(0)).contains(&(0, 400_000)));
        assert!(last_token(&spans[..2]).is_none());
    }
}
