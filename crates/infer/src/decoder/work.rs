//! The buffers that a chunk of tokens goes through, and the host memory that is used again for each.
//!
//! What is not here: the cache of keys and values.

use super::experts::Halves;
use crate::InferError;
use crate::arch::{Ffn, Mixer, ModelSpec};
use crate::backend::{Backend, Buf, Route, RowRun};
use crate::cpu::INPUTS_MAX;
use overspill::BlockId;

/// Elements of each buffer for one token, the widest layer's.
#[derive(Clone, Copy, Debug, Default)]
struct Widths {
    hidden: usize,
    q: usize,
    kv: usize,
    q_normed: usize,
    kv_normed: usize,
    gate_up: usize,
    gated: usize,
    parts: usize,
    gathered: usize,
    router: usize,
    angles: usize,
}

impl Widths {
    fn of(spec: &ModelSpec) -> Self {
        let mut w = Self { hidden: spec.hidden, angles: spec.rope.dim, ..Self::default() };
        for layer in &spec.layers {
            match &layer.mixer {
                Mixer::Attention(a) => {
                    let (q, kv) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
                    (w.q, w.kv) = (w.q.max(q), w.kv.max(kv));
                    if a.qk_norm.is_some() {
                        (w.q_normed, w.kv_normed) = (w.q_normed.max(q), w.kv_normed.max(kv));
                    }
                }
            }
            match &layer.ffn {
                Ffn::Dense(mlp) => {
                    (w.gate_up, w.gated) = (w.gate_up.max(2 * mlp.width), w.gated.max(mlp.width));
                }
                Ffn::Experts(experts) => {
                    let width = experts.experts.first().map_or(0, |mlp| mlp.width);
                    w.gate_up = w.gate_up.max(2 * width);
                    w.gated = w.gated.max(width.saturating_mul(experts.used));
                    w.parts = w.parts.max(spec.hidden.saturating_mul(experts.used));
                    w.gathered = spec.hidden;
                    w.router = w.router.max(experts.experts.len());
                }
            }
        }
        w
    }

    /// Of all buffers together.
    fn sum(&self) -> usize {
        let Self { hidden, q, kv, q_normed, kv_normed, gate_up, gated, parts, gathered, router, angles } = *self;
        // x, normed, out; q, mixed; k, v.
        let parts = [3 * hidden, 2 * q, 2 * kv, q_normed, kv_normed, gate_up, gated, parts, gathered, router, angles];
        parts.iter().fold(0, |sum: usize, &part| sum.saturating_add(part))
    }
}

/// Bytes of activations of one token of a chunk, in the backend's memory.
pub(crate) fn bytes_per_token(spec: &ModelSpec) -> u64 {
    (Widths::of(spec).sum() as u64).saturating_mul(size_of::<f32>() as u64)
}

/// The same where the CPU computes: with what its products prepare of activations, and embeddings on their way.
pub(crate) fn host_bytes_per_token(spec: &ModelSpec) -> u64 {
    let widths = Widths::of(spec);
    let longest = widths.hidden.max(widths.q).max(widths.gated) as u64;
    let beside = longest.saturating_mul(INPUTS_MAX as u64).saturating_add(2 * widths.hidden as u64);
    bytes_per_token(spec).saturating_add(beside.saturating_mul(size_of::<f32>() as u64))
}

/// See the module. Shapes are for `t` tokens of a chunk.
#[derive(Debug)]
pub(super) struct Work {
    /// The state: `[t][hidden]`.
    pub(super) x: Buf,
    /// The state, normed.
    pub(super) normed: Buf,
    pub(super) q: Buf,
    pub(super) k: Buf,
    pub(super) v: Buf,
    pub(super) q_normed: Buf,
    pub(super) k_normed: Buf,
    /// What attention gives: as `q`.
    pub(super) mixed: Buf,
    /// What is added to the state.
    pub(super) out: Buf,
    /// Gate and up: `[t][2 · width]`.
    pub(super) gate_up: Buf,
    /// `silu(gate) · up`: `[t][width]`, or `[t · used][width]` in the order of the experts.
    pub(super) gated: Buf,
    /// What the experts give: `[t · used][hidden]` in their order.
    pub(super) parts: Buf,
    /// The tokens of one expert: `[t][hidden]`.
    pub(super) gathered: Buf,
    /// Scores: `[t][experts]`.
    pub(super) router: Buf,
    pub(super) angles: Buf,
    /// Logits, and for how many rows.
    logits: (Buf, usize),

    pub(super) frequencies: Vec<f32>,
    pub(super) values: Vec<f32>,
    pub(super) bytes: Vec<u8>,
    pub(super) rows: Vec<u64>,
    pub(super) routing: Routing,
    /// What routers choose is written down here, if somebody wants it.
    pub(super) record: Option<Vec<ChosenExpert>>,
    pub(super) halves: Halves,
    pub(super) runs: Vec<RowRun>,
    pub(super) blocks: Vec<BlockId>,
}

/// A router's choice of one expert for one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChosenExpert {
    /// Place of the token in the sequence, from 0.
    pub position: usize,
    /// The layer, from 0.
    pub layer: usize,
    /// The expert, from 0.
    pub expert: u32,
}

/// Which token uses which experts.
#[derive(Debug, Default)]
pub(super) struct Routing {
    /// `[tokens][used]`: expert and weight, the highest score first.
    pub(super) chosen: Vec<(u32, f32)>,
    /// The same as rows of [`Work::parts`].
    pub(super) routes: Vec<Route>,
    /// First row of each expert, and the end of the last's.
    pub(super) first: Vec<u32>,
    /// Token of each row.
    pub(super) token: Vec<u32>,
}

impl Work {
    pub(super) fn new(spec: &ModelSpec, backend: &mut dyn Backend, chunk: usize) -> Result<Self, InferError> {
        let w = Widths::of(spec);
        let mut buffer = |label: &str, width: usize| backend.alloc(label, width.saturating_mul(chunk));
        Ok(Self {
            x: buffer("state", w.hidden)?,
            normed: buffer("normed state", w.hidden)?,
            q: buffer("queries", w.q)?,
            k: buffer("keys", w.kv)?,
            v: buffer("values", w.kv)?,
            q_normed: buffer("normed queries", w.q_normed)?,
            k_normed: buffer("normed keys", w.kv_normed)?,
            mixed: buffer("attention", w.q)?,
            out: buffer("output", w.hidden)?,
            gate_up: buffer("gate and up", w.gate_up)?,
            gated: buffer("gated", w.gated)?,
            parts: buffer("experts' outputs", w.parts)?,
            gathered: buffer("an expert's tokens", w.gathered)?,
            router: buffer("router", w.router)?,
            angles: buffer("angles", w.angles)?,
            logits: (backend.alloc("logits", spec.vocab)?, 1),
            frequencies: Vec::new(),
            values: Vec::new(),
            bytes: Vec::new(),
            rows: Vec::new(),
            routing: Routing::default(),
            record: None,
            halves: Halves::default(),
            runs: Vec::new(),
            blocks: Vec::new(),
        })
    }

    /// A buffer for `rows` rows of logits. There is one for a row, which is what sessions need, from the start; more are
    /// made room for when first asked for.
    pub(super) fn logits(&mut self, backend: &mut dyn Backend, vocab: usize, rows: usize) -> Result<Buf, InferError> {
        let (buf, there) = self.logits;
        if there >= rows {
            return Ok(buf);
        }
        let buf = backend.alloc("logits", vocab.saturating_mul(rows))?;
        self.logits = (buf, rows);
        Ok(buf)
    }
}
