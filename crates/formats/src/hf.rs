//! A Hugging Face model: a directory with `config.json` and safetensors files, sharded by an index or not.
//!
//! Finds the files that belong together, and makes a catalog of their headers. Interprets nothing of the
//! configuration but whether the head is tied to the embeddings.

use crate::error::{ErrorKind, FormatError};
use crate::read::read_json;
use crate::role::{is_head, role_of};
use crate::safetensors_file::{Entry, Header, read_header, unread};
use crate::{Format, Metadata, ModelFiles, SkippedTensor, build};
use overspill_core::{CatalogBuilder, RawTensor};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Buffers that older checkpoints carry and that are computed from the configuration instead.
const BUFFERS: &[&str] =
    &["rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias", "position_ids", "num_batches_tracked"];

/// An index: which shard holds which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The files of a model, and what an index says of them.
struct Files {
    paths: Vec<PathBuf>,
    index: Option<(PathBuf, Index)>,
}

/// Opens a directory.
pub(crate) fn open_directory(directory: &Path) -> Result<ModelFiles, FormatError> {
    let config = directory.join(CONFIG);
    if !exists(&config)? {
        return Err(no_config(directory));
    }
    let files = if exists(&directory.join(SINGLE))? {
        Files { paths: vec![directory.join(SINGLE)], index: None }
    } else if exists(&directory.join(INDEX))? {
        sharded(directory, directory.join(INDEX))?
    } else {
        return Err(no_weights(directory));
    };
    open_files(directory, files)
}

/// Opens one safetensors file, or the whole model if the file is a shard of one.
pub(crate) fn open_file(path: &Path) -> Result<ModelFiles, FormatError> {
    let directory = parent(path);
    // An error about the file itself comes before one about what lies beside it.
    read_header(path)?;
    if !exists(&directory.join(CONFIG))? {
        return Err(FormatError::bad(path, "there is no config.json beside it", "put the model's config.json there"));
    }
    let index = directory.join(INDEX);
    if exists(&index)? {
        let files = sharded(directory, index)?;
        if files.paths.iter().any(|shard| shard == path) {
            return open_files(directory, files);
        }
    }
    open_files(directory, Files { paths: vec![path.to_owned()], index: None })
}

/// Opens the model that an index lists.
pub(crate) fn open_index(path: &Path) -> Result<ModelFiles, FormatError> {
    let directory = parent(path);
    open_files(directory, sharded(directory, path.to_owned())?)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn exists(path: &Path) -> Result<bool, FormatError> {
    path.try_exists().map_err(|e| FormatError::io(path, "look for it", e))
}

fn no_config(directory: &Path) -> FormatError {
    let cause = "a directory without config.json";
    let ggufs = names_ending(directory, ".gguf");
    match ggufs.first() {
        Some(name) => FormatError::bad(directory, cause, format!("name the GGUF file in it: {name}")),
        None => FormatError::bad(directory, cause, "name a model's directory, or a .gguf file"),
    }
}

fn no_weights(directory: &Path) -> FormatError {
    let cause = format!("neither {SINGLE} nor {INDEX} is in it");
    let others = names_ending(directory, ".safetensors");
    let pickled = names_ending(directory, ".bin").into_iter().chain(names_ending(directory, ".pth")).next();
    let cure = match (others.as_slice(), pickled) {
        ([one], _) => format!("name the file itself: {one}"),
        ([_, ..], _) => "the shards' index is missing; fetch it too".to_owned(),
        ([], Some(pickled)) => format!("{pickled} is not read; convert it to safetensors"),
        ([], None) => "fetch the weights too".to_owned(),
    };
    FormatError::bad(directory, cause, cure)
}

fn names_ending(directory: &Path, suffix: &str) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter(|name| name.ends_with(suffix)).collect();
    names.sort_unstable();
    names
}

/// Reads an index and lists its shards.
fn sharded(directory: &Path, path: PathBuf) -> Result<Files, FormatError> {
    let index: Index = read_json(&path)?;
    if index.weight_map.is_empty() {
        return Err(FormatError::bad(&path, "its weight_map is empty", "fetch it again").key("weight_map"));
    }
    let mut paths = Vec::new();
    let shards: BTreeSet<&String> = index.weight_map.values().collect();
    for shard in shards {
        let relative = Path::new(shard);
        let is_inside = relative.components().all(|part| matches!(part, Component::Normal(_)));
        if shard.is_empty() || !is_inside {
            let cause =
                format!("the shard '{}' is not a file inside the model's directory", crate::error::shown(shard));
            return Err(FormatError::bad(&path, cause, "correct the index"));
        }
        let file = directory.join(relative);
        if !exists(&file)? {
            let tensor = index.weight_map.iter().find(|(_, s)| *s == shard).map_or("", |(name, _)| name);
            let cause = format!("the shard '{}' that holds it is missing", crate::error::shown(shard));
            return Err(FormatError::bad(&path, cause, "fetch the missing shard").tensor(tensor));
        }
        paths.push(file);
    }
    Ok(Files { paths, index: Some((path, index)) })
}

