//! Requests: a prompt in, tokens out.
//!
//! A [`Runtime`] holds a model on an engine; each [`Session`] is one sequence with its own cache, and several may run at
//! once, on threads of their own. What is not here: text ([`crate::tokenizer`]), and the choice among logits
//! ([`crate::sampling`]).

use crate::InferError;
use crate::arch::ModelSpec;
use crate::backend::Backend;
use crate::cpu::CpuBackend;
use crate::decoder::{ChosenExpert, Decoder, DecoderShape, Logits, Model, bytes_per_token, host_bytes_per_token};
use crate::kernels::{Activations, Pool};
use crate::kv;
use crate::sampling::{Sampler, SamplingParams};
use overspill::Engine;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Tokens of a prompt that are computed together, unless activations would take more than is allowed.
pub const CHUNK_DEFAULT: usize = 512;
/// Bytes of activations, by default: a chunk of 512 tokens of a model of a thousand million parameters.
pub const SCRATCH_BYTES_DEFAULT: u64 = 88 << 20;
/// The context of a session that names none, if the model's is longer.
pub const CONTEXT_DEFAULT: usize = 4096;

/// Settings of a [`Runtime`].
#[derive(Clone, Debug)]
pub struct RuntimeOptions {
    /// How activations meet quantised weights on a CPU. Default: [`Activations::F32`].
    pub activations: Activations,
    /// Threads that compute on a CPU. Default: 0, one for each core.
    pub threads: usize,
    /// Most tokens of a prompt that are computed together, 1 or more. Default: [`CHUNK_DEFAULT`].
    pub chunk: usize,
    /// Most bytes of activations of a session; shortens chunks, to no less than a token. Default:
    /// [`SCRATCH_BYTES_DEFAULT`].
    pub scratch_bytes: u64,
}

impl Default for RuntimeOptions {
    fn default() -> Self {
        Self {
            activations: Activations::default(),
            threads: 0,
            chunk: CHUNK_DEFAULT,
            scratch_bytes: SCRATCH_BYTES_DEFAULT,
        }
    }
}

impl RuntimeOptions {
    /// Host memory that a session of `context` tokens takes beside weights where the CPU computes: for its KV cache and
    /// for activations. For whoever sets a budget before there is a runtime.
    #[must_use]
    pub fn host_need(&self, spec: &ModelSpec, context: usize) -> HostNeed {
        let chunk = self.host_chunk(spec, context);
        HostNeed {
            kv_bytes: kv::bytes(spec, context, chunk),
            scratch_bytes: host_bytes_per_token(spec).saturating_mul(chunk as u64),
        }
    }

    fn host_chunk(&self, spec: &ModelSpec, context: usize) -> usize {
        self.chunk_of(self.scratch_bytes, host_bytes_per_token(spec), context)
    }

    /// Tokens of a prompt that are computed together.
    fn chunk_of(&self, scratch_bytes: u64, bytes_per_token: u64, context: usize) -> usize {
        let fitting = usize::try_from(scratch_bytes / bytes_per_token.max(1)).unwrap_or(usize::MAX).max(1);
        self.chunk.min(fitting).min(context)
    }
}

/// Host memory of a session beside weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostNeed {
    /// The KV cache, which `--kv` bounds.
    pub kv_bytes: u64,
    /// Activations of the longest chunk.
    pub scratch_bytes: u64,
}

/// Makes the backend of a new session.
pub type BackendMaker = Box<dyn Fn() -> Result<Box<dyn Backend>, InferError> + Send + Sync>;

/// A model on an engine, ready for sessions. Cheap to share: `Send + Sync`.
pub struct Runtime {
    model: Arc<Model>,
    backends: BackendMaker,
    /// The cache lies in host memory, and is reserved there; other backends reserve their buffers themselves.
    on_host: bool,
    options: RuntimeOptions,
    sessions: AtomicU64,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").field("architecture", &self.spec().architecture).finish_non_exhaustive()
    }
}

impl Runtime {
    /// Takes the model that `engine` was opened on, and computes where the engine's compute tier is: on its GPU if it
    /// has one, else on the CPU.
    ///
    /// # Errors
    /// As [`Model::open`]; [`InferError::Input`] for options out of their range; [`InferError::Device`] if the GPU
    /// can't do what the model needs.
    pub fn open(engine: Engine, options: RuntimeOptions) -> Result<Self, InferError> {
        #[cfg(feature = "gpu")]
        if let Some(context) = engine.gpu() {
            let kernels = crate::gpu::GpuKernels::new(context)?;
            let reserving = engine.clone();
            let backends = move || -> Result<Box<dyn Backend>, InferError> {
                Ok(Box::new(crate::gpu::GpuBackend::new(&kernels, Some(&reserving))?))
            };
            return Self::new(engine, options, Box::new(backends), false);
        }
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let pool = Arc::new(Pool::new(if options.threads == 0 { cores() } else { options.threads }));
        let activations = options.activations;
        let backends = move || -> Result<Box<dyn Backend>, InferError> {
            Ok(Box::new(CpuBackend::new(Arc::clone(&pool), activations)))
        };
        Self::new(engine, options, Box::new(backends), true)
    }

