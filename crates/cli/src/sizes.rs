//! Sizes as people write them (`512MiB`, `1.5GB`, `50%`), read and written. What a percentage is of is the caller's
//! business.

use std::fmt;
use std::str::FromStr;

/// A size that was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Size {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the model's weights.
    Percent(f64),
}

/// Units by their lower-case names. A lone letter is binary, as in `dd` and container runtimes.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kb", 1000),
    ("kib", 1 << 10),
    ("m", 1 << 20),
    ("mb", 1_000_000),
    ("mib", 1 << 20),
    ("g", 1 << 30),
    ("gb", 1_000_000_000),
    ("gib", 1 << 30),
    ("t", 1 << 40),
    ("tb", 1_000_000_000_000),
    ("tib", 1 << 40),
];

/// Decimals beyond these mean less than a byte of a TiB.
const DECIMALS_MAX: usize = 13;

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = (&trimmed[..split], trimmed[split..].trim_start().to_ascii_lowercase());
        let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || decimals.contains('.') || (number.contains('.') && decimals.is_empty()) {
            return Err(format!("'{text}' is no size; write 512MiB, 4GiB, 1.5GB, 50% or a number of bytes"));
        }
        if unit == "%" {
            let share: f64 = number.parse().map_err(|_| format!("'{text}' is no percentage; write 50%"))?;
            return if share.is_finite() { Ok(Self::Percent(share)) } else { Err(format!("'{text}' is too large")) };
        }
        let Some(&(_, unit_bytes)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("'{unit}' is no unit of size; use B, KiB, MiB, GiB, TiB, KB, MB, GB, TB or %"));
        };
        bytes_of(whole, decimals, unit_bytes)
            .map(Self::Bytes)
            .ok_or_else(|| format!("'{text}' is more than 2^64 bytes"))
    }
}

/// Exact, rounded down to whole bytes; `None` if it does not fit.
fn bytes_of(whole: &str, decimals: &str, unit_bytes: u64) -> Option<u64> {
    let whole: u128 = whole.parse().ok()?;
    let decimals = &decimals[..decimals.len().min(DECIMALS_MAX)];
    let scale = 10u128.checked_pow(decimals.len() as u32)?;
    let fraction: u128 = if decimals.is_empty() { 0 } else { decimals.parse().ok()? };
    let unit = u128::from(unit_bytes);
    let bytes = whole.checked_mul(unit)?.checked_add(fraction * unit / scale)?;
    u64::try_from(bytes).ok()
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => f.write_str(&human_bytes(*bytes)),
            Self::Percent(share) => write!(f, "{share}%"),
        }
    }
}

/// Bytes for people: three or four digits and a binary unit.
pub fn human_bytes(bytes: u64) -> String {
    const NAMES: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    if bytes < 1 << 10 {
        return format!("{bytes} B");
    }
    let mut power = (bytes.ilog2() / 10).min(4) as usize;
    let mut value = bytes as f64 / (1u64 << (10 * power)) as f64;
    if value >= 1023.95 && power < 4 {
        power += 1;
        value /= 1024.0;
    }
    format!("{value:.*} {}", if value < 10.0 { 2 } else { 1 }, NAMES[power])
}

/// A count for people: three digits and a power of a thousand.
pub fn human_count(count: u64) -> String {
    const NAMES: [&str; 5] = ["", " K", " M", " B", " T"];
    let mut power = 0;
    let mut value = count as f64;
    while value >= 999.5 && power + 1 < NAMES.len() {
        value /= 1000.0;
        power += 1;
    }
    let decimals = if power == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.decimals$}{}", NAMES[power])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn sizes_are_read_exactly() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512MiB", 512 << 20),
            ("512 mib", 512 << 20),
            ("4GiB", 4 << 30),
            ("1.5GB", 1_500_000_000),
            ("0.1KiB", 102),
            ("2k", 2048),
            ("1.9999999999999999999TiB", 2_199_023_255_551),
            ("18446744073709551615", u64::MAX),
            ("9007199254740993B", 9_007_199_254_740_993),
        ] {
            assert_eq!(text.parse(), Ok(Size::Bytes(bytes)), "{text}");
        }
        assert_eq!("50%".parse(), Ok(Size::Percent(50.0)));
        assert_eq!("12.5 %".parse(), Ok(Size::Percent(12.5)));
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_cure() {
        for text in ["", "MiB", "-1", "1e9", "4 gigs", ".5GB", "5.GB", "1.2.3MB", "%", "NaN%", "inf", "0x10", "١GB"] {
            let error = text.parse::<Size>().unwrap_err();
            assert!(error.contains("512MiB") || error.contains("KiB"), "{text}: {error}");
        }
        for text in ["18446744073709551616", "99999999999999999999999TiB", "16777216TiB"] {
            assert!(text.parse::<Size>().unwrap_err().contains("2^64"), "{text}");
        }
        assert!(format!("{}%", "9".repeat(400)).parse::<Size>().is_err());
    }

    #[test]
    fn numbers_for_people_have_few_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.50 KiB"),
            (1 << 20, "1.00 MiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (800 << 20, "800.0 MiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(human_bytes(bytes), text);
        }
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1.00 K"), (1_100_000_000, "1.10 B"), (999_600, "1.00 M")]
        {
            assert_eq!(human_count(count), text);
        }
    }
}
