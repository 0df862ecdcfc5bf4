//! Many tokens against f32 activations: weights are decoded once to a panel, then meet all tokens in register tiles.
//!
//! A panel, 64 rows × 512 columns, lies in the second-level cache; a tile's part of it and the tile's tokens pass
//! through the first. A tile is 4 rows × 3 tokens, so 12 multiplications share 7 loads. Sums of a token with a row stay
//! eight lanes wide between panels, and are added in the order of `scalar.rs`. What is not here: how elements are
//! decoded, and few tokens (`f32.rs`).

use super::super::super::input::{Input, LANES};
use super::super::columns::Out;
use super::f32::Source;
use super::{sum_eight, sum_lanes};
use core::arch::x86_64::*;
use core::cell::RefCell;

/// Rows of a panel.
const ROWS: usize = 64;
/// Columns of a panel.
const COLS: usize = 512;
/// Tokens that meet a panel while it is there: bounds the sums to 512 KiB a thread, whatever the batch. A longer batch
/// decodes the weights again, which costs one or two in a hundred.
const TOKENS: usize = 256;
/// Rows and most tokens of a register tile: 12 sums, 3 activations, 1 weight.
const TILE_ROWS: usize = 4;
const TILE_TOKENS: usize = 3;
/// Registers of a tile's part of the panel.
const TILE_PANEL: usize = TILE_ROWS * COLS / LANES;

/// Registers in memory, so that they are aligned.
struct Scratch {
    /// `[tile][column / 8][row of the tile]`.
    panel: Vec<__m256>,
    /// Lanes of `[token][row of the panel]`.
    sums: Vec<__m256>,
}

std::thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { panel: Vec::new(), sums: Vec::new() }) };
}

/// Some rows against all tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rows<S: Source>(weights: &[u8], rows: usize, x: &Input, out: &mut Out<'_>) {
    SCRATCH.with_borrow_mut(|scratch| {
        let zero = _mm256_setzero_ps();
        if scratch.panel.is_empty() {
            scratch.panel.resize(ROWS * COLS / LANES, zero);
        }
        let sums = x.batch().min(TOKENS) * ROWS;
        if scratch.sums.len() < sums {
            scratch.sums.resize(sums, zero);
        }
        let row_bytes = bytes::<S>(x.cols());
        for first in (0..rows).step_by(ROWS) {
            let n = ROWS.min(rows - first);
            let weights = &weights[first * row_bytes..(first + n) * row_bytes];
            for token in (0..x.batch()).step_by(TOKENS) {
                let tokens = TOKENS.min(x.batch() - token);
                strip::<S>(weights, (first, n), x, (token, tokens), scratch, out);
            }
        }
    });
}

/// Bytes of whole groups.
#[inline(always)]
fn bytes<S: Source>(elements: usize) -> usize {
    elements / S::ELEMENTS * S::GROUP_BYTES
}

/// `n` rows from `row` on (at most [`ROWS`]) against `tokens` tokens from `token` on (at most [`TOKENS`]).
#[target_feature(enable = "avx2,fma,f16c")]
fn strip<S: Source>(
    weights: &[u8],
    (row, n): (usize, usize),
    x: &Input,
    (token, tokens): (usize, usize),
    scratch: &mut Scratch,
    out: &mut Out<'_>,
) {
    let cols = x.cols();
    let sums = &mut scratch.sums[..tokens * ROWS];
    if cols == 0 {
        sums.fill(_mm256_setzero_ps());
    }
    for start in (0..cols).step_by(COLS) {
        let width = COLS.min(cols - start);
        for (r, row) in weights.chunks_exact(bytes::<S>(cols)).enumerate() {
            let row = &row[bytes::<S>(start)..bytes::<S>(start + width)];
            fill::<S>(row, &mut scratch.panel[r / TILE_ROWS * TILE_PANEL + r % TILE_ROWS..]);
        }
        let panel = &scratch.panel[..n.div_ceil(TILE_ROWS) * TILE_PANEL];
        let mut t = 0;
        while t < tokens {
            let sums = &mut sums[t * ROWS..];
            let x = |i: usize| &x.f32(token + t + i)[start..start + width.next_multiple_of(LANES)];
            // One token alone has too few independent sums to keep the processor busy.
            let left = tokens - t;
            let tile = if left == TILE_TOKENS + 1 { 2 } else { left.min(TILE_TOKENS) };
            match tile {
                1 => meet(panel, [x(0)], start == 0, sums),
                2 => meet(panel, [x(0), x(1)], start == 0, sums),
                _ => meet::<TILE_TOKENS>(panel, [x(0), x(1), x(2)], start == 0, sums),
            }
            t += tile;
        }
    }
    for (t, sums) in sums.chunks_exact(ROWS).enumerate() {
        finish(&sums[..n], out.get(token + t, row, n));
    }
}

/// Decodes a part of a row to every [`TILE_ROWS`]th register of a panel.
#[target_feature(enable = "avx2,fma,f16c")]
fn fill<S: Source>(row: &[u8], panel: &mut [__m256]) {
    // SAFETY: this function has the features.
    unsafe { S::each(row, |i, eight| panel[i * TILE_ROWS] = eight) };
}

/// A whole panel against `T` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn meet<const T: usize>(panel: &[__m256], x: [&[f32]; T], fresh: bool, sums: &mut [__m256]) {
    for (tile, panel) in panel.chunks_exact(TILE_PANEL).enumerate() {
        multiply(panel, x, fresh, &mut sums[tile * TILE_ROWS..]);
    }
}

/// The rows of a tile's panel, side by side, against `T` tokens, in registers; `fresh` sums begin at zero. Rows that
/// were not filled give sums that nobody reads.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn multiply<const T: usize>(panel: &[__m256], x: [&[f32]; T], fresh: bool, sums: &mut [__m256]) {
    let width = x[0].len();
    assert!(panel.len() >= width / LANES * TILE_ROWS && x.iter().all(|x| x.len() == width));
    assert!(sums.len() >= (T - 1) * ROWS + TILE_ROWS);
    let mut lanes = [[_mm256_setzero_ps(); TILE_ROWS]; T];
    if !fresh {
        for (t, lanes) in lanes.iter_mut().enumerate() {
            lanes.copy_from_slice(&sums[t * ROWS..t * ROWS + TILE_ROWS]);
        }
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
        sums[t * ROWS..t * ROWS + TILE_ROWS].copy_from_slice(lanes);
    }
}

/// One token's outputs from the lanes of its sums.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn finish(sums: &[__m256], out: &mut [f32]) {
    let (eights, rest) = sums.as_chunks::<LANES>();
    let (outs, last) = out.as_chunks_mut::<LANES>();
    for (sums, out) in eights.iter().zip(outs) {
        // SAFETY: `out` is 8 floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum_eight(*sums)) };
    }
    for (sum, out) in rest.iter().zip(last) {
        *out = sum_lanes(*sum);
    }
}
