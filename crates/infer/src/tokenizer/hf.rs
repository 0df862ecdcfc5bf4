//! Tokenizers from `tokenizer.json`, run by the `tokenizers` library, with what `tokenizer_config.json` adds to it.
//!
//! Decoding is done here, token by token, for the decoders that language models use, so that text can be streamed;
//! the library decodes for the rest.

use super::bytes;
use super::error::{TokenizerError, shown};
use super::special::SpecialIds;
use overspill::formats::Metadata;
use serde_json::Value;
use std::fs::File;
use std::io::Read as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::{ModelWrapper, Tokenizer as Library};

/// The largest vocabularies in use take 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;
const REFETCH: &str = "fetch it again";

/// A tokenizer described by JSON files.
pub(super) struct HuggingFace {
    inner: Library,
    decoder: Decoder,
    /// Whether the library's own post-processor adds special tokens.
    use_template: bool,
    prefix: Option<u32>,
    suffix: Option<u32>,
    vocab_size: usize,
    pub(super) special: SpecialIds,
}

/// How tokens become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decoder {
    /// Characters of the byte-level alphabet.
    ByteLevel,
    /// A character that stands for a space, perhaps tokens for single bytes, and spaces to strip at the start.
    Marks { mark: char, bytes: bool, leading_spaces: usize },
    /// Whatever else the library knows.
    Library,
}

impl HuggingFace {
    /// Reads `path`, a `tokenizer.json`. `metadata` is that of the same model.
    pub(super) fn load(path: &Path, settings: Option<&Value>, metadata: &Metadata) -> Result<Self, TokenizerError> {
        let library = read_library(path).map_err(|error| error.file(path))?;
        let mut special = SpecialIds::from_metadata(metadata);
        let named = |key: &str| settings.and_then(|s| named_token(s, key)).and_then(|t| library.token_to_id(t));
        special.bos = named("bos_token").or(special.bos);
        let eos = named("eos_token");
        special.stop.extend(eos);
        special.eos = eos.or(special.eos);
        special.settle();
        let decoder = library.get_decoder().and_then(|decoder| serde_json::to_value(decoder).ok());
        // A vocabulary may have gaps.
        let largest = library.get_vocab(true).into_values().max().unwrap_or(0);
        let mut tokenizer = Self {
            decoder: decoder.as_ref().map_or(Decoder::Library, classify),
            inner: library,
            use_template: true,
            prefix: None,
            suffix: None,
            vocab_size: largest as usize + 1,
            special,
        };
        let added = tokenizer.template().map_err(|error| error.file(path))?;
        let settings_path = path.with_file_name("tokenizer_config.json");
        tokenizer.settle_additions(added, settings).map_err(|error| error.file(&settings_path))?;
        Ok(tokenizer)
    }

    /// The tokens that the library's post-processor adds to a text.
    fn template(&self) -> Result<Vec<u32>, TokenizerError> {
        let (with, without) = (self.ids("", true)?, self.ids("", false)?);
        Ok(if with == without { Vec::new() } else { with })
    }

    /// Decides where BOS and EOS come from: the post-processor of tokenizer.json if it adds them, else the settings.
    fn settle_additions(&mut self, mut added: Vec<u32>, settings: Option<&Value>) -> Result<(), TokenizerError> {
        let setting = |key| settings.and_then(|s| s.get(key)).and_then(Value::as_bool);
        // These classes make their post-processor anew from the settings; others keep that of tokenizer.json.
        let class = settings.and_then(|s| s.get("tokenizer_class")).and_then(Value::as_str).unwrap_or_default();
        let obeys = ["Llama", "CodeLlama", "Gemma", "Cohere"].iter().any(|name| class.starts_with(name));
        if obeys && setting("add_bos_token") == Some(false) {
            self.use_template = false;
            added.clear();
        }
        let missing = |key: &str| {
            TokenizerError::bad("true, but no such token is named", "name the token, or set it to false").key(key)
        };
        if setting("add_bos_token") == Some(true) && (added.is_empty() || added.first().copied() != self.special.bos) {
            self.prefix = Some(self.special.bos.ok_or_else(|| missing("add_bos_token"))?);
        }
        if setting("add_eos_token") == Some(true) && (added.is_empty() || added.last().copied() != self.special.eos) {
            self.suffix = Some(self.special.eos.ok_or_else(|| missing("add_eos_token"))?);
        }
        Ok(())
    }

