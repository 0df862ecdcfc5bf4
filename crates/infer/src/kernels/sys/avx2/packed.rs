//! Quantised weights against 8-bit activations, many tokens: sixteen rows are unpacked to bytes once, four columns of
//! each row side by side, and then meet three tokens at a time in registers.
//!
//! A lane is a row here too, so integer sums need no reduction across lanes, and 16-bit sums are widened only when
//! they might overflow. The sums are those of `q8.rs`, added in the same order: the same bits. A new type needs nothing
//! here.

use super::super::super::blocks::{Floor, Group32, Group256};
use super::super::super::input::{Input, Token32};
use super::super::columns::Out;
use super::q8::{Eight, LANES, Simd32, Simd256, gather_f16, prefetch};
use core::arch::x86_64::*;
use core::cell::RefCell;

/// Registers of eight rows in a panel.
const HALVES: usize = 2;
/// Rows of a panel.
pub(super) const ROWS: usize = HALVES * LANES;
/// Tokens of a register tile: six sums of 16 bits, six of 32, two weights, one activation.
const TILE: usize = 3;
/// Registers of a panel's weights: 16 KiB, half of the first-level cache.
const PANEL: usize = 512;

/// From this many tokens on, unpacking a 32-element type pays: measured with this module's kernels. Where tokens are few
/// an expert of a mixture was half as slow again as it is without.
pub(super) const fn tokens_min_32<Q: Group32>() -> usize {
    if is_narrow(Q::UNSIGNED_MAX) { 12 } else { 16 }
}

/// The same with registers of twice the width, where it has not been measured.
pub(in super::super) const TOKENS_MIN_32: usize = 8;
/// From this many tokens on, unpacking a 256-element type pays.
pub(in super::super) const TOKENS_MIN_256: usize = 5;

/// A panel and the sums of its rows.
struct Scratch {
    /// `[group][step][half]`: four 8-bit columns (or two of 16 bits) of eight rows.
    weights: Vec<__m256i>,
    /// `[group]`: scales.
    scales: Vec<[__m256; HALVES]>,
    /// `[group]`: minima, or scales of minima.
    mins: Vec<[__m256; HALVES]>,
    /// `[group][16]`: sub-scales, twice in each lane.
    subs: Vec<[__m256i; HALVES]>,
    /// `[group][8]`: two sub-minima in each lane.
    sub_mins: Vec<[__m256i; HALVES]>,
    /// `[token]`.
    sums: Vec<[__m256; HALVES]>,
}

std::thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch {
            weights: Vec::new(),
            scales: Vec::new(),
            mins: Vec::new(),
            subs: Vec::new(),
            sub_mins: Vec::new(),
            sums: Vec::new(),
        })
    };
}

impl Scratch {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn ready(&mut self, tokens: usize) {
        let zero = _mm256_setzero_si256();
        let zeros = [_mm256_setzero_ps(); HALVES];
        if self.weights.is_empty() {
            self.weights.resize(PANEL, zero);
            self.scales.resize(PANEL / (8 * HALVES), zeros);
            self.mins.resize(PANEL / (8 * HALVES), zeros);
            self.subs.resize(PANEL / (64 * HALVES) * 16, [zero; HALVES]);
            self.sub_mins.resize(PANEL / (64 * HALVES) * 8, [zero; HALVES]);
        }
        if self.sums.len() < tokens {
            self.sums.resize(tokens, zeros);
        }
        self.sums[..tokens].fill(zeros);
    }
}

/// 32 bytes of each of eight rows.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn loaded(rows: &[[u8; 32]; LANES]) -> [__m256i; LANES] {
    let mut loaded = [_mm256_setzero_si256(); LANES];
    for (loaded, row) in loaded.iter_mut().zip(rows) {
        // SAFETY: 32 bytes are readable.
        *loaded = unsafe { _mm256_loadu_si256(row.as_ptr().cast()) };
    }
    loaded
}

