//! What the two classic caches miss, which know nothing of steps and cycles: what a policy is compared with from below,
//! as with [`crate::belady`] from above.

use overspill_core::BlockId;
use std::collections::BTreeSet;

/// What a cache judges blocks by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cache {
    /// The least recently used goes.
    Lru,
    /// The least often used goes, counted from the beginning, evicted or not; of equals, the least recently used.
    Lfu,
}

/// Which uses of a sequence miss in a cache of so many blocks that begins empty.
#[must_use]
pub fn misses(cache: Cache, uses: &[BlockId], blocks: usize) -> Vec<bool> {
    let kinds = uses.iter().map(|b| b.index() + 1).max().unwrap_or(0);
    // What a block is worth: how often it was used, if that counts, then when last.
    let mut worth = vec![(0u64, 0usize); kinds];
    let mut resident = BTreeSet::new();
    let mut missed = Vec::with_capacity(uses.len());
    for (at, block) in uses.iter().map(|b| b.index()).enumerate() {
        let hit = resident.remove(&(worth[block], block));
        missed.push(!hit);
        if !hit && resident.len() >= blocks {
            resident.pop_first();
        }
        worth[block] = (if cache == Cache::Lfu { worth[block].0 + 1 } else { 0 }, at + 1);
        if blocks > 0 {
            resident.insert((worth[block], block));
        }
    }
    missed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(cache: Cache, uses: &[u32], blocks: usize) -> usize {
        let uses: Vec<BlockId> = uses.iter().map(|&b| BlockId(b)).collect();
        misses(cache, &uses, blocks).into_iter().filter(|m| *m).count()
    }

    /// The textbook's reference string: 12 faults with three frames under LRU (Silberschatz, Operating System
    /// Concepts, 10.4.4).
    #[test]
    fn the_textbook_string_faults_as_in_the_textbook() {
        let uses = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1];
        assert_eq!(count(Cache::Lru, &uses, 3), 12);
        assert_eq!(count(Cache::Lru, &uses, 6), 6);
    }

    #[test]
    fn what_was_used_often_stays_under_lfu_and_goes_under_lru() {
        let uses = [1, 1, 1, 2, 3, 4, 1];
        assert_eq!(count(Cache::Lfu, &uses, 2), 4);
        assert_eq!(count(Cache::Lru, &uses, 2), 5);
    }
}
