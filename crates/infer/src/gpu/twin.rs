//! Each WGSL kernel again, in plain Rust: the same sums in the same order, so that a test can hold a GPU to it.
//!
//! A GPU's division, square root and exponential may differ in the last bits, and so may the decoding of a quantised
//! weight (one rounding more or less), so tests allow for that. Matrices are dense, `[rows][width]`. What is not here:
//! speed.

use crate::backend::{AttentionShape, RopePairs, RopeShape, Route};
use crate::kernels::dequantise;
use overspill::DType;

/// Positions that `attention` takes at a time, and lanes of `rms_norm`.
const TILE: usize = 64;
/// What stands for "no score yet".
const LOWEST: f32 = -3.0e38;

/// Adds lanes as a tree: each step adds the upper half to the lower one. `lanes.len()` is a power of two.
fn tree(lanes: &mut [f32], add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut step = lanes.len() / 2;
    while step > 0 {
        for lane in 0..step {
            lanes[lane] = add(lanes[lane], lanes[lane + step]);
        }
        step /= 2;
    }
    lanes[0]
}

/// `y[t][row] = Σ_c weights[row][c] · x[t][c]`, with rows shared by `lanes` lanes.
///
/// # Panics
/// If the slices do not fit each other.
#[must_use]
pub fn matmul(dtype: DType, lanes: usize, cols: usize, weights: &[u8], x: &[f32]) -> Vec<f32> {
    let Some(row_bytes) = dtype.row_bytes(cols as u64) else { panic!("{cols} columns are no whole groups of {dtype}") };
    let unit = if dtype.is_float() { 8 } else { 32 };
    let units = cols / unit;
    let rows: Vec<Vec<f32>> = weights
        .chunks_exact(row_bytes as usize)
        .map(|bytes| {
            let mut row = vec![0.0; cols];
            dequantise(dtype, bytes, &mut row);
            row
        })
        .collect();
    let mut y = Vec::with_capacity(rows.len() * x.len() / cols);
    for x in x.chunks_exact(cols) {
        for row in &rows {
            let mut sums = vec![[0.0f32; 4]; lanes];
            for (index, (w, x)) in row.chunks_exact(unit).zip(x.chunks_exact(unit)).enumerate() {
                for (c, (w, x)) in w.iter().zip(x).enumerate() {
                    let sum = &mut sums[index % lanes][c % 4];
                    *sum = w.mul_add(*x, *sum);
                }
            }
            for (w, x) in row[units * unit..].iter().zip(&x[units * unit..]) {
                let sum = &mut sums[units % lanes][0];
                *sum = w.mul_add(*x, *sum);
            }
            let mut lanes: Vec<f32> = sums.iter().map(|s| (s[0] + s[2]) + (s[1] + s[3])).collect();
            y.push(tree(&mut lanes, |a, b| a + b));
        }
    }
    y
}

/// `out[r][i] = x[r][i] / √(mean_i x[r]² + eps) · weight[i]`.
#[must_use]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for x in x.chunks_exact(weight.len()) {
        let mut lanes = [0.0f32; TILE];
        for (i, v) in x.iter().enumerate() {
            lanes[i % TILE] = v.mul_add(*v, lanes[i % TILE]);
        }
        let scale = 1.0 / (tree(&mut lanes, |a, b| a + b) / weight.len() as f32 + eps).sqrt();
        out.extend(x.iter().zip(weight).map(|(x, w)| x * scale * w));
    }
    out
}

/// `x[r][i] += bias[i]`.
pub fn add_bias(x: &mut [f32], bias: &[f32]) {
    x.chunks_exact_mut(bias.len()).for_each(|x| add(x, bias));
}

/// `to[i] += from[i]`.
pub fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// `x[i] = min(max(x[i], -bound), bound)`.
pub fn limit(x: &mut [f32], bound: f32) {
    x.iter_mut().for_each(|x| *x = x.max(-bound).min(bound));
}

