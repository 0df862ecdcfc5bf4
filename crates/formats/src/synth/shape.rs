//! What a Hugging Face configuration says about a model's dimensions, as far as its files depend on it.

use crate::error::{ErrorKind, FormatError};
use serde_json::Value;
use std::path::Path;

/// No dimension of any model comes near; keeps products of a few of them within 64 bits where they aren't checked.
const DIMENSION_MAX: u64 = 1 << 31;
/// Layers, experts and heads.
const COUNT_MAX: u64 = 1 << 16;
/// Experts of all layers.
const EXPERTS_MAX: u64 = 1 << 18;

/// The families that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Mixtral,
    Qwen3Moe,
    Olmoe,
}

/// `model_type`, class name before `ForCausalLM`, GGUF architecture.
const FAMILIES: &[(Family, &str, &str, &str)] = &[
    (Family::Llama, "llama", "Llama", "llama"),
    (Family::Mistral, "mistral", "Mistral", "llama"),
    (Family::Qwen2, "qwen2", "Qwen2", "qwen2"),
    (Family::Qwen3, "qwen3", "Qwen3", "qwen3"),
    (Family::Mixtral, "mixtral", "Mixtral", "llama"),
    (Family::Qwen3Moe, "qwen3_moe", "Qwen3Moe", "qwen3moe"),
    (Family::Olmoe, "olmoe", "Olmoe", "olmoe"),
];

impl Family {
    fn of(config: &Value) -> Result<Self, FormatError> {
        let model_type = config.get("model_type").and_then(Value::as_str);
        let class = config.get("architectures").and_then(|all| all.get(0)).and_then(Value::as_str);
        let class = class.and_then(|class| class.strip_suffix("ForCausalLM"));
        let found = FAMILIES.iter().find(|(_, name, class_name, _)| match model_type {
            Some(model_type) => model_type == *name,
            None => class == Some(class_name),
        });
        found.map(|row| row.0).ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().map(|row| row.1).collect();
            let said = model_type.or(class).map_or_else(|| "missing".to_owned(), crate::error::shown);
            bad("model_type", format!("{said}; synthetic models can be {}", known.join(", ")))
        })
    }

    /// The value of `general.architecture`.
    pub(crate) fn gguf_name(self) -> &'static str {
        FAMILIES.iter().find(|row| row.0 == self).map_or("llama", |row| row.3)
    }
}

/// The mixture of experts of some layers.
#[derive(Clone, Debug)]
pub(crate) struct Experts {
    pub count: u64,
    pub used: u64,
    pub width: u64,
    pub normalised: bool,
    step: u64,
    dense: Vec<u64>,
}

/// Rotary embeddings.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How the rotary embedding is stretched.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    Yarn {
        factor: f64,
        original_context: u64,
    },
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original_context: u64,
    },
    /// One that GGUF has no keys for.
    Other(String),
}

/// The dimensions of a model.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub family: Family,
    pub hidden: u64,
    pub layers: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
    /// Of dense layers; 0 if there are none.
    pub ffn_width: u64,
    pub vocabulary: u64,
    pub context: u64,
    pub is_tied: bool,
    pub rms_eps: f64,
    pub init_range: f64,
    pub rope: Rope,
    pub sliding_window: Option<u64>,
    pub experts: Option<Experts>,
    pub has_qkv_bias: bool,
    pub has_output_bias: bool,
    pub has_mlp_bias: bool,
}

impl Shape {
    /// Takes what is needed from a configuration, and checks it.
    pub(crate) fn of(config: &Value) -> Result<Self, FormatError> {
        let family = Family::of(config)?;
        let hidden = whole(config, "hidden_size", None, DIMENSION_MAX)?;
        let heads = whole(config, "num_attention_heads", None, COUNT_MAX)?;
        let kv_heads = whole(config, "num_key_value_heads", Some(heads), COUNT_MAX)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(bad("num_key_value_heads", format!("{kv_heads} heads can't be shared by {heads}")));
        }
        if config.get("head_dim").is_none_or(Value::is_null) && !hidden.is_multiple_of(heads) {
            return Err(bad("num_attention_heads", format!("a width of {hidden} can't be cut into {heads} heads")));
        }
        let head_dim = whole(config, "head_dim", Some((hidden / heads).max(1)), COUNT_MAX)?;
        if !head_dim.is_multiple_of(2) {
            return Err(bad("head_dim", format!("{head_dim} is odd, and rotary embeddings turn pairs")));
        }
        let layers = whole(config, "num_hidden_layers", None, COUNT_MAX)?;
        let experts = experts(config, family, layers)?;
        let is_dense = (0..layers).any(|layer| !experts.as_ref().is_some_and(|e| e.has(layer)));
        let flag = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
        let context = whole(config, "max_position_embeddings", Some(2048), DIMENSION_MAX)?;
        let window = match family {
            Family::Mistral | Family::Mixtral => !config.get("sliding_window").is_none_or(Value::is_null),
            _ => flag("use_sliding_window"),
        };
        Ok(Self {
            family,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn_width: if is_dense { whole(config, "intermediate_size", None, DIMENSION_MAX)? } else { 0 },
            vocabulary: whole(config, "vocab_size", None, DIMENSION_MAX)?,
            context,
            is_tied: flag("tie_word_embeddings"),
            rms_eps: number(config, "rms_norm_eps", Some(1e-6))?,
            init_range: number(config, "initializer_range", Some(0.02))?,
            rope: rope(config, family, context)?,
            sliding_window: window.then(|| whole(config, "sliding_window", None, DIMENSION_MAX)).transpose()?,
            experts,
            has_qkv_bias: family == Family::Qwen2 || flag("attention_bias"),
            has_output_bias: family != Family::Qwen2 && flag("attention_bias"),
            has_mlp_bias: family == Family::Llama && flag("mlp_bias"),
        })
    }
}

