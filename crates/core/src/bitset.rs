//! A set of small integers with fast "next member from here" and "previous member before here", which never allocates
//! after it is made: two levels of words (one summary bit for each word of 64 members).

/// A set of integers below a fixed bound.
#[derive(Clone, Debug, Default)]
pub(crate) struct BitSet {
    words: Vec<u64>,
    summary: Vec<u64>,
    count: usize,
}

impl BitSet {
    pub(crate) fn new(bound: usize) -> Self {
        let words = bound.div_ceil(64);
        Self { words: vec![0; words], summary: vec![0; words.div_ceil(64)], count: 0 }
    }

    pub(crate) fn contains(&self, member: usize) -> bool {
        self.words[member / 64] & (1 << (member % 64)) != 0
    }

    pub(crate) fn set(&mut self, member: usize, present: bool) {
        let (word, bit) = (member / 64, 1u64 << (member % 64));
        if present == (self.words[word] & bit != 0) {
            return;
        }
        if present {
            self.words[word] |= bit;
            self.summary[word / 64] |= 1 << (word % 64);
            self.count += 1;
        } else {
            self.words[word] &= !bit;
            if self.words[word] == 0 {
                self.summary[word / 64] &= !(1 << (word % 64));
            }
            self.count -= 1;
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// The smallest member that is at least `from`.
    pub(crate) fn next(&self, from: usize) -> Option<usize> {
        let word = from / 64;
        let here = self.words.get(word)? & (u64::MAX << (from % 64));
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        let word = next_in(&self.summary, word + 1)?;
        Some(word * 64 + self.words[word].trailing_zeros() as usize)
    }

    /// The largest member that is less than `before`.
    pub(crate) fn prev(&self, before: usize) -> Option<usize> {
        let before = before.min(self.words.len() * 64);
        let word = before / 64;
        if !before.is_multiple_of(64) {
            let here = self.words[word] & !(u64::MAX << (before % 64));
            if here != 0 {
                return Some(word * 64 + 63 - here.leading_zeros() as usize);
            }
        }
        let word = prev_in(&self.summary, word)?;
        Some(word * 64 + 63 - self.words[word].leading_zeros() as usize)
    }
}

fn next_in(words: &[u64], from: usize) -> Option<usize> {
    let mut word = from / 64;
    let mut here = words.get(word)? & (u64::MAX << (from % 64));
    while here == 0 {
        word += 1;
        here = *words.get(word)?;
    }
    Some(word * 64 + here.trailing_zeros() as usize)
}

fn prev_in(words: &[u64], before: usize) -> Option<usize> {
    let mut word = before / 64;
    let mut here = if before.is_multiple_of(64) { 0 } else { words[word] & !(u64::MAX << (before % 64)) };
    while here == 0 {
        word = word.checked_sub(1)?;
        here = words[word];
    }
    Some(word * 64 + 63 - here.leading_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(bound in 1usize..9000, ops in proptest::collection::vec((0usize..9000, any::<bool>()), 0..200)) {
            let (mut set, mut model) = (BitSet::new(bound), BTreeSet::new());
            for (member, present) in ops {
                let member = member % bound;
                set.set(member, present);
                if present { model.insert(member); } else { model.remove(&member); }
                prop_assert_eq!(set.len(), model.len());
                prop_assert_eq!(set.contains(member), present);
                for at in [member, member + 1, member.saturating_sub(63), bound] {
                    prop_assert_eq!(set.next(at), model.range(at..).next().copied());
                    prop_assert_eq!(set.prev(at), model.range(..at).next_back().copied());
                }
            }
        }
    }
}
