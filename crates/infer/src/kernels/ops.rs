//! What a decoder does between matrix products, over f32 slices: norms, softmax, rotary embedding, attention.
//!
//! One thread each; callers share rows or heads among threads. Bits depend on the arguments alone: reductions run in
//! eight lanes over ascending indices, added as in `scalar.rs`, and the exponential is a polynomial of our own, so
//! every instruction set (that can fuse a multiplication with an addition) gives the same. The bodies are plain Rust,
//! compiled once more with AVX2; attention has intrinsics besides. AVX-512 would add nothing, and NEON is what every
//! compiler for aarch64 makes of the bodies.

use super::table::Isa;
use core::ops::Range;

/// The keys and values of one head, in a cache that wraps around.
#[derive(Clone, Copy, Debug)]
pub struct KeyValues<'a> {
    /// `[capacity][stride]`; the head's keys begin at `offset` of each row.
    pub keys: &'a [f32],
    /// As `keys`.
    pub values: &'a [f32],
    /// Elements of a row of the cache (all heads).
    pub stride: usize,
    /// Where in a row the head begins.
    pub offset: usize,
    /// Rows: position `p` is in row `p % capacity`.
    pub capacity: usize,
}

impl<'a> KeyValues<'a> {
    /// The rows of `positions` in order, and whether all of them are there.
    pub(super) fn check(&self, head_dim: usize, positions: &Range<usize>) {
        let fits = |data: &[f32]| {
            let rows = self.capacity.checked_mul(self.stride);
            rows.is_some_and(|n| n <= data.len()) && self.offset.saturating_add(head_dim) <= self.stride
        };
        assert!(fits(self.keys) && fits(self.values), "keys and values shorter than the cache's shape");
        assert!(positions.len() <= self.capacity, "{} positions in {} rows", positions.len(), self.capacity);
    }

    #[inline(always)]
    fn slice(&self, data: &'a [f32], position: usize, head_dim: usize) -> &'a [f32] {
        let at = position % self.capacity * self.stride + self.offset;
        &data[at..at + head_dim]
    }
}

macro_rules! dispatch {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => { $(
        $(#[$doc])*
        pub fn $name($($arg: $type),*) $(-> $result)? {
            match Isa::best() {
                Isa::Unfused => body::$name::<false>($($arg),*),
                Isa::Scalar => body::$name::<true>($($arg),*),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 | Isa::Avx512 | Isa::Avx512Vnni => super::sys::avx2::ops::$name($($arg),*),
                #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
                Isa::Neon | Isa::NeonDot | Isa::NeonMatrix => body::$name::<true>($($arg),*),
            }
        }
    )* };
}

dispatch! {
    /// `out[i] = x[i] / √(mean(x²) + eps) · weight[i]`.
    ///
    /// # Panics
    /// If the lengths differ.
    fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
    /// `x[i] = e^(x[i] − max(x)) / Σ e^(x − max(x))`, in place. Nothing for an empty slice.
    fn softmax(x: &mut [f32]);
    /// `out[i] = gate[i] / (1 + e^(−gate[i])) · up[i]`.
    ///
    /// # Panics
    /// If the lengths differ.
    fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]);
    /// `Σ a[i] · b[i]`.
    ///
    /// # Panics
    /// If the lengths differ.
    fn dot(a: &[f32], b: &[f32]) -> f32;
    /// `y[i] += a · x[i]`, each rounded once.
    ///
    /// # Panics
    /// If the lengths differ.
    fn axpy(a: f32, x: &[f32], y: &mut [f32]);
    /// Turns the pairs `(x[i], x[i + n])` of one head by `n` angles, given as `n` cosines, then `n` sines: the layout
    /// of transformers ("neox" in ggml). Elements from `2 n` on stay.
    ///
    /// # Panics
    /// If there are more angles than pairs.
    fn rope_halves(x: &mut [f32], angles: &[f32]);
    /// As [`rope_halves`], for pairs `(x[2 i], x[2 i + 1])`: GGUF files of the llama architecture.
    ///
    /// # Panics
    /// If there are more angles than pairs.
    fn rope_neighbours(x: &mut [f32], angles: &[f32]);
    /// Attention of the query heads that share one head of keys and values, for one token:
    /// `out[h] = softmax_p(scale · q[h] · key[p]) · value[p]` over `positions`, ascending. `q` and `out` are
    /// `[heads][head_dim]`; `scratch` is for scores and grows once.
    ///
    /// # Panics
    /// If `q` and `out` differ in length or are no whole heads, or the cache does not hold the positions.
    fn attend(
        q: &[f32],
        head_dim: usize,
        kv: &KeyValues<'_>,
        positions: Range<usize>,
        scale: f32,
        scratch: &mut Vec<f32>,
        out: &mut [f32]
    );
}

/// The arithmetic, to be inlined into a function for each instruction set.
pub(super) mod body {
    use super::KeyValues;
    use crate::kernels::input::LANES;
    use crate::kernels::scalar::{add_product, sum_lanes};
    use core::ops::Range;

    /// Below this, e^x is taken for 0; above the other, it stays at e^88.37, just below the largest f32.
    const EXP_MIN: f32 = -87.33;
    const EXP_MAX: f32 = 88.37;
    /// Adding this rounds an f32 below 2^22 to the nearest integer, in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;

