//! Which experts the steps of a mixture choose: by chance of several kinds, or as a recorded conversation did.

use crate::rng::Rng;

/// What choices look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Habit {
    /// Every expert as likely as every other. No cache beats its share of the experts.
    #[default]
    Uniform,
    /// The k-th most popular expert of a layer comes k times less often than the first.
    Zipf,
    /// Each expert that the last token chose stays with this probability, in thousandths; the others are drawn.
    Sticky {
        /// Thousandths.
        stay_milli: u16,
    },
    /// The more recently an expert was chosen, the likelier it comes again: a cache of the least recently used of each
    /// layer hits as often, at each share of the experts, as it does on recorded routing of Qwen3-30B-A3B,
    /// Gemma-4-26B-A4B and gpt-oss-120b on average ([`RECENCY`]).
    Recency,
    /// As recorded; starts over at the end.
    Trace(RoutingTrace),
}

/// Share of the experts, and how often one of so many least recently used was chosen, both in thousandths.
pub const RECENCY: [(u32, u32); 6] = [(0, 0), (50, 391), (100, 525), (200, 734), (300, 842), (1000, 1000)];

/// The place, from the most recently used, of an expert that is chosen when chance says `milli` of a thousand.
fn recency_rank(milli: u32, experts: u32) -> u32 {
    let after = RECENCY.iter().position(|(_, hits)| *hits > milli).unwrap_or(RECENCY.len() - 1);
    let ((x0, y0), (x1, y1)) = (RECENCY[after.saturating_sub(1)], RECENCY[after]);
    // The share in millionths of a thousandth, so that chance is not rounded to few ranks.
    let within = u64::from(milli.saturating_sub(y0)) * u64::from(x1 - x0) * 1000 / u64::from((y1 - y0).max(1));
    let share = u64::from(x0) * 1000 + within;
    (share * u64::from(experts) / 1_000_000).min(u64::from(experts.saturating_sub(1))) as u32
}

/// Recorded choices: for each token, for each layer, the experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingTrace {
    /// Layers.
    pub layers: usize,
    tokens: Vec<Vec<Vec<u32>>>,
    /// The same of the prompts.
    prompt: Vec<Vec<Vec<u32>>>,
}

impl Habit {
    /// How many different experts of a layer so many tokens choose together, on average.
    #[must_use]
    pub fn distinct(&self, experts: u32, pick: u32, tokens: u64) -> u32 {
        let tokens = usize::try_from(tokens).unwrap_or(usize::MAX).min(DISTINCT_TOKENS_MAX);
        let count = |layer: &mut dyn Iterator<Item = u32>| layer.collect::<std::collections::BTreeSet<u32>>().len();
        if let Self::Trace(trace) = self {
            let recorded = if trace.prompt.is_empty() { &trace.tokens } else { &trace.prompt };
            let recorded = &recorded[..tokens.min(recorded.len())];
            let of = |layer: usize| recorded.iter().filter_map(move |token| token.get(layer)).flatten();
            let sum: usize = (0..trace.layers).map(|layer| count(&mut of(layer).map(|e| e % experts.max(1)))).sum();
            let mean = sum.div_ceil(trace.layers.max(1)) as u32;
            return mean.clamp(pick.min(experts), experts);
        }
        let (mut router, mut chosen, mut all) = (Router::new(self.clone(), 1), Vec::new(), Vec::new());
        for _ in 0..tokens {
            router.choose(0, experts, pick, &mut chosen);
            all.extend_from_slice(&chosen);
        }
        count(&mut all.into_iter()) as u32
    }
}

/// More tokens choose hardly more experts.
const DISTINCT_TOKENS_MAX: usize = 4096;

/// A trace that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// A column is not there.
    #[error("the trace's header names no column '{column}'")]
    NoColumn {
        /// Which.
        column: &'static str,
    },
    /// A line that is no record.
    #[error("line {line} of the trace: '{text}' is no number for column '{column}'")]
    NotANumber {
        /// Counted from 1.
        line: usize,
        /// Which.
        column: &'static str,
        /// What stands there.
        text: String,
    },
    /// No record of a generated token.
    #[error("the trace holds no record with phase 1 (decode)")]
    Empty,
    /// A number beyond any model's.
    #[error("line {line} of the trace: {value} is too large for column '{column}'")]
    TooLarge {
        /// Counted from 1.
        line: usize,
        /// Which.
        column: &'static str,
        /// What stands there.
        value: u64,
    },
}

const LAYERS_MAX: u64 = 4096;
const EXPERTS_MAX: u64 = 65_536;

