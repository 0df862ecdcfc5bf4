//! The only place of the kernels where `unsafe` is allowed: the thread pool's borrowed jobs, disjoint writes to one
//! output, and SIMD. Everything that leaves this module is safe to call.

pub(super) mod columns;
pub(super) mod scope;

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(super) mod neon;
