//! Watching a run: its trace, its metrics, and `overspill top`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{MIXTURE, STORIES, Temp, command, finish, overspill};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

fn trace(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let whole: Value = serde_json::from_str(&text).unwrap();
    assert!(whole["otherData"]["blocks"].as_u64().unwrap() > 0);
    whole["traceEvents"].as_array().unwrap().clone()
}

fn of<'a>(events: &'a [Value], category: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["cat"] == category).collect()
}

#[test]
fn a_trace_has_a_row_for_everything_that_happens() {
    let temp = Temp::new();
    let path = temp.join("trace.json");
    let args = ["run", STORIES, "--device", "cpu", "--prompt", "Once", "-n", "24", "--ram", "40%", "--json", "--trace"];
    let json = overspill(&[&args[..], &[path.to_str().unwrap()]].concat()).ok().json();
    let events = trace(&path);
    for category in ["compute", "stall", "disk", "evict"] {
        assert!(!of(&events, category).is_empty(), "no {category}");
    }
    let evictions = json["tiers"]["host"]["evictions"].as_u64().unwrap();
    assert!(of(&events, "evict").len() as u64 <= evictions);
    let names: BTreeSet<&str> = of(&events, "compute").iter().map(|event| event["name"].as_str().unwrap()).collect();
    assert!(names.iter().any(|name| name.contains("layers.0.")), "steps have their tensors' names: {names:?}");
    // What happens on one row happens one after the other.
    let mut rows: std::collections::BTreeMap<u64, Vec<(f64, f64)>> = Default::default();
    for event in events.iter().filter(|event| event["ph"] == "X") {
        let (start, length) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
        assert!(length >= 0.0);
        rows.entry(event["tid"].as_u64().unwrap()).or_default().push((start, start + length));
    }
    for (row, spans) in &mut rows {
        spans.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0 + 1e-3), "row {row} overlaps");
    }
    let named: BTreeSet<u64> =
        events.iter().filter(|e| e["name"] == "thread_name").map(|e| e["tid"].as_u64().unwrap()).collect();
    assert!(rows.keys().all(|row| named.contains(row)), "every row has a name");
    let read: u64 = of(&events, "disk").iter().map(|event| event["args"]["bytes"].as_u64().unwrap()).sum();
    let (counted, fixed) =
        (json["tiers"]["disk"]["read_bytes"].as_u64().unwrap(), json["model"]["bytes"].as_u64().unwrap());
    assert!(read <= counted && read + fixed > counted, "{read} in the trace, {counted} counted");
}

#[test]
fn a_mixture_s_experts_are_in_the_trace() {
    let temp = Temp::new();
    let path = temp.join("trace.json");
    let args = ["run", MIXTURE, "--device", "cpu", "--prompt-ids", "1,2,3", "-n", "8", "--ram", "60%", "--trace"];
    overspill(&[&args[..], &[path.to_str().unwrap()]].concat()).ok();
    let events = trace(&path);
    assert!(of(&events, "compute").iter().any(|event| event["name"].as_str().unwrap().contains("experts")));
}

/// A run that does not end by itself soon.
#[cfg(unix)]
fn long_run(temp: &Temp, more: &[&str]) -> Child {
    let (model, config) = (temp.arg("model"), temp.arg("config.json"));
    let text = std::fs::read_to_string(common::root().join(STORIES).join("config.json")).unwrap();
    let text =
        text.replace("\"hidden_size\": 128", "\"hidden_size\": 512").replace("\"head_dim\": 32", "\"head_dim\": 128");
    std::fs::write(&config, text.replace("\"intermediate_size\": 384", "\"intermediate_size\": 4096")).unwrap();
    overspill(&["synth", "--config", &config, "--dtype", "f32", "-o", &model, "--force"]).ok();
    again(temp, more)
}

