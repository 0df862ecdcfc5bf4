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

/// A run that is being watched.
#[derive(Debug)]
pub struct Watch {
    tokens: Arc<AtomicU64>,
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
        let tokens = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = mpsc::channel::<()>();
        let mut body = Body {
            engine: runtime.engine().clone(),
            metrics: args.metrics.clone(),
            status: crate::status::own_path(),
            fixed: Fixed::of(runtime.engine()),
            model: args.model.display().to_string(),
            tokens: Arc::clone(&tokens),
            begin: Instant::now(),
        };
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
        Ok(Self { tokens, stop, writer })
    }

    /// A token has come.
    pub fn token(&self) {
        self.tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes the last metrics and takes the status away.
    ///
    /// # Errors
    /// The metrics could not be written.
    pub fn finish(self) -> Outcome {
        drop(self.stop);
        self.writer.join().unwrap_or_else(|_| {
            Err(CliError::new(Kind::Failed, "the thread that watches the run broke off; please report it").into())
        })
    }
}

struct Body {
    engine: Engine,
    metrics: Option<PathBuf>,
    /// Where the status goes; `None` if there is no safe place, or it could not be written.
    status: Option<PathBuf>,
    fixed: Fixed,
    model: String,
    tokens: Arc<AtomicU64>,
    begin: Instant,
}

impl Body {
    fn write(&mut self, ended: bool, round: u32) -> Outcome {
        let tokens = self.tokens.load(Ordering::Relaxed);
        let metrics = self.metrics.as_ref().filter(|_| ended || round.is_multiple_of(METRICS_EVERY));
        if metrics.is_none() && (ended || self.begin.elapsed() < STATUS_AFTER || self.status.is_none()) {
            self.remove_status(ended);
            return Ok(());
        }
        let stats = match self.engine.stats() {
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
        if let Some(path) = self.status.as_ref().filter(|_| !ended && self.begin.elapsed() >= STATUS_AFTER) {
            let status = Status::new(&self.model, &self.engine, &stats, &self.fixed, tokens, self.begin.elapsed());
            let text = serde_json::to_vec(&status).unwrap_or_default();
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

/// Puts a file in place of another, whole.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
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