impl RoutingTrace {
    /// Reads a CSV with at least the columns `turn`, `phase` (1: decode; others: prompts, which are only counted), `step`, `layer` and
    /// `expert`, one choice a line. Lines that begin with `#` are comments.
    ///
    /// # Errors
    /// A column that is missing, a field that is no number, or no record at all.
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        let mut lines = text.lines().enumerate().filter(|(_, l)| !l.starts_with('#') && !l.trim().is_empty());
        let header: Vec<&str> = lines.next().map(|(_, l)| l.split(',').map(str::trim).collect()).unwrap_or_default();
        let column = |name: &'static str| {
            header.iter().position(|h| *h == name).ok_or(TraceError::NoColumn { column: name }).map(|at| (name, at))
        };
        let columns = [column("turn")?, column("phase")?, column("step")?, column("layer")?, column("expert")?];
        let (mut trace, mut token) = (Self::default(), None);
        for (index, line) in lines {
            let fields: Vec<&str> = line.split(',').map(str::trim).collect();
            let mut numbers = [0u64; 5];
            for (number, (column, at)) in numbers.iter_mut().zip(columns) {
                let field = fields.get(at).copied().unwrap_or_default();
                let bad = || TraceError::NotANumber { line: index + 1, column, text: field.chars().take(40).collect() };
                *number = field.parse().map_err(|_| bad())?;
            }
            let [turn, phase, step, layer, expert] = numbers;
            for (value, max, column) in [(layer, LAYERS_MAX, "layer"), (expert, EXPERTS_MAX, "expert")] {
                if value >= max {
                    return Err(TraceError::TooLarge { line: index + 1, column, value });
                }
            }
            let tokens = if phase == 1 { &mut trace.tokens } else { &mut trace.prompt };
            if token != Some((turn, phase, step)) {
                token = Some((turn, phase, step));
                tokens.push(Vec::new());
            }
            trace.layers = trace.layers.max(layer as usize + 1);
            if let Some(layers) = tokens.last_mut() {
                layers.resize(layers.len().max(layer as usize + 1), Vec::new());
                layers[layer as usize].push(expert as u32);
            }
        }
        if trace.tokens.is_empty() { Err(TraceError::Empty) } else { Ok(trace) }
    }

    /// Tokens of prompts recorded.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.len()
    }

    /// Tokens recorded.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }
}

/// Draws the choices of one sequence.
#[derive(Clone, Debug)]
pub struct Router {
    habit: Habit,
    rng: Rng,
    /// For each layer: what it chose last, how often it has chosen, and its experts by popularity, or by how recently they were chosen.
    layers: Vec<Layer>,
}

#[derive(Clone, Debug, Default)]
struct Layer {
    last: Vec<u32>,
    turns: usize,
    by_popularity: Vec<u32>,
    cumulated: Vec<u64>,
}

impl Router {
    /// A router of a habit.
    #[must_use]
    pub fn new(habit: Habit, seed: u64) -> Self {
        Self { habit, rng: Rng::new(seed), layers: Vec::new() }
    }

    /// The experts of a layer, those that are likeliest to be chosen next first (in any order where the habit knows
    /// none).
    #[must_use]
    pub fn ranked(&mut self, layer: usize, experts: u32) -> Vec<u32> {
        self.prepare(layer, experts);
        if let Habit::Trace(trace) = &self.habit {
            // It begins again after its end, so what was chosen last is what memory holds then.
            let of = |token: &Vec<Vec<u32>>| token.get(layer % trace.layers.max(1)).cloned().unwrap_or_default();
            let mut ranked = Vec::new();
            for token in trace.tokens.iter().rev() {
                add_distinct(&mut ranked, of(token).into_iter().map(|e| e % experts.max(1)), experts as usize);
            }
            add_distinct(&mut ranked, 0..experts, experts as usize);
            return ranked;
        }
        let ranked = &self.layers[layer].by_popularity;
        if ranked.is_empty() { (0..experts).collect() } else { ranked.clone() }
    }

    /// Gives a layer its state.
    fn prepare(&mut self, layer: usize, experts: u32) {
        if self.layers.len() <= layer {
            self.layers.resize(layer + 1, Layer::default());
        }
        let state = &mut self.layers[layer];
        if !matches!(self.habit, Habit::Zipf | Habit::Recency) || state.by_popularity.len() == experts as usize {
            return;
        }
        state.by_popularity = (0..experts).collect();
        self.rng.shuffle(&mut state.by_popularity, experts as usize);
        if self.habit == Habit::Zipf {
            let weights = (1..=u64::from(experts)).scan(0u64, |sum, k| {
                *sum += (1 << 32) / k;
                Some(*sum)
            });
            state.cumulated = weights.collect();
        }
    }

