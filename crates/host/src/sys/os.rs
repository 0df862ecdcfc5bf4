//! System calls about this process.

/// Size of a page of memory.
pub(crate) fn page_bytes() -> usize {
    #[cfg(unix)]
    {
        // SAFETY: reads a constant of the system.
        let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(bytes).ok().filter(|&bytes| bytes > 0).unwrap_or(crate::GRANULE_BYTES)
    }
    #[cfg(not(unix))]
    crate::GRANULE_BYTES
}

/// Memory of the machine, if the system says.
pub(crate) fn physical_bytes() -> Option<u64> {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        // SAFETY: reads a constant of the system.
        let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
        u64::try_from(pages).ok().filter(|&pages| pages > 0)?.checked_mul(page_bytes() as u64)
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    None
}

/// `RLIMIT_MEMLOCK`; `None` if it is unlimited.
#[cfg(unix)]
pub(crate) fn memlock_limit_bytes() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call fills the structure that it is given.
    let status = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    (status == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// The most memory that this process has had resident.
#[cfg(unix)]
pub(crate) fn peak_resident_bytes() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills the structure that it is given.
    let status = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    // SAFETY: all-zero bytes are a valid rusage, and the call may have filled it.
    let max = unsafe { usage.assume_init() }.ru_maxrss;
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    (status == 0).then_some(u64::try_from(max).ok()?.checked_mul(unit)?)
}

/// Page faults of this thread that needed no disk.
#[cfg(target_os = "linux")]
pub(crate) fn thread_minor_faults() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills the structure that it is given.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
    // SAFETY: all-zero bytes are a valid rusage, and the call may have filled it.
    u64::try_from(unsafe { usage.assume_init() }.ru_minflt).unwrap_or(0)
}
