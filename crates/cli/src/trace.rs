//! `--trace`: what the engine does, one JSON object a line, written by a thread of its own.
//!
//! Times are nanoseconds since the engine was opened. The first line describes the model, so that block numbers mean
//! something.

use crate::errors::{CliError, Kind};
use overspill::{Engine, Event};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A trace that is being written.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    writer: JoinHandle<std::io::Result<()>>,
}

impl Trace {
    /// Makes the file, before anything else is done.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(path: &Path) -> Result<File, CliError> {
        File::create(path).map_err(|error| failed(path, &error))
    }

    /// Writes what `engine` does from now on.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(file: File, path: &Path, engine: &Engine) -> Result<Self, CliError> {
        let events = engine.subscribe();
        let head = head(engine);
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let write = move || {
            let mut out = BufWriter::new(file);
            writeln!(out, "{head}")?;
            loop {
                match events.recv_timeout(Duration::from_millis(50)) {
                    Ok(event) => writeln!(out, "{}", line(&event))?,
                    Err(error) if error.is_disconnected() || asked.load(Ordering::Acquire) => return out.flush(),
                    Err(_) => {}
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

fn failed(path: &Path, error: &std::io::Error) -> CliError {
    CliError::new(Kind::Io, format!("--trace {}: {error}; name a file that can be written", path.display()))
}

fn head(engine: &Engine) -> Value {
    let catalog = engine.catalog();
    json!({
        "event": "opened",
        "blocks": catalog.blocks().len(),
        "slot_bytes": catalog.slot_bytes(),
        "weight_bytes": catalog.weight_bytes(),
        "io": engine.io().chosen.name(),
    })
}

fn line(event: &Event) -> Value {
    match event {
        Event::ReadStarted { at_ns, block, tier, speculative } => {
            json!({ "at_ns": at_ns, "event": "read_started", "block": block.0, "tier": tier.0, "speculative": speculative })
        }
        Event::ReadEnded { at_ns, block, tier, bytes } => {
            json!({ "at_ns": at_ns, "event": "read_ended", "block": block.0, "tier": tier.0, "bytes": bytes })
        }
        Event::Uploaded { at_ns, block, tier } => {
            json!({ "at_ns": at_ns, "event": "uploaded", "block": block.0, "tier": tier.0 })
        }
        Event::Evicted { at_ns, block, tier } => {
            json!({ "at_ns": at_ns, "event": "evicted", "block": block.0, "tier": tier.0 })
        }
        Event::Stalled { at_ns, ns, blocks } => {
            json!({ "at_ns": at_ns, "event": "stalled", "ns": ns, "blocks": blocks })
        }
        _ => json!({ "event": "other" }),
    }
}
