//! The GPU tier on whatever adapter there is (lavapipe will do). Without one, every test is reported as ignored.
#![allow(clippy::unwrap_used, reason = "tests")]

use libtest_mimic::{Arguments, Trial};
use overspill_core::ids::TransferId;
use overspill_gpu::{
    Choice, GpuContext, GpuError, Poller, RingConfig, RingPath, Sink, Source, Upload, Uploader, VramSlabs, adapters,
    probe_uploads, wgpu,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const SECONDS_10: Duration = Duration::from_secs(10);

fn main() {
    let arguments = Arguments::from_args();
    let no_adapter = adapters().is_empty();
    let tests: [(&str, fn()); 11] = [
        ("a_software_adapter_is_only_taken_when_allowed", a_software_adapter_is_only_taken_when_allowed),
        ("slabs_are_made_on_demand_and_counted_until_nobody_holds_them", slabs),
        ("a_buffer_beyond_the_limits_is_an_error", a_buffer_beyond_the_limits_is_an_error),
        ("invalid_commands_are_errors_and_the_device_works_on", invalid_commands),
        ("a_lost_device_is_an_error", a_lost_device_is_an_error),
        ("uploads_of_any_alignment_and_length_arrive", uploads_arrive),
        ("an_upload_larger_than_the_ring_arrives", large_upload_arrives),
        ("a_bad_range_completes_with_an_error", bad_ranges),
        ("dropping_the_uploader_completes_everything_once", dropping_completes),
        ("completion_runs_every_callback_once_and_after_the_work", completion),
        ("the_probe_measures_every_path", probe),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
        .with_ignored_flag(no_adapter)
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

fn context() -> GpuContext {
    GpuContext::choose(Choice { name: None, allow_software: true }).unwrap()
}

fn read_back(context: &GpuContext, buffer: &wgpu::Buffer) -> Vec<u8> {
    let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
    let host = context.buffer("read back", buffer.size(), usage).unwrap();
    let mut encoder = context.device.create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &host, 0, buffer.size());
    let submission = context.submit("read back", [encoder.finish()]).unwrap();
    host.map_async(wgpu::MapMode::Read, .., |result| result.unwrap());
    assert!(context.wait(&submission, SECONDS_10).unwrap());
    host.get_mapped_range(..).unwrap().to_vec()
}

struct Rig {
    // The uploader goes first, so that the poller completes what it has begun.
    uploader: Uploader,
    _poller: Poller,
    results: Receiver<(TransferId, Result<(), GpuError>)>,
}

fn rig(context: &GpuContext, config: RingConfig) -> Rig {
    let poller = Poller::new(context).unwrap();
    let path = RingPath::new(context, &poller.completion(), config).unwrap();
    let (send, results) = channel();
    let sink: Sink = Arc::new(move |id, result| {
        let _ = send.send((id, result));
    });
    Rig { uploader: Uploader::new(Box::new(path), sink).unwrap(), _poller: poller, results }
}

fn pattern(len: usize) -> Arc<Vec<u8>> {
    Arc::new((0..len).map(|i| (i * 31 + i / 251) as u8).collect())
}

/// Shares one vector between uploads.
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn upload(id: u64, bytes: &Arc<Vec<u8>>, at: usize, len: usize, dst: &Arc<wgpu::Buffer>, dst_offset: u64) -> Upload {
    let source: Source = Box::new(Shared(Arc::clone(bytes)));
    Upload { id: TransferId(id), source, source_offset: at, dst: Arc::clone(dst), dst_offset, len }
}

fn a_software_adapter_is_only_taken_when_allowed() {
    let all = adapters();
    let real = all.iter().any(|a| !a.is_software);
    match GpuContext::choose(Choice::default()) {
        Ok(context) => assert!(real && !context.is_software()),
        Err(GpuError::NoAdapter { wanted: None, found }) => assert!(!real && found.len() == all.len()),
        Err(error) => panic!("{error}"),
    }
    let name = all[0].name.to_uppercase();
    let named = GpuContext::choose(Choice { name: Some(&name[..4]), allow_software: false }).unwrap();
    assert_eq!(named.info.name, all[0].name);
    assert!(named.memory_bytes() >= 64 << 20, "{}", named.memory_bytes());
    assert_eq!(all[0].memory_bytes.unwrap_or(named.memory_bytes()), named.memory_bytes());
    let error = GpuContext::choose(Choice { name: Some("no such"), allow_software: true }).unwrap_err();
    assert!(error.to_string().contains(&all[0].name), "{error}");
}

fn slabs() {
    let context = context();
    let slabs = VramSlabs::new(&context, 1 << 20);
    assert_eq!(slabs.backed_bytes(), 0);
    let third = slabs.ensure(3).unwrap();
    assert_eq!(third.size(), 1 << 20);
    assert!(Arc::ptr_eq(&third, &slabs.ensure(3).unwrap()));
    assert!(slabs.get(0).is_none());
    assert_eq!(slabs.backed_bytes(), 1 << 20);
    slabs.release(3);
    slabs.release(7);
    assert_eq!(slabs.backed_bytes(), 1 << 20, "a lease still holds it");
    drop(third);
    assert_eq!(slabs.backed_bytes(), 0);
    let huge = VramSlabs::new(&context, u64::MAX / 2);
    assert_eq!(huge.slab_bytes(), context.binding_bytes_max());
}

fn a_buffer_beyond_the_limits_is_an_error() {
    let context = context();
    let bytes = context.limits.max_buffer_size + 4;
    let error = context.buffer("too large", bytes, wgpu::BufferUsages::STORAGE).unwrap_err();
    assert!(matches!(error, GpuError::Refused { .. } | GpuError::OutOfMemory { .. }), "{error}");
    assert!(error.to_string().contains("too large"));
}

fn invalid_commands() {
    let context = context();
    let small = context.buffer("small", 16, wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC).unwrap();
    let result = context.guarded("a copy", 0, || {
        let mut encoder = context.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&small, 0, &small, 1 << 20, 16);
        context.queue.submit([encoder.finish()])
    });
    assert!(matches!(result, Err(GpuError::Refused { .. })), "{result:?}");
    context.check().unwrap();
    assert_eq!(read_back(&context, &small), [0; 16]);
}

fn a_lost_device_is_an_error() {
    let context = context();
    let rig = rig(&context, RingConfig::default());
    let dst = Arc::new(context.buffer("dst", 64, wgpu::BufferUsages::COPY_DST).unwrap());
    context.device.destroy();
    let _ = context.poll_once();
    assert!(matches!(context.check(), Err(GpuError::DeviceLost { .. })));
    let made = context.buffer("after", 64, wgpu::BufferUsages::COPY_DST);
    assert!(matches!(made, Err(GpuError::DeviceLost { .. })), "{made:?}");
    rig.uploader.submit(upload(9, &pattern(64), 0, 64, &dst, 0));
    let (id, result) = rig.results.recv_timeout(SECONDS_10).unwrap();
    assert_eq!(id, TransferId(9));
    assert!(matches!(result, Err(GpuError::DeviceLost { .. })), "{result:?}");
}

fn uploads_arrive() {
    let context = context();
    let rig = rig(&context, RingConfig { chunks: 2, chunk_bytes: 4096 });
    let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
    let dst = Arc::new(context.buffer("dst", 64 << 10, usage).unwrap());
    let bytes = pattern(9000);
    let mut expected = vec![0; 64 << 10];
    let cases = [(0, 4), (1, 5), (2, 4096), (3, 1), (5, 8191), (4095, 4098), (7, 0), (8999, 1), (1, 8999)];
    let mut at = 0;
    for (id, &(from, len)) in cases.iter().enumerate() {
        expected[at..at + len].copy_from_slice(&bytes[from..from + len]);
        rig.uploader.submit(upload(id as u64, &bytes, from, len, &dst, at as u64));
        at += len.next_multiple_of(4);
    }
    let mut seen = [0; 9];
    for _ in 0..cases.len() {
        let (id, result) = rig.results.recv_timeout(SECONDS_10).unwrap();
        result.unwrap();
        seen[id.0 as usize] += 1;
    }
    assert_eq!(seen, [1; 9]);
    assert!(read_back(&context, &dst) == expected);
}

fn large_upload_arrives() {
    let context = context();
    let rig = rig(&context, RingConfig { chunks: 2, chunk_bytes: 4096 });
    let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
    let dst = Arc::new(context.buffer("dst", 1 << 20, usage).unwrap());
    let bytes = pattern((1 << 20) + 3);
    rig.uploader.submit(upload(1, &bytes, 3, 1 << 20, &dst, 0));
    rig.results.recv_timeout(SECONDS_10).unwrap().1.unwrap();
    assert!(read_back(&context, &dst) == bytes[3..]);
    assert!(rig.results.try_recv().is_err(), "an upload completes once, however many chunks it takes");
    assert_eq!(rig.uploader.staging_bytes(), 8192);
}

fn bad_ranges() {
    let context = context();
    let rig = rig(&context, RingConfig::default());
    let dst = Arc::new(context.buffer("dst", 64, wgpu::BufferUsages::COPY_DST).unwrap());
    let bytes = pattern(64);
    let cases = [(0, 65, 0), (60, 8, 0), (usize::MAX, 8, 0), (0, 4, 2), (0, 61, 4), (0, 8, u64::MAX - 3)];
    for (id, (at, len, dst_offset)) in cases.into_iter().enumerate() {
        rig.uploader.submit(upload(id as u64, &bytes, at, len, &dst, dst_offset));
        let (got, result) = rig.results.recv_timeout(SECONDS_10).unwrap();
        assert_eq!(got.0, id as u64);
        assert!(matches!(result, Err(GpuError::Range { .. })), "{id}: {result:?}");
    }
}

fn dropping_completes() {
    let context = context();
    let rig = rig(&context, RingConfig { chunks: 2, chunk_bytes: 4096 });
    let dst = Arc::new(context.buffer("dst", 1 << 20, wgpu::BufferUsages::COPY_DST).unwrap());
    let bytes = pattern(1 << 20);
    for id in 0..50 {
        rig.uploader.submit(upload(id, &bytes, 0, 1 << 20, &dst, 0));
    }
    rig.uploader.cancel(TransferId(49));
    let Rig { uploader, _poller, results } = rig;
    drop(uploader);
    drop(_poller);
    let mut seen = [0; 50];
    let mut cancelled = 0;
    for (id, result) in results.iter() {
        seen[id.0 as usize] += 1;
        cancelled += u32::from(result == Err(GpuError::Cancelled));
        assert!(matches!(result, Ok(()) | Err(GpuError::Closed | GpuError::Cancelled)), "{result:?}");
    }
    assert_eq!(seen, [1; 50]);
    assert_eq!(cancelled, 1);
}

fn completion() {
    let context = context();
    let poller = Poller::new(&context).unwrap();
    let completion = poller.completion();
    let buffer = context.buffer("b", 1 << 20, wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC).unwrap();
    let calls = Arc::new(AtomicU32::new(0));
    for _ in 0..20 {
        let mut encoder = context.device.create_command_encoder(&Default::default());
        encoder.clear_buffer(&buffer, 0, None);
        let submission = context.submit("clear", [encoder.finish()]).unwrap();
        let (own, wait_for) = (Arc::clone(&calls), (context.clone(), submission.clone()));
        completion.after(submission, move |result| {
            result.unwrap();
            assert!(wait_for.0.wait(&wait_for.1, Duration::ZERO).unwrap(), "called before the work was done");
            own.fetch_add(1, Ordering::SeqCst);
        });
    }
    drop(poller);
    assert_eq!(calls.load(Ordering::SeqCst), 20);
    let own = Arc::clone(&calls);
    let submission = context.submit("nothing", []).unwrap();
    completion.after(submission, move |result| {
        assert_eq!(result, Err(GpuError::Closed));
        own.fetch_add(1, Ordering::SeqCst);
    });
    assert_eq!(calls.load(Ordering::SeqCst), 21);
}

fn probe() {
    let rates = probe_uploads(&context(), 1 << 20, 8 << 20).unwrap();
    let paths: Vec<_> = rates.iter().map(|r| r.path).collect();
    assert_eq!(paths[..2], ["write_buffer", "ring"]);
    for rate in &rates {
        assert_eq!(rate.bytes, 8 << 20);
        assert!(rate.gigabytes_per_s() > 0.0);
        println!("{}: {:.2} GB/s", rate.path, rate.gigabytes_per_s());
    }
}
