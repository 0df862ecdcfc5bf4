//! How much memory this process may use: the machine's, its cgroups' (v1 and v2, every level), and the limit on locked
//! memory. The default of `--ram` derives from here; deciding how much of it to take is the caller's business.

use std::path::{Path, PathBuf};

/// What the system lets this process have. Fields are `None` where the system does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryLimits {
    /// Memory of the machine.
    pub machine_bytes: Option<u64>,
    /// Memory of the machine that can be had now without swapping.
    pub machine_available_bytes: Option<u64>,
    /// The cgroup that leaves the least room, if any has a limit.
    pub cgroup: Option<CgroupLimit>,
    /// Bytes that this process may lock; `None` if there is no limit.
    pub memlock_bytes: Option<u64>,
}

/// A limit of a cgroup that this process is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupLimit {
    /// Its directory.
    pub path: PathBuf,
    /// The limit.
    pub limit_bytes: u64,
    /// In use by all processes of the group, page cache included.
    pub used_bytes: u64,
    /// Of that, page cache that gives way when memory is wanted.
    pub reclaimable_bytes: u64,
}

impl CgroupLimit {
    /// What is left under the limit.
    #[must_use]
    pub fn available_bytes(&self) -> u64 {
        self.limit_bytes.saturating_sub(self.used_bytes.saturating_sub(self.reclaimable_bytes))
    }
}

impl MemoryLimits {
    /// What this process can still take, the machine and all cgroups heeded; `None` if the system does not say.
    #[must_use]
    pub fn available_bytes(&self) -> Option<u64> {
        let machine = self.machine_available_bytes.or(self.machine_bytes);
        let cgroup = self.cgroup.as_ref().map(CgroupLimit::available_bytes);
        machine.into_iter().chain(cgroup).min()
    }

    fn read(root: &Path) -> Self {
        let meminfo = read(root, "proc/meminfo");
        let kib = |name: &str| field(&meminfo, name).and_then(|kib| kib.checked_mul(1024));
        Self {
            machine_bytes: kib("MemTotal:"),
            machine_available_bytes: kib("MemAvailable:"),
            cgroup: tightest_cgroup(root),
            memlock_bytes: None,
        }
    }
}

/// Looks at the limits of this process's cgroups again and again, for the price of reading a few small files.
#[derive(Debug)]
pub struct LimitWatch {
    /// Those of every level, of both versions of the interface.
    files: Vec<PathBuf>,
    lowest_bytes: Option<u64>,
}

impl LimitWatch {
    /// Watches from now on.
    #[must_use]
    pub fn start() -> Self {
        Self::below(Path::new("/"))
    }

    fn below(root: &Path) -> Self {
        let mut watch = Self { files: limit_files(root), lowest_bytes: None };
        watch.lowest_bytes = watch.lowest();
        watch
    }

    /// The lowest limit, if it is lower than at the last look.
    pub fn sunk_to(&mut self) -> Option<u64> {
        let now = self.lowest();
        let before = std::mem::replace(&mut self.lowest_bytes, now);
        now.filter(|&now| before.is_none_or(|before| now < before))
    }

    fn lowest(&self) -> Option<u64> {
        let limits = self.files.iter().filter_map(|file| limit_in(file.parent()?, file.file_name()?.to_str()?));
        limits.min()
    }
}

/// Reads the limits of this process as they are now.
#[must_use]
pub fn memory_limits() -> MemoryLimits {
    let mut limits = MemoryLimits::read(Path::new("/"));
    limits.machine_bytes = limits.machine_bytes.or_else(crate::sys::physical_bytes);
    limits.memlock_bytes = memlock_bytes();
    limits
}

/// Bytes that this process may lock; `None` if there is no limit (also for a process that is exempt).
#[must_use]
pub fn memlock_bytes() -> Option<u64> {
    /// The capability that exempts from the limit.
    const CAP_IPC_LOCK: u32 = 14;
    let status = read(Path::new("/"), "proc/self/status");
    let capabilities =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    if capabilities.is_some_and(|bits| bits >> CAP_IPC_LOCK & 1 == 1) {
        return None;
    }
    #[cfg(unix)]
    return crate::sys::memlock_limit_bytes();
    #[cfg(not(unix))]
    Some(0)
}

/// What the system says of transparent huge pages: `always`, `madvise` (for those who ask, as slabs do) or `never`. None
/// if it has no such setting.
#[must_use]
pub fn huge_pages() -> Option<String> {
    huge_pages_at(Path::new("/"))
}

fn huge_pages_at(root: &Path) -> Option<String> {
    let text = read(root, "sys/kernel/mm/transparent_hugepage/enabled");
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(chosen, _)| chosen.to_owned())
}

