//! The questions of somebody who has a model and looks for a machine, answered.

use super::closed::{KeptCurve, physical_limit};
use super::cut::{Cut, Phase};
use super::machine::{Budgets, Device, Machine};
use super::predict::{PlanError, Prediction, Question, Resources, check, predict};
use super::shape::ModelShape;
use crate::hardware::Hardware;
use crate::router::Habit;
use crate::simulate::{Bound, Options};
use overspill_core::{Evict, Prefetch};
use std::thread;

/// What a unit of memory is in the marginal gains.
const GIB: u64 = 1 << 30;
/// What a unit of disk bandwidth is.
const GB_PER_S: u64 = 1_000_000_000;
/// Passes of a mixture that are simulated, all experts having been seen; the later half counts.
const MIXTURE_PASSES: u32 = 48;
/// The most that are simulated of what was recorded, twice.
const TRACE_PASSES_MAX: u32 = 512;
/// The same of chunks of a prompt, each of which chooses most experts.
const MIXTURE_PROMPTS: u32 = 8;

/// What to plan for.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// What computes; `None`: whichever decodes faster.
    pub device: Option<Device>,
    /// `--vram`; `None`: what the machine has, less a reserve.
    pub vram_bytes: Option<u64>,
    /// `--ram`; the same.
    pub ram_bytes: Option<u64>,
    /// Positions that there is room for.
    pub context: u64,
    /// Tokens of a prompt that are computed together.
    pub chunk: u64,
    /// How routers choose.
    pub habit: Habit,
    /// Eviction policy.
    pub evict: Evict,
    /// Prefetch policy.
    pub prefetch: Prefetch,
    /// How finely models are cut.
    pub cut: Cut,
    /// Whether to ask what more of each resource would bring.
    pub gains: bool,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            device: None,
            vram_bytes: None,
            ram_bytes: None,
            context: 4096,
            chunk: 512,
            habit: Habit::Recency,
            evict: Evict::Auto,
            prefetch: Prefetch::Auto,
            cut: Cut::Coarse,
            gains: true,
        }
    }
}

/// Where a kind of part lives, at the end of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Which part.
    pub kind: super::PartKind,
    /// Bytes in each tier, in the order of [`Plan::tiers`], and last those on disk alone.
    pub bytes: Vec<u64>,
}

/// What more of something brings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gain {
    /// Of what.
    pub resource: Resources,
    /// Decoded tokens per second more, for one unit (a GiB, a GB/s) more.
    pub tokens_per_s: f64,
    /// The same for one unit of currency spent on it.
    pub per_price: Option<f64>,
}

/// What more of everything brings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gains(pub Vec<Gain>);

/// What another device of the same machine would do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alternative {
    /// The device.
    pub device: Device,
    /// Decoded tokens per second.
    pub decode_tokens_per_s: f64,
    /// Tokens of prompts per second.
    pub prefill_tokens_per_s: f64,
}

/// A plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The machine's name.
    pub machine: String,
    /// What computes.
    pub device: Device,
    /// The budgets.
    pub budgets: Budgets,
    /// Bytes of the cache of keys and values, and of activations.
    pub kv_bytes: u64,
    /// See [`ModelShape::scratch_bytes`].
    pub scratch_bytes: u64,
    /// Names of the memories.
    pub tiers: Vec<String>,
    /// By kind of part.
    pub placement: Vec<Placement>,
    /// Decoding.
    pub decode: Prediction,
    /// A chunk of a prompt.
    pub prefill: Prediction,
    /// Seconds a token that no engine can beat on this machine with these budgets (routing as kind as any seen).
    pub physical_limit_seconds: f64,
    /// What that limit is spent on.
    pub physical_bound: Bound,
    /// What the other device would do, if both were tried and it can.
    pub alternative: Option<Alternative>,
    /// What more would bring.
    pub gains: Gains,
    /// The largest context for which there is room at all.
    pub context_max: u64,
    /// Cost of a million decoded tokens.
    pub per_million_tokens: Option<f64>,
    /// Of a million tokens of prompts.
    pub per_million_prompt_tokens: Option<f64>,
}

