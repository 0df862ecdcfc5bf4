//! How fast a disk is: each reader over the files of a model, over one file, or over a temporary one.

use crate::doctor::check_interrupt;
use crate::errors::{CliError, Kind, Outcome, stop};
use crate::sizes::human_bytes;
use crate::synth::free_disk_bytes;
use overspill::probe::{self, Bandwidth, ProbeError, Shape};
use overspill::remember::{self, Memory, Remembered};
use overspill::{FileSet, IoChoice};
use serde::Serialize;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What is measured.
#[derive(Debug)]
pub enum Target {
    /// These files, of these lengths.
    Files(String, Vec<(PathBuf, u64)>),
    /// A temporary file in this directory.
    Directory(PathBuf),
}

/// A disk's figures.
#[derive(Serialize)]
pub struct DiskReport {
    /// What was read.
    pub what: String,
    /// The readers, and the best shape of requests for the one that `auto` takes.
    pub readers: Vec<ReaderReport>,
    /// Why files are read through the page cache, if they are.
    pub direct_refusal: Option<String>,
    /// Why nothing was measured.
    pub error: Option<String>,
}

/// A reader's figures.
#[derive(Serialize)]
pub struct ReaderReport {
    /// `uring`, `pread`, `mmap`; or `auto` with the smallest requests that are fast enough.
    pub name: &'static str,
    /// Whether it reads past the page cache.
    pub direct: Option<bool>,
    /// Bandwidth.
    pub bytes_per_s: Option<f64>,
    /// Bytes of each read.
    pub request_bytes: Option<u64>,
    /// Reads in flight.
    pub depth: Option<usize>,
    /// Mean time of a read, waiting for the others included.
    pub latency_s: Option<f64>,
    /// Why there are no figures.
    pub error: Option<String>,
}

/// Smaller files are over before the clock has settled.
const FILE_BYTES_MIN: u64 = 16 << 20;
const TEMPORARY_BYTES: u64 = 256 << 20;
/// How each reader is measured.
const SHAPE: Shape = Shape { request_bytes: 1 << 20, depth: 16 };
const READER_TIME: Duration = Duration::from_millis(800);
/// For all shapes of requests together.
const SHAPES_TIME: Duration = Duration::from_millis(2400);

impl Target {
    /// What a path stands for.
    ///
    /// # Errors
    /// Nothing there, or a file that is too small.
    pub fn of(path: &Path) -> Outcome<Self> {
        let metadata = fs::metadata(path).map_err(|error| {
            stop(Kind::Config, format!("--path {}: {error}; name a file or a directory that is there", path.display()))
        })?;
        if metadata.is_dir() && !path.join("config.json").exists() {
            return Ok(Self::Directory(path.to_owned()));
        }
        // A model is its files; what is no model is read as it is.
        let files: Vec<_> = match overspill_formats::open(path) {
            Ok(model) => model.catalog.files().map(|(path, bytes)| (path.to_owned(), bytes)).collect(),
            Err(_) if metadata.is_dir() => return Ok(Self::Directory(path.to_owned())),
            Err(_) => vec![(path.to_owned(), metadata.len())],
        };
        let largest = files.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        if largest < FILE_BYTES_MIN {
            let message = format!(
                "--path {}: {} is too little to measure a disk with; name a file of {} or more, or a directory",
                path.display(),
                human_bytes(largest),
                human_bytes(FILE_BYTES_MIN)
            );
            return Err(stop(Kind::Config, message));
        }
        let total = files.iter().map(|(_, bytes)| *bytes).sum();
        Ok(Self::Files(format!("{}, {}", path.display(), human_bytes(total)), files))
    }
}

/// Of [`rate`]: how long it reads before it counts, since a throttle may have saved some up, and how long it counts.
const SETTLE_TIME: Duration = Duration::from_millis(600);
const RATE_TIME: Duration = Duration::from_millis(2000);

/// Bytes per second of the reader that `auto` takes, which other programs' page cache does not help where files can be
/// read directly; and what was read.
///
/// # Errors
/// Nothing can be read there; Ctrl-C.
pub fn rate(target: Target) -> Outcome<(String, Bandwidth)> {
    let (what, files, _temporary) = match target {
        Target::Files(what, files) => (what, files, None),
        Target::Directory(directory) => {
            let temporary = Temporary::write(&directory)?;
            (directory.display().to_string(), vec![(temporary.0.clone(), TEMPORARY_BYTES)], Some(temporary))
        }
    };
    let failed = |error: &dyn std::fmt::Display| {
        stop(Kind::Io, format!("{what}: the disk cannot be measured: {error}; name a profile with --hardware"))
    };
    let files = Arc::new(FileSet::open(&files).map_err(|error| failed(&error))?);
    let extents = probe::whole(&files);
    let read = |time| probe::bandwidth(&files, &extents, IoChoice::Auto, SHAPE, time);
    read(SETTLE_TIME).map_err(|error| failed(&error))?;
    check_interrupt()?;
    let found = read(RATE_TIME).map_err(|error| failed(&error))?;
    Ok((what, found))
}

