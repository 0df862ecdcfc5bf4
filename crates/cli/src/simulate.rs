//! `overspill simulate`: a model over budgets, policies and machines in virtual time, by the brain that runs the engine.

use crate::args::{EvictArg, PrefetchArg};
use crate::errors::{Kind, Outcome, stop};
use crate::plan::{self, bytes_of, ram_bytes_of};
use crate::plan_args::{OutputArg, SimulateArgs};
use crate::plan_hardware;
use crate::plan_model;
use crate::report::{self, Align, Table};
use crate::simulate_lists::sizes;
use crate::sizes::{Size, human_bytes};
use crate::{interrupt, machine, progress};
use clap::ValueEnum;
use overspill_sim::hardware::Hardware;
use overspill_sim::planner::{Budgets, Device, Machine, ModelShape, PlanError, PlanOptions, Prediction};
use overspill_sim::sweep;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Instant;

/// A sweep of more points needs `--yes`.
const POINTS_UNASKED: usize = 100_000;

/// One configuration.
#[derive(Clone, Debug)]
struct Point {
    hardware: usize,
    device: Device,
    budgets: Budgets,
    evict: EvictArg,
    prefetch: PrefetchArg,
}

/// What became of it.
type Answer = Result<Prediction, PlanError>;

/// A sweep, done.
struct Sweep<'a> {
    shape: &'a ModelShape,
    notes: &'a [String],
    machines: &'a [Hardware],
    points: &'a [Point],
    answers: &'a [Answer],
    options: &'a PlanOptions,
    seconds: f64,
}

/// Sweeps, and prints.
///
/// # Errors
/// A bad model, profile, list or option; too many points without `--yes`; no point fits; Ctrl-C.
pub fn simulate(args: &SimulateArgs) -> Outcome {
    let [vram, ram] = [("--vram", &args.vram), ("--ram", &args.ram)].map(|(option, list)| {
        let list = list.as_deref().map(sizes).transpose();
        list.map_err(|cause| stop(Kind::Usage, format!("{option}: {cause}")))
    });
    let (vram, ram) = (vram?, ram?);
    let model = plan_model::planned(&args.model)?;
    let options = plan::options(&args.assume, &model.shape)?;
    let per_device = |list: &Option<Vec<Size>>| list.as_ref().map_or(1, Vec::len);
    let count =
        [per_device(&vram), per_device(&ram), args.evict.len(), args.prefetch.len(), args.hardware.len().max(1)]
            .into_iter()
            .fold(1usize, usize::saturating_mul);
    if count > POINTS_UNASKED && !args.yes {
        let message = format!("the sweep has {count} points: name fewer, or add --yes if so many are meant");
        return Err(stop(Kind::Usage, message));
    }
    let here = plan::here(args.model.model.as_deref(), &model, &args.assume);
    let machines = plan_hardware::machines(&args.hardware, here)?;
    let points = points(args, &model.shape, &options, &machines, (vram.as_deref(), ram.as_deref()));
    interrupt::install();
    let started = Instant::now();
    let threads = args.assume.threads.map_or_else(machine::cores, |threads| threads as usize);
    let answers = answer(args, &model.shape, &options, &machines, &points, threads)?;
    let sweep = Sweep {
        shape: &model.shape,
        notes: &model.notes,
        machines: &machines,
        points: &points,
        answers: &answers,
        options: &options,
        seconds: started.elapsed().as_secs_f64(),
    };
    if let Some(Err(error)) = answers.first().filter(|_| answers.iter().all(Result::is_err)) {
        return Err(plan::refused(error));
    }
    let form = if args.json { OutputArg::Json } else { args.output };
    match form {
        OutputArg::Json => report::print_json(&sweep.json()),
        OutputArg::Csv => report::print(&sweep.csv()),
        OutputArg::Md => report::print(&sweep.markdown()),
        OutputArg::Table => report::print(&sweep.table()),
    }
}

