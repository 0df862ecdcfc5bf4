//! What the tensors are called, by file format: one table each.
//!
//! `{e}` stands for an expert's number. Where there are several names, files written by different programs differ.

/// The names of one format. Those of a layer follow [`Names::layer`].
#[derive(Debug)]
pub(super) struct Names {
    /// What may come before all names but the head's.
    pub(super) prefixes: &'static [&'static str],
    pub(super) embedding: &'static str,
    pub(super) final_norm: &'static str,
    pub(super) head: &'static str,
    /// A layer's names begin so; `{l}` is its number.
    pub(super) layer: &'static str,
    pub(super) mixer_norm: &'static str,
    pub(super) ffn_norm: &'static str,
    pub(super) q: &'static str,
    pub(super) k: &'static str,
    pub(super) v: &'static str,
    pub(super) o: &'static str,
    pub(super) q_norm: &'static str,
    pub(super) k_norm: &'static str,
    pub(super) gate: &'static str,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
    pub(super) router: &'static [&'static str],
    /// Experts one by one, in tensors of two dimensions: (gate, up, down).
    pub(super) each: &'static [(&'static str, &'static str, &'static str)],
    /// Experts together, in tensors of three dimensions: (gate, up, down).
    pub(super) fused: &'static [(&'static str, &'static str, &'static str)],
    /// Experts together, and the gate with what it gates: (gate and up, down).
    pub(super) fused_gate_up: &'static [(&'static str, &'static str)],
    /// Divisors of rotary frequencies.
    pub(super) rope_divisors: Option<&'static str>,
    /// Tensors that older files carry and that say nothing new: names end so.
    pub(super) redundant: &'static [&'static str],
}

/// Hugging Face.
pub(super) const HF: Names = Names {
    prefixes: &["model.", ""],
    embedding: "embed_tokens.weight",
    final_norm: "norm.weight",
    head: "lm_head.weight",
    layer: "layers.{l}.",
    mixer_norm: "input_layernorm.weight",
    ffn_norm: "post_attention_layernorm.weight",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    o: "self_attn.o_proj",
    q_norm: "self_attn.q_norm.weight",
    k_norm: "self_attn.k_norm.weight",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
    router: &["mlp.gate.weight", "block_sparse_moe.gate.weight"],
    each: &[
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight", "mlp.experts.{e}.down_proj.weight"),
        (
            "block_sparse_moe.experts.{e}.w1.weight",
            "block_sparse_moe.experts.{e}.w3.weight",
            "block_sparse_moe.experts.{e}.w2.weight",
        ),
    ],
    fused: &[],
    fused_gate_up: &[
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    ],
    rope_divisors: None,
    redundant: &["rotary_emb.inv_freq"],
};

/// GGUF.
pub(super) const GGUF: Names = Names {
    prefixes: &[""],
    embedding: "token_embd.weight",
    final_norm: "output_norm.weight",
    head: "output.weight",
    layer: "blk.{l}.",
    mixer_norm: "attn_norm.weight",
    ffn_norm: "ffn_norm.weight",
    q: "attn_q",
    k: "attn_k",
    v: "attn_v",
    o: "attn_output",
    q_norm: "attn_q_norm.weight",
    k_norm: "attn_k_norm.weight",
    gate: "ffn_gate",
    up: "ffn_up",
    down: "ffn_down",
    router: &["ffn_gate_inp.weight"],
    each: &[("ffn_gate.{e}.weight", "ffn_up.{e}.weight", "ffn_down.{e}.weight")],
    fused: &[("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")],
    fused_gate_up: &[("ffn_gate_up_exps.weight", "ffn_down_exps.weight")],
    rope_divisors: Some("rope_freqs.weight"),
    redundant: &["attn_rot_embd.weight", "attn_rot_embd"],
};
