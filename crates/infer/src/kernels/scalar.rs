//! The kernels in plain Rust: the twins that SIMD kernels are tested against, and what runs where no SIMD kernel
//! exists.
//!
//! The order of every reduction is fixed here, and a SIMD kernel must keep to it:
//! - f32 activations: lane l of 8 sums the products of columns l, l+8, l+16, … by fused multiply-add from 0; then
//!   lanes are added as ((0+4)+(2+6)) + ((1+5)+(3+7)).
//! - 8-bit activations: integer sums within a group are exact, so their order is free; then, group by group,
//!   sum = fma(weight scale × activation scale, integer sum, sum), followed for types with a minimum by one more fma
//!   with it.
//!
//! So an output depends on its row and its token alone. What is not here: tiling, which would change nothing but speed.

use super::blocks::{Decode, Floor, Group32, Group256};
use super::input::{Input, LANES};
use super::sys::columns::Out;
use core::marker::PhantomData;

/// Elements decoded at a time.
const CHUNK: usize = 256;
/// Tokens that share one decoding.
const TOKENS: usize = 8;

/// How a product is added: fused (one rounding) or not, where the machine has no fused instruction.
#[inline(always)]
pub(super) fn add_product<const FUSED: bool>(a: f32, b: f32, sum: f32) -> f32 {
    if FUSED { a.mul_add(b, sum) } else { a * b + sum }
}

/// The sum of 8 lanes, in the order that all kernels share.
#[inline(always)]
pub(crate) fn sum_lanes(v: [f32; LANES]) -> f32 {
    ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
}

/// Some rows against all tokens: writes `out`.
pub(super) type Rows = fn(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>);

/// f32 activations.
#[inline(always)]
pub(super) fn rows_f32<D: Decode, const FUSED: bool>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let cols = x.cols();
    let row_bytes = cols / D::ELEMENTS * D::GROUP_BYTES;
    for first in (0..x.batch()).step_by(TOKENS) {
        let tokens = TOKENS.min(x.batch() - first);
        for row in 0..rows {
            let row_weights = &weights[row * row_bytes..(row + 1) * row_bytes];
            let mut lanes = [[0.0f32; LANES]; TOKENS];
            let mut decoded = [0.0f32; CHUNK];
            for start in (0..cols).step_by(CHUNK) {
                let n = CHUNK.min(cols - start);
                let bytes = |elements: usize| elements / D::ELEMENTS * D::GROUP_BYTES;
                super::blocks::decode_all::<D>(&row_weights[bytes(start)..bytes(start + n)], &mut decoded[..n]);
                let padded = n.next_multiple_of(LANES);
                decoded[n..padded].fill(0.0);
                for (token, lanes) in lanes[..tokens].iter_mut().enumerate() {
                    let x = &x.f32(first + token)[start..start + padded];
                    for (w, x) in decoded[..padded].chunks_exact(LANES).zip(x.chunks_exact(LANES)) {
                        for l in 0..LANES {
                            lanes[l] = add_product::<FUSED>(w[l], x[l], lanes[l]);
                        }
                    }
                }
            }
            for (token, lanes) in lanes[..tokens].iter().enumerate() {
                out.get(first + token, row, 1)[0] = sum_lanes(*lanes);
            }
        }
    }
}

/// Something that meets 8-bit activations, one row at a time.
pub(super) trait Quantised {
    /// The products of one row with up to [`TOKENS`] tokens from `first` on.
    fn row<const FUSED: bool>(row: &[u8], x: &Input, first: usize, sums: &mut [f32]);
    /// Bytes of a row.
    fn row_bytes(cols: usize) -> usize;
}

/// Types of 32 elements a group.
pub(super) struct Dot32<Q>(PhantomData<Q>);
/// Types of 256 elements a group.
pub(super) struct Dot256<Q>(PhantomData<Q>);

impl<Q: Group32> Quantised for Dot32<Q> {
    #[inline(always)]
    fn row<const FUSED: bool>(row: &[u8], x: &Input, first: usize, sums: &mut [f32]) {
        for (group, weights) in row.chunks_exact(Q::BYTES).enumerate() {
            let (scale, min) = Q::scales(weights);
            let mut w = [0; 32];
            Q::unsigned(weights, &mut w);
            for (token, sum) in sums.iter_mut().enumerate() {
                let x = x.group32(first + token);
                let q = &x.q[32 * group..32 * group + 32];
                let signed = |w: u8| i32::from(w) - i32::from(Q::OFFSET);
                let dot: i32 = w.iter().zip(q).map(|(&w, &q)| signed(w) * i32::from(q)).sum();
                *sum = add_product::<FUSED>(scale * x.scales[group], dot as f32, *sum);
                if Q::HAS_MIN {
                    *sum = add_product::<FUSED>(min, x.scaled_sums[group], *sum);
                }
            }
        }
    }

    fn row_bytes(cols: usize) -> usize {
        cols / 32 * Q::BYTES
    }
}

impl<Q: Group256> Quantised for Dot256<Q> {
    #[inline(always)]
    fn row<const FUSED: bool>(row: &[u8], x: &Input, first: usize, sums: &mut [f32]) {
        for (group, weights) in row.chunks_exact(Q::BYTES).enumerate() {
            let scales = Q::scales(weights);
            let mut w = [0; 256];
            Q::unsigned(weights, &mut w);
            for (token, sum) in sums.iter_mut().enumerate() {
                let x = x.group256(first + token);
                let q = &x.q[256 * group..256 * group + 256];
                let (mut dot, mut mins) = (0, 0);
                for (sub, (w, q)) in w.chunks_exact(16).zip(q.chunks_exact(16)).enumerate() {
                    let part: i32 = w.iter().zip(q).map(|(&w, &q)| i32::from(w) * i32::from(q)).sum();
                    dot += i32::from(scales.sub[sub]) * part;
                    mins += i32::from(scales.min[sub]) * i32::from(x.sums[16 * group + sub]);
                }
                let scale = scales.scale * x.scales[group];
                if Q::FLOOR == Floor::Offset32 {
                    *sum = add_product::<FUSED>(scale, (dot - mins) as f32, *sum);
                } else {
                    *sum = add_product::<FUSED>(scale, dot as f32, *sum);
                    *sum = add_product::<FUSED>(-(scales.min_scale * x.scales[group]), mins as f32, *sum);
                }
            }
        }
    }

    fn row_bytes(cols: usize) -> usize {
        cols / 256 * Q::BYTES
    }
}

/// 8-bit activations.
#[inline(always)]
pub(super) fn rows_q8<K: Quantised, const FUSED: bool>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let row_bytes = K::row_bytes(x.cols());
    for first in (0..x.batch()).step_by(TOKENS) {
        let tokens = TOKENS.min(x.batch() - first);
        for row in 0..rows {
            let mut sums = [0.0; TOKENS];
            K::row::<FUSED>(&weights[row * row_bytes..(row + 1) * row_bytes], x, first, &mut sums[..tokens]);
            for (token, &sum) in sums[..tokens].iter().enumerate() {
                out.get(first + token, row, 1)[0] = sum;
            }
        }
    }
}
