//! Records put together: one row a configuration, its distance from the limit, the change against a baseline; as tables
//! for people and for programs.

use super::journal::{Ceiling, Figures, Machine, Record};
use super::points::{ModelFacts, Point, varying};
use super::sample::{Sample, digits};
use crate::limit::{self, Limit, Wires};
use crate::report::{Align, Table};
use serde::Serialize;
use std::collections::BTreeMap;

/// A configuration and all its runs.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which.
    pub point: Point,
    /// Decoded tokens a second, by run.
    pub decode: Sample,
    /// Tokens of the prompt a second, by run.
    pub prefill: Sample,
    /// Seconds of each decoded token that were compute, mean of all runs.
    pub compute_s: f64,
    /// Seconds of each decoded token that were waiting for blocks.
    pub stall_s: f64,
    /// Seconds of each decoded token in which the disk was at work, compute or not.
    pub disk_busy_s: f64,
    /// The same for the bus.
    pub bus_busy_s: f64,
    /// Share of the blocks asked for that were there, 0 to 1, in the tier that computes, while decoding.
    pub hit_share: Option<f64>,
    /// Bytes read from disk for each decoded token.
    pub read_bytes_per_token: f64,
    /// The fastest that physics allows.
    pub limit: Option<Limit>,
    /// The figures of the run in the middle.
    pub figures: Option<Figures>,
    /// Why it did not run.
    pub failed: Option<String>,
    /// The change of the median of tokens a second against the baseline, in percent.
    pub change_percent: Option<f64>,
}

/// Everything that a benchmark found.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// Version of the program.
    pub version: &'static str,
    /// Milliseconds since 1970.
    pub at_unix_ms: u64,
    /// Where.
    pub machine: Machine,
    /// The models, by path.
    pub models: BTreeMap<String, ModelFacts>,
    /// What the wires gave before and after the runs.
    pub ceilings: Vec<Ceiling>,
    /// The configurations.
    pub rows: Vec<Row>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// A pair of probes that differ by more is told: design's rule for noisy disks.
const CEILING_SPREAD: f64 = 0.10;

impl Results {
    /// Of these records, for these points, in their order.
    pub fn of(records: &[Record], points: &[Point], machine: Machine, at_unix_ms: u64) -> Self {
        let mut runs: BTreeMap<&Point, Vec<&Figures>> = BTreeMap::new();
        let (mut models, mut ceilings, mut failed) = (BTreeMap::new(), Vec::new(), BTreeMap::new());
        for record in records {
            match record {
                Record::Start { .. } => {}
                Record::Model { path, facts } => {
                    models.insert(path.clone(), facts.clone());
                }
                Record::Ceiling(ceiling) => ceilings.push(ceiling.clone()),
                Record::Run { point, figures, .. } => runs.entry(point).or_default().push(figures),
                Record::Failed { point, message } => {
                    failed.insert(point, message.clone());
                }
            }
        }
        let row = |point: &Point| {
            let runs = runs.get(point).map_or(&[][..], Vec::as_slice);
            Row::new(point, runs, failed.get(point).cloned(), &ceilings)
        };
        let rows: Vec<Row> = points.iter().map(row).collect();
        let mut notes = notes(&ceilings, &rows);
        notes.extend(disagreements(&rows));
        Self { version: env!("CARGO_PKG_VERSION"), at_unix_ms, machine, models, ceilings, rows, notes }
    }

