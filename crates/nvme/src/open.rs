//! Which reader serves: the one that was asked for, or the best of those that work here, with the reasons.

use crate::files::FileSet;
use crate::pread::Pread;
use crate::{NvmeError, Sink};
use overspill_core::seam::{Buffer, Storage};
use overspill_host::GRANULE_BYTES;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Which reader to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IoChoice {
    /// The best one that works here.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// Positional reads on a pool of threads.
    Pread,
    /// A memory map.
    Mmap,
}

impl IoChoice {
    /// All choices, `Auto` first.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Uring, Self::Pread, Self::Mmap];

    /// Its name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Uring => "uring",
            Self::Pread => "pread",
            Self::Mmap => "mmap",
        }
    }
}

impl fmt::Display for IoChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for IoChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|choice| choice.name() == text);
        known.ok_or_else(|| format!("'{text}' is no reader: use auto, uring, pread or mmap"))
    }
}

/// Settings of the readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageOptions {
    /// Reads in flight in the ring of `uring`. Default 64; 1 to 4096. More may be submitted; they wait.
    pub depth: usize,
    /// Threads of `pread` and `mmap`, and so their reads in flight. Default 8; 1 to 256.
    pub threads: usize,
    /// Whether `uring` and `pread` read past the page cache where they can. Default true.
    pub direct: bool,
    /// Most bytes of one system call; longer reads take several. Default 1 GiB; 4096 to 1 GiB, a multiple of 4096.
    pub call_bytes_max: usize,
}

impl Default for StorageOptions {
    fn default() -> Self {
        Self { depth: 64, threads: 8, direct: true, call_bytes_max: 1 << 30 }
    }
}

impl StorageOptions {
    fn check(&self) -> Result<(), NvmeError> {
        let error = |setting, value, range| Err(NvmeError::Setting { setting, value, range });
        if !(1..=4096).contains(&self.depth) {
            return error("depth", self.depth, "1 to 4096");
        }
        if !(1..=256).contains(&self.threads) {
            return error("threads", self.threads, "1 to 256");
        }
        let bytes = self.call_bytes_max;
        if !(GRANULE_BYTES..=1 << 30).contains(&bytes) || !bytes.is_multiple_of(GRANULE_BYTES) {
            return error("call_bytes_max", bytes, "4096 to 1 GiB, and a multiple of 4096");
        }
        Ok(())
    }
}

/// What was chosen, and why nothing better.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The reader that serves.
    pub chosen: IoChoice,
    /// Whether it reads past the page cache, at least some of the files.
    pub direct: bool,
    /// Readers that would have been preferred, each with the reason why it was not taken.
    pub rejected: Vec<(IoChoice, String)>,
    /// Why some files are read through the page cache although they were not to be.
    pub direct_refusal: Option<String>,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.chosen, if self.direct { " with direct I/O" } else { "" })?;
        for (choice, reason) in &self.rejected {
            write!(f, "; not {choice}: {reason}")?;
        }
        self.direct_refusal.iter().try_for_each(|reason| write!(f, "; not direct: {reason}"))
    }
}

/// Opens a reader of these files.
///
/// `Auto` takes io_uring if the kernel allows it and the files can be read directly; else positional reads. The
/// [`Probe`] says which and why.
///
/// # Errors
/// [`NvmeError::Unavailable`] if a reader was named that does not work here; [`NvmeError::Setting`] for options out of
/// their range; [`NvmeError::Resources`] if there is no thread to be had.
pub fn open_storage<B: Buffer>(
    io: IoChoice,
    files: Arc<FileSet>,
    options: &StorageOptions,
    sink: Sink<B>,
) -> Result<(Box<dyn Storage<B>>, Probe), NvmeError> {
    options.check()?;
    let sink = Arc::new(sink);
    let direct_refusal = files.direct_refusal().map(|(path, reason)| format!("{}: {reason}", path.display()));
    let mut probe = Probe {
        chosen: io,
        direct: options.direct && files.any_direct() && io != IoChoice::Mmap,
        rejected: Vec::new(),
        direct_refusal: direct_refusal.filter(|_| options.direct && io != IoChoice::Mmap),
    };
    let pread = |sink| Pread::start(Arc::clone(&files), options, sink).map(|reader| Box::new(reader) as Box<_>);
    let storage: Box<dyn Storage<B>> = match io {
        IoChoice::Pread => pread(sink)?,
        IoChoice::Uring => start_uring(&files, options, sink).map_err(|reason| NvmeError::Unavailable {
            choice: io,
            reason,
            cure: "allow io_uring to this process (Linux 5.6, the container's seccomp profile, kernel.io_uring_disabled) or use --io pread",
        })?,
        IoChoice::Mmap => start_mmap(&files, options, sink).map_err(|reason| NvmeError::Unavailable {
            choice: io,
            reason,
            cure: "allow process_vm_readv to this process or use --io pread",
        })?,
        IoChoice::Auto => {
            let refusal = probe.direct_refusal.as_ref().filter(|_| !probe.direct && !files.is_empty());
            let uring = match refusal {
                Some(refusal) => Err(format!("no direct I/O: {refusal}")),
                None => start_uring(&files, options, Arc::clone(&sink)),
            };
            match uring {
                Ok(storage) => {
                    probe.chosen = IoChoice::Uring;
                    storage
                }
                Err(reason) => {
                    probe.rejected.push((IoChoice::Uring, reason));
                    probe.chosen = IoChoice::Pread;
                    pread(sink)?
                }
            }
        }
    };
    tracing::debug!(reader = %probe, "opened a reader");
    Ok((storage, probe))
}

#[cfg(target_os = "linux")]
fn start_uring<B: Buffer>(
    files: &Arc<FileSet>,
    options: &StorageOptions,
    sink: Arc<Sink<B>>,
) -> Result<Box<dyn Storage<B>>, String> {
    Ok(Box::new(crate::uring::Uring::start(Arc::clone(files), options, sink)?))
}

#[cfg(not(target_os = "linux"))]
fn start_uring<B: Buffer>(
    _files: &Arc<FileSet>,
    _options: &StorageOptions,
    _sink: Arc<Sink<B>>,
) -> Result<Box<dyn Storage<B>>, String> {
    Err("only Linux has io_uring".to_owned())
}

#[cfg(target_os = "linux")]
fn start_mmap<B: Buffer>(
    files: &Arc<FileSet>,
    options: &StorageOptions,
    sink: Arc<Sink<B>>,
) -> Result<Box<dyn Storage<B>>, String> {
    Ok(Box::new(crate::mmap::Mmap::start(Arc::clone(files), options, sink)?))
}

#[cfg(not(target_os = "linux"))]
fn start_mmap<B: Buffer>(
    _files: &Arc<FileSet>,
    _options: &StorageOptions,
    _sink: Arc<Sink<B>>,
) -> Result<Box<dyn Storage<B>>, String> {
    Err(crate::mmap::REFUSAL.to_owned())
}
