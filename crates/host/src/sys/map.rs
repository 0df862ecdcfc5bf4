//! Anonymous, zeroed, page-aligned memory.

use std::io;
use std::ptr::NonNull;
#[cfg(target_os = "linux")]
use {crate::HUGE_BYTES, std::ops::Range};

/// Memory of its own, zeroed, that begins on a page. Unmapped on drop.
pub(crate) struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is plain memory owned by this value; it has no tie to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: the mapping hands out addresses only; whoever makes references of them answers for their exclusiveness.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

#[cfg(unix)]
impl Mapping {
    /// Maps `len` bytes (a multiple of the page size, not 0), where a huge page can begin if one fits.
    pub(crate) fn anonymous(len: usize) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        let mapping = {
            let mapping = if len >= HUGE_BYTES { Self::on_huge_boundary(len)? } else { Self::map(len)? };
            // Weights would make a core dump as large as the model.
            let _ = mapping.advise(0..len, libc::MADV_DONTDUMP);
            mapping
        };
        #[cfg(not(target_os = "linux"))]
        let mapping = Self::map(len)?;
        Ok(mapping)
    }

    fn map(len: usize) -> io::Result<Self> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory that exists.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(address.cast::<u8>()).map(|address| Self { address, len }).ok_or_else(io::Error::last_os_error)
    }

    /// Maps more than asked and gives the ends back, so that the rest begins where a huge page can.
    #[cfg(target_os = "linux")]
    fn on_huge_boundary(len: usize) -> io::Result<Self> {
        let Some(padded) = len.checked_add(HUGE_BYTES) else { return Self::map(len) };
        let whole = Self::map(padded)?;
        let head = whole.address.as_ptr().align_offset(HUGE_BYTES).min(HUGE_BYTES);
        let start = whole.address.as_ptr().wrapping_add(head);
        let Some(address) = NonNull::new(start) else { return Self::map(len) };
        std::mem::forget(whole);
        for (end, bytes) in [(start.wrapping_sub(head), head), (start.wrapping_add(len), HUGE_BYTES - head)] {
            if bytes > 0 {
                // SAFETY: both ends lie in the mapping just made, outside of the part that is kept, and nobody has
                // their address. `head` and `len` are multiples of the page size.
                unsafe { libc::munmap(end.cast(), bytes) };
            }
        }
        Ok(Self { address, len })
    }

    /// Gives the system an advice about a part, cut to what is mapped.
    #[cfg(target_os = "linux")]
    fn advise(&self, range: Range<usize>, advice: libc::c_int) -> io::Result<()> {
        let (start, end) = (range.start.min(self.len), range.end.min(self.len));
        let address = self.address.as_ptr().wrapping_add(start);
        // SAFETY: the range lies in this mapping, and the advices used in this module change no content: they back
        // pages, move them, or say how.
        match unsafe { libc::madvise(address.cast(), end.saturating_sub(start), advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Lets the system use huge pages where none is yet.
    #[cfg(target_os = "linux")]
    pub(crate) fn allow_huge(&self, range: Range<usize>) -> io::Result<()> {
        self.advise(range, libc::MADV_HUGEPAGE)
    }

    /// Backs pages that are not backed yet, as if they were written to. Returns how many the system was asked for.
    #[cfg(target_os = "linux")]
    pub(crate) fn populate(&self, range: Range<usize>) -> io::Result<u64> {
        let before = super::os::thread_minor_faults();
        loop {
            match self.advise(range.clone(), libc::MADV_POPULATE_WRITE) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                Err(error) => return Err(error),
                Ok(()) => return Ok(super::os::thread_minor_faults().saturating_sub(before)),
            }
        }
    }

    /// Moves the pages of a range into a huge one (Linux 6.1). The kernel refuses while a device holds any of them.
    #[cfg(target_os = "linux")]
    pub(crate) fn collapse(&self, range: Range<usize>) -> io::Result<()> {
        /// `MADV_COLLAPSE`, of which not every version of the libc crate knows.
        const COLLAPSE: libc::c_int = 25;
        self.advise(range, COLLAPSE)
    }

    /// Keeps the memory from being swapped out, as it is touched where the system can do that, else at once.
    pub(crate) fn lock(&self) -> io::Result<()> {
        let address = self.address.as_ptr().cast::<libc::c_void>();
        #[cfg(target_os = "linux")]
        {
            // SAFETY: the range is this mapping; locking changes no content.
            if unsafe { libc::mlock2(address, self.len, libc::MLOCK_ONFAULT as _) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::ENOSYS) {
                return Err(error);
            }
        }
        // SAFETY: the range is this mapping; locking changes no content.
        if unsafe { libc::mlock(address, self.len) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(unix)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by this value and is unmapped once; references into it borrow, or hold an Arc
        // of, the slab that owns this value.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

#[cfg(not(unix))]
impl Mapping {
    /// Allocates `len` zeroed bytes on a page boundary.
    pub(crate) fn anonymous(len: usize) -> io::Result<Self> {
        let layout = Self::layout(len).ok_or(io::ErrorKind::OutOfMemory)?;
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the layout's size is not 0.
        let address = unsafe { std::alloc::alloc_zeroed(layout) };
        NonNull::new(address).map(|address| Self { address, len }).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn layout(len: usize) -> Option<std::alloc::Layout> {
        std::alloc::Layout::from_size_align(len, crate::GRANULE_BYTES).ok()
    }

    /// Not done on this system.
    pub(crate) fn lock(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(not(unix))]
impl Drop for Mapping {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: allocated in `anonymous` with this very layout, freed once.
            unsafe { std::alloc::dealloc(self.address.as_ptr(), layout) };
        }
    }
}
