//! Which kernel serves which element type on which machine: one row a type, one table an instruction set.
//!
//! What is not here: the kernels.

use super::blocks::{self, By32, By256, Plain};
use super::input::{self, Kind};
use super::scalar::{self, Dot32, Dot256, Rows};
use overspill::DType;
use std::sync::OnceLock;

/// The instruction sets that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// Plain Rust, products added unfused: machines without a fused multiply-add.
    Unfused,
    /// Plain Rust, products added fused: the twin in tests, and aarch64 with the larger end first.
    #[cfg_attr(not(test), allow(dead_code, reason = "no machine that is common takes it"))]
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// As AVX2, with AVX-512 F, BW, DQ and VL for many tokens.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// As AVX-512, with VNNI for 8-bit activations.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// Every aarch64.
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Neon,
    /// aarch64 with products of four 8-bit integers (`sdot`).
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    NeonDot,
    /// As that, with products of small matrices of them (`smmla`).
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    NeonMatrix,
}

impl Isa {
    /// The best that this machine has.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::ALL.iter().copied().rev().find(|isa| isa.is_here()).unwrap_or(Self::Unfused))
    }

    /// All that this program was compiled with, the better after the lesser.
    pub(crate) const ALL: &[Self] = &[
        Self::Unfused,
        #[cfg(any(test, target_arch = "aarch64"))]
        Self::Scalar,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512Vnni,
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        Self::Neon,
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        Self::NeonDot,
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        Self::NeonMatrix,
    ];

    /// Whether to choose it on this machine.
    pub(crate) fn is_here(self) -> bool {
        match self {
            Self::Unfused => true,
            // Where fusing is no instruction it is a slow function.
            Self::Scalar => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => super::sys::avx2::available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => super::sys::avx512::available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => super::sys::avx512::vnni_available(),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => super::sys::neon::available(),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonDot => super::sys::neon::dot_available(),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonMatrix => super::sys::neon::matrix_available(),
        }
    }

    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unfused => "plain",
            Self::Scalar => "plain, fused",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => "avx512-vnni",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => "neon",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonDot => "neon-dotprod",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonMatrix => "neon-i8mm",
        }
    }

    /// The kernels of an element type.
    pub(crate) fn kernels(self, dtype: DType) -> &'static Kernels {
        let table = match self {
            Self::Unfused => &UNFUSED,
            Self::Scalar => &SCALAR,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => super::sys::avx2::table(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => super::sys::avx512::table(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => super::sys::avx512::vnni_table(),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => super::sys::neon::table(),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonDot => super::sys::neon::dot_table(),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonMatrix => super::sys::neon::matrix_table(),
        };
        &table[dtype as usize]
    }
}

/// The kernels of one element type.
pub(crate) struct Kernels {
    /// Whole groups to f32.
    pub decode: fn(&[u8], &mut [f32]),
    /// Rows against f32 activations.
    pub f32: Rows,
    /// Rows against 8-bit activations; the same as `f32` for float weights, which never meet them.
    pub q8: Rows,
}

/// One row for each [`DType`], in its order.
pub(crate) type Table = [Kernels; 11];

macro_rules! table {
    ($fused:literal) => {
        [
            table!(float Plain<blocks::F32>, $fused),
            table!(float Plain<blocks::F16>, $fused),
            table!(float Plain<blocks::Bf16>, $fused),
            table!(quantised By32<blocks::Q4_0>, Dot32<blocks::Q4_0>, $fused),
            table!(quantised By32<blocks::Q4_1>, Dot32<blocks::Q4_1>, $fused),
            table!(quantised By32<blocks::Q5_0>, Dot32<blocks::Q5_0>, $fused),
            table!(quantised By32<blocks::Q5_1>, Dot32<blocks::Q5_1>, $fused),
            table!(quantised By32<blocks::Q8_0>, Dot32<blocks::Q8_0>, $fused),
            table!(quantised By256<blocks::Q4K>, Dot256<blocks::Q4K>, $fused),
            table!(quantised By256<blocks::Q5K>, Dot256<blocks::Q5K>, $fused),
            table!(quantised By256<blocks::Q6K>, Dot256<blocks::Q6K>, $fused),
        ]
    };
    (float $decode:ty, $fused:literal) => {
        Kernels {
            decode: blocks::decode_all::<$decode>,
            f32: scalar::rows_f32::<$decode, $fused>,
            q8: scalar::rows_f32::<$decode, $fused>,
        }
    };
    (quantised $decode:ty, $dot:ty, $fused:literal) => {
        Kernels {
            decode: blocks::decode_all::<$decode>,
            f32: scalar::rows_f32::<$decode, $fused>,
            q8: scalar::rows_q8::<$dot, $fused>,
        }
    };
}

static SCALAR: Table = table!(true);
static UNFUSED: Table = table!(false);

/// The function that rounds a token to 8 bits.
pub(super) fn quantiser() -> fn(Kind, &[f32], &mut [f32]) {
    match Isa::best() {
        Isa::Unfused | Isa::Scalar => input::quantise,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Vnni => super::sys::avx2::quantise,
        // NEON is part of every aarch64, so the compiler makes it of plain loops.
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        Isa::Neon | Isa::NeonDot | Isa::NeonMatrix => input::quantise,
    }
}
