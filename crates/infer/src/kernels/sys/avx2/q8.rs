//! Quantised weights against 8-bit activations, few tokens: eight rows at once, from memory to registers.
//!
//! A lane is a row. Integer sums of the eight rows' groups are exact; one transposing reduction brings them into the
//! lanes of one register, which is then scaled and added, group by group, as `scalar.rs` says. So a register of any
//! width, and the blocked kernels of `packed.rs`, give the same bits.

use super::super::super::blocks::{Group32, Group256, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use super::super::super::input::{Input, Token32, Token256};
use super::super::columns::Out;
use core::arch::x86_64::*;

/// Rows at once: the lanes of a register.
pub(in super::super) const LANES: usize = 8;

/// Eight rows, equally far apart (or one row eight times): all that is needed to find them, in few registers.
#[derive(Clone, Copy)]
pub(in super::super) struct Eight {
    base: *const u8,
    stride: usize,
}

impl Eight {
    /// Rows `first..first + 8` of `weights`.
    ///
    /// # Panics
    /// If they are not there.
    pub(in super::super) fn rows(weights: &[u8], first: usize, row_bytes: usize) -> Self {
        let rows = &weights[first * row_bytes..(first + LANES) * row_bytes];
        Self { base: rows.as_ptr(), stride: row_bytes }
    }

    /// `row`, eight times.
    pub(in super::super) fn repeat(row: &[u8]) -> Self {
        Self { base: row.as_ptr(), stride: 0 }
    }

    /// Byte `at` of row `lane`.
    ///
    /// # Safety
    /// `at` lies in the rows that this was made of, and `lane` is below 8.
    #[inline(always)]
    pub(in super::super) unsafe fn at(self, lane: usize, at: usize) -> *const u8 {
        // SAFETY: by this function's contract.
        unsafe { self.base.add(at + lane * self.stride) }
    }

    /// `N` bytes of row `lane`, from `at` on.
    ///
    /// # Safety
    /// They lie in the rows that this was made of, which outlive the result; `lane` is below 8.
    #[inline(always)]
    pub(in super::super) unsafe fn bytes<'a>(self, lane: usize, at: usize, bytes: usize) -> &'a [u8] {
        // SAFETY: by this function's contract.
        unsafe { core::slice::from_raw_parts(self.at(lane, at), bytes) }
    }
}

/// A type of 32 elements a group, unpacked by SIMD.
///
/// # Safety
/// The functions need AVX2; they are `inline(always)` and belong inside a function that enables it. A group has
/// [`Group32::BYTES`] bytes.
pub(in super::super) trait Simd32: Group32 {
    /// The integers of a group: q + OFFSET, as [`Group32::unsigned`].
    unsafe fn bytes(group: &[u8]) -> __m256i;

    /// Elements 0..16 of group `a`, then of group `b`; and likewise elements 16..32.
    #[inline(always)]
    unsafe fn pair(a: &[u8], b: &[u8]) -> (__m256i, __m256i) {
        // SAFETY: by the trait's contract.
        unsafe {
            let (a, b) = (Self::bytes(a), Self::bytes(b));
            (_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b))
        }
    }
}

/// A type of 256 elements a group, unpacked by SIMD.
///
/// # Safety
/// The functions need AVX2, and a group has [`Group256::BYTES`] bytes. For `products`, the group at `at` lies in the
/// rows, and the activations have a group `g`.
pub(in super::super) trait Simd256: Group256 {
    /// Integers `32 * run..32 * run + 32` of a group.
    unsafe fn bytes(group: &[u8], run: usize) -> __m256i;

