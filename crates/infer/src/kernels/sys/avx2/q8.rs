//! Quantised weights against 8-bit activations, few tokens: eight rows at once, from memory to registers.
//!
//! A lane is a row. Integer sums of the eight rows' groups are exact; one transposing reduction brings them into the
//! lanes of one register, which is then scaled and added, group by group, as `scalar.rs` says. So a register of any
//! width, and the blocked kernels of `packed.rs`, give the same bits.

use super::super::super::blocks::{Floor, Group32, Group256, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use super::super::super::input::{Input, Token32, Token256};
use super::super::columns::Out;
use core::arch::x86_64::*;

/// Rows at once: the lanes of a register.
const ROWS: usize = 8;

/// A type of 32 elements a group, unpacked by SIMD.
///
/// # Safety
/// The functions need AVX2; they are `inline(always)` and belong inside a function that enables it. `group` has
/// [`Group32::BYTES`] bytes.
pub(super) trait Simd32: Group32 {
    /// Whether `products` gives sixteen 16-bit sums of q + OFFSET times x, instead of eight 32-bit sums of q times x.
    const NARROW: bool = true;

    /// The integers of a group: q + OFFSET, as [`Group32::unsigned`].
    unsafe fn bytes(group: &[u8]) -> __m256i;

    /// Sums of adjacent products with 32 activations.
    #[inline(always)]
    unsafe fn products(group: &[u8], x: __m256i) -> __m256i {
        // SAFETY: AVX2 by the trait's contract.
        unsafe { _mm256_maddubs_epi16(Self::bytes(group), x) }
    }
}

/// A type of 256 elements a group, unpacked by SIMD.
///
/// # Safety
/// The functions need AVX2, `group` has [`Group256::BYTES`] bytes, and 256 bytes are readable at `x`.
pub(super) trait Simd256: Group256 {
    /// Where in a group the scale is; the scale of minima follows it.
    const SCALE_AT: usize;

    /// Integers `32 * run..32 * run + 32` of a group.
    unsafe fn bytes(group: &[u8], run: usize) -> __m256i;

    /// Eight sums of sub-scale times q times x, and eight of sub-minimum times `sums` (for [`Floor::Offset32`] already
    /// taken off the first).
    unsafe fn products(group: &[u8], x: *const i8, sums: __m256i) -> (__m256i, __m256i);
}

/// 16 bytes of nibbles as 32 bytes: low ones, then high ones.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn nibbles(packed: &[u8; 16]) -> __m256i {
    // SAFETY: 16 bytes are readable.
    let packed = unsafe { _mm_loadu_si128(packed.as_ptr().cast()) };
    let shifted = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(packed), _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
    _mm256_and_si256(shifted, _mm256_set1_epi8(15))
}

/// 32 bits as 32 bytes: 16 for a one, 0 for a zero.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn fifth_bits(packed: &[u8; 4]) -> __m256i {
    // Byte i of the mask's source is byte i / 8 of the bits; then bit i % 8 is singled out.
    let spread = _mm256_set_epi64x(0x0303_0303_0303_0303, 0x0202_0202_0202_0202, 0x0101_0101_0101_0101, 0);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(*packed)), spread);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
    _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit), _mm256_set1_epi8(16))
}

/// `N` bytes from `at` on; the check vanishes where the length is known.
#[inline(always)]
fn bytes_at<const N: usize>(group: &[u8], at: usize) -> &[u8; N] {
    match group[at..].first_chunk() {
        Some(bytes) => bytes,
        None => panic!("a group is shorter than its type"),
    }
}

macro_rules! narrow {
    ($type:ty, $group:ident => $q:expr) => {
        impl Simd32 for $type {
            #[inline(always)]
            unsafe fn bytes($group: &[u8]) -> __m256i {
                // SAFETY: AVX2 by the trait's contract.
                unsafe { $q }
            }
        }
    };
}

narrow!(Q4_0, group => nibbles(bytes_at(group, 2)));
narrow!(Q4_1, group => nibbles(bytes_at(group, 4)));
narrow!(Q5_0, group => _mm256_or_si256(nibbles(bytes_at(group, 6)), fifth_bits(bytes_at(group, 2))));
narrow!(Q5_1, group => _mm256_or_si256(nibbles(bytes_at(group, 8)), fifth_bits(bytes_at(group, 4))));

impl Simd32 for Q8_0 {
    const NARROW: bool = false;

    #[inline(always)]
    unsafe fn bytes(group: &[u8]) -> __m256i {
        // SAFETY: AVX2 by the trait's contract.
        unsafe { _mm256_xor_si256(load(bytes_at(group, 2)), _mm256_set1_epi8(-128)) }
    }

