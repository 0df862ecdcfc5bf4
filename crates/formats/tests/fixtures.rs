//! Opens every model in `fixtures/` and compares the catalog with what independent readers say of the same files.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill_core::{Layout, Role, Tensor};
use overspill_formats::{Format, GgufValue, Metadata, ModelFiles, open};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn directories() -> Vec<PathBuf> {
    let mut all = vec![fixtures().join("tiny-stories"), fixtures().join("tiny-moe")];
    for entry in std::fs::read_dir(fixtures().join("oracles")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.push(path);
        }
    }
    assert!(all.len() >= 12, "{all:?}");
    all
}

fn ggufs() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures().join("oracles")).unwrap().map(|entry| entry.unwrap().path());
    let all: Vec<_> = entries.filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect();
    assert!(all.len() >= 6, "{all:?}");
    all
}

fn tensor<'a>(model: &'a ModelFiles, name: &str) -> &'a Tensor {
    let id = model.catalog.find(name).unwrap_or_else(|| panic!("{name} is not in {}", model.path.display()));
    model.catalog.tensor(id)
}

/// Bytes of every block that belongs to a tensor.
fn bytes_in_blocks(model: &ModelFiles, name: &str) -> u64 {
    let id = model.catalog.find(name).unwrap();
    let units = match model.catalog.tensor(id).layout {
        Layout::Cut { units, .. } => units,
        _ => 1,
    };
    (0..units).flat_map(|unit| model.catalog.pieces(id, unit)).map(|piece| piece.bytes).sum()
}

#[test]
fn every_safetensors_fixture_agrees_with_the_safetensors_crate() {
    for directory in directories() {
        let model = open(&directory).unwrap();
        assert_eq!(model.format, Format::Safetensors);
        assert!(model.skipped.is_empty());
        let file = std::fs::read(directory.join("model.safetensors")).unwrap();
        let (_, bytes) = model.catalog.files().next().unwrap();
        assert_eq!(bytes, file.len() as u64);
        let truth = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(model.catalog.tensors().len(), truth.len(), "{}", directory.display());
        let mut total = 0;
        for (name, view) in truth.iter() {
            let tensor = tensor(&model, name);
            let shape: Vec<u64> = view.shape().iter().map(|&d| d as u64).collect();
            assert_eq!(tensor.shape, shape, "{name}");
            assert_eq!(tensor.dtype.name().to_uppercase(), view.dtype().to_string(), "{name}");
            assert_eq!(tensor.bytes, view.data().len() as u64);
            let begin = tensor.offset as usize;
            assert_eq!(&file[begin..begin + tensor.bytes as usize], view.data(), "{name}: other bytes");
            total += tensor.bytes;
        }
        assert_eq!(model.catalog.weight_bytes(), total);
        let Metadata::HuggingFace { config, generation, tokenizer_json, tokenizer_config } = &model.metadata else {
            panic!("not a Hugging Face model")
        };
        assert!(config["hidden_size"].as_u64().unwrap() > 0);
        assert!(generation.is_some());
        assert_eq!(tokenizer_json.is_some(), directory.join("tokenizer.json").exists());
        assert_eq!(tokenizer_config.is_some(), directory.join("tokenizer_config.json").exists());
    }
}

#[test]
fn embeddings_are_tables_and_matrices_too_only_if_tied() {
    for directory in directories() {
        let model = open(&directory).unwrap();
        let Metadata::HuggingFace { config, .. } = &model.metadata else { panic!() };
        let tied = config["tie_word_embeddings"].as_bool().unwrap_or(false);
        let name = "model.embed_tokens.weight";
        assert!(tensor(&model, name).table.is_some());
        let wanted = if tied { tensor(&model, name).bytes } else { 0 };
        assert_eq!(bytes_in_blocks(&model, name), wanted, "{}", directory.display());
        assert_eq!(model.catalog.find("lm_head.weight").is_some(), !tied, "{}", directory.display());
    }
}

#[test]
fn every_gguf_fixture_is_described_to_its_last_byte() {
    for path in ggufs() {
        let model = open(&path).unwrap();
        assert_eq!(model.format, Format::Gguf);
        let Metadata::Gguf(metadata) = &model.metadata else { panic!("not GGUF") };
        assert_eq!(metadata.version(), 3);
        let file_bytes = std::fs::metadata(&path).unwrap().len();
        let mut tensors: Vec<&Tensor> = model.catalog.tensors().iter().collect();
        tensors.sort_by_key(|tensor| tensor.offset);
        for pair in tensors.windows(2) {
            let end = pair[0].offset + pair[0].bytes;
            assert_eq!(end.next_multiple_of(32), pair[1].offset, "{}: a gap after {}", path.display(), pair[0].name);
        }
        let last = tensors.last().unwrap();
        assert_eq!((last.offset + last.bytes).next_multiple_of(32), file_bytes, "{}", path.display());
        let architecture = metadata.require_str("general.architecture").unwrap();
        let width = metadata.require_u64(&format!("{architecture}.embedding_length")).unwrap();
        let vocabulary = metadata.strings("tokenizer.ggml.tokens").unwrap();
        assert_eq!(tensor(&model, "token_embd.weight").shape, [vocabulary.len() as u64, width]);
        assert_eq!(vocabulary.get(1).unwrap(), "<s>");
        assert_eq!(vocabulary.iter().count(), 512);
        assert_eq!(metadata.array("tokenizer.ggml.scores").unwrap().f32(2), Some(-2.0));
        assert_eq!(metadata.array("tokenizer.ggml.token_type").unwrap().i64(0), Some(2));
        assert!((metadata.require_f32(&format!("{architecture}.rope.freq_base")).unwrap() - 1e4).abs() < 1e-3);
        assert!(
            matches!(metadata.get("general.quantization_version"), Some(GgufValue::U32(2))) || architecture == "llama"
        );
    }
}

#[test]
fn shapes_of_a_gguf_are_outermost_first_and_experts_are_units() {
    let model = open(&fixtures().join("oracles/llama-q4_k_m.gguf")).unwrap();
    assert_eq!(tensor(&model, "blk.0.attn_k.weight").shape, [128, 256]);
    assert_eq!(tensor(&model, "output.weight").dtype.name(), "q6_k");
    assert_eq!(bytes_in_blocks(&model, "token_embd.weight"), 0, "not tied: never read whole");
    let model = open(&fixtures().join("oracles/qwen3moe-q8_0.gguf")).unwrap();
    let id = model.catalog.find("blk.1.ffn_down_exps.weight").unwrap();
    let Layout::Cut { units, rows_per_unit, .. } = model.catalog.tensor(id).layout else { panic!("not cut") };
    assert_eq!((units, rows_per_unit), (8, 256));
    assert_eq!(Role::of_shape(&model.catalog.tensor(id).shape), Role::Experts);
}

#[test]
fn a_file_of_a_directory_opens_the_same_model() {
    let directory = fixtures().join("tiny-stories");
    let by_directory = open(&directory).unwrap();
    let by_file = open(&directory.join("model.safetensors")).unwrap();
    assert_eq!(by_file.catalog.tensors().len(), by_directory.catalog.tensors().len());
    assert_eq!(by_file.catalog.blocks(), by_directory.catalog.blocks());
}
