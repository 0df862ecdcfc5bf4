//! Every model of the fixtures on a GPU against what independent implementations answer; and invariant 1: the bits of
//! an answer depend on neither chunks nor budgets. Any adapter will do (lavapipe is slow, and right). Without one,
//! every test is reported as ignored.
#![allow(clippy::unwrap_used, reason = "tests")]

#[cfg(feature = "gpu")]
mod common;

#[cfg(not(feature = "gpu"))]
fn main() {
    println!("built without the feature `gpu`: nothing to test");
}

#[cfg(feature = "gpu")]
fn main() {
    with_gpu::main();
}

#[cfg(feature = "gpu")]
mod with_gpu {
    use crate::common::{Oracle, bits, difference};
    use libtest_mimic::{Arguments, Failed, Trial};
    use overspill::device::{Choice, GpuContext, adapters};
    use overspill::{Budget, Engine};
    use overspill_infer::generate::{Request, Runtime, RuntimeOptions};
    use overspill_infer::gpu;
    use std::ops::ControlFlow;
    use std::path::Path;
    use std::sync::Arc;

    /// Of the largest logit: a GPU adds in another order, and its exponential is another.
    const TOLERANCE: f32 = 1e-3;
    /// Room for KV cache and activations, which a percentage of the weights does not include.
    const CONTEXT: usize = 64;

    pub fn main() {
        let arguments = Arguments::from_args();
        let no_adapter = adapters().is_empty();
        let mut trials = Vec::new();
        let mut add = |name: String, test: Box<dyn FnOnce() + Send>| {
            let run = move || -> Result<(), Failed> {
                test();
                Ok(())
            };
            trials.push(Trial::test(name, run).with_ignored_flag(no_adapter));
        };
        for oracle in Oracle::all() {
            let name = oracle.name.clone();
            add(format!("{name}_meets_its_oracle"), Box::new(move || meets_its_oracle(&oracle)));
            let oracle = Oracle::named(&name);
            add(
                format!("{name}_has_the_same_bits_for_any_budget_and_chunk"),
                Box::new(move || budgets_and_chunks_leave_no_trace(&oracle)),
            );
        }
        add("a_vram_budget_that_is_too_small_says_the_smallest_that_works".into(), Box::new(too_small));
        add("sessions_at_once_give_what_each_gives_alone".into(), Box::new(sessions_at_once));
        libtest_mimic::run(&arguments, trials).exit();
    }

    fn context() -> Arc<GpuContext> {
        Arc::new(GpuContext::choose(Choice { name: None, allow_software: true }).unwrap())
    }

    fn open(model: &Path, vram: Budget, ram: Budget, chunk: usize) -> Runtime {
        let engine = Engine::builder().gpu(context(), vram).ram(ram).open(model).unwrap();
        runtime(engine, chunk)
    }

    fn runtime(engine: Engine, chunk: usize) -> Runtime {
        let options = RuntimeOptions { chunk, ..RuntimeOptions::default() };
        let backends = gpu::backends(&engine).unwrap().unwrap();
        Runtime::open_on(engine, options, backends).unwrap()
    }

    fn meets_its_oracle(oracle: &Oracle) {
        let runtime = open(&oracle.model, Budget::Bytes(256 << 20), Budget::Bytes(256 << 20), 512);
        let mut session = runtime.session(Some(CONTEXT)).unwrap();
        let mut request = Request::greedy(&oracle.prompt, oracle.greedy.len());
        request.ignore_eos = true;
        let answer = session.generate(&request, None, &mut |_| ControlFlow::Continue(())).unwrap();
        let off = difference(&answer.last_prompt_logits, &oracle.last_prompt_logits);
        eprintln!("{} on {}: prompt {off:.2e}", oracle.name, session.backend_name());
        assert!(off <= TOLERANCE, "{}: last prompt logits differ by {off}", oracle.name);
        assert_eq!(answer.tokens, oracle.greedy, "{}", oracle.name);
        if let Some(expected) = &oracle.final_step_logits {
            let off = difference(session.logits(), expected);
            assert!(off <= TOLERANCE, "{}: final step's logits differ by {off}", oracle.name);
        }
        let stats = runtime.engine().stats().unwrap();
        let gpu = stats.tiers.iter().find(|tier| tier.label == "gpu0").unwrap();
        assert!(gpu.hits + gpu.misses > 0, "weights were leased in the GPU's tier");
    }

    /// Logits of a prompt, and of some tokens after it.
    fn trace(runtime: &Runtime, oracle: &Oracle) -> Vec<u32> {
        let mut session = runtime.session(Some(CONTEXT)).unwrap();
        let mut all = bits(session.prefill(&oracle.prompt, None).unwrap());
        for token in &oracle.greedy[..3] {
            all.extend(bits(session.prefill(&[*token], None).unwrap()));
        }
        all
    }

    fn budgets_and_chunks_leave_no_trace(oracle: &Oracle) {
        let roomy = Budget::Bytes(256 << 20);
        let expected = trace(&open(&oracle.model, roomy, roomy, 512), oracle);
        assert_eq!(trace(&open(&oracle.model, roomy, roomy, 3), oracle), expected, "chunks of 3");
        // KV cache and scratch come on top of the weights.
        for percent in [50.0, 25.0] {
            let runtime = open(&oracle.model, Budget::Percent(percent), Budget::Percent(50.0), 512);
            assert_eq!(trace(&runtime, oracle), expected, "at {percent} % in VRAM");
        }
    }

    fn too_small() {
        let oracle = Oracle::named("tiny-llama");
        let opened = Engine::builder().gpu(context(), Budget::Bytes(4096)).open(&oracle.model);
        let error = match opened {
            Err(error) => error.to_string(),
            Ok(engine) => {
                let backends = gpu::backends(&engine).unwrap().unwrap();
                match Runtime::open_on(engine, RuntimeOptions::default(), backends) {
                    Err(error) => error.to_string(),
                    Ok(runtime) => runtime.session(None).map(|_| ()).unwrap_err().to_string(),
                }
            }
        };
        assert!(error.contains("--vram"), "{error}");
    }

    fn sessions_at_once() {
        let oracle = Oracle::named("tiny-qwen3moe");
        let runtime = open(&oracle.model, Budget::Bytes(256 << 20), Budget::Percent(50.0), 512);
        let answers: Vec<Vec<u32>> = std::thread::scope(|scope| {
            let ask = || {
                let mut session = runtime.session(Some(CONTEXT)).unwrap();
                let mut request = Request::greedy(&oracle.prompt, oracle.greedy.len());
                request.ignore_eos = true;
                session.generate(&request, None, &mut |_| ControlFlow::Continue(())).unwrap().tokens
            };
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(ask)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for answer in answers {
            assert_eq!(answer, oracle.greedy);
        }
    }
}
