//! The reader that works everywhere: positional reads on a pool of threads, past the page cache where that is possible.

use crate::files::FileSet;
use crate::open::StorageOptions;
use crate::progress::{EINVAL, Progress};
use crate::workers::{Serve, Workers};
use crate::{NvmeError, Sink};
use overspill_core::TransferId;
use overspill_core::seam::{Buffer, Read, ReadFault, Storage};
use overspill_host::GRANULE_BYTES;
use std::fs::File;
use std::io;
use std::sync::Arc;

/// Positional reads on a pool of threads.
pub(crate) struct Pread<B: Buffer> {
    workers: Workers<B>,
    alignment_bytes: usize,
}

struct Server {
    files: Arc<FileSet>,
    direct: bool,
    call_bytes_max: usize,
}

impl<B: Buffer> Pread<B> {
    pub(crate) fn start(files: Arc<FileSet>, options: &StorageOptions, sink: Arc<Sink<B>>) -> Result<Self, NvmeError> {
        let direct = options.direct && files.any_direct();
        let server = Server { files, direct, call_bytes_max: options.call_bytes_max };
        let workers = Workers::start("pread", options.threads, Arc::new(server), sink)?;
        Ok(Self { workers, alignment_bytes: if direct { GRANULE_BYTES } else { 1 } })
    }
}

impl<B: Buffer> Storage<B> for Pread<B> {
    fn submit(&self, reads: &mut Vec<Read<B>>) {
        self.workers.submit(reads);
    }

    fn cancel(&self, id: TransferId) {
        self.workers.cancel(id);
    }

    fn alignment_bytes(&self) -> usize {
        self.alignment_bytes
    }

    fn name(&self) -> &'static str {
        "pread"
    }
}

impl<B: Buffer> Serve<B> for Server {
    fn serve(&self, read: &mut Read<B>) -> Result<usize, ReadFault> {
        let invalid = ReadFault::System { errno: EINVAL };
        let Some(bytes) = read.buffer.bytes_mut().get_mut(..read.len) else { return Err(invalid) };
        let Some(buffered) = self.files.buffered(read.file) else { return Err(invalid) };
        let direct = if self.direct { self.files.direct_file(read.file) } else { None };
        let lens = (read.len, read.len_min);
        let mut progress =
            Progress::new(read.offset, lens, bytes.as_ptr().addr(), direct.is_some(), self.call_bytes_max);
        while let Some(call) = progress.next_call() {
            let file = direct.filter(|_| call.direct).unwrap_or(buffered);
            let result = read_at(file, &mut bytes[call.range.clone()], call.offset);
            if let Some(outcome) = progress.advance(&call, result) {
                return outcome;
            }
        }
        progress.at_end()
    }
}

/// One positional read: bytes, or the error's number.
pub(crate) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> Result<usize, i32> {
    #[cfg(unix)]
    let result = std::os::unix::fs::FileExt::read_at(file, bytes, offset);
    #[cfg(windows)]
    let result = std::os::windows::fs::FileExt::seek_read(file, bytes, offset);
    match result {
        Ok(bytes) => Ok(bytes),
        // Windows has an error for reads that begin at the end.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof || is_end(&error) => Ok(0),
        Err(error) => Err(error.raw_os_error().unwrap_or(EIO)),
    }
}

const EIO: i32 = 5;

fn is_end(error: &io::Error) -> bool {
    /// `ERROR_HANDLE_EOF`.
    const WINDOWS_END: i32 = 38;
    cfg!(windows) && error.raw_os_error() == Some(WINDOWS_END)
}