    /// The products of eight rows' group at `at` with group `g` of a token.
    unsafe fn products(rows: Eight, at: usize, x: &Token256<'_>, g: usize) -> Products;
}

/// What eight rows give for one group: a lane is a row.
pub(in super::super) struct Products {
    /// Sum of sub-scale × q × x (× (q − 32) for types that subtract 32).
    sum: __m256i,
    /// Scale of the group.
    scale: __m256,
    /// Sum of sub-minimum × x, and the scale of minima, for types with minima.
    min: Option<(__m256i, __m256)>,
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

/// The nibbles of 16 bytes of two groups: low ones of `a` and `b`, high ones of `a` and `b`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn nibbles_of_two(a: &[u8; 16], b: &[u8; 16]) -> (__m256i, __m256i) {
    // SAFETY: 16 bytes are readable in both.
    let packed = unsafe { _mm256_loadu2_m128i(b.as_ptr().cast(), a.as_ptr().cast()) };
    let low = _mm256_set1_epi8(15);
    (_mm256_and_si256(packed, low), _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low))
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

/// The type without a fifth bit, whose nibbles begin at `at`.
macro_rules! four_bits {
    ($type:ty, $at:literal) => {
        impl Simd32 for $type {
            #[inline(always)]
            unsafe fn bytes(group: &[u8]) -> __m256i {
                // SAFETY: AVX2 by the trait's contract.
                unsafe { nibbles(bytes_at(group, $at)) }
            }

            #[inline(always)]
            unsafe fn pair(a: &[u8], b: &[u8]) -> (__m256i, __m256i) {
                // SAFETY: AVX2 by the trait's contract.
                unsafe { nibbles_of_two(bytes_at(a, $at), bytes_at(b, $at)) }
            }
        }
    };
}

/// The type whose fifth bits begin at `bits`, its nibbles 4 bytes later.
macro_rules! five_bits {
    ($type:ty, $bits:literal) => {
        impl Simd32 for $type {
            #[inline(always)]
            unsafe fn bytes(group: &[u8]) -> __m256i {
                // SAFETY: AVX2 by the trait's contract.
                unsafe { _mm256_or_si256(nibbles(bytes_at(group, $bits + 4)), fifth_bits(bytes_at(group, $bits))) }
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
    unsafe fn bytes(group: &[u8]) -> __m256i {
        // SAFETY: AVX2 by the trait's contract.
        unsafe { _mm256_xor_si256(load(bytes_at(group, 2)), _mm256_set1_epi8(-128)) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes are readable.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// What the heads of eight groups of Q4_K or Q5_K give: a lane is a row.
struct Heads {
    /// The rows' eight sub-scales as bytes; row r is at `r / 2 % 2 * 4 + r / 4 * 2 + r % 2`.
    scales: [u64; LANES],
    /// Sub-minima 0 to 3 of each row as bytes, then 4 to 7.
    mins: [__m256i; 2],
    scale: __m256,
    min_scale: __m256,
}

/// Reads the scales of eight rows at once: scale, scale of minima, and twelve bytes that hold eight 6-bit sub-scales and
/// eight sub-minima.
///
/// # Safety
/// AVX2 and F16C; 16 bytes at `at` lie in the rows.
#[inline(always)]
unsafe fn heads_k4(rows: Eight, at: usize) -> Heads {
    // SAFETY: by this function's contract.
    unsafe {
        let two = |r: usize| _mm256_loadu2_m128i(rows.at(r + 4, at).cast(), rows.at(r, at).cast());
        let (a, b, c, d) = (two(0), two(1), two(2), two(3));
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let (halves, word0) = (_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
        let (ab, cd) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        let (word1, word2) = (_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
        let (low4, low6, high2) = (_mm256_set1_epi8(15), _mm256_set1_epi8(63), _mm256_set1_epi8(0x30));
        let and = |a: __m256i, b: __m256i| _mm256_and_si256(a, b);
        let scales0 = and(word0, low6);
        let scales1 = _mm256_or_si256(and(word2, low4), and(_mm256_srli_epi32::<2>(word0), high2));
        let mins0 = and(word1, low6);
        let high = _mm256_srli_epi32::<4>(word2);
        let mins1 = _mm256_or_si256(and(high, low4), and(_mm256_srli_epi32::<2>(word1), high2));
        let mut scales = [0; LANES];
        _mm256_storeu_si256(scales.as_mut_ptr().cast(), _mm256_unpacklo_epi32(scales0, scales1));
        _mm256_storeu_si256(scales[4..].as_mut_ptr().cast(), _mm256_unpackhi_epi32(scales0, scales1));
        let (scale, min_scale) = (and(halves, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32::<16>(halves));
        let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(scale, min_scale));
        Heads {
            scales,
            mins: [mins0, mins1],
            scale: _mm256_cvtph_ps(_mm256_castsi256_si128(both)),
            min_scale: _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(both)),
        }
    }
}

/// What Q4_K and Q5_K share: one sub-scale and one sub-minimum for each run of 32.
///
/// # Safety
/// As [`Simd256::products`].
#[inline(always)]
unsafe fn products_k4<Q: Simd256>(rows: Eight, at: usize, x: &Token256<'_>, g: usize) -> Products {
    // SAFETY: by this function's contract; what `x` has is checked by indexing.
    unsafe {
        let heads = heads_k4(rows, at);
        let q = &x.q[256 * g..256 * g + 256];
        let mut sums = [_mm256_setzero_si256(); LANES];
        for (r, sum) in sums.iter_mut().enumerate() {
            let group = rows.bytes(r, at, Q::BYTES);
            let scales = _mm256_set1_epi64x(heads.scales[r / 2 % 2 * 4 + r / 4 * 2 + r % 2] as i64);
            for run in 0..8 {
                let x = _mm256_loadu_si256(q[32 * run..32 * run + 32].as_ptr().cast());
                let pairs = _mm256_maddubs_epi16(Q::bytes(group, run), x);
                // Byte `run` of the scales, followed by a zero byte: 16 bits.
                let scale = _mm256_shuffle_epi8(scales, _mm256_set1_epi16(i16::MIN + run as i16));
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, scale));
            }
        }
        let pairs = &x.pairs[4 * g..4 * g + 4];
        let even = _mm256_set1_epi32(0x00ff_00ff);
        let mut min = _mm256_setzero_si256();
        for (mins, pairs) in heads.mins.into_iter().zip(pairs.chunks_exact(2)) {
            let (low, high) = (_mm256_and_si256(mins, even), _mm256_and_si256(_mm256_srli_epi16::<8>(mins), even));
            min = _mm256_add_epi32(min, _mm256_madd_epi16(low, _mm256_set1_epi32(pairs[0])));
            min = _mm256_add_epi32(min, _mm256_madd_epi16(high, _mm256_set1_epi32(pairs[1])));
        }
        Products { sum: reduce32(sums), scale: heads.scale, min: Some((min, heads.min_scale)) }
    }
}

impl Simd256 for Q4K {
    #[inline(always)]
    unsafe fn bytes(group: &[u8], run: usize) -> __m256i {
        // SAFETY: AVX2 by the trait's contract.
        unsafe {
            let packed = load(bytes_at(group, 16 + 32 * (run / 2)));
            let packed = if run.is_multiple_of(2) { packed } else { _mm256_srli_epi16::<4>(packed) };
            _mm256_and_si256(packed, _mm256_set1_epi8(15))
        }
    }

    #[inline(always)]
    unsafe fn products(rows: Eight, at: usize, x: &Token256<'_>, g: usize) -> Products {
        // SAFETY: by the trait's contract.
        unsafe { products_k4::<Self>(rows, at, x, g) }
    }
}

impl Simd256 for Q5K {
    #[inline(always)]
    unsafe fn bytes(group: &[u8], run: usize) -> __m256i {
        // SAFETY: AVX2 by the trait's contract.
        unsafe {
            let packed = load(bytes_at(group, 48 + 32 * (run / 2)));
            let packed = if run.is_multiple_of(2) { packed } else { _mm256_srli_epi16::<4>(packed) };
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
    unsafe fn products(rows: Eight, at: usize, x: &Token256<'_>, g: usize) -> Products {
        // SAFETY: by the trait's contract.
        unsafe { products_k4::<Self>(rows, at, x, g) }
    }
}

impl Simd256 for Q6K {
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
    unsafe fn products(rows: Eight, at: usize, x: &Token256<'_>, g: usize) -> Products {
        // SAFETY: by the trait's contract; what `x` has is checked by indexing.
        unsafe {
            let q = &x.q[256 * g..256 * g + 256];
            // A run of 32 has two sub-scales: its first 16 elements one of even number, the others one of odd number.
            // So the even ones go to the lower half of a register.
            let split = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
            let x_sums = _mm256_loadu_si256(x.sums[16 * g..16 * g + 16].as_ptr().cast());
            let mut sums = [_mm256_setzero_si256(); LANES];
            for (r, sum) in sums.iter_mut().enumerate() {
                let group = rows.bytes(r, at, Self::BYTES);
                let bytes = _mm_loadu_si128(bytes_at::<16>(group, 192).as_ptr().cast());
                let offset = _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), x_sums);
                let scales = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, split));
                let mut total = _mm256_setzero_si256();
                for run in 0..8 {
                    let x = _mm256_loadu_si256(q[32 * run..32 * run + 32].as_ptr().cast());
                    let scale = _mm256_shuffle_epi8(scales, _mm256_set1_epi16(0x0100 + 0x0202 * run as i16));
                    let pairs = _mm256_maddubs_epi16(Self::bytes(group, run), x);
                    total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, scale));
                }
                *sum = _mm256_sub_epi32(total, _mm256_slli_epi32::<5>(offset));
            }
            Products { sum: reduce32(sums), scale: gather_f16(rows, at + 208), min: None }
        }
    }
}

/// Lane r becomes the sum of the eight 32-bit lanes of `v[r]`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn reduce32(v: [__m256i; LANES]) -> __m256i {
    let two = |a: usize| _mm256_add_epi32(_mm256_unpacklo_epi32(v[a], v[a + 1]), _mm256_unpackhi_epi32(v[a], v[a + 1]));
    let four = |a: usize| {
        let (ab, cd) = (two(a), two(a + 2));
        _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd))
    };
    let (a, b) = (four(0), four(4));
    _mm256_add_epi32(_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b))
}

