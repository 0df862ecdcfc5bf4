//! Quantised weights against 8-bit activations, many tokens, with `smmla`: eight rows are unpacked to bytes once, eight
//! columns of two rows side by side, and then meet two pairs of tokens at a time in registers.
//!
//! A register has the sums of two rows with two tokens. The integers are exact and what follows them is the same, in the
//! same order: the bits of `q8.rs`. A token without a partner is its own. A new type needs nothing here.

use super::super::super::blocks::{Floor, Group32, Group256};
use super::super::super::input::Input;
use super::super::columns::Out;
use super::packed::ROWS;
use super::q8::{Simd32, Simd256, smmla};
use core::arch::aarch64::*;
use core::cell::RefCell;

/// Pairs of rows of a panel.
const PAIRS: usize = ROWS / 2;
/// Pairs of tokens of a register tile: eight sums of integers, eight more of floats or of scaled integers, four weights,
/// two activations.
const TILE: usize = 2;
/// Columns of a panel: 16 KiB together with the rows.
const COLS: usize = 2048;

/// A register in memory: two rows' numbers, each twice; or the sums of two rows with two tokens.
type Quad<T> = [T; 4];

/// A panel and the sums of its rows.
struct Scratch {
    /// `[column / 8][pair of rows]`: eight columns of either row.
    weights: Vec<[[i8; 16]; PAIRS]>,
    /// `[group]`: scales.
    scales: Vec<[Quad<f32>; PAIRS]>,
    /// `[group]`: minima, or scales of minima.
    mins: Vec<[Quad<f32>; PAIRS]>,
    /// `[group][16]`: sub-scales.
    subs: Vec<[[Quad<i32>; PAIRS]; 16]>,
    /// `[group][8]`: sub-minima.
    sub_mins: Vec<[[Quad<i32>; PAIRS]; 8]>,
    /// `[pair of tokens]`.
    sums: Vec<[Quad<f32>; PAIRS]>,
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
    fn ready(&mut self, token_pairs: usize) {
        let zeros = [[0.0; 4]; PAIRS];
        if self.weights.is_empty() {
            self.weights.resize(COLS / 8, [[0; 16]; PAIRS]);
            self.scales.resize(COLS / 32, zeros);
            self.mins.resize(COLS / 32, zeros);
            self.subs.resize(COLS / 256, [[[0; 4]; PAIRS]; 16]);
            self.sub_mins.resize(COLS / 256, [[[0; 4]; PAIRS]; 8]);
        }
        if self.sums.len() < token_pairs {
            self.sums.resize(token_pairs, zeros);
        }
        self.sums[..token_pairs].fill(zeros);
    }
}

/// Puts a row's number where its pair has it.
#[inline(always)]
fn put<T: Copy>(pairs: &mut [Quad<T>; PAIRS], row: usize, value: T) {
    pairs[row / 2][2 * (row % 2)..2 * (row % 2) + 2].fill(value);
}

#[target_feature(enable = "neon")]
#[inline]
fn floats(quads: &[Quad<f32>; PAIRS]) -> [float32x4_t; PAIRS] {
    let mut loaded = [vdupq_n_f32(0.0); PAIRS];
    for (loaded, quad) in loaded.iter_mut().zip(quads) {
        // SAFETY: 4 floats are readable.
        *loaded = unsafe { vld1q_f32(quad.as_ptr()) };
    }
    loaded
}

#[target_feature(enable = "neon")]
#[inline]
fn integers(quads: &[Quad<i32>; PAIRS]) -> [int32x4_t; PAIRS] {
    let mut loaded = [vdupq_n_s32(0); PAIRS];
    for (loaded, quad) in loaded.iter_mut().zip(quads) {
        // SAFETY: 4 integers are readable.
        *loaded = unsafe { vld1q_s32(quad.as_ptr()) };
    }
    loaded
}

#[target_feature(enable = "neon")]
#[inline]
fn store(sums: [float32x4_t; PAIRS], quads: &mut [Quad<f32>; PAIRS]) {
    for (sum, quad) in sums.into_iter().zip(quads) {
        // SAFETY: 4 floats are writable.
        unsafe { vst1q_f32(quad.as_mut_ptr(), sum) };
    }
}

