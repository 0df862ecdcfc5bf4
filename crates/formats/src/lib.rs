//! Model files: their headers become a catalog of tensors, and synthetic models are written.
//!
//! [`open`] reads the headers of a Hugging Face directory (safetensors, in one file or in shards) or of a GGUF file
//! (in one or split), and describes every tensor: name, element type, shape, and where its bytes are. It never reads a
//! weight; that is the engine's business. What an architecture does with its tensors is the runtime's: here only the
//! role that decides how a tensor is stored is taken from its name.
//!
//! Files are taken to be hostile: every offset, length and count is checked before it is used, and what is allocated
//! is bounded by what is really in the file.
//!
//! ```no_run
//! let model = overspill_formats::open("models/tiny-stories".as_ref())?;
//! for tensor in model.catalog.tensors() {
//!     println!("{} {} {:?}", tensor.name, tensor.dtype, tensor.shape);
//! }
//! # Ok::<(), overspill_formats::FormatError>(())
//! ```
#![forbid(unsafe_code)]

mod error;
mod gguf;
mod gguf_value;
mod hf;
mod read;
mod role;
mod safetensors_file;
pub mod synth;
pub mod write;

pub use error::{ErrorKind, FormatError, Subject};
pub use gguf_value::{GgufArray, GgufMetadata, GgufStrings, GgufValue};

use overspill_core::{Catalog, CatalogBuilder, CatalogError};
use serde_json::Value;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// How a model is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// A directory of `config.json` and safetensors files.
    Safetensors,
    /// One GGUF file, or the files of a split one.
    Gguf,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors",
            Self::Gguf => "gguf",
        })
    }
}

/// What the files say about the model besides its tensors. Nothing in it has been checked for sense.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Metadata {
    /// The JSON files of a Hugging Face directory.
    HuggingFace {
        /// `config.json`: an object.
        config: Value,
        /// `generation_config.json`, if there is one.
        generation: Option<Value>,
        /// Where `tokenizer.json` is, if there is one.
        tokenizer_json: Option<PathBuf>,
        /// `tokenizer_config.json`, if there is one.
        tokenizer_config: Option<Value>,
    },
    /// The keys of a GGUF file.
    Gguf(GgufMetadata),
}

/// A tensor that is in the files but not in the catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkippedTensor {
    /// Its name.
    pub name: String,
    /// Why it was left out.
    pub reason: String,
}

/// A model whose headers have been read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModelFiles {
    /// Its tensors, and how they are cut.
    pub catalog: Catalog,
    /// Everything else that the files say.
    pub metadata: Metadata,
    /// How it is stored.
    pub format: Format,
    /// The directory, or the GGUF file that was opened.
    pub path: PathBuf,
    /// Tensors that were left out, with the reasons.
    pub skipped: Vec<SkippedTensor>,
}

/// Opens a model: a Hugging Face directory, one of its safetensors files or their index, or a GGUF file (any file of a
/// split one). Reads headers only.
///
/// # Errors
/// [`ErrorKind::NotFound`] if nothing is at `path`; [`ErrorKind::Io`] if the system refuses to read; otherwise
/// [`ErrorKind::BadFile`]. The error names the file, the tensor or key, the cause and the cure.
pub fn open(path: &Path) -> Result<ModelFiles, FormatError> {
    let metadata = std::fs::metadata(path).map_err(|e| FormatError::io(path, "open it", e))?;
    let name = path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    if metadata.is_dir() {
        if name.ends_with(".gguf") || name.ends_with(".safetensors") {
            return Err(FormatError::bad(path, "a directory where a file was expected", "name the file itself"));
        }
        return hf::open_directory(path);
    }
    if name.ends_with(".safetensors") {
        hf::open_file(path)
    } else if name.ends_with(".safetensors.index.json") {
        hf::open_index(path)
    } else if name.ends_with(".gguf") || begins_as_gguf(path)? {
        gguf::open(path)
    } else {
        Err(FormatError::bad(
            path,
            "neither a GGUF file nor a safetensors file",
            "name a .gguf file, or a directory with config.json and safetensors files",
        ))
    }
}

/// GGUF files in a content-addressed cache have no extension.
fn begins_as_gguf(path: &Path) -> Result<bool, FormatError> {
    let (file, _) = read::open_regular(path)?;
    let mut start = Vec::new();
    file.take(64).read_to_end(&mut start).map_err(|e| FormatError::io(path, "read it", e))?;
    match read::impostor(path, &start) {
        Some(error) => Err(error),
        None => Ok(start.starts_with(b"GGUF")),
    }
}

/// Cuts what the headers describe into blocks; `path` is named where an error concerns no single file.
fn build(builder: CatalogBuilder, path: &Path) -> Result<Catalog, FormatError> {
    let catalog = builder.build().map_err(|error| {
        let (file, cause, cure) = match &error {
            CatalogError::BeyondEnd { file, offset, end, file_bytes, .. } => (
                file.clone(),
                format!("its bytes {offset} to {end} lie beyond the file's end at {file_bytes}"),
                "the file is truncated; fetch it again",
            ),
            CatalogError::Shape { shape, dtype, .. } => (
                path.to_owned(),
                format!("a shape of {} is impossible for {dtype}", safetensors_file::dims(shape)),
                "the file is damaged; fetch it again",
            ),
            CatalogError::Duplicate { .. } => {
                (path.to_owned(), "it is there twice".to_owned(), "the files of two models may be mixed up")
            }
            other => (path.to_owned(), other.to_string(), "fetch it again"),
        };
        let named = FormatError::bad(&file, cause, cure);
        match &error {
            CatalogError::BeyondEnd { name, .. }
            | CatalogError::Shape { name, .. }
            | CatalogError::Duplicate { name } => named.tensor(name).with_source(error),
            _ => named.with_source(error),
        }
    })?;
    if catalog.tensors().is_empty() {
        return Err(FormatError::bad(path, "it holds no tensors", "fetch a file that holds the model's weights"));
    }
    Ok(catalog)
}
