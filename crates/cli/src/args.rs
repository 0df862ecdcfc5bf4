//! The words of the command line. Their meaning is in the modules of the same names; here they are only parsed and
//! checked one by one.

use crate::bench::{Counts, Sizes};
use crate::log::LogLevel;
use crate::plan_args::{AuditArgs, OutputArg, PlanArgs, SimulateArgs};
use crate::sizes::Size;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

const EXIT_CODES: &str = "\
Sizes: 512MiB, 4GiB, 1.5GB, a number of bytes, or 50% of the model's weights.
Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 the model's files are bad or absent,
            4 it does not fit (the smallest budget that works is named), 130 after Ctrl-C.";

/// Runs models that are larger than memory: weights are paged between GPU, RAM and NVMe.
#[derive(Debug, Parser)]
#[command(name = "overspill", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Tell on standard error what the engine does: off, error, warn, info, debug or trace [default: the variable
    /// OVERSPILL_LOG, else off]
    #[arg(long, global = true, value_enum, value_name = "LEVEL", hide_possible_values = true)]
    pub log: Option<LogLevel>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generate text (or token ids) within budgets of memory
    Run(Box<RunArgs>),
    /// Measure combinations of budgets, policies and readers against what the wires allow
    Bench(Box<BenchArgs>),
    /// Watch a run, in this terminal: tiers, wires, hits, stalls, what is where
    Top(TopArgs),
    /// Show what a model consists of and what of it fits where
    Inspect(InspectArgs),
    /// Show what this machine offers: adapters, I/O, limits, the speed of each wire
    Doctor(DoctorArgs),
    /// Write a synthetic model with random weights
    Synth(SynthArgs),
    /// Predict what a model would do on a machine, and what a better one would bring
    Plan(Box<PlanArgs>),
    /// Sweep a model over budgets, policies and machines in virtual time
    Simulate(Box<SimulateArgs>),
    /// Show what of a model costs most, what could be saved, and what may go wrong
    Audit(AuditArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the manual page (roff)
    Man,
}

impl Command {
    /// Whether results, and so errors too, are wanted as JSON.
    pub fn json(&self) -> bool {
        match self {
            Self::Run(args) => args.json,
            Self::Bench(args) => args.output == BenchOutput::Json,
            Self::Top(args) => args.json,
            Self::Inspect(args) => args.json,
            Self::Doctor(args) => args.json,
            Self::Synth(args) => args.json,
            Self::Plan(args) => args.json,
            Self::Simulate(args) => args.json || args.output == OutputArg::Json,
            Self::Audit(args) => args.json,
            Self::Completions(_) | Self::Man => false,
        }
    }

    /// Whether it may look for GPUs.
    pub fn looks_at_adapters(&self) -> bool {
        match self {
            Self::Run(args) => args.placement.device != DeviceArg::Cpu,
            Self::Bench(args) => args.device.iter().any(|device| *device != DeviceArg::Cpu),
            Self::Inspect(_) | Self::Doctor(_) => true,
            Self::Plan(_) | Self::Simulate(_) | Self::Audit(_) => false,
            Self::Synth(_) | Self::Top(_) | Self::Completions(_) | Self::Man => false,
        }
    }
}

