//! Spans as lines of JSON. Thousands come in a second while a model computes on the same cores, so numbers are written
//! digit by digit and names are escaped once each; nothing is allocated for a line.

use crate::timeline::{Names, Row, Span, What};
use overspill::{BlockId, StepId};
use std::collections::BTreeSet;

/// Turns spans into lines, each beginning with the comma that parts it from the one before.
#[derive(Debug)]
pub struct Lines {
    names: Names,
    /// Names as JSON strings, by block, as far as they have been needed.
    blocks: Vec<Option<Box<str>>>,
    /// Rows that have been named.
    rows: BTreeSet<Row>,
}

impl Lines {
    /// For what these names belong to.
    pub fn new(names: Names) -> Self {
        let blocks = vec![None; names.catalog().blocks().len()];
        Self { names, blocks, rows: BTreeSet::new() }
    }

    /// Writes a span, and its row's name before the first of a row.
    pub fn push(&mut self, out: &mut Vec<u8>, span: &Span) {
        let (track, category) = track(span.row);
        if !self.rows.contains(&span.row) {
            self.rows.insert(span.row);
            naming(out, track, &row_name(span.row));
        }
        out.extend_from_slice(b",\n{\"name\":");
        self.name(out, span.what);
        out.extend_from_slice(b",\"cat\":\"");
        out.extend_from_slice(category.as_bytes());
        out.extend_from_slice(b"\",\"pid\":1,\"tid\":");
        digits(out, track);
        out.extend_from_slice(b",\"ts\":");
        micros(out, span.start_ns);
        if matches!(span.row, Row::Evictions | Row::Predictions) {
            out.extend_from_slice(b",\"ph\":\"i\",\"s\":\"t\"");
        } else {
            out.extend_from_slice(b",\"ph\":\"X\",\"dur\":");
            micros(out, span.end_ns.saturating_sub(span.start_ns));
        }
        self.arguments(out, span.what);
        out.extend_from_slice(b"}}");
    }

    /// Writes how many events were missed up to a time, in nanoseconds.
    pub fn push_missed(out: &mut Vec<u8>, missed: u64) {
        naming(out, 4000, "events that are not here, because too many came at once");
        out.extend_from_slice(b",\n{\"name\":\"missed\",\"cat\":\"missed\",\"pid\":1,\"tid\":4000,\"ts\":0,");
        out.extend_from_slice(b"\"ph\":\"i\",\"s\":\"t\",\"args\":{\"events\":");
        digits(out, missed);
        out.extend_from_slice(b"}}");
    }

    fn name(&mut self, out: &mut Vec<u8>, what: What) {
        let block = match what {
            What::Wait { .. } => return out.extend_from_slice(b"\"stall\""),
            What::Step { step, .. } | What::Expected { step, .. } => self.names.first_block(step),
            What::Transfer { block, .. } | What::Evicted { block, .. } => Some(block),
        };
        let Some((block, place)) = block.and_then(|block| Some((block, self.blocks.get_mut(block.index())?))) else {
            return out.extend_from_slice(b"\"?\"");
        };
        let name = place.get_or_insert_with(|| json_string(self.names.block(block)).into());
        out.extend_from_slice(name.as_bytes());
    }

    fn arguments(&self, out: &mut Vec<u8>, what: What) {
        let number = |out: &mut Vec<u8>, key: &str, value: u64| {
            out.extend_from_slice(key.as_bytes());
            digits(out, value);
        };
        let begin = ",\"args\":{";
        out.extend_from_slice(begin.as_bytes());
        let step_number = |StepId(step): StepId| u64::from(step);
        let block_number = |BlockId(block): BlockId| u64::from(block);
        match what {
            What::Step { step, blocks } => {
                number(out, "\"step\":", step_number(step));
                number(out, ",\"blocks\":", blocks as u64);
            }
            What::Wait { blocks } => number(out, "\"blocks\":", blocks as u64),
            What::Transfer { block, tier, bytes, speculative } => {
                number(out, "\"block\":", block_number(block));
                self.tier(out, tier);
                if let Some(bytes) = bytes {
                    number(out, ",\"bytes\":", bytes);
                    out.extend_from_slice(if speculative { b",\"ahead\":true" } else { b",\"ahead\":false" });
                }
            }
            What::Evicted { block, tier } => {
                number(out, "\"block\":", block_number(block));
                self.tier(out, tier);
            }
            What::Expected { step, blocks, probability_milli } => {
                number(out, "\"step\":", step_number(step));
                number(out, ",\"blocks\":", blocks as u64);
                number(out, ",\"probability_percent\":", u64::from(probability_milli) / 10);
            }
        }
    }

