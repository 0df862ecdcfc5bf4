//! The tokens of a GGUF vocabulary: their texts, what kind each is, and how special ones are found in a text.

use std::collections::HashMap;

/// What a token is, by `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
    Undefined,
}

impl Kind {
    /// The kind that a number in the file means.
    pub(super) fn of(number: i64) -> Self {
        match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Undefined,
        }
    }

    /// Whether its text in a prompt means the token itself.
    fn is_matched(self) -> bool {
        matches!(self, Self::Unknown | Self::Control | Self::UserDefined)
    }
}

/// A part of a text: something to encode, or a special token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    Text(&'t str),
    Token(u32),
}

/// The tokens by id, and back.
pub(super) struct Vocab {
    texts: Vec<Box<[u8]>>,
    kinds: Vec<Kind>,
    ids: HashMap<Box<[u8]>, u32>,
    /// Tokens that are matched in texts before anything else, longest first.
    special: Vec<(Box<str>, u32)>,
}

impl Vocab {
    /// `texts` and `kinds` are of the same length, below 2³². Of tokens with the same text, the first is found by it.
    pub(super) fn new(texts: Vec<Box<[u8]>>, kinds: Vec<Kind>) -> Self {
        let mut ids = HashMap::with_capacity(texts.len());
        for (text, id) in texts.iter().zip(0..) {
            ids.entry(text.clone()).or_insert(id);
        }
        let mut vocab = Self { texts, kinds, ids, special: Vec::new() };
        vocab.find_special();
        vocab
    }

    /// Changes what some tokens are.
    pub(super) fn set_kinds(&mut self, kinds: impl IntoIterator<Item = (u32, Kind)>) {
        for (id, kind) in kinds {
            if let Some(slot) = self.kinds.get_mut(id as usize) {
                *slot = kind;
            }
        }
        self.find_special();
    }

    fn find_special(&mut self) {
        let matched = self.texts.iter().zip(&self.kinds).zip(0..).filter(|((_, kind), _)| kind.is_matched());
        let mut special: Vec<(Box<str>, u32)> = matched
            .filter_map(|((text, _), id)| Some((std::str::from_utf8(text).ok()?, id)))
            .filter(|(text, _)| !text.is_empty())
            .map(|(text, id)| (text.into(), id))
            .collect();
        special.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        self.special = special;
    }

    /// Number of tokens.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.texts.len()).unwrap_or(u32::MAX)
    }

    /// The token of a text.
    pub(super) fn id(&self, text: &[u8]) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// The text of a token.
    pub(super) fn text(&self, id: u32) -> Option<&[u8]> {
        self.texts.get(id as usize).map(AsRef::as_ref)
    }

    /// What a token is.
    pub(super) fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Undefined)
    }

    /// Cuts a text at its special tokens: first at all occurrences of the longest, then, in what is left, of the next.
    pub(super) fn fragments<'t>(&self, text: &'t str) -> Vec<Fragment<'t>> {
        let mut fragments = vec![Fragment::Text(text)];
        let mut begins = [false; 256];
        text.bytes().for_each(|byte| begins[usize::from(byte)] = true);
        for (special, id) in self.special.iter().filter(|(special, _)| begins[usize::from(special.as_bytes()[0])]) {
            let is_in = |fragment: &Fragment<'_>| matches!(fragment, Fragment::Text(t) if t.contains(&**special));
            if !fragments.iter().any(is_in) {
                continue;
            }
            let mut cut = Vec::with_capacity(fragments.len() + 2);
            for fragment in fragments {
                let Fragment::Text(text) = fragment else {
                    cut.push(fragment);
                    continue;
                };
                for (index, part) in text.split(&**special).enumerate() {
                    if index > 0 {
                        cut.push(Fragment::Token(*id));
                    }
                    if !part.is_empty() {
                        cut.push(Fragment::Text(part));
                    }
                }
            }
            fragments = cut;
        }
        fragments.retain(|fragment| *fragment != Fragment::Text(""));
        fragments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocab(tokens: &[(&str, Kind)]) -> Vocab {
        let texts = tokens.iter().map(|(text, _)| text.as_bytes().into()).collect();
        Vocab::new(texts, tokens.iter().map(|&(_, kind)| kind).collect())
    }

    #[test]
    fn the_longest_special_token_goes_first() {
        let vocab = vocab(&[("<s>", Kind::Control), ("<s>>", Kind::UserDefined), ("a", Kind::Normal)]);
        assert_eq!(
            vocab.fragments("a<s>><s>é"),
            [Fragment::Text("a"), Fragment::Token(1), Fragment::Token(0), Fragment::Text("é")]
        );
        assert_eq!(vocab.fragments("<s><s>"), [Fragment::Token(0), Fragment::Token(0)]);
        assert!(vocab.fragments("").is_empty());
    }

    #[test]
    fn kinds_can_be_corrected() {
        let mut vocab = vocab(&[("</s>", Kind::Normal), ("b", Kind::Normal)]);
        assert_eq!(vocab.fragments("</s>"), [Fragment::Text("</s>")]);
        vocab.set_kinds([(0, Kind::Control), (99, Kind::Control)]);
        assert_eq!(vocab.fragments("</s>"), [Fragment::Token(0)]);
    }

    #[test]
    fn of_equal_texts_the_first_is_found() {
        let vocab = vocab(&[("x", Kind::Normal), ("x", Kind::Normal)]);
        assert_eq!((vocab.id(b"x"), vocab.len()), (Some(0), 2));
    }
}
