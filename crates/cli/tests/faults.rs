//! Faults under a running `overspill run`: the model's file goes or changes, the limit on memory sinks, others use the
//! same file, Ctrl-C is pressed twice. What a system does not offer (io_uring, control groups) is reported as ignored.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::group::Group;
use common::{Ran, STORIES, Temp, command, copy_of, overspill, slow_model, trial};
use libtest_mimic::Arguments;
use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

const IO: [&str; 3] = ["uring", "pread", "mmap"];
/// Longer than any of this takes. What ends only then hangs.
const HANG: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// What the group may have at first, and in the end: less than the model either way.
const GROUP_BYTES: u64 = 168 * MIB;
const GROUP_BYTES_LAST: u64 = 112 * MIB;
/// How much is taken at once: less than a run leaves free, the first time too, when its own pages have taken their share.
const GROUP_STEP: u64 = 2 * MIB;

fn main() {
    let model = Arc::<Model>::default();
    let mut trials = Vec::new();
    for io in IO {
        let works = overspill(&["run", STORIES, "--device", "cpu", "--prompt-ids", "1", "-n", "1", "--io", io]);
        let ignored = works.code != Some(0);
        for (name, test) in [("truncated", truncated as fn(&Model, &str)), ("replaced", replaced)] {
            let model = Arc::clone(&model);
            let name = format!("a_{name}_file_ends_a_run_with_3_and_a_whole_line_{io}");
            trials.push(trial(&name, ignored, move || test(&model, io)));
        }
    }
    let group = Group::new("faults", GROUP_BYTES);
    let of_group = Arc::clone(&model);
    trials.push(trial("a_limit_that_sinks_under_a_run_is_obeyed", group.is_none(), move || {
        limit_sinks(&of_group, &group.unwrap());
    }));
    trials.push(trial("two_processes_on_one_file_have_budgets_of_their_own", false, two_processes));
    let of_keys = Arc::clone(&model);
    trials.push(trial("the_second_ctrl_c_ends_the_process_at_once", cfg!(not(unix)), move || second_ctrl_c(&of_keys)));
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    // To exit is not to drop: the model would stay on the disk.
    drop(model);
    conclusion.exit();
}

/// The large model, made when it is first needed.
struct Model {
    directory: Temp,
    path: OnceLock<String>,
}

impl Default for Model {
    fn default() -> Self {
        Self { directory: Temp::new(), path: OnceLock::new() }
    }
}

impl Model {
    fn path(&self) -> &str {
        self.path.get_or_init(|| slow_model(&self.directory))
    }
}

const WEIGHTS: &str = "model.safetensors";

/// A run in its middle.
struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
    so_far: Vec<u8>,
}

impl Running {
    /// Starts it and waits for its first token.
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut so_far = Vec::new();
        stdout.read_until(b',', &mut so_far).unwrap();
        Self { child, stdout, so_far }
    }

    /// Waits for its end.
    fn finish(mut self) -> Ran {
        self.stdout.read_to_end(&mut self.so_far).unwrap();
        let output = self.child.wait_with_output().unwrap();
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8(self.so_far).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

fn args<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["run", model, "--device", "cpu", "--prompt-ids", "1,2,3", "-n", "500"];
    args.extend(more);
    args
}

/// It ended as a run ends whose file is bad: what came is a whole line, and one error says what is wrong.
fn ended_as_bad_file(ran: Ran, says: &[&str]) {
    let ran = ran.calm();
    assert_eq!(ran.code, Some(3), "{}\n{}", ran.stdout, ran.stderr);
    let ids = ran.stdout.strip_suffix('\n').expect("the line is ended").split(',');
    let ids: Vec<u32> = ids.map(|id| id.parse().unwrap()).collect();
    let count = ids.len();
    assert!((1..500).contains(&count), "{count} tokens");
    let errors: Vec<_> = ran.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{}", ran.stderr);
    for word in [&[WEIGHTS, "open the model again"][..], says].concat() {
        assert!(errors[0].contains(word), "'{word}' is not in: {}", ran.stderr);
    }
}