    /// The names of settings that differ among the rows.
    pub fn varying(&self) -> Vec<&'static str> {
        varying(self.rows.iter().map(|row| &row.point))
    }

    /// The table: settings that vary (all of them if `whole`), then figures.
    pub fn table(&self, whole: bool) -> Table {
        let varying = self.varying();
        let shown = |name: &str| whole || varying.contains(&name);
        let mut columns: Vec<(&'static str, Align)> = Vec::new();
        let settings = self.rows.first().map(|row| row.point.words()).unwrap_or_default();
        columns
            .extend(settings.iter().map(|(name, _)| *name).filter(|name| shown(name)).map(|name| (name, Align::Left)));
        const FIGURES: [&str; 11] = [
            "tokens/s",
            "median",
            "outliers",
            "prompt/s",
            "hits %",
            "MiB/token",
            "compute ms",
            "stall ms",
            "disk ms",
            "limit/s",
            "x limit",
        ];
        columns.extend(FIGURES.map(|name| (name, Align::Right)));
        columns.push(("bound by", Align::Left));
        let compared = self.rows.iter().any(|row| row.change_percent.is_some());
        if compared {
            columns.push(("change %", Align::Right));
        }
        let mut table = Table::new(&columns);
        for row in &self.rows {
            let words = row.point.words().into_iter().filter(|(name, _)| shown(name));
            let mut cells: Vec<String> = words.map(|(_, word)| word).collect();
            cells.extend(row.cells());
            if compared {
                cells.push(row.change_percent.map_or_else(String::new, |change| format!("{change:+.1}")));
            }
            table.row_of(cells);
        }
        table
    }

    /// All figures in base units, one line a configuration, for spreadsheets.
    pub fn csv(&self) -> String {
        let mut text = String::from(
            "model,device,vram,ram,evict,prefetch,io,threads,prompt_tokens,max_new_tokens,runs,\
             decode_tokens_per_s_mean,decode_tokens_per_s_sd,decode_tokens_per_s_median,outliers,\
             prefill_tokens_per_s_mean,prefill_tokens_per_s_sd,hit_share,read_bytes_per_token,compute_s_per_token,\
             stall_s_per_token,disk_busy_s_per_token,bus_busy_s_per_token,limit_s_per_token,limit_ratio,bound_by,\
             change_percent,error\n",
        );
        for row in &self.rows {
            let point = &row.point;
            let number = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
            let measured = |value: f64| number((!row.decode.is_empty()).then_some(value));
            let cells = [
                point.model.clone(),
                point.device.clone(),
                point.vram.clone().unwrap_or_default(),
                point.ram.clone().unwrap_or_default(),
                point.evict.clone(),
                point.prefetch.clone(),
                point.io.clone(),
                point.threads.map(|threads| threads.to_string()).unwrap_or_default(),
                point.prompt_tokens.to_string(),
                point.max_new_tokens.to_string(),
                row.decode.values.len().to_string(),
                measured(row.decode.mean),
                measured(row.decode.sd),
                measured(row.decode.median),
                row.decode.outliers.len().to_string(),
                measured(row.prefill.mean),
                measured(row.prefill.sd),
                number(row.hit_share),
                measured(row.read_bytes_per_token),
                measured(row.compute_s),
                measured(row.stall_s),
                measured(row.disk_busy_s),
                measured(row.bus_busy_s),
                number(row.limit.map(|limit| limit.seconds_per_token)),
                number(row.limit.map(|limit| limit.ratio)),
                row.limit.map(|limit| limit.bound_by.to_owned()).unwrap_or_default(),
                number(row.change_percent),
                row.failed.clone().unwrap_or_default(),
            ];
            text.push_str(&cells.map(|cell| csv_cell(&cell)).join(","));
            text.push('\n');
        }
        text
    }
}

