//! How much may be in flight on a disk: what its speed, as it turns out while reading, calls for.

use overspill_core::Config;

/// The speed is looked at each time so much has been read.
const LOOK_BYTES: u64 = 256 << 20;

/// The window of every disk, which grows while the disks turn out to be faster than was thought. It never shrinks: a
/// processor that is slow for a while makes a disk look slow.
#[derive(Debug)]
pub(crate) struct Window {
    bytes: u64,
    wires: u64,
    read_bytes: u64,
    since_ns: u64,
}

impl Window {
    /// Of so many bytes at first; `wires` disks are read from at a time.
    pub(crate) fn new(bytes: u64, wires: u32) -> Self {
        Self { bytes, wires: u64::from(wires.max(1)), read_bytes: 0, since_ns: 0 }
    }

    /// Takes note of a read, and of the time in which there was something to read altogether. The new size in bytes, if
    /// it grows by a quarter or more: each change has a price, since the brain plans anew.
    pub(crate) fn read(&mut self, bytes: u64, busy_ns: u64) -> Option<u64> {
        self.read_bytes += bytes;
        if self.read_bytes < LOOK_BYTES {
            return None;
        }
        let ns = busy_ns.saturating_sub(self.since_ns).max(1);
        let bytes_per_s = u128::from(self.read_bytes) * 1_000_000_000 / u128::from(ns) / u128::from(self.wires);
        (self.read_bytes, self.since_ns) = (0, busy_ns);
        let wanted = Config::disk_window_bytes(u64::try_from(bytes_per_s).unwrap_or(u64::MAX));
        if wanted < self.bytes + self.bytes / 4 {
            return None;
        }
        self.bytes = wanted;
        Some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads so much at this speed, in megabytes per second; the last size that was told.
    fn read(window: &mut Window, busy_ns: &mut u64, bytes: u64, mb_per_s: u64) -> Option<u64> {
        let mut told = None;
        for _ in 0..bytes >> 20 {
            *busy_ns += (1 << 20) * 1000 / mb_per_s;
            told = window.read(1 << 20, *busy_ns).or(told);
        }
        told
    }

    #[test]
    fn a_fast_disk_gets_a_larger_window_and_keeps_it() {
        let (mut window, mut now) = (Window::new(16 << 20, 1), 0);
        assert_eq!(read(&mut window, &mut now, 1 << 30, 500), None);
        let grown = read(&mut window, &mut now, 255 << 20, 2_000);
        assert_eq!(grown, None, "too little was read to tell");
        let grown = read(&mut window, &mut now, 1 << 20, 2_000);
        assert!(grown.is_some_and(|bytes| (31_900_000..=32_000_000).contains(&bytes)), "{grown:?}");
        assert_eq!(read(&mut window, &mut now, 1 << 30, 2_300), None, "not worth it");
        assert_eq!(read(&mut window, &mut now, 1 << 30, 400), None, "it never shrinks");
        assert_eq!(read(&mut window, &mut now, 1 << 30, 20_000), Some(64 << 20));
    }

    #[test]
    fn several_disks_share_what_is_read() {
        let (mut window, mut now) = (Window::new(16 << 20, 4), 0);
        assert_eq!(read(&mut window, &mut now, 1 << 30, 4_000), None);
    }
}
