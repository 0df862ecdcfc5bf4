//! Configurations that make no sense, and requests that cannot be met: each gives one error that names the file, the
//! key or tensor, the cause and the cure. Nothing panics.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Oracle, PlainModel, TempDir, engine, fixture, runtime};
use overspill::formats::{self, GgufValue, Metadata};
use overspill::{Budget, Engine, ErrorKind};
use overspill_infer::InferError;
use overspill_infer::arch::ModelSpec;
use overspill_infer::generate::{Ended, Request, Runtime, RuntimeOptions};
use overspill_infer::kernels::Activations;
use overspill_infer::sampling::SamplingParams;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

/// The specification of a fixture with this configuration instead of its own.
fn spec_of(name: &str, config: Value) -> Result<ModelSpec, InferError> {
    let files = formats::open(&fixture("oracles").join(name)).unwrap();
    let metadata = Metadata::HuggingFace { config, generation: None, tokenizer_json: None, tokenizer_config: None };
    ModelSpec::from(&metadata, &files.catalog)
}

fn config_of(name: &str) -> Value {
    PlainModel::read(name).config
}

/// A change, and what the error must name.
type Case = (&'static str, &'static str, Value, &'static str);

fn hf_cases() -> Vec<Case> {
    let missing = Value::Null;
    vec![
        ("tiny-llama", "hidden_size", json!(0), "hidden_size"),
        ("tiny-llama", "hidden_size", json!("64"), "hidden_size"),
        ("tiny-llama", "hidden_size", json!(-64), "hidden_size"),
        ("tiny-llama", "hidden_size", json!(64.5), "hidden_size"),
        ("tiny-llama", "hidden_size", json!(1e300), "hidden_size"),
        ("tiny-llama", "hidden_size", json!(u64::MAX), "hidden_size"),
        ("tiny-llama", "hidden_size", json!(128), "model.embed_tokens.weight"),
        ("tiny-llama", "hidden_size", missing.clone(), "hidden_size"),
        ("tiny-llama", "intermediate_size", json!(177), "mlp.gate_proj.weight"),
        ("tiny-llama", "intermediate_size", missing.clone(), "intermediate_size"),
        ("tiny-llama", "num_attention_heads", json!(0), "num_attention_heads"),
        ("tiny-llama", "num_attention_heads", json!(6), "self_attn.q_proj.weight"),
        ("tiny-llama", "num_key_value_heads", json!(3), "num_key_value_heads"),
        ("tiny-llama", "num_key_value_heads", json!(4), "self_attn.k_proj.weight"),
        ("tiny-mixtral", "num_attention_heads", json!(6), "num_attention_heads"),
        ("tiny-llama", "head_dim", json!(15), "head_dim"),
        ("tiny-llama", "head_dim", json!(32), "self_attn.q_proj.weight"),
        ("tiny-llama", "num_hidden_layers", json!(0), "num_hidden_layers"),
        ("tiny-llama", "num_hidden_layers", json!(u64::MAX), "num_hidden_layers"),
        ("tiny-llama", "num_hidden_layers", json!(4000), "model.layers.4.input_layernorm.weight"),
        ("tiny-llama", "num_hidden_layers", json!(3), "model.layers.3."),
        ("tiny-llama", "max_position_embeddings", json!(0), "max_position_embeddings"),
        ("tiny-llama", "max_position_embeddings", missing.clone(), "max_position_embeddings"),
        ("tiny-llama", "rms_norm_eps", json!(-1e-5), "rms_norm_eps"),
        ("tiny-llama", "rms_norm_eps", json!("NaN"), "rms_norm_eps"),
        ("tiny-llama", "hidden_act", json!("gelu"), "hidden_act"),
        ("tiny-llama", "vocab_size", json!(0), "vocab_size"),
        ("tiny-llama", "vocab_size", json!(319), "model.embed_tokens.weight"),
        ("tiny-llama", "eos_token_id", json!([1, 320]), "eos_token_id"),
        ("tiny-llama", "eos_token_id", json!("</s>"), "eos_token_id"),
        ("tiny-llama", "tie_word_embeddings", json!("no"), "tie_word_embeddings"),
        ("tiny-llama-tied-rope3", "tie_word_embeddings", json!(false), "lm_head.weight"),
        ("tiny-llama", "attention_bias", json!(true), "self_attn.q_proj.bias"),
        ("tiny-qwen2", "architectures", json!(["LlamaForCausalLM"]), "bias"),
        ("tiny-llama", "architectures", json!(["FancyForCausalLM"]), "FancyForCausalLM"),
        ("tiny-llama", "rope_parameters", json!(7), "rope_parameters"),
        ("tiny-llama", "rope_parameters", json!({"rope_type": "wild"}), "rope_type"),
        ("tiny-llama", "rope_parameters", json!({"rope_theta": 0.0}), "rope_theta"),
        ("tiny-llama", "rope_parameters", json!({"rope_type": "linear"}), "factor"),
        ("tiny-llama", "rope_parameters", json!({"rope_type": "linear", "factor": 0.0}), "factor"),
        ("tiny-llama", "rope_parameters", json!({"rope_type": "longrope", "short_factor": [1.0]}), "short_factor"),
        ("tiny-llama", "rope_parameters", json!({"full_attention": {"rope_type": "default"}}), "full_attention"),
        (
            "tiny-llama",
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
            "high_freq_factor",
        ),
        ("tiny-mistral-swa", "sliding_window", json!(0), "sliding_window"),
        ("tiny-mixtral", "num_local_experts", json!(0), "num_local_experts"),
        ("tiny-mixtral", "num_local_experts", json!(9), "block_sparse_moe.gate.weight"),
        ("tiny-mixtral", "num_experts_per_tok", json!(9), "num_experts_per_tok"),
        ("tiny-qwen3moe", "num_experts_per_tok", json!(0), "num_experts_per_tok"),
        ("tiny-qwen3moe", "mlp_only_layers", json!([4]), "mlp_only_layers"),
        ("tiny-qwen3moe", "decoder_sparse_step", json!(0), "decoder_sparse_step"),
        ("tiny-olmoe", "clip_qkv", json!(-1.0), "clip_qkv"),
    ]
}

#[test]
fn configurations_that_make_no_sense_are_refused_by_name() {
    for (name, key, value, named) in hf_cases() {
        let mut config = config_of(name);
        config[key] = value.clone();
        let error = spec_of(name, config).expect_err(&format!("{name}: {key} = {value} was taken"));
        let text = error.to_string();
        assert!(text.contains(named), "{name}: {key} = {value} gives '{text}', which doesn't name {named}");
        assert!(text.contains("config.json") || text.contains("safetensors"), "'{text}' names no file");
        assert!(text.contains(';'), "'{text}' names no cure");
    }
}

proptest! {
    /// Whatever stands in a configuration: a specification or an error, never a panic.
    #[test]
    fn no_configuration_panics(
        model in prop::sample::select(vec!["tiny-llama-yarn", "tiny-qwen3moe", "tiny-olmoe", "tiny-mistral-swa"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0usize..14, any::<bool>()), 1..4),
    ) {
        let mut config = config_of(model);
        for (key, value, in_rope) in changes {
            let values = [
                json!(0), json!(1), json!(-1), json!(2), json!(3), json!(u64::MAX), json!(1e308), json!(1e-308),
                json!(0.5), json!("x"), json!([]), json!({}), json!(null), json!([1, "x", null]),
            ];
            let target = if in_rope { &mut config["rope_parameters"] } else { &mut config };
            let Some(object) = target.as_object_mut() else { continue };
            let keys: Vec<String> = object.keys().cloned().collect();
            if keys.is_empty() { continue }
            let key = key.get(&keys).clone();
            object.insert(key, values[value].clone());
        }
        // Either is fine.
        let _ = spec_of(model, config);
    }
}

#[test]
fn gguf_keys_that_make_no_sense_are_refused_by_name() {
    let u32_of = |n: u32| Some(GgufValue::U32(n));
    let cases: Vec<(&str, Option<GgufValue>, &str)> = vec![
        ("general.architecture", Some(GgufValue::Str("fancy".into())), "fancy"),
        ("general.architecture", None, "general.architecture"),
        ("llama.block_count", None, "llama.block_count"),
        ("llama.block_count", u32_of(0), "llama.block_count"),
        ("llama.block_count", u32_of(u32::MAX), "llama.block_count"),
        ("llama.block_count", u32_of(3), "blk.2."),
        ("llama.block_count", u32_of(1), "blk.1."),
        ("llama.embedding_length", u32_of(512), "token_embd.weight"),
        ("llama.embedding_length", Some(GgufValue::Str("256".into())), "llama.embedding_length"),
        ("llama.attention.head_count", u32_of(0), "llama.attention.head_count"),
        ("llama.attention.head_count", u32_of(3), "llama.attention.head_count"),
        ("llama.attention.head_count_kv", u32_of(3), "llama.attention.head_count_kv"),
        ("llama.attention.key_length", u32_of(32), "llama.rope.dimension_count"),
        ("llama.attention.value_length", u32_of(32), "llama.attention.value_length"),
        ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon"),
        ("llama.attention.layer_norm_rms_epsilon", Some(GgufValue::F32(f32::NAN)), "layer_norm_rms_epsilon"),
        ("llama.rope.freq_base", Some(GgufValue::F32(f32::INFINITY)), "llama.rope.freq_base"),
        ("llama.rope.freq_base", Some(GgufValue::F32(0.0)), "llama.rope.freq_base"),
        ("llama.rope.dimension_count", u32_of(63), "llama.rope.dimension_count"),
        ("llama.rope.dimension_count", u32_of(128), "llama.rope.dimension_count"),
        ("llama.rope.scaling.type", Some(GgufValue::Str("wild".into())), "llama.rope.scaling.type"),
        ("llama.context_length", u32_of(0), "llama.context_length"),
        ("llama.feed_forward_length", None, "llama.feed_forward_length"),
        ("llama.vocab_size", u32_of(513), "token_embd.weight"),
        ("llama.expert_count", u32_of(8), "llama.expert_used_count"),
        ("tokenizer.ggml.eos_token_id", u32_of(512), "eos_token_id"),
    ];
    let source = fixture("oracles/llama-f16.gguf");
    let files = formats::open(&source).unwrap();
    let Metadata::Gguf(metadata) = &files.metadata else { panic!("no GGUF") };
    let specs: Vec<_> = (files.catalog.tensors().iter())
        .map(|t| formats::write::TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() })
        .collect();
    let directory = TempDir::new("gguf-keys");
    for (number, (key, value, named)) in cases.into_iter().enumerate() {
        let mut pairs: Vec<(String, GgufValue)> =
            metadata.iter().filter(|(k, _)| *k != key).map(|(k, v)| (k.to_owned(), v.clone())).collect();
        pairs.extend(value.clone().map(|value| (key.to_owned(), value)));
        let path = directory.0.join(format!("{number}.gguf"));
        let layout = formats::write::gguf_layout(&path, &pairs, &specs).unwrap();
        let mut bytes = layout.header;
        bytes.resize(layout.file_bytes as usize, 0);
        std::fs::write(&path, bytes).unwrap();
        let files = formats::open(&path).unwrap();
        let error = ModelSpec::from(&files.metadata, &files.catalog);
        let error = error.expect_err(&format!("{key} = {value:?} was taken")).to_string();
        assert!(error.contains(named), "{key} = {value:?} gives '{error}', which doesn't name {named}");
        assert!(error.contains(".gguf"), "'{error}' names no file");
    }
}

