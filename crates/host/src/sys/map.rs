//! Anonymous, zeroed, page-aligned memory.

use std::io;
use std::ptr::NonNull;

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

/// Huge pages are of this size on every platform that has them under a transparent name.
#[cfg(target_os = "linux")]
const HUGE_BYTES: usize = 2 << 20;

#[cfg(unix)]
impl Mapping {
    /// Maps `len` bytes (a multiple of the page size, not 0). With `huge`, the system is asked for huge pages; if it
    /// has none, small ones serve.
    pub(crate) fn anonymous(len: usize, huge: bool) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        let mapping = {
            let mapping = if huge { Self::on_huge_boundary(len)? } else { Self::map(len)? };
            if huge {
                mapping.advise(libc::MADV_HUGEPAGE);
            }
            // Weights would make a core dump as large as the model.
            mapping.advise(libc::MADV_DONTDUMP);
            mapping
        };
        #[cfg(not(target_os = "linux"))]
        let mapping = {
            let _ = huge;
            Self::map(len)?
        };
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

    #[cfg(target_os = "linux")]
    fn advise(&self, advice: libc::c_int) {
        // SAFETY: the range is this mapping; the advices used here change no content. A refusal is harmless.
        unsafe { libc::madvise(self.address.as_ptr().cast(), self.len, advice) };
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
    /// Allocates `len` zeroed bytes on a page boundary. Huge pages are not asked for on this system.
    pub(crate) fn anonymous(len: usize, _huge: bool) -> io::Result<Self> {
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
