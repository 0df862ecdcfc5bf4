//! Quantised weights against 8-bit activations, few tokens: four rows at once, from memory to registers.
//!
//! Integers are signed and their sums exact; a pairwise reduction brings the sums of four rows into the lanes of one
//! register, which is then scaled and added, group by group, as `scalar.rs` says.

use super::super::super::blocks::{Floor, Group32, Group256, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use super::super::super::input::{Input, Token32, Token256};
use super::super::columns::Out;
use super::f16_to_f32;
use core::arch::aarch64::*;
use core::arch::asm;

/// Rows at once: the lanes of a register.
const ROWS: usize = 4;

/// How 8-bit integers are multiplied and added.
///
/// # Safety
/// `add_16` needs NEON, and the machine the instructions that the type stands for.
pub(super) trait Dot {
    /// How many tokens are multiplied.
    const MANY: Many;
    /// The sum over four lanes is the sum of 16 products, plus that of `sums`. No `x` is -128.
    unsafe fn add_16(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t;
}

/// How many tokens are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Many {
    /// One after the other.
    Singly,
    /// By `packed.rs`.
    Packed,
    /// By `matrix.rs`.
    Matrix,
}

/// Products of 16 bits, added in pairs: every aarch64.
pub(super) struct Pairs;
/// Four products in one instruction: cores with `dotprod`.
pub(super) struct Sdot;
/// The same, and 2 × 8 by 8 × 2 matrices in one instruction: cores with `i8mm`.
pub(super) struct Smmla;

impl Dot for Pairs {
    const MANY: Many = Many::Singly;

    #[inline(always)]
    unsafe fn add_16(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: NEON by the trait's contract.
        unsafe {
            // Two products are at most 2 × 128 × 127, below 2^15.
            let pairs = vmlal_high_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), w, x);
            vpadalq_s16(sums, pairs)
        }
    }
}

impl Dot for Sdot {
    const MANY: Many = Many::Packed;

    #[inline(always)]
    unsafe fn add_16(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: by the trait's contract.
        unsafe { sdot(sums, w, x) }
    }
}

impl Dot for Smmla {
    const MANY: Many = Many::Matrix;

    #[inline(always)]
    unsafe fn add_16(sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: by the trait's contract.
        unsafe { sdot(sums, w, x) }
    }
}

// The intrinsics of these three are not stable yet. The extension is named to the assembler alone, since the rest of a
// kernel needs none.