    fn tier(&self, out: &mut Vec<u8>, tier: overspill::TierId) {
        out.extend_from_slice(b",\"tier\":\"");
        out.extend_from_slice(self.names.tier(tier).as_bytes());
        out.push(b'"');
    }
}

/// The number that orders a row on the page, and the kind of what is on it.
fn track(row: Row) -> (u64, &'static str) {
    match row {
        Row::Compute(sequence, lane) => (10_000 + u64::from(sequence.0) * 100 + lane as u64 % 100, "compute"),
        Row::Stall(lane) => (40_000 + lane as u64, "stall"),
        Row::Disk(lane) => (50_000 + lane as u64, "disk"),
        Row::Bus(lane) => (60_000 + lane as u64, "bus"),
        Row::Evictions => (70_000, "evict"),
        Row::Predictions => (70_001, "predict"),
    }
}

fn row_name(row: Row) -> String {
    match row {
        Row::Compute(sequence, 0) => format!("compute (sequence {})", sequence.0),
        Row::Compute(sequence, lane) => format!("compute (sequence {}), lane {lane}", sequence.0),
        Row::Stall(0) => "stall".to_owned(),
        Row::Stall(lane) => format!("stall, caller {lane}"),
        Row::Disk(lane) => format!("disk, lane {lane}"),
        Row::Bus(lane) => format!("bus to the GPU, lane {lane}"),
        Row::Evictions => "evictions".to_owned(),
        Row::Predictions => "predictions".to_owned(),
    }
}

/// The events that name a row and give it its place.
fn naming(out: &mut Vec<u8>, track: u64, name: &str) {
    for (event, key, value) in
        [("thread_name", "name", json_string(name)), ("thread_sort_index", "sort_index", track.to_string())]
    {
        let line = format!(
            ",\n{{\"name\":\"{event}\",\"ph\":\"M\",\"pid\":1,\"tid\":{track},\"args\":{{\"{key}\":{value}}}}}"
        );
        out.extend_from_slice(line.as_bytes());
    }
}

fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A number in decimal.
fn digits(out: &mut Vec<u8>, mut number: u64) {
    let mut text = [0u8; 20];
    let mut at = text.len();
    loop {
        at -= 1;
        text[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&text[at..]);
}

/// Nanoseconds as microseconds with three decimals.
fn micros(out: &mut Vec<u8>, ns: u64) {
    digits(out, ns / 1000);
    let below = (ns % 1000) as u16;
    let digit = |value: u16| b'0' + (value % 10) as u8;
    out.extend_from_slice(&[b'.', digit(below / 100), digit(below / 10), digit(below)]);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use overspill::SequenceId;

    #[test]
    fn numbers_are_those_that_the_library_writes() {
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        for shift in (0..64).chain(0..64).chain([63, 63]) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            for number in [random >> shift, 0, 9, 10, 999, 1000, u64::MAX] {
                let (mut plain, mut parts) = (Vec::new(), Vec::new());
                digits(&mut plain, number);
                micros(&mut parts, number);
                assert_eq!(plain, number.to_string().into_bytes());
                assert_eq!(parts, format!("{}.{:03}", number / 1000, number % 1000).into_bytes());
            }
        }
    }

    #[test]
    fn rows_have_numbers_and_names_of_their_own() {
        let compute = |sequence, lane| Row::Compute(SequenceId(sequence), lane);
        let rows = [compute(0, 0), compute(0, 1), compute(255, 0), Row::Stall(0), Row::Disk(0), Row::Disk(1)];
        let rows = rows.into_iter().chain([Row::Bus(0), Row::Evictions, Row::Predictions]);
        let tracks: BTreeSet<(u64, String)> = rows.clone().map(|row| (track(row).0, row_name(row))).collect();
        assert_eq!(tracks.len(), rows.count());
        let mut out = Vec::new();
        naming(&mut out, 7, "a \"row\"");
        let lines: serde_json::Value = serde_json::from_slice(&[b"[0", &out[..], b"]"].concat()).unwrap();
        assert_eq!((&lines[1]["args"]["name"], &lines[2]["args"]["sort_index"]), (&"a \"row\"".into(), &7.into()));
    }

    #[test]
    fn what_was_missed_is_told() {
        let mut out = Vec::new();
        Lines::push_missed(&mut out, 12);
        let lines: serde_json::Value = serde_json::from_slice(&[b"[0", &out[..], b"]"].concat()).unwrap();
        assert_eq!(lines[3]["args"]["events"], 12);
    }
}
