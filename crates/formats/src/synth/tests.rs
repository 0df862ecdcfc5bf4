#![allow(clippy::unwrap_used, reason = "tests")]

use super::fill::Filler;
use super::tensors::{Fill, Planned, storable};
use super::*;
use half::{bf16, f16};
use overspill_core::dtype::TABLE;

/// A scalar reading of every type, written from ggml's description of the layouts.
fn dequantise(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let h = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
    let info = dtype.info();
    let mut out = Vec::new();
    for g in bytes.chunks_exact(info.group_bytes as usize) {
        let nibble = |q: &[u8], i: usize| if i < 16 { q[i] & 15 } else { q[i - 16] >> 4 };
        let bit = |q: &[u8], i: usize| q[i / 8] >> (i % 8) & 1;
        let elements = 0..info.group_elements as usize;
        match dtype {
            DType::F32 => out.push(f32::from_le_bytes(g.try_into().unwrap())),
            DType::F16 => out.push(h(g)),
            DType::BF16 => out.push(bf16::from_le_bytes([g[0], g[1]]).to_f32()),
            DType::Q4_0 => out.extend(elements.map(|i| h(g) * (f32::from(nibble(&g[2..], i)) - 8.0))),
            DType::Q4_1 => out.extend(elements.map(|i| h(g) * f32::from(nibble(&g[4..], i)) + h(&g[2..]))),
            DType::Q5_0 => {
                out.extend(elements.map(|i| h(g) * (f32::from(nibble(&g[6..], i) | bit(&g[2..], i) << 4) - 16.0)))
            }
            DType::Q5_1 => {
                out.extend(elements.map(|i| h(g) * f32::from(nibble(&g[8..], i) | bit(&g[4..], i) << 4) + h(&g[2..])))
            }
            DType::Q8_0 => out.extend(elements.map(|i| h(g) * f32::from(g[2 + i] as i8))),
            DType::Q4_K | DType::Q5_K => out.extend(elements.map(|i| {
                let s = &g[4..16];
                let j = i / 32;
                let (scale, min) = if j < 4 {
                    (s[j] & 63, s[j + 4] & 63)
                } else {
                    ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
                };
                let qs = if dtype == DType::Q4_K { &g[16..] } else { &g[48..] };
                let byte = qs[i / 64 * 32 + i % 32];
                let mut q = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
                if dtype == DType::Q5_K {
                    q |= (g[16 + i % 32] >> j & 1) << 4;
                }
                h(g) * f32::from(scale) * f32::from(q) - h(&g[2..]) * f32::from(min)
            })),
            DType::Q6_K => out.extend(elements.map(|i| {
                let (half, within) = (i / 128, i % 128);
                let (quarter, l) = (within / 32, within % 32);
                let low = g[half * 64 + (quarter % 2) * 32 + l] >> (4 * (quarter / 2)) & 15;
                let high = g[128 + half * 32 + l] >> (2 * quarter) & 3;
                let scale = f32::from(g[192 + i / 16] as i8);
                h(&g[208..]) * scale * (f32::from(low | high << 4) - 32.0)
            })),
            other => panic!("{other} has no reading here"),
        }
    }
    out
}

fn planned(dtype: DType, shape: &[u64], fill: Fill) -> Planned {
    Planned { spec: TensorSpec { name: "t".into(), dtype, shape: shape.into() }, fill }
}

fn values(planned: &Planned, seed: u64, skew: f32) -> Vec<f32> {
    let filler = Filler::new(planned, seed, skew);
    let mut bytes = Vec::new();
    let mut piece = Vec::new();
    for number in 0..filler.pieces() {
        filler.fill(number, &mut piece);
        bytes.extend_from_slice(&piece);
    }
    assert_eq!(bytes.len() as u64, planned.spec.bytes().unwrap());
    dequantise(planned.spec.dtype, &bytes)
}

fn mean_and_std(values: &[f32]) -> (f64, f64) {
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / values.len() as f64;
    (mean, variance.sqrt())
}

