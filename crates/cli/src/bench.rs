//! `overspill bench`: every combination of budgets, policies and readers, run several times, with the distance of each
//! from what the wires allow.
//!
//! Repetitions are the outer loop and every other one goes backwards, so that a drift of the machine does not favour
//! anybody. Wires are measured before and after. Each run opens the model anew.

mod baseline;
mod charts;
mod journal;
mod lists;
mod page;
mod points;
mod results;
mod sample;

pub use lists::{Counts, Sizes};

use crate::args::{BenchArgs, BenchOutput};
use crate::device::Device;
use crate::errors::{Kind, Outcome, Stop, stop};
use crate::execute::{self, Run};
use crate::limit::{self, ModelPaths};
use crate::timeline::{self, Names, Recorder};
use crate::{interrupt, machine, progress, report, status};
use journal::{Ceiling, Figures, Journal, Machine, Record, TierFigures};
use overspill::{FileSet, IoChoice, Stats};
use overspill_formats::ModelFiles;
use overspill_infer::arch::ModelSpec;
use overspill_infer::generate::Request;
use page::Timeline;
use points::{ModelFacts, Planned, Point};
use results::Results;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// More configurations than this need `--yes`.
const POINTS_FREE: u64 = 1000;
/// More than this are a slip of the pen: the list alone would fill memory.
const POINTS_MAX: u64 = 1_000_000;

/// Measures.
///
/// # Errors
/// Arguments that make no sense together; files that cannot be written; Ctrl-C; a model or a configuration that failed
/// (after all others have run); a regression against the baseline.
pub fn bench(args: &BenchArgs) -> Outcome {
    let count = points::count(args);
    if count > POINTS_MAX || (count > POINTS_FREE && !args.yes) {
        let cure = if count > POINTS_MAX { "take fewer" } else { "take fewer, or confirm with --yes" };
        let message = format!("{count} configurations × {} repetitions are asked for; {cure}", args.repetitions);
        return Err(stop(Kind::Usage, message));
    }
    // A bad baseline is told before hours of measuring, not after.
    let baseline = args.baseline.as_deref().map(baseline::Baseline::read).transpose()?;
    if let Some(path) = &args.report {
        page::check(path)?;
    }
    let mut bench = Bench::new(args)?;
    interrupt::install();
    bench.run()?;
    let points: Vec<Point> = bench.planned.iter().map(|planned| planned.point.clone()).collect();
    let timelines = if args.report.is_some() { bench.timelines()? } else { Vec::new() };
    let mut results = Results::of(&bench.records, &points, bench.machine.clone(), status::unix_ms());
    let compared = baseline.map(|baseline| baseline.compare(&mut results, args.threshold.0));
    if let Some(path) = &args.report {
        page::write(path, &results, &timelines)?;
    }
    print(args, &results, compared.as_ref())?;
    bench.verdict(&results)?;
    match compared.filter(|compared| !compared.regressions.is_empty()) {
        Some(compared) => Err(stop(Kind::Failed, compared.message(args.threshold.0))),
        None => Ok(()),
    }
}

fn print(args: &BenchArgs, results: &Results, compared: Option<&baseline::Compared>) -> Outcome {
    let notes = results.notes.iter().chain(compared.iter().flat_map(|compared| &compared.notes));
    match args.output {
        BenchOutput::Json => report::print_json(results)?,
        BenchOutput::Jsonl => {}
        BenchOutput::Csv => report::print(&results.csv())?,
        BenchOutput::Md => report::print(&results.table(false).markdown())?,
        BenchOutput::Table => {
            report::print(&results.table(false).render(report::coloured(&std::io::stdout())))?;
        }
    }
    notes.for_each(|note| report::note(&format!("note: {note}")));
    Ok(())
}

/// A model that could be opened.
struct Model {
    path: String,
    files: ModelFiles,
    spec: ModelSpec,
    paths: Vec<(PathBuf, u64)>,
}

/// What decides which device is opened: `--device`, `--adapter`, and whether a budget of VRAM asks for a GPU.
type DeviceKey = (String, Option<String>, bool);

fn device_key(point: &Point) -> DeviceKey {
    (point.device.clone(), point.adapter.clone(), point.vram.is_some())
}

