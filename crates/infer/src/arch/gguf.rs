//! The keys of GGUF files that describe a model (`{architecture}.…`, as llama.cpp writes them).
//!
//! What is not here: tensors, and the vocabulary.

use super::family::{Bias, FAMILIES, Family, GGUF_LLAMA_EXPERTS, Normalise, known};
use super::keys::{
    Biases, CONTEXT_MAX, Config, EXPERTS_MAX, FETCH, FfnConfig, LAYERS_MAX, LayerConfig, Presence, WIDTH_MAX, bad,
    check_heads, check_rotary, finite, head_dim_of, in_range,
};
use super::names::GGUF;
use crate::InferError;
use crate::backend::RopePairs;
use crate::rope::{Rope, RopeScaling, yarn_attention_factor};
use overspill::Catalog;
use overspill::formats::{GgufMetadata, GgufValue};

/// The keys that begin with the architecture's name.
struct Keys<'a> {
    metadata: &'a GgufMetadata,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn bad(&self, key: &str, cause: impl Into<String>, cure: impl Into<String>) -> InferError {
        bad(self.metadata.path(), key, cause, cure)
    }

    fn wrong_type(&self, name: &str, value: &GgufValue, wanted: &str) -> InferError {
        self.bad(name, format!("it is of type {}, where {wanted} was expected", value.type_name()), FETCH)
    }

    fn missing(&self, key: &str) -> InferError {
        self.bad(&self.name(key), "it is missing", "convert the model again with a current converter")
    }

    fn size(&self, key: &str, max: u64) -> Result<Option<usize>, InferError> {
        let name = self.name(key);
        let Some(value) = self.metadata.get(&name) else { return Ok(None) };
        let number = value.as_u64().ok_or_else(|| self.wrong_type(&name, value, "a whole number"))?;
        in_range(self.metadata.path(), &name, number, max).map(Some)
    }

    /// As [`Self::size`], but 0 means that it is absent.
    fn size_or_zero(&self, key: &str, max: u64) -> Result<Option<usize>, InferError> {
        if self.metadata.u64(&self.name(key)) == Some(0) { Ok(None) } else { self.size(key, max) }
    }

    fn required(&self, key: &str, max: u64) -> Result<usize, InferError> {
        self.size(key, max)?.ok_or_else(|| self.missing(key))
    }

    /// One number for all layers, or a list with one for each.
    fn by_layer(&self, key: &str, layers: usize) -> Result<Option<Vec<usize>>, InferError> {
        let name = self.name(key);
        let Some(value) = self.metadata.get(&name) else { return Ok(None) };
        let Some(array) = value.as_array() else {
            return Ok(self.size(key, WIDTH_MAX)?.map(|number| vec![number; layers]));
        };
        if array.len() != layers {
            return Err(self.bad(&name, format!("it lists {} numbers for {layers} layers", array.len()), FETCH));
        }
        let number = |layer| array.i64(layer).and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
        let checked = |layer| in_range(self.metadata.path(), &name, number(layer), WIDTH_MAX);
        (0..layers).map(checked).collect::<Result<Vec<_>, _>>().map(Some)
    }

    fn f64(&self, key: &str, min: f64, max: f64) -> Result<Option<f64>, InferError> {
        let name = self.name(key);
        let Some(value) = self.metadata.get(&name) else { return Ok(None) };
        let number = value.as_f32().ok_or_else(|| self.wrong_type(&name, value, "a float"))?;
        finite(self.metadata.path(), &name, f64::from(number), min, max).map(Some)
    }

    fn str(&self, key: &str) -> Result<Option<&str>, InferError> {
        let name = self.name(key);
        let Some(value) = self.metadata.get(&name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong_type(&name, value, "text"))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, InferError> {
        let name = self.name(key);
        let Some(value) = self.metadata.get(&name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong_type(&name, value, "true or false"))
    }

    fn token(&self, key: &str) -> Result<Option<u32>, InferError> {
        let name = format!("tokenizer.ggml.{key}");
        let Some(value) = self.metadata.get(&name) else { return Ok(None) };
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some).ok_or_else(|| self.wrong_type(&name, value, "a token"))
    }
}

