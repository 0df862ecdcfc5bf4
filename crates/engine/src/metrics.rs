//! [`Stats`] in Prometheus' text exposition format (version 0.0.4), for a `/metrics` page or a textfile collector.
//!
//! Names follow Prometheus' conventions: base units (bytes, seconds), `_total` for counters, one label for what differs.
//! Nothing is counted here, so metrics cost what [`crate::Engine::stats`] costs, and only when somebody asks.
//!
//! ```
//! # fn page(engine: &overspill::Engine) -> Result<String, overspill::Error> {
//! let page = overspill::metrics::render(&engine.stats()?);
//! # Ok(page)
//! # }
//! ```

use crate::{Stats, TierFigures};
use std::fmt::{Display, Write as _};

/// What HTTP calls this format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The page.
#[must_use]
pub fn render(stats: &Stats) -> String {
    let mut page = Page(String::with_capacity(4096));
    tiers(&mut page, stats);
    wires(&mut page, stats);
    page.family("overspill_stall_seconds_total", "counter", "Time in which callers waited for blocks, all callers.");
    page.sample("overspill_stall_seconds_total", &[], seconds(stats.stall_ns));
    page.family("overspill_mapped_bytes", "gauge", "Host memory mapped for blocks.");
    page.sample("overspill_mapped_bytes", &[], stats.mapped_bytes);
    page.family("overspill_huge_page_bytes", "gauge", "Of the mapped memory, what lies in huge pages.");
    page.sample("overspill_huge_page_bytes", &[], stats.huge_page_bytes);
    page.family("overspill_policy_info", "gauge", "Always 1; the labels tell what is in force.");
    let policy = [("evict", stats.decision.evict), ("prefetch", stats.prefetch), ("io", stats.io)];
    page.sample("overspill_policy_info", &policy, 1);
    page.0
}

