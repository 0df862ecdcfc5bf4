//! Synthetic models open again as described, are deterministic, and a write that fails leaves nothing behind.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::TestDir;
use overspill_core::DType;
use overspill_core::dtype::TABLE;
use overspill_formats::synth::{SynthSpec, Written, describe, preset, write};
use overspill_formats::{ErrorKind, Format, FormatError, Metadata, ModelFiles, open};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;

fn go(spec: &SynthSpec, out: &Path) -> Result<Written, FormatError> {
    write(spec, out, &mut |_, _| ControlFlow::Continue(()))
}

/// A small model of each family, shaped so that every quantised type fits some rows and not others.
fn configs() -> Vec<Value> {
    let base = json!({
        "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "torch_dtype": "float32",
    });
    let of = |more: Value| {
        let mut config = base.clone();
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let experts = json!({ "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48 });
    let with_experts = |more: Value| {
        let mut more = more;
        more.as_object_mut().unwrap().extend(experts.as_object().unwrap().clone());
        of(more)
    };
    vec![
        of(json!({ "model_type": "llama", "attention_bias": true, "mlp_bias": true })),
        of(json!({ "model_type": "mistral", "tie_word_embeddings": true, "sliding_window": 16 })),
        of(json!({ "architectures": ["Qwen2ForCausalLM"] })),
        of(json!({ "model_type": "qwen3", "head_dim": 32 })),
        of(json!({ "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2 })),
        with_experts(json!({ "model_type": "qwen3_moe", "mlp_only_layers": [1], "norm_topk_prob": true })),
        with_experts(json!({ "model_type": "olmoe", "num_key_value_heads": 4 })),
    ]
}

/// All that a catalog says, as text.
fn told(model: &ModelFiles) -> Vec<String> {
    let files = model.catalog.files().map(|file| format!("{file:?}"));
    files.chain(model.catalog.tensors().iter().map(|tensor| format!("{tensor:?}"))).collect()
}

#[test]
fn what_is_written_opens_as_it_was_described() {
    let dir = TestDir::new("synth");
    let mut number = 0;
    for config in configs() {
        for row in TABLE {
            for format in [Format::Safetensors, Format::Gguf] {
                if format == Format::Safetensors && !row.is_float {
                    continue;
                }
                number += 1;
                let mut spec = SynthSpec::new(config.clone(), row.dtype, format);
                spec.expert_skew = 1.0;
                spec.shard_bytes = 300_000;
                let suffix = if format == Format::Gguf { ".gguf" } else { "" };
                let out = dir.path().join(format!("{number}{suffix}"));
                let written = go(&spec, &out).unwrap();
                let model = open(&out).unwrap();
                assert_eq!(told(&model), told(&describe(&spec, &out).unwrap()));
                assert_eq!(model.catalog.tensors().len(), written.tensors);
                let on_disk: u64 = written.files.iter().map(|file| std::fs::metadata(file).unwrap().len()).sum();
                assert_eq!(on_disk, written.bytes);
                assert_eq!(written.bytes_by_dtype.values().sum::<u64>(), model.catalog.weight_bytes());
                if format == Format::Safetensors {
                    assert!(written.files.len() > 1, "sharded");
                    for file in &written.files {
                        safetensors::SafeTensors::deserialize(&std::fs::read(file).unwrap()).unwrap();
                    }
                }
            }
        }
    }
}

/// The tensors that transformers and llama.cpp wrote for the same configurations are the ones that we write.
#[test]
fn tensors_are_those_of_the_real_writers() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let mut directories = vec![fixtures.join("tiny-moe"), fixtures.join("tiny-stories")];
    directories.extend(
        ["llama", "llama-tied-rope3", "mistral-swa", "qwen2", "qwen3", "mixtral", "qwen3moe", "olmoe"]
            .map(|name| fixtures.join(format!("oracles/tiny-{name}"))),
    );
    let names = |model: &ModelFiles| {
        let mut all: Vec<_> =
            model.catalog.tensors().iter().map(|t| (t.name.clone(), t.shape.clone(), t.dtype)).collect();
        all.sort();
        all
    };
    for directory in directories {
        let real = open(&directory).unwrap();
        let Metadata::HuggingFace { config, .. } = &real.metadata else { panic!() };
        let dtype = real.catalog.tensors()[0].dtype;
        let spec = SynthSpec::new(config.clone(), dtype, Format::Safetensors);
        let ours = describe(&spec, Path::new("m")).unwrap();
        assert_eq!(names(&ours), names(&real), "{}", directory.display());
    }
    for (file, more) in [
        ("llama-q8_0.gguf", json!({ "model_type": "llama", "intermediate_size": 512 })),
        (
            "qwen3moe-q8_0.gguf",
            json!({
                "model_type": "qwen3_moe", "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
                "norm_topk_prob": true,
            }),
        ),
    ] {
        let real = open(&fixtures.join("oracles").join(file)).unwrap();
        let mut config = json!({
            "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 512, "head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let ours = describe(&SynthSpec::new(config, DType::Q8_0, Format::Gguf), Path::new("m")).unwrap();
        assert_eq!(names(&ours), names(&real), "{file}");
        let (Metadata::Gguf(ours), Metadata::Gguf(real)) = (&ours.metadata, &real.metadata) else { panic!() };
        for (key, value) in real.iter().filter(|(key, _)| !key.starts_with("tokenizer") && *key != "general.name") {
            assert_eq!(ours.get(key), Some(value), "{file}: {key}");
        }
    }
}

#[test]
fn the_same_request_gives_the_same_bytes() {
    let dir = TestDir::new("same");
    let config = configs().remove(0);
    let write_as = |name: &str, seed: u64| {
        let mut spec = SynthSpec::new(config.clone(), DType::Q6_K, Format::Gguf);
        spec.seed = seed;
        let out = dir.path().join(name);
        go(&spec, &out).unwrap();
        std::fs::read(out).unwrap()
    };
    let first = write_as("a.gguf", 5);
    assert_eq!(first, write_as("b.gguf", 5));
    assert_ne!(first, write_as("c.gguf", 6));
}

#[test]
fn what_was_broken_off_leaves_nothing() {
    let dir = TestDir::new("cancel");
    for (format, name) in [(Format::Safetensors, "m"), (Format::Gguf, "m.gguf")] {
        let mut spec = SynthSpec::new(configs().remove(3), DType::F16, format);
        spec.shard_bytes = 200_000;
        let out = dir.path().join(name);
        let mut calls = 0;
        let mut last = 0;
        let error = write(&spec, &out, &mut |done, total| {
            assert!(done > last && done <= total);
            last = done;
            calls += 1;
            if calls == 12 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{format}");
        last = 0;
        let mut end = (0, 1);
        let written = write(&spec, &out, &mut |done, total| {
            assert!(done > last);
            (last, end) = (done, (done, total));
            ControlFlow::Continue(())
        })
        .unwrap();
        assert!(end.0 <= end.1 && end.1 == written.bytes && end.1 - end.0 < 64, "{end:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{format}");
        std::fs::rename(out, dir.path().join("kept")).unwrap();
        let kept = dir.path().join("kept");
        if kept.is_dir() { std::fs::remove_dir_all(kept).unwrap() } else { std::fs::remove_file(kept).unwrap() }
    }
}

#[test]
fn nothing_is_replaced_and_impossible_outputs_are_refused() {
    let dir = TestDir::new("taken");
    let gguf = SynthSpec::new(configs().remove(0), DType::F16, Format::Gguf);
    let directory = SynthSpec::new(configs().remove(0), DType::F16, Format::Safetensors);
    let taken = dir.put("taken", "precious");
    for (spec, out) in [(&gguf, &*taken), (&directory, &taken), (&directory, dir.path()), (&gguf, dir.path())] {
        assert_eq!(go(spec, out).unwrap_err().kind(), ErrorKind::BadRequest);
    }
    assert_eq!(std::fs::read(&taken).unwrap(), b"precious");
    let error = go(&directory, &dir.path().join("m.gguf")).unwrap_err();
    assert!(error.to_string().contains("name a directory"), "{error}");
    let error = go(&gguf, &dir.path().join("absent/m.gguf")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    go(&directory, &empty).unwrap();
    assert!(open(&empty).is_ok());
}

#[test]
fn config_json_says_the_type_that_was_written() {
    let dir = TestDir::new("dtype");
    let out = dir.path().join("m");
    go(&SynthSpec::new(configs().remove(0), DType::BF16, Format::Safetensors), &out).unwrap();
    let Metadata::HuggingFace { config, .. } = open(&out).unwrap().metadata else { panic!() };
    assert_eq!(config["torch_dtype"], "bfloat16");
    assert_eq!(config["hidden_size"], 256);
    assert!(preset("tinyllama-1.1b").unwrap()["hidden_size"] == 2048);
}
