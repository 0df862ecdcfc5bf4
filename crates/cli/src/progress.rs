//! Progress bars and spinners: on standard error, and only if that is a terminal (indicatif hides them otherwise).

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

const RUNS_STYLE: &str = "{pos}/{len} runs [{bar:30}] {eta} left  {wide_msg}";
const BYTES_STYLE: &str = "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";

const ITEMS_STYLE: &str = "{msg} [{bar:30}] {human_pos}/{human_len} {eta}";

/// A bar over bytes. It vanishes when it is done or dropped.
pub fn bytes(total_bytes: u64, what: &str) -> ProgressBar {
    bar(total_bytes, what, BYTES_STYLE)
}

/// A bar over things that are counted. It vanishes when it is done or dropped.
pub fn items(total: u64, what: &str) -> ProgressBar {
    bar(total, what, ITEMS_STYLE)
}

/// A bar over runs, with the time that is left.
pub fn runs(total: u64) -> ProgressBar {
    let bar = bar(total, "", RUNS_STYLE);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// A spinner for work of unknown length.
pub fn spinner(what: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

/// What shows nothing, where something else has the terminal.
pub fn none() -> ProgressBar {
    ProgressBar::hidden()
}

fn bar(total: u64, what: &str, style: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_message(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_valid() {
        let bar = bytes(1, "a");
        assert!(bar.is_hidden() || bar.length() == Some(1));
        assert!(ProgressStyle::with_template(BYTES_STYLE).is_ok());
        assert!(ProgressStyle::with_template(ITEMS_STYLE).is_ok());
        assert!(ProgressStyle::with_template(RUNS_STYLE).is_ok());
    }
}
