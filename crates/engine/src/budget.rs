//! Sizes of budgets: bytes, a share of the model, or what is free.

use crate::error::Error;

/// How much a tier may hold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Budget {
    /// What is free, limits of the control group heeded, less a reserve; never more than the model needs.
    #[default]
    Auto,
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the model's weights.
    Percent(f64),
}

impl Budget {
    /// The budget in bytes, given the model's weights and what is free.
    ///
    /// # Errors
    /// [`Error::Config`] for a share that is negative or no number.
    pub fn resolve(self, setting: &str, weight_bytes: u64, free_bytes: u64) -> Result<u64, Error> {
        match self {
            Self::Auto => Ok(free_bytes),
            Self::Bytes(bytes) => Ok(bytes),
            Self::Percent(share) if share.is_finite() && share >= 0.0 => {
                Ok((weight_bytes as f64 * share / 100.0).ceil() as u64)
            }
            Self::Percent(share) => Err(Error::Config {
                setting: setting.to_owned(),
                cause: format!("{share}% of the model is no size; give a share of 0% or more"),
            }),
        }
    }
}
