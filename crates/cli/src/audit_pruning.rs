//! What leaving parts of a model out would free: layers, experts, rows of the vocabulary, and copies of what is there
//! already. It says bytes, not quality: only the last loses nothing.

use crate::audit_duplicates::Duplicates;
use crate::layers;
use overspill::{Catalog, Layout, Tensor};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Rows of the vocabulary that are counted together.
const ROWS: u64 = 1000;

/// A part that can be left out.
#[derive(Debug, PartialEq, Serialize)]
pub struct Pruning {
    /// `layer`, `expert`, `vocabulary`, `duplicate`.
    pub kind: &'static str,
    /// For people.
    pub what: String,
    /// What one of them frees.
    pub frees_bytes: u64,
    /// What a token reads less then; 0 for what a token reads none or little of.
    pub reads_less_bytes: u64,
    /// How many there are to choose from.
    pub of: u64,
    /// What it costs besides, and what to do about it.
    pub cost: &'static str,
}

/// All of them, what frees most first. `experts_used` of a layer's experts answer for a token.
pub fn find(catalog: &Catalog, experts_used: Option<u64>, duplicates: Option<&Duplicates>) -> Vec<Pruning> {
    let layers_of = parts(catalog);
    let mut found: Vec<Pruning> = [layer(&layers_of, experts_used), expert(&layers_of), vocabulary(catalog)]
        .into_iter()
        .flatten()
        .chain(duplicates.and_then(|found| copies(catalog, found)))
        .collect();
    found.sort_by_key(|pruning| std::cmp::Reverse(pruning.frees_bytes));
    found
}

/// Bytes of a layer, of its experts, and how many experts these are.
#[derive(Clone, Debug, Default)]
struct Parts {
    bytes: u64,
    expert_bytes: u64,
    /// Experts of a fused tensor.
    fused: u64,
    /// Numbers of experts whose tensors are apart.
    numbers: BTreeSet<u64>,
}

impl Parts {
    fn experts(&self) -> u64 {
        self.fused.max(self.numbers.len() as u64)
    }
}

/// By layer.
fn parts(catalog: &Catalog) -> BTreeMap<u32, Parts> {
    let mut layers_of: BTreeMap<u32, Parts> = BTreeMap::new();
    for tensor in catalog.tensors() {
        let Some(layer) = layers::layer_of(&tensor.name) else { continue };
        let parts = layers_of.entry(layer).or_default();
        parts.bytes = parts.bytes.saturating_add(tensor.bytes);
        let units = match tensor.layout {
            Layout::Cut { units, .. } => u64::from(units),
            _ => 1,
        };
        let number: Option<u64> =
            tensor.name.split("experts.").nth(1).and_then(|rest| rest.split('.').next()?.parse().ok());
        if units > 1 || layers::is_expert(&tensor.name) && number.is_some() {
            parts.expert_bytes = parts.expert_bytes.saturating_add(tensor.bytes);
            parts.fused = parts.fused.max(if units > 1 { units } else { 0 });
            parts.numbers.extend(number);
        }
    }
    layers_of
}

/// The layer that frees most. Several of one size: the one in the middle, which is said to be missed least.
fn layer(layers_of: &BTreeMap<u32, Parts>, experts_used: Option<u64>) -> Option<Pruning> {
    let most = layers_of.values().map(|parts| parts.bytes).max()?;
    let largest: Vec<u32> = layers_of.iter().filter(|(_, p)| p.bytes == most).map(|(&layer, _)| layer).collect();
    let number = *largest.get(largest.len() / 2)?;
    let parts = layers_of.get(&number)?;
    let (experts, bytes) = (parts.experts(), u128::from(parts.expert_bytes));
    let used_bytes = match experts_used {
        Some(used) if experts > 0 => (bytes * u128::from(used.min(experts)) / u128::from(experts)) as u64,
        _ => parts.expert_bytes,
    };
    Some(Pruning {
        kind: "layer",
        what: format!("one layer of {}, such as {number}", layers_of.len()),
        frees_bytes: parts.bytes,
        reads_less_bytes: parts.bytes - parts.expert_bytes + used_bytes,
        of: layers_of.len() as u64,
        cost: "answers change: leave out the one whose loss raises perplexity least, then fine-tune",
    })
}

