//! Hardware profiles: a machine as a text file of TOML describes it, checked key by key.
//!
//! A profile holds what a planner needs and a person can look up: memories and their bandwidths, wires, disks, and what
//! they cost. A handful is [shipped](SHIPPED); any of them is a start for one's own. Bandwidths are what programs reach,
//! not what data sheets promise: a profile that flatters gives plans that disappoint.
//!
//! What it does not do: measure anything, or know a model.

mod parse;

use std::fmt;

/// 10⁹, the giga of bandwidths.
const GIGA: f64 = 1e9;

/// A GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Bytes of its memory; 0 where it shares the host's.
    pub memory_bytes: u64,
    /// Bytes per second that it reads its memory with.
    pub memory_bytes_per_s: u64,
    /// Multiplications and additions per second that it reaches on matrices.
    pub flops_per_s: u64,
    /// Bytes per second of the link from host memory; 0 where memory is shared.
    pub link_bytes_per_s: u64,
    /// Nanoseconds from a request to its first byte on that link.
    pub link_latency_ns: u64,
    /// Nanoseconds that a layer costs whatever it computes: launches of kernels.
    pub layer_ns: u64,
}

/// The host: its memory, and its processor.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// Its processor's name.
    pub name: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Bytes per second that all cores together read it with.
    pub memory_bytes_per_s: u64,
    /// Multiplications and additions per second that all cores reach together on matrices.
    pub flops_per_s: u64,
    /// The same where each matrix meets 8 tokens, as the experts of a mixture do while a prompt is taken in.
    pub few_flops_per_s: u64,
    /// The same of attention over the past, which is computed in single precision whatever weights are stored in.
    pub attention_flops_per_s: u64,
    /// Nanoseconds that a matrix product costs beside reading its weights: activations are prepared, threads are given
    /// their parts and waited for. 0 where [`Self::layer_ns`] has that of a dense layer in it.
    pub product_ns: u64,
    /// Nanoseconds that a layer costs whatever it computes.
    pub layer_ns: u64,
}

/// A disk.
#[derive(Clone, Debug, PartialEq)]
pub struct Disk {
    /// Its name.
    pub name: String,
    /// Bytes that it holds.
    pub capacity_bytes: u64,
    /// Bytes per second of large direct reads with a deep queue.
    pub bytes_per_s: u64,
    /// Nanoseconds from a request to its first byte.
    pub latency_ns: u64,
    /// Requests under way at once.
    pub depth: u32,
    /// How long it saves up what it could have read while it is idle, in nanoseconds: volumes and control groups whose
    /// speed is bounded do so. 0: not at all.
    pub burst_ns: u64,
}

/// What things cost, all in the same currency.
#[derive(Clone, Debug, PartialEq)]
pub struct Price {
    /// The currency.
    pub currency: String,
    /// Of the machine, for an hour: its rent, or what it loses in worth and draws in power.
    pub per_hour: f64,
    /// Of a GB more of GPU memory.
    pub per_gb_vram: Option<f64>,
    /// Of a GB more of host memory.
    pub per_gb_ram: Option<f64>,
    /// Of one GB/s more of disk bandwidth.
    pub per_gb_per_s_disk: Option<f64>,
}

/// A machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Hardware {
    /// Its name.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    /// Whether GPU and host share one memory.
    pub unified_memory: bool,
    /// Its GPUs; may be none.
    pub gpus: Vec<Gpu>,
    /// Its host.
    pub host: Host,
    /// Its disks, at least one. A model lies on all of them in equal parts (block by block).
    pub disks: Vec<Disk>,
    /// What it costs; `None` if nobody said.
    pub price: Option<Price>,
}

/// A profile that makes no sense: which file, which key, why, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HardwareError {
    /// The file, as the caller named it.
    pub file: String,
    /// The key, as in `gpu[0].memory_gib`; empty if the text is no TOML at all.
    pub key: String,
    /// What is wrong.
    pub cause: String,
    /// What to do.
    pub cure: String,
}

impl fmt::Display for HardwareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, key, cause, cure } = self;
        if key.is_empty() { write!(f, "{file}: {cause}; {cure}") } else { write!(f, "{file}: '{key}' {cause}; {cure}") }
    }
}

