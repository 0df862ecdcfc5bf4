//! Synthetic models: the files of any model's shape, full of random weights of sensible scale.
//!
//! For measuring and testing with models that one cannot or need not download. The weights are made piece by piece
//! from a seed, so memory is constant and the same request gives the same bytes. What is written opens with
//! [`crate::open`] and runs; it says nothing of value.
//!
//! ```no_run
//! use overspill_formats::{Format, synth::{SynthSpec, preset, write}};
//! use std::ops::ControlFlow;
//!
//! let config = preset("tinyllama-1.1b").ok_or("unknown preset")?;
//! let spec = SynthSpec::new(config, overspill_core::DType::Q4_K, Format::Gguf);
//! write(&spec, "tinyllama-q4_k.gguf".as_ref(), &mut |_done, _total| ControlFlow::Continue(()))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod fill;
mod keys;
mod presets;
mod random;
mod shape;
mod tensors;

#[cfg(test)]
mod tests;

pub use presets::{PRESETS, preset};

use crate::error::{ErrorKind, FormatError};
use crate::gguf_value::GgufMetadata;
use crate::role::{is_head, role_of};
use crate::write::{Layout, TensorFile, TensorSpec, gguf_layout, pending_path, safetensors_layout, write_file};
use crate::{Format, Metadata, ModelFiles};
use fill::Filler;
use overspill_core::{CatalogBuilder, DType, RawTensor};
use serde_json::{Value, json};
use shape::Shape;
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use tensors::Planned;

/// Shards of safetensors are about as large as this by default.
pub const SHARD_BYTES_DEFAULT: u64 = 4 << 30;
/// Pieces that may wait between the generator and the disk.
const PIECES_WAITING: usize = 3;
/// A skew beyond this leaves one expert only.
const SKEW_MAX: f32 = 8.0;

/// What to write.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SynthSpec {
    /// A Hugging Face configuration (the content of `config.json`): `llama`, `mistral`, `qwen2`, `qwen3`, `mixtral`,
    /// `qwen3_moe` or `olmoe`.
    pub config: Value,
    /// Element type of the matrices. Quantised types need GGUF; a matrix whose rows don't suit the type gets the next
    /// wider one that does, and vectors and routers are f32 in GGUF.
    pub dtype: DType,
    /// A directory of safetensors, or a GGUF file.
    pub format: Format,
    /// Seed of the weights. Default 0.
    pub seed: u64,
    /// How unequally experts are chosen, 0 to 8: the scale of the router's row for the expert of rank r is r^-skew.
    /// 0, the default, makes all experts alike.
    pub expert_skew: f32,
    /// Length at which a shard of safetensors is full. Default [`SHARD_BYTES_DEFAULT`].
    pub shard_bytes: u64,
}

impl SynthSpec {
    /// A model with seed 0, no skew, and shards of 4 GiB.
    #[must_use]
    pub fn new(config: Value, dtype: DType, format: Format) -> Self {
        Self { config, dtype, format, seed: 0, expert_skew: 0.0, shard_bytes: SHARD_BYTES_DEFAULT }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Written {
    /// Files of weights.
    pub files: Vec<PathBuf>,
    /// Their bytes, headers included.
    pub bytes: u64,
    /// Weights.
    pub parameters: u64,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of tensors by the type that they were stored in.
    pub bytes_by_dtype: BTreeMap<DType, u64>,
}

/// One file to be written.
struct FilePlan {
    /// Its path below the output; empty if it is the output.
    name: PathBuf,
    layout: Layout,
    tensors: Range<usize>,
}

/// Everything that is known before the first byte is written.
struct Plan {
    tensors: Vec<Planned>,
    files: Vec<FilePlan>,
    pairs: Vec<(String, crate::GgufValue)>,
}

impl Plan {
    fn of(spec: &SynthSpec, out: &Path) -> Result<Self, FormatError> {
        let request = |cause: &str, cure: &str| Err(FormatError::new(ErrorKind::BadRequest, out, cause, cure));
        if !(0.0..=SKEW_MAX).contains(&spec.expert_skew) {
            return request("the skew of the experts is not within 0 to 8", "choose 1 for a skew like that of words");
        }
        if spec.format == Format::Safetensors && !spec.dtype.is_float() {
            return request("safetensors files hold floats only", "choose f32, f16 or bf16, or write GGUF");
        }
        let shape = Shape::of(&spec.config)?;
        let tensors = tensors::plan(&shape, spec.format, spec.dtype);
        let specs: Vec<TensorSpec> = tensors.iter().map(|tensor| tensor.spec.clone()).collect();
        let pairs = match spec.format {
            Format::Gguf => keys::keys(spec, &shape, out)?,
            Format::Safetensors => Vec::new(),
        };
        let files = match spec.format {
            Format::Gguf => {
                let layout = gguf_layout(out, &pairs, &specs)?;
                vec![FilePlan { name: PathBuf::new(), layout, tensors: 0..specs.len() }]
            }
            Format::Safetensors => shards(spec, out, &specs)?,
        };
        let total = files.iter().try_fold(0u64, |sum, file| sum.checked_add(file.layout.file_bytes));
        if total.is_none_or(|total| total > i64::MAX as u64) {
            return request("the model would have more bytes than a file system can hold", "choose smaller dimensions");
        }
        Ok(Self { tensors, files, pairs })
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.layout.file_bytes).sum()
    }

    /// `model.safetensors.index.json`, if there is more than one shard.
    fn index(&self) -> Option<Value> {
        (self.files.len() > 1).then(|| {
            let total: u64 = self.files.iter().flat_map(|file| &file.layout.places).map(|place| place.1).sum();
            let mut map = serde_json::Map::new();
            for file in &self.files {
                let name = file.name.to_string_lossy();
                map.extend(self.tensors[file.tensors.clone()].iter().map(|t| (t.spec.name.clone(), json!(name))));
            }
            json!({ "metadata": { "total_size": total }, "weight_map": map })
        })
    }
}

/// Cuts the list of tensors into shards.
fn shards(spec: &SynthSpec, out: &Path, tensors: &[TensorSpec]) -> Result<Vec<FilePlan>, FormatError> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let (mut begin, mut sum) = (0, 0u64);
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes().unwrap_or(0);
        if sum > 0 && sum.saturating_add(bytes) > spec.shard_bytes {
            ranges.push(begin..index);
            (begin, sum) = (index, 0);
        }
        sum = sum.saturating_add(bytes);
    }
    ranges.push(begin..tensors.len());
    let count = ranges.len();
    let plan = |(number, range): (usize, Range<usize>)| {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let layout = safetensors_layout(out, &tensors[range.clone()])?;
        Ok(FilePlan { name: PathBuf::from(name), layout, tensors: range })
    };
    ranges.into_iter().enumerate().map(plan).collect()
}

