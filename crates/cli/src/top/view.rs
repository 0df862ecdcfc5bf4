//! What `top` draws: rates between two looks at a run's counters, gauges of tiers and wires, and a map of which layers
//! are where.

use super::story::Story;
use crate::sizes::human_bytes;
use crate::status::{LayerStatus, Status};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, LineGauge, Paragraph, Sparkline};
use std::collections::VecDeque;
use std::time::Duration;

/// A run as it was seen so far.
pub struct View {
    now: Status,
    before: Option<Status>,
    /// The fastest that each wire has been seen, in bytes per second: what it is known to be capable of.
    best: Vec<f64>,
    /// Tokens a second, in hundredths, the latest last.
    history: VecDeque<u64>,
    /// What keys do.
    keys: &'static str,
}

/// Rates kept for the line of history.
const HISTORY: usize = 400;
/// A status that is older than this is a run that hangs or was stopped.
const LATE_TIME: Duration = Duration::from_secs(3);

const STYLES: [Color; 4] = [Color::Green, Color::Blue, Color::Magenta, Color::Cyan];

impl View {
    /// A run at the first look.
    pub fn new(now: Status) -> Self {
        let best = vec![0.0; now.wires.len()];
        Self { now, before: None, best, history: VecDeque::new(), keys: "q quits, Tab goes to the next run" }
    }

    /// A run of the process that draws.
    pub fn of_this_process(now: Status) -> Self {
        Self { keys: "q closes this view, Ctrl-C ends the run", ..Self::new(now) }
    }

    /// The next look. One that is no news changes nothing.
    pub fn update(&mut self, next: Status) {
        if next.elapsed_ms <= self.now.elapsed_ms {
            return;
        }
        self.before = Some(std::mem::replace(&mut self.now, next));
        self.best.resize(self.now.wires.len(), 0.0);
        for wire in 0..self.now.wires.len() {
            let rate = self.wire(wire).0;
            self.best[wire] = self.best[wire].max(rate);
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back((self.tokens_per_s() * 100.0) as u64);
    }

    /// Seconds and the earlier counters that rates are taken from: the last look, or the run's beginning.
    fn since(&self) -> (f64, Status) {
        let before = self.before.clone().unwrap_or_default();
        let seconds = self.now.elapsed_ms.saturating_sub(before.elapsed_ms) as f64 / 1000.0;
        (seconds.max(1e-3), before)
    }

    fn tokens_per_s(&self) -> f64 {
        let (seconds, before) = self.since();
        self.now.tokens.saturating_sub(before.tokens) as f64 / seconds
    }

    /// Share of the time in which compute waited.
    fn stall_share(&self) -> f64 {
        let (seconds, before) = self.since();
        (self.now.stall_ns.saturating_sub(before.stall_ns) as f64 / 1e9 / seconds).min(1.0)
    }

    /// Bytes per second, and the share of the time in which it was at work.
    fn wire(&self, index: usize) -> (f64, f64) {
        let (seconds, before) = self.since();
        let Some(now) = self.now.wires.get(index) else { return (0.0, 0.0) };
        let before = before.wires.get(index).cloned().unwrap_or_default();
        let busy = now.busy_ns.saturating_sub(before.busy_ns) as f64 / 1e9 / seconds;
        (now.bytes.saturating_sub(before.bytes) as f64 / seconds, busy.min(1.0))
    }

    /// Hits of a tier since the last look, as a share; `None` if nothing was asked for.
    fn hit_share(&self, index: usize) -> Option<f64> {
        let (_, before) = self.since();
        let now = self.now.tiers.get(index)?;
        let before = before.tiers.get(index).cloned().unwrap_or_default();
        let (hits, misses) = (now.hits.saturating_sub(before.hits), now.misses.saturating_sub(before.misses));
        (hits + misses > 0).then(|| hits as f64 / (hits + misses) as f64)
    }

    /// Whether the run has ended without a word: there has been no news for a while, and there is no such process.
    pub fn is_dead(&self, alive: impl FnOnce(u32) -> bool) -> bool {
        let age = crate::status::unix_ms().saturating_sub(self.now.at_unix_ms);
        u128::from(age) > LATE_TIME.as_millis() && !alive(self.now.pid)
    }

    /// What stays on the terminal when the picture is gone.
    pub fn farewell(&self) -> String {
        format!(
            "{} (process {}): {} tokens in {:.1} s",
            self.now.model,
            self.now.pid,
            self.now.tokens,
            self.now.elapsed_ms as f64 / 1000.0
        )
    }

    /// Draws all.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        self.draw_in(frame, frame.area());
    }

