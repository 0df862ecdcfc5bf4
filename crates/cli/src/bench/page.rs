//! `--report`: one page with everything in it. No script, nothing fetched; charts are SVG, and every number in them is
//! in a table too.

use super::charts::{self, COLOURS, Series, TIMELINE_STEPS, escape};
use super::points::Point;
use super::results::{Results, Row as Measured, rate_text};
use super::sample::digits;
use crate::errors::{Kind, Outcome, Stop, stop};
use crate::report::Align;
use crate::sizes::{human_bytes, human_count};
use crate::timeline::{Names, Row, Span, What};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

const STYLE: &str = include_str!("page.css");
/// Tokens that are drawn.
pub const TIMELINES_MAX: usize = 4;
/// Configurations whose bars are drawn; the table has all.
const BARS_MAX: usize = 60;
/// Configurations on the page: more would make one that no phone opens.
const ROWS_MAX: usize = 250;
/// Lines in a chart: more cannot be told apart.
const SERIES_MAX: usize = 16;
/// Lanes of a wire that are drawn; reads on further ones share them.
const LANES_MAX: usize = 8;

/// Whether the page can be written, before hours of measuring.
///
/// # Errors
/// It cannot.
pub fn check(path: &Path) -> Outcome {
    std::fs::OpenOptions::new().append(true).create(true).open(path).map(drop).map_err(|error| failed(path, &error))
}

/// Writes the page.
///
/// # Errors
/// It cannot be written.
pub fn write(path: &Path, results: &Results, timelines: &[Timeline]) -> Outcome {
    crate::watch::replace(path, page(results, timelines).as_bytes(), 0o644).map_err(|error| failed(path, &error))
}

fn failed(path: &Path, error: &std::io::Error) -> Stop {
    stop(Kind::Io, format!("--report {}: {error}; name a file that can be written", path.display()))
}

/// A token, drawn: for each row its stretches in [`TIMELINE_STEPS`] of the token's time.
#[derive(Clone, Debug)]
pub struct Timeline {
    point: Point,
    length_ns: u64,
    tracks: Vec<Track>,
}

#[derive(Clone, Debug)]
struct Track {
    name: &'static str,
    lanes: usize,
    /// Class, lane, from, to.
    stretches: Vec<(String, usize, u32, u32)>,
    /// What the track amounts to, in words.
    total: String,
}

const TRACKS: [&str; 6] = ["compute", "stalls", "disk", "bus to the GPU", "evictions", "predictions"];

impl Timeline {
    /// Of a token's spans, whose times count from its beginning.
    pub fn new(point: Point, length_ns: u64, spans: &[Span], names: &Names) -> Self {
        let bytes =
            |block: overspill::BlockId| names.catalog().blocks().get(block.index()).map_or(0, |block| block.bytes);
        Self::of(point, length_ns, spans, &bytes)
    }

    fn of(point: Point, length_ns: u64, spans: &[Span], bytes: &dyn Fn(overspill::BlockId) -> u64) -> Self {
        let mut tracks: BTreeMap<usize, Vec<&Span>> = BTreeMap::new();
        for span in spans {
            tracks.entry(track_of(span.row)).or_default().push(span);
        }
        let tracks = tracks.into_iter().map(|(number, spans)| Track::new(number, length_ns, &spans, bytes)).collect();
        Self { point, length_ns, tracks }
    }

    fn html(&self, names: &[&str]) -> String {
        let milliseconds = self.length_ns as f64 / 1e6;
        let mut html = format!(
            "<section class=\"token\"><h3>{}</h3><p class=\"soft\">One token, {} ms</p>",
            escape(&self.point.label(names)),
            digits(milliseconds)
        );
        for track in &self.tracks {
            let _ = write!(
                html,
                "<div class=\"track\"><div>{} <span class=\"num\">{}</span></div>{}</div>",
                track.name,
                escape(&track.total),
                charts::timeline(track.lanes, &track.stretches)
            );
        }
        html.push_str("<div class=\"scale\" aria-hidden=\"true\">");
        for index in 0..=4 {
            let _ = write!(html, "<span>{}</span>", digits(milliseconds * f64::from(index) / 4.0));
        }
        html.push_str("</div></section>\n");
        html
    }
}

fn track_of(row: Row) -> usize {
    match row {
        Row::Compute(..) => 0,
        Row::Stall(_) => 1,
        Row::Disk(_) => 2,
        Row::Bus(_) => 3,
        Row::Evictions => 4,
        Row::Predictions => 5,
    }
}

