//! Faults under a running engine: a disk that fails or slows down, a budget that sinks, others on the same file. What
//! is leased is right all the same, and every demand ends.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill::{
    BlockId, Budget, Catalog, CatalogBuilder, DType, Engine, EngineBuilder, Error, ErrorKind, FileId, IoBuf, RawTensor,
    Role, Schedule, Sequence, Step, StepId, TensorId,
};
use overspill_core::seam::{ReadFault, Storage};
use overspill_nvme::NvmeError;
use overspill_nvme::decorate::{Counted, Counters, Fault, FaultPlan, Faulty, Throttled, Wire, WireControl};
use parking_lot::Mutex;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

const EIO: i32 = 5;
const MATRICES: u64 = 12;
const ROWS: u64 = 128;
const COLUMNS: u64 = 1024;
const MATRIX: u64 = ROWS * COLUMNS * 2;
/// Nothing in real files is aligned.
const OFFSET: u64 = 1234;
const SMALLS: u64 = OFFSET + MATRICES * MATRIX;
/// Far enough apart that no two vectors share a page.
const SMALL_STEP: u64 = 8192;

/// A file of numbers that differ, twelve matrices and four vectors in it. It goes when this does.
struct Model {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Model {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("overspill-faults-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let words = (SMALLS + 4 * SMALL_STEP).div_ceil(4) as u32;
        let bytes: Vec<u8> =
            (0..words).flat_map(|i| i.wrapping_mul(0x9E37_79B9).rotate_left(7).to_le_bytes()).collect();
        std::fs::write(&path, &bytes).unwrap();
        Self { path, bytes }
    }

    fn catalog(&self) -> Catalog {
        let mut builder = CatalogBuilder::new();
        builder.file(&self.path, self.bytes.len() as u64);
        builder.payload_bytes(32 << 10);
        let mut tensor = |name: String, shape: &[u64], offset, role| -> TensorId {
            builder.tensor(RawTensor { name, dtype: DType::F16, shape: shape.to_vec(), file: FileId(0), offset, role })
        };
        for i in 0..MATRICES {
            tensor(format!("m{i}"), &[ROWS, COLUMNS], OFFSET + i * MATRIX, Role::Matrix);
        }
        for i in 0..4 {
            tensor(format!("v{i}"), &[50], SMALLS + SMALL_STEP * i, Role::Small);
        }
        builder.build().unwrap()
    }

    fn open(&self, builder: EngineBuilder) -> Engine {
        builder.open_catalog(self.catalog()).unwrap()
    }

    /// Whether a lease has the bytes of the file.
    fn check(&self, lease: &overspill::Lease, catalog: &Catalog) {
        for part in catalog.parts(lease.block()) {
            let expected = &self.bytes[part.file_offset as usize..][..part.bytes as usize];
            assert!(lease.slot()[part.slot_offset as usize..][..expected.len()] == *expected, "{}", lease.block());
        }
    }

