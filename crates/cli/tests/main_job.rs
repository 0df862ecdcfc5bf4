//! The main job: the same answer under every budget, policy, reader and number of threads, and its report.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{MIXTURE, Ran, STORIES, Temp, command, overspill};
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::Stdio;
use std::time::{Duration, Instant};

fn story(more: &[&str]) -> Ran {
    let mut args = vec!["run", STORIES, "--device", "cpu", "--prompt", "Once upon a time,", "-n", "48"];
    args.extend(more);
    overspill(&args).ok()
}

#[test]
fn less_memory_gives_the_same_story() {
    let whole = story(&[]);
    assert!(whole.stdout.len() > 100, "{}", whole.stdout);
    assert!(whole.stdout.ends_with('\n') && whole.stdout.is_ascii(), "{}", whole.stdout);
    for line in [
        &["--ram", "40%"][..],
        &["--ram", "75%", "--evict", "lru"],
        &["--ram", "50%", "--evict", "next-use", "--prefetch", "off"],
        &["--ram", "30%", "--evict", "planned", "--threads", "1"],
        &["--ram", "1.2MB", "--io", "pread"],
        &["--ram", "50%", "--io", "mmap", "--threads", "2"],
    ] {
        assert_eq!(story(line).stdout, whole.stdout, "{line:?}");
    }
}

#[test]
fn less_memory_gives_the_same_logits_of_a_mixture() {
    let run = |more: &[&str]| {
        let mut args =
            vec!["run", MIXTURE, "--device", "cpu", "--prompt-ids", "0,5,9,300", "-n", "12", "--logits", "--json"];
        args.extend(more);
        overspill(&args).ok().json()
    };
    let whole = run(&[]);
    assert_eq!(whole["last_prompt_logits"].as_array().unwrap().len(), 1024);
    for line in [&["--ram", "60%"][..], &["--ram", "40%", "--evict", "lru", "--prefetch", "off"]] {
        let tight = run(line);
        assert_eq!(tight["tokens"], whole["tokens"], "{line:?}");
        assert_eq!(tight["last_prompt_logits"], whole["last_prompt_logits"], "{line:?}");
        assert!(tight["tiers"]["disk"]["read_bytes"].as_u64() > whole["tiers"]["disk"]["read_bytes"].as_u64());
    }
}

#[test]
fn the_seed_decides_and_temperature_zero_is_greedy() {
    let (a, b) = (story(&["--seed", "1"]), story(&["--seed", "1"]));
    assert_eq!(a.stdout, b.stdout);
    assert_ne!(a.stdout, story(&["--seed", "2"]).stdout);
    let greedy = story(&["--temperature", "0", "--seed", "1"]);
    assert_eq!(greedy.stdout, story(&["--temperature", "0", "--seed", "2"]).stdout);
    assert_eq!(greedy.stdout, story(&["--top-k", "1"]).stdout);
}

