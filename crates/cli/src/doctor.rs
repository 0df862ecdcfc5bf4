//! `overspill doctor`: what this machine offers and how fast each wire is, measured now.

use crate::args::DoctorArgs;
use crate::disk::{self, DiskReport};
use crate::errors::{Kind, Outcome, stop};
use crate::machine::{self, Adapter, RamSpeed};
use crate::report::{self, Align, Table};
use crate::sizes::human_bytes;
use crate::{interrupt, progress};
use serde::Serialize;
use std::fmt::Write as _;
use std::time::Duration;

#[derive(Serialize)]
struct Report {
    version: &'static str,
    system: System,
    memory: Memory,
    adapters: Vec<AdapterReport>,
    disk: DiskReport,
    /// Absent with `--no-bench`, or if there was no memory to measure with.
    ram: Option<RamSpeed>,
    /// What could be better here, and how.
    advice: Vec<String>,
}

#[derive(Serialize)]
struct System {
    os: &'static str,
    arch: &'static str,
    kernel: Option<String>,
    cores: usize,
    cpu_features: Vec<&'static str>,
}

#[derive(Serialize)]
struct Memory {
    machine_bytes: Option<u64>,
    available_bytes: Option<u64>,
    cgroup: Option<Cgroup>,
    /// Absent if there is no limit.
    memlock_bytes: Option<u64>,
    /// `always`, `madvise` or `never`; absent if the system has no such setting.
    huge_pages: Option<String>,
}

#[derive(Serialize)]
struct Cgroup {
    path: String,
    limit_bytes: u64,
    used_bytes: u64,
    available_bytes: u64,
}

#[derive(Serialize)]
struct AdapterReport {
    #[serde(flatten)]
    adapter: Adapter,
    uploads: Vec<UploadSpeed>,
    /// Why there is no measurement.
    error: Option<String>,
}

#[derive(Serialize)]
struct UploadSpeed {
    path: &'static str,
    bytes_per_s: f64,
}

/// How long RAM is measured, for reading and for copying.
const RAM_TIME: Duration = Duration::from_millis(500);

/// Looks, measures, and prints.
///
/// # Errors
/// A path that is not there, or Ctrl-C. What cannot be measured is reported, and is no error.
pub fn doctor(args: &DoctorArgs) -> Outcome {
    let target = disk::Target::of(&args.path)?;
    interrupt::install();
    let spinner = progress::spinner("looking for adapters");
    let bench = !args.no_bench;
    let mut adapters = Vec::new();
    for adapter in machine::adapters() {
        spinner.set_message(format!("measuring uploads to {}", adapter.name));
        check_interrupt()?;
        adapters.push(adapter_report(adapter, bench));
    }
    spinner.set_message("measuring RAM");
    let ram = if bench { machine::ram_speed(machine::cores(), RAM_TIME) } else { None };
    check_interrupt()?;
    spinner.set_message(format!("measuring the disk of {}", args.path.display()));
    let disk = disk::report(target, bench)?;
    spinner.finish_and_clear();
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        system: System::now(),
        memory: Memory::now(),
        adapters,
        disk,
        ram,
        advice: Vec::new(),
    };
    report.advice = report.advise();
    if args.json {
        report::print_json(&report)
    } else {
        report::print(&report.text(report::coloured(&std::io::stdout())))
    }
}

/// Ends the command if Ctrl-C was pressed.
pub fn check_interrupt() -> Outcome {
    if interrupt::asked() { Err(stop(Kind::Interrupted, "interrupted")) } else { Ok(()) }
}