impl Experts {
    /// Whether a layer is a mixture.
    pub(crate) fn has(&self, layer: u64) -> bool {
        (layer + 1).is_multiple_of(self.step) && !self.dense.contains(&layer)
    }
}

fn experts(config: &Value, family: Family, layers: u64) -> Result<Option<Experts>, FormatError> {
    if !matches!(family, Family::Mixtral | Family::Qwen3Moe | Family::Olmoe) {
        return Ok(None);
    }
    let key = if config.get("num_local_experts").is_some() { "num_local_experts" } else { "num_experts" };
    let count = whole(config, key, None, COUNT_MAX)?;
    let used = whole(config, "num_experts_per_tok", None, COUNT_MAX)?;
    if used > count {
        return Err(bad("num_experts_per_tok", format!("{used} of {count} experts")));
    }
    if count.saturating_mul(layers) > EXPERTS_MAX {
        return Err(bad(key, format!("{count} experts in each of {layers} layers are more than any real model has")));
    }
    let width_key = if family == Family::Qwen3Moe { "moe_intermediate_size" } else { "intermediate_size" };
    let dense = config.get("mlp_only_layers").and_then(Value::as_array);
    Ok(Some(Experts {
        count,
        used,
        width: whole(config, width_key, None, DIMENSION_MAX)?,
        normalised: family == Family::Mixtral || config.get("norm_topk_prob").and_then(Value::as_bool).unwrap_or(false),
        step: whole(config, "decoder_sparse_step", Some(1), COUNT_MAX)?,
        dense: dense.map_or_else(Vec::new, |layers| layers.iter().filter_map(Value::as_u64).collect()),
    }))
}

fn rope(config: &Value, family: Family, context: u64) -> Result<Rope, FormatError> {
    let object = |key: &str| config.get(key).filter(|value| value.is_object());
    let scaling = object("rope_parameters").or_else(|| object("rope_scaling"));
    let default = if family == Family::Mixtral { 1e6 } else { 10_000.0 };
    let theta = match object("rope_parameters").filter(|rope| rope.get("rope_theta").is_some()) {
        Some(rope) => number(rope, "rope_theta", None)?,
        None => number(config, "rope_theta", Some(default))?,
    };
    let Some(rope) = scaling else { return Ok(Rope { theta, scaling: RopeScaling::None }) };
    let kind = rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("default");
    let original = || whole(rope, "original_max_position_embeddings", Some(context), DIMENSION_MAX);
    let has = |key: &str| rope.get(key).is_some_and(|value| !value.is_null());
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number(rope, "factor", None)? },
        "yarn" if has("attention_factor") || has("mscale") => {
            RopeScaling::Other("yarn with its own attention factor".into())
        }
        "yarn" => RopeScaling::Yarn { factor: number(rope, "factor", None)?, original_context: original()? },
        "llama3" => RopeScaling::Llama3 {
            factor: number(rope, "factor", None)?,
            low: number(rope, "low_freq_factor", None)?,
            high: number(rope, "high_freq_factor", None)?,
            original_context: original()?,
        },
        other => RopeScaling::Other(crate::error::shown(other)),
    };
    Ok(Rope { theta, scaling })
}

pub(crate) fn bad(key: &str, cause: impl Into<String>) -> FormatError {
    FormatError::new(ErrorKind::BadRequest, Path::new("config.json"), cause, "correct the configuration").key(key)
}

/// A whole number from 1 to `max`; `null` counts as absent.
fn whole(config: &Value, key: &str, default: Option<u64>, max: u64) -> Result<u64, FormatError> {
    match (config.get(key).filter(|value| !value.is_null()), default) {
        (None, Some(default)) => Ok(default),
        (None, None) => Err(bad(key, "missing")),
        (Some(value), _) => match value.as_u64() {
            Some(number) if (1..=max).contains(&number) => Ok(number),
            _ => {
                Err(bad(key, format!("{} is no whole number from 1 to {max}", crate::error::shown(&value.to_string()))))
            }
        },
    }
}

/// A positive number; `null` counts as absent.
fn number(config: &Value, key: &str, default: Option<f64>) -> Result<f64, FormatError> {
    match (config.get(key).filter(|value| !value.is_null()), default) {
        (None, Some(default)) => Ok(default),
        (None, None) => Err(bad(key, "missing")),
        (Some(value), _) => match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(number),
            _ => Err(bad(key, format!("{} is no positive number", crate::error::shown(&value.to_string())))),
        },
    }
}
