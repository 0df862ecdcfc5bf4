//! Finds the tensors of a configuration in a catalog, and checks shape and type of each.
//!
//! What is not here: values of a configuration, which have been checked on reading.

use super::family::QkNormRule;
use super::keys::{Config, FfnConfig, LayerConfig, Presence};
use super::{
    Attention, Embedding, Experts, Ffn, GateUp, Layer, Linear, Matrix, Mixer, Mlp, ModelSpec, QkNorm, VectorSpec,
};
use crate::InferError;
use overspill::{Catalog, Layout, TensorId};
use std::collections::BTreeSet;

const FETCH: &str = "the weights belong to another model or version than the configuration: fetch both again";

struct Binder<'a> {
    config: &'a Config,
    catalog: &'a Catalog,
    prefix: &'static str,
    used: BTreeSet<TensorId>,
}

/// Binds a configuration to the tensors of a catalog.
pub(super) fn bind(config: &Config, catalog: &Catalog) -> Result<ModelSpec, InferError> {
    let names = config.names;
    let holds = |prefix: &&&str| catalog.find(&format!("{prefix}{}", names.embedding)).is_some();
    let prefix = names.prefixes.iter().find(holds).or(names.prefixes.first()).copied().unwrap_or_default();
    let mut binder = Binder { config, catalog, prefix, used: BTreeSet::new() };
    let (embedding, vocab) = binder.embedding()?;
    let head = binder.head(&embedding, vocab)?;
    let final_norm = binder.vector(&binder.model(names.final_norm), config.hidden)?;
    let mut layers = Vec::new();
    for (index, layer) in config.layers.iter().enumerate() {
        layers.push(binder.layer(index, layer)?);
    }
    let rope_divisors = match names.rope_divisors {
        Some(name) if catalog.find(name).is_some() => Some(binder.vector(name, config.rope.pairs())?),
        _ => None,
    };
    binder.check_nothing_left()?;
    let stops = [(config.bos.as_slice(), "bos_token_id"), (config.eos.as_slice(), "eos_token_id")];
    for (ids, key) in stops {
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            let cause = format!("token {id} is not in the vocabulary of {vocab}");
            return Err(super::keys::bad(
                &config.file,
                key,
                cause,
                "the file is damaged or was edited: fetch it again",
            ));
        }
    }
    Ok(ModelSpec {
        architecture: config.family.name,
        vocab,
        hidden: config.hidden,
        context: config.context,
        norm_eps: config.norm_eps,
        embedding,
        layers,
        final_norm,
        head,
        rope: config.rope.clone(),
        rope_divisors,
        bos: config.bos,
        eos: config.eos.clone(),
    })
}

fn dims(shape: &[u64]) -> String {
    format!("[{}]", shape.iter().map(u64::to_string).collect::<Vec<_>>().join(", "))
}

