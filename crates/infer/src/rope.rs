//! Rotary position embedding: the angle of each pair at each position, with every scaling in use.
//!
//! Formulas are those of transformers (`modeling_rope_utils.py`), which the checkpoints were trained with; frequencies
//! and angles are rounded to f32 where it rounds them. Two scalings depend on how long the sequence is (dynamic NTK,
//! longrope): there, as in transformers, a prompt's tokens all see the prompt's length, and later tokens their own.
//! The result never depends on how a prompt is cut into chunks. What is not here: turning anything; that is
//! [`crate::backend::Backend::rope`].

use std::f64::consts::TAU;

/// How frequencies are scaled beyond the length of training.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All divided by a factor.
    Linear {
        /// The factor, at least 1.
        factor: f64,
    },
    /// NTK-aware: a larger base once the sequence is longer than the training's.
    Dynamic {
        /// The factor, at least 1.
        factor: f64,
        /// Positions of the training.
        original_positions: f64,
    },
    /// Llama 3: low frequencies divided, high ones kept, those between blended.
    Llama3 {
        /// The factor, at least 1.
        factor: f64,
        /// Wavelengths above `original_positions / low_frequency_factor` are divided.
        low_frequency_factor: f64,
        /// Wavelengths below `original_positions / high_frequency_factor` are kept.
        high_frequency_factor: f64,
        /// Positions of the training.
        original_positions: f64,
    },
    /// YaRN (Peng et al. 2023): as Llama 3 with a ramp over dimensions, and scaled attention.
    Yarn {
        /// The factor, at least 1.
        factor: f64,
        /// Positions of the training.
        original_positions: f64,
        /// Dimensions that turn more often than this over the training's length are kept.
        beta_fast: f64,
        /// Dimensions that turn less often than this are divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// Longrope: a divisor of its own for each pair, one list for short and one for long sequences.
    Long {
        /// Divisors of sequences up to `original_positions`, one a pair.
        short: Vec<f64>,
        /// Divisors of longer ones.
        long: Vec<f64>,
        /// Positions of the training.
        original_positions: f64,
    },
}

/// The rotary embedding of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base, above 1.
    pub theta: f64,
    /// Elements of a head that turn; even.
    pub dim: usize,
    /// How frequencies are scaled.
    pub scaling: RopeScaling,
    /// Factor of sines and cosines.
    pub attention_factor: f64,
    /// Divisors of the frequencies that the model's files bring along (`rope_freqs.weight` of GGUF), one a pair.
    pub divisors: Option<Vec<f32>>,
}

