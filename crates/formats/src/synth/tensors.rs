//! The tensors of a synthetic model: names as transformers or llama.cpp give them, shapes, types, and what fills them.

use super::random::{exp, ln};
use super::shape::{RopeScaling, Shape};
use crate::Format;
use crate::write::TensorSpec;
use overspill_core::DType;

/// What a tensor is filled with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fill {
    /// Normal deviates of this standard deviation.
    Normal { std: f32 },
    /// Normal deviates about 1.
    Norm,
    /// A router: rows scaled by the expert's popularity.
    Router { std: f32 },
    /// Exactly these values.
    Exact(Vec<f32>),
}

/// A tensor to be made.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub spec: TensorSpec,
    pub fill: Fill,
}

/// Collects tensors under the naming of one format.
struct Planner<'a> {
    shape: &'a Shape,
    format: Format,
    dtype: DType,
    all: Vec<Planned>,
}

/// All tensors in the order of their use.
pub(crate) fn plan(shape: &Shape, format: Format, dtype: DType) -> Vec<Planned> {
    let mut planner = Planner { shape, format, dtype, all: Vec::new() };
    planner.plan();
    planner.all
}

/// The type to store a matrix in: k-quants need rows of whole groups of 256, the others of 32. Where rows are not, the
/// next wider type that can is taken, as llama.cpp's quantiser does.
pub(crate) fn storable(dtype: DType, columns: u64) -> DType {
    let narrower = match dtype {
        DType::Q4_K => DType::Q5_0,
        DType::Q5_K => DType::Q5_1,
        DType::Q6_K => DType::Q8_0,
        _ => DType::F16,
    };
    if dtype.row_bytes(columns).is_some() { dtype } else { storable(narrower, columns) }
}