struct Bench<'a> {
    args: &'a BenchArgs,
    models: Vec<Model>,
    planned: Vec<Planned>,
    machine: Machine,
    records: Vec<Record>,
    /// Runs that the records have already.
    done: BTreeSet<(Point, u64)>,
    failed: BTreeMap<Point, Stop>,
    /// What could not be opened.
    unopened: Option<Stop>,
    journal: Option<Journal>,
    devices: BTreeMap<DeviceKey, Device>,
}

impl<'a> Bench<'a> {
    /// Opens models and files.
    fn new(args: &'a BenchArgs) -> Outcome<Self> {
        let (mut models, mut unopened) = (Vec::new(), None);
        for path in &args.models {
            match open(path) {
                Ok(model) => models.push(model),
                Err(Stop::Error(error)) if args.models.len() > 1 => {
                    report::note(&format!("note: left out: {error}"));
                    unopened.get_or_insert(Stop::Error(error));
                }
                Err(stop) => return Err(stop),
            }
        }
        if models.is_empty() {
            return Err(unopened.unwrap_or_else(|| stop(Kind::Usage, "there is no model; name one or more")));
        }
        let mut planned = Vec::new();
        for (index, model) in models.iter().enumerate() {
            let longest = longest(args);
            if longest > model.spec.context as u64 {
                let message = format!(
                    "{}: {longest} tokens of prompt and answer are more than its context of {}; shorten \
                     --prompt-tokens or --max-new-tokens",
                    model.path, model.spec.context
                );
                return Err(stop(Kind::Config, message));
            }
            planned.extend(points::of_model(args, index, &model.path));
        }
        let (journal, records) = match (&args.resume, &args.save) {
            (Some(path), _) => {
                let (journal, records) = Journal::resume(path)?;
                (Some(journal), records)
            }
            (None, Some(path)) => (Some(Journal::create(path)?), Vec::new()),
            (None, None) => (None, Vec::new()),
        };
        let machine = machine_facts();
        let mut bench = Self {
            args,
            models,
            planned,
            machine,
            records: Vec::new(),
            done: BTreeSet::new(),
            failed: BTreeMap::new(),
            unopened,
            journal,
            devices: BTreeMap::new(),
        };
        bench.take_up(records)?;
        Ok(bench)
    }

    /// Takes over what an interrupted benchmark has left, if it is this one's.
    fn take_up(&mut self, records: Vec<Record>) -> Outcome {
        for record in &records {
            match record {
                Record::Start { machine, .. } if *machine != self.machine => {
                    let message = "--resume: the results are of another machine; begin anew with --save";
                    return Err(stop(Kind::Config, message));
                }
                Record::Model { path, facts } => {
                    let mine = self.models.iter().find(|model| model.path == *path);
                    if mine.is_some_and(|model| ModelFacts::of(&model.files, &model.spec) != *facts) {
                        let message = format!("--resume: {path} is another model now; begin anew with --save");
                        return Err(stop(Kind::Config, message));
                    }
                }
                Record::Run { point, repetition, .. } => {
                    self.done.insert((point.clone(), *repetition));
                }
                _ => {}
            }
        }
        // What failed is tried again: perhaps that was the reason for the interruption.
        self.records = records.into_iter().filter(|record| !matches!(record, Record::Failed { .. })).collect();
        let start = Record::Start {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            at_unix_ms: status::unix_ms(),
            machine: self.machine.clone(),
        };
        self.keep(start)?;
        for index in 0..self.models.len() {
            let model = &self.models[index];
            let facts = ModelFacts::of(&model.files, &model.spec);
            self.keep(Record::Model { path: model.path.clone(), facts })?;
        }
        Ok(())
    }

    /// Keeps a record, in the file first.
    fn keep(&mut self, record: Record) -> Outcome {
        if let Some(journal) = &mut self.journal {
            journal.append(&record)?;
        }
        if self.args.output == BenchOutput::Jsonl {
            report::print(&(journal::line(&record)? + "\n"))?;
        }
        self.records.push(record);
        Ok(())
    }

