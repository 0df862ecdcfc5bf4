//! Files for tests.
#![allow(clippy::unwrap_used, reason = "tests")]

use overspill_nvme::FileSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A directory of test files, removed on drop. Below the target directory, where a disk is.
pub struct Files {
    directory: PathBuf,
    pub set: Arc<FileSet>,
    pub contents: Vec<Vec<u8>>,
}

impl Files {
    /// Files of these lengths; no two pages are alike.
    pub fn new(lens: &[usize]) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("nvme-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let (mut opened, mut contents) = (Vec::new(), Vec::new());
        for (index, &len) in lens.iter().enumerate() {
            let path = directory.join(index.to_string());
            let mixed = |at: u64| (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 + index as u64);
            let content: Vec<u8> = (0..len as u64).map(|at| (mixed(at) >> 37) as u8).collect();
            std::fs::write(&path, &content).unwrap();
            opened.push((path, len as u64));
            contents.push(content);
        }
        let set = Arc::new(FileSet::open(&opened).unwrap());
        Self { directory, set, contents }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
