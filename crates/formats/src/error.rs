//! The one error of this crate: which file, which tensor or key, what is wrong, and what to do about it.
//!
//! The kind is what a program branches on; the text is for people. Names that come from a file are shown escaped and
//! cut, so that a hostile header can neither flood nor confuse a terminal.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What a caller may want to branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is nothing at the path that was asked for.
    NotFound,
    /// The system refused to read or write (permissions, a full disk, a failing device).
    Io,
    /// The file, or the set of files, is damaged, incomplete, or of a kind that is not read.
    BadFile,
    /// What was asked for makes no sense (a synthetic model that cannot exist).
    BadRequest,
    /// The caller cancelled.
    Cancelled,
}

/// What inside a file an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Subject {
    /// A tensor of this name.
    Tensor(String),
    /// A metadata or configuration key.
    Key(String),
}

/// Why a model could not be opened or written.
///
/// Displays as `FILE: tensor 'NAME': cause; cure`.
pub struct FormatError(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    file: PathBuf,
    subject: Option<Subject>,
    cause: String,
    cure: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl FormatError {
    pub(crate) fn new(kind: ErrorKind, file: &Path, cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            file: file.to_owned(),
            subject: None,
            cause: cause.into(),
            cure: cure.into(),
            source: None,
        }))
    }

    pub(crate) fn bad(file: &Path, cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadFile, file, cause, cure)
    }

    pub(crate) fn tensor(mut self, name: &str) -> Self {
        self.0.subject = Some(Subject::Tensor(name.to_owned()));
        self
    }

    pub(crate) fn key(mut self, name: &str) -> Self {
        self.0.subject = Some(Subject::Key(name.to_owned()));
        self
    }

    pub(crate) fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// An error of the system while `doing` something (as in "cannot {doing}").
    pub(crate) fn io(file: &Path, doing: &str, error: io::Error) -> Self {
        let (kind, cure) = match error.kind() {
            io::ErrorKind::NotFound => (ErrorKind::NotFound, "check the path"),
            io::ErrorKind::PermissionDenied => (ErrorKind::Io, "check the permissions"),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                (ErrorKind::Io, "make room on the disk, or write elsewhere")
            }
            io::ErrorKind::UnexpectedEof => {
                (ErrorKind::BadFile, "the file became shorter while it was read; fetch it again")
            }
            _ => (ErrorKind::Io, "check the disk and try again"),
        };
        Self::new(kind, file, format!("cannot {doing}: {error}"), cure).with_source(error)
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The file or directory that is at fault.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.0.file
    }

    /// The tensor or key that is at fault, if it is one.
    #[must_use]
    pub fn subject(&self) -> Option<&Subject> {
        self.0.subject.as_ref()
    }

    /// What is wrong, without file and tensor.
    #[must_use]
    pub fn cause(&self) -> &str {
        &self.0.cause
    }

    /// What to do about it.
    #[must_use]
    pub fn cure(&self) -> &str {
        &self.0.cure
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        write!(f, "{}: ", inner.file.display())?;
        match &inner.subject {
            Some(Subject::Tensor(name)) => write!(f, "tensor '{}': ", shown(name))?,
            Some(Subject::Key(name)) => write!(f, "key '{}': ", shown(name))?,
            None => {}
        }
        f.write_str(&inner.cause)?;
        if inner.cure.is_empty() { Ok(()) } else { write!(f, "; {}", inner.cure) }
    }
}

impl fmt::Debug for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FormatError({:?}: {self})", self.0.kind)
    }
}

impl StdError for FormatError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|source| source.as_ref() as _)
    }
}

/// A name from a file, fit for a terminal.
pub(crate) fn shown(name: &str) -> String {
    const CHARS_MAX: usize = 120;
    let mut text: String = name.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect();
    if name.chars().nth(CHARS_MAX).is_some() {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_file_tensor_cause_and_cure() {
        let error = FormatError::bad(Path::new("m.gguf"), "it is broken", "fetch it again").tensor("a\x1b[31m");
        assert_eq!(error.to_string(), "m.gguf: tensor 'a\\u{1b}[31m': it is broken; fetch it again");
        assert_eq!(error.kind(), ErrorKind::BadFile);
    }

    #[test]
    fn long_names_are_cut() {
        assert!(shown(&"x".repeat(1 << 20)).len() < 200);
    }

    #[test]
    fn a_full_disk_says_what_to_do() {
        let error = FormatError::io(Path::new("m"), "write", io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("make room"), "{error}");
    }
}
