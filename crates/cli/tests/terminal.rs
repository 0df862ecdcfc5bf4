//! `run --top` and `top` on a real terminal: a pseudo terminal of `script`'s, with keys, signals and the terminal's
//! state afterwards. Without `script` and a shell these are reported as ignored.
#![allow(clippy::unwrap_used, reason = "tests")]

#[cfg(target_os = "linux")]
mod common;

#[cfg(target_os = "linux")]
mod on_linux {
    use super::common::{self, STORIES, Temp, command, overspill, slow_model, trial};
    use libtest_mimic::Trial;
    use std::io::{Read as _, Write as _};
    use std::process::{Child, Command, Stdio};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    const INTO: &str = "\u{1b}[?1049h";
    const BACK: &str = "\u{1b}[?1049l";

    /// A shell on a pseudo terminal of 100 by 30, and all that it shows.
    struct Terminal {
        child: Child,
        shown: Arc<Mutex<Vec<u8>>>,
        reader: std::thread::JoinHandle<()>,
    }

    impl Terminal {
        /// Runs the program with these arguments and what the shell is to do with it besides; afterwards says how it
        /// ended and whether lines and echo work again.
        fn run(args: &[&str], redirect: &str) -> Self {
            let program = command(args);
            let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_str().unwrap());
            let words: Vec<String> =
                std::iter::once(program.get_program()).chain(program.get_args()).map(quoted).collect();
            let line = format!(
                "stty cols 100 rows 30; {} {redirect}; echo \"ended $?\"; stty -a | tr ' ;' '\\n' | grep -x -e '-*icanon' -e '-*echo' -e '-*isig'",
                words.join(" ")
            );
            let mut script = Command::new("script");
            script.args(["-qefc", &line, "/dev/null"]).current_dir(common::root());
            for (name, value) in program.get_envs() {
                script.env(name, value.unwrap_or_default());
            }
            script.env("TERM", "xterm-256color").env("SHELL", "/bin/sh").env_remove("OVERSPILL_LOG");
            let mut child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
            let mut out = child.stdout.take().unwrap();
            let shown = Arc::<Mutex<Vec<u8>>>::default();
            let sink = Arc::clone(&shown);
            let reader = std::thread::spawn(move || {
                let mut part = [0; 4096];
                while let Ok(count @ 1..) = out.read(&mut part) {
                    sink.lock().unwrap().extend_from_slice(&part[..count]);
                }
            });
            Self { child, shown, reader }
        }

        fn shown(&self) -> String {
            String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
        }

