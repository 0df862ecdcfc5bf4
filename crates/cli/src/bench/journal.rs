//! The records of a benchmark: one JSON object a line, appended and flushed after every run, so that an interruption
//! loses nothing but the run that was going on. The same file serves to go on (`--resume`) and to compare with
//! (`--baseline`).

use super::points::{ModelFacts, Point};
use crate::errors::{Kind, Outcome, Stop, stop};
use crate::limit::Work;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// A benchmark began, or went on.
    Start {
        /// Version of the program.
        version: String,
        /// Milliseconds since 1970.
        at_unix_ms: u64,
        /// Where.
        machine: Machine,
    },
    /// A model was opened.
    Model {
        /// Its path as it was given.
        path: String,
        /// What it is.
        facts: ModelFacts,
    },
    /// Wires were measured.
    Ceiling(Ceiling),
    /// A configuration was run.
    Run {
        /// Which.
        point: Point,
        /// The how-manieth time, from 0.
        repetition: u64,
        /// How it went.
        figures: Box<Figures>,
    },
    /// A configuration cannot be run.
    Failed {
        /// Which.
        point: Point,
        /// Why.
        message: String,
    },
}

/// What the machine is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Threads that can run at once.
    pub cores: u64,
    /// All host memory, or the control group's limit.
    pub memory_bytes: u64,
    /// The system.
    pub system: String,
}

/// Bandwidths of wires at a moment, in bytes per second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ceiling {
    /// The model whose files were read.
    pub model: String,
    /// The reader.
    pub io: String,
    /// The device.
    pub device: String,
    /// Threads that read RAM.
    pub threads: u64,
    /// `before` or `after` the runs.
    pub when: String,
    /// The disk.
    pub disk_bytes_per_s: Option<f64>,
    /// RAM, if a CPU computes.
    pub ram_bytes_per_s: Option<f64>,
    /// The way to the GPU.
    pub bus_bytes_per_s: Option<f64>,
}

/// What a run was like. Times in seconds; `decode_…` is what came after the first token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// What computed.
    pub device: String,
    /// Opening the model.
    pub open_s: f64,
    /// To the first token.
    pub first_token_s: f64,
    /// Computing the prompt.
    pub prefill_s: f64,
    /// Computing the tokens after the first.
    pub decode_s: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens that `decode_s` was spent on.
    pub decoded_tokens: u64,
    /// GPUs first.
    pub tiers: Vec<TierFigures>,
    /// From disk, padding included.
    pub read_bytes: u64,
    /// Of these, after the first token.
    pub decode_read_bytes: u64,
    /// Waiting for blocks, after the first token.
    pub decode_stall_s: f64,
    /// Time in which the disk had reads under way, after the first token.
    pub decode_disk_busy_s: f64,
    /// Time in which the bus had copies under way, after the first token.
    pub decode_bus_busy_s: f64,
    /// Copied to the GPU, after the first token.
    pub decode_uploaded_bytes: u64,
    /// Bytes in flight plus leased while something streamed (R).
    pub in_flight_bytes: u64,
    /// What the limit depends on.
    pub work: Option<Work>,
    /// The policy in force.
    pub evict: String,
    /// How the disk was read.
    pub io: String,
    /// A hash of the tokens: configurations of one device must agree.
    pub answer: String,
}

/// A tier's figures over a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TierFigures {
    /// `gpu0`, `host`.
    pub label: String,
    /// What it was allowed.
    pub budget_bytes: u64,
    /// The most that it held.
    pub peak_bytes: u64,
    /// Blocks that were there, after the first token.
    pub decode_hits: u64,
    /// Blocks that were waited for, after the first token.
    pub decode_misses: u64,
    /// Blocks that went.
    pub evictions: u64,
}

/// A file of records that grows.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Where the last whole line ends.
    end: u64,
}

/// A record is not longer than this; what is, is no record.
const LINE_BYTES_MAX: u64 = 4 << 20;