    /// All runs that are missing, wires before and after.
    fn run(&mut self) -> Outcome {
        let order = order(self.planned.len(), self.args.warmup, self.args.repetitions);
        let missing: Vec<(usize, Option<u64>)> = order
            .into_iter()
            .filter(|&(index, repetition)| {
                // Warm-ups are for what is measured after them.
                let of = |repetition| self.done.contains(&(self.planned[index].point.clone(), repetition));
                repetition.map_or_else(|| !(0..self.args.repetitions).all(of), |repetition| !of(repetition))
            })
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        self.ceilings("before")?;
        let varying = points::varying(self.planned.iter().map(|planned| &planned.point));
        let bar = progress::runs(missing.len() as u64);
        for (index, repetition) in missing {
            let planned = self.planned[index].clone();
            bar.set_message(planned.point.label(&varying));
            self.run_one(&planned, repetition).map_err(|stop| self.advise(stop))?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        self.ceilings("after")
    }

    fn run_one(&mut self, planned: &Planned, repetition: Option<u64>) -> Outcome {
        if interrupt::asked() {
            return Err(stop(Kind::Interrupted, "interrupted"));
        }
        if self.failed.contains_key(&planned.point) {
            return Ok(());
        }
        let outcome = self.measure(planned, false);
        match (outcome, repetition) {
            (Ok(_), None) => Ok(()),
            (Ok((figures, _)), Some(repetition)) => {
                let figures = Box::new(figures);
                self.keep(Record::Run { point: planned.point.clone(), repetition, figures })
            }
            (Err(Stop::Error(error)), _) if !matches!(error.kind, Kind::Interrupted) => {
                let record = Record::Failed { point: planned.point.clone(), message: error.message.clone() };
                self.failed.insert(planned.point.clone(), Stop::Error(error));
                self.keep(record)
            }
            (Err(stop), _) => Err(stop),
        }
    }

    /// Says how to go on after Ctrl-C.
    fn advise(&self, stop: Stop) -> Stop {
        let Stop::Error(mut error) = stop else { return stop };
        if error.kind == Kind::Interrupted {
            error.message = match &self.journal {
                Some(journal) => format!(
                    "interrupted; all finished runs are in {}: go on with --resume {0}",
                    journal.path().display()
                ),
                None => "interrupted; with --save FILE the finished runs would have been kept".to_owned(),
            };
        }
        Stop::Error(error)
    }

    fn device(&mut self, planned: &Planned) -> Outcome<&Device> {
        let key = device_key(&planned.point);
        if !self.devices.contains_key(&key) {
            let device = Device::choose(&planned.setup.settings.placement)?;
            self.devices.insert(key.clone(), device);
        }
        self.devices.get(&key).ok_or_else(|| stop(Kind::Failed, "a device was lost; please report it"))
    }

    /// One run; with the last token's timeline if it is wanted.
    fn measure(&mut self, planned: &Planned, traced: bool) -> Outcome<(Figures, Option<Timeline>)> {
        self.device(planned)?;
        let (model, device) = (&self.models[planned.model], &self.devices[&device_key(&planned.point)]);
        if planned.point.cold
            && let Ok(files) = FileSet::open(&model.paths)
        {
            files.drop_cache();
        }
        let begin = Instant::now();
        let (runtime, mut session) = planned.setup.open(device, model.files.clone())?;
        let open = begin.elapsed();
        let recorder = if traced { Recorder::start(runtime.engine()) } else { None };
        let mut prompts = points::prompts(planned.point.prompt_tokens, model.spec.vocab);
        let prompt = prompts.next().unwrap_or_default();
        let count = usize::try_from(planned.point.max_new_tokens).unwrap_or(usize::MAX);
        let request = Request { ignore_eos: true, ..Request::greedy(&prompt, count) };
        for other in prompts.take(usize::try_from(planned.point.rehearsed).unwrap_or(usize::MAX)) {
            session.prefill(&other, Some(interrupt::flag()))?;
            session.reset();
        }
        let run = execute::generate(&runtime, &mut session, &request, &mut |_| Ok(()))?;
        let timeline = recorder.and_then(|recorder| {
            let (length_ns, spans) = timeline::last_token(&recorder.finish())?;
            Some(Timeline::new(planned.point.clone(), length_ns, &spans, &Names::of(&runtime)))
        });
        let mut figures = figures(&run, open, session.backend_name());
        figures.work = run.work(&runtime);
        Ok((figures, timeline))
    }

    /// Measures the wires of every model, reader, device and number of threads.
    fn ceilings(&mut self, when: &str) -> Outcome {
        let mut keys = BTreeMap::new();
        for planned in &self.planned {
            let point = &planned.point;
            let key = (planned.model, point.io.clone(), point.device.clone(), point.threads);
            keys.entry(key).or_insert_with(|| planned.clone());
        }
        let time = Duration::from_secs_f64(self.args.probe_seconds.0);
        let bar = progress::spinner("measuring the wires");
        let (mut disks, mut rams) = (BTreeMap::new(), BTreeMap::new());
        for ((index, io, device_name, threads), planned) in keys {
            if interrupt::asked() {
                return Err(self.advise(stop(Kind::Interrupted, "interrupted")));
            }
            bar.set_message(format!("measuring the wires: {}", planned.point.label(&["model", "io"])));
            let paths = self.models[index].paths.clone();
            let disk = *disks.entry((index, io.clone())).or_insert_with(|| disk(&paths, &io, time));
            // A device that cannot be had is told by the runs.
            let on_cpu = self.device(&planned).map(|device| device.kind() == "cpu").unwrap_or(false);
            let count = planned.setup.threads();
            let ram = on_cpu
                .then(|| *rams.entry(count).or_insert_with(|| machine::ram_read_bytes_per_s(count, time)))
                .flatten();
            let bus = self.bus(&planned);
            self.keep(Record::Ceiling(Ceiling {
                model: planned.point.model.clone(),
                io,
                device: device_name,
                threads: threads.unwrap_or(0),
                when: when.to_owned(),
                disk_bytes_per_s: disk,
                ram_bytes_per_s: ram,
                bus_bytes_per_s: bus,
            }))?;
        }
        bar.finish_and_clear();
        Ok(())
    }

    #[cfg(feature = "gpu")]
    fn bus(&mut self, planned: &Planned) -> Option<f64> {
        match self.device(planned) {
            Ok(Device::Gpu(context)) => limit::bus_bytes_per_s(context),
            _ => None,
        }
    }

    #[cfg(not(feature = "gpu"))]
    fn bus(&mut self, _planned: &Planned) -> Option<f64> {
        None
    }

    /// One more run of a few configurations, to draw a token of each.
    fn timelines(&mut self) -> Outcome<Vec<Timeline>> {
        let ran: Vec<Planned> =
            self.planned.iter().filter(|planned| !self.failed.contains_key(&planned.point)).cloned().collect();
        let mut found = Vec::new();
        for index in spread(ran.len(), page::TIMELINES_MAX) {
            match self.measure(&ran[index], true) {
                Ok((_, timeline)) => found.extend(timeline),
                Err(Stop::Error(error)) if error.kind == Kind::Interrupted => {
                    return Err(self.advise(Stop::Error(error)));
                }
                Err(Stop::Error(error)) => report::note(&format!("note: there is no picture of a token: {error}")),
                Err(stop) => return Err(stop),
            }
        }
        Ok(found)
    }

    /// What the exit code says once all that can run has run.
    fn verdict(&mut self, results: &Results) -> Outcome {
        if let Some(stop) = self.unopened.take() {
            return Err(stop);
        }
        let failed = std::mem::take(&mut self.failed);
        // A budget too small is an answer of a sweep, unless nothing else came of it.
        let all = results.rows.iter().all(|row| row.failed.is_some());
        let serious = |stop: &Stop| !matches!(stop, Stop::Error(error) if error.kind == Kind::TooSmall);
        match failed.into_values().find(|stop| all || serious(stop)) {
            Some(stop) => Err(stop),
            None => Ok(()),
        }
    }
}

fn open(path: &Path) -> Outcome<Model> {
    let files = overspill_formats::open(path)?;
    let spec = ModelSpec::from(&files.metadata, &files.catalog)?;
    let paths = files.catalog.files().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
    Ok(Model { path: path.display().to_string(), files, spec, paths })
}

fn longest(args: &BenchArgs) -> u64 {
    let most = |counts: &Counts| counts.0.iter().copied().max().unwrap_or(0);
    most(&args.prompt_tokens).saturating_add(most(&args.max_new_tokens))
}

/// Which configuration when: warm-ups (no repetition) first, then repetition by repetition, every other backwards.
fn order(points: usize, warmups: u64, repetitions: u64) -> Vec<(usize, Option<u64>)> {
    let rounds = (0..warmups).map(|_| None).chain((0..repetitions).map(Some));
    let round = |(number, repetition): (usize, Option<u64>)| {
        let place = move |index: usize| if number.is_multiple_of(2) { index } else { points - 1 - index };
        (0..points).map(move |index| (place(index), repetition))
    };
    rounds.enumerate().flat_map(round).collect()
}

/// At most `wanted` of `count` places, evenly spread, the ends among them.
fn spread(count: usize, wanted: usize) -> Vec<usize> {
    if count <= wanted {
        return (0..count).collect();
    }
    (0..wanted).map(|index| index * (count - 1) / (wanted - 1).max(1)).collect()
}

fn disk(paths: &ModelPaths, io: &str, time: Duration) -> Option<f64> {
    let io = IoChoice::ALL.into_iter().find(|choice| choice.name() == io)?;
    limit::disk_bytes_per_s(paths, io, time)
}

fn figures(run: &Run, open: Duration, device: String) -> Figures {
    let (timings, first, end) = (&run.generation.timings, &run.at_first, &run.at_end);
    let since = |value: fn(&Stats) -> u64| value(end).saturating_sub(value(first));
    let seconds = |ns: u64| Duration::from_nanos(ns).as_secs_f64();
    let tier = |(index, tier): (usize, &overspill::TierFigures)| {
        let before = first.tiers.get(index);
        TierFigures {
            label: tier.label.to_owned(),
            budget_bytes: tier.budget_bytes,
            peak_bytes: tier.peak_bytes,
            decode_hits: tier.hits.saturating_sub(before.map_or(0, |tier| tier.hits)),
            decode_misses: tier.misses.saturating_sub(before.map_or(0, |tier| tier.misses)),
            evictions: tier.blocks.evictions,
        }
    };
    Figures {
        device,
        open_s: open.as_secs_f64(),
        first_token_s: timings.first_token.as_secs_f64(),
        prefill_s: timings.prefill.as_secs_f64(),
        decode_s: timings.decode.as_secs_f64(),
        prompt_tokens: timings.prompt_tokens as u64,
        decoded_tokens: timings.decoded_tokens as u64,
        tiers: end.tiers.iter().enumerate().map(tier).collect(),
        read_bytes: end.disk.read_bytes,
        decode_read_bytes: since(|stats| stats.disk.read_bytes),
        decode_stall_s: seconds(since(|stats| stats.stall_ns)),
        decode_disk_busy_s: seconds(since(|stats| stats.disk.busy_ns)),
        decode_bus_busy_s: seconds(since(|stats| stats.bus.busy_ns)),
        decode_uploaded_bytes: since(|stats| stats.bus.uploaded_bytes),
        in_flight_bytes: end.in_flight_bytes(),
        work: None,
        evict: end.decision.evict.to_owned(),
        io: end.io.to_owned(),
        answer: hash(&run.generation.tokens),
    }
}

/// FNV-1a, 64 bits: enough to see a difference by.
fn hash(tokens: &[u32]) -> String {
    let bytes = tokens.iter().flat_map(|token| token.to_le_bytes());
    let hash = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

fn machine_facts() -> Machine {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
    };
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    Machine {
        cpu: field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        cores: machine::cores() as u64,
        memory_bytes: kib.map_or(0, |kib: u64| kib << 10),
        system: std::env::consts::OS.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_are_outermost_and_alternate() {
        let order = order(3, 1, 2);
        let expected = [(0, None), (1, None), (2, None), (2, Some(0)), (1, Some(0)), (0, Some(0))];
        assert_eq!(order[..6], expected);
        assert_eq!(order[6..], [(0, Some(1)), (1, Some(1)), (2, Some(1))]);
    }

    #[test]
    fn pictures_are_spread_over_all_configurations() {
        assert_eq!(spread(10, 4), [0, 3, 6, 9]);
        assert_eq!(spread(2, 4), [0, 1]);
        assert_eq!(spread(0, 4), [0usize; 0]);
    }

    #[test]
    fn answers_are_told_apart() {
        assert_eq!(hash(&[1, 2]), hash(&[1, 2]));
        assert_ne!(hash(&[1, 2]), hash(&[2, 1]));
        assert_eq!(hash(&[]), "cbf29ce484222325");
    }
}
