//! The staging ring: a few host-visible buffers that are filled, copied from, and mapped again, for ever.
//!
//! Unlike `queue.write_buffer`, which allocates at every call, it allocates once. A chunk is filled with as many
//! uploads as fit and submitted as one batch of copies; a chunk comes back when wgpu has mapped it again. The copy
//! through the chunk also brings bytes of any alignment to whole words.

use crate::completion::Completion;
use crate::context::GpuContext;
use crate::error::GpuError;
use crate::upload::{Sink, Upload, UploadPath};
use overspill_core::ids::TransferId;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Between two looks at whether the device still lives while a chunk is awaited.
const ROOM_SLICE: Duration = Duration::from_millis(50);

/// Sizes of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Number of chunks: 2 or more, so that one is filled while another is copied from. Default 4.
    pub chunks: u32,
    /// Bytes of a chunk, rounded up to a multiple of 4 KiB. Default 4 MiB.
    pub chunk_bytes: u64,
}

impl Default for RingConfig {
    fn default() -> Self {
        Self { chunks: 4, chunk_bytes: 4 << 20 }
    }
}

/// A buffer of the ring that has been mapped, or could not be.
type Mapped = (wgpu::Buffer, Result<(), wgpu::BufferAsyncError>);

struct Copy {
    from: u64,
    dst: Arc<wgpu::Buffer>,
    dst_offset: u64,
    bytes: u64,
}

/// A chunk that is being filled.
struct Chunk {
    buffer: wgpu::Buffer,
    view: wgpu::BufferViewMut,
    used: u64,
    copies: Vec<Copy>,
    /// Uploads of which the last byte is in this chunk.
    ends: Vec<TransferId>,
}

/// Uploads through the ring.
pub struct RingPath {
    context: GpuContext,
    completion: Completion,
    config: RingConfig,
    free: Receiver<Mapped>,
    give_back: Sender<Mapped>,
    chunk: Option<Chunk>,
}

impl std::fmt::Debug for RingPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingPath").field("config", &self.config).finish_non_exhaustive()
    }
}

impl RingPath {
    /// Allocates the ring.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], [`GpuError::DeviceLost`].
    pub fn new(context: &GpuContext, completion: &Completion, config: RingConfig) -> Result<Self, GpuError> {
        let chunk_bytes =
            config.chunk_bytes.max(1).next_multiple_of(4096).min(context.limits.max_buffer_size / 4096 * 4096);
        let config = RingConfig { chunks: config.chunks.clamp(2, 64), chunk_bytes };
        let (give_back, free) = channel();
        for index in 0..config.chunks {
            let buffer = context.mapped_buffer(&format!("staging chunk {index}"), chunk_bytes)?;
            let _ = give_back.send((buffer, Ok(()))); // The receiver is here.
        }
        Ok(Self { context: context.clone(), completion: completion.clone(), config, free, give_back, chunk: None })
    }

    /// The chunk to fill, waiting for one to be mapped if need be.
    fn chunk(&mut self) -> Result<&mut Chunk, GpuError> {
        let chunk = match self.chunk.take() {
            Some(chunk) => chunk,
            None => self.next_chunk()?,
        };
        Ok(self.chunk.insert(chunk))
    }

    fn next_chunk(&self) -> Result<Chunk, GpuError> {
        let (buffer, mapped) = loop {
            match self.free.recv_timeout(ROOM_SLICE) {
                Ok(mapped) => break mapped,
                // The poller does this, unless it has been closed already.
                Err(RecvTimeoutError::Timeout) => self.context.poll_once()?,
                Err(RecvTimeoutError::Disconnected) => return Err(GpuError::Closed),
            }
        };
        let refused = |message: String| GpuError::Refused { what: "mapping a staging chunk".to_owned(), message };
        let view = mapped
            .map_err(|e| refused(e.to_string()))
            .and_then(|()| buffer.get_mapped_range_mut(..).map_err(|e| refused(e.to_string())));
        match view {
            Ok(view) => Ok(Chunk { buffer, view, used: 0, copies: Vec::new(), ends: Vec::new() }),
            Err(error) => {
                self.context.check()?;
                // Ask for it again, or the ring would be one chunk shorter for ever.
                self.remap(buffer);
                Err(error)
            }
        }
    }

