//! Rows of tables: deduplicated, batched reads and a small cache. The brain keeps no state per row.

use crate::error::Error;
use crate::rows::RowCache;
use overspill_core::{Catalog, TableId, TensorId};
use overspill_nvme::{FileSet, GatherError, Gatherer, IoChoice, StorageOptions};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// See the module.
pub(crate) struct Gather {
    gatherer: Gatherer,
    catalog: Arc<Catalog>,
    caches: Vec<Option<Mutex<RowCache>>>,
    spare: Mutex<Vec<Scratch>>,
    read_bytes: AtomicU64,
    reads: AtomicU64,
}

/// What one call needs, kept between calls so that nothing is allocated once it is warm.
#[derive(Default)]
struct Scratch {
    /// Places in the destination whose rows are not cached, and these rows.
    missing: Vec<usize>,
    wanted: Vec<u64>,
    read: Vec<u8>,
}

impl Gather {
    pub(crate) fn new(
        catalog: &Arc<Catalog>,
        files: Arc<FileSet>,
        cache_bytes: u64,
        io: IoChoice,
        options: &StorageOptions,
    ) -> Result<Self, Error> {
        let gatherer = Gatherer::new(files, io, options).map_err(|e| crate::builder::storage_error(&e))?;
        let tables = catalog.tables();
        let share = cache_bytes / tables.len().max(1) as u64;
        let caches = tables.iter().map(|table| RowCache::within(share, table.row_bytes, table.rows).map(Mutex::new));
        Ok(Self {
            gatherer,
            catalog: Arc::clone(catalog),
            caches: caches.collect(),
            spare: Mutex::default(),
            read_bytes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
        })
    }

    /// Copies rows in the order in which they are named.
    pub(crate) fn rows(&self, table: TableId, rows: &[u64], destination: &mut [u8]) -> Result<(), Error> {
        let mut scratch = self.spare.lock().pop().unwrap_or_default();
        let result = self.rows_with(&mut scratch, table, rows, destination);
        self.spare.lock().push(scratch);
        result
    }

    fn rows_with(
        &self,
        scratch: &mut Scratch,
        table: TableId,
        rows: &[u64],
        destination: &mut [u8],
    ) -> Result<(), Error> {
        let info = self.catalog.tables()[table.index()];
        let tensor = self.catalog.tensor(info.tensor);
        let row_bytes = info.row_bytes as usize;
        let Scratch { missing, wanted, read } = scratch;
        self.copy_cached(table, rows, row_bytes, destination, missing);
        if missing.is_empty() {
            return Ok(());
        }
        wanted.clear();
        wanted.extend(missing.iter().map(|&index| rows[index]));
        read.resize(wanted.len() * row_bytes, 0);
        let result = Self::retried(|| self.gatherer.read(tensor.file, wanted, row_bytes, tensor.offset, read));
        result.map_err(|e| self.error(info.tensor, e))?;
        self.count(wanted.len(), read.len());
        for (bytes, &index) in read.chunks_exact(row_bytes).zip(&*missing) {
            destination[index * row_bytes..(index + 1) * row_bytes].copy_from_slice(bytes);
        }
        if let Some(Some(cache)) = self.caches.get(table.index()) {
            let mut cache = cache.lock();
            for (bytes, &row) in read.chunks_exact(row_bytes).zip(&*wanted) {
                cache.put(row, bytes);
            }
        }
        Ok(())
    }

    /// Copies what is cached; `missing` becomes the places of the rest.
    fn copy_cached(
        &self,
        table: TableId,
        rows: &[u64],
        row_bytes: usize,
        destination: &mut [u8],
        missing: &mut Vec<usize>,
    ) {
        missing.clear();
        let Some(Some(cache)) = self.caches.get(table.index()) else { return missing.extend(0..rows.len()) };
        let mut cache = cache.lock();
        for (index, destination) in destination.chunks_exact_mut(row_bytes).enumerate() {
            match cache.get(rows[index]) {
                Some(bytes) => destination.copy_from_slice(bytes),
                None => missing.push(index),
            }
        }
    }

    /// Copies any bytes of a tensor straight from its file.
    pub(crate) fn range(&self, tensor: TensorId, offset: u64, destination: &mut [u8]) -> Result<(), Error> {
        let info = self.catalog.tensor(tensor);
        let bytes = destination.len();
        let result = Self::retried(|| self.gatherer.read(info.file, &[0], bytes, info.offset + offset, destination));
        result.map_err(|e| self.error(tensor, e))?;
        self.count(1, destination.len());
        Ok(())
    }

    /// Reads a second time if the disk fails: rows get the one retry that the brain gives blocks.
    fn retried(mut read: impl FnMut() -> Result<(), GatherError>) -> Result<(), GatherError> {
        match read() {
            Err(error @ GatherError::Read { .. }) => {
                tracing::warn!(%error, "reading rows a second time");
                read()
            }
            other => other,
        }
    }

    fn count(&self, reads: usize, bytes: usize) {
        self.reads.fetch_add(reads as u64, Ordering::Relaxed);
        self.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn error(&self, tensor: TensorId, error: GatherError) -> Error {
        let info = self.catalog.tensor(tensor);
        match error {
            GatherError::Read { path, offset, fault, .. } => {
                Error::Read { path, tensor: info.name.clone(), offset, bytes: info.row_bytes, fault }
            }
            other => Error::Storage(format!("tensor '{}': {other}", info.name)),
        }
    }

    /// Bytes of rows that were read (not those that the disk had to deliver around them).
    pub(crate) fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }
}
