//! Advice about the page cache. It is only advice: a refusal changes nothing but speed.

use std::fs::File;

/// No read-ahead: what is wanted next is known, and asked for.
pub(crate) fn advise_random(file: &File) {
    #[cfg(target_os = "linux")]
    advise(file, libc::POSIX_FADV_RANDOM);
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}

/// Drops what is cached of the file, and clean.
pub(crate) fn forget_cached(file: &File) {
    #[cfg(target_os = "linux")]
    advise(file, libc::POSIX_FADV_DONTNEED);
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}

#[cfg(target_os = "linux")]
fn advise(file: &File, advice: libc::c_int) {
    use std::os::fd::AsRawFd;
    // SAFETY: takes no memory; the descriptor is open while `file` is borrowed. Length 0 means the whole file.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
}
