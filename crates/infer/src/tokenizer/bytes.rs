//! The byte-level alphabet: how GPT-2's family writes each byte of a text as one printable character.
//!
//! Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and up, in order.

/// The character that stands for a byte.
pub(super) fn char_of(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => byte as char,
        0..=0x20 => shifted(u32::from(byte)),
        0x7F..=0xA0 => shifted(u32::from(byte) - 0x7F + 33),
        0xAD => shifted(67),
    }
}

fn shifted(index: u32) -> char {
    char::from_u32(0x100 + index).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte that a character stands for.
pub(super) fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The bytes that a token of a byte-level vocabulary stands for; its own UTF-8 if a character of it is not of the
/// alphabet (as in most special tokens).
pub(super) fn decode(token: &str) -> Vec<u8> {
    token.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte of a token such as `<0x0A>`.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection() {
        let chars: std::collections::BTreeSet<char> = (0..=255).map(char_of).collect();
        assert_eq!(chars.len(), 256);
        assert!((0..=255).all(|byte| byte_of(char_of(byte)) == Some(byte)));
        let inverses = (0..=0x10FFFF).filter_map(char::from_u32).filter(|&c| byte_of(c).is_some()).count();
        assert_eq!(inverses, 256);
    }

    #[test]
    fn well_known_characters() {
        assert_eq!((char_of(b' '), char_of(b'\n'), char_of(0xAD)), ('Ġ', 'Ċ', 'Ń'));
        assert_eq!(decode("Ġthe"), b" the");
        assert_eq!(decode("日本"), "日本".as_bytes());
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert!(["<0x+A>", "<0x0A", "<0x0AB>", "0x0A"].into_iter().all(|token| fallback_byte(token).is_none()));
    }
}