impl Track {
    fn new(number: usize, length_ns: u64, spans: &[&Span], bytes: &dyn Fn(overspill::BlockId) -> u64) -> Self {
        let step = |ns: u64| (u128::from(ns) * u128::from(TIMELINE_STEPS) / u128::from(length_ns.max(1))) as u32;
        let mut stretches: Vec<(String, usize, u32, u32)> = Vec::new();
        let mut last: BTreeMap<(&'static str, usize), usize> = BTreeMap::new();
        let mut ordered = spans.to_vec();
        ordered.sort_by_key(|span| span.start_ns);
        for span in &ordered {
            let (class, lane) = place(span);
            let (from, to) = (step(span.start_ns), step(span.end_ns).min(TIMELINE_STEPS));
            // What is closer than can be seen is one stretch, so a page's size does not grow with a model's blocks.
            match last.get(&(class, lane)).and_then(|&index| stretches.get_mut(index)) {
                Some((_, _, _, end)) if from <= *end => *end = (*end).max(to),
                _ => {
                    last.insert((class, lane), stretches.len());
                    stretches.push((class.to_owned(), lane, from, to));
                }
            }
        }
        let lanes = stretches.iter().map(|(_, lane, ..)| lane + 1).max().unwrap_or(1);
        let total = match number {
            0 | 1 => {
                let ns: u64 = spans.iter().map(|span| span.end_ns - span.start_ns).sum();
                format!("{} ms", digits(ns as f64 / 1e6))
            }
            2 | 3 => {
                let moved: u64 = spans.iter().filter_map(|span| block_of(span)).map(bytes).sum();
                format!("{} blocks, {}", spans.len(), human_bytes(moved))
            }
            _ => spans.len().to_string(),
        };
        Self { name: TRACKS.get(number).copied().unwrap_or_default(), lanes, stretches, total }
    }
}

fn block_of(span: &Span) -> Option<overspill::BlockId> {
    match span.what {
        What::Transfer { block, .. } => Some(block),
        _ => None,
    }
}

/// Colour and lane.
fn place(span: &Span) -> (&'static str, usize) {
    let ahead = matches!(span.what, What::Transfer { speculative: true, .. });
    match span.row {
        Row::Compute(..) => ("compute", 0),
        Row::Stall(_) => ("stall", 0),
        Row::Disk(lane) => (if ahead { "spec" } else { "disk" }, lane % LANES_MAX),
        Row::Bus(lane) => ("bus", lane % LANES_MAX),
        Row::Evictions => ("evict", 0),
        Row::Predictions => ("expect", 0),
    }
}

/// The page.
fn page(results: &Results, timelines: &[Timeline]) -> String {
    let mut shown = results.clone();
    if results.rows.len() > ROWS_MAX {
        shown.rows.truncate(ROWS_MAX);
        let count = results.rows.len();
        shown.notes.push(format!("the page has the first {ROWS_MAX} of {count} configurations; -o csv prints all"));
    }
    let results = &shown;
    let names = results.varying();
    let models: Vec<String> = results.models.keys().map(|path| escape(path)).collect();
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"generator\" content=\"overspill {}\">\n<link rel=\"icon\" href=\"data:,\">\n\
         <title>overspill bench: {}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>overspill bench</h1>\n<p>{}</p>\n<p class=\"soft\">{}, overspill {}</p>\n",
        results.version,
        models.join(", "),
        models.join(", "),
        date(results.at_unix_ms),
        results.version
    );
    if !results.notes.is_empty() {
        html.push_str("<ul class=\"notes\">");
        results.notes.iter().for_each(|note| {
            let _ = write!(html, "<li>{}</li>", escape(note));
        });
        html.push_str("</ul>\n");
    }
    charts_section(&mut html, results, &names);
    split_section(&mut html, results, &names);
    if !timelines.is_empty() {
        html.push_str(
            "<h2>The pipeline, one token</h2>\n<p class=\"soft\">The last token of one more run. Reads are drawn \
                       on several lanes, since several are under way at a time; milliseconds from left to right.</p>\n",
        );
        let parts = [
            ("compute", "compute"),
            ("stall", "waiting for blocks"),
            ("disk", "read that somebody waits for"),
            ("spec", "read ahead"),
            ("bus", "copy to the GPU"),
            ("evict", "block that goes"),
        ];
        legend(&mut html, &parts);
        timelines.iter().for_each(|timeline| html.push_str(&timeline.html(&names)));
    }
    machine_section(&mut html, results);
    table_section(&mut html, results);
    html.push_str("</main>\n</body>\n</html>\n");
    html
}

