//! Disjoint parts of one output, written by several threads at once.
//!
//! A matrix product writes, for each token, some rows' results: strided in memory, so no `chunks_mut` can express it.
//! [`for_each_rows`] checks once that the parts of different tasks cannot overlap. What is not here: any arithmetic.

use super::super::{Pool, WeightRows};
use core::marker::PhantomData;

/// The outputs of some consecutive rows, for every token. Exclusively ours.
pub(in super::super) struct Out<'a> {
    first: *mut f32,
    stride: usize,
    batch: usize,
    rows: usize,
    exclusive: PhantomData<&'a mut [f32]>,
}

impl Out<'_> {
    /// The outputs of `rows` rows from `row` on, for token `token`.
    #[inline]
    pub(in super::super) fn get(&mut self, token: usize, row: usize, rows: usize) -> &mut [f32] {
        assert!(token < self.batch && row <= self.rows && rows <= self.rows - row, "output out of range");
        // SAFETY: by the assertion and the contract of `for_each_rows`, which makes every `Out`, these floats lie in
        // the output and belong to nobody else; `&mut self` keeps two slices of one `Out` apart.
        unsafe { core::slice::from_raw_parts_mut(self.first.add(token * self.stride + row), rows) }
    }
}

/// A pointer that tasks may share, because each touches another part of what it points to.
struct Shared<T>(*mut T);

// SAFETY: only an address; the functions below hand out parts that do not overlap, and `T: Send` lets a part be written
// on another thread.
unsafe impl<T: Send> Sync for Shared<T> {}

/// Calls `job(bytes, rows, out)` for all pieces, cut into tasks of at most `rows_per_task` rows.
///
/// `y` is `[batch][stride]`. Panics unless the pieces ascend without overlap, fit `y`, and have `row_bytes` a row.
pub(in super::super) fn for_each_rows(
    pool: &Pool,
    pieces: &[WeightRows<'_>],
    (row_bytes, rows_per_task): (usize, usize),
    (y, stride, batch): (&mut [f32], usize, usize),
    job: &(dyn Fn(&[u8], usize, &mut Out<'_>) + Sync),
) {
    let mut end = 0;
    let mut tasks = 0;
    for piece in pieces {
        assert!(piece.row >= end, "pieces must ascend and not overlap: row {} after row {end}", piece.row);
        assert_eq!(Some(piece.bytes.len()), piece.rows.checked_mul(row_bytes), "bytes of rows {}..", piece.row);
        end = piece.row.saturating_add(piece.rows);
        tasks += piece.rows.div_ceil(rows_per_task);
    }
    if batch == 0 || end == 0 {
        return;
    }
    let needed = (batch - 1).checked_mul(stride).and_then(|n| n.checked_add(end));
    assert!(
        end <= stride && needed.is_some_and(|n| n <= y.len()),
        "{end} rows do not fit an output of stride {stride}"
    );
    let y = Shared(y.as_mut_ptr());
    pool.run(tasks, &|task| {
        // The whole wrapper is captured, not the pointer inside.
        let y = &y;
        let Some((piece, row)) = locate(pieces, rows_per_task, task) else { return };
        let rows = rows_per_task.min(piece.rows - row);
        // SAFETY: `piece.row + row < end <= stride <= y.len()`, checked above.
        let first = unsafe { y.0.add(piece.row + row) };
        // Rows of different tasks differ, because pieces do not overlap, tasks cut a piece at multiples of
        // `rows_per_task`, and the pool runs each task once; with `end <= stride` so do the floats of every token.
        let mut out = Out { first, stride, batch, rows, exclusive: PhantomData };
        job(&piece.bytes[row * row_bytes..(row + rows) * row_bytes], rows, &mut out);
    });
}

/// The piece that a task belongs to, and the task's first row in it.
fn locate<'a, 'b>(
    pieces: &'a [WeightRows<'b>],
    rows_per_task: usize,
    mut task: usize,
) -> Option<(&'a WeightRows<'b>, usize)> {
    for piece in pieces {
        let tasks = piece.rows.div_ceil(rows_per_task);
        if task < tasks {
            return Some((piece, task * rows_per_task));
        }
        task -= tasks;
    }
    None
}

/// Calls `job(index, chunk)` for the chunks of `data` that have `chunk` items (the last perhaps fewer), on all threads.
pub(in super::super) fn for_each_chunk<T: Send>(
    pool: &Pool,
    data: &mut [T],
    chunk: usize,
    job: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    let chunk = chunk.max(1);
    let length = data.len();
    let data = Shared(data.as_mut_ptr());
    pool.run(length.div_ceil(chunk), &|index| {
        let data = &data;
        let start = index * chunk;
        // SAFETY: `start < length`, and the chunks of different indices do not overlap; the pool runs each index once,
        // while `data` is mutably borrowed by this function.
        let part = unsafe { core::slice::from_raw_parts_mut(data.0.add(start), chunk.min(length - start)) };
        job(index, part);
    });
}
