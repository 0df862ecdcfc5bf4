//! What runs in a world: sequences that go through schedules, acquirers that declare nothing, holders of leases.

use crate::router::Habit;
use overspill_core::{BlockId, Nanos, Schedule, TierId};

/// A schedule, and how long its steps compute.
#[derive(Clone, Debug, Default)]
pub struct ScheduleModel {
    /// As the brain is told. The candidates of a choice lie expert by expert.
    pub schedule: Schedule,
    /// Nanoseconds of computing for each step.
    pub compute_ns: Vec<Nanos>,
    /// For each step: if it chooses, among how many experts, and how many of them.
    pub choices: Vec<Option<Choice>>,
}

/// A choice of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Experts that the step's blocks belong to, in equal shares; at least 1.
    pub experts: u32,
    /// How many of them are chosen.
    pub pick: u32,
    /// Most blocks that are leased at once, one set after the other once all of them have been announced; 0: all.
    pub together: u32,
}

/// So many passes through a schedule.
#[derive(Clone, Copy, Debug)]
pub struct Passes {
    /// Index of a schedule.
    pub schedule: usize,
    /// How often.
    pub passes: u32,
}

/// What a program does.
#[derive(Clone, Debug)]
pub enum Work {
    /// A request: prompt chunks, then tokens. Holds leases on its schedules' standing blocks.
    Sequence {
        /// One after the other; each with a cursor of its own.
        passes: Vec<Passes>,
        /// How its choices fall.
        habit: Habit,
        /// If not 0, it says beforehand what it expects to choose, and is right so often, in thousandths.
        foresight_milli: u16,
        /// Whether it begins by going through all that its choices may fall on, what it is least likely to choose first:
        /// memory is then as it is after thousands of tokens.
        warm: bool,
    },
    /// Leases sets of blocks one after the other, telling no schedule.
    Acquire {
        /// Where.
        tier: TierId,
        /// The sets; no block twice in one.
        sets: Vec<Vec<BlockId>>,
        /// How often through all of them.
        rounds: u32,
        /// Nanoseconds of computing on each.
        compute_ns: Nanos,
    },
}

/// Something that runs.
#[derive(Clone, Debug)]
pub struct Program {
    /// When it begins.
    pub begins_at: Nanos,
    /// What it does.
    pub work: Work,
    /// Its demands' deadlines, from when they are made.
    pub deadline_ns: Nanos,
    /// It withdraws a demand after so long; `None`: never.
    pub patience_ns: Option<Nanos>,
    /// Leases drop so long after the computing, while the next step already begins (as a GPU's do).
    pub lag_ns: Nanos,
}

impl Program {
    /// A sequence that waits as long as it takes.
    #[must_use]
    pub fn sequence(passes: Vec<Passes>, habit: Habit) -> Self {
        Self {
            begins_at: 0,
            work: Work::Sequence { passes, habit, foresight_milli: 0, warm: false },
            deadline_ns: 30_000_000_000,
            patience_ns: None,
            lag_ns: 0,
        }
    }
}

/// What has come of a program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Blocks that were resident when they were needed.
    pub hits: u64,
    /// Blocks that were not.
    pub misses: u64,
    /// Nanoseconds of waiting for grants.
    pub stall_ns: Nanos,
    /// Nanoseconds of computing.
    pub compute_ns: Nanos,
    /// Demands granted.
    pub granted: u64,
    /// Demands that failed since a transfer did.
    pub failed: u64,
    /// Demands that failed since leases held the room.
    pub pinned_out: u64,
    /// Demands, or schedules, that were too large.
    pub too_small: u64,
    /// Demands withdrawn.
    pub withdrawn: u64,
    /// Bytes of the blocks that its steps used.
    pub touched_bytes: u64,
}

/// The end of a pass.
#[derive(Clone, Debug)]
pub struct Mark {
    /// Which program.
    pub actor: usize,
    /// Which schedule.
    pub schedule: usize,
    /// When.
    pub at: Nanos,
    /// Its figures until then.
    pub figures: Figures,
    /// Uses that the world has recorded until then.
    pub uses: usize,
    /// Bytes that have crossed each wire until then.
    pub wire_bytes: Vec<u64>,
    /// Nanoseconds in which each wire was busy until then.
    pub wire_busy_ns: Vec<Nanos>,
}
