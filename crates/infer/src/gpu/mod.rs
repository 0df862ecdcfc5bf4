//! The GPU backend: WGSL kernels behind the decoder's seam.
//!
//! Operations are recorded as data and submitted when leases are given back or a result is read, so the GPU works
//! while the decoder goes on. Weights are read where the engine put them in VRAM, in the bytes of their file. The bits
//! of a result depend on the device, never on budgets, batches or cuts: every kernel's order of summation is fixed,
//! and stated in its source. [`twin`] has each kernel again in plain Rust.
//!
//! What is not here: when weights move (the engine's), and what a model does (the decoder's).

mod kernels;
mod recording;
pub mod twin;

pub use kernels::{GpuKernels, Reduction};

use crate::InferError;
use crate::backend::{
    AttentionShape, Backend, Buf, RopePairs, RopeShape, Route, RowRun, Source, Vector, View, Weights,
};
use crate::generate::BackendMaker;
use kernels::{GROUP, HEAD_DIM_MAX, Kernel, WIDE_TOKENS, device_error, unit_columns};
use overspill::{DType, Engine, LeaseSet, Piece, Reservation, wgpu};
use recording::{Bound, Command, Dispatch, Executor, LIST_WORDS_MAX, Recording};
use std::sync::Arc;

/// Workgroups in one dimension: what every adapter allows.
const GROUPS_MAX: u32 = 65_535;
/// Workgroups of matmul in the first dimension, so that the others can make up for it.
const GROUPS_X: u32 = 32_768;

/// A GPU as the decoder's backend. See [`GpuKernels`] for what several of them share.
pub struct GpuBackend {
    executor: Executor,
    recording: Recording,
    engine: Option<Engine>,
    reservations: Vec<Reservation>,
    labels: Vec<String>,
}

impl std::fmt::Debug for GpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuBackend").field("name", &self.name()).field("buffers", &self.labels).finish_non_exhaustive()
    }
}

impl GpuBackend {
    /// A backend for one session. With an engine, its buffers are reserved in the engine's GPU tier and count in the
    /// budget; without one, it takes weights from plain memory only.
    ///
    /// # Errors
    /// [`InferError::Engine`] if the budget has no room, [`InferError::Memory`] if the GPU has none.
    pub fn new(kernels: &Arc<GpuKernels>, engine: Option<&Engine>) -> Result<Self, InferError> {
        let mut reservations = Vec::new();
        if let Some(engine) = engine {
            let bytes = Executor::own_bytes(kernels);
            reservations.push(engine.reserve(engine.compute_tier(), bytes, "GPU work lists")?);
        }
        Ok(Self {
            executor: Executor::new(Arc::clone(kernels))?,
            recording: Recording::default(),
            engine: engine.cloned(),
            reservations,
            labels: Vec::new(),
        })
    }

    fn flush(&mut self) -> Result<(), InferError> {
        self.executor.run(&mut self.recording)
    }

    /// Makes room for a command with a list, and returns where the list begins.
    fn list(&mut self, words: impl ExactSizeIterator<Item = u32>) -> Result<u32, InferError> {
        self.make_room(words.len())?;
        let at = self.recording.lists.len() as u32;
        self.recording.lists.extend(words);
        Ok(at)
    }

    fn make_room(&mut self, words: usize) -> Result<(), InferError> {
        if self.recording.has_room(words) { Ok(()) } else { self.flush() }
    }

    fn dispatch(
        &mut self,
        kernel: Kernel,
        reads: [Option<Bound>; 3],
        writes: Buf,
        params: &[u32],
        groups: [u32; 3],
    ) -> Result<(), InferError> {
        // A command with a list has made room already, and must not be parted from it.
        if !reads.iter().flatten().any(|bound| matches!(bound, Bound::Lists)) {
            self.make_room(0)?;
        }
        debug_assert_eq!(reads.iter().flatten().count(), kernel.reads());
        let mut all = [0; 12];
        all[..params.len()].copy_from_slice(params);
        self.recording.dispatch(Dispatch { kernel, reads, writes, params: all, groups });
        Ok(())
    }

    /// The buffer that holds a weight, and the byte at which it begins there.
    fn weight(&self, source: &Source<'_>, piece: &Piece) -> Result<(Bound, u32), InferError> {
        if let (Source::Leased(lease), Some(engine)) = (source, &self.engine)
            && let Some(slice) = lease.gpu()
        {
            let begin = slice.offset + overspill::device::piece_offset(engine.catalog(), piece);
            return Ok((Bound::Slab(Arc::clone(&slice.buffer)), words32(begin as usize)?));
        }
        let bytes = source.bytes(piece);
        if bytes.len() as u64 != piece.bytes {
            return Err(InferError::Device(format!(
                "block {} is neither in this GPU's memory nor in the host's: lease it in the compute tier",
                piece.block
            )));
        }
        Ok((Bound::Transient(self.upload(bytes)?), 0))
    }

