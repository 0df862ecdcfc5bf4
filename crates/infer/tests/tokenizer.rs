//! Tokens and texts equal those of the `tokenizers` library and of llama.cpp (fixtures/tokenizers), exactly.
#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "shared by several test programs")]
mod tokenizer_support;

use overspill::formats::{GgufValue, Metadata, open};
use overspill_infer::tokenizer::{SpecialIds, Tokenizer};
use serde_json::{Value, json as make_json};
use std::path::PathBuf;
use tokenizer_support::{Gguf, TempFile, fixtures, id_lists, json, strings};

fn tokenizer_of(path: PathBuf) -> Tokenizer {
    Tokenizer::from_metadata(&open(&path).unwrap().metadata).unwrap().unwrap()
}

fn hugging_face(tokenizer_json: PathBuf, settings: Option<Value>, config: Value) -> Metadata {
    Metadata::HuggingFace { config, generation: None, tokenizer_json: Some(tokenizer_json), tokenizer_config: settings }
}

/// Tokens one by one give what they give at once, and no character is cut.
fn assert_streams(tokenizer: &Tokenizer, ids: &[u32]) {
    let whole = tokenizer.decode(ids);
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(pieces.concat() + &stream.finish(), whole, "{ids:?}");
    for at in 0..=ids.len() {
        let (prompt, rest) = ids.split_at(at);
        let prompt_text: String = {
            let mut stream = tokenizer.stream();
            prompt.iter().map(|&id| stream.push(id)).collect()
        };
        assert_eq!(prompt_text + &tokenizer.decode_after(prompt, rest), whole, "{ids:?} after {at}");
    }
}

#[test]
fn trained_models_tokenise_as_the_library_does() {
    let oracle = json("tiny-stories.json");
    let (ids, noise) = (id_lists(&oracle["ids"]), id_lists(&oracle["noise"]));
    for model in ["tiny-stories", "tiny-moe"] {
        let tokenizer = tokenizer_of(fixtures(model));
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.stop_ids()), (Some(0), Some(1), &[1][..]));
        assert_eq!(tokenizer.vocab_size(), 1024);
        for (index, (text, ids)) in strings().iter().zip(&ids).enumerate() {
            assert_eq!(tokenizer.encode(text, false).unwrap(), *ids, "{text:?}");
            // tokenizer.json has no post-processor; tokenizer_config.json asks for BOS.
            assert_eq!(tokenizer.encode(text, true).unwrap(), [&[0], &ids[..]].concat(), "{text:?}");
            assert_eq!(tokenizer.decode(ids), oracle["text"][index], "{text:?}");
            if !ids.iter().any(|&id| id < 2) {
                assert_eq!(tokenizer.decode(ids), *text);
            }
            assert_streams(&tokenizer, ids);
        }
        for (index, ids) in noise.iter().enumerate() {
            assert_eq!(tokenizer.decode(ids), oracle["noise_text"][index], "{ids:?}");
            assert_streams(&tokenizer, ids);
        }
    }
}

#[test]
fn a_llama_tokenizer_json_tokenises_as_the_library_does() {
    let oracle = json("llama.json");
    let path = fixtures("tokenizers/llama/tokenizer.json");
    let tokenizer = Tokenizer::from_metadata(&hugging_face(path, None, make_json!({}))).unwrap().unwrap();
    for (index, (text, ids)) in strings().iter().zip(id_lists(&oracle["ids"])).enumerate() {
        // Neither cut nor padded, though the file asks for both.
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids[1..], "{text:?}");
        assert_eq!(tokenizer.decode(&ids), oracle["text"][index], "{text:?}");
        assert_streams(&tokenizer, &ids);
    }
    for (index, ids) in id_lists(&oracle["noise"]).iter().enumerate() {
        assert_eq!(tokenizer.decode(ids), oracle["noise_text"][index], "{ids:?}");
        assert_streams(&tokenizer, ids);
    }
}

#[test]
fn settings_decide_on_bos_and_eos() {
    let path = || fixtures("tokenizers/llama/tokenizer.json");
    let encode = |settings: Value| {
        let metadata = hugging_face(path(), Some(settings), make_json!({"bos_token_id": 1, "eos_token_id": [2, 5]}));
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap().unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.stop_ids()), (Some(1), Some(2), &[2, 5][..]));
        tokenizer.encode("</s>", true).unwrap()
    };
    assert_eq!(encode(make_json!({})), [1, 2]);
    // The template has BOS already.
    assert_eq!(encode(make_json!({"add_bos_token": true, "bos_token": {"content": "<s>"}})), [1, 2]);
    assert_eq!(encode(make_json!({"add_eos_token": true, "eos_token": "</s>"})), [1, 2, 2]);
    // Only some classes take the template away.
    assert_eq!(encode(make_json!({"add_bos_token": false})), [1, 2]);
    assert_eq!(encode(make_json!({"add_bos_token": false, "tokenizer_class": "LlamaTokenizerFast"})), [2]);
}

