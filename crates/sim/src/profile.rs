//! Machines, and models as a machine sees them: what a simulation is given.

use crate::program::Choice;
use crate::router::Habit;
use crate::wire::WireModel;
use overspill_core::{BlockSize, Config, Nanos, Schedule};

/// A machine: its memories, its wires, and how fast it computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Its name.
    pub label: String,
    /// GPUs first, then host RAM: a parent comes after its children.
    pub tiers: Vec<TierProfile>,
    /// The disks, as blocks number them.
    pub disks: Vec<WireModel>,
}

/// A memory that caches weights, and what computes on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierProfile {
    /// Its name.
    pub label: String,
    /// Bytes for weights.
    pub budget_bytes: u64,
    /// Bytes of a slab.
    pub slab_bytes: u64,
    /// Index of the tier that fills it, and the link from there; `None`: filled from disk.
    pub parent: Option<(u32, WireModel)>,
    /// Bytes of weights per second that its processor can read.
    pub read_bytes_per_s: u64,
    /// Operations per second of its processor; 0: never what binds.
    pub flops_per_s: u64,
    /// Nanoseconds that a step costs whatever it computes.
    pub step_ns: Nanos,
}

/// A model as a machine sees it.
#[derive(Clone, Debug, Default)]
pub struct Workload {
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// The blocks.
    pub blocks: Vec<BlockSize>,
    /// One pass: a token, or a chunk of a prompt.
    pub schedule: Schedule,
    /// For each step, whether it chooses, and among what. May be shorter than the steps.
    pub choices: Vec<Option<Choice>>,
    /// For each step, operations of one pass. May be shorter than the steps.
    pub flops: Vec<u64>,
    /// How choices fall.
    pub habit: Habit,
}

/// A machine or a model that can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// A rate of 0.
    #[error("{what} of '{label}' is 0: give the bytes per second that it really does")]
    NoRate {
        /// Which rate.
        what: &'static str,
        /// Of which wire or tier.
        label: String,
    },
    /// No memory, or no disk.
    #[error("profile '{label}' has no {what}")]
    Missing {
        /// What.
        what: &'static str,
        /// Whose.
        label: String,
    },
    /// A parent that is not there, or not after its child.
    #[error("tier '{label}' is filled from tier {parent}, which is not one of those after it")]
    Parent {
        /// Which tier.
        label: String,
        /// Its parent.
        parent: u32,
    },
    /// A block or step that refers to what is not there.
    #[error("step {step} refers to {what} {index}, of which there are {count}")]
    NoSuch {
        /// Which step; blocks of no step count as step 0.
        step: usize,
        /// A block, a tier, a disk.
        what: &'static str,
        /// Its number.
        index: u32,
        /// How many there are.
        count: usize,
    },
    /// Blocks that don't fit their slots, or none at all.
    #[error(
        "block {index} has {bytes} bytes and {slots} slots of {slot_bytes}: it must fit them, and both must be more than 0"
    )]
    Block {
        /// Which.
        index: usize,
        /// Its bytes.
        bytes: u64,
        /// Its slots.
        slots: u32,
        /// Bytes of a slot.
        slot_bytes: u64,
    },
    /// A schedule without any use.
    #[error("the schedule '{label}' has no step that reads a block")]
    Nothing {
        /// Its name.
        label: String,
    },
}

impl Profile {
    /// Checks that it can be.
    ///
    /// # Errors
    /// The first thing that can't.
    pub fn validate(&self) -> Result<(), ProfileError> {
        let missing = |what| ProfileError::Missing { what, label: self.label.clone() };
        if self.tiers.is_empty() {
            return Err(missing("memory"));
        }
        if self.disks.is_empty() {
            return Err(missing("disk"));
        }
        let links = self.tiers.iter().filter_map(|t| t.parent.as_ref().map(|(_, wire)| wire));
        if let Some(wire) = self.disks.iter().chain(links).find(|w| w.bytes_per_s == 0) {
            return Err(ProfileError::NoRate { what: "the speed", label: wire.label.clone() });
        }
        for (index, tier) in self.tiers.iter().enumerate() {
            if tier.read_bytes_per_s == 0 {
                return Err(ProfileError::NoRate { what: "the reading speed", label: tier.label.clone() });
            }
            if let Some((parent, _)) = &tier.parent
                && !(index + 1..self.tiers.len()).contains(&(*parent as usize))
            {
                return Err(ProfileError::Parent { label: tier.label.clone(), parent: *parent });
            }
        }
        Ok(())
    }

