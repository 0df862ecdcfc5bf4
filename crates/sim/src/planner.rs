//! The planner: what a model would do on a machine that one need not own.
//!
//! [`ModelShape`] is a model as far as its bytes and operations go: from a model's files, or from a `config.json` alone.
//! [`Machine`] is a [hardware profile](crate::hardware) with budgets. [`predict`] sends the shape's schedule through the
//! brain in virtual time, and [`plan`] asks it the questions that a buyer has. [`Estimate`] is the same in closed form,
//! which holds for dense models and serves as a cross-check; [`physical_limit`] is what no engine can beat.
//!
//! What it does not do: open a model, or measure a machine. It predicts from bandwidths, so it is as good as they are.

mod cheapest;
mod closed;
mod config;
mod cut;
mod machine;
mod plan;
mod predict;
mod shape;

pub use cheapest::{Offer, cheapest};
pub use closed::{Estimate, KeptCurve, estimate, physical_limit};
pub use config::ConfigError;
pub use cut::{Cut, Phase};
pub use machine::{Budgets, Device, Machine};
pub use plan::{Alternative, Gain, Gains, Placement, Plan, PlanOptions, plan};
pub use predict::{PlanError, Prediction, Question, Resources, predict};
pub use shape::{KvShape, ModelShape, Part, PartKind};
