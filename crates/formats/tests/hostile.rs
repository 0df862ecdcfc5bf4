//! Bad input: every kind of damage gives one clear error that names the file, the tensor or key, and the cause, and
//! never a panic or an allocation that a header alone can demand.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use overspill_formats::{ErrorKind, FormatError, GgufValue, Metadata, open};
use proptest::prelude::*;
use std::path::Path;

fn refused(path: &Path, wanted: &[&str]) -> FormatError {
    let error = open(path).map(|model| model.catalog.tensors().len()).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::BadFile, "{text}");
    for wanted in wanted {
        assert!(text.contains(wanted), "'{wanted}' isn't said in: {text}");
    }
    assert!(!error.cure().is_empty(), "{text}");
    assert!(text.len() < 1000, "{text}");
    error
}

fn model_dir(name: &str) -> TestDir {
    let dir = TestDir::new(name);
    dir.put("config.json", r#"{"model_type":"llama"}"#);
    dir
}

fn st_bytes(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

#[test]
fn safetensors_headers_that_lie_are_refused() {
    let x = r#""dtype":"F32","shape":[2,2],"data_offsets":[0,16]"#;
    let y = |begin: u64, end: u64| format!(r#""y":{{"dtype":"F32","shape":[2,2],"data_offsets":[{begin},{end}]}}"#);
    let dir = model_dir("st");
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (vec![], &["empty"]),
        (vec![1, 2, 3], &["header's length", "left"]),
        ((1u64 << 60).to_le_bytes().to_vec(), &["1152921504606846976", "only 8"]),
        (u64::MAX.to_le_bytes().to_vec(), &["only 8"]),
        (st_bytes("{", 0), &["header isn't valid"]),
        (st_bytes("[]", 0), &["header isn't valid"]),
        (st_bytes("{}", 0), &["no tensors"]),
        (st_bytes(&"[".repeat(100_000), 0), &["header isn't valid"]),
        (st_bytes(r#"{"x":{"dtype":"F32","shape":[2,2]}}"#, 16), &["data_offsets"]),
        (st_bytes(r#"{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4), &["-1"]),
        (st_bytes(&format!(r#"{{"x":{{{x}}}}}"#), 12), &["tensor 'x'", "beyond", "truncated"]),
        (st_bytes(&format!(r#"{{"x":{{{x}}}}}"#), 20), &["4 bytes follow the last tensor"]),
        (st_bytes(&format!(r#"{{"x":{{{x}}},{}}}"#, y(8, 24)), 24), &["tensor 'y'", "overlap"]),
        (st_bytes(&format!(r#"{{"x":{{{x}}},{}}}"#, y(20, 36)), 36), &["tensor 'y'", "begins at byte 20"]),
        (st_bytes(&format!(r#"{{"x":{{{x}}},{}}}"#, y(24, 16)), 24), &["tensor 'y'", "ends at byte 16"]),
        (st_bytes(&format!(r#"{{"x":{{{x}}},"x":{{{x}}}}}"#), 16), &["tensor 'x'", "twice"]),
        (
            st_bytes(r#"{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}"#, 16),
            &["tensor 'x'", "overflow"],
        ),
        (
            st_bytes(r#"{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}"#, 16),
            &["tensor 'x'", "takes 12 bytes", "given 16"],
        ),
        (
            st_bytes(r#"{"x":{"dtype":"Q9","shape":[4],"data_offsets":[0,4]}}"#, 4),
            &["tensor 'x'", "Q9", "F32, F16 and BF16"],
        ),
        (
            st_bytes(r#"{"x":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#, 4),
            &["tensor 'x'", "F8_E4M3", "convert"],
        ),
        (st_bytes(r#"{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#, 0), &["tensor 'x'", "impossible"]),
        (st_bytes(r#"{"__metadata__":3}"#, 0), &["header isn't valid"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n".to_vec(), &["git-lfs", "git lfs pull"]),
        (b"\n<!DOCTYPE html><html>not found</html>".to_vec(), &["web page"]),
    ];
    for (bytes, wanted) in cases {
        let path = dir.put("model.safetensors", &bytes);
        refused(dir.path(), wanted);
        refused(&path, wanted);
    }
}

#[test]
fn directories_and_configurations_that_are_no_model_are_refused() {
    let dir = TestDir::new("dir");
    let missing = open(&dir.path().join("absent")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains("absent"), "{missing}");
    refused(dir.path(), &["without config.json"]);
    let gguf_path = dir.path().join("m.gguf");
    gguf(&gguf_path, &all_pairs(), &gguf_tensors());
    refused(dir.path(), &["without config.json", "m.gguf"]);
    dir.put("config.json", "{}");
    refused(dir.path(), &["neither", "fetch the weights"]);
    dir.put("pytorch_model.bin", "PK");
    refused(dir.path(), &["pytorch_model.bin", "convert"]);
    safetensors(&dir.path().join("weights.safetensors"), &hf_tensors());
    refused(dir.path(), &["weights.safetensors"]);
    assert_eq!(open(&dir.path().join("weights.safetensors")).unwrap().catalog.tensors().len(), 4);
    safetensors(&dir.path().join("model.safetensors"), &hf_tensors());
    for (config, wanted) in [
        ("", "empty"),
        ("{", "invalid JSON"),
        (r#"{"rms_norm_eps": NaN}"#, "NaN"),
        (r#"{"rms_norm_eps": 1e999}"#, "out of range"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
    ] {
        dir.put("config.json", config);
        refused(dir.path(), &["config.json", wanted]);
    }
    dir.put("config.json", "{}");
    dir.put("generation_config.json", "{\"temperature\": Infinity}");
    refused(dir.path(), &["generation_config.json", "invalid JSON"]);
    std::fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(&dir.path().join("model.safetensors"), &["no config.json beside it"]);
    for name in ["d.gguf", "d.safetensors"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        refused(&dir.path().join(name), &["a directory where a file was expected"]);
    }
    refused(&dir.put("notes.txt", "hello"), &["neither a GGUF file nor"]);
    // A cache stores files under their hashes.
    assert!(open(&dir.put("0f3a", std::fs::read(gguf_path).unwrap())).is_ok());
}

#[cfg(target_os = "linux")]
#[test]
fn devices_are_not_waited_for() {
    refused(Path::new("/dev/null"), &["not a regular file"]);
}

#[test]
fn a_shard_that_is_a_directory_is_refused() {
    let dir = model_dir("shard-dir");
    std::fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    refused(dir.path(), &["model.safetensors", "a directory where a file was expected"]);
}

#[test]
fn sharded_models_open_and_their_indexes_are_checked() {
    let dir = model_dir("sharded");
    let all = hf_tensors();
    safetensors(&dir.path().join("model-00001-of-00002.safetensors"), &all[..2]);
    safetensors(&dir.path().join("model-00002-of-00002.safetensors"), &all[2..]);
    refused(dir.path(), &["index is missing"]);
    let index = |more: &str, last_shard: &str| {
        format!(
            r#"{{"metadata":{{}},"weight_map":{{{more}
            "model.embed_tokens.weight":"model-00001-of-00002.safetensors",
            "model.layers.0.input_layernorm.weight":"model-00001-of-00002.safetensors",
            "model.layers.0.self_attn.q_proj.weight":"model-00002-of-00002.safetensors",
            "lm_head.weight":"{last_shard}"}}}}"#
        )
    };
    let name = "model.safetensors.index.json";
    let path = dir.put(name, index("", "model-00002-of-00002.safetensors"));
    for path in [dir.path(), &path, &dir.path().join("model-00002-of-00002.safetensors")] {
        let model = open(path).unwrap();
        assert_eq!(model.catalog.tensors().len(), 4);
        assert_eq!(model.catalog.files().len(), 2);
    }
    let cases = [
        (index("", "model-00003-of-00002.safetensors"), "lm_head.weight", "is missing"),
        (index("", "model-00001-of-00002.safetensors"), "lm_head.weight", "isn't there"),
        (
            index(r#""extra":"model-00001-of-00002.safetensors","#, "model-00002-of-00002.safetensors"),
            "extra",
            "isn't there",
        ),
        (index("", "../model.safetensors"), "", "not a file inside"),
        (index("", "/etc/passwd"), "", "not a file inside"),
        (r#"{"weight_map":{}}"#.to_owned(), "weight_map", "empty"),
        (r#"{"weight_map":{"x":3}}"#.to_owned(), "", "invalid JSON"),
        ("{}".to_owned(), "", "weight_map"),
    ];
    for (index, subject, cause) in cases {
        dir.put(name, index);
        refused(dir.path(), &[name, subject, cause]);
    }
    // The same tensor in both shards, and an index that doesn't say which one counts.
    safetensors(&dir.path().join("model-00002-of-00002.safetensors"), &all[1..]);
    let unsaid = index("", "model-00002-of-00002.safetensors").replace("model.layers.0.input_layernorm.weight", "x");
    dir.put(name, unsaid.replace(r#""x":"model-00001-of-00002.safetensors","#, ""));
    refused(dir.path(), &["model.layers.0.input_layernorm.weight", "twice"]);
    dir.put(name, index("", "model-00002-of-00002.safetensors"));
    let model = open(dir.path()).unwrap();
    assert_eq!((model.catalog.tensors().len(), model.skipped.len()), (4, 1));
    assert!(model.skipped[0].reason.contains("model-00001"), "{:?}", model.skipped);
}

#[test]
fn buffers_of_old_checkpoints_are_left_out_and_named() {
    let dir = model_dir("buffers");
    let header = r#"{"model.layers.0.self_attn.rotary_emb.inv_freq":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},
        "model.embeddings.position_ids":{"dtype":"I64","shape":[1],"data_offsets":[16,24]},
        "model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[24,32]}}"#;
    dir.put("model.safetensors", st_bytes(header, 32));
    let model = open(dir.path()).unwrap();
    assert_eq!(model.catalog.tensors().len(), 1);
    assert_eq!(model.skipped.len(), 2);
}

/// A GGUF file's start: version, tensors, keys.
fn gguf_start(version: u32, tensors: u64, pairs: u64) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(pairs.to_le_bytes());
    bytes
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A file with one key whose type and value are given raw.
fn with_value(kind: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = gguf_start(3, 0, 1);
    bytes.extend(string("some.key"));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len() + 64, 0);
    bytes
}

/// A file with one tensor described raw, and `data_bytes` of data.
fn with_tensor(name: &str, dims: &[u64], kind: u32, offset: u64, data_bytes: usize) -> Vec<u8> {
    let mut bytes = gguf_start(3, 1, 0);
    bytes.extend(string(name));
    bytes.extend((dims.len() as u32).to_le_bytes());
    bytes.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(32) + data_bytes, 0);
    bytes
}

#[test]
fn gguf_headers_that_lie_are_refused() {
    let dir = TestDir::new("gguf");
    let huge = 1u64 << 60;
    let array = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (vec![], &["empty"]),
        (b"GG".to_vec(), &["magic number"]),
        (b"GGML\x03\0\0\0".to_vec(), &["doesn't begin with 'GGUF'"]),
        (gguf_start(1, 0, 0), &["version 1"]),
        (gguf_start(3u32.swap_bytes(), 0, 0), &["big-endian"]),
        (gguf_start(4, 0, 0), &["version 4"]),
        (gguf_start(3, huge, 0), &["1152921504606846976 tensors"]),
        (gguf_start(3, u64::MAX, u64::MAX), &["metadata keys"]),
        (gguf_start(3, 0, huge), &["metadata keys"]),
        (gguf_start(3, 0, 0), &["no tensors"]),
        (gguf_start(3, 1, 0), &["1 tensors"]),
        (
            [gguf_start(3, 0, 1), huge.to_le_bytes().to_vec(), vec![0; 64]].concat(),
            &["a metadata key", "1152921504606846976"],
        ),
        ([gguf_start(3, 0, 1), string(""), vec![0; 64]].concat(), &["empty"]),
        ([gguf_start(3, 0, 1), vec![2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe], vec![0; 64]].concat(), &["UTF-8"]),
        (with_value(13, &[]), &["some.key", "type 13"]),
        (with_value(7, &[2]), &["some.key", "bool of 2"]),
        (with_value(8, &huge.to_le_bytes()), &["some.key", "1152921504606846976"]),
        (with_value(9, &array(9, 1)), &["some.key", "array of arrays"]),
        (with_value(9, &array(13, 1)), &["some.key", "type 13"]),
        (with_value(9, &array(8, huge)), &["some.key", "array elements"]),
        (with_value(9, &array(10, huge)), &["some.key", "array elements"]),
        (with_value(9, &[array(7, 1), vec![9]].concat()), &["some.key", "bool of 9"]),
        (with_tensor("x", &[4; 5], 0, 0, 64), &["tensor 'x'", "5 dimensions"]),
        (with_tensor("x", &[1 << 40, 1 << 40], 0, 0, 64), &["tensor 'x'", "overflow"]),
        (with_tensor("x", &[1 << 62], 0, 0, 64), &["tensor 'x'"]),
        (with_tensor("x", &[0], 0, 0, 64), &["tensor 'x'", "impossible"]),
        (with_tensor("x", &[16], 39, 0, 64), &["tensor 'x'", "MXFP4", "q4_k"]),
        (with_tensor("x", &[16], 4000, 0, 64), &["tensor 'x'", "ggml type 4000"]),
        (with_tensor("x", &[16], 8, 0, 64), &["tensor 'x'", "whole groups of 32"]),
        (with_tensor("x", &[16], 0, 8, 128), &["tensor 'x'", "alignment"]),
        (with_tensor("x", &[16], 0, 1 << 63, 64), &["tensor 'x'"]),
        (with_tensor("x", &[16], 0, u64::MAX - 31, 64), &["tensor 'x'", "overflow"]),
        (with_tensor("x", &[16], 0, 32, 64), &["tensor 'x'", "beyond", "truncated"]),
        (with_tensor("", &[16], 0, 0, 64), &["empty"]),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), &["git-lfs"]),
    ];
    for (bytes, wanted) in cases {
        refused(&dir.put("m.gguf", bytes), wanted);
    }
}

#[test]
fn gguf_tensors_and_keys_may_not_clash() {
    let dir = TestDir::new("gguf-clash");
    let path = dir.path().join("m.gguf");
    let tensors = gguf_tensors();
    let architecture = pair("general.architecture", GgufValue::Str("llama".into()));
    gguf(&path, &[architecture.clone(), architecture.clone()], &tensors);
    refused(&path, &["general.architecture", "twice"]);
    gguf(&path, std::slice::from_ref(&architecture), &[tensors[1].clone(), tensors[1].clone()]);
    refused(&path, &["blk.0.attn_norm.weight", "twice"]);
    // Two tensors, and the second moved onto the first.
    let mut bytes = with_tensor("x", &[16], 0, 0, 0);
    bytes[8] = 2;
    bytes.truncate(24 + 9 + 4 + 8 + 4 + 8);
    bytes.extend([string("y"), 1u32.to_le_bytes().into(), 16u64.to_le_bytes().into(), vec![0; 4], vec![0; 8]].concat());
    bytes.resize(bytes.len() + 256, 0);
    refused(&dir.put("m.gguf", bytes), &["overlap", "'x'", "'y'"]);
    for alignment in [GgufValue::U32(33), GgufValue::U32(0), GgufValue::Str("x".into()), GgufValue::U64(1 << 40)] {
        gguf(&path, std::slice::from_ref(&architecture), &tensors);
        let plain = std::fs::read(&path).unwrap();
        // The writer refuses a bad alignment, so the key is put in by hand.
        let GgufParts { before, after } = GgufParts::of(&plain);
        let raw = match &alignment {
            GgufValue::U32(v) => [&4u32.to_le_bytes()[..], &v.to_le_bytes()].concat(),
            GgufValue::U64(v) => [&10u32.to_le_bytes()[..], &v.to_le_bytes()].concat(),
            _ => [&8u32.to_le_bytes()[..], &string("x")].concat(),
        };
        let bytes = [before, string("general.alignment"), raw, after].concat();
        refused(&dir.put("m.gguf", bytes), &["general.alignment", "power of two"]);
    }
}

/// A GGUF file cut behind its counts, so that another key fits between.
struct GgufParts {
    before: Vec<u8>,
    after: Vec<u8>,
}

impl GgufParts {
    fn of(bytes: &[u8]) -> Self {
        let mut before = bytes[..24].to_vec();
        before[16] += 1;
        Self { before, after: bytes[24..].to_vec() }
    }
}

#[test]
fn every_type_of_value_is_read_back_as_it_was_written() {
    let dir = TestDir::new("values");
    let path = dir.path().join("m.gguf");
    gguf(&path, &all_pairs(), &gguf_tensors());
    for version in [2u32, 3] {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let model = open(&path).unwrap();
        let Metadata::Gguf(metadata) = &model.metadata else { panic!() };
        assert_eq!(metadata.version(), version);
        for (key, value) in all_pairs() {
            assert_eq!(metadata.get(&key), Some(&value), "{key}");
        }
        assert_eq!(metadata.iter().len(), all_pairs().len());
        assert_eq!(metadata.u64("a.i8"), None, "negative");
        assert_eq!(metadata.u64("a.u8"), Some(200));
        let error = metadata.require_u64("a.f32").unwrap_err();
        assert!(error.to_string().contains("float32"), "{error}");
        assert!(metadata.require_str("absent").unwrap_err().to_string().contains("missing"));
        for tensor in model.catalog.tensors() {
            assert_eq!(tensor.offset % 64, 0, "the file's own alignment");
        }
        for wanted in gguf_tensors() {
            let tensor = model.catalog.tensor(model.catalog.find(&wanted.name).unwrap());
            assert_eq!((&tensor.shape, tensor.dtype), (&wanted.shape, wanted.dtype));
        }
    }
}

/// Writes `tensors` as a split model, one shard for each slice.
fn split(dir: &TestDir, shards: &[&[overspill_formats::write::TensorSpec]], total: i32) {
    let count = shards.len();
    for (number, tensors) in shards.iter().enumerate() {
        let mut pairs = vec![
            pair("split.no", GgufValue::U16(number as u16)),
            pair("split.count", GgufValue::U16(count as u16)),
            pair("split.tensors.count", GgufValue::I32(total)),
        ];
        if number == 0 {
            pairs.push(pair("general.architecture", GgufValue::Str("llama".into())));
        }
        gguf(&dir.path().join(format!("m-{:05}-of-{count:05}.gguf", number + 1)), &pairs, tensors);
    }
}

#[test]
fn split_gguf_models_open_from_any_of_their_files() {
    let dir = TestDir::new("split");
    let all = gguf_tensors();
    let file = |number: u32| dir.path().join(format!("m-{number:05}-of-00003.gguf"));
    split(&dir, &[&[], &all[..2], &all[2..]], 5);
    for number in 1..=3 {
        let model = open(&file(number)).unwrap();
        assert_eq!(model.catalog.tensors().len(), 5);
        assert_eq!(model.catalog.files().len(), 3);
        let Metadata::Gguf(metadata) = &model.metadata else { panic!() };
        assert_eq!(metadata.str("general.architecture"), Some("llama"));
    }
    split(&dir, &[&[], &all[..2], &all[2..]], 6);
    refused(&file(1), &["split.tensors.count", "6 tensors", "have 5"]);
    split(&dir, &[&[], &all[..2], &all[1..]], 6);
    refused(&file(2), &["blk.0.attn_norm.weight", "twice"]);
    split(&dir, &[&[], &all[..2], &all[2..]], 5);
    std::fs::copy(file(2), file(3)).unwrap();
    refused(&file(1), &["m-00003-of-00003.gguf", "split.no"]);
    std::fs::remove_file(file(3)).unwrap();
    refused(&file(1), &["m-00003-of-00003.gguf", "file 3 of 3", "missing"]);
    std::fs::rename(file(1), dir.path().join("other.gguf")).unwrap();
    refused(&dir.path().join("other.gguf"), &["split.count", "3 files"]);
    std::fs::rename(dir.path().join("other.gguf"), dir.path().join("m-00001-of-00009.gguf")).unwrap();
    refused(&dir.path().join("m-00001-of-00009.gguf"), &["split.count", "says 9"]);
}

#[test]
fn every_hostile_fixture_is_refused_as_its_list_says() {
    let hostile = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hostile");
    let expected = std::fs::read(hostile.join("expected.json")).unwrap();
    let expected: std::collections::BTreeMap<String, Vec<String>> = serde_json::from_slice(&expected).unwrap();
    let there = std::fs::read_dir(&hostile).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut there: Vec<String> = there.filter(|name| name != "expected.json" && name != "README.md").collect();
    there.sort();
    assert_eq!(there, expected.keys().cloned().collect::<Vec<_>>(), "files and list differ");
    for (name, wanted) in expected {
        refused(&hostile.join(name), &wanted.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// Peak resident memory of this process so far.
fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// What a mutated file may do: open to a catalog inside the file, or fail with an error that names it.
fn opens_sanely_or_fails(path: &Path) {
    match open(path) {
        Ok(model) => {
            let lengths: Vec<u64> = model.catalog.files().map(|(_, bytes)| bytes).collect();
            for tensor in model.catalog.tensors() {
                assert!(tensor.offset + tensor.bytes <= lengths[tensor.file.index()]);
            }
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::BadFile, "{error}");
            assert!(!error.cause().is_empty() && error.to_string().len() < 2000, "{error}");
        }
    }
}

#[derive(Clone, Debug)]
enum Mutation {
    Byte(prop::sample::Index, u8),
    Word(prop::sample::Index, u64),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Swap(prop::sample::Index, prop::sample::Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(at, byte)| Mutation::Byte(at, byte)),
        3 => (index(), prop_oneof![any::<u64>(), (0u32..64).prop_map(|bit| 1 << bit)]).prop_map(|(at, word)| Mutation::Word(at, word)),
        1 => index().prop_map(Mutation::Cut),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        1 => (index(), index()).prop_map(|(a, b)| Mutation::Swap(a, b)),
    ]
}

/// Applies mutations to the first `header` bytes, where they matter.
fn mutate(bytes: &[u8], header: usize, mutations: &[Mutation]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for mutation in mutations {
        let len = header.min(bytes.len());
        if len == 0 {
            break;
        }
        match mutation {
            Mutation::Byte(at, byte) => bytes[at.index(len)] = *byte,
            Mutation::Word(at, word) => {
                let at = at.index(len);
                let end = (at + 8).min(bytes.len());
                bytes[at..end].copy_from_slice(&word.to_le_bytes()[..end - at]);
            }
            Mutation::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Mutation::Insert(at, more) => {
                let at = at.index(len);
                bytes.splice(at..at, more.iter().copied());
            }
            Mutation::Swap(a, b) => bytes.swap(a.index(len), b.index(len)),
        }
    }
    bytes
}

/// Opens `open_at` with `name` in its directory replaced by mutated versions of `valid`, and checks that memory stayed
/// flat. The first `header` bytes are where mutations matter.
fn fuzz(dir: &TestDir, name: &str, open_at: &Path, header: usize, cases: u32) {
    let valid = std::fs::read(dir.path().join(name)).unwrap();
    assert!(open(open_at).is_ok(), "the seed is valid");
    let before = peak_bytes();
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(mutations in prop::collection::vec(mutation(), 1..5))| {
        dir.put(name, mutate(&valid, header, &mutations));
        opens_sanely_or_fails(open_at);
    });
    if let (Some(before), Some(after)) = (before, peak_bytes()) {
        let grown = after.saturating_sub(before);
        assert!(grown < 128 << 20, "memory grew by {} MiB", grown >> 20);
    }
}

#[test]
fn mutated_gguf_files_open_or_fail() {
    let dir = TestDir::new("fuzz-gguf");
    let path = dir.path().join("m.gguf");
    gguf(&path, &all_pairs(), &gguf_tensors());
    let header = open(&path).unwrap().catalog.tensors()[0].offset as usize;
    fuzz(&dir, "m.gguf", &path, header, 1000);
}

#[test]
fn mutated_safetensors_files_open_or_fail() {
    let dir = model_dir("fuzz-st");
    let path = dir.path().join("model.safetensors");
    safetensors(&path, &hf_tensors());
    let header = open(&path).unwrap().catalog.tensors()[0].offset as usize;
    fuzz(&dir, "model.safetensors", dir.path(), header, 1000);
}

#[test]
fn mutated_indexes_and_configurations_open_or_fail() {
    let dir = model_dir("fuzz-index");
    safetensors(&dir.path().join("a.safetensors"), &hf_tensors());
    let names = hf_tensors().into_iter().map(|tensor| format!("{:?}:\"a.safetensors\"", tensor.name));
    let index = format!(r#"{{"weight_map":{{{}}}}}"#, names.collect::<Vec<_>>().join(","));
    let name = "model.safetensors.index.json";
    dir.put(name, &index);
    fuzz(&dir, name, dir.path(), index.len(), 600);
    dir.put(name, &index);
    let config = r#"{"model_type":"llama","hidden_size":64,"rope_scaling":{"factor":2.0},"tie_word_embeddings":true}"#;
    dir.put("config.json", config);
    fuzz(&dir, "config.json", dir.path(), config.len(), 400);
}
