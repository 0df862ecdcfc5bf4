//! Charts as SVG: lines over a budget, and the rows of a timeline. Text is only in charts that keep their proportions;
//! what is stretched to a width has none.

use super::sample::digits;
use crate::sizes::human_bytes;
use std::fmt::Write as _;

/// A line, or points if there is but one.
#[derive(Clone, Debug)]
pub struct Series {
    /// What it is.
    pub name: String,
    /// Its colour, by number.
    pub colour: usize,
    /// A limit is drawn dashed and without marks.
    pub is_limit: bool,
    /// Bytes and values, in order of bytes.
    pub points: Vec<(f64, f64)>,
}

/// Colours of the style sheet.
pub const COLOURS: usize = 8;

/// A chart's frame in its own units. It is drawn about as wide as a phone, so that text keeps a legible size there.
const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 230.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 36.0;

/// Lines over a budget of memory. `percent` bounds the values' axis at 100.
pub fn lines(title: &str, x_name: &str, unit: &str, series: &[Series], percent: bool) -> String {
    let all = || series.iter().flat_map(|series| &series.points);
    let x_max = all().map(|point| point.0).fold(1.0, f64::max);
    let y_top = if percent { 100.0 } else { all().map(|point| point.1).fold(0.0, f64::max) };
    let y_step = if percent { 25.0 } else { nice_step(y_top.max(1e-9) / 4.0) };
    let y_max = if percent { 100.0 } else { (y_top.max(1e-9) / y_step - 1e-9).ceil() * y_step };
    let x = |value: f64| LEFT + value / x_max * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - value / y_max * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\" class=\"chart\">\n",
        escape(title)
    );
    let steps = (y_max / y_step).round().max(1.0) as usize;
    for index in 0..=steps {
        let value = y_step * index as f64;
        let at = y(value);
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 5.0,
            at + 3.5,
            tick(value, y_step)
        );
    }
    // Powers of two, as budgets of memory are.
    let x_step = (x_max / 5.0).max(1.0).log2().ceil().exp2();
    for index in 0..=(x_max / x_step) as u32 {
        let value = x_step * f64::from(index);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x(value),
            HEIGHT - BOTTOM + 14.0,
            short_bytes(value as u64)
        );
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" class=\"axis\">{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 6.0,
        escape(x_name)
    );
    // Limits first, so that what was measured lies on top.
    for series in series.iter().filter(|s| s.is_limit).chain(series.iter().filter(|s| !s.is_limit)) {
        one(&mut svg, series, unit, &x, &y);
    }
    svg.push_str("</svg>");
    svg
}

fn one(svg: &mut String, series: &Series, unit: &str, x: &dyn Fn(f64) -> f64, y: &dyn Fn(f64) -> f64) {
    let (colour, class) = (series.colour % COLOURS, if series.is_limit { " limit" } else { "" });
    let mut path = String::new();
    for (index, &(bytes, value)) in series.points.iter().enumerate() {
        let _ = write!(path, "{}{:.1} {:.1}", if index == 0 { 'M' } else { 'L' }, x(bytes), y(value));
    }
    if series.points.len() > 1 {
        let _ = writeln!(svg, "<path class=\"line s{colour}{class}\" d=\"{path}\"/>");
    }
    for &(bytes, value) in &series.points {
        let (cx, cy) = (x(bytes), y(value));
        let title = format!("{}: {} {unit} at {}", series.name, digits(value), human_bytes(bytes as u64));
        let title = escape(&title);
        let _ = if series.is_limit {
            // A dash for a limit, also where it is the only one.
            writeln!(
                svg,
                "<path class=\"line s{colour}\" d=\"M{:.1} {cy:.1}h8\"><title>{title}</title></path>",
                cx - 4.0
            )
        } else {
            writeln!(svg, "<g class=\"dot s{colour}\">{}<title>{title}</title></g>", mark(series.colour, cx, cy))
        };
    }
}

/// A mark whose form tells series apart where colours cannot.
fn mark(number: usize, x: f64, y: f64) -> String {
    match number % 4 {
        0 => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.2\"/>"),
        1 => format!("<path d=\"M{:.1} {:.1}h6v6h-6z\"/>", x - 3.0, y - 3.0),
        2 => format!("<path d=\"M{x:.1} {:.1}l4 7h-8z\"/>", y - 4.0),
        _ => format!("<path d=\"M{x:.1} {:.1}l4 4-4 4-4-4z\"/>", y - 4.0),
    }
}

/// A legend's mark.
pub fn key(series: &Series) -> String {
    let colour = series.colour % COLOURS;
    let mark = mark(series.colour, 8.0, 6.0);
    format!("<svg viewBox=\"0 0 16 12\" class=\"key\" aria-hidden=\"true\"><g class=\"dot s{colour}\">{mark}</g></svg>")
}