/// Whether slabs may ask for huge pages, and those have the size that is thought of.
pub(crate) fn huge_pages_allowed() -> bool {
    let size = read(Path::new("/"), "sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
    huge_pages().is_some_and(|setting| setting != "never") && size.trim().parse() == Ok(crate::HUGE_BYTES)
}

/// Memory of this process that is resident now, if the system says.
#[must_use]
pub fn resident_bytes() -> Option<u64> {
    let statm = read(Path::new("/"), "proc/self/statm");
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(crate::sys::page_bytes() as u64)
}

/// The most memory that this process has had resident, if the system says.
#[must_use]
pub fn peak_resident_bytes() -> Option<u64> {
    #[cfg(unix)]
    return crate::sys::peak_resident_bytes();
    #[cfg(not(unix))]
    None
}

/// A file's text, empty if it cannot be read.
fn read(root: &Path, path: &str) -> String {
    std::fs::read_to_string(root.join(path)).unwrap_or_default()
}

/// The number behind a name, in a file of lines `name number …`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some(name)).then(|| words.next()?.parse().ok())?
    })
}

/// Where one version of the cgroup interface is mounted.
struct Mount {
    version: Version,
    /// The cgroup that the mount point shows.
    root: PathBuf,
    point: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Mount {
    /// Parses a line of `/proc/self/mountinfo`: `… root point options [optional …] - type source super_options`.
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (unescape(left.next()?), unescape(left.next()?));
        let mut right = right.split(' ');
        let version = match right.next()? {
            "cgroup2" => Version::Two,
            "cgroup" if right.nth(1)?.split(',').any(|option| option == "memory") => Version::One,
            _ => return None,
        };
        Some(Self { version, root, point })
    }

    /// The directories of a cgroup and of all above it that the mount shows.
    fn levels(&self, system_root: &Path, cgroup: &str) -> Vec<PathBuf> {
        let below = Path::new(cgroup).strip_prefix(&self.root).unwrap_or(Path::new(""));
        let point = system_root.join(self.point.strip_prefix("/").unwrap_or(&self.point));
        below.ancestors().map(|dir| point.join(dir)).collect()
    }
}

impl Version {
    /// The files that limit what a group may take.
    fn limit_names(self) -> &'static [&'static str] {
        match self {
            Self::One => &["memory.limit_in_bytes"],
            Self::Two => &["memory.max", "memory.high"],
        }
    }

    fn limit(self, dir: &Path) -> Option<CgroupLimit> {
        let limit = self.limit_names().iter().filter_map(|name| limit_in(dir, name)).min();
        let number = |name: &str| read(dir, name).trim().parse::<u64>().ok();
        let (used, [inactive, active]) = match self {
            Self::One => (number("memory.usage_in_bytes"), ["total_inactive_file", "total_active_file"]),
            Self::Two => (number("memory.current"), ["inactive_file", "active_file"]),
        };
        let stat = read(dir, "memory.stat");
        let stat = |name| field(&stat, name).unwrap_or(0);
        Some(CgroupLimit {
            path: dir.to_owned(),
            limit_bytes: limit?,
            used_bytes: used.unwrap_or(0),
            // Part of the active page cache is in real use; count on half of it.
            reclaimable_bytes: stat(inactive).saturating_add(stat(active) / 2),
        })
    }
}

/// A limit in bytes, if the file has a number that is one.
fn limit_in(dir: &Path, name: &str) -> Option<u64> {
    /// The first version says "unlimited" with a number near 2⁶³.
    const UNLIMITED_FROM: u64 = 1 << 62;
    read(dir, name).trim().parse::<u64>().ok().filter(|&bytes| bytes < UNLIMITED_FROM)
}

/// The directories of this process's memory cgroups, each mount's with all above it.
fn cgroups(root: &Path) -> Vec<(Version, Vec<PathBuf>)> {
    let own = read(root, "proc/self/cgroup");
    let path_of = |version: Version| {
        own.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            let of_version = match version {
                Version::One => controllers.split(',').any(|controller| controller == "memory"),
                Version::Two => controllers.is_empty(),
            };
            of_version.then_some(path)
        })
    };
    let mounts = read(root, "proc/self/mountinfo");
    let mounts = mounts.lines().filter_map(Mount::parse);
    mounts.filter_map(|mount| Some((mount.version, mount.levels(root, path_of(mount.version)?)))).collect()
}

fn tightest_cgroup(root: &Path) -> Option<CgroupLimit> {
    let groups = cgroups(root);
    let limits = groups.iter().flat_map(|(version, levels)| levels.iter().filter_map(|dir| version.limit(dir)));
    limits.min_by_key(CgroupLimit::available_bytes)
}

fn limit_files(root: &Path) -> Vec<PathBuf> {
    let files = cgroups(root).into_iter().flat_map(|(version, levels)| {
        levels.into_iter().flat_map(move |dir| version.limit_names().iter().map(move |name| dir.join(name)))
    });
    files.filter(|file| file.is_file()).collect()
}

