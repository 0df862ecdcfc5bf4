//! `overspill audit`: what of a model costs most, what could be saved, the smallest machine that runs it well, and what
//! may go wrong here.
//!
//! Headers tell nearly everything. Only duplicates need the weights, and of these only what looks alike in samples.

use crate::audit_duplicates::{self as duplicates, Duplicates};
use crate::audit_pruning::{self as pruning, Pruning};
use crate::errors::Outcome;
use crate::layers::{self, Pattern};
use crate::plan::bytes_of;
use crate::plan_args::AuditArgs;
use crate::plan_hardware;
use crate::plan_model::{self, Planned};
use crate::report::{self, Align, Table};
use crate::sizes::human_bytes;
use crate::{interrupt, machine, progress};
use overspill::limits::memory_limits;
use overspill::{DType, FileSet};
use overspill_formats::ModelFiles;
use overspill_infer::arch::{Ffn, ModelSpec};
use overspill_sim::hardware::SHIPPED;
use overspill_sim::planner::{self, ModelShape, PlanOptions};
use serde::Serialize;
use std::fmt::Write as _;

/// What counts as well: as fast as people read.
const WELL_TOKENS_PER_S: f64 = 10.0;
/// A budget this close to the smallest is a risk.
const CLOSE: f64 = 1.05;
/// Registered I/O buffers want at least this much locked memory.
const MEMLOCK_BYTES_GOOD: u64 = 64 << 20;
/// Element types that are offered to whoever wants to save.
const OFFERED: [DType; 3] = [DType::Q8_0, DType::Q6_K, DType::Q4_K];

#[derive(Serialize)]
struct Report {
    path: String,
    bytes: u64,
    touched_bytes_per_token: Option<u64>,
    costs: Vec<Cost>,
    savings: Vec<Saving>,
    pruning: Vec<Pruning>,
    duplicates: Option<Duplicates>,
    padding: Padding,
    machine: Option<Smallest>,
    risks: Vec<Risk>,
    notes: Vec<String>,
}

/// Tensors of one pattern of names.
#[derive(Serialize)]
struct Cost {
    tensors: String,
    dtype: &'static str,
    count: usize,
    bytes: u64,
    share: f64,
}

/// What another element type would free.
#[derive(Serialize)]
struct Saving {
    tensors: String,
    from: &'static str,
    to: &'static str,
    frees_bytes: u64,
}

#[derive(Serialize)]
struct Padding {
    slot_bytes: u64,
    padding_bytes: u64,
    share: f64,
}

#[derive(Serialize)]
struct Smallest {
    /// The smallest budget that runs it at all.
    least_bytes: u64,
    /// The budget that holds all of it.
    all_bytes: u64,
    /// The cheapest of the profiles that come with the program which runs it well.
    cheapest: Option<&'static str>,
    tokens_per_s: Option<f64>,
    well_tokens_per_s: f64,
}

/// What may go wrong.
#[derive(Debug, PartialEq, Serialize)]
struct Risk {
    what: &'static str,
    cause: String,
    cure: String,
}

/// What of this machine matters to risks.
#[derive(Clone, Debug, Default)]
struct Here {
    free_bytes: Option<u64>,
    memlock_bytes: Option<u64>,
    direct_refusal: Option<String>,
}

/// Audits, and prints.
///
/// # Errors
/// A model that cannot be opened or read, or Ctrl-C.
pub fn audit(args: &AuditArgs) -> Outcome {
    let model = overspill_formats::open(&args.model)?;
    interrupt::install();
    let duplicates = if args.no_read { None } else { Some(duplicates::find(&model)?) };
    // What the planner does not know is still audited.
    let planned = plan_model::of_files(&model).ok();
    let spinner = progress::spinner("planning");
    let report = Report::of(args, &model, planned.as_ref(), duplicates)?;
    spinner.finish_and_clear();
    if args.json {
        report::print_json(&report)
    } else {
        report::print(&report.text(report::coloured(&std::io::stdout())))
    }
}

