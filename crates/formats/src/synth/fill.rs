//! Fills tensors with random values of a wanted standard deviation, in any element type, a piece at a time.
//!
//! Floats are drawn from a table of normal quantiles. Quantised groups are random bits under scales that are chosen so
//! that the values they stand for have the wanted deviation and a mean of nought.

use super::random::{QUANTILE_BITS, QUANTILES, Rng, exp, ln, normal_quantiles};
use super::tensors::{Fill, Planned};
use half::{bf16, f16};
use overspill_core::DType;

/// Elements of a piece; pieces have random streams of their own. A multiple of every group.
pub(crate) const PIECE_ELEMENTS: u64 = 1 << 20;
/// A router's rows differ in scale by no more than this from their mean.
const POPULARITY_MAX: f32 = 4.0;
/// Scales of groups vary by so much to either side of their mean.
const SCALE_SPREAD: f64 = 0.25;
/// Different scales of groups; a random byte chooses one.
const SCALES: usize = 256;

/// Makes the pieces of one tensor.
pub(crate) struct Filler<'a> {
    planned: &'a Planned,
    seed: u64,
    elements: u64,
    source: Source,
}

enum Source {
    /// Encoded quantiles.
    Two(Box<[[u8; 2]; QUANTILES]>),
    Four(Box<[[u8; 4]; QUANTILES]>),
    /// Values that are made one by one: (standard deviation, popularity of each row).
    Router(f32, Vec<f32>),
    Exact(Vec<f32>),
    /// Scales of quantised groups, as f16 and its negative offset where the type has one.
    Groups(Box<[(f16, f16); SCALES]>),
}

impl<'a> Filler<'a> {
    pub(crate) fn new(planned: &'a Planned, seed: u64, expert_skew: f32) -> Self {
        let spec = &planned.spec;
        let elements = spec.shape.iter().product();
        let source = match &planned.fill {
            Fill::Exact(values) => Source::Exact(values.clone()),
            Fill::Router { std } => {
                let rows = spec.shape.first().map_or(1, |&rows| rows as usize);
                Source::Router(*std, popularity(rows, seed, &spec.name, expert_skew))
            }
            Fill::Norm => floats(spec.dtype, 1.0, 0.02),
            Fill::Normal { std } if spec.dtype.is_float() => floats(spec.dtype, 0.0, *std),
            Fill::Normal { std } => Source::Groups(Box::new(scales(spec.dtype, *std))),
        };
        Self { planned, seed, elements, source }
    }

    /// Pieces that the tensor consists of.
    pub(crate) fn pieces(&self) -> u64 {
        self.elements.div_ceil(PIECE_ELEMENTS)
    }

    /// Replaces `out` with the bytes of a piece.
    pub(crate) fn fill(&self, piece: u64, out: &mut Vec<u8>) {
        let spec = &self.planned.spec;
        let first = piece * PIECE_ELEMENTS;
        let elements = PIECE_ELEMENTS.min(self.elements.saturating_sub(first));
        let bytes = spec.dtype.row_bytes(elements).unwrap_or(0) as usize;
        out.resize(bytes, 0);
        let mut rng = Rng::new(self.seed, &spec.name, piece);
        match &self.source {
            Source::Two(table) => look_up(&mut rng, table, out),
            Source::Four(table) => look_up(&mut rng, table, out),
            Source::Exact(values) => {
                let values = &values[first as usize..(first + elements) as usize];
                encode(spec.dtype, values.iter().copied(), out);
            }
            Source::Router(std, popularity) => {
                let columns = spec.shape.last().map_or(1, |&columns| columns as usize);
                let row = |index: u64| (first + index) as usize / columns;
                let values = (0..elements).map(|index| rng.normal() * std * popularity[row(index)]);
                encode(spec.dtype, values, out);
            }
            Source::Groups(scales) => fill_groups(spec.dtype, &mut rng, scales, out),
        }
    }
}

/// How strongly each expert's row is scaled: rank^-skew, ranks in random order, the root of the mean square 1. A row of
/// larger scale gives more extreme scores, and so is chosen more often.
fn popularity(rows: usize, seed: u64, name: &str, skew: f32) -> Vec<f32> {
    let ranks = Rng::new(seed, name, u64::MAX).permutation(rows);
    let raw: Vec<f64> = ranks.iter().map(|&rank| exp(-f64::from(skew) * ln(rank as f64 + 1.0))).collect();
    let mean_square = raw.iter().map(|p| p * p).sum::<f64>() / rows.max(1) as f64;
    raw.iter().map(|p| ((p / mean_square.sqrt()) as f32).min(POPULARITY_MAX)).collect()
}

fn floats(dtype: DType, mean: f32, std: f32) -> Source {
    let value = |index: usize| mean + std * normal_quantiles()[index];
    match dtype {
        DType::F16 => Source::Two(Box::new(std::array::from_fn(|i| f16::from_f32(value(i)).to_le_bytes()))),
        DType::BF16 => Source::Two(Box::new(std::array::from_fn(|i| bf16::from_f32(value(i)).to_le_bytes()))),
        _ => Source::Four(Box::new(std::array::from_fn(|i| value(i).to_le_bytes()))),
    }
}

