//! The open files of a model: what they were when they were opened, and whether they still are.

use crate::NvmeError;
use overspill_core::FileId;
#[cfg(target_os = "linux")]
use overspill_host::{AlignedBuf, GRANULE_BYTES};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The files of a model, open for reading, in the order of their [`FileId`]s.
#[derive(Debug)]
pub struct FileSet {
    entries: Vec<Entry>,
    wires: u32,
}

#[derive(Debug)]
struct Entry {
    path: PathBuf,
    identity: Identity,
    buffered: File,
    /// A second handle that goes past the page cache, or why there is none.
    direct: Result<File, String>,
    wire: u32,
}

/// What tells a file from another, and its content from an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let (device, inode) = {
            use std::os::unix::fs::MetadataExt;
            (metadata.dev(), metadata.ino())
        };
        #[cfg(not(unix))]
        let (device, inode) = (0, 0);
        Self { device, inode, bytes: metadata.len(), modified: metadata.modified().ok() }
    }
}

/// A file is no longer what it was when it was opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {what}", path.display())]
pub struct Changed {
    /// The file.
    pub path: PathBuf,
    /// Which file.
    pub file: FileId,
    /// In what way.
    pub what: Change,
}

/// How a file changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Change {
    /// Its length is another.
    #[error(
        "the file had {was_bytes} bytes when it was opened and has {is_bytes} now: it was changed while in use; open the model again"
    )]
    Resized {
        /// Before.
        was_bytes: u64,
        /// Now.
        is_bytes: u64,
    },
    /// It was written to.
    #[error("the file was written to while in use: open the model again")]
    Modified,
    /// Another file took its name. The one that is open is as it was.
    #[error("another file has taken this name while the model was in use: open the model again to use the new one")]
    Replaced,
    /// Nothing has its name any more. The file that is open is as it was.
    #[error("the file was removed while in use: its bytes stay readable until the model is closed")]
    Removed,
    /// The system no longer tells.
    #[error("the file can no longer be examined (error {errno}): check the disk")]
    Unreadable {
        /// `errno`, 0 if there is none.
        errno: i32,
    },
}

impl Change {
    /// Whether the bytes that are read are still those of the file that was opened.
    #[must_use]
    pub fn keeps_bytes(&self) -> bool {
        matches!(self, Self::Replaced | Self::Removed)
    }
}

impl FileSet {
    /// Opens files, each with the length that it had when its header was read.
    ///
    /// # Errors
    /// [`NvmeError::Open`], [`NvmeError::NotRegular`] or [`NvmeError::Length`], for the first file that is not right.
    pub fn open(paths: &[(PathBuf, u64)]) -> Result<Self, NvmeError> {
        let mut set = Self { entries: open_all(paths)?, wires: 0 };
        set.wires = assign_wires(&mut set.entries, |entry| disk_of(entry.identity.device));
        Ok(set)
    }

    /// As [`Self::open`], where the caller knows better than the system which disk a file lies on (volumes that hide
    /// their disks, servers behind a network): files for which `disk_of` says the same share a wire.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_on(paths: &[(PathBuf, u64)], disk_of: impl Fn(&Path) -> u64) -> Result<Self, NvmeError> {
        let mut set = Self { entries: open_all(paths)?, wires: 0 };
        set.wires = assign_wires(&mut set.entries, |entry| disk_of(&entry.path));
        Ok(set)
    }

    /// How many files.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no file.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A file's path, absolute; empty for a file that is not in the set.
    #[must_use]
    pub fn path(&self, file: FileId) -> &Path {
        self.entries.get(file.index()).map_or(Path::new(""), |entry| &entry.path)
    }

    /// A file's length when it was opened; 0 for a file that is not in the set.
    #[must_use]
    pub fn bytes(&self, file: FileId) -> u64 {
        self.entries.get(file.index()).map_or(0, |entry| entry.identity.bytes)
    }

    /// Disks that the files lie on. Files on partitions of one disk share it.
    #[must_use]
    pub fn wires(&self) -> u32 {
        self.wires
    }

    /// Which of [`Self::wires`] a file lies on; 0 for a file that is not in the set.
    #[must_use]
    pub fn wire_of(&self, file: FileId) -> u32 {
        self.entries.get(file.index()).map_or(0, |entry| entry.wire)
    }

    /// Whether a file can be read past the page cache.
    ///
    /// # Errors
    /// Why not.
    pub fn direct(&self, file: FileId) -> Result<(), &str> {
        let entry = self.entries.get(file.index()).ok_or("no such file")?;
        entry.direct.as_ref().map(|_| ()).map_err(String::as_str)
    }

    /// The first file that cannot be read past the page cache, and why.
    #[must_use]
    pub fn direct_refusal(&self) -> Option<(&Path, &str)> {
        self.entries.iter().find_map(|entry| Some((entry.path.as_path(), entry.direct.as_ref().err()?.as_str())))
    }

    /// Whether any file can be read past the page cache.
    #[must_use]
    pub fn any_direct(&self) -> bool {
        self.entries.iter().any(|entry| entry.direct.is_ok())
    }

    /// Checks that the files are still those that were opened: two cheap system calls a file, meant for once a token.
    ///
    /// # Errors
    /// The first file that changed, and how.
    pub fn check_unchanged(&self) -> Result<(), Changed> {
        for (index, entry) in self.entries.iter().enumerate() {
            entry.check().map_err(|what| Changed { path: entry.path.clone(), file: FileId(index as u32), what })?;
        }
        Ok(())
    }

    /// The files on one of [`Self::wires`].
    pub(crate) fn on_wire(&self, wire: u32) -> impl Iterator<Item = FileId> + '_ {
        (0..self.entries.len() as u32).map(FileId).filter(move |&file| self.wire_of(file) == wire)
    }

    /// Asks the system to forget what it has cached of these files, so that the next reads come from the disk.
    pub fn drop_cache(&self) {
        for entry in &self.entries {
            crate::sys::forget_cached(&entry.buffered);
        }
    }

    pub(crate) fn buffered(&self, file: FileId) -> Option<&File> {
        Some(&self.entries.get(file.index())?.buffered)
    }

    pub(crate) fn direct_file(&self, file: FileId) -> Option<&File> {
        self.entries.get(file.index())?.direct.as_ref().ok()
    }
}

