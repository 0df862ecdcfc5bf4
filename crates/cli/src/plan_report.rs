//! Plans for people, and for programs.

use crate::plan_model::Planned;
use crate::report::{self, Align, Table};
use crate::sizes::{human_bytes, human_count};
use overspill_sim::Bound;
use overspill_sim::hardware::Hardware;
use overspill_sim::planner::{Offer, Plan, PlanOptions, Prediction, Resources};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// A plan with what it is about.
#[derive(Debug)]
pub struct View<'a> {
    /// The model.
    pub model: &'a Planned,
    /// The machine.
    pub hardware: &'a Hardware,
    /// What was assumed.
    pub options: &'a PlanOptions,
    /// The plan.
    pub plan: &'a Plan,
}

/// Machines side by side.
#[derive(Debug)]
pub struct Comparison<'a> {
    /// The model.
    pub model: &'a Planned,
    /// The machines.
    pub offers: &'a [Offer<'a>],
    /// Tokens per second that are wanted.
    pub want: Option<f64>,
    /// The cheapest that reaches them.
    pub best: Option<usize>,
}

/// A figure with three digits or so.
fn figure(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 0.1 => format!("{v:.2}"),
        v => format!("{v:.4}"),
    }
}

/// What binds, for people.
pub fn bound_words(bound: Bound) -> &'static str {
    match bound {
        Bound::Disk => "the disk",
        Bound::Bus(_) => "the bus to the GPU",
        Bound::Compute => "computing (reading weights from memory, or arithmetic)",
    }
}

fn resource(resource: Resources) -> (&'static str, &'static str) {
    match resource {
        Resources::Vram => ("vram", "one more GiB of VRAM"),
        Resources::Ram => ("ram", "one more GiB of RAM"),
        Resources::Disk => ("disk", "one more GB/s of disk"),
    }
}

fn prediction_json(prediction: &Prediction) -> Value {
    json!({
        "tokens_per_s": prediction.tokens_per_s(),
        "tokens_per_pass": prediction.tokens,
        "seconds_per_pass": prediction.seconds_per_pass,
        "first_pass_s": prediction.first_pass_seconds,
        "bound_by": prediction.bound.name(),
        "limit": {
            "seconds_per_pass": prediction.limit_seconds,
            "ratio": prediction.seconds_per_pass / prediction.limit_seconds.max(1e-12),
        },
        "touched_bytes": prediction.touched_bytes,
        "disk_bytes": prediction.disk_bytes,
        "bus_bytes": prediction.bus_bytes,
        "stall_s": prediction.stall_seconds,
        "compute_s": prediction.compute_seconds,
        "hit_rate": prediction.hit_rate,
        "in_flight_bytes": prediction.ring_bytes,
        "evict": prediction.evict,
        "steady": prediction.steady,
    })
}

fn model_json(model: &Planned) -> Value {
    let shape = &model.shape;
    json!({
        "name": shape.label,
        "architecture": shape.architecture,
        "parameters": shape.parameters,
        "bytes": shape.bytes,
        "touched_bytes_per_token": shape.touched_bytes(),
        "expert_bytes": shape.expert_bytes(),
        "context": shape.context,
        "notes": model.notes,
    })
}

