//! Byte-level byte-pair encoding by ranked merges, as in GPT-2, Llama 3, Qwen and OLMo.

use super::bytes;
use super::error::TokenizerError;
use super::merge::{Merger, Symbol};
use super::pretokenize::{Rules, Splitter};
use super::vocab::Vocab;
use std::cmp::Reverse;
use std::collections::HashMap;

/// Merges, and how texts are cut into words.
///
/// Merges are between texts, which may be no tokens (a vocabulary may have been trimmed): such texts have numbers
/// beyond those of the vocabulary.
pub(super) struct Bpe {
    splitter: Splitter,
    ignore_merges: bool,
    /// (left, right) → (rank, what they become).
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// By byte: the text of its character.
    byte_texts: Box<[u32; 256]>,
    /// Texts that are no tokens, by number less the vocabulary's size.
    others: Vec<Box<[u8]>>,
}

/// Numbers texts: a token's text has the token's id, others follow.
struct Numbering<'v> {
    vocab: &'v Vocab,
    ids: HashMap<Box<[u8]>, u32>,
    others: Vec<Box<[u8]>>,
}

impl Numbering<'_> {
    /// `None` when 2³² texts are not enough.
    fn number(&mut self, text: &[u8]) -> Option<u32> {
        if let Some(id) = self.vocab.id(text).or_else(|| self.ids.get(text).copied()) {
            return Some(id);
        }
        let id = self.vocab.len().checked_add(u32::try_from(self.others.len()).ok()?)?;
        self.others.push(text.into());
        self.ids.insert(text.into(), id);
        Some(id)
    }
}

impl Bpe {
    /// `merges` are lines such as `Ġ t`, the first the most urgent.
    pub(super) fn new<'m>(
        vocab: &Vocab,
        merges: impl Iterator<Item = &'m [u8]>,
        rules: &Rules,
    ) -> Result<Self, TokenizerError> {
        let too_many = || TokenizerError::bad("more merges than can be numbered", "convert the model again");
        let mut numbering = Numbering { vocab, ids: HashMap::new(), others: Vec::new() };
        let mut ranked = HashMap::new();
        let mut joined = Vec::new();
        for (rank, line) in merges.enumerate() {
            // The first character may be a space itself in a vocabulary that isn't byte-level.
            let Some(space) = line.iter().skip(1).position(|&byte| byte == b' ') else { continue };
            let (left, right) = (&line[..space + 1], &line[space + 2..]);
            joined.clear();
            joined.extend_from_slice(left);
            joined.extend_from_slice(right);
            let mut number = |text: &[u8]| numbering.number(text).ok_or_else(too_many);
            let pair = (number(left)?, number(right)?);
            let rank = u32::try_from(rank).map_err(|_| too_many())?;
            ranked.entry(pair).or_insert((rank, number(&joined)?));
        }
        let mut byte_texts = Box::new([0; 256]);
        for (byte, text) in (0..=u8::MAX).zip(byte_texts.iter_mut()) {
            let mut utf8 = [0; 4];
            let encoded = bytes::char_of(byte).encode_utf8(&mut utf8);
            *text = numbering.number(encoded.as_bytes()).ok_or_else(too_many)?;
        }
        Ok(Self {
            splitter: Splitter::new(rules)?,
            ignore_merges: rules.ignore_merges,
            merges: ranked,
            byte_texts,
            others: numbering.others,
        })
    }

    /// Appends the tokens of `text`.
    pub(super) fn encode(
        &self,
        vocab: &Vocab,
        merger: &mut Merger<Reverse<u32>>,
        text: &str,
        tokens: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let pair = |left: &Symbol, right: &Symbol| {
            self.merges.get(&(left.id, right.id)).map(|&(rank, merged)| (Reverse(rank), merged))
        };
        for word in self.splitter.split(text)? {
            let word = &text.as_bytes()[word];
            if self.ignore_merges {
                let encoded: String = word.iter().map(|&byte| bytes::char_of(byte)).collect();
                if let Some(token) = vocab.id(encoded.as_bytes()) {
                    tokens.push(token);
                    continue;
                }
            }
            let symbols = word.iter().enumerate().map(|(at, &byte)| (at, at + 1, self.byte_texts[usize::from(byte)]));
            for symbol in merger.merge(symbols, pair) {
                if symbol.id < vocab.len() {
                    tokens.push(symbol.id);
                } else if let Some(text) = self.others.get((symbol.id - vocab.len()) as usize) {
                    // A text that is no token falls apart into its characters; those that are no tokens either are
                    // dropped, as every implementation does (complete vocabularies have all that occur in UTF-8).
                    tokens.extend(text.iter().filter_map(|&byte| vocab.id(&[byte])));
                }
            }
        }
        Ok(())
    }
}