/// A family of metrics with a sample for each tier.
type OfTier = (&'static str, &'static str, &'static str, fn(&TierFigures) -> u64);

const OF_TIERS: &[OfTier] = &[
    ("overspill_tier_budget_bytes", "gauge", "What the tier may hold.", |t| t.budget_bytes),
    ("overspill_tier_used_bytes", "gauge", "Slots of blocks in use, those being filled included.", |t| {
        t.blocks.used_bytes
    }),
    ("overspill_tier_peak_bytes", "gauge", "The most that the tier has held.", |t| t.peak_bytes),
    ("overspill_tier_reserved_bytes", "gauge", "Set aside for KV cache and scratch.", |t| t.reserved_bytes),
    ("overspill_tier_ring_bytes", "gauge", "In flight plus leased while something streams.", |t| t.blocks.ring_bytes),
    ("overspill_tier_kept_blocks", "gauge", "Blocks that the plan keeps.", |t| t.blocks.kept_blocks),
    ("overspill_tier_hits_total", "counter", "Blocks that were there when they were asked for.", |t| t.hits),
    ("overspill_tier_misses_total", "counter", "Blocks that had to be waited for.", |t| t.misses),
    ("overspill_tier_loads_total", "counter", "Blocks brought in.", |t| t.blocks.loads),
    ("overspill_tier_evictions_total", "counter", "Blocks that went to make room.", |t| t.blocks.evictions),
    ("overspill_tier_wasted_loads_total", "counter", "Blocks brought in that went unused.", |t| t.blocks.wasted),
];

fn tiers(page: &mut Page, stats: &Stats) {
    for (name, kind, help, value) in OF_TIERS {
        page.family(name, kind, help);
        for tier in &stats.tiers {
            page.sample(name, &[("tier", tier.label)], value(tier));
        }
    }
}

fn wires(page: &mut Page, stats: &Stats) {
    let mut of_wires = |name: &str, help: &str, disk: f64, bus: f64| {
        page.family(name, "counter", help);
        page.sample(name, &[("wire", "disk")], disk);
        if stats.tiers.len() > 1 {
            page.sample(name, &[("wire", "bus")], bus);
        }
    };
    let (disk, bus) = (&stats.disk, &stats.bus);
    let bytes = "Bytes that crossed the wire, alignment padding included.";
    of_wires("overspill_wire_bytes_total", bytes, disk.read_bytes as f64, bus.uploaded_bytes as f64);
    let transfers = "Reads from disk, or copies to a GPU.";
    of_wires("overspill_wire_transfers_total", transfers, disk.reads as f64, bus.uploads as f64);
    let busy = "Time in which at least one transfer of blocks was under way.";
    of_wires("overspill_wire_busy_seconds_total", busy, seconds(disk.busy_ns), seconds(bus.busy_ns));
    page.family("overspill_disk_padding_bytes_total", "counter", "Bytes read for alignment only.");
    page.sample("overspill_disk_padding_bytes_total", &[], disk.padding_bytes);
    page.family("overspill_gathered_bytes_total", "counter", "Bytes of table rows handed out.");
    page.sample("overspill_gathered_bytes_total", &[], disk.gathered_bytes);
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{}{label}=\"{text}\"", if index == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BusStats, Decision, DiskStats, TierStats};
    use std::collections::BTreeSet;

    fn stats(labels: &[&'static str]) -> Stats {
        let tier = |&label: &&'static str| TierFigures {
            label,
            budget_bytes: 100,
            budget_bytes_max: 100,
            peak_bytes: 90,
            reserved_bytes: 3,
            reserved_peak_bytes: 4,
            hits: 7,
            misses: 2,
            blocks: TierStats { evictions: 5, used_bytes: 80, ..TierStats::default() },
        };
        Stats {
            tiers: labels.iter().map(tier).collect(),
            disk: DiskStats { read_bytes: 4096, reads: 1, busy_ns: 1_500_000_000, ..DiskStats::default() },
            bus: BusStats { uploads: 9, ..BusStats::default() },
            stall_ns: 250_000_000,
            mapped_bytes: 64,
            huge_page_bytes: 32,
            decision: Decision { evict: "planned", why: "a \"cycle\"".to_owned() },
            prefetch: "auto",
            io: "uring",
        }
    }

    #[test]
    fn figures_are_told_with_their_units_and_labels() {
        let page = render(&stats(&["gpu0", "host"]));
        for line in [
            "overspill_tier_hits_total{tier=\"host\"} 7",
            "overspill_tier_evictions_total{tier=\"gpu0\"} 5",
            "overspill_wire_busy_seconds_total{wire=\"disk\"} 1.5",
            "overspill_wire_transfers_total{wire=\"bus\"} 9",
            "overspill_stall_seconds_total 0.25",
            "overspill_huge_page_bytes 32",
            "overspill_policy_info{evict=\"planned\",prefetch=\"auto\",io=\"uring\"} 1",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is not in:\n{page}");
        }
        assert!(!render(&stats(&["host"])).contains("wire=\"bus\""), "no bus without a GPU");
    }

    /// Each figure is a number of its own here, so that none can stand for another.
    #[test]
    fn each_figure_is_told_under_its_own_name() {
        let mut stats = stats(&["gpu0", "host"]);
        for (tier, base) in stats.tiers.iter_mut().zip([100, 200]) {
            tier.budget_bytes = base + 1;
            (tier.budget_bytes_max, tier.reserved_peak_bytes) = (base + 90, base + 91);
            (tier.peak_bytes, tier.reserved_bytes, tier.hits, tier.misses) = (base + 3, base + 4, base + 7, base + 8);
            tier.blocks = TierStats {
                budget_bytes: base + 92,
                used_bytes: base + 2,
                free_bytes: base + 93,
                peak_bytes: base + 94,
                ring_bytes: base + 5,
                kept_blocks: base + 6,
                loads: base + 9,
                evictions: base + 10,
                wasted: base + 11,
            };
        }
        stats.disk =
            DiskStats { read_bytes: 31, padding_bytes: 32, reads: 33, gathered_bytes: 34, busy_ns: 3_500_000_000 };
        stats.bus = BusStats { uploaded_bytes: 41, uploads: 42, busy_ns: 4_250_000_000 };
        let page = render(&stats);
        let families = [
            "tier_budget_bytes",
            "tier_used_bytes",
            "tier_peak_bytes",
            "tier_reserved_bytes",
            "tier_ring_bytes",
            "tier_kept_blocks",
            "tier_hits_total",
            "tier_misses_total",
            "tier_loads_total",
            "tier_evictions_total",
            "tier_wasted_loads_total",
        ];
        let mut wanted = Vec::new();
        for (number, family) in families.iter().enumerate() {
            for (label, base) in [("gpu0", 100), ("host", 200)] {
                wanted.push(format!("overspill_{family}{{tier=\"{label}\"}} {}", base + number + 1));
            }
        }
        for (family, disk, bus) in [
            ("wire_bytes_total", "31", "41"),
            ("wire_transfers_total", "33", "42"),
            ("wire_busy_seconds_total", "3.5", "4.25"),
        ] {
            wanted.push(format!("overspill_{family}{{wire=\"disk\"}} {disk}"));
            wanted.push(format!("overspill_{family}{{wire=\"bus\"}} {bus}"));
        }
        wanted.extend(
            ["disk_padding_bytes_total 32", "gathered_bytes_total 34", "stall_seconds_total 0.25", "mapped_bytes 64"]
                .map(|rest| format!("overspill_{rest}")),
        );
        for line in &wanted {
            assert!(page.lines().any(|found| found == line), "{line} is not in:\n{page}");
        }
        let samples = page.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(samples, wanted.len() + 2, "huge pages and the policy, and nothing that is not asked for here");
    }

    #[test]
    fn the_format_s_rules_hold() {
        let page = render(&stats(&["gpu0", "host"]));
        let (mut families, mut current, mut seen) = (BTreeSet::new(), String::new(), BTreeSet::new());
        assert!(page.ends_with('\n'));
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap_or_default();
                assert!(families.insert(name.to_owned()), "{name} is declared twice");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
                current = name.to_owned();
            } else if !line.starts_with("# HELP ") {
                let (sample, value) = line.rsplit_once(' ').unwrap_or_default();
                assert_eq!(sample.split('{').next(), Some(current.as_str()), "samples follow their family: {line}");
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(seen.insert(sample.to_owned()), "{sample} is told twice");
            }
        }
        assert!(families.len() > 15);
    }

    #[test]
    fn the_dashboard_asks_for_what_there_is() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/grafana/overspill.json");
        let Ok(dashboard) = std::fs::read_to_string(path) else { return };
        let page = render(&stats(&["gpu0", "host"]));
        let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
        let mut asked: BTreeSet<&str> = BTreeSet::new();
        for (at, _) in dashboard.match_indices("overspill_") {
            let rest = &dashboard[at..];
            asked.insert(&rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())]);
        }
        // The command line adds its own count of tokens.
        asked.remove("overspill_tokens_total");
        assert!(asked.len() > 8, "{asked:?}");
        for name in asked {
            assert!(page.contains(&format!("# TYPE {name} ")), "the dashboard asks for {name}");
        }
    }

    #[test]
    fn labels_are_escaped() {
        let mut page = Page(String::new());
        page.sample("a", &[("b", "x\"\\\n")], 1);
        assert_eq!(page.0, "a{b=\"x\\\"\\\\\\n\"} 1\n");
    }
}
