//! `--trace`: what the engine does, in the JSON that Perfetto and Chrome's tracing page show, written by a thread of its
//! own. One row for each sequence's compute, for stalls, for each lane of each wire, for evictions and for predictions.
//!
//! The file is whole after every write: each batch is written over the closing brackets of the one before, and brings
//! its own. So a process that is killed, or a disk that is full, leaves a file that can be looked at.

mod lines;

use crate::errors::{CliError, Kind};
use crate::report;
use crate::timeline::{Collector, End, Follower, Names};
use lines::Lines;
use overspill_infer::generate::Runtime;
use serde_json::json;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A trace that is being written.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    writer: Follower<io::Result<u64>>,
}

/// How far the file is behind what happens.
const BATCH_TIME: Duration = Duration::from_millis(100);
/// So much is written at once, and the last line of it may be so long.
const BATCH_BYTES: usize = 256 << 10;
const LINE_BYTES: usize = 4 << 10;

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
        let names = Names::of(runtime);
        let out = Whole::new(file, &head(&names)).map_err(|error| failed(path, &error))?;
        let (mut out, mut lines) = (Some(out), Lines::new(names));
        let write = move |collector: &mut Collector, batch: &[overspill::Event], end| {
            let written = out.as_mut().map_or(Ok(()), |out| out.write(collector, &mut lines, batch));
            let missed = match (written, end) {
                (Err(error), _) => return Some(Err(error)),
                (Ok(()), End::NotYet) => return None,
                (Ok(()), End::Now { missed }) => missed,
            };
            Some(out.take().map_or(Ok(()), |out| out.finish(missed)).map(|()| missed))
        };
        let writer = Follower::start(runtime.engine(), "overspill-trace", BATCH_TIME, write);
        Ok(Self { path: path.to_owned(), writer: writer.map_err(|error| failed(path, &error))? })
    }

    /// Writes what is left and closes the file.
    ///
    /// # Errors
    /// It could not be written.
    pub fn finish(self) -> Result<(), CliError> {
        match self.writer.finish() {
            Ok(Ok(0)) => Ok(()),
            Ok(Ok(missed)) => {
                report::note(&format!("--trace: {missed} events are not in the file: too many came at once"));
                Ok(())
            }
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
    batch: Vec<u8>,
}

impl Whole {
    fn new(mut file: File, head: &str) -> io::Result<Self> {
        let tail_at = file.stream_position().ok();
        let mut whole = Self { file, tail_at, batch: Vec::with_capacity(BATCH_BYTES + LINE_BYTES) };
        whole.batch.extend_from_slice(head.as_bytes());
        whole.flush()?;
        Ok(whole)
    }

    fn write(&mut self, collector: &mut Collector, lines: &mut Lines, events: &[overspill::Event]) -> io::Result<()> {
        for span in events.iter().filter_map(|event| collector.take(event)) {
            lines.push(&mut self.batch, &span);
            if self.batch.len() >= BATCH_BYTES {
                self.flush()?;
            }
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let Some(tail_at) = self.tail_at else {
            self.file.write_all(&self.batch)?;
            self.batch.clear();
            return Ok(());
        };
        let length = self.batch.len() as u64;
        self.batch.extend_from_slice(TAIL.as_bytes());
        self.file.seek(SeekFrom::Start(tail_at))?;
        let written = self.file.write_all(&self.batch);
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

    fn finish(mut self, missed: u64) -> io::Result<()> {
        if missed > 0 {
            Lines::push_missed(&mut self.batch, missed);
        }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::Value;

    #[test]
    fn the_file_is_whole_after_every_batch() {
        let path = std::env::temp_dir().join(format!("overspill-cli-whole-{}", std::process::id()));
        let read = || serde_json::from_str::<Value>(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let mut whole = Whole::new(File::create(&path).unwrap(), "{\"traceEvents\":[\n{\"a\":0}").unwrap();
        assert_eq!(read()["traceEvents"].as_array().unwrap().len(), 1);
        for batch in 1..4 {
            whole.batch.extend_from_slice(format!(",\n{{\"a\":{batch}}},\n{{\"a\":\"x\"}}").as_bytes());
            whole.flush().unwrap();
            assert_eq!(read()["traceEvents"].as_array().unwrap().len(), 1 + 2 * batch);
        }
        whole.finish(3).unwrap();
        assert_eq!(read()["traceEvents"][5]["a"], 3);
        assert_eq!(read()["traceEvents"][9]["args"]["events"], 3, "what was missed comes last");
        std::fs::remove_file(path).unwrap();
    }
}