fn points(
    args: &SimulateArgs,
    shape: &ModelShape,
    options: &PlanOptions,
    machines: &[Hardware],
    (vram, ram): (Option<&[Size]>, Option<&[Size]>),
) -> Vec<Point> {
    let apart = shape.kv_bytes(options.context, options.chunk).saturating_add(shape.scratch_bytes(options.chunk));
    let mut points = Vec::new();
    for (index, hardware) in machines.iter().enumerate() {
        // In a sweep the device is one: GPUs where there are some, unless the CPU is asked for.
        let device = options.device.unwrap_or(if hardware.gpus.is_empty() { Device::Cpu } else { Device::Gpu });
        let all = Budgets::of(hardware, device, apart);
        let unified = hardware.unified_memory && device == Device::Gpu;
        let vrams = match (device, vram.or(if unified { ram } else { None })) {
            (Device::Cpu, _) => vec![0],
            (Device::Gpu, None) => vec![all.vram_bytes],
            (Device::Gpu, Some(list)) => list.iter().map(|&size| bytes_of(size, shape, apart)).collect(),
        };
        let rams = match ram.filter(|_| !unified) {
            None => vec![all.ram_bytes],
            Some(list) => list.iter().map(|&size| ram_bytes_of(size, shape)).collect(),
        };
        for &vram_bytes in &vrams {
            for &ram_bytes in &rams {
                for &evict in &args.evict {
                    for &prefetch in &args.prefetch {
                        let budgets = Budgets { vram_bytes, ram_bytes };
                        points.push(Point { hardware: index, device, budgets, evict, prefetch });
                    }
                }
            }
        }
    }
    points
}

fn answer(
    args: &SimulateArgs,
    shape: &ModelShape,
    options: &PlanOptions,
    machines: &[Hardware],
    points: &[Point],
    threads: usize,
) -> Outcome<Vec<Answer>> {
    let bar = progress::items(points.len() as u64, "simulating");
    let answers = sweep::map(points.iter().collect(), threads, |point: &Point| {
        if interrupt::asked() {
            return None;
        }
        let hardware = machines[point.hardware].clone();
        let machine = Machine { hardware, device: point.device, budgets: point.budgets };
        let options = PlanOptions {
            evict: plan::evict(point.evict),
            prefetch: plan::prefetch(point.prefetch),
            ..options.clone()
        };
        let answer = if args.prefill { options.prefill(shape, &machine) } else { options.decode(shape, &machine) };
        bar.inc(1);
        Some(answer)
    });
    bar.finish_and_clear();
    crate::doctor::check_interrupt()?;
    Ok(answers.into_iter().flatten().collect())
}

/// A word of the command line.
fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

const COLUMNS: [&str; 14] = [
    "machine",
    "device",
    "vram_bytes",
    "ram_bytes",
    "evict",
    "prefetch",
    "tokens_per_s",
    "bound_by",
    "disk_bytes",
    "bus_bytes",
    "hit_rate",
    "stall_s",
    "ratio",
    "refused",
];