    /// Walks a schedule once and compares every byte.
    fn pass(&self, engine: &Engine, sequence: &mut Sequence) -> Result<(), Error> {
        for step in 0..sequence.schedule().steps.len() {
            let set = sequence.acquire(StepId(step as u32))?;
            set.iter().for_each(|lease| self.check(lease, engine.catalog()));
        }
        Ok(())
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Tensor by name.
fn tensor(engine: &Engine, name: &str) -> TensorId {
    let found = engine.catalog().tensors().iter().position(|tensor| tensor.name == name);
    TensorId(found.unwrap() as u32)
}

/// The blocks of a matrix.
fn blocks(engine: &Engine, name: &str) -> Vec<BlockId> {
    engine.catalog().pieces(tensor(engine, name), 0).iter().map(|piece| piece.block).collect()
}

/// A sequence through all matrices, two blocks a step.
fn walk(engine: &Engine) -> Sequence {
    let tier = engine.compute_tier();
    let all: Vec<_> = (0..MATRICES).flat_map(|i| blocks(engine, &format!("m{i}"))).collect();
    let steps = all.chunks(2).map(|blocks| Step { tier, blocks: blocks.to_vec(), choice_max: 0 }).collect();
    let schedule = Schedule { label: "test".into(), cyclic: true, steps, standing: vec![] };
    engine.sequence(engine.register(schedule).unwrap(), "test").unwrap()
}

/// Reads that touch these bytes fail, as often as `times` says; `tried` counts them.
#[derive(Clone, Default)]
struct Bad {
    bytes: std::ops::Range<u64>,
    times: Arc<AtomicUsize>,
    tried: Arc<AtomicUsize>,
}

impl Bad {
    fn new(bytes: std::ops::Range<u64>, times: usize) -> Self {
        Self { bytes, times: Arc::new(AtomicUsize::new(times)), tried: Arc::default() }
    }

    fn plan(&self) -> FaultPlan {
        let bad = self.clone();
        FaultPlan::new(move |read| {
            let touches = read.offset < bad.bytes.end && bad.bytes.start < read.offset + read.len as u64;
            if !touches {
                return None;
            }
            bad.tried.fetch_add(1, Ordering::SeqCst);
            let left = bad.times.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
            left.is_ok().then_some(Fault::Fail(ReadFault::System { errno: EIO }))
        })
    }

    fn builder(&self) -> EngineBuilder {
        let bad = self.clone();
        Engine::builder().decorate_storage(move |sink, make| {
            Ok(Box::new(Faulty::around(bad.plan(), sink, make)?) as Box<dyn Storage<IoBuf>>)
        })
    }

    fn tried(&self) -> usize {
        self.tried.load(Ordering::SeqCst)
    }
}

/// The middle of the second block of a matrix: no other block shares a page with it.
fn within(matrix: u64) -> std::ops::Range<u64> {
    let at = OFFSET + matrix * MATRIX + 48 * 1024;
    at..at + 1
}

#[test]
fn a_block_that_cannot_be_read_is_tried_twice_named_and_tried_again_when_it_is_wanted_again() {
    let model = Model::new();
    let bad = Bad::new(within(5), usize::MAX);
    let engine = model.open(bad.builder().ram(Budget::Percent(30.0)));
    let broken = blocks(&engine, "m5")[1];
    let error = engine.acquire(broken).unwrap_err();
    assert_eq!((error.kind(), bad.tried()), (ErrorKind::Io, 2), "{error}");
    let part = engine.catalog().parts(broken)[0];
    let Error::Read { path, tensor, offset, .. } = &error else { panic!("{error}") };
    assert_eq!((path, tensor.as_str()), (&model.path, "m5"));
    assert!(*offset <= part.file_offset && part.file_offset - offset < 4096, "{offset} of {}", part.file_offset);
    let system = std::io::Error::from_raw_os_error(EIO).to_string();
    for word in [model.path.to_str().unwrap(), "'m5'", &offset.to_string(), &system, "check the disk"] {
        assert!(error.to_string().contains(word), "'{word}' is not in: {error}");
    }
    // All others come.
    let others = (0..MATRICES).flat_map(|i| blocks(&engine, &format!("m{i}"))).filter(|&block| block != broken);
    others.for_each(|block| model.check(&engine.acquire(block).unwrap(), engine.catalog()));
    // Wanted again, it is tried again: in vain at first, and then the disk has recovered.
    assert_eq!(engine.acquire(broken).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(bad.tried(), 4);
    bad.times.store(0, Ordering::SeqCst);
    model.check(&engine.acquire(broken).unwrap(), engine.catalog());
    assert_eq!(bad.tried(), 5);
}

#[test]
fn one_failure_is_made_good_by_one_retry() {
    let model = Model::new();
    let bad = Bad::new(within(7), 1);
    let engine = model.open(bad.builder().ram(Budget::Percent(30.0)));
    let mut sequence = walk(&engine);
    model.pass(&engine, &mut sequence).unwrap();
    assert!(bad.tried() >= 2);
    assert_eq!(bad.times.load(Ordering::SeqCst), 0, "it did fail once");
}

#[test]
fn of_a_bundle_the_tensor_that_failed_is_named() {
    let model = Model::new();
    let bad = Bad::new(SMALLS + 2 * SMALL_STEP..SMALLS + 2 * SMALL_STEP + 100, usize::MAX);
    let engine = model.open(bad.builder());
    let bundle = engine.catalog().pieces(tensor(&engine, "v0"), 0)[0].block;
    let error = engine.acquire(bundle).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("'v2'"), "{error}");
    assert_eq!(bad.tried(), 2);
    model.check(&engine.acquire(blocks(&engine, "m0")[0]).unwrap(), engine.catalog());
    bad.times.store(0, Ordering::SeqCst);
    model.check(&engine.acquire(bundle).unwrap(), engine.catalog());
}

#[test]
fn a_walk_ends_at_the_broken_block_and_goes_on_when_it_is_whole() {
    let model = Model::new();
    let bad = Bad::new(within(6), usize::MAX);
    let engine = model.open(bad.builder().ram(Budget::Percent(30.0)));
    let mut sequence = walk(&engine);
    for _ in 0..3 {
        let error = model.pass(&engine, &mut sequence).unwrap_err();
        assert!(error.to_string().contains("'m6'"), "{error}");
    }
    bad.times.store(0, Ordering::SeqCst);
    for _ in 0..3 {
        model.pass(&engine, &mut sequence).unwrap();
    }
}

#[test]
fn a_disk_that_becomes_ten_times_slower_costs_time_and_nothing_else() {
    const WINDOW: u64 = 256 << 10;
    let fast = Wire { bytes_per_s: 400e6, latency: Duration::from_micros(200) };
    let slow = Wire { bytes_per_s: 40e6, latency: Duration::from_millis(2) };
    let model = Model::new();
    let wire = WireControl::from(fast);
    let counters = Arc::<Mutex<Option<Arc<Counters>>>>::default();
    let (of_wire, told) = (wire.clone(), Arc::clone(&counters));
    // Waiting for a slow disk is no waiting for room: the patience for leases must not end it.
    let builder = Engine::builder()
        .ram(Budget::Percent(40.0))
        .window_bytes(WINDOW)
        .patience(Duration::from_millis(1))
        .decorate_storage(move |sink, make| {
            let counted = Counted::around(sink, |sink| Throttled::around::<NvmeError>(of_wire.clone(), sink, make))?;
            *told.lock() = Some(counted.counters());
            Ok(Box::new(counted) as Box<dyn Storage<IoBuf>>)
        });
    let engine = model.open(builder);
    let counters = counters.lock().clone().unwrap();
    let mut sequence = walk(&engine);
    let mut most_in_flight = 0;
    let mut passes = |count: usize| {
        let before = engine.stats().unwrap();
        for _ in 0..count {
            for step in 0..sequence.schedule().steps.len() {
                let set = sequence.acquire(StepId(step as u32)).unwrap();
                set.iter().for_each(|lease| model.check(lease, engine.catalog()));
                most_in_flight = most_in_flight.max(counters.snapshot().in_flight());
            }
        }
        let after = engine.stats().unwrap();
        assert!(after.disk.read_bytes > before.disk.read_bytes, "it streams");
        after.stall_ns - before.stall_ns
    };
    passes(2);
    wire.set(slow);
    assert_eq!(wire.get(), slow);
    assert!(passes(2) > 0, "waiting is counted");
    wire.set(fast);
    passes(2);
    // The window is a bound in bytes, so a slow disk has no longer queue: the window, the step that waits, and one
    // block that begins before the window is full.
    let catalog = engine.catalog();
    let bound = WINDOW / (32 << 10) + 2 + 1;
    assert!(most_in_flight > 2 && most_in_flight <= bound, "{most_in_flight} of {bound}");
    let stats = engine.stats().unwrap();
    let host = stats.tier("host").unwrap();
    assert!(host.peak_bytes <= host.budget_bytes && catalog.slot_bytes() < WINDOW, "{host:?}");
}

#[test]
fn a_budget_changed_from_another_thread_in_the_middle_of_a_walk_is_obeyed() {
    let model = Model::new();
    let engine = model.open(Engine::builder().ram(Budget::Percent(100.0)));
    let weights = engine.catalog().weight_bytes();
    let mut sequence = walk(&engine);
    model.pass(&engine, &mut sequence).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let setter = scope.spawn(|| {
            let tier = engine.host_tier();
            for share in [70, 40, 25, 60, 30, 90, 25].into_iter().cycle().take(70) {
                let bytes = weights * share / 100;
                engine.set_budget(tier, bytes).unwrap();
                assert_eq!(engine.stats().unwrap().tier("host").unwrap().budget_bytes, bytes);
                std::thread::yield_now();
            }
            engine.set_budget(tier, weights / 4).unwrap();
            let error = engine.set_budget(tier, 1).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TooSmall, "what cannot work is refused, and the old budget holds");
            done.store(true, Ordering::Release);
        });
        let mut passes = 0;
        while !done.load(Ordering::Acquire) || passes < 3 {
            model.pass(&engine, &mut sequence).unwrap();
            passes += 1;
            assert!(!setter.is_finished() || done.load(Ordering::Acquire), "the setter failed");
        }
    });
    model.pass(&engine, &mut sequence).unwrap();
    let stats = engine.stats().unwrap();
    let host = stats.tier("host").unwrap();
    assert_eq!(host.budget_bytes, weights / 4);
    assert!(stats.mapped_bytes <= host.budget_bytes, "memory was given back: {} bytes are mapped", stats.mapped_bytes);
}