fn go_on(_: u32) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn requests_that_cannot_be_met_are_refused_and_leave_the_session_usable() {
    let oracle = Oracle::named("tiny-llama");
    let runtime = runtime(&oracle.model, Activations::F32, 1, 4);
    let too_long = runtime.session(Some(257)).unwrap_err().to_string();
    assert!(too_long.contains("--ctx") && too_long.contains("256"), "{too_long}");
    assert!(runtime.session(Some(0)).is_err());
    let mut session = runtime.session(Some(20)).unwrap();
    assert_eq!((session.context(), session.chunk()), (20, 4));

    let refused = |session: &mut overspill_infer::generate::Session, prompt: &[u32]| {
        session.generate(&Request::greedy(prompt, 5), None, &mut go_on).unwrap_err().to_string()
    };
    let error = refused(&mut session, &[]);
    assert!(error.contains("prompt"), "{error}");
    let error = refused(&mut session, &[1; 21]);
    assert!(error.contains("21") && error.contains("20") && error.contains("--ctx"), "{error}");
    let error = refused(&mut session, &[1, 320]);
    assert!(error.contains("320") && error.contains("vocabulary"), "{error}");
    let mut request = Request::greedy(&[1], 5);
    request.sampling = SamplingParams { temperature: f32::NAN, ..SamplingParams::default() };
    assert!(matches!(session.generate(&request, None, &mut go_on), Err(InferError::Sampling(_))));
    assert_eq!(session.position(), 0);

    // Eight tokens of a prompt and twelve of an answer fill twenty positions; a thirteenth is chosen, not computed.
    let mut request = Request::greedy(&oracle.prompt, 30);
    request.ignore_eos = true;
    let answer = session.generate(&request, None, &mut go_on).unwrap();
    assert_eq!(answer.ended, Ended::Context);
    assert_eq!(answer.tokens, oracle.greedy[..13]);
}

