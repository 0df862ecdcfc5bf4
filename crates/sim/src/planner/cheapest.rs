//! Several machines compared, and the cheapest that is fast enough.

use super::plan::{Plan, PlanOptions, plan};
use super::predict::PlanError;
use super::shape::ModelShape;
use crate::hardware::Hardware;

/// What a machine would do, or why it can't.
#[derive(Clone, Debug)]
pub struct Offer<'a> {
    /// The machine.
    pub hardware: &'a Hardware,
    /// Its plan.
    pub plan: Result<Plan, PlanError>,
}

/// Plans a model on several machines. Also tells which is the cheapest by the hour that decodes `wanted` tokens per
/// second, if any does; machines without a price come last.
#[must_use]
pub fn cheapest<'a>(
    shape: &ModelShape,
    machines: &'a [Hardware],
    options: &PlanOptions,
    wanted: f64,
) -> (Vec<Offer<'a>>, Option<usize>) {
    let offers: Vec<Offer<'a>> =
        machines.iter().map(|hardware| Offer { hardware, plan: plan(shape, hardware, options) }).collect();
    let price = |offer: &Offer<'_>| offer.hardware.price.as_ref().map_or(f64::INFINITY, |price| price.per_hour);
    let fast = |offer: &&Offer<'_>| offer.plan.as_ref().is_ok_and(|plan| plan.decode.tokens_per_s() >= wanted);
    let best =
        offers.iter().enumerate().filter(|(_, offer)| fast(offer)).min_by(|a, b| price(a.1).total_cmp(&price(b.1)));
    let best = best.map(|(index, _)| index);
    (offers, best)
}
