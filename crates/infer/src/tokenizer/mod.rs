//! Text to tokens and back, with the tokenizer that comes with a model.
//!
//! From a Hugging Face directory `tokenizer.json` is run by the `tokenizers` library; a GGUF file's vocabulary is run
//! by the two encodings here, byte-level and SentencePiece BPE, with llama.cpp's rules. Either gives the same tokens as
//! the program the model was made for. Nothing here knows about chats: templates are the caller's.

mod bpe;
mod bytes;
mod decode;
mod error;
mod gguf;
mod hf;
mod merge;
mod pretokenize;
mod special;
mod spm;
mod vocab;

pub use decode::DecodeStream;
pub use error::{TokenizerError, TokenizerErrorKind};
pub use special::SpecialIds;

use gguf::Ggml;
use hf::HuggingFace;
use overspill::formats::Metadata;
use std::sync::Arc;

/// A model's tokenizer. Cheap to clone, and safe to share between threads.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

enum Inner {
    HuggingFace(Box<HuggingFace>),
    Ggml(Box<Ggml>),
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match &*self.0 {
            Inner::HuggingFace(_) => "tokenizer.json",
            Inner::Ggml(_) => "gguf",
        };
        f.debug_struct("Tokenizer").field("from", &kind).field("vocab_size", &self.vocab_size()).finish()
    }
}

impl Tokenizer {
    /// The tokenizer that a model comes with; `None` if it comes without one, and then prompts are ids.
    ///
    /// # Errors
    /// `Io` if `tokenizer.json` cannot be read; `BadFile` if it, or the metadata, is damaged; `Unsupported` for kinds
    /// of tokenizers that are not read. The error names file, key, cause and cure.
    pub fn from_metadata(metadata: &Metadata) -> Result<Option<Self>, TokenizerError> {
        let inner = match metadata {
            Metadata::HuggingFace { tokenizer_json: Some(path), tokenizer_config, .. } => {
                Some(Inner::HuggingFace(Box::new(HuggingFace::load(path, tokenizer_config.as_ref(), metadata)?)))
            }
            Metadata::Gguf(gguf) => Ggml::load(gguf)?.map(|ggml| Inner::Ggml(Box::new(ggml))),
            _ => None,
        };
        Ok(inner.map(|inner| Self(Arc::new(inner))))
    }

    /// The tokens of a text. The texts of special tokens (`</s>`) become those tokens. With `add_special`, BOS and EOS
    /// are added where the model wants them; without, as for a text that continues another, never.
    ///
    /// # Errors
    /// `BadText` if the vocabulary is incomplete and has no token for a part of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        match &*self.0 {
            Inner::HuggingFace(hf) => hf.encode(text, add_special),
            Inner::Ggml(ggml) => ggml.encode(text, add_special),
        }
    }

    /// The text of tokens from a text's start: special tokens add nothing, a space that the vocabulary puts before the
    /// first word is stripped, bytes that are no UTF-8 become U+FFFD, ids that are no tokens are passed over.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        if let Inner::HuggingFace(hf) = &*self.0
            && !hf.has_pieces()
        {
            return hf.decode(ids);
        }
        let mut stream = self.stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text += &stream.finish();
        text
    }

    /// The text that `ids` add to a text whose tokens are `prompt`: unlike that of [`Self::decode`], its first word keeps
    /// the space before it.
    #[must_use]
    pub fn decode_after(&self, prompt: &[u32], ids: &[u32]) -> String {
        let mut stream = self.stream_after(prompt);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text += &stream.finish();
        text
    }

    /// Decodes token by token, from a text's start.
    #[must_use]
    pub fn stream(&self) -> DecodeStream {
        DecodeStream::new(self.clone())
    }

    /// Decodes token by token what comes after `prompt`.
    #[must_use]
    pub fn stream_after(&self, prompt: &[u32]) -> DecodeStream {
        let mut stream = self.stream();
        for &id in prompt {
            stream.push(id);
        }
        stream
    }

    /// The token that begins a text, if there is one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.special_ids().bos
    }

    /// The token that ends a text, if there is one.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.special_ids().eos
    }

    /// Every token at which generation stops, ascending.
    #[must_use]
    pub fn stop_ids(&self) -> &[u32] {
        &self.special_ids().stop
    }

    /// The tokens that begin and end texts.
    #[must_use]
    pub fn special_ids(&self) -> &SpecialIds {
        match &*self.0 {
            Inner::HuggingFace(hf) => &hf.special,
            Inner::Ggml(ggml) => &ggml.special,
        }
    }

    /// One more than the largest token id; a model's logits may be more (padding) or a vocabulary have gaps.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        match &*self.0 {
            Inner::HuggingFace(hf) => hf.vocab_size(),
            Inner::Ggml(ggml) => ggml.vocab_size(),
        }
    }

    /// The token that the vocabulary writes as `token` (`Ġthe`, `▁the`, `</s>`).
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &*self.0 {
            Inner::HuggingFace(hf) => hf.id(token),
            Inner::Ggml(ggml) => ggml.id(token),
        }
    }

    /// How the vocabulary writes a token.
    #[must_use]
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &*self.0 {
            Inner::HuggingFace(hf) => hf.token(id),
            Inner::Ggml(ggml) => ggml.token(id),
        }
    }

    fn decode_by_library(&self, ids: &[u32]) -> String {
        match &*self.0 {
            Inner::HuggingFace(hf) => hf.decode(ids),
            Inner::Ggml(_) => self.decode(ids),
        }
    }
}
