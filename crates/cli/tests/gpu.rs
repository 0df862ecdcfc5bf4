//! `run` on a GPU. Without an adapter these are reported as ignored. A software adapter will do: it is named.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{STORIES, overspill};
use libtest_mimic::{Arguments, Trial};

fn main() {
    let doctor = overspill(&["doctor", "--no-bench", "--json"]).ok().json();
    let adapter = doctor["adapters"].as_array().unwrap().first().map(|a| a["name"].as_str().unwrap().to_owned());
    let trial = |name: &str, test: fn(&str)| {
        let (ignored, adapter) = (adapter.is_none(), adapter.clone().unwrap_or_default());
        Trial::test(name, move || {
            test(&adapter);
            Ok(())
        })
        .with_ignored_flag(ignored)
    };
    let trials = vec![
        trial("less_vram_gives_the_same_tokens_and_the_cpus_text", less_vram_gives_the_same_tokens_and_the_cpus_text),
        trial("a_vram_too_small_says_the_smallest_that_works_and_that_works", vram_too_small),
        trial("a_share_of_the_model_means_its_weights", a_share_of_the_model_means_its_weights),
        trial("the_cache_has_no_budget_of_its_own", the_cache_has_no_budget_of_its_own),
        trial("a_sweep_over_vram_measures_the_bus", a_sweep_over_vram_measures_the_bus),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn run(adapter: &str, more: &[&str]) -> common::Ran {
    let mut args = vec!["run", STORIES, "--device", "gpu", "--adapter", adapter, "--prompt-ids", "0,5,9", "-n", "6"];
    args.extend(more);
    overspill(&args)
}

fn less_vram_gives_the_same_tokens_and_the_cpus_text(adapter: &str) {
    let whole = run(adapter, &["--vram", "400%", "--json"]).ok().json();
    assert_eq!(whole["device"]["kind"], "gpu");
    let tight = run(adapter, &["--vram", "90%", "--ram", "30%", "--logits", "--json"]).ok().json();
    assert_eq!(tight["tokens"], whole["tokens"]);
    let figures = &tight["tiers"]["gpu"];
    assert!(figures["evictions"].as_u64().unwrap() > 0, "{figures}");
    assert!(figures["peak_bytes"].as_u64() <= figures["budget_bytes"].as_u64(), "{figures}");
    assert!(figures["reserved_bytes"].as_u64().unwrap() > 0, "KV cache and scratch count: {figures}");
    let cpu = overspill(&["run", STORIES, "--device", "cpu", "--prompt-ids", "0,5,9", "-n", "6"]).ok();
    assert_eq!(run(adapter, &["--vram", "400%"]).ok().stdout, cpu.stdout);
}

/// The KV cache and scratch came out of the share: a small model, whose scratch is as large as its weights, was refused.
fn a_share_of_the_model_means_its_weights(adapter: &str) {
    let whole = run(adapter, &["--vram", "400%", "--json"]).ok().json();
    let weights = whole["model"]["bytes"].as_u64().unwrap();
    for share in [50, 25] {
        let json = run(adapter, &["--vram", &format!("{share}%"), "--json"]).ok().json();
        assert_eq!(json["tokens"], whole["tokens"]);
        let figures = &json["tiers"]["gpu"];
        let reserved = figures["reserved_bytes"].as_u64().unwrap();
        let expected = (weights * share).div_ceil(100) + reserved;
        assert_eq!(figures["budget_bytes"].as_u64().unwrap(), expected, "{figures}");
        assert!(figures["evictions"].as_u64().unwrap() > 0, "{figures}");
    }
    // What does not fit is refused before anything is written.
    run(adapter, &["--vram", "1%"]).refused(4, &["--vram 1%", "smallest"]);
}

fn vram_too_small(adapter: &str) {
    let refused = run(adapter, &["--vram", "1KiB"]).refused(4, &["--vram", "smallest"]);
    let json = run(adapter, &["--vram", "1KiB", "--json"]);
    assert_eq!(json.code, Some(4));
    let error = &json.json()["error"];
    assert_eq!(error["setting"], "--vram");
    let smallest = error["smallest_budget_bytes"].as_u64().unwrap();
    assert!(refused.stderr.contains(&smallest.to_string()), "{}", refused.stderr);
    run(adapter, &["--vram", &smallest.to_string()]).ok();
    run(adapter, &["--vram", &(smallest - smallest / 32).to_string()]).refused(4, &["--vram"]);
}

fn the_cache_has_no_budget_of_its_own(adapter: &str) {
    run(adapter, &["--kv", "1MiB"]).refused(2, &["--kv", "--vram"]);
}

fn a_sweep_over_vram_measures_the_bus(adapter: &str) {
    let sweep = ["bench", STORIES, "--device", "gpu,cpu", "--adapter", adapter, "--vram", "90%,400%", "--ram", "200%"];
    let short = ["-r", "1", "--probe-seconds", "0.05", "--prompt-tokens", "3", "-n", "4", "-o", "json"];
    let json = overspill(&[&sweep[..], &short].concat()).ok().json();
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3, "two budgets of VRAM, and the CPU once");
    let row = |vram: &str| rows.iter().find(|row| row["point"]["vram"] == vram).unwrap();
    let uploaded = |vram: &str| row(vram)["figures"]["decode_uploaded_bytes"].as_u64().unwrap();
    assert!(uploaded("90%") > uploaded("400%"), "{} {}", uploaded("90%"), uploaded("400%"));
    assert!(row("90%")["bus_busy_s"].as_f64().unwrap() > 0.0);
    assert_eq!(row("90%")["figures"]["answer"], row("400%")["figures"]["answer"]);
    let bus = |c: &serde_json::Value| c["bus_bytes_per_s"].as_f64();
    assert!(json["ceilings"].as_array().unwrap().iter().any(|c| c["device"] == "gpu" && bus(c).is_some()));
}
