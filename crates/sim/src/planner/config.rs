//! The shape of a model from its `config.json` alone.
//!
//! More families than the runtime runs: a plan needs bytes and operations, not kernels. Norms are counted roughly (they
//! are a few thousandths); matrices exactly. Unknown families are refused rather than guessed.

use super::shape::{KvShape, ModelShape, Part, PartKind};
use overspill_core::DType;
use serde_json::Value;

/// No dimension of any model comes near; a product of three of them stays within 128 bits, and is checked.
const DIMENSION_MAX: u64 = 1 << 31;
const LAYERS_MAX: u64 = 4096;
const EXPERTS_MAX: u64 = 65_536;
/// Experts of all layers together, as files may have.
const ALL_EXPERTS_MAX: u64 = 1 << 18;
/// No model comes near, and a plan makes blocks of it.
const MODEL_BYTES_MAX: u64 = 16 << 40;
/// As the engine cuts blocks: about so many, of 1 to 4 MiB.
const BLOCKS_SOFT_MAX: u64 = 20_000;
const SLOT_BYTES_MIN: u64 = 1 << 20;
const SLOT_BYTES_MAX: u64 = 4 << 20;
const ALIGN_BYTES: u64 = 4096;
/// A model of less than 512 MiB gets about this many blocks.
const SMALL_MODEL_BLOCKS: u64 = 512;
/// What alignment and uneven cuts add, typically.
const PADDING: f64 = 1.006;

/// Networks with a gate (three matrices), by `model_type`.
const GATED: &[&str] = &[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "olmo2",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "cohere",
    "command-r",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "yi",
    "internlm2",
    "baichuan",
    "minimax",
    "ernie4_5_moe",
];
/// Networks without one (two matrices).
const PLAIN: &[&str] = &["opt", "gpt2", "gpt_neox", "bloom", "falcon", "starcoder2", "phi"];

/// A configuration from which no shape can be made: which key, why, what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{key}' {cause}; {cure}")]
pub struct ConfigError {
    /// The key.
    pub key: String,
    /// What is wrong.
    pub cause: String,
    /// What to do.
    pub cure: String,
}

fn bad(key: &str, cause: impl Into<String>) -> ConfigError {
    ConfigError { key: key.into(), cause: cause.into(), cure: "correct the configuration".into() }
}

type Read<T> = Result<T, ConfigError>;

/// The configuration's numbers, under the names that families give them.
struct Keys<'a>(&'a Value);

impl Keys<'_> {
    fn find<'k>(&self, keys: &[&'k str]) -> Option<(&'k str, &Value)> {
        keys.iter().find_map(|key| self.0.get(key).filter(|value| !value.is_null()).map(|value| (*key, value)))
    }

    fn whole(&self, keys: &[&str], default: Option<u64>, max: u64) -> Read<u64> {
        match (self.find(keys), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(bad(keys[0], "is missing")),
            (Some((key, value)), _) => match value.as_u64() {
                Some(number) if number <= max => Ok(number),
                _ => {
                    let shown: String = value.to_string().chars().take(40).collect();
                    Err(bad(key, format!("is {shown}, no whole number up to {max}")))
                }
            },
        }
    }

    /// A number of at least 1.
    fn positive(&self, keys: &[&str], default: Option<u64>, max: u64) -> Read<u64> {
        match self.whole(keys, default, max)? {
            0 => Err(bad(keys[0], "is 0")),
            number => Ok(number),
        }
    }

    fn flag(&self, key: &str) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(false)
    }
}

/// Matrices by their rows and columns.
#[derive(Clone, Copy, Default)]
struct Weights {
    matrices: u32,
    parameters: u64,
    bytes: u64,
}

struct Counter {
    dtype: DType,
}

