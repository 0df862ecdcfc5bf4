//! What the brain costs in memory: counted by the allocator, not by hand.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill_core::{BlockId, BlockSize, Brain, Config, Evict, Prefetch, Schedule, Step, TierConfig, TierId};

mod sys {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Bytes allocated and not freed.
    pub static LIVE: AtomicUsize = AtomicUsize::new(0);

    pub struct Counting;

    // SAFETY: every call is passed on to the system's allocator unchanged; the counter does not touch memory.
    unsafe impl GlobalAlloc for Counting {
        // SAFETY: the caller's promise about the layout is the system allocator's requirement.
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            LIVE.fetch_add(layout.size(), Ordering::Relaxed);
            // SAFETY: as above.
            unsafe { System.alloc(layout) }
        }

        // SAFETY: the caller's promise about the pointer is the system allocator's requirement.
        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
            // SAFETY: as above.
            unsafe { System.dealloc(pointer, layout) }
        }
    }
}

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

#[test]
fn the_brain_takes_less_than_512_bytes_a_block() {
    const BLOCKS: u32 = 100_000;
    let live = || sys::LIVE.load(std::sync::atomic::Ordering::Relaxed);
    let schedule = Schedule {
        label: "decode".into(),
        cyclic: true,
        steps: (0..BLOCKS).map(|b| Step { tier: TierId(0), blocks: vec![BlockId(b)], choice_max: 0 }).collect(),
        standing: Vec::new(),
    };
    let tier = |label: &str, parent| TierConfig {
        label: label.into(),
        budget_bytes: 50_000 << 20,
        slots_per_slab: 64,
        parent,
    };
    let config = Config {
        slot_bytes: 1 << 20,
        tiers: vec![tier("gpu0", Some(TierId(1))), tier("host", None)],
        blocks: vec![BlockSize { bytes: 1 << 20, slots: 1, wire: 0 }; BLOCKS as usize],
        evict: Evict::Planned,
        prefetch: Prefetch::Auto,
        window_bytes: Config::WINDOW_BYTES_DEFAULT,
    };
    let before = live();
    let mut brain = Brain::new(config).unwrap();
    let id = brain.add_schedule(&schedule).unwrap();
    brain.open_sequence(id).unwrap();
    while brain.poll().is_some() {}
    let per_block = (live() - before) / BLOCKS as usize;
    assert!(per_block < 512, "{per_block} bytes a block");
    println!("{per_block} bytes a block, two tiers and one schedule included");
}