    /// Chooses `pick` different experts of `experts` for a layer, in ascending order.
    pub fn choose(&mut self, layer: usize, experts: u32, pick: u32, chosen: &mut Vec<u32>) {
        chosen.clear();
        let pick = pick.min(experts) as usize;
        self.prepare(layer, experts);
        let state = &mut self.layers[layer];
        let turn = state.turns;
        state.turns += 1;
        match &self.habit {
            Habit::Trace(trace) if trace.layers > 0 => {
                let recorded = &trace.tokens[turn % trace.tokens.len()];
                let recorded = recorded.get(layer % trace.layers).map(Vec::as_slice).unwrap_or_default();
                add_distinct(chosen, recorded.iter().map(|e| e % experts), pick);
            }
            Habit::Sticky { stay_milli } => {
                let kept = state.last.iter().filter(|_| self.rng.chance(u64::from(*stay_milli)));
                add_distinct(chosen, kept.copied().filter(|e| *e < experts), pick);
            }
            _ => {}
        }
        let (zipf, recency) = (self.habit == Habit::Zipf, self.habit == Habit::Recency);
        let mut misses = 0;
        while chosen.len() < pick {
            let drawn = if zipf {
                let at = self.rng.below(state.cumulated.last().copied().unwrap_or(1));
                state.by_popularity[state.cumulated.partition_point(|&c| c <= at)]
            } else if recency {
                state.by_popularity[recency_rank(self.rng.below(1000) as u32, experts) as usize]
            } else {
                self.rng.below(u64::from(experts)) as u32
            };
            if !chosen.contains(&drawn) {
                chosen.push(drawn);
            } else {
                misses += 1;
                if misses > 16 * pick {
                    add_distinct(chosen, 0..experts, pick);
                }
            }
        }
        if recency {
            state.by_popularity.retain(|expert| !chosen.contains(expert));
            state.by_popularity.splice(0..0, chosen.iter().copied());
        }
        chosen.sort_unstable();
        state.last.clone_from(chosen);
    }
}

fn add_distinct(to: &mut Vec<u32>, from: impl Iterator<Item = u32>, at_most: usize) {
    for item in from {
        if to.len() < at_most && !to.contains(&item) {
            to.push(item);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn shares(habit: Habit) -> (usize, usize) {
        let (mut router, mut chosen, mut count) = (Router::new(habit, 3), Vec::new(), vec![0usize; 64]);
        let (mut before, mut stayed) = (Vec::new(), 0);
        for _ in 0..1000 {
            router.choose(0, 64, 4, &mut chosen);
            assert!(chosen.len() == 4 && chosen.is_sorted_by(|a, b| a < b));
            stayed += chosen.iter().filter(|c| before.contains(*c)).count();
            chosen.iter().for_each(|&c| count[c as usize] += 1);
            before.clone_from(&chosen);
        }
        (count.into_iter().max().unwrap(), stayed)
    }

    #[test]
    fn habits_differ_as_their_names_say() {
        let (uniform, stays) = shares(Habit::Uniform);
        assert!(uniform < 110 && stays < 400, "{uniform} {stays}");
        assert!(shares(Habit::Zipf).0 > 500);
        assert!(shares(Habit::Sticky { stay_milli: 700 }).1 > 2600);
    }

    /// What the habit is made for: the least recently used hit as often as they do on recorded routing.
    #[test]
    fn recency_gives_the_hits_of_recorded_routing() {
        let (mut router, mut chosen) = (Router::new(Habit::Recency, 5), Vec::new());
        let mut recent: Vec<u32> = Vec::new();
        let mut hits = [0u32; 4];
        let shares = [(50, 391.0), (100, 525.0), (200, 734.0), (300, 842.0)];
        for _ in 0..4000 {
            router.choose(0, 128, 6, &mut chosen);
            for (hits, (share, _)) in hits.iter_mut().zip(shares) {
                *hits +=
                    chosen.iter().filter(|c| recent.iter().take(128 * share / 1000).any(|r| r == *c)).count() as u32;
            }
            recent.retain(|r| !chosen.contains(r));
            recent.splice(0..0, chosen.iter().copied());
        }
        for (hits, (share, wanted)) in hits.into_iter().zip(shares) {
            let found = f64::from(hits) / 24.0;
            assert!((found - wanted).abs() < 60.0, "{share}: {found} thousandths of {wanted}");
        }
    }

    #[test]
    fn traces_are_followed_and_checked() {
        let csv =
            "# made by hand\nturn,phase,step,layer,slot,expert\n0,0,0,0,0,9\n0,1,0,0,0,3\n0,1,0,1,0,4\n0,1,1,0,0,5\n";
        let trace = RoutingTrace::parse(csv).unwrap();
        assert_eq!((trace.tokens(), trace.layers), (2, 2));
        let (mut router, mut chosen) = (Router::new(Habit::Trace(trace), 1), Vec::new());
        for expected in [3, 5, 3] {
            router.choose(0, 8, 1, &mut chosen);
            assert_eq!(chosen, [expected]);
        }
        let parse = |text: &str| RoutingTrace::parse(text).unwrap_err();
        assert_eq!(parse("turn,phase,step,layer\n"), TraceError::NoColumn { column: "expert" });
        let header = "turn,phase,step,layer,expert\n";
        assert!(matches!(parse(&format!("{header}0,1,0,x,3")), TraceError::NotANumber { line: 2, .. }));
        assert!(matches!(parse(&format!("{header}0,1,0,99999999,3")), TraceError::TooLarge { .. }));
        assert_eq!(parse(header), TraceError::Empty);
    }
}