/// Reads a configuration.
pub(super) fn read(metadata: &GgufMetadata, catalog: &Catalog) -> Result<Config, InferError> {
    const ARCHITECTURE: &str = "general.architecture";
    let Some(architecture) = metadata.str(ARCHITECTURE) else {
        return Err(bad(metadata.path(), ARCHITECTURE, "it is missing", "convert the model again"));
    };
    let Some(mut family) = FAMILIES.iter().find(|f| f.gguf == Some(architecture)) else {
        let cause = format!("'{architecture}' is not supported");
        let cure = format!("use a model of one of these: {}", known());
        return Err(bad(metadata.path(), ARCHITECTURE, cause, cure));
    };
    let keys = Keys { metadata, architecture };
    let has_experts = keys.size_or_zero("expert_count", EXPERTS_MAX)?.is_some();
    if has_experts && family.experts.is_none() && architecture == "llama" {
        family = FAMILIES.iter().find(|f| f.name == "mixtral").unwrap_or(family);
    }
    let hidden = keys.required("embedding_length", WIDTH_MAX)?;
    let context = keys.required("context_length", CONTEXT_MAX)?;
    let layers = layers_of(&keys, family, hidden, has_experts)?;
    let head_dim = layers.first().map_or(0, |layer| layer.head_dim);
    let presence = |bias| match bias {
        Bias::Always => Presence::Yes,
        Bias::Configured | Bias::Never => Presence::Either,
    };
    let mut eos = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        eos.extend(keys.token(key)?.filter(|id| !eos.contains(id)));
    }
    Ok(Config {
        file: metadata.path().to_owned(),
        family,
        names: &GGUF,
        hidden,
        vocab: keys.size("vocab_size", WIDTH_MAX)?,
        context,
        norm_eps: keys
            .f64("attention.layer_norm_rms_epsilon", f64::MIN_POSITIVE, 1.0)?
            .ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))? as f32,
        layers,
        tied: Some(catalog.find(GGUF.head).is_none()),
        rope: rope_of(&keys, head_dim, context)?,
        pairs: if family.gguf_neighbours { RopePairs::Neighbours } else { RopePairs::Halves },
        clip: match family.clips {
            true => keys.f64("attention.clamp_kqv", 0.0, f64::from(f32::MAX))?.filter(|c| *c > 0.0).map(|c| c as f32),
            false => None,
        },
        biases: Biases { qkv: presence(family.qkv_bias), o: presence(family.o_bias), mlp: presence(family.mlp_bias) },
        bos: keys.token("bos_token_id")?,
        eos,
    })
}

fn layers_of(
    keys: &Keys<'_>,
    family: &Family,
    hidden: usize,
    has_experts: bool,
) -> Result<Vec<LayerConfig>, InferError> {
    let layers = keys.required("block_count", LAYERS_MAX)?;
    let file = keys.metadata.path();
    let heads = keys.by_layer("attention.head_count", layers)?.ok_or_else(|| keys.missing("attention.head_count"))?;
    let kv_heads = keys.by_layer("attention.head_count_kv", layers)?.unwrap_or_else(|| heads.clone());
    let key_length = keys.size("attention.key_length", WIDTH_MAX)?;
    let value_length = keys.size("attention.value_length", WIDTH_MAX)?;
    let window = keys.size_or_zero("attention.sliding_window", CONTEXT_MAX)?;
    let widths = keys.by_layer("feed_forward_length", layers)?;
    let experts = if has_experts { Some(experts_of(keys, family, widths.as_deref())?) } else { None };
    if family.experts.is_some() && experts.is_none() {
        return Err(keys.missing("expert_count"));
    }
    let mut all = Vec::with_capacity(layers);
    for layer in 0..layers {
        let (heads, kv_heads) = (heads[layer], kv_heads[layer]);
        check_heads(file, heads, kv_heads, &keys.name("attention.head_count_kv"))?;
        let head_dim = match key_length {
            Some(length) => length,
            None => head_dim_of(file, hidden, heads, &keys.name("attention.head_count"))?,
        };
        if let Some(length) = value_length
            && length != head_dim
        {
            let cause = format!("values of {length} elements beside keys of {head_dim} are not supported");
            return Err(keys.bad(&keys.name("attention.value_length"), cause, "use another model"));
        }
        let ffn = match (&experts, &widths) {
            (Some(experts), _) => *experts,
            (None, Some(widths)) => FfnConfig::Dense { width: widths[layer] },
            (None, None) => return Err(keys.missing("feed_forward_length")),
        };
        all.push(LayerConfig { heads, kv_heads, head_dim, window, ffn });
    }
    Ok(all)
}