/// Arguments of `run`.
#[derive(Args, Debug)]
#[command(after_help = EXIT_CODES, args_override_self = true)]
pub struct RunArgs {
    /// A Hugging Face directory (config.json, tokenizer.json, *.safetensors) or a .gguf file
    pub model: PathBuf,
    /// The text to go on from [default: standard input, if it is no terminal]
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_ids", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// The token ids to go on from; needs no tokenizer
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', num_args = 1)]
    pub prompt_ids: Option<Vec<u32>>,
    /// How many tokens to generate at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub placement: PlacementArgs,
    /// Room for the KV cache when the CPU computes, beside --ram [default: what --ctx needs]
    #[arg(long, value_name = "SIZE")]
    pub kv: Option<Size>,
    /// Tokens of context, prompt included [default: prompt and new tokens, at most what the model was made for]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub ctx: Option<u64>,
    /// Precision of activations that meet quantised weights on a CPU
    #[arg(long, value_enum, default_value_t = ActivationsArg::Q8)]
    pub activations: ActivationsArg,
    /// Threads that compute [default: the cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub threads: Option<u64>,
    /// Write what the engine does (compute, stalls, reads, evictions, predictions) to a file, for Perfetto or Chrome
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Show the run in this terminal while it goes on, as `overspill top` does; the text is printed when it has ended
    #[arg(long)]
    pub top: bool,
    /// Write metrics to a file every second, in Prometheus' text format
    #[arg(long, value_name = "FILE")]
    pub metrics: Option<PathBuf>,
    /// Write which experts each token uses to a file, for `overspill plan --routing FILE`
    #[arg(long, value_name = "FILE.csv")]
    pub record_routing: Option<PathBuf>,
    /// Also give the logits after the prompt's last token (with --json)
    #[arg(long, requires = "json")]
    pub logits: bool,
    /// Print one JSON object instead of the text
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `bench`.
#[derive(Args, Debug)]
#[command(after_help = BENCH_HELP, args_override_self = true)]
pub struct BenchArgs {
    /// Models: Hugging Face directories or .gguf files
    #[arg(required = true, value_name = "MODEL")]
    pub models: Vec<PathBuf>,
    /// Bytes of GPU memory [default: what is free, less a reserve]
    #[arg(long, value_name = "LIST")]
    pub vram: Option<Sizes>,
    /// Bytes of host memory for weights [default: what is free, less a reserve]
    #[arg(long, value_name = "LIST")]
    pub ram: Option<Sizes>,
    /// Which block goes when room is needed
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_value = "auto")]
    pub evict: Vec<EvictArg>,
    /// Whether blocks are read before they are asked for
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_value = "auto")]
    pub prefetch: Vec<PrefetchArg>,
    /// How files are read
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_value = "auto")]
    pub io: Vec<IoArg>,
    /// What computes
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_value = "auto")]
    pub device: Vec<DeviceArg>,
    /// Part of an adapter's name, as `overspill doctor` lists them; a software one must be named
    #[arg(long, value_name = "NAME")]
    pub adapter: Option<String>,
    /// Threads that compute [default: the cores]
    #[arg(long, value_name = "LIST")]
    pub threads: Option<Counts>,
    /// Tokens of the prompt
    #[arg(long, value_name = "LIST", default_value = "16")]
    pub prompt_tokens: Counts,
    /// Tokens to generate; the first comes from the prompt, the others count as decoded
    #[arg(long, short = 'n', value_name = "LIST", default_value = "33")]
    pub max_new_tokens: Counts,
    /// Precision of activations that meet quantised weights on a CPU
    #[arg(long, value_enum, default_value_t = ActivationsArg::Q8)]
    pub activations: ActivationsArg,
    /// Whether weights in host memory lie in huge pages; auto takes them where the system allows it
    #[arg(long, value_enum, default_value_t = HugePagesArg::Auto)]
    pub huge_pages: HugePagesArg,
    /// How often each configuration is run
    #[arg(long, short = 'r', value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub repetitions: u64,
    /// How often each is run before that, without being counted
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=10_000))]
    pub warmup: u64,
    /// Drop the models' files from the page cache before each run
    #[arg(long)]
    pub cold: bool,
    /// Take so many other prompts of the same length in before: what fits is in memory then
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "1",
          default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(u64).range(..=1000))]
    pub rehearse: u64,
    /// How long each wire is measured, before and after
    #[arg(long, value_name = "S", default_value = "1", value_parser = seconds)]
    pub probe_seconds: Seconds,
    /// What is printed
    #[arg(long, short, value_enum, value_name = "FORM", default_value_t = BenchOutput::Table)]
    pub output: BenchOutput,
    /// Write a page with charts, for a browser
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    /// Keep every run in a new file, one JSON object a line
    #[arg(long, value_name = "FILE", conflicts_with = "resume")]
    pub save: Option<PathBuf>,
    /// Go on with a benchmark that was interrupted: run what its file lacks
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
    /// Compare with results of --save; exit with 1 if something became slower
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// How much slower is a regression
    #[arg(long, value_name = "P%", default_value = "10%", value_parser = threshold)]
    pub threshold: Threshold,
    /// Do not ask back when there are more than 1,000 configurations
    #[arg(long, short)]
    pub yes: bool,
}

const BENCH_HELP: &str = "\
Lists: 25%,50%,100%   ranges: 10%..100%:10%, 1GiB..4GiB:512MiB, 1..8:1
Every combination is run. Repetitions are interleaved, and every other one goes backwards.
Exit codes as of `overspill run`; 1 also for a regression against --baseline.";

/// Seconds, from a hundredth up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seconds(pub f64);

/// Percent, from 0 up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold(pub f64);

