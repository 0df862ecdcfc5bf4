//! inspect, doctor, synth, completions and man.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{MIXTURE, STORIES, Temp, command, finish, overspill};
use serde_json::Value;

#[test]
fn inspect_shows_tensors_types_layers_and_what_fits() {
    let text = overspill(&["inspect", MIXTURE]).ok().stdout;
    for word in [
        "Qwen3MoeForCausalLM",
        "bf16",
        "0-3, each",
        "model.layers.{0-3}.mlp.experts.{0-31}.up_proj.weight",
        "model.embed_tokens.weight",
        "host RAM",
    ] {
        assert!(text.contains(word), "'{word}' is not in:\n{text}");
    }
    assert!(!text.contains('\x1b'));
    let all = overspill(&["inspect", MIXTURE, "--tensors"]).ok().stdout;
    assert!(all.contains("model.layers.2.mlp.experts.17.up_proj.weight"), "{all}");
}

#[test]
fn inspect_adds_up() {
    for model in [STORIES, MIXTURE, "fixtures/oracles/llama-q4_k_m.gguf"] {
        let json = overspill(&["inspect", model, "--json"]).ok().json();
        let bytes = json["bytes"].as_u64().unwrap();
        let sum = |list: &str, key: &str| -> u64 {
            json[list].as_array().unwrap().iter().map(|line| line[key].as_u64().unwrap()).sum()
        };
        assert!(bytes > 0);
        assert_eq!(sum("tensors", "bytes"), bytes, "{model}");
        assert_eq!(sum("layers", "bytes"), bytes, "{model}");
        assert_eq!(sum("dtypes", "bytes"), bytes, "{model}");
        assert!(sum("files", "bytes") >= bytes, "{model}");
        let blocks = &json["blocks"];
        assert_eq!(
            blocks["slots_bytes"].as_u64().unwrap(),
            blocks["count"].as_u64().unwrap() * blocks["slot_bytes"].as_u64().unwrap(),
            "{model}"
        );
    }
}

#[test]
fn doctor_looks_and_measures() {
    let json = overspill(&["doctor", "--no-bench", "--json"]).ok().json();
    assert!(json["system"]["cores"].as_u64().unwrap() >= 1);
    assert!(json["memory"]["machine_bytes"].as_u64().is_none_or(|bytes| bytes > 1 << 20));
    assert!(json["adapters"].is_array() && json["advice"].is_array());
    assert_eq!(json["ram"], Value::Null);

    let temp = Temp::new();
    let cache = Temp::new();
    let mut doctor = command(&["doctor", "--path", temp.path().to_str().unwrap(), "--json"]);
    let json = finish(doctor.env("XDG_CACHE_HOME", cache.path())).ok().json();
    assert!(json["ram"]["read_bytes_per_s"].as_f64().is_none_or(|rate| rate > 1e6), "{json}");
    let readers = json["disk"]["readers"].as_array().unwrap();
    if json["disk"]["error"].is_null() {
        let pread = readers.iter().find(|reader| reader["name"] == "pread").unwrap();
        assert!(pread["bytes_per_s"].as_f64().unwrap() > 1e5, "{json}");
        for reader in readers {
            assert_ne!(reader["bytes_per_s"].is_null(), reader["error"].is_null(), "a figure or a reason: {reader}");
        }
        if let Some(disk) = overspill::remember::disk_name(temp.path()) {
            let memory = overspill::remember::Memory::at(cache.join("overspill/disks.tsv"));
            assert!(memory.recall(&disk).is_some_and(|found| found.bytes_per_s > 1e5), "'{disk}' is remembered");
        }
    }
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0, "the temporary file is gone");
}

#[test]
fn doctor_refuses_what_it_cannot_measure() {
    overspill(&["doctor", "--path", "fixtures/nowhere"]).refused(2, &["--path", "fixtures/nowhere"]);
    overspill(&["doctor", "--path", "Cargo.toml"]).refused(2, &["too little", "16.0 MiB"]);
}

