//! What the bytes of each element type mean, in plain Rust: the ground truth that every other kernel is held to.
//!
//! A quantised type is described once, by unpacking a group into small integers and scales. Dequantising, the scalar
//! twins and the packing of the blocked matrix product all derive from that one description, so a new quantisation is
//! one `impl` here, one pair of SIMD dot products, and one row of the kernel table. The layouts are ggml's
//! (`ggml-common.h`), bit for bit.
//!
//! Everything is `inline(always)`: called from a function that enables AVX2, these loops are compiled for AVX2.
//! What is not here: SIMD, threads, and any knowledge of matrices.

/// An f16 as f32, exactly. Branch-free, so that loops over it vectorise.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    // 2^112 moves f16's exponent bias to f32's; the product is exact, for subnormals too.
    let finite = f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000);
    let special = 0x7f80_0000 | (magnitude << 13);
    f32::from_bits(sign | if magnitude >= 0x7c00 { special } else { finite.to_bits() })
}

/// A bfloat16 as f32, exactly.
#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[inline(always)]
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[inline(always)]
fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16_to_f32(u16_at(bytes, at))
}

/// A plain float type.
pub(crate) trait Float {
    /// Bytes of an element.
    const BYTES: usize;
    /// The element in `bytes` (exactly [`Self::BYTES`] of them).
    fn read(bytes: &[u8]) -> f32;
}

/// IEEE single precision.
pub(crate) struct F32;
/// IEEE half precision.
pub(crate) struct F16;
/// bfloat16.
pub(crate) struct Bf16;

impl Float for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

impl Float for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        f16_at(bytes, 0)
    }
}

impl Float for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        bf16_to_f32(u16_at(bytes, 0))
    }
}

/// A type of 32 elements a group: element = `scale` × q + `min`.
pub(crate) trait Group32 {
    /// Bytes of a group.
    const BYTES: usize;
    /// Whether groups have a minimum; without, `min` is 0.
    const HAS_MIN: bool;
    /// What to add to q to make it unsigned; q + OFFSET fits 7 bits unless the type is 8 bits wide.
    const OFFSET: u8;
    /// Largest q + OFFSET.
    const UNSIGNED_MAX: u8;
    /// (scale, min) of a group.
    fn scales(group: &[u8]) -> (f32, f32);
    /// The integers of a group, less nothing: q + OFFSET, wrapped to 8 bits.
    fn unsigned(group: &[u8], out: &mut [u8; 32]);
}

/// 32 elements: f16 scale, 16 bytes of 4-bit values less 8.
pub(crate) struct Q4_0;
/// 32 elements: f16 scale, f16 minimum, 16 bytes of 4-bit values.
pub(crate) struct Q4_1;
/// 32 elements: f16 scale, 32 high bits, 16 bytes of low 4 bits, less 16.
pub(crate) struct Q5_0;
/// 32 elements: f16 scale, f16 minimum, 32 high bits, 16 bytes of low 4 bits.
pub(crate) struct Q5_1;
/// 32 elements: f16 scale, 32 signed bytes.
pub(crate) struct Q8_0;

#[inline(always)]
fn nibbles(packed: &[u8], out: &mut [u8; 32]) {
    for j in 0..16 {
        out[j] = packed[j] & 15;
        out[j + 16] = packed[j] >> 4;
    }
}

#[inline(always)]
fn fifth_bits(packed: &[u8], out: &mut [u8; 32]) {
    let bits = u32::from_le_bytes([packed[0], packed[1], packed[2], packed[3]]);
    for (j, q) in out.iter_mut().enumerate() {
        *q |= (((bits >> j) & 1) as u8) << 4;
    }
}

impl Group32 for Q4_0 {
    const BYTES: usize = 18;
    const HAS_MIN: bool = false;
    const OFFSET: u8 = 8;
    const UNSIGNED_MAX: u8 = 15;
    #[inline(always)]
    fn scales(group: &[u8]) -> (f32, f32) {
        (f16_at(group, 0), 0.0)
    }
    #[inline(always)]
    fn unsigned(group: &[u8], out: &mut [u8; 32]) {
        nibbles(&group[2..18], out);
    }
}

impl Group32 for Q4_1 {
    const BYTES: usize = 20;
    const HAS_MIN: bool = true;
    const OFFSET: u8 = 0;
    const UNSIGNED_MAX: u8 = 15;
    #[inline(always)]
    fn scales(group: &[u8]) -> (f32, f32) {
        (f16_at(group, 0), f16_at(group, 2))
    }
    #[inline(always)]
    fn unsigned(group: &[u8], out: &mut [u8; 32]) {
        nibbles(&group[4..20], out);
    }
}