    #[inline(always)]
    unsafe fn products(group: &[u8], x: __m256i) -> __m256i {
        // SAFETY: AVX2 by the trait's contract.
        unsafe {
            let q = load(bytes_at(group, 2));
            // |q| ≤ 128 and |x| ≤ 127: two products are below 2^15.
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
            _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
        }
    }
}

/// Eight scales and eight minima of 6 bits, as bytes.
#[inline(always)]
fn scales_k4(group: &[u8]) -> (u64, u64) {
    let packed: &[u8; 12] = bytes_at(group, 4);
    let word = |at: usize| u32::from_le_bytes([packed[at], packed[at + 1], packed[at + 2], packed[at + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    let (low4, high2, low6) = (0x0f0f_0f0f, 0x0303_0303, 0x3f3f_3f3f);
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let scales = join(a & low6, (c & low4) | ((a >> 6) & high2) << 4);
    let mins = join(b & low6, ((c >> 4) & low4) | ((b >> 6) & high2) << 4);
    (scales, mins)
}

/// Eight bytes as 16-bit values, in each half of the register.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn widen8(bytes: u64) -> __m256i {
    let wide = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(bytes as i64));
    _mm256_set_m128i(wide, wide)
}

/// The 16-bit value `index` of each half, in every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn spread16(values: __m256i, index: usize) -> __m256i {
    _mm256_shuffle_epi8(values, _mm256_set1_epi16((0x0100 + 0x0202 * index) as i16))
}

/// Sub-minimum times sum of activations, for eight sub-minima that serve 32 elements each.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn min_products(mins: u64, sums: __m256i) -> __m256i {
    let mins = _mm_cvtsi64_si128(mins as i64);
    _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(mins, mins)), sums)
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes are readable.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// What Q4_K and Q5_K share: one scale and one minimum for each run of 32.
///
/// # Safety
/// As [`Simd256::products`].
#[inline(always)]
unsafe fn products_k4<Q: Simd256>(group: &[u8], x: *const i8, sums: __m256i) -> (__m256i, __m256i) {
    let (scales, mins) = scales_k4(group);
    // SAFETY: AVX2, and 256 bytes at `x`, by this function's contract.
    unsafe {
        let scales = widen8(scales);
        let mut total = _mm256_setzero_si256();
        for run in 0..8 {
            let x = _mm256_loadu_si256(x.add(32 * run).cast());
            let pairs = _mm256_maddubs_epi16(Q::bytes(group, run), x);
            total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, spread16(scales, run)));
        }
        (total, min_products(mins, sums))
    }
}

impl Simd256 for Q4K {
    const SCALE_AT: usize = 0;

    #[inline(always)]
    unsafe fn bytes(group: &[u8], run: usize) -> __m256i {
        // SAFETY: AVX2 by the trait's contract.
        unsafe {
            let packed = load(bytes_at(group, 16 + 32 * (run / 2)));
            let packed = if run % 2 == 0 { packed } else { _mm256_srli_epi16::<4>(packed) };
            _mm256_and_si256(packed, _mm256_set1_epi8(15))
        }
    }

    #[inline(always)]
    unsafe fn products(group: &[u8], x: *const i8, sums: __m256i) -> (__m256i, __m256i) {
        // SAFETY: by the trait's contract.
        unsafe { products_k4::<Self>(group, x, sums) }
    }
}

impl Simd256 for Q5K {
    const SCALE_AT: usize = 0;

    #[inline(always)]
    unsafe fn bytes(group: &[u8], run: usize) -> __m256i {
        // SAFETY: AVX2 by the trait's contract.
        unsafe {
            let packed = load(bytes_at(group, 48 + 32 * (run / 2)));
            let packed = if run % 2 == 0 { packed } else { _mm256_srli_epi16::<4>(packed) };
            let fifth = load(bytes_at(group, 16));
            // Bit `run` of each byte moves to bit 4.
            let fifth = if run < 4 {
                _mm256_sll_epi16(fifth, _mm_cvtsi32_si128(4 - run as i32))
            } else {
                _mm256_srl_epi16(fifth, _mm_cvtsi32_si128(run as i32 - 4))
            };
            let low = _mm256_and_si256(packed, _mm256_set1_epi8(15));
            _mm256_or_si256(low, _mm256_and_si256(fifth, _mm256_set1_epi8(16)))
        }
    }

    #[inline(always)]
    unsafe fn products(group: &[u8], x: *const i8, sums: __m256i) -> (__m256i, __m256i) {
        // SAFETY: by the trait's contract.
        unsafe { products_k4::<Self>(group, x, sums) }
    }
}

impl Simd256 for Q6K {
    const SCALE_AT: usize = 208;