/// Two tokens' numbers, one after the other, twice.
#[target_feature(enable = "neon")]
#[inline]
fn both_f32(numbers: [f32; 2]) -> float32x4_t {
    // SAFETY: 2 floats are readable.
    let two = unsafe { vld1_f32(numbers.as_ptr()) };
    vcombine_f32(two, two)
}

/// Two tokens' numbers, one after the other, twice.
#[target_feature(enable = "neon")]
#[inline]
fn both_s32(numbers: [i32; 2]) -> int32x4_t {
    // SAFETY: 2 integers are readable.
    let two = unsafe { vld1_s32(numbers.as_ptr()) };
    vcombine_s32(two, two)
}

/// Calls `multiply` for each eight rows, then writes the sums. The last eight overlap those before them: rows computed
/// twice give the same bits twice. There are at least eight.
fn strips(
    weights: &[u8],
    (rows, row_bytes): (usize, usize),
    x: &Input,
    out: &mut Out<'_>,
    multiply: impl Fn([&[u8]; ROWS], &mut Scratch),
) {
    SCRATCH.with_borrow_mut(|scratch| {
        for first in (0..rows).step_by(ROWS) {
            let first = first.min(rows - ROWS);
            scratch.ready(x.batch().div_ceil(2));
            let mut strip = [&[][..]; ROWS];
            for (row, bytes) in strip.iter_mut().zip(weights[first * row_bytes..].chunks_exact(row_bytes)) {
                *row = bytes;
            }
            multiply(strip, scratch);
            for token in 0..x.batch() {
                let sums = &scratch.sums[token / 2];
                for (row, out) in out.get(token, first, ROWS).iter_mut().enumerate() {
                    *out = sums[row / 2][2 * (row % 2) + token % 2];
                }
            }
        }
    });
}

/// The pairs of tokens of the tile that begins with pair `first`. Where one pair is left it comes twice.
fn token_pairs(x: &Input, first: usize) -> [(usize, [usize; 2]); TILE] {
    let last = x.batch().div_ceil(2) - 1;
    [first.min(last), (first + 1).min(last)].map(|pair| (pair, [2 * pair, (2 * pair + 1).min(x.batch() - 1)]))
}

/// Adds to `sums` the products of eight columns of the panel, those from `at` on of the tokens.
///
/// # Safety
/// NEON, and the machine has `i8mm`.
#[inline(always)]
unsafe fn add_8(sums: &mut [[int32x4_t; PAIRS]; TILE], weights: &[[i8; 16]; PAIRS], x: &[[&[i8]; 2]; TILE], at: usize) {
    // SAFETY: 16 weights, and 8 activations in each slice, are readable; the rest by this function's contract.
    unsafe {
        let eight = |x: &[i8]| vld1_s8(x[at..at + 8].as_ptr());
        let x = [vcombine_s8(eight(x[0][0]), eight(x[0][1])), vcombine_s8(eight(x[1][0]), eight(x[1][1]))];
        for (pair, weights) in weights.iter().enumerate() {
            let weights = vld1q_s8(weights.as_ptr());
            for t in 0..TILE {
                sums[t][pair] = smmla(sums[t][pair], weights, x[t]);
            }
        }
    }
}

/// Puts 16 columns of two rows into two places of a panel.
#[target_feature(enable = "neon")]
#[inline]
fn place_pair(a: int8x16_t, b: int8x16_t, pair: usize, places: &mut [[[i8; 16]; PAIRS]]) {
    // SAFETY: a place is 16 bytes.
    unsafe {
        vst1q_s8(places[0][pair].as_mut_ptr(), vcombine_s8(vget_low_s8(a), vget_low_s8(b)));
        vst1q_s8(places[1][pair].as_mut_ptr(), vcombine_s8(vget_high_s8(a), vget_high_s8(b)));
    }
}

