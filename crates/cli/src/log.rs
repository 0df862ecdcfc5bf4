//! `--log LEVEL`, or `OVERSPILL_LOG`: what the library tells through `tracing`, on standard error. Without either nothing
//! is installed, and telling costs nothing.

use crate::errors::{Kind, Outcome, stop};
use crate::report;
use clap::ValueEnum;
use std::io::stderr;
use std::sync::atomic::{AtomicBool, Ordering};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::SubscriberExt as _;

/// The variable that stands for `--log` where that is not given.
const VARIABLE: &str = "OVERSPILL_LOG";

/// How much is told. Each level has what is before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum LogLevel {
    /// Nothing
    Off,
    /// What the library cannot work round
    Error,
    /// What fails and is tried again, or fails a demand
    Warn,
    /// Opening, tiers, budgets that change
    Info,
    /// Each wait, each reservation, which reader was chosen and why
    Debug,
    /// Each step and each transfer
    Trace,
}

impl LogLevel {
    fn filter(self) -> LevelFilter {
        match self {
            Self::Off => LevelFilter::OFF,
            Self::Error => LevelFilter::ERROR,
            Self::Warn => LevelFilter::WARN,
            Self::Info => LevelFilter::INFO,
            Self::Debug => LevelFilter::DEBUG,
            Self::Trace => LevelFilter::TRACE,
        }
    }
}

/// Whether something is told.
static TOLD: AtomicBool = AtomicBool::new(false);

/// Whether something is told on standard error from time to time.
pub fn is_told() -> bool {
    TOLD.load(Ordering::Relaxed)
}

/// Tells from now on what the option, or the variable, asks for.
///
/// # Errors
/// The variable has no level.
pub fn install(asked: Option<LogLevel>) -> Outcome {
    let level = match (asked, std::env::var_os(VARIABLE)) {
        (Some(level), _) => level,
        (None, Some(value)) if !value.is_empty() => level_of(&value.to_string_lossy())?,
        (None, _) => LogLevel::Off,
    };
    if level == LogLevel::Off {
        return Ok(());
    }
    // Of the libraries below only what went wrong: wgpu tells each of its objects.
    let below = level.filter().min(LevelFilter::WARN);
    let targets = Targets::new().with_target("overspill", level.filter()).with_default(below);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(stderr)
        .with_ansi(report::coloured(&stderr()))
        .with_span_events(FmtSpan::CLOSE)
        .with_filter(targets);
    // Nothing else in this program installs one, and this is done once.
    let installed = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(lines));
    debug_assert!(installed.is_ok());
    TOLD.store(true, Ordering::Relaxed);
    Ok(())
}

fn level_of(text: &str) -> Outcome<LogLevel> {
    LogLevel::from_str(text.trim(), true).map_err(|_| {
        let levels: Vec<String> = LogLevel::value_variants()
            .iter()
            .filter_map(|level| level.to_possible_value().map(|value| value.get_name().to_owned()))
            .collect();
        stop(Kind::Usage, format!("{VARIABLE}={text} is no level; set it to one of {}", levels.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn levels_are_found_by_name() {
        assert_eq!(level_of(" Debug ").unwrap(), LogLevel::Debug);
        assert!(level_of("loud").is_err());
        assert!(LogLevel::Off < LogLevel::Error && LogLevel::Debug < LogLevel::Trace);
        assert_eq!(LogLevel::Trace.filter().min(LevelFilter::WARN), LevelFilter::WARN, "less is the lesser");
    }
}