/// Another of the same model.
#[cfg(unix)]
fn again(temp: &Temp, more: &[&str]) -> Child {
    let model = temp.arg("model");
    let args = ["run", &model, "--device", "cpu", "--prompt-ids", "1,2,3", "-n", "500", "--ram", "30%"];
    let mut command = command(&[&args[..], more].concat());
    command.env("XDG_RUNTIME_DIR", temp.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits for something to come true, for as long as a busy machine may take.
#[cfg(unix)]
fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(120), "it never came");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(unix)]
#[test]
fn a_killed_run_leaves_a_whole_trace_and_metrics() {
    let temp = Temp::new();
    let (trace_path, metrics) = (temp.join("trace.json"), temp.join("metrics.prom"));
    let more = ["--trace", trace_path.to_str().unwrap(), "--metrics", metrics.to_str().unwrap()];
    let mut child = long_run(&temp, &more);
    let page = until(|| {
        let page = std::fs::read_to_string(&metrics).unwrap_or_default();
        (page.contains("overspill_tokens_total") && !page.contains("overspill_tokens_total 0")).then_some(page)
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!of(&trace(&trace_path), "compute").is_empty());
    for name in ["overspill_tier_hits_total{tier=\"host\"}", "overspill_wire_bytes_total{wire=\"disk\"}"] {
        let line = page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {page}"));
        assert!(line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() > 0.0, "{line}");
    }
}

#[cfg(unix)]
#[test]
fn top_finds_a_run_and_sees_what_is_where() {
    use std::os::unix::fs::PermissionsExt as _;
    let temp = Temp::new();
    let look = |target: &[&str]| {
        let args = [&["top"][..], target, &["--json"]].concat();
        finish(command(&args).env("XDG_RUNTIME_DIR", temp.path()))
    };
    assert_eq!(look(&[]).code, Some(2), "nothing is going on yet");
    let mut child = long_run(&temp, &[]);
    let pid = child.id().to_string();
    let status = until(|| {
        let ran = look(&[&pid]).calm();
        (ran.code == Some(0)).then(|| ran.json()).filter(|status| status["tokens"].as_u64().unwrap() > 0)
    });
    assert_eq!(look(&[]).json()["pid"], status["pid"], "without a target, the latest run");
    let file = temp.join("overspill").join(format!("{pid}.json"));
    for (path, mode) in [(file.parent().unwrap(), 0o700), (&file, 0o600)] {
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, mode, "{}", path.display());
    }
    let host = &status["tiers"][0];
    assert!(host["used_bytes"].as_u64().unwrap() <= host["budget_bytes"].as_u64().unwrap());
    let layers = status["layers"].as_array().unwrap();
    let (blocks, resident) = layers.iter().fold((0, 0), |(blocks, resident), layer| {
        (blocks + layer["blocks"].as_u64().unwrap(), resident + layer["resident"][0].as_u64().unwrap())
    });
    assert!(resident > 0 && resident < blocks, "{resident} of {blocks}: the budget is 30 %");
    let interrupted = std::process::Command::new("kill").args(["-s", "INT", &pid]).status().unwrap();
    assert!(interrupted.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!file.exists(), "a run that has ended leaves nothing behind");
    let gone = look(&[&pid]).calm();
    assert_eq!(gone.code, Some(2));
    assert!(gone.json()["error"]["message"].as_str().unwrap().contains("no run that can be watched"));
}

#[cfg(unix)]
#[test]
fn top_tells_the_living_from_the_dead() {
    let temp = Temp::new();
    let look = |target: &[&str]| {
        let args = [&["top"][..], target, &["--json"]].concat();
        finish(command(&args).env("XDG_RUNTIME_DIR", temp.path())).calm()
    };
    let mut runs = [long_run(&temp, &[]), again(&temp, &["--threads", "1"])];
    let pids = [runs[0].id().to_string(), runs[1].id().to_string()];
    for pid in &pids {
        until(|| (look(&[pid]).code == Some(0)).then_some(()));
    }
    assert_ne!(look(&[&pids[0]]).json()["pid"], look(&[&pids[1]]).json()["pid"]);
    // What is killed takes nothing away, and is not shown all the same.
    runs[1].kill().unwrap();
    runs[1].wait().unwrap();
    assert!(temp.join("overspill").join(format!("{}.json", pids[1])).exists());
    let gone = look(&[&pids[1]]);
    assert_eq!(gone.code, Some(2));
    assert!(gone.json()["error"]["message"].as_str().unwrap().contains(&format!("going on: {} ", pids[0])));
    assert_eq!(look(&[]).json()["pid"].as_u64().unwrap().to_string(), pids[0], "the latest that lives");
    runs[0].kill().unwrap();
    runs[0].wait().unwrap();
    assert_eq!(look(&[]).code, Some(2));
    // A process that is no run is waited for a moment, then told.
    assert_eq!(look(&[&std::process::id().to_string()]).code, Some(2));
}

#[test]
fn what_the_library_tells_is_shown_when_it_is_asked_for() {
    let args = ["run", STORIES, "--device", "cpu", "--prompt-ids", "0,5,9", "-n", "4", "--ram", "30%"];
    let run = |more: &[&str], variable: &str| {
        finish(command(&[&args[..], more].concat()).env("OVERSPILL_LOG", variable)).calm()
    };
    let quiet = run(&[], "");
    assert_eq!(quiet.stderr.trim_end().lines().count(), 1, "the closing line alone: {}", quiet.stderr);
    let info = run(&["--log", "info"], "nonsense");
    for words in ["INFO open{", "budget_bytes=", "tier=\"host\""] {
        assert!(info.stderr.contains(words), "'{words}' is not in:\n{}", info.stderr);
    }
    assert!(!info.stderr.contains("wait{"));
    let debug = run(&[], "debug");
    assert!(debug.stderr.contains("wait{") && debug.stderr.contains("reserve{"), "{}", debug.stderr);
    let trace = run(&["--log", "trace"], "");
    assert!(trace.stderr.contains("step{sequence=") && trace.stderr.contains("evicted"), "{}", trace.stderr);
    for told in [&info, &debug, &trace] {
        assert_eq!((told.code, &told.stdout), (Some(0), &quiet.stdout), "what is told changes nothing");
    }
    run(&[], "loud").refused(2, &["OVERSPILL_LOG=loud", "debug"]);
}

#[test]
fn files_that_cannot_be_written_are_told_before_anything_is_done() {
    let run =
        |option: &str| overspill(&["run", STORIES, "--device", "cpu", "--prompt-ids", "1", option, "nowhere/file"]);
    run("--trace").refused(1, &["--trace nowhere/file", "name a file"]);
    run("--metrics").refused(1, &["--metrics nowhere/file", "name a file"]);
    overspill(&["top", "nowhere"]).refused(2, &["standard output is none"]);
}
