//! Tokens to text, piece by piece.

use super::{Inner, Tokenizer};

/// Turns tokens into text as they come, never cutting a character.
///
/// The pieces and what [`finish`](Self::finish) returns, joined, are what [`Tokenizer::decode`] makes of all tokens.
/// (For decoders that rewrite text across tokens, such as WordPiece, the pieces are a best effort.) Bytes that are no
/// UTF-8 become U+FFFD, as in [`String::from_utf8_lossy`]. Special tokens add nothing. Memory is constant, but for
/// those rare decoders.
pub struct DecodeStream {
    tokenizer: Tokenizer,
    state: State,
}

enum State {
    Bytes {
        /// The start of a character that isn't whole yet.
        pending: Vec<u8>,
        /// Spaces still to be stripped, while nothing but them has come.
        leading_spaces: usize,
    },
    Library {
        ids: Vec<u32>,
        /// Text handed out.
        emitted: String,
        /// Where the tokens begin that the next piece is decoded with.
        window: usize,
        /// What the tokens of the window gave when they were handed out.
        window_text: String,
    },
}

impl DecodeStream {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        let state = match &*tokenizer.0 {
            Inner::HuggingFace(hf) if !hf.has_pieces() => {
                State::Library { ids: Vec::new(), emitted: String::new(), window: 0, window_text: String::new() }
            }
            Inner::HuggingFace(hf) => State::Bytes { pending: Vec::new(), leading_spaces: hf.leading_spaces() },
            Inner::Ggml(ggml) => State::Bytes { pending: Vec::new(), leading_spaces: ggml.leading_spaces() },
        };
        Self { tokenizer, state }
    }

    /// Takes the next token; returns the text that has become certain, often empty. Ids that are no tokens add nothing.
    pub fn push(&mut self, id: u32) -> String {
        match &mut self.state {
            State::Bytes { pending, leading_spaces } => {
                let piece = match &*self.tokenizer.0 {
                    Inner::HuggingFace(hf) => hf.piece(id),
                    Inner::Ggml(ggml) => ggml.piece(id),
                };
                pending.extend(piece.unwrap_or_default());
                strip(pending, leading_spaces);
                take_whole(pending)
            }
            State::Library { ids, emitted, window, window_text } => {
                ids.push(id);
                let text = self.tokenizer.decode_by_library(&ids[*window..]);
                match text.strip_prefix(&**window_text) {
                    Some(piece) if !piece.is_empty() && !piece.ends_with(char::REPLACEMENT_CHARACTER) => {
                        let piece = piece.to_owned();
                        emitted.push_str(&piece);
                        // The next piece is decoded after this token, so that it is not taken for a text's first.
                        *window = ids.len() - 1;
                        *window_text = self.tokenizer.decode_by_library(&ids[*window..]);
                        piece
                    }
                    _ => String::new(),
                }
            }
        }
    }

    /// The rest, when no more tokens come: an unfinished character becomes U+FFFD.
    #[must_use]
    pub fn finish(self) -> String {
        match self.state {
            State::Bytes { pending, .. } => String::from_utf8_lossy(&pending).into_owned(),
            State::Library { ids, emitted, .. } => {
                let all = self.tokenizer.decode_by_library(&ids);
                all.strip_prefix(&*emitted).unwrap_or_default().to_owned()
            }
        }
    }
}

/// Strips spaces from the start of `bytes`, up to `left` of them, and none after something else has come.
fn strip(bytes: &mut Vec<u8>, left: &mut usize) {
    if *left == 0 || bytes.is_empty() {
        return;
    }
    let count = bytes.iter().take(*left).take_while(|&&byte| byte == b' ').count();
    bytes.drain(..count);
    *left = if bytes.is_empty() { *left - count } else { 0 };
}

/// Takes all whole characters, and replaces what can be none; leaves the start of one that may yet become whole.
fn take_whole(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = pending.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(whole) => {
                text.push_str(whole);
                rest = &[];
                break;
            }
            Err(error) => {
                let (whole, after) = rest.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(whole));
                rest = after;
                let Some(invalid) = error.error_len() else { break };
                text.push(char::REPLACEMENT_CHARACTER);
                rest = &rest[invalid..];
            }
        }
    }
    *pending = rest.to_vec();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_never_cut() {
        let text = "aé東🙂\u{301}z".as_bytes();
        for cuts in 1..text.len() {
            let mut pending = Vec::new();
            let mut out = String::new();
            for chunk in text.chunks(cuts) {
                pending.extend_from_slice(chunk);
                out += &take_whole(&mut pending);
            }
            assert_eq!((out.as_bytes(), pending.len()), (text, 0));
        }
    }

    #[test]
    fn invalid_bytes_become_what_the_standard_library_makes_of_them() {
        let mut seed = 1u32;
        let mut bytes = Vec::new();
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Mostly lead and continuation bytes.
            bytes.push([0x41, 0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xF0, 0x9F][(seed >> 24) as usize % 8]);
        }
        let mut pending = Vec::new();
        let mut out = String::new();
        for &byte in &bytes {
            pending.push(byte);
            out += &take_whole(&mut pending);
            assert!(pending.len() < 4);
        }
        out += &String::from_utf8_lossy(&pending);
        assert_eq!(out, String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn only_spaces_at_the_very_start_are_stripped() {
        let stripped = |pieces: &[&str], mut left: usize| {
            let mut out = Vec::new();
            for piece in pieces {
                let mut bytes = piece.as_bytes().to_vec();
                strip(&mut bytes, &mut left);
                out.extend(bytes);
            }
            String::from_utf8_lossy(&out).into_owned()
        };
        assert_eq!(stripped(&["", " ", " a", " b"], 1), " a b");
        assert_eq!(stripped(&["  a"], 1), " a");
        assert_eq!(stripped(&[" ", " ", " a"], 2), " a");
        assert_eq!(stripped(&["a", " b"], 1), "a b");
    }
}
