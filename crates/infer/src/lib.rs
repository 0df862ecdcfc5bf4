//! The reference runtime of overspill: a decoder that runs models larger than memory, on a CPU or a GPU.
//!
//! One decoder, driven by a table of what each layer of an architecture does ([`arch`]), asks the engine for the blocks
//! of each step and a [`backend::Backend`] for the arithmetic. Models come from Hugging Face directories and from GGUF
//! files. The bits of an answer depend on the model, the prompt and the backend alone, never on a budget, a policy, a
//! chunk size or a number of threads.
//!
//! What is not here: where weights are and when they move. That is the engine's (`overspill`).
// rustdoc evaluates auto traits through all of wgpu and naga.
#![recursion_limit = "256"]

pub mod arch;
pub mod backend;
pub mod cpu;
pub mod decoder;
mod error;
pub mod generate;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod kernels;
pub mod kv;
pub mod plan;
pub mod rope;
pub mod sampling;
pub mod tokenizer;

pub use error::InferError;