/// Lane r becomes the sum of the 16-bit lanes of a half: the lower half of `v[r]`, or the upper half of `v[r - 4]`. No
/// lane is above 15748 (31 × 127 × 4), so that two stay below 2^15. Widening to 32 bits and packing again adds
/// neighbours as a horizontal addition would, in a fraction of the time.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn reduce16(v: [__m256i; 4]) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let wide = |a: __m256i| _mm256_madd_epi16(a, ones);
    let two = |a: __m256i, b: __m256i| _mm256_packs_epi32(wide(a), wide(b));
    // Four neighbours are added before the last step, 62992 at most: too much for 16 bits, so that one is done in 32.
    let (ab, cd) = (two(v[0], v[1]), two(v[2], v[3]));
    let (ab, cd) = (wide(ab), wide(cd));
    // Lanes of `ab`: a, a, b, b.
    let even =
        _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(_mm256_castsi256_ps(ab), _mm256_castsi256_ps(cd)));
    let odd = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(_mm256_castsi256_ps(ab), _mm256_castsi256_ps(cd)));
    _mm256_add_epi32(even, odd)
}

/// The f16 at byte `at` of each row, as f32.
///
/// # Safety
/// AVX2 and F16C; two bytes at `at` lie in the rows.
#[inline(always)]
pub(in super::super) unsafe fn gather_f16(rows: Eight, at: usize) -> __m256 {
    // SAFETY: by this function's contract.
    unsafe {
        let half = |r: usize| rows.at(r, at).cast::<i16>().read_unaligned();
        _mm256_cvtph_ps(_mm_setr_epi16(half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7)))
    }
}

