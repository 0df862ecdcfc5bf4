//! Fixtures and their oracles, for all tests of the runtime.
#![allow(dead_code, reason = "each test uses some of it")]
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill::{Budget, Engine};
use overspill_infer::generate::{Runtime, RuntimeOptions};
use overspill_infer::kernels::Activations;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A file or directory of the fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// What an independent implementation answers.
pub struct Oracle {
    pub name: String,
    pub model: PathBuf,
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
    pub last_prompt_logits: Vec<f32>,
    pub all_prompt_logits: Option<Vec<Vec<f32>>>,
    pub final_step_logits: Option<Vec<f32>>,
    /// Whether weights are floats; 8-bit activations change nothing then.
    pub is_float: bool,
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn tokens(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

impl Oracle {
    fn read(name: &str, model: PathBuf, answers: &Path) -> Self {
        let value: Value = serde_json::from_str(&std::fs::read_to_string(answers).unwrap()).unwrap();
        let optional = |key: &str| value.get(key).filter(|v| v.is_array());
        Self {
            name: name.into(),
            model,
            prompt: tokens(&value["prompt"]),
            greedy: tokens(&value["greedy"]),
            last_prompt_logits: floats(&value["last_prompt_logits"]),
            all_prompt_logits: optional("all_prompt_logits")
                .map(|v| v.as_array().unwrap().iter().map(floats).collect()),
            final_step_logits: optional("final_step_logits").map(floats),
            is_float: !name.contains("-q"),
        }
    }

    /// Every oracle there is.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(fixture("oracles")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                let answers = path.join("oracle.json");
                if answers.exists() {
                    let mut oracle = Self::read(&name, path.clone(), &answers);
                    oracle.is_float = true;
                    all.push(oracle);
                }
            } else if let Some(stem) = name.strip_suffix(".gguf") {
                all.push(Self::read(stem, path.clone(), &path.with_file_name(format!("{stem}.oracle.json"))));
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        assert!(all.len() >= 15, "only {} oracles were found", all.len());
        all
    }

    pub fn named(name: &str) -> Self {
        Self::all().into_iter().find(|oracle| oracle.name == name).unwrap()
    }
}

/// An engine on a model, with room for all of it.
pub fn engine(model: &Path) -> Engine {
    Engine::builder().ram(Budget::Bytes(256 << 20)).open(model).unwrap()
}

/// A runtime with room for all of a model.
pub fn runtime(model: &Path, activations: Activations, threads: usize, chunk: usize) -> Runtime {
    let options = RuntimeOptions { activations, threads, chunk, ..RuntimeOptions::default() };
    Runtime::open(engine(model), options).unwrap()
}

/// The largest difference, as a part of the largest expected magnitude.
pub fn difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let difference = got.iter().zip(expected).fold(0.0f32, |m, (a, b)| {
        // A NaN is an infinite difference.
        if a.is_finite() { m.max((a - b).abs()) } else { f32::INFINITY }
    });
    difference / largest
}

/// All bits, so that equality means equality.
pub fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}