fn truncated(model: &Model, io: &str) {
    let copy = Temp::new();
    for entry in std::fs::read_dir(model.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let running = Running::start(&mut command(&args(copy.path().to_str().unwrap(), &["--ram", "25%", "--io", io])));
    let file = OpenOptions::new().write(true).open(copy.join(WEIGHTS)).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    ended_as_bad_file(running.finish(), &[]);
}

/// Another file takes the name; the one that is read keeps its bytes, but it is no longer what the user named.
fn replaced(model: &Model, io: &str) {
    let links = Temp::new();
    for entry in std::fs::read_dir(model.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::hard_link(entry.path(), links.path().join(entry.file_name())).unwrap();
    }
    let running = Running::start(&mut command(&args(links.path().to_str().unwrap(), &["--ram", "25%", "--io", io])));
    std::fs::copy(Path::new(model.path()).join("config.json"), links.join("other")).unwrap();
    std::fs::rename(links.join("other"), links.join(WEIGHTS)).unwrap();
    ended_as_bad_file(running.finish(), &["another file has taken this name"]);
}

fn limit_sinks(model: &Model, group: &Group) {
    let mut running = Running::start(&mut group.command(&args(model.path(), &[])));
    let (mut limit, begin) = (GROUP_BYTES, Instant::now());
    while limit > GROUP_BYTES_LAST && begin.elapsed() < HANG && running.child.try_wait().unwrap().is_none() {
        // The first version of the interface refuses until the run has given back enough.
        if group.limit(limit - GROUP_STEP).is_ok() {
            limit -= GROUP_STEP;
        }
        std::thread::sleep(Duration::from_millis(120));
    }
    let alive = running.child.try_wait().unwrap().is_none();
    if alive {
        common::interrupt(&running.child);
    }
    let ran = running.finish().calm();
    assert_eq!((limit, group.oom_kills()), (GROUP_BYTES_LAST, 0), "alive: {alive}\n{}", ran.stderr);
    assert!(ran.stderr.contains("the limit on memory has sunk to"), "{}", ran.stderr);
    if alive {
        assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    }
    let count = ran.stdout.split(',').count();
    let count = count.to_string();
    let plain = overspill(&["run", model.path(), "--device", "cpu", "--prompt-ids", "1,2,3", "-n", &count]).ok();
    assert_eq!(ran.stdout, plain.stdout, "less memory makes it slower, never different");
}

fn two_processes() {
    let copy = copy_of(STORIES);
    let model = copy.path().to_str().unwrap();
    let run = |ram: &'static str| {
        let mut args = args(model, &["--json", "--ram", ram]);
        args[7] = "120";
        command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let runs = [run("150%"), run("30%")].map(|child| child.wait_with_output().unwrap());
    let [whole, tight] = runs.map(|output| {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    });
    assert_eq!(whole["tokens"], tight["tokens"]);
    let host = |json: &serde_json::Value, key: &str| json["tiers"]["host"][key].as_u64().unwrap();
    let bytes = whole["model"]["bytes"].as_u64().unwrap() as f64;
    for (json, share) in [(&whole, 1.5), (&tight, 0.3)] {
        assert_eq!(host(json, "budget_bytes"), (bytes * share).ceil() as u64);
        assert!(host(json, "peak_bytes") <= host(json, "budget_bytes"), "{json}");
    }
    assert_eq!(host(&whole, "evictions"), 0);
    assert!(host(&tight, "evictions") > 0);
}

/// The first Ctrl-C asks the run to end in good order, which it cannot while nobody takes its output; the second does
/// not ask.
fn second_ctrl_c(model: &Model) {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = command(&args(model.path(), &["--ram", "25%"]));
    let mut child = command.stdout(writer.try_clone().unwrap()).stderr(Stdio::piped()).spawn().unwrap();
    drop(command);
    let mut reader = BufReader::with_capacity(1, reader);
    reader.read_until(b',', &mut Vec::new()).unwrap();
    // From here on nobody reads, and the pipe is full.
    let filler = std::thread::spawn(move || {
        let mut writer = writer;
        while writer.write_all(&[b'x'; 4096]).is_ok() {}
    });
    std::thread::sleep(Duration::from_millis(300));
    common::interrupt(&child);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(child.try_wait().unwrap(), None, "the first only asks");
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if begin.elapsed() > HANG {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        common::interrupt(&child);
        std::thread::sleep(Duration::from_millis(200));
    };
    drop(reader);
    filler.join().unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(status.and_then(|status| status.code()), Some(130), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}
