//! Uploads into VRAM: the staging ring that the engine uses, and wgpu's own `write_buffer` beside it, with the sizes of
//! blocks that models have. What arrived is read back and compared.
//!
//! `cargo bench -p overspill-gpu --bench upload`; the adapter is a real GPU if there is one, else a software one, whose
//! speed says nothing about GPUs. Under `cargo test` each case runs once, on few bytes; without any adapter it is
//! reported as ignored.
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use criterion::{BenchmarkId, Criterion, Throughput};
use libtest_mimic::{Arguments, Trial};
use overspill_core::ids::TransferId;
use overspill_gpu::{Choice, GpuContext, Poller, RingConfig, RingPath, Upload, Uploader, adapters, wgpu};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// What bytes go up with, and a buffer that they go to.
struct Rig {
    context: GpuContext,
    dst: Arc<wgpu::Buffer>,
    source: Arc<[u8]>,
    // The uploader goes first, so that the poller completes what it has begun.
    uploader: Uploader,
    results: Receiver<bool>,
    _poller: Poller,
}

impl Rig {
    fn new(block_bytes: u64) -> Self {
        let context = GpuContext::choose(Choice { name: None, allow_software: true }).unwrap();
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let dst = Arc::new(context.buffer("upload", block_bytes, usage).unwrap());
        let source: Arc<[u8]> = (0..block_bytes).map(|i| (i * 7 + (i >> 8)) as u8).collect();
        let poller = Poller::new(&context).unwrap();
        let path = RingPath::new(&context, &poller.completion(), RingConfig::default()).unwrap();
        let (done, results) = channel();
        let sink = Arc::new(move |_, result: Result<(), _>| done.send(result.is_ok()).unwrap());
        let uploader = Uploader::new(Box::new(path), sink).unwrap();
        Self { context, dst, source, uploader, results, _poller: poller }
    }

    /// Blocks through the ring, until all are there.
    fn ring(&self, blocks: u64) {
        for id in 0..blocks {
            self.uploader.submit(Upload {
                id: TransferId(id),
                source: Box::new(Arc::clone(&self.source)),
                source_offset: 0,
                dst: Arc::clone(&self.dst),
                dst_offset: 0,
                len: self.source.len(),
            });
        }
        for _ in 0..blocks {
            assert!(self.results.recv_timeout(PATIENCE).unwrap());
        }
    }

    /// The same with wgpu's own staging, which is allocated for each.
    fn write_buffer(&self, blocks: u64) {
        for _ in 0..blocks {
            self.context.queue.write_buffer(&self.dst, 0, &self.source);
            self.context.submit("upload", []).unwrap();
        }
        let last = self.context.submit("upload", []).unwrap();
        assert!(self.context.wait(&last, PATIENCE).unwrap());
    }

    fn arrived(&self) {
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
        let host = self.context.buffer("read back", self.dst.size(), usage).unwrap();
        let mut encoder = self.context.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&self.dst, 0, &host, 0, self.dst.size());
        let submission = self.context.submit("read back", [encoder.finish()]).unwrap();
        host.map_async(wgpu::MapMode::Read, .., |result| result.unwrap());
        assert!(self.context.wait(&submission, PATIENCE).unwrap());
        assert_eq!(host.get_mapped_range(..).unwrap().to_vec(), *self.source, "what arrived is what was sent");
    }
}

/// A way up.
type Path = (&'static str, fn(&Rig, u64));

const PATHS: [Path; 2] = [("ring", Rig::ring), ("write_buffer", Rig::write_buffer)];

fn measure(criterion: &mut Criterion) {
    for block_bytes in [64 << 10, 1 << 20, 4 << 20] {
        let rig = Rig::new(block_bytes);
        let blocks = (32 << 20) / block_bytes;
        let mut group = criterion.benchmark_group(format!("upload to {}", rig.context.info.name));
        group.throughput(Throughput::Bytes(blocks * block_bytes));
        for (name, upload) in PATHS {
            let id = BenchmarkId::new(name, format!("{} KiB", block_bytes >> 10));
            group.bench_function(id, |b| b.iter(|| upload(&rig, blocks)));
            rig.arrived();
        }
        group.finish();
    }
}

fn main() {
    if std::env::args().any(|argument| argument == "--bench") {
        if adapters().is_empty() {
            println!("skipped: there is no adapter; install a Vulkan driver (Mesa's software one will do)");
            return;
        }
        let criterion = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300));
        let mut criterion = criterion.measurement_time(Duration::from_secs(2)).configure_from_args();
        measure(&mut criterion);
        criterion.final_summary();
        return;
    }
    let no_adapter = adapters().is_empty();
    let trials = PATHS.map(|(name, upload)| {
        let run = move || {
            let rig = Rig::new(64 << 10);
            upload(&rig, 3);
            rig.arrived();
            Ok(())
        };
        Trial::test(format!("upload_{name}"), run).with_ignored_flag(no_adapter)
    });
    libtest_mimic::run(&Arguments::from_args(), trials.into()).exit();
}
