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

/// A directory of its own, removed in the end.
pub struct TempDir(pub PathBuf);

impl TempDir {
    pub fn new(label: &str) -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("overspill-infer-{label}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // What is left over is in the system's directory for such files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A tensor in f32.
#[derive(Clone, Debug)]
pub struct Plain {
    pub shape: Vec<u64>,
    pub values: Vec<f32>,
}

/// A Hugging Face model of f32, whole in memory.
#[derive(Clone, Debug)]
pub struct PlainModel {
    pub config: Value,
    pub tensors: std::collections::BTreeMap<String, Plain>,
}

impl PlainModel {
    pub fn read(name: &str) -> Self {
        let directory = fixture("oracles").join(name);
        let files = overspill::formats::open(&directory).unwrap();
        let overspill::formats::Metadata::HuggingFace { config, .. } = &files.metadata else { panic!("{name}") };
        let mut tensors = std::collections::BTreeMap::new();
        for tensor in files.catalog.tensors() {
            assert_eq!(tensor.dtype, overspill::DType::F32);
            let file = std::fs::read(files.catalog.path(tensor.file)).unwrap();
            let bytes = &file[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
            let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            tensors.insert(tensor.name.clone(), Plain { shape: tensor.shape.clone(), values });
        }
        Self { config: config.clone(), tensors }
    }

    fn specs(&self) -> Vec<overspill::formats::write::TensorSpec> {
        let spec = |(name, t): (&String, &Plain)| overspill::formats::write::TensorSpec {
            name: name.clone(),
            dtype: overspill::DType::F32,
            shape: t.shape.clone(),
        };
        self.tensors.iter().map(spec).collect()
    }

    fn fill(&self, mut file: overspill::formats::write::TensorFile) {
        for tensor in self.tensors.values() {
            let bytes: Vec<u8> = tensor.values.iter().flat_map(|x| x.to_le_bytes()).collect();
            file.write(&bytes).unwrap();
        }
        file.finish().unwrap();
    }

    /// Writes it as a directory.
    pub fn write(&self, directory: &Path) {
        std::fs::write(directory.join("config.json"), self.config.to_string()).unwrap();
        let path = directory.join("model.safetensors");
        self.fill(overspill::formats::write::TensorFile::create_safetensors(&path, &self.specs()).unwrap());
    }

    /// Writes its tensors as a GGUF file.
    pub fn write_gguf(&self, path: &Path, pairs: &[(String, overspill::formats::GgufValue)]) {
        self.fill(overspill::formats::write::TensorFile::create_gguf(path, pairs, &self.specs()).unwrap());
    }
}
