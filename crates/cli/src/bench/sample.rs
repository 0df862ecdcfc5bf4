//! Repeated measurements of one thing: mean, spread, median, and which of them stand apart.

use serde::Serialize;

/// Repeated measurements.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Sample {
    /// As they were taken.
    pub values: Vec<f64>,
    /// Their mean.
    pub mean: f64,
    /// The standard deviation of a sample; 0 for one value.
    pub sd: f64,
    /// The middle one.
    pub median: f64,
    /// Those that are further from the median than [`OUTLIER`] times the usual distance. They count in mean, sd and
    /// median all the same: they are told, not hidden.
    pub outliers: Vec<f64>,
}

/// Iglewicz and Hoaglin's bound for the modified z-score (How to Detect and Handle Outliers, 1993).
const OUTLIER: f64 = 3.5;
/// The median absolute deviation of a normal distribution is its standard deviation over this.
const MAD_TO_SD: f64 = 1.4826;
/// With fewer values nothing can be told apart.
const VALUES_MIN: usize = 4;

impl Sample {
    /// Of these values.
    pub fn of(values: Vec<f64>) -> Self {
        let count = values.len() as f64;
        if values.is_empty() {
            return Self::default();
        }
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let sd = if values.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 };
        let middle = median(&values);
        let distances: Vec<f64> = values.iter().map(|value| (value - middle).abs()).collect();
        let bound = OUTLIER * MAD_TO_SD * median(&distances);
        let apart = |value: &&f64| values.len() >= VALUES_MIN && bound > 0.0 && (**value - middle).abs() > bound;
        let outliers = values.iter().filter(apart).copied().collect();
        Self { mean, sd, median: middle, outliers, values }
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// `mean ± sd`.
    pub fn text(&self) -> String {
        match self.values.len() {
            0 => "–".to_owned(),
            1 => digits(self.mean),
            _ => format!("{} ± {}", digits(self.mean), digits(self.sd)),
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.len().saturating_sub(1) / 2, sorted.len() / 2);
    match (sorted.get(low), sorted.get(high)) {
        (Some(low), Some(high)) => (low + high) / 2.0,
        _ => 0.0,
    }
}

/// A number with about three digits.
pub fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 || v == 0.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_those_of_the_textbook() {
        let sample = Sample::of(vec![2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!((sample.mean, sample.median), (5.0, 4.5));
        assert!((sample.sd - 2.138).abs() < 1e-3);
        assert_eq!(sample.outliers, [9.0]);
        assert_eq!(Sample::of(vec![3.0]).text(), "3.00");
        assert_eq!(Sample::of(vec![]).text(), "–");
        assert_eq!(Sample::of(vec![100.0, 102.0]).text(), "101 ± 1.41");
    }

    #[test]
    fn what_stands_apart_is_told_and_counts() {
        let sample = Sample::of(vec![10.0, 10.1, 9.9, 10.0, 3.0]);
        assert_eq!(sample.outliers, [3.0]);
        assert!(sample.mean < 9.0);
        assert!(Sample::of(vec![10.0, 10.1, 3.0]).outliers.is_empty(), "three are too few to tell");
    }
}
