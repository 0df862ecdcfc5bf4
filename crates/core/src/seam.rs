//! The seam between the engine and whatever reads a disk, and the conformance body that every reader must pass.
//!
//! A reader takes a buffer by value and gives it back with the completion, on success and on error alike, so nobody
//! else can touch memory that a device may still write.

pub mod conformance;

use crate::ids::{FileId, TransferId};

/// Memory that a reader may fill: it owns its bytes, and moving the value does not move them.
pub trait Buffer: Send + 'static {
    /// The whole of the buffer, initialised. The address stays the same until the buffer is dropped.
    fn bytes_mut(&mut self) -> &mut [u8];
}

impl Buffer for Box<[u8]> {
    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
}

/// A request to fill the start of `buffer` with the file's bytes from `offset` on.
#[derive(Debug)]
pub struct Read<B> {
    /// Chosen by the caller; comes back in the completion and names the read in [`Storage::cancel`].
    pub id: TransferId,
    /// Which file.
    pub file: FileId,
    /// Where to start. If the file is open for direct I/O, a multiple of [`Storage::alignment_bytes`] is read without
    /// a copy; anything else is allowed and may be slower.
    pub offset: u64,
    /// Bytes wanted, at most the buffer's length. May reach past the end of the file.
    pub len: usize,
    /// Of `len`, how many must arrive for the read to be a success (the rest is alignment padding).
    pub len_min: usize,
    /// Where the bytes go.
    pub buffer: B,
}

/// What became of a read.
#[derive(Debug)]
pub struct Completion<B> {
    /// The request's id.
    pub id: TransferId,
    /// The request's buffer.
    pub buffer: B,
    /// Bytes read (at least `len_min`), or why not.
    pub result: Result<usize, ReadFault>,
}

/// Why a read did not deliver.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReadFault {
    /// The file ends before the bytes that must arrive: it was truncated after it was opened.
    EndOfFile {
        /// Bytes that did arrive.
        got_bytes: usize,
    },
    /// The system refused, with its error number (EIO and the like).
    System {
        /// `errno`.
        errno: i32,
    },
    /// The read was cancelled, or its reader was closed, before it began.
    Cancelled,
}

impl core::fmt::Display for ReadFault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::EndOfFile { got_bytes } => {
                write!(f, "the file ends early ({got_bytes} bytes arrived): it was truncated while in use")
            }
            Self::System { errno } => write!(f, "the system reports error {errno}"),
            Self::Cancelled => f.write_str("the read was cancelled"),
        }
    }
}

/// Reads files in the background. Implementations: memory map, pread pool, io_uring.
///
/// Every read that was submitted completes exactly once, through the sink that the reader was made with; the sink may
/// be called from any of the reader's threads, and must not block. Dropping the reader cancels what has not begun,
/// waits for the rest, and completes every read before it returns.
pub trait Storage<B: Buffer>: Send + Sync {
    /// Starts all these reads, leaving the vector empty. Never blocks on the disk; reads beyond the queue's depth wait
    /// inside the reader, in order.
    fn submit(&self, reads: &mut Vec<Read<B>>);

    /// Asks to drop a read if it has not begun. It completes all the same, with [`ReadFault::Cancelled`] or with what
    /// it read.
    fn cancel(&self, id: TransferId);

    /// Offsets, lengths and buffer addresses that are multiples of this are read without a copy. 1 if nothing is
    /// gained by alignment.
    fn alignment_bytes(&self) -> usize;

    /// The backend's name in reports: `uring`, `pread`, `mmap`.
    fn name(&self) -> &'static str;
}

impl<B: Buffer, S: Storage<B> + ?Sized> Storage<B> for Box<S> {
    fn submit(&self, reads: &mut Vec<Read<B>>) {
        (**self).submit(reads);
    }

    fn cancel(&self, id: TransferId) {
        (**self).cancel(id);
    }

    fn alignment_bytes(&self) -> usize {
        (**self).alignment_bytes()
    }

    fn name(&self) -> &'static str {
        (**self).name()
    }
}
