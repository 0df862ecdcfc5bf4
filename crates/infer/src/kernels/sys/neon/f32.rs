//! Weights against f32 activations: four rows at a time for few tokens, register tiles over a decoded panel for many.

use super::super::super::blocks::Floor;
use super::super::super::input::{Input, LANES};
use super::super::columns::Out;
use super::q8::{Simd32, Simd256};
use super::{Lanes, f16_to_f32, sum_lanes};
use core::arch::aarch64::*;
use core::cell::RefCell;
use core::marker::PhantomData;

/// Weights that can be had as f32.
///
/// # Safety
/// Every method needs NEON; they are `inline(always)` and belong inside a function that enables it.
pub(super) trait Source {
    /// Elements of a group.
    const ELEMENTS: usize;
    /// Bytes of a group.
    const GROUP_BYTES: usize;
    /// Decodes `out.len()` elements, whole groups.
    unsafe fn decode(bytes: &[u8], out: &mut [f32]);
    /// Adds the lane-wise products of `R` rows with `x`, `x` padded to whole lanes and rows of equal length.
    unsafe fn add_products<const R: usize>(rows: [&[u8]; R], x: &[f32], lanes: &mut [Lanes; R]);
}

/// Types of 32 elements a group, decoded in registers.
pub(super) struct By32<Q>(PhantomData<Q>);
/// Types of 256 elements a group, decoded in registers.
pub(super) struct By256<Q>(PhantomData<Q>);

/// 16 signed bytes as 16 floats.
#[target_feature(enable = "neon")]
#[inline]
fn to_floats(bytes: int8x16_t) -> [float32x4_t; 4] {
    let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
    [
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
        vcvtq_f32_s32(vmovl_high_s16(low)),
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
        vcvtq_f32_s32(vmovl_high_s16(high)),
    ]
}

/// Adds the products of 16 weights and activations to the lanes.
#[target_feature(enable = "neon")]
#[inline]
fn add_run(weights: [float32x4_t; 4], x: &[f32], lanes: &mut Lanes) {
    for (i, (weights, x)) in weights.into_iter().zip(x[..16].chunks_exact(4)).enumerate() {
        // SAFETY: `x` is 4 floats.
        lanes[i % 2] = vfmaq_f32(lanes[i % 2], weights, unsafe { vld1q_f32(x.as_ptr()) });
    }
}

/// Stores 16 weights.
#[target_feature(enable = "neon")]
#[inline]
fn store_run(weights: [float32x4_t; 4], out: &mut [f32]) {
    for (weights, out) in weights.into_iter().zip(out[..16].chunks_exact_mut(4)) {
        // SAFETY: `out` is 4 floats.
        unsafe { vst1q_f32(out.as_mut_ptr(), weights) };
    }
}

/// scale × q + min, or scale × q.
#[target_feature(enable = "neon")]
#[inline]
fn scaled(bytes: int8x16_t, scale: f32, min: Option<f32>) -> [float32x4_t; 4] {
    let mut weights = to_floats(bytes);
    for weights in &mut weights {
        *weights = match min {
            // The product is exact, so fusing changes nothing.
            Some(min) => vfmaq_n_f32(vdupq_n_f32(min), *weights, scale),
            None => vmulq_n_f32(*weights, scale),
        };
    }
    weights
}

impl<Q: Simd32> By32<Q> {
    /// # Safety
    /// NEON; `group` is a group.
    #[inline(always)]
    unsafe fn weights(group: &[u8]) -> [[float32x4_t; 4]; 2] {
        let (scale, min) = Q::scales(group);
        let min = Q::HAS_MIN.then_some(min);
        // SAFETY: by this function's contract.
        unsafe {
            let [low, high] = Q::bytes(group);
            [scaled(low, scale, min), scaled(high, scale, min)]
        }
    }
}

impl<Q: Simd32> Source for By32<Q> {
    const ELEMENTS: usize = 32;
    const GROUP_BYTES: usize = Q::BYTES;

    #[inline(always)]
    unsafe fn decode(bytes: &[u8], out: &mut [f32]) {
        for (group, out) in bytes.chunks_exact(Q::BYTES).zip(out.chunks_exact_mut(32)) {
            // SAFETY: NEON by the trait's contract.
            unsafe {
                let [low, high] = Self::weights(group);
                store_run(low, &mut out[..16]);
                store_run(high, &mut out[16..]);
            }
        }
    }

    #[inline(always)]
    unsafe fn add_products<const R: usize>(rows: [&[u8]; R], x: &[f32], lanes: &mut [Lanes; R]) {
        for (g, x) in x.chunks_exact(32).enumerate() {
            for (row, lanes) in rows.iter().zip(lanes.iter_mut()) {
                // SAFETY: NEON by the trait's contract.
                unsafe {
                    let [low, high] = Self::weights(&row[g * Q::BYTES..(g + 1) * Q::BYTES]);
                    add_run(low, &x[..16], lanes);
                    add_run(high, &x[16..], lanes);
                }
            }
        }
    }
}

