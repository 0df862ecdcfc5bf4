//! Configurations of well-known models, as transformers' `config.json` gives them.

use serde_json::{Value, json};

/// Names that [`preset`] knows.
pub const PRESETS: &[&str] = &[
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "tinyllama-1.1b",
    "llama-3.2-1b",
    "llama-2-7b",
    "mistral-7b",
    "qwen2.5-7b",
    "llama-3-8b",
    "qwen3-8b",
    "olmoe-1b-7b",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "llama-3-70b",
    "mixtral-8x22b",
    "qwen3-235b-a22b",
    "llama-3.1-405b",
];

/// The configuration of a preset; `None` for a name that is not in [`PRESETS`].
#[must_use]
pub fn preset(name: &str) -> Option<Value> {
    // hidden, intermediate, layers, heads, key-value heads, vocabulary, context
    Some(match name {
        "tinyllama-1.1b" => llama([2048, 5632, 22, 32, 4, 32_000, 2048], 10_000.0),
        "llama-2-7b" => llama([4096, 11_008, 32, 32, 32, 32_000, 4096], 10_000.0),
        "llama-3-8b" => llama([4096, 14_336, 32, 32, 8, 128_256, 8192], 500_000.0),
        "llama-3-70b" => llama([8192, 28_672, 80, 64, 8, 128_256, 8192], 500_000.0),
        "llama-3.2-1b" => {
            let tied = json!({ "tie_word_embeddings": true, "head_dim": 64, "rope_scaling": llama3_rope(32.0) });
            with(llama([2048, 8192, 16, 32, 8, 128_256, 131_072], 500_000.0), tied)
        }
        "llama-3.1-405b" => {
            let rope = json!({ "rope_scaling": llama3_rope(8.0) });
            with(llama([16_384, 53_248, 126, 128, 8, 128_256, 131_072], 500_000.0), rope)
        }
        "mistral-7b" => {
            let base = base("Mistral", "mistral", [4096, 14_336, 32, 32, 8, 32_000, 32_768], 10_000.0, 1e-5);
            with(base, json!({ "sliding_window": 4096 }))
        }
        "qwen2.5-0.5b" => {
            let base = base("Qwen2", "qwen2", [896, 4864, 24, 14, 2, 151_936, 32_768], 1e6, 1e-6);
            with(base, json!({ "tie_word_embeddings": true, "use_sliding_window": false, "sliding_window": 32_768 }))
        }
        "qwen2.5-7b" => {
            let base = base("Qwen2", "qwen2", [3584, 18_944, 28, 28, 4, 152_064, 32_768], 1e6, 1e-6);
            with(base, json!({ "use_sliding_window": false, "sliding_window": 131_072 }))
        }
        "qwen3-0.6b" => {
            let base = base("Qwen3", "qwen3", [1024, 3072, 28, 16, 8, 151_936, 40_960], 1e6, 1e-6);
            with(base, json!({ "tie_word_embeddings": true, "head_dim": 128, "attention_bias": false }))
        }
        "qwen3-8b" => {
            let base = base("Qwen3", "qwen3", [4096, 12_288, 36, 32, 8, 151_936, 40_960], 1e6, 1e-6);
            with(base, json!({ "head_dim": 128, "attention_bias": false }))
        }
        "mixtral-8x7b" => mixtral([4096, 14_336, 32, 32, 8, 32_000, 32_768]),
        "mixtral-8x22b" => mixtral([6144, 16_384, 56, 48, 8, 32_768, 65_536]),
        "qwen3-30b-a3b" => qwen3_moe([2048, 6144, 48, 32, 4, 151_936, 40_960], 768),
        "qwen3-235b-a22b" => qwen3_moe([4096, 12_288, 94, 64, 4, 151_936, 40_960], 1536),
        "olmoe-1b-7b" => {
            let base = base("Olmoe", "olmoe", [2048, 1024, 16, 16, 16, 50_304, 4096], 10_000.0, 1e-5);
            let experts = json!({ "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": false });
            with(with(base, experts), json!({ "attention_bias": false, "clip_qkv": null }))
        }
        _ => return None,
    })
}

fn base(class: &str, model_type: &str, sizes: [u64; 7], rope_theta: f64, rms_norm_eps: f64) -> Value {
    let [hidden, intermediate, layers, heads, kv_heads, vocabulary, context] = sizes;
    json!({
        "architectures": [format!("{class}ForCausalLM")],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": rope_theta,
        "tie_word_embeddings": false,
        "initializer_range": 0.02,
    })
}

fn with(mut base: Value, more: Value) -> Value {
    if let (Value::Object(base), Value::Object(more)) = (&mut base, more) {
        base.extend(more);
    }
    base
}

fn llama(sizes: [u64; 7], rope_theta: f64) -> Value {
    base("Llama", "llama", sizes, rope_theta, 1e-5)
}

fn llama3_rope(factor: f64) -> Value {
    json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    })
}

fn mixtral(sizes: [u64; 7]) -> Value {
    let experts = json!({ "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": null });
    with(base("Mixtral", "mixtral", sizes, 1e6, 1e-5), experts)
}

fn qwen3_moe(sizes: [u64; 7], expert_width: u64) -> Value {
    let more = json!({
        "head_dim": 128,
        "attention_bias": false,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert_width,
        "norm_topk_prob": true,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    });
    with(base("Qwen3Moe", "qwen3_moe", sizes, 1e6, 1e-6), more)
}
