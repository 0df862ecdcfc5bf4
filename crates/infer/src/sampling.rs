//! From logits to the next token: greedy, or drawn at random under temperature, top-k, top-p and min-p.
//!
//! Deterministic: the same parameters, seed and logits give the same tokens on every run. Everything is computed in
//! f64 in a fixed order, ties go to the lowest id, and the generator is xoshiro256++ (Blackman and Vigna,
//! <https://prng.di.unimi.it>), seeded through SplitMix64. Each token drawn takes exactly one number from it; greedy
//! takes none.
//!
//! Filters apply in the order temperature, top-k, top-p, min-p, each to what the one before has left. A filter that is
//! off changes nothing, not even the draws.

use std::cmp::Ordering;

/// How the next token is chosen. The default is greedy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by it. 0, the default, is greedy: the most likely token, and the rest is ignored. Finite, not
    /// negative.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens are kept. 0, the default, keeps all.
    pub top_k: u32,
    /// Only the fewest most likely tokens are kept whose probabilities reach `top_p` together (nucleus sampling, Holtzman
    /// et al. 2019). From 0 (the most likely alone) to 1, the default (all).
    pub top_p: f32,
    /// Only tokens at least `min_p` times as likely as the most likely are kept (Nguyen et al. 2024). From 0, the
    /// default (all), to 1.
    pub min_p: f32,
    /// What the generator starts from. 0 by default.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    #[must_use]
    pub fn greedy() -> Self {
        Self::default()
    }

    /// Whether the most likely token is always taken.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

/// Why no token could be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// A parameter is out of its range.
    #[error("{name} is {value}, but must be {range}")]
    Parameter {
        /// Which.
        name: &'static str,
        /// What it is.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// There are no logits, or more than ids can number.
    #[error("{0} logits: there must be one for each token of a vocabulary")]
    Count(usize),
    /// A logit is NaN or +∞.
    #[error("the logit of token {token} is {value}: the model's weights are damaged, or its arithmetic overflowed")]
    NotFinite {
        /// The first such token.
        token: u32,
        /// Its logit.
        value: f32,
    },
    /// Every logit is −∞.
    #[error("no token is possible: every logit is -inf")]
    NonePossible,
}

/// Chooses tokens. Allocates nothing after the first.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    random: Xoshiro256,
    candidates: Vec<Candidate>,
}

/// A token that is still in the running.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    /// Relative to the most likely token's, which is 1.
    weight: f64,
    logit: f32,
}

impl Candidate {
    /// The most likely first, the lowest id first among equals.
    fn order(a: &Self, b: &Self) -> Ordering {
        b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
    }
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    ///
    /// # Errors
    /// `Parameter` if one is out of the range that [`SamplingParams`] states.
    pub fn new(params: SamplingParams) -> Result<Self, SamplingError> {
        let check = |name, value: f32, max: f32, range| {
            let is_within = (0.0..=max).contains(&value);
            if is_within { Ok(()) } else { Err(SamplingError::Parameter { name, value, range }) }
        };
        check("temperature", params.temperature, f32::MAX, "0 (greedy) or more")?;
        check("top_p", params.top_p, 1.0, "from 0 to 1")?;
        check("min_p", params.min_p, 1.0, "from 0 to 1")?;
        Ok(Self { params, random: Xoshiro256::new(params.seed), candidates: Vec::new() })
    }