/// Word `w` of each of eight rows becomes register `w`: lane = row.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(in super::super) fn transpose(v: [__m256i; LANES]) -> [__m256i; LANES] {
    let low = |a: usize| _mm256_unpacklo_epi32(v[a], v[a + 1]);
    let high = |a: usize| _mm256_unpackhi_epi32(v[a], v[a + 1]);
    let join = |a: __m256i, b: __m256i, c: __m256i, d: __m256i| {
        [
            _mm256_unpacklo_epi64(a, b),
            _mm256_unpackhi_epi64(a, b),
            _mm256_unpacklo_epi64(c, d),
            _mm256_unpackhi_epi64(c, d),
        ]
    };
    let first = join(low(0), low(2), high(0), high(2));
    let second = join(low(4), low(6), high(4), high(6));
    let mut words = v;
    for w in 0..4 {
        words[w] = _mm256_permute2x128_si256::<0x20>(first[w], second[w]);
        words[w + 4] = _mm256_permute2x128_si256::<0x31>(first[w], second[w]);
    }
    words
}

/// Calls `multiply` for each sixteen rows, then writes the sums. The last sixteen overlap those before them: rows
/// computed twice give the same bits twice. There are at least sixteen.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn strips(
    weights: &[u8],
    (rows, row_bytes): (usize, usize),
    x: &Input,
    out: &mut Out<'_>,
    multiply: impl Fn([Eight; HALVES], &mut Scratch),
) {
    SCRATCH.with_borrow_mut(|scratch| {
        for first in (0..rows).step_by(ROWS) {
            let first = first.min(rows - ROWS);
            scratch.ready(x.batch());
            let halves = [first, first + LANES].map(|first| Eight::rows(weights, first, row_bytes));
            multiply(halves, scratch);
            for (token, sums) in scratch.sums[..x.batch()].iter().enumerate() {
                let out = out.get(token, first, ROWS);
                for (out, &sum) in out.chunks_exact_mut(LANES).zip(sums) {
                    // SAFETY: `out` is 8 floats.
                    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
                }
            }
        }
    });
}

/// Asks for the activations of the next tile: each token's are a stream too short for the processor to foresee.
#[inline(always)]
pub(in super::super) fn fetch(words: &[i32], first: usize, n: usize) {
    prefetch(words[first..first + n].as_ptr().cast(), 4 * n);
}

/// Whether unsigned integers of this size are kept as bytes; wider ones (Q8_0) are signed and 16 bits wide.
const fn is_narrow(unsigned_max: u8) -> bool {
    unsigned_max <= 63
}

/// Registers (of one half) that a group of 32 takes.
const fn steps32<Q: Group32>() -> usize {
    if is_narrow(Q::UNSIGNED_MAX) { 8 } else { 16 }
}

/// A token's activations as the panel wants them.
#[inline(always)]
fn words32<Q: Group32>(x: Token32<'_>) -> &[i32] {
    if is_narrow(Q::UNSIGNED_MAX) { x.words() } else { x.wide_words() }
}

/// Rows (at least [`ROWS`]) of a 32-element type against all tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows32<Q: Simd32>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let (groups, steps) = (x.cols() / 32, steps32::<Q>());
    let step = PANEL / (steps * HALVES);
    strips(weights, (rows, groups * Q::BYTES), x, out, |halves, scratch| {
        for first in (0..groups).step_by(step) {
            let n = step.min(groups - first);
            for g in 0..n {
                // SAFETY: `first + g` is one of a row's groups, `g` one of a panel's.
                unsafe { pack32::<Q>(halves, first + g, g, scratch) };
            }
            for token in (0..x.batch()).step_by(TILE) {
                for token in token + TILE..x.batch().min(token + 2 * TILE) {
                    fetch(words32::<Q>(x.group32(token)), first * steps, n * steps);
                }
                match x.batch() - token {
                    1 => tile32::<Q, 1>(scratch, x, token, first, n),
                    2 => tile32::<Q, 2>(scratch, x, token, first, n),
                    _ => tile32::<Q, TILE>(scratch, x, token, first, n),
                }
            }
        }
    });
}

