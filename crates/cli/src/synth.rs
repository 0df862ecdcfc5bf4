//! `overspill synth`: a model of a given shape with random weights, written as a stream.

use crate::args::{FormatArg, SynthArgs};
use crate::errors::{CliError, Kind, Outcome, stop};
use crate::inspect::architecture;
use crate::sizes::{human_bytes, human_count};
use crate::{interrupt, progress, report};
use overspill::DType;
use overspill_formats::Format;
use overspill_formats::synth::{PRESETS, SynthSpec, Written, describe, preset, write};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A configuration longer than this is none.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

#[derive(Serialize)]
struct Report {
    path: String,
    format: String,
    architecture: Option<String>,
    parameters: u64,
    tensors: usize,
    bytes: u64,
    files: Vec<String>,
    bytes_by_dtype: BTreeMap<&'static str, u64>,
    seed: u64,
    seconds: f64,
}

/// Writes a synthetic model.
///
/// # Errors
/// A shape that makes no model, an output that is there already, a disk without room, or a failed write.
pub fn synth(args: &SynthArgs) -> Outcome {
    let spec = spec(args)?;
    let model = describe(&spec, &args.output)?;
    let bytes: u64 = model.catalog.files().map(|(_, bytes)| bytes).sum();
    let replaced = replaced(args, spec.format)?;
    check_room(&args.output, bytes)?;
    interrupt::install();
    let start = Instant::now();
    let bar = progress::bytes(bytes, "writing");
    let mut watch = |done, _total| {
        bar.set_position(done);
        if interrupt::asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let target = if replaced { beside(&args.output)? } else { args.output.clone() };
    let written = write(&spec, &target, &mut watch);
    bar.finish_and_clear();
    let mut written = written?;
    if replaced {
        replace(&target, &args.output).map_err(|error| {
            let message = format!(
                "{}: cannot be replaced: {error}; the new model is whole in {}",
                args.output.display(),
                target.display()
            );
            CliError::new(Kind::Io, message)
        })?;
        written.files = written.files.iter().map(|file| rebase(file, &target, &args.output)).collect();
    }
    say(args, &spec, &written, architecture(&model.metadata), start.elapsed().as_secs_f64())
}

fn say(args: &SynthArgs, spec: &SynthSpec, written: &Written, architecture: Option<String>, seconds: f64) -> Outcome {
    if args.json {
        return report::print_json(&Report {
            path: args.output.display().to_string(),
            format: spec.format.to_string(),
            architecture,
            parameters: written.parameters,
            tensors: written.tensors,
            bytes: written.bytes,
            files: written.files.iter().map(|file| file.display().to_string()).collect(),
            bytes_by_dtype: written.bytes_by_dtype.iter().map(|(dtype, bytes)| (dtype.name(), *bytes)).collect(),
            seed: spec.seed,
            seconds,
        });
    }
    let rate = human_bytes((written.bytes as f64 / seconds.max(1e-9)) as u64);
    report::print(&format!(
        "{}: {} parameters in {} tensors, {}, written in {seconds:.1} s ({rate}/s)\n",
        args.output.display(),
        human_count(written.parameters),
        written.tensors,
        human_bytes(written.bytes),
    ))
}

fn spec(args: &SynthArgs) -> Outcome<SynthSpec> {
    let dtype = dtype_named(&args.dtype)?;
    let format = match args.format {
        FormatArg::Safetensors => Format::Safetensors,
        FormatArg::Gguf => Format::Gguf,
    };
    let mut spec = SynthSpec::new(config(args)?, dtype, format);
    spec.seed = args.seed;
    spec.expert_skew = args.expert_skew;
    Ok(spec)
}

/// The element type of this name.
///
/// # Errors
/// An unknown name; the message lists all.
pub fn dtype_named(name: &str) -> Outcome<DType> {
    DType::from_name(name).ok_or_else(|| {
        // Every type has a number in GGUF files, all of them small.
        let names: Vec<_> = (0..256).filter_map(DType::from_ggml).map(DType::name).collect();
        stop(Kind::Usage, format!("'{name}' is no element type; choose one of {}", names.join(", ")))
    })
}

/// The configuration of a preset.
///
/// # Errors
/// An unknown name; the message lists all.
pub fn preset_named(name: &str) -> Outcome<Value> {
    preset(name)
        .ok_or_else(|| stop(Kind::Usage, format!("'{name}' is no preset; choose one of {}", PRESETS.join(", "))))
}

fn config(args: &SynthArgs) -> Outcome<Value> {
    match (&args.shape.preset, &args.shape.config) {
        (Some(name), _) => preset_named(name),
        (None, Some(path)) => read_config(path),
        (None, None) => Err(stop(Kind::Usage, "no shape is given: name a --preset or a --config")),
    }
}

/// A model's configuration, from its file or from the directory that it is in.
///
/// # Errors
/// Nothing there, a file that cannot be read, or one that is no configuration.
pub fn read_config(path: &Path) -> Outcome<Value> {
    // A model's directory stands for the configuration in it.
    let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let file = fs::File::open(&path).map_err(|error| {
        let kind = if error.kind() == std::io::ErrorKind::NotFound { Kind::NotFound } else { Kind::Io };
        stop(kind, format!("{}: cannot open it: {error}; check the path", path.display()))
    })?;
    let mut text = Vec::new();
    file.take(CONFIG_BYTES_MAX + 1)
        .read_to_end(&mut text)
        .map_err(|error| stop(Kind::Io, format!("{}: cannot read it: {error}; check the disk", path.display())))?;
    let bad = |cause: String| stop(Kind::BadFile, format!("{}: {cause}; give a model's config.json", path.display()));
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(bad("longer than any configuration".to_owned()));
    }
    serde_json::from_slice(&text).map_err(|error| bad(format!("no JSON: {error}")))
}