#[test]
fn a_synthetic_model_runs_and_the_same_seed_gives_the_same_bytes() {
    let temp = Temp::new();
    let config = &format!("{MIXTURE}/config.json");
    let synth = |name: &str, format: &str, dtype: &str, seed: &str| {
        let out = temp.arg(name);
        let args =
            ["synth", "--config", config, "--dtype", dtype, "--format", format, "--seed", seed, "-o", &out, "--json"];
        let json = overspill(&args).ok().json();
        let run = ["run", &out, "--device", "cpu", "--prompt-ids", "1,2", "-n", "3", "--ram", "60%", "--json"];
        assert_eq!(overspill(&run).ok().json()["tokens"].as_array().unwrap().len(), 3, "{name}");
        json
    };
    let a = synth("a", "safetensors", "bf16", "7");
    synth("b", "safetensors", "bf16", "7");
    synth("c", "safetensors", "bf16", "8");
    let read = |name: &str| std::fs::read(temp.join(name).join("model.safetensors")).unwrap();
    assert!(read("a") == read("b"));
    assert!(read("a") != read("c"));
    assert_eq!(a["bytes"].as_u64().unwrap(), read("a").len() as u64);
    synth("d.gguf", "gguf", "q8_0", "7");
}

#[test]
fn synth_replaces_only_its_own_and_only_when_told() {
    let temp = Temp::new();
    let config = &format!("{STORIES}/config.json");
    let synth = |out: &str, more: &[&str]| {
        let args = [&["synth", "--config", config, "--dtype", "f16", "-o", out][..], more].concat();
        overspill(&args)
    };
    let out = temp.arg("model");
    synth(&out, &[]).ok();
    synth(&out, &["--seed", "1"]).refused(2, &["already", "--force"]);
    let before = std::fs::read(temp.join("model/model.safetensors")).unwrap();
    synth(&out, &["--seed", "1", "--force"]).ok();
    assert_ne!(before, std::fs::read(temp.join("model/model.safetensors")).unwrap());
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 1, "nothing is left beside it");
    let precious = temp.join("precious");
    std::fs::create_dir(&precious).unwrap();
    std::fs::write(precious.join("thesis.txt"), "years of work").unwrap();
    synth(precious.to_str().unwrap(), &["--force"]).refused(2, &["did not write"]);
    assert!(precious.join("thesis.txt").exists());
}

#[test]
fn synth_refuses_what_makes_no_model() {
    let temp = Temp::new();
    let out = &temp.arg("model");
    overspill(&["synth", "--preset", "gpt-9", "-o", out]).refused(2, &["gpt-9", "tinyllama-1.1b"]);
    overspill(&["synth", "--preset", "tinyllama-1.1b", "--dtype", "q9", "-o", out]).refused(2, &["q9", "q8_0"]);
    overspill(&["synth", "--preset", "tinyllama-1.1b", "--dtype", "q8_0", "-o", out]).refused(2, &["GGUF"]);
    overspill(&["synth", "--config", "fixtures/nowhere.json", "-o", out]).refused(3, &["nowhere.json"]);
    overspill(&["synth", "--config", "README.md", "-o", out]).refused(3, &["README.md", "JSON"]);
    let huge = "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":1048576,\
        \"intermediate_size\":1048576,\"num_hidden_layers\":1000,\"num_attention_heads\":8,\"num_key_value_heads\":8,\
        \"vocab_size\":1048576,\"max_position_embeddings\":64,\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0}";
    std::fs::write(temp.join("huge.json"), huge).unwrap();
    let ran = overspill(&["synth", "--config", &temp.arg("huge.json"), "-o", out]).calm();
    assert_ne!(ran.code, Some(0));
    assert!(!temp.join("model").exists(), "no room, nothing begun: {}", ran.stderr);
}

#[test]
fn completions_and_the_manual_name_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = overspill(&["completions", shell]).ok().stdout;
        assert!(script.contains("max-new-tokens") && script.contains("doctor"), "{shell}");
    }
    let page = overspill(&["man"]).ok().stdout;
    for word in [".TH overspill", "COMMAND RUN", "COMMAND SYNTH", "next\\-use", "Exit codes"] {
        assert!(page.contains(word), "'{word}' is not in the manual");
    }
    for args in [&["--help"][..], &["--version"], &["run", "--help"]] {
        let ran = overspill(args).ok();
        assert!(ran.stdout.contains("overspill") && ran.stderr.is_empty());
    }
}
