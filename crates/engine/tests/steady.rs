//! Invariant 8: after warm-up, a loop over a cyclic schedule allocates nothing, on any thread, and meets no page fault.
//!
//! The test is alone in its binary, since it counts what the whole process does.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill::{
    Budget, CatalogBuilder, DType, Engine, Error, Evict, FileId, IoChoice, Prefetch, RawTensor, Role, Schedule, Step,
    StepId, TableId,
};
use std::path::Path;

mod sys {
    //! An allocator that counts, and the kernel's count of page faults.

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

    /// Page faults of this process that needed no disk.
    pub fn minor_faults() -> i64 {
        // SAFETY: a structure of numbers; all zeros is a value of it.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the structure is valid for writing while the kernel fills it.
        assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) }, 0);
        usage.ru_minflt
    }
}

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

fn allocations() -> u64 {
    sys::ALLOCATIONS.load(std::sync::atomic::Ordering::Relaxed)
}

const ROWS: u64 = 64;
const COLUMNS: u64 = 512;
const MATRIX: u64 = ROWS * COLUMNS * 2;
const MATRICES: u64 = 24;
const SMALLS: u64 = 8;
const SMALL: u64 = 2 * 50;
const TABLE_ROWS: u64 = 500;
/// Nothing in real files is aligned.
const OFFSET: u64 = 1234;
/// Faults that the process may meet now and then whatever we do: a stack that grows by a page, a page that the system
/// has moved.
const FAULTS_MAX: i64 = 16;

/// An engine on matrices, vectors and a table, and its schedule: two matrices a step, and a step of the vectors, which
/// share a block and are gathered from the file.
fn open(path: &Path, bytes: u64, io: IoChoice, evict: Evict, prefetch: Prefetch) -> Result<(Engine, Schedule), Error> {
    let mut builder = CatalogBuilder::new();
    builder.file(path, bytes);
    builder.payload_bytes(32 << 10);
    let raw = |name: String, shape: &[u64], offset, role| RawTensor {
        name,
        dtype: DType::F16,
        shape: shape.to_vec(),
        file: FileId(0),
        offset,
        role,
    };
    let matrices: Vec<_> = (0..MATRICES)
        .map(|i| builder.tensor(raw(format!("m{i}"), &[ROWS, COLUMNS], OFFSET + i * MATRIX, Role::Matrix)))
        .collect();
    let smalls: Vec<_> = (0..SMALLS)
        .map(|i| builder.tensor(raw(format!("v{i}"), &[50], OFFSET + MATRICES * MATRIX + i * SMALL, Role::Small)))
        .collect();
    let table = OFFSET + MATRICES * MATRIX + SMALLS * SMALL;
    builder.tensor(raw("table".into(), &[TABLE_ROWS, COLUMNS], table, Role::Table));
    let builder = builder.build()?;
    let engine = Engine::builder().io(io).evict(evict).prefetch(prefetch).ram(Budget::Percent(50.0));
    let engine = engine.open_catalog(builder)?;
    let tier = engine.compute_tier();
    let pieces = |tensor| engine.catalog().pieces(tensor, 0).into_iter().map(|piece| piece.block);
    let mut steps: Vec<Step> = (matrices.chunks(2))
        .map(|pair| Step { tier, blocks: pair.iter().flat_map(|&m| pieces(m)).collect(), choice_max: 0 })
        .collect();
    let mut small: Vec<_> = smalls.iter().flat_map(|&s| pieces(s)).collect();
    small.dedup();
    steps.push(Step { tier, blocks: small, choice_max: 0 });
    let schedule = Schedule { label: "decode".into(), cyclic: true, steps, standing: Vec::new() };
    Ok((engine, schedule))
}

fn a_loop_allocates_nothing(path: &Path, bytes: u64, io: IoChoice, evict: Evict, prefetch: Prefetch) {
    let case = format!("{io}, {evict:?}, {prefetch:?}");
    let (engine, schedule) = match open(path, bytes, io, evict, prefetch) {
        Ok(opened) => opened,
        Err(error) => {
            assert_eq!(io, IoChoice::Uring, "{error}");
            return eprintln!("{case}: not possible here: {error}");
        }
    };
    let steps = schedule.steps.len() as u32;
    let id = engine.register(schedule).unwrap();
    let mut sequence = engine.sequence(id, "loop").unwrap();
    let mut row = vec![0u8; COLUMNS as usize * 2];
    let mut sum = 0u64;
    let mut pass = |cycle: u64| {
        engine.gather(TableId(0), &[cycle * 7 % TABLE_ROWS], &mut row).unwrap();
        for step in 0..steps {
            let set = sequence.acquire(StepId(step)).unwrap();
            sum += set.iter().map(|lease| u64::from(lease.slot()[2000])).sum::<u64>();
        }
    };
    (0..100).for_each(&mut pass);
    let loads = engine.stats().unwrap().tiers[0].blocks.loads;
    let (allocated, faults) = (allocations(), sys::minor_faults());
    (100..400).for_each(&mut pass);
    let (allocated, faults) = (allocations() - allocated, sys::minor_faults() - faults);
    let loads = engine.stats().unwrap().tiers[0].blocks.loads - loads;
    eprintln!("{case}: {loads} blocks read, {allocated} allocations, {faults} minor faults, sum {sum}");
    assert!(loads >= 300, "{case}: it must stream, or nothing is shown: {loads}");
    assert_eq!(allocated, 0, "{case}: allocations in 300 cycles");
    assert!(faults <= FAULTS_MAX, "{case}: {faults} page faults in 300 cycles");
}

#[test]
fn invariant_8_a_loop_over_a_cycle_allocates_nothing_and_meets_no_fault() {
    let bytes = OFFSET + MATRICES * MATRIX + SMALLS * SMALL + TABLE_ROWS * COLUMNS * 2;
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("steady-{}", std::process::id()));
    let content: Vec<u8> = (0..bytes).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    std::fs::write(&path, content).unwrap();
    for io in [IoChoice::Uring, IoChoice::Pread] {
        for (evict, prefetch) in
            [(Evict::Planned, Prefetch::Auto), (Evict::NextUse, Prefetch::Auto), (Evict::Lru, Prefetch::Off)]
        {
            a_loop_allocates_nothing(&path, bytes, io, evict, prefetch);
        }
    }
    std::fs::remove_file(&path).unwrap();
}