    /// A buffer of these bytes, for the recording at hand.
    fn upload(&self, bytes: &[u8]) -> Result<wgpu::Buffer, InferError> {
        let context = &self.executor.kernels.context;
        // Kernels may read one word past the last, and mask it.
        let size = (bytes.len() as u64).next_multiple_of(4) + 4;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let buffer = context.buffer("weights from plain memory", size, usage).map_err(device_error)?;
        let mut padded = bytes.to_vec();
        padded.resize(size as usize, 0);
        let write = || context.queue.write_buffer(&buffer, 0, &padded);
        context.guarded("weights from plain memory", size, write).map_err(device_error)?;
        Ok(buffer)
    }

    fn vector(&self, vector: &Vector<'_>) -> Result<(Bound, u32, u32), InferError> {
        let kind = match vector.dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
            other => {
                return Err(InferError::Device(format!(
                    "a norm or bias of type {other} has no GPU kernel: use --device cpu"
                )));
            }
        };
        let (bound, at) = self.weight(&vector.source, &vector.piece)?;
        Ok((bound, at, kind))
    }

    /// Dispatches an operation on elements once for each run of rows that a dispatch can count.
    fn by_rows(
        &mut self,
        rows: usize,
        width: usize,
        mut one: impl FnMut(&mut Self, usize, usize, [u32; 3]) -> Result<(), InferError>,
    ) -> Result<(), InferError> {
        let step = GROUPS_MAX as usize;
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            let groups = [words32(width)?.div_ceil(GROUP), count as u32, 1];
            if width > 0 {
                one(self, first, count, groups)?;
            }
        }
        Ok(())
    }

    fn matmul_piece(
        &mut self,
        weights: &Weights<'_>,
        index: usize,
        x: View,
        tokens: usize,
        y: View,
    ) -> Result<(), InferError> {
        let piece = &weights.pieces[index];
        let (bound, begin) = self.weight(&weights.source(index), piece)?;
        let (rows, unit) = (words32(piece.rows as usize)?, unit_columns(weights.dtype)? as usize);
        if rows == 0 || tokens == 0 {
            return Ok(());
        }
        let wide = tokens > 1;
        let row_groups = rows.div_ceil(self.executor.kernels.rows());
        let x_groups = row_groups.min(GROUPS_X);
        let tokens_each = if wide { WIDE_TOKENS } else { 1 };
        let groups = [x_groups, row_groups.div_ceil(x_groups), words32(tokens)?.div_ceil(tokens_each)];
        let params = [
            begin,
            words32((piece.bytes / piece.rows) as usize)?,
            rows,
            words32(weights.cols / unit)?,
            words32(weights.cols % unit)?,
            words32(x.offset)?,
            words32(x.stride)?,
            words32(y.offset + piece.row as usize)?,
            words32(y.stride)?,
            words32(tokens)?,
        ];
        let kernel = Kernel::Matmul { dtype: weights.dtype, wide };
        self.dispatch(kernel, [Some(bound), own(x), None], y.buf, &params, groups)
    }
}

/// A number as a kernel takes it.
fn words32(n: usize) -> Result<u32, InferError> {
    u32::try_from(n).map_err(|_| InferError::Device(format!("{n} elements are more than a kernel can count")))
}

#[expect(clippy::unnecessary_wraps, reason = "a place among the buffers that a dispatch may read")]
fn own(view: View) -> Option<Bound> {
    Some(Bound::Own(view.buf))
}

/// (element at which row `first` begins, stride).
fn place(view: View, first: usize) -> Result<[u32; 2], InferError> {
    Ok([words32(view.offset + first * view.stride)?, words32(view.stride)?])
}

impl Backend for GpuBackend {
    fn name(&self) -> String {
        let kernels = &self.executor.kernels;
        let how = match kernels.reduction() {
            Reduction::Barrier => "barriers",
            Reduction::Subgroup => "subgroups",
        };
        format!("{} ({}, {how})", kernels.context.info.name, kernels.context.info.backend)
    }