    fn ids(&self, text: &str, use_template: bool) -> Result<Vec<u32>, TokenizerError> {
        guarded(|| {
            let encoding = self.inner.encode_fast(text, use_template).map_err(|error| {
                TokenizerError::text(format!("the text cannot be encoded: {error}"), "check the model's tokenizer.json")
            })?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of a token as the vocabulary writes it.
    pub(super) fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    pub(super) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut tokens = self.ids(text, add_special && self.use_template)?;
        if add_special {
            if let Some(prefix) = self.prefix {
                tokens.insert(0, prefix);
            }
            tokens.extend(self.suffix);
        }
        Ok(tokens)
    }

    /// Whether [`Self::piece`] knows what tokens add to a text.
    pub(super) fn has_pieces(&self) -> bool {
        self.decoder != Decoder::Library
    }

    /// How many spaces at a text's start are an artefact of the vocabulary.
    pub(super) fn leading_spaces(&self) -> usize {
        match self.decoder {
            Decoder::Marks { leading_spaces, .. } => leading_spaces,
            _ => 0,
        }
    }

    /// The bytes that a token adds to a text; `None` if it adds none.
    pub(super) fn piece(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.inner.id_to_token(id)?;
        if self.inner.get_added_vocabulary().is_special_token(&token) {
            return None;
        }
        Some(match self.decoder {
            Decoder::Marks { mark, bytes, .. } => match bytes::fallback_byte(&token) {
                Some(byte) if bytes => vec![byte],
                _ => token.replace(mark, " ").into_bytes(),
            },
            Decoder::ByteLevel | Decoder::Library => bytes::decode(&token),
        })
    }

    /// Decodes with the library; should it fail, the tokens as the vocabulary writes them.
    pub(super) fn decode(&self, ids: &[u32]) -> String {
        let plain = || ids.iter().filter_map(|&id| self.inner.id_to_token(id)).collect();
        guarded(|| Ok(self.inner.decode(ids, true).unwrap_or_else(|_| plain()))).unwrap_or_else(|_| plain())
    }
}

fn read_library(path: &Path) -> Result<Library, TokenizerError> {
    let io = |error: std::io::Error| {
        TokenizerError::io(format!("cannot read it: {error}"), "check that it is there and may be read")
            .with_source(error)
    };
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.is_dir() {
        return Err(TokenizerError::bad("a directory where a file was expected", REFETCH));
    }
    let mut json = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut json).map_err(io)?;
    if json.len() as u64 > FILE_BYTES_MAX {
        let cause = format!("larger than {} MiB: not a tokenizer.json", FILE_BYTES_MAX >> 20);
        return Err(TokenizerError::bad(cause, REFETCH));
    }
    let unusable = |error: serde_json::Error| {
        TokenizerError::bad(format!("not a tokenizer.json that can be used: {error}"), REFETCH).with_source(error)
    };
    // The library panics over some malformed JSON, so it gets none.
    let description: Value = serde_json::from_slice(&json).map_err(unusable)?;
    drop(json);
    check_prefix(&description)?;
    let mut library = guarded(|| serde_json::from_value::<Library>(description).map_err(unusable))?;
    // A prompt must never be cut or padded silently, nor encoded at random.
    library.with_padding(None);
    library.with_truncation(None).map_err(|error| TokenizerError::bad(error.to_string(), REFETCH))?;
    if let ModelWrapper::BPE(model) = library.get_model()
        && model.dropout.is_some()
    {
        let mut model = model.clone();
        model.dropout = None;
        library.with_model(model);
    }
    Ok(library)
}

/// The library cuts the prefix off the right side of each merge without looking whether it is there.
fn check_prefix(description: &Value) -> Result<(), TokenizerError> {
    let Some(model) = description.get("model") else { return Ok(()) };
    let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str).unwrap_or_default();
    let merges = model.get("merges").and_then(Value::as_array);
    for merge in merges.into_iter().flatten().filter(|_| !prefix.is_empty()) {
        let right = match merge {
            Value::Array(pair) => pair.get(1).and_then(Value::as_str),
            line => line.as_str().and_then(|line| line.split(' ').nth(1)),
        };
        if !right.is_some_and(|right| right.starts_with(prefix)) {
            let cause = format!("the merge {} lacks the prefix '{}'", shown(&merge.to_string()), shown(prefix));
            return Err(TokenizerError::bad(cause, REFETCH).key("model.merges"));
        }
    }
    Ok(())
}

