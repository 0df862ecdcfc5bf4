//! `--trace`: what the engine does, in the JSON that Perfetto and Chrome's tracing page show, written by a thread of its
//! own. One row for each sequence's compute, for stalls, for each lane of each wire, for evictions and for predictions.
//!
//! The file is whole after every write: each batch is written over the closing brackets of the one before, and brings
//! its own. So a process that is killed, or a disk that is full, leaves a file that can be looked at.

use crate::errors::{CliError, Kind};
use crate::timeline::{Collector, Names, Row, Span, What};
use overspill_infer::generate::Runtime;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A trace that is being written.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    writer: JoinHandle<io::Result<()>>,
}

/// How far the file is behind what happens.
const BATCH_TIME: Duration = Duration::from_millis(100);
/// A batch is written early when it has grown to this.
const BATCH_BYTES: usize = 256 << 10;

impl Trace {
    /// Makes the file, before anything else is done.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(path: &Path) -> Result<File, CliError> {
        File::create(path).map_err(|error| failed(path, &error))
    }

    /// Writes what the model's engine does from now on.
    ///
    /// # Errors
    /// There is no thread to be had, or the file cannot be written.
    pub fn start(file: File, path: &Path, runtime: &Runtime) -> Result<Self, CliError> {
        let events = runtime.engine().subscribe();
        let names = Names::of(runtime);
        let mut out = Whole::new(file, &head(&names)).map_err(|error| failed(path, &error))?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let write = move || {
            let (mut collector, mut rows) = (Collector::default(), BTreeSet::new());
            let mut written = Instant::now();
            loop {
                match events.recv_timeout(BATCH_TIME) {
                    Ok(event) => {
                        if let Some(span) = collector.take(&event) {
                            if rows.insert(span.row) {
                                naming(span.row).iter().for_each(|line| out.push(line));
                            }
                            out.push(&line(&span, &names));
                        }
                    }
                    Err(error) if error.is_disconnected() || asked.load(Ordering::Acquire) => return out.finish(),
                    Err(_) => {}
                }
                if written.elapsed() >= BATCH_TIME || out.batch.len() >= BATCH_BYTES {
                    out.flush()?;
                    written = Instant::now();
                }
            }
        };
        let writer = std::thread::Builder::new().name("overspill-trace".into()).spawn(write);
        let writer = writer.map_err(|error| failed(path, &error))?;
        Ok(Self { path: path.to_owned(), stop, writer })
    }

    /// Writes what is left and closes the file.
    ///
    /// # Errors
    /// It could not be written.
    pub fn finish(self) -> Result<(), CliError> {
        self.stop.store(true, Ordering::Release);
        match self.writer.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(failed(&self.path, &error)),
            Err(_) => Err(CliError::new(Kind::Failed, "the trace's thread broke off; please report it")),
        }
    }
}

fn failed(path: &Path, error: &io::Error) -> CliError {
    CliError::new(Kind::Io, format!("--trace {}: {error}; name a file that can be written", path.display()))
}

const TAIL: &str = "\n]}\n";

/// A file of JSON that is whole after each flush, as far as it can be sought in (a pipe is whole at the end).
struct Whole {
    file: File,
    /// Where the closing brackets begin; `None` if the file cannot be sought in.
    tail_at: Option<u64>,
    batch: String,
}

impl Whole {
    fn new(mut file: File, head: &str) -> io::Result<Self> {
        let tail_at = file.stream_position().ok();
        let mut whole = Self { file, tail_at, batch: head.to_owned() };
        whole.flush()?;
        Ok(whole)
    }

    fn push(&mut self, value: &Value) {
        self.batch.push_str(",\n");
        self.batch.push_str(&value.to_string());
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let Some(tail_at) = self.tail_at else {
            self.file.write_all(self.batch.as_bytes())?;
            self.batch.clear();
            return Ok(());
        };
        let length = self.batch.len() as u64;
        self.batch.push_str(TAIL);
        self.file.seek(SeekFrom::Start(tail_at))?;
        let written = self.file.write_all(self.batch.as_bytes());
        self.batch.clear();
        if let Err(error) = written {
            // A full disk: what was whole is made whole again. If that fails too, the first cause is told.
            let mended = self.file.set_len(tail_at).and_then(|()| self.file.seek(SeekFrom::Start(tail_at)));
            let _ = mended.and_then(|_| self.file.write_all(TAIL.as_bytes()));
            return Err(error);
        }
        self.tail_at = Some(tail_at + length);
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        if self.tail_at.is_none() {
            self.file.write_all(TAIL.as_bytes())?;
        }
        self.file.flush()
    }
}

