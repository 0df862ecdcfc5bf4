//! The GPU tier's body: adapter choice, VRAM slabs, uploads and completion, on wgpu.
//!
//! It knows buffers, offsets and lengths, and nothing of models, residency or budgets: the brain decides what is where
//! and the engine tells this crate to back a slab, to copy bytes into it, or to say when a submission is done.
//!
//! # The layout of a slot in VRAM
//! A host slot begins with the bytes that direct I/O had to read before the block, so a block's payload begins at its
//! first part's `slot_offset`, at any alignment. A GPU slot has no such shift: **the payload begins with the slot**, so
//! that kernels find whole words. [`payload_shift`] is the difference: an upload's `source_offset`, and what is taken
//! from a piece's `slot_offset` to get its place in the GPU slot.

pub use wgpu;

mod completion;
mod context;
mod error;
mod probe;
mod ring;
mod slabs;
mod sys;
mod upload;

pub use completion::{Completion, Poller};
pub use context::{AdapterSummary, Choice, GpuContext, adapters};
pub use error::GpuError;
pub use probe::{UploadRate, probe_uploads};
pub use ring::{RingConfig, RingPath};
pub use slabs::{DEFAULT_SLAB_BYTES, GpuSlice, VramSlabs};
pub use upload::{Finished, Sink, Source, Upload, UploadPath, Uploader};

use overspill_core::catalog::{Catalog, Piece};
use overspill_core::ids::BlockId;

/// Bytes before a block's payload in its host slot, which its GPU slot lacks.
#[must_use]
pub fn payload_shift(catalog: &Catalog, block: BlockId) -> u32 {
    catalog.parts(block).first().map_or(0, |part| part.slot_offset)
}

/// Bytes that an upload of the block copies: from its first part's beginning to its last one's end.
#[must_use]
pub fn payload_bytes(catalog: &Catalog, block: BlockId) -> u64 {
    let shift = u64::from(payload_shift(catalog, block));
    catalog.parts(block).last().map_or(0, |part| u64::from(part.slot_offset) + part.bytes - shift)
}

/// Where in its block's GPU slot a piece begins: a multiple of 256 in bundles, 0 in blocks of one part.
#[must_use]
pub fn piece_offset(catalog: &Catalog, piece: &Piece) -> u64 {
    u64::from(piece.slot_offset.saturating_sub(payload_shift(catalog, piece.block)))
}