fn charts_section(html: &mut String, results: &Results, names: &[&str]) {
    html.push_str("<h2>Speed and traffic</h2>\n");
    let groups = groups(results, names);
    if groups.is_empty() {
        html.push_str("<p>Nothing was measured.</p>\n");
        return;
    }
    if groups.len() > SERIES_MAX {
        let _ =
            write!(html, "<p class=\"soft\">The first {SERIES_MAX} of {} lines; the table has all.</p>", groups.len());
    }
    let groups = &groups[..groups.len().min(SERIES_MAX)];
    let series = |value: &dyn Fn(&Measured) -> Option<f64>, is_limit: bool| -> Vec<Series> {
        let of = |(colour, (name, rows)): (usize, &(String, Vec<&Measured>))| {
            let mut points: Vec<(f64, f64)> =
                rows.iter().filter_map(|row| Some((row.budget_bytes()? as f64, value(row)?))).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let name = if is_limit { format!("limit of {name}") } else { name.clone() };
            Series { name, colour, is_limit, points }
        };
        groups.iter().enumerate().map(of).collect()
    };
    let decoded = |row: &Measured, value: f64| (!row.decode.is_empty()).then_some(value);
    let mut speed = series(&|row| decoded(row, row.decode.mean), false);
    let legend = speed.clone();
    speed.extend(series(&|row| row.limit.map(|limit| 1.0 / limit.seconds_per_token), true));
    let budget = "budget of the tier that computes";
    html.push_str("<ul class=\"legend\">");
    for line in &legend {
        let _ = write!(html, "<li>{}{}</li>", charts::key(line), escape(&line.name));
    }
    html.push_str("<li>dashed: the limit of the wires</li></ul>\n<div class=\"charts\">\n");
    let mib = f64::from(1 << 20);
    let panels = [
        ("Tokens a second", "tokens/s", speed, false, "Decoding, mean of all runs. Dashed: what the wires allow."),
        (
            "Blocks that were there",
            "%",
            series(&|row| row.hit_share.map(|share| share * 100.0), false),
            true,
            "Share of the blocks that decoding asked for, in percent.",
        ),
        (
            "Read from disk for each token",
            "MiB",
            series(&|row| decoded(row, row.read_bytes_per_token / mib), false),
            false,
            "MiB, alignment padding included.",
        ),
        (
            "Tokens of the prompt a second",
            "tokens/s",
            series(&|row| (!row.prefill.is_empty()).then_some(row.prefill.mean), false),
            false,
            "Reading the prompt, mean of all runs; the first reads fill empty tiers.",
        ),
    ];
    for (title, unit, series, percent, caption) in panels {
        let svg = charts::lines(title, budget, unit, &series, percent);
        let _ = writeln!(html, "<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption></figure>");
    }
    html.push_str("</div>\n");
}

/// Rows that differ in nothing but the budget make a line.
fn groups<'a>(results: &'a Results, names: &[&str]) -> Vec<(String, Vec<&'a Measured>)> {
    let mut groups: Vec<(String, Vec<&Measured>)> = Vec::new();
    for row in results.rows.iter().filter(|row| row.figures.is_some()) {
        // The budget of the tier that computes is the axis; the other one, if it varies, tells lines apart.
        let on_gpu = row.figures.as_ref().is_some_and(|figures| figures.tiers.len() > 1);
        let axis = if on_gpu { "vram" } else { "ram" };
        let rest: Vec<&str> = names.iter().copied().filter(|name| *name != axis).collect();
        let label = if rest.is_empty() { row.point.model.clone() } else { row.point.label(&rest) };
        match groups.iter_mut().find(|(found, _)| *found == label) {
            Some((_, rows)) => rows.push(row),
            None => groups.push((label, vec![row])),
        }
    }
    groups
}

fn legend(html: &mut String, parts: &[(&str, &str)]) {
    html.push_str("<ul class=\"legend\">");
    for (class, name) in parts {
        let _ = write!(html, "<li><span class=\"swatch {class}\"></span>{name}</li>");
    }
    html.push_str("</ul>\n");
}

