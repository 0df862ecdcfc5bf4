//! Memory beside weights and KV cache stays where it is: ten thousand tokens in repeated contexts, under a budget that
//! makes every token stream. A test binary of its own, since it looks at the whole process.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::fixture;
use overspill::{Budget, Engine};
use overspill_infer::generate::{Request, Runtime, RuntimeOptions};
use std::ops::ControlFlow;

const TOKENS: usize = 10_000;
/// Tokens after which everything has been allocated that ever will be.
const WARM_UP: usize = 1_000;
const CONTEXT: usize = 250;
/// Of the allocator's own doing: pages that threads' arenas take and give back.
const SLACK_BYTES: u64 = 1 << 20;

#[test]
fn ten_thousand_tokens_take_no_more_memory_than_one_thousand() {
    let engine = Engine::builder().ram(Budget::Percent(90.0)).open(&fixture("tiny-stories")).unwrap();
    let runtime = Runtime::open(engine, RuntimeOptions { threads: 2, ..RuntimeOptions::default() }).unwrap();
    let mut session = runtime.session(Some(CONTEXT)).unwrap();
    let (mut tokens, mut warm) = (0, None);
    while tokens < TOKENS {
        session.reset();
        let mut request = Request::greedy(&[0, 5, 9], CONTEXT - 3);
        request.ignore_eos = true;
        let answer = session.generate(&request, None, &mut |_| ControlFlow::Continue(())).unwrap();
        tokens += answer.tokens.len();
        if tokens >= WARM_UP && warm.is_none() {
            warm = overspill::limits::peak_resident_bytes();
        }
    }
    let host = runtime.engine().stats().unwrap().tier("host").cloned().unwrap();
    assert!(host.blocks.evictions > TOKENS as u64, "every token streams: {host:?}");
    match (warm, overspill::limits::peak_resident_bytes()) {
        (Some(warm), Some(end)) => assert!(end <= warm + SLACK_BYTES, "{warm} bytes became {end}"),
        none => eprintln!("this system does not say what is resident: {none:?}"),
    }
}
