//! Weights against f32 activations: where they come from, and products of few tokens, straight from the weights' bytes.
//!
//! Many tokens are in `panel.rs`.

use super::super::super::blocks::Floor;
use super::super::super::input::{Input, LANES};
use super::super::columns::Out;
use super::q8::{Simd32, Simd256, prefetch};
use super::{panel, sum_lanes};
use core::arch::x86_64::*;
use core::marker::PhantomData;

/// Weights that can be had as f32.
///
/// # Safety
/// Every method needs AVX2, FMA and F16C; they are `inline(always)` and belong inside a function that enables these.
pub(in super::super) trait Source {
    /// Elements of a group.
    const ELEMENTS: usize;
    /// Bytes of a group.
    const GROUP_BYTES: usize;
    /// From this many tokens on, decoding to a panel pays.
    const PANEL_TOKENS_MIN: usize;
    /// Gives the elements of `bytes`, whole groups, eight at a time with their number of eights; the last are followed
    /// by zeros.
    unsafe fn each(bytes: &[u8], take: impl FnMut(usize, __m256));
    /// Adds the lane-wise products of `R` rows with `T` tokens, tokens padded to whole lanes and rows of equal length.
    /// Meanwhile as many bytes as the rows have are fetched from `ahead` on.
    unsafe fn add_products<const R: usize, const T: usize>(
        rows: [&[u8]; R],
        ahead: *const u8,
        x: [&[f32]; T],
        lanes: &mut [[__m256; R]; T],
    );
}