fn split_section(html: &mut String, results: &Results, names: &[&str]) {
    let rows: Vec<&Measured> = results.rows.iter().filter(|row| !row.decode.is_empty()).collect();
    if rows.is_empty() {
        return;
    }
    html.push_str(
        "<h2>Time of a token</h2>\n<p class=\"soft\">Above: compute and waiting, which make up the time. Below: \
                   how much of that time the wires were at work, most of it at best while something is computed.</p>\n",
    );
    legend(
        html,
        &[("compute", "compute"), ("stall", "waiting for blocks"), ("disk", "disk at work"), ("bus", "bus at work")],
    );
    if rows.len() > BARS_MAX {
        let _ = write!(
            html,
            "<p class=\"soft\">The first {BARS_MAX} of {} configurations; the table has all.</p>",
            rows.len()
        );
    }
    let longest = rows.iter().take(BARS_MAX).map(|row| row.compute_s + row.stall_s).fold(1e-12, f64::max);
    for row in rows.iter().take(BARS_MAX) {
        let share = |seconds: f64| seconds / longest;
        let wires = [("disk", row.disk_busy_s), ("bus", row.bus_busy_s)];
        let thin: String = wires
            .iter()
            .filter(|(_, seconds)| *seconds > 0.0)
            .map(|&(class, seconds)| {
                charts::bar(&[(class, share(seconds))]).replace("class=\"bar\"", "class=\"bar thin\"")
            })
            .collect();
        let bus = if row.bus_busy_s > 0.0 { format!(", bus {}", digits(row.bus_busy_s * 1e3)) } else { String::new() };
        let _ = writeln!(
            html,
            "<div class=\"split\"><div class=\"name\">{}</div><div class=\"bars\">{}{thin}</div>\
             <div class=\"num\">compute {} ms, waiting {}, disk {}{bus}</div></div>",
            escape(&row.point.label(names)),
            charts::bar(&[("compute", share(row.compute_s)), ("stall", share(row.stall_s))]),
            digits(row.compute_s * 1e3),
            digits(row.stall_s * 1e3),
            digits(row.disk_busy_s * 1e3)
        );
    }
}

fn machine_section(html: &mut String, results: &Results) {
    let machine = &results.machine;
    let _ = write!(
        html,
        "<h2>Machine and models</h2>\n<dl><dt>processor</dt><dd>{}, {} threads</dd><dt>memory</dt><dd>{}</dd>\
         <dt>system</dt><dd>{}</dd>",
        escape(&machine.cpu),
        machine.cores,
        human_bytes(machine.memory_bytes),
        escape(&machine.system)
    );
    for (path, facts) in &results.models {
        let _ = write!(
            html,
            "<dt>model</dt><dd>{}: {}, {} parameters, {}, {} blocks</dd>",
            escape(path),
            escape(&facts.architecture),
            human_count(facts.parameters),
            human_bytes(facts.weight_bytes),
            facts.blocks
        );
    }
    html.push_str("</dl>\n");
    let columns: Vec<(&str, Align)> = vec![
        ("model", Align::Left),
        ("reader", Align::Left),
        ("device", Align::Left),
        ("when", Align::Left),
        ("disk", Align::Right),
        ("RAM", Align::Right),
        ("bus", Align::Right),
    ];
    let rate = |rate: Option<f64>| rate.map_or_else(|| "–".to_owned(), rate_text);
    let rows: Vec<Vec<String>> = results
        .ceilings
        .iter()
        .map(|c| {
            vec![
                c.model.clone(),
                c.io.clone(),
                c.device.clone(),
                c.when.clone(),
                rate(c.disk_bytes_per_s),
                rate(c.ram_bytes_per_s),
                rate(c.bus_bytes_per_s),
            ]
        })
        .collect();
    table(html, "What the wires gave", &columns, &rows);
}

fn table_section(html: &mut String, results: &Results) {
    html.push_str("<h2>All numbers</h2>\n");
    let whole = results.table(true);
    let caption = "By configuration; times in milliseconds a token, ± is the standard deviation";
    table(html, caption, whole.columns(), whole.rows());
}

