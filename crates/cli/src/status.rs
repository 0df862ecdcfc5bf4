//! The status of a run as `overspill top` reads it, and where such files are: in a directory that only the user can
//! enter, one file a process.

use crate::layers;
use overspill::remember::{self, Memory};
use overspill::{Catalog, Engine, Stats};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A run at a moment. Counters run from the model's opening.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The process.
    pub pid: u32,
    /// The model's path as it was given.
    pub model: String,
    /// When this was written, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// Since the model was opened.
    pub elapsed_ms: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Nanoseconds that callers waited for blocks.
    pub stall_ns: u64,
    /// Policy and reader in force.
    pub evict: String,
    /// How the disk is read.
    pub io: String,
    /// GPUs first.
    pub tiers: Vec<TierStatus>,
    /// The disk, and the bus if there is a GPU.
    pub wires: Vec<WireStatus>,
    /// The model's parts, in its order.
    pub layers: Vec<LayerStatus>,
}

/// A tier at a moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TierStatus {
    /// `gpu0`, `host`.
    pub label: String,
    /// What it may hold.
    pub budget_bytes: u64,
    /// What blocks take.
    pub used_bytes: u64,
    /// What cache and scratch take.
    pub reserved_bytes: u64,
    /// Blocks that were there.
    pub hits: u64,
    /// Blocks that were waited for.
    pub misses: u64,
    /// Blocks that went.
    pub evictions: u64,
}

/// A wire at a moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WireStatus {
    /// `disk` or `bus`.
    pub name: String,
    /// What crossed it.
    pub bytes: u64,
    /// For how long it had something to carry.
    pub busy_ns: u64,
    /// Bytes per second that `overspill doctor` measured of it, if it did lately.
    #[serde(default)]
    pub ceiling_bytes_per_s: Option<f64>,
}

/// Some blocks of a model that belong together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerStatus {
    /// The layer's number, or what it is.
    pub name: String,
    /// How many blocks it has.
    pub blocks: u32,
    /// How many of them are in each tier.
    pub resident: Vec<u32>,
}

/// What of a run's status stays as it is.
#[derive(Clone, Debug)]
pub struct Fixed {
    groups: Groups,
    disk_bytes_per_s: Option<f64>,
    bus_bytes_per_s: Option<f64>,
}

impl Fixed {
    /// Of an engine that is open.
    pub fn of(engine: &Engine) -> Self {
        let memory = Memory::of_user();
        #[cfg(feature = "gpu")]
        let bus = engine.gpu().map(|gpu| bus_name(&gpu.info.name));
        #[cfg(not(feature = "gpu"))]
        let bus: Option<String> = None;
        Self {
            groups: Groups::of(engine.catalog()),
            disk_bytes_per_s: memory.as_ref().and_then(|memory| disks_bytes_per_s(engine.catalog(), memory)),
            bus_bytes_per_s: memory.zip(bus).and_then(|(memory, bus)| Some(memory.recall(&bus)?.bytes_per_s)),
        }
    }
}

/// What an adapter's bus is remembered by, beside the disks.
#[cfg_attr(not(feature = "gpu"), expect(dead_code, reason = "of a GPU"))]
pub fn bus_name(adapter: &str) -> String {
    let clean: String = adapter.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("bus to {clean}")
}

/// What the disks under a model bring together, if all of them are known.
fn disks_bytes_per_s(catalog: &Catalog, memory: &Memory) -> Option<f64> {
    let mut disks = BTreeSet::new();
    for (path, _) in catalog.files() {
        disks.insert(remember::disk_name(path)?);
    }
    let known: Option<Vec<f64>> = disks.iter().map(|disk| Some(memory.recall(disk)?.bytes_per_s)).collect();
    known.filter(|known| !known.is_empty()).map(|known| known.iter().sum())
}

/// Which blocks belong together.
#[derive(Clone, Debug)]
pub struct Groups {
    names: Vec<String>,
    /// By block.
    group: Vec<u32>,
}

