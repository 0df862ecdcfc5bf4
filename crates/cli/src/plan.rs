//! `overspill plan`: what a model would do on a machine that one need not own, and what a better one would bring.

use crate::args::{EvictArg, PrefetchArg};
use crate::errors::{CliError, Kind, Missed, Outcome, Stop, stop};
use crate::plan_args::{AssumeArgs, PlanArgs, PlanDevice};
use crate::plan_hardware::{self, Here};
use crate::plan_model::{self, Planned};
use crate::plan_report;
use crate::sizes::Size;
use crate::{machine, report};
use overspill_sim::hardware::Hardware;
use overspill_sim::planner::{self, Cut, Device, ModelShape, PlanError, PlanOptions};
use overspill_sim::{Habit, RoutingTrace};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// A longer routing trace is refused.
const TRACE_BYTES_MAX: u64 = 1 << 30;

/// Plans, and prints.
///
/// # Errors
/// A bad model, profile or option; nothing fits; no machine is as fast as wanted.
pub fn plan(args: &PlanArgs) -> Outcome {
    if let Some(name) = args.show_hardware.as_deref().filter(|name| *name != plan_hardware::THIS) {
        return report::print(plan_hardware::shipped_text(name)?);
    }
    let model = plan_model::planned(&args.model)?;
    let shape = &model.shape;
    let mut options = options(&args.assume, shape)?;
    if args.show_hardware.is_some() {
        let here = here(args.model.model.as_deref(), &model, &args.assume);
        return report::print(&plan_hardware::this_text(here)?);
    }
    // Cache and scratch come on top of a percentage.
    let apart = shape.kv_bytes(options.context, options.chunk).saturating_add(shape.scratch_bytes(options.chunk));
    options.vram_bytes = args.vram.map(|size| bytes_of(size, shape, apart));
    options.ram_bytes = args.ram.map(|size| ram_bytes_of(size, shape));
    let machines = plan_hardware::machines(&args.hardware, here(args.model.model.as_deref(), &model, &args.assume))?;
    match (&machines[..], args.want) {
        ([hardware], None) => {
            let plan = planner::plan(shape, hardware, &options).map_err(|error| refused(&error))?;
            let view = plan_report::View { model: &model, hardware, options: &options, plan: &plan };
            if args.json { report::print_json(&view.json()) } else { report::print(&view.text(coloured())) }
        }
        (_, want) => compare(&model, &machines, &options, want, args.json),
    }
}

fn coloured() -> bool {
    report::coloured(&std::io::stdout())
}

/// Several machines side by side.
fn compare(model: &Planned, machines: &[Hardware], options: &PlanOptions, want: Option<f64>, json: bool) -> Outcome {
    let options = PlanOptions { gains: false, ..options.clone() };
    let (offers, best) = planner::cheapest(&model.shape, machines, &options, want.unwrap_or(0.0));
    if let Some(error) =
        offers.iter().find_map(|offer| offer.plan.as_ref().err()).filter(|_| offers.iter().all(|o| o.plan.is_err()))
    {
        return Err(refused(error));
    }
    if let (Some(want), None) = (want, best) {
        let speed = |offer: &planner::Offer<'_>| offer.plan.as_ref().map_or(0.0, |plan| plan.decode.tokens_per_s());
        let fastest = offers.iter().max_by(|a, b| speed(a).total_cmp(&speed(b)));
        let said = fastest.map_or_else(String::new, |offer| {
            format!("; the fastest is '{}' with {:.2}", offer.hardware.name, speed(offer))
        });
        let message =
            format!("no machine of these decodes {want} tokens per second{said}: compare others, or want less");
        return Err(stop(Kind::TooSmall, message));
    }
    let comparison = plan_report::Comparison { model, offers: &offers, want, best };
    if json { report::print_json(&comparison.json()) } else { report::print(&comparison.text(coloured())) }
}

/// What measuring this machine needs.
pub fn here<'a>(model: Option<&'a Path>, planned: &Planned, assume: &AssumeArgs) -> Here<'a> {
    Here {
        path: model.unwrap_or_else(|| Path::new(".")),
        dtype: planned.dtype,
        cols: planned.shape.hidden,
        attention: planned.shape.kv.first().map_or((0, 0), |kv| (kv.elements, kv.query_elements)),
        chunk: assume.chunk,
        threads: assume.threads.map_or_else(machine::cores, |threads| threads as usize),
    }
}

/// What predictions depend on, budgets apart.
///
/// # Errors
/// A context beyond the model's, or routing that makes no sense.
pub fn options(args: &AssumeArgs, shape: &ModelShape) -> Outcome<PlanOptions> {
    let context = args.ctx.min(shape.context);
    if args.ctx > shape.context && args.ctx != 4096 {
        let message = format!("--ctx {}: the model was made for {} positions; ask for fewer", args.ctx, shape.context);
        return Err(stop(Kind::Config, message));
    }
    Ok(PlanOptions {
        device: device(args.device),
        context,
        chunk: args.chunk.min(context),
        habit: habit(&args.routing)?,
        cut: if args.fine { Cut::Fine } else { Cut::Coarse },
        ..PlanOptions::default()
    })
}