#[test]
fn two_engines_on_one_file_have_budgets_of_their_own() {
    let model = Model::new();
    let (large, small) = (
        model.open(Engine::builder().ram(Budget::Percent(150.0))),
        model.open(Engine::builder().ram(Budget::Percent(20.0))),
    );
    std::thread::scope(|scope| {
        for engine in [&large, &small] {
            let model = &model;
            scope.spawn(move || {
                let mut sequence = walk(engine);
                (0..5).for_each(|_| model.pass(engine, &mut sequence).unwrap());
            });
        }
    });
    let (large, small) = (large.stats().unwrap(), small.stats().unwrap());
    let (large, small) = (large.tier("host").unwrap(), small.tier("host").unwrap());
    assert!(large.budget_bytes > 5 * small.budget_bytes);
    assert!(small.peak_bytes <= small.budget_bytes && small.blocks.evictions > 0, "{small:?}");
    assert!(large.peak_bytes > small.budget_bytes && large.blocks.evictions == 0, "{large:?}");
}

#[test]
fn a_replaced_file_is_noticed_and_its_bytes_stay() {
    let model = Model::new();
    let engine = model.open(Engine::builder().ram(Budget::Percent(30.0)));
    engine.check_unchanged().unwrap();
    let other = model.path.with_extension("new");
    std::fs::write(&other, vec![0; model.bytes.len()]).unwrap();
    std::fs::rename(&other, &model.path).unwrap();
    let error = engine.check_unchanged().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BadFile);
    assert!(error.to_string().contains("another file has taken this name"), "{error}");
    model.pass(&engine, &mut walk(&engine)).unwrap();
    std::fs::remove_file(&model.path).unwrap();
    engine.check_unchanged().unwrap();
}
