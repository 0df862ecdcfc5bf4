//! `overspill run`: a prompt in, text or token ids out, within budgets.
//!
//! Everything that can be known to be wrong is reported before anything is written to standard output: the model's
//! files, the prompt, the device, the budgets, in this order.

use crate::args::{ActivationsArg, PlacementArgs, RunArgs};
use crate::device::{Device, bytes_of};
use crate::errors::{CliError, Kind, Missed, Outcome, Stop, stop};
use crate::limit::{self, Limit, Wires, Work};
use crate::prompt::Prompt;
use crate::sizes::Size;
use crate::summary::{Measured, Summary};
use crate::trace::Trace;
use crate::{interrupt, machine, progress, report, smallest};
use overspill::Stats;
use overspill_formats::ModelFiles;
use overspill_infer::arch::{Ffn, ModelSpec};
use overspill_infer::generate::{Generation, Request, Runtime, RuntimeOptions, Session};
use overspill_infer::kernels::Activations;
use overspill_infer::sampling::SamplingParams;
use overspill_infer::tokenizer::DecodeStream;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The default temperature of prompts that are text.
const TEMPERATURE_DEFAULT: f32 = 0.8;

/// Generates.
///
/// # Errors
/// Whatever is wrong with the model, the prompt, the device or the budgets; Ctrl-C; a failure on the way.
pub fn run(args: &RunArgs) -> Outcome {
    let begin = Instant::now();
    let model = overspill_formats::open(&args.model)?;
    let spec = ModelSpec::from(&model.metadata, &model.catalog)?;
    let prompt = Prompt::of(args, &model, spec.vocab)?;
    let context = context(args, &prompt, &spec)?;
    let device = Device::choose(&args.placement)?;
    if args.kv.is_some() && device.kind() == "gpu" {
        let message = "--kv is for the CPU; on a GPU the cache is part of --vram: leave it out, or use --device cpu";
        return Err(stop(Kind::Usage, message));
    }
    let files: Vec<(PathBuf, u64)> = model.catalog.files().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
    let trace_file = args.trace.as_deref().map(Trace::create).transpose()?;
    interrupt::install();
    let spinner = progress::spinner("opening the model");
    let settings = Settings { placement: args.placement.clone(), kv: args.kv };
    let attempt = |settings: &Settings| open(args, settings, &device, model.clone(), context);
    let opened = attempt(&settings).map_err(|stop| smallest::named(stop, &settings, attempt));
    spinner.finish_and_clear();
    let (runtime, mut session) = opened?;
    let trace = match (trace_file, &args.trace) {
        (Some(file), Some(path)) => Some(Trace::start(file, path, runtime.engine())?),
        _ => None,
    };
    let opened = begin.elapsed();

    let mut output = Output::new(args, &prompt);
    let outcome = generate(args, &prompt, &runtime, &mut session, &mut output);
    let outcome = outcome.and_then(|run| Ok((run, runtime.engine().stats()?)));
    if let Some(trace) = trace {
        trace.finish()?;
    }
    let (run, stats) = match outcome {
        Ok(found) => found,
        Err(stop) => {
            drop((session, runtime));
            return Err(output.interrupted(stop));
        }
    };
    let backend = session.backend_name();
    let work = work(&runtime, &run, &stats);
    let io = runtime.engine().io().clone();
    let catalog = runtime.engine().catalog();
    let measured = Measured {
        architecture: spec.architecture,
        parameters: ModelSpec::parameters(catalog),
        weight_bytes: catalog.weight_bytes(),
        blocks: catalog.blocks().len(),
        device_kind: device.kind(),
        device_name: backend,
        open: opened,
        io_detail: io.to_string(),
    };
    // Measuring wires takes memory, so the model's goes first.
    drop((session, runtime));
    let limit = work.and_then(|work| {
        let threads = args.threads.map_or_else(machine::cores, |threads| threads as usize);
        let time = limit::probe_time(run.generation.timings.decode);
        measure_limit(&work, &device, &files, io.chosen, threads, time)
    });
    let summary = Summary::new(&measured, &run, &stats, work, limit, prompt.decode(&run.generation.tokens));
    if args.json { summary.print_json(args.logits) } else { output.finish(&summary) }
}

/// A finished generation, and the figures at its first token.
pub struct Run {
    /// What the runtime says.
    pub generation: Generation,
    /// The engine's figures when the first token came.
    pub at_first: Stats,
}