#[test]
fn weights_of_every_type_have_the_wanted_deviation_and_no_mean() {
    for row in TABLE {
        for std in [0.02f32, 0.0156, 0.002] {
            let values = values(&planned(row.dtype, &[1024, 2048], Fill::Normal { std }), 1, 0.0);
            assert_eq!(values.len(), 1 << 21);
            let (mean, measured) = mean_and_std(&values);
            let error = measured / f64::from(std) - 1.0;
            assert!(error.abs() < 0.02, "{}: {measured}, wanted {std}", row.name);
            assert!(mean.abs() < 0.005 * f64::from(std), "{}: mean {mean} for {std}", row.name);
        }
    }
}

#[test]
fn weights_do_not_repeat_and_depend_on_the_seed() {
    for row in TABLE {
        let filled = planned(row.dtype, &[1024, 2048], Fill::Normal { std: 0.02 });
        let a = values(&filled, 1, 0.0);
        assert_eq!(a, values(&filled, 1, 0.0), "{}: not deterministic", row.name);
        let b = values(&filled, 2, 0.0);
        let equal = |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64;
        assert!(equal(&a, &b) < 0.1, "{}: seeds give the same", row.name);
        let (first, second) = a.split_at(a.len() / 2);
        assert!(equal(first, second) < 0.1, "{}: pieces repeat", row.name);
    }
}

#[test]
fn norms_are_near_one() {
    let (mean, std) = mean_and_std(&values(&planned(DType::BF16, &[1 << 16], Fill::Norm), 1, 0.0));
    assert!((mean - 1.0).abs() < 1e-3 && (std - 0.02).abs() < 2e-3, "{mean} {std}");
}

/// Share of all choices that the busiest quarter of the experts gets, for random activations.
fn share_of_busiest_quarter(skew: f32) -> f64 {
    const EXPERTS: usize = 32;
    const WIDTH: usize = 256;
    const USED: usize = 4;
    let router = planned(DType::F32, &[EXPERTS as u64, WIDTH as u64], Fill::Router { std: 1.0 / 16.0 });
    let rows = values(&router, 3, skew);
    let mut rng = random::Rng::new(9, "x", 0);
    let mut counts = [0u32; EXPERTS];
    for _ in 0..2000 {
        let x: Vec<f32> = (0..WIDTH).map(|_| rng.normal()).collect();
        let score = |e: usize| rows[e * WIDTH..(e + 1) * WIDTH].iter().zip(&x).map(|(a, b)| a * b).sum::<f32>();
        let mut order: Vec<(f32, usize)> = (0..EXPERTS).map(|e| (score(e), e)).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        order[..USED].iter().for_each(|&(_, e)| counts[e] += 1);
    }
    counts.sort_unstable();
    f64::from(counts[EXPERTS - EXPERTS / 4..].iter().sum::<u32>()) / f64::from(counts.iter().sum::<u32>())
}

#[test]
fn skew_concentrates_the_choice_of_experts() {
    let [none, some, much] = [0.0, 0.5, 1.5].map(share_of_busiest_quarter);
    assert!(none < 0.35, "{none}");
    assert!(some > none + 0.1, "{some}");
    assert!(much > some + 0.05, "{much}");
}

#[test]
fn rows_that_are_no_whole_groups_get_the_next_wider_type() {
    assert_eq!(storable(DType::Q4_K, 4096), DType::Q4_K);
    assert_eq!(storable(DType::Q4_K, 96), DType::Q5_0);
    assert_eq!(storable(DType::Q5_K, 96), DType::Q5_1);
    assert_eq!(storable(DType::Q6_K, 96), DType::Q8_0);
    assert_eq!(storable(DType::Q6_K, 48), DType::F16);
    assert_eq!(storable(DType::F32, 7), DType::F32);
}

