//! What a system may refuse (io_uring in a container, direct I/O on a file system) is worked around, with the reason
//! told; what was asked for by name and is refused is an error with a cure.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::Files;
use overspill_core::seam::{Read, ReadFault};
use overspill_core::{FileId, TransferId};
use overspill_nvme::{FileSet, IoChoice, NvmeError, Probe, StorageOptions, open_storage};
use std::sync::{Arc, mpsc};

mod sys {
    //! A filter of system calls, as a container has.

    /// From here on, one system call fails with this error on this thread and on those that it starts.
    pub fn refuse(call: libc::c_long, errno: i32) {
        let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut program = [
            // The first word of what the filter sees is the call's number.
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: takes no memory.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
        // SAFETY: the program is valid while the kernel copies it.
        let status = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    }
}

/// Opens a reader and reads with it.
fn try_reading(files: &Files, io: IoChoice) -> Result<Probe, NvmeError> {
    let (done, arrived) = mpsc::channel();
    let sink = Box::new(move |completion| done.send(completion).unwrap());
    let (storage, probe) = open_storage::<Box<[u8]>>(io, files.set.clone(), &StorageOptions::default(), sink)?;
    let (id, file, buffer) = (TransferId(0), FileId(0), vec![0; 5000].into());
    storage.submit(&mut vec![Read { id, file, offset: 0, len: 5000, len_min: 5000, buffer }]);
    assert!(*arrived.recv().unwrap().buffer == files.contents[0][..5000]);
    Ok(probe)
}

/// Runs on a thread of its own, so that the filter stays there.
fn with_refused(call: libc::c_long, errno: i32, test: fn(&Files)) {
    let files = Files::new(&[10_000]);
    let run = move || {
        sys::refuse(call, errno);
        test(&files);
    };
    std::thread::spawn(run).join().unwrap();
}

#[test]
fn a_container_without_io_uring_gets_pread_and_the_reason() {
    let calls = [libc::SYS_io_uring_setup, libc::SYS_io_uring_register, libc::SYS_io_uring_enter];
    for call in calls {
        for errno in [libc::EPERM, libc::ENOSYS] {
            with_refused(call, errno, |files| {
                let probe = try_reading(files, IoChoice::Auto).unwrap();
                assert_eq!((probe.chosen, probe.rejected[0].0), (IoChoice::Pread, IoChoice::Uring));
                assert!(probe.to_string().contains("io_uring"), "{probe}");
                let error = try_reading(files, IoChoice::Uring).unwrap_err().to_string();
                assert!(error.contains("seccomp") && error.contains("--io pread"), "{error}");
            });
        }
    }
}

#[test]
fn a_map_that_cannot_be_copied_from_safely_is_refused() {
    with_refused(libc::SYS_process_vm_readv, libc::EPERM, |files| {
        let error = try_reading(files, IoChoice::Mmap).unwrap_err().to_string();
        assert!(error.contains("process_vm_readv") && error.contains("--io pread"), "{error}");
        try_reading(files, IoChoice::Pread).unwrap();
    });
}

#[test]
fn a_file_system_without_direct_io_gets_pread_and_the_reason() {
    // Regular files there are of length 0, and cannot be opened past a page cache that they do not have.
    let files = Arc::new(FileSet::open(&[("/proc/version".into(), 0)]).unwrap());
    assert!(files.direct(FileId(0)).is_err());
    let open = |io| open_storage::<Box<[u8]>>(io, files.clone(), &StorageOptions::default(), Box::new(|_| ()));
    let (storage, probe) = open(IoChoice::Auto).unwrap();
    assert_eq!((storage.name(), storage.alignment_bytes(), probe.direct), ("pread", 1, false));
    assert!(probe.to_string().contains("/proc/version"), "{probe}");
}

#[test]
fn invariant_4_an_error_of_the_system_ends_the_read_with_its_number() {
    // This process's memory, as a file: at address 0 there is none, and the kernel says EIO.
    let files = Arc::new(FileSet::open(&[("/proc/self/mem".into(), 0)]).unwrap());
    for io in [IoChoice::Pread, IoChoice::Mmap, IoChoice::Auto, IoChoice::Uring] {
        let (done, arrived) = mpsc::channel();
        let sink = Box::new(move |completion| done.send(completion).unwrap());
        let storage = match open_storage::<Box<[u8]>>(io, files.clone(), &StorageOptions::default(), sink) {
            Err(NvmeError::Unavailable { .. }) => continue,
            other => other.unwrap().0,
        };
        let (id, file, buffer) = (TransferId(0), FileId(0), vec![0; 4096].into());
        storage.submit(&mut vec![Read { id, file, offset: 0, len: 4096, len_min: 4096, buffer }]);
        assert_eq!(arrived.recv().unwrap().result, Err(ReadFault::System { errno: libc::EIO }), "{io}");
    }
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let files = Files::new(&[1]);
    let defaults = StorageOptions::default();
    let wrong = [
        ("depth", StorageOptions { depth: 0, ..defaults }),
        ("depth", StorageOptions { depth: 5000, ..defaults }),
        ("flight_bytes", StorageOptions { flight_bytes: 0, ..defaults }),
        ("threads", StorageOptions { threads: 0, ..defaults }),
        ("call_bytes_max", StorageOptions { call_bytes_max: 5000, ..defaults }),
    ];
    for (name, options) in wrong {
        let result = open_storage::<Box<[u8]>>(IoChoice::Auto, files.set.clone(), &options, Box::new(|_| ()));
        let error = result.map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    }
    assert_eq!("mmap".parse(), Ok(IoChoice::Mmap));
    assert!("disk".parse::<IoChoice>().unwrap_err().contains("uring"));
}