fn look_up<const N: usize>(rng: &mut Rng, table: &[[u8; N]; QUANTILES], out: &mut [u8]) {
    const DRAWS: usize = (u64::BITS / QUANTILE_BITS) as usize;
    let (elements, _) = out.as_chunks_mut::<N>();
    for elements in elements.chunks_mut(DRAWS) {
        let mut bits = rng.next();
        for element in elements {
            *element = table[bits as usize % QUANTILES];
            bits >>= QUANTILE_BITS;
        }
    }
}

fn encode(dtype: DType, values: impl Iterator<Item = f32>, out: &mut [u8]) {
    match dtype {
        DType::F16 => {
            out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, v)| *o = f16::from_f32(v).to_le_bytes())
        }
        DType::BF16 => {
            out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, v)| *o = bf16::from_f32(v).to_le_bytes());
        }
        _ => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes()),
    }
}

/// Root of the mean square of the integers from `low` to `high`, as they are.
fn rms_about_nought(low: i32, high: i32) -> f64 {
    let squares: f64 = (low..=high).map(|v| f64::from(v) * f64::from(v)).sum();
    (squares / f64::from(high - low + 1)).sqrt()
}

/// Root of the mean square of the integers from 0 to `high`, less their mean.
fn rms_about_mean(high: i32) -> f64 {
    let count = f64::from(high + 1);
    ((count * count - 1.0) / 12.0).sqrt()
}

/// Sub-scales of k-quants are drawn from this to twice as much less one.
fn sub_scale_low(dtype: DType) -> i32 {
    match dtype {
        DType::Q4_K | DType::Q5_K => 32,
        // Smaller, so that the f16 scale above them keeps some digits.
        DType::Q6_K => 16,
        _ => 1,
    }
}

/// The scales of groups, and the offset `-centre * scale` of the types that store one.
fn scales(dtype: DType, std: f32) -> [(f16, f16); SCALES] {
    // Root of the mean square of a group's integers, and what unsigned ones are centred on.
    let (rms, centre) = match dtype {
        DType::Q4_0 => (rms_about_nought(-8, 7), 0.0),
        DType::Q5_0 => (rms_about_nought(-16, 15), 0.0),
        DType::Q6_K => (rms_about_nought(-32, 31), 0.0),
        DType::Q4_1 | DType::Q4_K => (rms_about_mean(15), 7.5),
        DType::Q5_1 | DType::Q5_K => (rms_about_mean(31), 15.5),
        _ => (rms_about_nought(-127, 127), 0.0),
    };
    let low = sub_scale_low(dtype);
    let sub_scale_rms = rms_about_nought(low, 2 * low - 1);
    let spread_rms = (1.0 + SCALE_SPREAD * SCALE_SPREAD / 3.0).sqrt();
    let mean = f64::from(std) / (rms * sub_scale_rms * spread_rms);
    std::array::from_fn(|i| {
        let spread = 1.0 + SCALE_SPREAD * ((i as f64 + 0.5) / (SCALES as f64 / 2.0) - 1.0);
        // Never nought, which would make all weights nought.
        let scale = f16::from_f64(mean * spread).max(f16::from_bits(1));
        (scale, f16::from_f64(-centre * f64::from(scale)))
    })
}

fn fill_groups(dtype: DType, rng: &mut Rng, scales: &[(f16, f16); SCALES], out: &mut [u8]) {
    let bytes = dtype.info().group_bytes as usize;
    for group in out.chunks_exact_mut(bytes) {
        rng.fill(group);
        // Two bytes and a few signs, apart from the bits that stay.
        let bits = rng.next();
        let (scale, offset) = scales[bits as usize % SCALES];
        let sign = if bits & (1 << 8) == 0 { scale } else { -scale };
        match dtype {
            DType::Q4_0 | DType::Q5_0 => group[..2].copy_from_slice(&sign.to_le_bytes()),
            DType::Q4_1 | DType::Q5_1 => {
                group[..2].copy_from_slice(&scale.to_le_bytes());
                group[2..4].copy_from_slice(&offset.to_le_bytes());
            }
            DType::Q4_K | DType::Q5_K => {
                group[..2].copy_from_slice(&scale.to_le_bytes());
                group[2..4].copy_from_slice(&(-offset).to_le_bytes());
                pack_sub_scales(&mut group[4..16], rng.next(), sub_scale_low(dtype) as u8);
            }
            DType::Q6_K => {
                let low = sub_scale_low(dtype);
                for sub in &mut group[192..208] {
                    let magnitude = low + i32::from(*sub & 15) % low;
                    *sub = (if *sub & 128 == 0 { magnitude } else { -magnitude }) as i8 as u8;
                }
                group[208..210].copy_from_slice(&scale.to_le_bytes());
            }
            _ => {
                group[..2].copy_from_slice(&sign.to_le_bytes());
                // -128 is a value that no quantiser writes, and that has no counterpart of the other sign.
                group[2..].iter_mut().for_each(|q| *q = if *q == 0x80 { 0x7f } else { *q });
            }
        }
    }
}

/// Eight 6-bit scales, each with a minimum of the same number, in ggml's packing: the low four in the first bytes, the
/// high four in nibbles at the end and the upper bits of the others.
fn pack_sub_scales(out: &mut [u8], bits: u64, low: u8) {
    let scale = |j: usize| low + (bits >> (8 * j)) as u8 % low;
    for j in 0..4 {
        let high_bits = (scale(j + 4) >> 4) << 6;
        out[j] = scale(j) | high_bits;
        out[j + 4] = scale(j) | high_bits;
        out[j + 8] = (scale(j + 4) & 15) * 0x11;
    }
}