impl Sweep<'_> {
    fn rows(&self) -> impl Iterator<Item = (&Point, &Answer, &Hardware)> {
        self.points.iter().zip(self.answers).map(|(point, answer)| (point, answer, &self.machines[point.hardware]))
    }

    fn json(&self) -> Value {
        let point = |(point, answer, hardware): (&Point, &Answer, &Hardware)| {
            let mut object = json!({
                "machine": hardware.name,
                "device": point.device.name(),
                "vram_bytes": point.budgets.vram_bytes,
                "ram_bytes": point.budgets.ram_bytes,
                "evict": word(point.evict),
                "prefetch": word(point.prefetch),
            });
            let more = match answer {
                Ok(p) => json!({
                    "tokens_per_s": p.tokens_per_s(),
                    "seconds_per_pass": p.seconds_per_pass,
                    "bound_by": p.bound.name(),
                    "disk_bytes": p.disk_bytes,
                    "bus_bytes": p.bus_bytes,
                    "touched_bytes": p.touched_bytes,
                    "hit_rate": p.hit_rate,
                    "stall_s": p.stall_seconds,
                    "compute_s": p.compute_seconds,
                    "limit": { "seconds_per_pass": p.limit_seconds, "ratio": p.seconds_per_pass / p.limit_seconds.max(1e-12) },
                    "in_flight_bytes": p.ring_bytes,
                    "steady": p.steady,
                    "events": p.events,
                    "evict_in_force": p.evict,
                }),
                Err(error) => json!({ "refused": error.to_string() }),
            };
            if let (Some(object), Value::Object(more)) = (object.as_object_mut(), more) {
                object.extend(more);
            }
            object
        };
        json!({
            "model": {
                "name": self.shape.label,
                "parameters": self.shape.parameters,
                "bytes": self.shape.bytes,
                "touched_bytes_per_token": self.shape.touched_bytes(),
                "notes": self.notes,
            },
            "context": self.options.context,
            "chunk": self.options.chunk,
            "points": self.rows().map(point).collect::<Vec<_>>(),
            "seconds": self.seconds,
        })
    }

    /// One line's cells, bytes as numbers.
    fn cells((point, answer, hardware): (&Point, &Answer, &Hardware)) -> [String; 14] {
        let start = [
            hardware.name.clone(),
            point.device.name().to_owned(),
            point.budgets.vram_bytes.to_string(),
            point.budgets.ram_bytes.to_string(),
            word(point.evict),
            word(point.prefetch),
        ];
        let end = match answer {
            Ok(p) => [
                format!("{:.6}", p.tokens_per_s()),
                p.bound.name().to_owned(),
                p.disk_bytes.to_string(),
                p.bus_bytes.to_string(),
                format!("{:.6}", p.hit_rate),
                format!("{:.9}", p.stall_seconds),
                format!("{:.4}", p.seconds_per_pass / p.limit_seconds.max(1e-12)),
                String::new(),
            ],
            Err(error) => {
                let mut cells: [String; 8] = Default::default();
                cells[7] = error.to_string();
                cells
            }
        };
        let mut cells: [String; 14] = Default::default();
        cells.iter_mut().zip(start.into_iter().chain(end)).for_each(|(cell, value)| *cell = value);
        cells
    }

    fn csv(&self) -> String {
        let quoted = |cell: &String| {
            if cell.contains([',', '"', '\n', '\r']) {
                format!("\"{}\"", cell.replace('"', "\"\""))
            } else {
                cell.clone()
            }
        };
        let mut text = COLUMNS.join(",");
        text.push('\n');
        for row in self.rows() {
            let _ = writeln!(text, "{}", Self::cells(row).iter().map(quoted).collect::<Vec<_>>().join(","));
        }
        text
    }

    /// The cells that people want.
    fn short(row: (&Point, &Answer, &Hardware)) -> [String; 10] {
        let (point, answer, hardware) = row;
        let size = |bytes: u64| if bytes == 0 { "-".to_owned() } else { human_bytes(bytes) };
        let [speed, bound, disk, hits, ratio] = match answer {
            Ok(p) => [
                format!("{:.2}", p.tokens_per_s()),
                p.bound.name().to_owned(),
                size(p.disk_bytes),
                format!("{:.1} %", p.hit_rate * 100.0),
                format!("{:.2}", p.seconds_per_pass / p.limit_seconds.max(1e-12)),
            ],
            Err(error) => ["-".to_owned(), error.to_string(), String::new(), String::new(), String::new()],
        };
        [
            hardware.name.clone(),
            size(point.budgets.vram_bytes),
            size(point.budgets.ram_bytes),
            word(point.evict),
            word(point.prefetch),
            speed,
            disk,
            hits,
            ratio,
            bound,
        ]
    }

    const SHORT: [(&'static str, Align); 10] = [
        ("machine", Align::Left),
        ("VRAM", Align::Right),
        ("RAM", Align::Right),
        ("evict", Align::Left),
        ("prefetch", Align::Left),
        ("tokens/s", Align::Right),
        ("from disk", Align::Right),
        ("hits", Align::Right),
        ("x limit", Align::Right),
        ("bound by", Align::Left),
    ];

    fn table(&self) -> String {
        let mut table = Table::new(&Self::SHORT);
        self.rows().for_each(|row| table.row(Self::short(row)));
        format!("{}\n{}", self.heading(), table.render(report::coloured(&std::io::stdout())))
    }

    fn markdown(&self) -> String {
        let mut text = format!("{}\n\n|", self.heading());
        for (name, _) in Self::SHORT {
            let _ = write!(text, " {name} |");
        }
        text.push_str("\n|");
        for (_, align) in Self::SHORT {
            text.push_str(if align == Align::Left { " --- |" } else { " ---: |" });
        }
        text.push('\n');
        for row in self.rows() {
            text.push('|');
            for cell in Self::short(row) {
                let _ = write!(text, " {} |", cell.replace('|', "\\|"));
            }
            text.push('\n');
        }
        text
    }

    fn heading(&self) -> String {
        format!(
            "{}: {} points of {} positions in {:.2} s",
            self.shape.label,
            self.points.len(),
            self.options.context,
            self.seconds
        )
    }
}
