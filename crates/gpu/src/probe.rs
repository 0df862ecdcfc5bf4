//! A measurement of how fast bytes get into VRAM, for `doctor` and the docs: each way once, over a buffer of its own.

use crate::completion::Poller;
use crate::context::GpuContext;
use crate::error::GpuError;
use crate::ring::{RingConfig, RingPath};
use crate::upload::{Upload, Uploader};
use overspill_core::ids::TransferId;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// How long one submission of a probe may take before the GPU counts as hung.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Bandwidth of one way to upload.
#[derive(Clone, Debug, PartialEq)]
pub struct UploadRate {
    /// `write_buffer` (wgpu's own staging, allocated at each call) or `ring`.
    pub path: &'static str,
    /// Bytes moved in the measured time.
    pub bytes: u64,
    /// From the first call to the GPU's last completion, in seconds.
    pub seconds: f64,
}

impl UploadRate {
    /// Bandwidth in 10⁹ bytes per second.
    #[must_use]
    pub fn gigabytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.seconds.max(1e-9) / 1e9
    }
}

/// Measures every path with `total_bytes` in blocks of `block_bytes` (rounded to multiples of 4, at least one block),
/// after one round to warm up. Takes VRAM for one block and the ring's staging memory.
///
/// # Errors
/// [`GpuError::OutOfMemory`], [`GpuError::DeviceLost`].
pub fn probe_uploads(context: &GpuContext, block_bytes: u64, total_bytes: u64) -> Result<Vec<UploadRate>, GpuError> {
    let block_bytes = block_bytes.clamp(4, 64 << 20).next_multiple_of(4);
    let blocks = (total_bytes / block_bytes).max(1);
    let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::STORAGE;
    let dst = Arc::new(context.buffer("upload probe", block_bytes, usage)?);
    // Every page of the source is touched before the clock runs.
    let source: Arc<[u8]> = (0..block_bytes).map(|i| i as u8 | 1).collect();
    Ok(vec![write_buffer(context, &dst, &source, blocks)?, ring(context, &dst, &source, blocks)?])
}

fn write_buffer(context: &GpuContext, dst: &wgpu::Buffer, source: &[u8], blocks: u64) -> Result<UploadRate, GpuError> {
    let round = |blocks: u64| {
        for _ in 0..blocks {
            context.guarded("an upload probe", 0, || context.queue.write_buffer(dst, 0, source))?;
            context.submit("an upload probe", [])?;
        }
        let last = context.submit("an upload probe", [])?;
        context.wait(&last, TIMEOUT)
    };
    round(1)?;
    let start = Instant::now();
    round(blocks)?;
    Ok(UploadRate { path: "write_buffer", bytes: blocks * source.len() as u64, seconds: start.elapsed().as_secs_f64() })
}

fn ring(
    context: &GpuContext,
    dst: &Arc<wgpu::Buffer>,
    source: &Arc<[u8]>,
    blocks: u64,
) -> Result<UploadRate, GpuError> {
    let poller = Poller::new(context)?;
    let path = RingPath::new(context, &poller.completion(), RingConfig::default())?;
    let (done, results) = channel();
    let sink = Arc::new(move |_, result| {
        let _ = done.send(result); // The probe has given up on it.
    });
    let uploader = Uploader::new(Box::new(path), sink)?;
    let round = |blocks: u64| {
        for id in 0..blocks {
            let source: Arc<[u8]> = Arc::clone(source);
            let len = source.len();
            let upload = Upload {
                id: TransferId(id),
                source: Box::new(source),
                source_offset: 0,
                dst: Arc::clone(dst),
                dst_offset: 0,
                len,
            };
            uploader.submit(upload);
        }
        (0..blocks).try_for_each(|_| results.recv_timeout(TIMEOUT).unwrap_or(Err(GpuError::Closed)))
    };
    round(1)?;
    let start = Instant::now();
    round(blocks)?;
    Ok(UploadRate { path: "ring", bytes: blocks * source.len() as u64, seconds: start.elapsed().as_secs_f64() })
}