/// Quoted if it must be.
fn csv_cell(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

impl Row {
    fn new(point: &Point, runs: &[&Figures], failed: Option<String>, ceilings: &[Ceiling]) -> Self {
        let rate = |tokens: u64, seconds: f64| (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds);
        let decode = Sample::of(runs.iter().filter_map(|f| rate(f.decoded_tokens, f.decode_s)).collect());
        let prefill = Sample::of(runs.iter().filter_map(|f| rate(f.prompt_tokens, f.prefill_s)).collect());
        let tokens = runs.iter().map(|f| f.decoded_tokens).sum::<u64>().max(1) as f64;
        let per_token = |value: fn(&Figures) -> f64| runs.iter().map(|f| value(f)).sum::<f64>() / tokens;
        let middle = runs.iter().copied().min_by(|a, b| {
            let distance =
                |f: &Figures| rate(f.decoded_tokens, f.decode_s).map_or(f64::MAX, |rate| (rate - decode.median).abs());
            distance(a).total_cmp(&distance(b))
        });
        let wires = wires(point, ceilings);
        // One run has the work, all of them have the time.
        let limit = middle
            .and_then(|figures| limit::limit(&figures.work?, wires))
            .map(|limit| Limit { ratio: 1.0 / (decode.median * limit.seconds_per_token).max(1e-12), ..limit });
        let (hits, asked) = runs.iter().filter_map(|f| f.tiers.first()).fold((0, 0), |(hits, asked), tier| {
            (hits + tier.decode_hits, asked + tier.decode_hits + tier.decode_misses)
        });
        Self {
            point: point.clone(),
            compute_s: per_token(|f| (f.decode_s - f.decode_stall_s).max(0.0)),
            stall_s: per_token(|f| f.decode_stall_s),
            disk_busy_s: per_token(|f| f.decode_disk_busy_s),
            bus_busy_s: per_token(|f| f.decode_bus_busy_s),
            hit_share: (asked > 0).then(|| hits as f64 / asked as f64),
            read_bytes_per_token: per_token(|f| f.decode_read_bytes as f64),
            limit,
            figures: middle.cloned(),
            failed: failed.filter(|_| decode.is_empty()),
            change_percent: None,
            decode,
            prefill,
        }
    }

    fn cells(&self) -> Vec<String> {
        let Some(_) = self.figures else {
            let mut cells = vec![String::new(); 11];
            cells.push(format!("failed: {}", self.failed.as_deref().unwrap_or("it was not run")));
            return cells;
        };
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
        let decoded = |value: f64| or_dash((!self.decode.is_empty()).then(|| digits(value)));
        vec![
            self.decode.text(),
            decoded(self.decode.median),
            self.decode.outliers.len().to_string(),
            self.prefill.text(),
            or_dash(self.hit_share.map(|share| format!("{:.1}", share * 100.0))),
            decoded(self.read_bytes_per_token / f64::from(1 << 20)),
            decoded(self.compute_s * 1e3),
            decoded(self.stall_s * 1e3),
            decoded(self.disk_busy_s * 1e3),
            or_dash(self.limit.map(|limit| digits(1.0 / limit.seconds_per_token))),
            or_dash(self.limit.map(|limit| format!("{:.2}", limit.ratio))),
            or_dash(self.limit.map(|limit| limit.bound_by.to_owned())),
        ]
    }

    /// The budget of the tier that computes, in bytes.
    pub fn budget_bytes(&self) -> Option<u64> {
        self.figures.as_ref().and_then(|figures| figures.tiers.first()).map(|tier| tier.budget_bytes)
    }
}

/// What the wires of a configuration gave: the mean of all probes.
fn wires(point: &Point, ceilings: &[Ceiling]) -> Wires {
    let mean = |value: fn(&Ceiling) -> Option<f64>, fits: &dyn Fn(&Ceiling) -> bool| {
        let values: Vec<f64> = ceilings.iter().filter(|c| fits(c)).filter_map(value).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let threads = point.threads.unwrap_or(0);
    Wires {
        disk: mean(|c| c.disk_bytes_per_s, &|c| c.model == point.model && c.io == point.io),
        ram: mean(|c| c.ram_bytes_per_s, &|c| c.threads == threads && c.device == point.device),
        bus: mean(|c| c.bus_bytes_per_s, &|c| c.device == point.device),
    }
}

/// Where ceilings moved between before and after, and runs that stand apart.
fn notes(ceilings: &[Ceiling], rows: &[Row]) -> Vec<String> {
    let mut notes = Vec::new();
    for before in ceilings.iter().filter(|c| c.when == "before") {
        let same = |c: &&Ceiling| {
            c.when == "after"
                && (&c.model, &c.io, &c.device, c.threads)
                    == (&before.model, &before.io, &before.device, before.threads)
        };
        let Some(after) = ceilings.iter().rev().find(same) else { continue };
        let files = format!(" ({}, --io {})", before.model, before.io);
        let wires = [
            ("disk", files.as_str(), before.disk_bytes_per_s, after.disk_bytes_per_s),
            ("RAM", "", before.ram_bytes_per_s, after.ram_bytes_per_s),
            ("bus", "", before.bus_bytes_per_s, after.bus_bytes_per_s),
        ];
        for (wire, of, before_rate, after_rate) in wires {
            let (Some(b), Some(a)) = (before_rate, after_rate) else { continue };
            let spread = (a - b).abs() / a.max(b).max(1e-9);
            if spread > CEILING_SPREAD {
                let note = format!(
                    "the {wire} gave {} before and {} after{of}: {:.0} % apart, so its limit is an indication only",
                    rate_text(b),
                    rate_text(a),
                    spread * 100.0
                );
                // Several models share RAM and bus.
                if !notes.contains(&note) {
                    notes.push(note);
                }
            }
        }
    }
    let outliers: usize = rows.iter().map(|row| row.decode.outliers.len()).sum();
    if outliers > 0 {
        let runs: usize = rows.iter().map(|row| row.decode.values.len()).sum();
        notes.push(format!("{outliers} of {runs} runs stand apart from the others of their configuration"));
    }
    notes
}

/// Configurations of one model, device and length must give the same tokens.
fn disagreements(rows: &[Row]) -> Vec<String> {
    let mut answers: BTreeMap<(&str, &str, u64, u64), (&str, &Point)> = BTreeMap::new();
    let mut notes = Vec::new();
    for row in rows {
        let Some(figures) = &row.figures else { continue };
        let point = &row.point;
        let key = (point.model.as_str(), figures.device.as_str(), point.prompt_tokens, point.max_new_tokens);
        let (answer, first) = *answers.entry(key).or_insert((figures.answer.as_str(), point));
        if answer != figures.answer {
            let names = varying([first, point].into_iter());
            notes.push(format!(
                "{}: the tokens differ between '{}' and '{}'; budgets must not change them: please report it",
                point.model,
                first.label(&names),
                point.label(&names)
            ));
        }
    }
    notes
}

/// `1.23 GB/s`.
pub fn rate_text(bytes_per_s: f64) -> String {
    let (value, unit) = if bytes_per_s >= 1e9 { (bytes_per_s / 1e9, "GB/s") } else { (bytes_per_s / 1e6, "MB/s") };
    format!("{} {unit}", digits(value))
}

#[cfg(test)]
pub mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::bench::journal::TierFigures;
    use crate::limit::Work;

    /// Results of a made-up sweep: 3 budgets × 2 policies of a model bound by a disk of 100 bytes a second.
    pub fn results() -> Results {
        let mut records = Vec::new();
        let mut points = Vec::new();
        for evict in ["planned", "lru"] {
            for share in [25u64, 50, 100] {
                let point = Point {
                    model: "a/<model>".into(),
                    device: "cpu".into(),
                    ram: Some(format!("{share}%")),
                    evict: evict.into(),
                    prefetch: "auto".into(),
                    io: "auto".into(),
                    prompt_tokens: 4,
                    max_new_tokens: 11,
                    ..Point::default()
                };
                for repetition in 0..4 {
                    let figures = figures(share, evict, repetition);
                    records.push(Record::Run { point: point.clone(), repetition, figures: Box::new(figures) });
                }
                points.push(point);
            }
        }
        for (when, disk) in [("before", 100.0), ("after", 80.0)] {
            records.push(Record::Ceiling(Ceiling {
                model: "a/<model>".into(),
                io: "auto".into(),
                device: "cpu".into(),
                when: when.into(),
                disk_bytes_per_s: Some(disk),
                ram_bytes_per_s: Some(1e4),
                ..Ceiling::default()
            }));
        }
        let facts = ModelFacts { architecture: "llama".into(), parameters: 1000, weight_bytes: 1000, blocks: 10 };
        records.push(Record::Model { path: "a/<model>".into(), facts });
        let mut failed = points[0].clone();
        failed.ram = Some("1%".into());
        records.push(Record::Failed { point: failed.clone(), message: "--ram 1% is too small".into() });
        points.push(failed);
        Results::of(&records, &points, Machine::default(), 0)
    }

    fn figures(share: u64, evict: &str, repetition: u64) -> Figures {
        let missing = if evict == "lru" && share < 100 { 1000 } else { 1000 - share * 10 };
        let seconds = 0.1 + missing as f64 / 90.0 + repetition as f64 * 0.001;
        Figures {
            device: "cpu".into(),
            decode_s: seconds * 10.0,
            decoded_tokens: 10,
            prefill_s: 1.0,
            prompt_tokens: 4,
            decode_stall_s: (seconds - 0.1) * 10.0,
            decode_disk_busy_s: seconds * 9.0,
            decode_read_bytes: missing * 10,
            tiers: vec![TierFigures {
                label: "host".into(),
                budget_bytes: share * 10,
                decode_hits: share,
                decode_misses: 100 - share,
                ..TierFigures::default()
            }],
            work: Some(Work {
                touched_bytes: 1000,
                is_mixture: false,
                read_bytes: missing as f64,
                seconds,
                stall_seconds: seconds - 0.1,
                gpu_keeps_bytes: None,
                keeps_bytes: share * 10,
            }),
            answer: "abc".into(),
            ..Figures::default()
        }
    }

    #[test]
    fn rows_say_how_far_the_limit_is() {
        let results = results();
        let row = &results.rows[1];
        assert_eq!(row.decode.values.len(), 4);
        // 500 bytes at (100 + 80) / 2 bytes a second.
        let limit = row.limit.unwrap();
        assert!((limit.seconds_per_token - 500.0 / 90.0).abs() < 1e-9 && limit.bound_by == "disk");
        assert_eq!((row.hit_share, row.read_bytes_per_token), (Some(0.5), 500.0));
        assert!((row.compute_s - 0.1).abs() < 1e-9);
        assert!(results.notes.iter().any(|note| note.contains("20 % apart")), "{:?}", results.notes);
        assert_eq!(results.varying(), ["ram", "evict"]);
        let text = results.table(false).render(false);
        assert!(text.contains("25%") && text.contains("failed: --ram 1% is too small"), "{text}");
        assert!(!text.contains("model"), "settings that are the same everywhere take no column: {text}");
        let csv = results.csv();
        let columns: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
        assert!(columns.iter().all(|&count| count == columns[0]) && columns.len() == 8, "{csv}");
    }

    #[test]
    fn answers_that_differ_are_told() {
        let mut results = results();
        assert!(disagreements(&results.rows).is_empty());
        results.rows[2].figures.as_mut().unwrap().answer = "other".into();
        let notes = disagreements(&results.rows);
        assert!(notes.len() == 1 && notes[0].contains("ram 100%"), "{notes:?}");
    }

    #[test]
    fn cells_of_csv_are_quoted() {
        assert_eq!(csv_cell("a"), "a");
        assert_eq!(csv_cell("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
