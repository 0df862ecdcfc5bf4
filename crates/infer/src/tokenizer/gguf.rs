//! Tokenizers from GGUF metadata (`tokenizer.ggml.*`), with llama.cpp's rules.
//!
//! Read are byte-level vocabularies with merges (model `gpt2`) and SentencePiece ones with scores (model `llama`).

use super::bpe::Bpe;
use super::bytes;
use super::error::{TokenizerError, shown};
use super::merge::Merger;
use super::pretokenize::{Rules, rules_of};
use super::special::{CONTROLS, ENDS, SHOWN, SpecialIds, named_stops};
use super::spm::{SPACE, Spm};
use super::vocab::{Fragment, Kind, Vocab};
use overspill::formats::{GgufArray, GgufMetadata, GgufStrings};
use std::collections::BTreeSet;

const RECONVERT: &str = "convert the model again with a current converter";

/// A tokenizer described by GGUF metadata.
pub(super) struct Ggml {
    vocab: Vocab,
    model: Model,
    unknown: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    pub(super) special: SpecialIds,
}

enum Model {
    Bpe(Bpe),
    Spm { spm: Spm, add_space_prefix: bool },
}

impl Ggml {
    /// `None` if the file says that it holds no tokenizer.
    pub(super) fn load(gguf: &GgufMetadata) -> Result<Option<Self>, TokenizerError> {
        Self::read(gguf).map_err(|error| error.file(gguf.path()))
    }

    fn read(gguf: &GgufMetadata) -> Result<Option<Self>, TokenizerError> {
        let Some(model) = text(gguf, "tokenizer.ggml.model")? else { return Ok(None) };
        match model {
            "none" | "no_vocab" => return Ok(None),
            "gpt2" | "llama" => {}
            other => {
                let cause = format!("tokenizers of the kind '{}' are not read (only gpt2 and llama are)", shown(other));
                return Err(TokenizerError::unsupported(cause, "give the prompt as ids").key("tokenizer.ggml.model"));
            }
        }
        let mut vocab = read_vocab(gguf)?;
        let count = vocab.len();
        let is_spm = model == "llama";
        let rules = if is_spm { None } else { Some(read_rules(gguf)?) };
        let mut special = SpecialIds {
            bos: token_id(gguf, "bos", count)?.or(if is_spm && count > 1 { Some(1) } else { None }),
            eos: token_id(gguf, "eos", count)?.or(if is_spm && count > 2 { Some(2) } else { None }),
            stop: named_stops(gguf, count).collect(),
        };
        special.stop.extend(settle_kinds(&mut vocab));
        special.settle();
        let unknown = token_id(gguf, "unknown", count)?.or(is_spm.then_some(0));
        let (add_bos, add_eos) = read_additions(gguf, rules, &special)?;
        let model = match rules {
            Some(rules) => Model::Bpe(read_bpe(gguf, &vocab, rules)?),
            None => Model::Spm {
                spm: Spm::new(&vocab, &read_scores(gguf, count)?),
                add_space_prefix: flag(gguf, "tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
            },
        };
        Ok(Some(Self { vocab, model, unknown, add_bos, add_eos, special }))
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab.len() as usize
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.vocab.id(token.as_bytes())
    }

    /// The text of a token as the vocabulary writes it.
    pub(super) fn token(&self, id: u32) -> Option<String> {
        self.vocab.text(id).map(|text| String::from_utf8_lossy(text).into_owned())
    }

    pub(super) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = Vec::new();
        if add_special && self.add_bos {
            tokens.extend(self.special.bos);
        }
        let fragments = self.vocab.fragments(text);
        match &self.model {
            Model::Bpe(bpe) => {
                let mut merger = Merger::new();
                for fragment in fragments {
                    match fragment {
                        Fragment::Text(text) => bpe.encode(&self.vocab, &mut merger, text, &mut tokens)?,
                        Fragment::Token(id) => tokens.push(id),
                    }
                }
            }
            Model::Spm { spm, add_space_prefix } => {
                let mut merger = Merger::new();
                let mut after_special = true;
                for fragment in fragments {
                    match fragment {
                        Fragment::Text(text) => {
                            let prefix = if *add_space_prefix && after_special { SPACE } else { "" };
                            let text = [prefix, &text.replace(' ', SPACE)].concat();
                            spm.encode(&self.vocab, &mut merger, &text, self.unknown, &mut tokens)?;
                            after_special = false;
                        }
                        Fragment::Token(id) => {
                            tokens.push(id);
                            after_special = true;
                        }
                    }
                }
            }
        }
        if add_special && self.add_eos {
            tokens.extend(self.special.eos);
        }
        Ok(tokens)
    }

