//! `config.json` and `generation_config.json`, in the forms of transformers 4 and 5.
//!
//! Keys that changed names are looked for under all of them. What is not here: tensors.

use super::family::{Bias, FAMILIES, Family, Normalise, WindowRule, known};
use super::keys::{
    Biases, CONTEXT_MAX, Config, EXPERTS_MAX, FETCH, FfnConfig, LAYERS_MAX, LayerConfig, Presence, WIDTH_MAX, bad,
    check_heads, check_rotary, finite, head_dim_of, in_range,
};
use super::names::HF;
use crate::InferError;
use crate::backend::RopePairs;
use crate::rope::{Rope, RopeScaling, yarn_attention_factor};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A JSON object of a file.
struct Object<'a> {
    file: PathBuf,
    /// Where in the file it is, with a dot at the end: `rope_parameters.`.
    path: &'static str,
    value: &'a Value,
}

impl<'a> Object<'a> {
    /// The first of these keys whose value isn't null, with its full name.
    fn first(&self, keys: &[&str]) -> Option<(String, &'a Value)> {
        let found = keys.iter().find_map(|key| Some((*key, self.value.get(key).filter(|v| !v.is_null())?)))?;
        Some((format!("{}{}", self.path, found.0), found.1))
    }

    fn bad(&self, key: &str, cause: impl Into<String>, cure: impl Into<String>) -> InferError {
        bad(&self.file, key, cause, cure)
    }

    fn u64(&self, keys: &[&str]) -> Result<Option<u64>, InferError> {
        let Some((key, value)) = self.first(keys) else { return Ok(None) };
        let whole = value.as_f64().filter(|f| *f >= 0.0 && f.fract() == 0.0 && *f < 9e15).map(|f| f as u64);
        match value.as_u64().or(whole) {
            Some(value) => Ok(Some(value)),
            None => Err(self.bad(&key, format!("{} is not a whole number", shown(value)), FETCH)),
        }
    }

    /// In `1..=max`.
    fn size(&self, keys: &[&str], max: u64) -> Result<Option<usize>, InferError> {
        let Some(value) = self.u64(keys)? else { return Ok(None) };
        let key = self.first(keys).map_or_else(String::new, |(key, _)| key);
        in_range(&self.file, &key, value, max).map(Some)
    }

    fn required(&self, keys: &[&str], max: u64) -> Result<usize, InferError> {
        self.size(keys, max)?.ok_or_else(|| self.missing(keys))
    }

    fn missing(&self, keys: &[&str]) -> InferError {
        let key = format!("{}{}", self.path, keys.first().copied().unwrap_or_default());
        self.bad(&key, "it is missing", "fetch the model's own config.json")
    }

    fn f64(&self, keys: &[&str], min: f64, max: f64) -> Result<Option<f64>, InferError> {
        let Some((key, value)) = self.first(keys) else { return Ok(None) };
        match value.as_f64() {
            Some(value) => finite(&self.file, &key, value, min, max).map(Some),
            None => Err(self.bad(&key, format!("{} is not a number", shown(value)), FETCH)),
        }
    }

    fn bool(&self, keys: &[&str]) -> Result<Option<bool>, InferError> {
        let Some((key, value)) = self.first(keys) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.bad(&key, format!("{} is not true or false", shown(value)), FETCH))
    }

    fn str(&self, keys: &[&str]) -> Result<Option<&'a str>, InferError> {
        let Some((key, value)) = self.first(keys) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.bad(&key, format!("{} is not text", shown(value)), FETCH))
    }

    /// One id or a list of them.
    fn ids(&self, key: &str) -> Result<Option<Vec<u32>>, InferError> {
        let Some((name, value)) = self.first(&[key]) else { return Ok(None) };
        let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(one).collect::<Option<Vec<_>>>(),
            value => one(value).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.bad(&name, format!("{} is neither a token nor a list", shown(value)), FETCH))
    }
}

