//! The brain of overspill: everything that decides, and nothing that acts.
//!
//! This crate is a pure state machine. It has no threads, no clock, no I/O, no `unsafe`, and never iterates over a
//! hashed container, so the same events always give the same commands. Events go in with `now` (integer nanoseconds),
//! commands come out; bodies (the engine, the simulator) carry them out and report back.
//!
//! What it does not do: it never sees a byte of a weight, never opens a file, and knows nothing of models beyond the
//! sizes of their blocks and the order in which steps read them.
#![forbid(unsafe_code)]

mod bitset;
mod brain;
pub mod catalog;
mod choices;
mod config;
pub mod dtype;
mod evict;
pub mod ids;
mod learn;
mod lru;
mod protocol;
mod schedule;
pub mod seam;
mod slots;
pub mod word;

pub use brain::{Brain, Decision, TierStats};
pub use config::{BlockSize, Config, Evict, Prefetch, TierConfig, TooSmall};
pub use protocol::{Command, Event, Refusal};
pub use schedule::{Schedule, Step};

pub use catalog::{
    Block, Catalog, CatalogBuilder, CatalogError, Layout, Part, Piece, RawTensor, Role, RowTable, Tensor,
};
pub use dtype::DType;
pub use ids::{
    BlockId, FileId, Nanos, ScheduleId, SequenceId, SlotId, StepId, TableId, TensorId, Ticket, TierId, TransferId,
};