fn table(html: &mut String, caption: &str, columns: &[(&str, Align)], rows: &[Vec<String>]) {
    let class = |align: Align| if align == Align::Right { " class=\"r\"" } else { "" };
    let _ = write!(
        html,
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{0}\"><table><caption>{0}</caption><thead><tr>",
        escape(caption)
    );
    for &(name, align) in columns {
        let _ = write!(html, "<th scope=\"col\"{}>{}</th>", class(align), escape(name));
    }
    html.push_str("</tr></thead><tbody>\n");
    for row in rows {
        html.push_str("<tr>");
        for (cell, &(_, align)) in row.iter().zip(columns) {
            let class = if cell.len() > 60 { " class=\"long\"" } else { class(align) };
            let _ = write!(html, "<td{class}>{}</td>", escape(cell));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody></table></div>\n");
}

/// `2026-01-31 13:45 UTC`.
fn date(unix_ms: u64) -> String {
    let minutes = unix_ms / 60_000;
    let (days, minute) = (minutes / 1440, minutes % 1440);
    // Howard Hinnant's civil_from_days (chrono-Compatible Low-Level Date Algorithms).
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", minute / 60, minute % 60)
}

const _: () = assert!(COLOURS == 8, "the style sheet has as many");

#[cfg(test)]
mod tests {
    use super::*;
    use overspill::{BlockId, SequenceId, StepId, TierId};

    fn timeline(spans: u64) -> Timeline {
        let length = spans * 1000;
        let of = |index: u64| {
            let what = What::Transfer {
                block: BlockId(index as u32),
                tier: TierId(0),
                bytes: Some(4096),
                speculative: index.is_multiple_of(3),
            };
            let start_ns = index * 1000;
            let disk = Span { row: Row::Disk(index as usize % 12), start_ns, end_ns: start_ns + 5000, what };
            let what = What::Step { step: StepId(index as u32), blocks: 1 };
            let step = Span { row: Row::Compute(SequenceId(0), 0), start_ns, end_ns: start_ns + 600, what };
            let wait = Span {
                row: Row::Stall(0),
                start_ns: start_ns + 600,
                end_ns: start_ns + 1000,
                what: What::Wait { blocks: 1 },
            };
            [disk, step, wait]
        };
        let all: Vec<Span> = (0..spans).flat_map(of).collect();
        let point = super::super::results::tests::results().rows[0].point.clone();
        Timeline::of(point, length, &all, &|_| 4096)
    }

    #[test]
    fn the_page_stands_alone_and_has_every_number() {
        let results = super::super::results::tests::results();
        let html = page(&results, &[timeline(50)]);
        for needed in [
            "<!doctype html>",
            "<meta name=\"viewport\"",
            "prefers-color-scheme:dark",
            "@media print",
            "Tokens a second",
            "Blocks that were there",
            "Read from disk for each token",
            "Time of a token",
            "The pipeline, one token",
            "What the wires gave",
            "All numbers",
            "class=\"line s0 limit\"",
            "compute 100 ms",
            "20 % apart",
        ] {
            assert!(html.contains(needed), "'{needed}' is missing");
        }
        for forbidden in ["http:", "https:", "//", "<script", "@import", "url(", "NaN", "inf ", "a/<model>"] {
            let body = html.replace("</", "<_");
            assert!(!body.contains(forbidden), "'{forbidden}' is in the page");
        }
        // Every tag that is opened is closed.
        for tag in ["div", "svg", "table", "tr", "td", "th", "ul", "li", "section", "figure", "g", "main", "dl"] {
            let open = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
            assert_eq!(open, html.matches(&format!("</{tag}>")).count(), "<{tag}>");
        }
        // The table has the figures that the charts draw.
        for row in results.rows.iter().filter(|row| !row.decode.is_empty()) {
            assert!(html.contains(&row.decode.text()), "{}", row.decode.text());
        }
    }

    #[test]
    fn a_page_of_many_configurations_and_blocks_stays_small() {
        let mut results = super::super::results::tests::results();
        let rows = results.rows.clone();
        results.rows = (0..2000).map(|index| rows[index % rows.len()].clone()).collect();
        let timelines: Vec<Timeline> = (0..TIMELINES_MAX).map(|_| timeline(20_000)).collect();
        let html = page(&results, &timelines);
        assert!(html.len() < 1_000_000, "{} bytes", html.len());
        assert!(html.contains("first 250 of 2000"));
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_827_640_000), "2000-02-29 12:34 UTC");
        assert_eq!(date(1_767_225_599_000), "2025-12-31 23:59 UTC");
    }
}
