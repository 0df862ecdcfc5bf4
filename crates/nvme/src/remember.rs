//! What probes have found about disks, kept between runs in a small file of the user's cache directory: one line a
//! disk, fields separated by tabs. Losing it costs a probe; a line that makes no sense is no line.

use crate::probe::Shape;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Older findings are forgotten: firmware, filesystems and neighbours change.
const AGE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Disks in the file; the oldest go.
const DISKS_MAX: usize = 64;
/// A file larger than this is not ours.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What is known of a disk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remembered {
    /// The smallest reads and the shallowest queue that come near the best.
    pub shape: Shape,
    /// Bytes per second with them.
    pub bytes_per_s: f64,
    /// Seconds since 1970 when it was measured.
    pub measured_unix_s: u64,
}

impl Remembered {
    /// A finding of now.
    #[must_use]
    pub fn now(shape: Shape, bytes_per_s: f64) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { shape, bytes_per_s, measured_unix_s: now.as_secs() }
    }

    /// Bytes in flight that keep the disk busy.
    #[must_use]
    pub fn in_flight_bytes(&self) -> u64 {
        self.shape.request_bytes as u64 * self.shape.depth as u64
    }

    fn parse(line: &str) -> Option<(&str, Self)> {
        let mut fields = line.split('\t');
        let disk = fields.next().filter(|disk| !disk.is_empty())?;
        let shape = Shape { request_bytes: fields.next()?.parse().ok()?, depth: fields.next()?.parse().ok()? };
        let bytes_per_s: f64 = fields.next()?.parse().ok()?;
        let measured_unix_s = fields.next()?.parse().ok()?;
        let sensible = (1..=64 << 20).contains(&shape.request_bytes)
            && (1..=256).contains(&shape.depth)
            && bytes_per_s.is_finite()
            && bytes_per_s > 0.0;
        sensible.then_some((disk, Self { shape, bytes_per_s, measured_unix_s }))
    }
}

/// The file of what is known.
#[derive(Clone, Debug)]
pub struct Memory(PathBuf);

impl Memory {
    /// The file of this user: `overspill/disks.tsv` in `XDG_CACHE_HOME`, or in `~/.cache`; `None` if there is no home.
    #[must_use]
    pub fn of_user() -> Option<Self> {
        let directory = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let cache = directory("XDG_CACHE_HOME").or_else(|| Some(directory("HOME")?.join(".cache")))?;
        Some(Self::at(cache.join("overspill").join("disks.tsv")))
    }

    /// A file of one's own.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self(path)
    }

    fn lines(&self) -> Vec<(String, Remembered)> {
        let small = std::fs::metadata(&self.0).is_ok_and(|found| found.is_file() && found.len() <= FILE_BYTES_MAX);
        let text = if small { std::fs::read_to_string(&self.0).unwrap_or_default() } else { String::new() };
        text.lines().filter_map(|line| Remembered::parse(line).map(|(disk, found)| (disk.to_owned(), found))).collect()
    }

    /// What is known of a disk ([`disk_name`]), if that is not too long ago.
    #[must_use]
    pub fn recall(&self, disk: &str) -> Option<Remembered> {
        let (_, found) = self.lines().into_iter().find(|(name, _)| name == disk)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let age = now.checked_sub(Duration::from_secs(found.measured_unix_s))?;
        (age <= AGE_MAX).then_some(found)
    }

    /// Keeps a finding, instead of an earlier one of the same disk. Others see the old file or the new one.
    ///
    /// # Errors
    /// Whatever the system says about the directory or the file.
    pub fn keep(&self, disk: &str, found: Remembered) -> io::Result<()> {
        let mut lines = self.lines();
        lines.retain(|(name, _)| name != disk);
        lines.push((disk.to_owned(), found));
        lines.sort_by_key(|(_, found)| std::cmp::Reverse(found.measured_unix_s));
        lines.truncate(DISKS_MAX);
        let text: String = (lines.iter())
            .map(|(disk, found)| {
                let Remembered { shape, bytes_per_s, measured_unix_s } = found;
                let Shape { request_bytes, depth } = shape;
                format!("{disk}\t{request_bytes}\t{depth}\t{bytes_per_s}\t{measured_unix_s}\n")
            })
            .collect();
        if let Some(directory) = self.0.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let partial = self.0.with_extension(format!("{}.tmp", std::process::id()));
        std::fs::write(&partial, text).and_then(|()| std::fs::rename(&partial, &self.0)).inspect_err(|_| {
            // What is left of it is in nobody's way; the error that counts is the first.
            let _ = std::fs::remove_file(&partial);
        })
    }
}