#[test]
fn answers_end_where_they_are_told_to() {
    let oracle = Oracle::named("tiny-llama");
    let runtime = runtime(&oracle.model, Activations::F32, 1, 512);
    let mut session = runtime.session(None).unwrap();
    let stop = oracle.greedy[3];
    let first = oracle.greedy.iter().position(|t| *t == stop).unwrap();
    let mut request = Request::greedy(&oracle.prompt, 30);
    let stops = [stop];
    request.stop = &stops;
    let answer = session.generate(&request, None, &mut go_on).unwrap();
    assert_eq!(answer.ended, Ended::Stop(stop));
    assert_eq!(answer.tokens, oracle.greedy[..first]);

    session.reset();
    let mut seen = Vec::new();
    let answer = session.generate(&Request::greedy(&oracle.prompt, 30), None, &mut |token| {
        seen.push(token);
        if seen.len() == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(answer.unwrap().ended, Ended::Caller);
    assert_eq!(seen, oracle.greedy[..5]);

    // The conversation goes on with the answer's last token, and gives what one long prompt gives.
    let rest = session.generate(&Request::greedy(&seen[4..], 5), None, &mut go_on).unwrap();
    assert_eq!(rest.tokens, oracle.greedy[5..10]);
}

/// A cancelled request leaves the sequence as it was, in a ring of keys too.
#[test]
fn cancelled_requests_leave_the_sequence_as_it_was() {
    for name in ["tiny-mistral-swa", "tiny-qwen3moe"] {
        let oracle = Oracle::named(name);
        let runtime = runtime(&oracle.model, Activations::F32, 1, 4);
        let mut session = runtime.session(None).unwrap();
        let prompt = [&oracle.prompt[..], &oracle.greedy].concat();
        session.prefill(&prompt, None).unwrap();
        let cancel = AtomicBool::new(true);
        let error = session.prefill(&[1, 2, 3, 4], Some(&cancel)).unwrap_err();
        assert!(matches!(error, InferError::Cancelled));
        assert_eq!(session.position(), prompt.len());
        cancel.store(false, Ordering::Relaxed);
        let got = session.prefill(&[7], Some(&cancel)).unwrap().to_vec();

        // Cancelled in the middle: another thread's timing decides where, the result must not.
        for wait_us in [50, 200, 800] {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(std::time::Duration::from_micros(wait_us));
                    cancel.store(true, Ordering::Relaxed);
                });
                let before = session.position();
                if session.prefill(&[5, 6, 7, 8], Some(&cancel)).is_err() {
                    assert_eq!(session.position(), before);
                }
            });
            cancel.store(false, Ordering::Relaxed);
            session.reset();
            session.prefill(&prompt, None).unwrap();
        }
        let again = session.prefill(&[7], None).unwrap();
        assert_eq!(common::bits(&got), common::bits(again), "{name}");
    }
}

