//! Sizes of budgets: bytes, a share of the model, or what is free; and the books of a tier's budget.

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
    /// So many hundredths of the model's weights. On a GPU, reservations (KV cache, scratch) come on top, as far as its
    /// memory goes; in host RAM they are apart in any case.
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

/// The row cache's part of the host budget, and the most that it takes.
const ROW_CACHE_SHARE: u64 = 64;
const ROW_CACHE_BYTES_MAX: u64 = 1 << 20;

pub(crate) fn row_cache_bytes(budget_bytes: u64) -> u64 {
    (budget_bytes / ROW_CACHE_SHARE).min(ROW_CACHE_BYTES_MAX)
}

/// The host budget of which so many bytes are for blocks.
pub(crate) fn budget_for_blocks(blocks_bytes: u64) -> u64 {
    let by_share = blocks_bytes.div_ceil(ROW_CACHE_SHARE - 1).saturating_mul(ROW_CACHE_SHARE);
    by_share.min(blocks_bytes.saturating_add(ROW_CACHE_BYTES_MAX))
}

/// How reservations stand to a tier's budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reserving {
    /// They come out of it: bytes of a GPU.
    Inside,
    /// They raise it, to no more than this: a share of the model on a GPU.
    #[cfg_attr(not(any(feature = "gpu", test)), expect(dead_code, reason = "of a GPU"))]
    OnTop {
        /// What the GPU has.
        bytes_max: u64,
    },
    /// They do not count in it: host RAM, where `--kv` bounds them.
    Apart,
}

/// The books of a tier's budget: what was given, what is reserved, and what that leaves for blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TierBudget {
    pub(crate) label: &'static str,
    /// What the command line calls it: `--ram`, `--vram`.
    pub(crate) setting: &'static str,
    given_bytes: u64,
    /// Of these, what is not for blocks: the row cache.
    pub(crate) apart_bytes: u64,
    reserving: Reserving,
    /// What is for blocks is a multiple of this: a GPU's memory is taken by whole slabs, host memory by pages as they are
    /// written to.
    unit_bytes: u64,
    pub(crate) reserved_bytes: u64,
    /// The most that `reserved_bytes` has been.
    pub(crate) reserved_peak_bytes: u64,
}

impl TierBudget {
    pub(crate) fn new(
        label: &'static str,
        setting: &'static str,
        given_bytes: u64,
        apart_bytes: u64,
        reserving: Reserving,
    ) -> Self {
        let unit_bytes = 1;
        Self {
            label,
            setting,
            given_bytes,
            apart_bytes,
            reserving,
            unit_bytes,
            reserved_bytes: 0,
            reserved_peak_bytes: 0,
        }
    }

    /// The same, with blocks in units of so many bytes.
    #[cfg_attr(not(any(feature = "gpu", test)), expect(dead_code, reason = "of a GPU"))]
    pub(crate) fn in_units(self, unit_bytes: u64) -> Self {
        Self { unit_bytes: unit_bytes.max(1), ..self }
    }

    /// What the tier may hold, what is reserved in it included.
    pub(crate) fn bytes(&self) -> u64 {
        match self.reserving {
            Reserving::OnTop { bytes_max } => self.given_bytes.saturating_add(self.reserved_bytes).min(bytes_max),
            _ => self.given_bytes,
        }
    }

    /// What [`Self::bytes`] can become by reservations.
    pub(crate) fn bytes_max(&self) -> u64 {
        match self.reserving {
            Reserving::OnTop { bytes_max } => bytes_max,
            _ => self.given_bytes,
        }
    }

    /// Reserved bytes that count in the budget.
    fn inside_bytes(&self) -> u64 {
        if self.reserving == Reserving::Apart { 0 } else { self.reserved_bytes }
    }

    /// What is left for blocks.
    pub(crate) fn blocks_bytes(&self) -> u64 {
        let bytes = self.bytes().saturating_sub(self.apart_bytes).saturating_sub(self.inside_bytes());
        bytes - bytes % self.unit_bytes
    }

    /// Reserves; `kv_bytes` bounds what is apart.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if there is no room even without any block.
    pub(crate) fn reserve(&mut self, bytes: u64, kv_bytes: Option<u64>) -> Result<(), Error> {
        let total = self.reserved_bytes.saturating_add(bytes);
        let (setting, bound) = match self.reserving {
            Reserving::Apart => ("--kv", kv_bytes.unwrap_or(u64::MAX)),
            _ => (self.setting, self.bytes_max()),
        };
        if total > bound {
            return Err(Error::TooSmall { setting: setting.to_owned(), budget_bytes: bound, bytes_min: total });
        }
        self.reserved_bytes = total;
        self.reserved_peak_bytes = self.reserved_peak_bytes.max(total);
        Ok(())
    }

