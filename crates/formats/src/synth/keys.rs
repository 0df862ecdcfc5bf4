//! The metadata of a synthetic GGUF file: the keys that llama.cpp needs to run it.

use super::SynthSpec;
use super::shape::{Family, RopeScaling, Shape};
use crate::error::{ErrorKind, FormatError};
use crate::gguf_value::GgufValue;
use overspill_core::DType;
use std::path::Path;

/// llama.cpp's number (`enum llama_ftype`) of a file mostly of this type.
fn file_type(dtype: DType) -> Option<u32> {
    Some(match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 7,
        DType::Q5_0 => 8,
        DType::Q5_1 => 9,
        DType::Q4_K => 14,
        DType::Q5_K => 16,
        DType::Q6_K => 18,
        DType::BF16 => 32,
        _ => return None,
    })
}

/// All keys, in the order in which they are written. `path` is only named in errors.
pub(crate) fn keys(spec: &SynthSpec, shape: &Shape, path: &Path) -> Result<Vec<(String, GgufValue)>, FormatError> {
    let mut all: Vec<(String, GgufValue)> = Vec::new();
    let architecture = shape.family.gguf_name();
    let u32_of = |key: &str, value: u64| {
        u32::try_from(value).map(GgufValue::U32).map_err(|_| {
            FormatError::new(ErrorKind::BadRequest, path, format!("{value} is too large"), "choose less").key(key)
        })
    };
    all.push(("general.architecture".into(), GgufValue::Str(architecture.into())));
    all.push(("general.type".into(), GgufValue::Str("model".into())));
    all.push(("general.name".into(), GgufValue::Str(format!("synthetic {architecture}"))));
    all.extend(file_type(spec.dtype).map(|number| ("general.file_type".into(), GgufValue::U32(number))));
    all.push(("general.quantization_version".into(), GgufValue::U32(2)));
    let numbers = [
        ("vocab_size", Some(shape.vocabulary)),
        ("context_length", Some(shape.context)),
        ("embedding_length", Some(shape.hidden)),
        ("block_count", Some(shape.layers)),
        // llama.cpp reads the width of experts here where the architecture has no key of its own for it.
        ("feed_forward_length", Some(feed_forward(shape))),
        ("attention.head_count", Some(shape.heads)),
        ("attention.head_count_kv", Some(shape.kv_heads)),
        ("attention.key_length", Some(shape.head_dim)),
        ("attention.value_length", Some(shape.head_dim)),
        ("attention.sliding_window", shape.sliding_window),
        ("rope.dimension_count", Some(shape.head_dim)),
        ("expert_count", shape.experts.as_ref().map(|experts| experts.count)),
        ("expert_used_count", shape.experts.as_ref().map(|experts| experts.used)),
        ("expert_feed_forward_length", shape.experts.as_ref().map(|experts| experts.width)),
    ];
    for (key, value) in numbers {
        if let Some(value) = value {
            all.push((format!("{architecture}.{key}"), u32_of(key, value)?));
        }
    }
    if let Some(experts) = &shape.experts {
        all.push((format!("{architecture}.expert_weights_norm"), GgufValue::Bool(experts.normalised)));
    }
    let rms_eps = GgufValue::F32(shape.rms_eps as f32);
    all.push((format!("{architecture}.attention.layer_norm_rms_epsilon"), rms_eps));
    all.push((format!("{architecture}.rope.freq_base"), GgufValue::F32(shape.rope.theta as f32)));
    rope_scaling(&shape.rope.scaling, architecture, path, &mut all)?;
    all.push(("tokenizer.ggml.model".into(), GgufValue::Str("none".into())));
    all.push(("overspill.synth.seed".into(), GgufValue::U64(spec.seed)));
    all.push(("overspill.synth.expert_skew".into(), GgufValue::F32(spec.expert_skew)));
    Ok(all)
}

fn feed_forward(shape: &Shape) -> u64 {
    match (&shape.experts, shape.family) {
        (Some(experts), Family::Mixtral | Family::Olmoe) => experts.width,
        (Some(experts), _) if shape.ffn_width == 0 => experts.width,
        _ => shape.ffn_width,
    }
}

fn rope_scaling(
    scaling: &RopeScaling,
    architecture: &str,
    path: &Path,
    all: &mut Vec<(String, GgufValue)>,
) -> Result<(), FormatError> {
    let mut put = |key: &str, value: GgufValue| all.push((format!("{architecture}.rope.scaling.{key}"), value));
    match scaling {
        // Llama 3.1's is a tensor, `rope_freqs.weight`.
        RopeScaling::None | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            put("type", GgufValue::Str("linear".into()));
            put("factor", GgufValue::F32(*factor as f32));
        }
        RopeScaling::Yarn { factor, original_context } => {
            put("type", GgufValue::Str("yarn".into()));
            put("factor", GgufValue::F32(*factor as f32));
            let original = u32::try_from(*original_context).unwrap_or(u32::MAX);
            put("original_context_length", GgufValue::U32(original));
        }
        RopeScaling::Other(name) => {
            let cause = format!("rope scaling '{name}' has no form in GGUF");
            let error = FormatError::new(ErrorKind::BadRequest, path, cause, "write safetensors, or scale otherwise");
            return Err(error.key("rope_scaling"));
        }
    }
    Ok(())
}
