//! One configuration, opened and run: what `run` does once and `bench` does many times, with the same figures.

use crate::args::{ActivationsArg, PlacementArgs};
use crate::device::{Device, bytes_of};
use crate::errors::{CliError, Kind, Missed, Outcome, Stop};
use crate::limit::{self, Limit, Wires, Work};
use crate::machine;
use crate::sizes::Size;
use overspill::Stats;
use overspill_formats::ModelFiles;
use overspill_infer::arch::{Ffn, ModelSpec};
use overspill_infer::generate::{Generation, Request, Runtime, RuntimeOptions, Session};
use overspill_infer::kernels::Activations;
use std::ops::ControlFlow;
use std::time::Duration;

/// The settings that budgets are part of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `--ram`, `--vram` and how they are used.
    pub placement: PlacementArgs,
    /// `--kv`.
    pub kv: Option<Size>,
}

/// Everything that is decided before the model is opened.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where weights are and how they get there.
    pub settings: Settings,
    /// How activations meet quantised weights.
    pub activations: ActivationsArg,
    /// Threads that compute; the cores if absent.
    pub threads: Option<u64>,
    /// Tokens of context.
    pub context: usize,
}

impl Setup {
    /// Threads that compute on a CPU.
    pub fn threads(&self) -> usize {
        self.threads.map_or_else(machine::cores, |threads| threads as usize)
    }

    /// Opens a model so.
    ///
    /// # Errors
    /// Budgets that are too small, files that cannot be read, settings that cannot be met.
    pub fn open(&self, device: &Device, model: ModelFiles) -> Outcome<(Runtime, Session)> {
        let kv_bytes = self.settings.kv.map(|size| bytes_of(size, model.catalog.weight_bytes()));
        let options = RuntimeOptions {
            activations: match self.activations {
                ActivationsArg::F32 => Activations::F32,
                ActivationsArg::Q8 => Activations::Q8,
            },
            threads: self.threads.map_or(0, |threads| threads as usize),
            ..RuntimeOptions::default()
        };
        let mut builder = device.builder(&self.settings.placement, kv_bytes);
        if device.kind() == "cpu" {
            let need = options.host_need(&ModelSpec::from(&model.metadata, &model.catalog)?, self.context);
            // A cache that --kv bounds has been set aside already.
            let kv_bytes = if kv_bytes.is_some() { 0 } else { need.kv_bytes };
            builder = builder.beside_bytes(need.scratch_bytes.saturating_add(kv_bytes));
        }
        let runtime = Runtime::open(builder.open_model(model)?, options)?;
        let session = runtime.session(Some(self.context))?;
        Ok((runtime, session))
    }
}

/// A finished generation, and the engine's figures along it.
pub struct Run {
    /// What the runtime says.
    pub generation: Generation,
    /// The engine's figures when the first token came.
    pub at_first: Stats,
    /// The engine's figures at the end.
    pub at_end: Stats,
}

/// Generates; `on_token` is told of each token as it comes, and its failure ends the run.
///
/// # Errors
/// What the runtime or `on_token` fails with; Ctrl-C.
pub fn generate(
    runtime: &Runtime,
    session: &mut Session,
    request: &Request<'_>,
    on_token: &mut dyn FnMut(u32) -> Outcome,
) -> Outcome<Run> {
    let mut at_first = None;
    let mut failed = None;
    let generation = session.generate(request, Some(crate::interrupt::flag()), &mut |token| {
        let told = match at_first {
            Some(_) => Ok(()),
            None => runtime.engine().stats().map(|stats| at_first = Some(stats)).map_err(Stop::from),
        };
        match told.and_then(|()| on_token(token)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(stop) => {
                failed = Some(stop);
                ControlFlow::Break(())
            }
        }
    });
    if let Some(stop) = failed {
        return Err(stop);
    }
    let generation = generation?;
    let at_end = runtime.engine().stats()?;
    Ok(Run { generation, at_first: at_first.unwrap_or_else(|| at_end.clone()), at_end })
}