/// Rows (at least [`ROWS`]) of a 32-element type against all tokens.
///
/// # Safety
/// The machine has `i8mm`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn rows32<Q: Simd32>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let groups = x.cols() / 32;
    let step = COLS / 32;
    strips(weights, (rows, groups * Q::BYTES), x, out, |rows, scratch| {
        for first in (0..groups).step_by(step) {
            let n = step.min(groups - first);
            for g in 0..n {
                let group = (first + g) * Q::BYTES..(first + g + 1) * Q::BYTES;
                pack32::<Q>(rows.map(|row| &row[group.clone()]), g, scratch);
            }
            for pair in (0..x.batch().div_ceil(2)).step_by(TILE) {
                // SAFETY: by this function's contract.
                unsafe { tile32::<Q>(scratch, x, pair, first, n) };
            }
        }
    });
}

/// Unpacks a group of eight rows to place `at` of the panel.
#[target_feature(enable = "neon")]
fn pack32<Q: Simd32>(group: [&[u8]; ROWS], at: usize, scratch: &mut Scratch) {
    for (pair, two) in group.chunks_exact(2).enumerate() {
        // SAFETY: this function has NEON.
        let (a, b) = unsafe { (Q::bytes(two[0]), Q::bytes(two[1])) };
        for half in 0..2 {
            place_pair(a[half], b[half], pair, &mut scratch.weights[4 * at + 2 * half..4 * at + 2 * half + 2]);
        }
    }
    for (row, group) in group.into_iter().enumerate() {
        let (scale, min) = Q::scales(group);
        put(&mut scratch.scales[at], row, scale);
        put(&mut scratch.mins[at], row, min);
    }
}

/// `n` groups of the panel, which are groups `first..` of the rows, against the tokens from pair `pair` on.
///
/// # Safety
/// The machine has `i8mm`.
#[target_feature(enable = "neon")]
unsafe fn tile32<Q: Group32>(scratch: &mut Scratch, x: &Input, pair: usize, first: usize, n: usize) {
    let pairs = token_pairs(x, pair);
    let tokens = pairs.map(|(_, tokens)| tokens.map(|token| x.group32(token)));
    let q = tokens.map(|two| two.map(|x| &x.q[32 * first..32 * (first + n)]));
    let mut sums = [floats(&scratch.sums[pairs[0].0]), floats(&scratch.sums[pairs[1].0])];
    for g in 0..n {
        let mut dots = [[vdupq_n_s32(0); PAIRS]; TILE];
        for (step, weights) in scratch.weights[4 * g..4 * g + 4].iter().enumerate() {
            // SAFETY: this function has NEON, and the machine `i8mm`, by its contract.
            unsafe { add_8(&mut dots, weights, &q, 32 * g + 8 * step) };
        }
        let (scales, mins) = (floats(&scratch.scales[g]), floats(&scratch.mins[g]));
        for t in 0..TILE {
            let x_scale = both_f32(tokens[t].map(|x| x.scales[first + g]));
            let x_sum = both_f32(tokens[t].map(|x| x.scaled_sums[first + g]));
            for p in 0..PAIRS {
                sums[t][p] = vfmaq_f32(sums[t][p], vmulq_f32(scales[p], x_scale), vcvtq_f32_s32(dots[t][p]));
                if Q::HAS_MIN {
                    sums[t][p] = vfmaq_f32(sums[t][p], mins[p], x_sum);
                }
            }
        }
    }
    for ((pair, _), sums) in pairs.into_iter().zip(sums) {
        store(sums, &mut scratch.sums[pair]);
    }
}

/// Rows (at least [`ROWS`]) of a 256-element type against all tokens.
///
/// # Safety
/// The machine has `i8mm`.
#[target_feature(enable = "neon")]
pub(super) unsafe fn rows256<Q: Simd256>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let groups = x.cols() / 256;
    let step = COLS / 256;
    strips(weights, (rows, groups * Q::BYTES), x, out, |rows, scratch| {
        for first in (0..groups).step_by(step) {
            let n = step.min(groups - first);
            for g in 0..n {
                let group = (first + g) * Q::BYTES..(first + g + 1) * Q::BYTES;
                pack256::<Q>(rows.map(|row| &row[group.clone()]), g, scratch);
            }
            for pair in (0..x.batch().div_ceil(2)).step_by(TILE) {
                // SAFETY: by this function's contract.
                unsafe { tile256::<Q>(scratch, x, pair, first, n) };
            }
        }
    });
}