/// A value for an error message, no longer than a line.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Reads a configuration. `directory` is where the files are.
pub(super) fn read(config: &Value, generation: Option<&Value>, directory: &Path) -> Result<Config, InferError> {
    let object = Object { file: directory.join("config.json"), path: "", value: config };
    let family = family_of(&object)?;
    if let Some(activation) = object.str(&["hidden_act", "hidden_activation"])?
        && !matches!(activation, "silu" | "swish")
    {
        return Err(object.bad("hidden_act", format!("'{activation}' is not supported"), "use a model with 'silu'"));
    }
    let hidden = object.required(&["hidden_size"], WIDTH_MAX)?;
    let heads = object.required(&["num_attention_heads"], WIDTH_MAX)?;
    let kv_heads = object.size(&["num_key_value_heads"], WIDTH_MAX)?.unwrap_or(heads);
    check_heads(&object.file, heads, kv_heads, "num_key_value_heads")?;
    let head_dim = match object.size(&["head_dim"], WIDTH_MAX)? {
        Some(head_dim) => head_dim,
        None => head_dim_of(&object.file, hidden, heads, "num_attention_heads")?,
    };
    let context = object
        .size(&["max_position_embeddings"], CONTEXT_MAX)?
        .ok_or_else(|| object.missing(&["max_position_embeddings"]))?;
    let rope = rope_of(&object, family, head_dim, context)?;
    let context = match rope.scaling {
        // The configuration says how long the training's sequences were; the scaling is there to go beyond.
        RopeScaling::Dynamic { factor, original_positions } if original_positions == context as f64 => {
            ((context as f64 * factor) as usize).min(CONTEXT_MAX as usize)
        }
        _ => context,
    };
    let attention = LayerConfig { heads, kv_heads, head_dim, window: None, ffn: FfnConfig::Dense { width: 1 } };
    let presence = |bias: Bias, key: &str| {
        Ok::<_, InferError>(match bias {
            Bias::Always => Presence::Yes,
            Bias::Never => Presence::No,
            Bias::Configured if object.bool(&[key])? == Some(true) => Presence::Yes,
            Bias::Configured => Presence::No,
        })
    };
    let stops = |key: &str| -> Result<Option<Vec<u32>>, InferError> {
        let file = directory.join("generation_config.json");
        let own = generation.map(|value| Object { file, path: "", value }.ids(key)).transpose()?.flatten();
        Ok(if own.is_some() { own } else { object.ids(key)? })
    };
    Ok(Config {
        family,
        names: &HF,
        hidden,
        vocab: object.size(&["vocab_size"], WIDTH_MAX)?,
        context,
        norm_eps: object.f64(&["rms_norm_eps"], f64::MIN_POSITIVE, 1.0)?.unwrap_or(family.eps_default) as f32,
        layers: layers_of(&object, family, attention)?,
        tied: object.bool(&["tie_word_embeddings"])?,
        rope,
        pairs: RopePairs::Halves,
        clip: match family.clips {
            true => object.f64(&["clip_qkv"], f64::MIN_POSITIVE, f64::from(f32::MAX))?.map(|clip| clip as f32),
            false => None,
        },
        biases: Biases {
            qkv: presence(family.qkv_bias, "attention_bias")?,
            o: presence(family.o_bias, "attention_bias")?,
            mlp: presence(family.mlp_bias, "mlp_bias")?,
        },
        bos: stops("bos_token_id")?.and_then(|ids| ids.first().copied()),
        eos: stops("eos_token_id")?.unwrap_or_default(),
        file: object.file,
    })
}

