//! The same weights in other forms: every spelling of a configuration, every arrangement of experts, and GGUF files
//! of every architecture must give what the original gives.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Oracle, Plain, PlainModel, TempDir, bits, difference, fixture, runtime};
use overspill::formats::GgufValue;
use overspill_infer::generate::Request;
use overspill_infer::kernels::Activations;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

fn logits(model: &Path, prompt: &[u32]) -> Vec<f32> {
    let runtime = runtime(model, Activations::F32, 1, 512);
    let mut session = runtime.session(None).unwrap();
    session.prefill_all(prompt, None).unwrap().to_vec()
}

/// The changed model gives the original's bits.
fn assert_same_bits(name: &str, label: &str, change: impl FnOnce(&mut PlainModel)) {
    let prompt = Oracle::named(name).prompt;
    let mut model = PlainModel::read(name);
    change(&mut model);
    let directory = TempDir::new(label);
    model.write(&directory.0);
    let (got, expected) = (logits(&directory.0, &prompt), logits(&fixture("oracles").join(name), &prompt));
    assert!(bits(&got) == bits(&expected), "{label}: differs by {}", difference(&got, &expected));
}

fn remove(config: &mut Value, key: &str) -> Value {
    config.as_object_mut().unwrap().remove(key).unwrap()
}

/// transformers 4 wrote rope_theta beside rope_scaling, whose kind was first called `type`; dtype was torch_dtype.
#[test]
fn configurations_of_transformers_4_are_read() {
    for name in ["tiny-llama", "tiny-llama-linear", "tiny-llama-tied-rope3", "tiny-llama-yarn", "tiny-mixtral"] {
        assert_same_bits(name, "transformers-4", |model| {
            let mut rope = remove(&mut model.config, "rope_parameters");
            model.config["rope_theta"] = remove(&mut rope, "rope_theta");
            let kind = remove(&mut rope, "rope_type");
            model.config["torch_dtype"] = remove(&mut model.config, "dtype");
            model.config["rope_scaling"] = if kind == "default" { Value::Null } else { rope };
            if kind != "default" {
                let key = if kind == "linear" { "type" } else { "rope_type" };
                model.config["rope_scaling"][key] = kind;
            }
        });
    }
    assert_same_bits("tiny-qwen3moe", "num_experts", |model| {
        model.config["num_experts"] = remove(&mut model.config, "num_local_experts");
        remove(&mut model.config, "head_dim");
        remove(&mut model.config, "architectures");
    });
}

#[test]
fn names_without_the_models_prefix_are_found() {
    assert_same_bits("tiny-qwen2", "prefix", |model| {
        let tensors = std::mem::take(&mut model.tensors);
        model.tensors =
            tensors.into_iter().map(|(name, t)| (name.trim_start_matches("model.").to_owned(), t)).collect();
    });
}

/// Takes the tensors of experts `prefix{e}suffix` and puts them together.
fn stack(tensors: &mut BTreeMap<String, Plain>, experts: usize, name: impl Fn(usize) -> String) -> Plain {
    let mut all = Plain { shape: Vec::new(), values: Vec::new() };
    for expert in 0..experts {
        let one = tensors.remove(&name(expert)).unwrap();
        all.shape = [&[experts as u64], &one.shape[..]].concat();
        all.values.extend(one.values);
    }
    all
}

/// transformers 5 keeps experts in one tensor, the gate's rows before those that it gates.
#[test]
fn experts_in_one_tensor_give_what_single_ones_give() {
    assert_same_bits("tiny-qwen3moe", "fused", |model| {
        for layer in 0..4 {
            let prefix = format!("model.layers.{layer}.mlp.experts.");
            let of = |part: &str| {
                let (prefix, part) = (prefix.clone(), part.to_owned());
                move |e: usize| format!("{prefix}{e}.{part}_proj.weight")
            };
            let gate = stack(&mut model.tensors, 8, of("gate"));
            let up = stack(&mut model.tensors, 8, of("up"));
            let down = stack(&mut model.tensors, 8, of("down"));
            let (rows, cols) = (gate.shape[1], gate.shape[2]);
            let size = (rows * cols) as usize;
            let pairs = gate.values.chunks(size).zip(up.values.chunks(size));
            let values = pairs.flat_map(|(gate, up)| gate.iter().chain(up).copied()).collect();
            model.tensors.insert(format!("{prefix}gate_up_proj"), Plain { shape: vec![8, 2 * rows, cols], values });
            model.tensors.insert(format!("{prefix}down_proj"), down);
        }
    });
}

/// llama.cpp's order of the rows of queries and keys of the llama architecture: pairs become neighbours.
fn permute(plain: &mut Plain, heads: usize) {
    let cols = plain.shape.get(1).copied().unwrap_or(1) as usize;
    let rows: Vec<Vec<f32>> = plain.values.chunks(cols).map(<[f32]>::to_vec).collect();
    let head_dim = rows.len() / heads;
    let mut out = Vec::new();
    for head in 0..heads {
        for pair in 0..head_dim / 2 {
            for half in 0..2 {
                out.extend(&rows[head * head_dim + half * head_dim / 2 + pair]);
            }
        }
    }
    plain.values = out;
}

