//! What can go wrong in the runtime, by kind, with file, tensor or key, cause and cure.

use std::path::PathBuf;

/// An error of the runtime.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// The engine could not bring weights, or has no room.
    #[error(transparent)]
    Engine(#[from] overspill::Error),
    /// The model's configuration makes no sense, or describes a model that this runtime cannot run.
    #[error("{}: {key}: {cause}; {cure}", file.display())]
    Config {
        /// The file that says so.
        file: PathBuf,
        /// The key in it.
        key: String,
        /// What is wrong with its value.
        cause: String,
        /// What to do.
        cure: String,
    },
    /// A tensor that the configuration calls for is missing or has another shape.
    #[error("{}: tensor '{tensor}': {cause}; {cure}", file.display())]
    Tensor {
        /// The file in which it is, or should be.
        file: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong.
        cause: String,
        /// What to do.
        cure: String,
    },
    /// A prompt, a token or a setting that the model cannot take.
    #[error("{what}: {cause}; {cure}")]
    Input {
        /// What was given: `prompt`, `--ctx`.
        what: String,
        /// Why it can't be taken.
        cause: String,
        /// What to do.
        cure: String,
    },
    /// Memory for the KV cache or for activations that the system or the budget does not give.
    #[error("{what} of {bytes} bytes finds no memory: {cause}; {cure}")]
    Memory {
        /// What it was for.
        what: String,
        /// How much.
        bytes: u64,
        /// Why not.
        cause: String,
        /// What to do.
        cure: String,
    },
    /// A GPU that is gone, or cannot do what the model needs.
    #[error("{0}")]
    Device(String),
    /// The tokenizer's files are damaged or of an unknown kind.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// No token can be chosen: a parameter is out of range, or the logits are no numbers.
    #[error(transparent)]
    Sampling(#[from] crate::sampling::SamplingError),
    /// The request was cancelled.
    #[error("cancelled")]
    Cancelled,
}