/// What `bench` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchOutput {
    /// A table for people
    Table,
    /// A table in Markdown
    Md,
    /// Comma-separated values, in base units
    Csv,
    /// One JSON object
    Json,
    /// One JSON object for each run, as it ends
    Jsonl,
}

/// Arguments of `top`.
#[derive(Args, Debug)]
pub struct TopArgs {
    /// The process of the run, or its status file [default: the run that began last]
    #[arg(value_name = "PID|FILE")]
    pub target: Option<String>,
    /// Seconds between two looks
    #[arg(long, value_name = "S", default_value = "0.5", value_parser = seconds)]
    pub interval: Seconds,
    /// Print the status once, as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// How the next token is chosen.
#[derive(Args, Debug)]
pub struct SamplingArgs {
    /// 0 always takes the likeliest token [default: 0 with --prompt-ids, else the model's, else 0.8]
    #[arg(long, value_name = "T", value_parser = temperature, allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Choose among the K likeliest tokens only; 0 for all [default: the model's, else 40]
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Choose among the likeliest tokens that together have this probability [default: the model's, else 0.95]
    #[arg(long, value_name = "P", value_parser = probability)]
    pub top_p: Option<f32>,
    /// Seed of the random choice: the same seed gives the same text
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
}

/// Where weights are and how they get there.
#[derive(Args, Clone, Debug)]
pub struct PlacementArgs {
    /// What computes; auto takes a real GPU if there is one
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    pub device: DeviceArg,
    /// Part of an adapter's name, as `overspill doctor` lists them; a software one must be named
    #[arg(long, value_name = "NAME")]
    pub adapter: Option<String>,
    /// Bytes of GPU memory for weights, KV cache and scratch [default: what is free, less a reserve]
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<Size>,
    /// Bytes of host memory for weights [default: what is free, less a reserve]
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<Size>,
    /// Which block goes when room is needed
    #[arg(long, value_enum, default_value_t = EvictArg::Auto)]
    pub evict: EvictArg,
    /// Whether blocks are read before they are asked for
    #[arg(long, value_enum, default_value_t = PrefetchArg::Auto)]
    pub prefetch: PrefetchArg,
    /// How files are read
    #[arg(long, value_enum, default_value_t = IoArg::Auto)]
    pub io: IoArg,
    /// Whether weights in host memory lie in huge pages; auto takes them where the system allows it
    #[arg(long, value_enum, default_value_t = HugePagesArg::Auto)]
    pub huge_pages: HugePagesArg,
    /// How layers are divided between processors; auto computes all of them on --device
    #[arg(long, value_enum, default_value_t = SplitArg::Auto)]
    pub split: SplitArg,
}

/// Arguments of `inspect`.
#[derive(Args, Debug)]
#[command(after_help = EXIT_CODES)]
pub struct InspectArgs {
    /// A Hugging Face directory or a .gguf file
    pub model: PathBuf,
    /// List every tensor by itself, not one line for the same tensor of all layers
    #[arg(long)]
    pub tensors: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// The disk to measure: a model, any file of 16 MiB or more, or a directory to write a temporary file of 256 MiB into
    #[arg(long, value_name = "PATH", default_value = ".")]
    pub path: PathBuf,
    /// Measure nothing, only look
    #[arg(long)]
    pub no_bench: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `synth`.
#[derive(Args, Debug)]
pub struct SynthArgs {
    #[command(flatten)]
    pub shape: SynthShape,
    /// Element type of the matrices (norms stay f32 where quantised types demand it)
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    pub dtype: String,
    /// File format
    #[arg(long, value_enum, default_value_t = FormatArg::Safetensors)]
    pub format: FormatArg,
    /// Seed of the weights: the same seed gives the same bytes
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// How unequally experts are chosen, 0 to 8; 0 makes all alike, 1 is like the frequency of words
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub expert_skew: f32,
    /// Where to write: a directory for safetensors, a .gguf file for GGUF
    #[arg(long, short, value_name = "PATH")]
    pub output: PathBuf,
    /// Write over what is there
    #[arg(long)]
    pub force: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Where a synthetic model's shape comes from.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct SynthShape {
    /// A shape by name; an unknown name lists all
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// The config.json of any supported model
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Arguments of `completions`.
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// A real GPU if there is one, else the CPU
    Auto,
    /// A GPU
    Gpu,
    /// The CPU; no GPU tier is made
    Cpu,
}

/// Eviction policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EvictArg {
    /// planned where the order of use is known, else lru
    Auto,
    /// The least recently used block
    Lru,
    /// The block whose next use is furthest away
    NextUse,
    /// A set of blocks stays, spread evenly between those that stream
    Planned,
}

/// Prefetch policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PrefetchArg {
    /// As far ahead as keeps the disk busy
    Auto,
    /// Only what is asked for
    Off,
}

/// I/O backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IoArg {
    /// The best that works here
    Auto,
    /// io_uring with direct I/O
    Uring,
    /// Positional reads by a pool of threads
    Pread,
    /// A memory map
    Mmap,
}

/// Huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum HugePagesArg {
    /// Before the first read where they can be had cheaply, else when nothing is read
    Auto,
    /// At any price, before the first read: a slower start, and every later pass faster
    Always,
    /// Never asked for
    Off,
}

/// Division of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SplitArg {
    /// All layers on the device
    Auto,
}

/// Precision of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ActivationsArg {
    /// Single precision everywhere
    F32,
    /// 8 bits where weights are quantised; float weights still meet single precision
    Q8,
}

/// Formats of synthetic models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// A directory with config.json and safetensors
    Safetensors,
    /// One GGUF file
    Gguf,
}

fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("a number from 0 up is wanted, such as 0.8".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Seconds, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.01..=3600.0).contains(&value) => Ok(Seconds(value)),
        _ => Err("a number of seconds from 0.01 to 3600 is wanted".to_owned()),
    }
}

fn threshold(text: &str) -> Result<Threshold, String> {
    match text.strip_suffix('%').unwrap_or(text).trim().parse::<f64>() {
        Ok(value) if (0.0..=100.0).contains(&value) => Ok(Threshold(value)),
        _ => Err("a percentage from 0 to 100 is wanted, such as 5%".to_owned()),
    }
}

fn probability(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("a number above 0 and up to 1 is wanted, such as 0.95".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_contracts_words_are_understood() {
        let line = "overspill run m --prompt-ids 1,2,3 --max-new-tokens 4 --temperature 0.5 --top-k 3 --top-p 0.9 --seed 7 \
             --device gpu --adapter llvm --vram 50% --ram 1.5GB --evict next-use --prefetch off --io uring --kv 1MiB \
             --ctx 64 --split auto --activations f32 --threads 2 --trace t --logits --json";
        let Command::Run(args) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else { panic!() };
        assert_eq!(args.prompt_ids, Some(vec![1, 2, 3]));
        assert_eq!(args.placement.ram, Some(Size::Bytes(1_500_000_000)));
        assert_eq!(args.placement.vram, Some(Size::Percent(50.0)));
        assert_eq!((args.placement.evict, args.placement.io), (EvictArg::NextUse, IoArg::Uring));
        let line = "overspill bench m n --vram 1GiB,2GiB --ram 10%..100%:10% --evict lru,planned --prefetch auto,off --io uring,pread \
             --device cpu,gpu --threads 1,2 --prompt-tokens 8,16 --max-new-tokens 4 -r 5 --warmup 1 --cold --rehearse -o md \
             --report r.html --save s --baseline b --threshold 5% --yes";
        let Command::Bench(args) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else { panic!() };
        assert_eq!((args.models.len(), args.ram.unwrap().0.len(), args.threshold), (2, 10, Threshold(5.0)));
        assert_eq!((args.evict.len(), args.prefetch.len(), args.io.len(), args.repetitions), (2, 2, 2, 5));
        let line = "overspill synth --preset p --dtype q4_0 --format gguf --seed 1 -o x";
        assert!(Cli::try_parse_from(line.split_whitespace()).is_ok());
    }

    #[test]
    fn nonsense_is_refused_word_by_word() {
        for line in [
            "run",
            "run m --temperature -1",
            "run m --temperature nan",
            "run m --top-p 0",
            "run m --top-p 1.5",
            "run m --ctx 0",
            "run m --threads 0",
            "run m --ram lots",
            "run m --evict fifo",
            "run m --prompt a --prompt-ids 1",
            "run m --prompt-ids 1,x",
            "run m --prompt-ids -1",
            "run m --logits",
            "bench",
            "bench m --ram 10%..100%",
            "bench m --evict lru,fifo",
            "bench m -r 0",
            "bench m --threads 0",
            "bench m --threshold -5%",
            "bench m --probe-seconds 0",
            "bench m --save a --resume b",
            "bench m -o xml",
            "top --interval 0",
            "synth -o x",
            "synth --preset a --config b -o x",
            "completions tcl",
        ] {
            assert!(Cli::try_parse_from(["overspill"].into_iter().chain(line.split(' '))).is_err(), "{line}");
        }
    }
}
