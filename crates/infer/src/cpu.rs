//! The backend that computes in host memory, with the kernels of [`crate::kernels`].
//!
//! Every call has computed when it returns. Sessions share the threads, not the buffers. What is not here: arithmetic
//! (the kernels'), and which operations a model needs (the decoder's).

use crate::InferError;
use crate::backend::{AttentionShape, Backend, Buf, RopePairs, RopeShape, Route, RowRun, Vector, View, Weights};
use crate::kernels::ops::KeyValues;
use crate::kernels::{Activations, Input, Kind, Pool, WeightRows, dequantise, matmul, ops};
use overspill::LeaseSet;
use std::cell::RefCell;
use std::sync::Arc;

/// Pieces that one product takes at a time; a longer list is multiplied in parts.
const PIECES_MAX: usize = 32;
/// Prepared activations that are kept: of one input, for weights of two kinds.
pub(crate) const INPUTS_MAX: usize = 2;
/// Least elements of a task, so that dealing it out costs nothing beside it.
const TASK_ELEMENTS: usize = 8192;

/// Heads whose scores a kernel needs at a time, at most.
const HEADS_AT_ONCE_MAX: usize = 2;

std::thread_local! {
    /// Scores of one token's attention; as long as the longest context, once a thread.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Activations as prepared for a product, and what they were prepared from.
#[derive(Debug, Default)]
struct Prepared {
    input: Input,
    /// (buffer, its version, offset, tokens, columns), if there are any.
    key: Option<(Buf, u64, usize, usize, usize)>,
    used: u64,
}

/// Computes in host memory. One a session.
#[derive(Debug)]
pub struct CpuBackend {
    pool: Arc<Pool>,
    activations: Activations,
    buffers: Vec<Vec<f32>>,
    /// Counts the writes to each buffer, so that prepared activations are known to be stale.
    versions: Vec<u64>,
    prepared: [Prepared; INPUTS_MAX],
    clock: u64,
    /// A norm or bias in f32.
    vector: Vec<f32>,
}

impl CpuBackend {
    /// A backend without buffers, that shares `pool` with others.
    #[must_use]
    pub fn new(pool: Arc<Pool>, activations: Activations) -> Self {
        Self {
            pool,
            activations,
            buffers: Vec::new(),
            versions: Vec::new(),
            prepared: Default::default(),
            clock: 0,
            vector: Vec::new(),
        }
    }

    /// Takes a buffer out, to be written while others are read. [`Self::put`] puts it back.
    fn take(&mut self, buf: Buf) -> Vec<f32> {
        self.versions[buf.0 as usize] += 1;
        std::mem::take(&mut self.buffers[buf.0 as usize])
    }

    fn put(&mut self, buf: Buf, data: Vec<f32>) {
        self.buffers[buf.0 as usize] = data;
    }

    /// From a view's first element to the end of its last row.
    fn part(&self, view: View, rows: usize, width: usize) -> &[f32] {
        let (start, end) = span(view, rows, width);
        &self.buffers[view.buf.0 as usize][start..end]
    }

    fn decode(&mut self, vector: &Vector<'_>) {
        self.vector.resize(vector.len, 0.0);
        dequantise(vector.dtype, vector.bytes(), &mut self.vector);
    }

    /// Index of the activations in `x`, prepared for these weights.
    fn prepare(&mut self, weights: &Weights<'_>, x: View, tokens: usize) -> usize {
        assert_eq!(x.stride, weights.cols, "a product's input is contiguous");
        let kind = Kind::of(weights.dtype, self.activations);
        let key = Some((x.buf, self.versions[x.buf.0 as usize], x.offset, tokens, weights.cols));
        self.clock += 1;
        let known = self.prepared.iter().position(|p| p.key == key && p.input.kind() == kind);
        let index = known.unwrap_or_else(|| {
            let oldest = (0..INPUTS_MAX).min_by_key(|&i| self.prepared[i].used).unwrap_or(0);
            let (start, end) = span(x, tokens, weights.cols);
            let values = &self.buffers[x.buf.0 as usize][start..end];
            let prepared = &mut self.prepared[oldest];
            prepared.input.prepare(&self.pool, values, tokens, weights.cols, weights.dtype, self.activations);
            prepared.key = key;
            oldest
        });
        self.prepared[index].used = self.clock;
        index
    }
}

fn span(view: View, rows: usize, width: usize) -> (usize, usize) {
    let length = if rows == 0 { 0 } else { (rows - 1) * view.stride + width };
    (view.offset, view.offset + length)
}

/// Calls `job(row, elements)` for each row of a view into `data`, on all threads if there is enough to do.
fn for_rows(
    pool: &Pool,
    data: &mut [f32],
    view: View,
    (rows, width): (usize, usize),
    job: &(dyn Fn(usize, &mut [f32]) + Sync),
) {
    assert!(width <= view.stride, "rows of a view overlap");
    let (start, end) = span(view, rows, width);
    let rows_per_task = (TASK_ELEMENTS / width.max(1)).clamp(1, rows.max(1));
    pool.for_chunks(&mut data[start..end], rows_per_task * view.stride, &|task, part| {
        for (row, part) in part.chunks_mut(view.stride).enumerate() {
            job(task * rows_per_task + row, &mut part[..width]);
        }
    });
}

/// Element at which row `row` of a part returned by [`CpuBackend::part`] begins, to its end.
fn row(part: &[f32], view: View, row: usize, width: usize) -> &[f32] {
    &part[row * view.stride..row * view.stride + width]
}

impl Backend for CpuBackend {
    fn name(&self) -> String {
        format!("cpu ({} threads)", self.pool.threads())
    }

    fn alloc(&mut self, label: &str, elements: usize) -> Result<Buf, InferError> {
        // `vec!` would abort the process; pages are backed when they are first written either way.
        Vec::<f32>::new().try_reserve_exact(elements).map_err(|error| InferError::Memory {
            what: label.to_owned(),
            bytes: (elements as u64).saturating_mul(4),
            cause: error.to_string(),
            cure: "use a shorter context (--ctx)".into(),
        })?;
        self.buffers.push(vec![0.0; elements]);
        self.versions.push(0);
        Ok(Buf(self.buffers.len() as u32 - 1))
    }

    fn write(&mut self, to: Buf, offset: usize, values: &[f32]) -> Result<(), InferError> {
        let mut data = self.take(to);
        data[offset..offset + values.len()].copy_from_slice(values);
        self.put(to, data);
        Ok(())
    }

    fn read(&mut self, from: Buf, offset: usize, values: &mut [f32]) -> Result<(), InferError> {
        values.copy_from_slice(&self.buffers[from.0 as usize][offset..offset + values.len()]);
        Ok(())
    }

    fn release(&mut self, leases: LeaseSet) -> Result<(), InferError> {
        drop(leases);
        Ok(())
    }

    fn copy_rows(&mut self, from: View, to: View, width: usize, runs: &[RowRun]) -> Result<(), InferError> {
        let mut data = self.take(to.buf);
        for run in runs {
            for index in 0..run.rows {
                let source = from.offset + (run.from + index) * from.stride;
                let target = to.offset + (run.to + index) * to.stride;
                let source = &self.buffers[from.buf.0 as usize][source..source + width];
                data[target..target + width].copy_from_slice(source);
            }
        }
        self.put(to.buf, data);
        Ok(())
    }

    fn matmul(&mut self, weights: &Weights<'_>, x: View, tokens: usize, y: View) -> Result<(), InferError> {
        let index = self.prepare(weights, x, tokens);
        let mut data = self.take(y.buf);
        let (cols, dtype) = (weights.cols, weights.dtype);
        for first in (0..weights.pieces.len()).step_by(PIECES_MAX) {
            let mut rows = [WeightRows { row: 0, rows: 0, bytes: &[] }; PIECES_MAX];
            let count = PIECES_MAX.min(weights.pieces.len() - first);
            for (slot, index) in rows[..count].iter_mut().zip(first..) {
                let piece = &weights.pieces[index];
                let bytes = weights.source(index).bytes(piece);
                *slot = WeightRows { row: piece.row as usize, rows: piece.rows as usize, bytes };
            }
            matmul(
                &self.pool,
                dtype,
                cols,
                &rows[..count],
                &self.prepared[index].input,
                &mut data[y.offset..],
                y.stride,
            );
        }
        self.put(y.buf, data);
        Ok(())
    }

    fn rms_norm(&mut self, x: View, rows: usize, weight: &Vector<'_>, eps: f32, out: View) -> Result<(), InferError> {
        self.decode(weight);
        let mut data = self.take(out.buf);
        let (width, source) = (weight.len, self.part(x, rows, weight.len));
        for_rows(&self.pool, &mut data, out, (rows, width), &|index, out| {
            ops::rms_norm(row(source, x, index, width), &self.vector, eps, out);
        });
        self.put(out.buf, data);
        Ok(())
    }

    fn add_bias(&mut self, x: View, rows: usize, bias: &Vector<'_>) -> Result<(), InferError> {
        self.decode(bias);
        let mut data = self.take(x.buf);
        for_rows(&self.pool, &mut data, x, (rows, bias.len), &|_, x| {
            x.iter_mut().zip(&self.vector).for_each(|(x, bias)| *x += bias);
        });
        self.put(x.buf, data);
        Ok(())
    }

    fn add(&mut self, to: View, from: View, rows: usize, width: usize) -> Result<(), InferError> {
        let mut data = self.take(to.buf);
        let source = self.part(from, rows, width);
        for_rows(&self.pool, &mut data, to, (rows, width), &|index, to| {
            to.iter_mut().zip(row(source, from, index, width)).for_each(|(to, from)| *to += from);
        });
        self.put(to.buf, data);
        Ok(())
    }

    fn clamp(&mut self, x: View, rows: usize, width: usize, limit: f32) -> Result<(), InferError> {
        let mut data = self.take(x.buf);
        for_rows(&self.pool, &mut data, x, (rows, width), &|_, x| {
            x.iter_mut().for_each(|x| *x = x.clamp(-limit, limit));
        });
        self.put(x.buf, data);
        Ok(())
    }

    fn silu_mul(&mut self, gate: View, up: View, rows: usize, width: usize, out: View) -> Result<(), InferError> {
        let mut data = self.take(out.buf);
        let (gates, ups) = (self.part(gate, rows, width), self.part(up, rows, width));
        for_rows(&self.pool, &mut data, out, (rows, width), &|index, out| {
            ops::silu_mul(row(gates, gate, index, width), row(ups, up, index, width), out);
        });
        self.put(out.buf, data);
        Ok(())
    }

    fn rope(&mut self, x: View, shape: &RopeShape, angles: Buf) -> Result<(), InferError> {
        let mut data = self.take(x.buf);
        let RopeShape { tokens, heads, head_dim, rotary_dim, pairs } = *shape;
        let angles = &self.buffers[angles.0 as usize];
        for_rows(&self.pool, &mut data, x, (tokens, heads * head_dim), &|token, x| {
            let angles = &angles[token * rotary_dim..(token + 1) * rotary_dim];
            for head in x.chunks_exact_mut(head_dim) {
                match pairs {
                    RopePairs::Halves => ops::rope_halves(&mut head[..rotary_dim], angles),
                    RopePairs::Neighbours => ops::rope_neighbours(&mut head[..rotary_dim], angles),
                }
            }
        });
        self.put(x.buf, data);
        Ok(())
    }

    fn attention(
        &mut self,
        q: View,
        keys: Buf,
        values: Buf,
        shape: &AttentionShape,
        out: View,
    ) -> Result<(), InferError> {
        let AttentionShape { tokens, start, heads, kv_heads, head_dim, window, capacity, scale } = *shape;
        assert_eq!(out.stride, heads * head_dim, "attention's output is contiguous");
        let mut data = self.take(out.buf);
        let queries = self.part(q, tokens, heads * head_dim);
        let (keys, values) = (&self.buffers[keys.0 as usize], &self.buffers[values.0 as usize]);
        let group = heads / kv_heads * head_dim;
        let (begin, end) = span(out, tokens, heads * head_dim);
        self.pool.for_chunks(&mut data[begin..end], group, &|index, out| {
            let (token, head) = (index / kv_heads, index % kv_heads);
            let end = start + token + 1;
            let first = window.map_or(0, |window| end.saturating_sub(window));
            let kv = KeyValues { keys, values, stride: kv_heads * head_dim, offset: head * head_dim, capacity };
            let q = &row(queries, q, token, heads * head_dim)[head * group..(head + 1) * group];
            SCORES.with_borrow_mut(|scores| {
                // Once for the whole context, and not whenever it has doubled.
                let seen_max = window.map_or(capacity, |window| window.min(capacity));
                scores.reserve((seen_max * HEADS_AT_ONCE_MAX).saturating_sub(scores.len()));
                ops::attend(q, head_dim, &kv, first..end, scale, scores, out);
            });
        });
        self.put(out.buf, data);
        Ok(())
    }

    fn combine(
        &mut self,
        parts: View,
        routes: &[Route],
        tokens: usize,
        width: usize,
        to: View,
    ) -> Result<(), InferError> {
        let mut data = self.take(to.buf);
        let experts = routes.len() / tokens.max(1);
        let source = &self.buffers[parts.buf.0 as usize][parts.offset..];
        for_rows(&self.pool, &mut data, to, (tokens, width), &|token, to| {
            let routes = &routes[token * experts..(token + 1) * experts];
            for (index, to) in to.iter_mut().enumerate() {
                let mut sum = 0.0f32;
                for route in routes {
                    sum += route.weight * source[route.row as usize * parts.stride + index];
                }
                *to += sum;
            }
        });
        self.put(to.buf, data);
        Ok(())
    }
}
