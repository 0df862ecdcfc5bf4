//! The fewest misses that any cache of a size can have: Belady's MIN (IBM Systems Journal 5:2, 1966), with the whole
//! future known. What a policy is measured against.

use overspill_core::BlockId;
use std::collections::BTreeSet;

const NEVER: usize = usize::MAX;

/// Which uses of a sequence miss in a cache of so many blocks that begins empty, if always the one goes that is used
/// furthest in the future. With `cyclic`, the sequence repeats for ever, and the uses of `passes` repetitions are told;
/// else it ends.
#[must_use]
pub fn misses(uses: &[BlockId], blocks: usize, cyclic: bool, passes: usize) -> Vec<bool> {
    let capacity = blocks;
    let length = uses.len();
    let kinds = uses.iter().map(|b| b.index() + 1).max().unwrap_or(0);
    // The next use of the same block after each use, counted from the beginning of its pass.
    let (mut next, mut seen) = (vec![NEVER; length], vec![NEVER; kinds]);
    let rounds = if cyclic { 2 } else { 1 };
    for at in (0..rounds * length).rev() {
        let block = uses[at % length].index();
        if at < length {
            next[at] = seen[block];
        }
        seen[block] = at;
    }
    let (mut resident, mut due) = (BTreeSet::new(), vec![NEVER; kinds]);
    let mut missed = Vec::with_capacity(passes * length);
    for pass in 0..if cyclic { passes } else { 1 } {
        for (at, block) in uses.iter().enumerate() {
            let block = block.index();
            let hit = resident.remove(&(due[block], block));
            missed.push(!hit);
            if !hit && resident.len() >= capacity {
                resident.pop_last();
            }
            due[block] = if next[at] == NEVER { NEVER } else { pass * length + next[at] };
            if capacity > 0 {
                resident.insert((due[block], block));
            }
        }
    }
    missed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(uses: &[u32], blocks: usize) -> usize {
        let uses: Vec<BlockId> = uses.iter().map(|&b| BlockId(b)).collect();
        misses(&uses, blocks, false, 1).into_iter().filter(|m| *m).count()
    }

    /// The textbook's reference string: 9 faults with three frames (Silberschatz, Operating System Concepts, 10.4.3).
    #[test]
    fn the_textbook_string_faults_as_in_the_textbook() {
        let uses = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1];
        assert_eq!(count(&uses, 3), 9);
        assert_eq!(count(&uses, 6), 6);
    }

    #[test]
    fn a_cycle_misses_what_does_not_fit() {
        let uses: Vec<BlockId> = (0..10).map(BlockId).collect();
        let missed = misses(&uses, 4, true, 40);
        assert!(missed[..10].iter().all(|m| *m));
        let steady = missed[100..].iter().filter(|m| **m).count();
        // MIN on a cycle of n in c hits (c − 1) of n − 1.
        assert!((steady as i64 - 300 * 6 / 9).abs() <= 10, "{steady}");
    }
}