/// Lane i: `sums` and the four products of columns `4 * i..4 * i + 4`.
///
/// # Safety
/// The machine has `dotprod`.
#[inline(always)]
unsafe fn sdot(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the machine has the instruction, by this function's contract; it goes from register to register.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sums, in(vreg) w, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Adds four columns of four rows times columns `4 * LANE..4 * LANE + 4` of a token: lane = row.
///
/// # Safety
/// The machine has `dotprod`.
#[inline(always)]
pub(super) unsafe fn sdot_lane<const LANE: i32>(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the machine has the instruction, by this function's contract; it goes from register to register.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]",
            inout(vreg) sums, in(vreg) w, in(vreg) x, const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Adds eight columns of two rows times those of two tokens: lanes are (row 0, token 0), (0, 1), (1, 0), (1, 1).
///
/// # Safety
/// The machine has `i8mm`.
#[inline(always)]
pub(super) unsafe fn smmla(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the machine has the instruction, by this function's contract; it goes from register to register.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sums, in(vreg) w, in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// A type of 32 elements a group, unpacked by NEON.
///
/// # Safety
/// The function needs NEON; it is `inline(always)` and belongs inside a function that enables it.
pub(super) trait Simd32: Group32 {
    /// The integers of a group, signed: [`Group32::unsigned`] less [`Group32::OFFSET`].
    unsafe fn bytes(group: &[u8]) -> [int8x16_t; 2];
}

/// A type of 256 elements a group, unpacked by NEON.
///
/// # Safety
/// The function needs NEON; it is `inline(always)` and belongs inside a function that enables it.
pub(super) trait Simd256: Group256 {
    /// Integers `32 * run..32 * run + 32` of a group, less 32 for types of [`Floor::Offset32`].
    unsafe fn bytes(group: &[u8], run: usize) -> [int8x16_t; 2];
    /// Sub-scales, one for each 16 elements, and minima, one for each 32 (0 for [`Floor::Offset32`]).
    fn subs(group: &[u8]) -> ([i8; 16], [u8; 8]);
    /// (scale, scale of minima) of a group.
    fn factors(group: &[u8]) -> (f32, f32);
}

/// `N` bytes from `at` on; the check vanishes where the length is known.
#[inline(always)]
fn bytes_at<const N: usize>(group: &[u8], at: usize) -> &[u8; N] {
    match group[at..].first_chunk() {
        Some(bytes) => bytes,
        None => panic!("a group is shorter than its type"),
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn load(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: 16 bytes are readable.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// Low nibbles, then high ones.
#[target_feature(enable = "neon")]
#[inline]
fn nibbles(packed: uint8x16_t) -> [uint8x16_t; 2] {
    [vandq_u8(packed, vdupq_n_u8(15)), vshrq_n_u8::<4>(packed)]
}

/// 32 bits as 32 bytes: 16 for a one, 0 for a zero.
#[target_feature(enable = "neon")]
#[inline]
fn fifth_bits(packed: &[u8; 4]) -> [uint8x16_t; 2] {
    let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
    let spread = |low: u8, high: u8| {
        let bytes = vcombine_u8(vdup_n_u8(low), vdup_n_u8(high));
        vandq_u8(vtstq_u8(bytes, bit), vdupq_n_u8(16))
    };
    [spread(packed[0], packed[1]), spread(packed[2], packed[3])]
}

#[target_feature(enable = "neon")]
#[inline]
fn less([low, high]: [uint8x16_t; 2], offset: u8) -> [int8x16_t; 2] {
    let offset = vdupq_n_u8(offset);
    [vreinterpretq_s8_u8(vsubq_u8(low, offset)), vreinterpretq_s8_u8(vsubq_u8(high, offset))]
}

/// The type without a fifth bit, whose nibbles begin at `at`.
macro_rules! four_bits {
    ($type:ty, $at:literal) => {
        impl Simd32 for $type {
            #[inline(always)]
            unsafe fn bytes(group: &[u8]) -> [int8x16_t; 2] {
                // SAFETY: NEON by the trait's contract.
                unsafe { less(nibbles(load(bytes_at(group, $at))), <$type>::OFFSET) }
            }
        }
    };
}

/// The type whose fifth bits begin at `bits`, its nibbles 4 bytes later.
macro_rules! five_bits {
    ($type:ty, $bits:literal) => {
        impl Simd32 for $type {
            #[inline(always)]
            unsafe fn bytes(group: &[u8]) -> [int8x16_t; 2] {
                // SAFETY: NEON by the trait's contract.
                unsafe {
                    let [low, high] = nibbles(load(bytes_at(group, $bits + 4)));
                    let fifth = fifth_bits(bytes_at(group, $bits));
                    less([vorrq_u8(low, fifth[0]), vorrq_u8(high, fifth[1])], <$type>::OFFSET)
                }
            }
        }
    };
}

four_bits!(Q4_0, 2);
four_bits!(Q4_1, 4);
five_bits!(Q5_0, 2);
five_bits!(Q5_1, 4);

impl Simd32 for Q8_0 {
    #[inline(always)]
    unsafe fn bytes(group: &[u8]) -> [int8x16_t; 2] {
        // SAFETY: NEON by the trait's contract.
        unsafe { [vreinterpretq_s8_u8(load(bytes_at(group, 2))), vreinterpretq_s8_u8(load(bytes_at(group, 18)))] }
    }
}

/// The sub-scales and minima of Q4_K and Q5_K, 6 bits each, eight of each in twelve bytes.
#[inline(always)]
fn subs_k4(group: &[u8]) -> ([i8; 16], [u8; 8]) {
    let word = |at: usize| u32::from_le_bytes(*bytes_at(group, at));
    let (w0, w1, w2) = (word(4), word(8), word(12));
    let (six, four) = (0x3f3f_3f3f, 0x0f0f_0f0f);
    let high = |low4: u32, high2: u32| (low4 & four) | (high2 >> 2 & 0x3030_3030);
    let eight = |low: u32, high: u32| (u64::from(low & six) | u64::from(high) << 32).to_le_bytes();
    let scales = eight(w0, high(w2, w0));
    (core::array::from_fn(|j| scales[j / 2] as i8), eight(w1, high(w2 >> 4, w1)))
}

/// The first two f16 of a group.
#[inline(always)]
fn factors_k4(group: &[u8]) -> (f32, f32) {
    let half = |at: usize| super::super::super::blocks::f16_to_f32(u16::from_le_bytes(*bytes_at(group, at)));
    (half(0), half(2))
}

impl Simd256 for Q4K {
    #[inline(always)]
    unsafe fn bytes(group: &[u8], run: usize) -> [int8x16_t; 2] {
        // SAFETY: NEON by the trait's contract.
        unsafe {
            let at = 16 + 32 * (run / 2);
            let (low, high) = (nibbles(load(bytes_at(group, at))), nibbles(load(bytes_at(group, at + 16))));
            less([low[run % 2], high[run % 2]], 0)
        }
    }

    #[inline(always)]
    fn subs(group: &[u8]) -> ([i8; 16], [u8; 8]) {
        subs_k4(group)
    }

    #[inline(always)]
    fn factors(group: &[u8]) -> (f32, f32) {
        factors_k4(group)
    }
}

impl Simd256 for Q5K {
    #[inline(always)]
    unsafe fn bytes(group: &[u8], run: usize) -> [int8x16_t; 2] {
        // SAFETY: NEON by the trait's contract.
        unsafe {
            let at = 48 + 32 * (run / 2);
            let half = |at: usize, fifth_at: usize| {
                let low = nibbles(load(bytes_at(group, at)))[run % 2];
                // Bit `run` of each byte becomes bit 4.
                let bit = vtstq_u8(load(bytes_at(group, fifth_at)), vdupq_n_u8(1 << run));
                vorrq_u8(low, vandq_u8(bit, vdupq_n_u8(16)))
            };
            less([half(at, 16), half(at + 16, 32)], 0)
        }
    }

    #[inline(always)]
    fn subs(group: &[u8]) -> ([i8; 16], [u8; 8]) {
        subs_k4(group)
    }

    #[inline(always)]
    fn factors(group: &[u8]) -> (f32, f32) {
        factors_k4(group)
    }
}

impl Simd256 for Q6K {
    #[inline(always)]
    unsafe fn bytes(group: &[u8], run: usize) -> [int8x16_t; 2] {
        // SAFETY: NEON by the trait's contract.
        unsafe {
            let (part, quarter) = (run / 4, run % 4);
            let at = 64 * part + 32 * (quarter % 2);
            let shift = vdupq_n_s8(4 - 2 * quarter as i8);
            let half = |at: usize, high_at: usize| {
                let low = nibbles(load(bytes_at(group, at)))[quarter / 2];
                // Bits 2 quarter and 2 quarter + 1 of each byte move to bits 4 and 5.
                let high = vshlq_u8(load(bytes_at(group, high_at)), shift);
                vorrq_u8(low, vandq_u8(high, vdupq_n_u8(0x30)))
            };
            let high_at = 128 + 32 * part;
            less([half(at, high_at), half(at + 16, high_at + 16)], 32)
        }
    }

    #[inline(always)]
    fn subs(group: &[u8]) -> ([i8; 16], [u8; 8]) {
        (bytes_at::<16>(group, 192).map(|sub| sub as i8), [0; 8])
    }

    #[inline(always)]
    fn factors(group: &[u8]) -> (f32, f32) {
        (super::super::super::blocks::f16_to_f32(u16::from_le_bytes(*bytes_at(group, 208))), 0.0)
    }
}

/// Lane r becomes the sum of the lanes of `v[r]`.
#[target_feature(enable = "neon")]
#[inline]
fn reduce(v: [int32x4_t; ROWS]) -> int32x4_t {
    vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]))
}

/// The f16 at byte `at` of each row, as f32.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn gather_f16(rows: [&[u8]; ROWS], at: usize) -> float32x4_t {
    let mut halves = [0; ROWS];
    for (half, row) in halves.iter_mut().zip(rows) {
        *half = u16::from_le_bytes(*bytes_at(row, at));
    }
    // SAFETY: `halves` is 4 halves.
    f16_to_f32(unsafe { vld1_u16(halves.as_ptr()) })
}

/// 16 activations.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_x(x: &[i8], at: usize) -> int8x16_t {
    // SAFETY: 16 bytes are readable.
    unsafe { vld1q_s8(x[at..at + 16].as_ptr()) }
}

/// Four rows with one token: lane = row.
#[target_feature(enable = "neon")]
fn dot32<Q: Simd32, D: Dot>(rows: [&[u8]; ROWS], x: Token32<'_>) -> float32x4_t {
    let mut sum = vdupq_n_f32(0.0);
    for (g, &x_scale) in x.scales.iter().enumerate() {
        let group = rows.map(|row| &row[g * Q::BYTES..(g + 1) * Q::BYTES]);
        let (x_low, x_high) = (load_x(x.q, 32 * g), load_x(x.q, 32 * g + 16));
        let mut dots = [vdupq_n_s32(0); ROWS];
        for (dot, group) in dots.iter_mut().zip(group) {
            // SAFETY: this function has NEON, and the machine what `D` stands for.
            unsafe {
                let [low, high] = Q::bytes(group);
                *dot = D::add_16(D::add_16(*dot, low, x_low), high, x_high);
            }
        }
        let scale = vmulq_n_f32(gather_f16(group, 0), x_scale);
        sum = vfmaq_f32(sum, scale, vcvtq_f32_s32(reduce(dots)));
        if Q::HAS_MIN {
            sum = vfmaq_n_f32(sum, gather_f16(group, 2), x.scaled_sums[g]);
        }
    }
    sum
}

/// Four rows with one token: lane = row.
#[target_feature(enable = "neon")]
fn dot256<Q: Simd256, D: Dot>(rows: [&[u8]; ROWS], x: Token256<'_>) -> float32x4_t {
    let mut sum = vdupq_n_f32(0.0);
    for (g, &x_scale) in x.scales.iter().enumerate() {
        // SAFETY: 16 sums are readable.
        let x_sums = unsafe {
            let sums = &x.sums[16 * g..16 * g + 16];
            vpaddq_s16(vld1q_s16(sums.as_ptr()), vld1q_s16(sums[8..].as_ptr()))
        };
        let (mut dots, mut mins) = ([vdupq_n_s32(0); ROWS], [vdupq_n_s32(0); ROWS]);
        let (mut scales, mut min_scales) = ([0.0; ROWS], [0.0; ROWS]);
        for (r, row) in rows.into_iter().enumerate() {
            let group = &row[g * Q::BYTES..(g + 1) * Q::BYTES];
            let (subs, sub_mins) = Q::subs(group);
            (scales[r], min_scales[r]) = Q::factors(group);
            let mut total = vdupq_n_s32(0);
            for run in 0..8 {
                let (x_low, x_high) = (load_x(x.q, 256 * g + 32 * run), load_x(x.q, 256 * g + 32 * run + 16));
                let zero = vdupq_n_s32(0);
                // SAFETY: this function has NEON, and the machine what `D` stands for.
                unsafe {
                    let [low, high] = Q::bytes(group, run);
                    let low = D::add_16(zero, low, x_low);
                    if Q::FLOOR == Floor::Minimum {
                        // These have one sub-scale for 32 elements.
                        total = vmlaq_n_s32(total, D::add_16(low, high, x_high), i32::from(subs[2 * run]));
                    } else {
                        total = vmlaq_n_s32(total, low, i32::from(subs[2 * run]));
                        total = vmlaq_n_s32(total, D::add_16(zero, high, x_high), i32::from(subs[2 * run + 1]));
                    }
                }
            }
            dots[r] = total;
            if Q::FLOOR == Floor::Minimum {
                // SAFETY: 8 bytes are readable.
                let sub_mins = vreinterpretq_s16_u16(vmovl_u8(unsafe { vld1_u8(sub_mins.as_ptr()) }));
                let low = vmull_s16(vget_low_s16(sub_mins), vget_low_s16(x_sums));
                mins[r] = vmlal_high_s16(low, sub_mins, x_sums);
            }
        }
        // SAFETY: both are 4 floats.
        let (scale, min_scale) = unsafe { (vld1q_f32(scales.as_ptr()), vld1q_f32(min_scales.as_ptr())) };
        sum = vfmaq_f32(sum, vmulq_n_f32(scale, x_scale), vcvtq_f32_s32(reduce(dots)));
        if Q::FLOOR == Floor::Minimum {
            sum = vfmsq_f32(sum, vmulq_n_f32(min_scale, x_scale), vcvtq_f32_s32(reduce(mins)));
        }
    }
    sum
}

/// Calls `dot` for each four rows and token, and writes the lanes. The last four overlap those before them, and less
/// than four are repeated: rows computed twice give the same bits twice.
#[target_feature(enable = "neon")]
#[inline]
fn strips(
    weights: &[u8],
    (rows, row_bytes): (usize, usize),
    x: &Input,
    out: &mut Out<'_>,
    dot: impl Fn([&[u8]; ROWS], usize) -> float32x4_t,
) {
    for row in (0..rows).step_by(ROWS) {
        let first = row.min(rows.saturating_sub(ROWS));
        let n = ROWS.min(rows);
        let at = |r: usize| &weights[(first + r.min(n - 1)) * row_bytes..(first + r.min(n - 1) + 1) * row_bytes];
        let strip = [at(0), at(1), at(2), at(3)];
        for token in 0..x.batch() {
            let mut lanes = [0.0; ROWS];
            // SAFETY: `lanes` is 4 floats.
            unsafe { vst1q_f32(lanes.as_mut_ptr(), dot(strip, token)) };
            out.get(token, first, n).copy_from_slice(&lanes[..n]);
        }
    }
}

/// Rows of a 32-element type against all tokens, one token after the other.
#[target_feature(enable = "neon")]
pub(super) fn rows32<Q: Simd32, D: Dot>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let row_bytes = x.cols() / 32 * Q::BYTES;
    strips(weights, (rows, row_bytes), x, out, |strip, token| dot32::<Q, D>(strip, x.group32(token)));
}

/// Rows of a 256-element type against all tokens, one token after the other.
#[target_feature(enable = "neon")]
pub(super) fn rows256<Q: Simd256, D: Dot>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let row_bytes = x.cols() / 256 * Q::BYTES;
    strips(weights, (rows, row_bytes), x, out, |strip, token| dot256::<Q, D>(strip, x.group256(token)));
}