/// Measures. What cannot be measured is reported.
///
/// # Errors
/// Ctrl-C.
pub fn report(target: Target, bench: bool) -> Outcome<DiskReport> {
    let nothing =
        |what: String, error: Option<String>| DiskReport { what, readers: Vec::new(), direct_refusal: None, error };
    let (what, files, _temporary) = match target {
        Target::Files(what, files) => (what, files, None),
        Target::Directory(directory) if !bench => {
            return Ok(nothing(directory.display().to_string(), Some("--no-bench was given".to_owned())));
        }
        Target::Directory(directory) => {
            let what = format!("{}, a temporary file of {}", directory.display(), human_bytes(TEMPORARY_BYTES));
            match Temporary::write(&directory) {
                Ok(temporary) => (what, vec![(temporary.0.clone(), TEMPORARY_BYTES)], Some(temporary)),
                Err(error) => return Ok(nothing(what, Some(error.to_string()))),
            }
        }
    };
    let files = match FileSet::open(&files) {
        Ok(files) => Arc::new(files),
        Err(error) => return Ok(nothing(what, Some(error.to_string()))),
    };
    let direct_refusal = files.direct_refusal().map(|(path, reason)| format!("{}: {reason}", path.display()));
    let mut report = DiskReport { what, readers: Vec::new(), direct_refusal, error: None };
    if !bench {
        report.error = Some("--no-bench was given".to_owned());
        return Ok(report);
    }
    let extents = probe::whole(&files);
    for io in [IoChoice::Uring, IoChoice::Pread, IoChoice::Mmap] {
        check_interrupt()?;
        let measured = probe::bandwidth(&files, &extents, io, SHAPE, READER_TIME);
        report.readers.push(ReaderReport::of(io.name(), measured));
    }
    check_interrupt()?;
    let best = probe::best_shape(&files, &extents, IoChoice::Auto, SHAPES_TIME);
    if let Ok(found) = &best {
        keep(&files, found);
    }
    report.readers.push(ReaderReport::of(IoChoice::Auto.name(), best));
    Ok(report)
}

/// Keeps a finding for later runs. Failing to costs them nothing but a narrower window.
pub fn keep(files: &FileSet, found: &Bandwidth) {
    let paths = (0..files.len()).map(|index| files.path(overspill::FileId(index as u32)));
    let disks: std::collections::BTreeSet<_> = paths.filter_map(remember::disk_name).collect();
    // Of several disks at once nothing is known about each.
    if let (Some(memory), Some(disk), 1) = (Memory::of_user(), disks.first(), disks.len()) {
        let _ = memory.keep(disk, Remembered::now(found.shape, found.bytes_per_s));
    }
}

impl ReaderReport {
    fn of(name: &'static str, measured: Result<Bandwidth, ProbeError>) -> Self {
        let found = measured.as_ref().ok();
        Self {
            name,
            direct: found.map(|b| b.reader.direct),
            bytes_per_s: found.map(|b| b.bytes_per_s),
            request_bytes: found.map(|b| b.shape.request_bytes as u64),
            depth: found.map(|b| b.shape.depth),
            latency_s: found.map(|b| b.latency.as_secs_f64()),
            error: measured.as_ref().err().map(ToString::to_string),
        }
    }
}

/// A file that is deleted when this is dropped.
struct Temporary(PathBuf);

impl Temporary {
    /// Writes [`TEMPORARY_BYTES`] that no file system can compress, and waits until they are on the disk.
    fn write(directory: &Path) -> Result<Self, CliError> {
        let path = directory.join(format!(".overspill-doctor-{}.tmp", std::process::id()));
        if free_disk_bytes(directory).is_some_and(|free| free / 2 < TEMPORARY_BYTES) {
            let message = format!("{}: no room for {}", directory.display(), human_bytes(TEMPORARY_BYTES));
            return Err(CliError::new(Kind::Io, message));
        }
        let failed = |error: io::Error| {
            let message =
                format!("{}: {error}; name a directory that can be written to, or a large file", path.display());
            CliError::new(Kind::Io, message)
        };
        let mut file = fs::File::create_new(&path).map_err(failed)?;
        let temporary = Self(path.clone());
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut chunk = vec![0u8; 1 << 20];
        for _ in 0..TEMPORARY_BYTES / chunk.len() as u64 {
            for word in chunk.chunks_exact_mut(8) {
                // xorshift64
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            file.write_all(&chunk).map_err(failed)?;
        }
        file.sync_all().map_err(failed)?;
        Ok(temporary)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // A failure leaves a hidden file behind; there is nobody to tell.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_path_stands_for_a_model_a_file_or_a_directory() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert!(matches!(Target::of(here).unwrap(), Target::Directory(_)));
        for (path, says) in
            [("nowhere", "name a file"), ("Cargo.toml", "too little"), ("../../fixtures/tiny-moe", "too little")]
        {
            let Err(crate::errors::Stop::Error(error)) = Target::of(&here.join(path)) else { panic!("{path}") };
            assert_eq!(error.kind, Kind::Config);
            assert!(error.message.contains(says), "{error}");
        }
        let large = std::env::temp_dir().join(format!("overspill-cli-target-{}", std::process::id()));
        fs::File::create(&large).unwrap().set_len(FILE_BYTES_MIN).unwrap();
        assert!(matches!(Target::of(&large).unwrap(), Target::Files(_, files) if files.len() == 1));
        fs::remove_file(large).unwrap();
    }
}
