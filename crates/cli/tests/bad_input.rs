//! Bad input: one clear error, the contract's exit code, no panic, no output before it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{STORIES, Temp, command, copy_of, edit, finish, overspill, root};
use serde_json::Value;
use std::io::Write as _;
use std::process::Stdio;

/// `run` on a model, greedy, on the CPU.
fn run(model: &str, more: &[&str]) -> common::Ran {
    let mut args = vec!["run", model, "--device", "cpu", "--prompt-ids", "1,2,3", "-n", "2"];
    args.extend(more);
    overspill(&args)
}

#[test]
fn hostile_files_are_refused_by_every_command_that_opens_models() {
    let expected = std::fs::read_to_string(root().join("fixtures/hostile/expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let mut tried = 0;
    for (name, says) in expected.as_object().unwrap() {
        let path = format!("fixtures/hostile/{name}");
        let says: Vec<&str> = says.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
        run(&path, &[]).refused(3, &says);
        overspill(&["inspect", &path]).refused(3, &says);
        tried += 1;
    }
    assert!(tried >= 10, "{tried}");
}

#[test]
fn a_truncated_model_names_the_tensor_that_is_cut() {
    let model = copy_of(STORIES);
    let file = std::fs::OpenOptions::new().write(true).open(model.join("model.safetensors")).unwrap();
    file.set_len(2_000_000).unwrap();
    run(model.path().to_str().unwrap(), &[]).refused(3, &["model.safetensors", "truncated"]);
}

#[test]
fn an_unknown_architecture_is_named() {
    let model = copy_of(STORIES);
    edit(&model.join("config.json"), |text| {
        text.replace("\"LlamaForCausalLM\"", "\"TapeworkForCausalLM\"").replace("\"llama\"", "\"tapework\"")
    });
    let model = model.path().to_str().unwrap();
    run(model, &[]).refused(3, &["config.json", "apework"]);
    // It can still be looked at.
    overspill(&["inspect", model]).ok();
}

#[test]
fn a_configuration_that_contradicts_the_tensors_is_refused() {
    let model = copy_of(STORIES);
    edit(&model.join("config.json"), |text| text.replace("\"hidden_size\": 128", "\"hidden_size\": 192"));
    run(model.path().to_str().unwrap(), &[]).refused(3, &["tensor"]);
    let model = copy_of(STORIES);
    edit(&model.join("config.json"), |text| text.replace("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 7"));
    run(model.path().to_str().unwrap(), &[]).refused(3, &["tensor", "layers.6"]);
}

#[test]
fn no_number_in_the_configuration_is_refused() {
    let model = copy_of(STORIES);
    edit(&model.join("config.json"), |text| text.replace("1e-05", "NaN"));
    run(model.path().to_str().unwrap(), &[]).refused(3, &["config.json"]);
}

#[test]
fn a_path_with_nothing_or_the_wrong_thing_is_refused() {
    run("fixtures/nowhere", &[]).refused(3, &["fixtures/nowhere", "check the path"]);
    run("fixtures", &[]).refused(3, &["config.json"]);
    run("README.md", &[]).refused(3, &["README.md", "GGUF"]);
    let temp = Temp::new();
    std::fs::create_dir(temp.join("model.gguf")).unwrap();
    run(&temp.arg("model.gguf"), &[]).refused(3, &["model.gguf", "directory"]);
}

#[test]
fn without_a_tokenizer_ids_still_work_and_text_does_not() {
    let model = copy_of(STORIES);
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    let path = model.path().to_str().unwrap();
    overspill(&["run", path, "--device", "cpu", "--prompt", "a"]).refused(3, &["tokenizer", "--prompt-ids"]);
    let ids = run(path, &[]).ok();
    let numbers: Vec<u32> = ids.stdout.trim().split(',').map(|id| id.parse().unwrap()).collect();
    assert_eq!(numbers.len(), 2);
    let json = run(path, &["--json"]).ok().json();
    assert_eq!(json["tokens"], serde_json::json!(numbers));
    assert_eq!(json["text"], Value::Null);
}

#[test]
fn a_damaged_tokenizer_is_refused_for_text() {
    let model = copy_of(STORIES);
    std::fs::write(model.join("tokenizer.json"), "{\"model\": 3").unwrap();
    let path = model.path().to_str().unwrap();
    overspill(&["run", path, "--device", "cpu", "--prompt", "a"]).refused(3, &["tokenizer.json"]);
}

#[test]
fn a_budget_too_small_says_the_smallest_that_works_and_that_works() {
    let refused = run(STORIES, &["--ram", "1KiB"]).refused(4, &["--ram", "smallest"]);
    let number = refused.stderr.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).next_back().unwrap();
    let json = run(STORIES, &["--ram", "1KiB", "--json"]);
    assert_eq!(json.code, Some(4));
    let json = json.json();
    assert_eq!(json["error"]["kind"], "too_small");
    let smallest = json["error"]["smallest_budget_bytes"].as_u64().unwrap();
    assert!(refused.stderr.contains(&smallest.to_string()) && number >= 1024, "{}", refused.stderr);
    let tight = run(STORIES, &["--ram", &smallest.to_string()]).ok();
    assert_eq!(tight.stdout, run(STORIES, &[]).ok().stdout, "the same answer");
    // And less is not enough by far.
    run(STORIES, &["--ram", &(smallest / 4).to_string()]).refused(4, &["--ram"]);
}

#[test]
fn a_cache_too_small_says_the_smallest_that_works_and_that_works() {
    let json = run(STORIES, &["--kv", "1KiB", "--json"]);
    assert_eq!(json.code, Some(4), "{}", json.stderr);
    let smallest = json.json()["error"]["smallest_budget_bytes"].as_u64().unwrap();
    run(STORIES, &["--kv", &smallest.to_string()]).ok();
}

#[test]
fn a_prompt_longer_than_the_context_is_refused() {
    let ids = vec!["1"; 513].join(",");
    let args = ["run", STORIES, "--device", "cpu", "--prompt-ids", &ids];
    overspill(&args).refused(2, &["513", "context of 512"]);
    run(STORIES, &["--ctx", "2"]).refused(2, &["3 tokens", "context of 2", "--ctx"]);
    run(STORIES, &["--ctx", "513"]).refused(2, &["--ctx 513", "512"]);
}

#[test]
fn a_token_beyond_the_vocabulary_is_refused() {
    let args = ["run", STORIES, "--device", "cpu", "--prompt-ids", "1,1024"];
    overspill(&args).refused(2, &["--prompt-ids", "1024", "1023"]);
    overspill(&["run", STORIES, "--device", "cpu", "--prompt-ids", "4294967295"]).refused(2, &["vocabulary"]);
}

#[test]
fn a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu() {
    let without = |args: &[&str]| {
        let mut command = command(args);
        // The Vulkan loader finds no driver then.
        command.env("VK_DRIVER_FILES", "/nonexistent.json").env("VK_ICD_FILENAMES", "/nonexistent.json");
        finish(&mut command)
    };
    let base = ["run", STORIES, "--prompt-ids", "1,2,3", "-n", "2"];
    let with = |more: &[&'static str]| [&base[..], more].concat();
    without(&with(&["--vram", "1MiB"])).refused(2, &["--vram"]);
    without(&with(&["--device", "gpu"])).refused(2, &["--device gpu"]);
    without(&with(&["--adapter", "no such adapter"])).refused(2, &["--adapter", "no such adapter"]);
    let json = without(&with(&["--json"])).ok().json();
    assert_eq!(json["device"]["kind"], "cpu");
    overspill(&with(&["--device", "cpu", "--vram", "1MiB"])).refused(2, &["--vram", "--device cpu"]);
}

#[test]
fn a_missing_prompt_is_refused() {
    let run = ["run", STORIES, "--device", "cpu"];
    overspill(&run).refused(2, &["prompt", "standard input is empty"]);
    overspill(&[&run[..], &["--prompt", ""]].concat()).calm();
    let mut child = command(&run);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\xff\xfe\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("UTF-8"));
    assert!(output.stdout.is_empty());
}

#[test]
fn settings_that_make_no_sense_are_usage_errors_also_as_json() {
    for (option, value) in
        [("--ram", "lots"), ("--ram", "1XB"), ("--temperature", "-1"), ("--evict", "fifo"), ("--io", "tape")]
    {
        let ran = run(STORIES, &[option, value, "--json"]);
        assert_eq!(ran.code, Some(2), "{option} {value}");
        assert_eq!(ran.json()["error"]["kind"], "usage", "{option} {value}");
        let ran = run(STORIES, &[option, value]).calm();
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
        assert!(ran.stderr.contains(option) && ran.stderr.contains(value), "{}", ran.stderr);
    }
    assert_eq!(overspill(&[]).calm().code, Some(2));
    assert_eq!(overspill(&["frobnicate", "--json"]).json()["error"]["kind"], "usage");
}

#[test]
fn a_trace_that_cannot_be_written_is_an_error_before_any_output() {
    run(STORIES, &["--trace", "/nonexistent/trace"]).refused(1, &["--trace", "/nonexistent/trace"]);
}

#[test]
fn errors_as_json_are_one_object_with_the_same_exit_code() {
    let ran = run("fixtures/hostile/truncated", &["--json"]);
    assert_eq!(ran.code, Some(3));
    let error = &ran.json()["error"];
    assert_eq!(error["kind"], "bad_file");
    assert!(ran.stderr.contains(error["message"].as_str().unwrap()));
    let ran = overspill(&["inspect", "fixtures/nowhere", "--json"]);
    assert_eq!((ran.code, ran.json()["error"]["kind"].as_str()), (Some(3), Some("not_found")));
}