impl Group32 for Q5_0 {
    const BYTES: usize = 22;
    const HAS_MIN: bool = false;
    const OFFSET: u8 = 16;
    const UNSIGNED_MAX: u8 = 31;
    #[inline(always)]
    fn scales(group: &[u8]) -> (f32, f32) {
        (f16_at(group, 0), 0.0)
    }
    #[inline(always)]
    fn unsigned(group: &[u8], out: &mut [u8; 32]) {
        nibbles(&group[6..22], out);
        fifth_bits(&group[2..6], out);
    }
}

impl Group32 for Q5_1 {
    const BYTES: usize = 24;
    const HAS_MIN: bool = true;
    const OFFSET: u8 = 0;
    const UNSIGNED_MAX: u8 = 31;
    #[inline(always)]
    fn scales(group: &[u8]) -> (f32, f32) {
        (f16_at(group, 0), f16_at(group, 2))
    }
    #[inline(always)]
    fn unsigned(group: &[u8], out: &mut [u8; 32]) {
        nibbles(&group[8..24], out);
        fifth_bits(&group[4..8], out);
    }
}

impl Group32 for Q8_0 {
    const BYTES: usize = 34;
    const HAS_MIN: bool = false;
    const OFFSET: u8 = 128;
    const UNSIGNED_MAX: u8 = 255;
    #[inline(always)]
    fn scales(group: &[u8]) -> (f32, f32) {
        (f16_at(group, 0), 0.0)
    }
    #[inline(always)]
    fn unsigned(group: &[u8], out: &mut [u8; 32]) {
        for j in 0..32 {
            out[j] = group[j + 2].wrapping_add(128);
        }
    }
}

/// How a type of 256 elements a group treats the lower end of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Floor {
    /// element = scale × sub-scale × q − minimum scale × sub-minimum, q unsigned.
    Minimum,
    /// element = scale × sub-scale × (q − 32).
    Offset32,
}

/// The scales of a group of 256, one sub-scale for each 16 elements (types with one for 32 repeat it).
pub(crate) struct Scales256 {
    /// The group's scale.
    pub scale: f32,
    /// The group's scale of minima; 0 for [`Floor::Offset32`].
    pub min_scale: f32,
    /// Sub-scales.
    pub sub: [i16; 16],
    /// Sub-minima; for [`Floor::Offset32`] 32 × sub-scale, so that both kinds subtract `min × sum(x)`.
    pub min: [i16; 16],
}

/// A type of 256 elements a group.
pub(crate) trait Group256 {
    /// Bytes of a group.
    const BYTES: usize;
    /// The lower end of the range.
    const FLOOR: Floor;
    /// Largest q.
    const UNSIGNED_MAX: u8;
    /// The scales of a group.
    fn scales(group: &[u8]) -> Scales256;
    /// The integers of a group, unsigned.
    fn unsigned(group: &[u8], out: &mut [u8; 256]);
}

/// 256 elements: f16 scale, f16 minimum scale, 12 bytes of 6-bit scales, 128 bytes of 4-bit values.
pub(crate) struct Q4K;
/// 256 elements: as Q4_K with 32 bytes of fifth bits.
pub(crate) struct Q5K;
/// 256 elements: 128 bytes of low 4 bits, 64 of high 2 bits, 16 signed scales, f16 scale.
pub(crate) struct Q6K;