#[test]
fn a_model_s_own_sampling_is_the_default_of_text_prompts() {
    let model = common::copy_of(STORIES);
    let path = model.path().to_str().unwrap();
    let run = |more: &[&str]| {
        let mut args = vec!["run", path, "--device", "cpu", "-n", "24"];
        args.extend(more);
        overspill(&args)
    };
    let text = |more: &[&str]| run(&[&["--prompt", "Once upon a time,"][..], more].concat()).ok().stdout;
    let ids = || run(&["--prompt-ids", "1,2,3"]).ok().stdout;
    let (before, greedy, of_ids) = (text(&[]), text(&["--temperature", "0"]), ids());
    assert_ne!(before, greedy);
    let set = |to: &str| {
        let file = model.join("generation_config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        let to: Value = serde_json::from_str(to).unwrap();
        config.as_object_mut().unwrap().extend(to.as_object().unwrap().clone());
        std::fs::write(&file, config.to_string()).unwrap();
    };
    set(r#"{"do_sample": true, "temperature": 3.0, "top_k": 0, "top_p": 1.0}"#);
    let hot = text(&[]);
    assert!(hot != before && hot != greedy);
    assert_eq!(text(&["--temperature", "0.8", "--top-k", "40", "--top-p", "0.95"]), before, "the command line wins");
    assert_eq!(ids(), of_ids, "ids stay greedy");
    set(r#"{"temperature": 1.0, "top_k": 1}"#);
    assert_eq!(text(&[]), greedy);
    set(r#"{"temperature": "warm"}"#);
    run(&["--prompt", "Once"]).refused(3, &["generation_config.json", "temperature", "warm"]);
    assert_eq!(ids(), of_ids, "what is not asked for is no obstacle");
}

#[test]
fn the_report_has_the_contracts_fields() {
    let json = story(&["--ram", "40%", "--json", "--logits"]).json();
    let number = |path: &str| {
        let found = path.split('.').fold(&json, |value, key| &value[key]);
        found.as_f64().unwrap_or_else(|| panic!("{path} is no number: {found}"))
    };
    for path in [
        "model.parameters",
        "model.bytes",
        "model.blocks",
        "prompt_tokens",
        "time_s.open",
        "time_s.first_token",
        "time_s.prefill",
        "time_s.decode",
        "tokens_per_s.prefill",
        "tokens_per_s.decode",
        "tiers.host.budget_bytes",
        "tiers.host.peak_bytes",
        "tiers.host.hits",
        "tiers.host.misses",
        "tiers.host.evictions",
        "tiers.disk.read_bytes",
        "tiers.disk.reads",
        "tiers.disk.padding_bytes",
        "stall_s",
        "decode_read_bytes",
        "touched_bytes_per_token",
        "in_flight_bytes",
        "limit.seconds_per_token",
        "limit.ratio",
    ] {
        assert!(number(path) >= 0.0, "{path}");
    }
    for (key, value) in [("evict", "planned"), ("prefetch", "auto")] {
        assert_eq!(json[key], value);
    }
    assert_eq!(json["model"]["architecture"], "llama");
    assert_eq!(json["device"]["kind"], "cpu");
    assert!(["uring", "pread"].contains(&json["io"].as_str().unwrap()));
    assert!(["disk", "bus", "compute"].contains(&json["limit"]["bound_by"].as_str().unwrap()));
    let tokens = json["tokens"].as_array().unwrap();
    assert!(!tokens.is_empty() && tokens.len() <= 48);
    assert_eq!(json["last_prompt_logits"].as_array().unwrap().len(), 1024);
    // The figures hang together.
    let bytes = number("model.bytes");
    assert_eq!(number("tiers.host.budget_bytes"), (bytes * 0.4).ceil());
    assert!(number("tiers.host.peak_bytes") <= number("tiers.host.budget_bytes"));
    assert!(number("tiers.disk.read_bytes") >= number("decode_read_bytes") + bytes * 0.5);
    assert!(number("tiers.host.evictions") > 0.0 && number("tiers.host.misses") > 0.0);
    // Of a dense model with tied embeddings a token touches everything, and one row more.
    assert_eq!(number("touched_bytes_per_token"), bytes + 256.0);
    assert!(number("time_s.first_token") >= number("time_s.prefill"));
    // The text is what the plain run prints.
    let plain = story(&[]).stdout;
    assert_eq!(json["text"].as_str().unwrap().trim_end_matches('\n'), plain.trim_end_matches('\n'));
    assert!(story(&["--json"]).json().get("last_prompt_logits").is_none());
}

#[test]
fn what_memory_holds_is_read_once() {
    let json = story(&["--json"]).json();
    let (bytes, read) =
        (json["model"]["bytes"].as_u64().unwrap(), json["tiers"]["disk"]["read_bytes"].as_u64().unwrap());
    let padding = json["tiers"]["disk"]["padding_bytes"].as_u64().unwrap();
    assert!(read - padding <= bytes + (1 << 20), "{read} {padding} {bytes}");
    assert_eq!(json["tiers"]["host"]["evictions"], 0);
    // Rows of the embeddings are gathered as tokens come, and nothing else is read any more.
    assert!(json["decode_read_bytes"].as_u64().unwrap() <= 48 * 8192, "{}", json["decode_read_bytes"]);
}

#[test]
fn the_closing_line_says_how_it_went() {
    let ran = story(&["--ram", "40%"]);
    for word in ["tokens/s", "host", "% hits", "disk", "read", "stalled", "limit", "planned"] {
        assert!(ran.stderr.contains(word), "'{word}' is not in: {}", ran.stderr);
    }
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    assert!(!ran.stderr.contains('\x1b'), "no colour but on a terminal");
}

#[test]
fn a_prompt_comes_from_standard_input_too() {
    let mut child = command(&["run", STORIES, "--device", "cpu", "-n", "48"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Once upon a time,\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), story(&[]).stdout);
}

#[test]
fn the_stop_token_and_the_context_end_a_text() {
    let json = story(&["--ctx", "12", "--json"]).json();
    assert_eq!(json["ended"], "context");
    assert!(json["prompt_tokens"].as_u64().unwrap() + json["tokens"].as_array().unwrap().len() as u64 <= 13);
    let json = story(&["-n", "1", "--json"]);
    assert_eq!(json.json()["ended"], "length");
    assert_eq!(json.json()["limit"], Value::Null, "no token was decoded");
    let nothing = story(&["-n", "0"]);
    assert_eq!(nothing.stdout, "");
}

#[test]
fn nobody_reading_is_no_failure() {
    for args in [
        &["run", STORIES, "--device", "cpu", "--prompt", "Once", "-n", "400"][..],
        &["inspect", MIXTURE, "--tensors"],
        &["completions", "zsh"],
    ] {
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut some = [0; 1];
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut some).unwrap();
        drop(stdout);
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{args:?}: {stderr}");
        assert!(!stderr.contains("panicked") && !stderr.contains("error"), "{args:?}: {stderr}");
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_130_and_what_was_generated() {
    let temp = Temp::new();
    let model = common::slow_model(&temp);
    let args = ["run", &model, "--device", "cpu", "--prompt-ids", "1,2,3", "-n", "500", "--ram", "20%"];
    let mut child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut first = Vec::new();
    stdout.read_until(b',', &mut first).unwrap();
    common::interrupt(&child);
    let begin = Instant::now();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(begin.elapsed() < Duration::from_secs(20), "it stops soon");
    assert!(rest.ends_with('\n'), "the line is ended: {rest}");
    let tokens = format!("{}{rest}", String::from_utf8(first).unwrap());
    let ids: Vec<u32> = tokens.trim().split(',').map(|id| id.parse().unwrap()).collect();
    let count = ids.len();
    assert!(count < 500, "it was interrupted");
    assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"));
}