/// One expert of each layer that has some.
fn expert(layers_of: &BTreeMap<u32, Parts>) -> Option<Pruning> {
    let with: Vec<&Parts> = layers_of.values().filter(|parts| parts.experts() > 1).collect();
    let experts = with.iter().map(|parts| parts.experts()).min()?;
    Some(Pruning {
        kind: "expert",
        what: format!("one expert of {experts} in each of {} layers", with.len()),
        frees_bytes: with.iter().map(|parts| parts.expert_bytes / parts.experts()).fold(0, u64::saturating_add),
        reads_less_bytes: 0,
        of: experts,
        cost: "answers change where it was chosen: record which are chosen least, leave out those, renumber the router",
    })
}

/// A thousand rows of every table as long as the vocabulary: embeddings, and the head if it is one of its own.
fn vocabulary(catalog: &Catalog) -> Option<Pruning> {
    let table = catalog.tables().iter().min_by_key(|table| table.tensor)?;
    let rows = table.rows;
    let of_rows = |tensor: &&Tensor| {
        layers::layer_of(&tensor.name).is_none() && tensor.shape.len() == 2 && tensor.shape.first() == Some(&rows)
    };
    let taken = ROWS.min(rows);
    let tensors: Vec<&Tensor> = catalog.tensors().iter().filter(of_rows).collect();
    // Of the embeddings a token reads a row, of the head all rows.
    let read_whole = tensors.iter().copied().filter(|tensor| tensor.layout != Layout::TableOnly);
    Some(Pruning {
        kind: "vocabulary",
        what: format!("{taken} of {rows} words of the vocabulary"),
        frees_bytes: rows_bytes(tensors.iter().copied(), taken),
        reads_less_bytes: rows_bytes(read_whole, taken),
        of: rows,
        cost: "the tokenizer must lose the same words: take those of scripts that are never used",
    })
}

/// So many rows of each tensor.
fn rows_bytes<'a>(tensors: impl Iterator<Item = &'a Tensor>, rows: u64) -> u64 {
    tensors.map(|tensor| tensor.row_bytes.saturating_mul(rows)).fold(0, u64::saturating_add)
}