/// A budget that is too small says which would do, and that one does (invariant 2).
#[test]
fn the_smallest_budget_works_and_is_named() {
    for name in ["tiny-llama", "tiny-qwen3moe", "llama-q4_k_m"] {
        let oracle = Oracle::named(name);
        let open = |bytes: u64| {
            let engine = Engine::builder().ram(Budget::Bytes(bytes)).open(&oracle.model);
            let options = RuntimeOptions { threads: 1, ..RuntimeOptions::default() };
            engine.map_err(InferError::from).and_then(|engine| Runtime::open(engine, options))
        };
        let mut budget = 1;
        let mut tries = 0;
        let runtime = loop {
            match open(budget) {
                Ok(runtime) => break runtime,
                Err(InferError::Engine(overspill::Error::TooSmall { bytes_min, setting, .. })) => {
                    assert_eq!(setting, "--ram");
                    assert!(bytes_min > budget, "{name}: {bytes_min} is no cure for {budget}");
                    budget = bytes_min;
                }
                Err(error) => panic!("{name} with {budget} bytes: {error}"),
            }
            tries += 1;
            assert!(tries < 4, "{name}: the smallest budget is never named");
        };
        let mut request = Request::greedy(&oracle.prompt, oracle.greedy.len());
        request.ignore_eos = true;
        let answer = runtime.session(None).unwrap().generate(&request, None, &mut go_on).unwrap();
        assert_eq!(answer.tokens, oracle.greedy, "{name} in {budget} bytes");
        let stats = runtime.engine().stats().unwrap();
        assert!(stats.tier("host").unwrap().peak_bytes <= budget);
    }
}