/// Unpacks group `group` of sixteen rows to place `at` of the panel.
///
/// # Safety
/// The rows have that group.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack32<Q: Simd32>(halves: [Eight; HALVES], group: usize, at: usize, scratch: &mut Scratch) {
    let steps = steps32::<Q>();
    let place = &mut scratch.weights[at * steps * HALVES..(at + 1) * steps * HALVES];
    for (half, rows) in halves.into_iter().enumerate() {
        let from = group * Q::BYTES;
        let mut bytes = [_mm256_setzero_si256(); LANES];
        // SAFETY: the rows have this group, by this function's contract.
        unsafe {
            for (lane, bytes) in bytes.iter_mut().enumerate() {
                *bytes = Q::bytes(rows.bytes(lane, from, Q::BYTES));
            }
            scratch.scales[at][half] = gather_f16(rows, from);
            if Q::HAS_MIN {
                scratch.mins[at][half] = gather_f16(rows, from + 2);
            }
        }
        if is_narrow(Q::UNSIGNED_MAX) {
            for (step, words) in transpose(bytes).into_iter().enumerate() {
                place[step * HALVES + half] = words;
            }
            continue;
        }
        let (mut low, mut high) = (bytes, bytes);
        for (lane, bytes) in bytes.into_iter().enumerate() {
            let signed = _mm256_sub_epi8(bytes, _mm256_set1_epi8(Q::OFFSET as i8));
            low[lane] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(signed));
            high[lane] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(signed));
        }
        for (step, words) in transpose(low).into_iter().chain(transpose(high)).enumerate() {
            place[step * HALVES + half] = words;
        }
    }
}

/// One tile's integers: `[token][half]`, lane = row.
type Tile<const T: usize> = [[__m256i; HALVES]; T];

/// Returns `v`, which the compiler may no longer look into. Without it, sums are reordered until they no longer fit the
/// registers.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn keep(mut v: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe { core::arch::asm!("/* {0} */", inout(ymm_reg) v, options(pure, nomem, nostack, preserves_flags)) };
    v
}

/// 16-bit sums of `STEPS` × 4 byte columns of the panel times `T` tokens' words.
///
/// # Safety
/// `STEPS` × [`HALVES`] registers are readable at `panel`, and `STEPS` words from `at` on at each of `words`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn narrow<const STEPS: usize, const T: usize>(
    panel: *const __m256i,
    words: &[*const i32; T],
    at: usize,
) -> Tile<T> {
    let mut sums = [[_mm256_setzero_si256(); HALVES]; T];
    for step in 0..STEPS {
        // SAFETY: `step < STEPS`, by this function's contract.
        let (weights, x): ([__m256i; HALVES], [i32; T]) = unsafe {
            ([*panel.add(step * HALVES), *panel.add(step * HALVES + 1)], words.map(|words| *words.add(at + step)))
        };
        for t in 0..T {
            let x = _mm256_set1_epi32(x[t]);
            for h in 0..HALVES {
                let pairs = _mm256_maddubs_epi16(weights[h], x);
                sums[t][h] = keep(if step == 0 { pairs } else { _mm256_add_epi16(sums[t][h], pairs) });
            }
        }
    }
    sums
}

/// 32-bit sums of 16 × 2 columns of 16 bits times `T` tokens' words.
///
/// # Safety
/// As [`narrow`], for 16 steps.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn wide<const T: usize>(panel: *const __m256i, words: &[*const i32; T], at: usize) -> Tile<T> {
    let mut sums = [[_mm256_setzero_si256(); HALVES]; T];
    for step in 0..16 {
        // SAFETY: `step < 16`, by this function's contract.
        let (weights, x): ([__m256i; HALVES], [i32; T]) = unsafe {
            ([*panel.add(step * HALVES), *panel.add(step * HALVES + 1)], words.map(|words| *words.add(at + step)))
        };
        for t in 0..T {
            let x = _mm256_set1_epi32(x[t]);
            for h in 0..HALVES {
                sums[t][h] = keep(_mm256_add_epi32(sums[t][h], _mm256_madd_epi16(weights[h], x)));
            }
        }
    }
    sums
}

/// Adds to `sums` the 16-bit `pairs` times `factor`, widened.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_widened<const T: usize>(sums: &mut Tile<T>, pairs: Tile<T>, factor: [__m256i; HALVES]) {
    for t in 0..T {
        for h in 0..HALVES {
            sums[t][h] = _mm256_add_epi32(sums[t][h], _mm256_madd_epi16(pairs[t][h], factor[h]));
        }
    }
}