    /// What it was made with.
    #[must_use]
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The next token, given one logit for each token of the vocabulary. −∞ forbids a token.
    ///
    /// # Errors
    /// `Count`, `NotFinite` or `NonePossible` if the logits make no sense; the generator isn't advanced then.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SamplingError> {
        let best = greedy(logits)?;
        if self.params.is_greedy() {
            return Ok(best);
        }
        let max = logits[best as usize];
        self.weigh(logits, max);
        self.keep_top_k();
        self.keep_top_p();
        let least = f64::from(self.params.min_p);
        self.candidates.retain(|candidate| candidate.weight >= least);
        // In the order of ids, so that the draw depends on which tokens are left, not on how they were found.
        self.candidates.sort_unstable_by_key(|candidate| candidate.token);
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        let mut left = self.random.unit() * total;
        let mut chosen = best;
        for candidate in self.candidates.iter().filter(|candidate| candidate.weight > 0.0) {
            chosen = candidate.token;
            left -= candidate.weight;
            if left < 0.0 {
                break;
            }
        }
        Ok(chosen)
    }

    /// Makes every possible token a candidate.
    fn weigh(&mut self, logits: &[f32], max: f32) {
        let temperature = f64::from(self.params.temperature);
        let weight = |logit: f32| ((f64::from(logit) - f64::from(max)) / temperature).exp();
        self.candidates.clear();
        self.candidates.extend(
            (0..)
                .zip(logits)
                .filter(|&(_, &logit)| logit > f32::NEG_INFINITY)
                // Adding zero makes −0 into 0, which ties with it.
                .map(|(token, &logit)| Candidate { token, weight: weight(logit), logit: logit + 0.0 }),
        );
    }

    fn keep_top_k(&mut self) {
        let count = self.params.top_k as usize;
        if count > 0 && count < self.candidates.len() {
            self.candidates.select_nth_unstable_by(count - 1, Candidate::order);
            self.candidates.truncate(count);
        }
    }

    /// Sorts only as many candidates as it must, usually some dozens of 100,000.
    fn keep_top_p(&mut self) {
        if self.params.top_p >= 1.0 {
            return;
        }
        // Summed in the order of ids, whatever top-k has left.
        self.candidates.sort_unstable_by_key(|candidate| candidate.token);
        let total: f64 = self.candidates.iter().map(|candidate| candidate.weight).sum();
        let wanted = f64::from(self.params.top_p) * total;
        let (mut sorted, mut reached) = (0, 0.0);
        let mut chunk = 64;
        while sorted < self.candidates.len() {
            let rest = &mut self.candidates[sorted..];
            let count = chunk.min(rest.len());
            if count < rest.len() {
                rest.select_nth_unstable_by(count - 1, Candidate::order);
            }
            rest[..count].sort_unstable_by(Candidate::order);
            for candidate in &rest[..count] {
                reached += candidate.weight;
                sorted += 1;
                if reached >= wanted {
                    self.candidates.truncate(sorted);
                    return;
                }
            }
            chunk *= 8;
        }
    }
}

/// The most likely token; the lowest id among equals.
///
/// # Errors
/// As [`Sampler::sample`].
pub fn greedy(logits: &[f32]) -> Result<u32, SamplingError> {
    if logits.is_empty() || u32::try_from(logits.len()).is_err() {
        return Err(SamplingError::Count(logits.len()));
    }
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &value) in (0u32..).zip(logits) {
        if value.is_nan() || value == f32::INFINITY {
            return Err(SamplingError::NotFinite { token, value });
        }
        if value > best.1 {
            best = (token, value);
        }
    }
    if best.1 == f32::NEG_INFINITY { Err(SamplingError::NonePossible) } else { Ok(best.0) }
}

/// xoshiro256++.
#[derive(Clone, Debug)]
struct Xoshiro256([u64; 4]);

impl Xoshiro256 {
    fn new(mut seed: u64) -> Self {
        Self([(); 4].map(|()| split_mix(&mut seed)))
    }

