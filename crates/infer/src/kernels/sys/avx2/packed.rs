//! Quantised weights against 8-bit activations, many tokens: sixteen rows are unpacked to bytes once, four columns of
//! each row side by side, and then meet three tokens at a time in registers.
//!
//! A lane is a row here too, so integer sums need no reduction across lanes, and 16-bit sums are widened only when
//! they might overflow. The sums are those of `q8.rs`, added in the same order: the same bits. A new type needs nothing here.

use super::super::super::blocks::{Floor, Group32, Group256};
use super::super::super::input::{Input, Token32};
use super::super::columns::Out;
use super::q8::{Simd32, Simd256, prefetch};
use core::arch::x86_64::*;
use core::cell::RefCell;

/// From this many tokens on, unpacking pays.
pub(super) const TOKENS_MIN: usize = 4;
/// Rows of a panel: two registers of eight lanes.
const ROWS: usize = 16;
const HALVES: usize = 2;
/// Tokens of a register tile.
const TILE: usize = 3;
/// Registers of a panel: with scales and activations it stays in the first-level cache.
const PANEL: usize = 512;

/// A panel and the sums of its rows. Registers in memory, so that they are aligned.
struct Scratch {
    /// `[group][step][half]`: four 8-bit columns (or two of 16 bits) of eight rows.
    weights: Vec<__m256i>,
    /// `[group][half]`.
    scales: Vec<[__m256; HALVES]>,
    /// `[group][half]`: minima, or scales of minima.
    mins: Vec<[__m256; HALVES]>,
    /// `[group][16][half]`: sub-scales, twice in each lane.
    subs: Vec<[__m256i; HALVES]>,
    /// `[group][8][half]`: two sub-minima in each lane.
    sub_mins: Vec<[__m256i; HALVES]>,
    /// `[token][half]`.
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
            self.scales.resize(PANEL / 16, zeros);
            self.mins.resize(PANEL / 16, zeros);
            self.subs.resize(PANEL / 128 * 16, [zero; HALVES]);
            self.sub_mins.resize(PANEL / 128 * 8, [zero; HALVES]);
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
fn loaded(rows: &[[u8; 32]; 8]) -> [__m256i; 8] {
    core::array::from_fn(|r| {
        // SAFETY: 32 bytes are readable.
        unsafe { _mm256_loadu_si256(rows[r].as_ptr().cast()) }
    })
}

/// Word `w` of each of eight rows becomes register `w`: lane = row.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn transpose(v: [__m256i; 8]) -> [__m256i; 8] {
    let pairs = |a: usize| (_mm256_unpacklo_epi32(v[a], v[a + 1]), _mm256_unpackhi_epi32(v[a], v[a + 1]));
    let (low0, high0) = pairs(0);
    let (low2, high2) = pairs(2);
    let (low4, high4) = pairs(4);
    let (low6, high6) = pairs(6);
    let first = [
        _mm256_unpacklo_epi64(low0, low2),
        _mm256_unpackhi_epi64(low0, low2),
        _mm256_unpacklo_epi64(high0, high2),
        _mm256_unpackhi_epi64(high0, high2),
    ];
    let second = [
        _mm256_unpacklo_epi64(low4, low6),
        _mm256_unpackhi_epi64(low4, low6),
        _mm256_unpacklo_epi64(high4, high6),
        _mm256_unpackhi_epi64(high4, high6),
    ];
    core::array::from_fn(|w| {
        let (a, b) = (first[w % 4], second[w % 4]);
        if w < 4 { _mm256_permute2x128_si256::<0x20>(a, b) } else { _mm256_permute2x128_si256::<0x31>(a, b) }
    })
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn floats(lanes: &[f32; 8]) -> __m256 {
    // SAFETY: 8 floats are readable.
    unsafe { _mm256_loadu_ps(lanes.as_ptr()) }
}

/// The rows of a strip, the last repeated up to [`ROWS`].
struct Strip<'a> {
    weights: &'a [u8],
    rows: usize,
    row_bytes: usize,
}

