//! Quantised weights against 8-bit activations, many tokens, with `sdot`: eight rows are unpacked to bytes once, four
//! columns of each row side by side, and then meet four tokens at a time in registers.
//!
//! A lane is a row, so integer sums need no reduction across lanes; a register holds sixteen columns of a token, of which
//! the instruction picks four. The sums are those of `q8.rs`, added in the same order: the same bits. A new type needs
//! nothing here.

use super::super::super::blocks::{Floor, Group32, Group256};
use super::super::super::input::Input;
use super::super::columns::Out;
use super::q8::{Simd32, Simd256, gather_f16, load_x, sdot_lane};
use core::arch::aarch64::*;
use core::cell::RefCell;

/// Rows of a panel.
pub(super) const ROWS: usize = 8;
/// Registers of four rows.
const HALVES: usize = 2;
/// From this many tokens on unpacking pays.
pub(super) const TOKENS_MIN: usize = 4;
/// Tokens of a register tile: eight sums of integers, eight more of floats or of scaled integers, two weights, four
/// activations.
const TILE: usize = 4;
/// Columns of a panel: 16 KiB together with the rows.
const COLS: usize = 2048;

/// Two registers in memory: a lane is a row.
type Rows<T> = [T; ROWS];

/// A panel and the sums of its rows.
struct Scratch {
    /// `[column / 4]`: four columns of each row.
    weights: Vec<[i8; 4 * ROWS]>,
    /// `[group]`: scales.
    scales: Vec<Rows<f32>>,
    /// `[group]`: minima, or scales of minima.
    mins: Vec<Rows<f32>>,
    /// `[group][16]`: sub-scales.
    subs: Vec<[Rows<i32>; 16]>,
    /// `[group][8]`: sub-minima.
    sub_mins: Vec<[Rows<i32>; 8]>,
    /// `[token]`.
    sums: Vec<Rows<f32>>,
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
    fn ready(&mut self, tokens: usize) {
        let zeros = [0.0; ROWS];
        if self.weights.is_empty() {
            self.weights.resize(COLS / 4, [0; 4 * ROWS]);
            self.scales.resize(COLS / 32, zeros);
            self.mins.resize(COLS / 32, zeros);
            self.subs.resize(COLS / 256, [[0; ROWS]; 16]);
            self.sub_mins.resize(COLS / 256, [[0; ROWS]; 8]);
        }
        if self.sums.len() < tokens {
            self.sums.resize(tokens, zeros);
        }
        self.sums[..tokens].fill(zeros);
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn floats(rows: &Rows<f32>) -> [float32x4_t; HALVES] {
    // SAFETY: 8 floats are readable.
    unsafe { [vld1q_f32(rows.as_ptr()), vld1q_f32(rows[4..].as_ptr())] }
}

#[target_feature(enable = "neon")]
#[inline]
fn integers(rows: &Rows<i32>) -> [int32x4_t; HALVES] {
    // SAFETY: 8 integers are readable.
    unsafe { [vld1q_s32(rows.as_ptr()), vld1q_s32(rows[4..].as_ptr())] }
}

#[target_feature(enable = "neon")]
#[inline]
fn store(sums: [float32x4_t; HALVES], rows: &mut Rows<f32>) {
    for (sums, rows) in sums.into_iter().zip(rows.chunks_exact_mut(4)) {
        // SAFETY: `rows` is 4 floats.
        unsafe { vst1q_f32(rows.as_mut_ptr(), sums) };
    }
}

/// Puts 16 bytes of each of eight rows into four places, four columns to each.
#[target_feature(enable = "neon")]
#[inline]
fn place_words(rows: [int8x16_t; ROWS], places: &mut [[i8; 4 * ROWS]]) {
    for (half, rows) in rows.chunks_exact(4).enumerate() {
        let row = |r: usize| vreinterpretq_s32_s8(rows[r]);
        let pairs = |a: int32x4_t, b: int32x4_t| {
            let (even, odd) = (vtrn1q_s32(a, b), vtrn2q_s32(a, b));
            [vreinterpretq_s64_s32(even), vreinterpretq_s64_s32(odd)]
        };
        let (first, second) = (pairs(row(0), row(1)), pairs(row(2), row(3)));
        let words = [
            vtrn1q_s64(first[0], second[0]),
            vtrn1q_s64(first[1], second[1]),
            vtrn2q_s64(first[0], second[0]),
            vtrn2q_s64(first[1], second[1]),
        ];
        for (word, place) in words.into_iter().zip(&mut *places) {
            // SAFETY: half of a place is 16 bytes.
            unsafe { vst1q_s8(place[16 * half..16 * half + 16].as_mut_ptr(), vreinterpretq_s8_s64(word)) };
        }
    }
}

/// Calls `multiply` for each eight rows, then writes the sums. The last eight overlap those before them: rows computed
/// twice give the same bits twice. There are at least eight.
#[target_feature(enable = "neon")]
#[inline]
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
            scratch.ready(x.batch());
            let mut strip = [&[][..]; ROWS];
            for (row, bytes) in strip.iter_mut().zip(weights[first * row_bytes..].chunks_exact(row_bytes)) {
                *row = bytes;
            }
            multiply(strip, scratch);
            for (token, sums) in scratch.sums[..x.batch()].iter().enumerate() {
                out.get(token, first, ROWS).copy_from_slice(sums);
            }
        }
    });
}