/// Tokens of context: what was asked for, or what prompt and new tokens need, as far as the model goes.
fn context(args: &RunArgs, prompt: &Prompt, spec: &ModelSpec) -> Outcome<usize> {
    let asked = args.ctx.map(|ctx| usize::try_from(ctx).unwrap_or(usize::MAX));
    if let Some(asked) = asked.filter(|&asked| asked > spec.context) {
        let message =
            format!("--ctx {asked}: the model was made for a context of {} tokens; use at most that", spec.context);
        return Err(stop(Kind::Config, message));
    }
    let wanted = prompt.tokens.len().saturating_add(args.max_new_tokens).max(1);
    let context = asked.unwrap_or_else(|| wanted.min(spec.context));
    if prompt.tokens.len() > context {
        let message = format!(
            "the prompt has {} tokens, more than the context of {context}; shorten it{}",
            prompt.tokens.len(),
            if asked.is_some_and(|asked| asked < spec.context) { ", or raise --ctx" } else { "" }
        );
        return Err(stop(Kind::Config, message));
    }
    Ok(context)
}

/// The settings that budgets are part of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `--ram`, `--vram` and how they are used.
    pub placement: PlacementArgs,
    /// `--kv`.
    pub kv: Option<Size>,
}

fn open(
    args: &RunArgs,
    settings: &Settings,
    device: &Device,
    model: ModelFiles,
    context: usize,
) -> Outcome<(Runtime, Session)> {
    let kv_bytes = settings.kv.map(|size| bytes_of(size, model.catalog.weight_bytes()));
    let engine = device.builder(&settings.placement, kv_bytes).open_model(model)?;
    let options = RuntimeOptions {
        activations: match args.activations {
            ActivationsArg::F32 => Activations::F32,
            ActivationsArg::Q8 => Activations::Q8,
        },
        threads: args.threads.map_or(0, |threads| threads as usize),
        ..RuntimeOptions::default()
    };
    let runtime = Runtime::open(engine, options)?;
    let session = runtime.session(Some(context))?;
    Ok((runtime, session))
}

fn sampling(args: &RunArgs) -> SamplingParams {
    let default = if args.prompt_ids.is_some() { 0.0 } else { TEMPERATURE_DEFAULT };
    let temperature = args.sampling.temperature.unwrap_or(default);
    if temperature == 0.0 {
        return SamplingParams::greedy();
    }
    SamplingParams {
        temperature,
        top_k: args.sampling.top_k,
        top_p: args.sampling.top_p,
        seed: args.sampling.seed,
        ..SamplingParams::default()
    }
}

fn generate(
    args: &RunArgs,
    prompt: &Prompt,
    runtime: &Runtime,
    session: &mut Session,
    output: &mut Output<'_>,
) -> Outcome<Run> {
    let stop_ids = prompt.tokenizer.as_ref().map_or(&[][..], |tokenizer| tokenizer.stop_ids());
    let request =
        Request { sampling: sampling(args), stop: stop_ids, ..Request::greedy(&prompt.tokens, args.max_new_tokens) };
    let mut at_first = None;
    let mut failed = None;
    let generation = session.generate(&request, Some(interrupt::flag()), &mut |token| {
        let told = match at_first {
            Some(_) => Ok(()),
            None => runtime.engine().stats().map(|stats| at_first = Some(stats)).map_err(Stop::from),
        };
        match told.and_then(|()| output.token(token)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(stop) => {
                failed = Some(stop);
                ControlFlow::Break(())
            }
        }
    });
    output.clear_progress();
    if let Some(stop) = failed {
        return Err(stop);
    }
    let generation = generation?;
    let at_first = match at_first {
        Some(stats) => stats,
        None => runtime.engine().stats()?,
    };
    Ok(Run { generation, at_first })
}

/// What the limit depends on; `None` if no token was decoded.
fn work(runtime: &Runtime, run: &Run, stats: &Stats) -> Option<Work> {
    let timings = &run.generation.timings;
    let tokens = timings.decoded_tokens as f64;
    let (gpu_keeps_bytes, keeps_bytes) = limit::kept_bytes(stats);
    let spec = runtime.spec();
    (timings.decoded_tokens > 0).then(|| Work {
        touched_bytes: limit::touched_bytes(spec, runtime.model().plan(), runtime.engine().catalog()),
        is_mixture: spec.layers.iter().any(|layer| matches!(layer.ffn, Ffn::Experts(_))),
        read_bytes: stats.disk.read_bytes.saturating_sub(run.at_first.disk.read_bytes) as f64 / tokens,
        seconds: timings.decode.as_secs_f64() / tokens,
        stall_seconds: Duration::from_nanos(stats.stall_ns.saturating_sub(run.at_first.stall_ns)).as_secs_f64()
            / tokens,
        gpu_keeps_bytes,
        keeps_bytes,
    })
}

