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

    /// The limits of a cgroup and of all above it that the mount shows.
    fn limits(&self, system_root: &Path, cgroup: &str) -> Vec<CgroupLimit> {
        let below = Path::new(cgroup).strip_prefix(&self.root).unwrap_or(Path::new(""));
        let point = system_root.join(self.point.strip_prefix("/").unwrap_or(&self.point));
        below.ancestors().filter_map(|dir| self.version.limit(&point.join(dir))).collect()
    }
}

impl Version {
    fn limit(self, dir: &Path) -> Option<CgroupLimit> {
        /// The first version says "unlimited" with a number near 2⁶³.
        const UNLIMITED_FROM: u64 = 1 << 62;
        let number = |name: &str| read(dir, name).trim().parse::<u64>().ok();
        let (limit, used, [inactive, active]) = match self {
            Self::One => {
                let limit = number("memory.limit_in_bytes").filter(|&bytes| bytes < UNLIMITED_FROM);
                (limit, number("memory.usage_in_bytes"), ["total_inactive_file", "total_active_file"])
            }
            Self::Two => {
                let limit = number("memory.max").into_iter().chain(number("memory.high")).min();
                (limit, number("memory.current"), ["inactive_file", "active_file"])
            }
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

fn tightest_cgroup(root: &Path) -> Option<CgroupLimit> {
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
    let limits = mounts.lines().filter_map(Mount::parse).filter_map(|mount| {
        let limits = mount.limits(root, path_of(mount.version)?);
        limits.into_iter().min_by_key(CgroupLimit::available_bytes)
    });
    limits.min_by_key(CgroupLimit::available_bytes)
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
}
