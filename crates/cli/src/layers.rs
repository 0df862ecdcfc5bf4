//! Which layer a tensor belongs to, by its name, and the tensors of many layers as one pattern. For display only:
//! what runs is decided by the runtime.

use overspill::{Catalog, Layout, Tensor};
use std::collections::BTreeMap;

/// The layer in a name like `model.layers.3.mlp.up_proj.weight` or `blk.3.ffn_up.weight`: its first whole number.
pub fn layer_of(name: &str) -> Option<u32> {
    name.split('.').skip(1).find_map(|part| part.parse().ok())
}

/// Whether a tensor belongs to experts, of which a token needs a few.
pub fn is_expert(name: &str) -> bool {
    name.split('.').any(|part| part == "experts" || part.ends_with("_exps"))
}

/// The blocks that a tensor has to itself; 0 for what is bundled or only gathered.
pub fn blocks_of(tensor: &Tensor) -> usize {
    match tensor.layout {
        Layout::Cut { units, blocks_per_unit, .. } => units as usize * blocks_per_unit as usize,
        Layout::Whole { .. } | Layout::TableOnly => 0,
    }
}

/// Elements of all tensors together.
pub fn parameters(catalog: &Catalog) -> u64 {
    let elements = |tensor: &Tensor| tensor.shape.iter().copied().fold(1u64, u64::saturating_mul);
    catalog.tensors().iter().map(elements).fold(0, u64::saturating_add)
}

/// A shape as `[2, 3]`.
pub fn dims(shape: &[u64]) -> String {
    let dims: Vec<String> = shape.iter().map(u64::to_string).collect();
    format!("[{}]", dims.join(", "))
}

/// Tensors whose names differ in numbers only, and whose keys are equal.
#[derive(Debug, PartialEq, Eq)]
pub struct Pattern<K> {
    /// The name, with `{first-last}` where numbers differ.
    pub name: String,
    /// What they have in common.
    pub key: K,
    /// How many they are.
    pub count: usize,
    /// Their bytes together.
    pub bytes: u64,
}

/// Groups tensors (name, key, bytes) into patterns, in the order of their first members.
pub fn patterns<'a, K: Ord + Clone>(tensors: impl Iterator<Item = (&'a str, K, u64)>) -> Vec<Pattern<K>> {
    struct Group<'a, K> {
        parts: Vec<(&'a str, Option<(u64, u64)>)>,
        key: K,
        count: usize,
        bytes: u64,
    }
    let mut index: BTreeMap<(String, K), usize> = BTreeMap::new();
    let mut groups: Vec<Group<'a, K>> = Vec::new();
    for (name, key, bytes) in tensors {
        let parts: Vec<_> =
            name.split('.').map(|part| (part, part.parse::<u64>().ok().map(|number| (number, number)))).collect();
        let stem: Vec<&str> = parts.iter().map(|&(part, range)| if range.is_some() { "#" } else { part }).collect();
        let at = *index.entry((stem.join("."), key.clone())).or_insert(groups.len());
        match groups.get_mut(at) {
            None => groups.push(Group { parts, key, count: 1, bytes }),
            Some(group) => {
                group.count += 1;
                group.bytes = group.bytes.saturating_add(bytes);
                for ((_, mine), (_, new)) in group.parts.iter_mut().zip(parts) {
                    if let (Some((low, high)), Some((number, _))) = (mine, new) {
                        (*low, *high) = ((*low).min(number), (*high).max(number));
                    }
                }
            }
        }
    }
    let named = |group: Group<'_, K>| {
        let part = |&(part, range): &(&str, Option<(u64, u64)>)| match range {
            Some((low, high)) if low != high => format!("{{{low}-{high}}}"),
            _ => part.to_owned(),
        };
        let name = group.parts.iter().map(part).collect::<Vec<_>>().join(".");
        Pattern { name, key: group.key, count: group.count, bytes: group.bytes }
    };
    groups.into_iter().map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_found_in_both_styles_of_names() {
        assert_eq!(layer_of("model.layers.12.mlp.experts.3.w1.weight"), Some(12));
        assert_eq!(layer_of("blk.7.ffn_up_exps.weight"), Some(7));
        assert_eq!(layer_of("lm_head.weight"), None);
        assert!(
            is_expert("model.layers.1.block_sparse_moe.experts.3.w1.weight") && is_expert("blk.7.ffn_up_exps.weight")
        );
        assert!(!is_expert("model.layers.1.mlp.gate.weight"));
    }

    #[test]
    fn names_that_differ_in_numbers_share_a_line_unless_their_shapes_differ() {
        let tensors = [("a.0.w", 1, 10), ("a.1.w", 1, 10), ("a.2.w", 2, 30), ("b.w", 1, 5), ("a.5.w", 1, 10)];
        let lines: Vec<_> = patterns(tensors.into_iter()).into_iter().map(|p| (p.name, p.count, p.bytes)).collect();
        let expected = [("a.{0-5}.w", 3, 30), ("a.2.w", 1, 30), ("b.w", 1, 5)];
        assert_eq!(lines, expected.map(|(name, count, bytes)| (name.to_owned(), count, bytes)));
    }
}