fn patterns(model: &ModelFiles) -> Vec<Pattern<(DType, Vec<u64>)>> {
    let tensors = model.catalog.tensors().iter();
    let mut patterns = layers::patterns(tensors.map(|t| (t.name.as_str(), (t.dtype, t.shape.clone()), t.bytes)));
    patterns.sort_by_key(|pattern| std::cmp::Reverse(pattern.bytes));
    patterns
}

/// What a pattern's tensors would weigh in another type; `None` if their rows don't suit it.
fn bytes_as(shape: &[u64], count: usize, dtype: DType) -> Option<u64> {
    let (columns, outer) = shape.split_last()?;
    let rows = outer.iter().try_fold(count as u64, |rows, &d| rows.checked_mul(d))?;
    rows.checked_mul(dtype.row_bytes(*columns)?)
}

fn savings(patterns: &[Pattern<(DType, Vec<u64>)>]) -> Vec<Saving> {
    let mut savings = Vec::new();
    for pattern in patterns.iter().filter(|pattern| pattern.key.1.len() >= 2) {
        let (from, shape) = &pattern.key;
        for to in OFFERED {
            let frees = bytes_as(shape, pattern.count, to).and_then(|bytes| pattern.bytes.checked_sub(bytes));
            if let Some(frees_bytes) = frees.filter(|bytes| *bytes > 0) {
                let tensors = pattern.name.clone();
                savings.push(Saving { tensors, from: from.name(), to: to.name(), frees_bytes });
            }
        }
    }
    savings.sort_by_key(|saving| std::cmp::Reverse(saving.frees_bytes));
    savings
}

/// Experts of a layer that answer for a token, if the runtime knows the architecture.
fn experts_used(model: &ModelFiles) -> Option<u64> {
    let spec = ModelSpec::from(&model.metadata, &model.catalog).ok()?;
    let mut used = spec.layers.iter().filter_map(|layer| match &layer.ffn {
        Ffn::Experts(experts) => Some(experts.used as u64),
        _ => None,
    });
    used.next()
}

fn smallest(shape: &ModelShape) -> Outcome<Smallest> {
    let machines = plan_hardware::machines(
        &SHIPPED.iter().map(|(name, _)| (*name).to_owned()).collect::<Vec<_>>(),
        plan_hardware::Here {
            path: ".".as_ref(),
            dtype: DType::F16,
            cols: 4096,
            attention: (0, 0),
            chunk: 64,
            threads: 1,
        },
    )?;
    let options = PlanOptions { gains: false, context: shape.context.min(4096), ..PlanOptions::default() };
    let (offers, best) = planner::cheapest(shape, &machines, &options, WELL_TOKENS_PER_S);
    let plan = best.and_then(|index| offers[index].plan.as_ref().ok());
    Ok(Smallest {
        least_bytes: shape.least_bytes(),
        all_bytes: (shape.block_bytes() as f64 * shape.padding) as u64,
        cheapest: best.and_then(|index| SHIPPED.get(index)).map(|(name, _)| *name),
        tokens_per_s: plan.map(|plan| plan.decode.tokens_per_s()),
        well_tokens_per_s: WELL_TOKENS_PER_S,
    })
}

impl Here {
    fn now(model: &ModelFiles) -> Self {
        let limits = memory_limits();
        let files: Vec<_> = model.catalog.files().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
        let files = FileSet::open(&files).ok();
        let refusal = files.as_ref().and_then(|files| files.direct_refusal());
        Self {
            free_bytes: machine::free_host_bytes(),
            memlock_bytes: limits.memlock_bytes,
            direct_refusal: refusal.map(|(path, reason)| format!("{}: {reason}", path.display())),
        }
    }
}