/// Asks for `bytes` bytes from `at` on to be brought near; nothing happens if they are not there.
#[inline(always)]
pub(in super::super) fn prefetch(at: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        // SAFETY: a prefetch touches nothing, whatever the address; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(64 * line).cast()) };
    }
}

/// Sum over 32 elements of q × x for each of eight rows; for [`Q8_0`] and other wide types.
///
/// # Safety
/// AVX2; the group at `at` lies in the rows.
#[inline(always)]
unsafe fn wide32<Q: Simd32>(rows: Eight, at: usize, x: __m256i) -> __m256i {
    let mut sums = [x; LANES];
    for (r, sum) in sums.iter_mut().enumerate() {
        // SAFETY: by this function's contract.
        *sum = unsafe {
            let q = _mm256_sub_epi8(Q::bytes(rows.bytes(r, at, Q::BYTES)), _mm256_set1_epi8(Q::OFFSET as i8));
            // |q| ≤ 128 and |x| ≤ 127: two products are below 2^15.
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
            _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
        };
    }
    // SAFETY: AVX2 by this function's contract.
    unsafe { reduce32(sums) }
}

/// Sum over 32 elements of (q + OFFSET) × x for each of eight rows, for types of at most 5 bits.
///
/// # Safety
/// AVX2; the group at `at` lies in the rows.
#[inline(always)]
unsafe fn narrow32<Q: Simd32>(rows: Eight, at: usize, x: __m256i) -> __m256i {
    // SAFETY: by this function's contract.
    unsafe {
        let x_low = _mm256_permute2x128_si256::<0x00>(x, x);
        let x_high = _mm256_permute2x128_si256::<0x11>(x, x);
        let mut sums = [x; 4];
        for (r, sum) in sums.iter_mut().enumerate() {
            let (low, high) = Q::pair(rows.bytes(r, at, Q::BYTES), rows.bytes(r + 4, at, Q::BYTES));
            *sum = _mm256_add_epi16(_mm256_maddubs_epi16(low, x_low), _mm256_maddubs_epi16(high, x_high));
        }
        reduce16(sums)
    }
}

