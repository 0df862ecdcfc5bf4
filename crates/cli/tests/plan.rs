//! plan, simulate and audit.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{MIXTURE, STORIES, Temp, overspill};
use serde_json::{Value, json};
use std::time::Instant;

fn plan(more: &[&str]) -> Value {
    let mut args = vec!["plan", "--json"];
    args.extend(more);
    overspill(&args).ok().json()
}

fn float(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn deepseek_v3(temp: &Temp) -> String {
    let config = json!({
        "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129_280,
        "max_position_embeddings": 163_840
    });
    let path = temp.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_plan_says_where_how_fast_what_binds_and_what_more_would_bring() {
    let json = plan(&["--preset", "llama-3-70b", "--hardware", "desktop-24gb", "--device", "gpu"]);
    assert_eq!(json["hardware"]["name"], "desktop-24gb");
    assert_eq!(json["decode"]["bound_by"], "bus");
    assert!(float(&json["decode"]["tokens_per_s"]) > 0.5 && float(&json["prefill"]["tokens_per_s"]) > 50.0);
    assert!(float(&json["physical_limit"]["ratio"]) >= 1.0);
    assert!(float(&json["decode"]["limit"]["ratio"]) >= 0.999);
    let placed: u64 =
        json["placement"].as_array().unwrap().iter().map(|part| part["bytes"]["RTX 4090"].as_u64().unwrap()).sum();
    assert!((19_u64 << 30..24 << 30).contains(&placed), "{placed}");
    let gains = json["gains"].as_array().unwrap();
    assert_eq!(
        gains.iter().map(|gain| gain["resource"].as_str().unwrap()).collect::<Vec<_>>(),
        ["vram", "ram", "disk"]
    );
    assert!(float(&gains[0]["tokens_per_s"]) > 0.0 && float(&gains[0]["tokens_per_s_per_price"]) > 0.0);
    assert!(float(&json["cost"]["per_million_tokens"]) > 0.0);
    assert_eq!(json["context"]["max"], 8192);

    let text = overspill(&["plan", "--preset", "llama-3-70b", "--hardware", "desktop-24gb", "--device", "gpu"]);
    let text = text.ok().stdout;
    for word in
        ["Where it lives", "How fast", "bound by", "one more GiB of VRAM", "A million tokens cost", "attention", "head"]
    {
        assert!(text.contains(word), "'{word}' is not in:\n{text}");
    }
}

/// Bytes read for a token are T − (B − R), as run reports and the engine's tests prove.
#[test]
fn a_plan_of_files_reads_what_does_not_fit() {
    let json = plan(&[STORIES, "--hardware", "laptop", "--ram", "50%", "--fine", "--ctx", "64"]);
    let bytes = |value: &Value| value.as_u64().unwrap() as f64;
    let touched = bytes(&json["model"]["touched_bytes_per_token"]);
    let ring = bytes(&json["decode"]["in_flight_bytes"][0]);
    let budget = bytes(&json["budgets"]["ram_bytes"]);
    let read = bytes(&json["decode"]["disk_bytes"]);
    let inspected = overspill(&["inspect", STORIES, "--json"]).ok().json();
    let padding = bytes(&inspected["blocks"]["slots_bytes"]) / bytes(&inspected["bytes"]);
    // Of what is kept some is padding; the fullest slots are kept first.
    let (least, most) = (touched - (budget - ring), touched - (budget - ring) / padding);
    assert!((least..=most * 1.01).contains(&read), "{read}, not {least} to {most}");
}

#[test]
fn a_mixture_of_671_billion_is_planned_from_its_configuration_alone() {
    let temp = Temp::new();
    let config = deepseek_v3(&temp);
    let started = Instant::now();
    let json = plan(&["--config", &config, "--dtype", "q4_k", "--hardware", "workstation"]);
    println!("planned in {:.2} s (a debug build)", started.elapsed().as_secs_f64());
    assert!((670e9..672e9).contains(&float(&json["model"]["parameters"])));
    assert!(float(&json["decode"]["tokens_per_s"]) > 0.5, "{}", json["decode"]);
    let kinds: Vec<&str> = json["placement"].as_array().unwrap().iter().map(|p| p["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["attention", "dense network", "router", "shared experts", "experts", "head"]);
}

#[test]
fn machines_are_compared_and_the_cheapest_is_named() {
    let args =
        ["--preset", "llama-3-8b", "--hardware", "cloud-h100", "--hardware", "laptop", "--hardware", "desktop-24gb"];
    let json = plan(&[&args[..], &["--want", "60"]].concat());
    assert_eq!(json["cheapest"], "desktop-24gb");
    assert_eq!(json["machines"].as_array().unwrap().len(), 3);
    let all = overspill(&["plan", "--preset", "llama-3-8b", "--hardware", "all"]).ok().stdout;
    let both = plan(&["--preset", "llama-3-70b", "--hardware", "desktop-24gb"]);
    assert_eq!((&both["device"], &both["alternative"]["device"]), (&json!("cpu"), &json!("gpu")));
    assert!(float(&both["alternative"]["prefill_tokens_per_s"]) > 10.0 * float(&both["prefill"]["tokens_per_s"]));
    for name in ["laptop", "two-cards", "unified", "workstation", "cloud-a100"] {
        assert!(all.contains(name), "{all}");
    }
    let too_fast = [&["plan"], &args[..], &["--want", "100000"]].concat();
    overspill(&too_fast).refused(4, &["no machine of these", "cloud-h100", "want less"]);
}

#[test]
fn what_cannot_be_planned_is_refused_with_its_exit_code() {
    let temp = Temp::new();
    let write = |name: &str, text: &str| {
        let path = temp.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let laptop = ["--hardware", "laptop"];
    let run = |more: &[&str]| overspill(&[&["plan"], more, &laptop[..]].concat());
    run(&[]).refused(2, &["no model is given"]);
    run(&["--preset", "abacus"]).refused(2, &["no preset", "llama-3-70b"]);
    run(&["--preset", "llama-3-8b", "--dtype", "q17"]).refused(2, &["no element type"]);
    run(&["fixtures/nowhere"]).refused(3, &["fixtures/nowhere"]);
    let odd = write("odd.json", r#"{"model_type": "abacus"}"#);
    run(&["--config", &odd]).refused(3, &["odd.json", "'model_type'", "it knows"]);
    run(&["--config", &write("no.json", "{")]).refused(3, &["no.json", "no JSON"]);
    run(&["--preset", "llama-3-8b", "--ram", "1MiB"]).refused(4, &["--ram", "the smallest that works is"]);
    run(&["--preset", "llama-3-8b", "--device", "gpu"]).refused(2, &["has no GPU"]);
    run(&["--preset", "llama-3-8b", "--ctx", "99999"]).refused(2, &["--ctx 99999", "8192"]);
    run(&["--preset", "llama-3-8b", "--routing", "often"]).refused(2, &["--routing often", "sticky:70%"]);
    let on = |hardware: &str| overspill(&["plan", "--preset", "llama-3-8b", "--hardware", hardware]);
    on("abacus").refused(2, &["abacus", "desktop-24gb"]);
    let slow = write(
        "slow.toml",
        "name = \"x\"\n[host]\nmemory_gib = 8\nmemory_gb_per_s = 0\ntflops = 1\n[[disk]]\ngb_per_s = 1\n",
    );
    on(&slow).refused(2, &["slow.toml", "'host.memory_gb_per_s' is 0"]);
    let shipped = overspill(&["plan", "--show-hardware", "laptop"]).ok().stdout;
    on(&write("odd.toml", &format!("colour = 1\n{shipped}"))).refused(2, &["odd.toml", "'colour' is no key"]);
    on(&write("same.toml", &shipped)).ok();
    let json = overspill(&["plan", "--preset", "llama-3-8b", "--ram", "1MiB", "--json", "--hardware", "laptop"]);
    assert_eq!(json.code, Some(4));
    assert!(json.json()["error"]["smallest_budget_bytes"].as_u64().unwrap() > 1 << 20);
}

/// What a plan names as the smallest budget is about what run names.
#[test]
fn the_smallest_budget_is_the_one_that_run_names() {
    for model in [STORIES, MIXTURE] {
        let smallest = |args: &[&str]| {
            let ran = overspill(args);
            assert_eq!(ran.code, Some(4), "{}", ran.stderr);
            ran.json()["error"]["smallest_budget_bytes"].as_u64().unwrap() as f64
        };
        let planned = smallest(&["plan", model, "--ram", "1", "--json", "--hardware", "laptop"]);
        let really =
            smallest(&["run", model, "--ram", "1", "--json", "--prompt-ids", "1", "-n", "1", "--device", "cpu"]);
        assert!((planned / really - 1.0).abs() < 0.35, "{model}: {planned}, run says {really}");
    }
}

#[test]
fn a_sweep_has_every_point_in_every_form() {
    let args =
        ["simulate", STORIES, "--hardware", "laptop", "--ctx", "64", "--ram", "30%..90%:20%", "--evict", "auto,lru"];
    let json = overspill(&[&args[..], &["--json"]].concat()).ok().json();
    let points = json["points"].as_array().unwrap();
    assert_eq!(points.len(), 8);
    let speed = |index: usize| float(&points[index]["tokens_per_s"]);
    assert!(speed(0) < speed(6), "more memory is faster: {points:?}");
    assert!(speed(0) >= speed(1), "planned is no slower than lru");
    assert_eq!(points[1]["hit_rate"].as_f64().unwrap(), 0.0, "in a cycle larger than memory lru never hits");
    assert_eq!(points[1]["evict"], "lru");
    let csv = overspill(&[&args[..], &["-o", "csv"]].concat()).ok().stdout;
    assert_eq!(csv.lines().count(), 9);
    assert!(csv.starts_with("machine,device,vram_bytes,ram_bytes,evict,prefetch,tokens_per_s,"));
    let fields: Vec<&str> = csv.lines().nth(1).unwrap().split(',').collect();
    assert!((fields[6].parse::<f64>().unwrap() - speed(0)).abs() < 1e-3);
    let table = overspill(&[&args[..], &["-o", "md"]].concat()).ok().stdout;
    assert_eq!(table.lines().filter(|line| line.starts_with('|')).count(), 10);
    assert!(overspill(&args).ok().stdout.contains("tokens/s"));
}

/// The answers don't depend on the number of threads.
#[test]
fn sweeps_are_the_same_on_any_number_of_threads() {
    let sweep = |threads: &str| {
        let args =
            ["simulate", MIXTURE, "--hardware", "laptop,desktop-24gb", "--ctx", "64", "--ram", "40%,80%", "-o", "csv"];
        overspill(&[&args[..], &["--threads", threads]].concat()).ok().stdout
    };
    assert_eq!(sweep("1"), sweep("5"));
}

#[test]
fn sweeps_that_make_no_sense_are_refused() {
    let run = |more: &[&str]| overspill(&[&["simulate", STORIES, "--hardware", "laptop"], more].concat());
    run(&["--ram", "10%..1000%:0.005%"]).refused(2, &["198001 points", "--yes"]);
    run(&["--ram", "10%..20%"]).refused(2, &["--ram", "without a step"]);
    run(&["--ram", "0B..1TiB:1B"]).refused(2, &["--ram", "larger steps"]);
    run(&["--ram", "1,2"]).refused(4, &["the smallest that works"]);
    let mixed = run(&["--ctx", "64", "--ram", "1,90%", "-o", "csv"]).ok().stdout;
    assert!(
        mixed.lines().nth(1).unwrap().contains("too small") && !mixed.lines().nth(2).unwrap().contains("too small")
    );
}

#[test]
fn an_audit_adds_up_and_finds_duplicates() {
    let json = overspill(&["audit", STORIES, "--json", "--top", "1000"]).ok().json();
    let costs: u64 = json["costs"].as_array().unwrap().iter().map(|cost| cost["bytes"].as_u64().unwrap()).sum();
    assert_eq!(costs, json["bytes"].as_u64().unwrap());
    assert!(json["savings"].as_array().unwrap().iter().all(|saving| saving["frees_bytes"].as_u64().unwrap() > 0));
    let kinds = |json: &Value| -> Vec<(String, u64)> {
        let parts = json["pruning"].as_array().unwrap().iter();
        parts.map(|p| (p["kind"].as_str().unwrap().to_owned(), p["frees_bytes"].as_u64().unwrap())).collect()
    };
    let bytes_of = |name: &str| -> u64 {
        let of =
            json["costs"].as_array().unwrap().iter().filter(|cost| cost["tensors"].as_str().unwrap().contains(name));
        of.map(|cost| cost["bytes"].as_u64().unwrap()).sum()
    };
    let config = std::fs::read_to_string(common::root().join(STORIES).join("config.json")).unwrap();
    let layers = serde_json::from_str::<Value>(&config).unwrap()["num_hidden_layers"].as_u64().unwrap();
    assert!(kinds(&json).contains(&("layer".to_owned(), bytes_of("layers.") / layers)), "{:?}", kinds(&json));
    let mixture = overspill(&["audit", MIXTURE, "--json", "--no-read"]).ok().json();
    assert!(kinds(&mixture).iter().any(|(kind, bytes)| kind == "expert" && *bytes > 0), "{:?}", kinds(&mixture));
    assert!(json["risks"].is_array() && json["machine"]["least_bytes"].as_u64().unwrap() > 0);
    let text = overspill(&["audit", MIXTURE]).ok().stdout;
    for word in [
        "What costs most",
        "What another element type would free",
        "leaving parts out",
        "Duplicates:",
        "The smallest machine",
        "Risks here",
    ] {
        assert!(text.contains(word), "'{word}' is not in:\n{text}");
    }

    // One expert's matrix becomes a copy of another's.
    let temp = Temp::new();
    for entry in std::fs::read_dir(common::root().join(MIXTURE)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), temp.path().join(entry.file_name())).unwrap();
    }
    let file = temp.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    let range = |expert: u32| {
        let offsets = &header[format!("model.layers.1.mlp.experts.{expert}.up_proj.weight")]["data_offsets"];
        let at = |index: usize| 8 + header_bytes + offsets[index].as_u64().unwrap() as usize;
        at(0)..at(1)
    };
    let (from, to) = (range(3), range(7));
    let wasted = from.len() as u64;
    bytes.copy_within(from, to.start);
    std::fs::write(&file, &bytes).unwrap();
    let copy = temp.path().to_str().unwrap();
    let before = overspill(&["audit", MIXTURE, "--json"]).ok().json()["duplicates"]["wasted_bytes"].as_u64().unwrap();
    let found = overspill(&["audit", copy, "--json"]).ok().json()["duplicates"].clone();
    assert_eq!(found["wasted_bytes"].as_u64().unwrap(), before + wasted);
    let named = found["groups"].to_string();
    assert!(named.contains("experts.3.up_proj") && named.contains("experts.7.up_proj"), "{named}");
    // A last byte that differs is no duplicate.
    bytes[to.end - 1] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    assert_eq!(overspill(&["audit", copy, "--json"]).ok().json()["duplicates"]["wasted_bytes"], before);
    let unread = overspill(&["audit", copy, "--json", "--no-read"]).ok().json();
    assert_eq!(unread["duplicates"], Value::Null);
}

#[test]
fn an_audit_warns_of_a_budget_close_to_the_smallest() {
    let least = overspill(&["audit", STORIES, "--json"]).ok().json()["machine"]["least_bytes"].as_u64().unwrap();
    let risks =
        |ram: u64| overspill(&["audit", STORIES, "--json", "--ram", &ram.to_string()]).ok().json()["risks"].to_string();
    assert!(risks(least + 1).contains("close_to_the_minimum"));
    assert!(risks(least / 2).contains("too_small"));
    assert!(!risks(least * 2).contains("minimum"));
    overspill(&["audit", "fixtures/hostile/truncated"]).refused(3, &["truncated"]);
}

/// This machine is measured when no other is named.
#[test]
fn this_machine_is_measured() {
    let json = plan(&[STORIES, "--ctx", "64", "--ram", "60%"]);
    assert_eq!(json["hardware"]["name"], "this");
    assert!(float(&json["decode"]["tokens_per_s"]) > 1.0, "{json}");
}
