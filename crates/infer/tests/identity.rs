//! Invariant 1, in full: tokens and logits have the same bits for every budget, eviction policy, prefetcher, reader and
//! number of threads. On a CPU every combination is run; on a GPU every pair of settings is met (without an adapter
//! those tests are reported as ignored, and so is a reader that this system does not have).
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Oracle, bits, fixture};
use libtest_mimic::{Arguments, Failed, Trial};
use overspill::{Budget, Engine, EngineBuilder, Evict, IoChoice, Prefetch};
use overspill_infer::InferError;
use overspill_infer::generate::{Runtime, RuntimeOptions};
use overspill_infer::kernels::Activations;
use std::path::PathBuf;

const EVICTS: [Evict; 3] = [Evict::Lru, Evict::NextUse, Evict::Planned];
const PREFETCHES: [Prefetch; 2] = [Prefetch::Auto, Prefetch::Off];
const READERS: [IoChoice; 3] = [IoChoice::Uring, IoChoice::Pread, IoChoice::Mmap];
/// Tokens decoded after the prompt: two and more turns of the cycle, so that what is kept by now was evicted before.
const DECODED: usize = 4;

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for model in Model::all() {
        for io in READERS {
            let name = format!("every_combination_on_a_cpu_has_the_same_bits::{}::{io}", model.name);
            let model = model.clone();
            trials.push(trial(name, !works(io), move || every_combination(&model, io)));
        }
    }
    #[cfg(feature = "gpu")]
    for model in Model::all() {
        let name = format!("every_pair_on_a_gpu_has_the_same_bits::{}", model.name);
        trials
            .push(trial(name, !with_gpu::is_there() || !works(IoChoice::Uring), move || with_gpu::every_pair(&model)));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: String, ignored: bool, test: impl FnOnce() + Send + 'static) -> Trial {
    let run = move || -> Result<(), Failed> {
        test();
        Ok(())
    };
    Trial::test(name, run).with_ignored_flag(ignored)
}

/// Whether this system has the reader.
fn works(io: IoChoice) -> bool {
    Engine::builder().ram(Budget::Percent(100.0)).io(io).open(&fixture("tiny-stories")).is_ok()
}

/// A model and what it is asked.
#[derive(Clone)]
struct Model {
    name: &'static str,
    path: PathBuf,
    prompt: Vec<u32>,
    activations: Activations,
}

impl Model {
    /// A dense model, a mixture (both trained), and one whose kernels take 8-bit activations.
    fn all() -> Vec<Self> {
        let trained = |name| Self {
            name,
            path: fixture(name),
            prompt: vec![0, 5, 9, 300, 17, 44, 8],
            activations: Activations::F32,
        };
        let quantised = Oracle::named("llama-q4_k_m");
        let quantised =
            Self { name: "q4_k_m", path: quantised.model, prompt: quantised.prompt, activations: Activations::Q8 };
        vec![trained("tiny-stories"), trained("tiny-moe"), quantised]
    }

    fn options(&self, threads: usize) -> RuntimeOptions {
        RuntimeOptions { threads, activations: self.activations, ..RuntimeOptions::default() }
    }

    /// The greedy tokens, and all logits on the way. A tier is within its budget while the session is there.
    fn answer(&self, runtime: &Runtime, tier: &str) -> (Vec<u32>, Vec<u32>) {
        let mut session = runtime.session(Some(64)).unwrap();
        let (mut tokens, mut logits) = (Vec::new(), bits(session.prefill(&self.prompt, None).unwrap()));
        for _ in 0..DECODED {
            let last = session.logits();
            let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
            tokens.push(best);
            logits.extend(bits(session.prefill(&[best], None).unwrap()));
        }
        let figures = runtime.engine().stats().unwrap().tier(tier).cloned().unwrap();
        let inside = if tier == "host" { 0 } else { figures.reserved_bytes };
        assert!(figures.peak_bytes + inside <= figures.budget_bytes, "{}: {figures:?}", self.name);
        (tokens, logits)
    }
}

