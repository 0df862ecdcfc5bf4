//! Gathering rows: the right bytes in the right places, from every reader, and errors that say where.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::Files;
use overspill_core::FileId;
use overspill_nvme::{FileRange, GatherError, Gatherer, IoChoice, StorageOptions};

/// Small numbers that look random and are always the same.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn gatherers(files: &Files) -> Vec<Gatherer> {
    let shallow = StorageOptions { depth: 2, threads: 2, ..StorageOptions::default() };
    let cached = StorageOptions { direct: false, ..StorageOptions::default() };
    let choices = [
        (IoChoice::Auto, StorageOptions::default()),
        (IoChoice::Auto, shallow),
        (IoChoice::Pread, StorageOptions::default()),
        (IoChoice::Pread, cached),
    ];
    choices.iter().map(|(io, options)| Gatherer::new(files.set.clone(), *io, options).unwrap()).collect()
}

#[test]
fn rows_come_in_the_order_asked_and_doubles_too() {
    const BASE: usize = 1234;
    for row_bytes in [1, 34, 576, 4096, 5000, 300_000] {
        let rows_there = (3_000_000 - BASE) / row_bytes;
        let files = Files::new(&[10, 3_000_000]);
        for gatherer in gatherers(&files) {
            let mut dice = Dice(row_bytes as u64);
            for count in [0, 1, 3, 200] {
                let rows: Vec<u64> = (0..count).map(|_| dice.below(rows_there.min(400) as u64)).collect();
                let mut to = vec![0; rows.len() * row_bytes];
                gatherer.read(FileId(1), &rows, row_bytes, BASE as u64, &mut to).unwrap();
                for (row, got) in rows.iter().zip(to.chunks(row_bytes)) {
                    let at = BASE + *row as usize * row_bytes;
                    assert!(got == &files.contents[1][at..at + row_bytes], "row {row} of {row_bytes} bytes");
                }
            }
        }
    }
}

#[test]
fn ranges_of_several_files_overlap_as_they_like() {
    let files = Files::new(&[700_000, 50_000]);
    let mut dice = Dice(7);
    for gatherer in gatherers(&files) {
        for _ in 0..20 {
            let mut ranges = Vec::new();
            let mut room = 0;
            for _ in 0..dice.below(60) {
                let file = dice.below(2) as u32;
                let there = files.contents[file as usize].len() as u64;
                let longest = if dice.below(9) == 0 { there } else { 3000 };
                let bytes = dice.below(longest) as usize;
                let offset = dice.below(there - bytes as u64 + 1);
                ranges.push(FileRange { file: FileId(file), offset, bytes, to: room });
                room += bytes + dice.below(5) as usize;
            }
            let mut to = vec![0; room];
            gatherer.read_ranges(&ranges, &mut to).unwrap();
            for range in ranges {
                let from = &files.contents[range.file.index()][range.offset as usize..][..range.bytes];
                assert!(&to[range.to..][..range.bytes] == from, "{range:?}");
            }
        }
    }
}

#[test]
fn threads_gather_at_once() {
    let files = Files::new(&[1_000_000]);
    let gatherer = &Gatherer::new(files.set.clone(), IoChoice::Auto, &StorageOptions::default()).unwrap();
    let contents = &files.contents[0];
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let mut dice = Dice(thread);
                let mut to = vec![0; 50 * 1000];
                for _ in 0..20 {
                    let rows: Vec<u64> = (0..50).map(|_| dice.below(1000)).collect();
                    gatherer.read(FileId(0), &rows, 1000, 0, &mut to).unwrap();
                    for (row, got) in rows.iter().zip(to.chunks(1000)) {
                        assert!(got == &contents[*row as usize * 1000..][..1000]);
                    }
                }
            });
        }
    });
}

#[test]
fn rows_that_are_not_there_are_refused_by_name() {
    let files = Files::new(&[10_000]);
    for gatherer in gatherers(&files) {
        let mut to = vec![0; 2000];
        for (file, row) in [(0, 10), (0, u64::MAX), (3, 0)] {
            let error = gatherer.read(FileId(file), &[1, row], 1000, 0, &mut to).unwrap_err();
            assert!(matches!(error, GatherError::Beyond { .. }), "{error}");
        }
        let error = gatherer.read(FileId(0), &[1], 1000, 0, &mut to).unwrap_err();
        assert!(matches!(error, GatherError::Destination { wanted_bytes: 1000, had_bytes: 2000 }));
        let outside = FileRange { file: FileId(0), offset: 0, bytes: 1, to: 2000 };
        assert!(matches!(gatherer.read_ranges(&[outside], &mut to), Err(GatherError::Destination { .. })));
        gatherer.read(FileId(0), &[1, 2], 1000, 0, &mut to).unwrap();
        assert_eq!(to, files.contents[0][1000..3000]);
    }
}

#[test]
fn invariant_4_a_file_cut_short_ends_the_gathering_with_an_error() {
    let files = Files::new(&[2_000_000]);
    let gatherers = gatherers(&files);
    let file = std::fs::OpenOptions::new().write(true).open(files.set.path(FileId(0))).unwrap();
    file.set_len(1_000_000).unwrap();
    let rows: Vec<u64> = (0..2000).rev().collect();
    for gatherer in gatherers {
        let error = gatherer.read(FileId(0), &rows, 1000, 0, &mut vec![0; 2_000_000]).unwrap_err();
        assert!(matches!(error, GatherError::Read { .. }) && error.to_string().contains("truncated"), "{error}");
        gatherer.read(FileId(0), &rows[1500..], 1000, 0, &mut vec![0; 500_000]).unwrap();
    }
}