impl std::error::Error for HardwareError {}

/// The profiles that come with the program: name and text.
pub const SHIPPED: &[(&str, &str)] = &[
    ("laptop", include_str!("../profiles/laptop.toml")),
    ("desktop-24gb", include_str!("../profiles/desktop-24gb.toml")),
    ("two-cards", include_str!("../profiles/two-cards.toml")),
    ("unified", include_str!("../profiles/unified.toml")),
    ("workstation", include_str!("../profiles/workstation.toml")),
    ("cloud-t4", include_str!("../profiles/cloud-t4.toml")),
    ("cloud-l4", include_str!("../profiles/cloud-l4.toml")),
    ("cloud-a100", include_str!("../profiles/cloud-a100.toml")),
    ("cloud-h100", include_str!("../profiles/cloud-h100.toml")),
];

impl Hardware {
    /// Reads a profile. `file` names it in errors.
    ///
    /// # Errors
    /// [`HardwareError`] for text that is no TOML, a key that is unknown or missing, and a value that can't be.
    pub fn parse(file: &str, text: &str) -> Result<Self, HardwareError> {
        parse::hardware(file, text)
    }

    /// A shipped profile; `None` for a name that is not in [`SHIPPED`].
    ///
    /// # Errors
    /// None that the tests of this crate let pass.
    pub fn shipped(name: &str) -> Option<Result<Self, HardwareError>> {
        SHIPPED.iter().find(|(known, _)| *known == name).map(|(name, text)| Self::parse(name, text))
    }

    /// Bytes of all GPU memories.
    #[must_use]
    pub fn vram_bytes(&self) -> u64 {
        self.gpus.iter().map(|gpu| gpu.memory_bytes).fold(0, u64::saturating_add)
    }

    /// Bytes per second of all disks.
    #[must_use]
    pub fn disk_bytes_per_s(&self) -> u64 {
        self.disks.iter().map(|disk| disk.bytes_per_s).fold(0, u64::saturating_add)
    }

    /// The same machine with so many bytes per second more of disk, each disk faster by the same factor.
    #[must_use]
    pub fn with_faster_disks(&self, more_bytes_per_s: u64) -> Self {
        let mut faster = self.clone();
        let factor = 1.0 + more_bytes_per_s as f64 / self.disk_bytes_per_s().max(1) as f64;
        for disk in &mut faster.disks {
            disk.bytes_per_s = (disk.bytes_per_s as f64 * factor) as u64;
        }
        faster
    }
}

