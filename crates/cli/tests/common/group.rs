//! Control groups for tests that need a limit on memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A control group for memory, of either version.
pub struct Group {
    directory: PathBuf,
    /// The file that limits it.
    limit: &'static str,
}

impl Group {
    /// Makes one below the group of this process; `None` where that is not allowed.
    pub fn new(what: &str, limit_bytes: u64) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let name = format!("overspill-test-{what}-{}", std::process::id());
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
                let directory = parent.join(&name);
                if fs::create_dir(&directory).is_ok() {
                    let group = Self { directory, limit };
                    if group.limit(limit_bytes).is_ok() {
                        return Some(group);
                    }
                }
            }
        }
        None
    }

    /// Changes its limit. The first version refuses what is less than it can make free.
    pub fn limit(&self, bytes: u64) -> std::io::Result<()> {
        fs::write(self.directory.join(self.limit), bytes.to_string())
    }

    /// The program with these arguments, in the group.
    pub fn command(&self, args: &[&str]) -> Command {
        let plain = super::command(args);
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.directory.join("cgroup.procs"));
        shell.arg(plain.get_program()).args(plain.get_args()).current_dir(super::root()).stdin(Stdio::null());
        shell.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        shell
    }

    pub fn oom_kills(&self) -> u64 {
        let files = ["memory.oom_control", "memory.events"];
        let text = files.into_iter().find_map(|name| fs::read_to_string(self.directory.join(name)).ok()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.map_or(0, |count| count.trim().parse().unwrap())
    }

    pub fn peak_bytes(&self) -> Option<u64> {
        let files = ["memory.max_usage_in_bytes", "memory.peak"];
        let text = files.into_iter().find_map(|name| fs::read_to_string(self.directory.join(name)).ok())?;
        text.trim().parse().ok()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last process of the group is gone a moment after it has been waited for.
        let begin = Instant::now();
        while fs::remove_dir(&self.directory).is_err() && begin.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