    /// As [`Self::open`], on backends of the caller's. They must be able to read the engine's compute tier, and reserve
    /// their buffers themselves if they shall count in a budget.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_on(engine: Engine, options: RuntimeOptions, backends: BackendMaker) -> Result<Self, InferError> {
        Self::new(engine, options, backends, false)
    }

    fn new(engine: Engine, options: RuntimeOptions, backends: BackendMaker, on_host: bool) -> Result<Self, InferError> {
        if options.chunk == 0 {
            return Err(input("chunk", "0 tokens are no chunk", "use 1 or more"));
        }
        let model = Arc::new(Model::open(engine)?);
        Ok(Self { model, backends, on_host, options, sessions: AtomicU64::new(0) })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the model consists of.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    /// The engine that brings the weights.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        self.model.engine()
    }

    /// A new, empty sequence of at most `context` tokens; if `None`, of the model's context or [`CONTEXT_DEFAULT`],
    /// whichever is shorter. Its cache is reserved at once.
    ///
    /// # Errors
    /// [`InferError::Input`] if the model was not made for so long a context; [`InferError::Engine`] or
    /// [`InferError::Memory`] if the cache finds no room.
    pub fn session(&self, context: Option<usize>) -> Result<Session, InferError> {
        let spec = self.spec();
        let context = context.unwrap_or_else(|| spec.context.min(CONTEXT_DEFAULT));
        if context == 0 || context > spec.context {
            let cause = format!("{context} positions, where the model was made for 1 to {}", spec.context);
            return Err(input("context (--ctx)", cause, "use a context in that range"));
        }
        let chunk = if self.on_host {
            self.options.host_chunk(spec, context)
        } else {
            self.options.chunk_of(self.scratch_bytes()?, bytes_per_token(spec), context)
        };
        let shape = DecoderShape { context, chunk };
        let reservation = if self.on_host {
            let bytes = kv::bytes(spec, shape.context, shape.chunk);
            Some(self.engine().reserve(self.engine().host_tier(), bytes, "KV cache")?)
        } else {
            None
        };
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        let label = format!("session {number}");
        let decoder = Decoder::new(Arc::clone(&self.model), (self.backends)()?, &label, shape, reservation)?;
        Ok(Session { decoder, eos: spec.eos.clone(), logits: Vec::new() })
    }
}

/// Activations in a tier take this part of its budget at most.
const SCRATCH_SHARE: u64 = 8;

impl Runtime {
    /// Most bytes of a session's activations where they count in a budget: they leave most of it to weights.
    fn scratch_bytes(&self) -> Result<u64, InferError> {
        let tiers = self.engine().stats()?.tiers;
        let tier = tiers.get(self.engine().compute_tier().index());
        let share = tier.map_or(u64::MAX, |tier| tier.budget_bytes_max / SCRATCH_SHARE);
        Ok(self.options.scratch_bytes.min(share))
    }
}

/// What is asked of [`Session::generate`].
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The tokens to continue; at least one.
    pub prompt: &'a [u32],
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// How tokens are chosen. Default: greedy.
    pub sampling: SamplingParams,
    /// Tokens that end the answer besides the model's own.
    pub stop: &'a [u32],
    /// Whether the model's own end-of-text tokens are ignored.
    pub ignore_eos: bool,
}

impl<'a> Request<'a> {
    /// Greedy, until the model ends the text or `max_new_tokens` have come.
    #[must_use]
    pub fn greedy(prompt: &'a [u32], max_new_tokens: usize) -> Self {
        Self { prompt, max_new_tokens, sampling: SamplingParams::greedy(), stop: &[], ignore_eos: false }
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this token, which ends a text. It is not part of the answer.
    Stop(u32),
    /// After as many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    /// The caller had enough.
    Caller,
}

/// How long an answer took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// From the request to the first token.
    pub first_token: Duration,
    /// Of this, computing the prompt.
    pub prefill: Duration,
    /// Computing the tokens after the first.
    pub decode: Duration,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that `decode` was spent on.
    pub decoded_tokens: usize,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub ended: Ended,
    /// The logits after the prompt's last token: one for each token of the vocabulary.
    pub last_prompt_logits: Vec<f32>,
    /// How long it took.
    pub timings: Timings,
}

/// One sequence of tokens. `Send`: it may run on any thread, one at a time.
pub struct Session {
    decoder: Decoder,
    eos: Vec<u32>,
    logits: Vec<f32>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("decoder", &self.decoder).finish_non_exhaustive()
    }
}

/// Never set: for callers who don't cancel.
static NEVER: AtomicBool = AtomicBool::new(false);

impl Session {
    /// Most tokens of the sequence.
    #[must_use]
    pub fn context(&self) -> usize {
        self.decoder.shape().context
    }

    /// Most tokens of a prompt that are computed together.
    #[must_use]
    pub fn chunk(&self) -> usize {
        self.decoder.shape().chunk
    }

    /// Tokens that have been computed.
    #[must_use]
    pub fn position(&self) -> usize {
        self.decoder.position()
    }