/// How experts are arranged in the GGUF file.
#[derive(Clone, Copy, PartialEq)]
enum ExpertForm {
    /// One tensor for each matrix of all experts.
    Fused,
    /// One tensor for gates and ups of all experts.
    GateUp,
    /// As old files have it.
    Each,
}

/// The model as a GGUF file: its tensors renamed, and its keys.
fn to_gguf(model: &PlainModel, architecture: &str, form: ExpertForm) -> (PlainModel, Vec<(String, GgufValue)>) {
    let config = &model.config;
    let number = |key: &str| config.get(key).and_then(Value::as_u64);
    let heads = number("num_attention_heads").unwrap();
    let kv_heads = number("num_key_value_heads").unwrap();
    let experts = number("num_local_experts").or(number("num_experts"));
    let mut pairs = vec![("general.architecture".to_owned(), GgufValue::Str(architecture.into()))];
    let mut add = |key: &str, value: GgufValue| pairs.push((format!("{architecture}.{key}"), value));
    let u32_of = |value: u64| GgufValue::U32(value as u32);
    add("context_length", u32_of(number("max_position_embeddings").unwrap()));
    add("embedding_length", u32_of(number("hidden_size").unwrap()));
    add("block_count", u32_of(number("num_hidden_layers").unwrap()));
    add("feed_forward_length", u32_of(number("intermediate_size").unwrap()));
    add("attention.head_count", u32_of(heads));
    add("attention.head_count_kv", u32_of(kv_heads));
    add("attention.layer_norm_rms_epsilon", GgufValue::F32(config["rms_norm_eps"].as_f64().unwrap() as f32));
    let rope = &config["rope_parameters"];
    add("rope.freq_base", GgufValue::F32(rope["rope_theta"].as_f64().unwrap() as f32));
    if let Some(kind @ ("linear" | "yarn")) = rope["rope_type"].as_str() {
        add("rope.scaling.type", GgufValue::Str(kind.into()));
        add("rope.scaling.factor", GgufValue::F32(rope["factor"].as_f64().unwrap() as f32));
        if let Some(original) = rope["original_max_position_embeddings"].as_u64() {
            add("rope.scaling.original_context_length", u32_of(original));
        }
    }
    if let Some(window) = number("sliding_window") {
        add("attention.sliding_window", u32_of(window));
    }
    if let Some(experts) = experts {
        add("expert_count", u32_of(experts));
        add("expert_used_count", u32_of(number("num_experts_per_tok").unwrap()));
        if let Some(width) = number("moe_intermediate_size") {
            add("expert_feed_forward_length", u32_of(width));
        }
    }
    let neighbours = architecture == "llama";
    let mut tensors = BTreeMap::new();
    let mut source = model.tensors.clone();
    if let Some(experts) = experts {
        for layer in 0..number("num_hidden_layers").unwrap() {
            experts_to_gguf(&mut source, &mut tensors, layer, experts as usize, form);
        }
    }
    for (name, mut tensor) in source {
        if neighbours && name.contains("q_proj") {
            permute(&mut tensor, heads as usize);
        }
        if neighbours && name.contains("k_proj") {
            permute(&mut tensor, kv_heads as usize);
        }
        tensors.insert(gguf_name(&name), tensor);
    }
    (PlainModel { config: Value::Null, tensors }, pairs)
}

fn experts_to_gguf(
    source: &mut BTreeMap<String, Plain>,
    tensors: &mut BTreeMap<String, Plain>,
    layer: u64,
    experts: usize,
    form: ExpertForm,
) {
    let mixtral = source.contains_key("model.layers.0.block_sparse_moe.gate.weight")
        || source.keys().any(|name| name.contains("block_sparse_moe"));
    let name_of = |part: &'static str, mixtral_part: &'static str| {
        move |e: usize| match mixtral {
            true => format!("model.layers.{layer}.block_sparse_moe.experts.{e}.{mixtral_part}.weight"),
            false => format!("model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"),
        }
    };
    if form == ExpertForm::Each {
        for expert in 0..experts {
            for (part, mixtral_part) in [("gate", "w1"), ("up", "w3"), ("down", "w2")] {
                let tensor = source.remove(&name_of(part, mixtral_part)(expert)).unwrap();
                tensors.insert(format!("blk.{layer}.ffn_{part}.{expert}.weight"), tensor);
            }
        }
        return;
    }
    let gate = stack(source, experts, name_of("gate", "w1"));
    let up = stack(source, experts, name_of("up", "w3"));
    let down = stack(source, experts, name_of("down", "w2"));
    tensors.insert(format!("blk.{layer}.ffn_down_exps.weight"), down);
    if form == ExpertForm::Fused {
        tensors.insert(format!("blk.{layer}.ffn_gate_exps.weight"), gate);
        tensors.insert(format!("blk.{layer}.ffn_up_exps.weight"), up);
    } else {
        let size = (gate.shape[1] * gate.shape[2]) as usize;
        let both = gate.values.chunks(size).zip(up.values.chunks(size));
        let values = both.flat_map(|(gate, up)| gate.iter().chain(up).copied()).collect();
        let shape = vec![experts as u64, 2 * gate.shape[1], gate.shape[2]];
        tensors.insert(format!("blk.{layer}.ffn_gate_up_exps.weight"), Plain { shape, values });
    }
}