/// What may go wrong with a budget (what is free, if none is given) on this machine.
fn risks(shape: Option<&ModelShape>, budget: Option<u64>, here: &Here, skipped: usize) -> Vec<Risk> {
    let mut risks = Vec::new();
    let mut risk = |what, cause: String, cure: &str| risks.push(Risk { what, cause, cure: cure.to_owned() });
    let budget_bytes = budget.or(here.free_bytes);
    if let (Some(shape), Some(bytes)) = (shape, budget_bytes) {
        let least = shape.least_bytes();
        let human = human_bytes;
        if bytes < least {
            risk(
                "too_small",
                format!("{} is less than the {} that it takes", human(bytes), human(least)),
                "give more with --ram",
            );
        } else if (bytes as f64) < least as f64 * CLOSE {
            let cause = format!(
                "{} is within 5 % of the least, {}: nearly every block is read for every token",
                human(bytes),
                human(least)
            );
            risk(
                "close_to_the_minimum",
                cause,
                "give more with --ram: each byte more is a byte less to read for each token",
            );
        }
        let cycle = shape.touched_bytes() - shape.common_bytes().min(shape.touched_bytes());
        let room = bytes.saturating_sub(shape.common_bytes());
        if shape.is_mixture() && bytes >= least && room < cycle {
            let cause = format!(
                "{} for experts hold less than the {} that one token uses: least recently used, none would ever be found",
                human(room),
                human(cycle)
            );
            risk("cache_below_a_token", cause, "give more with --ram, or quantise the experts");
        }
    }
    if let (Some(asked), Some(free)) = (budget, here.free_bytes)
        && asked > free
    {
        let cause = format!("--ram {} is more than the {} that are free", human_bytes(asked), human_bytes(free));
        risk("more_than_is_free", cause, "ask for less, or the system swaps or kills the process");
    }
    if let Some(bytes) = here.memlock_bytes.filter(|&bytes| bytes < MEMLOCK_BYTES_GOOD) {
        let cause = format!("only {} may be locked, so I/O buffers cannot be registered", human_bytes(bytes));
        risk("memlock", cause, "raise it: ulimit -l, or LimitMEMLOCK= of the service");
    }
    if let Some(refusal) = &here.direct_refusal {
        let cause =
            format!("reads go through the page cache ({refusal}): slower, and memory beside the budget is filled");
        risk("no_direct_io", cause, "put the model on a disk whose file system allows O_DIRECT");
    }
    if shape.is_none() {
        risk(
            "unknown_architecture",
            "the runtime does not know this architecture".to_owned(),
            "see overspill run for the reason",
        );
    }
    if skipped > 0 {
        let cause = format!("{skipped} tensors are of a kind that is not read");
        risk("left_out", cause, "see overspill inspect for which and why");
    }
    risks
}

impl Report {
    fn of(
        args: &AuditArgs,
        model: &ModelFiles,
        planned: Option<&Planned>,
        duplicates: Option<Duplicates>,
    ) -> Outcome<Self> {
        let catalog = &model.catalog;
        let patterns = patterns(model);
        let total = catalog.weight_bytes();
        let top = args.top as usize;
        let cost = |pattern: &Pattern<(DType, Vec<u64>)>| Cost {
            tensors: pattern.name.clone(),
            dtype: pattern.key.0.name(),
            count: pattern.count,
            bytes: pattern.bytes,
            share: pattern.bytes as f64 / total.max(1) as f64,
        };
        let in_blocks: u64 = catalog.blocks().iter().map(|block| block.bytes).sum();
        let slots: u64 = catalog.blocks().iter().map(|block| u64::from(block.slots)).sum();
        let padding_bytes = slots.saturating_mul(catalog.slot_bytes()).saturating_sub(in_blocks);
        let shape = planned.map(|planned| &planned.shape);
        let budget = args.ram.zip(shape).map(|(size, shape)| bytes_of(size, shape, 0));
        let mut savings = savings(&patterns);
        savings.truncate(top);
        Ok(Self {
            path: model.path.display().to_string(),
            bytes: total,
            touched_bytes_per_token: shape.map(ModelShape::touched_bytes),
            costs: patterns.iter().take(top).map(cost).collect(),
            savings,
            pruning: pruning::find(catalog, experts_used(model), duplicates.as_ref()),
            duplicates,
            padding: Padding {
                slot_bytes: catalog.slot_bytes(),
                padding_bytes,
                share: padding_bytes as f64 / in_blocks.max(1) as f64,
            },
            machine: shape.map(smallest).transpose()?,
            risks: risks(shape, budget, &Here::now(model), model.skipped.len()),
            notes: planned.map(|planned| planned.notes.clone()).unwrap_or_default(),
        })
    }

