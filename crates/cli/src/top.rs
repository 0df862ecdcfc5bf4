//! `overspill top`: a run as it goes on, in a terminal. It reads the status file that the run writes (see
//! [`crate::status`]), so it can watch any run of the same user and costs the run nothing.

pub mod live;
pub mod screen;
mod story;
mod view;

use crate::args::TopArgs;
use crate::errors::{Kind, Outcome, Stop, stop};
use crate::report;
use crate::status::{self, Status};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use screen::{Screen, Stream};
use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use view::View;

/// Shows a run until it ends or the user has seen enough.
///
/// # Errors
/// There is no such run, or no terminal.
pub fn top(args: &TopArgs) -> Outcome {
    let path = find(args.target.as_deref())?;
    if args.json {
        let status = status::read(&path).map_err(|error| unreadable(&path, &error))?;
        return report::print_json(&status);
    }
    if !io::stdout().is_terminal() {
        return Err(stop(Kind::Usage, "top draws on a terminal, and standard output is none; use --json there"));
    }
    let first = status::read(&path).map_err(|error| unreadable(&path, &error))?;
    let mut screen = Screen::open(Stream::Stdout).map_err(|error| terminal_failed(&error))?;
    let ended = watch(&mut screen, path, first, Duration::from_secs_f64(args.interval.0));
    drop(screen);
    ended.map_err(|error| terminal_failed(&error)).map(|last| report::note(&last))
}

fn terminal_failed(error: &io::Error) -> Stop {
    stop(Kind::Io, format!("cannot draw on the terminal: {error}; try another terminal, or --json"))
}

fn unreadable(path: &std::path::Path, error: &io::Error) -> Stop {
    let message = format!("{}: {error}; name a run's process, or a status file that a run has written", path.display());
    stop(Kind::Config, message)
}

/// A run that has just begun has not written its status yet; it opens its model first, which may take longer than this.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks for it.
const LOOK_TIME: Duration = Duration::from_millis(100);

/// The status file that is meant.
fn find(target: Option<&str>) -> Outcome<PathBuf> {
    let runs = || status::all().into_iter();
    let none = |what: String| {
        let running: Vec<String> = runs().map(|(_, status)| format!("{} ({})", status.pid, status.model)).collect();
        let known = if running.is_empty() {
            "no run is going on; start one with `overspill run`".to_owned()
        } else {
            format!("these are going on: {}", running.join(", "))
        };
        stop(Kind::Config, format!("{what}; {known}"))
    };
    match target {
        None => runs().next().map(|(path, _)| path).ok_or_else(|| none("there is nothing to watch".to_owned())),
        Some(target) => match target.parse::<u32>() {
            Ok(pid) => {
                let begin = Instant::now();
                loop {
                    if let Some((path, _)) = runs().find(|(_, status)| status.pid == pid) {
                        return Ok(path);
                    }
                    if !status::alive(pid) || begin.elapsed() > PATIENCE {
                        return Err(none(format!("process {pid} is no run that can be watched")));
                    }
                    std::thread::sleep(LOOK_TIME);
                }
            }
            Err(_) => Ok(PathBuf::from(target)),
        },
    }
}

/// Draws until the end; what to say then.
fn watch(screen: &mut Screen, mut path: PathBuf, first: Status, interval: Duration) -> io::Result<String> {
    let mut view = View::new(first);
    let mut next = Instant::now();
    loop {
        if next <= Instant::now() {
            match status::read(&path) {
                Ok(status) => view.update(status),
                Err(_) => return Ok(view.farewell()),
            }
            if view.is_dead(status::alive) {
                return Ok(format!("{}; it was killed", view.farewell()));
            }
            next = Instant::now() + interval;
        }
        screen.draw(|frame| view.draw(frame))?;
        if !event::poll(next.saturating_duration_since(Instant::now()))? {
            continue;
        }
        let Event::Key(key) = event::read()? else { continue };
        if key.kind != KeyEventKind::Press {
            continue;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Ok(view.farewell()),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(view.farewell()),
            KeyCode::Tab => {
                let runs = status::all();
                let at = runs.iter().position(|(found, _)| *found == path).map_or(0, |at| at + 1);
                if let Some((found, status)) = runs.get(at % runs.len().max(1)) {
                    (path, view) = (found.clone(), View::new(status.clone()));
                }
            }
            _ => {}
        }
    }
}
