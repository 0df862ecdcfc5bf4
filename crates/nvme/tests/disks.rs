//! A model on several disks: each has a reader of its own, and a slow one does not hold up the others.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::Files;
use overspill_core::seam::{Completion, Read};
use overspill_core::{FileId, TransferId};
use overspill_nvme::{FileSet, IoChoice, NvmeError, StorageOptions, open_storage};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Done = Completion<Box<[u8]>>;

/// Longer than any read takes; shorter than a person's patience.
const PATIENCE: Duration = Duration::from_secs(20);

/// The files, as if those of even and of odd numbers lay on a disk each.
fn on_two_disks(files: &Files) -> Arc<FileSet> {
    let paths: Vec<_> = (0..files.contents.len())
        .map(|index| (files.set.path(FileId(index as u32)).to_owned(), files.contents[index].len() as u64))
        .collect();
    let number = |path: &Path| path.file_name().unwrap().to_str().unwrap().parse::<u64>().unwrap();
    Arc::new(FileSet::open_on(&paths, |path| number(path) % 2).unwrap())
}

fn request(id: u64, file: u32, offset: u64) -> Read<Box<[u8]>> {
    let buffer = vec![0; 4096].into();
    Read { id: TransferId(id), file: FileId(file), offset, len: 4096, len_min: 4096, buffer }
}

/// One queue served all files: reads of a fast disk waited behind those of a slow one.
#[test]
fn a_disk_that_hangs_does_not_hold_up_the_other() {
    let files = Files::new(&[200_000, 200_000]);
    let set = on_two_disks(&files);
    for io in [IoChoice::Uring, IoChoice::Pread, IoChoice::Mmap] {
        // One read in flight a disk.
        let options = StorageOptions { depth: 1, threads: 1, ..StorageOptions::default() };
        let (done, arrived) = channel::<Done>();
        let (go_on, hung) = channel::<()>();
        let hung = Mutex::new(hung);
        let sink = Box::new(move |completion: Done| {
            // The first disk delivers nothing until it is told to.
            if completion.id.0 < 100 {
                let _ = hung.lock().unwrap().recv_timeout(PATIENCE);
            }
            done.send(completion).unwrap();
        });
        let storage = match open_storage(io, set.clone(), &options, sink) {
            Ok((storage, probe)) => {
                assert_eq!(probe.disks.len(), 2);
                storage
            }
            Err(NvmeError::Unavailable { .. }) => continue,
            Err(error) => panic!("{error}"),
        };
        let slow = (0..8).map(|id| request(id, 0, id * 4096));
        let fast = (100..108).map(|id| request(id, 1, (id - 100) * 4096));
        storage.submit(&mut slow.chain(fast).collect());
        for _ in 0..8 {
            match arrived.recv_timeout(PATIENCE / 2) {
                Ok(completion) => {
                    let id = completion.id.0;
                    assert!(id >= 100, "the first disk hangs");
                    assert!(*completion.buffer == files.contents[1][(id as usize - 100) * 4096..][..4096]);
                }
                Err(RecvTimeoutError::Timeout) => panic!("{io}: the second disk waits for the first"),
                Err(error) => panic!("{error}"),
            }
        }
        drop(go_on);
        for _ in 0..8 {
            let completion = arrived.recv_timeout(PATIENCE).unwrap();
            assert!(*completion.buffer == files.contents[0][completion.id.index() * 4096..][..4096]);
        }
    }
}

#[test]
fn the_report_names_each_disk() {
    let files = Files::new(&[5000, 5000, 5000]);
    let set = on_two_disks(&files);
    let options = StorageOptions { threads: 2, ..StorageOptions::default() };
    let (_storage, probe) = open_storage::<Box<[u8]>>(IoChoice::Pread, set, &options, Box::new(|_| ())).unwrap();
    let disks: Vec<_> = probe.disks.iter().map(|disk| (disk.chosen, disk.files, disk.depth)).collect();
    assert_eq!(disks, [(IoChoice::Pread, 2, 2), (IoChoice::Pread, 1, 2)]);
    assert!(probe.disks[1].first.ends_with("1"), "{probe:?}");
    let text = probe.to_string();
    assert!(text.starts_with("2 disks: 0 and 1 more by pread") && text.contains(", 1 by pread"), "{text}");
}

/// Reads of a file that is not there, and cancels of reads that no reader has, are answered as ever.
#[test]
fn what_belongs_to_no_disk_is_refused() {
    let files = Files::new(&[5000, 5000]);
    let (done, arrived) = channel::<Done>();
    let sink = Box::new(move |completion| done.send(completion).unwrap());
    let set = on_two_disks(&files);
    let (storage, _) = open_storage(IoChoice::Auto, set, &StorageOptions::default(), sink).unwrap();
    storage.cancel(TransferId(7));
    storage.submit(&mut vec![request(1, 9, 0)]);
    assert!(arrived.recv_timeout(PATIENCE).unwrap().result.is_err());
}
