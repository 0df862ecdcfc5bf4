//! Ctrl-C: the first asks the work to stop in good order, the second ends the process at once.

use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// The exit code after Ctrl-C.
const CODE: i32 = 130;

/// Takes Ctrl-C over from the system. Before this is called, and if it cannot be, Ctrl-C ends the process at once.
pub fn install() {
    // A failure leaves the system's own handling, which ends the process: that is acceptable.
    let _ = ctrlc::set_handler(ask);
}

/// What Ctrl-C does, however it comes: where a view has the terminal, it comes as a key and not as a signal.
pub fn ask() {
    if ASKED.swap(true, Ordering::SeqCst) {
        crate::top::screen::restore();
        std::process::exit(CODE);
    }
}

/// Set by the first Ctrl-C.
pub fn flag() -> &'static AtomicBool {
    &ASKED
}

/// Whether Ctrl-C was pressed.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}