fn open_files(directory: &Path, files: Files) -> Result<ModelFiles, FormatError> {
    let config: Value = read_json(&directory.join(CONFIG))?;
    if !config.is_object() {
        return Err(FormatError::bad(&directory.join(CONFIG), "not a JSON object", "fetch it again"));
    }
    let mut headers = Vec::with_capacity(files.paths.len());
    for path in &files.paths {
        let header = read_header(path).map_err(|error| match error.kind() {
            // It was there a moment ago, so it isn't the user's path that is wrong.
            ErrorKind::NotFound => {
                FormatError::bad(path, "it has just vanished", "don't change a model while it is opened")
            }
            _ => error,
        })?;
        headers.push(header);
    }
    if let Some((path, index)) = &files.index {
        check_index(directory, path, index, &files.paths, &headers)?;
    }
    let tied = config.get("tie_word_embeddings").and_then(Value::as_bool) == Some(true)
        || !headers.iter().flat_map(|header| &header.entries).any(|entry| is_head(&entry.name));
    let mut builder = CatalogBuilder::new();
    let mut skipped = Vec::new();
    let first = files.paths.first().cloned().unwrap_or_default();
    for (path, header) in files.paths.iter().zip(headers) {
        let file = builder.file(path, header.file_bytes);
        for entry in header.entries {
            if let Some(reason) = reason_to_skip(directory, path, &entry, &files) {
                skipped.push(SkippedTensor { name: entry.name, reason });
                continue;
            }
            let dtype = entry.dtype.map_err(|dtype| unread(path, &entry.name, &dtype))?;
            let role = role_of(&entry.name, dtype, &entry.shape, tied);
            let Entry { name, shape, offset, .. } = entry;
            builder.tensor(RawTensor { name, dtype, shape, file, offset, role });
        }
    }
    Ok(ModelFiles {
        catalog: build(builder, &first)?,
        metadata: Metadata::HuggingFace {
            config,
            generation: optional_json(directory, "generation_config.json")?,
            tokenizer_json: Some(directory.join("tokenizer.json")).filter(|path| path.is_file()),
            tokenizer_config: optional_json(directory, "tokenizer_config.json")?,
        },
        format: Format::Safetensors,
        path: directory.to_owned(),
        skipped,
    })
}

fn optional_json(directory: &Path, name: &str) -> Result<Option<Value>, FormatError> {
    let path = directory.join(name);
    if exists(&path)? { read_json(&path).map(Some) } else { Ok(None) }
}

/// Every tensor of the index must be in the shard that it names.
fn check_index(
    directory: &Path,
    path: &Path,
    index: &Index,
    paths: &[PathBuf],
    headers: &[Header],
) -> Result<(), FormatError> {
    let mut there: BTreeSet<(&Path, &str)> = BTreeSet::new();
    for (shard, header) in paths.iter().zip(headers) {
        there.extend(header.entries.iter().map(|entry| (shard.as_path(), entry.name.as_str())));
    }
    for (name, shard) in &index.weight_map {
        if !there.contains(&(directory.join(shard).as_path(), name.as_str())) {
            let cause = format!("the index says that it is in '{}', but it isn't there", crate::error::shown(shard));
            let cure = "index and shards are of different models or versions; fetch them again";
            return Err(FormatError::bad(path, cause, cure).tensor(name));
        }
    }
    Ok(())
}

fn reason_to_skip(directory: &Path, path: &Path, entry: &Entry, files: &Files) -> Option<String> {
    if BUFFERS.iter().any(|buffer| entry.name.ends_with(buffer)) {
        return Some("a buffer that is computed from the configuration".to_owned());
    }
    let (_, index) = files.index.as_ref()?;
    let shard = index.weight_map.get(&entry.name)?;
    (directory.join(shard) != path).then(|| format!("the index takes it from '{}'", crate::error::shown(shard)))
}
