//! The one error of the command line: its kind decides the exit code, its message goes to people.

use overspill_formats::{ErrorKind as FormatKind, FormatError};
use serde_json::json;
use std::fmt;
use std::io;

/// What went wrong, for scripts. Each kind has one exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The command line itself makes no sense.
    Usage,
    /// A setting that cannot be met: no such adapter, a prompt beyond the context, a token beyond the vocabulary.
    Config,
    /// There is no model at the path.
    NotFound,
    /// The model's files are damaged, incomplete, or of a kind that is not supported.
    BadFile,
    /// A budget has no room for the work.
    TooSmall,
    /// The system could not read or write.
    Io,
    /// A GPU is gone or out of memory.
    Device,
    /// Ctrl-C.
    Interrupted,
    /// Everything else.
    Failed,
}

impl Kind {
    /// Its name under `--json`.
    fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::Config => "config",
            Self::NotFound => "not_found",
            Self::BadFile => "bad_file",
            Self::TooSmall => "too_small",
            Self::Io => "io",
            Self::Device => "device",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
        }
    }

    /// The exit code of the contract.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Io | Self::Device | Self::Failed => 1,
            Self::Usage | Self::Config => 2,
            Self::NotFound | Self::BadFile => 3,
            Self::TooSmall => 4,
            Self::Interrupted => 130,
        }
    }
}

/// An error that ends the program.
#[derive(Debug)]
pub struct CliError {
    /// What kind of failure it is.
    pub kind: Kind,
    /// What was tried, which file and tensor, why it failed and what to do. One paragraph, no prefix.
    pub message: String,
    /// The budget that was missed, if that is what went wrong.
    pub missed: Option<Missed>,
    /// Tokens that had been generated, and their text.
    pub tokens: Option<(Vec<u32>, Option<String>)>,
}

/// A budget without room for the work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missed {
    /// The option that sets it.
    pub setting: String,
    /// The smallest that works.
    pub bytes_min: u64,
}

/// What a command ends with.
pub type Outcome<T = ()> = Result<T, Stop>;

/// Why a command ends early.
#[derive(Debug)]
pub enum Stop {
    /// It failed.
    Error(CliError),
    /// Nobody reads standard output any more (`overspill … | head`): not a failure.
    StdoutClosed,
}

impl CliError {
    /// An error of this kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), missed: None, tokens: None }
    }

    /// The object that `--json` prints.
    pub fn json(&self) -> serde_json::Value {
        let mut error = json!({ "kind": self.kind.name(), "message": self.message });
        if let (Some(object), Some(missed)) = (error.as_object_mut(), &self.missed) {
            object.insert("setting".to_owned(), missed.setting.clone().into());
            object.insert("smallest_budget_bytes".to_owned(), missed.bytes_min.into());
        }
        match &self.tokens {
            None => json!({ "error": error }),
            Some((tokens, text)) => json!({ "error": error, "tokens": tokens, "text": text }),
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// A failure of this kind, as a command returns it.
pub fn stop(kind: Kind, message: impl Into<String>) -> Stop {
    Stop::Error(CliError::new(kind, message))
}

impl From<CliError> for Stop {
    fn from(error: CliError) -> Self {
        Self::Error(error)
    }
}

impl From<FormatError> for Stop {
    fn from(error: FormatError) -> Self {
        Self::Error(CliError::new(format_kind(error.kind()), error.to_string()))
    }
}

fn format_kind(kind: FormatKind) -> Kind {
    match kind {
        FormatKind::NotFound => Kind::NotFound,
        FormatKind::Io => Kind::Io,
        FormatKind::BadFile => Kind::BadFile,
        FormatKind::BadRequest => Kind::Config,
        FormatKind::Cancelled => Kind::Interrupted,
        _ => Kind::Failed,
    }
}

/// What a failed write to standard output means.
pub fn stdout_failed(error: &io::Error) -> Stop {
    if error.kind() == io::ErrorKind::BrokenPipe {
        Stop::StdoutClosed
    } else {
        stop(Kind::Io, format!("cannot write to standard output: {error}; check where it leads"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_the_contracts_exit_code_and_a_name_of_its_own() {
        let kinds = [
            (Kind::Usage, 2),
            (Kind::Config, 2),
            (Kind::NotFound, 3),
            (Kind::BadFile, 3),
            (Kind::TooSmall, 4),
            (Kind::Io, 1),
            (Kind::Device, 1),
            (Kind::Interrupted, 130),
            (Kind::Failed, 1),
        ];
        for (kind, code) in kinds {
            assert_eq!(kind.exit_code(), code, "{}", kind.name());
        }
        let names: std::collections::BTreeSet<_> = kinds.iter().map(|(kind, _)| kind.name()).collect();
        assert_eq!(names.len(), kinds.len());
    }

    #[test]
    fn the_json_of_an_error_has_kind_message_and_what_would_work() {
        let mut error = CliError::new(Kind::TooSmall, "too small");
        assert_eq!(error.json(), json!({"error": {"kind": "too_small", "message": "too small"}}));
        error.missed = Some(Missed { setting: "--ram".to_owned(), bytes_min: 7 });
        assert_eq!(error.json()["error"]["smallest_budget_bytes"], 7);
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        assert!(matches!(stdout_failed(&io::Error::from(io::ErrorKind::BrokenPipe)), Stop::StdoutClosed));
        assert!(matches!(stdout_failed(&io::Error::from(io::ErrorKind::StorageFull)), Stop::Error(_)));
    }
}
