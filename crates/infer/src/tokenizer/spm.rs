//! SentencePiece byte-pair encoding by scores, as in Llama 1 and 2, Mistral and Mixtral: characters merge into the
//! token of the highest score, and characters without a token become bytes.

use super::error::TokenizerError;
use super::merge::{Merger, Symbol};
use super::vocab::Vocab;

/// The character that stands for a space in such vocabularies: U+2581.
pub(super) const SPACE: &str = "\u{2581}";

/// Scores of all tokens, and what to do with bytes.
pub(super) struct Spm {
    /// By token id; ordered as the scores are.
    scores: Vec<i32>,
    /// By byte: the token that stands for it.
    byte_tokens: Box<[Option<u32>; 256]>,
    longest: usize,
}

impl Spm {
    /// `scores` has one finite score a token.
    pub(super) fn new(vocab: &Vocab, scores: &[f32]) -> Self {
        let byte_token = |byte: u8| {
            let named = vocab.id(format!("<0x{byte:02X}>").as_bytes());
            named.or_else(|| vocab.id(&[byte]))
        };
        let mut byte_tokens = Box::new([None; 256]);
        for (byte, token) in (0..=u8::MAX).zip(byte_tokens.iter_mut()) {
            *token = byte_token(byte);
        }
        let longest = (0..vocab.len()).filter_map(|id| vocab.text(id)).map(<[u8]>::len).max().unwrap_or(0);
        Self { scores: scores.iter().map(|&score| ordered(score)).collect(), byte_tokens, longest }
    }

    /// Appends the tokens of `text`, in which [`SPACE`] already stands for spaces.
    pub(super) fn encode(
        &self,
        vocab: &Vocab,
        merger: &mut Merger<i32>,
        text: &str,
        unknown: Option<u32>,
        tokens: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        /// A character that is no token.
        const NO_TOKEN: u32 = u32::MAX;
        let bytes = text.as_bytes();
        let symbols = text.char_indices().map(|(start, c)| {
            let end = start + c.len_utf8();
            (start, end, vocab.id(&bytes[start..end]).unwrap_or(NO_TOKEN))
        });
        let pair = |left: &Symbol, right: &Symbol| {
            let joined = &bytes[left.start..right.end];
            let id = if joined.len() <= self.longest { vocab.id(joined) } else { None }?;
            Some((*self.scores.get(id as usize)?, id))
        };
        for symbol in merger.merge(symbols, pair) {
            if symbol.id != NO_TOKEN {
                tokens.push(symbol.id);
                continue;
            }
            for &byte in &bytes[symbol.start..symbol.end] {
                let token = self.byte_tokens[usize::from(byte)].or(unknown).ok_or_else(|| {
                    TokenizerError::text(
                        format!("the vocabulary has no token for byte 0x{byte:02X} and none for the unknown"),
                        "leave that character out, or use a model with byte tokens",
                    )
                })?;
                tokens.push(token);
            }
        }
        Ok(())
    }
}

/// An integer that is ordered as the float is; both zeros are equal.
fn ordered(score: f32) -> i32 {
    let bits = (score + 0.0).to_bits().cast_signed();
    bits ^ (((bits >> 31).cast_unsigned() >> 1).cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_ordered_as_floats() {
        let scores = [f32::MIN, -2.0, -1.5, -1e-40, 0.0, 1e-40, 1.0, f32::MAX];
        assert!(scores.windows(2).all(|pair| ordered(pair[0]) < ordered(pair[1])));
        assert_eq!(ordered(-0.0), ordered(0.0));
    }
}