/// The smallest budget in bytes that `open` takes, found by giving it what it asks for.
fn smallest(mut open: impl FnMut(u64) -> Result<(), InferError>) -> u64 {
    let mut bytes = 1;
    for _ in 0..200 {
        match open(bytes) {
            Ok(()) => return bytes,
            Err(InferError::Engine(overspill::Error::TooSmall { bytes_min, .. })) => {
                assert!(bytes_min > bytes, "{bytes} is too small, and {bytes_min} would do?");
                bytes = bytes_min;
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("no budget is large enough: {bytes}");
}

fn every_combination(model: &Model, io: IoChoice) {
    let open = |builder: EngineBuilder, threads| -> Result<Runtime, InferError> {
        Runtime::open(builder.open(&model.path)?, model.options(threads))
    };
    let whole = Engine::builder().ram(Budget::Bytes(256 << 20));
    let expected = model.answer(&open(whole, 2).unwrap(), "host");
    assert_eq!(expected.0.len(), DECODED);
    let mut runs = 0;
    for evict in EVICTS {
        for prefetch in PREFETCHES {
            let builder = Engine::builder().evict(evict).prefetch(prefetch).io(io);
            for threads in [1, 2] {
                let least = smallest(|bytes| {
                    let runtime = open(builder.clone().ram(Budget::Bytes(bytes)), threads)?;
                    runtime.session(Some(64)).map(drop)
                });
                let budgets = [100.0, 50.0, 25.0].map(Budget::Percent);
                for ram in budgets.into_iter().chain([Budget::Bytes(least)]) {
                    let runtime = open(builder.clone().ram(ram), threads).unwrap();
                    let what = format!("{}: {ram:?}, {evict:?}, {prefetch:?}, {io}, {threads} threads", model.name);
                    assert!(model.answer(&runtime, "host") == expected, "{what}");
                    runs += 1;
                }
            }
        }
    }
    assert_eq!(runs, EVICTS.len() * PREFETCHES.len() * 2 * 4);
}

#[cfg(feature = "gpu")]
mod with_gpu {
    use super::{EVICTS, Model, PREFETCHES, READERS, smallest};
    use overspill::device::{Choice, GpuContext, adapters};
    use overspill::{Budget, Engine, EngineBuilder};
    use overspill_infer::InferError;
    use overspill_infer::generate::Runtime;
    use std::sync::Arc;

    /// Settings: VRAM, RAM, eviction, prefetch, reader.
    const LEVELS: [usize; 5] = [4, 2, EVICTS.len(), PREFETCHES.len(), READERS.len()];

    pub fn is_there() -> bool {
        !adapters().is_empty()
    }

    /// Rows in which every pair of levels of two settings occurs.
    fn pairs() -> Vec<[usize; 5]> {
        let all = |row: &[usize; 5]| -> Vec<(usize, usize, usize, usize)> {
            let pairs = (0..5).flat_map(|a| (a + 1..5).map(move |b| (a, b)));
            pairs.map(|(a, b)| (a, b, row[a], row[b])).collect()
        };
        let count: usize = LEVELS.iter().product();
        let rows: Vec<[usize; 5]> = (0..count)
            .map(|mut index| {
                LEVELS.map(|levels| {
                    let level = index % levels;
                    index /= levels;
                    level
                })
            })
            .collect();
        let mut open: std::collections::BTreeSet<_> = rows.iter().flat_map(all).collect();
        let mut chosen = Vec::new();
        while !open.is_empty() {
            // The row that meets the most pairs not met yet.
            let best = rows.iter().max_by_key(|row| all(row).iter().filter(|p| open.contains(*p)).count()).unwrap();
            all(best).iter().for_each(|pair| {
                open.remove(pair);
            });
            chosen.push(*best);
        }
        chosen
    }

    pub fn every_pair(model: &Model) {
        let context = Arc::new(GpuContext::choose(Choice { name: None, allow_software: true }).unwrap());
        let open = |builder: EngineBuilder, vram: u64| -> Result<Runtime, InferError> {
            let engine = builder.gpu(Arc::clone(&context), Budget::Bytes(vram)).open(&model.path)?;
            let backends = overspill_infer::gpu::backends(&engine)?.unwrap();
            Runtime::open_on(engine, model.options(2), backends)
        };
        let whole = open(Engine::builder().ram(Budget::Bytes(256 << 20)), 256 << 20).unwrap();
        let expected = model.answer(&whole, "gpu0");
        // KV cache and scratch come on top of the weights.
        let apart = whole.engine().stats().unwrap().tier("gpu0").unwrap().reserved_peak_bytes;
        let weights = whole.engine().catalog().weight_bytes();
        drop(whole);
        let rows = pairs();
        assert!(rows.len() >= 12, "{}", rows.len());
        for [vram, ram, evict, prefetch, io] in rows {
            let ram = Budget::Percent([100.0, 50.0][ram]);
            let (evict, prefetch, io) = (EVICTS[evict], PREFETCHES[prefetch], READERS[io]);
            let builder = Engine::builder().ram(ram).evict(evict).prefetch(prefetch).io(io);
            let vram = match [100, 50, 25, 0][vram] {
                0 => smallest(|bytes| open(builder.clone(), bytes)?.session(Some(64)).map(drop)),
                percent => weights * percent / 100 + apart,
            };
            let what = format!("{}: {vram} bytes of VRAM, {ram:?}, {evict:?}, {prefetch:?}, {io}", model.name);
            let runtime = open(builder, vram).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(model.answer(&runtime, "gpu0") == expected, "{what}");
        }
    }
}