/// `gate[i] / (1 + e^(-gate[i])) · up[i]`.
#[must_use]
pub fn silu_mul(gate: &[f32], up: &[f32]) -> Vec<f32> {
    gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
}

/// Turns the pairs of each head. `x` is `[tokens][heads · head_dim]`, `angles` is `[tokens][rotary_dim]`.
pub fn rope(x: &mut [f32], shape: &RopeShape, angles: &[f32]) {
    let half = shape.rotary_dim / 2;
    for (x, angles) in x.chunks_exact_mut(shape.heads * shape.head_dim).zip(angles.chunks_exact(2 * half)) {
        for head in x.chunks_exact_mut(shape.head_dim) {
            for i in 0..half {
                let (first, second) = match shape.pairs {
                    RopePairs::Halves => (i, i + half),
                    RopePairs::Neighbours => (2 * i, 2 * i + 1),
                };
                let (a, b, cos, sin) = (head[first], head[second], angles[i], angles[half + i]);
                head[first] = a.mul_add(cos, -(b * sin));
                head[second] = b.mul_add(cos, a * sin);
            }
        }
    }
}

/// `out[t][h] = softmax_p(scale · q[t][h] · keys[p]) · values[p]` over what each token sees.
#[must_use]
pub fn attention(q: &[f32], keys: &[f32], values: &[f32], shape: &AttentionShape) -> Vec<f32> {
    let (dim, stride) = (shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut out = Vec::with_capacity(q.len());
    for (token, q) in q.chunks_exact(shape.heads * dim).enumerate() {
        let position = shape.start + token;
        let first = (position + 1).saturating_sub(shape.window.unwrap_or(usize::MAX));
        for (head, q) in q.chunks_exact(dim).enumerate() {
            let kv = head / (shape.heads / shape.kv_heads) * dim;
            let row = |p: usize| p % shape.capacity * stride + kv;
            let (mut largest, mut total, mut sums) = (LOWEST, 0.0f32, vec![0.0f32; dim]);
            for tile in (first..=position).step_by(TILE) {
                let seen = tile..(tile + TILE).min(position + 1);
                let scores: Vec<f32> = seen
                    .clone()
                    .map(|p| q.iter().zip(&keys[row(p)..]).fold(0.0f32, |dot, (q, k)| q.mul_add(*k, dot)) * shape.scale)
                    .collect();
                let larger = scores.iter().fold(largest, |a, b| a.max(*b));
                let shrink = (largest - larger).exp();
                largest = larger;
                total *= shrink;
                sums.iter_mut().for_each(|sum| *sum *= shrink);
                for (p, score) in seen.zip(scores) {
                    let weight = (score - larger).exp();
                    total += weight;
                    for (sum, value) in sums.iter_mut().zip(&values[row(p)..]) {
                        *sum = weight.mul_add(*value, *sum);
                    }
                }
            }
            out.extend(sums.iter().map(|sum| sum / total));
        }
    }
    out
}

/// `to[pairs[r].1] = from[pairs[r].0]`, rows of `width`.
pub fn copy_rows(from: &[f32], to: &mut [f32], width: usize, pairs: &[(usize, usize)]) {
    for &(source, target) in pairs {
        to[target * width..(target + 1) * width].copy_from_slice(&from[source * width..(source + 1) * width]);
    }
}

/// `to[t][i] += Σ_rank weight · parts[row][i]`, the sum made first.
pub fn combine(parts: &[f32], routes: &[Route], width: usize, to: &mut [f32]) {
    let tokens = to.len() / width;
    for (to, routes) in to.chunks_exact_mut(width).zip(routes.chunks_exact(routes.len() / tokens)) {
        for (i, to) in to.iter_mut().enumerate() {
            let part = |route: &Route| parts[route.row as usize * width + i];
            *to += routes.iter().fold(0.0f32, |sum, route| route.weight.mul_add(part(route), sum));
        }
    }
}