/// All copies but one of what is stored more than once.
fn copies(catalog: &Catalog, duplicates: &Duplicates) -> Option<Pruning> {
    let largest = duplicates.groups.first()?;
    let is_table =
        |name: &String| catalog.tensors().iter().any(|tensor| tensor.table.is_some() && tensor.name == *name);
    let tied = largest.tensors.iter().any(is_table);
    let count: u64 = duplicates.groups.iter().map(|group| group.tensors.len() as u64 - 1).sum();
    Some(Pruning {
        kind: "duplicate",
        what: if tied { "the head that is a copy of the embeddings, and other copies" } else { "copies of tensors" }
            .to_owned(),
        frees_bytes: duplicates.wasted_bytes,
        reads_less_bytes: 0,
        of: count,
        cost: if tied {
            "nothing is lost: set tie_word_embeddings and leave the head's tensor out"
        } else {
            "nothing is lost: store one, if the architecture lets tensors be shared"
        },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::audit_duplicates::Group;
    use overspill::{CatalogBuilder, DType, FileId, RawTensor, Role};

    /// Two layers; experts apart or fused; a table and a head of 2000 words.
    fn catalog(fused: bool) -> Catalog {
        let mut tensors = vec![
            ("embed.weight".to_owned(), vec![2000, 64], Role::Table),
            ("lm_head.weight".to_owned(), vec![2000, 64], Role::Matrix),
        ];
        for layer in 0..2 {
            tensors.push((format!("model.layers.{layer}.attn.weight"), vec![64, 64], Role::Matrix));
            if fused {
                tensors.push((format!("model.layers.{layer}.ffn_exps.weight"), vec![4, 128, 64], Role::Experts));
            } else {
                tensors.extend((0..4).map(|expert| {
                    (format!("model.layers.{layer}.mlp.experts.{expert}.up.weight"), vec![128, 64], Role::Matrix)
                }));
            }
        }
        let mut builder = CatalogBuilder::new();
        builder.file("m", 1 << 30);
        let mut offset = 0;
        for (name, shape, role) in tensors {
            let bytes: u64 = shape.iter().product::<u64>() * 2;
            builder.tensor(RawTensor { name, dtype: DType::F16, shape, file: FileId(0), offset, role });
            offset += bytes;
        }
        builder.build().unwrap()
    }

    #[test]
    fn each_part_frees_what_it_weighs() {
        for fused in [false, true] {
            let catalog = catalog(fused);
            let found = find(&catalog, Some(2), None);
            let of = |kind: &str| found.iter().find(|pruning| pruning.kind == kind).unwrap();
            let (attention, expert) = (64 * 64 * 2, 128 * 64 * 2);
            assert_eq!((of("layer").frees_bytes, of("layer").of), (attention + 4 * expert, 2), "fused: {fused}");
            assert_eq!(of("layer").reads_less_bytes, attention + 2 * expert, "two of four experts are chosen");
            assert_eq!((of("expert").frees_bytes, of("expert").of), (2 * expert, 4), "one in each layer");
            assert_eq!((of("vocabulary").frees_bytes, of("vocabulary").of), (2 * 1000 * 64 * 2, 2000));
            assert_eq!(of("vocabulary").reads_less_bytes, 1000 * 64 * 2, "the head's rows");
            assert!(found.is_sorted_by_key(|pruning| std::cmp::Reverse(pruning.frees_bytes)));
            assert!(!found.iter().any(|pruning| pruning.kind == "duplicate"));
        }
    }

    #[test]
    fn a_copy_of_the_embeddings_is_named() {
        let group = Group { tensors: vec!["embed.weight".into(), "lm_head.weight".into()], bytes: 7 };
        let duplicates = Duplicates { groups: vec![group], wasted_bytes: 7, read_bytes: 0 };
        let found = find(&catalog(true), None, Some(&duplicates));
        let copy = found.iter().find(|pruning| pruning.kind == "duplicate").unwrap();
        assert!(copy.what.contains("head") && copy.cost.contains("tie_word_embeddings") && copy.frees_bytes == 7);
        let none = Duplicates { groups: vec![], wasted_bytes: 0, read_bytes: 0 };
        assert!(find(&catalog(true), None, Some(&none)).iter().all(|pruning| pruning.kind != "duplicate"));
    }

    /// A catalog of f16 tensors.
    fn of(tensors: &[(&str, &[u64], Role)]) -> Catalog {
        let mut builder = CatalogBuilder::new();
        builder.file("m", 1 << 30);
        let mut offset = 0;
        for &(name, shape, role) in tensors {
            let (dtype, file) = (DType::F16, FileId(0));
            builder.tensor(RawTensor { name: name.into(), dtype, shape: shape.to_vec(), file, offset, role });
            offset += shape.iter().product::<u64>() * 2;
        }
        builder.build().unwrap()
    }

    #[test]
    fn of_the_embeddings_a_token_reads_a_row_and_of_the_head_all() {
        // The two differ in width, so that one cannot pass for the other.
        let catalog = of(&[("embed.weight", &[3000, 64], Role::Table), ("head.weight", &[3000, 128], Role::Matrix)]);
        let found = find(&catalog, None, None);
        assert_eq!((found[0].frees_bytes, found[0].reads_less_bytes), (1000 * (64 + 128) * 2, 1000 * 128 * 2));
    }

    #[test]
    fn of_layers_alike_the_middle_one_is_named_and_experts_are_the_fewest_of_a_layer() {
        let catalog = of(&[
            ("layers.0.ffn_exps.weight", &[2, 64, 64], Role::Experts),
            ("layers.1.ffn_exps.weight", &[4, 64, 64], Role::Experts),
            ("layers.2.ffn_exps.weight", &[4, 64, 64], Role::Experts),
            ("layers.3.ffn_exps.weight", &[4, 64, 64], Role::Experts),
        ]);
        let found = find(&catalog, None, None);
        let of = |kind: &str| found.iter().find(|pruning| pruning.kind == kind).unwrap();
        assert_eq!(of("layer").what, "one layer of 4, such as 2", "the middle of the three that weigh most");
        assert_eq!((of("expert").of, of("expert").frees_bytes), (2, 4 * 64 * 64 * 2));
    }

    #[test]
    fn one_of_each_group_of_copies_stays() {
        let group = |names: &[&str]| Group { tensors: names.iter().map(|&name| name.into()).collect(), bytes: 8 };
        let groups = vec![group(&["a", "b", "c"]), group(&["d", "e"])];
        let duplicates = Duplicates { groups, wasted_bytes: 24, read_bytes: 0 };
        let found = find(&catalog(true), None, Some(&duplicates));
        let copies = found.iter().find(|pruning| pruning.kind == "duplicate").unwrap();
        assert_eq!((copies.of, copies.what.as_str()), (3, "copies of tensors"));
    }

    #[test]
    fn a_model_without_layers_has_none_to_leave_out() {
        let mut builder = CatalogBuilder::new();
        builder.file("m", 1 << 20);
        let shape = vec![8, 8];
        let (dtype, file, role) = (DType::F32, FileId(0), Role::Matrix);
        builder.tensor(RawTensor { name: "w".into(), dtype, shape, file, offset: 0, role });
        assert_eq!(find(&builder.build().unwrap(), None, None), []);
    }
}
