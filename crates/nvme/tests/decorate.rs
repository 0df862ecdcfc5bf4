//! The decorators do what they say; that they otherwise leave a reader as it is, the conformance body checks.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::Files;
use overspill_core::seam::{Completion, Read, ReadFault, Storage};
use overspill_core::{FileId, TransferId};
use overspill_nvme::decorate::{Counted, Fault, FaultPlan, Faulty, Throttled, Wire};
use overspill_nvme::{IoChoice, NvmeError, Sink, StorageOptions, open_storage};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

type Boxed = Box<dyn Storage<Box<[u8]>>>;
type Done = Completion<Box<[u8]>>;

fn arrivals() -> (Sink<Box<[u8]>>, Receiver<Done>) {
    let (done, arrived) = channel();
    (Box::new(move |completion| done.send(completion).unwrap()), arrived)
}

fn open(files: &Files) -> impl FnOnce(Sink<Box<[u8]>>) -> Result<Boxed, NvmeError> {
    let set = files.set.clone();
    move |sink| Ok(open_storage(IoChoice::Pread, set, &StorageOptions::default(), sink)?.0)
}

fn request(id: u64, offset: u64, len: usize) -> Read<Box<[u8]>> {
    Read { id: TransferId(id), file: FileId(0), offset, len, len_min: len / 2, buffer: vec![0; len].into() }
}

#[test]
fn reads_are_counted() {
    let files = Files::new(&[10_000]);
    let (sink, arrived) = arrivals();
    let storage = Counted::around(sink, open(&files)).unwrap();
    storage.submit(&mut vec![request(1, 0, 4096), request(2, 8192, 4096), request(3, 20_000, 4096)]);
    (0..3).for_each(|_| drop(arrived.recv().unwrap()));
    let counts = storage.counters().snapshot();
    assert_eq!((counts.submitted, counts.done, counts.failed, counts.cancelled), (3, 1, 2, 0));
    assert_eq!((counts.requested_bytes, counts.read_bytes, counts.in_flight()), (3 * 4096, 4096, 0));
}

#[test]
fn faults_hit_the_reads_that_were_planned() {
    let files = Files::new(&[100_000]);
    let eio = Fault::Fail(ReadFault::System { errno: 5 });
    let (sink, arrived) = arrivals();
    let storage = Faulty::around(FaultPlan::reads(2..4, eio.clone()), sink, open(&files)).unwrap();
    storage.submit(&mut (0..6).map(|id| request(id, id * 100, 100)).collect());
    let mut done: Vec<Done> = (0..6).map(|_| arrived.recv().unwrap()).collect();
    done.sort_by_key(|completion| completion.id);
    for completion in done {
        let id = completion.id.0;
        let there = &files.contents[0][id as usize * 100..][..100];
        if (2..4).contains(&id) {
            assert_eq!(completion.result, Err(ReadFault::System { errno: 5 }));
            assert_ne!(&*completion.buffer, there);
        } else {
            assert_eq!((completion.result, &*completion.buffer), (Ok(100), there));
        }
    }
    let (sink, arrived) = arrivals();
    let storage = Faulty::around(FaultPlan::place(FileId(0), 150..151, eio), sink, open(&files)).unwrap();
    for (offset, fails) in [(0, false), (100, true), (51, true), (151, false), (100, true)] {
        storage.submit(&mut vec![request(0, offset, 100)]);
        assert_eq!(arrived.recv().unwrap().result.is_err(), fails, "at {offset}");
    }
    let (sink, arrived) = arrivals();
    let storage = Faulty::around(FaultPlan::reads(0..1, Fault::Short), sink, open(&files)).unwrap();
    storage.submit(&mut vec![request(0, 0, 100)]);
    let completion = arrived.recv().unwrap();
    assert_eq!((completion.result, &completion.buffer[..50]), (Ok(50), &files.contents[0][..50]));
}

#[test]
fn a_slow_wire_takes_its_time_and_may_be_left() {
    let files = Files::new(&[100_000]);
    let (sink, arrived) = arrivals();
    let wire = Wire { bytes_per_s: 1e6, latency: Duration::from_millis(5) };
    let storage = Throttled::around(wire, sink, open(&files)).unwrap();
    let start = Instant::now();
    storage.submit(&mut (0..5).map(|id| request(id, 0, 10_000)).collect());
    for id in 0..5 {
        assert_eq!(arrived.recv().unwrap().id.0, id);
        assert!(start.elapsed() >= Duration::from_millis(5 + 10 * (id + 1)), "read {id} after {:?}", start.elapsed());
    }
    storage.submit(&mut (0..100).map(|id| request(id, 0, 100_000)).collect());
    storage.cancel(TransferId(50));
    let cancelled = arrived.recv().unwrap();
    assert_eq!((cancelled.id.0, cancelled.result), (50, Err(ReadFault::Cancelled)));
    let start = Instant::now();
    drop(storage);
    assert!(start.elapsed() < Duration::from_secs(5), "closing does not wait for the wire");
    assert_eq!(arrived.iter().count(), 99);
}
