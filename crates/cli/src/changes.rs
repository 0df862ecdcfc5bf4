//! What may change under a run: another file takes the model's name, or the limit on memory sinks. Looked at between
//! tokens, a few times a second at most, by reading a few small files of the system's.
//!
//! A run that was given no `--ram` took what was free; it gives back when there is less. It takes no more when the limit
//! rises again: what has been promised to others since is not known.

use crate::args::PlacementArgs;
use crate::errors::Outcome;
use crate::report;
use crate::sizes::human_bytes;
use overspill::limits::{LimitWatch, MemoryLimits, memory_limits};
use overspill::{Engine, Error};
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);
/// Left free for what the process takes besides: as much as the engine leaves when it opens within a control group.
const RESERVE_BYTES: u64 = 24 << 20;
const RESERVE_SHARE: u64 = 128;

/// See the module.
#[derive(Debug)]
pub struct Changes {
    /// Absent if the budget was given and is to be kept.
    limits: Option<LimitWatch>,
    next: Instant,
}

impl Changes {
    /// Watches from now on.
    pub fn start(args: &PlacementArgs) -> Self {
        Self { limits: args.ram.is_none().then(LimitWatch::start), next: Instant::now() }
    }

    /// Looks, if it is time.
    ///
    /// # Errors
    /// A file of the model that is another now; the engine's.
    pub fn look(&mut self, engine: &Engine) -> Outcome {
        let now = Instant::now();
        if now < self.next {
            return Ok(());
        }
        self.next = now + PAUSE;
        engine.check_unchanged()?;
        match self.limits.as_mut().and_then(LimitWatch::sunk_to) {
            Some(limit_bytes) => give_back(engine, limit_bytes),
            None => Ok(()),
        }
    }
}

/// Lowers the budget of host RAM to what the limits allow now, or as far as the model allows.
fn give_back(engine: &Engine, limit_bytes: u64) -> Outcome {
    let stats = engine.stats()?;
    let Some(host) = stats.tiers.get(engine.host_tier().index()) else { return Ok(()) };
    let room = room(&memory_limits(), stats.mapped_bytes, host.reserved_bytes);
    if room >= host.budget_bytes {
        return Ok(());
    }
    let (budget_bytes, too_small) = match engine.set_budget(engine.host_tier(), room) {
        Err(Error::TooSmall { bytes_min, .. }) => {
            let least = bytes_min.min(host.budget_bytes);
            engine.set_budget(engine.host_tier(), least)?;
            (least, true)
        }
        other => {
            other?;
            (room, false)
        }
    };
    let (limit, budget) = (human_bytes(limit_bytes), human_bytes(budget_bytes));
    report::note(&if too_small {
        format!(
            "the limit on memory has sunk to {limit}: weights keep {budget}, the least that works, which may be too much"
        )
    } else {
        format!("the limit on memory has sunk to {limit}: weights give way to {budget}")
    });
    Ok(())
}

/// Bytes of weights that the limits leave room for, if `mapped_bytes` hold weights now and `reserved_bytes` are promised
/// to a cache that may not have taken them yet.
fn room(limits: &MemoryLimits, mapped_bytes: u64, reserved_bytes: u64) -> u64 {
    let group = limits.cgroup.as_ref();
    // A limit below what is in use leaves less than nothing.
    let left_in_group = group.map(|group| {
        i128::from(group.limit_bytes) - i128::from(group.used_bytes.saturating_sub(group.reclaimable_bytes))
    });
    let left_in_machine = limits.machine_available_bytes.or(limits.machine_bytes).map(i128::from);
    let Some(left) = left_in_group.into_iter().chain(left_in_machine).min() else { return u64::MAX };
    let reserve = RESERVE_BYTES + group.map_or(0, |group| group.limit_bytes / RESERVE_SHARE);
    let room = i128::from(mapped_bytes) + left - i128::from(reserve) - i128::from(reserved_bytes);
    u64::try_from(room.max(0)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use overspill::limits::CgroupLimit;

    fn limits(machine: Option<u64>, group: Option<(u64, u64, u64)>) -> MemoryLimits {
        let mut limits = MemoryLimits::default();
        limits.machine_available_bytes = machine;
        limits.cgroup = group.map(|(limit_bytes, used_bytes, reclaimable_bytes)| CgroupLimit {
            path: "/group".into(),
            limit_bytes,
            used_bytes,
            reclaimable_bytes,
        });
        limits
    }

    #[test]
    fn room_is_what_weights_hold_and_what_is_left_less_a_reserve() {
        const MIB: u64 = 1 << 20;
        let reserve = RESERVE_BYTES + 512 * MIB / RESERVE_SHARE;
        let group = limits(Some(9000 * MIB), Some((512 * MIB, 400 * MIB, 100 * MIB)));
        assert_eq!(room(&group, 200 * MIB, 10 * MIB), (200 + 212 - 10) * MIB - reserve);
        let over = limits(Some(9000 * MIB), Some((512 * MIB, 600 * MIB, 0)));
        assert_eq!(room(&over, 500 * MIB, 0), (500 - 88) * MIB - reserve, "less than nothing is left");
        assert_eq!(room(&limits(Some(0), None), 10, 0), 0);
        assert_eq!(room(&limits(Some(100 * MIB), None), 0, 0), 100 * MIB - RESERVE_BYTES);
        assert_eq!(room(&limits(None, None), 5, 0), u64::MAX, "the system does not say");
    }
}