    fn draw_in(&self, frame: &mut Frame<'_>, area: Rect) {
        let gauges = (self.now.tiers.len() + self.now.wires.len()) as u16;
        let areas = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(gauges + 3),
            Constraint::Length(4),
            Constraint::Min(3),
        ])
        .split(area);
        let [head, gauges, speed, map] = areas.as_ref() else { return };
        self.head(frame, *head);
        self.gauges(frame, *gauges);
        self.speed(frame, *speed);
        self.map(frame, *map);
    }

    /// Draws all, and the text that the run generates: beside the rest where that is wide enough, else below it. Of a
    /// small terminal the text gets the most.
    pub fn draw_with(&self, frame: &mut Frame<'_>, story: &Story) {
        const WIDE: u16 = 130;
        let area = frame.area();
        if area.width >= WIDE {
            let halves = Layout::horizontal([Constraint::Percentage(55), Constraint::Percentage(45)]).split(area);
            let [left, right] = halves.as_ref() else { return };
            self.draw_in(frame, *left);
            return tell(frame, *right, story);
        }
        let heights = self.heights(area);
        let areas = Layout::vertical(heights.map(Constraint::Length)).split(area);
        let [head, gauges, map, speed, text] = areas.as_ref() else { return };
        self.head(frame, *head);
        for (area, draw) in
            [(gauges, Self::gauges as fn(&Self, &mut Frame<'_>, Rect)), (map, Self::map), (speed, Self::speed)]
        {
            if area.height > 0 {
                draw(self, frame, *area);
            }
        }
        tell(frame, *text, story);
    }

    /// Lines for the head, the gauges, the map, the history and the text. What does not fit beside a third for the text
    /// is left out.
    fn heights(&self, area: Rect) -> [u16; 5] {
        const SPEED: u16 = 4;
        let head = area.height.min(2);
        let mut left = area.height - head;
        let text_min = (area.height / 3).max(4);
        let mut take = |wanted: u16, least: u16| {
            let taken = wanted.min(left.saturating_sub(text_min));
            let taken = if taken < least { 0 } else { taken };
            left -= taken;
            taken
        };
        let gauges = (self.now.tiers.len() + self.now.wires.len()) as u16 + 3;
        let gauges = take(gauges, gauges);
        let (_, columns) = self.columns(area.width.saturating_sub(2));
        let rows = self.now.layers.len().div_ceil(columns) as u16;
        let map = take(rows.saturating_add(2), 3);
        let speed = take(SPEED, SPEED);
        [head, gauges, map, speed, left]
    }

    /// How wide a layer's cell is, and how many go beside one another.
    fn columns(&self, width: u16) -> (usize, usize) {
        let cell = self.now.layers.iter().map(|layer| layer.name.len()).max().unwrap_or(1) + 3;
        (cell, (usize::from(width) / cell).max(1))
    }

    fn head(&self, frame: &mut Frame<'_>, area: Rect) {
        let age = crate::status::unix_ms().saturating_sub(self.now.at_unix_ms);
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let mut first =
            vec![Span::styled(self.now.model.clone(), bold), Span::raw(format!("  process {}", self.now.pid))];
        if u128::from(age) > LATE_TIME.as_millis() {
            let late = format!("  no news for {} s", age / 1000);
            first.push(Span::styled(late, Style::new().fg(Color::Red)));
        }
        let second = format!(
            "{:.1} s, {} tokens, {:.1} tokens/s   {}, {}   {}",
            self.now.elapsed_ms as f64 / 1000.0,
            self.now.tokens,
            self.tokens_per_s(),
            self.now.evict,
            self.now.io,
            self.keys
        );
        frame.render_widget(Paragraph::new(vec![Line::from(first), Line::raw(second)]), area);
    }

    fn gauges(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title(" tiers, wires, waiting ");
        let inner = block.inner(area);
        frame.render_widget(block, area);
        let mut lines = Vec::new();
        for (index, tier) in self.now.tiers.iter().enumerate() {
            // Cache and scratch are part of a GPU's budget, and beside that of host memory.
            let inside = tier.label != "host";
            let held = tier.used_bytes.saturating_add(if inside { tier.reserved_bytes } else { 0 });
            let beside = if inside || tier.reserved_bytes == 0 {
                String::new()
            } else {
                format!("  + {} cache", human_bytes(tier.reserved_bytes))
            };
            let hits = self.hit_share(index).map_or_else(|| "–".to_owned(), |share| format!("{:.1} %", share * 100.0));
            let text = format!(
                "{:<5} {:>11} of {:>11}  hits {hits:>7}{beside}",
                tier.label,
                human_bytes(held),
                human_bytes(tier.budget_bytes)
            );
            lines.push((held as f64 / tier.budget_bytes.max(1) as f64, text, STYLES[index % STYLES.len()]));
        }
        for (index, wire) in self.now.wires.iter().enumerate() {
            let (rate, busy) = self.wire(index);
            let seen = self.best.get(index).copied().unwrap_or(0.0);
            let measured = wire.ceiling_bytes_per_s.filter(|rate| rate.is_finite() && *rate > 0.0);
            let (best, known) = measured.map_or((seen, "seen"), |rate| (rate, "measured"));
            let text = format!(
                "{:<5} {:>9}/s of {:>9}/s {known}  at work {:>5.1} %",
                wire.name,
                human_bytes(rate as u64),
                human_bytes(best as u64),
                busy * 100.0
            );
            lines.push((rate / best.max(1.0), text, Color::Yellow));
        }
        let stall = self.stall_share();
        lines.push((stall, format!("{:<5} {:>5.1} % of the time", "stall", stall * 100.0), Color::Red));
        for (row, (ratio, text, colour)) in lines.into_iter().enumerate() {
            let Some(y) = inner.y.checked_add(row as u16).filter(|&y| y < inner.bottom()) else { break };
            let line = Rect { y, height: 1, ..inner };
            let gauge = LineGauge::default()
                .filled_symbol("━")
                .unfilled_symbol("─")
                .ratio(ratio.clamp(0.0, 1.0))
                .label(text)
                .filled_style(Style::new().fg(colour));
            frame.render_widget(gauge, line);
        }
    }

    fn speed(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title(" tokens/s ");
        let shown = usize::from(area.width.saturating_sub(2));
        let skip = self.history.len().saturating_sub(shown);
        let data: Vec<u64> = self.history.iter().skip(skip).copied().collect();
        frame.render_widget(Sparkline::default().block(block).data(data).style(Style::new().fg(Color::Green)), area);
    }

    /// One cell a layer: its colour is the fastest tier that has some of it, its height how much.
    fn map(&self, frame: &mut Frame<'_>, area: Rect) {
        let mut title = vec![Span::raw(" layers:")];
        for (index, tier) in self.now.tiers.iter().enumerate() {
            let style = Style::new().fg(STYLES[index % STYLES.len()]);
            title.push(Span::styled(format!(" █ in {}", tier.label), style));
        }
        title.push(Span::raw(" "));
        let block = Block::bordered().title(Line::from(title));
        let inner = block.inner(area);
        frame.render_widget(block, area);
        let (width, columns) = self.columns(inner.width);
        let rows = self
            .now
            .layers
            .chunks(columns)
            .map(|layers| Line::from(layers.iter().flat_map(|layer| cell(layer, width)).collect::<Vec<_>>()));
        frame.render_widget(Paragraph::new(rows.collect::<Vec<_>>()), inner);
    }
}

/// The end of a text, in a frame where there is room for one.
fn tell(frame: &mut Frame<'_>, area: Rect, story: &Story) {
    let block = if area.height > 2 { Block::bordered().title(" text ") } else { Block::new() };
    let inner = block.inner(area);
    let lines: Vec<Line<'_>> = story.tail(inner.width, inner.height).into_iter().map(Line::raw).collect();
    frame.render_widget(block, area);
    frame.render_widget(Paragraph::new(lines), inner);
}

/// A layer's name and its mark.
fn cell(layer: &LayerStatus, width: usize) -> [Span<'static>; 2] {
    const HEIGHTS: [&str; 9] = ["·", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
    let name = Span::styled(format!("{:>1$} ", layer.name, width - 3), Style::new().fg(Color::DarkGray));
    let fastest = layer.resident.iter().position(|&count| count > 0);
    let resident = fastest.and_then(|tier| layer.resident.get(tier)).copied().unwrap_or(0);
    let eighths = (u64::from(resident) * 8).div_ceil(u64::from(layer.blocks.max(1))).min(8) as usize;
    let colour = fastest.map_or(Color::DarkGray, |tier| STYLES[tier % STYLES.len()]);
    [name, Span::styled(format!("{} ", HEIGHTS[eighths]), Style::new().fg(colour))]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::status::{TierStatus, WireStatus};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn status(seconds: u64) -> Status {
        let tier = |label: &str, used: u64| TierStatus {
            label: label.into(),
            budget_bytes: 1 << 30,
            used_bytes: used,
            reserved_bytes: if label == "host" { 3 << 20 } else { 0 },
            hits: seconds * 30,
            misses: seconds * 10,
            ..TierStatus::default()
        };
        let layer = |number: u32| LayerStatus {
            name: number.to_string(),
            blocks: 8,
            resident: vec![if number < 2 { 8 } else { 0 }, if number == 2 { 4 } else { 0 }],
        };
        Status {
            pid: 4711,
            model: "models/a".into(),
            at_unix_ms: crate::status::unix_ms(),
            elapsed_ms: seconds * 1000,
            tokens: seconds * 5,
            stall_ns: seconds * 250_000_000,
            evict: "planned".into(),
            io: "uring".into(),
            tiers: vec![tier("gpu0", 1 << 29), tier("host", 1 << 30)],
            wires: vec![WireStatus {
                name: "disk".into(),
                bytes: seconds << 20,
                busy_ns: seconds * 900_000_000,
                ceiling_bytes_per_s: None,
            }],
            layers: (0..4).map(layer).collect(),
        }
    }

    fn drawn(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn rates_are_those_between_two_looks() {
        let mut view = View::new(status(10));
        let mut next = status(12);
        next.tokens = 50 + 8;
        next.wires[0].bytes = (10 << 20) + (6 << 20);
        view.update(next);
        let text = drawn(&view, 90, 24);
        for words in [
            "models/a",
            "process 4711",
            "58 tokens, 4.0 tokens/s",
            "planned, uring",
            "512.0 MiB of",
            "+ 3.00 MiB cache",
            "━",
            "hits  75.0 %",
            "3.00 MiB/s of  3.00 MiB/s seen",
            "at work  90.0 %",
            "25.0 % of the time",
            "in gpu0",
        ] {
            assert!(text.contains(words), "'{words}' is not in:\n{text}");
        }
        assert!(!text.contains("no news"));
    }

    #[test]
    fn a_ceiling_that_was_measured_goes_before_what_was_seen() {
        let mut measured = status(1);
        measured.wires[0].ceiling_bytes_per_s = Some((4 << 20) as f64);
        let text = drawn(&View::new(measured.clone()), 90, 24);
        assert!(text.contains("1.00 MiB/s of  4.00 MiB/s measured"), "{text}");
        measured.wires[0].ceiling_bytes_per_s = Some(f64::NAN);
        assert!(drawn(&View::new(measured), 90, 24).contains("seen"), "nonsense in a file is nothing");
    }

    #[test]
    fn layers_show_how_much_of_them_is_where() {
        let text = drawn(&View::new(status(1)), 90, 24);
        assert!(text.contains("0 █ 1 █ 2 ▄ 3 ·"), "{text}");
    }

    fn told(view: &View, width: u16, height: u16) -> String {
        let mut story = Story::default();
        story.push("Once upon a time there was a fox.\nIt was red");
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw_with(frame, &story)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_text_is_shown_with_all_the_rest_where_there_is_room() {
        for (width, height) in [(80, 30), (140, 24)] {
            let text = told(&View::of_this_process(status(1)), width, height);
            for words in [
                "models/a",
                "It was red",
                "there was a fox.",
                "hits  75.0 %",
                "0 █ 1 █ 2 ▄ 3 ·",
                "tokens/s ─",
                "Ctrl-C",
            ] {
                assert!(text.contains(words), "'{words}' is not in:\n{text}");
            }
        }
    }

    #[test]
    fn of_a_small_terminal_the_text_has_the_most() {
        let view = View::of_this_process(status(1));
        for height in 3..30 {
            let text = told(&view, 60, height);
            assert!(text.contains("It was red") && text.contains("models/a"), "{height}:\n{text}");
            assert_eq!(view.heights(Rect::new(0, 0, 60, height)).iter().sum::<u16>(), height);
        }
        let low = told(&view, 60, 8);
        assert!(!low.contains("tiers") && !low.contains("layers"), "nothing is drawn by half:\n{low}");
        for (width, height) in [(1, 1), (1, 40), (200, 1), (5, 5)] {
            told(&view, width, height);
            told(&View::of_this_process(Status::default()), width, height);
        }
    }

    #[test]
    fn a_small_terminal_and_an_empty_status_do_no_harm() {
        for (width, height) in [(1, 1), (10, 3), (20, 8), (300, 100)] {
            drawn(&View::new(status(1)), width, height);
            drawn(&View::new(Status::default()), width, height);
        }
        let mut old = status(5);
        old.at_unix_ms -= 10_000;
        assert!(drawn(&View::new(old), 90, 24).contains("no news for 10 s"));
        let mut old = status(5);
        assert!(!View::new(old.clone()).is_dead(|_| false), "it has just been heard of");
        old.at_unix_ms -= 10_000;
        assert!(!View::new(old.clone()).is_dead(|_| true), "it may hang");
        assert!(View::new(old).is_dead(|pid| pid != 4711));
        assert!(View::new(status(2)).farewell().contains("10 tokens in 2.0 s"));
    }
}
