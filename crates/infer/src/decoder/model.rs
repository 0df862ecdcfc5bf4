//! What all sequences of a model share: its specification, its steps, its schedules, and the norms and biases that are
//! held all the time.
//!
//! What is not here: any sequence's state.

use crate::InferError;
use crate::arch::{ModelSpec, VectorSpec};
use crate::backend::{Source, Vector};
use crate::kernels::dequantise;
use crate::plan::{Plan, vectors};
use crate::rope::Rope;
use overspill::{Engine, LeaseSet, Piece, ScheduleId, Sequence};
use parking_lot::Mutex;

/// A model that is ready to run on an engine.
#[derive(Debug)]
pub struct Model {
    engine: Engine,
    spec: ModelSpec,
    rope: Rope,
    plan: Plan,
    /// With the head: a token's decoding, and the last chunk of a prompt.
    decode: ScheduleId,
    /// Without: a prompt's other chunks. Registered when the first long prompt comes.
    prompt: Mutex<Option<ScheduleId>>,
    standing: LeaseSet,
    /// By tensor: its piece, and the piece's place among the standing leases.
    vectors: Vec<Option<(Piece, usize)>>,
}

impl Model {
    /// Reads the specification, registers the schedule with the engine, and leases norms and biases.
    ///
    /// # Errors
    /// As [`ModelSpec::from`]; [`InferError::Engine`] if a budget has no room for the largest step, or the norms can't
    /// be read; [`InferError::Input`] if the engine was not opened on a model.
    pub fn open(engine: Engine) -> Result<Self, InferError> {
        let metadata = engine.metadata().ok_or_else(|| InferError::Input {
            what: "engine".into(),
            cause: "it was opened on tensors without a configuration".into(),
            cure: "open it on a Hugging Face directory or a GGUF file".into(),
        })?;
        let spec = ModelSpec::from(metadata, engine.catalog())?;
        let rope = rope_of(&engine, &spec)?;
        let plan = Plan::new(&spec, engine.catalog(), engine.compute_tier(), engine.step_bytes_hint());
        let decode = engine.register(plan.schedule("decode", true))?;
        let standing = engine.acquire_set(&plan.standing)?;
        let mut places = vec![None; engine.catalog().tensors().len()];
        for vector in vectors(&spec) {
            let piece = engine.catalog().pieces(vector.tensor, 0).first().copied();
            let place = piece.and_then(|piece| Some((piece, plan.standing.binary_search(&piece.block).ok()?)));
            places[vector.tensor.index()] = place;
        }
        Ok(Self { engine, spec, rope, plan, decode, prompt: Mutex::new(None), standing, vectors: places })
    }

    /// The engine that brings its weights.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What it consists of.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its steps.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Its rotary embedding, complete.
    #[must_use]
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// The schedule of tokens that give logits.
    #[must_use]
    pub fn schedule(&self) -> ScheduleId {
        self.decode
    }

    /// A norm or bias.
    pub(crate) fn vector(&self, spec: &VectorSpec) -> Result<Vector<'_>, InferError> {
        let place = self.vectors.get(spec.tensor.index()).copied().flatten();
        let (piece, index) = place.ok_or_else(|| {
            InferError::Device(format!("tensor {} is not among the standing ones: this is a bug", spec.tensor))
        })?;
        let source = Source::Leased(self.standing.lease(index));
        Ok(Vector { dtype: spec.dtype, len: spec.len, piece, source })
    }

    /// A way through the steps, with or without the head's.
    pub(crate) fn sequence(&self, head: bool, label: &str) -> Result<Sequence, InferError> {
        let schedule = if head {
            self.decode
        } else {
            let mut prompt = self.prompt.lock();
            match *prompt {
                Some(schedule) => schedule,
                None => *prompt.insert(self.engine.register(self.plan.schedule("prompt", false))?),
            }
        };
        Ok(self.engine.sequence(schedule, label)?)
    }
}

/// The rotary embedding with the divisors that the model's files bring along.
fn rope_of(engine: &Engine, spec: &ModelSpec) -> Result<Rope, InferError> {
    let mut rope = spec.rope.clone();
    if let Some(vector) = &spec.rope_divisors {
        let tensor = engine.catalog().tensor(vector.tensor);
        let mut bytes = vec![0; usize::try_from(tensor.bytes).unwrap_or(usize::MAX)];
        engine.fill(vector.tensor, 0, &mut bytes)?;
        let mut divisors = vec![0.0; vector.len];
        dequantise(vector.dtype, &bytes, &mut divisors);
        if let Some(divisor) = divisors.iter().find(|d| !(d.is_finite() && **d > 0.0)) {
            return Err(InferError::Tensor {
                file: engine.catalog().path(tensor.file).into(),
                tensor: tensor.name.clone(),
                cause: format!("a frequency can't be divided by {divisor}"),
                cure: "the file is damaged: fetch it again".into(),
            });
        }
        rope.divisors = Some(divisors);
    }
    Ok(rope)
}