/// `n` groups of the panel, which are groups `first..` of the rows, against `T` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
fn tile32<Q: Group32, const T: usize>(scratch: &mut Scratch, x: &Input, token: usize, first: usize, n: usize) {
    let steps = steps32::<Q>();
    let mut words = [core::ptr::null(); T];
    let mut factors = [[&[][..]; 2]; T];
    let mut offsets = [&[][..]; T];
    for t in 0..T {
        let x = x.group32(token + t);
        words[t] = words32::<Q>(x)[first * steps..(first + n) * steps].as_ptr();
        factors[t] = [&x.scales[first..first + n], &x.scaled_sums[first..first + n]];
        offsets[t] = &x.sums[first..first + n];
    }
    let panel = &scratch.weights[..n * steps * HALVES];
    let (scales, mins) = (&scratch.scales[..n], &scratch.mins[..n]);
    let mut sums = [[_mm256_setzero_ps(); HALVES]; T];
    sums.copy_from_slice(&scratch.sums[token..token + T]);
    for g in 0..n {
        let (at, panel) = (g * steps, panel[g * steps * HALVES..].as_ptr());
        let ones = [_mm256_set1_epi16(1); HALVES];
        // SAFETY: group `g < n` has `steps` steps in the panel and in each token's words.
        let integers = unsafe {
            if !is_narrow(Q::UNSIGNED_MAX) {
                wide::<T>(panel, &words, at)
            } else {
                let mut integers = [[_mm256_setzero_si256(); HALVES]; T];
                // 16-bit sums stay below 2^15: 15 × 127 × 2 × 8, or 31 × 127 × 2 × 4.
                if Q::UNSIGNED_MAX <= 15 {
                    add_widened(&mut integers, narrow::<8, T>(panel, &words, at), ones);
                } else {
                    add_widened(&mut integers, narrow::<4, T>(panel, &words, at), ones);
                    add_widened(&mut integers, narrow::<4, T>(panel.add(4 * HALVES), &words, at + 4), ones);
                }
                integers
            }
        };
        for t in 0..T {
            let offset = _mm256_set1_epi32(i32::from(Q::OFFSET) * offsets[t][g]);
            let [scale, min] = factors[t].map(|factors| _mm256_set1_ps(factors[g]));
            for h in 0..HALVES {
                let shifted = is_narrow(Q::UNSIGNED_MAX) && Q::OFFSET != 0;
                let integers = if shifted { _mm256_sub_epi32(integers[t][h], offset) } else { integers[t][h] };
                let scale = _mm256_mul_ps(scales[g][h], scale);
                sums[t][h] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(integers), sums[t][h]);
                if Q::HAS_MIN {
                    sums[t][h] = _mm256_fmadd_ps(mins[g][h], min, sums[t][h]);
                }
            }
        }
    }
    scratch.sums[token..token + T].copy_from_slice(&sums);
}

/// Rows (at least [`ROWS`]) of a 256-element type against all tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows256<Q: Simd256>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let groups = x.cols() / 256;
    let step = PANEL / (64 * HALVES);
    strips(weights, (rows, groups * Q::BYTES), x, out, |halves, scratch| {
        for first in (0..groups).step_by(step) {
            let n = step.min(groups - first);
            for g in 0..n {
                // SAFETY: `first + g` is one of a row's groups, `g` one of a panel's.
                unsafe { pack256::<Q>(halves, first + g, g, scratch) };
            }
            for token in (0..x.batch()).step_by(TILE) {
                for token in token + TILE..x.batch().min(token + 2 * TILE) {
                    fetch(x.group256(token).words(), first * 64, n * 64);
                }
                match x.batch() - token {
                    1 => tile256::<Q, 1>(scratch, x, token, first, n),
                    2 => tile256::<Q, 2>(scratch, x, token, first, n),
                    _ => tile256::<Q, TILE>(scratch, x, token, first, n),
                }
            }
        }
    });
}

