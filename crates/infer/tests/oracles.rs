//! Every model of the fixtures against what independent implementations answer, on a CPU; and invariant 1: the bits of
//! an answer depend on neither chunks nor threads nor budgets.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Oracle, bits, difference, engine, fixture, runtime};
use overspill::{Budget, Engine};
use overspill_infer::generate::{Ended, Request, Runtime, RuntimeOptions};
use overspill_infer::kernels::Activations;
use std::ops::ControlFlow;

/// Float weights, and quantised ones against f32 activations.
const TOLERANCE_FLOAT: f32 = 1e-4;
const TOLERANCE_QUANTISED: f32 = 1e-3;
/// 8-bit activations: a sanity check.
const TOLERANCE_Q8: f32 = 6e-2;

fn go_on(_: u32) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn every_oracle_is_met_with_f32_activations() {
    for oracle in Oracle::all() {
        let tolerance = if oracle.is_float { TOLERANCE_FLOAT } else { TOLERANCE_QUANTISED };
        let runtime = runtime(&oracle.model, Activations::F32, 2, 512);
        let mut session = runtime.session(None).unwrap();
        let mut request = Request::greedy(&oracle.prompt, oracle.greedy.len());
        request.ignore_eos = true;
        let answer = session.generate(&request, None, &mut go_on).unwrap();
        let off = difference(&answer.last_prompt_logits, &oracle.last_prompt_logits);
        eprintln!("{}: prompt {off:.2e}", oracle.name);
        assert!(off <= tolerance, "{}: last prompt logits differ by {off}", oracle.name);
        assert_eq!(answer.tokens, oracle.greedy, "{}", oracle.name);
        assert_eq!(answer.ended, Ended::Length);
        if let Some(expected) = &oracle.final_step_logits {
            let off = difference(session.logits(), expected);
            assert!(off <= tolerance, "{}: final step's logits differ by {off}", oracle.name);
        }
        if let Some(expected) = &oracle.all_prompt_logits {
            session.reset();
            let all = session.prefill_all(&oracle.prompt, None).unwrap();
            assert_eq!(all.len(), expected.iter().map(Vec::len).sum::<usize>());
            for (token, expected) in expected.iter().enumerate() {
                let got = &all[token * expected.len()..(token + 1) * expected.len()];
                let off = difference(got, expected);
                assert!(off <= tolerance, "{}: logits of prompt token {token} differ by {off}", oracle.name);
            }
        }
    }
}

#[test]
fn quantised_oracles_are_near_with_8_bit_activations() {
    let mut quantised = 0;
    for oracle in Oracle::all().iter().filter(|oracle| !oracle.is_float) {
        let runtime = runtime(&oracle.model, Activations::Q8, 2, 512);
        let mut session = runtime.session(None).unwrap();
        let off = difference(session.prefill(&oracle.prompt, None).unwrap(), &oracle.last_prompt_logits);
        eprintln!("{}: {off:.2e}", oracle.name);
        assert!(off <= TOLERANCE_Q8, "{}: differs by {off}", oracle.name);
        assert!(off > 0.0, "{}: activations were not rounded at all", oracle.name);
        quantised += 1;
    }
    assert!(quantised >= 5);
}

/// Logits of every prompt token, and of some tokens after it.
fn trace(runtime: &Runtime, prompt: &[u32], next: &[u32]) -> Vec<u32> {
    let mut session = runtime.session(None).unwrap();
    let mut all = bits(session.prefill_all(prompt, None).unwrap());
    session.reset();
    all.extend(bits(session.prefill(prompt, None).unwrap()));
    for token in next {
        all.extend(bits(session.prefill(&[*token], None).unwrap()));
    }
    all
}

