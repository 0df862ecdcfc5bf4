//! A cache of a table's rows: all of one size, so that a count bounds its bytes. What was used lately stays (the clock,
//! or second chance: Corbató, MIT Project MAC, 1968). It allocates when it is made, and never again.

use std::collections::HashMap;

/// What a cached row costs besides its bytes: its place, and its part of an index that is at most half full.
const ROW_OVERHEAD_BYTES: u64 = 96;

/// See the module.
pub(crate) struct RowCache {
    row_bytes: usize,
    rows_max: usize,
    /// `[places][row_bytes]`.
    bytes: Vec<u8>,
    /// Of each place: its row, and whether it was used since the hand last passed.
    places: Vec<(u64, bool)>,
    /// The place of each row.
    index: HashMap<u64, usize>,
    hand: usize,
}

impl RowCache {
    /// A cache of at most so many bytes for a table of `rows` rows of `row_bytes` bytes; `None` if not one row fits.
    pub(crate) fn within(bytes: u64, row_bytes: u64, rows: u64) -> Option<Self> {
        let rows_max = usize::try_from((bytes / row_bytes.checked_add(ROW_OVERHEAD_BYTES)?).min(rows)).ok()?;
        let row_bytes = usize::try_from(row_bytes).ok()?;
        (rows_max > 0 && row_bytes > 0).then(|| Self {
            row_bytes,
            rows_max,
            bytes: Vec::with_capacity(rows_max * row_bytes),
            places: Vec::with_capacity(rows_max),
            // Half empty, so that rows that come and go never make it grow.
            index: HashMap::with_capacity(2 * rows_max),
            hand: 0,
        })
    }

    /// A row's bytes, if it is here.
    pub(crate) fn get(&mut self, row: u64) -> Option<&[u8]> {
        let place = *self.index.get(&row)?;
        self.places[place].1 = true;
        Some(&self.bytes[place * self.row_bytes..(place + 1) * self.row_bytes])
    }

    /// Keeps a row (of `row_bytes` bytes) in place of one that was not used lately.
    pub(crate) fn put(&mut self, row: u64, bytes: &[u8]) {
        if self.index.contains_key(&row) || bytes.len() != self.row_bytes {
            return;
        }
        if self.places.len() < self.rows_max {
            self.index.insert(row, self.places.len());
            self.places.push((row, false));
            self.bytes.extend_from_slice(bytes);
            return;
        }
        while std::mem::take(&mut self.places[self.hand].1) {
            self.hand = (self.hand + 1) % self.rows_max;
        }
        let place = self.hand;
        self.hand = (self.hand + 1) % self.rows_max;
        self.index.remove(&self.places[place].0);
        self.index.insert(row, place);
        self.places[place] = (row, false);
        self.bytes[place * self.row_bytes..(place + 1) * self.row_bytes].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn what_was_used_lately_stays_and_the_size_is_bounded() {
        let mut cache = RowCache::within(3 * (4 + ROW_OVERHEAD_BYTES), 4, 1000).unwrap();
        for row in 0..3 {
            cache.put(row, &[row as u8; 4]);
        }
        assert_eq!(cache.get(0), Some(&[0; 4][..]));
        cache.put(3, &[3; 4]);
        assert_eq!(cache.get(1), None, "the first that was not used");
        assert_eq!(cache.get(0), Some(&[0; 4][..]));
        assert_eq!(cache.get(3), Some(&[3; 4][..]));
        for row in 4..1000 {
            cache.put(row, &[row as u8; 4]);
            assert_eq!(cache.get(row), Some(&[row as u8; 4][..]));
        }
        assert_eq!((cache.places.len(), cache.bytes.len(), cache.index.len()), (3, 12, 3));
    }

    #[test]
    fn a_cache_too_small_for_a_row_is_none() {
        let smallest = 4 + ROW_OVERHEAD_BYTES;
        assert!(RowCache::within(smallest - 1, 4, 10).is_none() && RowCache::within(smallest, 4, 10).is_some());
        assert!(RowCache::within(smallest, 4, 0).is_none());
        assert!(RowCache::within(1 << 40, u64::MAX, 10).is_none());
        assert_eq!(RowCache::within(1 << 40, 4, 10).unwrap().rows_max, 10);
    }
}
