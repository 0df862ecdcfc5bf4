//! Damaged and malicious tokenizers: one clear error or a working tokenizer, never a panic.
#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared by several test programs")]
mod tokenizer_support;

use overspill::formats::{GgufArray, GgufStrings, GgufValue, Metadata, open};
use overspill_infer::tokenizer::{Tokenizer, TokenizerError, TokenizerErrorKind};
use proptest::prelude::*;
use serde_json::{Value, json as make_json};
use std::path::{Path, PathBuf};
use tokenizer_support::{Gguf, TempFile, fixtures};

fn load_json(path: &Path, settings: Option<Value>) -> Result<Option<Tokenizer>, TokenizerError> {
    Tokenizer::from_metadata(&Metadata::HuggingFace {
        config: make_json!({}),
        generation: None,
        tokenizer_json: Some(path.to_owned()),
        tokenizer_config: settings,
    })
}

fn tiny() -> PathBuf {
    fixtures("tiny-stories/tokenizer.json")
}

/// The description of the trained models' tokenizer, changed.
fn changed(change: impl FnOnce(&mut Value)) -> TempFile {
    let mut value: Value = serde_json::from_slice(&std::fs::read(tiny()).unwrap()).unwrap();
    change(&mut value);
    TempFile::new("json", value.to_string().as_bytes())
}

fn strings(all: &[&str]) -> GgufValue {
    GgufValue::Array(GgufArray::Str(all.iter().collect::<GgufStrings>()))
}

/// The error must have this kind and name this in its text.
fn assert_refused(result: Result<Option<Tokenizer>, TokenizerError>, kind: TokenizerErrorKind, names: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    for name in names {
        assert!(error.to_string().contains(name), "'{name}' is not in: {error}");
    }
    assert!(!error.cure().is_empty() && error.path().is_some());
}

/// Using it does no harm, whatever it is.
fn exercise(tokenizer: &Tokenizer) {
    for text in ["", "Once upon <s> a\r\n time 123 🙂 \0 é</s>", "   "] {
        if let Ok(ids) = tokenizer.encode(text, true) {
            let mut stream = tokenizer.stream();
            let streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
            drop(streamed + &stream.finish());
            drop(tokenizer.decode(&ids));
        }
    }
    drop(tokenizer.decode(&[0, 1, 2, 700, 1023, 1024, u32::MAX]));
}

#[test]
fn files_that_are_no_tokenizer_json_are_refused() {
    use TokenizerErrorKind::{BadFile, Io};
    let missing = fixtures("tiny-stories/no-such-tokenizer.json");
    assert_refused(load_json(&missing, None), Io, &["no-such-tokenizer.json", "check"]);
    assert_refused(load_json(&fixtures("tiny-stories"), None), BadFile, &["tiny-stories", "directory"]);
    for (content, name) in [
        ("", "EOF"),
        ("{", "EOF"),
        ("[]", "invalid"),
        ("null", "invalid"),
        ("{\"version\": \"1.0\"}", "Model missing"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "expected value"),
    ] {
        let file = TempFile::new("json", content.as_bytes());
        assert_refused(load_json(&file.0, None), BadFile, &["overspill-tokenizer-", name]);
    }
    let deep = TempFile::new("json", "[".repeat(1 << 20).as_bytes());
    assert_refused(load_json(&deep.0, None), BadFile, &["recursion"]);
    let not_utf8 = TempFile::new("json", b"{\"version\": \"\xFF\"}");
    assert_refused(load_json(&not_utf8.0, None), BadFile, &["overspill-tokenizer-"]);
}

#[test]
fn merges_of_unknown_tokens_are_refused_by_the_library_and_harmless_in_gguf() {
    let file = changed(|value| value["model"]["merges"] = make_json!([["nope", "neither"]]));
    assert_refused(load_json(&file.0, None), TokenizerErrorKind::BadFile, &["nope"]);
    // As llama.cpp, which keeps merges as texts.
    let gguf =
        Gguf::of("byte-level.gguf").with("merges", strings(&["h e", "he l", "nope neither", "", " ", "x", "a "]));
    let tokenizer = gguf.tokenizer().unwrap().unwrap();
    exercise(&tokenizer);
    assert_eq!(tokenizer.decode(&tokenizer.encode("hello hello", false).unwrap()), "hello hello");
}