impl<'a> Strip<'a> {
    #[inline(always)]
    fn group(&self, half: usize, lane: usize, group: usize, bytes: usize) -> &'a [u8] {
        let at = (8 * half + lane).min(self.rows - 1) * self.row_bytes + group * bytes;
        &self.weights[at..at + bytes]
    }
}

/// Calls `strip` for each sixteen rows, then writes the sums.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn strips(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>, multiply: impl Fn(&Strip<'_>, &mut Scratch)) {
    let row_bytes = weights.len() / rows.max(1);
    SCRATCH.with_borrow_mut(|scratch| {
        for first in (0..rows).step_by(ROWS) {
            let n = ROWS.min(rows - first);
            let weights = &weights[first * row_bytes..(first + n) * row_bytes];
            scratch.ready(x.batch());
            multiply(&Strip { weights, rows: n, row_bytes }, scratch);
            for (token, sums) in scratch.sums[..x.batch()].iter().enumerate() {
                let mut lanes = [0.0; ROWS];
                for (lanes, &sum) in lanes.chunks_exact_mut(8).zip(sums) {
                    // SAFETY: `lanes` is 8 floats.
                    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
                }
                out.get(token, first, n).copy_from_slice(&lanes[..n]);
            }
        }
    });
}

/// Asks for the activations of the next tile: each token's are a stream too short for the processor to foresee.
#[inline(always)]
fn fetch(words: &[i32], first: usize, n: usize) {
    prefetch(words[first..first + n].as_ptr().cast(), 4 * n);
}

/// A token's activations as the panel wants them.
#[inline(always)]
fn tile32_words<Q: Group32>(x: Token32<'_>) -> &[i32] {
    if is_narrow(Q::UNSIGNED_MAX) { x.words() } else { x.wide_words() }
}

/// Whether unsigned integers of this size are kept as bytes; wider ones (Q8_0) are signed and 16 bits wide.
const fn is_narrow(unsigned_max: u8) -> bool {
    unsigned_max <= 63
}

/// Registers (of one half) that a group of 32 takes.
const fn steps32<Q: Group32>() -> usize {
    if is_narrow(Q::UNSIGNED_MAX) { 8 } else { 16 }
}

/// Steps of four columns whose 16-bit sums cannot overflow: 2 × 127 × max × steps < 2^15.
const fn steps_before_widening(unsigned_max: u8) -> usize {
    match unsigned_max {
        0..=15 => 8,
        16..=31 => 4,
        32..=63 => 2,
        _ => panic!("two products of this size overflow 16 bits"),
    }
}