/// Eight rows with one token: lane = row. Meanwhile as many bytes are fetched from `ahead` on.
///
/// # Safety
/// The rows have `x.scales.len()` groups.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot32<Q: Simd32>(rows: Eight, ahead: *const u8, x: Token32<'_>) -> __m256 {
    let groups = x.scales.len();
    assert!(x.q.len() == 32 * groups && x.sums.len() == groups && x.scaled_sums.len() == groups);
    let mut sum = _mm256_setzero_ps();
    for g in 0..groups {
        let at = g * Q::BYTES;
        prefetch(ahead.wrapping_add(LANES * at), LANES * Q::BYTES);
        // SAFETY: group `g` lies in the rows, by this function's contract, and in `x`, by the assertion.
        unsafe {
            let q = _mm256_loadu_si256(x.q.as_ptr().add(32 * g).cast());
            let integers = if Q::UNSIGNED_MAX > 31 {
                wide32::<Q>(rows, at, q)
            } else if Q::OFFSET == 0 {
                narrow32::<Q>(rows, at, q)
            } else {
                let offset = _mm256_sll_epi32(
                    _mm256_set1_epi32(x.sums[g]),
                    _mm_cvtsi32_si128(Q::OFFSET.trailing_zeros() as i32),
                );
                _mm256_sub_epi32(narrow32::<Q>(rows, at, q), offset)
            };
            let scale = _mm256_mul_ps(gather_f16(rows, at), _mm256_set1_ps(x.scales[g]));
            sum = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(integers), sum);
            if Q::HAS_MIN {
                sum = _mm256_fmadd_ps(gather_f16(rows, at + 2), _mm256_set1_ps(x.scaled_sums[g]), sum);
            }
        }
    }
    sum
}

/// Eight rows with one token: lane = row. Meanwhile as many bytes are fetched from `ahead` on.
///
/// # Safety
/// The rows have `x.scales.len()` groups.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot256<Q: Simd256>(rows: Eight, ahead: *const u8, x: Token256<'_>) -> __m256 {
    let mut sum = _mm256_setzero_ps();
    for g in 0..x.scales.len() {
        let at = g * Q::BYTES;
        prefetch(ahead.wrapping_add(LANES * at), LANES * Q::BYTES);
        // SAFETY: group `g` lies in the rows, by this function's contract.
        let products = unsafe { Q::products(rows, at, &x, g) };
        let x_scale = _mm256_set1_ps(x.scales[g]);
        let scale = _mm256_mul_ps(products.scale, x_scale);
        sum = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(products.sum), sum);
        if let Some((min, min_scale)) = products.min {
            sum = _mm256_fnmadd_ps(_mm256_mul_ps(min_scale, x_scale), _mm256_cvtepi32_ps(min), sum);
        }
    }
    sum
}

/// Calls `dot` for each eight rows and token, and writes the lanes. The last eight overlap those before them, and less
/// than eight go one by one: rows computed twice give the same bits twice. `dot` is also told where the next rows
/// begin, which it should fetch: eight rows side by side make streams too short for the processor to foresee.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn strips(
    weights: &[u8],
    (rows, row_bytes): (usize, usize),
    x: &Input,
    out: &mut Out<'_>,
    dot: impl Fn(Eight, *const u8, usize) -> __m256,
) {
    let mut row = 0;
    while row < rows {
        let (first, n) = if rows < LANES { (row, 1) } else { (row.min(rows - LANES), LANES) };
        let strip = if n == 1 {
            Eight::repeat(&weights[row * row_bytes..(row + 1) * row_bytes])
        } else {
            Eight::rows(weights, first, row_bytes)
        };
        for token in 0..x.batch() {
            let ahead = if token == 0 { row + n } else { row };
            let mut lanes = [0.0; LANES];
            let sums = dot(strip, weights.as_ptr().wrapping_add(ahead * row_bytes), token);
            // SAFETY: `lanes` is 8 floats.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums) };
            out.get(token, first, n).copy_from_slice(&lanes[..n]);
        }
        row += n;
    }
}

/// Rows of a 32-element type against all tokens, one token after the other.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn rows32<Q: Simd32>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let row_bytes = x.cols() / 32 * Q::BYTES;
    strips(weights, (rows, row_bytes), x, out, |strip, ahead, token| {
        // SAFETY: a row has `cols / 32` groups, as many as the token has scales.
        unsafe { dot32::<Q>(strip, ahead, x.group32(token)) }
    });
}

/// Rows of a 256-element type against all tokens, one token after the other.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn rows256<Q: Simd256>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let row_bytes = x.cols() / 256 * Q::BYTES;
    strips(weights, (rows, row_bytes), x, out, |strip, ahead, token| {
        // SAFETY: a row has `cols / 256` groups, as many as the token has scales.
        unsafe { dot256::<Q>(strip, ahead, x.group256(token)) }
    });
}