        /// Waits until it has shown this.
        fn until(&self, words: &str) -> String {
            let begin = Instant::now();
            loop {
                let shown = self.shown();
                if shown.contains(words) {
                    return shown;
                }
                assert!(begin.elapsed() < Duration::from_secs(120), "'{words}' never came:\n{shown:?}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }

        fn press(&mut self, keys: &[u8]) {
            let input = self.child.stdin.as_mut().unwrap();
            input.write_all(keys).and_then(|()| input.flush()).unwrap();
        }

        /// Waits for the end, with this exit code, and finds the terminal as it was; what was shown after the view.
        fn end(mut self, code: i32) -> String {
            self.until("isig");
            drop(self.child.stdin.take());
            self.child.wait().unwrap();
            self.reader.join().unwrap();
            let shown = String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned();
            let (_, after) = shown.rsplit_once(BACK).unwrap_or(("", &shown));
            let after = after.replace('\r', "");
            assert!(after.contains(&format!("ended {code}\n")), "{after:?}");
            for state in ["isig", "icanon", "echo"] {
                assert!(after.lines().any(|line| line == state), "the terminal has no {state}: {after:?}");
            }
            assert!(!after.contains("panicked"), "{after}");
            assert_eq!(shown.matches(INTO).count(), shown.matches(BACK).count(), "{shown:?}");
            after
        }
    }

    /// The process of the only run in a directory of status files.
    fn pid_of_run(model: &str) -> String {
        let begin = Instant::now();
        loop {
            let found = Command::new("pgrep").args(["-f", &format!("^[^ ]*overspill run {model} ")]).output().unwrap();
            if let Some(pid) = String::from_utf8(found.stdout).unwrap().lines().next() {
                return pid.to_owned();
            }
            assert!(begin.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    const STORY: [&str; 9] =
        ["run", STORIES, "--device", "cpu", "--prompt", "Once upon a time", "--temperature", "0", "-n"];

    fn a_run_shows_itself_and_then_prints_its_text_once() {
        let args = [&STORY[..], &["40"]].concat();
        let plain = overspill(&args).ok().stdout;
        let terminal = Terminal::run(&[&args[..], &["--top"]].concat(), "");
        let shown = terminal.until("isig");
        assert!(shown.contains(INTO) && shown.contains("waiting"), "{shown:?}");
        let after = terminal.end(0);
        assert!(after.contains(&format!("{}\n", plain.trim_end())), "{plain:?} is not in {after:?}");
    }

    fn output_that_leads_elsewhere_gets_the_text_and_the_terminal_the_view() {
        let temp = Temp::new();
        let args = [&STORY[..], &["40"]].concat();
        let plain = overspill(&args).ok().stdout;
        for redirect in [format!("> {}", temp.arg("out")), format!("| cat > {}; true", temp.arg("out"))] {
            let terminal = Terminal::run(&[&args[..], &["--top"]].concat(), &redirect);
            let shown = terminal.until("isig");
            assert!(shown.contains(INTO), "{shown:?}");
            terminal.end(0);
            assert_eq!(std::fs::read_to_string(temp.join("out")).unwrap(), plain, "{redirect}");
        }
        let json = format!("--json > {}", temp.arg("json"));
        Terminal::run(&[&args[..], &["--top"]].concat(), &json).end(0);
        let whole: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(temp.join("json")).unwrap()).unwrap();
        assert_eq!(whole["text"].as_str().unwrap().trim_end(), plain.trim_end());
    }

    fn long(temp: &Temp) -> Vec<String> {
        let model = slow_model(temp);
        ["run", &model, "--device", "cpu", "--prompt-ids", "1,2,3", "-n", "1500", "--ram", "40%", "--top"]
            .map(str::to_owned)
            .to_vec()
    }

    fn start(args: &[String]) -> Terminal {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let terminal = Terminal::run(&args, "");
        terminal.until("text");
        terminal
    }

    fn ctrl_c_and_signals_give_the_terminal_back() {
        let temp = Temp::new();
        let args = long(&temp);
        let mut terminal = start(&args);
        terminal.press(b"\x03");
        let after = terminal.end(130);
        assert!(after.contains("interrupted after "), "{after:?}");
        for (signal, code) in [("INT", 130), ("TERM", 128 + 15), ("HUP", 128 + 1)] {
            let terminal = start(&args);
            let pid = pid_of_run(&args[1]);
            assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
            terminal.end(code);
        }
    }

    fn a_view_that_is_closed_leaves_the_run_alone() {
        let temp = Temp::new();
        let args = long(&temp);
        let mut terminal = start(&args);
        terminal.press(b"q");
        let shown = terminal.until(BACK);
        let (_, after) = shown.rsplit_once(BACK).unwrap();
        let so_far = after.len();
        // The text goes on, after what has come already.
        let begin = Instant::now();
        while terminal.shown().len() < shown.len() + 40 {
            assert!(begin.elapsed() < Duration::from_secs(60), "nothing comes after {so_far} bytes");
            std::thread::sleep(Duration::from_millis(50));
        }
        // The terminal is the shell's again, which Ctrl-C would end, too.
        assert!(Command::new("kill").args(["-s", "INT", &pid_of_run(&args[1])]).status().unwrap().success());
        let after = terminal.end(130);
        let numbers: Vec<&str> =
            after.split("\nerror").next().unwrap().trim_matches(['^', 'C', '\n']).split(',').collect();
        assert!(numbers.len() > 5, "{after:?}");
    }

    fn top_watches_another_process_and_gives_the_terminal_back() {
        let temp = Temp::new();
        let model = slow_model(&temp);
        let args = ["run", &model, "--device", "cpu", "--prompt-ids", "1,2,3", "-n", "1500", "--ram", "40%"];
        let mut run = command(&args)
            .env("XDG_RUNTIME_DIR", temp.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let status = temp.join("overspill").join(format!("{}.json", run.id()));
        let begin = Instant::now();
        while !status.exists() {
            assert!(begin.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(50));
        }
        let watch = || {
            let terminal = Terminal::run(&["top", status.to_str().unwrap()], "");
            terminal.until("tokens/s");
            terminal
        };
        let mut terminal = watch();
        terminal.press(b"q");
        let after = terminal.end(0);
        assert!(after.contains(&format!("(process {})", run.id())), "{after:?}");
        let terminal = watch();
        common::interrupt(&run);
        assert_eq!(run.wait().unwrap().code(), Some(130));
        terminal.end(0);
    }

    fn what_cannot_be_drawn_on_is_refused() {
        let args = [&STORY[..], &["4", "--top"]].concat();
        overspill(&args).refused(2, &["--top draws on a terminal", "leave it out"]);
        let terminal = Terminal::run(&[&args[..], &["--log", "info"]].concat(), "");
        let after = terminal.end(2);
        assert!(after.contains("2>FILE") && !after.contains("INFO"), "{after}");
        // Where the log goes elsewhere, both work.
        let temp = Temp::new();
        let terminal = Terminal::run(&[&args[..], &["--log", "info"]].concat(), &format!("2> {}", temp.arg("log")));
        terminal.end(0);
        assert!(std::fs::read_to_string(temp.join("log")).unwrap().contains("INFO open{"));
    }

    pub fn trials() -> Vec<Trial> {
        let there = |program: &str| {
            let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
            found.is_ok_and(|status| status.success())
        };
        let missing = !(there("script") && there("pgrep"));
        let tests: [(&str, fn()); 6] = [
            ("a_run_shows_itself_and_then_prints_its_text_once", a_run_shows_itself_and_then_prints_its_text_once),
            (
                "output_that_leads_elsewhere_gets_the_text_and_the_terminal_the_view",
                output_that_leads_elsewhere_gets_the_text_and_the_terminal_the_view,
            ),
            ("ctrl_c_and_signals_give_the_terminal_back", ctrl_c_and_signals_give_the_terminal_back),
            ("a_view_that_is_closed_leaves_the_run_alone", a_view_that_is_closed_leaves_the_run_alone),
            (
                "top_watches_another_process_and_gives_the_terminal_back",
                top_watches_another_process_and_gives_the_terminal_back,
            ),
            ("what_cannot_be_drawn_on_is_refused", what_cannot_be_drawn_on_is_refused),
        ];
        tests.into_iter().map(|(name, test)| trial(name, missing, test)).collect()
    }
}

fn main() {
    let arguments = libtest_mimic::Arguments::from_args();
    #[cfg(target_os = "linux")]
    let trials = on_linux::trials();
    #[cfg(not(target_os = "linux"))]
    let trials = Vec::new();
    libtest_mimic::run(&arguments, trials).exit();
}
