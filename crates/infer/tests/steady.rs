//! Invariant 8 for the whole runtime: once it is warm, computing a token on the CPU allocates nothing, on any thread,
//! while half of the model streams from disk.
//!
//! The test is alone in its binary, since it counts what the whole process does.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill::{Budget, Engine, IoChoice};
use overspill_infer::generate::{Runtime, RuntimeOptions};
use overspill_infer::sampling::{Sampler, SamplingParams};
use std::path::Path;

mod sys {
    //! An allocator that counts.

    use std::alloc::{GlobalAlloc, Layout, System};
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Allocations so far.
    pub static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

    pub struct Counting;

    // SAFETY: every call is passed on to the system's allocator unchanged; the counter does not touch memory.
    unsafe impl GlobalAlloc for Counting {
        // SAFETY: the caller's promise about the layout is the system allocator's requirement.
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
            // SAFETY: as above.
            unsafe { System.alloc(layout) }
        }

        // SAFETY: the caller's promise about the pointer is the system allocator's requirement.
        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: as above.
            unsafe { System.dealloc(pointer, layout) }
        }
    }
}

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

fn allocations() -> u64 {
    sys::ALLOCATIONS.load(std::sync::atomic::Ordering::Relaxed)
}

/// Allocations of 100 tokens, after as many to warm up.
fn allocations_of_decoding(model: &str, io: IoChoice) -> Option<u64> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(model);
    let engine = match Engine::builder().ram(Budget::Percent(50.0)).io(io).open(&path) {
        Ok(engine) => engine,
        Err(error) => {
            assert_eq!(io, IoChoice::Uring, "{error}");
            eprintln!("{model}, {io}: not possible here: {error}");
            return None;
        }
    };
    let runtime = Runtime::open(engine, RuntimeOptions { threads: 2, ..RuntimeOptions::default() }).unwrap();
    let mut session = runtime.session(Some(256)).unwrap();
    let mut sampler = Sampler::new(SamplingParams { temperature: 0.8, ..SamplingParams::greedy() }).unwrap();
    session.prefill(&[1, 5, 9], None).unwrap();
    let mut decode = |_| {
        let token = sampler.sample(session.logits()).unwrap();
        session.prefill(&[token], None).unwrap();
    };
    (0..100).for_each(&mut decode);
    let loads = runtime.engine().stats().unwrap().tiers[0].blocks.loads;
    let before = allocations();
    (100..200).for_each(&mut decode);
    let allocated = allocations() - before;
    let loads = runtime.engine().stats().unwrap().tiers[0].blocks.loads - loads;
    eprintln!("{model}, {io}: {loads} blocks read, {allocated} allocations in 100 tokens");
    assert!(loads >= 100, "{model}: it must stream, or nothing is shown: {loads}");
    Some(allocated)
}

#[test]
fn invariant_8_a_token_allocates_nothing() {
    for model in ["tiny-stories", "tiny-moe"] {
        for io in [IoChoice::Uring, IoChoice::Pread] {
            if let Some(allocated) = allocations_of_decoding(model, io) {
                assert_eq!(allocated, 0, "{model}, {io}");
            }
        }
    }
}
