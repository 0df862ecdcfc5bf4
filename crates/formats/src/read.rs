//! Bounded reading of headers: every length is compared with what the file has left before it is believed.
//!
//! Nothing here reads weights. What is allocated follows what was really read, never what a header claims.

use crate::error::{ErrorKind, FormatError};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// JSON files (configurations, indexes) larger than this are refused.
const JSON_BYTES_MAX: u64 = 128 << 20;

const AGAIN: &str = "fetch the file again";

/// Opens a regular file that isn't empty, and says how long it is.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64), FormatError> {
    // Asked before opening, because opening a pipe would wait for a writer.
    let metadata = std::fs::metadata(path).map_err(|e| FormatError::io(path, "open it", e))?;
    if metadata.is_dir() {
        return Err(FormatError::bad(path, "a directory where a file was expected", "name the file itself"));
    }
    if !metadata.is_file() {
        return Err(FormatError::bad(path, "not a regular file", "copy the model into a regular file"));
    }
    let file = File::open(path).map_err(|e| FormatError::io(path, "open it", e))?;
    let bytes = file.metadata().map_err(|e| FormatError::io(path, "ask for its length", e))?.len();
    if bytes == 0 {
        return Err(FormatError::bad(path, "the file is empty", AGAIN));
    }
    Ok((file, bytes))
}

/// Reads a whole JSON file.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, FormatError> {
    let (file, bytes) = open_regular(path)?;
    if bytes > JSON_BYTES_MAX {
        return Err(FormatError::bad(
            path,
            format!("{bytes} bytes of JSON, more than the {JSON_BYTES_MAX} that are read"),
            "this is not a model's configuration; check the path",
        ));
    }
    let mut text = Vec::new();
    file.take(JSON_BYTES_MAX).read_to_end(&mut text).map_err(|e| FormatError::io(path, "read it", e))?;
    if let Some(error) = impostor(path, &text) {
        return Err(error);
    }
    serde_json::from_slice(&text).map_err(|e| {
        FormatError::bad(
            path,
            format!("invalid JSON: {e}"),
            "NaN and Infinity aren't JSON; correct the file or fetch it again",
        )
        .with_source(e)
    })
}

/// Files that often lie where a model should be: the pointer that git leaves when LFS was not installed, or a web page
/// that a download saved in place of the file.
pub(crate) fn impostor(path: &Path, start: &[u8]) -> Option<FormatError> {
    if start.starts_with(b"version https://git-lfs") {
        return Some(FormatError::bad(
            path,
            "a git-lfs pointer, not the file itself",
            "run 'git lfs pull' where it was cloned",
        ));
    }
    let text = start.trim_ascii_start();
    let is_html = [&b"<!doctype html"[..], b"<html"]
        .iter()
        .any(|tag| text.get(..tag.len()).is_some_and(|head| head.eq_ignore_ascii_case(tag)));
    is_html.then(|| FormatError::bad(path, "a web page, not the file itself", AGAIN))
}

/// A file that is read from its start, with a count of what is left.
pub(crate) struct HeaderReader {
    path: PathBuf,
    file: BufReader<File>,
    bytes: u64,
    at: u64,
}

impl HeaderReader {
    pub(crate) fn open(path: &Path) -> Result<Self, FormatError> {
        let (file, bytes) = open_regular(path)?;
        let mut reader = Self { path: path.to_owned(), file: BufReader::with_capacity(64 << 10, file), bytes, at: 0 };
        let mut start = Vec::new();
        reader.file.by_ref().take(64).read_to_end(&mut start).map_err(|e| FormatError::io(path, "read it", e))?;
        if let Some(error) = impostor(path, &start) {
            return Err(error);
        }
        reader.file.seek(SeekFrom::Start(0)).map_err(|e| FormatError::io(path, "read it", e))?;
        Ok(reader)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes read so far.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Bytes not yet read.
    pub(crate) fn left(&self) -> u64 {
        self.bytes - self.at
    }

    /// Reads exactly `N` bytes of what `of` describes.
    pub(crate) fn array<const N: usize>(&mut self, of: &str) -> Result<[u8; N], FormatError> {
        let mut array = [0; N];
        self.check(N as u64, of)?;
        self.file.read_exact(&mut array).map_err(|e| FormatError::io(&self.path, "read its header", e))?;
        self.at += N as u64;
        Ok(array)
    }

    /// Appends exactly `len` bytes of what `of` describes.
    pub(crate) fn append(&mut self, len: u64, into: &mut Vec<u8>, of: &str) -> Result<(), FormatError> {
        self.check(len, of)?;
        let had = into.len();
        let got = self.file.by_ref().take(len).read_to_end(into);
        got.map_err(|e| FormatError::io(&self.path, "read its header", e))?;
        if (into.len() - had) as u64 != len {
            let error = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
            return Err(FormatError::io(&self.path, "read its header", error));
        }
        self.at += len;
        Ok(())
    }

    /// Whether `len` more bytes are there.
    pub(crate) fn check(&self, len: u64, of: &str) -> Result<(), FormatError> {
        if len <= self.left() {
            return Ok(());
        }
        Err(FormatError::new(
            ErrorKind::BadFile,
            &self.path,
            format!(
                "{of} at byte {} should take {len} bytes, but the file has only {} left: truncated or damaged",
                self.at,
                self.left()
            ),
            AGAIN,
        ))
    }
}
