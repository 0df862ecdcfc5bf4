//! Weights against f32 activations, many tokens: rows are decoded to a panel in the first-level cache, two side by side
//! in a register, and eight of them meet six tokens at a time in registers.
//!
//! A row's eight lanes sum the same products in the same order as with AVX2; a wider register only holds two rows.

use super::super::super::input::{Input, LANES};
use super::super::avx2::f32::{Source, decode};
use super::super::avx2::q8::prefetch;
use super::super::avx2::sum_lanes;
use super::super::columns::Out;
use super::Line;
use core::arch::x86_64::*;
use core::cell::RefCell;

/// Rows of a panel, and registers of one column block of it.
const PANEL_ROWS: usize = 16;
const PANEL_LINES: usize = PANEL_ROWS / 2;
/// Columns of a panel: 16 KiB together with the rows, half of the first-level cache or less.
const PANEL_COLS: usize = 256;
/// Registers (of two rows) and tokens of a register tile: 24 accumulators, 4 weights, 1 activation.
const TILE: usize = 4;
const TILE_ROWS: usize = 2 * TILE;
const TILE_TOKENS: usize = 6;
/// Registers of a tile's part of the panel.
const TILE_PANEL: usize = TILE * PANEL_COLS / LANES;

struct Scratch {
    /// `[tile][column / 8][pair of rows]`, of each row eight columns.
    panel: Vec<Line<f32>>,
    /// A part of a row, before it goes there.
    decoded: [f32; PANEL_COLS],
    /// Lanes of `[token][pair of rows]`.
    sums: Vec<Line<f32>>,
}

std::thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch { panel: Vec::new(), decoded: [0.0; PANEL_COLS], sums: Vec::new() })
    };
}

/// Some rows against all tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn rows<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.panel.resize(PANEL_LINES * PANEL_COLS / LANES, Line([0.0; 16]));
        let sums = x.batch() * PANEL_LINES;
        if scratch.sums.len() < sums {
            scratch.sums.resize(sums, Line([0.0; 16]));
        }
        let row_bytes = x.cols() / S::ELEMENTS * S::GROUP_BYTES;
        for first in (0..rows).step_by(PANEL_ROWS) {
            let n = PANEL_ROWS.min(rows - first);
            strip::<S>(&weights[first * row_bytes..(first + n) * row_bytes], (first, n), x, scratch, out);
        }
    });
}

/// `n` rows (at most [`PANEL_ROWS`]) against all tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn strip<S: Source>(weights: &[u8], (first, n): (usize, usize), x: &Input, scratch: &mut Scratch, out: &mut Out<'_>) {
    let (cols, batch) = (x.cols(), x.batch());
    let bytes = |elements: usize| elements / S::ELEMENTS * S::GROUP_BYTES;
    let sums = &mut scratch.sums[..batch * PANEL_LINES];
    sums.fill(Line([0.0; 16]));
    for start in (0..cols).step_by(PANEL_COLS) {
        let width = PANEL_COLS.min(cols - start);
        let padded = width.next_multiple_of(LANES);
        for (r, row) in weights.chunks_exact(bytes(cols)).enumerate() {
            let row = &row[bytes(start)..bytes(start + width)];
            let place = &mut scratch.panel[r / TILE_ROWS * TILE_PANEL + r % TILE_ROWS / 2..];
            fill_panel::<S>(row, width, &mut scratch.decoded, (place, r % 2));
        }
        for token in (0..batch).step_by(TILE_TOKENS) {
            let sums = &mut sums[token * PANEL_LINES..];
            for token in token + TILE_TOKENS..batch.min(token + 2 * TILE_TOKENS) {
                // Each token's part is a stream too short for the processor to foresee.
                prefetch(x.f32(token)[start..].as_ptr().cast(), 4 * padded);
            }
            let x = |t: usize| &x.f32(token + t)[start..start + padded];
            for (tile, panel) in scratch.panel.chunks_exact(TILE_PANEL).take(n.div_ceil(TILE_ROWS)).enumerate() {
                let sums = &mut sums[tile * TILE..];
                match batch - token {
                    1 => multiply(panel, [x(0)], sums),
                    2 => multiply(panel, [x(0), x(1)], sums),
                    3 => multiply(panel, [x(0), x(1), x(2)], sums),
                    4 => multiply(panel, [x(0), x(1), x(2), x(3)], sums),
                    5 => multiply(panel, [x(0), x(1), x(2), x(3), x(4)], sums),
                    _ => multiply::<TILE_TOKENS>(panel, [x(0), x(1), x(2), x(3), x(4), x(5)], sums),
                }
            }
        }
    }
    for (token, sums) in sums.chunks_exact(PANEL_LINES).enumerate() {
        for (out, Line(pair)) in out.get(token, first, n).chunks_mut(2).zip(sums) {
            for (out, lanes) in out.iter_mut().zip(pair.chunks_exact(LANES)) {
                // SAFETY: `lanes` is 8 floats.
                *out = sum_lanes(unsafe { _mm256_loadu_ps(lanes.as_ptr()) });
            }
        }
    }
}

/// Decodes a part of a row to one half of every [`TILE`]th register of a panel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn fill_panel<S: Source>(
    row: &[u8],
    width: usize,
    decoded: &mut [f32; PANEL_COLS],
    (panel, half): (&mut [Line<f32>], usize),
) {
    decode::<S>(row, &mut decoded[..width]);
    decoded[width..width.next_multiple_of(LANES)].fill(0.0);
    let registers = decoded[..width.next_multiple_of(LANES)].chunks_exact(LANES);
    for (Line(place), decoded) in panel.iter_mut().step_by(TILE).zip(registers) {
        place[half * LANES..(half + 1) * LANES].copy_from_slice(decoded);
    }
}

/// The rows of a tile's panel, side by side, against `T` tokens, in registers. Rows that were not filled give sums that
/// nobody reads.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn multiply<const T: usize>(panel: &[Line<f32>], x: [&[f32]; T], sums: &mut [Line<f32>]) {
    let width = x[0].len();
    assert!(panel.len() >= width / LANES * TILE && x.iter().all(|x| x.len() == width));
    assert!(sums.len() >= (T - 1) * PANEL_LINES + TILE);
    let mut lanes = [[_mm512_setzero_ps(); TILE]; T];
    for t in 0..T {
        for r in 0..TILE {
            // SAFETY: a line is 16 aligned floats.
            lanes[t][r] = unsafe { _mm512_load_ps(sums[t * PANEL_LINES + r].0.as_ptr()) };
        }
    }
    for i in 0..width / LANES {
        let mut weights = [_mm512_setzero_ps(); TILE];
        for (r, weights) in weights.iter_mut().enumerate() {
            // SAFETY: lines `TILE i..TILE (i + 1)` of the panel are there by the assertion, 16 aligned floats each.
            *weights = unsafe { _mm512_load_ps(panel.get_unchecked(i * TILE + r).0.as_ptr()) };
        }
        for t in 0..T {
            // SAFETY: floats `8 i..8 i + 8` of every token are there by the assertion.
            let x = _mm512_broadcast_f32x8(unsafe { _mm256_loadu_ps(x[t].as_ptr().add(i * LANES)) });
            for r in 0..TILE {
                lanes[t][r] = _mm512_fmadd_ps(weights[r], x, lanes[t][r]);
            }
        }
    }
    for t in 0..T {
        for r in 0..TILE {
            // SAFETY: a line is 16 aligned floats.
            unsafe { _mm512_store_ps(sums[t * PANEL_LINES + r].0.as_mut_ptr(), lanes[t][r]) };
        }
    }
}