    /// What may be in flight on a wire, as the engine has it once it knows the disks: two times bandwidth × latency of
    /// the wire that needs most, or what [`Config::disk_window_bytes`] gives a disk, or 16 MiB.
    #[must_use]
    pub fn window_bytes(&self) -> u64 {
        let links = self.tiers.iter().filter_map(|t| t.parent.as_ref().map(|(_, wire)| wire));
        let product = |w: &WireModel| {
            let bytes = 2 * u128::from(w.bytes_per_s) * u128::from(w.latency_ns) / 1_000_000_000;
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        let disks = self.disks.iter().map(|disk| Config::disk_window_bytes(disk.bytes_per_s));
        self.disks.iter().chain(links).map(product).chain(disks).max().unwrap_or(Config::WINDOW_BYTES_DEFAULT)
    }
}

impl Workload {
    /// Checks that it can be, on such a machine.
    ///
    /// # Errors
    /// The first thing that can't.
    pub fn validate(&self, profile: &Profile) -> Result<(), ProfileError> {
        for (index, block) in self.blocks.iter().enumerate() {
            let room = u64::from(block.slots).saturating_mul(self.slot_bytes);
            if block.bytes == 0 || room < block.bytes {
                let (bytes, slots) = (block.bytes, block.slots);
                return Err(ProfileError::Block { index, bytes, slots, slot_bytes: self.slot_bytes });
            }
            check_index(0, "disk", block.wire, profile.disks.len())?;
        }
        for (step, s) in self.schedule.steps.iter().enumerate() {
            check_index(step, "tier", s.tier.0, profile.tiers.len())?;
            s.blocks.iter().try_for_each(|b| check_index(step, "block", b.0, self.blocks.len()))?;
        }
        self.schedule.standing.iter().try_for_each(|b| check_index(0, "block", b.0, self.blocks.len()))?;
        if self.schedule.steps.iter().all(|s| s.blocks.is_empty()) {
            return Err(ProfileError::Nothing { label: self.schedule.label.clone() });
        }
        Ok(())
    }

    /// Whether any step chooses what it reads.
    #[must_use]
    pub fn is_mixture(&self) -> bool {
        self.choices.iter().any(Option::is_some)
    }

    /// Bytes that a step reads, of a choice those of the chosen, on average.
    #[must_use]
    pub fn step_bytes(&self, step: usize) -> u64 {
        let Some(s) = self.schedule.steps.get(step) else { return 0 };
        let all: u64 = s.blocks.iter().map(|b| self.blocks[b.index()].bytes).sum();
        match self.choices.get(step).copied().flatten() {
            Some(choice) => {
                let experts = u64::from(choice.experts.max(1));
                (u128::from(all) * u128::from(u64::from(choice.pick).min(experts)) / u128::from(experts)) as u64
            }
            None => all,
        }
    }

    /// Nanoseconds that a step computes on a machine: reading its weights, or operating on them, whichever takes longer.
    #[must_use]
    pub fn compute_ns(&self, profile: &Profile, step: usize) -> Nanos {
        let Some(tier) = self.schedule.steps.get(step).and_then(|s| profile.tiers.get(s.tier.index())) else {
            return 0;
        };
        let per_second = |work: u64, rate: u64| match rate {
            0 => 0,
            rate => u64::try_from(u128::from(work) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX),
        };
        let reading = per_second(self.step_bytes(step), tier.read_bytes_per_s);
        let operating = per_second(self.flops.get(step).copied().unwrap_or(0), tier.flops_per_s);
        tier.step_ns.saturating_add(reading.max(operating))
    }
}

fn check_index(step: usize, what: &'static str, index: u32, count: usize) -> Result<(), ProfileError> {
    if (index as usize) < count { Ok(()) } else { Err(ProfileError::NoSuch { step, what, index, count }) }
}
