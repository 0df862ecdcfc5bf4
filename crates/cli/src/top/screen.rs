//! The terminal while something is drawn on it: taken over, and given back whatever ends the drawing, be it an error, a
//! panic in any thread, Ctrl-C or another signal.

use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};
use ratatui::{Frame, Terminal};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, Once, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Where the terminal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Behind standard output.
    Stdout,
    /// Behind standard error, because standard output leads elsewhere.
    Stderr,
}

impl Stream {
    /// The stream that is a terminal, standard output first.
    pub fn find() -> Option<Self> {
        if io::stdout().is_terminal() { Some(Self::Stdout) } else { io::stderr().is_terminal().then_some(Self::Stderr) }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stdout => io::stdout().write(bytes),
            Self::Stderr => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().flush(),
            Self::Stderr => io::stderr().flush(),
        }
    }
}

/// Which stream is drawn on, for those who must end that from outside: 0 is none.
static TAKEN: AtomicU8 = AtomicU8::new(0);
/// Held while something is drawn.
static DRAWING: Mutex<()> = Mutex::new(());
/// A drawing that takes longer is not waited for: the terminal may be stopped, or it is the one that panics.
const PATIENCE: Duration = Duration::from_millis(100);

/// A terminal that is drawn on. Dropping it gives the terminal back as it was.
pub struct Screen {
    terminal: Terminal<CrosstermBackend<BufWriter<Stream>>>,
}

impl Screen {
    /// Whether there is a terminal that can be drawn on, before anything else is done.
    ///
    /// # Errors
    /// It moves no cursor, or its keys cannot be read.
    pub fn check() -> io::Result<()> {
        if std::env::var_os("TERM").is_some_and(|term| term == "dumb") {
            return Err(io::Error::other("TERM=dumb says that it moves no cursor"));
        }
        enable_raw_mode()?;
        disable_raw_mode()
    }

    /// Takes the terminal over.
    ///
    /// # Errors
    /// As [`Self::check`]; it cannot be written to.
    pub fn open(stream: Stream) -> io::Result<Self> {
        Self::check()?;
        guard()?;
        TAKEN.store(1 + stream as u8, Ordering::SeqCst);
        let begin = || {
            enable_raw_mode()?;
            let mut out = stream;
            execute!(out, EnterAlternateScreen)?;
            Terminal::new(CrosstermBackend::new(BufWriter::new(stream)))
        };
        match begin() {
            Ok(terminal) => Ok(Self { terminal }),
            Err(error) => {
                restore();
                Err(error)
            }
        }
    }

    /// Draws.
    ///
    /// # Errors
    /// The terminal is gone, or was given back by [`restore`].
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        let _drawing = DRAWING.lock().unwrap_or_else(PoisonError::into_inner);
        if TAKEN.load(Ordering::SeqCst) == 0 {
            return Err(io::Error::other("it was given back"));
        }
        self.terminal.draw(draw).map(|_| ())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back, if it was taken over: out of raw mode, its former contents, its cursor.
pub fn restore() {
    if TAKEN.load(Ordering::SeqCst) == 0 {
        return;
    }
    let begin = Instant::now();
    let _drawing = loop {
        match DRAWING.try_lock() {
            Ok(guard) => break Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => break Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if begin.elapsed() > PATIENCE => break None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    let mut out = match TAKEN.swap(0, Ordering::SeqCst) {
        0 => return,
        1 => Stream::Stdout,
        _ => Stream::Stderr,
    };
    // Of a terminal that is gone there is nothing to give back.
    let _ = disable_raw_mode();
    let _ = execute!(out, LeaveAlternateScreen, Show);
}

/// Sees to it that panics and signals give the terminal back.
fn guard() -> io::Result<()> {
    static GUARD: Once = Once::new();
    let mut done = Ok(());
    GUARD.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            crate::report::release_notes();
            before(panic);
        }));
        done = guard_signals();
    });
    done
}

/// A signal that ends the process does so after the terminal has been given back.
#[cfg(unix)]
fn guard_signals() -> io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGQUIT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGQUIT, SIGTERM])?;
    let wait = move || {
        for signal in signals.forever() {
            restore();
            // What the signal does by default: it ends the process, and whoever waits for that sees by what.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    };
    std::thread::Builder::new().name("overspill-signals".into()).spawn(wait).map(|_| ())
}

#[cfg(not(unix))]
fn guard_signals() -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_taken_is_not_given_back() {
        restore();
        assert_eq!(TAKEN.load(Ordering::SeqCst), 0);
    }
}