fn family_of(object: &Object<'_>) -> Result<&'static Family, InferError> {
    let class = object.value.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
    let cure = || format!("use a model of one of these: {}", known());
    if let Some(class) = class {
        let found = FAMILIES.iter().find(|f| f.hf_class == class);
        return found.ok_or_else(|| object.bad("architectures", format!("'{class}' is not supported"), cure()));
    }
    let Some(model_type) = object.str(&["model_type"])? else {
        return Err(object.bad(
            "architectures",
            "it is missing, and so is model_type",
            "fetch the model's own config.json",
        ));
    };
    let found = FAMILIES.iter().find(|f| f.hf == model_type);
    found.ok_or_else(|| object.bad("model_type", format!("'{model_type}' is not supported"), cure()))
}

fn layers_of(object: &Object<'_>, family: &Family, attention: LayerConfig) -> Result<Vec<LayerConfig>, InferError> {
    let layers = object.required(&["num_hidden_layers"], LAYERS_MAX)?;
    let windows = windows_of(object, family, layers)?;
    let experts = match &family.experts {
        None => None,
        Some(rule) => {
            let experts = object.required(&["num_local_experts", "num_experts"], EXPERTS_MAX)?;
            let used = object.size(&["num_experts_per_tok"], EXPERTS_MAX)?.unwrap_or(rule.used_default as usize);
            if used > experts {
                let cause = format!("a token can't use {used} of {experts} experts");
                return Err(object.bad("num_experts_per_tok", cause, FETCH));
            }
            let normalise = match rule.normalise {
                Normalise::Always => true,
                Normalise::Configured { default, .. } => object.bool(&["norm_topk_prob"])?.unwrap_or(default),
            };
            let width = object.required(&[rule.width_key], WIDTH_MAX)?;
            Some(FfnConfig::Experts { width, experts, used, normalise })
        }
    };
    let is_dense = dense_layers(object, family, layers)?;
    let needs_dense = experts.is_none() || is_dense.contains(&true);
    let width = if needs_dense { object.required(&["intermediate_size"], WIDTH_MAX)? } else { 0 };
    let ffn = |layer: usize| match experts {
        Some(experts) if !is_dense[layer] => experts,
        _ => FfnConfig::Dense { width },
    };
    Ok((0..layers).map(|l| LayerConfig { window: windows[l], ffn: ffn(l), ..attention }).collect())
}

/// Which layers have a dense network though the architecture has experts.
fn dense_layers(object: &Object<'_>, family: &Family, layers: usize) -> Result<Vec<bool>, InferError> {
    let mut dense = vec![false; layers];
    if !family.experts.is_some_and(|rule| rule.sparse_layers) {
        return Ok(dense);
    }
    let step = object.size(&["decoder_sparse_step"], LAYERS_MAX)?.unwrap_or(1);
    for (layer, dense) in dense.iter_mut().enumerate() {
        *dense = !(layer + 1).is_multiple_of(step);
    }
    for layer in object.ids("mlp_only_layers")?.unwrap_or_default() {
        match dense.get_mut(layer as usize) {
            Some(dense) => *dense = true,
            None => return Err(object.bad("mlp_only_layers", format!("there is no layer {layer}"), FETCH)),
        }
    }
    Ok(dense)
}

fn windows_of(object: &Object<'_>, family: &Family, layers: usize) -> Result<Vec<Option<usize>>, InferError> {
    let none = vec![None; layers];
    if family.window == WindowRule::None {
        return Ok(none);
    }
    let Some(window) = object.size(&["sliding_window"], CONTEXT_MAX)? else { return Ok(none) };
    let is_used = object.bool(&["use_sliding_window"])? == Some(true);
    match family.window {
        WindowRule::None => Ok(none),
        WindowRule::All => Ok(vec![Some(window); layers]),
        WindowRule::AllIfUsed => Ok(if is_used { vec![Some(window); layers] } else { none }),
        WindowRule::FromLayer if !is_used => Ok(none),
        WindowRule::FromLayer => {
            let Some((key, types)) = object.first(&["layer_types"]) else {
                let from = object.u64(&["max_window_layers"])?.unwrap_or(28);
                return Ok((0..layers as u64).map(|l| (l >= from).then_some(window)).collect());
            };
            let types = types.as_array().filter(|types| types.len() == layers);
            let types = types.ok_or_else(|| object.bad(&key, format!("it doesn't list {layers} layers"), FETCH))?;
            let window_of = |kind: &Value| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => Ok(Some(window)),
                _ => Err(object.bad(&key, format!("{} is not supported", shown(kind)), "use another model")),
            };
            types.iter().map(window_of).collect()
        }
    }
}

fn rope_of(object: &Object<'_>, family: &Family, head_dim: usize, context: usize) -> Result<Rope, InferError> {
    let nested = |path, key: &'static str| {
        let value = object.value.get(key).filter(|v| !v.is_null())?;
        Some(Object { file: object.file.clone(), path, value })
    };
    let parameters = nested("rope_parameters.", "rope_parameters").or_else(|| nested("rope_scaling.", "rope_scaling"));
    if let Some(parameters) = &parameters
        && !parameters.value.is_object()
    {
        let cause = format!("{} is not an object", shown(parameters.value));
        return Err(object.bad(parameters.path.trim_end_matches('.'), cause, FETCH));
    }
    let empty = Value::Object(serde_json::Map::new());
    let rope = parameters.unwrap_or(Object { file: object.file.clone(), path: "rope_parameters.", value: &empty });
    if let Some((kind, _)) = rope.value.as_object().and_then(|map| map.iter().find(|(_, v)| v.is_object())) {
        let cause = format!("rotary embeddings that differ by layer ('{kind}') are not supported");
        return Err(object.bad(rope.path.trim_end_matches('.'), cause, "use another model"));
    }
    let theta = match rope.f64(&["rope_theta"], 1.000_001, 1e30)? {
        Some(theta) => theta,
        None => object.f64(&["rope_theta"], 1.000_001, 1e30)?.unwrap_or(family.theta_default),
    };
    for (holder, key) in [(object, "partial_rotary_factor"), (&rope, "partial_rotary_factor")] {
        if let Some(factor) = holder.f64(&[key], 0.0, 1.0)?
            && factor != 1.0
        {
            let cause = format!("{factor}: {} heads that turn only in part are not supported", family.name);
            return Err(object.bad(key, cause, "use another model"));
        }
    }
    check_rotary(&object.file, "head_dim", head_dim, head_dim)?;
    let (scaling, attention_factor) = scaling_of(object, &rope, head_dim, context)?;
    Ok(Rope { theta, dim: head_dim, scaling, attention_factor, divisors: None })
}

