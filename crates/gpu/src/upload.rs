//! Uploads: a thread that takes them in order and hands them to a path, which moves the bytes.
//!
//! The seam is [`UploadPath`]. Today there is one path, the staging ring; imported host memory and a transfer queue
//! are others that can take its place without the engine noticing.

use crate::error::GpuError;
use overspill_core::ids::TransferId;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Host bytes that an upload reads from, owned until they have been read.
pub type Source = Box<dyn AsRef<[u8]> + Send>;
/// What becomes of a transfer.
pub type Finished = (TransferId, Result<(), GpuError>);
/// Called once for every upload, when the bytes are in VRAM or will never be; from any thread, and must not block.
pub type Sink = Arc<dyn Fn(TransferId, Result<(), GpuError>) + Send + Sync>;

/// A copy of host bytes into a buffer.
pub struct Upload {
    /// Chosen by the caller; comes back in the sink.
    pub id: TransferId,
    /// The host bytes.
    pub source: Source,
    /// Where in them the copy begins; any alignment.
    pub source_offset: usize,
    /// The destination.
    pub dst: Arc<wgpu::Buffer>,
    /// Where in it the copy begins: a multiple of 4.
    pub dst_offset: u64,
    /// Bytes to copy; any number. The rest of the last word becomes zero.
    pub len: usize,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Upload({}, {} bytes from {} to {})", self.id, self.len, self.source_offset, self.dst_offset)
    }
}

impl Upload {
    /// The bytes to copy.
    ///
    /// # Errors
    /// [`GpuError::Range`] if they, or their place, do not exist.
    pub fn bytes(&self) -> Result<&[u8], GpuError> {
        let range = |cause| GpuError::Range { offset: self.dst_offset, len: self.len as u64, cause };
        let end = self.source_offset.checked_add(self.len);
        let bytes = end.and_then(|end| self.source.as_ref().as_ref().get(self.source_offset..end));
        let bytes = bytes.ok_or_else(|| range("the host bytes end before it"))?;
        if !self.dst_offset.is_multiple_of(4) {
            return Err(range("the destination is no multiple of 4"));
        }
        let words_end = self.dst_offset.checked_add((self.len as u64).next_multiple_of(4));
        if words_end.is_none_or(|end| end > self.dst.size()) {
            return Err(range("the buffer ends before it"));
        }
        Ok(bytes)
    }
}

/// A way for bytes to get into VRAM. Runs in the uploader's thread.
pub trait UploadPath: Send {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// Host memory that it holds for staging, in bytes.
    fn staging_bytes(&self) -> u64;

    /// Takes an upload whose ranges were checked. May wait for room. The sink hears of every upload exactly once.
    fn push(&mut self, upload: Upload, sink: &Sink);

    /// Starts what was pushed and not yet started.
    fn flush(&mut self, sink: &Sink);
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Upload>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    sink: Sink,
}

/// Copies host bytes into VRAM in the background, in the order of submission. Dropping it cancels what has not begun;
/// what has begun completes through the poller.
pub struct Uploader {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    path_name: &'static str,
    staging_bytes: u64,
}

impl std::fmt::Debug for Uploader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uploader").field("path", &self.path_name).field("staging_bytes", &self.staging_bytes).finish()
    }
}

impl Uploader {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`GpuError::Refused`] if the system gives no thread.
    pub fn new(mut path: Box<dyn UploadPath>, sink: Sink) -> Result<Self, GpuError> {
        let (path_name, staging_bytes) = (path.name(), path.staging_bytes());
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new(), sink });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("overspill-gpu-upload".to_owned())
            .spawn(move || own.run(&mut *path))
            .map_err(|e| GpuError::Refused { what: "a thread for uploads".into(), message: e.to_string() })?;
        Ok(Self { shared, thread: Some(thread), path_name, staging_bytes })
    }

    /// Queues an upload; never blocks. The sink hears of it exactly once.
    pub fn submit(&self, upload: Upload) {
        let result = match upload.bytes() {
            Err(error) => Err(error),
            Ok(_) => {
                let mut queue = self.shared.queue.lock();
                if !queue.closed {
                    queue.waiting.push_back(upload);
                    self.shared.changed.notify_one();
                    return;
                }
                Err(GpuError::Closed)
            }
        };
        (self.shared.sink)(upload.id, result);
    }

    /// Drops an upload that has not begun; it completes with [`GpuError::Cancelled`]. Others complete as they would.
    pub fn cancel(&self, id: TransferId) {
        let cancelled = {
            let mut queue = self.shared.queue.lock();
            let position = queue.waiting.iter().position(|upload| upload.id == id);
            position.and_then(|position| queue.waiting.remove(position))
        };
        if let Some(upload) = cancelled {
            (self.shared.sink)(upload.id, Err(GpuError::Cancelled));
        }
    }

    /// Name of the path that moves the bytes.
    #[must_use]
    pub fn path_name(&self) -> &'static str {
        self.path_name
    }

    /// Host memory held for staging, in bytes.
    #[must_use]
    pub fn staging_bytes(&self) -> u64 {
        self.staging_bytes
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        let waiting = {
            let mut queue = self.shared.queue.lock();
            queue.closed = true;
            std::mem::take(&mut queue.waiting)
        };
        self.shared.changed.notify_all();
        for upload in waiting {
            (self.shared.sink)(upload.id, Err(GpuError::Closed));
        }
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join(); // A panic in the path has been printed; there is nobody to pass it on to.
        }
    }
}

impl Shared {
    fn run(&self, path: &mut dyn UploadPath) {
        loop {
            let mut next = {
                let mut queue = self.queue.lock();
                loop {
                    if let Some(upload) = queue.waiting.pop_front() {
                        break Some(upload);
                    }
                    if queue.closed {
                        return;
                    }
                    self.changed.wait(&mut queue);
                }
            };
            while let Some(upload) = next {
                path.push(upload, &self.sink);
                next = self.queue.lock().waiting.pop_front();
            }
            path.flush(&self.sink);
        }
    }
}
