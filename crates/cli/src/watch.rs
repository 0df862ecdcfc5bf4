//! What others see of a run while it goes on: the file of `--metrics`, and the status file that `overspill top` reads.
//!
//! One thread writes both, each anew under another name and then renamed, so that a reader never sees half of one. It
//! asks the engine for its figures and looks at no weights.

use crate::args::RunArgs;
use crate::errors::{CliError, Kind, Outcome};
use crate::status::{Fixed, Status};
use overspill::Engine;
use overspill_infer::generate::Runtime;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A run, as one may look at it from another thread.
#[derive(Clone, Debug)]
pub struct Observer {
    engine: Engine,
    fixed: Fixed,
    model: String,
    tokens: Arc<AtomicU64>,
    begin: Instant,
}

impl Observer {
    /// The run now.
    ///
    /// # Errors
    /// The engine is being closed.
    pub fn look(&self) -> Result<Status, overspill::Error> {
        Ok(self.status(&self.engine.stats()?))
    }

    fn status(&self, stats: &overspill::Stats) -> Status {
        Status::new(&self.model, &self.engine, stats, &self.fixed, self.tokens(), self.begin.elapsed())
    }

    fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }
}

/// A run that is being watched.
#[derive(Debug)]
pub struct Watch {
    observer: Observer,
    /// Dropping it ends the thread.
    stop: mpsc::Sender<()>,
    writer: JoinHandle<Outcome>,
}

/// How often the status is written.
const STATUS_TIME: Duration = Duration::from_millis(250);
/// How often the metrics are written, in periods of the status.
const METRICS_EVERY: u32 = 4;
/// A run that ends sooner leaves no status: nobody could have looked.
const STATUS_AFTER: Duration = Duration::from_millis(750);

impl Watch {
    /// Whether the metrics can be written, before anything else is done.
    ///
    /// # Errors
    /// They cannot.
    pub fn check(path: &Path) -> Outcome {
        replace(path, b"", 0o644).map_err(|error| failed(path, &error).into())
    }

    /// Watches a model's engine from now on.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(args: &RunArgs, runtime: &Runtime) -> Outcome<Self> {
        let (stop, stopped) = mpsc::channel::<()>();
        let observer = Observer {
            engine: runtime.engine().clone(),
            fixed: Fixed::of(runtime.engine()),
            model: args.model.display().to_string(),
            tokens: Arc::new(AtomicU64::new(0)),
            begin: Instant::now(),
        };
        let mut body =
            Body { observer: observer.clone(), metrics: args.metrics.clone(), status: crate::status::own_path() };
        let write = move || {
            let mut round = 0u32;
            loop {
                let ended = stopped.recv_timeout(STATUS_TIME) != Err(mpsc::RecvTimeoutError::Timeout);
                round = round.wrapping_add(1);
                body.write(ended, round)?;
                if ended {
                    return Ok(());
                }
            }
        };
        let writer = std::thread::Builder::new().name("overspill-watch".into()).spawn(write).map_err(|error| {
            CliError::new(
                Kind::Io,
                format!("there is no thread to watch the run with: {error}; lift the limit on threads"),
            )
        })?;
        Ok(Self { observer, stop, writer })
    }

    /// A token has come.
    pub fn token(&self) {
        self.observer.tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// For whoever else looks at the run.
    pub fn observer(&self) -> Observer {
        self.observer.clone()
    }

    /// Writes the last metrics and takes the status away.
    ///
    /// # Errors
    /// The metrics could not be written.
    pub fn finish(self) -> Outcome {
        // The engine closes with the last that holds it.
        drop((self.stop, self.observer));
        self.writer.join().unwrap_or_else(|_| {
            Err(CliError::new(Kind::Failed, "the thread that watches the run broke off; please report it").into())
        })
    }
}

struct Body {
    observer: Observer,
    metrics: Option<PathBuf>,
    /// Where the status goes; `None` if there is no safe place, or it could not be written.
    status: Option<PathBuf>,
}

impl Body {
    fn write(&mut self, ended: bool, round: u32) -> Outcome {
        let tokens = self.observer.tokens();
        let elapsed = self.observer.begin.elapsed();
        let metrics = self.metrics.as_ref().filter(|_| ended || round.is_multiple_of(METRICS_EVERY));
        if metrics.is_none() && (ended || elapsed < STATUS_AFTER || self.status.is_none()) {
            self.remove_status(ended);
            return Ok(());
        }
        let stats = match self.observer.engine.stats() {
            Ok(stats) => stats,
            // The engine is being closed: the run tells why.
            Err(_) => return Ok(()),
        };
        if let Some(path) = metrics {
            let mut page = overspill::metrics::render(&stats);
            page.push_str("# HELP overspill_tokens_total Tokens generated.\n# TYPE overspill_tokens_total counter\n");
            page.push_str(&format!("overspill_tokens_total {tokens}\n"));
            replace(path, page.as_bytes(), 0o644).map_err(|error| failed(path, &error))?;
        }
        self.remove_status(ended);
        if let Some(path) = self.status.as_ref().filter(|_| !ended && elapsed >= STATUS_AFTER) {
            let text = serde_json::to_vec(&self.observer.status(&stats)).unwrap_or_default();
            // Nobody asked for it, so a full disk is no failure of the run.
            if replace(path, &text, 0o600).is_err() {
                self.status = None;
            }
        }
        Ok(())
    }

    fn remove_status(&self, ended: bool) {
        if let Some(path) = self.status.as_ref().filter(|_| ended) {
            let _ = fs::remove_file(path);
        }
    }
}

fn failed(path: &Path, error: &io::Error) -> CliError {
    CliError::new(Kind::Io, format!("--metrics {}: {error}; name a file that can be written", path.display()))
}

/// Puts a file in place of another, whole. What is there and is no file (a device, a pipe) is written to, for it is not
/// ours to take away; of a link, what it leads to is replaced.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return fs::OpenOptions::new().write(true).open(path)?.write_all(bytes);
    }
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    let written = options.open(&temporary).and_then(|mut file| file.write_all(bytes));
    written.and_then(|()| fs::rename(&temporary, path)).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_stays_and_a_link_keeps_leading_where_it_led() {
        use std::os::unix::fs::{FileTypeExt as _, symlink};
        let directory = std::env::temp_dir().join(format!("overspill-cli-replace-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let at = |name: &str| directory.join(name);
        fs::write(at("file"), "old").unwrap();
        symlink("file", at("link")).unwrap();
        replace(&at("link"), b"new", 0o644).unwrap();
        assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
        assert_eq!(fs::read(at("file")).unwrap(), b"new");
        // A pipe, since a test may not touch the system's devices: a rename over one would take it from everybody.
        let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
        assert!(made.success());
        let pipe = at("pipe");
        let reader = std::thread::spawn(move || fs::read(pipe).unwrap());
        replace(&at("pipe"), b"through", 0o644).unwrap();
        assert!(fs::symlink_metadata(at("pipe")).unwrap().file_type().is_fifo());
        assert_eq!(reader.join().unwrap(), b"through");
        assert!(replace(&directory, b"", 0o644).is_err(), "a directory");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 3, "nothing is left lying about");
        fs::remove_dir_all(directory).unwrap();
    }
}
