//! Kernels for x86-64 with AVX2, FMA and F16C.
//!
//! Each keeps to the order of reduction that `scalar.rs` states, so its results equal its twin's to the bit. The
//! functions of [`table`] are safe to call because the table is handed out only where [`available`] is true.

pub(super) mod f32;
pub(in super::super) mod ops;
pub(super) mod packed;
mod panel;
pub(super) mod q8;

use super::super::blocks;
use super::super::input::{self, Input, Kind};
use super::super::table::{Kernels, Table};
use super::columns::Out;
use core::arch::x86_64::*;
use f32::{By32, By256, Source};
use q8::{Simd32, Simd256};

/// Whether this machine has what these kernels need.
pub(in super::super) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The kernels; panics where they cannot run.
pub(in super::super) fn table() -> &'static Table {
    static TABLE: Table = [
        float::<f32::F32>(),
        float::<f32::F16>(),
        float::<f32::Bf16>(),
        by32::<blocks::Q4_0>(),
        by32::<blocks::Q4_1>(),
        by32::<blocks::Q5_0>(),
        by32::<blocks::Q5_1>(),
        by32::<blocks::Q8_0>(),
        by256::<blocks::Q4K>(),
        by256::<blocks::Q5K>(),
        by256::<blocks::Q6K>(),
    ];
    assert!(available(), "AVX2 kernels on a machine without");
    &TABLE
}

const fn float<S: Source>() -> Kernels {
    Kernels { decode: decode::<S>, f32: rows_f32::<S>, q8: rows_f32::<S> }
}

const fn by32<Q: Simd32>() -> Kernels {
    Kernels { decode: decode::<By32<Q>>, f32: rows_f32::<By32<Q>>, q8: rows32::<Q> }
}

const fn by256<Q: Simd256>() -> Kernels {
    Kernels { decode: decode::<By256<Q>>, f32: rows_f32::<By256<Q>>, q8: rows256::<Q> }
}

pub(super) fn decode<S: Source>(bytes: &[u8], out: &mut [f32]) {
    // SAFETY: reachable only through `table`, which checks the features.
    unsafe { f32::decode::<S>(bytes, out) }
}

pub(super) fn rows_f32<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    // SAFETY: reachable only through `table`, which checks the features.
    unsafe { f32::rows::<S>(weights, rows, x, out) }
}

pub(super) fn rows32<Q: Simd32>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    // SAFETY: reachable only through `table`, which checks the features.
    unsafe {
        if x.batch() < packed::tokens_min_32::<Q>() || rows < packed::ROWS {
            q8::rows32::<Q>(weights, rows, x, out);
        } else {
            packed::rows32::<Q>(weights, rows, x, out);
        }
    }
}

pub(super) fn rows256<Q: Simd256>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    // SAFETY: reachable only through `table`, which checks the features.
    unsafe {
        if x.batch() < packed::TOKENS_MIN_256 || rows < packed::ROWS {
            q8::rows256::<Q>(weights, rows, x, out);
        } else {
            packed::rows256::<Q>(weights, rows, x, out);
        }
    }
}

/// Rounds a token to 8 bits.
pub(in super::super) fn quantise(kind: Kind, x: &[f32], record: &mut [f32]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn inner(kind: Kind, x: &[f32], record: &mut [f32]) {
        input::quantise(kind, x, record);
    }
    assert!(available(), "AVX2 kernels on a machine without");
    // SAFETY: the features were checked just above.
    unsafe { inner(kind, x, record) }
}

/// The sum of the lanes, in the order of `scalar::sum_lanes`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn sum_lanes(v: __m256) -> f32 {
    let halves = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
    _mm_cvtss_f32(_mm_add_ss(pairs, _mm_shuffle_ps::<1>(pairs, pairs)))
}

/// The sums of the lanes of eight registers, each in the order of `scalar::sum_lanes`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn sum_eight(v: [__m256; 8]) -> __m256 {
    // Lanes (0+4, 1+5, 2+6, 3+7) of two registers.
    let halves = |a: __m256, b: __m256| {
        _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
    };
    // Then (even, odd) of four.
    let pairs = |a: __m256, b: __m256, c: __m256, d: __m256| {
        let (low, high) = (_mm256_castps_pd(halves(a, c)), _mm256_castps_pd(halves(b, d)));
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)), _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)))
    };
    let (low, high) = (pairs(v[0], v[1], v[4], v[5]), pairs(v[2], v[3], v[6], v[7]));
    _mm256_add_ps(_mm256_shuffle_ps::<0x88>(low, high), _mm256_shuffle_ps::<0xdd>(low, high))
}