/// The eight 6-bit scales and eight 6-bit minima that Q4_K and Q5_K pack into 12 bytes.
#[inline(always)]
fn scales_k4(group: &[u8]) -> Scales256 {
    let packed = &group[4..16];
    let (mut sub, mut min) = ([0; 16], [0; 16]);
    for j in 0..8 {
        let (s, m) = if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            ((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
        };
        for half in 0..2 {
            sub[2 * j + half] = i16::from(s);
            min[2 * j + half] = i16::from(m);
        }
    }
    Scales256 { scale: f16_at(group, 0), min_scale: f16_at(group, 2), sub, min }
}

impl Group256 for Q4K {
    const BYTES: usize = 144;
    const FLOOR: Floor = Floor::Minimum;
    const UNSIGNED_MAX: u8 = 15;
    #[inline(always)]
    fn scales(group: &[u8]) -> Scales256 {
        scales_k4(group)
    }
    #[inline(always)]
    fn unsigned(group: &[u8], out: &mut [u8; 256]) {
        let packed = &group[16..144];
        for chunk in 0..4 {
            for l in 0..32 {
                out[64 * chunk + l] = packed[32 * chunk + l] & 15;
                out[64 * chunk + l + 32] = packed[32 * chunk + l] >> 4;
            }
        }
    }
}

impl Group256 for Q5K {
    const BYTES: usize = 176;
    const FLOOR: Floor = Floor::Minimum;
    const UNSIGNED_MAX: u8 = 31;
    #[inline(always)]
    fn scales(group: &[u8]) -> Scales256 {
        scales_k4(group)
    }
    #[inline(always)]
    fn unsigned(group: &[u8], out: &mut [u8; 256]) {
        let (high, packed) = (&group[16..48], &group[48..176]);
        for chunk in 0..4 {
            for l in 0..32 {
                let bits = high[l] >> (2 * chunk);
                out[64 * chunk + l] = (packed[32 * chunk + l] & 15) | ((bits & 1) << 4);
                out[64 * chunk + l + 32] = (packed[32 * chunk + l] >> 4) | (((bits >> 1) & 1) << 4);
            }
        }
    }
}

impl Group256 for Q6K {
    const BYTES: usize = 210;
    const FLOOR: Floor = Floor::Offset32;
    const UNSIGNED_MAX: u8 = 63;
    #[inline(always)]
    fn scales(group: &[u8]) -> Scales256 {
        let (mut sub, mut min) = ([0; 16], [0; 16]);
        for j in 0..16 {
            sub[j] = i16::from(group[192 + j] as i8);
            min[j] = 32 * sub[j];
        }
        Scales256 { scale: f16_at(group, 208), min_scale: 0.0, sub, min }
    }
    #[inline(always)]
    fn unsigned(group: &[u8], out: &mut [u8; 256]) {
        for half in 0..2 {
            let (low, high) = (&group[64 * half..64 * half + 64], &group[128 + 32 * half..160 + 32 * half]);
            for l in 0..32 {
                let at = 128 * half + l;
                out[at] = (low[l] & 15) | ((high[l] & 3) << 4);
                out[at + 32] = (low[l + 32] & 15) | (((high[l] >> 2) & 3) << 4);
                out[at + 64] = (low[l] >> 4) | (((high[l] >> 4) & 3) << 4);
                out[at + 96] = (low[l + 32] >> 4) | ((high[l] >> 6) << 4);
            }
        }
    }
}

/// Decodes whole groups to f32; one rounding an element at most, so SIMD and scalar agree to the bit.
pub(crate) trait Decode {
    /// Elements of a group.
    const ELEMENTS: usize;
    /// Bytes of a group.
    const GROUP_BYTES: usize;
    /// Writes the elements of one group.
    fn decode(group: &[u8], out: &mut [f32]);
}

/// Marks a plain float as something to decode.
pub(crate) struct Plain<F>(core::marker::PhantomData<F>);
/// Marks a 32-element type as something to decode.
pub(crate) struct By32<Q>(core::marker::PhantomData<Q>);
/// Marks a 256-element type as something to decode.
pub(crate) struct By256<Q>(core::marker::PhantomData<Q>);

impl<F: Float> Decode for Plain<F> {
    const ELEMENTS: usize = 1;
    const GROUP_BYTES: usize = F::BYTES;
    #[inline(always)]
    fn decode(group: &[u8], out: &mut [f32]) {
        out[0] = F::read(group);
    }
}

impl<Q: Group32> Decode for By32<Q> {
    const ELEMENTS: usize = 32;
    const GROUP_BYTES: usize = Q::BYTES;
    #[inline(always)]
    fn decode(group: &[u8], out: &mut [f32]) {
        let (scale, min) = Q::scales(group);
        let mut q = [0; 32];
        Q::unsigned(group, &mut q);
        for (out, q) in out[..32].iter_mut().zip(q) {
            let product = scale * (i32::from(q) - i32::from(Q::OFFSET)) as f32;
            *out = if Q::HAS_MIN { product + min } else { product };
        }
    }
}

impl<Q: Group256> Decode for By256<Q> {
    const ELEMENTS: usize = 256;
    const GROUP_BYTES: usize = Q::BYTES;
    #[inline(always)]
    fn decode(group: &[u8], out: &mut [f32]) {
        let scales = Q::scales(group);
        let mut q = [0; 256];
        Q::unsigned(group, &mut q);
        for (sub, (out, q)) in out[..256].chunks_exact_mut(16).zip(q.chunks_exact(16)).enumerate() {
            let scale = scales.scale * f32::from(scales.sub[sub]);
            let min = scales.min_scale * f32::from(scales.min[sub]);
            for (out, &q) in out.iter_mut().zip(q) {
                *out = match Q::FLOOR {
                    Floor::Minimum => scale * f32::from(q) - min,
                    Floor::Offset32 => scale * f32::from(i16::from(q) - 32),
                };
            }
        }
    }
}

/// Decodes `out.len()` elements from `bytes`, both whole groups.
#[inline(always)]
pub(crate) fn decode_all<D: Decode>(bytes: &[u8], out: &mut [f32]) {
    for (group, out) in bytes.chunks_exact(D::GROUP_BYTES).zip(out.chunks_exact_mut(D::ELEMENTS)) {
        D::decode(group, out);
    }
}