#[test]
fn a_vocabulary_with_gaps_costs_nothing() {
    let file = changed(|value| value["model"]["vocab"]["zebra"] = make_json!(u32::MAX));
    let tokenizer = load_json(&file.0, None).unwrap().unwrap();
    assert_eq!(tokenizer.vocab_size(), 1 << 32);
    assert_eq!(tokenizer.decode(&[u32::MAX, 5000]), "zebra");
    exercise(&tokenizer);
    let too_large = changed(|value| value["model"]["vocab"]["zebra"] = make_json!(1u64 << 32));
    assert_refused(load_json(&too_large.0, None), TokenizerErrorKind::BadFile, &["overspill-tokenizer-"]);
}

#[test]
fn a_prefix_that_merges_lack_is_refused() {
    let file = changed(|value| value["model"]["continuing_subword_prefix"] = make_json!("\u{1F642}"));
    assert_refused(load_json(&file.0, None), TokenizerErrorKind::BadFile, &["model.merges", "lacks"]);
}

#[test]
fn encoding_is_never_random() {
    let file = changed(|value| value["model"]["dropout"] = make_json!(0.9));
    let (random, plain) = (load_json(&file.0, None).unwrap().unwrap(), load_json(&tiny(), None).unwrap().unwrap());
    let text = "Once upon a time, Mia lived near a village.";
    assert_eq!(random.encode(text, true).unwrap(), plain.encode(text, true).unwrap());
}

#[test]
fn settings_that_name_no_token_are_refused() {
    let settings = make_json!({"add_bos_token": true, "bos_token": "<nope>"});
    assert_refused(
        load_json(&tiny(), Some(settings)),
        TokenizerErrorKind::BadFile,
        &["tokenizer_config.json", "add_bos_token"],
    );
    let nonsense =
        make_json!({"add_bos_token": "yes", "bos_token": 7, "tokenizer_class": [], "eos_token": {"content": 1}});
    exercise(&load_json(&tiny(), Some(nonsense)).unwrap().unwrap());
    exercise(&load_json(&tiny(), Some(make_json!([1]))).unwrap().unwrap());
}

#[test]
fn gguf_keys_that_make_no_sense_are_named() {
    use TokenizerErrorKind::{BadFile, Unsupported};
    let bpe = || Gguf::of("byte-level.gguf");
    let spm = || Gguf::of("spm.gguf");
    let text = |text: &str| GgufValue::Str(text.into());
    for (gguf, kind, names) in [
        (bpe().with("model", text("bert")), Unsupported, &["tokenizer.ggml.model", "bert"][..]),
        (bpe().with("model", GgufValue::U32(1)), BadFile, &["tokenizer.ggml.model", "uint32"]),
        (
            bpe().with("pre", text("from-the-future\u{1b}[31m")),
            Unsupported,
            &["tokenizer.ggml.pre", "from-the-future\\u{1b}"],
        ),
        (bpe().without("merges"), BadFile, &["tokenizer.ggml.merges", "missing"]),
        (bpe().with("merges", GgufValue::U32(1)), BadFile, &["tokenizer.ggml.merges", "uint32"]),
        (bpe().without("tokens"), BadFile, &["tokenizer.ggml.tokens", "missing"]),
        (bpe().with("tokens", strings(&[])), BadFile, &["tokenizer.ggml.tokens", "0 tokens"]),
        (bpe().with("tokens", GgufValue::Array(GgufArray::F32(vec![1.0]))), BadFile, &["tokenizer.ggml.tokens"]),
        (
            bpe().with("token_type", GgufValue::Array(GgufArray::I32(vec![1; 5]))),
            BadFile,
            &["token_type", "5 elements"],
        ),
        (bpe().with("token_type", text("normal")), BadFile, &["token_type", "string"]),
        (bpe().with("bos_token_id", GgufValue::U32(1 << 20)), BadFile, &["bos_token_id", "1048576"]),
        (bpe().with("eos_token_id", text("</s>")), BadFile, &["eos_token_id", "string"]),
        (bpe().with("add_bos_token", GgufValue::U32(1)), BadFile, &["add_bos_token", "uint32"]),
        (bpe().without("bos_token_id").with("add_bos_token", GgufValue::Bool(true)), BadFile, &["add_bos_token"]),
        (spm().with("scores", GgufValue::Array(GgufArray::F32(vec![0.0; 7]))), BadFile, &["scores", "7 elements"]),
        (spm().with("scores", GgufValue::Array(GgufArray::F32(vec![f32::NAN; 2000]))), BadFile, &["scores", "token 0"]),
        (spm().with("scores", GgufValue::Bool(true)), BadFile, &["scores", "bool"]),
        (spm().with("add_space_prefix", text("no")), BadFile, &["add_space_prefix", "string"]),
    ] {
        assert_refused(gguf.tokenizer(), kind, names);
    }
}

