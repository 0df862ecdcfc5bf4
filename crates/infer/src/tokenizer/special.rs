//! Which tokens begin and end a text: from a model's configuration, and by their names where a GGUF file leaves it open.

use super::gguf::token_id;
use overspill::formats::{GgufMetadata, Metadata};
use serde_json::Value;

/// The tokens that begin a text and those that end an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpecialIds {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Every token at which generation stops, ascending; `eos` among them.
    pub stop: Vec<u32>,
}

impl SpecialIds {
    /// What the configuration says, without a look at the vocabulary: for models that come without a tokenizer.
    /// What makes no sense is left out.
    #[must_use]
    pub fn from_metadata(metadata: &Metadata) -> Self {
        let mut ids = Self::default();
        match metadata {
            Metadata::HuggingFace { config, generation, .. } => {
                for source in [generation.as_ref(), Some(config), config.get("text_config")].into_iter().flatten() {
                    ids.bos = ids.bos.or(ids_of(source, "bos_token_id").first().copied());
                    let eos = ids_of(source, "eos_token_id");
                    ids.eos = ids.eos.or(eos.first().copied());
                    ids.stop.extend(eos);
                }
            }
            Metadata::Gguf(gguf) => {
                let id = |name: &str| token_id(gguf, name, u32::MAX).ok().flatten();
                ids.bos = id("bos");
                ids.eos = id("eos");
                ids.stop.extend(ids.eos.into_iter().chain(named_stops(gguf, u32::MAX)));
            }
            _ => {}
        }
        ids.settle();
        ids
    }

    /// Sorts the stop tokens.
    pub(super) fn settle(&mut self) {
        self.stop.extend(self.eos);
        self.stop.sort_unstable();
        self.stop.dedup();
    }
}

/// The ids under a key that may hold one id or a list.
fn ids_of(source: &Value, key: &str) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match source.get(key) {
        Some(Value::Array(values)) => values.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Tokens other than EOS that a GGUF file names as ends of something; those out of range are left out.
pub(super) fn named_stops(gguf: &GgufMetadata, count: u32) -> impl Iterator<Item = u32> + '_ {
    let names = ["eot", "eom", "fim_pad", "fim_rep", "fim_sep"];
    names.into_iter().filter_map(move |name| token_id(gguf, name, count).ok().flatten())
}

/// Tokens with these texts end a turn, a message or a document in every model that has them.
pub(super) const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
    // Padding and file borders of fill-in-the-middle models.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

/// Tokens with these texts are control tokens, whatever a converter wrote, but end nothing.
pub(super) const CONTROLS: &[&str] = &[
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
];

/// Tokens with these texts carry the structure of an answer (gpt-oss) and are shown.
pub(super) const SHOWN: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::json;

    #[test]
    fn ids_may_be_one_or_many_or_nonsense() {
        assert_eq!(ids_of(&json!({"eos_token_id": 7}), "eos_token_id"), [7]);
        assert_eq!(ids_of(&json!({"eos_token_id": [7, 3, -1, "x", 1e300]}), "eos_token_id"), [7, 3]);
        assert!(ids_of(&json!({"eos_token_id": null}), "eos_token_id").is_empty());
        assert!(ids_of(&json!([]), "eos_token_id").is_empty());
    }
}