fn scaling_of(
    object: &Object<'_>,
    rope: &Object<'_>,
    head_dim: usize,
    context: usize,
) -> Result<(RopeScaling, f64), InferError> {
    let kind = rope.str(&["rope_type", "type"])?.unwrap_or("default");
    let optional_factor = || rope.f64(&["factor"], 1.0, 1e6);
    let factor = || optional_factor()?.ok_or_else(|| rope.missing(&["factor"]));
    let original = match rope.size(&["original_max_position_embeddings"], CONTEXT_MAX)? {
        Some(positions) => Some(positions),
        None => object.size(&["original_max_position_embeddings"], CONTEXT_MAX)?,
    };
    let stretch = original.map(|original| context as f64 / original as f64);
    let original_positions = original.unwrap_or(context) as f64;
    let attention_factor = || rope.f64(&["attention_factor"], 1e-6, 1e6);
    match kind {
        "default" => Ok((RopeScaling::Default, 1.0)),
        "linear" => Ok((RopeScaling::Linear { factor: factor()? }, 1.0)),
        "dynamic" => {
            Ok((RopeScaling::Dynamic { factor: factor()?, original_positions }, attention_factor()?.unwrap_or(1.0)))
        }
        "llama3" => {
            let number = |key: &'static str| rope.f64(&[key], 1e-6, 1e6)?.ok_or_else(|| rope.missing(&[key]));
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            if low >= high {
                let cause = format!("{high} is not above low_freq_factor, {low}");
                return Err(rope.bad("rope_parameters.high_freq_factor", cause, FETCH));
            }
            let original = original.ok_or_else(|| rope.missing(&["original_max_position_embeddings"]))?;
            let scaling = RopeScaling::Llama3 {
                factor: factor()?,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_positions: original as f64,
            };
            Ok((scaling, 1.0))
        }
        "yarn" => {
            let factor = match (optional_factor()?, stretch) {
                (Some(factor), _) => factor,
                (None, Some(stretch)) if stretch >= 1.0 => stretch,
                _ => return Err(rope.missing(&["factor"])),
            };
            let mscale = rope.f64(&["mscale"], 0.0, 1e6)?.filter(|m| *m != 0.0);
            let mscale_all = rope.f64(&["mscale_all_dim"], 0.0, 1e6)?.filter(|m| *m != 0.0);
            let attention = match (attention_factor()?, mscale, mscale_all) {
                (Some(given), _, _) => given,
                (None, Some(m), Some(all)) => yarn_attention_factor(factor, m) / yarn_attention_factor(factor, all),
                _ => yarn_attention_factor(factor, 1.0),
            };
            let scaling = RopeScaling::Yarn {
                factor,
                original_positions,
                beta_fast: rope.f64(&["beta_fast"], 1e-6, 1e6)?.unwrap_or(32.0),
                beta_slow: rope.f64(&["beta_slow"], 1e-6, 1e6)?.unwrap_or(1.0),
                truncate: rope.bool(&["truncate"])?.unwrap_or(true),
            };
            Ok((scaling, attention))
        }
        "longrope" | "su" => {
            let list = |key: &'static str| divisors_of(rope, key, head_dim / 2);
            let scaling =
                RopeScaling::Long { short: list("short_factor")?, long: list("long_factor")?, original_positions };
            let factor = optional_factor()?.or(stretch).unwrap_or(1.0);
            let derived = if factor <= 1.0 || original_positions <= 1.0 {
                1.0
            } else {
                (1.0 + factor.ln() / original_positions.ln()).sqrt()
            };
            Ok((scaling, attention_factor()?.unwrap_or(derived)))
        }
        other => {
            let cause = format!("'{other}' is not supported");
            let cure = "use a model with one of these: default, linear, dynamic, llama3, yarn, longrope";
            Err(rope.bad(&format!("{}rope_type", rope.path), cause, cure))
        }
    }
}

fn divisors_of(rope: &Object<'_>, key: &'static str, pairs: usize) -> Result<Vec<f64>, InferError> {
    let (name, value) = rope.first(&[key]).ok_or_else(|| rope.missing(&[key]))?;
    let list = value.as_array().filter(|list| list.len() == pairs);
    let list = list.ok_or_else(|| rope.bad(&name, format!("it doesn't list {pairs} numbers"), FETCH))?;
    let number = |v: &Value| finite(&rope.file, &name, v.as_f64().unwrap_or(f64::NAN), 1e-6, 1e6);
    list.iter().map(number).collect()
}
