//! Weights against f32 activations: four rows at a time for few tokens, register tiles over a decoded panel for many.

use super::super::super::blocks::Floor;
use super::super::super::input::{Input, LANES};
use super::super::columns::Out;
use super::q8::{Simd32, Simd256, prefetch};
use super::sum_lanes;
use core::arch::x86_64::*;
use core::cell::RefCell;
use core::marker::PhantomData;

/// Weights that can be had as f32.
///
/// # Safety
/// Every method needs AVX2, FMA and F16C; they are `inline(always)` and belong inside a function that enables these.
pub(super) trait Source {
    /// Elements of a group.
    const ELEMENTS: usize;
    /// Bytes of a group.
    const GROUP_BYTES: usize;
    /// Decodes `out.len()` elements, whole groups.
    unsafe fn decode(bytes: &[u8], out: &mut [f32]);
    /// Adds the lane-wise products of `R` rows with `x`, `x` padded to whole lanes and rows of equal length. Meanwhile
    /// as many bytes are fetched from `ahead` on.
    unsafe fn add_products<const R: usize>(rows: [&[u8]; R], ahead: *const u8, x: &[f32], lanes: &mut [__m256; R]);
}

/// Types of 32 elements a group, decoded in registers.
pub(super) struct By32<Q>(PhantomData<Q>);
/// Types of 256 elements a group, decoded in registers.
pub(super) struct By256<Q>(PhantomData<Q>);

/// 32 bytes as 32 floats, `offset` taken off first.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn to_floats(bytes: __m256i, offset: u8) -> [__m256; 4] {
    let signed = _mm256_sub_epi8(bytes, _mm256_set1_epi8(offset as i8));
    let (low, high) = (_mm256_castsi256_si128(signed), _mm256_extracti128_si256::<1>(signed));
    [low, _mm_unpackhi_epi64(low, low), high, _mm_unpackhi_epi64(high, high)]
        .map(|eight| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)))
}

/// Adds the products of 32 weights and activations to the lanes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_run(weights: [__m256; 4], x: &[f32], lanes: &mut __m256) {
    for (weights, x) in weights.into_iter().zip(x[..32].chunks_exact(LANES)) {
        // SAFETY: `x` is 8 floats.
        *lanes = _mm256_fmadd_ps(weights, unsafe { _mm256_loadu_ps(x.as_ptr()) }, *lanes);
    }
}

/// Stores 32 weights.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_run(weights: [__m256; 4], out: &mut [f32]) {
    for (weights, out) in weights.into_iter().zip(out[..32].chunks_exact_mut(LANES)) {
        // SAFETY: `out` is 8 floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), weights) };
    }
}

impl<Q: Simd32> By32<Q> {
    /// # Safety
    /// AVX2, FMA and F16C; `group` is a group.
    #[inline(always)]
    unsafe fn weights(group: &[u8]) -> [__m256; 4] {
        let (scale, min) = Q::scales(group);
        // SAFETY: by this function's contract.
        unsafe {
            let (scale, min) = (_mm256_set1_ps(scale), _mm256_set1_ps(min));
            // The product is exact, so fusing changes nothing.
            to_floats(Q::bytes(group), Q::OFFSET)
                .map(|q| if Q::HAS_MIN { _mm256_fmadd_ps(q, scale, min) } else { _mm256_mul_ps(q, scale) })
        }
    }
}

impl<Q: Simd32> Source for By32<Q> {
    const ELEMENTS: usize = 32;
    const GROUP_BYTES: usize = Q::BYTES;

    #[inline(always)]
    unsafe fn decode(bytes: &[u8], out: &mut [f32]) {
        for (group, out) in bytes.chunks_exact(Q::BYTES).zip(out.chunks_exact_mut(32)) {
            // SAFETY: features by the trait's contract.
            unsafe { store_run(Self::weights(group), out) };
        }
    }

    #[inline(always)]
    unsafe fn add_products<const R: usize>(rows: [&[u8]; R], ahead: *const u8, x: &[f32], lanes: &mut [__m256; R]) {
        for (g, x) in x.chunks_exact(32).enumerate() {
            prefetch(ahead.wrapping_add(R * g * Q::BYTES), R * Q::BYTES);
            for (row, lanes) in rows.iter().zip(lanes.iter_mut()) {
                // SAFETY: features by the trait's contract.
                unsafe { add_run(Self::weights(&row[g * Q::BYTES..(g + 1) * Q::BYTES]), x, lanes) };
            }
        }
    }
}

impl<Q: Simd256> By256<Q> {
    /// Scale and minimum of each 16 elements.
    #[inline(always)]
    fn scales(group: &[u8]) -> ([f32; 16], [f32; 16]) {
        let all = Q::scales(group);
        (all.sub.map(|sub| all.scale * f32::from(sub)), all.min.map(|min| all.min_scale * f32::from(min)))
    }