/// Unpacks a group of eight rows to place `at` of the panel.
#[target_feature(enable = "neon")]
fn pack256<Q: Simd256>(group: [&[u8]; ROWS], at: usize, scratch: &mut Scratch) {
    for (row, group) in group.into_iter().enumerate() {
        let (subs, mins) = Q::subs(group);
        let (scale, min_scale) = Q::factors(group);
        put(&mut scratch.scales[at], row, scale);
        put(&mut scratch.mins[at], row, min_scale);
        for (place, sub) in scratch.subs[at].iter_mut().zip(subs) {
            put(place, row, i32::from(sub));
        }
        for (place, min) in scratch.sub_mins[at].iter_mut().zip(mins) {
            put(place, row, i32::from(min));
        }
    }
    for run in 0..8 {
        for (pair, two) in group.chunks_exact(2).enumerate() {
            // SAFETY: this function has NEON.
            let (a, b) = unsafe { (Q::bytes(two[0], run), Q::bytes(two[1], run)) };
            for half in 0..2 {
                let place = 32 * at + 4 * run + 2 * half;
                place_pair(a[half], b[half], pair, &mut scratch.weights[place..place + 2]);
            }
        }
    }
}

/// `n` groups of the panel, which are groups `first..` of the rows, against the tokens from pair `pair` on.
///
/// # Safety
/// The machine has `i8mm`.
#[target_feature(enable = "neon")]
unsafe fn tile256<Q: Group256>(scratch: &mut Scratch, x: &Input, pair: usize, first: usize, n: usize) {
    let pairs = token_pairs(x, pair);
    let tokens = pairs.map(|(_, tokens)| tokens.map(|token| x.group256(token)));
    let q = tokens.map(|two| two.map(|x| &x.q[256 * first..256 * (first + n)]));
    for g in 0..n {
        let mut dots = [[vdupq_n_s32(0); PAIRS]; TILE];
        for (sub, scale) in scratch.subs[g].iter().enumerate() {
            let mut part = [[vdupq_n_s32(0); PAIRS]; TILE];
            for half in 0..2 {
                let at = 2 * sub + half;
                // SAFETY: this function has NEON, and the machine `i8mm`, by its contract.
                unsafe { add_8(&mut part, &scratch.weights[32 * g + at], &q, 256 * g + 8 * at) };
            }
            let scale = integers(scale);
            for t in 0..TILE {
                for p in 0..PAIRS {
                    dots[t][p] = vmlaq_s32(dots[t][p], part[t][p], scale[p]);
                }
            }
        }
        let mut mins = [[vdupq_n_s32(0); PAIRS]; TILE];
        if Q::FLOOR == Floor::Minimum {
            for (j, min) in scratch.sub_mins[g].iter().enumerate() {
                let min = integers(min);
                let at = 16 * (first + g) + 2 * j;
                for t in 0..TILE {
                    let sums = both_s32(tokens[t].map(|x| i32::from(x.sums[at]) + i32::from(x.sums[at + 1])));
                    for p in 0..PAIRS {
                        mins[t][p] = vmlaq_s32(mins[t][p], min[p], sums);
                    }
                }
            }
        }
        let (scales, min_scales) = (floats(&scratch.scales[g]), floats(&scratch.mins[g]));
        // Both loaded before either is stored: they may be the same pair.
        let mut sums = [floats(&scratch.sums[pairs[0].0]), floats(&scratch.sums[pairs[1].0])];
        for t in 0..TILE {
            let x_scale = both_f32(tokens[t].map(|x| x.scales[first + g]));
            for p in 0..PAIRS {
                sums[t][p] = vfmaq_f32(sums[t][p], vmulq_f32(scales[p], x_scale), vcvtq_f32_s32(dots[t][p]));
                if Q::FLOOR == Floor::Minimum {
                    let scale = vmulq_f32(min_scales[p], x_scale);
                    sums[t][p] = vfmsq_f32(sums[t][p], scale, vcvtq_f32_s32(mins[t][p]));
                }
            }
        }
        for ((pair, _), sums) in pairs.into_iter().zip(sums) {
            store(sums, &mut scratch.sums[pair]);
        }
    }
}