fn measure_limit(
    work: &Work,
    device: &Device,
    files: &limit::ModelPaths,
    io: overspill::IoChoice,
    threads: usize,
    time: Duration,
) -> Option<Limit> {
    let streams = work.is_mixture && work.read_bytes > 0.0 || work.touched_bytes > work.keeps_bytes;
    let disk = if streams { limit::disk_bytes_per_s(files, io, time) } else { None };
    let (bus, ram) = match device {
        Device::Cpu => (None, machine::ram_read_bytes_per_s(threads, time)),
        #[cfg(feature = "gpu")]
        Device::Gpu(context) => (limit::bus_bytes_per_s(context), None),
    };
    limit::limit(work, Wires { disk, bus, ram })
}

/// Standard output while tokens come.
struct Output<'a> {
    /// Makes text of tokens; ids are written if there is none.
    stream: Option<DecodeStream>,
    prompt: &'a Prompt,
    json: bool,
    tokens: Vec<u32>,
    ends_line: bool,
    progress: indicatif::ProgressBar,
}

impl<'a> Output<'a> {
    fn new(args: &RunArgs, prompt: &'a Prompt) -> Self {
        let reading = format!("reading {} tokens of prompt", prompt.tokens.len());
        Self {
            stream: prompt.stream(),
            prompt,
            json: args.json,
            tokens: Vec::new(),
            ends_line: true,
            progress: progress::spinner(&reading),
        }
    }

    fn clear_progress(&mut self) {
        self.progress.finish_and_clear();
    }

    fn token(&mut self, token: u32) -> Outcome {
        self.tokens.push(token);
        if self.json {
            self.progress.set_message(format!("{} tokens", self.tokens.len()));
            return Ok(());
        }
        if self.tokens.len() == 1 {
            self.clear_progress();
        }
        let text = match &mut self.stream {
            Some(stream) => stream.push(token),
            None if self.tokens.len() == 1 => token.to_string(),
            None => format!(",{token}"),
        };
        self.write(&text)
    }

    fn write(&mut self, text: &str) -> Outcome {
        if text.is_empty() {
            return Ok(());
        }
        self.ends_line = text.ends_with('\n');
        report::print(text)
    }

    /// The rest of the text, and the closing line on standard error.
    fn finish(mut self, summary: &Summary) -> Outcome {
        self.end_text()?;
        report::note(&summary.line());
        Ok(())
    }

    fn end_text(&mut self) -> Outcome {
        let rest = self.stream.take().map(DecodeStream::finish).unwrap_or_default();
        self.write(&rest)?;
        if self.ends_line { Ok(()) } else { self.write("\n") }
    }

    /// What a failure becomes when some tokens have come: the text so far is ended, the JSON so far goes along.
    fn interrupted(mut self, stop: Stop) -> Stop {
        self.clear_progress();
        let Stop::Error(mut error) = stop else { return stop };
        let count = self.tokens.len();
        if self.json {
            let text = self.prompt.decode(&self.tokens);
            error.tokens = Some((std::mem::take(&mut self.tokens), text));
        } else if let Err(Stop::StdoutClosed) = self.end_text() {
            return Stop::StdoutClosed;
        }
        if error.kind == Kind::Interrupted {
            error.message = format!("interrupted after {count} tokens");
        }
        Stop::Error(error)
    }
}

impl From<overspill::Error> for CliError {
    fn from(error: overspill::Error) -> Self {
        use overspill::{Error, ErrorKind};
        let kind = match error.kind() {
            ErrorKind::NotFound => Kind::NotFound,
            ErrorKind::BadFile => Kind::BadFile,
            ErrorKind::TooSmall => Kind::TooSmall,
            ErrorKind::Config => Kind::Config,
            ErrorKind::Io => Kind::Io,
            ErrorKind::Device => Kind::Device,
            _ => Kind::Failed,
        };
        let mut found = Self::new(kind, error.to_string());
        if let Error::TooSmall { setting, bytes_min, .. } = error {
            found.missed = Some(Missed { setting, bytes_min });
        }
        found
    }
}

impl From<overspill_infer::InferError> for CliError {
    fn from(error: overspill_infer::InferError) -> Self {
        use overspill_infer::InferError;
        use overspill_infer::sampling::SamplingError;
        let kind = match error {
            InferError::Engine(error) => return error.into(),
            InferError::Config { .. } | InferError::Tensor { .. } | InferError::Tokenizer(_) => Kind::BadFile,
            InferError::Input { .. } | InferError::Sampling(SamplingError::Parameter { .. }) => Kind::Config,
            InferError::Sampling(_) => Kind::BadFile,
            InferError::Memory { .. } => Kind::TooSmall,
            InferError::Device(_) => Kind::Device,
            InferError::Cancelled => Kind::Interrupted,
            _ => Kind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<overspill::Error> for Stop {
    fn from(error: overspill::Error) -> Self {
        Self::Error(error.into())
    }
}

impl From<overspill_infer::InferError> for Stop {
    fn from(error: overspill_infer::InferError) -> Self {
        Self::Error(error.into())
    }
}
