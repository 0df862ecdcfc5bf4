//! `overspill inspect`: what a model consists of and what of it fits where, from its headers alone.

use crate::args::InspectArgs;
use crate::errors::Outcome;
use crate::layers::{self, Pattern};
use crate::machine::{self, Adapter};
use crate::report::{self, Align, Table};
use crate::sizes::{human_bytes, human_count};
use overspill_formats::{Metadata, ModelFiles};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Everything that `inspect` says.
#[derive(Serialize)]
struct Inspection {
    path: String,
    format: String,
    architecture: Option<String>,
    parameters: u64,
    bytes: u64,
    files: Vec<FileLine>,
    blocks: Blocks,
    dtypes: Vec<DtypeLine>,
    layers: Vec<LayerLine>,
    row_tables: Vec<TableLine>,
    fits: Fits,
    skipped: Vec<SkippedLine>,
    tensors: Vec<TensorLine>,
}

#[derive(Serialize)]
struct FileLine {
    path: String,
    bytes: u64,
}

#[derive(Serialize)]
struct Blocks {
    count: usize,
    slot_bytes: u64,
    /// Room that all blocks take in a tier, padding included.
    slots_bytes: u64,
}

#[derive(Serialize)]
struct DtypeLine {
    dtype: &'static str,
    tensors: usize,
    bytes: u64,
}

/// One layer, or what belongs to none.
#[derive(Serialize)]
struct LayerLine {
    layer: Option<u32>,
    tensors: usize,
    blocks: usize,
    bytes: u64,
    /// Of `bytes`, what belongs to experts, of which a token needs a few.
    expert_bytes: u64,
}

#[derive(Serialize)]
struct TableLine {
    tensor: String,
    rows: u64,
    row_bytes: u64,
}

#[derive(Serialize)]
struct Fits {
    /// What this process could take now; absent if the system does not say.
    free_host_bytes: Option<u64>,
    /// The smaller of 1 and free memory over the room that all blocks take.
    host_share: Option<f64>,
    adapters: Vec<Adapter>,
}

#[derive(Serialize)]
struct SkippedLine {
    tensor: String,
    reason: String,
}

#[derive(Serialize)]
struct TensorLine {
    name: String,
    dtype: &'static str,
    shape: Vec<u64>,
    bytes: u64,
    blocks: usize,
    file: String,
    offset: u64,
}

/// Prints the inspection of a model.
///
/// # Errors
/// Whatever keeps the model from being opened.
pub fn inspect(args: &InspectArgs) -> Outcome {
    let model = overspill_formats::open(&args.model)?;
    let inspection = Inspection::of(&model);
    if args.json {
        return report::print_json(&inspection);
    }
    report::print(&inspection.text(args.tensors, report::coloured(&std::io::stdout())))
}

/// The architecture's name as the files give it.
pub fn architecture(metadata: &Metadata) -> Option<String> {
    let name = match metadata {
        Metadata::HuggingFace { config, .. } => {
            let class = config.get("architectures").and_then(|list| list.get(0)).and_then(|name| name.as_str());
            class.or_else(|| config.get("model_type").and_then(|name| name.as_str()))
        }
        Metadata::Gguf(metadata) => metadata.str("general.architecture"),
        _ => None,
    };
    name.map(|name| name.chars().filter(|c| !c.is_control()).take(100).collect())
}

impl Inspection {
    fn of(model: &ModelFiles) -> Self {
        let catalog = &model.catalog;
        let slots: u64 = catalog.blocks().iter().map(|block| u64::from(block.slots)).sum();
        let slots_bytes = slots.saturating_mul(catalog.slot_bytes());
        let mut dtypes: BTreeMap<_, DtypeLine> = BTreeMap::new();
        for tensor in catalog.tensors() {
            let empty = DtypeLine { dtype: tensor.dtype.name(), tensors: 0, bytes: 0 };
            let line = dtypes.entry(tensor.dtype).or_insert(empty);
            line.tensors += 1;
            line.bytes += tensor.bytes;
        }
        let tables = catalog.tables().iter().map(|table| TableLine {
            tensor: catalog.tensor(table.tensor).name.clone(),
            rows: table.rows,
            row_bytes: table.row_bytes,
        });
        Self {
            path: model.path.display().to_string(),
            format: model.format.to_string(),
            architecture: architecture(&model.metadata),
            parameters: layers::parameters(catalog),
            bytes: catalog.weight_bytes(),
            files: catalog.files().map(|(path, bytes)| FileLine { path: path.display().to_string(), bytes }).collect(),
            blocks: Blocks { count: catalog.blocks().len(), slot_bytes: catalog.slot_bytes(), slots_bytes },
            dtypes: dtypes.into_values().collect(),
            layers: layer_lines(model),
            row_tables: tables.collect(),
            fits: Fits::of(slots_bytes),
            skipped: (model.skipped.iter())
                .map(|s| SkippedLine { tensor: s.name.clone(), reason: s.reason.clone() })
                .collect(),
            tensors: tensor_lines(model),
        }
    }