impl Price {
    /// What a million tokens cost at so many tokens per second.
    #[must_use]
    pub fn per_million_tokens(&self, tokens_per_s: f64) -> f64 {
        self.per_hour / 3600.0 / tokens_per_s.max(f64::MIN_POSITIVE) * 1e6
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn every_shipped_profile_is_read_and_names_itself() {
        for (name, text) in SHIPPED {
            let hardware = Hardware::shipped(name).unwrap().unwrap();
            assert_eq!(hardware.name, *name);
            assert!(text.contains("Sources"), "{name} says where its figures are from");
            assert!(hardware.price.is_some(), "{name}");
            assert_eq!(hardware.unified_memory, hardware.vram_bytes() == 0 && !hardware.gpus.is_empty(), "{name}");
        }
        assert!(Hardware::shipped("abacus").is_none());
    }

    const SMALL: &str = r#"
name = "small"
[host]
memory_gib = 16
memory_gb_per_s = 40.5
tflops = 0.5
[[disk]]
gb_per_s = 3
"#;

    #[test]
    fn what_is_left_out_has_a_default() {
        let hardware = Hardware::parse("small.toml", SMALL).unwrap();
        assert_eq!(hardware.host.memory_bytes, 16 << 30);
        assert_eq!(hardware.host.memory_bytes_per_s, 40_500_000_000);
        assert_eq!((hardware.disks[0].bytes_per_s, hardware.disks[0].depth), (3_000_000_000, 32));
        assert_eq!((hardware.gpus.len(), hardware.unified_memory, hardware.price), (0, false, None));
        let host = &hardware.host;
        assert_eq!((host.attention_flops_per_s, host.product_ns), (host.flops_per_s, 0));
        assert_eq!(host.few_flops_per_s, host.flops_per_s);
        let given =
            SMALL.replace("tflops = 0.5", "tflops = 0.5\nfew_tflops = 0.2\nattention_tflops = 0.02\nproduct_us = 7.5");
        let host = Hardware::parse("small.toml", &given).unwrap().host;
        assert_eq!((host.attention_flops_per_s, host.product_ns), (20_000_000_000, 7500));
        assert_eq!(host.few_flops_per_s, 200_000_000_000);
    }

    #[test]
    fn nonsense_is_refused_with_file_key_cause_and_cure() {
        let swap = |from: &str, to: &str| Hardware::parse("my.toml", &SMALL.replace(from, to)).unwrap_err().to_string();
        for (from, to, says) in [
            ("gb_per_s = 3", "gb_per_s = 0", "'disk[0].gb_per_s' is 0"),
            ("gb_per_s = 3", "gb_per_s = -1", "'disk[0].gb_per_s' is -1"),
            ("gb_per_s = 3", "gb_per_s = nan", "'disk[0].gb_per_s'"),
            ("gb_per_s = 3", "gb_per_s = inf", "'disk[0].gb_per_s'"),
            ("gb_per_s = 3", "gb_per_s = 1e300", "'disk[0].gb_per_s'"),
            ("gb_per_s = 3", "gb_per_s = \"3\"", "'disk[0].gb_per_s' is no number"),
            ("gb_per_s = 3", "gb_per_s = 3\nspeed = 3", "'disk[0].speed' is no key"),
            ("memory_gib = 16", "memory_gib = 0", "'host.memory_gib' is 0"),
            ("memory_gib = 16", "", "'host.memory_gib' is missing"),
            ("name = \"small\"", "", "'name' is missing"),
            ("name = \"small\"", "name = 3", "'name' is no text"),
            ("name = \"small\"", "name = \"a\"\nunified_memory = true", "'unified_memory' is true but there is no gpu"),
            ("[[disk]]\ngb_per_s = 3", "", "'disk' is missing"),
            ("[[disk]]\ngb_per_s = 3", "[disk]\ngb_per_s = 3", "'disk' is no list"),
            ("[host]", "[host", "my.toml:"),
            ("gb_per_s = 3", "gb_per_s = 3\n[price]\nper_hour = -2", "'price.per_hour' is -2"),
        ] {
            let error = swap(from, to);
            assert!(error.starts_with("my.toml:") && error.contains(says), "{to}: {error}");
            assert!(error.contains("; "), "the cure: {error}");
        }
        let none = SMALL.replace("[[disk]]\ngb_per_s = 3", "").replace("[host]", "disk = []\n[host]");
        assert!(Hardware::parse("my.toml", &none).unwrap_err().to_string().contains("'disk' is empty"));
        let huge = format!("{SMALL}#{}", " ".repeat(2 << 20));
        assert!(Hardware::parse("my.toml", &huge).unwrap_err().cause.contains("too long"));
        let many = "[[disk]]\ngb_per_s = 3\n".repeat(100);
        assert!(Hardware::parse("my.toml", &format!("{SMALL}{many}")).unwrap_err().cause.contains("at most"));
    }

    #[test]
    fn a_gpu_without_a_link_must_share_memory() {
        let gpu = |more: &str| {
            Hardware::parse(
                "g.toml",
                &format!("{SMALL}[[gpu]]\nname = \"g\"\nmemory_gb_per_s = 500\ntflops = 50\n{more}"),
            )
        };
        assert!(gpu("memory_gib = 24\nlink_gb_per_s = 20").is_ok());
        assert_eq!(gpu("memory_gib = 24").unwrap_err().key, "gpu[0].link_gb_per_s");
        assert_eq!(gpu("link_gb_per_s = 20").unwrap_err().key, "gpu[0].memory_gib");
    }

    #[test]
    fn a_million_tokens_cost_what_the_hours_cost() {
        let price = Price {
            currency: "USD".into(),
            per_hour: 3.6,
            per_gb_vram: None,
            per_gb_ram: None,
            per_gb_per_s_disk: None,
        };
        assert!((price.per_million_tokens(10.0) - 100.0).abs() < 1e-9);
    }
}
