//! Which role a tensor's name and shape give it.
//!
//! Only roles, because they decide how a tensor is stored: what an architecture does with it is the runtime's business.

use overspill_core::{DType, Role};

/// Tables of which a token reads a few rows, by the last parts of their names.
const TABLES: &[&str] = &[
    // transformers
    "embed_tokens.weight",
    "embed_tokens_per_layer.weight",
    "wte.weight",
    "wpe.weight",
    "tok_embeddings.weight",
    // llama.cpp
    "token_embd.weight",
    "per_layer_token_embd.weight",
    "position_embd.weight",
];
/// The tables that serve as the head when the model has none of its own.
const HEAD_TABLES: &[&str] = &["embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "token_embd.weight"];
const HEADS: &[&str] = &["lm_head.weight", "output.weight"];
/// Tensors of more than two dimensions that aren't experts (kernels of short convolutions) are bundled up to this size.
const SMALL_BYTES_MAX: u64 = 1 << 20;

/// Whether `name` is `suffix`, or ends with it at a dot.
fn is(name: &str, suffix: &str) -> bool {
    name.strip_suffix(suffix).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Whether this is the model's own output head.
pub(crate) fn is_head(name: &str) -> bool {
    // `attn_output.weight` and `blk.0.attn.output.weight` are projections, not heads.
    HEADS.iter().any(|head| is(name, head)) && !name.contains("blk.") && !name.contains("layers.")
}

/// The role of a tensor; `tied` says that the embedding table is also the head.
pub(crate) fn role_of(name: &str, dtype: DType, shape: &[u64], tied: bool) -> Role {
    if shape.len() == 2 && TABLES.iter().any(|table| is(name, table)) {
        let is_head_too = tied && HEAD_TABLES.iter().any(|table| is(name, table));
        return if is_head_too { Role::TableAndMatrix } else { Role::Table };
    }
    match shape.len() {
        0 | 1 => Role::Small,
        2 => Role::Matrix,
        _ if name.contains("experts") || name.contains("_exps") => Role::Experts,
        _ => {
            let columns = shape.last().copied().unwrap_or(1);
            let rows = shape.iter().rev().skip(1).try_fold(1u64, |all, &d| all.checked_mul(d));
            let bytes = rows.zip(dtype.row_bytes(columns)).and_then(|(rows, row)| rows.checked_mul(row));
            if bytes.is_some_and(|bytes| bytes <= SMALL_BYTES_MAX) { Role::Small } else { Role::Experts }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_decide_between_table_matrix_and_both() {
        let role = |name, shape: &[u64], tied| role_of(name, DType::F16, shape, tied);
        assert_eq!(role("model.embed_tokens.weight", &[320, 64], false), Role::Table);
        assert_eq!(role("model.embed_tokens.weight", &[320, 64], true), Role::TableAndMatrix);
        assert_eq!(role("token_embd.weight", &[320, 64], true), Role::TableAndMatrix);
        assert_eq!(role("per_layer_token_embd.weight", &[320, 64], true), Role::Table);
        assert_eq!(role("not_embed_tokens.weight", &[320, 64], true), Role::Matrix);
        assert_eq!(role("blk.0.ffn_gate_exps.weight", &[8, 64, 64], false), Role::Experts);
        assert_eq!(role("model.layers.0.mlp.experts.gate_up_proj", &[8, 64, 64], false), Role::Experts);
        assert_eq!(role("model.layers.0.linear_attn.conv1d.weight", &[8192, 1, 4], false), Role::Small);
        assert_eq!(role("model.norm.weight", &[64], false), Role::Small);
        assert_eq!(role("logit_scale", &[], false), Role::Small);
    }

    #[test]
    fn projections_are_not_heads() {
        assert!(is_head("lm_head.weight") && is_head("output.weight") && is_head("language_model.lm_head.weight"));
        assert!(!is_head("blk.0.attn_output.weight") && !is_head("model.layers.0.attention.output.weight"));
        assert!(!is_head("output_norm.weight"));
    }
}