impl<Q: Simd256> By256<Q> {
    /// Calls `each(run, weights)` for each 16 weights.
    ///
    /// # Safety
    /// NEON; `group` is a group.
    #[inline(always)]
    unsafe fn for_each_run(group: &[u8], mut each: impl FnMut(usize, [float32x4_t; 4])) {
        let all = Q::scales(group);
        for run in 0..8 {
            // SAFETY: by this function's contract.
            let halves = unsafe { Q::bytes(group, run) };
            for (half, bytes) in halves.into_iter().enumerate() {
                let sub = 2 * run + half;
                let scale = all.scale * f32::from(all.sub[sub]);
                let min = -(all.min_scale * f32::from(all.min[sub]));
                let min = (Q::FLOOR == Floor::Minimum).then_some(min);
                // SAFETY: by this function's contract.
                each(sub, unsafe { scaled(bytes, scale, min) });
            }
        }
    }
}

impl<Q: Simd256> Source for By256<Q> {
    const ELEMENTS: usize = 256;
    const GROUP_BYTES: usize = Q::BYTES;

    #[inline(always)]
    unsafe fn decode(bytes: &[u8], out: &mut [f32]) {
        for (group, out) in bytes.chunks_exact(Q::BYTES).zip(out.chunks_exact_mut(256)) {
            // SAFETY: NEON by the trait's contract.
            unsafe { Self::for_each_run(group, |run, weights| store_run(weights, &mut out[16 * run..16 * run + 16])) };
        }
    }

    #[inline(always)]
    unsafe fn add_products<const R: usize>(rows: [&[u8]; R], x: &[f32], lanes: &mut [Lanes; R]) {
        for (g, x) in x.chunks_exact(256).enumerate() {
            for (row, lanes) in rows.iter().zip(lanes.iter_mut()) {
                let group = &row[g * Q::BYTES..(g + 1) * Q::BYTES];
                // SAFETY: NEON by the trait's contract.
                unsafe {
                    Self::for_each_run(group, |run, weights| add_run(weights, &x[16 * run..16 * run + 16], lanes))
                };
            }
        }
    }
}

/// IEEE single precision.
pub(super) struct F32;
/// IEEE half precision.
pub(super) struct F16;
/// bfloat16.
pub(super) struct Bf16;

/// A plain float type, eight at a time.
///
/// # Safety
/// `load` needs NEON, and 8 elements readable at `at`, at any alignment.
pub(super) trait Float {
    const BYTES: usize;
    unsafe fn load(at: *const u8) -> Lanes;
}

impl Float for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Lanes {
        // SAFETY: 32 bytes are readable by the trait's contract; bytes have no alignment.
        unsafe { [vreinterpretq_f32_u8(vld1q_u8(at)), vreinterpretq_f32_u8(vld1q_u8(at.add(16)))] }
    }
}

impl Float for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Lanes {
        // SAFETY: 16 bytes are readable by the trait's contract; bytes have no alignment.
        unsafe {
            let halves = vreinterpretq_u16_u8(vld1q_u8(at));
            [f16_to_f32(vget_low_u16(halves)), f16_to_f32(vget_high_u16(halves))]
        }
    }
}

impl Float for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> Lanes {
        // SAFETY: 16 bytes are readable by the trait's contract; bytes have no alignment.
        unsafe {
            let halves = vreinterpretq_u16_u8(vld1q_u8(at));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(halves))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(halves)),
            ]
        }
    }
}

/// The last elements of a row, fewer than 8, followed by zeros.
#[inline(always)]
fn padded_tail(tail: &[u8]) -> [u8; 32] {
    let mut padded = [0; 32];
    padded[..tail.len()].copy_from_slice(tail);
    padded
}

/// # Safety
/// NEON.
#[inline(always)]
unsafe fn store(lanes: Lanes, out: &mut [f32; LANES]) {
    // SAFETY: `out` is 8 floats; NEON by this function's contract.
    unsafe {
        vst1q_f32(out.as_mut_ptr(), lanes[0]);
        vst1q_f32(out[4..].as_mut_ptr(), lanes[1]);
    }
}

impl<F: Float> Source for F {
    const ELEMENTS: usize = 1;
    const GROUP_BYTES: usize = F::BYTES;