/// The beginning, up to and with the first event (so that each other one can begin with a comma).
fn head(names: &Names) -> String {
    let catalog = names.catalog();
    let model = json!({
        "blocks": catalog.blocks().len(),
        "slot_bytes": catalog.slot_bytes(),
        "weight_bytes": catalog.weight_bytes(),
        "io": names.engine().io().chosen.name(),
        "overspill": env!("CARGO_PKG_VERSION"),
    });
    let process = json!({ "name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": { "name": "overspill" } });
    format!("{{\"displayTimeUnit\":\"ms\",\"otherData\":{model},\"traceEvents\":[\n{process}")
}

/// The number that orders a row on the page, and its name.
fn track(row: Row) -> (usize, String) {
    match row {
        Row::Compute(sequence) => (1 + sequence as usize % 90, format!("compute (sequence {sequence})")),
        Row::Stall(lane) => (100 + lane, "stall".to_owned()),
        Row::Disk(lane) => (1000 + lane, format!("disk, lane {lane}")),
        Row::Bus(lane) => (2000 + lane, format!("bus to the GPU, lane {lane}")),
        Row::Evictions => (3000, "evictions".to_owned()),
        Row::Predictions => (3001, "predictions".to_owned()),
    }
}

fn naming(row: Row) -> [Value; 2] {
    let (tid, name) = track(row);
    [
        json!({ "name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": { "name": name } }),
        json!({ "name": "thread_sort_index", "ph": "M", "pid": 1, "tid": tid, "args": { "sort_index": tid } }),
    ]
}

fn line(span: &Span, names: &Names) -> Value {
    let (tid, _) = track(span.row);
    let (category, name, args) = match span.what {
        What::Step { step, blocks } => {
            ("compute", names.step(step).to_owned(), json!({ "step": step.0, "blocks": blocks }))
        }
        What::Wait { blocks } => ("stall", "stall".to_owned(), json!({ "blocks": blocks })),
        What::Transfer { block, tier, bytes, speculative } => {
            let category = if matches!(span.row, Row::Disk(_)) { "disk" } else { "bus" };
            let args = json!({
                "block": block.0, "tier": names.tier(tier), "bytes": bytes, "speculative": speculative,
            });
            (category, names.block(block).to_owned(), args)
        }
        What::Evicted { block, tier } => {
            ("evict", names.block(block).to_owned(), json!({ "block": block.0, "tier": names.tier(tier) }))
        }
        What::Expected { step, blocks, probability_milli } => {
            let args =
                json!({ "step": step.0, "blocks": blocks, "probability": f64::from(probability_milli) / 1000.0 });
            ("predict", names.step(step).to_owned(), args)
        }
    };
    let micros = |ns: u64| ns as f64 / 1000.0;
    let mut value = json!({
        "name": name, "cat": category, "pid": 1, "tid": tid, "ts": micros(span.start_ns), "args": args,
    });
    if let Some(object) = value.as_object_mut() {
        if span.end_ns > span.start_ns || !matches!(span.row, Row::Evictions | Row::Predictions) {
            object.insert("ph".to_owned(), "X".into());
            object.insert("dur".to_owned(), micros(span.end_ns - span.start_ns).into());
        } else {
            object.insert("ph".to_owned(), "i".into());
            object.insert("s".to_owned(), "t".into());
        }
    }
    value
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_file_is_whole_after_every_batch() {
        let path = std::env::temp_dir().join(format!("overspill-cli-whole-{}", std::process::id()));
        let read = || serde_json::from_str::<Value>(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let mut whole = Whole::new(File::create(&path).unwrap(), "{\"traceEvents\":[\n{\"a\":0}").unwrap();
        assert_eq!(read()["traceEvents"].as_array().unwrap().len(), 1);
        for batch in 1..4 {
            whole.push(&json!({ "a": batch }));
            whole.push(&json!({ "a": "x" }));
            whole.flush().unwrap();
            assert_eq!(read()["traceEvents"].as_array().unwrap().len(), 1 + 2 * batch);
        }
        whole.finish().unwrap();
        assert_eq!(read()["traceEvents"][5]["a"], 3);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn rows_have_numbers_of_their_own() {
        let rows = [Row::Compute(0), Row::Stall(0), Row::Disk(0), Row::Disk(1), Row::Bus(0), Row::Evictions];
        let tracks: BTreeSet<usize> = rows.iter().map(|&row| track(row).0).collect();
        assert_eq!(tracks.len(), rows.len());
        assert_eq!(naming(Row::Predictions)[0]["args"]["name"], "predictions");
    }
}