impl Counter {
    /// Bytes of a row: of the wanted type, or of the next wider one whose groups suit the row, as llama.cpp's quantiser
    /// (and the writer of synthetic models) does it.
    fn row_bytes(&self, columns: u64) -> u64 {
        let mut dtype = self.dtype;
        loop {
            if let Some(bytes) = dtype.row_bytes(columns) {
                return bytes;
            }
            dtype = match dtype {
                DType::Q4_K => DType::Q5_0,
                DType::Q5_K => DType::Q5_1,
                DType::Q6_K => DType::Q8_0,
                DType::F16 => return columns.saturating_mul(2),
                _ => DType::F16,
            };
        }
    }

    fn matrices(&self, shapes: &[(u64, u64)]) -> Read<Weights> {
        let mut sum = Weights { matrices: shapes.len() as u32, ..Weights::default() };
        for &(rows, columns) in shapes {
            let too_large = || bad("hidden_size", "makes matrices of more than 2^63 bytes");
            let bytes = rows.checked_mul(self.row_bytes(columns)).ok_or_else(too_large)?;
            let parameters = rows.checked_mul(columns).ok_or_else(too_large)?;
            sum.bytes = sum.bytes.checked_add(bytes).filter(|b| *b < 1 << 56).ok_or_else(too_large)?;
            sum.parameters = sum.parameters.checked_add(parameters).ok_or_else(too_large)?;
        }
        Ok(sum)
    }
}

/// Attention's dimensions.
struct Attention {
    matrices: Vec<(u64, u64)>,
    kv_elements: u64,
    query_elements: u64,
    window: Option<u64>,
}

fn attention(keys: &Keys<'_>, hidden: u64) -> Read<Attention> {
    let heads = keys.positive(&["num_attention_heads", "n_head"], None, EXPERTS_MAX)?;
    let rank = keys.whole(&["kv_lora_rank"], Some(0), DIMENSION_MAX)?;
    if rank > 0 {
        // Latent attention: keys and values are kept as one short vector.
        let nope = keys.positive(&["qk_nope_head_dim"], None, EXPERTS_MAX)?;
        let rope = keys.positive(&["qk_rope_head_dim"], None, EXPERTS_MAX)?;
        let value = keys.positive(&["v_head_dim"], None, EXPERTS_MAX)?;
        let query = heads.saturating_mul(nope + rope);
        let mut matrices = match keys.whole(&["q_lora_rank"], Some(0), DIMENSION_MAX)? {
            0 => vec![(query, hidden)],
            q_rank => vec![(q_rank, hidden), (query, q_rank)],
        };
        matrices.extend([
            (rank + rope, hidden),
            (heads.saturating_mul(nope + value), rank),
            (hidden, heads.saturating_mul(value)),
        ]);
        return Ok(Attention { matrices, kv_elements: rank + rope, query_elements: query, window: None });
    }
    let kv_heads = if keys.flag("multi_query") { 1 } else { heads };
    let kv_heads = keys.positive(&["num_key_value_heads", "num_kv_heads"], Some(kv_heads), EXPERTS_MAX)?;
    let head = keys.positive(&["head_dim"], Some((hidden / heads).max(1)), EXPERTS_MAX)?;
    let (query, kv) = (heads.saturating_mul(head), kv_heads.saturating_mul(head));
    let windowed = match keys.0.get("use_sliding_window").and_then(Value::as_bool) {
        Some(used) => used,
        None => keys.find(&["sliding_window"]).is_some(),
    };
    let window = if windowed { Some(keys.positive(&["sliding_window"], None, DIMENSION_MAX)?) } else { None };
    let matrices = vec![(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)];
    Ok(Attention { matrices, kv_elements: 2 * kv, query_elements: query, window })
}

/// The experts of the layers that have some.
struct Experts {
    count: u64,
    used: u64,
    width: u64,
    shared_width: u64,
    dense_first: u64,
    every: u64,
    dense: Vec<u64>,
}

impl Experts {
    fn has(&self, layer: u64) -> bool {
        layer >= self.dense_first && (layer + 1).is_multiple_of(self.every) && !self.dense.contains(&layer)
    }
}

