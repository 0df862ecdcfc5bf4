//! The cache of keys and values: its shape, and which rows of it a chunk of tokens is written to.
//!
//! A layer that sees all positions has a row for each; one with a sliding window has a ring that holds the window and
//! the chunk that is being written, so that the chunk's first tokens still find what they see. Values are f32: answers
//! come before capacity. What is not here: the bytes, which are a backend's buffers.

use crate::InferError;
use crate::arch::{Layer, Mixer, ModelSpec};
use crate::backend::{Backend, Buf, RowRun};

/// The cache of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayer {
    /// Keys: `[capacity][width]`.
    pub keys: Buf,
    /// Values: `[capacity][width]`.
    pub values: Buf,
    /// Rows: position `p` is in row `p % capacity`.
    pub capacity: usize,
    /// Elements of a row: all key heads.
    pub width: usize,
}

/// Rows of a layer's cache for sequences of `context` tokens, written at most `chunk` at a time.
#[must_use]
pub fn capacity(layer: &Layer, context: usize, chunk: usize) -> usize {
    match &layer.mixer {
        // A token sees `window` positions; the last of a chunk is `chunk - 1` rows after the first.
        Mixer::Attention(attention) => match attention.window {
            Some(window) => context.min(window.saturating_add(chunk.saturating_sub(1))),
            None => context,
        },
    }
}

fn width(layer: &Layer) -> usize {
    match &layer.mixer {
        Mixer::Attention(attention) => attention.kv_heads * attention.head_dim,
    }
}

/// Bytes of the cache of a whole model.
#[must_use]
pub fn bytes(spec: &ModelSpec, context: usize, chunk: usize) -> u64 {
    let rows = spec.layers.iter().map(|layer| {
        let elements = (capacity(layer, context, chunk) as u64).saturating_mul(width(layer) as u64);
        elements.saturating_mul(2 * size_of::<f32>() as u64)
    });
    rows.fold(0, u64::saturating_add)
}

/// Makes the cache of every layer.
///
/// # Errors
/// As [`Backend::alloc`].
pub fn allocate(
    spec: &ModelSpec,
    backend: &mut dyn Backend,
    context: usize,
    chunk: usize,
) -> Result<Vec<KvLayer>, InferError> {
    let mut layers = Vec::with_capacity(spec.layers.len());
    for layer in &spec.layers {
        let (capacity, width) = (capacity(layer, context, chunk), width(layer));
        let elements = capacity.saturating_mul(width);
        let (keys, values) = (backend.alloc("KV cache", elements)?, backend.alloc("KV cache", elements)?);
        layers.push(KvLayer { keys, values, capacity, width });
    }
    Ok(layers)
}

impl KvLayer {
    /// Where the rows of `tokens` tokens from position `start` on go: one run, or two around the ring's end.
    pub fn runs(&self, start: usize, tokens: usize) -> impl Iterator<Item = RowRun> + use<> {
        let at = start % self.capacity;
        let before = tokens.min(self.capacity - at);
        let runs = [RowRun { from: 0, to: at, rows: before }, RowRun { from: before, to: 0, rows: tokens - before }];
        runs.into_iter().filter(|run| run.rows > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_wrap_around_the_ring() {
        let layer = KvLayer { keys: Buf(0), values: Buf(1), capacity: 8, width: 4 };
        let runs = |start, tokens| layer.runs(start, tokens).collect::<Vec<_>>();
        assert_eq!(runs(2, 3), [RowRun { from: 0, to: 2, rows: 3 }]);
        assert_eq!(runs(14, 4), [RowRun { from: 0, to: 6, rows: 2 }, RowRun { from: 2, to: 0, rows: 2 }]);
        assert_eq!(runs(8, 8), [RowRun { from: 0, to: 0, rows: 8 }]);
    }
}
