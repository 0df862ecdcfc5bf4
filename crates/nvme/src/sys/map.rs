//! A map of a file from which bytes are copied by the kernel, never by a load of our own: after the file has shrunk, a
//! load would be answered with SIGBUS, while the kernel's copy just comes back short.

use memmap2::{Advice, MmapOptions, MmapRaw};
use std::fs::File;
use std::io;

/// A file, mapped for reading.
pub(crate) struct FileMap {
    map: MmapRaw,
    file: File,
}

impl FileMap {
    /// Maps the first `bytes` bytes of a file; more than 0.
    pub(crate) fn new(file: &File, bytes: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(bytes).map_raw_read_only(file)?;
        Ok(Self { map, file: file.try_clone()? })
    }

    /// Whether the system lets this process copy from itself.
    pub(crate) fn probe() -> io::Result<()> {
        let (from, mut to) = ([7u8; 16], [0u8; 16]);
        match copy(from.as_ptr(), &mut to) {
            Ok(16) if from == to => Ok(()),
            Ok(_) => Err(io::Error::other("process_vm_readv delivers nothing")),
            Err(errno) => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Copies the file's bytes from `offset` on, as far as they can be read. 0 bytes, or EFAULT, where the map or the
    /// file ends.
    pub(crate) fn copy_out(&self, offset: u64, to: &mut [u8]) -> Result<usize, i32> {
        let Ok(offset) = usize::try_from(offset) else { return Ok(0) };
        let bytes = to.len().min(self.map.len().saturating_sub(offset));
        if bytes == 0 {
            return Ok(0);
        }
        // One request to the disk for all of it, where page faults would make one each.
        let _ = self.map.advise_range(Advice::WillNeed, offset, bytes);
        let copied = copy(self.map.as_ptr().wrapping_add(offset), &mut to[..bytes]);
        self.let_go(offset, bytes);
        // The rest of the page in which the file ends reads as zeros. Asked after the copy, so that a file that was cut
        // before or during it is seen as cut.
        let ends = self.file.metadata().map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?.len();
        let there = usize::try_from(ends).unwrap_or(usize::MAX).saturating_sub(offset);
        copied.map(|copied| copied.min(there))
    }

    /// Takes the pages out of this process again: they stay in the page cache, but do not count as its memory.
    fn let_go(&self, offset: usize, bytes: usize) {
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the map is a shared, read-only map of a file: what is dropped comes back from the file at the next
        // access. No reference into the map exists, here or anywhere.
        let _ = unsafe { self.map.unchecked_advise_range(advice, offset, bytes) };
    }
}

fn copy(from: *const u8, to: &mut [u8]) -> Result<usize, i32> {
    let local = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let remote = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: to.len() };
    // SAFETY: the kernel writes `to`, which is borrowed exclusively and of this length. It checks every page of
    // `from` and fails with EFAULT, so nothing is asked of that address.
    let copied = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}