#[test]
fn odd_but_usable_gguf_vocabularies_work() {
    let bpe = || Gguf::of("byte-level.gguf");
    let spm = || Gguf::of("spm.gguf");
    // −1 means "none", in either type.
    for none in [GgufValue::U32(u32::MAX), GgufValue::I32(-1)] {
        let tokenizer = bpe().with("bos_token_id", none).tokenizer().unwrap().unwrap();
        assert_eq!(tokenizer.bos(), None);
    }
    for gguf in [
        bpe().without("token_type"),
        bpe().without("pre"),
        bpe().with("merges", strings(&[])),
        bpe()
            .with("tokens", strings(&["a", "a", "", "b"]))
            .without("bos_token_id")
            .without("eos_token_id")
            .without("unknown_token_id"),
        spm().without("scores").without("token_type"),
        spm().with("scores", GgufValue::Array(GgufArray::I32(vec![i32::MIN; 2000]))),
        spm().with("scores", GgufValue::Array(GgufArray::F32(vec![f32::INFINITY; 2000]))),
        spm().with("tokens", strings(&["<unk>", "<s>", "</s>", "▁"])),
        spm()
            .with("tokens", strings(&["only"]))
            .without("bos_token_id")
            .without("eos_token_id")
            .without("unknown_token_id"),
    ] {
        exercise(&gguf.tokenizer().unwrap().unwrap());
    }
}

#[test]
fn long_texts_take_no_quadratic_time() {
    let long =
        ["a".repeat(200_000), " ".repeat(200_000), "🙂".repeat(50_000), "<s>".repeat(50_000), "ab 12 ".repeat(30_000)];
    for file in ["tokenizers/byte-level.gguf", "tokenizers/spm.gguf", "tiny-stories"] {
        let tokenizer = Tokenizer::from_metadata(&open(&fixtures(file)).unwrap().metadata).unwrap().unwrap();
        for text in &long {
            let start = std::time::Instant::now();
            let ids = tokenizer.encode(text, true).unwrap();
            if !text.starts_with('<') {
                assert_eq!(tokenizer.decode(&ids), *text);
            }
            // Quadratic would be minutes.
            assert!(start.elapsed().as_secs() < 20, "{file}: {:?}…", &text[..4]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_json_never_panics(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), truncate in any::<bool>()) {
        let mut bytes = std::fs::read(fixtures("tokenizers/llama/tokenizer.json")).unwrap();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        let file = TempFile::new("json", &bytes);
        if let Ok(Some(tokenizer)) = load_json(&file.0, None) {
            exercise(&tokenizer);
        }
    }

    #[test]
    fn mutated_values_never_panic(at in any::<prop::sample::Index>(), with in 0usize..8) {
        let mut value: Value = serde_json::from_slice(&std::fs::read(fixtures("tokenizers/llama/tokenizer.json")).unwrap()).unwrap();
        let paths = leaves(&value);
        let replacement = [
            Value::Null, make_json!(-1), make_json!(1e300), make_json!(""), make_json!("\u{0}🙂"), make_json!([]), make_json!({}), make_json!(u32::MAX),
        ][with].clone();
        *value.pointer_mut(&paths[at.index(paths.len())]).unwrap() = replacement;
        let file = TempFile::new("json", value.to_string().as_bytes());
        if let Ok(Some(tokenizer)) = load_json(&file.0, None) {
            exercise(&tokenizer);
        }
    }

    #[test]
    fn mutated_gguf_never_panics(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12), which in 0usize..2) {
        let mut bytes = std::fs::read(fixtures(["tokenizers/byte-level.gguf", "tokenizers/spm.gguf"][which])).unwrap();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let file = TempFile::new("gguf", &bytes);
        if let Ok(files) = open(&file.0)
            && let Ok(Some(tokenizer)) = Tokenizer::from_metadata(&files.metadata)
        {
            exercise(&tokenizer);
        }
    }
}

/// Pointers to everything in a description, but to only some of the vocabulary.
fn leaves(value: &Value) -> Vec<String> {
    fn walk(value: &Value, path: &str, out: &mut Vec<String>) {
        out.push(path.to_owned());
        match value {
            Value::Object(map) => map.iter().take(12).for_each(|(key, value)| {
                walk(value, &format!("{path}/{}", key.replace('~', "~0").replace('/', "~1")), out);
            }),
            Value::Array(all) => {
                all.iter().take(8).enumerate().for_each(|(index, value)| walk(value, &format!("{path}/{index}"), out))
            }
            _ => {}
        }
    }
    let mut out = Vec::new();
    walk(value, "", &mut out);
    out
}
