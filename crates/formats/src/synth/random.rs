//! Random numbers for weights: a counter-based generator, and normal quantiles in a table.
//!
//! Built on additions, multiplications, divisions and square roots alone, whose results IEEE 754 fixes, so a seed gives
//! the same file on every machine; the system's `ln` and `exp` don't promise that.

use std::sync::OnceLock;

/// Bits of an index into the table of quantiles.
pub(crate) const QUANTILE_BITS: u32 = 12;
/// Entries of the table.
pub(crate) const QUANTILES: usize = 1 << QUANTILE_BITS;

/// splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
pub(crate) struct Rng(u64);

impl Rng {
    /// The generator for piece `piece` of the tensor `name` of the model with this seed.
    pub(crate) fn new(seed: u64, name: &str, piece: u64) -> Self {
        // FNV-1a: any hash that stays the same for ever.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Self(mix(mix(mix(seed) ^ hash).wrapping_add(piece)))
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Fills with random bytes.
    pub(crate) fn fill(&mut self, out: &mut [u8]) {
        let (words, rest) = out.as_chunks_mut::<8>();
        for word in words {
            *word = self.next().to_le_bytes();
        }
        let last = self.next().to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }

    /// A normal deviate, from the table.
    pub(crate) fn normal(&mut self) -> f32 {
        normal_quantiles()[self.next() as usize % QUANTILES]
    }

    /// The numbers below `count` in random order.
    pub(crate) fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
        order
    }
}

#[inline]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Quantiles of the standard normal distribution at (i + 0.5) / 4096, scaled to a variance of exactly 1.
pub(crate) fn normal_quantiles() -> &'static [f32; QUANTILES] {
    static TABLE: OnceLock<[f32; QUANTILES]> = OnceLock::new();
    TABLE.get_or_init(|| {
        let quantiles: Vec<f64> =
            (0..QUANTILES).map(|i| normal_quantile((i as f64 + 0.5) / QUANTILES as f64)).collect();
        let variance = quantiles.iter().map(|q| q * q).sum::<f64>() / QUANTILES as f64;
        std::array::from_fn(|i| (quantiles[i] / variance.sqrt()) as f32)
    })
}

/// The inverse of the normal distribution function, to 1.2e-9 (P. J. Acklam's rational approximation, 2003).
fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969_683_028_665_376e1,
        2.209_460_984_245_205e2,
        -2.759_285_104_469_687e2,
        1.383_577_518_672_69e2,
        -3.066_479_806_614_716e1,
        2.506_628_277_459_239,
    ];
    const B: [f64; 6] = [
        -5.447_609_879_822_406e1,
        1.615_858_368_580_409e2,
        -1.556_989_798_598_866e2,
        6.680_131_188_771_972e1,
        -1.328_068_155_288_572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784_894_002_430_293e-3,
        -3.223_964_580_411_365e-1,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 5] =
        [7.784_695_709_041_462e-3, 3.224_671_290_700_398e-1, 2.445_134_137_142_996, 3.754_408_661_907_416, 1.0];
    const P_LOW: f64 = 0.02425;
    let poly = |c: &[f64], x: f64| c.iter().fold(0.0, |sum, c| sum * x + c);
    if p < P_LOW {
        let q = (-2.0 * ln(p)).sqrt();
        poly(&C, q) / poly(&D, q)
    } else if p > 1.0 - P_LOW {
        -normal_quantile(1.0 - p)
    } else {
        let q = p - 0.5;
        poly(&A, q * q) * q / poly(&B, q * q)
    }
}

/// Natural logarithm of a positive normal number, to about 1e-15.
pub(crate) fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    // ln m = 2 artanh((m - 1) / (m + 1)), m in [1, 2), so the argument is below 1/3.
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let series = (0..20).rev().fold(0.0, |sum, k| sum * (t * t) + 1.0 / f64::from(2 * k + 1));
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * t * series
}

/// e to the power of `x`, |x| < 700, to about 1e-15.
pub(crate) fn exp(x: f64) -> f64 {
    let k = (x / std::f64::consts::LN_2).round();
    let r = x - k * std::f64::consts::LN_2;
    let series = (1..=20).rev().fold(1.0, |sum, n| 1.0 + sum * r / f64::from(n));
    series * f64::from_bits(((k as i64 + 1023).clamp(1, 2046) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithm_and_exponential_agree_with_the_systems() {
        for x in [1e-6, 0.02, 0.5, 1.0, 1.999, 10.0, 12345.678] {
            assert!((ln(x) - x.ln()).abs() < 1e-14 * x.ln().abs().max(1.0), "{x}");
        }
        for x in [-30.0, -1.0, 0.0, 0.3, 5.5, 200.0] {
            assert!((exp(x) / x.exp() - 1.0).abs() < 1e-13, "{x}");
        }
    }

    #[test]
    fn quantiles_are_those_of_a_normal_distribution() {
        assert!((normal_quantile(0.975) - 1.959_963_985).abs() < 1e-8);
        assert!((normal_quantile(0.001) + 3.090_232_306).abs() < 1e-8);
        let table = normal_quantiles();
        assert!(table.is_sorted());
        assert!((table[QUANTILES - 1] - 3.67).abs() < 0.02, "{}", table[QUANTILES - 1]);
    }

    #[test]
    fn names_and_pieces_have_streams_of_their_own() {
        let first = |name, piece| Rng::new(7, name, piece).next();
        let all = [first("a", 0), first("a", 1), first("b", 0), Rng::new(8, "a", 0).next()];
        for (i, x) in all.iter().enumerate() {
            assert!(!all[..i].contains(x));
        }
        assert_eq!(first("a", 1), all[1]);
    }
}
