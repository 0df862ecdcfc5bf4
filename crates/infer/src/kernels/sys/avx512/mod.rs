//! Kernels for x86-64 with AVX-512 (F, BW, DQ and VL), and for those that have VNNI as well.
//!
//! Only products with many tokens are here: 32 registers of twice the width hold larger tiles, and VNNI adds four 8-bit
//! products in one instruction. Decoding, products with few tokens (bound by memory) and the decoder's vector operations
//! are those of `avx2`. A register holds two rows of eight lanes each, or sixteen rows, so that every sum is added in
//! the order that `scalar.rs` states: the same bits.
//!
//! What is not here, on purpose: the bfloat16 dot product (VDPBF16PS). It rounds activations to bfloat16, adds two
//! products without the rounding between them and flushes subnormals, so no other path could give its bits.

mod f32;
mod packed;

use super::super::blocks;
use super::super::input::Input;
use super::super::table::{Kernels, Table};
use super::avx2::f32::{self as wide, By32, By256, Source};
use super::avx2::q8::{Simd32, Simd256};
use super::avx2::{self, packed as packed2};
use super::columns::Out;

/// Whether this machine has AVX-512 as these kernels need it.
pub(in super::super) fn available() -> bool {
    avx2::available()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// Whether this machine has VNNI besides.
pub(in super::super) fn vnni_available() -> bool {
    available() && is_x86_feature_detected!("avx512vnni")
}

macro_rules! table {
    ($vnni:literal) => {
        [
            float::<wide::F32>(),
            float::<wide::F16>(),
            float::<wide::Bf16>(),
            by32::<blocks::Q4_0, $vnni>(),
            by32::<blocks::Q4_1, $vnni>(),
            by32::<blocks::Q5_0, $vnni>(),
            by32::<blocks::Q5_1, $vnni>(),
            by32::<blocks::Q8_0, $vnni>(),
            by256::<blocks::Q4K, $vnni>(),
            by256::<blocks::Q5K, $vnni>(),
            by256::<blocks::Q6K, $vnni>(),
        ]
    };
}

/// The kernels that need no VNNI; panics where they cannot run.
pub(in super::super) fn table() -> &'static Table {
    static TABLE: Table = table!(false);
    assert!(available(), "AVX-512 kernels on a machine without");
    &TABLE
}

/// The kernels with VNNI; panics where they cannot run.
pub(in super::super) fn vnni_table() -> &'static Table {
    static TABLE: Table = table!(true);
    assert!(vnni_available(), "AVX-512 VNNI kernels on a machine without");
    &TABLE
}

const fn float<S: Source>() -> Kernels {
    Kernels { decode: avx2::decode::<S>, f32: rows_f32::<S>, q8: rows_f32::<S> }
}

const fn by32<Q: Simd32, const VNNI: bool>() -> Kernels {
    let q8 = if VNNI { rows32::<Q> } else { avx2::rows32::<Q> };
    Kernels { decode: avx2::decode::<By32<Q>>, f32: rows_f32::<By32<Q>>, q8 }
}

const fn by256<Q: Simd256, const VNNI: bool>() -> Kernels {
    let q8 = if VNNI { rows256::<Q> } else { avx2::rows256::<Q> };
    Kernels { decode: avx2::decode::<By256<Q>>, f32: rows_f32::<By256<Q>>, q8 }
}

fn rows_f32<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    if x.batch() < S::PANEL_TOKENS_MIN {
        avx2::rows_f32::<S>(weights, rows, x, out);
    } else {
        // SAFETY: reachable only through the tables, which check the features.
        unsafe { f32::rows::<S>(weights, rows, x, out) }
    }
}

fn rows32<Q: Simd32>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    if x.batch() < packed2::TOKENS_MIN_32 || rows < packed::ROWS {
        avx2::rows32::<Q>(weights, rows, x, out);
    } else {
        // SAFETY: reachable only through the table with VNNI, which checks the features.
        unsafe { packed::rows32::<Q>(weights, rows, x, out) }
    }
}

fn rows256<Q: Simd256>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    if x.batch() < packed2::TOKENS_MIN_256 || rows < packed::ROWS {
        avx2::rows256::<Q>(weights, rows, x, out);
    } else {
        // SAFETY: reachable only through the table with VNNI, which checks the features.
        unsafe { packed::rows256::<Q>(weights, rows, x, out) }
    }
}

/// A register in memory: a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line<T>([T; 16]);