    #[inline(always)]
    unsafe fn bytes(group: &[u8], run: usize) -> __m256i {
        // SAFETY: AVX2 by the trait's contract.
        unsafe {
            let (half, part) = (run / 4, run % 4);
            let low = load(bytes_at(group, 64 * half + 32 * (part % 2)));
            let high = load(bytes_at(group, 128 + 32 * half));
            let low = if part < 2 { low } else { _mm256_srli_epi16::<4>(low) };
            // Bits 2 part and 2 part + 1 of each byte move to bits 4 and 5.
            let high = match part {
                0 => _mm256_slli_epi16::<4>(high),
                1 => _mm256_slli_epi16::<2>(high),
                2 => high,
                _ => _mm256_srli_epi16::<2>(high),
            };
            let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
            _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)))
        }
    }

    #[inline(always)]
    unsafe fn products(group: &[u8], x: *const i8, sums: __m256i) -> (__m256i, __m256i) {
        // SAFETY: AVX2, and 256 bytes at `x`, by the trait's contract.
        unsafe {
            let scales = _mm_loadu_si128(bytes_at::<16>(group, 192).as_ptr().cast());
            let offset = _mm256_madd_epi16(_mm256_cvtepi8_epi16(scales), sums);
            let mut total = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32::<5>(offset));
            for run in 0..8 {
                let x = _mm256_loadu_si256(x.add(32 * run).cast());
                // Sub-scale 2 run for the first 16 elements, 2 run + 1 for the others.
                let which = _mm_set_epi64x(
                    0x0101_0101_0101_0101 * (2 * run as i64 + 1),
                    0x0101_0101_0101_0101 * 2 * run as i64,
                );
                let scale = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, which));
                let pairs = _mm256_maddubs_epi16(Self::bytes(group, run), x);
                total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, scale));
            }
            (total, _mm256_setzero_si256())
        }
    }
}

/// Lane r becomes the sum of the eight 32-bit lanes of `v[r]`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn reduce32(v: [__m256i; ROWS]) -> __m256i {
    let four = |i: usize| _mm256_hadd_epi32(_mm256_hadd_epi32(v[i], v[i + 1]), _mm256_hadd_epi32(v[i + 2], v[i + 3]));
    halves(four(0), four(4))
}

/// Lane r becomes the sum of the sixteen 16-bit lanes of `v[r]`, none above 7874 (31 × 127 × 2), so that four of them
/// stay below 2^15. Widening to 32 bits and packing again adds neighbours like a horizontal addition, but on ports
/// that are free.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn reduce16(v: [__m256i; ROWS]) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let two = |a: __m256i, b: __m256i| _mm256_packs_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
    let four = |i: usize| _mm256_madd_epi16(two(two(v[i], v[i + 1]), two(v[i + 2], v[i + 3])), ones);
    halves(four(0), four(4))
}

/// Adds the two halves of each, the first's sums to the lower half.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn halves(a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b))
}

/// The f16 at byte `at` of each row, as f32. Every row has two bytes there: the caller has checked. Put together in
/// general registers, because vector ports are what is short.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn gather_f16(rows: &[&[u8]; ROWS], at: usize) -> __m256 {
    // SAFETY: the caller has checked that `at + 2` lies in every row.
    let half = |r: usize| u64::from(unsafe { rows[r].as_ptr().add(at).cast::<u16>().read_unaligned() });
    let four = |r: usize| half(r) | half(r + 1) << 16 | (half(r + 2) | half(r + 3) << 16) << 32;
    _mm256_cvtph_ps(_mm_set_epi64x(four(4) as i64, four(0) as i64))
}

/// Asks for `bytes` bytes from `at` on to be brought near; nothing happens if they are not there.
#[inline(always)]
pub(super) fn prefetch(at: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        // SAFETY: a prefetch touches nothing, whatever the address; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(64 * line).cast()) };
    }
}

/// Group `at..at + bytes` of a row, which the caller has checked to be there.
///
/// # Safety
/// `at + bytes <= row.len()`.
#[inline(always)]
unsafe fn group(row: &[u8], at: usize, bytes: usize) -> &[u8] {
    // SAFETY: by this function's contract.
    unsafe { row.get_unchecked(at..at + bytes) }
}