/// Whether `--force` has something to replace. Only what a user can mean is replaced: a file, or a directory that this
/// command wrote.
fn replaced(args: &SynthArgs, format: Format) -> Outcome<bool> {
    let out = &args.output;
    let Ok(found) = fs::symlink_metadata(out) else { return Ok(false) };
    let is_empty = || fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    if found.is_dir() && format == Format::Safetensors && is_empty() {
        return Ok(false);
    }
    let refuse = |cause: &str, cure: &str| Err(stop(Kind::Config, format!("{}: {cause}; {cure}", out.display())));
    if !args.force {
        return refuse("there is something already", "name another output, or write over it with --force");
    }
    if found.is_dir() && !is_synthetic(out) {
        return refuse("a directory that synth did not write is not replaced", "remove it yourself, or name another");
    }
    Ok(true)
}

fn is_synthetic(directory: &Path) -> bool {
    let config = fs::read(directory.join("config.json")).ok();
    let config = config.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    config.is_some_and(|config| config.get("overspill_synth").is_some())
}

/// A name for the new model until the old one is gone.
fn beside(out: &Path) -> Outcome<PathBuf> {
    let name =
        out.file_name().ok_or_else(|| stop(Kind::Usage, format!("{}: is no name for a model", out.display())))?;
    let mut new = std::ffi::OsString::from(format!(".new-{}-", std::process::id()));
    new.push(name);
    Ok(out.with_file_name(new))
}

fn replace(new: &Path, old: &Path) -> std::io::Result<()> {
    if fs::symlink_metadata(old)?.is_dir() {
        fs::remove_dir_all(old)?;
    }
    fs::rename(new, old)
}

fn rebase(file: &Path, from: &Path, to: &Path) -> PathBuf {
    match file.strip_prefix(from) {
        Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
        Ok(rest) => to.join(rest),
        Err(_) => file.to_owned(),
    }
}

/// Refuses to begin what the disk has no room for.
fn check_room(out: &Path, bytes: u64) -> Outcome {
    let Some(free) = free_disk_bytes(out) else { return Ok(()) };
    if free >= bytes {
        return Ok(());
    }
    let message = format!(
        "{}: the model has {} but the disk has {} free; make room, or write elsewhere",
        out.display(),
        human_bytes(bytes),
        human_bytes(free)
    );
    Err(stop(Kind::Io, message))
}

/// Free bytes of the disk that a path will be on, if the system says.
#[cfg(unix)]
pub fn free_disk_bytes(path: &Path) -> Option<u64> {
    let exists = path.ancestors().find(|dir| dir.exists());
    let directory = exists.filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let stat = rustix::fs::statvfs(directory).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

/// Free bytes of the disk that a path will be on, if the system says.
#[cfg(not(unix))]
pub fn free_disk_bytes(_path: &Path) -> Option<u64> {
    None
}
