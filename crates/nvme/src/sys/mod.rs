//! The unsafe part of the readers: the ring shared with the kernel, copies out of a map, advice to the page cache.

mod advise;
#[cfg(target_os = "linux")]
mod map;
#[cfg(target_os = "linux")]
mod ring;

pub(crate) use advise::{advise_random, forget_cached};
#[cfg(target_os = "linux")]
pub(crate) use map::FileMap;
#[cfg(target_os = "linux")]
pub(crate) use ring::{EventFd, Ring, Target};
