//! The engine on files of random bytes: what is leased is what is in the file, whatever the budget, policy and reader.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill::{
    Budget, Catalog, CatalogBuilder, DType, Engine, EngineBuilder, Error, ErrorKind, Evict, FileId, IoChoice, Prefetch,
    RawTensor, Role, Schedule, Step, StepId, TensorId,
};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A file of random bytes that goes when this does.
struct Fixture {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Fixture {
    fn new(bytes: usize) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("overspill-engine-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let mut x = 88_172_645_463_325_252u64;
        let bytes: Vec<u8> = (0..bytes)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect();
        std::fs::write(&path, &bytes).unwrap();
        Self { path, bytes }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

const ROWS: u64 = 200;
const COLUMNS: u64 = 1024;
const MATRICES: u64 = 12;
const MATRIX: u64 = ROWS * COLUMNS * 2;
/// Nothing in real files is aligned.
const OFFSET: u64 = 1234;
const TABLE: u64 = OFFSET + MATRICES * MATRIX + 8 * 100;

fn raw(name: String, shape: &[u64], offset: u64, role: Role) -> RawTensor {
    RawTensor { name, dtype: DType::F16, shape: shape.to_vec(), file: FileId(0), offset, role }
}

/// Matrices, four vectors and a table, as a model has them.
fn model() -> (Fixture, Catalog, Vec<TensorId>, Vec<TensorId>) {
    let fixture = Fixture::new((TABLE + 300 * COLUMNS * 2) as usize);
    let mut builder = CatalogBuilder::new();
    builder.file(&fixture.path, fixture.bytes.len() as u64);
    builder.payload_bytes(32 << 10);
    let matrices = (0..MATRICES)
        .map(|i| builder.tensor(raw(format!("m{i}"), &[ROWS, COLUMNS], OFFSET + i * MATRIX, Role::Matrix)));
    let matrices: Vec<_> = matrices.collect();
    let smalls =
        (0..4).map(|i| builder.tensor(raw(format!("v{i}"), &[50], OFFSET + MATRICES * MATRIX + 200 * i, Role::Small)));
    let smalls: Vec<_> = smalls.collect();
    builder.tensor(raw("table".into(), &[300, COLUMNS], TABLE, Role::Table));
    (fixture, builder.build().unwrap(), matrices, smalls)
}

fn schedule(engine: &Engine, matrices: &[TensorId], smalls: &[TensorId]) -> Schedule {
    let catalog = engine.catalog();
    let tier = engine.compute_tier();
    let steps = matrices.iter().flat_map(|&m| {
        let pieces = catalog.pieces(m, 0);
        let step = |pieces: &[overspill::Piece]| Step {
            tier,
            blocks: pieces.iter().map(|p| p.block).collect(),
            choice_max: 0,
        };
        pieces.chunks(2).map(step).collect::<Vec<_>>()
    });
    let mut standing: Vec<_> = smalls.iter().map(|&s| catalog.pieces(s, 0)[0].block).collect();
    standing.dedup();
    Schedule { label: "test".into(), cyclic: true, steps: steps.collect(), standing }
}

/// What is told adds up to what is counted, and each block's story makes sense: read before it goes, gone before it is
/// read again.
#[test]
fn events_tell_what_the_figures_count() {
    use overspill::Event;
    for prefetch in [Prefetch::Off, Prefetch::Auto] {
        let (fixture, engine, matrices, smalls) = small_engine(Engine::builder().prefetch(prefetch), 30.0);
        let schedule = engine.register(schedule(&engine, &matrices, &smalls)).unwrap();
        let mut sequence = engine.sequence(schedule, "test").unwrap();
        let events = engine.subscribe();
        let before = engine.stats().unwrap();
        for _ in 0..3 {
            check_pass(&engine, &fixture, &mut sequence).unwrap();
        }
        let chosen = sequence.schedule().steps[1].blocks.clone();
        sequence.expect(StepId(1), &chosen, 0.25).unwrap();
        let steps = sequence.schedule().steps.clone();
        let host = engine.compute_tier();
        drop(sequence);
        // What was under way is told when it ends, and counted before it is told.
        let (mut told, mut batch) = (Vec::new(), Vec::new());
        let after = loop {
            let quiet = engine.stats().unwrap();
            assert!(events.take(&mut batch, Duration::from_millis(100)));
            told.append(&mut batch);
            let now = engine.stats().unwrap();
            if now.disk.reads == quiet.disk.reads && now.tiers[0].blocks.evictions == quiet.tiers[0].blocks.evictions {
                break now;
            }
        };
        assert_eq!(events.missed(), 0);
        let (mut read_bytes, mut evictions, mut stalled_ns, mut ahead) = (0, 0, 0, 0);
        let mut present = std::collections::BTreeMap::new();
        let (mut next_step, mut expected, mut latest_ns) = (0, 0, 0);
        for event in &told {
            match *event {
                // Given up, since what is needed sooner wanted the room.
                Event::Read { bytes: 0, speculative, .. } => assert!(speculative, "{event:?}"),
                Event::Read { from_ns, at_ns, block, tier, bytes, speculative } => {
                    assert!(from_ns < at_ns && tier == host, "{event:?}");
                    assert_ne!(present.insert(block, true), Some(true), "{block} was there");
                    let payload: u64 = engine.catalog().parts(block).iter().map(|part| part.bytes).sum();
                    assert!((payload..payload + (64 << 10)).contains(&bytes), "{block}: {bytes} of {payload}");
                    read_bytes += bytes;
                    ahead += u64::from(speculative);
                }
                Event::Evicted { at_ns, block, tier } => {
                    assert!(at_ns > 0 && tier == host);
                    assert_ne!(present.insert(block, false), Some(false), "{block} was gone");
                    evictions += 1;
                }
                Event::Stalled { ns, blocks, at_ns } => {
                    assert!(ns > 0 && at_ns >= ns && (1..=2).contains(&blocks), "{event:?}");
                    stalled_ns += ns;
                }
                Event::Step { from_ns, at_ns, step, blocks, .. } => {
                    assert_eq!(step.index(), next_step % steps.len());
                    assert_eq!(blocks, steps[step.index()].blocks.len());
                    assert!(from_ns <= at_ns && from_ns >= latest_ns, "steps follow one another");
                    (next_step, latest_ns) = (next_step + 1, at_ns);
                }
                Event::Expected { step, blocks, probability_milli, .. } => {
                    assert_eq!((step, blocks, probability_milli), (StepId(1), chosen.len(), 250));
                    expected += 1;
                }
                _ => panic!("without a GPU nothing is uploaded: {event:?}"),
            }
        }
        assert_eq!((next_step, expected), (3 * steps.len(), 1));
        assert_eq!(read_bytes, after.disk.read_bytes - before.disk.read_bytes);
        assert_eq!(evictions, after.tiers[0].blocks.evictions - before.tiers[0].blocks.evictions);
        assert_eq!(stalled_ns, after.stall_ns - before.stall_ns);
        assert!(evictions > 0 && stalled_ns > 0);
        assert_eq!(ahead > 0, prefetch == Prefetch::Auto, "{ahead} of the reads were not waited for");
        drop(engine);
        assert!(!events.take(&mut batch, Duration::from_secs(60)), "without an engine this is the last");
    }
}

/// Walks all matrices and compares every byte.
fn check_pass(engine: &Engine, fixture: &Fixture, sequence: &mut overspill::Sequence) -> Result<(), Error> {
    let steps = sequence.schedule().steps.len();
    let catalog = engine.catalog();
    for step in 0..steps {
        let set = sequence.acquire(StepId(step as u32))?;
        for lease in set.iter() {
            let part = catalog.parts(lease.block())[0];
            let start = part.file_offset as usize;
            let expected = &fixture.bytes[start..start + part.bytes as usize];
            let at = part.slot_offset as usize;
            assert!(lease.slot()[at..at + expected.len()] == *expected, "step {step} {}", lease.block());
        }
    }
    Ok(())
}

fn small_engine(builder: EngineBuilder, percent: f64) -> (Fixture, Engine, Vec<TensorId>, Vec<TensorId>) {
    let (fixture, catalog, matrices, smalls) = model();
    let engine = builder.ram(Budget::Percent(percent)).open_catalog(catalog).unwrap();
    (fixture, engine, matrices, smalls)
}

/// Invariants 1 and 2: every byte is right and no budget is exceeded, whatever the budget, policy and reader.
#[test]
fn every_combination_leases_the_bytes_of_the_file() {
    for percent in [100.0, 50.0, 25.0, 12.0] {
        for evict in [Evict::Lru, Evict::NextUse, Evict::Planned] {
            for prefetch in [Prefetch::Auto, Prefetch::Off] {
                for io in IoChoice::ALL {
                    let builder = Engine::builder().evict(evict).prefetch(prefetch).io(io);
                    let (fixture, catalog, matrices, smalls) = model();
                    let engine = match builder.ram(Budget::Percent(percent)).open_catalog(catalog) {
                        Ok(engine) => engine,
                        Err(error) => {
                            assert_eq!(io, IoChoice::Uring, "{error}");
                            continue;
                        }
                    };
                    let schedule = engine.register(schedule(&engine, &matrices, &smalls)).unwrap();
                    let mut sequence = engine.sequence(schedule, "test").unwrap();
                    for _ in 0..3 {
                        check_pass(&engine, &fixture, &mut sequence).unwrap();
                    }
                    let stats = engine.stats().unwrap();
                    let host = stats.tier("host").unwrap();
                    assert!(host.peak_bytes <= host.budget_bytes, "{host:?}");
                    assert!(percent > 99.0 || host.blocks.evictions > 0);
                }
            }
        }
    }
}

/// Invariant 5, with real threads: a planned cycle reads T − (B − R).
#[test]
fn a_planned_cycle_reads_what_does_not_fit() {
    let (fixture, engine, matrices, smalls) = small_engine(Engine::builder(), 50.0);
    let id = engine.register(schedule(&engine, &matrices, &smalls)).unwrap();
    let mut sequence = engine.sequence(id, "test").unwrap();
    let standing = engine.acquire_set(&sequence.schedule().standing.clone()).unwrap();
    for _ in 0..2 {
        check_pass(&engine, &fixture, &mut sequence).unwrap();
    }
    let before = engine.stats().unwrap().tier("host").unwrap().blocks.loads;
    for _ in 0..10 {
        check_pass(&engine, &fixture, &mut sequence).unwrap();
    }
    let stats = engine.stats().unwrap();
    let host = &stats.tier("host").unwrap().blocks;
    let blocks = engine.catalog().blocks().len() as u64;
    let ring = host.ring_bytes / engine.catalog().slot_bytes();
    let slots = (host.budget_bytes / engine.catalog().slot_bytes()).min(blocks);
    let per_cycle = (host.loads - before) as f64 / 10.0;
    let bound = (blocks - (slots - ring) + 1) as f64;
    assert!(per_cycle <= bound, "{per_cycle} blocks a cycle, at most {bound}: {stats:?}");
    drop(standing);
}

#[test]
fn the_order_of_use_is_learned_where_none_is_declared() {
    let (_fixture, engine, matrices, _) = small_engine(Engine::builder(), 50.0);
    let blocks: Vec<_> =
        matrices.iter().flat_map(|&m| engine.catalog().pieces(m, 0)).map(|piece| piece.block).collect();
    assert_eq!(engine.stats().unwrap().decision.evict, "lru");
    for _ in 0..6 {
        for &block in &blocks {
            drop(engine.acquire(block).unwrap());
        }
    }
    let before = engine.stats().unwrap();
    assert_eq!(before.decision.evict, "planned", "{}", before.decision.why);
    for &block in &blocks {
        drop(engine.acquire(block).unwrap());
    }
    let after = engine.stats().unwrap();
    let loads = after.tiers[0].blocks.loads - before.tiers[0].blocks.loads;
    let kept = after.tiers[0].blocks.kept_blocks;
    assert!(kept > 30 && loads <= blocks.len() as u64 - kept + 2, "{loads} of {}, {kept} kept", blocks.len());
}

#[test]
fn many_sequences_at_once_all_see_the_file() {
    let (fixture, engine, matrices, smalls) = small_engine(Engine::builder(), 30.0);
    let id = engine.register(schedule(&engine, &matrices, &smalls)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (engine, fixture) = (engine.clone(), &fixture);
            scope.spawn(move || {
                let mut sequence = engine.sequence(id, &format!("thread {thread}")).unwrap();
                for _ in 0..5 {
                    check_pass(&engine, fixture, &mut sequence).unwrap();
                }
            });
        }
    });
}

#[test]
fn fill_and_gather_copy_any_bytes() {
    let (fixture, engine, matrices, smalls) = small_engine(Engine::builder(), 30.0);
    for (offset, len) in [(0, MATRIX), (1, 77), (40_000, 100_000), (MATRIX - 5, 5), (17, 0)] {
        let mut bytes = vec![0; len as usize];
        engine.fill(matrices[3], offset, &mut bytes).unwrap();
        let start = (OFFSET + 3 * MATRIX + offset) as usize;
        assert!(bytes == fixture.bytes[start..start + len as usize]);
    }
    assert_eq!(engine.fill(matrices[3], MATRIX - 5, &mut [0; 6]).unwrap_err().kind(), ErrorKind::NotFound);
    let mut vector = [0; 100];
    engine.fill(smalls[2], 0, &mut vector).unwrap();
    let start = (OFFSET + MATRICES * MATRIX + 400) as usize;
    assert_eq!(vector, fixture.bytes[start..start + 100]);

    let table = engine.catalog().tensor(engine.catalog().find("table").unwrap()).table.unwrap();
    let rows = [5, 0, 299, 5, 5, 17];
    for _ in 0..2 {
        let mut bytes = vec![0; rows.len() * 2048];
        engine.gather(table, &rows, &mut bytes).unwrap();
        for (row, got) in rows.iter().zip(bytes.chunks(2048)) {
            let start = (TABLE + row * 2048) as usize;
            assert!(*got == fixture.bytes[start..start + 2048]);
        }
    }
    assert_eq!(engine.gather(table, &[300], &mut [0; 2048]).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(engine.gather(table, &[0], &mut [0; 2]).unwrap_err().kind(), ErrorKind::Config);
}

#[test]
fn a_cut_tensor_has_no_single_pointer_and_a_contiguous_one_has() {
    let (fixture, mut catalog) = (Fixture::new(400_000), CatalogBuilder::new());
    catalog.file(&fixture.path, 400_000);
    catalog.payload_bytes(16 << 10);
    let cut = catalog.tensor(raw("cut".into(), &[64, 1024], 0, Role::Matrix));
    let whole = catalog.tensor(raw("whole".into(), &[64, 1024], 64 * 2048 + 3, Role::Contiguous));
    let engine = Engine::builder().ram(Budget::Bytes(200_000)).open_catalog(catalog.build().unwrap()).unwrap();
    assert_eq!(engine.acquire_tensor(cut).unwrap_err().kind(), ErrorKind::NotContiguous);
    for _ in 0..3 {
        // The cut one fills the tier, so that adjacent slots must be made free.
        for piece in engine.catalog().pieces(cut, 0) {
            drop(engine.acquire(piece.block).unwrap());
        }
        let (lease, piece) = engine.acquire_tensor(whole).unwrap();
        assert!(lease.piece(&piece) == &fixture.bytes[64 * 2048 + 3..64 * 2048 * 2 + 3]);
    }
}

#[test]
fn leases_that_hold_all_room_are_named_and_the_engine_goes_on() {
    let builder = Engine::builder().patience(Duration::from_millis(50));
    let (_fixture, engine, matrices, _) = small_engine(builder, 20.0);
    let blocks: Vec<_> = matrices.iter().flat_map(|&m| engine.catalog().pieces(m, 0)).map(|p| p.block).collect();
    let mut held = Vec::new();
    let error = loop {
        match engine.acquire(blocks[held.len()]) {
            Ok(lease) => held.push(lease),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::PinnedOut);
    assert!(error.to_string().contains(&format!("'engine' holds {} blocks", held.len())), "{error}");
    held.clear();
    drop(engine.acquire(blocks[blocks.len() - 1]).unwrap());
}

#[test]
fn a_budget_too_small_is_refused_with_the_smallest_that_works() {
    let (fixture, catalog, matrices, smalls) = model();
    let open = |bytes| {
        let engine = Engine::builder().ram(Budget::Bytes(bytes)).open_catalog(catalog.clone())?;
        let id = engine.register(schedule(&engine, &matrices, &smalls))?;
        let mut sequence = engine.sequence(id, "test")?;
        let standing = engine.acquire_set(&sequence.schedule().standing.clone())?;
        check_pass(&engine, &fixture, &mut sequence)?;
        drop(standing);
        Ok::<_, Error>(())
    };
    let mut budget = 1;
    for _ in 0..3 {
        match open(budget) {
            Ok(()) => return,
            Err(Error::TooSmall { bytes_min, budget_bytes, .. }) => {
                assert!(bytes_min > budget && budget_bytes == budget);
                budget = bytes_min;
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the smallest budget that works does not work: {budget}");
}

#[test]
fn a_lowered_budget_is_obeyed_and_a_raised_one_used() {
    let (fixture, engine, matrices, smalls) = small_engine(Engine::builder(), 110.0);
    let id = engine.register(schedule(&engine, &matrices, &smalls)).unwrap();
    let mut sequence = engine.sequence(id, "test").unwrap();
    check_pass(&engine, &fixture, &mut sequence).unwrap();
    let full = engine.stats().unwrap();
    let lowered = full.mapped_bytes / 2;
    engine.set_budget(engine.host_tier(), lowered).unwrap();
    check_pass(&engine, &fixture, &mut sequence).unwrap();
    let stats = engine.stats().unwrap();
    assert!(stats.tiers[0].blocks.used_bytes <= lowered && stats.mapped_bytes <= lowered, "{stats:?}");
    engine.set_budget(engine.host_tier(), full.tiers[0].budget_bytes).unwrap();
    check_pass(&engine, &fixture, &mut sequence).unwrap();
    let loads = engine.stats().unwrap().tiers[0].blocks.loads;
    check_pass(&engine, &fixture, &mut sequence).unwrap();
    assert_eq!(engine.stats().unwrap().tiers[0].blocks.loads, loads, "all is resident again");
}

/// A budget could be lowered below the largest step: the failure came at the first demand.
#[test]
fn a_budget_in_which_no_step_would_fit_is_refused_and_changes_nothing() {
    let (fixture, engine, matrices, smalls) = small_engine(Engine::builder(), 50.0);
    let id = engine.register(schedule(&engine, &matrices, &smalls)).unwrap();
    let host = engine.host_tier();
    let before = engine.stats().unwrap();
    let mut smallest = 4096;
    loop {
        match engine.set_budget(host, smallest) {
            Ok(()) => break,
            Err(Error::TooSmall { setting, budget_bytes, bytes_min }) => {
                assert_eq!((setting.as_str(), budget_bytes, smallest), ("--ram", smallest, 4096));
                let now = engine.stats().unwrap();
                assert_eq!(now.tiers[0].budget_bytes, before.tiers[0].budget_bytes);
                assert_eq!(now.tiers[0].blocks, before.tiers[0].blocks);
                smallest = bytes_min;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(smallest < before.tiers[0].budget_bytes, "{smallest}");
    let mut sequence = engine.sequence(id, "test").unwrap();
    let standing = engine.acquire_set(&sequence.schedule().standing.clone()).unwrap();
    check_pass(&engine, &fixture, &mut sequence).unwrap();
    drop(standing);
    engine.set_budget(host, before.tiers[0].budget_bytes).unwrap();
    let refused = engine.set_budget(host, smallest - 1).unwrap_err();
    assert!(matches!(refused, Error::TooSmall { bytes_min, .. } if bytes_min == smallest), "{refused}");
}

#[test]
fn what_is_reserved_in_host_memory_is_bounded_apart() {
    let (_fixture, engine, ..) = small_engine(Engine::builder().kv_bytes(10_000), 50.0);
    let host = engine.host_tier();
    let before = engine.stats().unwrap().tiers[0].clone();
    let kept = engine.reserve(host, 6000, "cache").unwrap();
    let refused = engine.reserve(host, 5000, "cache").unwrap_err();
    assert!(matches!(refused, Error::TooSmall { bytes_min: 11_000, .. }), "{refused}");
    let now = engine.stats().unwrap().tiers[0].clone();
    assert_eq!((now.budget_bytes, now.blocks.budget_bytes), (before.budget_bytes, before.blocks.budget_bytes));
    assert_eq!((now.reserved_bytes, now.reserved_peak_bytes), (6000, 6000));
    drop(kept);
    assert_eq!(engine.stats().unwrap().tiers[0].reserved_bytes, 0);
    drop(engine.reserve(host, 10_000, "cache").unwrap());
}

/// Invariant 9 and 4: a file that shrinks fails the demands for what is gone, and nothing else.
#[test]
fn a_truncated_file_is_an_error_and_not_a_crash() {
    for io in [IoChoice::Mmap, IoChoice::Pread, IoChoice::Auto] {
        let (fixture, engine, matrices, _) = small_engine(Engine::builder().io(io), 30.0);
        let first = engine.catalog().pieces(matrices[0], 0)[0];
        let last = engine.catalog().pieces(matrices[11], 0)[3];
        let file = std::fs::OpenOptions::new().write(true).open(&fixture.path).unwrap();
        file.set_len(OFFSET + MATRIX).unwrap();
        let error = engine.acquire(last.block).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadFile);
        let text = error.to_string();
        assert!(text.contains("'m11'") && text.contains("truncated"), "{text}");
        let lease = engine.acquire(first.block).unwrap();
        assert!(lease.piece(&first) == &fixture.bytes[OFFSET as usize..][..first.bytes as usize]);
    }
}

#[test]
fn a_changed_file_is_noticed_when_a_pass_begins() {
    let (fixture, engine, matrices, smalls) = small_engine(Engine::builder(), 30.0);
    let id = engine.register(schedule(&engine, &matrices, &smalls)).unwrap();
    let mut sequence = engine.sequence(id, "test").unwrap();
    check_pass(&engine, &fixture, &mut sequence).unwrap();
    std::fs::OpenOptions::new().write(true).open(&fixture.path).unwrap().set_len(TABLE).unwrap();
    let error = check_pass(&engine, &fixture, &mut sequence).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadFile);
}

#[test]
fn closing_ends_waiting_and_leases_outlive_the_engine() {
    let (fixture, engine, matrices, smalls) = small_engine(Engine::builder(), 30.0);
    let piece = engine.catalog().pieces(matrices[0], 0)[0];
    let lease = engine.acquire(piece.block).unwrap();
    let id = engine.register(schedule(&engine, &matrices, &smalls)).unwrap();
    std::thread::scope(|scope| {
        let walker = scope.spawn(|| {
            let mut sequence = engine.sequence(id, "walker").unwrap();
            loop {
                if let Err(error) = check_pass(&engine, &fixture, &mut sequence) {
                    return error;
                }
            }
        });
        std::thread::sleep(Duration::from_millis(30));
        engine.close();
        assert_eq!(walker.join().unwrap().kind(), ErrorKind::Closed);
    });
    assert_eq!(engine.stats().unwrap_err().kind(), ErrorKind::Closed);
    drop(engine);
    assert!(lease.piece(&piece) == &fixture.bytes[OFFSET as usize..][..piece.bytes as usize]);
}

#[test]
fn a_demand_can_be_awaited_withdrawn_or_bounded_in_time() {
    let (_fixture, engine, matrices, _) = small_engine(Engine::builder(), 20.0);
    let blocks: Vec<_> = matrices.iter().flat_map(|&m| engine.catalog().pieces(m, 0)).map(|p| p.block).collect();
    let set = futures_lite_block_on(engine.request_set(&blocks[..2]).unwrap()).unwrap();
    assert_eq!(set.len(), 2);
    drop(engine.request_set(&blocks[2..4]).unwrap());
    // Leases on all but five slots.
    let room = (engine.stats().unwrap().tiers[0].blocks.budget_bytes / engine.catalog().slot_bytes()) as usize - 5;
    let held = engine.acquire_set(&blocks[..room]).unwrap();
    let soon = std::time::Instant::now() + Duration::from_millis(20);
    let wanted = &blocks[room..room + 6];
    assert!(engine.request_set(wanted).unwrap().wait_until(soon).unwrap().is_none());
    drop((held, set));
    assert_eq!(engine.acquire_set(wanted).unwrap().len(), 6);
}

/// Runs a future on this thread.
fn futures_lite_block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}
