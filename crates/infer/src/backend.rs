//! The seam between the decoder and what computes: buffers of f32 activations, and the few operations of a decoder.
//!
//! A backend belongs to one session and is called by one thread; what sessions share (threads, pipelines) it shares
//! behind this seam. Calls have the effect of being carried out one after the other; a GPU may queue them, and only
//! [`Backend::read`] waits. Weights come as leased pieces: a matrix that is larger than a step's share of the budget
//! arrives in several calls, each with some of its rows.
//!
//! # Rules for every operation
//! - A [`View`] is a matrix of f32 in a buffer: row `r` begins at element `offset + r * stride`.
//! - A buffer that a call writes is not otherwise read by it; operations in place (bias, add, clamp, rope, combine)
//!   say so by having only one view of it.
//! - The bits of each output depend on its own inputs alone, not on how many tokens or rows come in one call
//!   (invariant 1): sums run over columns, positions and experts in ascending order of the index or rank, or in any
//!   order that depends on their number alone.
//! - Shapes are the decoder's business and have been checked when the model was opened; a view that does not lie in
//!   its buffer is a bug and may panic.
//!
//! What is not here: which operations a model needs, and when. That is the decoder's.

use crate::InferError;
use overspill::{DType, Lease, LeaseSet, Piece};

/// A buffer of a backend, by number. Buffers live as long as their backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Buf(pub u32);

/// A matrix of f32 in a buffer: row `r` begins at element `offset + r * stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The buffer.
    pub buf: Buf,
    /// Element at which row 0 begins.
    pub offset: usize,
    /// Elements from one row to the next; at least the width that a call works on.
    pub stride: usize,
}

impl View {
    /// Rows of `width` elements, one after the other from the buffer's start.
    #[must_use]
    pub fn rows(buf: Buf, width: usize) -> Self {
        Self { buf, offset: 0, stride: width }
    }
}

/// Rows to copy: `rows` rows from `from` on become the rows from `to` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowRun {
    /// First row in the source.
    pub from: usize,
    /// First row in the destination.
    pub to: usize,
    /// How many.
    pub rows: usize,
}

/// One expert's share in a token's output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    /// The row that the expert computed for this token.
    pub row: u32,
    /// How much it counts.
    pub weight: f32,
}

/// Where the bytes of a weight are.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// In a tier; the piece says where in the slot. On a GPU, ask the lease for its buffer.
    Leased(&'a Lease),
    /// In plain memory, exactly the piece's bytes: weights that no engine manages.
    Host(&'a [u8]),
}

impl<'a> Source<'a> {
    /// The piece's bytes, unaligned; empty if they are not in host memory.
    #[must_use]
    pub fn bytes(&self, piece: &Piece) -> &'a [u8] {
        match *self {
            Self::Leased(lease) => lease.piece(piece),
            Self::Host(bytes) => bytes,
        }
    }
}

/// Leases (or plain bytes) of a matrix's pieces, in the order of the pieces.
#[derive(Clone, Copy, Debug)]
pub enum Leases<'a> {
    /// The lease of piece `i` is lease `first + i` of the set.
    Set {
        /// The set.
        set: &'a LeaseSet,
        /// The first piece's place in it.
        first: usize,
    },
    /// The bytes of each piece.
    Host(&'a [&'a [u8]]),
}

/// Some rows of a matrix `[rows][cols]`, as they lie in the file.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// Element type.
    pub dtype: DType,
    /// Length of a row, in elements.
    pub cols: usize,
    /// Rows that are here, by piece, ascending: [`Piece::row`] counts from the matrix's (the expert's) first row.
    pub pieces: &'a [Piece],
    /// Where their bytes are.
    pub leases: Leases<'a>,
}

impl<'a> Weights<'a> {
    /// Where the bytes of piece `index` are.
    ///
    /// # Panics
    /// If there are fewer pieces.
    #[must_use]
    pub fn source(&self, index: usize) -> Source<'a> {
        match self.leases {
            Leases::Set { set, first } => Source::Leased(set.lease(first + index)),
            Leases::Host(bytes) => Source::Host(bytes[index]),
        }
    }
}

/// A vector of weights (a norm, a bias), whole. Its place in a slot is a multiple of 256 bytes if it shares the slot.
#[derive(Clone, Copy, Debug)]
pub struct Vector<'a> {
    /// Element type.
    pub dtype: DType,
    /// Elements.
    pub len: usize,
    /// Where in its block it is.
    pub piece: Piece,
    /// Where its bytes are.
    pub source: Source<'a>,
}

impl<'a> Vector<'a> {
    /// Its bytes, unaligned; empty if they are not in host memory.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.source.bytes(&self.piece)
    }
}

/// Which elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// Element `i` with `i + rotary/2` (transformers; "neox" in ggml).
    Halves,
    /// Element `2i` with `2i + 1` (GGUF files of the llama architecture; "norm" in ggml).
    Neighbours,
}