/// Unpacks group `group` of sixteen rows to place `at` of the panel.
///
/// # Safety
/// The rows have that group.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack256<Q: Simd256>(halves: [Eight; HALVES], group: usize, at: usize, scratch: &mut Scratch) {
    for (half, rows) in halves.into_iter().enumerate() {
        // SAFETY: the rows have this group, by this function's contract.
        let group = |lane: usize| unsafe { rows.bytes(lane, group * Q::BYTES, Q::BYTES) };
        let (mut scales, mut min_scales) = ([0.0; LANES], [0.0; LANES]);
        let (mut subs, mut mins) = ([[[0; 32]; LANES]; 2], [[0; 32]; LANES]);
        for lane in 0..LANES {
            let all = Q::scales(group(lane));
            (scales[lane], min_scales[lane]) = (all.scale, all.min_scale);
            for (j, (sub, min)) in all.sub.into_iter().zip(all.min).enumerate() {
                let twice = u32::from(sub as u16) * 0x0001_0001;
                subs[j / 8][lane][4 * (j % 8)..4 * (j % 8) + 4].copy_from_slice(&twice.to_le_bytes());
                mins[lane][2 * j..2 * j + 2].copy_from_slice(&min.to_le_bytes());
            }
        }
        // SAFETY: both are 8 floats.
        unsafe {
            scratch.scales[at][half] = _mm256_loadu_ps(scales.as_ptr());
            scratch.mins[at][half] = _mm256_loadu_ps(min_scales.as_ptr());
        }
        for run in 0..8 {
            let mut bytes = [_mm256_setzero_si256(); LANES];
            for (lane, bytes) in bytes.iter_mut().enumerate() {
                // SAFETY: this function has AVX2, and this is a group.
                *bytes = unsafe { Q::bytes(group(lane), run) };
            }
            for (step, words) in transpose(bytes).into_iter().enumerate() {
                scratch.weights[((at * 8 + run) * 8 + step) * HALVES + half] = words;
            }
        }
        for (part, subs) in subs.iter().enumerate() {
            for (j, words) in transpose(loaded(subs)).into_iter().enumerate() {
                scratch.subs[at * 16 + 8 * part + j][half] = words;
            }
        }
        for (j, words) in transpose(loaded(&mins)).into_iter().enumerate() {
            scratch.sub_mins[at * 8 + j][half] = words;
        }
    }
}

/// `n` groups of the panel, which are groups `first..` of the rows, against `T` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
fn tile256<Q: Group256, const T: usize>(scratch: &mut Scratch, x: &Input, token: usize, first: usize, n: usize) {
    let mut words = [core::ptr::null(); T];
    let mut sum_words = [&[][..]; T];
    let mut factors = [&[][..]; T];
    for t in 0..T {
        let x = x.group256(token + t);
        words[t] = x.words()[64 * first..64 * (first + n)].as_ptr();
        sum_words[t] = &x.sum_words()[8 * first..8 * (first + n)];
        factors[t] = &x.scales[first..first + n];
    }
    let mut sums = [[_mm256_setzero_ps(); HALVES]; T];
    sums.copy_from_slice(&scratch.sums[token..token + T]);
    for g in 0..n {
        let panel = scratch.weights[g * 64 * HALVES..(g + 1) * 64 * HALVES].as_ptr();
        let mut integers = [[_mm256_setzero_si256(); HALVES]; T];
        for (sub, subs) in scratch.subs[g * 16..(g + 1) * 16].iter().enumerate() {
            let at = 64 * g + 4 * sub;
            // SAFETY: sub-group `sub < 16` of group `g < n` has four steps in the panel and in each token's words.
            // 16-bit sums stay below 2^15: 31 × 127 × 2 × 4, or 63 × 127 × 2 × 2.
            unsafe {
                let panel = panel.add(4 * sub * HALVES);
                if Q::UNSIGNED_MAX <= 31 {
                    add_widened(&mut integers, narrow::<4, T>(panel, &words, at), *subs);
                } else {
                    add_widened(&mut integers, narrow::<2, T>(panel, &words, at), *subs);
                    add_widened(&mut integers, narrow::<2, T>(panel.add(2 * HALVES), &words, at + 2), *subs);
                }
            }
        }
        let mut mins = [[_mm256_setzero_si256(); HALVES]; T];
        for (j, sub_mins) in scratch.sub_mins[g * 8..(g + 1) * 8].iter().enumerate() {
            for t in 0..T {
                let pair = _mm256_set1_epi32(sum_words[t][8 * g + j]);
                for h in 0..HALVES {
                    mins[t][h] = _mm256_add_epi32(mins[t][h], _mm256_madd_epi16(sub_mins[h], pair));
                }
            }
        }
        for t in 0..T {
            let x_scale = _mm256_set1_ps(factors[t][g]);
            for h in 0..HALVES {
                let scale = _mm256_mul_ps(scratch.scales[g][h], x_scale);
                if Q::FLOOR == Floor::Offset32 {
                    let integers = _mm256_sub_epi32(integers[t][h], mins[t][h]);
                    sums[t][h] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(integers), sums[t][h]);
                } else {
                    sums[t][h] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(integers[t][h]), sums[t][h]);
                    let scale = _mm256_mul_ps(scratch.mins[g][h], x_scale);
                    sums[t][h] = _mm256_fnmadd_ps(scale, _mm256_cvtepi32_ps(mins[t][h]), sums[t][h]);
                }
            }
        }
    }
    scratch.sums[token..token + T].copy_from_slice(&sums);
}
