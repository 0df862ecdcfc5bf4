//! What a run ends with: the object of `run --json`, or one line for people.

use crate::errors::Outcome;
use crate::execute::Run;
use crate::limit::{Limit, Work};
use crate::report;
use crate::sizes::human_bytes;
use overspill::Stats;
use overspill_infer::generate::Ended;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// Facts that are known before the first token.
pub struct Measured {
    /// The architecture's name.
    pub architecture: &'static str,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Blocks.
    pub blocks: usize,
    /// `cpu` or `gpu`.
    pub device_kind: &'static str,
    /// The backend's name.
    pub device_name: String,
    /// From the start to readiness.
    pub open: Duration,
    /// How the disk is read, and why not otherwise.
    pub io_detail: String,
}

/// The object of `run --json`.
#[derive(Serialize)]
pub struct Summary {
    model: Model,
    device: Device,
    prompt_tokens: usize,
    tokens: Vec<u32>,
    text: Option<String>,
    /// Why it ended: `stop`, `length`, `context` or `caller`.
    ended: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_prompt_logits: Option<Vec<f32>>,
    time_s: Times,
    tokens_per_s: Rates,
    tiers: BTreeMap<&'static str, Tier>,
    stall_s: f64,
    /// Of `stall_s`, after the first token.
    decode_stall_s: f64,
    decode_read_bytes: u64,
    touched_bytes_per_token: Option<u64>,
    in_flight_bytes: u64,
    /// The most memory that the process had resident: budgets, KV cache and everything else.
    peak_resident_bytes: Option<u64>,
    /// Bytes of host memory for weights that lie in huge pages at the end.
    huge_page_bytes: u64,
    limit: Option<Limit>,
    evict: &'static str,
    evict_why: String,
    prefetch: &'static str,
    io: &'static str,
    io_why: String,
}

#[derive(Serialize)]
struct Model {
    architecture: &'static str,
    parameters: u64,
    bytes: u64,
    blocks: usize,
}

#[derive(Serialize)]
struct Device {
    kind: &'static str,
    name: String,
}

#[derive(Serialize)]
struct Times {
    open: f64,
    first_token: f64,
    prefill: f64,
    decode: f64,
}

/// Absent where nothing was computed.
#[derive(Serialize)]
struct Rates {
    prefill: Option<f64>,
    decode: Option<f64>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Tier {
    Cache {
        budget_bytes: u64,
        peak_bytes: u64,
        hits: u64,
        misses: u64,
        evictions: u64,
        /// KV cache and scratch: in a GPU's memory inside of the budget, in RAM beside it.
        reserved_bytes: u64,
    },
    Disk {
        read_bytes: u64,
        reads: u64,
        padding_bytes: u64,
    },
}

impl Summary {
    /// Puts a run's figures together.
    pub fn new(facts: &Measured, run: &Run, work: Option<Work>, limit: Option<Limit>, text: Option<String>) -> Self {
        let (timings, stats) = (&run.generation.timings, &run.at_end);
        let rate = |tokens: usize, time: Duration| (tokens > 0).then(|| tokens as f64 / time.as_secs_f64().max(1e-9));
        let seconds = |ns: u64| Duration::from_nanos(ns).as_secs_f64();
        Self {
            model: Model {
                architecture: facts.architecture,
                parameters: facts.parameters,
                bytes: facts.weight_bytes,
                blocks: facts.blocks,
            },
            device: Device { kind: facts.device_kind, name: facts.device_name.clone() },
            prompt_tokens: timings.prompt_tokens,
            tokens: run.generation.tokens.clone(),
            text,
            ended: match run.generation.ended {
                Ended::Stop(_) => "stop",
                Ended::Length => "length",
                Ended::Context => "context",
                Ended::Caller => "caller",
            },
            last_prompt_logits: Some(run.generation.last_prompt_logits.clone()),
            time_s: Times {
                open: facts.open.as_secs_f64(),
                first_token: timings.first_token.as_secs_f64(),
                prefill: timings.prefill.as_secs_f64(),
                decode: timings.decode.as_secs_f64(),
            },
            tokens_per_s: Rates {
                prefill: rate(timings.prompt_tokens, timings.prefill),
                decode: rate(timings.decoded_tokens, timings.decode),
            },
            tiers: tiers(stats),
            stall_s: seconds(stats.stall_ns),
            decode_stall_s: seconds(stats.stall_ns.saturating_sub(run.at_first.stall_ns)),
            decode_read_bytes: stats.disk.read_bytes.saturating_sub(run.at_first.disk.read_bytes),
            touched_bytes_per_token: work.map(|work| work.touched_bytes),
            in_flight_bytes: stats.in_flight_bytes(),
            peak_resident_bytes: overspill::limits::peak_resident_bytes(),
            huge_page_bytes: stats.huge_page_bytes,
            limit,
            evict: stats.decision.evict,
            evict_why: stats.decision.why.clone(),
            prefetch: stats.prefetch,
            io: stats.io,
            io_why: facts.io_detail.clone(),
        }
    }

    /// Prints the object.
    pub fn print_json(mut self, logits: bool) -> Outcome {
        if !logits {
            self.last_prompt_logits = None;
        }
        report::print_json(&self)
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let mut line = format!("{} tokens", self.tokens.len());
        if let Some(rate) = self.tokens_per_s.decode {
            let _ = write!(line, " at {rate:.1} tokens/s");
        }
        let _ = write!(line, " (prompt: {}", self.prompt_tokens);
        if let Some(rate) = self.tokens_per_s.prefill {
            let _ = write!(line, " at {rate:.1}");
        }
        let _ = write!(line, ") on {}", self.device.name);
        let tiers = ["gpu", "host", "disk"].into_iter().filter_map(|name| Some((name, self.tiers.get(name)?)));
        for (name, tier) in tiers {
            match tier {
                Tier::Cache { budget_bytes, hits, misses, .. } => {
                    let share = *hits as f64 * 100.0 / (hits + misses).max(1) as f64;
                    let budget = human_bytes(*budget_bytes);
                    let _ = write!(line, "; {name} {budget}: {share:.1} % hits");
                }
                Tier::Disk { read_bytes, .. } => {
                    let _ = write!(line, "; {name}: {} read", human_bytes(*read_bytes));
                }
            }
        }
        let _ = write!(line, "; stalled {:.2} s", self.stall_s);
        if let Some(limit) = self.limit {
            let _ = write!(line, "; {:.2} x the time of the limit ({})", limit.ratio, limit.bound_by);
        }
        let _ = write!(line, "; {}: {}", self.evict, self.evict_why);
        line
    }
}

fn tiers(stats: &Stats) -> BTreeMap<&'static str, Tier> {
    let cache = |tier: &overspill::TierFigures| {
        let name = if tier.label == "gpu0" { "gpu" } else { tier.label };
        let figures = Tier::Cache {
            budget_bytes: tier.budget_bytes,
            peak_bytes: tier.peak_bytes,
            hits: tier.hits,
            misses: tier.misses,
            evictions: tier.blocks.evictions,
            reserved_bytes: tier.reserved_peak_bytes,
        };
        (name, figures)
    };
    let disk = Tier::Disk {
        read_bytes: stats.disk.read_bytes,
        reads: stats.disk.reads,
        padding_bytes: stats.disk.padding_bytes,
    };
    stats.tiers.iter().map(cache).chain([("disk", disk)]).collect()
}
