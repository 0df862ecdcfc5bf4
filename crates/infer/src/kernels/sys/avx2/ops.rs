//! The decoder's vector operations, compiled for AVX2, and attention by hand.

use super::super::super::ops::{KeyValues, body};
use super::{available, sum_lanes};
use core::arch::x86_64::*;
use core::ops::Range;

macro_rules! compile {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => { $(
        pub(in super::super::super) fn $name($($arg: $type),*) $(-> $result)? {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn inner($($arg: $type),*) $(-> $result)? {
                body::$name::<true>($($arg),*)
            }
            assert!(available(), "AVX2 kernels on a machine without");
            // SAFETY: the features were checked just above.
            unsafe { inner($($arg),*) }
        }
    )* };
}

compile! {
    fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
    fn softmax(x: &mut [f32]);
    fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]);
    fn dot(a: &[f32], b: &[f32]) -> f32;
    fn axpy(a: f32, x: &[f32], y: &mut [f32]);
    fn rope_halves(x: &mut [f32], angles: &[f32]);
    fn rope_neighbours(x: &mut [f32], angles: &[f32]);
}

/// See `ops::attend`. Head sizes that are no multiple of 8 take the plain body.
pub(in super::super::super) fn attend(
    q: &[f32],
    head_dim: usize,
    kv: &KeyValues<'_>,
    positions: Range<usize>,
    scale: f32,
    scratch: &mut Vec<f32>,
    out: &mut [f32],
) {
    assert!(available(), "AVX2 kernels on a machine without");
    // SAFETY: the features were checked just above.
    unsafe { attend_heads(q, head_dim, kv, positions, scale, scratch, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn attend_heads(
    q: &[f32],
    head_dim: usize,
    kv: &KeyValues<'_>,
    positions: Range<usize>,
    scale: f32,
    scratch: &mut Vec<f32>,
    out: &mut [f32],
) {
    if !head_dim.is_multiple_of(8) {
        body::attend::<true>(q, head_dim, kv, positions, scale, scratch, out);
        return;
    }
    assert!(q.len() == out.len() && q.len().is_multiple_of(head_dim), "queries are no whole heads");
    kv.check(head_dim, &positions);
    let n = positions.len();
    if scratch.len() < 2 * n {
        scratch.resize(2 * n, 0.0);
    }
    for (q, out) in q.chunks(2 * head_dim).zip(out.chunks_mut(2 * head_dim)) {
        if q.len() == 2 * head_dim {
            some_heads::<2>(q, head_dim, kv, &positions, scale, &mut scratch[..2 * n], out);
        } else {
            some_heads::<1>(q, head_dim, kv, &positions, scale, &mut scratch[..n], out);
        }
    }
}

/// `H` heads that share keys and values. `kv` was checked, `head_dim` is a multiple of 8.
#[target_feature(enable = "avx2,fma,f16c")]
fn some_heads<const H: usize>(
    q: &[f32],
    head_dim: usize,
    kv: &KeyValues<'_>,
    positions: &Range<usize>,
    scale: f32,
    scores: &mut [f32],
    out: &mut [f32],
) {
    const KEYS: usize = 4;
    let n = positions.len();
    let start = if n == 0 { 0 } else { positions.start % kv.capacity };
    let row = |index: usize| {
        let row = start + index;
        (if row >= kv.capacity { row - kv.capacity } else { row }) * kv.stride + kv.offset
    };
    let key = |index: usize| &kv.keys[row(index)..row(index) + head_dim];
    let mut index = 0;
    while index + KEYS <= n {
        let keys: [&[f32]; KEYS] = core::array::from_fn(|k| key(index + k));
        let products = head_products::<H, KEYS>(q, head_dim, keys);
        for (h, products) in products.iter().enumerate() {
            for (k, &product) in products.iter().enumerate() {
                scores[h * n + index + k] = scale * sum_lanes(product);
            }
        }
        index += KEYS;
    }
    for index in index..n {
        let products = head_products::<H, 1>(q, head_dim, [key(index)]);
        for (h, products) in products.iter().enumerate() {
            scores[h * n + index] = scale * sum_lanes(products[0]);
        }
    }
    let mut factors = [0.0; H];
    for (h, factor) in factors.iter_mut().enumerate() {
        *factor = 1.0 / body::exponentials::<true>(&mut scores[h * n..(h + 1) * n]);
    }
    let values = |index: usize| &kv.values[row(index)..row(index) + head_dim];
    let mut at = 0;
    while at + 32 <= head_dim {
        weighted_sum::<H, 4>(scores, n, at, &values, factors, out);
        at += 32;
    }
    while at < head_dim {
        weighted_sum::<H, 1>(scores, n, at, &values, factors, out);
        at += 8;
    }
}

/// Lane-wise products of `H` queries with `K` keys, all of `head_dim` elements.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn head_products<const H: usize, const K: usize>(q: &[f32], head_dim: usize, keys: [&[f32]; K]) -> [[__m256; K]; H] {
    assert!(q.len() >= H * head_dim && keys.iter().all(|key| key.len() == head_dim));
    let mut lanes = [[_mm256_setzero_ps(); K]; H];
    for i in (0..head_dim / 8 * 8).step_by(8) {
        let mut q_lanes = [_mm256_setzero_ps(); H];
        for (h, q_lanes) in q_lanes.iter_mut().enumerate() {
            // SAFETY: `h * head_dim + i + 8 <= q.len()`, by the assertion.
            *q_lanes = unsafe { _mm256_loadu_ps(q.as_ptr().add(h * head_dim + i)) };
        }
        for (k, key) in keys.iter().enumerate() {
            // SAFETY: `i + 8 <= head_dim`, the key's length.
            let key = unsafe { _mm256_loadu_ps(key.as_ptr().add(i)) };
            for h in 0..H {
                lanes[h][k] = _mm256_fmadd_ps(q_lanes[h], key, lanes[h][k]);
            }
        }
    }
    lanes
}

/// Elements `at..at + 8 V` of `H` heads' outputs: the values weighted by `scores` (`[H][n]`), times a factor.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn weighted_sum<'a, const H: usize, const V: usize>(
    scores: &[f32],
    n: usize,
    at: usize,
    values: &impl Fn(usize) -> &'a [f32],
    factors: [f32; H],
    out: &mut [f32],
) {
    let head_dim = out.len() / H;
    let mut sums = [[_mm256_setzero_ps(); V]; H];
    for index in 0..n {
        let value = &values(index)[at..at + 8 * V];
        for v in 0..V {
            // SAFETY: `8 v + 8 <= 8 V`, the slice's length.
            let value = unsafe { _mm256_loadu_ps(value.as_ptr().add(8 * v)) };
            for (h, sums) in sums.iter_mut().enumerate() {
                sums[v] = _mm256_fmadd_ps(_mm256_set1_ps(scores[h * n + index]), value, sums[v]);
            }
        }
    }
    for (h, sums) in sums.iter().enumerate() {
        let out = &mut out[h * head_dim + at..h * head_dim + at + 8 * V];
        for (v, &sum) in sums.iter().enumerate() {
            // SAFETY: `8 v + 8 <= 8 V`, the slice's length.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * v), _mm256_mul_ps(sum, _mm256_set1_ps(factors[h]))) };
        }
    }
}