    fn text(&self, coloured: bool) -> String {
        let mut facts = vec![("model", self.path.clone()), ("weights", human_bytes(self.bytes))];
        if let Some(bytes) = self.touched_bytes_per_token {
            facts.push(("a token reads", human_bytes(bytes)));
        }
        let padding = &self.padding;
        facts.push((
            "padding",
            format!(
                "{} of slots of {} ({:.1} %)",
                human_bytes(padding.padding_bytes),
                human_bytes(padding.slot_bytes),
                padding.share * 100.0
            ),
        ));
        let mut text = report::facts(&facts);
        let _ = write!(text, "\nWhat costs most\n{}", self.cost_table(coloured));
        if !self.savings.is_empty() {
            let _ = write!(text, "\nWhat another element type would free\n{}", self.saving_table(coloured));
        }
        if !self.pruning.is_empty() {
            let _ = write!(text, "\nWhat leaving parts out would free\n{}", self.pruning_table(coloured));
            for part in &self.pruning {
                let _ = writeln!(text, "  {}: {}", part.kind, part.cost);
            }
        }
        if let Some(duplicates) = &self.duplicates {
            let _ = write!(text, "\n{}", duplicates.text());
        }
        if let Some(smallest) = &self.machine {
            let _ = writeln!(
                text,
                "\nThe smallest machine\n  at all: {} for weights; for all of it: {}",
                human_bytes(smallest.least_bytes),
                human_bytes(smallest.all_bytes)
            );
            let _ = match (smallest.cheapest, smallest.tokens_per_s) {
                (Some(name), Some(speed)) => writeln!(
                    text,
                    "  that runs it well ({WELL_TOKENS_PER_S} tokens/s): {name}, with {speed:.1} tokens/s"
                ),
                _ => writeln!(
                    text,
                    "  that runs it well ({WELL_TOKENS_PER_S} tokens/s): none of those that come with the program"
                ),
            };
        }
        text.push_str("\nRisks here\n");
        if self.risks.is_empty() {
            text.push_str("  none found\n");
        }
        for Risk { cause, cure, .. } in &self.risks {
            let _ = writeln!(text, "  {cause}; {cure}");
        }
        for note in &self.notes {
            let _ = writeln!(text, "\nNote: {note}");
        }
        text
    }

    fn cost_table(&self, coloured: bool) -> String {
        let columns = [
            ("tensors", Align::Left),
            ("type", Align::Left),
            ("count", Align::Right),
            ("bytes", Align::Right),
            ("share", Align::Right),
        ];
        let mut table = Table::new(&columns);
        for cost in &self.costs {
            let share = format!("{:.1} %", cost.share * 100.0);
            let name = duplicates::shown(&cost.tensors);
            table.row([name, cost.dtype.to_owned(), cost.count.to_string(), human_bytes(cost.bytes), share]);
        }
        table.render(coloured)
    }

    fn pruning_table(&self, coloured: bool) -> String {
        let columns = [
            ("part", Align::Left),
            ("frees", Align::Right),
            ("of all", Align::Right),
            ("a token reads less", Align::Right),
        ];
        let mut table = Table::new(&columns);
        for part in &self.pruning {
            let share = format!("{:.1} %", part.frees_bytes as f64 * 100.0 / self.bytes.max(1) as f64);
            let less = if part.reads_less_bytes > 0 { human_bytes(part.reads_less_bytes) } else { "–".to_owned() };
            table.row([part.what.clone(), human_bytes(part.frees_bytes), share, less]);
        }
        table.render(coloured)
    }

