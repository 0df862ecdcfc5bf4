//! What both formats' configurations become, and checked values on the way there.
//!
//! What is not here: the keys of either format.

use super::family::Family;
use super::names::Names;
use crate::InferError;
use crate::backend::RopePairs;
use crate::rope::Rope;
use std::path::PathBuf;

/// Layers of the deepest model that makes sense; a larger number is damage.
pub(super) const LAYERS_MAX: u64 = 4096;
/// Experts of a layer, likewise.
pub(super) const EXPERTS_MAX: u64 = 65_536;
/// Any width, likewise; products of two of them don't overflow.
pub(super) const WIDTH_MAX: u64 = 1 << 24;
/// Positions, likewise.
pub(super) const CONTEXT_MAX: u64 = 1 << 31;

/// A configuration, in the words of no format. Every value lies in a sensible range; how they fit together is checked
/// against the tensors.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) file: PathBuf,
    pub(super) family: &'static Family,
    pub(super) names: &'static Names,
    pub(super) hidden: usize,
    /// `None` if the configuration doesn't say.
    pub(super) vocab: Option<usize>,
    pub(super) context: usize,
    pub(super) norm_eps: f32,
    pub(super) layers: Vec<LayerConfig>,
    /// Whether the embeddings are the head; `None` if the configuration doesn't say.
    pub(super) tied: Option<bool>,
    pub(super) rope: Rope,
    pub(super) pairs: RopePairs,
    pub(super) clip: Option<f32>,
    pub(super) biases: Biases,
    pub(super) bos: Option<u32>,
    pub(super) eos: Vec<u32>,
}

/// Which tensors have a bias.
#[derive(Clone, Copy, Debug)]
pub(super) struct Biases {
    pub(super) qkv: Presence,
    pub(super) o: Presence,
    pub(super) mlp: Presence,
}

/// Whether a tensor is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    Yes,
    No,
    /// Whatever the file has.
    Either,
}

/// What a configuration says of one layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerConfig {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) window: Option<usize>,
    pub(super) ffn: FfnConfig,
}

/// What a configuration says of a layer's feed-forward network.
#[derive(Clone, Copy, Debug)]
pub(super) enum FfnConfig {
    Dense { width: usize },
    Experts { width: usize, experts: usize, used: usize, normalise: bool },
}

/// An error about a key of a file.
pub(super) fn bad(
    file: impl Into<PathBuf>,
    key: &str,
    cause: impl Into<String>,
    cure: impl Into<String>,
) -> InferError {
    InferError::Config { file: file.into(), key: key.into(), cause: cause.into(), cure: cure.into() }
}

/// What to do about a value that makes no sense.
pub(super) const FETCH: &str = "the file is damaged or was edited: fetch it again";

/// `value` if it lies in `1..=max`.
pub(super) fn in_range(file: &std::path::Path, key: &str, value: u64, max: u64) -> Result<usize, InferError> {
    if value == 0 || value > max {
        return Err(bad(file, key, format!("{value} is not between 1 and {max}"), FETCH));
    }
    usize::try_from(value).map_err(|_| bad(file, key, format!("{value} is too large for this machine"), FETCH))
}

/// `value` if it is finite and lies in `min..=max`.
pub(super) fn finite(file: &std::path::Path, key: &str, value: f64, min: f64, max: f64) -> Result<f64, InferError> {
    if value.is_finite() && (min..=max).contains(&value) {
        return Ok(value);
    }
    Err(bad(file, key, format!("{value} is not between {min} and {max}"), FETCH))
}

/// Heads that fit together: key heads divide query heads.
pub(super) fn check_heads(file: &std::path::Path, heads: usize, kv_heads: usize, key: &str) -> Result<(), InferError> {
    if heads.is_multiple_of(kv_heads) {
        return Ok(());
    }
    Err(bad(file, key, format!("{heads} query heads can't share {kv_heads} key heads evenly"), FETCH))
}

/// A head's size from the width, if nothing states it.
pub(super) fn head_dim_of(file: &std::path::Path, hidden: usize, heads: usize, key: &str) -> Result<usize, InferError> {
    if hidden.is_multiple_of(heads) {
        return Ok(hidden / heads);
    }
    Err(bad(
        file,
        key,
        format!("a width of {hidden} can't be split among {heads} heads, and no head size is given"),
        FETCH,
    ))
}

/// A rotary embedding turns pairs.
pub(super) fn check_rotary(file: &std::path::Path, key: &str, dim: usize, head_dim: usize) -> Result<(), InferError> {
    if dim == 0 || dim > head_dim || !dim.is_multiple_of(2) {
        let cause = format!("{dim} of {head_dim} elements of a head can't turn in pairs");
        return Err(bad(file, key, cause, FETCH));
    }
    Ok(())
}
