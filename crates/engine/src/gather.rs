//! Rows of tables: deduplicated, batched reads and a small cache. The brain keeps no state per row.

use crate::error::Error;
use lru::LruCache;
use overspill_core::{Catalog, TableId, TensorId};
use overspill_nvme::{FileSet, GatherError, Gatherer, IoChoice, StorageOptions};
use parking_lot::Mutex;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The cache of one table: rows of one size, so a count bounds its bytes.
struct Cached {
    rows: LruCache<u64, Box<[u8]>>,
}

/// See the module.
pub(crate) struct Gather {
    gatherer: Gatherer,
    catalog: Arc<Catalog>,
    caches: Vec<Option<Mutex<Cached>>>,
    read_bytes: AtomicU64,
    reads: AtomicU64,
}

/// What a cached row costs besides its bytes.
const ROW_OVERHEAD_BYTES: u64 = 96;

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
        let caches = tables.iter().map(|table| {
            let rows = (share / (table.row_bytes + ROW_OVERHEAD_BYTES)).min(table.rows) as usize;
            NonZeroUsize::new(rows).map(|rows| Mutex::new(Cached { rows: LruCache::new(rows) }))
        });
        Ok(Self {
            gatherer,
            catalog: Arc::clone(catalog),
            caches: caches.collect(),
            read_bytes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
        })
    }

    /// Copies rows in the order in which they are named.
    pub(crate) fn rows(&self, table: TableId, rows: &[u64], destination: &mut [u8]) -> Result<(), Error> {
        let info = self.catalog.tables()[table.index()];
        let tensor = self.catalog.tensor(info.tensor);
        let row_bytes = info.row_bytes as usize;
        let missing = self.copy_cached(table, rows, row_bytes, destination);
        if missing.is_empty() {
            return Ok(());
        }
        let wanted: Vec<u64> = missing.iter().map(|&index| rows[index]).collect();
        let mut read = vec![0u8; wanted.len() * row_bytes];
        self.gatherer
            .read(tensor.file, &wanted, row_bytes, tensor.offset, &mut read)
            .map_err(|e| self.error(info.tensor, e))?;
        self.count(wanted.len(), read.len());
        for (bytes, &index) in read.chunks_exact(row_bytes).zip(&missing) {
            destination[index * row_bytes..(index + 1) * row_bytes].copy_from_slice(bytes);
        }
        if let Some(Some(cache)) = self.caches.get(table.index()) {
            let mut cache = cache.lock();
            for (bytes, &row) in read.chunks_exact(row_bytes).zip(&wanted) {
                cache.rows.put(row, bytes.into());
            }
        }
        Ok(())
    }

    /// Copies what is cached; returns the indices of the rest.
    fn copy_cached(&self, table: TableId, rows: &[u64], row_bytes: usize, destination: &mut [u8]) -> Vec<usize> {
        let Some(Some(cache)) = self.caches.get(table.index()) else { return (0..rows.len()).collect() };
        let mut cache = cache.lock();
        let copy = |(index, destination): (usize, &mut [u8])| match cache.rows.get(&rows[index]) {
            Some(bytes) => {
                destination.copy_from_slice(bytes);
                None
            }
            None => Some(index),
        };
        destination.chunks_exact_mut(row_bytes).enumerate().filter_map(copy).collect()
    }

    /// Copies any bytes of a tensor straight from its file.
    pub(crate) fn range(&self, tensor: TensorId, offset: u64, destination: &mut [u8]) -> Result<(), Error> {
        let info = self.catalog.tensor(tensor);
        let bytes = destination.len();
        self.gatherer
            .read(info.file, &[0], bytes, info.offset + offset, destination)
            .map_err(|e| self.error(tensor, e))?;
        self.count(1, destination.len());
        Ok(())
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
