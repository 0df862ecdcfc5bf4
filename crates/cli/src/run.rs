//! `overspill run`: a prompt in, text or token ids out, within budgets.
//!
//! Everything that can be known to be wrong is reported before anything is written to standard output: the model's
//! files, the prompt, the device, the budgets, in this order.

use crate::args::RunArgs;
use crate::changes::Changes;
use crate::device::Device;
use crate::errors::{Kind, Outcome, Stop, stop};
use crate::execute::{self, Run, Settings, Setup};
use crate::prompt::Prompt;
use crate::summary::{Measured, Summary};
use crate::top::live::Live;
use crate::trace::Trace;
use crate::watch::Watch;
use crate::{interrupt, limit, progress, report, routing, sampling, smallest};
use overspill_infer::arch::ModelSpec;
use overspill_infer::generate::{Request, Runtime, Session};
use overspill_infer::sampling::SamplingParams;
use overspill_infer::tokenizer::DecodeStream;
use std::path::PathBuf;
use std::time::Instant;

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
    let sampling = sampling::params(&args.sampling, &model, args.prompt_ids.is_some())?;
    let device = Device::choose(&args.placement)?;
    if args.kv.is_some() && device.kind() == "gpu" {
        let message = "--kv is for the CPU; on a GPU the cache is part of --vram: leave it out, or use --device cpu";
        return Err(stop(Kind::Usage, message));
    }
    let files: Vec<(PathBuf, u64)> = model.catalog.files().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
    let trace_file = args.trace.as_deref().map(Trace::create).transpose()?;
    let routing_file = args.record_routing.as_deref().map(routing::create).transpose()?;
    if let Some(path) = &args.metrics {
        Watch::check(path)?;
    }
    let top = args.top.then(Live::check).transpose()?;
    interrupt::install();
    let changes = Changes::start(&args.placement);
    let spinner = progress::spinner("opening the model");
    let setup = Setup {
        settings: Settings { placement: args.placement.clone(), kv: args.kv },
        activations: args.activations,
        threads: args.threads,
        context,
    };
    let attempt =
        |settings: &Settings| Setup { settings: settings.clone(), ..setup.clone() }.open(&device, model.clone());
    let opened = attempt(&setup.settings).map_err(|stop| smallest::named(stop, &setup.settings, attempt));
    spinner.finish_and_clear();
    let (runtime, mut session) = opened?;
    let trace = match (trace_file, &args.trace) {
        (Some(file), Some(path)) => Some(Trace::start(file, path, &runtime)?),
        _ => None,
    };
    let watch = Watch::start(args, &runtime)?;
    session.record_routing(routing_file.is_some());
    let opened = begin.elapsed();

    let view = top.map(|stream| Live::start(stream, watch.observer())).transpose()?;
    let mut output = Output::new(args, &prompt, view);
    let outcome = generate(args, &prompt, sampling, &runtime, &mut session, &mut output, (&watch, changes));
    if let Some(trace) = trace {
        trace.finish()?;
    }
    watch.finish()?;
    if let (Some(file), Some(path)) = (routing_file, &args.record_routing) {
        routing::write(file, path, &session.take_routing(), prompt.tokens.len())?;
    }
    let run = match outcome {
        Ok(found) => found,
        Err(stop) => {
            drop((session, runtime));
            return Err(output.interrupted(stop));
        }
    };
    let backend = session.backend_name();
    let work = run.work(&runtime);
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
        let time = limit::probe_time(run.generation.timings.decode);
        execute::measure_limit(&work, &device, &files, io.chosen, setup.threads(), time)
    });
    let summary = Summary::new(&measured, &run, work, limit, prompt.decode(&run.generation.tokens));
    if args.json { summary.print_json(args.logits) } else { output.finish(&summary) }
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

fn generate(
    args: &RunArgs,
    prompt: &Prompt,
    sampling: SamplingParams,
    runtime: &Runtime,
    session: &mut Session,
    output: &mut Output<'_>,
    (watch, mut changes): (&Watch, Changes),
) -> Outcome<Run> {
    let stop_ids = prompt.tokenizer.as_ref().map_or(&[][..], |tokenizer| tokenizer.stop_ids());
    let request = Request { sampling, stop: stop_ids, ..Request::greedy(&prompt.tokens, args.max_new_tokens) };
    let run = execute::generate(runtime, session, &request, &mut |token| {
        watch.token();
        output.token(token)?;
        changes.look(runtime.engine())
    });
    output.clear_progress();
    let closed = output.close_view();
    let run = run?;
    closed.map(|()| run)
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
    view: Option<Live>,
    /// Text that waits for the view's end: on a terminal, or a pipe that may lead to one.
    held: Option<String>,
}

impl<'a> Output<'a> {
    fn new(args: &RunArgs, prompt: &'a Prompt, view: Option<Live>) -> Self {
        let reading = format!("reading {} tokens of prompt", prompt.tokens.len());
        let held = (view.is_some() && !report::stdout_is_file()).then(String::new);
        Self {
            stream: prompt.stream(),
            prompt,
            json: args.json,
            tokens: Vec::new(),
            ends_line: true,
            progress: if view.is_some() { progress::none() } else { progress::spinner(&reading) },
            view,
            held,
        }
    }

    fn clear_progress(&mut self) {
        self.progress.finish_and_clear();
    }

    fn token(&mut self, token: u32) -> Outcome {
        self.tokens.push(token);
        if self.view.as_ref().is_some_and(Live::is_closed) {
            self.close_view()?;
        }
        if self.json && self.view.is_none() {
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
        if let Some(view) = &self.view {
            view.push(&text);
        }
        if self.json { Ok(()) } else { self.write(&text) }
    }

    /// Gives the terminal back, and writes what has waited for that.
    fn close_view(&mut self) -> Outcome {
        self.view = None;
        match self.held.take() {
            Some(text) => self.write(&text),
            None => Ok(()),
        }
    }

    fn write(&mut self, text: &str) -> Outcome {
        if text.is_empty() {
            return Ok(());
        }
        self.ends_line = text.ends_with('\n');
        if let Some(held) = &mut self.held {
            held.push_str(text);
            return Ok(());
        }
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