    /// How many spaces at a text's start are an artefact of the vocabulary.
    pub(super) fn leading_spaces(&self) -> usize {
        match &self.model {
            Model::Spm { add_space_prefix: true, .. } => 1,
            _ => 0,
        }
    }

    /// The bytes that a token adds to a text; `None` if it adds none.
    pub(super) fn piece(&self, id: u32) -> Option<Vec<u8>> {
        let text = self.vocab.text(id)?;
        match (self.vocab.kind(id), &self.model) {
            (Kind::UserDefined, _) => Some(text.to_vec()),
            (Kind::Byte, _) => bytes::fallback_byte(std::str::from_utf8(text).ok()?).map(|byte| vec![byte]),
            (Kind::Normal, model) => Some(match (std::str::from_utf8(text), model) {
                (Ok(text), Model::Bpe(_)) => bytes::decode(text),
                (Ok(text), Model::Spm { .. }) => text.replace(SPACE, " ").into_bytes(),
                (Err(_), _) => text.to_vec(),
            }),
            (Kind::Unknown | Kind::Control | Kind::Unused | Kind::Undefined, _) => None,
        }
    }
}

/// The token that `tokenizer.ggml.NAME_token_id` names; `None` if there is no such key, or it says "none" (−1).
pub(super) fn token_id(gguf: &GgufMetadata, name: &str, count: u32) -> Result<Option<u32>, TokenizerError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(value) = gguf.get(&key) else { return Ok(None) };
    match value.as_u64() {
        Some(none) if none == u64::from(u32::MAX) => Ok(None),
        Some(id) => match u32::try_from(id) {
            Ok(id) if id < count => Ok(Some(id)),
            _ => {
                let cause = format!("token {id} does not exist: the vocabulary has {count}");
                Err(TokenizerError::bad(cause, RECONVERT).key(&key))
            }
        },
        None if value.type_name().starts_with("int") => Ok(None),
        None => Err(wanting(gguf, &key, "an integer")),
    }
}

fn wanting(gguf: &GgufMetadata, key: &str, wanted: &str) -> TokenizerError {
    let cause = match gguf.get(key) {
        Some(value) => format!("of type {}, where {wanted} was expected", value.type_name()),
        None => format!("missing, where {wanted} was expected"),
    };
    TokenizerError::bad(cause, RECONVERT).key(key)
}

fn text<'g>(gguf: &'g GgufMetadata, key: &str) -> Result<Option<&'g str>, TokenizerError> {
    match gguf.get(key) {
        None => Ok(None),
        Some(value) => value.as_str().map(Some).ok_or_else(|| wanting(gguf, key, "text")),
    }
}

fn flag(gguf: &GgufMetadata, key: &str) -> Result<Option<bool>, TokenizerError> {
    match gguf.get(key) {
        None => Ok(None),
        Some(value) => value.as_bool().map(Some).ok_or_else(|| wanting(gguf, key, "a truth value")),
    }
}

fn strings<'g>(gguf: &'g GgufMetadata, key: &str) -> Result<&'g GgufStrings, TokenizerError> {
    gguf.strings(key).ok_or_else(|| wanting(gguf, key, "an array of strings"))
}

/// An array with at least `count` elements, if the key is there.
fn array<'g>(gguf: &'g GgufMetadata, key: &str, count: u32) -> Result<Option<&'g GgufArray>, TokenizerError> {
    let Some(value) = gguf.get(key) else { return Ok(None) };
    let array = value.as_array().ok_or_else(|| wanting(gguf, key, "an array"))?;
    if array.len() < count as usize {
        let cause = format!("{} elements for {count} tokens", array.len());
        return Err(TokenizerError::bad(cause, RECONVERT).key(key));
    }
    Ok(Some(array))
}

fn read_vocab(gguf: &GgufMetadata) -> Result<Vocab, TokenizerError> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    const TYPES: &str = "tokenizer.ggml.token_type";
    let tokens = strings(gguf, TOKENS)?;
    let count = match u32::try_from(tokens.len()) {
        Ok(count) if count > 0 => count,
        _ => {
            let cause = format!("a vocabulary of {} tokens", tokens.len());
            return Err(TokenizerError::bad(cause, RECONVERT).key(TOKENS));
        }
    };
    let texts = (0..tokens.len()).map(|id| match tokens.bytes(id) {
        Some(text) if !text.is_empty() => text.into(),
        _ => format!("[EMPTY_{id}]").into_bytes().into(),
    });
    let kinds = match array(gguf, TYPES, count)? {
        None => vec![Kind::Normal; tokens.len()],
        Some(types) => (0..tokens.len())
            .map(|id| types.i64(id).map(Kind::of))
            .collect::<Option<_>>()
            .ok_or_else(|| TokenizerError::bad("not an array of integers", RECONVERT).key(TYPES))?,
    };
    Ok(Vocab::new(texts.collect(), kinds))
}

