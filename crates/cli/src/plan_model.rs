//! The shape of a model for plans: from its files, from a configuration, or from a preset.

use crate::errors::{CliError, Kind, Outcome, stop};
use crate::plan_args::ModelArgs;
use crate::synth::{dtype_named, preset_named, read_config};
use overspill::{BlockId, Catalog, DType, Layout, TierId};
use overspill_formats::{Metadata, ModelFiles};
use overspill_infer::arch::{Ffn, Matrix, Mixer, ModelSpec};
use overspill_infer::plan::{Plan, halves};
use overspill_sim::planner::{KvShape, ModelShape, Part, PartKind};
use std::collections::BTreeMap;
use std::path::Path;

/// A model for a plan.
#[derive(Debug)]
pub struct Planned {
    /// Its shape.
    pub shape: ModelShape,
    /// The element type of most of its bytes.
    pub dtype: DType,
    /// What the reader should know about the shape.
    pub notes: Vec<String>,
}

/// The model that the arguments name.
///
/// # Errors
/// No model is named; files, configuration or preset are bad; the element type is unknown.
pub fn planned(args: &ModelArgs) -> Outcome<Planned> {
    if let Some(path) = &args.model {
        return of_files(&overspill_formats::open(path)?);
    }
    let dtype = dtype_named(&args.dtype)?;
    let (config, label) = match (&args.preset, &args.config) {
        (Some(name), _) => (preset_named(name)?, name.clone()),
        (None, Some(path)) => (read_config(path)?, path.display().to_string()),
        (None, None) => return Err(stop(Kind::Usage, "no model is given: name a MODEL, a --config or a --preset")),
    };
    let mut shape =
        ModelShape::from_config(&config, dtype).map_err(|error| stop(Kind::BadFile, format!("{label}: {error}")))?;
    shape.label = format!("{label} as {dtype}");
    let notes = vec!["The shape is that of the configuration; norms are counted roughly.".to_owned()];
    Ok(Planned { shape, dtype, notes })
}

/// The shape of a model's files, exact to the block where the runtime knows the architecture.
///
/// # Errors
/// A model whose architecture neither the runtime nor the planner knows.
pub fn of_files(model: &ModelFiles) -> Outcome<Planned> {
    let catalog = &model.catalog;
    let dtype = main_dtype(catalog);
    match ModelSpec::from(&model.metadata, catalog) {
        Ok(spec) => Ok(Planned { shape: of_spec(&spec, catalog, &model.path), dtype, notes: Vec::new() }),
        Err(error) => {
            let error = CliError::from(error);
            let Metadata::HuggingFace { config, .. } = &model.metadata else { return Err(error.into()) };
            let Ok(shape) = ModelShape::from_config(config, dtype) else { return Err(error.into()) };
            let shape =
                ModelShape { label: model.path.display().to_string(), ..shape.scaled_to(catalog.weight_bytes()) };
            let notes = vec![format!("The runtime cannot run this model yet ({error}); the plan is for its shape.")];
            Ok(Planned { shape, dtype, notes })
        }
    }
}

/// The element type of most bytes.
fn main_dtype(catalog: &Catalog) -> DType {
    let mut bytes: BTreeMap<DType, u64> = BTreeMap::new();
    for tensor in catalog.tensors() {
        *bytes.entry(tensor.dtype).or_default() += tensor.bytes;
    }
    bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or(DType::F32, |(dtype, _)| dtype)
}