/// Undoes the octal escapes (`\040` for a space) of mount tables.
fn unescape(text: &str) -> PathBuf {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        match after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &after[3..];
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A pretended root of a file system.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("overspill-limits-{}-{name}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            Self(root)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    const MEMINFO: &str = "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 6000 kB\n";

    #[test]
    fn the_tightest_level_of_cgroup_v2_counts_and_page_cache_gives_way() {
        let root = Root::new(
            "v2",
            &[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "0::/a b/c\n"),
                ("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cg\\040roup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"),
                ("sys/fs/cg roup/a b/memory.max", "3000000\n"),
                ("sys/fs/cg roup/a b/memory.current", "2500000\n"),
                ("sys/fs/cg roup/a b/memory.stat", "anon 1\nactive_file 200000\ninactive_file 400000\n"),
                ("sys/fs/cg roup/a b/c/memory.max", "max\n"),
                ("sys/fs/cg roup/a b/c/memory.high", "2900000\n"),
                ("sys/fs/cg roup/a b/c/memory.current", "1000000\n"),
            ],
        );
        let limits = MemoryLimits::read(&root.0);
        let cgroup = limits.cgroup.clone().unwrap();
        assert!(cgroup.path.ends_with("a b"), "{cgroup:?}");
        assert_eq!(limits.available_bytes(), Some(1_000_000));
        assert_eq!(limits.machine_bytes, Some(8_192_000));
    }

    #[test]
    fn cgroup_v1_is_found_beside_an_empty_v2_and_under_a_mount_of_a_part() {
        let mountinfo = "30 23 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
             31 23 0:27 /docker/x /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
             32 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let root = Root::new(
            "v1",
            &[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "4:memory:/docker/x/y\n1:cpu:/\n0::/\n"),
                ("proc/self/mountinfo", mountinfo),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
                ("sys/fs/cgroup/memory/y/memory.limit_in_bytes", "5000000\n"),
                ("sys/fs/cgroup/memory/y/memory.usage_in_bytes", "4500000\n"),
                ("sys/fs/cgroup/memory/y/memory.stat", "total_inactive_file 1000000\ntotal_active_file 0\n"),
            ],
        );
        assert_eq!(MemoryLimits::read(&root.0).available_bytes(), Some(1_500_000));
    }

    #[test]
    fn without_cgroups_the_machine_counts_and_nonsense_is_passed_over() {
        let files =
            [("proc/meminfo", MEMINFO), ("proc/self/cgroup", "x\n0:\n"), ("proc/self/mountinfo", "a - b\n\n- -\n")];
        let root = Root::new("none", &files);
        let limits = MemoryLimits::read(&root.0);
        assert_eq!((limits.available_bytes(), limits.cgroup), (Some(6_144_000), None));
        assert_eq!(MemoryLimits::read(&root.0.join("nowhere")).available_bytes(), None);
    }

    #[test]
    fn a_limit_that_sinks_is_noticed_once_at_any_level() {
        let mounts = "31 23 0:27 / /cg rw - cgroup cgroup rw,memory\n32 23 0:28 / /cg2 rw - cgroup2 cgroup2 rw\n";
        let root = Root::new(
            "watch",
            &[
                ("proc/self/cgroup", "4:memory:/a/b\n0::/c\n"),
                ("proc/self/mountinfo", mounts),
                ("cg/memory.limit_in_bytes", "9223372036854771712\n"),
                ("cg/a/memory.limit_in_bytes", "7000\n"),
                ("cg/a/b/memory.limit_in_bytes", "9000\n"),
                ("cg2/c/memory.max", "max\n"),
            ],
        );
        let mut watch = LimitWatch::below(&root.0);
        let mut after = |file: &str, text: &str| {
            std::fs::write(root.0.join(file), text).unwrap();
            watch.sunk_to()
        };
        assert_eq!(after("cg/a/b/memory.limit_in_bytes", "8000\n"), None, "another is lower");
        assert_eq!(after("cg/a/memory.limit_in_bytes", "6000\n"), Some(6000));
        assert_eq!(after("cg/a/memory.limit_in_bytes", "6000\n"), None);
        assert_eq!(after("cg2/c/memory.max", "100\n"), Some(100));
        assert_eq!(after("cg2/c/memory.max", "max\n"), None, "it has risen");
        assert_eq!(after("cg/a/b/memory.limit_in_bytes", "5000\n"), Some(5000));
        assert_eq!(LimitWatch::below(&root.0.join("nowhere")).sunk_to(), None);
    }

    #[test]
    fn this_process_has_memory() {
        let limits = memory_limits();
        assert!(limits.machine_bytes.is_none_or(|bytes| bytes > 1 << 20));
        #[cfg(target_os = "linux")]
        {
            assert!(limits.available_bytes().unwrap() > 0);
            assert!(resident_bytes().unwrap() > 1 << 16);
            assert!(peak_resident_bytes().unwrap() > 1 << 16);
        }
    }

    #[test]
    fn the_setting_of_huge_pages_is_read() {
        const PATH: &str = "sys/kernel/mm/transparent_hugepage/enabled";
        let root = Root::new("huge", &[(PATH, "always [madvise] never\n")]);
        assert_eq!(huge_pages_at(&root.0).as_deref(), Some("madvise"));
        for strange in ["", "always", "[", "]always["] {
            std::fs::write(root.0.join(PATH), strange).unwrap();
            assert_eq!(huge_pages_at(&root.0), None, "{strange}");
        }
    }
}
