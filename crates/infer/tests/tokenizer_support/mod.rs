//! What the tokenizer tests share: the fixtures, and GGUF files made from them with some keys changed.

use overspill::formats::{GgufArray, GgufValue, Metadata, open};
use overspill_infer::tokenizer::{Tokenizer, TokenizerError};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory of fixtures.
pub fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A JSON file beside the tokenizer fixtures.
pub fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures("tokenizers").join(name)).unwrap()).unwrap()
}

/// The texts that all oracles are of.
pub fn strings() -> Vec<String> {
    serde_json::from_value(json("strings.json")).unwrap()
}

/// A list of lists of ids.
pub fn id_lists(value: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A file in the system's temporary directory, removed when dropped.
pub struct TempFile(pub PathBuf);

impl TempFile {
    pub fn new(extension: &str, bytes: &[u8]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("overspill-tokenizer-{}-{count}.{extension}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The keys of a GGUF file, to be changed and written.
pub struct Gguf(pub BTreeMap<String, GgufValue>);

impl Gguf {
    pub fn of(name: &str) -> Self {
        let Metadata::Gguf(gguf) = open(&fixtures("tokenizers").join(name)).unwrap().metadata else {
            panic!("not GGUF")
        };
        Self(gguf.iter().map(|(key, value)| (key.to_owned(), value.clone())).collect())
    }

    /// Sets a key of the tokenizer's.
    pub fn with(mut self, key: &str, value: GgufValue) -> Self {
        self.0.insert(format!("tokenizer.ggml.{key}"), value);
        self
    }

    /// Removes a key of the tokenizer's.
    pub fn without(mut self, key: &str) -> Self {
        self.0.remove(&format!("tokenizer.ggml.{key}")).unwrap();
        self
    }

    /// The file: these keys and one small tensor.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(1u64.to_le_bytes());
        out.extend((self.0.len() as u64).to_le_bytes());
        for (key, value) in &self.0 {
            string(&mut out, key.as_bytes());
            write_value(&mut out, value);
        }
        string(&mut out, b"output_norm.weight");
        out.extend(1u32.to_le_bytes());
        out.extend(8u64.to_le_bytes());
        out.extend(0u32.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        out.resize(out.len().next_multiple_of(32) + 32, 0);
        out
    }

    /// The tokenizer that the file describes.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, TokenizerError> {
        let file = TempFile::new("gguf", &self.bytes());
        Tokenizer::from_metadata(&open(&file.0).unwrap().metadata)
    }
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

fn write_value(out: &mut Vec<u8>, value: &GgufValue) {
    let mut scalar = |kind: u32, bytes: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        GgufValue::U32(v) => scalar(4, &v.to_le_bytes()),
        GgufValue::I32(v) => scalar(5, &v.to_le_bytes()),
        GgufValue::F32(v) => scalar(6, &v.to_le_bytes()),
        GgufValue::Bool(v) => scalar(7, &[u8::from(*v)]),
        GgufValue::Str(v) => {
            scalar(8, &[]);
            string(out, v.as_bytes());
        }
        GgufValue::Array(array) => {
            out.extend(9u32.to_le_bytes());
            write_array(out, array);
        }
        other => panic!("no fixture has a {}", other.type_name()),
    }
}

fn write_array(out: &mut Vec<u8>, array: &GgufArray) {
    let mut head = |kind: u32| {
        out.extend(kind.to_le_bytes());
        out.extend((array.len() as u64).to_le_bytes());
    };
    match array {
        GgufArray::Str(all) => {
            head(8);
            (0..all.len()).for_each(|index| string(out, all.bytes(index).unwrap()));
        }
        GgufArray::F32(all) => {
            head(6);
            all.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        GgufArray::I32(all) => {
            head(5);
            all.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        GgufArray::U32(all) => {
            head(4);
            all.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        _ => panic!("no fixture has such an array"),
    }
}