impl Planner<'_> {
    fn plan(&mut self) {
        let Shape { hidden, vocabulary, layers, .. } = *self.shape;
        let embeddings = Fill::Normal { std: self.shape.init_range as f32 };
        self.add("model.embed_tokens.weight", "token_embd.weight", &[vocabulary, hidden], embeddings);
        for layer in 0..layers {
            self.attention(layer);
            let is_mixture = self.shape.experts.as_ref().is_some_and(|experts| experts.has(layer));
            self.layer(layer, "post_attention_layernorm.weight", "ffn_norm.weight", &[hidden], Fill::Norm);
            if is_mixture { self.experts(layer) } else { self.dense(layer) }
        }
        self.add("model.norm.weight", "output_norm.weight", &[hidden], Fill::Norm);
        if !self.shape.is_tied {
            self.add("lm_head.weight", "output.weight", &[vocabulary, hidden], matrix(hidden, 1.0));
        }
        if let (Format::Gguf, Some(factors)) = (self.format, rope_factors(self.shape)) {
            self.add("", "rope_freqs.weight", &[factors.len() as u64], Fill::Exact(factors));
        }
    }

    /// Matrices that add to the residual stream are scaled down so that it stays of one size at any depth.
    fn residual_gain(&self) -> f32 {
        (2.0 * self.shape.layers as f32).sqrt().recip()
    }

    fn attention(&mut self, layer: u64) {
        let Shape { hidden, heads, kv_heads, head_dim, has_qkv_bias, has_output_bias, .. } = *self.shape;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        self.layer(layer, "input_layernorm.weight", "attn_norm.weight", &[hidden], Fill::Norm);
        for (hf, gguf, rows) in [("q_proj", "attn_q", q), ("k_proj", "attn_k", kv), ("v_proj", "attn_v", kv)] {
            self.linear(layer, &format!("self_attn.{hf}"), gguf, [rows, hidden], 1.0, has_qkv_bias);
        }
        let gain = self.residual_gain();
        self.linear(layer, "self_attn.o_proj", "attn_output", [hidden, q], gain, has_output_bias);
        use super::shape::Family::{Olmoe, Qwen3, Qwen3Moe};
        let norms = match self.shape.family {
            Qwen3 | Qwen3Moe => Some((head_dim, head_dim)),
            Olmoe => Some((q, kv)),
            _ => None,
        };
        if let Some((q, k)) = norms {
            self.layer(layer, "self_attn.q_norm.weight", "attn_q_norm.weight", &[q], Fill::Norm);
            self.layer(layer, "self_attn.k_norm.weight", "attn_k_norm.weight", &[k], Fill::Norm);
        }
    }

    fn dense(&mut self, layer: u64) {
        let Shape { hidden, ffn_width: width, has_mlp_bias, .. } = *self.shape;
        self.linear(layer, "mlp.gate_proj", "ffn_gate", [width, hidden], 1.0, has_mlp_bias);
        self.linear(layer, "mlp.up_proj", "ffn_up", [width, hidden], 1.0, has_mlp_bias);
        self.linear(layer, "mlp.down_proj", "ffn_down", [hidden, width], self.residual_gain(), has_mlp_bias);
    }

    fn experts(&mut self, layer: u64) {
        let hidden = self.shape.hidden;
        let Some((count, width)) = self.shape.experts.as_ref().map(|experts| (experts.count, experts.width)) else {
            return;
        };
        let is_mixtral = self.shape.family == super::shape::Family::Mixtral;
        let block = if is_mixtral { "block_sparse_moe" } else { "mlp" };
        let names = if is_mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
        let router = Fill::Router { std: (hidden as f32).sqrt().recip() };
        self.layer(layer, &format!("{block}.gate.weight"), "ffn_gate_inp.weight", &[count, hidden], router);
        let matrices = [
            (names[0], "ffn_gate_exps.weight", [width, hidden], matrix(hidden, 1.0)),
            (names[1], "ffn_up_exps.weight", [width, hidden], matrix(hidden, 1.0)),
            (names[2], "ffn_down_exps.weight", [hidden, width], matrix(width, self.residual_gain())),
        ];
        if self.format == Format::Gguf {
            for (_, gguf, [rows, columns], fill) in matrices {
                self.layer(layer, "", gguf, &[count, rows, columns], fill);
            }
            return;
        }
        for expert in 0..count {
            for (hf, _, shape, fill) in &matrices {
                self.layer(layer, &format!("{block}.experts.{expert}.{hf}.weight"), "", shape, fill.clone());
            }
        }
    }

    fn linear(&mut self, layer: u64, hf: &str, gguf: &str, shape: [u64; 2], gain: f32, has_bias: bool) {
        let [rows, columns] = shape;
        self.layer(layer, &format!("{hf}.weight"), &format!("{gguf}.weight"), &shape, matrix(columns, gain));
        if has_bias {
            let fill = Fill::Normal { std: self.shape.init_range as f32 };
            self.layer(layer, &format!("{hf}.bias"), &format!("{gguf}.bias"), &[rows], fill);
        }
    }

    fn layer(&mut self, layer: u64, hf: &str, gguf: &str, shape: &[u64], fill: Fill) {
        self.add(&format!("model.layers.{layer}.{hf}"), &format!("blk.{layer}.{gguf}"), shape, fill);
    }

    fn add(&mut self, hf: &str, gguf: &str, shape: &[u64], fill: Fill) {
        let columns = shape.last().copied().unwrap_or(1);
        let (name, dtype) = match self.format {
            Format::Safetensors => (hf, self.dtype),
            // As llama.cpp's converters do: vectors and routers stay exact.
            Format::Gguf if shape.len() == 1 || matches!(fill, Fill::Router { .. }) => (gguf, DType::F32),
            Format::Gguf => (gguf, storable(self.dtype, columns)),
        };
        self.all.push(Planned { spec: TensorSpec { name: name.to_owned(), dtype, shape: shape.to_vec() }, fill });
    }
}

fn matrix(columns: u64, gain: f32) -> Fill {
    Fill::Normal { std: gain / (columns as f32).sqrt() }
}

/// The divisors of the rotary frequencies that Llama 3.1's scaling amounts to, which GGUF files carry as a tensor.
fn rope_factors(shape: &Shape) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { factor, low, high, original_context } = shape.rope.scaling else { return None };
    let original = original_context as f64;
    let of_pair = |pair: u64| {
        let wavelength = std::f64::consts::TAU * exp(ln(shape.rope.theta) * (2 * pair) as f64 / shape.head_dim as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Some((0..shape.head_dim / 2).map(|pair| of_pair(pair) as f32).collect())
}
