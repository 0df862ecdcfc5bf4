//! The table of architectures: what is peculiar to each, in one row.
//!
//! What is not here: tensor names ([`super::names`]), and values that a configuration states.

/// Whether a bias is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bias {
    /// If the configuration says so (GGUF: if the tensor is there).
    Configured,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QkNormRule {
    None,
    PerHead,
    WholeWidth,
}

/// Which layers have a sliding window, in a Hugging Face configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WindowRule {
    /// None, whatever the configuration says.
    None,
    /// All, if the configuration states a window.
    All,
    /// All, if the configuration states a window and that it is used.
    AllIfUsed,
    /// Those from `max_window_layers` on, or those listed, if the configuration says that the window is used.
    FromLayer,
}

/// Where the experts' width and weighting come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExpertRule {
    /// The key of the experts' width in a Hugging Face configuration.
    pub(super) width_key: &'static str,
    /// Experts that each token uses, if the configuration doesn't say.
    pub(super) used_default: u64,
    /// Whether weights are scaled to a sum of 1: always or never, or as the configuration says with this default.
    pub(super) normalise: Normalise,
    /// Whether only some layers may have experts (`decoder_sparse_step`, `mlp_only_layers`).
    pub(super) sparse_layers: bool,
}

/// Whether the weights of a token's experts are scaled to a sum of 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Normalise {
    Always,
    /// `norm_topk_prob`; the value is for GGUF files, which don't say, and its default.
    Configured {
        default: bool,
        gguf: bool,
    },
}

/// One architecture.
#[derive(Debug)]
pub(super) struct Family {
    /// Its name in reports.
    pub(super) name: &'static str,
    /// `model_type` of config.json.
    pub(super) hf: &'static str,
    /// Its class in `architectures` of config.json.
    pub(super) hf_class: &'static str,
    /// `general.architecture` of GGUF, if it has a name of its own there.
    pub(super) gguf: Option<&'static str>,
    /// Biases of queries, keys and values.
    pub(super) qkv_bias: Bias,
    /// Bias of attention's output.
    pub(super) o_bias: Bias,
    /// Biases of the dense network.
    pub(super) mlp_bias: Bias,
    pub(super) qk_norm: QkNormRule,
    pub(super) window: WindowRule,
    pub(super) experts: Option<ExpertRule>,
    /// Whether `clip_qkv` exists.
    pub(super) clips: bool,
    /// `rms_norm_eps` if the configuration doesn't say.
    pub(super) eps_default: f64,
    /// `rope_theta` if the configuration doesn't say.
    pub(super) theta_default: f64,
    /// GGUF files have the rows of queries and keys permuted for neighbouring pairs.
    pub(super) gguf_neighbours: bool,
}

const PLAIN: Family = Family {
    name: "llama",
    hf: "llama",
    hf_class: "LlamaForCausalLM",
    gguf: Some("llama"),
    qkv_bias: Bias::Configured,
    o_bias: Bias::Configured,
    mlp_bias: Bias::Configured,
    qk_norm: QkNormRule::None,
    window: WindowRule::None,
    experts: None,
    clips: false,
    eps_default: 1e-6,
    theta_default: 10_000.0,
    gguf_neighbours: true,
};

const MIXTRAL_EXPERTS: ExpertRule =
    ExpertRule { width_key: "intermediate_size", used_default: 2, normalise: Normalise::Always, sparse_layers: false };

/// All architectures.
pub(super) const FAMILIES: &[Family] = &[
    PLAIN,
    Family {
        name: "mistral",
        hf: "mistral",
        hf_class: "MistralForCausalLM",
        gguf: None,
        qkv_bias: Bias::Never,
        o_bias: Bias::Never,
        mlp_bias: Bias::Never,
        window: WindowRule::All,
        ..PLAIN
    },
    Family {
        name: "mixtral",
        hf: "mixtral",
        hf_class: "MixtralForCausalLM",
        gguf: None,
        qkv_bias: Bias::Never,
        o_bias: Bias::Never,
        mlp_bias: Bias::Never,
        window: WindowRule::All,
        experts: Some(MIXTRAL_EXPERTS),
        eps_default: 1e-5,
        theta_default: 1e6,
        ..PLAIN
    },
    Family {
        name: "qwen2",
        hf: "qwen2",
        hf_class: "Qwen2ForCausalLM",
        gguf: Some("qwen2"),
        qkv_bias: Bias::Always,
        o_bias: Bias::Never,
        mlp_bias: Bias::Never,
        window: WindowRule::FromLayer,
        gguf_neighbours: false,
        ..PLAIN
    },
    Family {
        name: "qwen3",
        hf: "qwen3",
        hf_class: "Qwen3ForCausalLM",
        gguf: Some("qwen3"),
        mlp_bias: Bias::Never,
        qk_norm: QkNormRule::PerHead,
        window: WindowRule::FromLayer,
        gguf_neighbours: false,
        ..PLAIN
    },
    Family {
        name: "qwen3moe",
        hf: "qwen3_moe",
        hf_class: "Qwen3MoeForCausalLM",
        gguf: Some("qwen3moe"),
        mlp_bias: Bias::Never,
        qk_norm: QkNormRule::PerHead,
        window: WindowRule::AllIfUsed,
        experts: Some(ExpertRule {
            width_key: "moe_intermediate_size",
            used_default: 8,
            normalise: Normalise::Configured { default: false, gguf: true },
            sparse_layers: true,
        }),
        gguf_neighbours: false,
        ..PLAIN
    },
    Family {
        name: "olmoe",
        hf: "olmoe",
        hf_class: "OlmoeForCausalLM",
        gguf: Some("olmoe"),
        mlp_bias: Bias::Never,
        qk_norm: QkNormRule::WholeWidth,
        experts: Some(ExpertRule {
            width_key: "intermediate_size",
            used_default: 8,
            normalise: Normalise::Configured { default: false, gguf: false },
            sparse_layers: false,
        }),
        clips: true,
        eps_default: 1e-5,
        gguf_neighbours: false,
        ..PLAIN
    },
];

/// Mixtral in a GGUF file calls itself llama, and has experts.
pub(super) const GGUF_LLAMA_EXPERTS: ExpertRule = MIXTRAL_EXPERTS;

/// The names of all architectures, for errors.
pub(super) fn known() -> String {
    FAMILIES.iter().map(|f| f.name).collect::<Vec<_>>().join(", ")
}