    fn remap(&self, buffer: wgpu::Buffer) {
        let give_back = self.give_back.clone();
        let own = buffer.clone();
        buffer.map_async(wgpu::MapMode::Write, .., move |result| {
            let _ = give_back.send((own, result)); // Fails only when the ring is gone.
        });
    }

    /// Copies as much as fits into the current chunk; what was copied is returned.
    fn stage(&mut self, upload: &Upload, at: usize, bytes: &[u8]) -> Result<usize, GpuError> {
        let chunk_bytes = self.config.chunk_bytes;
        let chunk = self.chunk()?;
        let room = (chunk_bytes - chunk.used) as usize;
        let part = &bytes[at..bytes.len().min(at + room)];
        let padded = part.len().next_multiple_of(4);
        let start = chunk.used as usize;
        chunk.view.slice(start..start + part.len()).copy_from_slice(part);
        chunk.view.slice(start + part.len()..start + padded).copy_from_slice(&[0; 3][..padded - part.len()]);
        let dst_offset = upload.dst_offset + at as u64;
        chunk.copies.push(Copy { from: chunk.used, dst: Arc::clone(&upload.dst), dst_offset, bytes: padded as u64 });
        chunk.used += padded as u64;
        if at + part.len() == bytes.len() {
            chunk.ends.push(upload.id);
        }
        Ok(part.len())
    }

    fn stage_all(&mut self, upload: &Upload, sink: &Sink) -> Result<(), GpuError> {
        let bytes = upload.bytes()?;
        let mut at = 0;
        while at < bytes.len() {
            at += self.stage(upload, at, bytes)?;
            if self.chunk.as_ref().is_some_and(|chunk| chunk.used == self.config.chunk_bytes) {
                let sent = self.send(sink);
                if at < bytes.len() {
                    sent?; // Otherwise the upload ended in that chunk, and has been told already.
                }
            }
        }
        if bytes.is_empty() {
            sink(upload.id, Ok(()));
        }
        Ok(())
    }

    /// Submits the current chunk. On error its uploads have been told, so the error is returned only to stop.
    fn send(&mut self, sink: &Sink) -> Result<(), GpuError> {
        let Some(chunk) = self.chunk.take() else { return Ok(()) };
        let Chunk { buffer, view, copies, ends, .. } = chunk;
        drop(view);
        buffer.unmap();
        let submitted = self.context.guarded("an upload", 0, || {
            let mut encoder = self.context.device.create_command_encoder(&Default::default());
            for copy in &copies {
                encoder.copy_buffer_to_buffer(&buffer, copy.from, &copy.dst, copy.dst_offset, copy.bytes);
            }
            self.context.submit_unguarded([encoder.finish()])
        });
        self.remap(buffer);
        match submitted {
            Ok(submission) => {
                let sink = Arc::clone(sink);
                self.completion.after(submission, move |result| {
                    for id in ends {
                        sink(id, result.clone());
                    }
                });
                Ok(())
            }
            Err(error) => {
                for id in ends {
                    sink(id, Err(error.clone()));
                }
                Err(error)
            }
        }
    }
}

impl UploadPath for RingPath {
    fn name(&self) -> &'static str {
        "ring"
    }

    fn staging_bytes(&self) -> u64 {
        u64::from(self.config.chunks) * self.config.chunk_bytes
    }

    fn push(&mut self, upload: Upload, sink: &Sink) {
        let id = upload.id;
        if let Err(error) = self.stage_all(&upload, sink) {
            sink(id, Err(error));
        }
    }

    fn flush(&mut self, sink: &Sink) {
        let _ = self.send(sink); // Those concerned have been told.
    }
}
