//! The decoder: walks a model's layers for a chunk of tokens, asking the engine for each step's weights and a backend
//! for the arithmetic.
//!
//! There is one decoder for all architectures: what a layer does is in its [`crate::arch::Layer`], which steps read its
//! weights in its [`crate::plan::LayerPlan`]. The bits of a token's logits depend on the tokens before it, never on how
//! they were cut into chunks or steps. What is not here: choosing tokens ([`crate::generate`]).

mod experts;
mod model;
mod work;

pub use model::Model;
pub use work::ChosenExpert;
pub(crate) use work::{bytes_per_token, host_bytes_per_token};

use crate::InferError;
use crate::arch::{Attention, Ffn, GateUp, Linear, Mixer, Mlp};
use crate::backend::{AttentionShape, Backend, Leases, RopeShape, View, Weights};
use crate::kernels::dequantise;
use crate::kv::{self, KvLayer};
use crate::plan::{FfnPlan, Group, MixerPlan};
use overspill::{Reservation, Sequence};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use work::Work;

/// Which logits a chunk of tokens shall give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: a prompt's chunk that is not the last.
    None,
    /// Those of the last token.
    Last,
    /// Those of every token.
    All,
}

/// The way through a schedule that a decoder is on.
#[derive(Debug)]
struct Walk {
    /// Whether the schedule has the head.
    head: bool,
    sequence: Sequence,
}

/// The shape of a decoder's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderShape {
    /// Most tokens of a sequence.
    pub context: usize,
    /// Most tokens of one call of [`Decoder::forward`].
    pub chunk: usize,
}

/// A sequence's state, and what computes it.
pub struct Decoder {
    /// First, so that nothing is brought for a sequence whose buffers are being given back.
    walk: Option<Walk>,
    model: Arc<Model>,
    backend: Box<dyn Backend>,
    label: String,
    shape: DecoderShape,
    kv: Vec<KvLayer>,
    work: Work,
    /// Tokens in the cache.
    position: usize,
    _kv_reservation: Option<Reservation>,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("label", &self.label).field("position", &self.position).finish_non_exhaustive()
    }
}

impl Decoder {
    /// An empty sequence of at most `shape.context` tokens. `label` names it where leases are in somebody's way;
    /// `kv_reservation` is kept as long as the cache.
    ///
    /// # Errors
    /// [`InferError::Memory`] or [`InferError::Device`] if there is no room for cache and activations.
    pub fn new(
        model: Arc<Model>,
        mut backend: Box<dyn Backend>,
        label: &str,
        shape: DecoderShape,
        kv_reservation: Option<Reservation>,
    ) -> Result<Self, InferError> {
        let kv = kv::allocate(model.spec(), backend.as_mut(), shape.context, shape.chunk)?;
        let work = Work::new(model.spec(), backend.as_mut(), shape.chunk)?;
        Ok(Self {
            model,
            backend,
            label: label.to_owned(),
            shape,
            kv,
            work,
            walk: None,
            position: 0,
            _kv_reservation: kv_reservation,
        })
    }