/// Eight rows with one token: lane = row. Meanwhile as many bytes are fetched from `ahead` on.
#[target_feature(enable = "avx2,fma,f16c")]
fn dot32<Q: Simd32>(rows: &[&[u8]; ROWS], ahead: *const u8, x: Token32<'_>) -> __m256 {
    let groups = x.scales.len();
    assert!(rows.iter().all(|row| row.len() == groups * Q::BYTES) && x.q.len() == 32 * groups);
    assert!(x.sums.len() == groups && x.scaled_sums.len() == groups);
    let mut sum = _mm256_setzero_ps();
    for g in 0..groups {
        let at = g * Q::BYTES;
        prefetch(ahead.wrapping_add(ROWS * at), ROWS * Q::BYTES);
        let mut products = [_mm256_setzero_si256(); ROWS];
        // SAFETY: group `g` lies in every row and in `x`, by the assertions; this function has AVX2.
        unsafe {
            let x = _mm256_loadu_si256(x.q.as_ptr().add(32 * g).cast());
            for (products, row) in products.iter_mut().zip(rows) {
                *products = Q::products(group(row, at, Q::BYTES), x);
            }
        }
        let integers = if Q::NARROW {
            let offset = _mm256_set1_epi32(i32::from(Q::OFFSET) * x.sums[g]);
            _mm256_sub_epi32(reduce16(products), offset)
        } else {
            reduce32(products)
        };
        let scale = _mm256_mul_ps(gather_f16(rows, at), _mm256_set1_ps(x.scales[g]));
        sum = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(integers), sum);
        if Q::HAS_MIN {
            sum = _mm256_fmadd_ps(gather_f16(rows, at + 2), _mm256_set1_ps(x.scaled_sums[g]), sum);
        }
    }
    sum
}

/// Eight rows with one token: lane = row. Meanwhile as many bytes are fetched from `ahead` on.
#[target_feature(enable = "avx2,fma,f16c")]
fn dot256<Q: Simd256>(rows: &[&[u8]; ROWS], ahead: *const u8, x: Token256<'_>) -> __m256 {
    let groups = x.scales.len();
    assert!(rows.iter().all(|row| row.len() == groups * Q::BYTES));
    assert!(x.q.len() == 256 * groups && x.sums.len() == 16 * groups);
    let mut sum = _mm256_setzero_ps();
    for g in 0..groups {
        let at = g * Q::BYTES;
        prefetch(ahead.wrapping_add(ROWS * at), ROWS * Q::BYTES);
        let mut products = [_mm256_setzero_si256(); ROWS];
        let mut mins = [_mm256_setzero_si256(); ROWS];
        // SAFETY: group `g` lies in every row and in `x`, by the assertions; this function has AVX2.
        unsafe {
            let sums = _mm256_loadu_si256(x.sums.as_ptr().add(16 * g).cast());
            let x = x.q.as_ptr().add(256 * g);
            for ((products, mins), row) in products.iter_mut().zip(&mut mins).zip(rows) {
                (*products, *mins) = Q::products(group(row, at, Q::BYTES), x, sums);
            }
        }
        let x_scale = _mm256_set1_ps(x.scales[g]);
        let scale = _mm256_mul_ps(gather_f16(rows, at + Q::SCALE_AT), x_scale);
        sum = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(reduce32(products)), sum);
        if Q::FLOOR == Floor::Minimum {
            let scale = _mm256_mul_ps(gather_f16(rows, at + Q::SCALE_AT + 2), x_scale);
            sum = _mm256_fnmadd_ps(scale, _mm256_cvtepi32_ps(reduce32(mins)), sum);
        }
    }
    sum
}

/// Calls `dot` for each eight rows (the last padded by repeating a row) and token, and writes the lanes. `dot` is also
/// told where the next rows begin, which it should fetch: eight rows side by side make streams too short for the
/// processor to foresee.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn strips(
    weights: &[u8],
    rows: usize,
    x: &Input,
    out: &mut Out<'_>,
    dot: impl Fn(&[&[u8]; ROWS], *const u8, usize) -> __m256,
) {
    let row_bytes = weights.len() / rows.max(1);
    for first in (0..rows).step_by(ROWS) {
        let n = ROWS.min(rows - first);
        let strip = core::array::from_fn(|r| {
            let row = first + r.min(n - 1);
            &weights[row * row_bytes..(row + 1) * row_bytes]
        });
        for token in 0..x.batch() {
            let ahead = if token == 0 { first + ROWS } else { first };
            let mut lanes = [0.0; ROWS];
            let sums = dot(&strip, weights.as_ptr().wrapping_add(ahead * row_bytes), token);
            // SAFETY: `lanes` is 8 floats.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums) };
            out.get(token, first, n).copy_from_slice(&lanes[..n]);
        }
    }
}

/// Rows of a 32-element type against all tokens, one token after the other.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows32<Q: Simd32>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    strips(weights, rows, x, out, |strip, ahead, token| dot32::<Q>(strip, ahead, x.group32(token)));
}

/// Rows of a 256-element type against all tokens, one token after the other.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows256<Q: Simd256>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    strips(weights, rows, x, out, |strip, ahead, token| dot256::<Q>(strip, ahead, x.group256(token)));
}