impl Groups {
    /// By layer; what belongs to none comes last.
    pub fn of(catalog: &Catalog) -> Self {
        let layer = |block: u32| {
            let part = catalog.parts(overspill::BlockId(block)).first();
            part.and_then(|part| layers::layer_of(&catalog.tensor(part.tensor).name))
        };
        let of_blocks: Vec<Option<u32>> = (0..catalog.blocks().len() as u32).map(layer).collect();
        let mut known: Vec<u32> = of_blocks.iter().flatten().copied().collect();
        known.sort_unstable();
        known.dedup();
        let mut names: Vec<String> = known.iter().map(u32::to_string).collect();
        names.push("other".to_owned());
        let index = |layer: &Option<u32>| {
            let found = layer.and_then(|layer| known.binary_search(&layer).ok());
            found.unwrap_or(known.len()) as u32
        };
        Self { names, group: of_blocks.iter().map(index).collect() }
    }

    /// How much of each is where.
    pub fn residency(&self, tiers: &[Vec<bool>]) -> Vec<LayerStatus> {
        let mut layers: Vec<LayerStatus> = self
            .names
            .iter()
            .map(|name| LayerStatus { name: name.clone(), blocks: 0, resident: vec![0; tiers.len()] })
            .collect();
        for (block, &group) in self.group.iter().enumerate() {
            let Some(layer) = layers.get_mut(group as usize) else { continue };
            layer.blocks += 1;
            for (count, tier) in layer.resident.iter_mut().zip(tiers) {
                *count += u32::from(tier.get(block).copied().unwrap_or(false));
            }
        }
        layers.retain(|layer| layer.blocks > 0);
        layers
    }
}

impl Status {
    /// An engine's status now.
    pub fn new(model: &str, engine: &Engine, stats: &Stats, fixed: &Fixed, tokens: u64, elapsed: Duration) -> Self {
        let tier = |tier: &overspill::TierFigures| TierStatus {
            label: tier.label.to_owned(),
            budget_bytes: tier.budget_bytes,
            used_bytes: tier.blocks.used_bytes,
            reserved_bytes: tier.reserved_bytes,
            hits: tier.hits,
            misses: tier.misses,
            evictions: tier.blocks.evictions,
        };
        let wire = |name: &str, bytes, busy_ns, ceiling_bytes_per_s| WireStatus {
            name: name.to_owned(),
            bytes,
            busy_ns,
            ceiling_bytes_per_s,
        };
        let mut wires = vec![wire("disk", stats.disk.read_bytes, stats.disk.busy_ns, fixed.disk_bytes_per_s)];
        if stats.tiers.len() > 1 {
            wires.push(wire("bus", stats.bus.uploaded_bytes, stats.bus.busy_ns, fixed.bus_bytes_per_s));
        }
        let residency: Vec<Vec<bool>> =
            (0..stats.tiers.len() as u32).map(|tier| engine.residency(overspill::TierId(tier))).collect();
        Self {
            pid: std::process::id(),
            model: model.to_owned(),
            at_unix_ms: unix_ms(),
            elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            tokens,
            stall_ns: stats.stall_ns,
            evict: stats.decision.evict.to_owned(),
            io: stats.io.to_owned(),
            tiers: stats.tiers.iter().map(tier).collect(),
            wires,
            layers: fixed.groups.residency(&residency),
        }
    }
}

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A status is not larger than this; what is, is none.
const STATUS_BYTES_MAX: u64 = 16 << 20;