    fn text(&self, all_tensors: bool, coloured: bool) -> String {
        let mut text = report::facts(&[
            ("model", format!("{} ({}, {})", self.path, self.format, plural(self.files.len(), "file"))),
            ("architecture", self.architecture.clone().unwrap_or_else(|| "not named".to_owned())),
            ("parameters", human_count(self.parameters)),
            ("weights", human_bytes(self.bytes)),
            (
                "blocks",
                format!(
                    "{} in slots of {}: {} with padding",
                    self.blocks.count,
                    human_bytes(self.blocks.slot_bytes),
                    human_bytes(self.blocks.slots_bytes)
                ),
            ),
        ]);
        let mut section = |title: &str, table: Table| {
            if !table.is_empty() {
                let _ = write!(text, "\n{title}\n{}", table.render(coloured));
            }
        };
        section("Element types", self.dtype_table());
        section("Layers", self.layer_table());
        section("Row tables (gathered row by row, never in blocks)", self.row_table());
        section("Tensors", if all_tensors { self.tensor_table() } else { self.pattern_table() });
        section("Left out", self.skipped_table());
        text.push_str("\nWhat fits where\n");
        for line in self.fits.lines(self.blocks.slots_bytes) {
            let _ = writeln!(text, "  {line}");
        }
        text
    }

    fn dtype_table(&self) -> Table {
        let mut table = Table::new(&[
            ("type", Align::Left),
            ("tensors", Align::Right),
            ("size", Align::Right),
            ("share", Align::Right),
        ]);
        for line in &self.dtypes {
            table.row([
                line.dtype.to_owned(),
                line.tensors.to_string(),
                human_bytes(line.bytes),
                format!("{:.1} %", line.bytes as f64 * 100.0 / self.bytes.max(1) as f64),
            ]);
        }
        table
    }

    /// Equal layers that follow each other share a line.
    fn layer_table(&self) -> Table {
        let mut table = Table::new(&[
            ("layer", Align::Left),
            ("tensors", Align::Right),
            ("blocks", Align::Right),
            ("size", Align::Right),
            ("of it experts", Align::Right),
        ]);
        let alike = |a: &LayerLine, b: &LayerLine| {
            a.layer.is_some()
                && b.layer.is_some()
                && (a.tensors, a.blocks, a.bytes, a.expert_bytes) == (b.tensors, b.blocks, b.bytes, b.expert_bytes)
        };
        for run in self.layers.chunk_by(alike) {
            let [line, ..] = run else { continue };
            let name = match (line.layer, run.last().and_then(|last| last.layer)) {
                (None, _) => "outside of layers".to_owned(),
                (Some(first), Some(last)) if last != first => format!("{first}-{last}, each"),
                (Some(layer), _) => layer.to_string(),
            };
            let experts = if line.expert_bytes == 0 { String::new() } else { human_bytes(line.expert_bytes) };
            let sizes = [line.tensors.to_string(), line.blocks.to_string(), human_bytes(line.bytes)];
            let [tensors, blocks, bytes] = sizes;
            table.row([name, tensors, blocks, bytes, experts]);
        }
        table
    }

    fn row_table(&self) -> Table {
        let mut table = Table::new(&[("tensor", Align::Left), ("rows", Align::Right), ("a row", Align::Right)]);
        for line in &self.row_tables {
            table.row([shown(&line.tensor), line.rows.to_string(), human_bytes(line.row_bytes)]);
        }
        table
    }

