//! `overspill run --top`: the view of the run that goes on in this very process, drawn by a thread of its own, with the
//! generated text in a pane. What else the run has to say waits until the view is closed.

use super::screen::{Screen, Stream};
use super::story::Story;
use super::view::View;
use crate::errors::{CliError, Kind, Outcome, stop};
use crate::watch::Observer;
use crate::{interrupt, log, report};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks at the engine's figures.
const LOOK_TIME: Duration = Duration::from_millis(500);
/// Between two pictures, as long as text comes; and how soon the end is noticed.
const PICTURE_TIME: Duration = Duration::from_millis(100);

/// A view that is open.
#[derive(Debug)]
pub struct Live {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    story: Mutex<Story>,
    /// There is text that is not in the picture.
    fresh: AtomicBool,
    /// The run has ended.
    end: AtomicBool,
    /// The view is gone, because the user has seen enough or the terminal is lost.
    closed: AtomicBool,
}

impl Live {
    /// Finds the terminal, before anything else is done.
    ///
    /// # Errors
    /// There is none, or it cannot be drawn on, or something else writes there.
    pub fn check() -> Outcome<Stream> {
        let stream = Stream::find().ok_or_else(|| {
            let message = "--top draws on a terminal, and neither standard output nor standard error is one; \
                           leave it out, and watch the run from a terminal with `overspill top`";
            stop(Kind::Usage, message)
        })?;
        if log::is_told() && io::IsTerminal::is_terminal(&io::stderr()) {
            let message = "--log (or OVERSPILL_LOG) writes on the terminal that --top draws on; \
                           send the log to a file with 2>FILE, or leave one of them out";
            return Err(stop(Kind::Usage, message));
        }
        Screen::check().map_err(|error| {
            let message = format!("--top cannot draw on this terminal: {error}; try another terminal, or leave it out");
            stop(Kind::Config, message)
        })?;
        Ok(stream)
    }

    /// Shows a run from now on.
    ///
    /// # Errors
    /// There is no thread to be had; the terminal cannot be drawn on; the engine has failed.
    pub fn start(stream: Stream, observer: Observer) -> Outcome<Self> {
        let first = observer.look()?;
        let failed = |error: io::Error| CliError::new(Kind::Io, format!("--top: {error}; leave it out"));
        let screen = Screen::open(stream).map_err(failed)?;
        report::hold_notes();
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        let body = move || {
            let ended = follow(screen, &observer, View::of_this_process(first), &of_thread);
            of_thread.closed.store(true, Ordering::Release);
            ended
        };
        let thread = std::thread::Builder::new().name("overspill-top".into()).spawn(body).map_err(|error| {
            report::release_notes();
            failed(error)
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What was generated next.
    pub fn push(&self, text: &str) {
        self.shared.story.lock().unwrap_or_else(PoisonError::into_inner).push(text);
        self.shared.fresh.store(true, Ordering::Release);
    }

    /// Whether the view is gone already.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    fn close(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else { return };
        let ended = thread.join();
        report::release_notes();
        // A view that is lost is no failure of the run. A panic has told of itself.
        if let Ok(Err(error)) = ended {
            report::note(&format!("--top: the view was closed: {error}"));
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.close();
    }
}

/// Draws until the run ends or the view is closed. The screen goes with the end of this.
fn follow(mut screen: Screen, observer: &Observer, mut view: View, shared: &Shared) -> io::Result<()> {
    let mut next_look = Instant::now() + LOOK_TIME;
    let mut due = true;
    while !shared.end.load(Ordering::Acquire) {
        if next_look <= Instant::now() {
            next_look = Instant::now() + LOOK_TIME;
            // An engine that is being closed has no more figures; the run tells why.
            if let Ok(status) = observer.look() {
                view.update(status);
            }
            due = true;
        }
        if shared.fresh.swap(false, Ordering::AcqRel) || due {
            due = false;
            screen.draw(|frame| {
                let story = shared.story.lock().unwrap_or_else(PoisonError::into_inner);
                view.draw_with(frame, &story);
            })?;
        }
        if !event::poll(PICTURE_TIME)? {
            continue;
        }
        match event::read()? {
            Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => interrupt::ask(),
                _ => {}
            },
            Event::Resize(..) => due = true,
            _ => {}
        }
    }
    Ok(())
}
