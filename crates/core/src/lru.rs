//! Order of last use, as lists linked by index: no allocation after the start. Blocks that some schedule uses, blocks
//! that steps choose (experts) and blocks of neither kind are in separate lists, since their future is known, guessed
//! or not known.

const END: u32 = u32::MAX;

/// Which list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum List {
    /// Blocks with a place in a schedule.
    Scheduled = 0,
    /// The others.
    Free = 1,
    /// Blocks among which some step chooses, and that no schedule uses otherwise.
    Chosen = 2,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    older: u32,
    newer: u32,
    /// When it was used last, counted in uses.
    stamp: u64,
    list: u8,
}

const LISTS: usize = 3;
const UNLINKED: u8 = LISTS as u8;

/// Blocks of a tier in the order of their last use.
#[derive(Clone, Debug)]
pub(crate) struct Lru {
    links: Vec<Link>,
    newest: [u32; LISTS],
    oldest: [u32; LISTS],
    uses: u64,
}

impl Lru {
    pub(crate) fn new(blocks: usize) -> Self {
        let link = Link { older: END, newer: END, stamp: 0, list: UNLINKED };
        Self { links: vec![link; blocks], newest: [END; LISTS], oldest: [END; LISTS], uses: 0 }
    }

    /// Makes a block the most recently used of a list, whether it was linked or not.
    pub(crate) fn touch(&mut self, block: usize, list: List) {
        self.remove(block);
        self.uses += 1;
        let old = self.newest[list as usize];
        self.links[block] = Link { older: old, newer: END, stamp: self.uses, list: list as u8 };
        match old {
            END => self.oldest[list as usize] = block as u32,
            old => self.links[old as usize].newer = block as u32,
        }
        self.newest[list as usize] = block as u32;
    }

    pub(crate) fn remove(&mut self, block: usize) {
        let Link { older, newer, list, .. } = self.links[block];
        if list == UNLINKED {
            return;
        }
        match older {
            END => self.oldest[list as usize] = newer,
            older => self.links[older as usize].newer = newer,
        }
        match newer {
            END => self.newest[list as usize] = older,
            newer => self.links[newer as usize].older = older,
        }
        self.links[block].list = UNLINKED;
    }

    /// Whether a block is in a list.
    pub(crate) fn is_in(&self, block: usize, list: List) -> bool {
        self.links[block].list == list as u8
    }

    pub(crate) fn stamp(&self, block: usize) -> u64 {
        self.links[block].stamp
    }

    /// From the least to the most recently used.
    pub(crate) fn oldest_first(&self, list: List) -> impl Iterator<Item = usize> + '_ {
        let mut at = self.oldest[list as usize];
        std::iter::from_fn(move || {
            let here = (at != END).then_some(at as usize)?;
            at = self.links[here].newer;
            Some(here)
        })
    }

    /// All linked blocks, each list from the oldest on.
    pub(crate) fn linked(&self) -> Vec<usize> {
        let lists = [List::Scheduled, List::Free, List::Chosen];
        let mut all: Vec<usize> = lists.into_iter().flat_map(|list| self.oldest_first(list)).collect();
        all.sort_by_key(|&block| self.links[block].stamp);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_the_last_use() {
        let mut lru = Lru::new(4);
        for block in [0, 1, 2, 0] {
            lru.touch(block, List::Free);
        }
        lru.touch(3, List::Scheduled);
        assert_eq!(lru.oldest_first(List::Free).collect::<Vec<_>>(), [1, 2, 0]);
        lru.remove(2);
        lru.touch(1, List::Scheduled);
        assert_eq!(lru.oldest_first(List::Free).collect::<Vec<_>>(), [0]);
        assert_eq!(lru.linked(), [0, 3, 1]);
    }
}