    /// Weights `32 * run..32 * run + 32`.
    ///
    /// # Safety
    /// AVX2, FMA and F16C; `group` is a group.
    #[inline(always)]
    unsafe fn weights(group: &[u8], run: usize, scales: &[f32; 16], mins: &[f32; 16]) -> [__m256; 4] {
        // SAFETY: by this function's contract.
        unsafe {
            let offset = if Q::FLOOR == Floor::Offset32 { 32 } else { 0 };
            let mut weights = to_floats(Q::bytes(group, run), offset);
            for (i, weights) in weights.iter_mut().enumerate() {
                let (scale, min) = (_mm256_set1_ps(scales[2 * run + i / 2]), _mm256_set1_ps(mins[2 * run + i / 2]));
                *weights = match Q::FLOOR {
                    // The product is exact, so fusing changes nothing.
                    Floor::Minimum => _mm256_fmsub_ps(*weights, scale, min),
                    Floor::Offset32 => _mm256_mul_ps(*weights, scale),
                };
            }
            weights
        }
    }
}

impl<Q: Simd256> Source for By256<Q> {
    const ELEMENTS: usize = 256;
    const GROUP_BYTES: usize = Q::BYTES;

    #[inline(always)]
    unsafe fn decode(bytes: &[u8], out: &mut [f32]) {
        for (group, out) in bytes.chunks_exact(Q::BYTES).zip(out.chunks_exact_mut(256)) {
            let (scales, mins) = Self::scales(group);
            for (run, out) in out.chunks_exact_mut(32).enumerate() {
                // SAFETY: features by the trait's contract.
                unsafe { store_run(Self::weights(group, run, &scales, &mins), out) };
            }
        }
    }

    #[inline(always)]
    unsafe fn add_products<const R: usize>(rows: [&[u8]; R], ahead: *const u8, x: &[f32], lanes: &mut [__m256; R]) {
        for (g, x) in x.chunks_exact(256).enumerate() {
            prefetch(ahead.wrapping_add(R * g * Q::BYTES), R * Q::BYTES);
            for (row, lanes) in rows.iter().zip(lanes.iter_mut()) {
                let group = &row[g * Q::BYTES..(g + 1) * Q::BYTES];
                let (scales, mins) = Self::scales(group);
                for (run, x) in x.chunks_exact(32).enumerate() {
                    // SAFETY: features by the trait's contract.
                    unsafe { add_run(Self::weights(group, run, &scales, &mins), x, lanes) };
                }
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
/// `load` needs AVX2 and F16C, and 8 elements readable at `at`, at any alignment.
pub(super) trait Lanes {
    const BYTES: usize;
    unsafe fn load(at: *const u8) -> __m256;
}

impl Lanes for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m256 {
        // SAFETY: 32 bytes are readable by the trait's contract.
        unsafe { _mm256_loadu_ps(at.cast()) }
    }
}

impl Lanes for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m256 {
        // SAFETY: 16 bytes are readable, and F16C is there, by the trait's contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }
}

impl Lanes for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m256 {
        // SAFETY: 16 bytes are readable, and AVX2 is there, by the trait's contract.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast())))) }
    }
}

/// The last elements of a row, fewer than 8, followed by zeros.
#[inline(always)]
fn padded_tail(tail: &[u8]) -> [u8; 32] {
    let mut padded = [0; 32];
    padded[..tail.len()].copy_from_slice(tail);
    padded
}

impl<L: Lanes> Source for L {
    const ELEMENTS: usize = 1;
    const GROUP_BYTES: usize = L::BYTES;

    #[inline(always)]
    unsafe fn decode(bytes: &[u8], out: &mut [f32]) {
        let wide = LANES * L::BYTES;
        let mut chunks = out.chunks_exact_mut(LANES);
        for (out, bytes) in chunks.by_ref().zip(bytes.chunks_exact(wide)) {
            // SAFETY: `bytes` has 8 elements, `out` 8 floats.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), L::load(bytes.as_ptr())) };
        }
        let tail = chunks.into_remainder();
        if !tail.is_empty() {
            let padded = padded_tail(&bytes[bytes.len() - tail.len() * L::BYTES..]);
            let mut lanes = [0.0; LANES];
            // SAFETY: `padded` has room for 8 elements, `lanes` is 8 floats.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), L::load(padded.as_ptr())) };
            tail.copy_from_slice(&lanes[..tail.len()]);
        }
    }

    #[inline(always)]
    unsafe fn add_products<const R: usize>(rows: [&[u8]; R], ahead: *const u8, x: &[f32], lanes: &mut [__m256; R]) {
        let wide = LANES * L::BYTES;
        let whole = rows[0].len() / wide;
        assert!(rows.iter().all(|row| row.len() == rows[0].len()) && x.len() >= whole * LANES);
        for i in 0..whole {
            if i % 4 == 0 {
                prefetch(ahead.wrapping_add(i * wide * R), 4 * wide * R);
            }
            // SAFETY: element 8 i + 7 of `x` and of every row exist, by the assertion.
            unsafe {
                let x = _mm256_loadu_ps(x.as_ptr().add(i * LANES));
                for (row, lanes) in rows.iter().zip(lanes.iter_mut()) {
                    *lanes = _mm256_fmadd_ps(L::load(row.as_ptr().add(i * wide)), x, *lanes);
                }
            }
        }
        if rows[0].len() > whole * wide {
            let x = &x[whole * LANES..whole * LANES + LANES];
            for (row, lanes) in rows.iter().zip(lanes.iter_mut()) {
                let padded = padded_tail(&row[whole * wide..]);
                // SAFETY: `padded` has room for 8 elements, and `x` is 8 floats.
                *lanes = unsafe { _mm256_fmadd_ps(L::load(padded.as_ptr()), _mm256_loadu_ps(x.as_ptr()), *lanes) };
            }
        }
    }
}

/// Some rows against all tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    if x.batch() < PANEL_TOKENS_MIN {
        rows_direct::<S>(weights, rows, x, out);
    } else {
        rows_panel::<S>(weights, rows, x, out);
    }
}