/// Runs the library, which panics over some descriptions that it has accepted; such a panic is an error here.
fn guarded<T>(run: impl FnOnce() -> Result<T, TokenizerError>) -> Result<T, TokenizerError> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        Err(TokenizerError::bad("the tokenizers library failed over it", "check the model's tokenizer.json"))
    })
}

/// The text of a token that the settings name as a string or as an object with `content`.
fn named_token<'s>(settings: &'s Value, key: &str) -> Option<&'s str> {
    let value = settings.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Which decoder a description means.
fn classify(decoder: &Value) -> Decoder {
    let kind = |value: &Value| value.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    match kind(decoder).as_str() {
        "ByteLevel" => Decoder::ByteLevel,
        "Sequence" => {
            let empty = Vec::new();
            let parts = decoder.get("decoders").and_then(Value::as_array).unwrap_or(&empty);
            if let [one] = parts.as_slice() {
                return classify(one);
            }
            let (mut mark, mut bytes, mut fused, mut leading_spaces) = (None, false, false, 0);
            for part in parts {
                match kind(part).as_str() {
                    "Replace" if mark.is_none() && !fused => match replaced_by_space(part) {
                        Some(c) => mark = Some(c),
                        None => return Decoder::Library,
                    },
                    "ByteFallback" if !fused => bytes = true,
                    "Fuse" => fused = true,
                    "Strip" if fused && leading_spaces == 0 => match stripped_spaces(part) {
                        Some(count) => leading_spaces = count,
                        None => return Decoder::Library,
                    },
                    _ => return Decoder::Library,
                }
            }
            mark.map_or(Decoder::Library, |mark| Decoder::Marks { mark, bytes, leading_spaces })
        }
        _ => Decoder::Library,
    }
}

/// The character that a `Replace` decoder turns into a space.
fn replaced_by_space(part: &Value) -> Option<char> {
    let pattern = part.get("pattern")?.get("String")?.as_str()?;
    let mut chars = pattern.chars();
    match (part.get("content")?.as_str()?, chars.next(), chars.next()) {
        (" ", Some(mark), None) => Some(mark),
        _ => None,
    }
}

/// How many spaces a `Strip` decoder strips at the start, if that is all it does.
fn stripped_spaces(part: &Value) -> Option<usize> {
    let is_plain = part.get("content")?.as_str()? == " " && part.get("stop")?.as_u64()? == 0;
    if is_plain { usize::try_from(part.get("start")?.as_u64()?).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn decoders_are_recognised_or_left_to_the_library() {
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let llama =
            json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]});
        assert_eq!(classify(&llama), Decoder::Marks { mark: '▁', bytes: true, leading_spaces: 1 });
        let gemma = json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]});
        assert_eq!(classify(&gemma), Decoder::Marks { mark: '▁', bytes: true, leading_spaces: 0 });
        assert_eq!(classify(&json!({"type": "ByteLevel"})), Decoder::ByteLevel);
        assert_eq!(classify(&json!({"type": "Sequence", "decoders": [{"type": "ByteLevel"}]})), Decoder::ByteLevel);
        // Stripping before fusing strips every token.
        let odd = json!({"type": "Sequence", "decoders": [replace, strip, {"type": "Fuse"}]});
        for other in [odd, json!({"type": "WordPiece"}), json!(null), json!({"type": "Metaspace"})] {
            assert_eq!(classify(&other), Decoder::Library);
        }
    }
}
