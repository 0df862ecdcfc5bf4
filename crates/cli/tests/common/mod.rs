//! Runs the real program, and makes models to run it on.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "tests")]

pub mod group;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// What became of a run.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// The one object on standard output.
    pub fn json(&self) -> Value {
        assert_eq!(self.stdout.trim_end().lines().count(), 1, "one line of JSON: {}\n{}", self.stdout, self.stderr);
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// It worked.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.stdout, self.stderr);
        self.calm()
    }

    /// Nothing panicked.
    pub fn calm(self) -> Self {
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// It was refused: this exit code, one error on standard error that says all of this, and nothing else anywhere.
    pub fn refused(self, code: i32, says: &[&str]) -> Self {
        let ran = self.calm();
        assert_eq!(ran.code, Some(code), "{}\n{}", ran.stdout, ran.stderr);
        assert_eq!(ran.stdout, "", "no output before an error");
        assert!(ran.stderr.starts_with("error: "), "{}", ran.stderr);
        assert_eq!(ran.stderr.trim_end().lines().count(), 1, "one clear error: {}", ran.stderr);
        for word in says {
            assert!(ran.stderr.contains(word), "'{word}' is not in: {}", ran.stderr);
        }
        ran
    }
}

/// The program with these arguments: no standard input, no environment that changes what it does.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_overspill"));
    command.args(args).stdin(Stdio::null()).current_dir(root()).env("NODEVICE_SELECT", "1");
    // What is remembered of this machine's disks is no business of tests.
    command.env("XDG_CACHE_HOME", std::env::temp_dir().join(format!("overspill-cache-{}", std::process::id())));
    command
}

/// Runs it to its end.
pub fn overspill(args: &[&str]) -> Ran {
    finish(&mut command(args))
}

/// Runs a prepared command to its end.
pub fn finish(command: &mut Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The trained Llama.
pub const STORIES: &str = "fixtures/tiny-stories";
/// The trained mixture.
pub const MIXTURE: &str = "fixtures/tiny-moe";

/// A directory that goes away.
pub struct Temp(PathBuf);

impl Temp {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("overspill-cli-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The path of something in it, as an argument.
    pub fn arg(&self, name: &str) -> String {
        self.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A copy of a model's directory, to be damaged.
pub fn copy_of(model: &str) -> Temp {
    let temp = Temp::new();
    for entry in std::fs::read_dir(root().join(model)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), temp.path().join(entry.file_name())).unwrap();
    }
    temp
}

/// Writes a file anew, changed.
pub fn edit(path: &Path, change: impl FnOnce(String) -> String) {
    let text = std::fs::read_to_string(path).unwrap();
    let changed = change(text.clone());
    assert_ne!(text, changed, "the edit of {} does nothing", path.display());
    std::fs::write(path, changed).unwrap();
}

/// Sends the signal of Ctrl-C, where there is one.
pub fn interrupt(child: &std::process::Child) {
    let kill = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
}

/// A model of 170 MiB without a meaning, so large that a few hundred tokens take a while.
pub fn slow_model(temp: &Temp) -> String {
    let (config, model) = (temp.arg("config.json"), temp.arg("model"));
    let text = std::fs::read_to_string(root().join(STORIES).join("config.json")).unwrap();
    let text =
        text.replace("\"hidden_size\": 128", "\"hidden_size\": 512").replace("\"head_dim\": 32", "\"head_dim\": 128");
    std::fs::write(&config, text.replace("\"intermediate_size\": 384", "\"intermediate_size\": 4096")).unwrap();
    overspill(&["synth", "--config", &config, "--dtype", "f32", "-o", &model]).ok();
    model
}

/// A test of a program that makes its own list of tests: it panics, or it has passed.
pub fn trial(name: &str, ignored: bool, test: impl FnOnce() + Send + 'static) -> libtest_mimic::Trial {
    let run = move || {
        test();
        Ok(())
    };
    libtest_mimic::Trial::test(name, run).with_ignored_flag(ignored)
}
