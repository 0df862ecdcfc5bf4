//! What a model consists of: a table of what each of its layers does, and which tensors that takes.
//!
//! [`ModelSpec::from`] reads a configuration (Hugging Face or GGUF), checks every value, finds every tensor and checks
//! its shape. What it returns is all that the decoder knows of an architecture: a layer is a mixer and a feed-forward
//! network, each with its features. A new architecture is a row of `family::FAMILIES`; a new kind of layer is a
//! variant of [`Mixer`] or [`Ffn`]. A tensor that the table has no use for is an error, since leaving it out would give
//! wrong answers in silence.
//!
//! What is not here: how tensors are cut into steps ([`crate::plan`]), and any arithmetic.

mod bind;
mod family;
mod gguf;
mod hf;
mod keys;
mod names;

use crate::InferError;
use crate::backend::RopePairs;
use crate::rope::Rope;
use overspill::formats::Metadata;
use overspill::{Catalog, DType, TableId, TensorId};

/// A matrix of weights `[rows][cols]`: a tensor, or one expert's part of a fused one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// The tensor.
    pub tensor: TensorId,
    /// Which of the tensor's units (experts); 0 for a plain matrix.
    pub unit: u32,
    /// Element type.
    pub dtype: DType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// A vector of weights: a norm or a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VectorSpec {
    /// The tensor.
    pub tensor: TensorId,
    /// Element type.
    pub dtype: DType,
    /// Elements.
    pub len: usize,
}

/// A matrix with an optional bias on its outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// The weights.
    pub matrix: Matrix,
    /// Added to the outputs.
    pub bias: Option<VectorSpec>,
}

/// RMS norms of queries and keys before they turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QkNorm {
    /// Of queries.
    pub q: VectorSpec,
    /// Of keys.
    pub k: VectorSpec,
    /// Whether each head is normed on its own; otherwise all heads of a token together.
    pub per_head: bool,
}

/// Softmax attention over a cache of keys and values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Queries.
    pub q: Linear,
    /// Keys.
    pub k: Linear,
    /// Values.
    pub v: Linear,
    /// The output.
    pub o: Linear,
    /// Norms of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Queries, keys and values are clamped to ± this.
    pub clip: Option<f32>,
    /// Positions that a token sees, itself included; all before it if `None`.
    pub window: Option<usize>,
    /// Which elements of a head turn together.
    pub pairs: RopePairs,
    /// Factor of the scores.
    pub scale: f32,
}

/// What carries information from token to token in a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Mixer {
    /// Attention over a cache of keys and values.
    Attention(Attention),
}

/// The first half of a gated network: two matrices, or one with the gate's rows first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUp {
    /// Two matrices of `width` rows.
    Separate {
        /// The gate.
        gate: Linear,
        /// What is gated.
        up: Linear,
    },
    /// One matrix of `2 · width` rows.
    Fused(Matrix),
}

/// A gated network: `down(silu(gate(x)) · up(x))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mlp {
    /// Elements between the two halves.
    pub width: usize,
    /// The first half.
    pub gate_up: GateUp,
    /// The second half.
    pub down: Linear,
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// Scores the experts: `[experts][hidden]`.
    pub router: Matrix,
    /// The experts, all of one shape.
    pub experts: Vec<Mlp>,
    /// How many each token uses.
    pub used: usize,
    /// Whether the weights of those used are scaled to a sum of 1.
    pub normalise: bool,
}

/// The feed-forward network of a layer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Ffn {
    /// One network for all tokens.
    Dense(Mlp),
    /// Each token chooses some.
    Experts(Experts),
}

/// One layer: `x += mixer(norm(x)); x += ffn(norm(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// RMS norm before the mixer.
    pub mixer_norm: VectorSpec,
    /// The mixer.
    pub mixer: Mixer,
    /// RMS norm before the network.
    pub ffn_norm: VectorSpec,
    /// The network.
    pub ffn: Ffn,
}

/// The table of token embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Embedding {
    /// The tensor.
    pub tensor: TensorId,
    /// Its rows, to gather.
    pub table: TableId,
    /// Element type.
    pub dtype: DType,
    /// Bytes of a row in the file.
    pub row_bytes: usize,
}

/// A model, checked: see the module.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The architecture's name: `llama`, `qwen3moe`.
    pub architecture: &'static str,
    /// Tokens of the vocabulary: rows of the embedding table.
    pub vocab: usize,
    /// Elements of a token's state.
    pub hidden: usize,
    /// Positions that the model was made for.
    pub context: usize,
    /// Constant of all RMS norms.
    pub norm_eps: f32,
    /// The embeddings.
    pub embedding: Embedding,
    /// The layers.
    pub layers: Vec<Layer>,
    /// RMS norm before the head.
    pub final_norm: VectorSpec,
    /// The head: `[vocab][hidden]`.
    pub head: Matrix,
    /// The rotary embedding; without [`Self::rope_divisors`].
    pub rope: Rope,
    /// A tensor of divisors for [`Rope::divisors`], to be read when weights can be.
    pub rope_divisors: Option<VectorSpec>,
    /// The token that begins a text, if the files name one.
    pub bos: Option<u32>,
    /// The tokens that end one.
    pub eos: Vec<u32>,
}

impl ModelSpec {
    /// Reads and checks a model's configuration, and finds its tensors.
    ///
    /// # Errors
    /// [`InferError::Config`] names the file and the key whose value is missing or makes no sense, or the architecture
    /// if it is not in the table; [`InferError::Tensor`] names the tensor that is missing, has another shape than the
    /// configuration says, or that the architecture has no use for.
    pub fn from(metadata: &Metadata, catalog: &Catalog) -> Result<Self, InferError> {
        let config = match metadata {
            Metadata::HuggingFace { config, generation, .. } => {
                let directory = catalog.files().next().and_then(|(path, _)| path.parent()).unwrap_or("".as_ref());
                hf::read(config, generation.as_ref(), directory)?
            }
            Metadata::Gguf(metadata) => gguf::read(metadata, catalog)?,
            _ => {
                return Err(InferError::Input {
                    what: "model".into(),
                    cause: "its format is unknown to the runtime".into(),
                    cure: "use a Hugging Face directory or a GGUF file".into(),
                });
            }
        };
        bind::bind(&config, catalog)
    }

    /// Parameters of all tensors that the model uses; a tied head counts once.
    #[must_use]
    pub fn parameters(catalog: &Catalog) -> u64 {
        (catalog.tensors().iter()).map(|t| t.shape.iter().fold(1, |n: u64, &d| n.saturating_mul(d))).sum()
    }
}
