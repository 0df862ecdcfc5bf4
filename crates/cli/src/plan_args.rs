//! The words of `plan`, `simulate` and `audit`. Their meaning is in the modules of those names.

use crate::args::{EvictArg, PrefetchArg};
use crate::sizes::Size;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

const HARDWARE_HELP: &str = "\
Profiles that come with the program: laptop, desktop-24gb, two-cards, unified, workstation, cloud-t4, cloud-l4,
cloud-a100, cloud-h100; `this` is this machine, measured now, `all` are all that come with the program. Write your own
in TOML: `overspill plan --show-hardware desktop-24gb` prints one to begin with.
Exit codes: 0 done, 1 failed, 2 bad usage, configuration or profile, 3 the model's files are bad or absent,
            4 it does not fit (the smallest budget that works is named), or no machine is as fast as --want.";

/// The model of a plan.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// A Hugging Face directory or a .gguf file
    #[arg(value_name = "MODEL", conflicts_with_all = ["config", "preset"])]
    pub model: Option<PathBuf>,
    /// A model's config.json instead: no weights are needed
    #[arg(long, value_name = "FILE", conflicts_with = "preset")]
    pub config: Option<PathBuf>,
    /// A well-known model's shape by name; an unknown name lists all
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// Element type of the matrices, with --config or --preset
    #[arg(long, value_name = "TYPE", default_value = "q4_k")]
    pub dtype: String,
}

/// What all predictions depend on.
#[derive(Args, Clone, Debug)]
pub struct AssumeArgs {
    /// What computes; auto takes whichever is faster
    #[arg(long, value_enum, default_value_t = PlanDevice::Auto)]
    pub device: PlanDevice,
    /// Tokens of context that there is room for; half of it is full when a token is timed
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    pub ctx: u64,
    /// Tokens of a prompt that are computed together
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub chunk: u64,
    /// How routers of mixtures choose: recent (as recorded ones do), uniform, zipf, sticky:70%, or a recorded trace
    #[arg(long, value_name = "HABIT|FILE.csv", default_value = "recent")]
    pub routing: String,
    /// Threads, of this machine when it is planned for, and of the planner [default: the cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub threads: Option<u64>,
    /// Cut models as finely as the engine does: slower, and exact to the block
    #[arg(long)]
    pub fine: bool,
}

/// Arguments of `plan`.
#[derive(Args, Debug)]
#[command(after_help = HARDWARE_HELP)]
pub struct PlanArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A profile's name or file; may be repeated to compare machines [default: this]
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub hardware: Vec<String>,
    /// Bytes of GPU memory for weights, KV cache and scratch [default: what the machine has, less a reserve]
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<Size>,
    /// Bytes of host memory for weights [default: what the machine has, less a reserve]
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<Size>,
    /// Decoded tokens per second that are wanted: names the cheapest machine that reaches them
    #[arg(long, value_name = "T", value_parser = rate)]
    pub want: Option<f64>,
    #[command(flatten)]
    pub assume: AssumeArgs,
    /// Print a profile that comes with the program, or with `this` what MODEL meets on this machine, measured now; and
    /// do nothing else
    #[arg(long, value_name = "NAME", conflicts_with_all = ["hardware", "vram", "ram", "want", "json"])]
    pub show_hardware: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `simulate`.
#[derive(Args, Debug)]
#[command(after_help = HARDWARE_HELP)]
pub struct SimulateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Profiles' names or files, separated by commas [default: this]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub hardware: Vec<String>,
    /// Budgets of GPU memory, such as 8GiB,16GiB or 10%..100%:10% [default: what the machine has]
    #[arg(long, value_name = "LIST")]
    pub vram: Option<String>,
    /// Budgets of host memory for weights
    #[arg(long, value_name = "LIST")]
    pub ram: Option<String>,
    /// Eviction policies
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_value = "auto")]
    pub evict: Vec<EvictArg>,
    /// Prefetch policies
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_value = "auto")]
    pub prefetch: Vec<PrefetchArg>,
    #[command(flatten)]
    pub assume: AssumeArgs,
    /// Simulate a chunk of a prompt instead of decoding
    #[arg(long)]
    pub prefill: bool,
    /// Form of the result
    #[arg(long, short, value_enum, default_value_t = OutputArg::Table)]
    pub output: OutputArg,
    /// Sweep over more than 100000 points without being asked
    #[arg(long)]
    pub yes: bool,
    /// The same as --output json
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `audit`.
#[derive(Args, Debug)]
pub struct AuditArgs {
    /// A Hugging Face directory or a .gguf file
    pub model: PathBuf,
    /// Budget of host memory whose risks to look at [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<Size>,
    /// Don't read the weights: duplicates are not looked for
    #[arg(long)]
    pub no_read: bool,
    /// Lines of each table
    #[arg(long, value_name = "N", default_value_t = 12, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub top: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// What computes, in a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlanDevice {
    /// Whichever is faster
    Auto,
    /// The GPUs
    Gpu,
    /// The CPU
    Cpu,
}

/// Forms of a sweep's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputArg {
    /// For people
    Table,
    /// A table of Markdown
    Md,
    /// Comma-separated values
    Csv,
    /// One object
    Json,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value > 0.0 => Ok(value),
        _ => Err("a number above 0 is wanted, such as 7.5".to_owned()),
    }
}