/// Few tokens: weights go from memory to registers, four rows at once to share the activations and to have four
/// independent chains of additions.
#[target_feature(enable = "avx2,fma,f16c")]
fn rows_direct<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    const R: usize = 4;
    let row_bytes = x.cols() / S::ELEMENTS * S::GROUP_BYTES;
    let row_at = |row: usize| &weights[row * row_bytes..(row + 1) * row_bytes];
    let mut row = 0;
    while row + R <= rows {
        let strip: [&[u8]; R] = core::array::from_fn(|r| row_at(row + r));
        for token in 0..x.batch() {
            // Rows side by side make streams too short for the processor to foresee.
            let ahead = weights.as_ptr().wrapping_add((if token == 0 { row + R } else { row }) * row_bytes);
            let mut lanes = [_mm256_setzero_ps(); R];
            // SAFETY: this function has the features.
            unsafe { S::add_products(strip, ahead, x.f32(token), &mut lanes) };
            for (out, lanes) in out.get(token, row, R).iter_mut().zip(lanes) {
                *out = sum_lanes(lanes);
            }
        }
        row += R;
    }
    for row in row..rows {
        for token in 0..x.batch() {
            let mut lanes = [_mm256_setzero_ps()];
            // SAFETY: this function has the features.
            unsafe { S::add_products([row_at(row)], weights.as_ptr(), x.f32(token), &mut lanes) };
            out.get(token, row, 1)[0] = sum_lanes(lanes[0]);
        }
    }
}

/// From this many tokens on a panel of decoded weights pays.
const PANEL_TOKENS_MIN: usize = 3;
/// Rows of a panel.
const PANEL_ROWS: usize = 16;
/// Columns of a panel: 16 KiB together with the rows, half of the first-level cache.
const PANEL_COLS: usize = 256;
/// Rows and tokens of a register tile: 12 accumulators, 3 activations, 1 weight.
const TILE_ROWS: usize = 4;
const TILE_TOKENS: usize = 3;
/// Registers of a tile's part of the panel.
const TILE_PANEL: usize = TILE_ROWS * PANEL_COLS / LANES;

/// Registers in memory, so that they are aligned.
struct Scratch {
    /// `[tile][column / 8][row of the tile]`.
    panel: Vec<__m256>,
    /// A part of a row, before it goes there.
    decoded: [f32; PANEL_COLS],
    /// Lanes of `[token][row of the panel]`.
    sums: Vec<__m256>,
}

std::thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch { panel: Vec::new(), decoded: [0.0; PANEL_COLS], sums: Vec::new() })
    };
}

/// Many tokens: 16 rows × 256 columns are decoded once, then meet all tokens from the cache.
#[target_feature(enable = "avx2,fma,f16c")]
fn rows_panel<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.panel.resize(PANEL_ROWS * PANEL_COLS / LANES, _mm256_setzero_ps());
        let sums = x.batch() * PANEL_ROWS;
        if scratch.sums.len() < sums {
            scratch.sums.resize(sums, _mm256_setzero_ps());
        }
        let row_bytes = x.cols() / S::ELEMENTS * S::GROUP_BYTES;
        for first in (0..rows).step_by(PANEL_ROWS) {
            let n = PANEL_ROWS.min(rows - first);
            strip::<S>(&weights[first * row_bytes..(first + n) * row_bytes], (first, n), x, scratch, out);
        }
    });
}