/// Corrects what converters are known to get wrong, by the texts of tokens; returns those that end an answer.
fn settle_kinds(vocab: &mut Vocab) -> BTreeSet<u32> {
    let find = |vocab: &Vocab, text: &str| vocab.id(text.as_bytes());
    let all = |vocab: &Vocab, texts: &[&str]| texts.iter().filter_map(|text| find(vocab, text)).collect::<Vec<_>>();
    let mut ends: BTreeSet<u32> = all(vocab, ENDS).into_iter().collect();
    let mut kinds: Vec<(u32, Kind)> = ends.iter().map(|&id| (id, Kind::Control)).collect();
    kinds.extend(all(vocab, CONTROLS).into_iter().map(|id| (id, Kind::Control)));
    kinds.extend(all(vocab, SHOWN).into_iter().map(|id| (id, Kind::UserDefined)));
    let has = |text| find(vocab, text).is_some();
    // In gpt-oss and Solar a message ends with <|end|> but the answer goes on.
    let is_harmony = (has("<|call|>") || has("<|calls|>")) && (has("<|return|>") || has("<|flush|>"));
    // Gemma 4 and PLaMo have an ordinary token with this text.
    let is_plain = has("<|tool_response>") || has("<|plamo:eos|>");
    let exceptions = [("<|end|>", is_harmony, Kind::UserDefined), ("</s>", is_plain, Kind::Normal)];
    for (text, applies, kind) in exceptions {
        if let (Some(id), true) = (find(vocab, text), applies) {
            ends.remove(&id);
            kinds.push((id, kind));
        }
    }
    vocab.set_kinds(kinds);
    ends
}

fn read_rules(gguf: &GgufMetadata) -> Result<&'static Rules, TokenizerError> {
    const PRE: &str = "tokenizer.ggml.pre";
    let name = text(gguf, PRE)?.unwrap_or_else(|| {
        tracing::warn!(file = %gguf.path().display(), "no {PRE}: the default is taken, answers may suffer");
        "default"
    });
    rules_of(name).ok_or_else(|| {
        let cause = format!("the pre-tokenizer '{}' is not known", shown(name));
        TokenizerError::unsupported(cause, "use a newer release, or give the prompt as ids").key(PRE)
    })
}

/// Whether BOS and EOS are added to a text.
fn read_additions(
    gguf: &GgufMetadata,
    rules: Option<&Rules>,
    special: &SpecialIds,
) -> Result<(bool, bool), TokenizerError> {
    let addition = |key: &str, id: Option<u32>, by_default: bool| match (flag(gguf, key)?, id) {
        (Some(true), None) => {
            Err(TokenizerError::bad("true, but no such token is named", "name its id, or set it to false").key(key))
        }
        (given, _) => Ok(given.unwrap_or(by_default)),
    };
    let add_bos = addition("tokenizer.ggml.add_bos_token", special.bos, rules.is_none_or(|rules| rules.add_bos))?;
    Ok((add_bos, addition("tokenizer.ggml.add_eos_token", special.eos, false)?))
}

fn read_bpe(gguf: &GgufMetadata, vocab: &Vocab, rules: &Rules) -> Result<Bpe, TokenizerError> {
    const MERGES: &str = "tokenizer.ggml.merges";
    let merges = strings(gguf, MERGES)?;
    let lines = (0..merges.len()).filter_map(|index| merges.bytes(index));
    Bpe::new(vocab, lines, rules).map_err(|error| error.key(MERGES))
}

fn read_scores(gguf: &GgufMetadata, count: u32) -> Result<Vec<f32>, TokenizerError> {
    const SCORES: &str = "tokenizer.ggml.scores";
    let Some(scores) = array(gguf, SCORES, count)? else { return Ok(vec![0.0; count as usize]) };
    let score = |id: usize| scores.f32(id).or_else(|| scores.i64(id).map(|score| score as f32));
    (0..count as usize)
        .map(|id| match score(id) {
            Some(score) if !score.is_nan() => Ok(score),
            Some(_) => {
                Err(TokenizerError::bad(format!("the score of token {id} is not a number"), RECONVERT).key(SCORES))
            }
            None => Err(TokenizerError::bad("not an array of numbers", RECONVERT).key(SCORES)),
        })
        .collect()
}