/// `config.json` as it is written: the one given, with the type that the weights really have.
fn config_of(spec: &SynthSpec) -> Value {
    let name = match spec.dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    };
    let mut config = spec.config.clone();
    if let Value::Object(config) = &mut config {
        let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        config.insert(key.into(), json!(name));
        config.insert("overspill_synth".into(), json!({ "seed": spec.seed, "expert_skew": spec.expert_skew }));
    }
    config
}

/// What [`crate::open`] would find if the model were written to `out`. Nothing is written.
///
/// # Errors
/// `BadRequest` for a configuration or type that makes no model.
pub fn describe(spec: &SynthSpec, out: &Path) -> Result<ModelFiles, FormatError> {
    let plan = Plan::of(spec, out)?;
    let has_head = plan.tensors.iter().any(|tensor| is_head(&tensor.spec.name));
    let tied = !has_head || spec.config.get("tie_word_embeddings").and_then(Value::as_bool) == Some(true);
    let mut builder = CatalogBuilder::new();
    for file in &plan.files {
        let path = if file.name.as_os_str().is_empty() { out.to_owned() } else { out.join(&file.name) };
        let id = builder.file(path, file.layout.file_bytes);
        for (tensor, &(offset, _)) in plan.tensors[file.tensors.clone()].iter().zip(&file.layout.places) {
            let TensorSpec { name, dtype, shape } = tensor.spec.clone();
            let role = role_of(&name, dtype, &shape, tied);
            builder.tensor(RawTensor { name, dtype, shape, file: id, offset, role });
        }
    }
    let metadata = match spec.format {
        Format::Gguf => Metadata::Gguf(GgufMetadata::new(out, 3, plan.pairs.into_iter().collect())),
        Format::Safetensors => Metadata::HuggingFace {
            config: config_of(spec),
            generation: None,
            tokenizer_json: None,
            tokenizer_config: None,
        },
    };
    let catalog = crate::build(builder, out)?;
    Ok(ModelFiles { catalog, metadata, format: spec.format, path: out.to_owned(), skipped: Vec::new() })
}