fn experts(keys: &Keys<'_>) -> Read<Option<Experts>> {
    let counts = ["n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"];
    let count = keys.whole(&counts, Some(0), EXPERTS_MAX)?;
    if count == 0 {
        return Ok(None);
    }
    let used_keys = ["num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k"];
    let used = keys.positive(&used_keys, None, EXPERTS_MAX)?;
    if used > count {
        return Err(bad("num_experts_per_tok", format!("is {used}, more than the {count} experts")));
    }
    let width = keys.positive(&["moe_intermediate_size", "intermediate_size"], None, DIMENSION_MAX)?;
    let shared = keys.whole(&["n_shared_experts"], Some(0), EXPERTS_MAX)?.saturating_mul(width);
    let shared_width = keys.whole(&["shared_expert_intermediate_size"], Some(shared), DIMENSION_MAX)?;
    let dense = keys.0.get("mlp_only_layers").and_then(Value::as_array);
    Ok(Some(Experts {
        count,
        used,
        width,
        shared_width,
        dense_first: keys.whole(&["first_k_dense_replace"], Some(0), LAYERS_MAX)?,
        every: keys.positive(&["decoder_sparse_step", "moe_layer_freq"], Some(1), LAYERS_MAX)?,
        dense: dense.map_or_else(Vec::new, |layers| layers.iter().filter_map(Value::as_u64).collect()),
    }))
}

/// Matrices of a network.
fn network(gated: bool, width: u64, hidden: u64) -> Vec<(u64, u64)> {
    let up = std::iter::repeat_n((width, hidden), if gated { 2 } else { 1 });
    up.chain([(hidden, width)]).collect()
}

impl ModelShape {
    /// Makes a shape of the content of a `config.json`, with matrices of this element type (or the next wider one that
    /// suits their rows).
    ///
    /// # Errors
    /// [`ConfigError`] for a family that is not known, and for a key that is missing or makes no sense.
    pub fn from_config(config: &Value, dtype: DType) -> Result<Self, ConfigError> {
        let config = config.get("text_config").filter(|inner| inner.is_object()).unwrap_or(config);
        let family = config.get("model_type").and_then(Value::as_str).unwrap_or("");
        let gated = GATED.contains(&family);
        if !gated && !PLAIN.contains(&family) {
            let shown: String = family.chars().filter(|c| !c.is_control()).take(40).collect();
            let mut error = bad("model_type", format!("is '{shown}', which the planner does not know"));
            error.cure = format!("it knows {}, {}", GATED.join(", "), PLAIN.join(", "));
            return Err(error);
        }
        let keys = Keys(config);
        let hidden = keys.positive(&["hidden_size", "n_embd"], None, DIMENSION_MAX)?;
        let layers = keys.positive(&["num_hidden_layers", "n_layer"], None, LAYERS_MAX)?;
        let vocabulary = keys.positive(&["vocab_size"], None, DIMENSION_MAX)?;
        let context = ["max_position_embeddings", "n_positions"];
        let context = keys.positive(&context, Some(2048), DIMENSION_MAX)?;
        let attention = attention(&keys, hidden)?;
        let experts = experts(&keys)?;
        if experts.as_ref().is_some_and(|experts| experts.count.saturating_mul(layers) > ALL_EXPERTS_MAX) {
            return Err(bad("num_experts", "has more experts in all layers than any real model"));
        }
        let count = Counter { dtype };
        let mut shape = Self {
            label: config.get("_name_or_path").and_then(Value::as_str).unwrap_or(family).to_owned(),
            architecture: family.to_owned(),
            parameters: 0,
            bytes: 0,
            hidden,
            vocabulary,
            context,
            layers: layers as u32,
            parts: Vec::new(),
            standing_bytes: (2 * layers + 1).saturating_mul(hidden).saturating_mul(if dtype.is_float() {
                2
            } else {
                4
            }),
            row_bytes: count.row_bytes(hidden),
            kv: windows(config, layers, &attention),
            kv_element_bytes: 4,
            activation_bytes: 0,
            slot_bytes: 0,
            padding: PADDING,
        };
        let mut ffn_width_max = 0;
        for layer in 0..layers {
            let experts = experts.as_ref().filter(|experts| experts.has(layer));
            let width = shape.layer(layer as u32, &keys, &count, &attention, experts)?;
            ffn_width_max = ffn_width_max.max(width);
        }
        let head = count.matrices(&[(vocabulary, hidden)])?;
        let (bytes, parameters) = (head.bytes, head.parameters);
        shape.parts.push(Part {
            kind: PartKind::Head,
            layer: layers as u32,
            bytes,
            parameters,
            units: 1,
            used: 1,
            products: 1,
            slots: 0,
        });
        let tied = keys.flag("tie_word_embeddings") || family == "opt" || family == "gpt2";
        shape.finish(&attention, ffn_width_max, if tied { None } else { Some(head) })
    }

