//! The smallest budget that works, for the message about one that does not.
//!
//! The engine refuses whatever leaves a tier too small, but each step of opening (steps, cache, scratch) only knows its
//! own need, and how steps are cut depends on the budget. So opening is tried again with what was asked for, until it
//! works.

use crate::errors::{Missed, Stop};
use crate::execute::Settings;
use crate::sizes::{Size, human_bytes};

/// Tries at most; each opens the model anew, which reads its norms and biases only.
const TRIES_MAX: u32 = 64;
/// Where what is asked for creeps up, a larger stride finds an upper bound: this part of the budget.
const STRIDE: u64 = 8;
/// The answer may be too large by this part of it, where it had to be searched for.
const TOLERANCE: u64 = 128;

/// Names the smallest budget that works in an error about one that is too small. Other errors stay as they are.
pub fn named<T>(stop: Stop, settings: &Settings, mut open: impl FnMut(&Settings) -> Result<T, Stop>) -> Stop {
    let Stop::Error(mut error) = stop else { return stop };
    let Some(Missed { setting, bytes_min }) = error.missed.take() else { return Stop::Error(error) };
    let found = search(bytes_min, |bytes| {
        let mut settings = settings.clone();
        match setting.as_str() {
            "--ram" => settings.placement.ram = Some(Size::Bytes(bytes)),
            "--vram" => settings.placement.vram = Some(Size::Bytes(bytes)),
            "--kv" => settings.kv = Some(Size::Bytes(bytes)),
            _ => return None,
        }
        match open(&settings) {
            Err(Stop::Error(error)) => error.missed.filter(|missed| missed.setting == setting).map(|m| m.bytes_min),
            _ => None,
        }
    });
    if let Some(bytes_min) = found {
        error.message = format!(
            "{} is too small: the smallest that works is {bytes_min} bytes ({})",
            asked(&setting, settings),
            human_bytes(bytes_min)
        );
        error.missed = Some(Missed { setting, bytes_min });
    }
    Stop::Error(error)
}

/// The option as it was given.
fn asked(setting: &str, settings: &Settings) -> String {
    let size = match setting {
        "--ram" => settings.placement.ram,
        "--vram" => settings.placement.vram,
        _ => settings.kv,
    };
    match size {
        Some(size) => format!("{setting} {size}"),
        None => format!("what is free now for {setting}"),
    }
}

/// The smallest budget for which `lacks` says `None`, from `first` up; `lacks` says what a budget that fails is told to
/// be. `None` if there is none within reason.
fn search(first: u64, mut lacks: impl FnMut(u64) -> Option<u64>) -> Option<u64> {
    let (mut too_small, mut works) = (first.saturating_sub(1), first);
    let mut tries = 0;
    let mut strode = false;
    while let Some(wanted) = lacks(works) {
        tries += 1;
        if tries >= TRIES_MAX {
            return None;
        }
        too_small = works;
        let stride = works.saturating_add((works / STRIDE).max(1));
        // The first answers are usually exact; only what creeps is run after.
        strode = tries > 2 && wanted < stride;
        works = if strode { stride } else { wanted.max(works.saturating_add(1)) };
    }
    while strode && works - too_small > (works / TOLERANCE).max(1) && tries < TRIES_MAX {
        tries += 1;
        let middle = too_small + (works - too_small) / 2;
        match lacks(middle) {
            None => works = middle,
            Some(_) => too_small = middle,
        }
    }
    Some(works)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_exactly_is_taken() {
        let mut tries = 0;
        let found = search(100, |bytes| {
            tries += 1;
            (bytes < 5000).then_some(5000)
        });
        assert_eq!((found, tries), (Some(5000), 2));
        assert_eq!(search(100, |_| None), Some(100));
    }

    #[test]
    fn what_creeps_up_is_run_after_and_then_narrowed_down() {
        let smallest = 1_234_567;
        let mut tries = 0;
        let found = search(40_000, |bytes| {
            tries += 1;
            (bytes < smallest).then_some(bytes + 1280)
        });
        let found = found.unwrap_or(0);
        assert!(found >= smallest && found <= smallest + smallest / 100, "{found}");
        assert!(tries < TRIES_MAX, "{tries}");
    }

    #[test]
    fn what_never_works_is_given_up() {
        assert_eq!(search(1, Some), None);
        assert_eq!(search(u64::MAX - 1, |bytes| Some(bytes.saturating_add(1))), None);
    }
}
