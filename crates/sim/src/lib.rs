//! Virtual clock and modelled tiers that drive the real brain of overspill.
//!
//! Two uses. A [`World`] with chance and faults in it tests the brain: any number of interleavings by seed, every
//! invariant checked after every event ([`random`]). A world without them answers what a model would do on a machine
//! that one doesn't own.
//!
//! What it does not do: it moves no byte, knows no model format, and never asks for the time.
#![forbid(unsafe_code)]

mod actor;
pub mod belady;
pub mod caches;
mod checker;
mod faults;
pub mod hardware;
pub mod planner;
mod profile;
mod program;
pub mod random;
mod rng;
mod router;
mod simulate;
pub mod sweep;
mod wire;
mod world;

pub use caches::Cache;
pub use checker::Violation;
pub use faults::{BudgetChange, Faults, Slow, Stop};
pub use profile::{Profile, ProfileError, TierProfile, Workload};
pub use program::{Choice, Figures, Mark, Passes, Program, ScheduleModel, Work};
pub use rng::Rng;
pub use router::{Habit, RECENCY, Router, RoutingTrace, TraceError};
pub use simulate::{Bound, Limit, Options, Outcome, SimulateError, WireOutcome, simulate, simulate_uses};
pub use wire::WireModel;
pub use world::{Checks, Setup, Summary, World};