fn open_all(paths: &[(PathBuf, u64)]) -> Result<Vec<Entry>, NvmeError> {
    paths.iter().map(|(path, bytes)| Entry::open(path, *bytes)).collect()
}

impl Entry {
    fn open(path: &Path, expected_bytes: u64) -> Result<Self, NvmeError> {
        let open_error = |source| NvmeError::Open { path: path.to_owned(), source };
        // Looked at before it is opened: opening a pipe would wait for its writer.
        check_regular(path, &std::fs::metadata(path).map_err(open_error)?)?;
        let path = std::path::absolute(path).map_err(open_error)?;
        let buffered = open_options().open(&path).map_err(open_error)?;
        let metadata = buffered.metadata().map_err(open_error)?;
        check_regular(&path, &metadata)?;
        let identity = Identity::of(&metadata);
        if identity.bytes != expected_bytes {
            return Err(NvmeError::Length { path, expected_bytes, actual_bytes: identity.bytes });
        }
        // The brain says what to read ahead; the system's guesses would only take the disk's time.
        crate::sys::advise_random(&buffered);
        let direct = open_direct(&path, &identity).map_err(|error| error.to_string());
        Ok(Self { path, identity, buffered, direct, wire: 0 })
    }

    fn check(&self) -> Result<(), Change> {
        let errno = |error: io::Error| Change::Unreadable { errno: error.raw_os_error().unwrap_or(0) };
        let now = Identity::of(&self.buffered.metadata().map_err(errno)?);
        let was = self.identity;
        if now.bytes != was.bytes {
            return Err(Change::Resized { was_bytes: was.bytes, is_bytes: now.bytes });
        }
        if now.modified != was.modified {
            return Err(Change::Modified);
        }
        match std::fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Change::Removed),
            Err(error) => Err(errno(error)),
            Ok(metadata) if Identity::of(&metadata) != was => Err(Change::Replaced),
            Ok(_) => Ok(()),
        }
    }
}

fn check_regular(path: &Path, metadata: &Metadata) -> Result<(), NvmeError> {
    if metadata.is_file() {
        return Ok(());
    }
    let kind = if metadata.is_dir() { "a directory" } else { "a pipe, a socket or a device" };
    Err(NvmeError::NotRegular { path: path.to_owned(), kind })
}

fn open_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(libc::O_NONBLOCK);
    }
    options
}

/// Opens a file past the page cache, and really reads from it so: some systems take the flag and refuse the reads.
#[cfg(target_os = "linux")]
fn open_direct(path: &Path, identity: &Identity) -> io::Result<File> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let file = open_options().custom_flags(libc::O_DIRECT | libc::O_NONBLOCK).open(path)?;
    if Identity::of(&file.metadata()?) != *identity {
        return Err(io::Error::other("the file changed while it was being opened"));
    }
    let mut buffer = AlignedBuf::new(GRANULE_BYTES).map_err(io::Error::other)?;
    let wanted = identity.bytes.min(GRANULE_BYTES as u64);
    loop {
        match file.read_at(&mut buffer, 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(bytes) if (bytes as u64) < wanted => return Err(io::Error::other("a direct read came back short")),
            Ok(_) => return Ok(file),
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_path: &Path, _identity: &Identity) -> io::Result<File> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "direct reads are done on Linux only"))
}

