//! How byte-level vocabularies cut a text into words before merging: one table row for each value of
//! `tokenizer.ggml.pre`.
//!
//! The expressions are those of the models' own `tokenizer.json` files, applied one after the other as llama.cpp does:
//! each cuts what the one before has left, and what lies between two matches is a piece too. Where llama.cpp only
//! approximates an expression (the case of letters beyond ASCII in `tekken`, `gpt-4o` and `tiny_aya`, marks in `kimi-k2`),
//! the model's own is used: it is what the model was trained with.

use super::error::TokenizerError;
use fancy_regex::{Regex, RegexBuilder};
use std::ops::Range;

/// What depends on `tokenizer.ggml.pre`.
#[derive(Debug)]
pub(super) struct Rules {
    names: &'static [&'static str],
    stages: &'static [&'static str],
    /// A word that is a token as it stands isn't merged.
    pub ignore_merges: bool,
    /// Whether a prompt begins with the BOS token unless the file says otherwise.
    pub add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const NO_CONTRACTIONS: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const MINICPM: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const JAIS2: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";
const SEED_CODER: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const PORO: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const CJK: &str = "[一-龥぀-ゟ゠-ヿ]+";

const fn rules(names: &'static [&'static str], stages: &'static [&'static str]) -> Rules {
    Rules { names, stages, ignore_merges: false, add_bos: false }
}

impl Rules {
    const fn whole_words(self) -> Self {
        Self { ignore_merges: true, ..self }
    }

    const fn with_bos(self) -> Self {
        Self { add_bos: true, ..self }
    }
}

static TABLE: &[Rules] = &[
    rules(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    rules(
        &[
            "gpt-2",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        &[GPT2],
    ),
    rules(
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[r"\p{N}", GPT2],
    ),
    rules(&["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"], &[LLAMA3])
        .whole_words()
        .with_bos(),
    rules(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    rules(&["glm4", "glm5"], &[LLAMA3]).whole_words(),
    rules(&["jais-2"], &[JAIS2]),
    rules(
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        &[QWEN2],
    ),
    rules(&["laguna"], &[r"[^\n]+|[\n]+", QWEN2]),
    rules(&["qwen35"], &[QWEN35]),
    rules(&["ufakzeka"], &[NO_CONTRACTIONS]),
    rules(&["minicpm5"], &[r"\p{N}{1,3}", MINICPM]).whole_words(),
    rules(&["seed-coder"], &[SEED_CODER]),
    rules(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    rules(&["exaone-moe"], &[EXAONE_MOE]),
    rules(&["tekken"], &[TEKKEN]).whole_words().with_bos(),
    rules(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT4O]),
    rules(&["tiny_aya", "cohere2moe"], &[r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O]),
    rules(&["kimi-k2"], &[KIMI]),
    rules(&["deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"], &[r"\p{N}{1,3}", CJK, DEEPSEEK]),
    rules(&["deepseek-coder"], &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]),
    rules(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    rules(&["poro-chat", "bloom", "gpt3-finnish"], &[PORO]),
    rules(&["viking"], &[PORO, r"\p{N}"]),
    rules(&["superbpe"], &[r"\p{N}+", r"(?=(\d{3})+(?!\d))"]),
];

/// The rules for a value of `tokenizer.ggml.pre`, if it is known.
pub(super) fn rules_of(name: &str) -> Option<&'static Rules> {
    TABLE.iter().find(|rules| rules.names.contains(&name))
}

/// Every value of `tokenizer.ggml.pre` that is known.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().flat_map(|rules| rules.names.iter().copied())
}

/// Cuts texts by a row of the table.
pub(super) struct Splitter {
    stages: Vec<Stage>,
}

/// One expression, compiled.
///
/// Nearly all end in `\s+(?!\S)|\s+`: of a run of blanks before a word, the last goes with the word. Look-ahead takes
/// a backtracking matcher, with a stack that long runs overflow; so `\s+` is matched, in linear time, and the last blank
/// given back.
struct Stage {
    regex: Regex,
    blanks: Blanks,
}

/// Which matches give back their last character.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Blanks {
    /// None.
    Kept,
    /// Those that end in a blank.
    Shared,
    /// Those that end in a blank that is no line break (which ends a match by another alternative).
    SharedUnlessBreak,
}

impl Stage {
    const SHARED: &str = r"|\s+(?!\S)|\s+";
    const BREAKS: &str = r"|\s*[\r\n]";
    /// Bounds the time of the few expressions that do look ahead: about a second.
    const STEPS_MAX: usize = 1 << 26;

    fn new(expression: &str) -> Result<Self, fancy_regex::Error> {
        let (expression, blanks) = match expression.strip_suffix(Self::SHARED) {
            Some(rest) if rest.contains(Self::BREAKS) => (format!(r"{rest}|\s+"), Blanks::SharedUnlessBreak),
            Some(rest) => (format!(r"{rest}|\s+"), Blanks::Shared),
            None => (expression.to_owned(), Blanks::Kept),
        };
        let regex = RegexBuilder::new(&expression).backtrack_limit(Self::STEPS_MAX).build()?;
        Ok(Self { regex, blanks })
    }

    /// Appends the pieces of `word`, a range of `text`.
    fn cut(&self, text: &str, word: Range<usize>, pieces: &mut Vec<Range<usize>>) -> Result<(), fancy_regex::Error> {
        let inside = &text[word.clone()];
        let (mut from, mut at) = (0, 0);
        while let Some(found) = self.regex.find_from_pos(inside, at)? {
            let end = found.end() - self.given_back(found.as_str(), &inside[found.end()..]);
            pieces.extend([from..found.start(), found.start()..end].map(|piece| shift(piece, word.start)));
            from = end;
            // An empty match cuts where it is; the search goes on after the next character.
            let step = inside[end..].chars().next().map_or(1, char::len_utf8);
            at = if end > found.start() { end } else { end + step };
            if at > inside.len() {
                break;
            }
        }
        pieces.push(shift(from..inside.len(), word.start));
        Ok(())
    }