    #[inline(always)]
    unsafe fn decode(bytes: &[u8], out: &mut [f32]) {
        let mut chunks = out.chunks_exact_mut(LANES);
        for (out, bytes) in chunks.by_ref().zip(bytes.chunks_exact(LANES * F::BYTES)) {
            let Some(out) = out.first_chunk_mut() else { continue };
            // SAFETY: `bytes` has 8 elements; NEON by the trait's contract.
            unsafe { store(F::load(bytes.as_ptr()), out) };
        }
        let tail = chunks.into_remainder();
        if !tail.is_empty() {
            let padded = padded_tail(&bytes[bytes.len() - tail.len() * F::BYTES..]);
            let mut lanes = [0.0; LANES];
            // SAFETY: `padded` has room for 8 elements; NEON by the trait's contract.
            unsafe { store(F::load(padded.as_ptr()), &mut lanes) };
            tail.copy_from_slice(&lanes[..tail.len()]);
        }
    }

    #[inline(always)]
    unsafe fn add_products<const R: usize>(rows: [&[u8]; R], x: &[f32], lanes: &mut [Lanes; R]) {
        let wide = LANES * F::BYTES;
        let whole = rows[0].len() / wide;
        assert!(rows.iter().all(|row| row.len() == rows[0].len()) && x.len() >= whole * LANES);
        for i in 0..whole {
            // SAFETY: element 8 i + 7 of `x` and of every row exist, by the assertion.
            unsafe {
                let x = F32::load(x.as_ptr().add(i * LANES).cast());
                for (row, lanes) in rows.iter().zip(lanes.iter_mut()) {
                    add_eight(F::load(row.as_ptr().add(i * wide)), x, lanes);
                }
            }
        }
        if rows[0].len() > whole * wide {
            let x = &x[whole * LANES..whole * LANES + LANES];
            for (row, lanes) in rows.iter().zip(lanes.iter_mut()) {
                let padded = padded_tail(&row[whole * wide..]);
                // SAFETY: `padded` has room for 8 elements, and `x` is 8 floats.
                unsafe { add_eight(F::load(padded.as_ptr()), F32::load(x.as_ptr().cast()), lanes) };
            }
        }
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn add_eight(weights: Lanes, x: Lanes, lanes: &mut Lanes) {
    lanes[0] = vfmaq_f32(lanes[0], weights[0], x[0]);
    lanes[1] = vfmaq_f32(lanes[1], weights[1], x[1]);
}

/// Some rows against all tokens.
#[target_feature(enable = "neon")]
pub(super) fn rows<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    if x.batch() < PANEL_TOKENS_MIN {
        rows_direct::<S>(weights, rows, x, out);
    } else {
        rows_panel::<S>(weights, rows, x, out);
    }
}

/// Few tokens: weights go from memory to registers, four rows at once to share the activations and to have eight
/// independent chains of additions.
#[target_feature(enable = "neon")]
fn rows_direct<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    const R: usize = 4;
    let row_bytes = x.cols() / S::ELEMENTS * S::GROUP_BYTES;
    let row_at = |row: usize| &weights[row * row_bytes..(row + 1) * row_bytes];
    let zeros = [vdupq_n_f32(0.0); 2];
    let mut row = 0;
    while row + R <= rows {
        let strip = [row_at(row), row_at(row + 1), row_at(row + 2), row_at(row + 3)];
        for token in 0..x.batch() {
            let mut lanes = [zeros; R];
            // SAFETY: this function has NEON.
            unsafe { S::add_products(strip, x.f32(token), &mut lanes) };
            for (out, lanes) in out.get(token, row, R).iter_mut().zip(lanes) {
                *out = sum_lanes(lanes);
            }
        }
        row += R;
    }
    for row in row..rows {
        for token in 0..x.batch() {
            let mut lanes = [zeros];
            // SAFETY: this function has NEON.
            unsafe { S::add_products([row_at(row)], x.f32(token), &mut lanes) };
            out.get(token, row, 1)[0] = sum_lanes(lanes[0]);
        }
    }
}

/// From this many tokens on a panel of decoded weights pays.
const PANEL_TOKENS_MIN: usize = 3;
/// Rows of a panel, which are those of a tile.
const ROWS: usize = 8;
/// Columns of a panel: 16 KiB together with the rows.
const PANEL_COLS: usize = 512;
/// Tokens of a register tile: 24 accumulators, 3 activations, 1 weight.
const TOKENS: usize = 3;
/// Registers of half of the panel.
const HALF: usize = ROWS * PANEL_COLS / LANES;

/// Four floats: a register in memory.
type Quad = [f32; 4];

struct Scratch {
    /// `[half][column / 8][row]`, where a half is lanes 0 to 3, or 4 to 7: sums of different lanes never meet, so each
    /// half is multiplied on its own, and twice as many rows and tokens fit the registers.
    panel: Vec<Quad>,
    /// A part of a row, before it goes there.
    decoded: [f32; PANEL_COLS],
    /// `[token][half][row]`.
    sums: Vec<[[Quad; ROWS]; 2]>,
}

std::thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch { panel: Vec::new(), decoded: [0.0; PANEL_COLS], sums: Vec::new() })
    };
}

