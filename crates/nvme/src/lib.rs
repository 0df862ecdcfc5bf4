//! The NVMe tier of overspill: reads of a model's files, in the background, at a deep queue.
//!
//! [`FileSet`] opens the files and notices when they change. [`open_storage`] picks a reader for them, behind the seam
//! [`Storage`](overspill_core::seam::Storage): io_uring with direct I/O, a pool of threads with positional reads, or a
//! memory map that cannot kill the process. [`Gatherer`] reads scattered rows. [`decorate`] has readers around readers,
//! which count, slow down or fail; [`probe`] measures what the disk gives.
//!
//! This crate reads what it is told to. What to read and when is the brain's business, and so is every budget.
//!
//! ```
//! use overspill_core::{FileId, TransferId, seam::Read};
//! use overspill_nvme::{FileSet, IoChoice, StorageOptions, open_storage};
//! use std::sync::{Arc, mpsc};
//!
//! let path = std::env::temp_dir().join(format!("overspill-doc-{}", std::process::id()));
//! std::fs::write(&path, b"weights")?;
//! let files = Arc::new(FileSet::open(&[(path.clone(), 7)])?);
//! let (done, arrived) = mpsc::channel();
//! let sink = Box::new(move |completion| done.send(completion).unwrap_or_default());
//! let (storage, probe) = open_storage::<Box<[u8]>>(IoChoice::Auto, files, &StorageOptions::default(), sink)?;
//! let buffer = vec![0; 7].into();
//! storage.submit(&mut vec![Read { id: TransferId(1), file: FileId(0), offset: 0, len: 7, len_min: 7, buffer }]);
//! let completion = arrived.recv()?;
//! assert_eq!((completion.result, &*completion.buffer), (Ok(7), &b"weights"[..]));
//! println!("read by {}", probe.chosen);
//! # std::fs::remove_file(path)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod decorate;
mod files;
mod gather;
mod mmap;
mod open;
mod pread;
pub mod probe;
mod progress;
pub mod remember;
mod sys;
#[cfg(target_os = "linux")]
mod uring;
mod wires;
mod workers;

pub use files::{Change, Changed, FileSet};
pub use gather::{FileRange, GatherError, Gatherer};
pub use open::{DiskProbe, IoChoice, Probe, StorageOptions, open_storage};

use overspill_core::seam::Completion;
use std::path::PathBuf;

/// Where completed reads go. Called from the reader's threads; it must not block, nor drop the reader.
pub type Sink<B> = Box<dyn Fn(Completion<B>) + Send + Sync>;

/// Why files or a reader could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NvmeError {
    /// The system did not open a file.
    #[error("{}: cannot be opened ({source}): check the path and its permissions", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A directory, a pipe, a device: nothing that holds a model.
    #[error("{}: is {kind}, not a regular file: name the model's file itself", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The length is not what the header's reader saw.
    #[error(
        "{}: has {actual_bytes} bytes now but {expected_bytes} when its header was read: it is being written; try again \
         when that is done", path.display()
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length when its header was read.
        expected_bytes: u64,
        /// Its length now.
        actual_bytes: u64,
    },
    /// A reader that was asked for by name cannot work here.
    #[error("--io {choice} is not possible here: {reason}: {cure}")]
    Unavailable {
        /// What was asked for.
        choice: IoChoice,
        /// Why it does not work.
        reason: String,
        /// What to do.
        cure: &'static str,
    },
    /// A setting outside of its range.
    #[error("{setting} of {value} is impossible: it must be {range}")]
    Setting {
        /// Which.
        setting: &'static str,
        /// Its value.
        value: usize,
        /// What would be possible.
        range: &'static str,
    },
    /// No thread or no memory for a reader.
    #[error("a reader's {what} could not be made ({source}): the process is at a limit; raise it (ulimit -u, -v)")]
    Resources {
        /// What was wanted.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}
