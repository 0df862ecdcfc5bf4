//! Signals interrupt system calls at any time; no read may be lost or wrong for it.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::Files;
use overspill_core::seam::Read;
use overspill_core::{FileId, TransferId};
use overspill_nvme::{IoChoice, StorageOptions, open_storage};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

mod sys {
    //! Signals to the threads of this process.

    extern "C" fn nothing(_signal: libc::c_int) {}

    /// From here on, the signal interrupts system calls and does nothing else.
    pub fn interrupt_calls() {
        // SAFETY: all-zero bytes are a valid sigaction: no flags (so calls are not restarted), an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the action is valid, and its handler does nothing, which is safe at any time.
        assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }, 0);
    }

    /// Interrupts a thread of this process. It may have ended by now.
    pub fn signal(thread: i32) {
        // SAFETY: takes no memory; the signal's handler does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
    }
}

#[test]
fn reads_survive_signals() {
    const LEN: usize = 65_536;
    sys::interrupt_calls();
    let files = Files::new(&[4 << 20]);
    for io in [IoChoice::Auto, IoChoice::Pread, IoChoice::Mmap] {
        let (done, arrived) = channel();
        let sink = Box::new(move |completion| done.send(completion).unwrap());
        let (storage, _) = open_storage(io, files.set.clone(), &StorageOptions::default(), sink).unwrap();
        let stop = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for entry in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
                        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                        if name.starts_with("overspill") {
                            sys::signal(entry.file_name().to_string_lossy().parse().unwrap());
                        }
                    }
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            for round in 0..40u64 {
                let offset = |id: u64| (id % 64) * LEN as u64;
                let read = |id| Read {
                    id: TransferId(id),
                    file: FileId(0),
                    offset: offset(id),
                    len: LEN,
                    len_min: LEN,
                    buffer: overspill_host::AlignedBuf::new(LEN).unwrap(),
                };
                storage.submit(&mut (round..round + 30).map(read).collect());
                for _ in 0..30 {
                    let completion = arrived.recv_timeout(Duration::from_secs(60)).unwrap();
                    assert_eq!(completion.result, Ok(LEN));
                    let at = offset(completion.id.0) as usize;
                    assert!(*completion.buffer == files.contents[0][at..at + LEN]);
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
