//! Invariant 2, from outside: a model of 2 GiB decodes in a process that may have 1 GiB, and takes no more than its
//! budget and a stated overhead. Where the system lets nobody make a control group, that test is reported as ignored
//! and what the process had resident is asserted all the same.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Temp, command, overspill};
use libtest_mimic::{Arguments, Failed, Trial};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

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
    let trials = vec![
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
    let mut trials = trials;
    trials.push(trial("the_default_budget_leaves_room_for_a_long_prompt", no_group, move || {
        let group = small.unwrap();
        long_prompt(&group);
        assert_eq!(group.oom_kills(), 0);
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// Two layers that are wide, and a prompt that is long: activations take nearly half of what the process may have.
fn long_prompt(group: &Group) {
    let temp = Temp::new();
    let config = temp.arg("config.json");
    let shape = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
        "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 1024, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}"#;
    fs::write(&config, shape).unwrap();
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

fn trial(name: &str, ignored: bool, test: impl FnOnce() + Send + 'static) -> Trial {
    let run = move || -> Result<(), Failed> {
        test();
        Ok(())
    };
    Trial::test(name, run).with_ignored_flag(ignored)
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
    let plain = command(args);
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(group.0.join("cgroup.procs"));
    shell.arg(plain.get_program()).args(plain.get_args()).current_dir(common::root());
    common::finish(&mut shell)
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

/// A control group for memory, of either version.
struct Group(PathBuf);

impl Group {
    /// Makes one below the group of this process; `None` where that is not allowed.
    fn new(label: &str, limit_bytes: u64) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let name = format!("overspill-test-{label}-{}", std::process::id());
        for line in mounts.lines() {
            let (left, right) = line.split_once(" - ")?;
            let point = left.split(' ').nth(4)?;
            let kind = right.split(' ').next()?;
            let memory = right.split(' ').nth(2).is_some_and(|options| options.split(',').any(|o| o == "memory"));
            let (entry, limit) = match kind {
                "cgroup" if memory => {
                    (own.lines().find(|l| l.contains(":memory:") || l.contains(",memory")), "memory.limit_in_bytes")
                }
                "cgroup2" => (own.lines().find(|l| l.starts_with("0::")), "memory.max"),
                _ => continue,
            };
            let Some(within) = entry.and_then(|l| l.splitn(3, ':').nth(2)) else { continue };
            for parent in [Path::new(point).join(within.trim_start_matches('/')), PathBuf::from(point)] {
                let group = Self(parent.join(&name));
                if fs::create_dir(&group.0).is_ok() && fs::write(group.0.join(limit), limit_bytes.to_string()).is_ok() {
                    return Some(group);
                }
            }
        }
        None
    }

    fn oom_kills(&self) -> u64 {
        let files = ["memory.oom_control", "memory.events"];
        let text = files.into_iter().find_map(|name| fs::read_to_string(self.0.join(name)).ok()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.map_or(0, |count| count.trim().parse().unwrap())
    }

    fn peak_bytes(&self) -> Option<u64> {
        let files = ["memory.max_usage_in_bytes", "memory.peak"];
        let text = files.into_iter().find_map(|name| fs::read_to_string(self.0.join(name)).ok())?;
        text.trim().parse().ok()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last process of the group is gone a moment after it has been waited for.
        let begin = Instant::now();
        while fs::remove_dir(&self.0).is_err() && begin.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
