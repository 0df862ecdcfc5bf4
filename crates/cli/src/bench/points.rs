//! The configurations of a benchmark: every combination of what was asked for, once each.

use crate::args::{BenchArgs, DeviceArg, PlacementArgs, SplitArg};
use crate::execute::{Settings, Setup};
use crate::sizes::{Size, human_bytes};
use clap::ValueEnum;
use overspill_formats::ModelFiles;
use overspill_infer::arch::ModelSpec;
use serde::{Deserialize, Serialize};

/// A configuration by its words, as records name it. Sizes are bytes or `50%`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Point {
    /// The model's path as it was given.
    pub model: String,
    /// `auto`, `cpu` or `gpu`.
    pub device: String,
    /// Part of an adapter's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// `--vram`; absent for what is free.
    pub vram: Option<String>,
    /// `--ram`; absent for what is free.
    pub ram: Option<String>,
    /// `--evict`.
    pub evict: String,
    /// `--prefetch`.
    pub prefetch: String,
    /// `--io`.
    pub io: String,
    /// `--threads`; absent for all cores.
    pub threads: Option<u64>,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens to generate.
    pub max_new_tokens: u64,
    /// Whether the page cache is dropped before each run.
    pub cold: bool,
    /// Whether the prompt was taken in once before it counted.
    #[serde(default)]
    pub rehearsed: u64,
}

/// A configuration, ready to run.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its words.
    pub point: Point,
    /// Which of the models.
    pub model: usize,
    /// Its settings.
    pub setup: Setup,
}

/// How many configurations these arguments are, without making them.
pub fn count(args: &BenchArgs) -> u64 {
    let sizes = |list: &Option<super::lists::Sizes>| list.as_ref().map_or(1, |list| list.0.len() as u64);
    // A CPU has no VRAM to vary.
    let cpus = args.device.iter().filter(|device| **device == DeviceArg::Cpu).count() as u64;
    let devices = cpus.min(1) + (args.device.len() as u64 - cpus).saturating_mul(sizes(&args.vram));
    [
        args.models.len() as u64,
        devices,
        sizes(&args.ram),
        args.evict.len() as u64,
        args.prefetch.len() as u64,
        args.io.len() as u64,
        args.threads.as_ref().map_or(1, |list| list.0.len() as u64),
        args.prompt_tokens.0.len() as u64,
        args.max_new_tokens.0.len() as u64,
    ]
    .into_iter()
    .fold(1, u64::saturating_mul)
}

/// The configurations of one model, in the order of the lists; each once.
pub fn of_model(args: &BenchArgs, index: usize, path: &str) -> Vec<Planned> {
    let mut found: Vec<Planned> = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    let threads: Vec<Option<u64>> =
        args.threads.as_ref().map_or(vec![None], |list| list.0.iter().map(|&count| Some(count)).collect());
    let options = |list: &Option<super::lists::Sizes>| -> Vec<Option<Size>> {
        list.as_ref().map_or(vec![None], |list| list.0.iter().map(|&size| Some(size)).collect())
    };
    let (vrams, rams) = (options(&args.vram), options(&args.ram));
    for &device in &args.device {
        let vrams = if device == DeviceArg::Cpu { &[None][..] } else { &vrams };
        for &vram in vrams {
            for &ram in &rams {
                for &evict in &args.evict {
                    for &prefetch in &args.prefetch {
                        for &io in &args.io {
                            let adapter = args.adapter.clone().filter(|_| device != DeviceArg::Cpu);
                            let placement = PlacementArgs {
                                device,
                                adapter,
                                vram,
                                ram,
                                evict,
                                prefetch,
                                io,
                                huge_pages: args.huge_pages,
                                split: SplitArg::Auto,
                            };
                            lengths(args, index, path, &placement, &threads, &mut |planned: Planned| {
                                if seen.insert(planned.point.clone()) {
                                    found.push(planned);
                                }
                            });
                        }
                    }
                }
            }
        }
    }
    found
}

fn lengths(
    args: &BenchArgs,
    index: usize,
    path: &str,
    placement: &PlacementArgs,
    threads: &[Option<u64>],
    take: &mut dyn FnMut(Planned),
) {
    for &threads in threads {
        for &prompt_tokens in &args.prompt_tokens.0 {
            for &max_new_tokens in &args.max_new_tokens.0 {
                let point = Point {
                    model: path.to_owned(),
                    device: word(&placement.device),
                    adapter: placement.adapter.clone(),
                    vram: placement.vram.map(size_word),
                    ram: placement.ram.map(size_word),
                    evict: word(&placement.evict),
                    prefetch: word(&placement.prefetch),
                    io: word(&placement.io),
                    threads,
                    prompt_tokens,
                    max_new_tokens,
                    cold: args.cold,
                    rehearsed: args.rehearse,
                };
                let context = usize::try_from(prompt_tokens.saturating_add(max_new_tokens)).unwrap_or(usize::MAX);
                let settings = Settings { placement: placement.clone(), kv: None };
                let setup = Setup { settings, activations: args.activations, threads, context };
                take(Planned { point, model: index, setup });
            }
        }
    }
}