impl View<'_> {
    /// The object of `--json`.
    pub fn json(&self) -> Value {
        let Self { model, hardware, options, plan } = self;
        let placement = plan.placement.iter().map(|placement| {
            let tiers = plan.tiers.iter().zip(&placement.bytes).map(|(tier, bytes)| (tier.clone(), json!(bytes)));
            let disk = ("disk".to_owned(), json!(placement.bytes.last()));
            json!({ "kind": placement.kind.name(), "bytes": tiers.chain([disk]).collect::<serde_json::Map<_, _>>() })
        });
        let gains = plan.gains.0.iter().map(|gain| {
            json!({
                "resource": resource(gain.resource).0,
                "unit": if gain.resource == Resources::Disk { "GB/s" } else { "GiB" },
                "tokens_per_s": gain.tokens_per_s,
                "tokens_per_s_per_price": gain.per_price,
            })
        });
        json!({
            "model": model_json(model),
            "hardware": { "name": hardware.name, "description": hardware.description },
            "device": plan.device.name(),
            "budgets": { "vram_bytes": plan.budgets.vram_bytes, "ram_bytes": plan.budgets.ram_bytes },
            "context": { "planned": options.context, "max": plan.context_max, "kv_bytes": plan.kv_bytes },
            "scratch_bytes": plan.scratch_bytes,
            "placement": placement.collect::<Vec<_>>(),
            "decode": prediction_json(&plan.decode),
            "prefill": prediction_json(&plan.prefill),
            "physical_limit": {
                "seconds_per_token": plan.physical_limit_seconds,
                "bound_by": plan.physical_bound.name(),
                "ratio": plan.decode.seconds_per_pass / plan.physical_limit_seconds.max(1e-12),
            },
            "alternative": plan.alternative.map(|other| json!({
                "device": other.device.name(),
                "decode_tokens_per_s": other.decode_tokens_per_s,
                "prefill_tokens_per_s": other.prefill_tokens_per_s,
            })),
            "gains": gains.collect::<Vec<_>>(),
            "cost": hardware.price.as_ref().map(|price| json!({
                "currency": price.currency,
                "per_hour": price.per_hour,
                "per_million_tokens": plan.per_million_tokens,
                "per_million_prompt_tokens": plan.per_million_prompt_tokens,
            })),
        })
    }

    /// For people.
    pub fn text(&self, coloured: bool) -> String {
        let Self { model, hardware, options, plan } = self;
        let shape = &model.shape;
        let mut text = report::facts(&[
            ("model", format!("{} ({}, {})", shape.label, human_count(shape.parameters), human_bytes(shape.bytes))),
            ("a token reads", human_bytes(shape.touched_bytes())),
            ("machine", format!("{}: {}", hardware.name, hardware.description)),
            ("budgets", self.budgets()),
            (
                "context",
                format!(
                    "{} positions ({}); {} would fit",
                    options.context,
                    human_bytes(plan.kv_bytes),
                    plan.context_max
                ),
            ),
        ]);
        let _ = write!(text, "\nWhere it lives\n{}", self.placement(coloured));
        let _ = write!(text, "\nHow fast\n{}", self.speeds(coloured));
        if let Some(other) = plan.alternative {
            let (decode, prompt) = (figure(other.decode_tokens_per_s), figure(other.prefill_tokens_per_s));
            let name = other.device.name();
            let _ = writeln!(text, "  with --device {name}: {decode} tokens/s decoding, {prompt} as a prompt");
        }
        let _ = writeln!(
            text,
            "  no engine could be faster here than {} tokens/s ({})",
            figure(1.0 / plan.physical_limit_seconds.max(1e-12)),
            bound_words(plan.physical_bound)
        );
        if !plan.gains.0.is_empty() {
            let _ = write!(text, "\nWhat more would bring, decoding\n{}", self.gains(coloured));
        }
        if let (Some(price), Some(decode), Some(prompt)) =
            (&hardware.price, plan.per_million_tokens, plan.per_million_prompt_tokens)
        {
            let _ = writeln!(
                text,
                "\nA million tokens cost {} {} decoded, {} as a prompt (at {} an hour)",
                figure(decode),
                price.currency,
                figure(prompt),
                price.per_hour
            );
        }
        for note in model.notes.iter().chain(&self.notes()) {
            let _ = writeln!(text, "\nNote: {note}");
        }
        text
    }

    fn budgets(&self) -> String {
        let budgets = self.plan.budgets;
        match (budgets.vram_bytes, budgets.ram_bytes) {
            (0, ram) => format!("RAM {} (the CPU computes)", human_bytes(ram)),
            (vram, 0) => format!("memory {}, shared (the GPU computes)", human_bytes(vram)),
            (vram, ram) => format!("VRAM {}, RAM {} (the GPU computes)", human_bytes(vram), human_bytes(ram)),
        }
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.hardware.gpus.len() > 1 && self.plan.tiers.len() > 2 {
            let note =
                "The layers are divided between the GPUs by their memory; the runtime of this version computes on one.";
            notes.push(note.to_owned());
        }
        if self.model.shape.is_mixture() {
            let note = "How often experts are found in memory depends on routing: see --routing.";
            notes.push(note.to_owned());
        }
        notes
    }

    fn placement(&self, coloured: bool) -> String {
        let mut table = Table::new(&[
            ("part", Align::Left),
            ("where", Align::Left),
            ("bytes", Align::Right),
            ("share", Align::Right),
        ]);
        for placement in &self.plan.placement {
            let all: u64 = placement.bytes.iter().sum();
            let tiers = self.plan.tiers.iter().map(String::as_str).chain(["disk alone"]);
            for (tier, &bytes) in tiers.zip(&placement.bytes).filter(|(_, bytes)| **bytes > 0) {
                let share = format!("{:.0} %", bytes as f64 * 100.0 / all.max(1) as f64);
                table.row([placement.kind.name().to_owned(), tier.to_owned(), human_bytes(bytes), share]);
            }
        }
        table.render(coloured)
    }

    fn speeds(&self, coloured: bool) -> String {
        let mut table = Table::new(&[
            ("", Align::Left),
            ("tokens/s", Align::Right),
            ("from disk", Align::Right),
            ("over the bus", Align::Right),
            ("hits", Align::Right),
            ("bound by", Align::Left),
        ]);
        for (name, p) in [("decode", &self.plan.decode), ("prompt", &self.plan.prefill)] {
            let name = if p.tokens > 1 { format!("{name}, {} at once", p.tokens) } else { name.to_owned() };
            table.row([
                name,
                figure(p.tokens_per_s()),
                human_bytes(p.disk_bytes),
                human_bytes(p.bus_bytes),
                format!("{:.1} %", p.hit_rate * 100.0),
                bound_words(p.bound).to_owned(),
            ]);
        }
        table.render(coloured)
    }

    fn gains(&self, coloured: bool) -> String {
        let currency = self.hardware.price.as_ref().map_or("", |price| price.currency.as_str());
        let mut table =
            Table::new(&[("", Align::Left), ("tokens/s", Align::Right), ("for each 100 spent", Align::Right)]);
        for gain in &self.plan.gains.0 {
            let per_price = gain.per_price.map(|each| format!("+{} for {currency}", figure(each * 100.0)));
            let [what, more] = [resource(gain.resource).1.to_owned(), format!("+{}", figure(gain.tokens_per_s))];
            table.row([what, more, per_price.unwrap_or_default()]);
        }
        table.render(coloured)
    }
}