    /// e^x within 2 units of the last place. Cephes' `expf`: x = n ln 2 + r, a polynomial in r, then the exponent.
    #[inline(always)]
    pub fn exp<const FUSED: bool>(x: f32) -> f32 {
        let fma = add_product::<FUSED>;
        #[expect(clippy::manual_clamp, reason = "comparisons, so that NaN stays NaN and both paths round alike")]
        let clamped = if x > EXP_MAX {
            EXP_MAX
        } else if x < EXP_MIN {
            EXP_MIN
        } else {
            x
        };
        let shifted = clamped * core::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = fma(n, -0.693_359_4, clamped);
        let r = fma(n, 2.121_944_4e-4, r);
        let mut p = 1.987_569_2e-4;
        p = fma(p, r, 1.398_2e-3);
        p = fma(p, r, 8.333_452e-3);
        p = fma(p, r, 4.166_579_6e-2);
        p = fma(p, r, 1.666_666_5e-1);
        p = fma(p, r, 0.5);
        p = fma(p * r, r, r + 1.0);
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
        if x < EXP_MIN { 0.0 } else { p * power }
    }

    /// Lane-wise sum of `term(i)` over all `i`: lane `i % 8`.
    #[inline(always)]
    fn reduce(n: usize, mut add: impl FnMut(usize, &mut f32)) -> f32 {
        let mut lanes = [0.0; LANES];
        let whole = n / LANES * LANES;
        for start in (0..whole).step_by(LANES) {
            for (l, lane) in lanes.iter_mut().enumerate() {
                add(start + l, lane);
            }
        }
        for i in whole..n {
            add(i, &mut lanes[i - whole]);
        }
        sum_lanes(lanes)
    }

    #[inline(always)]
    pub fn dot<const FUSED: bool>(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        let b = &b[..a.len()];
        reduce(a.len(), |i, lane| *lane = add_product::<FUSED>(a[i], b[i], *lane))
    }

    #[inline(always)]
    pub fn axpy<const FUSED: bool>(a: f32, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len(), y.len());
        for (y, x) in y.iter_mut().zip(x) {
            *y = add_product::<FUSED>(a, *x, *y);
        }
    }

    #[inline(always)]
    pub fn rms_norm<const FUSED: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == weight.len() && x.len() == out.len(), "lengths differ");
        let squares = dot::<FUSED>(x, x);
        let factor = 1.0 / (squares / x.len() as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * weight;
        }
    }

    /// Replaces each x by e^(x − max); the sum of them.
    #[inline(always)]
    pub fn exponentials<const FUSED: bool>(x: &mut [f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let mut chunks = x.chunks_exact(LANES);
        for chunk in chunks.by_ref() {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane = larger(*lane, x);
            }
        }
        let largest = chunks.remainder().iter().chain(&lanes).fold(f32::NEG_INFINITY, |m, &x| larger(m, x));
        for x in x.iter_mut() {
            *x = exp::<FUSED>(*x - largest);
        }
        reduce(x.len(), |i, lane| *lane += x[i])
    }

    #[inline(always)]
    pub fn softmax<const FUSED: bool>(x: &mut [f32]) {
        let sum = exponentials::<FUSED>(x);
        let factor = 1.0 / sum;
        for x in x {
            *x *= factor;
        }
    }

    #[inline(always)]
    pub fn silu_mul<const FUSED: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && gate.len() == out.len(), "lengths differ");
        for ((out, &gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + exp::<FUSED>(-gate)) * up;
        }
    }

    #[inline(always)]
    fn turn<const FUSED: bool>(a: f32, b: f32, cos: f32, sin: f32) -> (f32, f32) {
        (add_product::<FUSED>(a, cos, -(b * sin)), add_product::<FUSED>(b, cos, a * sin))
    }

    #[inline(always)]
    pub fn rope_halves<const FUSED: bool>(x: &mut [f32], angles: &[f32]) {
        let (cos, sin) = angles.split_at(angles.len() / 2);
        let (low, rest) = x.split_at_mut(cos.len());
        let high = &mut rest[..cos.len()];
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = turn::<FUSED>(*a, *b, *cos, *sin);
        }
    }

    #[inline(always)]
    pub fn rope_neighbours<const FUSED: bool>(x: &mut [f32], angles: &[f32]) {
        let (cos, sin) = angles.split_at(angles.len() / 2);
        let x = &mut x[..2 * cos.len()];
        for ((pair, cos), sin) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
            (pair[0], pair[1]) = turn::<FUSED>(pair[0], pair[1], *cos, *sin);
        }
    }

    #[inline(always)]
    pub fn attend<const FUSED: bool>(
        q: &[f32],
        head_dim: usize,
        kv: &KeyValues<'_>,
        positions: Range<usize>,
        scale: f32,
        scratch: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        assert!(q.len() == out.len() && q.len().is_multiple_of(head_dim), "queries are no whole heads");
        kv.check(head_dim, &positions);
        if scratch.len() < positions.len() {
            scratch.resize(positions.len(), 0.0);
        }
        let scores = &mut scratch[..positions.len()];
        for (q, out) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
            for (score, p) in scores.iter_mut().zip(positions.clone()) {
                *score = scale * dot::<FUSED>(q, kv.slice(kv.keys, p, head_dim));
            }
            let sum = exponentials::<FUSED>(scores);
            out.fill(0.0);
            for (&score, p) in scores.iter().zip(positions.clone()) {
                axpy::<FUSED>(score, kv.slice(kv.values, p, head_dim), out);
            }
            let factor = 1.0 / sum;
            for out in out {
                *out *= factor;
            }
        }
    }
}