/// Types of 32 elements a group, decoded in registers.
pub(in super::super) struct By32<Q>(PhantomData<Q>);
/// Types of 256 elements a group, decoded in registers.
pub(in super::super) struct By256<Q>(PhantomData<Q>);

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

    const PANEL_TOKENS_MIN: usize = 7;

    #[inline(always)]
    unsafe fn each(bytes: &[u8], mut take: impl FnMut(usize, __m256)) {
        for (g, group) in bytes.chunks_exact(Q::BYTES).enumerate() {
            // SAFETY: features by the trait's contract.
            let weights = unsafe { Self::weights(group) };
            for (i, weights) in weights.into_iter().enumerate() {
                take(4 * g + i, weights);
            }
        }
    }

    #[inline(always)]
    unsafe fn add_products<const R: usize, const T: usize>(
        rows: [&[u8]; R],
        ahead: *const u8,
        x: [&[f32]; T],
        lanes: &mut [[__m256; R]; T],
    ) {
        for g in 0..x[0].len() / 32 {
            prefetch(ahead.wrapping_add(R * g * Q::BYTES), R * Q::BYTES);
            for (r, row) in rows.iter().enumerate() {
                // SAFETY: features by the trait's contract.
                unsafe {
                    let weights = Self::weights(&row[g * Q::BYTES..(g + 1) * Q::BYTES]);
                    for (x, lanes) in x.iter().zip(lanes.iter_mut()) {
                        add_run(weights, &x[32 * g..], &mut lanes[r]);
                    }
                }
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

    const PANEL_TOKENS_MIN: usize = 7;

    #[inline(always)]
    unsafe fn each(bytes: &[u8], mut take: impl FnMut(usize, __m256)) {
        for (g, group) in bytes.chunks_exact(Q::BYTES).enumerate() {
            let (scales, mins) = Self::scales(group);
            for run in 0..8 {
                // SAFETY: features by the trait's contract.
                let weights = unsafe { Self::weights(group, run, &scales, &mins) };
                for (i, weights) in weights.into_iter().enumerate() {
                    take(32 * g + 4 * run + i, weights);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add_products<const R: usize, const T: usize>(
        rows: [&[u8]; R],
        ahead: *const u8,
        x: [&[f32]; T],
        lanes: &mut [[__m256; R]; T],
    ) {
        for g in 0..x[0].len() / 256 {
            prefetch(ahead.wrapping_add(R * g * Q::BYTES), R * Q::BYTES);
            for (r, row) in rows.iter().enumerate() {
                let group = &row[g * Q::BYTES..(g + 1) * Q::BYTES];
                let (scales, mins) = Self::scales(group);
                for run in 0..8 {
                    // SAFETY: features by the trait's contract.
                    unsafe {
                        let weights = Self::weights(group, run, &scales, &mins);
                        for (x, lanes) in x.iter().zip(lanes.iter_mut()) {
                            add_run(weights, &x[256 * g + 32 * run..], &mut lanes[r]);
                        }
                    }
                }
            }
        }
    }
}

/// IEEE single precision.
pub(in super::super) struct F32;
/// IEEE half precision.
pub(in super::super) struct F16;
/// bfloat16.
pub(in super::super) struct Bf16;

/// A plain float type, eight at a time.
///
/// # Safety
/// `load` needs AVX2 and F16C, and 8 elements readable at `at`, at any alignment.
pub(in super::super) trait Lanes {
    const BYTES: usize;
    /// As [`Source`]'s.
    const PANEL_TOKENS_MIN: usize;
    unsafe fn load(at: *const u8) -> __m256;
}

impl Lanes for F32 {
    const BYTES: usize = 4;
    const PANEL_TOKENS_MIN: usize = 17;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m256 {
        // SAFETY: 32 bytes are readable by the trait's contract.
        unsafe { _mm256_loadu_ps(at.cast()) }
    }
}

impl Lanes for F16 {
    const BYTES: usize = 2;
    const PANEL_TOKENS_MIN: usize = 25;
    #[inline(always)]
    unsafe fn load(at: *const u8) -> __m256 {
        // SAFETY: 16 bytes are readable, and F16C is there, by the trait's contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }
}

impl Lanes for Bf16 {
    const BYTES: usize = 2;
    const PANEL_TOKENS_MIN: usize = 25;
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

    const PANEL_TOKENS_MIN: usize = L::PANEL_TOKENS_MIN;

    #[inline(always)]
    unsafe fn each(bytes: &[u8], mut take: impl FnMut(usize, __m256)) {
        let chunks = bytes.chunks_exact(LANES * L::BYTES);
        let tail = chunks.remainder();
        let whole = chunks.len();
        for (i, bytes) in chunks.enumerate() {
            // SAFETY: `bytes` has 8 elements.
            take(i, unsafe { L::load(bytes.as_ptr()) });
        }
        if !tail.is_empty() {
            // SAFETY: the tail is made long enough for 8 elements.
            take(whole, unsafe { L::load(padded_tail(tail).as_ptr()) });
        }
    }

    #[inline(always)]
    unsafe fn add_products<const R: usize, const T: usize>(
        rows: [&[u8]; R],
        ahead: *const u8,
        x: [&[f32]; T],
        lanes: &mut [[__m256; R]; T],
    ) {
        let wide = LANES * L::BYTES;
        let whole = rows[0].len() / wide;
        assert!(rows.iter().all(|row| row.len() == rows[0].len()) && x.iter().all(|x| x.len() >= whole * LANES));
        for i in 0..whole {
            if i % 4 == 0 {
                prefetch(ahead.wrapping_add(i * wide * R), 4 * wide * R);
            }
            // SAFETY: element 8 i + 7 of every token and of every row exist, by the assertion.
            unsafe {
                // One activation at a time: six tokens' sums leave three registers.
                let weights: [__m256; R] = core::array::from_fn(|r| L::load(rows[r].as_ptr().add(i * wide)));
                for (x, lanes) in x.iter().zip(lanes.iter_mut()) {
                    let x = _mm256_loadu_ps(x.as_ptr().add(i * LANES));
                    for (weights, lanes) in weights.iter().zip(lanes.iter_mut()) {
                        *lanes = _mm256_fmadd_ps(*weights, x, *lanes);
                    }
                }
            }
        }
        if rows[0].len() > whole * wide {
            for (r, row) in rows.iter().enumerate() {
                let padded = padded_tail(&row[whole * wide..]);
                for (x, lanes) in x.iter().zip(lanes.iter_mut()) {
                    let x = &x[whole * LANES..whole * LANES + LANES];
                    // SAFETY: `padded` has room for 8 elements, and `x` is 8 floats.
                    lanes[r] =
                        unsafe { _mm256_fmadd_ps(L::load(padded.as_ptr()), _mm256_loadu_ps(x.as_ptr()), lanes[r]) };
                }
            }
        }
    }
}

/// Decodes `out.len()` elements, whole groups.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn decode<S: Source>(bytes: &[u8], out: &mut [f32]) {
    // SAFETY: this function has the features.
    unsafe {
        S::each(bytes, |i, eight| {
            let out = &mut out[i * LANES..];
            if out.len() >= LANES {
                _mm256_storeu_ps(out.as_mut_ptr(), eight);
            } else {
                let mut lanes = [0.0; LANES];
                _mm256_storeu_ps(lanes.as_mut_ptr(), eight);
                out.copy_from_slice(&lanes[..out.len()]);
            }
        });
    }
}

/// Some rows against all tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn rows<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    if x.batch() < S::PANEL_TOKENS_MIN {
        rows_direct::<S>(weights, rows, x, out);
    } else {
        panel::rows::<S>(weights, rows, x, out);
    }
}

/// Tokens that a pair of rows meets at once: 12 sums, 2 weights, 1 activation in registers.
const PAIR_TOKENS: usize = 6;

/// Few tokens: weights go from memory to registers, each once for up to six tokens. One or two tokens meet four rows at
/// once, to share the activations and to have independent chains of additions; more meet two.
#[target_feature(enable = "avx2,fma,f16c")]
fn rows_direct<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let mut weights = Strips { weights, row_bytes: x.cols() / S::ELEMENTS * S::GROUP_BYTES, row: 0, rows };
    match x.batch() {
        1 => weights.each(|strip, row, ahead| tile::<S, 4, 1>(strip, ahead, x, (0, row), out)),
        2 => weights.each(|strip, row, ahead| tile::<S, 4, 2>(strip, ahead, x, (0, row), out)),
        _ => weights.each(|strip, row, ahead| strip_pair::<S, 2>(strip, ahead, row, x, out)),
    }
    // What is left is fewer rows than a strip has.
    weights.each(|strip, row, ahead| strip_pair::<S, 1>(strip, ahead, row, x, out));
}

/// Rows not yet multiplied.
struct Strips<'a> {
    weights: &'a [u8],
    row_bytes: usize,
    row: usize,
    rows: usize,
}

impl Strips<'_> {
    /// Calls `job(strip, its first row, what follows)` for strips of `R` rows until fewer are left. Rows side by side
    /// make streams too short for the processor to foresee, so the job fetches what follows.
    #[inline(always)]
    fn each<const R: usize>(&mut self, mut job: impl FnMut([&[u8]; R], usize, *const u8)) {
        while self.rows - self.row >= R {
            let at = |row: usize| &self.weights[row * self.row_bytes..(row + 1) * self.row_bytes];
            let strip = core::array::from_fn(|r| at(self.row + r));
            job(strip, self.row, self.weights.as_ptr().wrapping_add((self.row + R) * self.row_bytes));
            self.row += R;
        }
    }
}

/// One or two rows from `row` on against all tokens, in tiles as even as they can be.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn strip_pair<S: Source, const R: usize>(
    strip: [&[u8]; R],
    ahead: *const u8,
    row: usize,
    x: &Input,
    out: &mut Out<'_>,
) {
    let (mut token, mut ahead) = (0, ahead);
    while token < x.batch() {
        let left = x.batch() - token;
        let tokens = left.div_ceil(left.div_ceil(PAIR_TOKENS));
        match tokens {
            1 => tile::<S, R, 1>(strip, ahead, x, (token, row), out),
            2 => tile::<S, R, 2>(strip, ahead, x, (token, row), out),
            3 => tile::<S, R, 3>(strip, ahead, x, (token, row), out),
            4 => tile::<S, R, 4>(strip, ahead, x, (token, row), out),
            5 => tile::<S, R, 5>(strip, ahead, x, (token, row), out),
            _ => tile::<S, R, PAIR_TOKENS>(strip, ahead, x, (token, row), out),
        }
        token += tokens;
        // What follows has been fetched once.
        ahead = strip[0].as_ptr();
    }
}

/// `R` rows from `row` on against `T` tokens from `token` on.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tile<S: Source, const R: usize, const T: usize>(
    strip: [&[u8]; R],
    ahead: *const u8,
    x: &Input,
    (token, row): (usize, usize),
    out: &mut Out<'_>,
) {
    let mut lanes = [[_mm256_setzero_ps(); R]; T];
    // SAFETY: this function has the features.
    unsafe { S::add_products(strip, ahead, core::array::from_fn(|t| x.f32(token + t)), &mut lanes) };
    for (t, lanes) in lanes.into_iter().enumerate() {
        for (out, lanes) in out.get(token + t, row, R).iter_mut().zip(lanes) {
            *out = sum_lanes(lanes);
        }
    }
}