/// 1, 2 or 5 times a power of ten, at least as large.
fn nice_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let times = [1.0, 2.0, 5.0].into_iter().find(|times| times * power >= least * (1.0 - 1e-9));
    times.unwrap_or(10.0) * power
}

/// A power of two times a small number, without decimals that say nothing.
fn short_bytes(bytes: u64) -> String {
    human_bytes(bytes).replace(".00 ", " ").replace(".0 ", " ")
}

fn tick(value: f64, step: f64) -> String {
    let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{value:.decimals$}")
}

/// A bar of parts side by side, stretched to its place's width: class and share of the whole of each.
pub fn bar(parts: &[(&str, f64)]) -> String {
    let mut svg =
        String::from("<svg viewBox=\"0 0 1000 10\" preserveAspectRatio=\"none\" class=\"bar\" aria-hidden=\"true\">");
    let mut at = 0.0;
    for &(class, share) in parts {
        let width = (share * 1000.0).clamp(0.0, 1000.0 - at);
        if width > 0.0 {
            let _ = write!(svg, "<rect class=\"{class}\" x=\"{at:.1}\" y=\"0\" width=\"{width:.1}\" height=\"10\"/>");
        }
        at += width;
    }
    svg.push_str("</svg>");
    svg
}

/// Steps into which the width of a timeline is divided: what is closer together is drawn as one.
pub const TIMELINE_STEPS: u32 = 1000;

/// A row of a timeline, stretched to its place's width: for each class, lanes of stretches in [`TIMELINE_STEPS`].
pub fn timeline(lanes: usize, stretches: &[(String, usize, u32, u32)]) -> String {
    let height = lanes.max(1) * 10;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {TIMELINE_STEPS} {height}\" preserveAspectRatio=\"none\" class=\"lanes\" \
         style=\"height:{}px\" aria-hidden=\"true\">",
        if lanes > 1 { lanes * 7 } else { 16 }
    );
    let mut classes: Vec<&str> = stretches.iter().map(|(class, ..)| class.as_str()).collect();
    classes.sort_unstable();
    classes.dedup();
    for class in classes {
        let _ = write!(svg, "<path class=\"{class}\" d=\"");
        for (_, lane, from, to) in stretches.iter().filter(|(found, ..)| found == class) {
            let (top, width) = (lane * 10 + 1, (to - from).max(1));
            let _ = write!(svg, "M{from} {top}h{width}v8h-{width}z");
        }
        svg.push_str("\"/>");
    }
    svg.push_str("</svg>");
    svg
}

/// Text that means itself in HTML.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Control characters are not allowed in HTML, and a file's name may have any.
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_steps() {
        for (least, step) in [(1.0, 1.0), (1.1, 2.0), (2.2, 5.0), (7.0, 10.0), (0.03, 0.05), (260.0, 500.0)] {
            assert!((nice_step(least) - step).abs() < step * 1e-9, "{least}: {}", nice_step(least));
        }
        assert_eq!((short_bytes(4 << 30), short_bytes(1536)), ("4 GiB".to_owned(), "1.50 KiB".to_owned()));
        assert_eq!((tick(0.05, 0.05), tick(10.0, 5.0)), ("0.05".to_owned(), "10".to_owned()));
    }

    #[test]
    fn every_point_is_drawn_within_the_frame() {
        let series = [
            Series { name: "a<b".into(), colour: 0, is_limit: false, points: vec![(1024.0, 3.0), (2048.0, 9.7)] },
            Series { name: "limit".into(), colour: 0, is_limit: true, points: vec![(1024.0, 4.0), (2048.0, 12.0)] },
        ];
        let svg = lines("t", "memory", "tokens/s", &series, false);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert_eq!(svg.matches("class=\"line s0 limit\"").count(), 1);
        assert!(svg.contains("a&lt;b: 9.70 tokens/s at 2.00 KiB") && !svg.contains("NaN"), "{svg}");
        for part in svg.split("cy=\"").skip(1) {
            let cy: f64 = part.split('"').next().and_then(|text| text.parse().ok()).unwrap_or(-1.0);
            assert!((TOP..=HEIGHT - BOTTOM).contains(&cy), "{cy}");
        }
        assert!(!lines("t", "x", "y", &[], true).contains("NaN"), "no points at all");
    }

    #[test]
    fn bars_never_leave_their_place() {
        let svg = bar(&[("a", 0.7), ("b", 0.5)]);
        assert!(svg.contains("width=\"700.0\"") && svg.contains("width=\"300.0\""), "{svg}");
        assert_eq!(escape("<a href='x'>&\u{7}"), "&lt;a href=&#39;x&#39;&gt;&amp;\u{fffd}");
    }
}