    fn next(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let shifted = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= shifted;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// From 0 to less than 1, a multiple of 2⁻⁵³.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const LOGITS: [f32; 6] = [0.5, 2.0, -1.0, 2.0, 1.0, f32::NEG_INFINITY];

    fn warm() -> SamplingParams {
        SamplingParams { temperature: 1.0, seed: 7, ..Default::default() }
    }

    fn draws(params: SamplingParams, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(params).unwrap();
        (0..count).map(|_| sampler.sample(logits).unwrap()).collect()
    }

    /// Draws 40,000 tokens and compares their counts with `expected` weights by χ², and that others never come.
    fn assert_distribution(params: SamplingParams, logits: &[f32], expected: &[f64]) {
        let total: f64 = expected.iter().sum();
        let count = 40_000;
        let mut seen = vec![0.0; logits.len()];
        draws(params, logits, count).into_iter().for_each(|token| seen[token as usize] += 1.0);
        let mut chi_squared = 0.0;
        let mut degrees = -1.0;
        for (&seen, &expected) in seen.iter().zip(expected) {
            if expected == 0.0 {
                assert_eq!(seen, 0.0, "{params:?}");
                continue;
            }
            let expected = expected / total * count as f64;
            chi_squared += (seen - expected).powi(2) / expected;
            degrees += 1.0;
        }
        // Beyond five standard deviations of the χ² distribution.
        assert!(chi_squared < degrees + 5.0 * f64::sqrt(2.0 * degrees) + 1.0, "{params:?}: {chi_squared} {seen:?}");
    }

    #[test]
    fn the_generator_gives_its_published_numbers() {
        let mut seed = 1_234_567;
        let mixed: Vec<u64> = (0..3).map(|_| split_mix(&mut seed)).collect();
        assert_eq!(mixed, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
        let mut random = Xoshiro256([1, 2, 3, 4]);
        let numbers: Vec<u64> = (0..5).map(|_| random.next()).collect();
        assert_eq!(
            numbers,
            [41_943_041, 58_720_359, 3_588_806_011_781_223, 3_591_011_842_654_386, 9_228_616_714_210_784_205]
        );
    }

    #[test]
    fn greedy_takes_the_lowest_of_the_most_likely() {
        assert_eq!(draws(SamplingParams::greedy(), &LOGITS, 3), [1, 1, 1]);
        assert_eq!(greedy(&[-0.0, 0.0]).unwrap(), 0);
        assert_eq!(greedy(&[f32::NEG_INFINITY, f32::MIN]).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let weights: Vec<f64> = LOGITS.iter().map(|&logit| f64::from(logit).exp()).collect();
        assert_distribution(warm(), &LOGITS, &weights);
        let cool: Vec<f64> = LOGITS.iter().map(|&logit| (f64::from(logit) / 0.5).exp()).collect();
        assert_distribution(SamplingParams { temperature: 0.5, ..warm() }, &LOGITS, &cool);
    }

    #[test]
    fn filters_keep_what_they_say() {
        let weight = |token: usize| f64::from(LOGITS[token]).exp();
        let only = |kept: &[usize]| {
            let mut weights = vec![0.0; LOGITS.len()];
            kept.iter().for_each(|&token| weights[token] = weight(token));
            weights
        };
        let total: f64 = (0..LOGITS.len()).map(weight).sum();
        assert_distribution(SamplingParams { top_k: 3, ..warm() }, &LOGITS, &only(&[1, 3, 4]));
        // Of two equals at the edge the lower id is kept.
        assert_distribution(SamplingParams { top_k: 1, ..warm() }, &LOGITS, &only(&[1]));
        let both = (2.0 * weight(1) / total) as f32;
        assert_distribution(SamplingParams { top_p: both - 1e-4, ..warm() }, &LOGITS, &only(&[1, 3]));
        assert_distribution(SamplingParams { top_p: both + 1e-4, ..warm() }, &LOGITS, &only(&[1, 3, 4]));
        assert_distribution(SamplingParams { top_p: 0.0, ..warm() }, &LOGITS, &only(&[1]));
        let fifth = (-1.5f32).exp();
        assert_distribution(SamplingParams { min_p: fifth - 1e-4, ..warm() }, &LOGITS, &only(&[0, 1, 3, 4]));
        assert_distribution(SamplingParams { min_p: fifth + 1e-4, ..warm() }, &LOGITS, &only(&[1, 3, 4]));
        assert_distribution(SamplingParams { min_p: 1.0, ..warm() }, &LOGITS, &only(&[1, 3]));
        // top-p is of what top-k has left: of two equals one is half.
        assert_distribution(SamplingParams { top_k: 2, top_p: 0.5, ..warm() }, &LOGITS, &only(&[1]));
    }

    #[test]
    fn a_filter_that_is_off_changes_no_draw() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 7919 % 5000) as f32).sqrt() / 9.0).collect();
        let plain = draws(warm(), &logits, 200);
        for params in [
            SamplingParams { top_k: 5000, ..warm() },
            SamplingParams { top_k: u32::MAX, ..warm() },
            SamplingParams { top_p: 1.0, min_p: 0.0, ..warm() },
            SamplingParams { min_p: 1e-30, ..warm() },
        ] {
            assert_eq!(draws(params, &logits, 200), plain, "{params:?}");
        }
        assert_ne!(draws(SamplingParams { seed: 8, ..warm() }, &logits, 200), plain);
    }

    #[test]
    fn sorting_in_parts_finds_the_same_nucleus_as_sorting_all() {
        let logits: Vec<f32> = (0..3000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 1500.0).collect();
        for top_p in [0.001, 0.02, 0.5, 0.9, 0.999] {
            let mut sampler = Sampler::new(SamplingParams { top_p, ..warm() }).unwrap();
            let best = greedy(&logits).unwrap();
            sampler.weigh(&logits, logits[best as usize]);
            let mut all = sampler.candidates.clone();
            sampler.keep_top_p();
            let wanted = f64::from(top_p) * all.iter().map(|candidate| candidate.weight).sum::<f64>();
            all.sort_by(Candidate::order);
            let mut reached = 0.0;
            let mut expected = Vec::new();
            for candidate in &all {
                expected.push(candidate.token);
                reached += candidate.weight;
                if reached >= wanted {
                    break;
                }
            }
            let kept: Vec<u32> = sampler.candidates.iter().map(|candidate| candidate.token).collect();
            assert_eq!(kept, expected, "{top_p}");
        }
    }

    #[test]
    fn extreme_temperatures_and_logits_do_no_harm() {
        let tiny = SamplingParams { temperature: f32::MIN_POSITIVE, ..warm() };
        assert!(draws(tiny, &LOGITS, 50).iter().all(|token| [1, 3].contains(token)));
        let huge = SamplingParams { temperature: f32::MAX, ..warm() };
        assert_distribution(huge, &LOGITS, &[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]);
        let wide = [f32::MAX, f32::MIN, 0.0];
        assert!(draws(warm(), &wide, 50).iter().all(|&token| token == 0));
        assert_distribution(
            SamplingParams { temperature: f32::MAX, ..warm() },
            &wide,
            &[1.0, (-2.0f64).exp(), (-1.0f64).exp()],
        );
    }

    #[test]
    fn nonsense_is_refused_and_takes_no_number() {
        let mut sampler = Sampler::new(warm()).unwrap();
        assert_eq!(sampler.sample(&[]), Err(SamplingError::Count(0)));
        let error = sampler.sample(&[0.0, f32::NAN, f32::NAN]).unwrap_err();
        assert!(matches!(error, SamplingError::NotFinite { token: 1, .. }), "{error}");
        assert!(matches!(sampler.sample(&[f32::INFINITY]), Err(SamplingError::NotFinite { token: 0, .. })));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 3]), Err(SamplingError::NonePossible));
        let rest: Vec<u32> = (0..20).map(|_| sampler.sample(&LOGITS).unwrap()).collect();
        assert_eq!(rest, draws(warm(), &LOGITS, 20));
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        for (params, name) in [
            (SamplingParams { temperature: -0.1, ..warm() }, "temperature"),
            (SamplingParams { temperature: f32::NAN, ..warm() }, "temperature"),
            (SamplingParams { temperature: f32::INFINITY, ..warm() }, "temperature"),
            (SamplingParams { top_p: 1.01, ..warm() }, "top_p"),
            (SamplingParams { top_p: f32::NAN, ..warm() }, "top_p"),
            (SamplingParams { min_p: -1.0, ..warm() }, "min_p"),
        ] {
            let error = Sampler::new(params).unwrap_err();
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }
}
