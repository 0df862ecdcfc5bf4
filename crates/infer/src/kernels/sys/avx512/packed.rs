//! Quantised weights against 8-bit activations, many tokens, with VNNI: sixteen rows are unpacked to bytes once, four
//! columns of each row side by side, and then meet eight tokens at a time in registers.
//!
//! A lane is a row, as in `avx2/packed.rs`, but one instruction multiplies four columns and adds them in 32 bits, where
//! nothing overflows, so the bytes of every type are unsigned and none needs 16 bits. The integers are exact and what
//! follows them is the same, in the same order: the same bits. A new type needs nothing here.

use super::super::super::blocks::{Floor, Group32, Group256};
use super::super::super::input::Input;
use super::super::avx2::packed::{fetch, transpose};
use super::super::avx2::q8::{Eight, LANES, Simd32, Simd256, gather_f16};
use super::super::columns::Out;
use super::Line;
use core::arch::x86_64::*;
use core::cell::RefCell;

/// Rows of a panel: the lanes of a register.
pub(super) const ROWS: usize = 16;
/// Tokens of a register tile: eight sums of integers, eight of floats, one register of weights.
const TILE: usize = 8;
/// Registers of a panel's weights: 16 KiB.
const PANEL: usize = 256;
/// Registers that 32 elements and 256 elements take.
const STEPS_32: usize = 8;
const STEPS_256: usize = 64;

/// Calls a tile for as many tokens as are left, at most [`TILE`].
macro_rules! tiles {
    ($left:expr, $tile:ident::<$type:ty>($($arg:expr),*)) => {
        match $left {
            1 => $tile::<$type, 1>($($arg),*),
            2 => $tile::<$type, 2>($($arg),*),
            3 => $tile::<$type, 3>($($arg),*),
            4 => $tile::<$type, 4>($($arg),*),
            5 => $tile::<$type, 5>($($arg),*),
            6 => $tile::<$type, 6>($($arg),*),
            7 => $tile::<$type, 7>($($arg),*),
            _ => $tile::<$type, TILE>($($arg),*),
        }
    };
}

/// A panel and the sums of its rows.
struct Scratch {
    /// `[group][step]`: four 8-bit columns of sixteen rows.
    weights: Vec<Line<i32>>,
    /// `[group]`: scales.
    scales: Vec<Line<f32>>,
    /// `[group]`: minima, or scales of minima.
    mins: Vec<Line<f32>>,
    /// `[group][16]`: sub-scales.
    subs: Vec<[Line<i32>; 16]>,
    /// `[group][8]`: two 16-bit sub-minima in each lane.
    sub_mins: Vec<[Line<u32>; 8]>,
    /// `[token]`.
    sums: Vec<Line<f32>>,
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
        let zeros = Line([0.0; ROWS]);
        if self.weights.is_empty() {
            self.weights.resize(PANEL, Line([0; ROWS]));
            self.scales.resize(PANEL / STEPS_32, zeros);
            self.mins.resize(PANEL / STEPS_32, zeros);
            self.subs.resize(PANEL / STEPS_256, [Line([0; ROWS]); 16]);
            self.sub_mins.resize(PANEL / STEPS_256, [Line([0; ROWS]); 8]);
        }
        if self.sums.len() < tokens {
            self.sums.resize(tokens, zeros);
        }
        self.sums[..tokens].fill(zeros);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn floats(line: &Line<f32>) -> __m512 {
    // SAFETY: a line is 16 aligned floats.
    unsafe { _mm512_load_ps(line.0.as_ptr()) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn integers<T>(line: &Line<T>) -> __m512i {
    const { assert!(size_of::<Line<T>>() == 64) };
    // SAFETY: a line is 64 aligned bytes.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

/// Calls `multiply` for each sixteen rows, then writes the sums. The last sixteen overlap those before them: rows
/// computed twice give the same bits twice. There are at least sixteen.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn strips(
    weights: &[u8],
    (rows, row_bytes): (usize, usize),
    x: &Input,
    out: &mut Out<'_>,
    multiply: impl Fn([Eight; 2], &mut Scratch),
) {
    SCRATCH.with_borrow_mut(|scratch| {
        for first in (0..rows).step_by(ROWS) {
            let first = first.min(rows - ROWS);
            scratch.ready(x.batch());
            multiply([first, first + LANES].map(|first| Eight::rows(weights, first, row_bytes)), scratch);
            for (token, Line(sums)) in scratch.sums[..x.batch()].iter().enumerate() {
                out.get(token, first, ROWS).copy_from_slice(sums);
            }
        }
    });
}

/// Puts the words of sixteen rows, transposed, into `place`: word `w` of row `r` becomes lane `r` of line `w`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn place_words(rows: [[__m256i; LANES]; 2], place: &mut [Line<i32>]) {
    let [low, high] = [transpose(rows[0]), transpose(rows[1])];
    for ((Line(place), low), high) in place.iter_mut().zip(low).zip(high) {
        // SAFETY: a line is 16 integers, two registers.
        unsafe {
            _mm256_storeu_si256(place.as_mut_ptr().cast(), low);
            _mm256_storeu_si256(place[LANES..].as_mut_ptr().cast(), high);
        }
    }
}

/// Rows (at least [`ROWS`]) of a 32-element type against all tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn rows32<Q: Simd32>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let groups = x.cols() / 32;
    strips(weights, (rows, groups * Q::BYTES), x, out, |halves, scratch| {
        let step = PANEL / STEPS_32;
        for first in (0..groups).step_by(step) {
            let n = step.min(groups - first);
            for at in 0..n {
                // SAFETY: `first + at` is one of a row's groups.
                unsafe { pack32::<Q>(halves, first + at, at, scratch) };
            }
            for token in (0..x.batch()).step_by(TILE) {
                for next in token + TILE..x.batch().min(token + 2 * TILE) {
                    fetch(x.group32(next).words(), first * STEPS_32, n * STEPS_32);
                }
                tiles!(x.batch() - token, tile32::<Q>(scratch, x, token, first, n));
            }
        }
    });
}

/// Unpacks group `group` of sixteen rows to place `at` of the panel.
///
/// # Safety
/// The rows have that group.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn pack32<Q: Simd32>(halves: [Eight; 2], group: usize, at: usize, scratch: &mut Scratch) {
    let from = group * Q::BYTES;
    let mut bytes = [[_mm256_setzero_si256(); LANES]; 2];
    for (half, rows) in halves.into_iter().enumerate() {
        // SAFETY: the rows have this group, by this function's contract; a half of a line is 8 floats.
        unsafe {
            for (lane, bytes) in bytes[half].iter_mut().enumerate() {
                *bytes = Q::bytes(rows.bytes(lane, from, Q::BYTES));
            }
            let lanes = half * LANES..(half + 1) * LANES;
            _mm256_storeu_ps(scratch.scales[at].0[lanes.clone()].as_mut_ptr(), gather_f16(rows, from));
            if Q::HAS_MIN {
                _mm256_storeu_ps(scratch.mins[at].0[lanes].as_mut_ptr(), gather_f16(rows, from + 2));
            }
        }
    }
    place_words(bytes, &mut scratch.weights[at * STEPS_32..(at + 1) * STEPS_32]);
}