impl Journal {
    /// A new file; what was there is lost, so there must be nothing, or nothing but an empty file.
    ///
    /// # Errors
    /// There is something already, or the file cannot be written.
    pub fn create(path: &Path) -> Outcome<Self> {
        if std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() > 0) {
            let message = format!(
                "--save {}: there are results already; name a new file, or go on with --resume {0}",
                path.display()
            );
            return Err(stop(Kind::Config, message));
        }
        let file = File::create(path).map_err(|error| failed("--save", path, &error))?;
        Ok(Self { path: path.to_owned(), file, end: 0 })
    }

    /// Goes on with a file: its records, and a torn last line taken away.
    ///
    /// # Errors
    /// It is not there, cannot be written, or is no file of records.
    pub fn resume(path: &Path) -> Outcome<(Self, Vec<Record>)> {
        let (records, end) = read(path, "--resume")?;
        let told = |error: io::Error| failed("--resume", path, &error);
        let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(told)?;
        file.set_len(end).and_then(|()| file.seek(SeekFrom::Start(end))).map_err(told)?;
        Ok((Self { path: path.to_owned(), file, end }, records))
    }

    /// Appends a record, and waits until the system has it. If it does not fit (a full disk), what was there stays
    /// whole.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn append(&mut self, record: &Record) -> Outcome {
        let mut line = line(record)?;
        line.push('\n');
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            let mended = self.file.set_len(self.end).and_then(|()| self.file.seek(SeekFrom::Start(self.end)));
            let state = if mended.is_ok() { "all results up to here are in it" } else { "its last line may be torn" };
            let message = format!("{}: {error}; {state}: make room, then go on with --resume {0}", self.path.display());
            return Err(stop(Kind::Io, message));
        }
        self.end += line.len() as u64;
        Ok(())
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A record as a line, without its end.
pub fn line(record: &Record) -> Outcome<String> {
    serde_json::to_string(record).map_err(|error| stop(Kind::Failed, format!("cannot write JSON: {error}")))
}

/// The records of a file, and where the last whole one ends. A torn last line is left out; a bad one before it is an
/// error.
///
/// # Errors
/// It cannot be read, or is no file of records.
pub fn read(path: &Path, option: &str) -> Outcome<(Vec<Record>, u64)> {
    let told = |error: io::Error| failed(option, path, &error);
    let mut file = BufReader::new(File::open(path).map_err(told)?);
    let (mut records, mut end) = (Vec::new(), 0u64);
    for number in 1u64.. {
        let mut line = Vec::new();
        let length = io::Read::take(&mut file, LINE_BYTES_MAX).read_until(b'\n', &mut line).map_err(told)? as u64;
        if length == 0 || (line.last() != Some(&b'\n') && length < LINE_BYTES_MAX) {
            break;
        }
        let record = serde_json::from_slice(&line).map_err(|error| {
            let message = format!(
                "{option} {}: line {number} is no record of a benchmark ({error}); name a file that --save has written",
                path.display()
            );
            stop(Kind::Config, message)
        })?;
        records.push(record);
        end += length;
    }
    Ok((records, end))
}

fn failed(option: &str, path: &Path, error: &io::Error) -> Stop {
    stop(Kind::Io, format!("{option} {}: {error}; name a file that can be read and written", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn record(repetition: u64) -> Record {
        let figures = Figures { decode_s: 0.1 + repetition as f64 / 3.0, ..Figures::default() };
        Record::Run { point: Point::default(), repetition, figures: Box::new(figures) }
    }

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("overspill-cli-journal-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_written_over() {
        let path = path("torn");
        let mut journal = Journal::create(&path).unwrap();
        journal.append(&record(0)).unwrap();
        journal.append(&record(1)).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        let (mut journal, records) = Journal::resume(&path).unwrap();
        assert_eq!(records, [record(0)]);
        journal.append(&record(2)).unwrap();
        assert_eq!(read(&path, "--baseline").unwrap().0, [record(0), record(2)]);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn results_are_never_written_over() {
        let path = path("over");
        Journal::create(&path).unwrap().append(&record(0)).unwrap();
        let Err(Stop::Error(error)) = Journal::create(&path) else { panic!() };
        assert!(error.message.contains("--resume"), "{error}");
        std::fs::write(&path, "not json\n").unwrap();
        let Err(Stop::Error(error)) = Journal::resume(&path) else { panic!() };
        assert!(error.message.contains("line 1") && error.kind == Kind::Config, "{error}");
        std::fs::remove_file(path).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_told_with_the_cure() {
        let Ok(file) = OpenOptions::new().write(true).open("/dev/full") else { return };
        let mut journal = Journal { path: "/dev/full".into(), file, end: 0 };
        let Err(Stop::Error(error)) = journal.append(&record(0)) else { panic!() };
        assert!(error.message.contains("make room") && error.message.contains("--resume"), "{error}");
    }
}
