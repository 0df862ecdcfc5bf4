//! The prompt: from the command line, standard input, or as token ids; and the text that its continuation makes.

use crate::args::RunArgs;
use crate::errors::{CliError, Kind, Outcome, stop};
use overspill_formats::ModelFiles;
use overspill_infer::tokenizer::{DecodeStream, Tokenizer, TokenizerError, TokenizerErrorKind};
use std::io::{IsTerminal, Read};

/// What to go on from.
#[derive(Debug)]
pub struct Prompt {
    /// As tokens.
    pub tokens: Vec<u32>,
    /// The model's tokenizer; absent if only ids are given and the model comes without a sound one.
    pub tokenizer: Option<Tokenizer>,
}

impl Prompt {
    /// Finds the prompt and turns it into tokens.
    ///
    /// # Errors
    /// No prompt at all, a text without a tokenizer, a damaged tokenizer, ids beyond the vocabulary.
    pub fn of(args: &RunArgs, model: &ModelFiles, vocab: usize) -> Outcome<Self> {
        let found = Tokenizer::from_metadata(&model.metadata);
        let prompt = match &args.prompt_ids {
            // Without text a tokenizer is a comfort, and its faults are no obstacle.
            Some(ids) => Self { tokens: ids.clone(), tokenizer: found.ok().flatten() },
            None => {
                let tokenizer = found?.ok_or_else(|| no_tokenizer(model))?;
                let tokens = tokenizer.encode(&text(args)?, true)?;
                Self { tokens, tokenizer: Some(tokenizer) }
            }
        };
        if let Some(id) = prompt.tokens.iter().find(|&&id| id as usize >= vocab) {
            let what = if args.prompt_ids.is_some() { "--prompt-ids" } else { "--prompt" };
            let message = format!(
                "{what}: token {id} is not in the model's vocabulary of {vocab}; use ids from 0 to {}",
                vocab.saturating_sub(1)
            );
            return Err(stop(Kind::Config, message));
        }
        if prompt.tokens.is_empty() {
            return Err(stop(Kind::Usage, "--prompt: it is empty; give some text, or ids with --prompt-ids"));
        }
        Ok(prompt)
    }

    /// Makes text of the tokens that follow.
    pub fn stream(&self) -> Option<DecodeStream> {
        self.tokenizer.as_ref().map(|tokenizer| tokenizer.stream_after(&self.tokens))
    }

    /// The text of all tokens that follow.
    pub fn decode(&self, tokens: &[u32]) -> Option<String> {
        self.tokenizer.as_ref().map(|tokenizer| tokenizer.decode_after(&self.tokens, tokens))
    }
}

/// The prompt's text. A text longer than this is no prompt for any context.
const TEXT_BYTES_MAX: u64 = 64 << 20;

fn text(args: &RunArgs) -> Outcome<String> {
    if let Some(text) = &args.prompt {
        return Ok(text.clone());
    }
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        let message = "there is no prompt; give --prompt TEXT or --prompt-ids 1,2,3, or pipe a text in";
        return Err(stop(Kind::Usage, message));
    }
    let mut bytes = Vec::new();
    stdin
        .lock()
        .take(TEXT_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| stop(Kind::Io, format!("cannot read the prompt from standard input: {error}")))?;
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        return Err(stop(Kind::Usage, "the prompt on standard input has more than 64 MiB; shorten it"));
    }
    let text = String::from_utf8(bytes)
        .map_err(|error| stop(Kind::Usage, format!("the prompt on standard input is no UTF-8: {error}")))?;
    // The newline that ends a line of a shell is not part of what was meant.
    let text = text.strip_suffix('\n').map_or(text.as_str(), |line| line.strip_suffix('\r').unwrap_or(line));
    if text.is_empty() {
        let message = "there is no prompt: standard input is empty; give --prompt TEXT or --prompt-ids 1,2,3";
        return Err(stop(Kind::Usage, message));
    }
    Ok(text.to_owned())
}

fn no_tokenizer(model: &ModelFiles) -> CliError {
    let message = format!(
        "{}: the model comes without a tokenizer (tokenizer.json, or the vocabulary in a GGUF file); add it, or give the \
         prompt as ids with --prompt-ids",
        model.path.display()
    );
    CliError::new(Kind::BadFile, message)
}

impl From<TokenizerError> for CliError {
    fn from(error: TokenizerError) -> Self {
        let kind = match error.kind() {
            TokenizerErrorKind::Io => Kind::Io,
            TokenizerErrorKind::BadText => Kind::Config,
            _ => Kind::BadFile,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<TokenizerError> for crate::errors::Stop {
    fn from(error: TokenizerError) -> Self {
        Self::Error(error.into())
    }
}