/// Adds to `sums` the products of `steps` lines of the panel with `T` tokens' words, from word `at` on.
///
/// # Safety
/// `steps` words from `at` on are readable at each of `words`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
unsafe fn add_products<const T: usize>(
    sums: &mut [__m512i; T],
    panel: &[Line<i32>],
    words: &[*const i32; T],
    at: usize,
) {
    for (step, line) in panel.iter().enumerate() {
        let weights = integers(line);
        for t in 0..T {
            // SAFETY: by this function's contract.
            let x = _mm512_set1_epi32(unsafe { *words[t].add(at + step) });
            sums[t] = _mm512_dpbusd_epi32(sums[t], weights, x);
        }
    }
}

/// `n` groups of the panel, which are groups `first..` of the rows, against `T` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile32<Q: Group32, const T: usize>(scratch: &mut Scratch, x: &Input, token: usize, first: usize, n: usize) {
    let mut words = [core::ptr::null(); T];
    let mut factors = [[&[][..]; 2]; T];
    let mut offsets = [&[][..]; T];
    let mut sums = [_mm512_setzero_ps(); T];
    for t in 0..T {
        let x = x.group32(token + t);
        words[t] = x.words()[first * STEPS_32..(first + n) * STEPS_32].as_ptr();
        factors[t] = [&x.scales[first..first + n], &x.scaled_sums[first..first + n]];
        offsets[t] = &x.sums[first..first + n];
        sums[t] = floats(&scratch.sums[token + t]);
    }
    for g in 0..n {
        let mut dots = [_mm512_setzero_si512(); T];
        if Q::OFFSET != 0 {
            for t in 0..T {
                dots[t] = _mm512_set1_epi32(-(i32::from(Q::OFFSET) * offsets[t][g]));
            }
        }
        let panel = &scratch.weights[g * STEPS_32..(g + 1) * STEPS_32];
        // SAFETY: group `g < n` has `STEPS_32` words in each token's.
        unsafe { add_products(&mut dots, panel, &words, g * STEPS_32) };
        let (scale, min) = (floats(&scratch.scales[g]), floats(&scratch.mins[g]));
        for t in 0..T {
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(factors[t][0][g]));
            sums[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dots[t]), sums[t]);
            if Q::HAS_MIN {
                sums[t] = _mm512_fmadd_ps(min, _mm512_set1_ps(factors[t][1][g]), sums[t]);
            }
        }
    }
    store(&sums, &mut scratch.sums[token..]);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
#[inline]
fn store<const T: usize>(sums: &[__m512; T], lines: &mut [Line<f32>]) {
    for (&sum, line) in sums.iter().zip(lines) {
        // SAFETY: a line is 16 aligned floats.
        unsafe { _mm512_store_ps(line.0.as_mut_ptr(), sum) };
    }
}