/// Many tokens: 8 rows × 512 columns are decoded once, then meet all tokens from the cache.
#[target_feature(enable = "neon")]
fn rows_panel<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.panel.resize(2 * HALF, [0.0; 4]);
        if scratch.sums.len() < x.batch() {
            scratch.sums.resize(x.batch(), [[[0.0; 4]; ROWS]; 2]);
        }
        let row_bytes = x.cols() / S::ELEMENTS * S::GROUP_BYTES;
        for first in (0..rows).step_by(ROWS) {
            let n = ROWS.min(rows - first);
            strip::<S>(&weights[first * row_bytes..(first + n) * row_bytes], (first, n), x, scratch, out);
        }
    });
}

/// `n` rows (at most [`ROWS`]) against all tokens.
#[target_feature(enable = "neon")]
fn strip<S: Source>(weights: &[u8], (first, n): (usize, usize), x: &Input, scratch: &mut Scratch, out: &mut Out<'_>) {
    let (cols, batch) = (x.cols(), x.batch());
    let bytes = |elements: usize| elements / S::ELEMENTS * S::GROUP_BYTES;
    let sums = &mut scratch.sums[..batch];
    sums.fill([[[0.0; 4]; ROWS]; 2]);
    for start in (0..cols).step_by(PANEL_COLS) {
        let width = PANEL_COLS.min(cols - start);
        let padded = width.next_multiple_of(LANES);
        for (r, row) in weights.chunks_exact(bytes(cols)).enumerate() {
            let row = &row[bytes(start)..bytes(start + width)];
            // SAFETY: this function has NEON.
            unsafe { S::decode(row, &mut scratch.decoded[..width]) };
            scratch.decoded[width..padded].fill(0.0);
            for (i, eight) in scratch.decoded[..padded].chunks_exact(LANES).enumerate() {
                scratch.panel[i * ROWS + r].copy_from_slice(&eight[..4]);
                scratch.panel[HALF + i * ROWS + r].copy_from_slice(&eight[4..]);
            }
        }
        for token in (0..batch).step_by(TOKENS) {
            let x = |t: usize| &x.f32(token + t)[start..start + padded];
            for (half, panel) in scratch.panel.chunks_exact(HALF).enumerate() {
                let sums = &mut sums[token..];
                match batch - token {
                    1 => multiply(panel, half, [x(0)], sums),
                    2 => multiply(panel, half, [x(0), x(1)], sums),
                    _ => multiply::<TOKENS>(panel, half, [x(0), x(1), x(2)], sums),
                }
            }
        }
    }
    for (token, sums) in sums.iter().enumerate() {
        for (r, out) in out.get(token, first, n).iter_mut().enumerate() {
            // SAFETY: both are 4 floats.
            *out = sum_lanes(unsafe { [vld1q_f32(sums[0][r].as_ptr()), vld1q_f32(sums[1][r].as_ptr())] });
        }
    }
}

/// Half of a panel's rows, side by side, against `T` tokens, in registers. Rows that were not filled give sums that
/// nobody reads.
#[target_feature(enable = "neon")]
#[inline]
fn multiply<const T: usize>(panel: &[Quad], half: usize, x: [&[f32]; T], sums: &mut [[[Quad; ROWS]; 2]]) {
    let width = x[0].len();
    assert!(panel.len() >= width / LANES * ROWS && x.iter().all(|x| x.len() == width) && half < 2);
    let mut lanes = [[vdupq_n_f32(0.0); ROWS]; T];
    for (lanes, sums) in lanes.iter_mut().zip(&*sums) {
        for (lanes, sum) in lanes.iter_mut().zip(&sums[half]) {
            // SAFETY: `sum` is 4 floats.
            *lanes = unsafe { vld1q_f32(sum.as_ptr()) };
        }
    }
    for i in 0..width / LANES {
        let mut eight = [vdupq_n_f32(0.0); T];
        for (eight, x) in eight.iter_mut().zip(x) {
            // SAFETY: float 8 i + 7 of every token is there by the assertion.
            *eight = unsafe { vld1q_f32(x.as_ptr().add(i * LANES + 4 * half)) };
        }
        for r in 0..ROWS {
            // SAFETY: register `8 i + r` of the panel is there by the assertion.
            let weights = unsafe { vld1q_f32(panel.get_unchecked(i * ROWS + r).as_ptr()) };
            for t in 0..T {
                lanes[t][r] = vfmaq_f32(lanes[t][r], weights, eight[t]);
            }
        }
    }
    for (lanes, sums) in lanes.iter().zip(sums) {
        for (&lanes, sum) in lanes.iter().zip(&mut sums[half]) {
            // SAFETY: `sum` is 4 floats.
            unsafe { vst1q_f32(sum.as_mut_ptr(), lanes) };
        }
    }
}
