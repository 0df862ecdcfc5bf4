//! Kernels for aarch64: NEON, and where the machine has them products of four 8-bit integers (`sdot`) and of small
//! matrices of them (`smmla`).
//!
//! Each keeps to the order of reduction that `scalar.rs` states, so its results equal its twin's to the bit: eight lanes
//! are two registers, and integers are exact. The functions of the tables are safe to call because a table is handed
//! out only where [`available`], [`dot_available`] or [`matrix_available`] is true.
//!
//! What is not here: the decoder's vector operations, which the compiler makes NEON of anyway, and the bfloat16 and f16
//! products of newer cores, which round activations, so that no other path could give their bits.

mod f32;
mod matrix;
mod packed;
mod q8;

use super::super::blocks;
use super::super::input::Input;
use super::super::table::{Kernels, Table};
use super::columns::Out;
use core::arch::aarch64::*;
use core::arch::asm;
use f32::{By32, By256, Source};
use q8::{Dot, Many, Pairs, Sdot, Simd32, Simd256, Smmla};

/// Whether this machine has what these kernels need.
pub(in super::super) fn available() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

/// Whether it has `sdot` besides.
pub(in super::super) fn dot_available() -> bool {
    available() && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Whether it has `smmla` as well.
pub(in super::super) fn matrix_available() -> bool {
    dot_available() && std::arch::is_aarch64_feature_detected!("i8mm")
}

macro_rules! table {
    ($dot:ty) => {
        [
            float::<f32::F32>(),
            float::<f32::F16>(),
            float::<f32::Bf16>(),
            by32::<blocks::Q4_0, $dot>(),
            by32::<blocks::Q4_1, $dot>(),
            by32::<blocks::Q5_0, $dot>(),
            by32::<blocks::Q5_1, $dot>(),
            by32::<blocks::Q8_0, $dot>(),
            by256::<blocks::Q4K, $dot>(),
            by256::<blocks::Q5K, $dot>(),
            by256::<blocks::Q6K, $dot>(),
        ]
    };
}

/// The kernels that need no `sdot`; panics where they cannot run.
pub(in super::super) fn table() -> &'static Table {
    static TABLE: Table = table!(Pairs);
    assert!(available(), "NEON kernels on a machine without");
    &TABLE
}

/// The kernels with `sdot`; panics where they cannot run.
pub(in super::super) fn dot_table() -> &'static Table {
    static TABLE: Table = table!(Sdot);
    assert!(dot_available(), "kernels with sdot on a machine without");
    &TABLE
}

/// The kernels with `sdot` and `smmla`; panics where they cannot run.
pub(in super::super) fn matrix_table() -> &'static Table {
    static TABLE: Table = table!(Smmla);
    assert!(matrix_available(), "kernels with smmla on a machine without");
    &TABLE
}

const fn float<S: Source>() -> Kernels {
    Kernels { decode: decode::<S>, f32: rows_f32::<S>, q8: rows_f32::<S> }
}

const fn by32<Q: Simd32, D: Dot>() -> Kernels {
    Kernels { decode: decode::<By32<Q>>, f32: rows_f32::<By32<Q>>, q8: rows32::<Q, D> }
}

const fn by256<Q: Simd256, D: Dot>() -> Kernels {
    Kernels { decode: decode::<By256<Q>>, f32: rows_f32::<By256<Q>>, q8: rows256::<Q, D> }
}

fn decode<S: Source>(bytes: &[u8], out: &mut [f32]) {
    #[target_feature(enable = "neon")]
    fn inner<S: Source>(bytes: &[u8], out: &mut [f32]) {
        // SAFETY: this function has NEON.
        unsafe { S::decode(bytes, out) }
    }
    // SAFETY: reachable only through the tables, which check the features.
    unsafe { inner::<S>(bytes, out) }
}

fn rows_f32<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    // SAFETY: reachable only through the tables, which check the features.
    unsafe { f32::rows::<S>(weights, rows, x, out) }
}

fn rows32<Q: Simd32, D: Dot>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let few = x.batch() < packed::TOKENS_MIN || rows < packed::ROWS;
    // SAFETY: reachable only through the tables, which check the features.
    unsafe {
        match D::MANY {
            Many::Packed if !few => packed::rows32::<Q>(weights, rows, x, out),
            Many::Matrix if !few => matrix::rows32::<Q>(weights, rows, x, out),
            _ => q8::rows32::<Q, D>(weights, rows, x, out),
        }
    }
}

fn rows256<Q: Simd256, D: Dot>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let few = x.batch() < packed::TOKENS_MIN || rows < packed::ROWS;
    // SAFETY: reachable only through the tables, which check the features.
    unsafe {
        match D::MANY {
            Many::Packed if !few => packed::rows256::<Q>(weights, rows, x, out),
            Many::Matrix if !few => matrix::rows256::<Q>(weights, rows, x, out),
            _ => q8::rows256::<Q, D>(weights, rows, x, out),
        }
    }
}

/// Eight lanes.
type Lanes = [float32x4_t; 2];

/// The sum of the lanes, in the order of `scalar::sum_lanes`.
#[target_feature(enable = "neon")]
#[inline]
fn sum_lanes([low, high]: Lanes) -> f32 {
    let halves = vaddq_f32(low, high);
    vpadds_f32(vadd_f32(vget_low_f32(halves), vget_high_f32(halves)))
}

/// Four f16 as f32, exactly. (The intrinsic for it is younger than the compiler that this workspace asks for.)
#[target_feature(enable = "neon")]
#[inline]
fn f16_to_f32(halves: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: an instruction of the base set, from register to register.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) halves, options(pure, nomem, nostack, preserves_flags));
    }
    wide
}