fn gguf_name(name: &str) -> String {
    const PARTS: &[(&str, &str)] = &[
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("mlp.gate.", "ffn_gate_inp."),
        ("block_sparse_moe.gate.", "ffn_gate_inp."),
    ];
    PARTS.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// Llama 3's frequencies as the divisors that converters write.
fn llama3_divisors(config: &Value) -> Plain {
    let rope = &config["rope_parameters"];
    let number = |key: &str| rope[key].as_f64().unwrap();
    let (theta, factor) = (number("rope_theta"), number("factor"));
    let (low, high, original) =
        (number("low_freq_factor"), number("high_freq_factor"), number("original_max_position_embeddings"));
    let divisor = |pair: u32| {
        let wavelength = std::f64::consts::TAU * theta.powf(f64::from(2 * pair) / 16.0);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Plain { shape: vec![8], values: (0..8).map(|pair| divisor(pair) as f32).collect() }
}

#[test]
fn gguf_files_of_every_architecture_meet_the_oracles() {
    use ExpertForm::{Each, Fused, GateUp};
    let cases = [
        ("tiny-llama", "llama", Fused),
        ("tiny-llama-linear", "llama", Fused),
        ("tiny-llama-tied-rope3", "llama", Fused),
        ("tiny-llama-yarn", "llama", Fused),
        ("tiny-mistral-swa", "llama", Fused),
        ("tiny-qwen2", "qwen2", Fused),
        ("tiny-qwen3", "qwen3", Fused),
        ("tiny-mixtral", "llama", Fused),
        ("tiny-mixtral", "llama", Each),
        ("tiny-qwen3moe", "qwen3moe", Fused),
        ("tiny-qwen3moe", "qwen3moe", GateUp),
    ];
    for (name, architecture, form) in cases {
        let oracle = Oracle::named(name);
        let source = PlainModel::read(name);
        let (mut model, mut pairs) = to_gguf(&source, architecture, form);
        if name.contains("rope3") {
            model.tensors.insert("rope_freqs.weight".into(), llama3_divisors(&source.config));
        }
        pairs.push(("tokenizer.ggml.bos_token_id".into(), GgufValue::U32(1)));
        let directory = TempDir::new("gguf");
        let path = directory.0.join("model.gguf");
        model.write_gguf(&path, &pairs);
        let runtime = runtime(&path, Activations::F32, 2, 512);
        let mut session = runtime.session(None).unwrap();
        let mut request = Request::greedy(&oracle.prompt, oracle.greedy.len());
        request.ignore_eos = true;
        let answer = session.generate(&request, None, &mut |_| ControlFlow::Continue(())).unwrap();
        let off = difference(&answer.last_prompt_logits, &oracle.last_prompt_logits);
        assert!(off <= 1e-4, "{name} as {architecture}: differs by {off}");
        assert_eq!(answer.tokens, oracle.greedy, "{name} as {architecture}");
    }
}

/// OLMoE has no oracle; its two forms must agree at least. (Its arithmetic is held against `reference.rs`.)
#[test]
fn olmoe_gives_the_same_from_both_formats() {
    let prompt = [1, 17, 42, 5, 99, 200, 7, 63];
    let (model, pairs) = to_gguf(&PlainModel::read("tiny-olmoe"), "olmoe", ExpertForm::Fused);
    let directory = TempDir::new("olmoe");
    let path = directory.0.join("model.gguf");
    model.write_gguf(&path, &pairs);
    assert_eq!(bits(&logits(&path, &prompt)), bits(&logits(&fixture("oracles/tiny-olmoe"), &prompt)));
}

/// A layer may have a dense network though the architecture has experts.
#[test]
fn dense_layers_among_experts_are_used() {
    let mut model = PlainModel::read("tiny-qwen3moe");
    model.config["mlp_only_layers"] = json!([1]);
    let dense = PlainModel::read("tiny-llama");
    model.config["intermediate_size"] = json!(176);
    model.tensors.retain(|name, _| !name.starts_with("model.layers.1.mlp."));
    for part in ["gate", "up", "down"] {
        let name = format!("model.layers.1.mlp.{part}_proj.weight");
        model.tensors.insert(name.clone(), dense.tensors[&name].clone());
    }
    let directory = TempDir::new("mixed");
    model.write(&directory.0);
    let prompt = [1, 17, 42, 5];
    let got = logits(&directory.0, &prompt);
    let original = logits(&fixture("oracles/tiny-qwen3moe"), &prompt);
    assert!(got.iter().all(|x| x.is_finite()));
    assert!(difference(&got, &original) > 0.01, "the dense layer changed nothing");
}
