//! What can go wrong, by kind, with file, tensor, cause and cure.

use overspill_core::seam::ReadFault;
use std::path::PathBuf;

/// The kind of an [`Error`], from which a program decides what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A file, tensor, block, table or schedule that is not there.
    NotFound,
    /// A model file that is damaged, of an unknown kind, or changed while it was in use.
    BadFile,
    /// A budget that has no room for the work.
    TooSmall,
    /// A tensor that is cut into several blocks was asked for under one pointer.
    NotContiguous,
    /// Leases held the room until the deadline.
    PinnedOut,
    /// The system could not read.
    Io,
    /// A GPU is gone or out of memory, or there is none.
    Device,
    /// The engine is closed.
    Closed,
    /// A setting that makes no sense.
    Config,
}

/// An error of the engine.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Something that is not there.
    #[error("{what} is not there: {cure}")]
    NotFound {
        /// What.
        what: String,
        /// What to do.
        cure: String,
    },
    /// The model's files do not describe a model.
    #[error(transparent)]
    Format(#[from] std::sync::Arc<overspill_formats::FormatError>),
    /// Tensors that make no catalog.
    #[error(transparent)]
    Catalog(#[from] overspill_core::CatalogError),
    /// A file that changed while it was in use.
    #[error("{}: {what}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What changed, and what to do.
        what: String,
    },
    /// A budget that has no room for the work.
    #[error("{setting} of {budget_bytes} bytes is too small: the smallest that works is {bytes_min} bytes")]
    TooSmall {
        /// The setting, as the command line calls it.
        setting: String,
        /// What it is.
        budget_bytes: u64,
        /// What it must be.
        bytes_min: u64,
    },
    /// A tensor that lies in several blocks.
    #[error(
        "tensor '{tensor}' is cut into {blocks} blocks: acquire them one by one, copy it with fill(), or register it contiguous"
    )]
    NotContiguous {
        /// The tensor.
        tensor: String,
        /// In how many blocks it is.
        blocks: usize,
    },
    /// Leases held the room until the deadline.
    #[error(
        "{blocks} blocks found no room within {waited_ms} ms, since leases hold it ({holders}): drop leases before asking for more, or raise {setting}"
    )]
    PinnedOut {
        /// Blocks that were wanted.
        blocks: usize,
        /// How long the caller waited.
        waited_ms: u64,
        /// Who holds leases, and how many.
        holders: String,
        /// The setting of the tier's budget.
        setting: String,
    },
    /// A block that could not be read, even at the second try.
    #[error("{}: reading {bytes} bytes at {offset} of tensor '{tensor}' failed twice: {}; {}", path.display(), cause_of(fault), cure_of(fault))]
    Read {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where in the file.
        offset: u64,
        /// How many bytes.
        bytes: u64,
        /// What the disk said.
        fault: ReadFault,
    },
    /// A file that cannot be opened, or a backend that cannot run.
    #[error("{0}")]
    Storage(String),
    /// Memory that the system does not give.
    #[error("{0}")]
    Memory(String),
    /// A GPU that is gone, out of memory, or not there.
    #[error("{0}")]
    Device(String),
    /// The engine was closed.
    #[error("the engine is closed")]
    Closed,
    /// A setting that makes no sense.
    #[error("{setting}: {cause}")]
    Config {
        /// The setting.
        setting: String,
        /// What is wrong with it, and what would be right.
        cause: String,
    },
}

/// What the disk said, in the system's words where it has some.
fn cause_of(fault: &ReadFault) -> String {
    match fault {
        ReadFault::System { errno } => std::io::Error::from_raw_os_error(*errno).to_string(),
        other => other.to_string(),
    }
}

/// What to do about a read that failed.
fn cure_of(fault: &ReadFault) -> &'static str {
    match fault {
        ReadFault::EndOfFile { .. } => "stop whatever writes the file, and open the model again",
        _ => "check the disk (the system's log says more), or copy the model to another",
    }
}

impl Error {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Format(error) if error.kind() == overspill_formats::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Format(error) if error.kind() == overspill_formats::ErrorKind::Io => ErrorKind::Io,
            Self::Format(_) | Self::Catalog(_) | Self::Changed { .. } => ErrorKind::BadFile,
            Self::TooSmall { .. } => ErrorKind::TooSmall,
            Self::NotContiguous { .. } => ErrorKind::NotContiguous,
            Self::PinnedOut { .. } => ErrorKind::PinnedOut,
            Self::Read { fault: ReadFault::EndOfFile { .. }, .. } => ErrorKind::BadFile,
            Self::Read { .. } | Self::Storage(_) | Self::Memory(_) => ErrorKind::Io,
            Self::Device(_) => ErrorKind::Device,
            Self::Closed => ErrorKind::Closed,
            Self::Config { .. } => ErrorKind::Config,
        }
    }
}

impl From<overspill_formats::FormatError> for Error {
    fn from(error: overspill_formats::FormatError) -> Self {
        Self::Format(std::sync::Arc::new(error))
    }
}