/// Invariant 1: chunks and threads.
#[test]
fn chunks_and_threads_leave_no_trace_in_the_bits() {
    for oracle in Oracle::all() {
        for activations in [Activations::F32, Activations::Q8] {
            if oracle.is_float && activations == Activations::Q8 {
                continue;
            }
            // A longer prompt: the answer is taken as if it had been given.
            let mut prompt = oracle.prompt.clone();
            let (known, next) = oracle.greedy.split_at(oracle.greedy.len() - 2);
            prompt.extend(known);
            let expected = trace(&runtime(&oracle.model, activations, 1, 512), &prompt, next);
            for (threads, chunk) in [(2, 512), (1, 1), (2, 3), (2, 8)] {
                let got = trace(&runtime(&oracle.model, activations, threads, chunk), &prompt, next);
                assert!(got == expected, "{}: {threads} threads, chunks of {chunk}, {activations:?}", oracle.name);
            }
        }
    }
}

/// Invariant 1: budgets, down to the smallest that is accepted.
#[test]
fn budgets_leave_no_trace_in_the_bits() {
    for oracle in Oracle::all() {
        let (prompt, next) = (&oracle.prompt, &oracle.greedy[..3]);
        let expected = trace(&runtime(&oracle.model, Activations::F32, 2, 512), prompt, next);
        for percent in [50.0, 25.0] {
            let builder = Engine::builder().ram(Budget::Percent(percent));
            let runtime = builder.open(&oracle.model).map_err(|error| error.to_string()).and_then(|engine| {
                Runtime::open(engine, RuntimeOptions { threads: 2, ..RuntimeOptions::default() })
                    .map_err(|error| error.to_string())
            });
            match runtime {
                Ok(runtime) => {
                    let got = trace(&runtime, prompt, next);
                    assert!(got == expected, "{}: at {percent} %", oracle.name);
                }
                Err(error) => panic!("{} at {percent} %: {error}", oracle.name),
            }
        }
    }
}

#[test]
fn sessions_at_once_give_what_each_gives_alone() {
    let oracle = Oracle::named("tiny-qwen3moe");
    let engine = Engine::builder().ram(Budget::Percent(50.0)).open(&oracle.model).unwrap();
    let runtime = Runtime::open(engine, RuntimeOptions { threads: 2, ..RuntimeOptions::default() }).unwrap();
    let answers: Vec<Vec<u32>> = std::thread::scope(|scope| {
        let ask = || {
            let mut session = runtime.session(None).unwrap();
            let mut request = Request::greedy(&oracle.prompt, oracle.greedy.len());
            request.ignore_eos = true;
            session.generate(&request, None, &mut go_on).unwrap().tokens
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for answer in answers {
        assert_eq!(answer, oracle.greedy);
    }
}

/// The trained models write stories: legible, and the same as an unlimited engine's under a budget.
#[test]
fn trained_models_keep_to_their_language() {
    for name in ["tiny-stories", "tiny-moe"] {
        let runtime = Runtime::open(engine(&fixture(name)), RuntimeOptions::default()).unwrap();
        let mut session = runtime.session(None).unwrap();
        let answer = session.generate(&Request::greedy(&[0], 60), None, &mut go_on).unwrap();
        // Untrained weights repeat one token or wander over the whole vocabulary; perplexity is the measure.
        let mut session = runtime.session(None).unwrap();
        let vocab = runtime.spec().vocab;
        let tokens: Vec<u32> = [0].into_iter().chain(answer.tokens.iter().copied()).collect();
        let all = session.prefill_all(&tokens, None).unwrap();
        let mut sum = 0.0f64;
        for (logits, next) in all.chunks(vocab).zip(&tokens[1..]) {
            let max = logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
            let total: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
            sum += f64::from(logits[*next as usize] - max) - total.ln();
        }
        let perplexity = (-sum / answer.tokens.len() as f64).exp();
        eprintln!("{name}: {} tokens, {:?}, perplexity {perplexity:.2}", answer.tokens.len(), answer.ended);
        assert!(perplexity < 4.0, "{name}: perplexity {perplexity}");
        assert!(answer.tokens.len() >= 20, "{name}: {:?}", answer.ended);
    }
}
