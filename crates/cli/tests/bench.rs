//! `overspill bench`: sweeps, what is kept of them, comparison, and what goes wrong.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{MIXTURE, STORIES, Temp, command, overspill};
use serde_json::Value;
use std::path::Path;

/// A sweep that is over soon.
fn bench(more: &[&str]) -> common::Ran {
    let mut args = vec!["bench"];
    args.extend(more);
    args.extend(["--device", "cpu", "--probe-seconds", "0.05", "--prompt-tokens", "3", "-n", "5"]);
    overspill(&args)
}

fn records(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn count(records: &[Value], kind: &str) -> usize {
    records.iter().filter(|record| record["record"] == kind).count()
}

#[test]
fn a_sweep_measures_every_combination_against_the_wires() {
    let temp = Temp::new();
    let (page, kept) = (temp.arg("page.html"), temp.join("kept.jsonl"));
    let sweep = [STORIES, "--ram", "40%,200%", "--evict", "lru,planned", "-r", "2", "-o", "json"];
    let more = ["--report", &page, "--save", kept.to_str().unwrap(), "--cold", "--warmup", "1"];
    let json = bench(&[&sweep[..], &more].concat()).ok().json();
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    for row in rows {
        assert_eq!(row["decode"]["values"].as_array().unwrap().len(), 2, "warm-ups are not counted");
        let number = |key: &str| row[key].as_f64().unwrap();
        let seconds = row["figures"]["decode_s"].as_f64().unwrap() / 4.0;
        assert!(number("compute_s") >= 0.0 && number("stall_s") >= 0.0 && seconds > 0.0);
        assert!(row["limit"]["seconds_per_token"].as_f64().unwrap() > 0.0);
        assert!(number("disk_busy_s") > 0.0 || row["point"]["ram"] == "200%", "{row}");
    }
    let read = |ram: &str, evict: &str| {
        let row = rows.iter().find(|row| row["point"]["ram"] == ram && row["point"]["evict"] == evict).unwrap();
        row["read_bytes_per_token"].as_f64().unwrap()
    };
    assert!(read("40%", "planned") < read("40%", "lru"), "a planned cycle reads less");
    assert!(read("200%", "lru") < read("40%", "planned"));
    let answers: Vec<&Value> = rows.iter().map(|row| &row["figures"]["answer"]).collect();
    assert!(answers.iter().all(|answer| answer == &answers[0]), "budgets do not change the answer");
    bench(&[STORIES, "--ram", "200%", "-r", "1", "--huge-pages", "off", "-o", "json"]).ok();
    let rehearsed = bench(&[STORIES, "--ram", "200%", "-r", "1", "--rehearse=2", "-o", "json"]).ok().json();
    let row = &rehearsed["rows"][0];
    assert_eq!((&row["point"]["rehearsed"], &row["figures"]["answer"]), (&Value::from(2), answers[0]));
    let records = records(&kept);
    assert_eq!((count(&records, "run"), count(&records, "ceiling"), count(&records, "model")), (8, 2, 1));
    let order: Vec<&Value> = records.iter().filter(|r| r["record"] == "run").map(|r| &r["point"]).collect();
    assert_eq!(order[3], order[4], "every other repetition goes backwards");
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.len() < 1_000_000 && page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    for part in ["Tokens a second", "The pipeline, one token", "read ahead", "All numbers", "What the wires gave"] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("http") && !page.contains("<script"));
}

#[test]
fn an_interrupted_sweep_goes_on_where_it_was() {
    let temp = Temp::new();
    let (kept, text) = (temp.join("kept.jsonl"), temp.arg("kept.jsonl"));
    let sweep = |more: &[&str]| bench(&[&[STORIES, "--ram", "50%,100%", "-r", "2"], more].concat());
    sweep(&["--save", &text]).ok();
    let whole = std::fs::read_to_string(&kept).unwrap();
    // Cut within the third run, as a crash in the middle of writing does.
    let third = whole.match_indices("{\"record\":\"run\"").nth(2).unwrap().0;
    std::fs::write(&kept, &whole[..third + 40]).unwrap();
    sweep(&["--save", &text]).refused(2, &["there are results already", "--resume"]);
    let table = sweep(&["--resume", &text]).ok().stdout;
    assert!(table.contains("50%") && table.contains("100%") && table.contains('±'), "{table}");
    let after = std::fs::read_to_string(&kept).unwrap();
    assert!(after.starts_with(&whole[..third]), "what was there stays");
    assert_eq!(count(&records(&kept), "run"), 4, "only what was missing was run");
    sweep(&["--resume", &text]).ok();
    assert_eq!(count(&records(&kept), "run"), 4, "nothing is missing any more");
    let other = bench(&[STORIES, "--resume", MIXTURE]);
    other.refused(1, &["--resume"]);
}