    /// The backend's name.
    #[must_use]
    pub fn backend_name(&self) -> String {
        self.decoder.backend_name()
    }

    /// See [`Decoder::record_routing`].
    pub fn record_routing(&mut self, on: bool) {
        self.decoder.record_routing(on);
    }

    /// See [`Decoder::take_routing`].
    pub fn take_routing(&mut self) -> Vec<ChosenExpert> {
        self.decoder.take_routing()
    }

    /// Forgets all tokens, and keeps the memory.
    pub fn reset(&mut self) {
        self.decoder.reset();
    }

    /// The logits of the token computed last; of all tokens of the last [`Self::prefill_all`].
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Computes tokens in chunks, and returns the logits after the last.
    ///
    /// # Errors
    /// As [`Decoder::forward`]. If it fails the tokens of whole chunks before stay computed ([`Self::position`]).
    pub fn prefill(&mut self, tokens: &[u32], cancel: Option<&AtomicBool>) -> Result<&[f32], InferError> {
        self.check_room(tokens)?;
        let length = self.position() + tokens.len();
        let chunks = tokens.len().div_ceil(self.chunk());
        for (index, chunk) in tokens.chunks(self.chunk()).enumerate() {
            let want = if index + 1 == chunks { Logits::Last } else { Logits::None };
            self.decoder.forward(chunk, length, want, cancel.unwrap_or(&NEVER), &mut self.logits)?;
        }
        Ok(&self.logits)
    }

    /// As [`Self::prefill`], and returns the logits after each token, `[tokens][vocabulary]`: for looking into a model.
    ///
    /// # Errors
    /// As [`Self::prefill`].
    pub fn prefill_all(&mut self, tokens: &[u32], cancel: Option<&AtomicBool>) -> Result<&[f32], InferError> {
        self.check_room(tokens)?;
        let length = self.position() + tokens.len();
        let (mut all, mut part) = (Vec::new(), Vec::new());
        for chunk in tokens.chunks(self.chunk()) {
            self.decoder.forward(chunk, length, Logits::All, cancel.unwrap_or(&NEVER), &mut part)?;
            all.extend_from_slice(&part);
        }
        self.logits = all;
        Ok(&self.logits)
    }

    fn check_room(&self, tokens: &[u32]) -> Result<(), InferError> {
        if tokens.is_empty() {
            return Err(input("prompt", "it has no tokens", "give at least one, such as the token that begins a text"));
        }
        let (length, context) = (self.position() + tokens.len(), self.context());
        if length > context {
            let cause = format!("{length} tokens are more than the context of {context}");
            return Err(input("prompt", cause, "shorten it, or use a longer context (--ctx)"));
        }
        Ok(())
    }

    /// Computes the prompt as the next tokens of the sequence, then chooses and computes tokens one by one. `on_token`
    /// is called with each as soon as it is chosen, and may end the answer. `cancel` is looked at before each step.
    ///
    /// The last token of the answer has not been computed when this returns: a further prompt that continues the
    /// conversation begins with it.
    ///
    /// # Errors
    /// [`InferError::Input`] for a prompt that is empty or longer than what is left of the context;
    /// [`InferError::Sampling`]; otherwise as [`Decoder::forward`].
    pub fn generate(
        &mut self,
        request: &Request<'_>,
        cancel: Option<&AtomicBool>,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, InferError> {
        let result = self.generate_inner(request, cancel, on_token);
        self.decoder.rest();
        result
    }

    fn generate_inner(
        &mut self,
        request: &Request<'_>,
        cancel: Option<&AtomicBool>,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, InferError> {
        let begin = Instant::now();
        let mut sampler = Sampler::new(request.sampling)?;
        self.prefill(request.prompt, cancel)?;
        let last_prompt_logits = self.logits.clone();
        let prefill = begin.elapsed();
        let mut timings = Timings { prefill, prompt_tokens: request.prompt.len(), ..Timings::default() };
        let mut tokens = Vec::new();
        let mut decoding = Instant::now();
        let ended = loop {
            if tokens.len() >= request.max_new_tokens {
                break Ended::Length;
            }
            if let Some(&token) = tokens.last() {
                if self.position() >= self.context() {
                    break Ended::Context;
                }
                let length = self.position() + 1;
                let cancel = cancel.unwrap_or(&NEVER);
                self.decoder.forward(&[token], length, Logits::Last, cancel, &mut self.logits)?;
                timings.decoded_tokens += 1;
            }
            let token = sampler.sample(&self.logits)?;
            if tokens.is_empty() {
                timings.first_token = begin.elapsed();
                decoding = Instant::now();
            }
            if request.stop.contains(&token) || (!request.ignore_eos && self.eos.contains(&token)) {
                break Ended::Stop(token);
            }
            tokens.push(token);
            if on_token(token).is_break() {
                break Ended::Caller;
            }
        };
        if timings.decoded_tokens > 0 {
            timings.decode = decoding.elapsed();
        }
        Ok(Generation { tokens, ended, last_prompt_logits, timings })
    }
}

fn input(what: &str, cause: impl Into<String>, cure: &str) -> InferError {
    InferError::Input { what: what.into(), cause: cause.into(), cure: cure.into() }
}
