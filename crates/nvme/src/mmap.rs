//! The memory-mapped reader. Bytes leave the map through the kernel, so a file that shrinks is an error, not the end of
//! the process. It reads through the page cache, and serves where that is wanted: several processes with one model.

#[cfg(not(target_os = "linux"))]
pub(crate) const REFUSAL: &str = "only Linux can copy out of a map safely (process_vm_readv)";

#[cfg(target_os = "linux")]
pub(crate) use linux::Mmap;

#[cfg(target_os = "linux")]
mod linux {
    use crate::Sink;
    use crate::files::FileSet;
    use crate::open::StorageOptions;
    use crate::pread::read_at;
    use crate::progress::{EINVAL, Progress};
    use crate::sys::FileMap;
    use crate::workers::{Serve, Workers};
    use overspill_core::seam::{Buffer, Read, ReadFault, Storage};
    use overspill_core::{FileId, TransferId};
    use std::sync::Arc;

    /// Copies out of memory maps, on a pool of threads.
    pub(crate) struct Mmap<B: Buffer> {
        workers: Workers<B>,
    }

    struct Server {
        files: Arc<FileSet>,
        /// One each; none for an empty file.
        maps: Vec<Option<FileMap>>,
        call_bytes_max: usize,
    }

    impl<B: Buffer> Mmap<B> {
        /// Maps all files.
        ///
        /// # Errors
        /// Why it cannot be, in words.
        pub(crate) fn start(files: Arc<FileSet>, options: &StorageOptions, sink: Arc<Sink<B>>) -> Result<Self, String> {
            FileMap::probe().map_err(|error| format!("process_vm_readv is refused ({error})"))?;
            let mut maps = Vec::with_capacity(files.len());
            for index in 0..files.len() {
                let file = FileId(index as u32);
                let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", files.path(file).display());
                let bytes = usize::try_from(files.bytes(file)).map_err(|error| failed(&error))?;
                let map = files.buffered(file).filter(|_| bytes > 0).map(|file| FileMap::new(file, bytes));
                maps.push(map.transpose().map_err(|error| failed(&error))?);
            }
            let server = Server { files, maps, call_bytes_max: options.call_bytes_max };
            let workers = Workers::start("mmap", options.threads, Arc::new(server), sink);
            Ok(Self { workers: workers.map_err(|error| error.to_string())? })
        }
    }

    impl<B: Buffer> Storage<B> for Mmap<B> {
        fn submit(&self, reads: &mut Vec<Read<B>>) {
            self.workers.submit(reads);
        }

        fn cancel(&self, id: TransferId) {
            self.workers.cancel(id);
        }

        fn alignment_bytes(&self) -> usize {
            1
        }

        fn name(&self) -> &'static str {
            "mmap"
        }
    }

    impl<B: Buffer> Serve<B> for Server {
        fn serve(&self, read: &mut Read<B>) -> Result<usize, ReadFault> {
            let invalid = ReadFault::System { errno: EINVAL };
            let Some(bytes) = read.buffer.bytes_mut().get_mut(..read.len) else { return Err(invalid) };
            let Some(file) = self.files.buffered(read.file) else { return Err(invalid) };
            let map = self.maps.get(read.file.index()).and_then(Option::as_ref);
            let lens = (read.len, read.len_min);
            let mut progress = Progress::new(read.offset, lens, 0, false, self.call_bytes_max);
            while let Some(call) = progress.next_call() {
                let to = &mut bytes[call.range.clone()];
                let copied = map.and_then(|map| map.copy_out(call.offset, to).ok()).filter(|&bytes| bytes > 0);
                // Where the map gives nothing, the file says why: it ends there, or the disk has an error.
                let result = copied.map_or_else(|| read_at(file, to, call.offset), Ok);
                if let Some(outcome) = progress.advance(&call, result) {
                    return outcome;
                }
            }
            progress.at_end()
        }
    }
}