#[cfg(feature = "gpu")]
fn adapter_report(adapter: Adapter, bench: bool) -> AdapterReport {
    use overspill::device::{Choice, GpuContext, probe_uploads};
    const BLOCK_BYTES: u64 = 2 << 20;
    const TOTAL_BYTES: u64 = 256 << 20;
    if !bench {
        return AdapterReport { adapter, uploads: Vec::new(), error: None };
    }
    let choice = Choice { name: Some(&adapter.name), ..Choice::default() };
    let rates = GpuContext::choose(choice).and_then(|context| probe_uploads(&context, BLOCK_BYTES, TOTAL_BYTES));
    let (rates, error) = match rates {
        Ok(rates) => (rates, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    // What `overspill top` holds a run's uploads against. Failing to keep it costs no more than that.
    if let (Some(memory), Some(ring)) =
        (overspill::remember::Memory::of_user(), rates.iter().find(|rate| rate.path == "ring"))
    {
        let shape = overspill::probe::Shape { request_bytes: BLOCK_BYTES as usize, depth: 1 };
        let found = overspill::remember::Remembered::now(shape, ring.bytes as f64 / ring.seconds.max(1e-9));
        let _ = memory.keep(&crate::status::bus_name(&adapter.name), found);
    }
    let speed = |rate: &overspill::device::UploadRate| UploadSpeed {
        path: rate.path,
        bytes_per_s: rate.bytes as f64 / rate.seconds.max(1e-9),
    };
    AdapterReport { adapter, uploads: rates.iter().map(speed).collect(), error }
}

#[cfg(not(feature = "gpu"))]
fn adapter_report(adapter: Adapter, _bench: bool) -> AdapterReport {
    AdapterReport { adapter, uploads: Vec::new(), error: Some("this build has no GPU support".to_owned()) }
}

impl System {
    fn now() -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok();
        Self {
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
            kernel: kernel.map(|text| text.trim().to_owned()),
            cores: machine::cores(),
            cpu_features: cpu_features(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    let features = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512dq", is_x86_feature_detected!("avx512dq")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    features.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

#[cfg(target_arch = "aarch64")]
fn cpu_features() -> Vec<&'static str> {
    use std::arch::is_aarch64_feature_detected;
    let features = [
        ("neon", is_aarch64_feature_detected!("neon")),
        ("dotprod", is_aarch64_feature_detected!("dotprod")),
        ("i8mm", is_aarch64_feature_detected!("i8mm")),
    ];
    features.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}

impl Memory {
    fn now() -> Self {
        let limits = overspill::limits::memory_limits();
        Self {
            machine_bytes: limits.machine_bytes,
            available_bytes: limits.available_bytes(),
            cgroup: limits.cgroup.as_ref().map(|group| Cgroup {
                path: group.path.display().to_string(),
                limit_bytes: group.limit_bytes,
                used_bytes: group.used_bytes,
                available_bytes: group.available_bytes(),
            }),
            memlock_bytes: limits.memlock_bytes,
            huge_pages: overspill::limits::huge_pages(),
        }
    }
}

/// Registered I/O buffers want at least this much locked memory.
const MEMLOCK_BYTES_GOOD: u64 = 64 << 20;

impl Report {
    fn advise(&self) -> Vec<String> {
        let mut advice = Vec::new();
        if cfg!(debug_assertions) && self.ram.is_some() {
            advice.push("This is a debug build, whose figure for reading RAM means little.".to_owned());
        }
        if self.adapters.iter().all(|a| a.adapter.software) {
            advice.push("No GPU: the CPU computes. If there is one, install its Vulkan driver.".to_owned());
        }
        for reader in self.disk.readers.iter().filter(|reader| reader.name == "uring") {
            if let Some(error) = &reader.error {
                advice.push(format!("io_uring, the fastest way to read, does not work here: {error}"));
            }
        }
        if let Some(refusal) = &self.disk.direct_refusal {
            advice.push(format!("Reads go through the page cache ({refusal}): put models on a disk with direct I/O."));
        }
        if let Some(bytes) = self.memory.memlock_bytes.filter(|&bytes| bytes < MEMLOCK_BYTES_GOOD) {
            advice.push(format!(
                "Only {} may be locked: raise it (ulimit -l, LimitMEMLOCK=) so that I/O buffers can be registered.",
                human_bytes(bytes)
            ));
        }
        if self.memory.huge_pages.as_deref() == Some("never") {
            advice.push(
                "Huge pages are off, without which RAM and disk are read more slowly: \
                 echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)."
                    .to_owned(),
            );
        }
        advice
    }

    fn text(&self, coloured: bool) -> String {
        let unknown = || "unknown".to_owned();
        let size = |bytes: Option<u64>| bytes.map_or_else(unknown, human_bytes);
        let System { os, arch, cores, .. } = self.system;
        let kernel = self.system.kernel.as_deref().unwrap_or("");
        let mut facts = vec![
            ("overspill", self.version.to_owned()),
            ("system", format!("{os} {kernel}, {arch}, {cores} cores ({})", self.system.cpu_features.join(" "))),
            (
                "memory",
                format!("{}, of it free {}", size(self.memory.machine_bytes), size(self.memory.available_bytes)),
            ),
        ];
        facts.push(match &self.memory.cgroup {
            None => ("cgroup", "no memory limit".to_owned()),
            Some(group) => (
                "cgroup",
                format!(
                    "limit {}, of it free {} ({})",
                    human_bytes(group.limit_bytes),
                    human_bytes(group.available_bytes),
                    group.path
                ),
            ),
        });
        facts.push(("memlock", self.memory.memlock_bytes.map_or_else(|| "no limit".to_owned(), human_bytes)));
        facts.push(("huge pages", self.memory.huge_pages.clone().unwrap_or_else(unknown)));
        if let Some(ram) = self.ram {
            facts.push((
                "RAM",
                format!(
                    "read {}, copy {} ({} threads)",
                    rate(ram.read_bytes_per_s),
                    rate(ram.copy_bytes_per_s),
                    ram.threads
                ),
            ));
        }
        let mut text = report::facts(&facts);
        let _ = write!(text, "\nAdapters\n{}", self.adapter_lines(coloured));
        let _ = write!(text, "\nDisk ({})\n{}", self.disk.what, self.disk_lines(coloured));
        if !self.advice.is_empty() {
            text.push_str("\nAdvice\n");
            for line in &self.advice {
                let _ = writeln!(text, "  {line}");
            }
        }
        text
    }

    fn adapter_lines(&self, coloured: bool) -> String {
        if self.adapters.is_empty() {
            return "  none\n".to_owned();
        }
        let mut table = Table::new(&[
            ("name", Align::Left),
            ("kind", Align::Left),
            ("API", Align::Left),
            ("driver", Align::Left),
            ("largest buffer", Align::Right),
            ("subgroups", Align::Left),
            ("upload", Align::Left),
        ]);
        for AdapterReport { adapter, uploads, error } in &self.adapters {
            let uploads: Vec<_> = uploads.iter().map(|u| format!("{} {}", u.path, rate(u.bytes_per_s))).collect();
            let kind = if adapter.software { "software (only when named)" } else { adapter.kind };
            table.row([
                adapter.name.clone(),
                kind.to_owned(),
                adapter.backend.clone(),
                adapter.driver.clone(),
                human_bytes(adapter.buffer_bytes_max),
                if adapter.subgroups { "yes" } else { "no" }.to_owned(),
                error.clone().unwrap_or_else(|| uploads.join(", ")),
            ]);
        }
        table.render(coloured)
    }

    fn disk_lines(&self, coloured: bool) -> String {
        let mut table = Table::new(&[
            ("reader", Align::Left),
            ("direct I/O", Align::Left),
            ("bandwidth", Align::Right),
            ("in flight", Align::Left),
            ("mean latency", Align::Right),
            ("", Align::Left),
        ]);
        for reader in &self.disk.readers {
            let in_flight =
                reader.request_bytes.map(|bytes| format!("{} x {}", reader.depth.unwrap_or(0), human_bytes(bytes)));
            table.row([
                reader.name.to_owned(),
                reader.direct.map_or("", |direct| if direct { "yes" } else { "no" }).to_owned(),
                reader.bytes_per_s.map(rate).unwrap_or_default(),
                in_flight.unwrap_or_default(),
                reader.latency_s.map(|s| format!("{:.2} ms", s * 1e3)).unwrap_or_default(),
                reader.error.clone().unwrap_or_default(),
            ]);
        }
        let mut text = if table.is_empty() { String::new() } else { table.render(coloured) };
        if let Some(error) = &self.disk.error {
            let _ = writeln!(text, "  not measured: {error}");
        }
        text
    }
}

/// A bandwidth for people, in the unit that disks and memory are sold in.
fn rate(bytes_per_s: f64) -> String {
    format!("{:.2} GB/s", bytes_per_s / 1e9)
}