/// `n` rows (at most [`PANEL_ROWS`]) against all tokens.
#[target_feature(enable = "avx2,fma,f16c")]
fn strip<S: Source>(weights: &[u8], (first, n): (usize, usize), x: &Input, scratch: &mut Scratch, out: &mut Out<'_>) {
    let (cols, batch) = (x.cols(), x.batch());
    let bytes = |elements: usize| elements / S::ELEMENTS * S::GROUP_BYTES;
    let sums = &mut scratch.sums[..batch * PANEL_ROWS];
    sums.fill(_mm256_setzero_ps());
    for start in (0..cols).step_by(PANEL_COLS) {
        let width = PANEL_COLS.min(cols - start);
        let padded = width.next_multiple_of(LANES);
        for (r, row) in weights.chunks_exact(bytes(cols)).enumerate() {
            let row = &row[bytes(start)..bytes(start + width)];
            let place = &mut scratch.panel[r / TILE_ROWS * TILE_PANEL + r % TILE_ROWS..];
            fill_panel::<S>(row, width, &mut scratch.decoded, place);
        }
        for token in (0..batch).step_by(TILE_TOKENS) {
            let sums = &mut sums[token * PANEL_ROWS..];
            for token in token + TILE_TOKENS..batch.min(token + 2 * TILE_TOKENS) {
                // Each token's part is a stream too short for the processor to foresee.
                prefetch(x.f32(token)[start..].as_ptr().cast(), 4 * padded);
            }
            let x = |t: usize| &x.f32(token + t)[start..start + padded];
            for (tile, panel) in scratch.panel.chunks_exact(TILE_PANEL).take(n.div_ceil(TILE_ROWS)).enumerate() {
                let sums = &mut sums[tile * TILE_ROWS..];
                match batch - token {
                    1 => multiply::<1>(panel, [x(0)], sums),
                    2 => multiply::<2>(panel, [x(0), x(1)], sums),
                    _ => multiply::<TILE_TOKENS>(panel, [x(0), x(1), x(2)], sums),
                }
            }
        }
    }
    for (token, sums) in sums.chunks_exact(PANEL_ROWS).enumerate() {
        for (out, &sum) in out.get(token, first, n).iter_mut().zip(sums) {
            *out = sum_lanes(sum);
        }
    }
}

/// Decodes a part of a row to every [`TILE_ROWS`]th register of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
fn fill_panel<S: Source>(row: &[u8], width: usize, decoded: &mut [f32; PANEL_COLS], panel: &mut [__m256]) {
    // SAFETY: this function has the features.
    unsafe { S::decode(row, &mut decoded[..width]) };
    decoded[width..width.next_multiple_of(LANES)].fill(0.0);
    let registers = decoded[..width.next_multiple_of(LANES)].chunks_exact(LANES);
    for (place, decoded) in panel.iter_mut().step_by(TILE_ROWS).zip(registers) {
        // SAFETY: `decoded` is 8 floats.
        *place = unsafe { _mm256_loadu_ps(decoded.as_ptr()) };
    }
}

/// The rows of a tile's panel, side by side, against `T` tokens, in registers. Rows that were not filled give sums that
/// nobody reads.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn multiply<const T: usize>(panel: &[__m256], x: [&[f32]; T], sums: &mut [__m256]) {
    let width = x[0].len();
    assert!(panel.len() >= width / LANES * TILE_ROWS && x.iter().all(|x| x.len() == width));
    assert!(sums.len() >= (T - 1) * PANEL_ROWS + TILE_ROWS);
    let mut lanes = [[_mm256_setzero_ps(); TILE_ROWS]; T];
    for (t, lanes) in lanes.iter_mut().enumerate() {
        lanes.copy_from_slice(&sums[t * PANEL_ROWS..t * PANEL_ROWS + TILE_ROWS]);
    }
    for i in 0..width / LANES {
        // SAFETY: register `i` of every token, and registers `4 i..4 i + 4` of the panel, are there by the assertions.
        unsafe {
            let x = x.map(|x| _mm256_loadu_ps(x.as_ptr().add(i * LANES)));
            #[expect(clippy::needless_range_loop, reason = "r and t walk several arrays at once")]
            for r in 0..TILE_ROWS {
                let weights = *panel.get_unchecked(i * TILE_ROWS + r);
                for t in 0..T {
                    lanes[t][r] = _mm256_fmadd_ps(weights, x[t], lanes[t][r]);
                }
            }
        }
    }
    for (t, lanes) in lanes.iter().enumerate() {
        sums[t * PANEL_ROWS..t * PANEL_ROWS + TILE_ROWS].copy_from_slice(lanes);
    }
}
