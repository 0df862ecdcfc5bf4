//! Why a tokenizer could not be built, or a text not be encoded: which file, which key, what is wrong, what to do.

use std::error::Error as StdError;
use std::fmt;
use std::path::{Path, PathBuf};

/// What a caller may want to branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TokenizerErrorKind {
    /// The system refused to read a file, or it is gone.
    Io,
    /// The tokenizer's description is damaged or contradicts itself.
    BadFile,
    /// A sound description of a kind of tokenizer that is not read.
    Unsupported,
    /// The text cannot be encoded with this vocabulary.
    BadText,
}

/// An error of the tokenizer. Displays as `FILE: key 'KEY': cause; cure`.
pub struct TokenizerError(Box<Inner>);

struct Inner {
    kind: TokenizerErrorKind,
    file: Option<PathBuf>,
    key: Option<String>,
    cause: String,
    cure: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl TokenizerError {
    fn new(kind: TokenizerErrorKind, cause: impl Into<String>, cure: impl Into<String>) -> Self {
        let (cause, cure) = (cause.into(), cure.into());
        Self(Box::new(Inner { kind, file: None, key: None, cause, cure, source: None }))
    }

    pub(super) fn io(cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::new(TokenizerErrorKind::Io, cause, cure)
    }

    pub(super) fn bad(cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::new(TokenizerErrorKind::BadFile, cause, cure)
    }

    pub(super) fn unsupported(cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::new(TokenizerErrorKind::Unsupported, cause, cure)
    }

    pub(super) fn text(cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::new(TokenizerErrorKind::BadText, cause, cure)
    }

    pub(super) fn file(mut self, file: &Path) -> Self {
        self.0.file = Some(file.to_owned());
        self
    }

    pub(super) fn key(mut self, key: &str) -> Self {
        self.0.key = Some(key.to_owned());
        self
    }

    pub(super) fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> TokenizerErrorKind {
        self.0.kind
    }

    /// The file at fault; `None` if the text is.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.file.as_deref()
    }

    /// What is wrong, without file and key.
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

impl fmt::Display for TokenizerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        if let Some(file) = &inner.file {
            write!(f, "{}: ", file.display())?;
        }
        if let Some(key) = &inner.key {
            write!(f, "key '{}': ", shown(key))?;
        }
        write!(f, "{}; {}", inner.cause, inner.cure)
    }
}

impl fmt::Debug for TokenizerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenizerError({:?}: {self})", self.0.kind)
    }
}

impl StdError for TokenizerError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|source| source.as_ref() as _)
    }
}

/// Text from a file, fit for a terminal: escaped and cut.
pub(super) fn shown(text: &str) -> String {
    const CHARS_MAX: usize = 120;
    let mut escaped: String = text.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        escaped.push('…');
    }
    escaped
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_text_names_file_key_cause_and_cure() {
        let error = TokenizerError::bad("it is empty", "fetch it again").file(Path::new("m.gguf")).key("a\x1b[31m");
        assert_eq!(error.to_string(), "m.gguf: key 'a\\u{1b}[31m': it is empty; fetch it again");
        assert_eq!(error.kind(), TokenizerErrorKind::BadFile);
        assert_eq!(error.path().unwrap(), Path::new("m.gguf"));
    }

    #[test]
    fn long_texts_are_cut() {
        assert!(shown(&"x".repeat(1 << 16)).len() < 200);
    }
}