    /// Tokens in the cache.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position
    }

    /// Its limits.
    #[must_use]
    pub fn shape(&self) -> DecoderShape {
        self.shape
    }

    /// The backend's name.
    #[must_use]
    pub fn backend_name(&self) -> String {
        self.backend.name()
    }

    /// Forgets all tokens.
    pub fn reset(&mut self) {
        self.position = 0;
        self.rest();
    }

    /// Leaves the schedule: nothing more is brought ahead for this sequence until the next token.
    pub fn rest(&mut self) {
        self.walk = None;
    }

    /// Writes down from now on what routers choose, or no longer. Off at first; costs memory for every token.
    pub fn record_routing(&mut self, on: bool) {
        self.work.record = on.then(Vec::new);
    }

    /// What routers chose since the last call, in the order of computing (a chunk's tokens layer by layer); empty unless
    /// it is [recorded](Self::record_routing).
    pub fn take_routing(&mut self) -> Vec<ChosenExpert> {
        self.work.record.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Computes `tokens` (1 to [`DecoderShape::chunk`]) as the next of the sequence. `logits` becomes
    /// `[rows][vocabulary]`, with as many rows as `want` says. `length` is how long the sequence will be when all the
    /// tokens that are known now have been computed; only rotary scalings that depend on the length look at it.
    /// `cancel` is looked at before each step; a cancelled or failed call leaves the sequence as it was.
    ///
    /// # Errors
    /// [`InferError::Input`] for tokens that are not in the vocabulary, too many, or none; [`InferError::Cancelled`];
    /// [`InferError::Engine`] if weights can't be brought; what the backend reports.
    pub fn forward(
        &mut self,
        tokens: &[u32],
        length: usize,
        want: Logits,
        cancel: &AtomicBool,
        logits: &mut Vec<f32>,
    ) -> Result<(), InferError> {
        self.check(tokens)?;
        let model = Arc::clone(&self.model);
        let walk = match self.walk.take().filter(|walk| walk.head == (want != Logits::None)) {
            Some(walk) => walk,
            None => {
                let head = want != Logits::None;
                Walk { head, sequence: model.sequence(head, &self.label)? }
            }
        };
        let mut pass = Pass {
            model: &model,
            backend: self.backend.as_mut(),
            work: &mut self.work,
            kv: &self.kv,
            sequence: walk.sequence,
            tokens: tokens.len(),
            start: self.position,
            cancel,
        };
        pass.embed(tokens, length)?;
        for layer in 0..model.spec().layers.len() {
            pass.layer(layer)?;
        }
        pass.head(want, logits)?;
        self.walk = Some(Walk { head: walk.head, sequence: pass.sequence });
        self.position += tokens.len();
        Ok(())
    }

    fn check(&self, tokens: &[u32]) -> Result<(), InferError> {
        let input =
            |what: &str, cause: String, cure: &str| InferError::Input { what: what.into(), cause, cure: cure.into() };
        let vocab = self.model.spec().vocab;
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
            let cause = format!("{token} is not in the vocabulary of {vocab}");
            return Err(input("token", cause, "use tokens of this model's own tokenizer"));
        }
        let DecoderShape { context, chunk } = self.shape;
        if tokens.is_empty() || tokens.len() > chunk {
            let cause = format!("{} tokens in one chunk, where 1 to {chunk} are possible", tokens.len());
            return Err(input("chunk", cause, "cut the prompt into smaller chunks"));
        }
        if self.position + tokens.len() > context {
            let cause = format!("{} tokens don't fit a context of {context}", self.position + tokens.len());
            return Err(input("sequence", cause, "use a longer context (--ctx), or fewer tokens"));
        }
        Ok(())
    }
}

/// One chunk of tokens on its way through the layers.
struct Pass<'a> {
    model: &'a Model,
    backend: &'a mut dyn Backend,
    work: &'a mut Work,
    kv: &'a [KvLayer],
    sequence: Sequence,
    tokens: usize,
    /// Position of the first token.
    start: usize,
    cancel: &'a AtomicBool,
}

