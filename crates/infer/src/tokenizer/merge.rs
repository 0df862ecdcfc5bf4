//! The loop that all byte-pair encodings share: of all neighbours that may merge, merge the best, until none may.
//!
//! Linear in space, O(n log n) in time: a doubly linked list of symbols and a heap of candidates, of which those that
//! a merge has made stale are dropped when they come up.

use std::collections::BinaryHeap;

/// "No neighbour".
const NONE: usize = usize::MAX;

/// A part of the text that is, or may become, one token.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol {
    /// Where it begins, in bytes.
    pub start: usize,
    /// Where it ends; equal to `start` once it has been merged into its left neighbour.
    pub end: usize,
    /// What it is, to whoever asked for the merging.
    pub id: u32,
    previous: usize,
    next: usize,
}

/// A pair that may merge: ordered by its priority, greater first, then from left to right.
struct Candidate<K> {
    priority: K,
    left: usize,
    right: usize,
    end: usize,
    merged: u32,
}

impl<K: Ord> Ord for Candidate<K> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.priority.cmp(&other.priority).then(other.left.cmp(&self.left))
    }
}

impl<K: Ord> PartialOrd for Candidate<K> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<K: Ord> PartialEq for Candidate<K> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<K: Ord> Eq for Candidate<K> {}

/// The working memory of one encoding, reused from word to word.
pub(super) struct Merger<K> {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Candidate<K>>,
}

impl<K: Ord> Merger<K> {
    pub(super) fn new() -> Self {
        Self { symbols: Vec::new(), queue: BinaryHeap::new() }
    }

    /// Merges `initial` symbols, which must follow each other without gaps. `pair` gives the priority of merging two
    /// neighbours and the id of the result, or `None` if they may not merge. Returns what is left, in order.
    pub(super) fn merge(
        &mut self,
        initial: impl Iterator<Item = (usize, usize, u32)>,
        pair: impl Fn(&Symbol, &Symbol) -> Option<(K, u32)>,
    ) -> impl Iterator<Item = Symbol> + '_ {
        self.symbols.clear();
        self.queue.clear();
        self.symbols.extend(initial.enumerate().map(|(index, (start, end, id))| Symbol {
            start,
            end,
            id,
            previous: index.wrapping_sub(1),
            next: index + 1,
        }));
        if let Some(last) = self.symbols.last_mut() {
            last.next = NONE;
        }
        for left in 1..self.symbols.len() {
            self.offer(left - 1, left, &pair);
        }
        while let Some(best) = self.queue.pop() {
            let (left, right) = (self.symbols[best.left], self.symbols[best.right]);
            // A symbol only ever grows or vanishes, so the ends tell whether both are what they were when offered.
            if left.end == left.start || right.end == right.start || left.end != right.start || right.end != best.end {
                continue;
            }
            self.symbols[best.right].end = right.start;
            self.symbols[best.left] = Symbol { end: right.end, id: best.merged, next: right.next, ..left };
            if right.next != NONE {
                self.symbols[right.next].previous = best.left;
                self.offer(best.left, right.next, &pair);
            }
            if left.previous != NONE {
                self.offer(left.previous, best.left, &pair);
            }
        }
        self.symbols.iter().filter(|symbol| symbol.end > symbol.start).copied()
    }

    fn offer(&mut self, left: usize, right: usize, pair: &impl Fn(&Symbol, &Symbol) -> Option<(K, u32)>) {
        if let Some((priority, merged)) = pair(&self.symbols[left], &self.symbols[right]) {
            self.queue.push(Candidate { priority, left, right, end: self.symbols[right].end, merged });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str, priority: impl Fn(&str, &str) -> Option<i32>) -> Vec<String> {
        let symbols = text.char_indices().map(|(start, c)| (start, start + c.len_utf8(), 0));
        let pair = |l: &Symbol, r: &Symbol| priority(&text[l.start..l.end], &text[r.start..r.end]).map(|p| (p, 0));
        Merger::new().merge(symbols, pair).map(|s| text[s.start..s.end].to_owned()).collect()
    }

    #[test]
    fn the_best_pair_goes_first_and_the_leftmost_of_equals() {
        let rule = |l: &str, r: &str| match (l, r) {
            ("a", "a") => Some(1),
            ("a", "b") => Some(2),
            ("aa", "ab") => Some(3),
            _ => None,
        };
        assert_eq!(pieces("aaa", rule), ["aa", "a"]);
        assert_eq!(pieces("aaab", rule), ["aaab"]);
        assert_eq!(pieces("aaaab", rule), ["aa", "a", "ab"]);
        assert!(pieces("", rule).is_empty());
    }

    #[test]
    fn a_long_run_takes_no_quadratic_time() {
        let rule = |l: &str, r: &str| (l.len() == r.len()).then_some(-(l.len() as i32));
        assert_eq!(pieces(&"x".repeat(1 << 18), rule), ["x".repeat(1 << 18)]);
    }
}