    fn saving_table(&self, coloured: bool) -> String {
        let columns = [
            ("tensors", Align::Left),
            ("from", Align::Left),
            ("to", Align::Left),
            ("frees", Align::Right),
            ("of all", Align::Right),
        ];
        let mut table = Table::new(&columns);
        for saving in &self.savings {
            let share = format!("{:.1} %", saving.frees_bytes as f64 * 100.0 / self.bytes.max(1) as f64);
            let name = duplicates::shown(&saving.tensors);
            table.row([name, saving.from.to_owned(), saving.to.to_owned(), human_bytes(saving.frees_bytes), share]);
        }
        table.render(coloured)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use overspill_formats::synth::preset;

    fn shape(name: &str) -> ModelShape {
        ModelShape::from_config(&preset(name).unwrap(), DType::Q4_K).unwrap()
    }

    fn found(shape: Option<&ModelShape>, budget: Option<u64>, here: &Here, skipped: usize) -> Vec<&'static str> {
        let risks = risks(shape, budget, here, skipped);
        assert!(risks.iter().all(|risk| !risk.cause.is_empty() && !risk.cure.is_empty()));
        risks.iter().map(|risk| risk.what).collect()
    }

    #[test]
    fn each_risk_is_seen_and_none_invented() {
        let (dense, mixture) = (shape("llama-3-8b"), shape("qwen3-30b-a3b"));
        let calm = Here { free_bytes: Some(64 << 30), ..Here::default() };
        assert_eq!(found(Some(&dense), None, &calm, 0), [""; 0]);
        let least = dense.least_bytes();
        assert_eq!(found(Some(&dense), Some(least - 1), &calm, 0), ["too_small"]);
        assert_eq!(found(Some(&dense), Some(least + 1), &calm, 0), ["close_to_the_minimum"]);
        assert_eq!(found(Some(&dense), Some(least * 2), &calm, 0), [""; 0]);
        assert_eq!(found(Some(&dense), Some(65 << 30), &calm, 0), ["more_than_is_free"]);
        assert_eq!(found(Some(&mixture), Some(mixture.common_bytes() + (64 << 20)), &calm, 0), ["cache_below_a_token"]);
        let locked = Here { memlock_bytes: Some(8 << 20), ..calm.clone() };
        assert_eq!(found(Some(&dense), None, &locked, 0), ["memlock"]);
        let cached = Here { direct_refusal: Some("a: tmpfs".to_owned()), ..calm.clone() };
        assert_eq!(found(Some(&dense), None, &cached, 0), ["no_direct_io"]);
        assert_eq!(found(None, None, &calm, 2), ["unknown_architecture", "left_out"]);
    }

    #[test]
    fn savings_are_what_the_types_weigh() {
        let pattern = |dtype: DType, shape: Vec<u64>, count| {
            let bytes = bytes_as(&shape, count, dtype).unwrap();
            Pattern { name: "w".to_owned(), key: (dtype, shape), count, bytes }
        };
        let found = savings(&[pattern(DType::BF16, vec![512, 256], 3), pattern(DType::F32, vec![256], 9)]);
        let list: Vec<_> = found.iter().map(|s| (s.to, s.frees_bytes)).collect();
        let elements = 3 * 512 * 256;
        let wanted = [("q4_k", 144), ("q6_k", 210), ("q8_0", 272)]
            .map(|(to, bytes)| (to, elements * 2 - elements / 256 * bytes));
        assert_eq!(list, wanted);
        assert!(savings(&[pattern(DType::Q4_K, vec![512, 256], 1)]).is_empty(), "smaller already");
        assert!(savings(&[pattern(DType::F16, vec![512, 100], 1)]).is_empty(), "rows that don't suit");
    }
}