impl PlanOptions {
    fn machine(&self, shape: &ModelShape, hardware: &Hardware, device: Device) -> Machine {
        let kv_bytes = shape.kv_bytes(self.context, self.chunk).saturating_add(shape.scratch_bytes(self.chunk));
        let mut machine = Machine::new(hardware, device, kv_bytes);
        match (device, self.vram_bytes, self.ram_bytes) {
            // One memory: whichever option bounds it.
            (Device::Gpu, vram, ram) if hardware.unified_memory => {
                machine.budgets.vram_bytes = vram.or(ram).unwrap_or(machine.budgets.vram_bytes);
            }
            (Device::Gpu, vram, ram) => {
                machine.budgets.vram_bytes = vram.unwrap_or(machine.budgets.vram_bytes);
                machine.budgets.ram_bytes = ram.unwrap_or(machine.budgets.ram_bytes);
            }
            (Device::Cpu, _, ram) => machine.budgets.ram_bytes = ram.unwrap_or(machine.budgets.ram_bytes),
        }
        machine
    }

    fn question(&self, phase: Phase) -> Question<'_> {
        Question {
            context: self.context,
            chunk: self.chunk,
            phase,
            cut: self.cut,
            habit: &self.habit,
            options: Options { evict: self.evict, prefetch: self.prefetch, ..Options::default() },
        }
    }

    /// Predicts decoding, half of the context behind it.
    ///
    /// # Errors
    /// As [`predict`].
    pub fn decode(&self, shape: &ModelShape, machine: &Machine) -> Result<Prediction, PlanError> {
        let mut question = self.question(Phase { tokens: 1, past: self.context / 2 });
        // What was recorded counts once, after it has been gone through once.
        let passes = match &self.habit {
            Habit::Trace(trace) => u32::try_from(2 * trace.tokens()).unwrap_or(u32::MAX).min(TRACE_PASSES_MAX),
            _ => 0,
        };
        question.options.passes_max = shape.is_mixture().then_some(passes.max(MIXTURE_PASSES));
        predict(shape, machine, &question)
    }

    /// Predicts a chunk of a prompt.
    ///
    /// # Errors
    /// As [`predict`].
    pub fn prefill(&self, shape: &ModelShape, machine: &Machine) -> Result<Prediction, PlanError> {
        let mut question = self.question(Phase { tokens: self.chunk.max(1), past: self.context / 2 });
        question.options.passes_max = shape.is_mixture().then_some(MIXTURE_PROMPTS);
        predict(shape, machine, &question)
    }
}