    fn tensor_table(&self) -> Table {
        let mut table = Table::new(&[
            ("tensor", Align::Left),
            ("type", Align::Left),
            ("shape", Align::Left),
            ("blocks", Align::Right),
            ("size", Align::Right),
        ]);
        for line in &self.tensors {
            let shape = layers::dims(&line.shape);
            let cells = [shape, line.blocks.to_string(), human_bytes(line.bytes)];
            let [shape, blocks, bytes] = cells;
            table.row([shown(&line.name), line.dtype.to_owned(), shape, blocks, bytes]);
        }
        table
    }

    fn pattern_table(&self) -> Table {
        let mut table = Table::new(&[
            ("tensor", Align::Left),
            ("type", Align::Left),
            ("shape", Align::Left),
            ("count", Align::Right),
            ("size together", Align::Right),
        ]);
        let tensors = self.tensors.iter().map(|line| (line.name.as_str(), (line.dtype, &line.shape), line.bytes));
        for Pattern { name, key: (dtype, shape), count, bytes } in layers::patterns(tensors) {
            table.row([shown(&name), dtype.to_owned(), layers::dims(shape), count.to_string(), human_bytes(bytes)]);
        }
        table
    }

    fn skipped_table(&self) -> Table {
        let mut table = Table::new(&[("tensor", Align::Left), ("why", Align::Left)]);
        for line in &self.skipped {
            table.row([shown(&line.tensor), line.reason.clone()]);
        }
        table
    }
}

impl Fits {
    fn of(slots_bytes: u64) -> Self {
        let free_host_bytes = machine::free_host_bytes();
        let host_share = free_host_bytes.map(|free| (free as f64 / slots_bytes.max(1) as f64).min(1.0));
        Self { free_host_bytes, host_share, adapters: machine::adapters() }
    }

    fn lines(&self, slots_bytes: u64) -> Vec<String> {
        let host = match (self.free_host_bytes, self.host_share) {
            (Some(free), Some(share)) if share >= 1.0 => {
                format!("host RAM: all of it ({} of {} free)", human_bytes(slots_bytes), human_bytes(free))
            }
            (Some(free), Some(share)) => format!(
                "host RAM: {:.0} % ({} free); the other {} stream from disk",
                share * 100.0,
                human_bytes(free),
                human_bytes(slots_bytes.saturating_sub(free))
            ),
            _ => "host RAM: the system does not say how much is free".to_owned(),
        };
        let gpus = self.adapters.iter().map(|adapter| {
            let kind = if adapter.software { "software, used only when named" } else { adapter.kind };
            format!(
                "GPU '{}' ({kind}): budget with --vram; one buffer holds up to {}",
                adapter.name,
                human_bytes(adapter.buffer_bytes_max)
            )
        });
        let none = self.adapters.is_empty().then(|| "GPU: no adapter here".to_owned());
        std::iter::once(host).chain(gpus).chain(none).collect()
    }
}

fn tensor_lines(model: &ModelFiles) -> Vec<TensorLine> {
    let catalog = &model.catalog;
    let line = |tensor: &overspill::Tensor| TensorLine {
        name: tensor.name.clone(),
        dtype: tensor.dtype.name(),
        shape: tensor.shape.clone(),
        bytes: tensor.bytes,
        blocks: layers::blocks_of(tensor),
        file: catalog.path(tensor.file).display().to_string(),
        offset: tensor.offset,
    };
    catalog.tensors().iter().map(line).collect()
}

fn layer_lines(model: &ModelFiles) -> Vec<LayerLine> {
    let mut lines: BTreeMap<Option<u32>, LayerLine> = BTreeMap::new();
    for tensor in model.catalog.tensors() {
        let layer = layers::layer_of(&tensor.name);
        let empty = LayerLine { layer, tensors: 0, blocks: 0, bytes: 0, expert_bytes: 0 };
        let line = lines.entry(layer).or_insert(empty);
        line.tensors += 1;
        line.bytes += tensor.bytes;
        // Small tensors share blocks with those of other layers, so only matrices count here.
        line.blocks += layers::blocks_of(tensor);
        if layers::is_expert(&tensor.name) {
            line.expert_bytes += tensor.bytes;
        }
    }
    lines.into_values().collect()
}

fn plural(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// A name from a file, fit for a terminal.
fn shown(name: &str) -> String {
    const CHARS_MAX: usize = 90;
    let mut text: String = name.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect();
    if name.chars().nth(CHARS_MAX).is_some() {
        text.push('…');
    }
    text
}