impl Pass<'_> {
    fn check_cancelled(&self) -> Result<(), InferError> {
        if self.cancel.load(Ordering::Relaxed) { Err(InferError::Cancelled) } else { Ok(()) }
    }

    /// Gathers the tokens' embeddings, and the angles of their positions.
    fn embed(&mut self, tokens: &[u32], length: usize) -> Result<(), InferError> {
        self.check_cancelled()?;
        let spec = self.model.spec();
        let work = &mut *self.work;
        work.rows.clear();
        work.rows.extend(tokens.iter().map(|&token| u64::from(token)));
        work.bytes.resize(tokens.len() * spec.embedding.row_bytes, 0);
        self.model.engine().gather(spec.embedding.table, &work.rows, &mut work.bytes)?;
        work.values.resize(tokens.len() * spec.hidden, 0.0);
        dequantise(spec.embedding.dtype, &work.bytes, &mut work.values);
        self.backend.write(work.x, 0, &work.values)?;

        let rope = self.model.rope();
        let dim = rope.dim;
        work.values.resize(tokens.len() * dim, 0.0);
        if work.frequencies.is_empty() || rope.depends_on_length() {
            rope.frequencies(length, &mut work.frequencies);
        }
        for (index, angles) in work.values.chunks_exact_mut(dim).enumerate() {
            rope.angles(&work.frequencies, self.start + index, angles);
        }
        self.backend.write(work.angles, 0, &work.values)
    }

    /// Multiplies `x` with all matrices of a group; matrix `i`'s results go to `out[i]`.
    fn group(&mut self, group: &Group, x: View, tokens: usize, out: &[View]) -> Result<(), InferError> {
        for step in &group.steps {
            self.check_cancelled()?;
            let set = self.sequence.acquire(step.step)?;
            for run in &step.runs {
                let matrix = &group.matrices[run.matrix];
                let leases = Leases::Set { set: &set, first: run.first };
                let weights = Weights { dtype: matrix.dtype, cols: matrix.cols, pieces: &run.pieces, leases };
                self.backend.matmul(&weights, x, tokens, out[run.matrix])?;
            }
            self.backend.release(set)?;
        }
        Ok(())
    }

    fn bias(&mut self, linear: &Linear, x: View) -> Result<(), InferError> {
        match &linear.bias {
            Some(bias) => self.backend.add_bias(x, self.tokens, &self.model.vector(bias)?),
            None => Ok(()),
        }
    }

    fn layer(&mut self, index: usize) -> Result<(), InferError> {
        let model = self.model;
        let (spec, plan) = (model.spec(), model.plan());
        let (layer, steps) = (&spec.layers[index], &plan.layers[index]);
        let hidden = spec.hidden;
        let (x, normed) = (View::rows(self.work.x, hidden), View::rows(self.work.normed, hidden));
        self.backend.rms_norm(x, self.tokens, &model.vector(&layer.mixer_norm)?, spec.norm_eps, normed)?;
        match (&layer.mixer, &steps.mixer) {
            (Mixer::Attention(attention), MixerPlan::Attention { qkv, o }) => {
                self.attention(attention, index, qkv, o)?;
            }
        }
        self.backend.rms_norm(x, self.tokens, &model.vector(&layer.ffn_norm)?, spec.norm_eps, normed)?;
        match (&layer.ffn, &steps.ffn) {
            (Ffn::Dense(mlp), FfnPlan::Dense { gate_up, down }) => self.dense(mlp, gate_up, down),
            (Ffn::Experts(experts), FfnPlan::Experts { router, step, pieces }) => {
                self.experts(experts, index, router, *step, pieces)
            }
            // The plan was made from this very specification.
            _ => Err(InferError::Device("the plan is of another model: this is a bug".into())),
        }
    }

    /// `x += o(attention(q(n), k(n), v(n)))`, with `n` the normed state.
    fn attention(&mut self, spec: &Attention, layer: usize, qkv: &Group, o: &Group) -> Result<(), InferError> {
        let model = self.model;
        let Attention { heads, kv_heads, head_dim, .. } = *spec;
        let (width, kv_width, tokens) = (heads * head_dim, kv_heads * head_dim, self.tokens);
        let hidden = model.spec().hidden;
        let normed = View::rows(self.work.normed, hidden);
        let (mut q, mut k) = (View::rows(self.work.q, width), View::rows(self.work.k, kv_width));
        let v = View::rows(self.work.v, kv_width);
        self.group(qkv, normed, tokens, &[q, k, v])?;
        self.bias(&spec.q, q)?;
        self.bias(&spec.k, k)?;
        self.bias(&spec.v, v)?;
        if let Some(norm) = &spec.qk_norm {
            let (q_out, k_out) = (View::rows(self.work.q_normed, width), View::rows(self.work.k_normed, kv_width));
            let eps = model.spec().norm_eps;
            for (x, out, vector, heads) in [(q, q_out, &norm.q, heads), (k, k_out, &norm.k, kv_heads)] {
                let (rows, row) = if norm.per_head { (tokens * heads, head_dim) } else { (tokens, heads * head_dim) };
                let (x, out) = (View { stride: row, ..x }, View { stride: row, ..out });
                self.backend.rms_norm(x, rows, &model.vector(vector)?, eps, out)?;
            }
            (q, k) = (q_out, k_out);
        }
        if let Some(limit) = spec.clip {
            self.backend.clamp(q, tokens, width, limit)?;
            self.backend.clamp(k, tokens, kv_width, limit)?;
            self.backend.clamp(v, tokens, kv_width, limit)?;
        }
        for (x, heads) in [(q, heads), (k, kv_heads)] {
            let shape = RopeShape { tokens, heads, head_dim, rotary_dim: model.rope().dim, pairs: spec.pairs };
            self.backend.rope(x, &shape, self.work.angles)?;
        }
        let cache = self.kv[layer];
        for run in cache.runs(self.start, tokens) {
            self.backend.copy_rows(k, View::rows(cache.keys, kv_width), kv_width, &[run])?;
            self.backend.copy_rows(v, View::rows(cache.values, kv_width), kv_width, &[run])?;
        }
        let shape = AttentionShape {
            tokens,
            start: self.start,
            heads,
            kv_heads,
            head_dim,
            window: spec.window,
            capacity: cache.capacity,
            scale: spec.scale,
        };
        let mixed = View::rows(self.work.mixed, width);
        self.backend.attention(q, cache.keys, cache.values, &shape, mixed)?;
        let out = View::rows(self.work.out, hidden);
        self.group(o, mixed, tokens, &[out])?;
        self.bias(&spec.o, out)?;
        self.backend.add(View::rows(self.work.x, hidden), out, tokens, hidden)
    }

    /// `x += down(silu(gate(n)) · up(n))`, with `n` the normed state.
    fn dense(&mut self, mlp: &Mlp, gate_up: &Group, down: &Group) -> Result<(), InferError> {
        let (hidden, width, tokens) = (self.model.spec().hidden, mlp.width, self.tokens);
        let normed = View::rows(self.work.normed, hidden);
        let gate = View::rows(self.work.gate_up, 2 * width);
        let up = View { offset: width, ..gate };
        self.group(gate_up, normed, tokens, &[gate, up])?;
        if let GateUp::Separate { gate: gate_linear, up: up_linear } = &mlp.gate_up {
            self.bias(gate_linear, gate)?;
            self.bias(up_linear, up)?;
        }
        let gated = View::rows(self.work.gated, width);
        self.backend.silu_mul(gate, up, tokens, width, gated)?;
        let out = View::rows(self.work.out, hidden);
        self.group(down, gated, tokens, &[out])?;
        self.bias(&mlp.down, out)?;
        self.backend.add(View::rows(self.work.x, hidden), out, tokens, hidden)
    }

    /// The last norm, the head, and the logits' way to the host.
    fn head(&mut self, want: Logits, logits: &mut Vec<f32>) -> Result<(), InferError> {
        let model = self.model;
        let spec = model.spec();
        let rows = match want {
            Logits::None => {
                logits.clear();
                return Ok(());
            }
            Logits::Last => 1,
            Logits::All => self.tokens,
        };
        let x = View { buf: self.work.x, offset: (self.tokens - rows) * spec.hidden, stride: spec.hidden };
        let normed = View::rows(self.work.normed, spec.hidden);
        self.backend.rms_norm(x, rows, &model.vector(&spec.final_norm)?, spec.norm_eps, normed)?;
        let buf = self.work.logits(self.backend, spec.vocab, rows)?;
        self.group(&model.plan().head, normed, rows, &[View::rows(buf, spec.vocab)])?;
        logits.resize(rows * spec.vocab, 0.0);
        self.backend.read(buf, 0, logits)
    }
}