/// Adds to `sums` the products of 16 columns of the panel with `T` tokens.
///
/// # Safety
/// NEON, and the machine has `dotprod`.
#[inline(always)]
unsafe fn add_16<const T: usize>(sums: &mut [[int32x4_t; HALVES]; T], panel: &[[i8; 4 * ROWS]], x: [int8x16_t; T]) {
    // SAFETY: half of a place is 16 bytes; the rest by this function's contract.
    unsafe {
        let weights = |step: usize, half: usize| vld1q_s8(panel[step][16 * half..16 * half + 16].as_ptr());
        for half in 0..HALVES {
            let w = [weights(0, half), weights(1, half), weights(2, half), weights(3, half)];
            for t in 0..T {
                sums[t][half] = sdot_lane::<0>(sums[t][half], w[0], x[t]);
            }
            for t in 0..T {
                sums[t][half] = sdot_lane::<1>(sums[t][half], w[1], x[t]);
            }
            for t in 0..T {
                sums[t][half] = sdot_lane::<2>(sums[t][half], w[2], x[t]);
            }
            for t in 0..T {
                sums[t][half] = sdot_lane::<3>(sums[t][half], w[3], x[t]);
            }
        }
    }
}

/// Calls a tile for as many tokens as are left, at most [`TILE`].
macro_rules! tiles {
    ($left:expr, $tile:ident::<$type:ty>($($arg:expr),*)) => {
        // SAFETY: the machine has `dotprod`, by the contract of the function that expands this.
        unsafe {
            match $left {
                1 => $tile::<$type, 1>($($arg),*),
                2 => $tile::<$type, 2>($($arg),*),
                3 => $tile::<$type, 3>($($arg),*),
                _ => $tile::<$type, TILE>($($arg),*),
            }
        }
    };
}

/// Rows (at least [`ROWS`]) of a 32-element type against all tokens.
///
/// # Safety
/// The machine has `dotprod`.
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
            for token in (0..x.batch()).step_by(TILE) {
                tiles!(x.batch() - token, tile32::<Q>(scratch, x, token, first, n));
            }
        }
    });
}

/// Unpacks a group of eight rows to place `at` of the panel.
#[target_feature(enable = "neon")]
fn pack32<Q: Simd32>(group: [&[u8]; ROWS], at: usize, scratch: &mut Scratch) {
    let mut bytes = [[vdupq_n_s8(0); ROWS]; 2];
    for (r, group) in group.into_iter().enumerate() {
        // SAFETY: this function has NEON.
        [bytes[0][r], bytes[1][r]] = unsafe { Q::bytes(group) };
    }
    for (half, bytes) in bytes.into_iter().enumerate() {
        place_words(bytes, &mut scratch.weights[8 * at + 4 * half..8 * at + 4 * half + 4]);
    }
    let [a, b, c, d, e, f, g, h] = group;
    let both = [[a, b, c, d], [e, f, g, h]];
    store(both.map(|rows| gather_f16(rows, 0)), &mut scratch.scales[at]);
    if Q::HAS_MIN {
        store(both.map(|rows| gather_f16(rows, 2)), &mut scratch.mins[at]);
    }
}

/// `n` groups of the panel, which are groups `first..` of the rows, against `T` tokens.
///
/// # Safety
/// The machine has `dotprod`.
#[target_feature(enable = "neon")]
unsafe fn tile32<Q: Group32, const T: usize>(scratch: &mut Scratch, x: &Input, token: usize, first: usize, n: usize) {
    let mut q = [&[][..]; T];
    let mut factors = [[&[][..]; 2]; T];
    let mut sums = [[vdupq_n_f32(0.0); HALVES]; T];
    for t in 0..T {
        let x = x.group32(token + t);
        q[t] = &x.q[32 * first..32 * (first + n)];
        factors[t] = [&x.scales[first..first + n], &x.scaled_sums[first..first + n]];
        sums[t] = floats(&scratch.sums[token + t]);
    }
    for g in 0..n {
        let mut dots = [[vdupq_n_s32(0); HALVES]; T];
        for half in 0..2 {
            let at = 8 * g + 4 * half;
            let mut x = [vdupq_n_s8(0); T];
            for t in 0..T {
                x[t] = load_x(q[t], 4 * at);
            }
            // SAFETY: this function has NEON, and the machine `dotprod`, by the contract of who called it.
            unsafe { add_16(&mut dots, &scratch.weights[at..at + 4], x) };
        }
        let (scales, mins) = (floats(&scratch.scales[g]), floats(&scratch.mins[g]));
        for t in 0..T {
            for h in 0..HALVES {
                let scale = vmulq_n_f32(scales[h], factors[t][0][g]);
                sums[t][h] = vfmaq_f32(sums[t][h], scale, vcvtq_f32_s32(dots[t][h]));
                if Q::HAS_MIN {
                    sums[t][h] = vfmaq_n_f32(sums[t][h], mins[h], factors[t][1][g]);
                }
            }
        }
    }
    for (t, sums) in sums.into_iter().enumerate() {
        store(sums, &mut scratch.sums[token + t]);
    }
}