/// Numbers the disks in the order in which they come up. Returns how many there are.
fn assign_wires(entries: &mut [Entry], disk_of: impl Fn(&Entry) -> u64) -> u32 {
    let mut disks = Vec::new();
    for entry in entries {
        let disk = disk_of(entry);
        let known = disks.iter().position(|&known| known == disk);
        entry.wire = known.unwrap_or_else(|| {
            disks.push(disk);
            disks.len() - 1
        }) as u32;
    }
    disks.len() as u32
}

/// The disk that a device number belongs to: a partition's whole disk, where the system tells.
fn disk_of(device: u64) -> u64 {
    #[cfg(target_os = "linux")]
    {
        let directory = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
        let directory = Path::new(&directory);
        if directory.join("partition").exists()
            && let Ok(whole) = std::fs::read_to_string(directory.join("../dev"))
            && let Some((major, minor)) = whole.trim().split_once(':')
            && let (Ok(major), Ok(minor)) = (major.parse(), minor.parse())
        {
            return libc::makedev(major, minor);
        }
    }
    device
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::time::Duration;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("overspill-files-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str, bytes: usize) -> (PathBuf, u64) {
            let path = self.0.join(name);
            std::fs::write(&path, vec![7; bytes]).unwrap();
            (path, bytes as u64)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn invariant_9_changes_are_noticed_and_told_apart() {
        let dir = Dir::new("changes");
        let (path, bytes) = dir.file("a", 10_000);
        let set = FileSet::open(&[(path.clone(), bytes)]).unwrap();
        assert_eq!(set.check_unchanged(), Ok(()));
        let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
        let handle = OpenOptions::new().write(true).open(&path).unwrap();

        handle.set_modified(modified + Duration::from_secs(5)).unwrap();
        assert_eq!(set.check_unchanged().unwrap_err().what, Change::Modified);
        handle.set_modified(modified).unwrap();
        assert_eq!(set.check_unchanged(), Ok(()));

        handle.set_len(100).unwrap();
        let changed = set.check_unchanged().unwrap_err();
        assert_eq!(changed.what, Change::Resized { was_bytes: 10_000, is_bytes: 100 });
        assert!(changed.to_string().contains("/a: ") && !changed.what.keeps_bytes());
    }

    #[cfg(unix)]
    #[test]
    fn a_replaced_or_removed_file_keeps_its_bytes() {
        let dir = Dir::new("replaced");
        let (path, bytes) = dir.file("a", 5000);
        let set = FileSet::open(&[(path.clone(), bytes)]).unwrap();
        let (other, _) = dir.file("b", 5000);
        std::fs::rename(other, &path).unwrap();
        let what = set.check_unchanged().unwrap_err().what;
        assert!(what == Change::Replaced && what.keeps_bytes());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(set.check_unchanged().unwrap_err().what, Change::Removed);
    }

    #[test]
    fn what_is_no_model_file_is_refused() {
        let dir = Dir::new("refused");
        let (path, bytes) = dir.file("a", 5000);
        assert!(matches!(FileSet::open(&[(dir.0.clone(), 0)]), Err(NvmeError::NotRegular { .. })));
        assert!(matches!(FileSet::open(&[(dir.0.join("nowhere"), 0)]), Err(NvmeError::Open { .. })));
        let error = FileSet::open(&[(path, bytes + 1)]).unwrap_err();
        assert!(error.to_string().contains("has 5000 bytes now but 5001"), "{error}");
        #[cfg(target_os = "linux")]
        assert!(matches!(FileSet::open(&[("/dev/null".into(), 0)]), Err(NvmeError::NotRegular { .. })));
    }

    #[test]
    fn files_of_one_disk_share_a_wire() {
        let dir = Dir::new("wires");
        let set = FileSet::open(&[dir.file("a", 1), dir.file("b", 0)]).unwrap();
        assert_eq!((set.len(), set.wires(), set.wire_of(FileId(0)), set.wire_of(FileId(1))), (2, 1, 0, 0));
        assert_eq!((set.bytes(FileId(0)), set.bytes(FileId(9))), (1, 0));
        assert!(set.direct(FileId(9)).is_err());
    }

    #[test]
    fn files_of_two_disks_have_a_wire_each() {
        let dir = Dir::new("two-wires");
        let paths = [dir.file("a", 1), dir.file("bb", 2), dir.file("c", 1), dir.file("ddd", 3)];
        // As if files of a length lay on a disk of their own.
        let set = FileSet::open_on(&paths, |path| std::fs::metadata(path).unwrap().len()).unwrap();
        let wires: Vec<_> = (0..4).map(|file| set.wire_of(FileId(file))).collect();
        assert_eq!((set.wires(), &wires[..]), (3, &[0, 1, 0, 2][..]));
    }
}