/// The word that an option's value has on the command line.
fn word(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// A size exactly.
fn size_word(size: Size) -> String {
    match size {
        Size::Bytes(bytes) => bytes.to_string(),
        Size::Percent(share) => format!("{share}%"),
    }
}

impl Point {
    /// The settings, by name; sizes for people.
    pub fn words(&self) -> Vec<(&'static str, String)> {
        let size = |word: &Option<String>| match word {
            None => "free".to_owned(),
            Some(word) => word.parse::<u64>().map_or_else(|_| word.clone(), human_bytes),
        };
        vec![
            ("model", self.model.clone()),
            ("device", self.device.clone()),
            ("vram", size(&self.vram)),
            ("ram", size(&self.ram)),
            ("evict", self.evict.clone()),
            ("prefetch", self.prefetch.clone()),
            ("io", self.io.clone()),
            ("threads", self.threads.map_or_else(|| "all".to_owned(), |threads| threads.to_string())),
            ("prompt", self.prompt_tokens.to_string()),
            ("new", self.max_new_tokens.to_string()),
        ]
    }

    /// Those settings (of [`Self::words`]) that are among `names`, in one line.
    pub fn label(&self, names: &[&str]) -> String {
        let words = self.words().into_iter().filter(|(name, _)| names.contains(name));
        let parts: Vec<String> =
            words.map(|(name, word)| if name == "model" { word } else { format!("{name} {word}") }).collect();
        if parts.is_empty() { self.model.clone() } else { parts.join(", ") }
    }
}

/// The names of the settings (of [`Point::words`]) that differ among points.
pub fn varying<'a>(points: impl Iterator<Item = &'a Point>) -> Vec<&'static str> {
    let mut values: Vec<(&'static str, std::collections::BTreeSet<String>)> = Vec::new();
    for point in points {
        for (index, (name, word)) in point.words().into_iter().enumerate() {
            match values.get_mut(index) {
                Some((_, seen)) => {
                    seen.insert(word);
                }
                None => values.push((name, [word].into())),
            }
        }
    }
    values.into_iter().filter(|(_, seen)| seen.len() > 1).map(|(name, _)| name).collect()
}

/// Prompts of so many tokens of the model's vocabulary, one after the other: the first is measured, others rehearse. They
/// are the same every time, and say nothing of sense: benchmarks measure the way of weights, which no text of a dense
/// model changes; a mixture's router sees arbitrary tokens, and should not know a prompt's experts from its rehearsal.
pub fn prompts(tokens: u64, vocab: usize) -> impl Iterator<Item = Vec<u32>> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let vocab = vocab.max(1) as u64;
    let mut draw = move || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocab) as u32
    };
    std::iter::repeat_with(move || (0..tokens).map(|_| draw()).collect())
}

/// Facts by which a model is known again under another path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// The architecture's name.
    pub architecture: String,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Blocks, for the report.
    pub blocks: u64,
}

impl ModelFacts {
    /// Of an opened model.
    pub fn of(model: &ModelFiles, spec: &ModelSpec) -> Self {
        Self {
            architecture: spec.architecture.to_owned(),
            parameters: ModelSpec::parameters(&model.catalog),
            weight_bytes: model.catalog.weight_bytes(),
            blocks: model.catalog.blocks().len() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser as _;

    fn args(line: &str) -> Box<BenchArgs> {
        let Command::Bench(args) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else { panic!() };
        args
    }

    #[test]
    fn every_combination_is_there_once() {
        let args = args(
            "overspill bench m --ram 25%,50%,50% --vram 1GiB,2GiB --device cpu,gpu --evict lru,planned --threads 1,2 \
             --prompt-tokens 4 -n 8,16",
        );
        let points = of_model(&args, 0, "m");
        // CPU: 1 × 2 × 2 × 2 × 2, GPU: twice that for the sizes of VRAM; the second 50 % is none.
        assert_eq!(points.len(), 16 + 32);
        assert_eq!(count(&args), 3 * (1 + 2) * 2 * 2 * 2, "the count is an upper bound");
        assert!(points.iter().all(|p| p.point.vram.is_some() == (p.point.device == "gpu")));
        assert_eq!(varying(points.iter().map(|p| &p.point)), ["device", "vram", "ram", "evict", "threads", "new"]);
        assert_eq!(points[0].setup.context, 12);
    }

    #[test]
    fn a_point_survives_its_record() {
        let args = args("overspill bench m --ram 1GiB,12.5%");
        for planned in of_model(&args, 0, "m") {
            let text = serde_json::to_string(&planned.point).unwrap();
            assert_eq!(serde_json::from_str::<Point>(&text).unwrap(), planned.point);
        }
        let labels: Vec<String> = of_model(&args, 0, "m").iter().map(|p| p.point.label(&["ram"])).collect();
        assert_eq!(labels, ["ram 1.00 GiB", "ram 12.5%"]);
    }

    #[test]
    fn prompts_are_of_the_vocabulary_and_the_same_every_time() {
        let two = || prompts(100, 7).take(2).collect::<Vec<_>>();
        assert!(two().iter().all(|tokens| tokens.len() == 100 && tokens.iter().all(|&token| token < 7)));
        assert_eq!(two(), two());
        assert_ne!(two()[0], two()[1]);
    }
}