/// What the system calls the disk under a file: its model and size, where it says so. A name that stays the same when
/// the system starts anew and devices are numbered in another order.
#[must_use]
pub fn disk_name(file: &Path) -> Option<String> {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::MetadataExt as _;
        let device = std::fs::metadata(file).ok()?.dev();
        let node =
            std::fs::canonicalize(format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device))).ok()?;
        let disk = if node.join("partition").exists() { node.parent()?.to_owned() } else { node };
        let word = |name: &str| std::fs::read_to_string(disk.join(name)).ok();
        let model = ["device/model", "device/serial", "dm/name", "md/uuid"].into_iter().find_map(word);
        let name = model.unwrap_or_else(|| disk.file_name().unwrap_or_default().to_string_lossy().into_owned());
        let clean: String = name.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        Some(format!("{clean} {}", word("size")?.trim()))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = file;
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const SHAPE: Shape = Shape { request_bytes: 1 << 20, depth: 8 };

    fn memory(name: &str) -> Memory {
        Memory::at(std::env::temp_dir().join(format!("overspill-{name}-{}", std::process::id())).join("deep/disks.tsv"))
    }

    #[test]
    fn what_was_kept_is_recalled_until_it_is_old() {
        let memory = memory("remember");
        assert_eq!(memory.recall("disk a"), None);
        let found = Remembered::now(SHAPE, 2.5e9);
        memory.keep("disk a", found).unwrap();
        memory.keep("disk b", Remembered { bytes_per_s: 1e9, ..found }).unwrap();
        assert_eq!(memory.recall("disk a"), Some(found));
        assert_eq!(found.in_flight_bytes(), 8 << 20);
        memory.keep("disk a", Remembered { bytes_per_s: 3e9, ..found }).unwrap();
        assert_eq!(memory.recall("disk a").unwrap().bytes_per_s, 3e9);
        assert_eq!(memory.recall("disk b").unwrap().bytes_per_s, 1e9);
        let old = found.measured_unix_s - AGE_MAX.as_secs() - 10;
        memory.keep("disk b", Remembered { measured_unix_s: old, ..found }).unwrap();
        assert_eq!(memory.recall("disk b"), None);
        let future = found.measured_unix_s + 1000;
        memory.keep("disk b", Remembered { measured_unix_s: future, ..found }).unwrap();
        assert_eq!(memory.recall("disk b"), None, "a clock that was wrong");
        for index in 0..2 * DISKS_MAX {
            memory.keep(&format!("disk {index}"), found).unwrap();
        }
        assert_eq!(memory.lines().len(), DISKS_MAX);
        std::fs::remove_dir_all(memory.0.parent().unwrap().parent().unwrap()).unwrap();
    }

    #[test]
    fn nonsense_is_nothing() {
        let memory = memory("nonsense");
        std::fs::create_dir_all(memory.0.parent().unwrap()).unwrap();
        for text in
            ["", "\n\t\t\n", "d\t1\t1\tnan\t1\n", "d\t0\t1\t5\t1", "d\t4096\t900\t5\t1", "d\t4096\t4\t-5\t1", "d\t4096"]
        {
            std::fs::write(&memory.0, text).unwrap();
            assert_eq!(memory.lines(), [], "{text:?}");
        }
        std::fs::write(&memory.0, vec![b'x'; FILE_BYTES_MAX as usize + 1]).unwrap();
        memory.keep("d", Remembered::now(SHAPE, 1.0)).unwrap();
        assert_eq!(memory.lines().len(), 1);
        std::fs::remove_dir_all(memory.0.parent().unwrap().parent().unwrap()).unwrap();
    }

    #[test]
    fn a_disk_has_one_name() {
        let (a, b) = (disk_name(Path::new(env!("CARGO_MANIFEST_DIR"))), disk_name(Path::new(file!())));
        assert!(a.as_ref().is_none_or(|name| !name.contains('\t') && !name.is_empty()));
        assert!(b.is_none() || a == b);
        assert_eq!(disk_name(Path::new("/nowhere/at/all")), None);
    }
}