#[test]
fn the_cache_is_bounded_by_its_own_setting() {
    let oracle = Oracle::named("tiny-llama");
    let engine = Engine::builder().kv_bytes(100 << 10).open(&oracle.model).unwrap();
    let runtime = Runtime::open(engine, RuntimeOptions::default()).unwrap();
    // 4 layers of 2 × 32 f32 are 1 KiB a position.
    assert!(runtime.session(Some(100)).is_ok());
    let error = runtime.session(Some(101)).unwrap_err();
    assert!(error.to_string().contains("--kv"), "{error}");
    let held = runtime.session(Some(60)).unwrap();
    assert!(runtime.session(Some(60)).is_err());
    drop(held);
    assert!(runtime.session(Some(60)).is_ok());
}

#[test]
fn an_engine_without_a_model_is_refused() {
    let files = formats::open(&fixture("oracles/tiny-llama")).unwrap();
    let engine = Engine::builder().open_catalog(files.catalog).unwrap();
    assert!(matches!(Runtime::open(engine, RuntimeOptions::default()), Err(InferError::Input { .. })));
    let gone = Engine::builder().open(&fixture("oracles/none")).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
    let closed = engine_closed();
    assert!(matches!(closed, Err(InferError::Engine(overspill::Error::Closed))), "{closed:?}");
}

fn engine_closed() -> Result<(), InferError> {
    let engine = engine(&fixture("oracles/tiny-llama"));
    let runtime = Runtime::open(engine.clone(), RuntimeOptions::default())?;
    let mut session = runtime.session(None)?;
    engine.close();
    session.prefill(&[1, 2, 3], None).map(|_| ())
}
