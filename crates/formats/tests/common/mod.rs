//! What several test files need: a directory that goes away, and small valid models.
#![allow(clippy::unwrap_used, dead_code, reason = "tests; not every file uses everything")]

use overspill_core::DType;
use overspill_formats::write::{TensorFile, TensorSpec};
use overspill_formats::{GgufArray, GgufStrings, GgufValue};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory of its own, removed at the end.
pub struct TestDir(PathBuf);

impl TestDir {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("overspill-{name}-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn spec(name: &str, dtype: DType, shape: &[u64]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype, shape: shape.into() }
}

/// Writes all tensors, full of `byte`.
pub fn fill(mut file: TensorFile, tensors: &[TensorSpec], byte: u8) {
    for tensor in tensors {
        file.write(&vec![byte; tensor.bytes().unwrap() as usize]).unwrap();
    }
    file.finish().unwrap();
}

pub fn safetensors(path: &Path, tensors: &[TensorSpec]) {
    fill(TensorFile::create_safetensors(path, tensors).unwrap(), tensors, 7);
}

pub fn gguf(path: &Path, pairs: &[(String, GgufValue)], tensors: &[TensorSpec]) {
    fill(TensorFile::create_gguf(path, pairs, tensors).unwrap(), tensors, 7);
}

pub fn pair(key: &str, value: GgufValue) -> (String, GgufValue) {
    (key.to_owned(), value)
}

/// Every type of value.
pub fn all_pairs() -> Vec<(String, GgufValue)> {
    let strings: GgufStrings = ["<s>", "", "a\u{2581}b"].into_iter().collect();
    vec![
        pair("general.architecture", GgufValue::Str("llama".into())),
        pair("general.alignment", GgufValue::U32(64)),
        pair("a.u8", GgufValue::U8(200)),
        pair("a.i8", GgufValue::I8(-3)),
        pair("a.u16", GgufValue::U16(65_000)),
        pair("a.i16", GgufValue::I16(-300)),
        pair("a.i32", GgufValue::I32(-70_000)),
        pair("a.u64", GgufValue::U64(1 << 40)),
        pair("a.i64", GgufValue::I64(-(1 << 40))),
        pair("a.f32", GgufValue::F32(1.5)),
        pair("a.f64", GgufValue::F64(-2.5)),
        pair("a.bool", GgufValue::Bool(true)),
        pair("b.u8", GgufValue::Array(GgufArray::U8(vec![1, 2, 3]))),
        pair("b.i8", GgufValue::Array(GgufArray::I8(vec![-1]))),
        pair("b.u16", GgufValue::Array(GgufArray::U16(vec![1, 2]))),
        pair("b.i16", GgufValue::Array(GgufArray::I16(vec![-1, 2]))),
        pair("b.u32", GgufValue::Array(GgufArray::U32(vec![1, 2]))),
        pair("b.i32", GgufValue::Array(GgufArray::I32(vec![1, -2]))),
        pair("b.u64", GgufValue::Array(GgufArray::U64(vec![1, 1 << 50]))),
        pair("b.i64", GgufValue::Array(GgufArray::I64(vec![1, -2]))),
        pair("b.f32", GgufValue::Array(GgufArray::F32(vec![0.5, -2.0]))),
        pair("b.f64", GgufValue::Array(GgufArray::F64(vec![0.5]))),
        pair("b.bool", GgufValue::Array(GgufArray::Bool(vec![true, false]))),
        pair("b.str", GgufValue::Array(GgufArray::Str(strings))),
        pair("b.empty", GgufValue::Array(GgufArray::I32(vec![]))),
    ]
}

/// Tensors of every role.
pub fn gguf_tensors() -> Vec<TensorSpec> {
    vec![
        spec("token_embd.weight", DType::Q8_0, &[40, 64]),
        spec("blk.0.attn_norm.weight", DType::F32, &[64]),
        spec("blk.0.attn_q.weight", DType::Q4_0, &[64, 64]),
        spec("blk.0.ffn_gate_exps.weight", DType::Q5_1, &[4, 16, 64]),
        spec("output.weight", DType::F16, &[40, 64]),
    ]
}

pub fn hf_tensors() -> Vec<TensorSpec> {
    vec![
        spec("model.embed_tokens.weight", DType::BF16, &[40, 16]),
        spec("model.layers.0.input_layernorm.weight", DType::F32, &[16]),
        spec("model.layers.0.self_attn.q_proj.weight", DType::F16, &[16, 16]),
        spec("lm_head.weight", DType::BF16, &[40, 16]),
    ]
}