/// Rows (at least [`ROWS`]) of a 256-element type against all tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn rows256<Q: Simd256>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    let groups = x.cols() / 256;
    strips(weights, (rows, groups * Q::BYTES), x, out, |halves, scratch| {
        let step = PANEL / STEPS_256;
        for first in (0..groups).step_by(step) {
            let n = step.min(groups - first);
            for at in 0..n {
                // SAFETY: `first + at` is one of a row's groups.
                unsafe { pack256::<Q>(halves, first + at, at, scratch) };
            }
            for token in (0..x.batch()).step_by(TILE) {
                for next in token + TILE..x.batch().min(token + 2 * TILE) {
                    fetch(x.group256(next).words(), first * STEPS_256, n * STEPS_256);
                }
                tiles!(x.batch() - token, tile256::<Q>(scratch, x, token, first, n));
            }
        }
    });
}

/// Unpacks group `group` of sixteen rows to place `at` of the panel.
///
/// # Safety
/// The rows have that group.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn pack256<Q: Simd256>(halves: [Eight; 2], group: usize, at: usize, scratch: &mut Scratch) {
    // SAFETY: the rows have this group, by this function's contract.
    let group = |row: usize| unsafe { halves[row / LANES].bytes(row % LANES, group * Q::BYTES, Q::BYTES) };
    for row in 0..ROWS {
        let all = Q::scales(group(row));
        (scratch.scales[at].0[row], scratch.mins[at].0[row]) = (all.scale, all.min_scale);
        for j in 0..16 {
            scratch.subs[at][j].0[row] = i32::from(all.sub[j]);
        }
        for (j, min) in all.min.chunks_exact(2).enumerate() {
            scratch.sub_mins[at][j].0[row] = u32::from(min[0] as u16) | u32::from(min[1] as u16) << 16;
        }
    }
    for run in 0..8 {
        let mut bytes = [[_mm256_setzero_si256(); LANES]; 2];
        for (row, bytes) in bytes.as_flattened_mut().iter_mut().enumerate() {
            // SAFETY: this function has AVX2, and this is a group.
            *bytes = unsafe { Q::bytes(group(row), run) };
        }
        let line = at * STEPS_256 + run * STEPS_32;
        place_words(bytes, &mut scratch.weights[line..line + STEPS_32]);
    }
}

/// `n` groups of the panel, which are groups `first..` of the rows, against `T` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile256<Q: Group256, const T: usize>(scratch: &mut Scratch, x: &Input, token: usize, first: usize, n: usize) {
    let mut words = [core::ptr::null(); T];
    let mut sum_words = [&[][..]; T];
    let mut factors = [&[][..]; T];
    let mut sums = [_mm512_setzero_ps(); T];
    for t in 0..T {
        let x = x.group256(token + t);
        words[t] = x.words()[first * STEPS_256..(first + n) * STEPS_256].as_ptr();
        sum_words[t] = &x.sum_words()[8 * first..8 * (first + n)];
        factors[t] = &x.scales[first..first + n];
        sums[t] = floats(&scratch.sums[token + t]);
    }
    for g in 0..n {
        let panel = &scratch.weights[g * STEPS_256..(g + 1) * STEPS_256];
        let mut dots = [_mm512_setzero_si512(); T];
        for (sub, (line, panel)) in scratch.subs[g].iter().zip(panel.chunks_exact(4)).enumerate() {
            let mut part = [_mm512_setzero_si512(); T];
            // SAFETY: sub-group `sub < 16` of group `g < n` has four words in each token's.
            unsafe { add_products(&mut part, panel, &words, g * STEPS_256 + 4 * sub) };
            let scale = integers(line);
            for t in 0..T {
                dots[t] = _mm512_add_epi32(dots[t], _mm512_mullo_epi32(part[t], scale));
            }
        }
        let mut mins = [_mm512_setzero_si512(); T];
        for (j, line) in scratch.sub_mins[g].iter().enumerate() {
            let line = integers(line);
            for t in 0..T {
                mins[t] = _mm512_dpwssd_epi32(mins[t], line, _mm512_set1_epi32(sum_words[t][8 * g + j]));
            }
        }
        let (scale, min_scale) = (floats(&scratch.scales[g]), floats(&scratch.mins[g]));
        for t in 0..T {
            let x_scale = _mm512_set1_ps(factors[t][g]);
            let scale = _mm512_mul_ps(scale, x_scale);
            if Q::FLOOR == Floor::Offset32 {
                let dot = _mm512_sub_epi32(dots[t], mins[t]);
                sums[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot), sums[t]);
            } else {
                sums[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dots[t]), sums[t]);
                let scale = _mm512_mul_ps(min_scale, x_scale);
                sums[t] = _mm512_fnmadd_ps(scale, _mm512_cvtepi32_ps(mins[t]), sums[t]);
            }
        }
    }
    store(&sums, &mut scratch.sums[token..]);
}