/// The device of the planner's words.
pub fn device(device: PlanDevice) -> Option<Device> {
    match device {
        PlanDevice::Auto => None,
        PlanDevice::Gpu => Some(Device::Gpu),
        PlanDevice::Cpu => Some(Device::Cpu),
    }
}

/// The policy of the command line's words.
pub fn evict(evict: EvictArg) -> overspill::Evict {
    match evict {
        EvictArg::Auto => overspill::Evict::Auto,
        EvictArg::Lru => overspill::Evict::Lru,
        EvictArg::NextUse => overspill::Evict::NextUse,
        EvictArg::Planned => overspill::Evict::Planned,
    }
}

/// The policy of the command line's words.
pub fn prefetch(prefetch: PrefetchArg) -> overspill::Prefetch {
    match prefetch {
        PrefetchArg::Auto => overspill::Prefetch::Auto,
        PrefetchArg::Off => overspill::Prefetch::Off,
    }
}

/// A size in bytes; a percentage is of the model's weights, with `apart` on top.
pub fn bytes_of(size: Size, shape: &ModelShape, apart: u64) -> u64 {
    match size {
        Size::Bytes(bytes) => bytes,
        Size::Percent(share) => ((shape.bytes as f64 * share / 100.0) as u64).saturating_add(apart),
    }
}

/// `--ram` in bytes. All of the weights is, as in the engine, with the rounding that they need in memory.
pub fn ram_bytes_of(size: Size, shape: &ModelShape) -> u64 {
    let bytes = bytes_of(size, shape, 0);
    match size {
        Size::Percent(share) if share >= 100.0 => bytes.max(shape.bytes_in_memory()),
        _ => bytes,
    }
}

/// How routers choose.
fn habit(words: &str) -> Outcome<Habit> {
    let bad = |cause: &str| {
        let cure = "use recent, uniform, zipf, sticky:70%, or a recorded trace (.csv)";
        stop(Kind::Usage, format!("--routing {words}: {cause}; {cure}"))
    };
    match words {
        "recent" => return Ok(Habit::Recency),
        "uniform" => return Ok(Habit::Uniform),
        "zipf" => return Ok(Habit::Zipf),
        _ => {}
    }
    if let Some(share) = words.strip_prefix("sticky:") {
        let share = share.strip_suffix('%').and_then(|share| share.parse::<f64>().ok());
        let share = share.filter(|share| (0.0..=100.0).contains(share)).ok_or_else(|| bad("it is no percentage"))?;
        return Ok(Habit::Sticky { stay_milli: (share * 10.0) as u16 });
    }
    let path = PathBuf::from(words);
    let file = fs::File::open(&path).map_err(|error| bad(&format!("it is no habit and no file ({error})")))?;
    let mut text = String::new();
    let read = file.take(TRACE_BYTES_MAX + 1).read_to_string(&mut text);
    let read = read.map_err(|error| stop(Kind::Io, format!("{words}: cannot read it: {error}; check the path")))?;
    if read as u64 > TRACE_BYTES_MAX {
        return Err(bad("the trace is larger than a GiB"));
    }
    let trace = RoutingTrace::parse(&text);
    trace.map(Habit::Trace).map_err(|error| stop(Kind::BadFile, format!("{words}: {error}; record it anew")))
}

/// What a refusal of the planner is to the program.
pub fn refused(error: &PlanError) -> Stop {
    let mut failure = match error {
        PlanError::TooSmall { setting, budget_bytes, bytes_min, what } => {
            let human = crate::sizes::human_bytes;
            let message = format!(
                "{setting} {} is too small for {what}: the smallest that works is {bytes_min} bytes ({})",
                human(*budget_bytes),
                human(*bytes_min)
            );
            let missed = Missed { setting: (*setting).to_owned(), bytes_min: *bytes_min };
            CliError { missed: Some(missed), ..CliError::new(Kind::TooSmall, message) }
        }
        PlanError::NoDisk { .. } => CliError::new(Kind::TooSmall, error.to_string()),
        PlanError::NoGpu { .. } => CliError::new(Kind::Config, error.to_string()),
        PlanError::Simulate(overspill_sim::SimulateError::TooSmall(error)) => {
            CliError::new(Kind::TooSmall, format!("{error}: give that tier more"))
        }
        other => CliError::new(Kind::Failed, other.to_string()),
    };
    failure.message = failure.message.replace('\n', " ");
    failure.into()
}