    pub(crate) fn give_back(&mut self, bytes: u64) {
        self.reserved_bytes = self.reserved_bytes.saturating_sub(bytes);
    }

    /// From now on so many bytes, reservations that count in it included.
    #[expect(clippy::unnecessary_wraps, reason = "one of the changes that may be refused")]
    pub(crate) fn set(&mut self, bytes: u64) -> Result<(), Error> {
        self.given_bytes = bytes;
        if matches!(self.reserving, Reserving::OnTop { .. }) {
            self.reserving = Reserving::Inside;
        }
        Ok(())
    }

    /// The brain speaks of bytes for blocks; users give budgets, of which some bytes are not for blocks. This is for a
    /// tier that is to be opened with another budget.
    pub(crate) fn too_small(&self, error: &overspill_core::TooSmall) -> Error {
        // The row cache is a share of the budget, so a smaller budget has a smaller one: ask for what is sure to do.
        let blocks = if self.apart_bytes == 0 { error.bytes_min } else { budget_for_blocks(error.bytes_min) };
        self.error(blocks)
    }

    /// The same for a tier that is open: its row cache stays as it is.
    pub(crate) fn refused(&self, error: &overspill_core::TooSmall) -> Error {
        self.error(error.bytes_min.saturating_add(self.apart_bytes))
    }

    fn error(&self, bytes_min: u64) -> Error {
        let bytes_min = bytes_min.checked_next_multiple_of(self.unit_bytes).unwrap_or(u64::MAX);
        Error::TooSmall {
            setting: self.setting.to_owned(),
            budget_bytes: self.bytes(),
            bytes_min: bytes_min.saturating_add(self.inside_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn of(reserving: Reserving) -> TierBudget {
        TierBudget::new("gpu0", "--vram", 1000, 0, reserving)
    }

    #[test]
    fn reservations_come_out_of_bytes_and_on_top_of_a_share() {
        let mut bytes = of(Reserving::Inside);
        bytes.reserve(300, None).unwrap();
        assert_eq!((bytes.bytes(), bytes.blocks_bytes()), (1000, 700));
        let mut share = of(Reserving::OnTop { bytes_max: 1200 });
        share.reserve(150, None).unwrap();
        assert_eq!((share.bytes(), share.blocks_bytes()), (1150, 1000));
        share.reserve(150, None).unwrap();
        assert_eq!((share.bytes(), share.blocks_bytes()), (1200, 900), "the device has no more");
        assert!(share.reserve(1000, None).is_err());
        share.give_back(300);
        assert_eq!((share.blocks_bytes(), share.reserved_peak_bytes), (1000, 300));
        let mut host = of(Reserving::Apart);
        host.reserve(5000, None).unwrap();
        assert_eq!((host.bytes(), host.blocks_bytes()), (1000, 1000));
        let refused = host.reserve(1, Some(5000)).unwrap_err();
        assert!(matches!(refused, Error::TooSmall { ref setting, bytes_min: 5001, .. } if setting == "--kv"));
    }

    #[test]
    fn a_gpu_s_blocks_are_whole_slabs() {
        let mut slabs = of(Reserving::Inside).in_units(64);
        assert_eq!((slabs.bytes(), slabs.blocks_bytes()), (1000, 960));
        slabs.reserve(100, None).unwrap();
        assert_eq!(slabs.blocks_bytes(), 896);
        let lacking = overspill_core::TooSmall { tier: "gpu0".into(), budget_bytes: 896, bytes_min: 900 };
        let Error::TooSmall { bytes_min, .. } = slabs.refused(&lacking) else { panic!() };
        assert_eq!(bytes_min, 960 + 100, "what is asked for is enough");
        slabs.set(bytes_min).unwrap();
        assert!(slabs.blocks_bytes() >= 900);
    }

    #[test]
    fn a_share_that_is_set_anew_is_bytes() {
        let mut share = of(Reserving::OnTop { bytes_max: 5000 });
        share.reserve(100, None).unwrap();
        share.set(1000).unwrap();
        assert_eq!((share.bytes(), share.blocks_bytes()), (1000, 900));
    }
}