    fn alloc(&mut self, label: &str, elements: usize) -> Result<Buf, InferError> {
        let context = &self.executor.kernels.context;
        let bytes = (elements as u64).saturating_mul(4).max(4);
        if bytes > context.binding_bytes_max() {
            return Err(InferError::Device(format!(
                "{label} takes {bytes} bytes and {} binds at most {} at once: lower --ctx, or use --device cpu",
                context.info.name,
                context.binding_bytes_max()
            )));
        }
        if let Some(engine) = &self.engine {
            self.reservations.push(engine.reserve(engine.compute_tier(), bytes, label)?);
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let buffer = context.buffer(label, bytes, usage).map_err(device_error)?;
        self.executor.buffers.push(buffer);
        self.labels.push(label.to_owned());
        Ok(Buf(self.labels.len() as u32 - 1))
    }

    fn write(&mut self, to: Buf, offset: usize, values: &[f32]) -> Result<(), InferError> {
        let mut at = offset as u64 * 4;
        for part in values.chunks(LIST_WORDS_MAX) {
            let list_word = self.list(part.iter().map(|v| v.to_bits()))? as usize;
            let words = part.len();
            self.recording.commands.push(Command::Fill { to, offset_bytes: at, list_word, words });
            at += words as u64 * 4;
        }
        Ok(())
    }

    fn read(&mut self, from: Buf, offset: usize, values: &mut [f32]) -> Result<(), InferError> {
        self.executor.read(&mut self.recording, from, offset, values)
    }

    fn release(&mut self, leases: LeaseSet) -> Result<(), InferError> {
        self.flush()?;
        match &self.executor.last {
            Some(submission) => leases.release_after(submission.clone()),
            None => drop(leases),
        }
        Ok(())
    }

    fn copy_rows(&mut self, from: View, to: View, width: usize, runs: &[RowRun]) -> Result<(), InferError> {
        let mut pairs = Vec::new();
        for run in runs {
            for row in 0..run.rows {
                pairs.push([words32(run.from + row)?, words32(run.to + row)?]);
            }
        }
        let [source, source_stride] = place(from, 0)?;
        let [target, target_stride] = place(to, 0)?;
        for pairs in pairs.chunks(GROUPS_MAX as usize) {
            let rows = pairs.len();
            let list = self.list(pairs.as_flattened().iter().copied())?;
            let params = [words32(width)?, rows as u32, source, source_stride, target, target_stride, list];
            let groups = [words32(width)?.div_ceil(GROUP), rows as u32, 1];
            self.dispatch(Kernel::CopyRows, [own(from), Some(Bound::Lists), None], to.buf, &params, groups)?;
        }
        Ok(())
    }

    fn matmul(&mut self, weights: &Weights<'_>, x: View, tokens: usize, y: View) -> Result<(), InferError> {
        (0..weights.pieces.len()).try_for_each(|index| self.matmul_piece(weights, index, x, tokens, y))
    }

    fn rms_norm(&mut self, x: View, rows: usize, weight: &Vector<'_>, eps: f32, out: View) -> Result<(), InferError> {
        let (bound, at, kind) = self.vector(weight)?;
        let rows = words32(rows)?;
        if rows == 0 {
            return Ok(());
        }
        let ([from, from_stride], [to, to_stride]) = (place(x, 0)?, place(out, 0)?);
        let params = [words32(weight.len)?, eps.to_bits(), from, from_stride, to, to_stride, at, kind, rows];
        let groups_x = rows.min(GROUPS_X);
        let groups = [groups_x, rows.div_ceil(groups_x), 1];
        self.dispatch(Kernel::RmsNorm, [own(x), Some(bound), None], out.buf, &params, groups)
    }

    fn add_bias(&mut self, x: View, rows: usize, bias: &Vector<'_>) -> Result<(), InferError> {
        let (bound, at, kind) = self.vector(bias)?;
        self.by_rows(rows, bias.len, |this, first, count, groups| {
            let [to, stride] = place(x, first)?;
            let params = [words32(bias.len)?, count as u32, to, stride, at, kind];
            this.dispatch(Kernel::AddBias, [Some(bound.clone()), None, None], x.buf, &params, groups)
        })
    }

    fn add(&mut self, to: View, from: View, rows: usize, width: usize) -> Result<(), InferError> {
        self.by_rows(rows, width, |this, first, count, groups| {
            let ([to_at, to_stride], [from_at, from_stride]) = (place(to, first)?, place(from, first)?);
            let params = [words32(width)?, count as u32, to_at, to_stride, from_at, from_stride];
            this.dispatch(Kernel::Add, [own(from), None, None], to.buf, &params, groups)
        })
    }

    fn clamp(&mut self, x: View, rows: usize, width: usize, limit: f32) -> Result<(), InferError> {
        self.by_rows(rows, width, |this, first, count, groups| {
            let [at, stride] = place(x, first)?;
            let params = [words32(width)?, count as u32, at, stride, limit.to_bits()];
            this.dispatch(Kernel::Limit, [None, None, None], x.buf, &params, groups)
        })
    }

    fn silu_mul(&mut self, gate: View, up: View, rows: usize, width: usize, out: View) -> Result<(), InferError> {
        self.by_rows(rows, width, |this, first, count, groups| {
            let ([g, g_stride], [u, u_stride], [o, o_stride]) =
                (place(gate, first)?, place(up, first)?, place(out, first)?);
            let params = [words32(width)?, count as u32, g, g_stride, u, u_stride, o, o_stride];
            this.dispatch(Kernel::SiluMul, [own(gate), own(up), None], out.buf, &params, groups)
        })
    }

    fn rope(&mut self, x: View, shape: &RopeShape, angles: Buf) -> Result<(), InferError> {
        let half = shape.rotary_dim / 2;
        if shape.tokens > GROUPS_MAX as usize {
            return Err(InferError::Device(format!("{} tokens in one call are too many", shape.tokens)));
        }
        self.by_rows(shape.tokens, shape.heads * half, |this, first, count, groups| {
            let [at, stride] = place(x, first)?;
            let neighbours = u32::from(shape.pairs == RopePairs::Neighbours);
            let (heads, head_dim) = (words32(shape.heads)?, words32(shape.head_dim)?);
            let params = [count as u32, heads, head_dim, words32(half)?, neighbours, at, stride];
            this.dispatch(Kernel::Rope, [Some(Bound::Own(angles)), None, None], x.buf, &params, groups)
        })
    }

    fn attention(
        &mut self,
        q: View,
        keys: Buf,
        values: Buf,
        shape: &AttentionShape,
        out: View,
    ) -> Result<(), InferError> {
        if shape.head_dim > HEAD_DIM_MAX {
            return Err(InferError::Device(format!(
                "heads of {} elements: the GPU kernel has room for {HEAD_DIM_MAX}; use --device cpu",
                shape.head_dim
            )));
        }
        let step = GROUPS_MAX as usize;
        for first in (0..shape.tokens).step_by(step) {
            let ([q_at, q_stride], [out_at, out_stride]) = (place(q, first)?, place(out, first)?);
            let params = [
                words32(shape.start + first)?,
                words32(shape.heads)?,
                words32(shape.heads / shape.kv_heads)?,
                words32(shape.head_dim)?,
                shape.window.map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX)),
                words32(shape.capacity)?,
                words32(shape.kv_heads * shape.head_dim)?,
                shape.scale.to_bits(),
                q_at,
                q_stride,
                out_at,
                out_stride,
            ];
            let groups = [words32(shape.heads)?, step.min(shape.tokens - first) as u32, 1];
            let reads = [own(q), Some(Bound::Own(keys)), Some(Bound::Own(values))];
            self.dispatch(Kernel::Attention, reads, out.buf, &params, groups)?;
        }
        Ok(())
    }

    fn combine(
        &mut self,
        parts: View,
        routes: &[Route],
        tokens: usize,
        width: usize,
        to: View,
    ) -> Result<(), InferError> {
        if tokens == 0 || routes.is_empty() {
            return Ok(());
        }
        let ranks = routes.len() / tokens;
        let tokens_each = (LIST_WORDS_MAX / 2 / ranks).clamp(1, GROUPS_MAX as usize);
        let [parts_at, parts_stride] = place(parts, 0)?;
        for (part, routes) in routes.chunks(tokens_each * ranks).enumerate() {
            let count = routes.len() / ranks;
            let words: Vec<u32> = routes.iter().flat_map(|route| [route.row, route.weight.to_bits()]).collect();
            let list = self.list(words.into_iter())?;
            let [to_at, to_stride] = place(to, part * tokens_each)?;
            let params =
                [words32(width)?, count as u32, words32(ranks)?, parts_at, parts_stride, to_at, to_stride, list];
            let groups = [words32(width)?.div_ceil(GROUP), count as u32, 1];
            self.dispatch(Kernel::Combine, [own(parts), Some(Bound::Lists), None], to.buf, &params, groups)?;
        }
        Ok(())
    }
}

/// What makes a backend for each session of a runtime on this engine's GPU; `None` if the engine has none.
///
/// # Errors
/// [`InferError::Device`] if the GPU cannot bind what kernels need.
pub fn backends(engine: &Engine) -> Result<Option<BackendMaker>, InferError> {
    let Some(context) = engine.gpu() else { return Ok(None) };
    let (kernels, engine) = (GpuKernels::new(context)?, engine.clone());
    Ok(Some(Box::new(move || {
        let backend: Box<dyn Backend> = Box::new(GpuBackend::new(&kernels, Some(&engine))?);
        Ok(backend)
    })))
}
