//! Lists and ranges of sizes: `25%,50%`, `10%..100%:10%`, `4GiB..64GiB:4GiB`, and any of them separated by commas.

use crate::sizes::Size;

/// A list is cut off as an error beyond this, before it is made.
pub const POINTS_MAX: u64 = 10_000_000;

/// The sizes of a list, in the order given.
///
/// # Errors
/// Words that are no size; a range that does not end after it begins, has ends of two kinds, or steps of nothing; more
/// than [`POINTS_MAX`] sizes.
pub fn sizes(text: &str) -> Result<Vec<Size>, String> {
    let mut list = Vec::new();
    for item in text.split(',') {
        match item.split_once("..") {
            None => list.push(item.parse()?),
            Some((first, rest)) => {
                let (last, step) = rest
                    .split_once(':')
                    .ok_or_else(|| format!("'{item}' is a range without a step; write 10%..100%:10%"))?;
                range(item, first.parse()?, last.parse()?, step.parse()?, &mut list)?;
            }
        }
        if list.len() as u64 > POINTS_MAX {
            return Err(format!("'{text}' has more than {POINTS_MAX} sizes; use larger steps"));
        }
    }
    Ok(list)
}

fn range(item: &str, first: Size, last: Size, step: Size, list: &mut Vec<Size>) -> Result<(), String> {
    let count = match (first, last, step) {
        (Size::Bytes(first), Size::Bytes(last), Size::Bytes(step)) if step > 0 && first <= last => {
            (last - first) / step
        }
        (Size::Percent(first), Size::Percent(last), Size::Percent(step)) if step > 0.0 && first <= last => {
            // A range may end a rounding before its end.
            ((last - first) / step + 1e-9).floor().min(1e18) as u64
        }
        (Size::Bytes(_), Size::Bytes(_), Size::Bytes(_)) | (Size::Percent(_), Size::Percent(_), Size::Percent(_)) => {
            return Err(format!("'{item}' goes nowhere: write the smaller end first, and a step above 0"));
        }
        _ => return Err(format!("'{item}' mixes bytes and percentages; use one of them for both ends and the step")),
    };
    if count >= POINTS_MAX {
        return Err(format!("'{item}' has more than {POINTS_MAX} sizes; use larger steps"));
    }
    let at = |index: u64| match (first, step) {
        (Size::Bytes(first), Size::Bytes(step)) => Size::Bytes(first + index * step),
        (Size::Percent(first), Size::Percent(step)) => {
            // 0.1 + 0.2 is 0.3 for people.
            Size::Percent(((first + index as f64 * step) * 1e6).round() / 1e6)
        }
        _ => first,
    };
    list.extend((0..=count).map(at));
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn lists_and_ranges_are_what_they_say() {
        let percent = |shares: &[f64]| shares.iter().map(|&share| Size::Percent(share)).collect::<Vec<_>>();
        assert_eq!(sizes("25%,50%").unwrap(), percent(&[25.0, 50.0]));
        assert_eq!(sizes("10%..40%:10%").unwrap(), percent(&[10.0, 20.0, 30.0, 40.0]));
        assert_eq!(sizes("0.1%..0.3%:0.1%,1%").unwrap(), percent(&[0.1, 0.2, 0.3, 1.0]));
        let gib = |n: u64| Size::Bytes(n << 30);
        assert_eq!(sizes("1GiB..4GiB:2GiB,8GiB").unwrap(), [gib(1), gib(3), gib(8)]);
        assert_eq!(sizes("5%..5%:1%").unwrap(), percent(&[5.0]));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            ",",
            "10%..",
            "..10%:1%",
            "10%..20%",
            "20%..10%:1%",
            "10%..20%:0%",
            "1GiB..2GiB:10%",
            "10%..1GiB:1%",
            "x",
            "0B..1TiB:1B",
            "0%..100%:0.0000000001%",
            "10%..20%:1%:2%",
        ] {
            assert!(sizes(text).is_err(), "{text}");
        }
    }
}