fn experts_of(keys: &Keys<'_>, family: &Family, widths: Option<&[usize]>) -> Result<FfnConfig, InferError> {
    let rule = family.experts.unwrap_or(GGUF_LLAMA_EXPERTS);
    let experts = keys.required("expert_count", EXPERTS_MAX)?;
    let used = keys.required("expert_used_count", EXPERTS_MAX)?;
    if used > experts {
        let cause = format!("a token can't use {used} of {experts} experts");
        return Err(keys.bad(&keys.name("expert_used_count"), cause, FETCH));
    }
    for (key, plain) in [("expert_weights_scale", 1.0), ("expert_gating_func", 1.0)] {
        let name = keys.name(key);
        let value = keys.metadata.get(&name).and_then(|v| v.as_f32().or(v.as_u64().map(|n| n as f32)));
        if let Some(value) = value
            && value != plain
            && value != 0.0
        {
            return Err(keys.bad(&name, format!("{value} is not supported"), "use another model"));
        }
    }
    if keys.size_or_zero("expert_shared_count", EXPERTS_MAX)?.is_some() {
        let name = keys.name("expert_shared_count");
        return Err(keys.bad(&name, "shared experts are not supported", "use another model"));
    }
    let normalise = match rule.normalise {
        Normalise::Always => true,
        Normalise::Configured { gguf, .. } => keys.bool("expert_weights_norm")?.unwrap_or(gguf),
    };
    let width = match keys.size("expert_feed_forward_length", WIDTH_MAX)? {
        Some(width) => width,
        None => widths.and_then(|w| w.first().copied()).ok_or_else(|| keys.missing("expert_feed_forward_length"))?,
    };
    Ok(FfnConfig::Experts { width, experts, used, normalise })
}

fn rope_of(keys: &Keys<'_>, head_dim: usize, context: usize) -> Result<Rope, InferError> {
    let theta = keys.f64("rope.freq_base", 1.000_001, 1e30)?.unwrap_or(10_000.0);
    let dim = keys.size("rope.dimension_count", WIDTH_MAX)?.unwrap_or(head_dim);
    check_rotary(keys.metadata.path(), &keys.name("rope.dimension_count"), dim, head_dim)?;
    let kind = keys.str("rope.scaling.type")?;
    let factor = match keys.f64("rope.scaling.factor", 0.0, 1e6)? {
        Some(factor) => Some(factor),
        None => keys.f64("rope.scale_linear", 0.0, 1e6)?,
    };
    let factor = factor.filter(|f| *f != 0.0).unwrap_or(1.0);
    let (scaling, attention_factor) = match kind {
        Some("none") => (RopeScaling::Default, 1.0),
        None | Some("linear") if factor == 1.0 => (RopeScaling::Default, 1.0),
        None | Some("linear") => (RopeScaling::Linear { factor }, 1.0),
        Some("yarn") => {
            let original = keys.size("rope.scaling.original_context_length", CONTEXT_MAX)?.unwrap_or(context);
            let own = keys.f64("rope.scaling.attn_factor", 0.0, 1e6)?.filter(|f| *f != 0.0).unwrap_or(1.0);
            let scaling = RopeScaling::Yarn {
                factor,
                original_positions: original as f64,
                beta_fast: keys.f64("rope.scaling.yarn_beta_fast", 1e-6, 1e6)?.unwrap_or(32.0),
                beta_slow: keys.f64("rope.scaling.yarn_beta_slow", 1e-6, 1e6)?.unwrap_or(1.0),
                truncate: true,
            };
            (scaling, own * yarn_attention_factor(factor, 1.0))
        }
        Some(other) => {
            let name = keys.name("rope.scaling.type");
            let cure = "use a model with one of these: none, linear, yarn";
            return Err(keys.bad(&name, format!("'{other}' is not supported"), cure));
        }
    };
    Ok(Rope { theta, dim, scaling, attention_factor, divisors: None })
}