/// Writes a model to `out`: a directory for safetensors, a file for GGUF. `progress` is told the bytes done and in all
/// after every piece, and may break off. Until the whole is complete it lies beside `out` under another name; if it
/// fails or is broken off, nothing is left.
///
/// # Errors
/// `BadRequest` for a configuration or type that makes no model, or an output that is there already; `NotFound` or
/// `Io` if the system refuses (a full disk says so); `Cancelled` if `progress` broke off.
pub fn write(
    spec: &SynthSpec,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<Written, FormatError> {
    let mut plan = Plan::of(spec, out)?;
    check_free(spec, out)?;
    let written = written(&plan, out);
    match spec.format {
        Format::Gguf => write_weights(spec, &mut plan, out, None, progress)?,
        Format::Safetensors => {
            let pending = PendingDirectory::create(out)?;
            let config = serde_json::to_vec_pretty(&config_of(spec)).unwrap_or_default();
            write_file(&pending.pending.join("config.json"), &config)?;
            if let Some(index) = plan.index() {
                let index = serde_json::to_vec_pretty(&index).unwrap_or_default();
                write_file(&pending.pending.join("model.safetensors.index.json"), &index)?;
            }
            write_weights(spec, &mut plan, out, Some(&pending.pending), progress)?;
            pending.finish()?;
        }
    }
    Ok(written)
}

fn written(plan: &Plan, out: &Path) -> Written {
    let mut bytes_by_dtype = BTreeMap::new();
    for tensor in &plan.tensors {
        *bytes_by_dtype.entry(tensor.spec.dtype).or_default() += tensor.spec.bytes().unwrap_or(0);
    }
    let path = |file: &FilePlan| if file.name.as_os_str().is_empty() { out.to_owned() } else { out.join(&file.name) };
    // The factors of rotary frequencies are constants, not weights.
    let weights = plan.tensors.iter().filter(|tensor| !matches!(tensor.fill, tensors::Fill::Exact(_)));
    Written {
        files: plan.files.iter().map(path).collect(),
        bytes: plan.bytes(),
        parameters: weights.map(|tensor| tensor.spec.shape.iter().product::<u64>()).sum(),
        tensors: plan.tensors.len(),
        bytes_by_dtype,
    }
}

/// Refuses to replace what is there.
fn check_free(spec: &SynthSpec, out: &Path) -> Result<(), FormatError> {
    let request = |cause: &str, cure: &str| Err(FormatError::new(ErrorKind::BadRequest, out, cause, cure));
    let ends_with = |extension: &str| out.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension));
    if spec.format == Format::Safetensors && (ends_with("gguf") || ends_with("safetensors")) {
        return request("safetensors are written to a directory, and this is the name of a file", "name a directory");
    }
    match std::fs::symlink_metadata(out) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(FormatError::io(out, "look for it", e)),
        Ok(metadata) if spec.format == Format::Safetensors && metadata.is_dir() => {
            let mut entries = std::fs::read_dir(out).map_err(|e| FormatError::io(out, "list it", e))?;
            match entries.next() {
                None => Ok(()),
                Some(_) => request("the directory is not empty", "remove it first, or name another"),
            }
        }
        Ok(_) => request("there is something already", "remove it first, or name another"),
    }
}

/// A directory that appears under its name only when it is complete.
struct PendingDirectory {
    out: PathBuf,
    pending: PathBuf,
    is_done: bool,
}

impl PendingDirectory {
    fn create(out: &Path) -> Result<Self, FormatError> {
        let pending = pending_path(out)?;
        std::fs::create_dir(&pending).map_err(|e| FormatError::io(out, "create it", e))?;
        Ok(Self { out: out.to_owned(), pending, is_done: false })
    }

    fn finish(mut self) -> Result<(), FormatError> {
        let moved = match std::fs::remove_dir(&self.out) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => std::fs::rename(&self.pending, &self.out),
        };
        moved.map_err(|e| FormatError::io(&self.out, "move it into place", e))?;
        self.is_done = true;
        Ok(())
    }
}

impl Drop for PendingDirectory {
    fn drop(&mut self) {
        if !self.is_done {
            // Nothing can be done about a failure, and the failure that led here is being reported.
            let _ = std::fs::remove_dir_all(&self.pending);
        }
    }
}

/// Makes the weights on one thread and writes them on this one. `directory` is where shards go.
fn write_weights(
    spec: &SynthSpec,
    plan: &mut Plan,
    out: &Path,
    directory: Option<&Path>,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(), FormatError> {
    let total = plan.bytes();
    let Plan { tensors, files, .. } = plan;
    let tensors: &[Planned] = tensors;
    std::thread::scope(|scope| {
        let (made, pieces) = mpsc::sync_channel::<Vec<u8>>(PIECES_WAITING);
        let (used, free) = mpsc::channel::<Vec<u8>>();
        scope.spawn(move || {
            for tensor in tensors {
                let filler = Filler::new(tensor, spec.seed, spec.expert_skew);
                for piece in 0..filler.pieces() {
                    let mut buffer = free.try_recv().unwrap_or_default();
                    filler.fill(piece, &mut buffer);
                    if made.send(buffer).is_err() {
                        // The writer has failed or was cancelled.
                        return;
                    }
                }
            }
        });
        let mut done = 0;
        for file in files {
            let path = directory.map_or_else(|| out.to_owned(), |directory| directory.join(&file.name));
            let layout =
                std::mem::replace(&mut file.layout, Layout { header: Vec::new(), places: Vec::new(), file_bytes: 0 });
            let file_bytes = layout.file_bytes;
            let mut left: u64 = layout.places.iter().map(|place| place.1).sum();
            let mut writer = TensorFile::create(&path, layout)?;
            while left > 0 {
                let Ok(piece) = pieces.recv() else {
                    let cause = "the generator of weights stopped before its end";
                    return Err(FormatError::new(ErrorKind::Io, &path, cause, "try again, and report it"));
                };
                writer.write(&piece)?;
                left -= piece.len() as u64;
                if progress(done + file_bytes - left, total).is_break() {
                    return Err(FormatError::new(ErrorKind::Cancelled, out, "cancelled", "nothing was left behind"));
                }
                // The generator may have ended already.
                let _ = used.send(piece);
            }
            writer.finish()?;
            done += file_bytes;
        }
        Ok(())
    })
}