    /// How many bytes of a match belong to what comes after it.
    fn given_back(&self, found: &str, after: &str) -> usize {
        let Some(last) = found.chars().next_back().filter(|c| c.is_whitespace()) else { return 0 };
        let is_shared = match self.blanks {
            Blanks::Kept => false,
            Blanks::Shared => true,
            Blanks::SharedUnlessBreak => !matches!(last, '\r' | '\n'),
        };
        if is_shared && !after.is_empty() && found.len() > last.len_utf8() { last.len_utf8() } else { 0 }
    }
}

fn shift(range: Range<usize>, by: usize) -> Range<usize> {
    range.start + by..range.end + by
}

impl Splitter {
    /// Compiles the expressions of a row.
    pub(super) fn new(rules: &Rules) -> Result<Self, TokenizerError> {
        let compile = |expression: &&str| {
            Stage::new(expression).map_err(|error| {
                let cause = format!("the pre-tokenizer '{}' does not compile", rules.names[0]);
                TokenizerError::unsupported(cause, "report it").with_source(error)
            })
        };
        Ok(Self { stages: rules.stages.iter().map(compile).collect::<Result<_, _>>()? })
    }

    /// The words of a text, as byte ranges without gaps.
    pub(super) fn split(&self, text: &str) -> Result<Vec<Range<usize>>, TokenizerError> {
        let mut words: Vec<_> = std::iter::once(0..text.len()).collect();
        let mut pieces = Vec::new();
        for stage in &self.stages {
            for word in words.drain(..) {
                stage.cut(text, word, &mut pieces).map_err(|error| {
                    TokenizerError::text("the text cannot be cut into words", "shorten it").with_source(error)
                })?;
            }
            pieces.retain(|piece| !piece.is_empty());
            std::mem::swap(&mut words, &mut pieces);
        }
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn words<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let splitter = Splitter::new(rules_of(name).unwrap()).unwrap();
        splitter.split(text).unwrap().into_iter().map(|word| &text[word]).collect()
    }

    #[test]
    fn every_row_compiles_and_loses_nothing() {
        let text = "  It's 1234567 o'CLOCK\r\n\n\tÉtéS, 東京タワー 10€…!?\u{301}\u{2028} \u{0}end  ";
        for name in names() {
            assert_eq!(words(name, text).concat(), text, "{name}");
            assert!(words(name, text).len() > 5, "{name}");
            assert!(words(name, "").is_empty(), "{name}");
        }
    }

    #[test]
    fn no_name_stands_twice() {
        let mut all: Vec<&str> = names().collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn the_families_differ_where_they_should() {
        assert_eq!(words("gpt-2", "I'LL be  1234!\n\n x"), ["I", "'", "LL", " be", " ", " 1234", "!", "\n\n", " x"]);
        assert_eq!(
            words("llama-bpe", "I'LL be  1234!\n\n x"),
            ["I", "'LL", " be", " ", " ", "123", "4", "!\n\n", " x"]
        );
        assert_eq!(words("qwen2", "12a"), ["1", "2", "a"]);
        assert_eq!(words("tekken", "ÉCOLEété"), ["ÉCOLEété"]);
        assert_eq!(words("tekken", "étéÉCOLE"), ["été", "ÉCOLE"]);
        assert_eq!(words("deepseek-v3", "1234東京ab"), ["123", "4", "東京", "ab"]);
        assert_eq!(words("superbpe", "1234567"), ["1", "234", "567"]);
    }

    /// Cuts by expressions as they are written, with look-ahead.
    fn looking_ahead(stages: &[Regex], text: &str) -> Vec<String> {
        let mut words = vec![text.to_owned()];
        for regex in stages {
            let cut = |word: &String| {
                let mut from = 0;
                let mut pieces = Vec::new();
                for found in regex.find_iter(word) {
                    let found = found.unwrap();
                    pieces.extend([word[from..found.start()].to_owned(), found.as_str().to_owned()]);
                    from = found.end();
                }
                pieces.push(word[from..].to_owned());
                pieces
            };
            words = words.iter().flat_map(cut).filter(|piece| !piece.is_empty()).collect();
        }
        words
    }

    #[test]
    fn giving_back_a_blank_is_the_same_as_looking_ahead() {
        let alphabet =
            [" ", " ", "\n", "\r\n", "\t", "\u{3000}", "a", "É", "\u{301}", "1", "٣", "!", "'", "s", "東", "/"];
        for rules in TABLE {
            let stages: Vec<Regex> = rules.stages.iter().map(|stage| Regex::new(stage).unwrap()).collect();
            let splitter = Splitter::new(rules).unwrap();
            let mut seed = 9u32;
            for _ in 0..200 {
                let mut next = |_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    alphabet[(seed >> 24) as usize % alphabet.len()]
                };
                let text: String = (0..24).map(&mut next).collect();
                let words: Vec<&str> = splitter.split(&text).unwrap().into_iter().map(|word| &text[word]).collect();
                assert_eq!(words, looking_ahead(&stages, &text), "{}: {text:?}", rules.names[0]);
            }
        }
    }

    #[test]
    fn a_long_run_of_blanks_is_one_word() {
        let text = " ".repeat(3 << 20);
        for name in ["gpt-2", "llama-bpe", "tekken"] {
            assert_eq!(words(name, &text).len(), 1, "{name}");
            assert_eq!(words(name, &(text.clone() + "x")), [&text[1..], " x"], "{name}");
        }
    }
}