#[test]
fn byte_level_vocabularies_tokenise_as_llama_cpp_does() {
    let oracle = json("byte-level.json");
    let texts = strings();
    let base = id_lists(&oracle["pre"]["gpt-2"]);
    let tokenizer = tokenizer_of(fixtures("tokenizers/byte-level.gguf"));
    assert_eq!(make_json!(tokenizer.stop_ids()), oracle["stops"]);
    for (index, (text, ids)) in texts.iter().zip(&base).enumerate() {
        assert_eq!(tokenizer.encode(text, true).unwrap(), *ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids), oracle["text"][index], "{text:?}");
        assert_streams(&tokenizer, ids);
    }
    let others = [&oracle["pre"], &oracle["original"]].into_iter().flat_map(|group| group.as_object().unwrap());
    let mut checked = 0;
    for (pre, expected) in others.filter(|(pre, _)| *pre != "gpt-2") {
        let tokenizer =
            Gguf::of("byte-level.gguf").with("pre", GgufValue::Str(pre.clone())).tokenizer().unwrap().unwrap();
        let bos = if expected["bos"] == true { vec![1] } else { vec![] };
        for (index, text) in texts.iter().enumerate() {
            let differs = expected["differs"].get(index.to_string());
            let ids: Vec<u32> =
                differs.map_or_else(|| base[index].clone(), |ids| serde_json::from_value(ids.clone()).unwrap());
            let found = tokenizer.encode(text, true).unwrap();
            assert_eq!(found, [&bos[..], &ids].concat(), "{pre}: {text:?}");
            assert_streams(&tokenizer, &found);
        }
        checked += 1;
    }
    assert_eq!(checked, 24);
}

#[test]
fn sentencepiece_vocabularies_tokenise_as_llama_cpp_does() {
    let oracle = json("spm.json");
    let texts = strings();
    let plain = id_lists(&oracle["plain"]);
    let tokenizer = tokenizer_of(fixtures("tokenizers/spm.gguf"));
    assert_eq!(make_json!(tokenizer.stop_ids()), oracle["stops"]);
    for (index, (text, ids)) in texts.iter().zip(&plain).enumerate() {
        assert_eq!(tokenizer.encode(text, true).unwrap(), *ids, "{text:?}");
        let whole = oracle["text"][index].as_str().unwrap();
        assert_eq!(tokenizer.decode(ids), whole.strip_prefix(' ').unwrap_or(whole), "{text:?}");
        assert_streams(&tokenizer, ids);
        if !text.contains(['<', '▁']) {
            assert_eq!(tokenizer.decode(ids), *text);
        }
    }
    let no_prefix = Gguf::of("spm.gguf").with("add_space_prefix", GgufValue::Bool(false)).tokenizer().unwrap().unwrap();
    let eos =
        Gguf::of("spm.gguf").with("add_bos_token", GgufValue::Bool(false)).with("add_eos_token", GgufValue::Bool(true));
    let eos = eos.tokenizer().unwrap().unwrap();
    let eos_ids = id_lists(&oracle["eos"]);
    for (index, text) in texts.iter().enumerate() {
        let ids = oracle["no_prefix"].get(index.to_string());
        let ids: Vec<u32> =
            ids.map_or_else(|| plain[index].clone(), |ids| serde_json::from_value(ids.clone()).unwrap());
        assert_eq!(no_prefix.encode(text, true).unwrap(), ids, "{text:?}");
        assert_streams(&no_prefix, &ids);
        if let Some(ids) = eos_ids.get(index) {
            assert_eq!(eos.encode(text, true).unwrap(), *ids, "{text:?}");
        }
    }
}

#[test]
fn what_follows_a_prompt_keeps_its_space() {
    let tokenizer = tokenizer_of(fixtures("tokenizers/spm.gguf"));
    let ids = tokenizer.encode("Once upon a time", true).unwrap();
    let prompt = tokenizer.encode("Once upon", true).unwrap();
    assert_eq!(ids[..prompt.len()], prompt);
    assert_eq!(tokenizer.decode_after(&prompt, &ids[prompt.len()..]), " a time");
    assert_eq!(tokenizer.decode(&ids[prompt.len()..]), "a time");
    // Special tokens and ids beyond the vocabulary add nothing.
    assert_eq!(tokenizer.decode(&[1, u32::MAX, 2]), "");
}

#[test]
fn a_decoder_that_only_the_library_knows_streams_too() {
    let wordpiece = make_json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                  "vocab": {"[UNK]": 0, "play": 1, "##ing": 2, "now": 3, "é": 4}}
    });
    let file = TempFile::new("json", wordpiece.to_string().as_bytes());
    let tokenizer = Tokenizer::from_metadata(&hugging_face(file.0.clone(), None, make_json!({}))).unwrap().unwrap();
    let ids = tokenizer.encode("playing now é playing", true).unwrap();
    assert_eq!(ids, [1, 2, 3, 4, 1, 2]);
    assert_eq!(tokenizer.decode(&ids), "playing now é playing");
    assert_streams(&tokenizer, &ids);
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(pieces, ["play", "ing", " now", " é", " play", "ing"]);
}

#[test]
fn special_ids_are_known_without_a_tokenizer() {
    let metadata = Metadata::HuggingFace {
        config: make_json!({"bos_token_id": 9, "eos_token_id": 5, "text_config": {"eos_token_id": 8}}),
        generation: Some(make_json!({"eos_token_id": [7, 5]})),
        tokenizer_json: None,
        tokenizer_config: None,
    };
    assert!(Tokenizer::from_metadata(&metadata).unwrap().is_none());
    let ids = SpecialIds::from_metadata(&metadata);
    assert_eq!((ids.bos, ids.eos, &ids.stop[..]), (Some(9), Some(7), &[5, 7, 8][..]));
    let Metadata::Gguf(gguf) = open(&fixtures("tokenizers/spm.gguf")).unwrap().metadata else { panic!("not GGUF") };
    let ids = SpecialIds::from_metadata(&Metadata::Gguf(gguf));
    assert_eq!((ids.bos, ids.eos, &ids.stop[..]), (Some(1), Some(2), &[2][..]));
    let none = Gguf::of("spm.gguf").with("model", GgufValue::Str("none".into()));
    assert!(none.tokenizer().unwrap().is_none());
    assert!(Gguf::of("spm.gguf").without("model").tokenizer().unwrap().is_none());
}