fn of_spec(spec: &ModelSpec, catalog: &Catalog, path: &Path) -> ModelShape {
    let size = |matrix: &Matrix| {
        let tensor = catalog.tensor(matrix.tensor);
        match tensor.layout {
            Layout::Cut { units, .. } => tensor.bytes / u64::from(units.max(1)),
            _ => tensor.bytes,
        }
    };
    let slots = |matrix: &Matrix| match catalog.tensor(matrix.tensor).layout {
        Layout::Cut { blocks_per_unit, .. } => blocks_per_unit,
        _ => 0,
    };
    let mut parts = Vec::new();
    let mut kv = Vec::new();
    let mut widest = 0;
    for (index, layer) in spec.layers.iter().enumerate() {
        let mut push = |kind, matrices: &[Matrix], units: usize, used: usize| {
            parts.push(Part {
                kind,
                layer: index as u32,
                bytes: matrices.iter().map(size).sum(),
                parameters: matrices.iter().map(|m| (m.rows as u64).saturating_mul(m.cols as u64)).sum(),
                units: units as u32,
                used: used as u32,
                products: matrices.len() as u32,
                slots: matrices.iter().map(slots).sum(),
            });
        };
        match &layer.mixer {
            Mixer::Attention(a) => {
                push(PartKind::Attention, &[a.q.matrix, a.k.matrix, a.v.matrix, a.o.matrix], 1, 1);
                kv.push(KvShape {
                    elements: 2 * (a.kv_heads * a.head_dim) as u64,
                    window: a.window.map(|window| window as u64),
                    query_elements: (a.heads * a.head_dim) as u64,
                });
            }
            // A mixer that plans don't know yet has no cache of keys and values either.
            _ => kv.push(KvShape { elements: 0, window: None, query_elements: 0 }),
        }
        match &layer.ffn {
            Ffn::Dense(mlp) => {
                let matrices: Vec<Matrix> = halves(mlp).into_iter().chain([mlp.down.matrix]).collect();
                push(PartKind::Dense, &matrices, 1, 1);
                widest = widest.max(mlp.width as u64);
            }
            Ffn::Experts(experts) => {
                push(PartKind::Router, &[experts.router], 1, 1);
                if let Some(mlp) = experts.experts.first() {
                    let matrices: Vec<Matrix> = halves(mlp).into_iter().chain([mlp.down.matrix]).collect();
                    push(PartKind::Experts, &matrices, experts.experts.len(), experts.used);
                    widest = widest.max(mlp.width as u64 * experts.used as u64);
                }
            }
            _ => {}
        }
    }
    parts.push(Part {
        kind: PartKind::Head,
        layer: spec.layers.len() as u32,
        bytes: size(&spec.head),
        parameters: spec.head.rows as u64 * spec.head.cols as u64,
        units: 1,
        used: 1,
        products: 1,
        slots: slots(&spec.head),
    });
    let plan = Plan::new(spec, catalog, TierId(0), u64::MAX);
    let block = |block: &BlockId| catalog.blocks().get(block.index()).map_or(0, |block| block.bytes);
    let all_slots: u64 = catalog.blocks().iter().map(|block| u64::from(block.slots)).sum();
    let in_blocks: u64 = catalog.blocks().iter().map(|block| block.bytes).sum();
    let query = kv.iter().map(|kv| kv.query_elements).max().unwrap_or(0);
    let values = kv.iter().map(|kv| kv.elements).max().unwrap_or(0);
    ModelShape {
        label: path.display().to_string(),
        architecture: spec.architecture.to_owned(),
        parameters: ModelSpec::parameters(catalog),
        bytes: catalog.weight_bytes(),
        hidden: spec.hidden as u64,
        vocabulary: spec.vocab as u64,
        context: spec.context as u64,
        layers: spec.layers.len() as u32,
        parts,
        standing_bytes: plan.standing.iter().map(block).sum(),
        row_bytes: spec.embedding.row_bytes as u64,
        kv,
        kv_element_bytes: 4,
        // State, queries, keys and values, and the two halves of the network.
        activation_bytes: 4 * (3 * spec.hidden as u64 + 2 * query + 2 * values + 3 * widest),
        slot_bytes: catalog.slot_bytes(),
        padding: (all_slots.saturating_mul(catalog.slot_bytes()) as f64 / in_blocks.max(1) as f64).max(1.0),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use overspill_formats::Format;
    use overspill_formats::synth::{PRESETS, SynthSpec, describe, preset};

    /// What a configuration alone says is what the files would be, for every preset.
    #[test]
    fn shapes_from_configurations_are_those_of_the_files() {
        for name in PRESETS {
            for (dtype, format) in [(DType::Q4_K, Format::Gguf), (DType::BF16, Format::Safetensors)] {
                let config = preset(name).unwrap();
                let files = describe(&SynthSpec::new(config.clone(), dtype, format), Path::new("model.gguf")).unwrap();
                let exact = of_files(&files).unwrap().shape;
                let quick = ModelShape::from_config(&config, dtype).unwrap();
                for (what, found, wanted) in [
                    ("parameters", quick.parameters, exact.parameters),
                    ("bytes", quick.bytes, exact.bytes),
                    ("T", quick.touched_bytes(), exact.touched_bytes()),
                    ("blocks", quick.block_bytes(), exact.block_bytes()),
                    ("cache", quick.kv_bytes(8192, 512), exact.kv_bytes(8192, 512)),
                    ("context", quick.context, exact.context),
                    ("operations", quick.flops_per_token(), exact.flops_per_token()),
                ] {
                    let error = found as f64 / wanted.max(1) as f64 - 1.0;
                    assert!(found == wanted || error.abs() < 0.003, "{name} {dtype}: {what} {found}, not {wanted}");
                }
                assert_eq!(quick.parts.len(), exact.parts.len(), "{name}");
                // The catalog takes the slot that wastes least, of a half to two times the usual least.
                let slots = quick.slot_bytes / 2..=2 * quick.slot_bytes;
                assert!(slots.contains(&exact.slot_bytes), "{name}: {} and {}", quick.slot_bytes, exact.slot_bytes);
            }
        }
    }
}