    /// Adds a layer's parts. Returns the elements between the halves of its network, of all experts used.
    fn layer(
        &mut self,
        layer: u32,
        keys: &Keys<'_>,
        count: &Counter,
        attention: &Attention,
        experts: Option<&Experts>,
    ) -> Read<u64> {
        let (gated, hidden) = (GATED.contains(&self.architecture.as_str()), self.hidden);
        let mut push = |kind, weights: Weights, units: u64, used: u64| {
            self.parts.push(Part {
                kind,
                layer,
                bytes: weights.bytes,
                parameters: weights.parameters,
                units: units as u32,
                used: used as u32,
                products: weights.matrices,
                slots: 0,
            });
        };
        push(PartKind::Attention, count.matrices(&attention.matrices)?, 1, 1);
        let Some(e) = experts else {
            let default = if gated { None } else { Some(hidden.saturating_mul(4)) };
            let width = keys.positive(&["intermediate_size", "ffn_dim", "n_inner"], default, DIMENSION_MAX)?;
            push(PartKind::Dense, count.matrices(&network(gated, width, hidden))?, 1, 1);
            return Ok(width);
        };
        // Routers stay in single precision where files are quantised.
        let router = Counter { dtype: if count.dtype.is_float() { count.dtype } else { DType::F32 } };
        push(PartKind::Router, router.matrices(&[(e.count, hidden)])?, 1, 1);
        if e.shared_width > 0 {
            push(PartKind::SharedExperts, count.matrices(&network(gated, e.shared_width, hidden))?, 1, 1);
        }
        push(PartKind::Experts, count.matrices(&network(gated, e.width, hidden))?, e.count, e.used);
        Ok(e.width.saturating_mul(e.used))
    }

    fn finish(mut self, attention: &Attention, ffn_width: u64, table: Option<Weights>) -> Read<Self> {
        let table = table.unwrap_or_default();
        let units = |part: &Part, each: u64| each.checked_mul(u64::from(part.units));
        let sum = |each: fn(&Part) -> u64| {
            let mut parts = self.parts.iter().map(|part| units(part, each(part)));
            parts.try_fold(0u64, |sum, part| sum.checked_add(part?))
        };
        let too_large = || bad("hidden_size", "makes a model of more than 16 TiB");
        let blocks = sum(|part| part.bytes).filter(|bytes| *bytes <= MODEL_BYTES_MAX).ok_or_else(too_large)?;
        self.parameters = sum(|part| part.parameters).ok_or_else(too_large)?.saturating_add(table.parameters);
        self.bytes = blocks + self.standing_bytes + table.bytes;
        let wide = 3 * self.hidden + 2 * attention.query_elements + 2 * attention.kv_elements;
        self.activation_bytes = 4 * (wide + 2 * ffn_width + ffn_width);
        let low = (blocks / SMALL_MODEL_BLOCKS).min(SLOT_BYTES_MIN);
        let payload = low.max((blocks / BLOCKS_SOFT_MAX).min(SLOT_BYTES_MAX)).next_multiple_of(ALIGN_BYTES);
        self.slot_bytes = payload.max(ALIGN_BYTES) + ALIGN_BYTES;
        Ok(self)
    }
}