/// What [`Backend::rope`] turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeShape {
    /// Tokens.
    pub tokens: usize,
    /// Heads of a token, one after the other in a row of the view.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements at the start of each head that turn: even, at most `head_dim`.
    pub rotary_dim: usize,
    /// Which turn together.
    pub pairs: RopePairs,
}

/// What [`Backend::attention`] attends to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Tokens of this call, at positions `start..start + tokens`. Their keys and values are in the cache already.
    pub tokens: usize,
    /// Position of the first.
    pub start: usize,
    /// Query heads; query head `h` reads key head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head, of queries, keys and values alike.
    pub head_dim: usize,
    /// How many positions a token sees, itself included; all before it if `None`.
    pub window: Option<usize>,
    /// Rows of the cache: position `p` is in row `p % capacity`. At least what any token of this call sees, and the
    /// tokens after it.
    pub capacity: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// What computes. See the module for the rules that all operations share.
pub trait Backend: Send {
    /// Its name in reports: `cpu (avx2, 2 threads)`, the adapter's name.
    fn name(&self) -> String;

    /// A buffer of `elements` zeros; `label` names it in errors and debuggers.
    ///
    /// # Errors
    /// [`InferError::Memory`] if there is no room, [`InferError::Device`] if the device can't bind so much.
    fn alloc(&mut self, label: &str, elements: usize) -> Result<Buf, InferError>;

    /// Copies values from the host into a buffer, from element `offset` on.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn write(&mut self, to: Buf, offset: usize, values: &[f32]) -> Result<(), InferError>;

    /// Copies elements of a buffer from `offset` on to the host, after all that was asked for before.
    ///
    /// # Errors
    /// [`InferError::Device`]: also for what an earlier operation met.
    fn read(&mut self, from: Buf, offset: usize, values: &mut [f32]) -> Result<(), InferError>;

    /// Takes leases over when the last operation that reads them has been asked for. A GPU submits its work and gives
    /// them back when that is done; a CPU has computed already and drops them.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn release(&mut self, leases: LeaseSet) -> Result<(), InferError>;

    /// Copies rows of `width` elements. Destinations of different runs don't overlap.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn copy_rows(&mut self, from: View, to: View, width: usize, runs: &[RowRun]) -> Result<(), InferError>;

    /// `y[t][row] = Σ_c weights[row][c] · x[t][c]` for the rows that are here and each of `tokens` tokens. `x` is
    /// `[tokens][cols]` with a stride of `cols`; `y` is `[tokens][≥ rows]`, of which other rows stay as they are.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn matmul(&mut self, weights: &Weights<'_>, x: View, tokens: usize, y: View) -> Result<(), InferError>;

    /// `out[r][i] = x[r][i] / √(mean_i x[r]² + eps) · weight[i]`, with `weight.len` the width. Whole rows, or heads: a
    /// head is a row of a view whose stride is the head's size.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn rms_norm(&mut self, x: View, rows: usize, weight: &Vector<'_>, eps: f32, out: View) -> Result<(), InferError>;

    /// `x[r][i] += bias[i]`.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn add_bias(&mut self, x: View, rows: usize, bias: &Vector<'_>) -> Result<(), InferError>;

    /// `to[r][i] += from[r][i]`.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn add(&mut self, to: View, from: View, rows: usize, width: usize) -> Result<(), InferError>;

    /// `x[r][i] = min(max(x[r][i], -limit), limit)`.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn clamp(&mut self, x: View, rows: usize, width: usize, limit: f32) -> Result<(), InferError>;

    /// `out[r][i] = gate[r][i] / (1 + e^(-gate[r][i])) · up[r][i]`. `gate` and `up` may be views of one buffer.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn silu_mul(&mut self, gate: View, up: View, rows: usize, width: usize, out: View) -> Result<(), InferError>;

    /// Turns the pairs of each head by its token's angles, in place. `x` is `[tokens][heads · head_dim]`; `angles` is
    /// `[tokens][rotary_dim]`: `rotary_dim / 2` cosines, then as many sines. A pair `(a, b)` becomes
    /// `(a·cos − b·sin, b·cos + a·sin)`.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn rope(&mut self, x: View, shape: &RopeShape, angles: Buf) -> Result<(), InferError>;

    /// `out[t][h] = softmax_p(scale · q[t][h] · keys[p]) · values[p]` over the positions `p` that the token sees:
    /// those up to its own, and within its window. `q` and `out` are `[tokens][heads · head_dim]`; `keys` and `values`
    /// are `[capacity][kv_heads · head_dim]`.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn attention(
        &mut self,
        q: View,
        keys: Buf,
        values: Buf,
        shape: &AttentionShape,
        out: View,
    ) -> Result<(), InferError>;

    /// `to[t][i] += Σ_rank routes[t][rank].weight · parts[routes[t][rank].row][i]`, the sum made first, in the order of
    /// the ranks. `routes` is `[tokens][routes.len() / tokens]`.
    ///
    /// # Errors
    /// [`InferError::Device`].
    fn combine(
        &mut self,
        parts: View,
        routes: &[Route],
        tokens: usize,
        width: usize,
        to: View,
    ) -> Result<(), InferError>;
}