/// Rows (at least [`ROWS`]) of a 256-element type against all tokens.
///
/// # Safety
/// The machine has `dotprod`.
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
            for token in (0..x.batch()).step_by(TILE) {
                tiles!(x.batch() - token, tile256::<Q>(scratch, x, token, first, n));
            }
        }
    });
}

/// Unpacks a group of eight rows to place `at` of the panel.
#[target_feature(enable = "neon")]
fn pack256<Q: Simd256>(group: [&[u8]; ROWS], at: usize, scratch: &mut Scratch) {
    for (r, group) in group.into_iter().enumerate() {
        let (subs, mins) = Q::subs(group);
        (scratch.scales[at][r], scratch.mins[at][r]) = Q::factors(group);
        for (place, sub) in scratch.subs[at].iter_mut().zip(subs) {
            place[r] = i32::from(sub);
        }
        for (place, min) in scratch.sub_mins[at].iter_mut().zip(mins) {
            place[r] = i32::from(min);
        }
    }
    for run in 0..8 {
        let mut bytes = [[vdupq_n_s8(0); ROWS]; 2];
        for (r, group) in group.into_iter().enumerate() {
            // SAFETY: this function has NEON.
            [bytes[0][r], bytes[1][r]] = unsafe { Q::bytes(group, run) };
        }
        for (half, bytes) in bytes.into_iter().enumerate() {
            let place = 64 * at + 8 * run + 4 * half;
            place_words(bytes, &mut scratch.weights[place..place + 4]);
        }
    }
}

/// `n` groups of the panel, which are groups `first..` of the rows, against `T` tokens.
///
/// # Safety
/// The machine has `dotprod`.
#[target_feature(enable = "neon")]
unsafe fn tile256<Q: Group256, const T: usize>(scratch: &mut Scratch, x: &Input, token: usize, first: usize, n: usize) {
    let mut q = [&[][..]; T];
    let mut x_sums = [&[][..]; T];
    let mut factors = [&[][..]; T];
    for t in 0..T {
        let x = x.group256(token + t);
        q[t] = &x.q[256 * first..256 * (first + n)];
        x_sums[t] = &x.sums[16 * first..16 * (first + n)];
        factors[t] = &x.scales[first..first + n];
    }
    for g in 0..n {
        let mut dots = [[vdupq_n_s32(0); HALVES]; T];
        for (sub, scale) in scratch.subs[g].iter().enumerate() {
            let at = 64 * g + 4 * sub;
            let mut x = [vdupq_n_s8(0); T];
            for t in 0..T {
                x[t] = load_x(q[t], 4 * at);
            }
            let mut part = [[vdupq_n_s32(0); HALVES]; T];
            // SAFETY: this function has NEON, and the machine `dotprod`, by the contract of who called it.
            unsafe { add_16(&mut part, &scratch.weights[at..at + 4], x) };
            let scale = integers(scale);
            for t in 0..T {
                for h in 0..HALVES {
                    dots[t][h] = vmlaq_s32(dots[t][h], part[t][h], scale[h]);
                }
            }
        }
        let mut mins = [[vdupq_n_s32(0); HALVES]; T];
        if Q::FLOOR == Floor::Minimum {
            for (j, min) in scratch.sub_mins[g].iter().enumerate() {
                let min = integers(min);
                for t in 0..T {
                    let at = 16 * g + 2 * j;
                    let sum = i32::from(x_sums[t][at]) + i32::from(x_sums[t][at + 1]);
                    for h in 0..HALVES {
                        mins[t][h] = vmlaq_n_s32(mins[t][h], min[h], sum);
                    }
                }
            }
        }
        let (scales, min_scales) = (floats(&scratch.scales[g]), floats(&scratch.mins[g]));
        for t in 0..T {
            let x_scale = factors[t][g];
            let mut sums = floats(&scratch.sums[token + t]);
            for h in 0..HALVES {
                sums[h] = vfmaq_f32(sums[h], vmulq_n_f32(scales[h], x_scale), vcvtq_f32_s32(dots[t][h]));
                if Q::FLOOR == Floor::Minimum {
                    let scale = vmulq_n_f32(min_scales[h], x_scale);
                    sums[h] = vfmsq_f32(sums[h], scale, vcvtq_f32_s32(mins[t][h]));
                }
            }
            store(sums, &mut scratch.sums[token + t]);
        }
    }
}