/// Which layers see a window only: all, or those that `layer_types` names.
fn windows(config: &Value, layers: u64, attention: &Attention) -> Vec<KvShape> {
    let types = config.get("layer_types").and_then(Value::as_array);
    let slides = |layer: u64| match types.and_then(|types| types.get(layer as usize)).and_then(Value::as_str) {
        Some(kind) => kind.contains("sliding"),
        None => true,
    };
    let layer = |layer| KvShape {
        elements: attention.kv_elements,
        window: attention.window.filter(|_| slides(layer)),
        query_elements: attention.query_elements,
    };
    (0..layers).map(layer).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use serde_json::json;

    fn deepseek_v3() -> Value {
        json!({
            "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
            "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
            "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "first_k_dense_replace": 3, "moe_layer_freq": 1, "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
            "max_position_embeddings": 163840, "tie_word_embeddings": false
        })
    }

    #[test]
    fn a_mixture_of_671_billion_has_as_many_and_uses_37() {
        let shape = ModelShape::from_config(&deepseek_v3(), DType::Q4_K).unwrap();
        assert!((670_500_000_000..671_500_000_000).contains(&shape.parameters), "{}", shape.parameters);
        let used = shape.flops_per_token() / 2;
        // Its makers count 37 billion, the embeddings (0.9) with them.
        assert!((36_000_000_000..37_500_000_000).contains(&used), "{used}");
        // Routers stay in single precision.
        assert!((shape.touched_bytes() as f64 / used as f64 - 0.5625 - 0.0105).abs() < 0.005);
        assert!(shape.is_mixture() && shape.expert_bytes() > shape.common_bytes() * 20);
        // 576 values a layer and position.
        assert_eq!(shape.kv_bytes(1000, 1), 61 * 576 * 1000 * 4);
        assert_eq!(shape.positions_in(61 * 576 * 1000 * 4, 1), 1000);
    }

    #[test]
    fn nonsense_is_refused_with_its_key() {
        let with = |key: &str, value: Value| {
            let mut config = deepseek_v3();
            config[key] = value;
            ModelShape::from_config(&config, DType::F16).map(|_| ()).unwrap_err()
        };
        for (key, value) in [
            ("model_type", json!("abacus")),
            ("model_type", json!(null)),
            ("hidden_size", json!(0)),
            ("hidden_size", json!(-1)),
            ("hidden_size", json!("7168")),
            ("hidden_size", json!(u64::MAX)),
            ("num_hidden_layers", json!(1e9)),
            ("num_hidden_layers", json!(1_000_000)),
            ("n_routed_experts", json!(1u64 << 40)),
            ("num_experts_per_tok", json!(257)),
            ("vocab_size", json!(null)),
            ("v_head_dim", json!(0)),
        ] {
            let error = with(key, value.clone());
            assert_eq!(error.key, key, "{value}: {error}");
            assert!(!error.cure.is_empty());
        }
        let mut config = deepseek_v3();
        for key in ["hidden_size", "moe_intermediate_size", "intermediate_size", "vocab_size"] {
            config[key] = json!(1u64 << 31);
        }
        assert!(ModelShape::from_config(&config, DType::F32).unwrap_err().cause.contains("more than "));
        let mut config = deepseek_v3();
        config["moe_intermediate_size"] = json!(1 << 20);
        assert!(ModelShape::from_config(&config, DType::F32).unwrap_err().cause.contains("more than 16 TiB"));
        let mut config = deepseek_v3();
        config["num_hidden_layers"] = json!(4096);
        assert!(ModelShape::from_config(&config, DType::F32).unwrap_err().cause.contains("more experts"));
    }

    #[test]
    fn windows_bound_the_cache_of_the_layers_that_have_them() {
        let config = json!({
            "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 4,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
            "num_experts_per_tok": 4, "vocab_size": 201_088, "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        });
        let shape = ModelShape::from_config(&config, DType::F16).unwrap();
        assert_eq!(shape.kv_bytes(1000, 1), 2 * (1000 + 128) * 1024 * 4);
        assert_eq!(shape.kv_bytes(100, 1), 4 * 100 * 1024 * 4);
    }
}
