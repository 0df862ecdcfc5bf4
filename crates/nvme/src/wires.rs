//! Several disks: a reader for each, so that a slow one does not hold up the others' reads.
//!
//! Which file lies on which disk the [`FileSet`] knows; what a reader of one disk is, the others know.

use crate::files::FileSet;
use overspill_core::TransferId;
use overspill_core::seam::{Buffer, Read, Storage};
use parking_lot::Mutex;
use std::sync::Arc;

/// Readers of one disk each, as one.
pub(crate) struct ByWire<B: Buffer> {
    files: Arc<FileSet>,
    /// By wire. Never empty.
    readers: Vec<Box<dyn Storage<B>>>,
    /// Batches of one disk each while they are sorted out, by wire; empty in between.
    batches: Mutex<Vec<Vec<Read<B>>>>,
}

impl<B: Buffer> ByWire<B> {
    /// Distributes reads over `readers` by the wire of their file. `None` if there is no reader.
    pub(crate) fn new(files: Arc<FileSet>, readers: Vec<Box<dyn Storage<B>>>) -> Option<Self> {
        let batches = Mutex::new(readers.iter().map(|_| Vec::new()).collect());
        (!readers.is_empty()).then_some(Self { files, readers, batches })
    }
}

impl<B: Buffer> Storage<B> for ByWire<B> {
    fn submit(&self, reads: &mut Vec<Read<B>>) {
        // Readers take a batch without waiting for their disk, so the lock is short.
        let mut batches = self.batches.lock();
        for read in reads.drain(..) {
            // A file that is not in the set has wire 0, whose reader refuses it.
            batches[self.files.wire_of(read.file) as usize].push(read);
        }
        for (reader, batch) in self.readers.iter().zip(batches.iter_mut()) {
            reader.submit(batch);
        }
    }

    fn cancel(&self, id: TransferId) {
        // Ids are the caller's, and one that a reader has not got is nothing to it.
        self.readers.iter().for_each(|reader| reader.cancel(id));
    }

    fn alignment_bytes(&self) -> usize {
        self.readers.iter().map(|reader| reader.alignment_bytes()).max().unwrap_or(1)
    }

    fn name(&self) -> &'static str {
        self.readers[0].name()
    }
}