/// Plans a model on a machine.
///
/// # Errors
/// [`PlanError`], of the device that lacks least if both were tried.
pub fn plan(shape: &ModelShape, hardware: &Hardware, options: &PlanOptions) -> Result<Plan, PlanError> {
    let devices = match options.device {
        Some(device) => vec![device],
        None if hardware.gpus.is_empty() => vec![Device::Cpu],
        None => vec![Device::Gpu, Device::Cpu],
    };
    let tried = in_parallel(devices, |device| {
        let machine = options.machine(shape, hardware, device);
        options.decode(shape, &machine).map(|decode| (machine, decode))
    });
    let (mut found, mut refused) = (Vec::new(), None);
    for result in tried {
        match result {
            Ok(result) => found.push(result),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    // Of two that are alike the first, which is the GPU.
    found.sort_by(|a, b| a.1.seconds_per_pass.total_cmp(&b.1.seconds_per_pass));
    let mut found = found.into_iter();
    match (found.next(), found.next()) {
        (Some((machine, decode)), other) => finish(shape, machine, decode, other, options),
        (None, _) => Err(refused.unwrap_or_else(|| PlanError::NoGpu { machine: hardware.name.clone() })),
    }
}

/// The rest of a plan, once it is known what computes.
fn finish(
    shape: &ModelShape,
    machine: Machine,
    decode: Prediction,
    other: Option<(Machine, Prediction)>,
    options: &PlanOptions,
) -> Result<Plan, PlanError> {
    let resources = if options.gains { resources(&machine) } else { Vec::new() };
    let machines = [Some(&machine), other.as_ref().map(|(machine, _)| machine)].into_iter().flatten().collect();
    // Prompts of both devices, and what more would bring.
    let prefills = in_parallel(machines, |machine| options.prefill(shape, machine));
    let gains = in_parallel(resources, |resource| gain(shape, &machine, &decode, resource, options));
    let gains = gains.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut prefills = prefills.into_iter();
    // The first machine was asked about.
    let prefill = prefills.next().unwrap_or_else(|| Ok(decode.clone()))?;
    let alternative = other.zip(prefills.next()).and_then(|((machine, decode), prefill)| {
        let (device, decode_tokens_per_s) = (machine.device, decode.tokens_per_s());
        let prefill_tokens_per_s = prefill.ok()?.tokens_per_s();
        Some(Alternative { device, decode_tokens_per_s, prefill_tokens_per_s })
    });
    let whole = Budgets::of(&machine.hardware, machine.device, 0);
    let budgets = machine.budgets;
    // The other memory may be used by another engine, so it counts as much as the machine has of it.
    let generous = match machine.device {
        Device::Gpu => budgets,
        Device::Cpu => Budgets { vram_bytes: machine.hardware.vram_bytes(), ..budgets },
    };
    let phase = Phase { tokens: 1, past: 0 };
    let (physical_limit_seconds, physical_bound) =
        physical_limit(shape, &machine.hardware, generous, phase, &KeptCurve::best_seen());
    let price = machine.hardware.price.as_ref().filter(|price| price.per_hour > 0.0);
    let placed = decode.places.iter();
    Ok(Plan {
        machine: machine.hardware.name.clone(),
        device: machine.device,
        budgets,
        kv_bytes: shape.kv_bytes(options.context, options.chunk),
        scratch_bytes: shape.scratch_bytes(options.chunk),
        tiers: decode.tiers.clone(),
        placement: placed.map(|(kind, bytes)| Placement { kind: *kind, bytes: bytes.clone() }).collect(),
        physical_limit_seconds,
        physical_bound,
        alternative,
        gains: Gains(gains),
        context_max: context_max(shape, &machine, whole, options),
        per_million_tokens: price.map(|price| price.per_million_tokens(decode.tokens_per_s())),
        per_million_prompt_tokens: price.map(|price| price.per_million_tokens(prefill.tokens_per_s())),
        decode,
        prefill,
    })
}

/// What a machine could have more of.
fn resources(machine: &Machine) -> Vec<Resources> {
    match machine.device {
        Device::Gpu if machine.hardware.unified_memory => vec![Resources::Ram, Resources::Disk],
        Device::Gpu => vec![Resources::Vram, Resources::Ram, Resources::Disk],
        Device::Cpu => vec![Resources::Ram, Resources::Disk],
    }
}

fn gain(
    shape: &ModelShape,
    machine: &Machine,
    decode: &Prediction,
    resource: Resources,
    options: &PlanOptions,
) -> Result<Gain, PlanError> {
    let unit = if resource == Resources::Disk { GB_PER_S } else { GIB };
    // What is not read from disk gets no faster by a faster disk, and what is all there by more room.
    let useless = match resource {
        Resources::Disk | Resources::Ram => decode.disk_bytes == 0,
        Resources::Vram => decode.bus_bytes == 0 && decode.disk_bytes == 0,
    };
    let more = if useless {
        decode.tokens_per_s()
    } else {
        options.decode(shape, &machine.with_more(resource, unit))?.tokens_per_s()
    };
    // Plans differ by the sizes of their blocks; what is no more than that is no gain.
    let tokens_per_s = if more > decode.tokens_per_s() * 1.0005 { more - decode.tokens_per_s() } else { 0.0 };
    let price = machine.hardware.price.as_ref();
    let per_gb = 1e9 / GIB as f64;
    let price = match resource {
        Resources::Vram => price.and_then(|p| p.per_gb_vram).map(|p| p / per_gb),
        Resources::Ram => price.and_then(|p| p.per_gb_ram).map(|p| p / per_gb),
        Resources::Disk => price.and_then(|p| p.per_gb_per_s_disk),
    };
    Ok(Gain { resource, tokens_per_s, per_price: price.map(|price| tokens_per_s / price) })
}

/// The most positions for which there is room besides the least of weights.
fn context_max(shape: &ModelShape, machine: &Machine, whole: Budgets, options: &PlanOptions) -> u64 {
    let chunk = options.chunk;
    match machine.device {
        Device::Cpu => {
            // The cache lies beside --ram: what the host has left.
            let weights = options.ram_bytes.unwrap_or_else(|| shape.least_bytes());
            let room = whole.ram_bytes.saturating_sub(weights).saturating_sub(shape.scratch_bytes(chunk));
            shape.positions_in(room, chunk)
        }
        Device::Gpu => {
            let (mut low, mut high) = (0, shape.context);
            while low < high {
                let middle = low + (high - low).div_ceil(2);
                if check(shape, machine, middle, chunk).is_ok() { low = middle } else { high = middle - 1 }
            }
            low
        }
    }
}

/// Answers questions on as many threads as there are cores, in their order.
pub(crate) fn in_parallel<Q: Send, A: Send>(questions: Vec<Q>, answer: impl Fn(Q) -> A + Sync) -> Vec<A> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    crate::sweep::map(questions, threads, &answer)
}