/// The factor of sines and cosines that YaRN derives from its scaling factor.
#[must_use]
pub fn yarn_attention_factor(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

impl Rope {
    /// Pairs of a head that turn.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.dim / 2
    }

    /// Whether frequencies depend on the length of the sequence.
    #[must_use]
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. } | RopeScaling::Long { .. })
    }

    /// The angle per position of each pair, for a sequence of `length` tokens.
    pub fn frequencies(&self, length: usize, out: &mut Vec<f32>) {
        out.clear();
        let length = length as f64;
        let theta = match self.scaling {
            RopeScaling::Dynamic { factor, original_positions } => {
                let dim = self.dim as f64;
                let length = length.max(original_positions);
                let stretch = (factor * length / original_positions) - (factor - 1.0);
                // Two elements have one pair of frequency 1, whatever the base.
                if dim > 2.0 { self.theta * stretch.powf(dim / (dim - 2.0)) } else { self.theta }
            }
            _ => self.theta,
        };
        for pair in 0..self.pairs() {
            let plain = theta.powf(-(2.0 * pair as f64) / self.dim as f64);
            let frequency = self.scaled(pair, plain, length) as f32;
            let divisor = self.divisors.as_ref().and_then(|d| d.get(pair)).copied().unwrap_or(1.0);
            out.push(frequency / divisor);
        }
    }

    fn scaled(&self, pair: usize, plain: f64, length: f64) -> f64 {
        match &self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => plain,
            RopeScaling::Linear { factor } => plain / factor,
            RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_positions } => {
                let turns = original_positions * plain / TAU;
                if turns < *low_frequency_factor {
                    plain / factor
                } else if turns > *high_frequency_factor {
                    plain
                } else {
                    let kept = (turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor);
                    (1.0 - kept) * plain / factor + kept * plain
                }
            }
            RopeScaling::Yarn { factor, original_positions, beta_fast, beta_slow, truncate } => {
                let dim = self.dim as f64;
                let dimension_of =
                    |turns: f64| dim * (original_positions / (turns * TAU)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (dimension_of(*beta_fast), dimension_of(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain / factor * divided + plain * (1.0 - divided)
            }
            RopeScaling::Long { short, long, original_positions } => {
                let divisors = if length > *original_positions { long } else { short };
                plain / divisors.get(pair).copied().unwrap_or(1.0)
            }
        }
    }

    /// The cosines, then the sines, of all pairs at `position`, into `out` (of [`Self::dim`] elements).
    pub fn angles(&self, frequencies: &[f32], position: usize, out: &mut [f32]) {
        let (cosines, sines) = out.split_at_mut(frequencies.len());
        for ((&frequency, cosine), sine) in frequencies.iter().zip(cosines).zip(sines) {
            let angle = f64::from(position as f32 * frequency);
            *cosine = (angle.cos() * self.attention_factor) as f32;
            *sine = (angle.sin() * self.attention_factor) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { theta: 10_000.0, dim: 16, scaling, attention_factor: 1.0, divisors: None }
    }

    fn frequencies(rope: &Rope, length: usize) -> Vec<f32> {
        let mut out = Vec::new();
        rope.frequencies(length, &mut out);
        out
    }

    #[test]
    fn plain_frequencies_are_powers_of_the_base() {
        let f = frequencies(&rope(RopeScaling::Default), 1);
        assert_eq!(f.len(), 8);
        for (pair, f) in f.iter().enumerate() {
            let expected = 10f64.powf(-(pair as f64) / 2.0);
            assert!((f64::from(*f) / expected - 1.0).abs() < 1e-7, "pair {pair}: {f} {expected}");
        }
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let scaled = RopeScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_positions: 64.0,
        };
        let (plain, scaled) = (frequencies(&rope(RopeScaling::Default), 1), frequencies(&rope(scaled), 1));
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[7], plain[7] / 8.0);
        // 64 × 0.3162 / 2π = 3.22 turns: kept to (3.22 - 1) / 3.
        let kept = (64.0 * 10f64.powf(-0.5) / TAU - 1.0) / 3.0;
        let expected = f64::from(plain[1]) * (kept + (1.0 - kept) / 8.0);
        assert!((f64::from(scaled[1]) - expected).abs() < 1e-7);
    }

    #[test]
    fn yarn_ramps_between_kept_and_divided() {
        let scaled = RopeScaling::Yarn {
            factor: 4.0,
            original_positions: 64.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
        };
        let (plain, scaled) = (frequencies(&rope(RopeScaling::Default), 1), frequencies(&rope(scaled), 1));
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[7], plain[7] / 4.0);
        let ratios: Vec<f32> = scaled.iter().zip(&plain).map(|(s, p)| s / p).collect();
        assert!(ratios.windows(2).all(|r| r[0] >= r[1]), "{ratios:?}");
        assert!((yarn_attention_factor(4.0, 1.0) - 1.138_629_436).abs() < 1e-8);
        assert_eq!(yarn_attention_factor(1.0, 1.0), 1.0);
    }

    #[test]
    fn dynamic_scaling_begins_beyond_the_trained_length() {
        let dynamic = rope(RopeScaling::Dynamic { factor: 2.0, original_positions: 64.0 });
        assert!(dynamic.depends_on_length());
        assert_eq!(frequencies(&dynamic, 10), frequencies(&rope(RopeScaling::Default), 10));
        assert_eq!(frequencies(&dynamic, 64), frequencies(&rope(RopeScaling::Default), 64));
        let longer = frequencies(&dynamic, 128);
        // base × (2 × 128/64 - 1)^(16/14)
        let base = 10_000f64 * 3f64.powf(16.0 / 14.0);
        assert!((f64::from(longer[1]) - base.powf(-0.125)).abs() < 1e-6);
    }

    #[test]
    fn longrope_takes_the_list_of_the_length() {
        let long = rope(RopeScaling::Long { short: vec![1.0; 8], long: vec![3.0; 8], original_positions: 64.0 });
        assert_eq!(frequencies(&long, 64)[0], 1.0);
        assert_eq!(frequencies(&long, 65)[0], 1.0 / 3.0);
    }

    #[test]
    fn the_attention_factor_scales_sines_and_cosines() {
        let mut rope = rope(RopeScaling::Default);
        rope.attention_factor = 2.0;
        let mut out = [0.0; 16];
        rope.angles(&frequencies(&rope, 1), 1, &mut out);
        assert_eq!(out[0], (2.0 * 1f64.cos()) as f32);
        assert_eq!(out[8], (2.0 * 1f64.sin()) as f32);
    }
}
