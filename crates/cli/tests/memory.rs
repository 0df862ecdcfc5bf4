//! Invariant 2, from outside: a model of 2 GiB decodes in a process that may have 1 GiB, and takes no more than its
//! budget and a stated overhead. Where the system lets nobody make a control group, that test is reported as ignored
//! and what the process had resident is asserted all the same.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::group::Group;
use common::{Temp, overspill, trial};
use libtest_mimic::Arguments;
use std::sync::{Arc, OnceLock};

const RAM_BYTES: u64 = 800 << 20;
const GROUP_BYTES: u64 = 1 << 30;
const SMALL_GROUP_BYTES: u64 = 170 << 20;
/// What the program needs beside weights: its own pages, stacks, the tokenizer's tables, activations.
const OVERHEAD_BYTES: u64 = 64 << 20;
/// The shape of TinyLlama in f16: 2.05 GiB.
const PRESET: &str = "tinyllama-1.1b";
const MODEL_BYTES_MIN: u64 = 2 << 30;

fn main() {
    let group = Group::new("large", GROUP_BYTES);
    let small = Group::new("small", SMALL_GROUP_BYTES);
    let no_group = group.is_none() || small.is_none();
    let model = Arc::new(Model::default());
    let shared = Arc::clone(&model);
    let mut trials = vec![
        trial("a_model_of_2_gib_decodes_in_a_control_group_of_1_gib", no_group || !model.has_room(), move || {
            let group = group.unwrap();
            let json = run(&shared, Some(&group));
            assert_eq!(group.oom_kills(), 0);
            assert!(group.peak_bytes().is_none_or(|bytes| bytes <= GROUP_BYTES));
            check(&json);
        }),
        trial("what_is_resident_stays_within_the_budget_and_a_stated_overhead", !model.has_room(), {
            let model = Arc::clone(&model);
            move || check(&run(&model, None))
        }),
    ];
    trials.push(trial("the_default_budget_leaves_room_for_a_long_prompt", no_group, move || {
        let group = small.unwrap();
        long_prompt(&group);
        assert_eq!(group.oom_kills(), 0);
    }));
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    // To exit is not to drop: the model would stay on the disk.
    drop(model);
    conclusion.exit();
}

/// Two layers that are wide, and a prompt that is long: activations take nearly half of what the process may have.
fn long_prompt(group: &Group) {
    let temp = Temp::new();
    let config = temp.arg("config.json");
    let shape = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 1024, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}"#;
    std::fs::write(&config, shape).unwrap();
    let path = temp.arg("wide.gguf");
    overspill(&["synth", "--config", &config, "--dtype", "f16", "--format", "gguf", "-o", &path]).ok();
    let prompt: Vec<String> = (0..400).map(|index| (index * 7 % 1000).to_string()).collect();
    let prompt = prompt.join(",");
    let json =
        in_group(group, &["run", &path, "--device", "cpu", "--prompt-ids", &prompt, "-n", "2", "--json"]).ok().json();
    let host = &json["tiers"]["host"];
    let budget = host["budget_bytes"].as_u64().unwrap();
    assert!(budget < SMALL_GROUP_BYTES && host["evictions"].as_u64().unwrap() > 0, "{host}");
    let used = json["peak_resident_bytes"].as_u64().unwrap();
    assert!(used > SMALL_GROUP_BYTES * 7 / 10, "it fills what it may have: {used}");
}

/// The synthetic model, written when it is first needed.
struct Model {
    directory: Temp,
    written: OnceLock<()>,
}

impl Default for Model {
    fn default() -> Self {
        Self { directory: Temp::new(), written: OnceLock::new() }
    }
}

impl Model {
    fn path(&self) -> String {
        let path = self.directory.arg("model.gguf");
        self.written.get_or_init(|| {
            overspill(&["synth", "--preset", PRESET, "--dtype", "f16", "--format", "gguf", "-o", &path]).ok();
        });
        path
    }

    /// Whether the disk has room for it and as much again.
    fn has_room(&self) -> bool {
        let asked = std::process::Command::new("df").args(["-Pk"]).arg(self.directory.path()).output();
        let Ok(answer) = asked else { return false };
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        let free = text.lines().nth(1).and_then(|line| line.split_ascii_whitespace().nth(3)?.parse::<u64>().ok());
        free.is_some_and(|kib| kib << 10 > 2 * MODEL_BYTES_MIN)
    }
}

fn run(model: &Model, group: Option<&Group>) -> serde_json::Value {
    let path = model.path();
    let args = ["run", &path, "--device", "cpu", "--ram", "800MiB", "--prompt-ids", "1,2,3,4", "-n", "3", "--json"];
    match group {
        None => overspill(&args),
        Some(group) => in_group(group, &args),
    }
    .ok()
    .json()
}

/// Runs the program in a control group.
fn in_group(group: &Group, args: &[&str]) -> common::Ran {
    common::finish(&mut group.command(args))
}

fn check(json: &serde_json::Value) {
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or_else(|| panic!("{value} in {json}"));
    assert!(number(&json["model"]["bytes"]) >= MODEL_BYTES_MIN);
    assert_eq!(json["tokens"].as_array().unwrap().len(), 3);
    let host = &json["tiers"]["host"];
    assert_eq!(number(&host["budget_bytes"]), RAM_BYTES);
    assert!(number(&host["peak_bytes"]) <= RAM_BYTES, "{host}");
    assert!(number(&host["evictions"]) > 0, "{host}");
    let most = RAM_BYTES + number(&host["reserved_bytes"]) + OVERHEAD_BYTES;
    assert!(number(&json["peak_resident_bytes"]) <= most, "{} of {most}", json["peak_resident_bytes"]);
}