/// Rows of a 32-element type against all tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows32<Q: Simd32>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let groups = x.cols() / 32;
    let step = PANEL / (steps32::<Q>() * HALVES);
    strips(weights, rows, x, out, |strip, scratch| {
        for first in (0..groups).step_by(step) {
            let n = step.min(groups - first);
            for g in 0..n {
                pack32::<Q>(strip, first + g, g, scratch);
            }
            for token in (0..x.batch()).step_by(TILE) {
                let words = steps32::<Q>();
                for token in token + TILE..x.batch().min(token + 2 * TILE) {
                    fetch(tile32_words::<Q>(x.group32(token)), first * words, n * words);
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
#[target_feature(enable = "avx2,fma,f16c")]
fn pack32<Q: Simd32>(strip: &Strip<'_>, group: usize, at: usize, scratch: &mut Scratch) {
    let steps = steps32::<Q>();
    let place = &mut scratch.weights[at * steps * HALVES..(at + 1) * steps * HALVES];
    for half in 0..HALVES {
        let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
        let mut bytes = [_mm256_setzero_si256(); 8];
        for lane in 0..8 {
            let group = strip.group(half, lane, group, Q::BYTES);
            (scales[lane], mins[lane]) = Q::scales(group);
            // SAFETY: this function has AVX2, and `group` is a group.
            bytes[lane] = unsafe { Q::bytes(group) };
        }
        scratch.scales[at][half] = floats(&scales);
        scratch.mins[at][half] = floats(&mins);
        if is_narrow(Q::UNSIGNED_MAX) {
            for (step, words) in transpose(bytes).into_iter().enumerate() {
                place[step * HALVES + half] = words;
            }
            continue;
        }
        let signed = bytes.map(|bytes| _mm256_sub_epi8(bytes, _mm256_set1_epi8(Q::OFFSET as i8)));
        let low = signed.map(|q| _mm256_cvtepi8_epi16(_mm256_castsi256_si128(q)));
        let high = signed.map(|q| _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(q)));
        for (step, words) in transpose(low).into_iter().chain(transpose(high)).enumerate() {
            place[step * HALVES + half] = words;
        }
    }
}

/// `n` groups of the panel, which are groups `first..` of the rows, against `T` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
fn tile32<Q: Group32, const T: usize>(scratch: &mut Scratch, x: &Input, token: usize, first: usize, n: usize) {
    let steps = steps32::<Q>();
    let tokens: [_; T] = core::array::from_fn(|t| x.group32(token + t));
    let words: [&[i32]; T] =
        core::array::from_fn(|t| &tile32_words::<Q>(tokens[t])[first * steps..(first + n) * steps]);
    let panel = &scratch.weights[..n * steps * HALVES];
    let mut sums: [[__m256; HALVES]; T] = core::array::from_fn(|t| scratch.sums[token + t]);
    for g in 0..n {
        let mut integers = [[_mm256_setzero_si256(); HALVES]; T];
        let panel = &panel[g * steps * HALVES..(g + 1) * steps * HALVES];
        let words: [&[i32]; T] = core::array::from_fn(|t| &words[t][g * steps..(g + 1) * steps]);
        if is_narrow(Q::UNSIGNED_MAX) {
            add_narrow::<T>(panel, words, steps_before_widening(Q::UNSIGNED_MAX), |_, pairs, t, h| {
                integers[t][h] = _mm256_add_epi32(integers[t][h], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            });
        } else {
            for (s, weights) in panel.chunks_exact(HALVES).enumerate() {
                for t in 0..T {
                    let x = _mm256_set1_epi32(words[t][s]);
                    for h in 0..HALVES {
                        integers[t][h] = _mm256_add_epi32(integers[t][h], _mm256_madd_epi16(weights[h], x));
                    }
                }
            }
        }
        for t in 0..T {
            let x = tokens[t];
            let offset = _mm256_set1_epi32(i32::from(Q::OFFSET) * x.sums[first + g]);
            let (scale, min) = (_mm256_set1_ps(x.scales[first + g]), _mm256_set1_ps(x.scaled_sums[first + g]));
            for h in 0..HALVES {
                let narrow = is_narrow(Q::UNSIGNED_MAX) && Q::OFFSET != 0;
                let integers = if narrow { _mm256_sub_epi32(integers[t][h], offset) } else { integers[t][h] };
                let scale = _mm256_mul_ps(scratch.scales[g][h], scale);
                sums[t][h] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(integers), sums[t][h]);
                if Q::HAS_MIN {
                    sums[t][h] = _mm256_fmadd_ps(scratch.mins[g][h], min, sums[t][h]);
                }
            }
        }
    }
    scratch.sums[token..token + T].copy_from_slice(&sums);
}

/// Products of byte columns with `T` tokens' words, summed in 16 bits over `steps` steps at a time; `widen(step, pairs,
/// token, half)` takes each such sum.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_narrow<const T: usize>(
    panel: &[__m256i],
    words: [&[i32]; T],
    steps: usize,
    mut widen: impl FnMut(usize, __m256i, usize, usize),
) {
    assert!(words.iter().all(|words| words.len() * HALVES == panel.len()));
    for (part, panel) in panel.chunks_exact(steps * HALVES).enumerate() {
        let mut pairs = [[_mm256_setzero_si256(); HALVES]; T];
        for (s, weights) in panel.chunks_exact(HALVES).enumerate() {
            for t in 0..T {
                let x = _mm256_set1_epi32(words[t][part * steps + s]);
                for h in 0..HALVES {
                    pairs[t][h] = _mm256_add_epi16(pairs[t][h], _mm256_maddubs_epi16(weights[h], x));
                }
            }
        }
        for (t, pairs) in pairs.iter().enumerate() {
            for (h, &pairs) in pairs.iter().enumerate() {
                widen(part * steps, pairs, t, h);
            }
        }
    }
}

/// Rows of a 256-element type against all tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows256<Q: Simd256>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let groups = x.cols() / 256;
    let step = PANEL / (64 * HALVES);
    strips(weights, rows, x, out, |strip, scratch| {
        for first in (0..groups).step_by(step) {
            let n = step.min(groups - first);
            for g in 0..n {
                pack256::<Q>(strip, first + g, g, scratch);
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
#[target_feature(enable = "avx2,fma,f16c")]
fn pack256<Q: Simd256>(strip: &Strip<'_>, group: usize, at: usize, scratch: &mut Scratch) {
    for half in 0..HALVES {
        let (mut scales, mut min_scales) = ([0.0; 8], [0.0; 8]);
        let (mut subs, mut mins) = ([[[0; 32]; 8]; 2], [[0; 32]; 8]);
        for lane in 0..8 {
            let group = strip.group(half, lane, group, Q::BYTES);
            let all = Q::scales(group);
            (scales[lane], min_scales[lane]) = (all.scale, all.min_scale);
            for (j, (sub, min)) in all.sub.into_iter().zip(all.min).enumerate() {
                let twice = u32::from(sub as u16) * 0x0001_0001;
                subs[j / 8][lane][4 * (j % 8)..4 * (j % 8) + 4].copy_from_slice(&twice.to_le_bytes());
                mins[lane][2 * j..2 * j + 2].copy_from_slice(&min.to_le_bytes());
            }
        }
        scratch.scales[at][half] = floats(&scales);
        scratch.mins[at][half] = floats(&min_scales);
        for run in 0..8 {
            let mut bytes = [_mm256_setzero_si256(); 8];
            for (lane, bytes) in bytes.iter_mut().enumerate() {
                // SAFETY: this function has AVX2, and this is a group.
                *bytes = unsafe { Q::bytes(strip.group(half, lane, group, Q::BYTES), run) };
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
    let tokens: [_; T] = core::array::from_fn(|t| x.group256(token + t));
    let mut sums: [[__m256; HALVES]; T] = core::array::from_fn(|t| scratch.sums[token + t]);
    for g in 0..n {
        let mut integers = [[_mm256_setzero_si256(); HALVES]; T];
        let panel = &scratch.weights[g * 64 * HALVES..(g + 1) * 64 * HALVES];
        let subs = &scratch.subs[g * 16..(g + 1) * 16];
        let at = first + g;
        let words: [&[i32]; T] = core::array::from_fn(|t| &tokens[t].words()[64 * at..64 * at + 64]);
        add_narrow::<T>(panel, words, steps_before_widening(Q::UNSIGNED_MAX), |step, pairs, t, h| {
            integers[t][h] = _mm256_add_epi32(integers[t][h], _mm256_madd_epi16(pairs, subs[step / 4][h]));
        });
        let mut mins = [[_mm256_setzero_si256(); HALVES]; T];
        for (j, sub_mins) in scratch.sub_mins[g * 8..(g + 1) * 8].iter().enumerate() {
            for t in 0..T {
                let pair = _mm256_set1_epi32(tokens[t].sum_words()[8 * at + j]);
                for h in 0..HALVES {
                    mins[t][h] = _mm256_add_epi32(mins[t][h], _mm256_madd_epi16(sub_mins[h], pair));
                }
            }
        }
        for t in 0..T {
            let x_scale = _mm256_set1_ps(tokens[t].scales[at]);
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