impl Binder<'_> {
    fn model(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn in_layer(&self, layer: usize, name: &str) -> String {
        let layer = self.config.names.layer.replace("{l}", &layer.to_string());
        format!("{}{layer}{name}", self.prefix)
    }

    fn error(&self, tensor: &str, cause: impl Into<String>, cure: &str) -> InferError {
        let id = self.catalog.find(tensor);
        let file = match id {
            Some(id) => self.catalog.path(self.catalog.tensor(id).file),
            None => self.config.file.as_path(),
        };
        InferError::Tensor { file: file.into(), tensor: tensor.into(), cause: cause.into(), cure: cure.into() }
    }

    /// A tensor of exactly this shape.
    fn find(&mut self, name: &str, shape: &[usize]) -> Result<TensorId, InferError> {
        let Some(id) = self.catalog.find(name) else {
            let cause = format!("it is missing ({} needs {})", self.config.family.name, dims(&wide(shape)));
            return Err(self.error(name, cause, FETCH));
        };
        let found = &self.catalog.tensor(id).shape;
        if *found != wide(shape) {
            let cause = format!("its shape is {}, where {} was expected", dims(found), dims(&wide(shape)));
            return Err(self.error(name, cause, FETCH));
        }
        self.used.insert(id);
        Ok(id)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<VectorSpec, InferError> {
        let tensor = self.find(name, &[len])?;
        let dtype = self.catalog.tensor(tensor).dtype;
        if !dtype.is_float() {
            let cure = "convert the model again with a current converter";
            return Err(self.error(name, format!("a vector of type {dtype} is not supported"), cure));
        }
        if !matches!(self.catalog.tensor(tensor).layout, Layout::Whole { .. }) {
            return Err(self.error(name, "it is cut into blocks", "register it with the role Small"));
        }
        Ok(VectorSpec { tensor, dtype, len })
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, InferError> {
        let tensor = self.find(name, &[rows, cols])?;
        self.unit(name, tensor, 0, rows, cols)
    }

    fn unit(&self, name: &str, id: TensorId, unit: u32, rows: usize, cols: usize) -> Result<Matrix, InferError> {
        let tensor = self.catalog.tensor(id);
        match tensor.layout {
            Layout::Cut { units, rows_per_unit, .. } if unit < units && rows_per_unit == rows as u64 => {
                Ok(Matrix { tensor: id, unit, dtype: tensor.dtype, rows, cols })
            }
            _ => Err(self.error(name, "it is not cut by rows", "register it with the role Matrix or Experts")),
        }
    }

    fn linear(&mut self, stem: &str, rows: usize, cols: usize, bias: Presence) -> Result<Linear, InferError> {
        let matrix = self.matrix(&format!("{stem}.weight"), rows, cols)?;
        let name = format!("{stem}.bias");
        let is_there = match bias {
            Presence::Yes => true,
            Presence::No => false,
            Presence::Either => self.catalog.find(&name).is_some(),
        };
        let bias = if is_there { Some(self.vector(&name, rows)?) } else { None };
        Ok(Linear { matrix, bias })
    }

    fn embedding(&mut self) -> Result<(Embedding, usize), InferError> {
        let name = self.model(self.config.names.embedding);
        let rows = match (self.config.vocab, self.catalog.find(&name)) {
            (Some(vocab), _) => vocab,
            (None, Some(id)) => {
                usize::try_from(self.catalog.tensor(id).shape.first().copied().unwrap_or(0)).unwrap_or(0)
            }
            (None, None) => 0,
        };
        let id = self.find(&name, &[rows, self.config.hidden])?;
        let tensor = self.catalog.tensor(id);
        let Some(table) = tensor.table else {
            return Err(self.error(&name, "it is no row table", "register it with the role Table"));
        };
        let row_bytes = usize::try_from(tensor.row_bytes).unwrap_or(usize::MAX);
        Ok((Embedding { tensor: id, table, dtype: tensor.dtype, row_bytes }, rows))
    }

    fn head(&mut self, embedding: &Embedding, vocab: usize) -> Result<Matrix, InferError> {
        let (names, hidden) = (self.config.names, self.config.hidden);
        let own = self.catalog.find(names.head);
        if self.config.tied.unwrap_or(own.is_none()) {
            // Some writers store the tied head all the same.
            self.used.extend(own);
            let name = self.model(names.embedding);
            return self.unit(&name, embedding.tensor, 0, vocab, hidden);
        }
        self.matrix(names.head, vocab, hidden)
    }

    fn layer(&mut self, index: usize, layer: &LayerConfig) -> Result<Layer, InferError> {
        let (names, hidden) = (self.config.names, self.config.hidden);
        let mixer_norm = self.vector(&self.in_layer(index, names.mixer_norm), hidden)?;
        let mixer = Mixer::Attention(self.attention(index, layer)?);
        let ffn_norm = self.vector(&self.in_layer(index, names.ffn_norm), hidden)?;
        let ffn = match layer.ffn {
            FfnConfig::Dense { width } => Ffn::Dense(self.dense(index, width)?),
            FfnConfig::Experts { width, experts, used, normalise } => {
                let router = self.router(index, experts)?;
                let experts = self.experts(index, width, experts)?;
                Ffn::Experts(Experts { router, experts, used, normalise })
            }
        };
        Ok(Layer { mixer_norm, mixer, ffn_norm, ffn })
    }

    fn attention(&mut self, index: usize, layer: &LayerConfig) -> Result<Attention, InferError> {
        let (names, hidden, biases) = (self.config.names, self.config.hidden, self.config.biases);
        let LayerConfig { heads, kv_heads, head_dim, window, .. } = *layer;
        // Both are at most 2^24, as `in_range` has checked, so this fits 64 bits.
        let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let q = self.linear(&self.in_layer(index, names.q), width, hidden, biases.qkv)?;
        let k = self.linear(&self.in_layer(index, names.k), kv_width, hidden, biases.qkv)?;
        let v = self.linear(&self.in_layer(index, names.v), kv_width, hidden, biases.qkv)?;
        let o = self.linear(&self.in_layer(index, names.o), hidden, width, biases.o)?;
        let qk_norm = match self.config.family.qk_norm {
            QkNormRule::None => None,
            rule => {
                let per_head = rule == QkNormRule::PerHead;
                let (q_len, k_len) = if per_head { (head_dim, head_dim) } else { (width, kv_width) };
                let q = self.vector(&self.in_layer(index, names.q_norm), q_len)?;
                let k = self.vector(&self.in_layer(index, names.k_norm), k_len)?;
                Some(QkNorm { q, k, per_head })
            }
        };
        Ok(Attention {
            heads,
            kv_heads,
            head_dim,
            q,
            k,
            v,
            o,
            qk_norm,
            clip: self.config.clip,
            window,
            pairs: self.config.pairs,
            scale: 1.0 / (head_dim as f32).sqrt(),
        })
    }

    fn dense(&mut self, index: usize, width: usize) -> Result<Mlp, InferError> {
        let (names, hidden, bias) = (self.config.names, self.config.hidden, self.config.biases.mlp);
        let gate = self.linear(&self.in_layer(index, names.gate), width, hidden, bias)?;
        let up = self.linear(&self.in_layer(index, names.up), width, hidden, bias)?;
        let down = self.linear(&self.in_layer(index, names.down), hidden, width, bias)?;
        Ok(Mlp { width, gate_up: GateUp::Separate { gate, up }, down })
    }

    fn router(&mut self, index: usize, experts: usize) -> Result<Matrix, InferError> {
        let names = self.config.names.router;
        let candidates = names.iter().map(|name| self.in_layer(index, name));
        let found = candidates.clone().find(|name| self.catalog.find(name).is_some());
        let name = found.or_else(|| candidates.clone().next()).unwrap_or_default();
        self.matrix(&name, experts, self.config.hidden)
    }

    fn experts(&mut self, index: usize, width: usize, experts: usize) -> Result<Vec<Mlp>, InferError> {
        let (names, hidden) = (self.config.names, self.config.hidden);
        for (gate, up, down) in names.fused {
            let [gate, up, down] = [gate, up, down].map(|name| self.in_layer(index, name));
            if self.catalog.find(&gate).is_some() {
                let gates = self.fused(&gate, experts, width, hidden)?;
                let ups = self.fused(&up, experts, width, hidden)?;
                let downs = self.fused(&down, experts, hidden, width)?;
                let gate_ups = gates.into_iter().zip(ups).map(|(gate, up)| GateUp::Separate {
                    gate: Linear { matrix: gate, bias: None },
                    up: Linear { matrix: up, bias: None },
                });
                return Ok(mlps(width, gate_ups, downs));
            }
        }
        for (gate_up, down) in names.fused_gate_up {
            let [gate_up, down] = [gate_up, down].map(|name| self.in_layer(index, name));
            if self.catalog.find(&gate_up).is_some() {
                let gate_ups = self.fused(&gate_up, experts, 2 * width, hidden)?;
                let downs = self.fused(&down, experts, hidden, width)?;
                return Ok(mlps(width, gate_ups.into_iter().map(GateUp::Fused), downs));
            }
        }
        let first = |(gate, _, _): &&(&str, &str, &str)| {
            self.catalog.find(&self.in_layer(index, &gate.replace("{e}", "0"))).is_some()
        };
        let Some(&(gate, up, down)) = names.each.iter().find(first).or(names.each.first()) else {
            return Ok(Vec::new());
        };
        let mut all = Vec::new();
        for expert in 0..experts {
            let [gate, up, down] =
                [gate, up, down].map(|name| self.in_layer(index, &name.replace("{e}", &expert.to_string())));
            let gate = Linear { matrix: self.matrix(&gate, width, hidden)?, bias: None };
            let up = Linear { matrix: self.matrix(&up, width, hidden)?, bias: None };
            let down = Linear { matrix: self.matrix(&down, hidden, width)?, bias: None };
            all.push(Mlp { width, gate_up: GateUp::Separate { gate, up }, down });
        }
        Ok(all)
    }

    /// The experts' matrices in one tensor `[experts][rows][cols]`.
    fn fused(&mut self, name: &str, experts: usize, rows: usize, cols: usize) -> Result<Vec<Matrix>, InferError> {
        let tensor = self.find(name, &[experts, rows, cols])?;
        (0..experts as u32).map(|unit| self.unit(name, tensor, unit, rows, cols)).collect()
    }

    /// Refuses tensors that nothing uses: without them the answer would be wrong, and nobody would notice.
    fn check_nothing_left(&self) -> Result<(), InferError> {
        for (index, tensor) in self.catalog.tensors().iter().enumerate() {
            let redundant = self.config.names.redundant.iter().any(|suffix| tensor.name.ends_with(suffix));
            if !redundant && !self.used.contains(&TensorId(index as u32)) {
                let cause = format!("the architecture '{}' has no use for it", self.config.family.name);
                return Err(self.error(&tensor.name, cause, "use a model of a supported architecture"));
            }
        }
        Ok(())
    }
}

fn wide(shape: &[usize]) -> Vec<u64> {
    shape.iter().map(|&d| d as u64).collect()
}

fn mlps(width: usize, gate_ups: impl Iterator<Item = GateUp>, downs: Vec<Matrix>) -> Vec<Mlp> {
    let linear = |matrix| Linear { matrix, bias: None };
    gate_ups.zip(downs).map(|(gate_up, down)| Mlp { width, gate_up, down: linear(down) }).collect()
}