#[test]
fn a_regression_ends_with_1() {
    let temp = Temp::new();
    let kept = temp.arg("kept.jsonl");
    bench(&[STORIES, "--ram", "60%", "-r", "1", "--save", &kept]).ok();
    let same = bench(&[STORIES, "--ram", "60%", "-r", "1", "--baseline", &kept, "--threshold", "100%"]).ok();
    assert!(same.stdout.contains("change %"), "{}", same.stdout);
    // A baseline that was a thousand times as fast, on a machine with more cores.
    let faster: Vec<String> = records(Path::new(&kept))
        .into_iter()
        .map(|mut record| {
            if let Some(seconds) = record["figures"]["decode_s"].as_f64() {
                record["figures"]["decode_s"] = (seconds / 1000.0).into();
            }
            if record["record"] == "start" {
                record["machine"]["cores"] = 999.into();
            }
            record.to_string() + "\n"
        })
        .collect();
    std::fs::write(&kept, faster.concat()).unwrap();
    let slower = bench(&[STORIES, "--ram", "60%", "-r", "1", "--baseline", &kept]).calm();
    assert_eq!(slower.code, Some(1), "{}", slower.stderr);
    for words in ["slower than the baseline by more than 10 %", "another machine", "--threshold"] {
        assert!(slower.stderr.contains(words), "'{words}' is not in: {}", slower.stderr);
    }
    let other = bench(&[MIXTURE, "-r", "1", "--baseline", &kept]).ok();
    assert!(other.stderr.contains("another model"), "{}", other.stderr);
}

#[test]
fn what_cannot_run_does_not_keep_the_others_from_it() {
    let ran = bench(&[STORIES, "--ram", "1,100%", "-r", "1", "-o", "csv"]).ok();
    assert!(ran.stdout.contains("too small"), "a budget too small is an answer: {}", ran.stdout);
    assert_eq!(ran.stdout.lines().count(), 3, "{}", ran.stdout);
    let two = bench(&["nowhere", STORIES, "-r", "1", "-o", "md"]).calm();
    assert_eq!(two.code, Some(3), "{}", two.stderr);
    assert!(two.stderr.contains("left out") && two.stdout.starts_with('|'), "{}\n{}", two.stderr, two.stdout);
    bench(&["nowhere", "-r", "1"]).refused(3, &["nowhere"]);
    let all = bench(&[STORIES, "--ram", "1", "-r", "1"]).calm();
    assert_eq!(all.code, Some(4), "nothing ran at all: {}", all.stderr);
}

#[test]
fn sweeps_that_are_a_slip_are_asked_about() {
    bench(&[STORIES, "--ram", "1%..100%:0.05%"]).refused(2, &["1981 configurations", "--yes"]);
    bench(&[STORIES, "--ram", "1%..100%:0.05%", "--threads", "1..1000:1", "--yes"]).refused(2, &["take fewer"]);
    overspill(&["bench", STORIES, "--device", "cpu", "--prompt-tokens", "100000"]).refused(2, &["context"]);
    bench(&[STORIES, "--baseline", "nowhere"]).refused(1, &["--baseline nowhere"]);
    bench(&[STORIES, "--report", "nowhere/page.html"]).refused(1, &["--report nowhere/page.html"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_and_ends_the_sweep() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    let ran = bench(&[STORIES, "-r", "1", "--save", "/dev/full"]).calm();
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("/dev/full") && ran.stderr.contains("make room"), "{}", ran.stderr);
}

#[test]
fn json_lines_come_as_runs_end() {
    let ran = bench(&[STORIES, "-r", "2", "-o", "jsonl"]).ok();
    let lines: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(count(&lines, "run"), 2);
    let error = command(&["bench", "nowhere", "-o", "json"]).output().unwrap();
    let object: Value = serde_json::from_slice(&error.stdout).unwrap();
    assert_eq!(object["error"]["kind"], "not_found");
}
