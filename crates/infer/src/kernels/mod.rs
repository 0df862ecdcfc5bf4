//! CPU kernels: matrix products over weights as they lie in a file, at any alignment, in every element type.
//!
//! Instruction sets are chosen at run time. The bits of an output depend on its weight row and its token alone: the
//! same for a batch of 1 or 500, for any cut of the matrix into pieces, and for any number of threads. `scalar`
//! states the order of every reduction. Float weights meet f32 activations; quantised weights also activations of
//! 8 bits, if asked.
//!
//! What is not here: models, caches, and where the bytes come from.

mod blocks;
mod input;
pub mod ops;
mod pool;
mod scalar;
mod sys;
mod table;
#[cfg(test)]
mod tests;

pub use input::{Input, Kind};
pub use pool::Pool;

use overspill::DType;
use table::Isa;

/// How exactly activations meet quantised weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// In f32: the reference.
    #[default]
    F32,
    /// Rounded to 8 bits in groups: several times faster.
    Q8,
}

/// Consecutive rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct WeightRows<'a> {
    /// The first row's number in the matrix.
    pub row: usize,
    /// How many rows.
    pub rows: usize,
    /// Their bytes as in the file, at any alignment.
    pub bytes: &'a [u8],
}

/// Least weight bytes of a task, so that dealing it out costs nothing beside it.
const TASK_BYTES: usize = 64 << 10;
/// Rows of a task are a multiple of this where they can be: kernels work on this many at once.
const TASK_ROWS: usize = 16;

/// Multiplies the rows in `pieces` with every token in `x`: `y[token * y_stride + row] = sum over columns`.
///
/// `cols` is the length of a row; `y` is `[batch][y_stride]`, and only the outputs of the given rows are written.
///
/// # Panics
/// If pieces do not ascend, overlap, or are not whole rows; if `y` is too small; if `x` was prepared for other columns,
/// or for a type of another [`Kind`].
pub fn matmul(
    pool: &Pool,
    dtype: DType,
    cols: usize,
    pieces: &[WeightRows<'_>],
    x: &Input,
    y: &mut [f32],
    y_stride: usize,
) {
    matmul_with(Isa::best(), pool, dtype, cols, pieces, x, (y, y_stride));
}

fn matmul_with(
    isa: Isa,
    pool: &Pool,
    dtype: DType,
    cols: usize,
    pieces: &[WeightRows<'_>],
    x: &Input,
    (y, y_stride): (&mut [f32], usize),
) {
    assert_eq!(cols, x.cols(), "the activations' columns");
    let row_bytes = dtype.row_bytes(cols as u64).and_then(|bytes| usize::try_from(bytes).ok());
    let Some(row_bytes) = row_bytes else { panic!("{cols} columns are no whole groups of {dtype}") };
    let kernels = isa.kernels(dtype);
    let kernel = match x.kind() {
        Kind::F32 => kernels.f32,
        kind => {
            assert_eq!(kind, Kind::of(dtype, Activations::Q8), "activations prepared for another type than {dtype}");
            kernels.q8
        }
    };
    let rows: usize = pieces.iter().map(|piece| piece.rows).fold(0, usize::saturating_add);
    let cut = (row_bytes, rows_per_task(rows, row_bytes, pool.threads()));
    sys::columns::for_each_rows(pool, pieces, cut, (y, y_stride, x.batch()), &|weights, rows, out| {
        kernel(weights, rows, x, out);
    });
}

/// About eight tasks a thread, none too small.
fn rows_per_task(rows: usize, row_bytes: usize, threads: usize) -> usize {
    let least = TASK_BYTES / row_bytes.max(1);
    let even = rows / (threads * 8);
    least.max(even).next_multiple_of(TASK_ROWS).max(TASK_ROWS)
}

/// The instruction set that these kernels use here, for reports.
#[must_use]
pub fn instruction_set() -> &'static str {
    Isa::best().name()
}

/// Decodes whole groups to f32: embedding rows, norms.
///
/// # Panics
/// If `bytes` are not the bytes of `out.len()` elements.
pub fn dequantise(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Some(bytes.len() as u64), dtype.row_bytes(out.len() as u64), "bytes of {} {dtype} elements", out.len());
    (Isa::best().kernels(dtype).decode)(bytes, out);
}