#[test]
fn presets_have_as_many_weights_as_the_models_that_they_name() {
    // As counted from the published checkpoints.
    let published = [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-2-7b", 6_738_415_616),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama-3-8b", 8_030_261_248),
        ("qwen3-8b", 8_190_735_360),
        ("olmoe-1b-7b", 6_919_161_856),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mixtral-8x7b", 46_702_792_704),
        ("llama-3-70b", 70_553_706_496),
        ("mixtral-8x22b", 140_630_071_296),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("llama-3.1-405b", 405_853_388_800),
    ];
    assert_eq!(published.map(|(name, _)| name), PRESETS);
    for (name, parameters) in published {
        for (format, dtype) in [(Format::Safetensors, DType::BF16), (Format::Gguf, DType::Q4_K)] {
            let spec = SynthSpec::new(preset(name).unwrap(), dtype, format);
            let out = Path::new("m");
            let plan = Plan::of(&spec, out).unwrap();
            assert_eq!(written(&plan, out).parameters, parameters, "{name} as {format}");
            let model = describe(&spec, out).unwrap();
            assert_eq!(model.catalog.tensors().len(), plan.tensors.len());
        }
    }
    assert!(preset("gpt-5").is_none());
}

fn tiny(more: Value) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

#[test]
fn configurations_that_make_no_model_are_refused_by_key() {
    let refused = [
        (json!({ "model_type": "mamba" }), "model_type"),
        (json!({ "hidden_size": 0 }), "hidden_size"),
        (json!({ "hidden_size": -64 }), "hidden_size"),
        (json!({ "hidden_size": 64.5 }), "hidden_size"),
        (json!({ "hidden_size": null }), "hidden_size"),
        (json!({ "num_hidden_layers": 1u64 << 60 }), "num_hidden_layers"),
        (json!({ "num_key_value_heads": 3 }), "num_key_value_heads"),
        (json!({ "num_attention_heads": 3, "num_key_value_heads": 3 }), "num_attention_heads"),
        (json!({ "head_dim": 15 }), "head_dim"),
        (json!({ "rms_norm_eps": 0.0 }), "rms_norm_eps"),
        (json!({ "model_type": "mixtral" }), "num_experts"),
        (json!({ "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 5 }), "num_experts_per_tok"),
        (json!({ "rope_scaling": { "type": "linear" } }), "factor"),
        (json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }), "rope_scaling"),
    ];
    for (more, key) in refused {
        let spec = SynthSpec::new(tiny(more.clone()), DType::F16, Format::Gguf);
        let error = describe(&spec, Path::new("m")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadRequest, "{more}: {error}");
        assert_eq!(error.subject(), Some(&crate::Subject::Key(key.to_owned())), "{more}: {error}");
    }
    let mut spec = SynthSpec::new(tiny(json!({})), DType::Q4_0, Format::Safetensors);
    assert!(describe(&spec, Path::new("m")).unwrap_err().to_string().contains("GGUF"));
    spec.dtype = DType::F16;
    spec.expert_skew = f32::NAN;
    assert_eq!(describe(&spec, Path::new("m")).unwrap_err().kind(), ErrorKind::BadRequest);
    let huge = tiny(json!({ "vocab_size": 1u64 << 31, "hidden_size": 1u64 << 31, "num_hidden_layers": 60_000 }));
    let error = describe(&SynthSpec::new(huge, DType::F32, Format::Gguf), Path::new("m")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadRequest);
}

#[test]
fn the_scaling_of_llama_3_1_becomes_a_tensor_of_factors() {
    let spec = SynthSpec::new(preset("llama-3.2-1b").unwrap(), DType::Q8_0, Format::Gguf);
    let plan = Plan::of(&spec, Path::new("m")).unwrap();
    let tensor = plan.tensors.iter().find(|tensor| tensor.spec.name == "rope_freqs.weight").unwrap();
    let factors = values(tensor, 0, 0.0);
    // llama.cpp's converter: short wavelengths keep their frequency, long ones are divided by the factor.
    assert_eq!(factors.len(), 32);
    assert_eq!((factors[0], factors[31]), (1.0, 32.0));
    assert!(factors.is_sorted() && factors.iter().any(|&f| f > 1.0 && f < 32.0), "{factors:?}");
}