impl Run {
    /// What the limit depends on; `None` if no token was decoded.
    pub fn work(&self, runtime: &Runtime) -> Option<Work> {
        let timings = &self.generation.timings;
        let tokens = timings.decoded_tokens as f64;
        let stats = &self.at_end;
        let (gpu_keeps_bytes, keeps_bytes) = limit::kept_bytes(stats);
        let spec = runtime.spec();
        (timings.decoded_tokens > 0).then(|| Work {
            touched_bytes: limit::touched_bytes(spec, runtime.model().plan(), runtime.engine().catalog()),
            is_mixture: spec.layers.iter().any(|layer| matches!(layer.ffn, Ffn::Experts(_))),
            read_bytes: stats.disk.read_bytes.saturating_sub(self.at_first.disk.read_bytes) as f64 / tokens,
            seconds: timings.decode.as_secs_f64() / tokens,
            stall_seconds: Duration::from_nanos(stats.stall_ns.saturating_sub(self.at_first.stall_ns)).as_secs_f64()
                / tokens,
            gpu_keeps_bytes,
            keeps_bytes,
        })
    }
}

/// Measures the wires that this work needs, and says how far from their limit it was. Measuring takes memory, so the
/// model's should be gone.
pub fn measure_limit(
    work: &Work,
    device: &Device,
    files: &limit::ModelPaths,
    io: overspill::IoChoice,
    threads: usize,
    time: Duration,
) -> Option<Limit> {
    let streams = work.is_mixture && work.read_bytes > 0.0 || work.touched_bytes > work.keeps_bytes;
    let disk = if streams { limit::disk_bytes_per_s(files, io, time) } else { None };
    let (bus, ram) = match device {
        Device::Cpu => (None, machine::ram_read_bytes_per_s(threads, time)),
        #[cfg(feature = "gpu")]
        Device::Gpu(context) => (limit::bus_bytes_per_s(context), None),
    };
    limit::limit(work, Wires { disk, bus, ram })
}

impl From<overspill::Error> for CliError {
    fn from(error: overspill::Error) -> Self {
        use overspill::{Error, ErrorKind};
        let kind = match error.kind() {
            ErrorKind::NotFound => Kind::NotFound,
            ErrorKind::BadFile => Kind::BadFile,
            ErrorKind::TooSmall => Kind::TooSmall,
            ErrorKind::Config => Kind::Config,
            ErrorKind::Io => Kind::Io,
            ErrorKind::Device => Kind::Device,
            _ => Kind::Failed,
        };
        let mut found = Self::new(kind, error.to_string());
        if let Error::TooSmall { setting, bytes_min, .. } = error {
            found.missed = Some(Missed { setting, bytes_min });
        }
        found
    }
}

impl From<overspill_infer::InferError> for CliError {
    fn from(error: overspill_infer::InferError) -> Self {
        use overspill_infer::InferError;
        use overspill_infer::sampling::SamplingError;
        let kind = match error {
            InferError::Engine(error) => return error.into(),
            InferError::Config { .. } | InferError::Tensor { .. } | InferError::Tokenizer(_) => Kind::BadFile,
            InferError::Input { .. } | InferError::Sampling(SamplingError::Parameter { .. }) => Kind::Config,
            InferError::Sampling(_) => Kind::BadFile,
            InferError::Memory { .. } => Kind::TooSmall,
            InferError::Device(_) => Kind::Device,
            InferError::Cancelled => Kind::Interrupted,
            _ => Kind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<overspill::Error> for Stop {
    fn from(error: overspill::Error) -> Self {
        Self::Error(error.into())
    }
}

impl From<overspill_infer::InferError> for Stop {
    fn from(error: overspill_infer::InferError) -> Self {
        Self::Error(error.into())
    }
}