impl Comparison<'_> {
    /// The object of `--json`.
    pub fn json(&self) -> Value {
        let machine = |offer: &Offer<'_>| {
            let name = &offer.hardware.name;
            let price = offer.hardware.price.as_ref().map(|price| price.per_hour);
            match &offer.plan {
                Ok(plan) => json!({
                    "name": name,
                    "per_hour": price,
                    "device": plan.device.name(),
                    "decode": prediction_json(&plan.decode),
                    "prefill": prediction_json(&plan.prefill),
                    "physical_limit_s": plan.physical_limit_seconds,
                    "context_max": plan.context_max,
                    "per_million_tokens": plan.per_million_tokens,
                }),
                Err(error) => json!({ "name": name, "per_hour": price, "refused": error.to_string() }),
            }
        };
        json!({
            "model": model_json(self.model),
            "want_tokens_per_s": self.want,
            "machines": self.offers.iter().map(machine).collect::<Vec<_>>(),
            "cheapest": self.want.and(self.best).map(|index| self.offers[index].hardware.name.clone()),
        })
    }

    /// For people.
    pub fn text(&self, coloured: bool) -> String {
        let mut table = Table::new(&[
            ("machine", Align::Left),
            ("computes", Align::Left),
            ("decode", Align::Right),
            ("prompt", Align::Right),
            ("bound by", Align::Left),
            ("an hour", Align::Right),
            ("a million tokens", Align::Right),
        ]);
        for offer in self.offers {
            let price = offer.hardware.price.as_ref();
            let hour = price.map(|price| format!("{} {}", figure(price.per_hour), price.currency)).unwrap_or_default();
            let name = offer.hardware.name.clone();
            match &offer.plan {
                Ok(plan) => table.row([
                    name,
                    plan.device.name().to_owned(),
                    figure(plan.decode.tokens_per_s()),
                    figure(plan.prefill.tokens_per_s()),
                    plan.decode.bound.name().to_owned(),
                    hour,
                    plan.per_million_tokens.map(figure).unwrap_or_default(),
                ]),
                Err(error) => {
                    let none = String::new;
                    table.row([name, "-".to_owned(), none(), none(), format!("does not fit: {error}"), hour, none()]);
                }
            }
        }
        let shape = &self.model.shape;
        let mut text = format!(
            "{} ({}, {}; a token reads {})\n\n{}",
            shape.label,
            human_count(shape.parameters),
            human_bytes(shape.bytes),
            human_bytes(shape.touched_bytes()),
            table.render(coloured)
        );
        if let (Some(want), Some(best)) = (self.want, self.best) {
            let _ = writeln!(text, "\nThe cheapest that decodes {want} tokens/s: {}", self.offers[best].hardware.name);
        }
        text
    }
}
