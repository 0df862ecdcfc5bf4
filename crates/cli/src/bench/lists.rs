//! Lists and ranges on the command line: `25%,50%,75%`, `10%..100%:10%`, `1GiB..4GiB:512MiB`, `1..8:1`.

use crate::sizes::Size;
use std::str::FromStr;

/// No list is longer: a range with a small step is a slip of the pen.
const LENGTH_MAX: usize = 100_000;

/// Sizes, as bytes or as shares of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Sizes(pub Vec<Size>);

/// Whole numbers from 1 up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts(pub Vec<u64>);

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = |from: Size, to: Size, step: Option<Size>| match (from, to, step) {
            (Size::Percent(from), Size::Percent(to), Some(Size::Percent(step))) if step > 0.0 => {
                let steps = ((to - from) / step + 1e-9).floor();
                let count = if steps >= 0.0 { steps as usize + 1 } else { 0 };
                // Whole steps from the beginning, so that 10%..100%:10% has no 30.000000000000004 %.
                let at = |index: usize| Size::Percent(((from + step * index as f64) * 1e9).round() / 1e9);
                checked(count, text).map(|count| (0..count).map(at).collect())
            }
            (Size::Bytes(from), Size::Bytes(to), Some(Size::Bytes(step))) if step > 0 => {
                let count = to.checked_sub(from).map_or(0, |span| span / step + 1);
                let count = checked(usize::try_from(count).unwrap_or(usize::MAX), text)?;
                Ok((0..count as u64).map(|index| Size::Bytes(from + step * index)).collect())
            }
            _ => Err(format!(
                "'{text}': a range is from..to:step, all three in bytes or all three in %, and the step above 0: \
                 10%..100%:10%, 1GiB..4GiB:512MiB"
            )),
        };
        items(text, range).map(Self)
    }
}

impl FromStr for Counts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = |from: Count, to: Count, step: Option<Count>| {
            let step = step.map_or(1, |step| step.0);
            let count = to.0.checked_sub(from.0).map_or(0, |span| span / step + 1);
            let count = checked(usize::try_from(count).unwrap_or(usize::MAX), text)?;
            Ok((0..count as u64).map(|index| Count(from.0 + step * index)).collect())
        };
        items(text, range).map(|counts| Self(counts.into_iter().map(|count| count.0).collect()))
    }
}

#[derive(Clone, Copy)]
struct Count(u64);

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().parse() {
            Ok(count) if count > 0 => Ok(Self(count)),
            _ => Err(format!("'{text}' is no whole number from 1 up; write 4, 1,2,4 or 1..8:1")),
        }
    }
}

fn checked(count: usize, text: &str) -> Result<usize, String> {
    match count {
        0 => Err(format!("'{text}': the range is empty; write the smaller end first")),
        1..=LENGTH_MAX => Ok(count),
        _ => Err(format!("'{text}': {count} values are too many; take a larger step")),
    }
}

/// The values of a list, each of which may be a range.
fn items<T: FromStr<Err = String>>(
    text: &str,
    range: impl Fn(T, T, Option<T>) -> Result<Vec<T>, String>,
) -> Result<Vec<T>, String> {
    let mut values = Vec::new();
    for item in text.split(',') {
        match item.split_once("..") {
            None => values.push(item.parse()?),
            Some((from, rest)) => {
                let (to, step) = rest.split_once(':').map_or((rest, None), |(to, step)| (to, Some(step)));
                values.extend(range(from.parse()?, to.parse()?, step.map(str::parse).transpose()?)?);
            }
        }
    }
    checked(values.len(), text)?;
    Ok(values)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn lists_and_ranges_are_read() {
        let percents = |text: &str| text.parse::<Sizes>().unwrap().0;
        assert_eq!(percents("25%,50%"), [Size::Percent(25.0), Size::Percent(50.0)]);
        let range = percents("10%..100%:10%");
        assert_eq!(range.len(), 10);
        assert_eq!((range[2], range[9]), (Size::Percent(30.0), Size::Percent(100.0)));
        assert_eq!(percents("1KiB..4KiB:1KiB,1GiB").len(), 5);
        assert_eq!(percents("10%..35%:10%").last(), Some(&Size::Percent(30.0)), "the end need not be hit");
        assert_eq!("1,2..6:2,9..10".parse::<Counts>().unwrap().0, [1, 2, 4, 6, 9, 10]);
    }

    #[test]
    fn what_is_no_list_is_refused_with_the_cure() {
        for text in ["", "a", "10%..100%", "10%..100%:0%", "10%..4GiB:1GiB", "1..0.1%:1%", "0..100%:1%", "1GiB..2GiB:1"]
        {
            assert!(text.parse::<Sizes>().is_err(), "{text}");
        }
        for text in ["", "0", "-1", "1..0", "1..4:0", "1,,2", "1..999999999999", "x"] {
            assert!(text.parse::<Counts>().is_err(), "{text}");
        }
        assert!("2..1".parse::<Counts>().unwrap_err().contains("smaller end first"));
    }
}