/// Reads a status.
///
/// # Errors
/// The file is not there, cannot be read, or is no status.
pub fn read(path: &Path) -> io::Result<Status> {
    use io::Read as _;
    let mut text = Vec::new();
    fs::File::open(path)?.take(STATUS_BYTES_MAX).read_to_end(&mut text)?;
    serde_json::from_slice(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Where this process may write its status; `None` if there is no place that only the user can enter.
pub fn own_path() -> Option<PathBuf> {
    let directory = directory()?;
    make_private(&directory).ok()?;
    sweep(&directory);
    Some(directory.join(format!("{}.json", std::process::id())))
}

/// The directory of status files.
pub fn directory() -> Option<PathBuf> {
    let runtime =
        std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute() && dir.is_dir());
    match runtime {
        Some(runtime) => Some(runtime.join("overspill")),
        #[cfg(unix)]
        None => Some(std::env::temp_dir().join(format!("overspill-{}", rustix::process::getuid().as_raw()))),
        // Elsewhere the temporary directory is the user's own.
        #[cfg(not(unix))]
        None => Some(std::env::temp_dir().join("overspill")),
    }
}

/// Makes a directory that only the user can enter, or finds that it is one. A link or another's directory will not do:
/// anybody can put one into a shared temporary directory.
#[cfg(unix)]
fn make_private(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(directory)?;
    let private = found.is_dir() && found.uid() == rustix::process::getuid().as_raw() && found.mode() & 0o077 == 0;
    if private { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

#[cfg(not(unix))]
fn make_private(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)
}

/// A status that was not written anew for so long is a dead process's.
const STALE_TIME: Duration = Duration::from_secs(30);

/// Takes away what processes that were killed have left.
fn sweep(directory: &Path) {
    for path in files(directory) {
        let modified = fs::metadata(&path).and_then(|found| found.modified());
        if modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STALE_TIME)) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether there is such a process, as far as the system says.
pub fn alive(pid: u32) -> bool {
    #[cfg(unix)]
    {
        let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
        // One that belongs to somebody else is there, too.
        pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
    }
    #[cfg(not(unix))]
    {
        let _ = pid;
        true
    }
}

/// All status files of a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json" || extension == "tmp"));
    paths
}

/// The statuses of all runs, the latest first.
pub fn all() -> Vec<(PathBuf, Status)> {
    let paths = directory().map(|directory| files(&directory)).unwrap_or_default();
    let mut found: Vec<(PathBuf, Status)> = paths
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .filter_map(|path| read(&path).ok().map(|status| (path, status)))
        .filter(|(_, status)| unix_ms().saturating_sub(status.at_unix_ms) < STALE_TIME.as_millis() as u64)
        .filter(|(_, status)| alive(status.pid))
        .collect();
    found.sort_by_key(|(_, status)| std::cmp::Reverse(status.at_unix_ms - status.elapsed_ms.min(status.at_unix_ms)));
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn blocks_are_counted_by_layer_and_tier() {
        let groups = Groups { names: vec!["0".into(), "1".into(), "other".into()], group: vec![0, 0, 1, 2] };
        let layers = groups.residency(&[vec![true, false, true, false], vec![true; 4]]);
        let counts: Vec<_> = layers.iter().map(|l| (l.name.as_str(), l.blocks, l.resident.clone())).collect();
        assert_eq!(counts, [("0", 2, vec![1, 2]), ("1", 1, vec![1, 1]), ("other", 1, vec![0, 1])]);
    }

    #[test]
    fn what_was_measured_of_a_model_s_disk_is_its_ceiling() {
        let path = std::env::temp_dir().join(format!("overspill-cli-ceiling-{}", std::process::id()));
        let memory = Memory::at(path.with_extension("tsv"));
        fs::write(&path, [0; 4096]).unwrap();
        let mut builder = overspill::CatalogBuilder::new();
        builder.file(&path, 4096);
        let catalog = builder.build().unwrap();
        assert_eq!(disks_bytes_per_s(&catalog, &memory), None);
        // Some file systems lie on no disk.
        if let Some(disk) = remember::disk_name(&path) {
            let shape = overspill::probe::Shape { request_bytes: 4096, depth: 1 };
            memory.keep(&disk, remember::Remembered::now(shape, 5e8)).unwrap();
            assert_eq!(disks_bytes_per_s(&catalog, &memory), Some(5e8));
            fs::remove_file(path.with_extension("tsv")).unwrap();
        }
        fs::remove_file(path).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn the_living_are_told_from_the_dead() {
        assert!(alive(std::process::id()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(!alive(child.id()));
        assert!(!alive(0) && !alive(u32::MAX), "no process has these numbers");
    }

    #[cfg(unix)]
    #[test]
    fn a_directory_that_others_can_enter_is_not_taken() {
        use std::os::unix::fs::PermissionsExt as _;
        let path = std::env::temp_dir().join(format!("overspill-cli-private-{}", std::process::id()));
        make_private(&path).unwrap();
        make_private(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(make_private(&path).is_err());
        fs::remove_dir(&path).unwrap();
        std::os::unix::fs::symlink(std::env::temp_dir(), &path).unwrap();
        assert!(make_private(&path).is_err(), "a link leads anywhere");
        fs::remove_file(&path).unwrap();
    }
}
