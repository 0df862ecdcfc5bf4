//! The catalog: what a model consists of, from file headers alone, and how its tensors are cut into blocks.
//!
//! Matrices are cut by rows into blocks of nearly equal size, one slot size per model, chosen so that slots waste the
//! fewest bytes. Vectors and scalars are bundled: they are all needed in every token, so they share a few blocks.
//! Tables of which a token reads a few rows (embeddings) are not cut at all. Nothing here reads a file.

use crate::dtype::DType;
use crate::ids::{BlockId, FileId, TableId, TensorId};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Alignment of direct reads, and so of slots: offsets, lengths and addresses.
pub const ALIGN_BYTES: u64 = 4096;
/// Alignment of a tensor inside a bundle, so that a GPU can bind it.
pub const BUNDLE_ALIGN_BYTES: u64 = 256;
/// A bundle is no larger than this, however large slots are.
const BUNDLE_BYTES_MAX: u64 = 64 << 20;
/// Row cuts fall on multiples of this, because GPUs copy whole words.
const CUT_QUANTUM_BYTES: u64 = 4;
/// More blocks than this are avoided by larger slots, as far as [`PAYLOAD_BYTES_MAX`] allows.
const BLOCKS_SOFT_MAX: u64 = 20_000;
const PAYLOAD_BYTES_MIN: u64 = 1 << 20;
const PAYLOAD_BYTES_MAX: u64 = 4 << 20;
/// A hostile header must not make us allocate without bound.
const BLOCKS_HARD_MAX: u64 = 4 << 20;
/// A model of less than 512 MiB gets about this many blocks rather than blocks of a full MiB.
const SMALL_MODEL_BLOCKS: u64 = 512;
/// Slots smaller than that, down to half, may take this part more blocks …
const FINER_BLOCKS_SHARE: u64 = 8;
/// … and must save this part of all slots' bytes.
const FINER_GAIN_SHARE: u64 = 50;

/// How a tensor is used, which decides how it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A matrix `[rows, columns]` that is read whole. Cut by rows.
    Matrix,
    /// Matrices of experts, fused: `[experts, rows, columns]`. Each expert is cut on its own, so it can move alone.
    Experts,
    /// A vector or scalar, needed in every token. Bundled with the others.
    Small,
    /// A table `[rows, columns]` of which a token reads a few rows. Gathered, never cut into blocks.
    Table,
    /// A table that is also read whole as a matrix (tied embeddings).
    TableAndMatrix,
    /// Needed by its user under one pointer: one block in a run of adjacent slots.
    Contiguous,
}

impl Role {
    /// The role that a tensor of this shape has if nothing more is known.
    #[must_use]
    pub fn of_shape(shape: &[u64]) -> Self {
        match shape.len() {
            0 | 1 => Self::Small,
            2 => Self::Matrix,
            _ => Self::Experts,
        }
    }
}

/// A tensor as a file's header describes it.
#[derive(Clone, Debug)]
pub struct RawTensor {
    /// Its name in the file.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Outermost dimension first; the last is contiguous.
    pub shape: Vec<u64>,
    /// The file that holds it.
    pub file: FileId,
    /// Where in that file its bytes begin.
    pub offset: u64,
    /// How it is used.
    pub role: Role,
}

/// A tensor and where its bytes are.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name in the file.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Outermost dimension first; the last is contiguous.
    pub shape: Vec<u64>,
    /// The file that holds it.
    pub file: FileId,
    /// Where in that file its bytes begin.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Bytes of one row (of the last dimension).
    pub row_bytes: u64,
    /// How it is cut.
    pub layout: Layout,
    /// Its row table, if rows of it are gathered.
    pub table: Option<TableId>,
}

/// How a tensor is laid out in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Cut by rows. A unit is what is never cut across: an expert, or the whole matrix.
    Cut {
        /// The first block; the others follow.
        first: BlockId,
        /// Units (experts; 1 for a plain matrix).
        units: u32,
        /// Blocks of each unit.
        blocks_per_unit: u32,
        /// Rows of each unit.
        rows_per_unit: u64,
        /// Rows of each block but perhaps the last of a unit.
        rows_per_block: u64,
    },
    /// Whole, in one block that may hold other tensors too.
    Whole {
        /// The block.
        block: BlockId,
        /// Where in the block's payload it begins.
        slot_offset: u32,
    },
    /// Not in blocks: only rows are gathered.
    TableOnly,
}

/// The unit that moves and is leased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Weight bytes in it.
    pub bytes: u64,
    /// Adjacent slots that it takes; 1 but for [`Role::Contiguous`].
    pub slots: u32,
    /// Its parts, in [`Catalog::parts`].
    pub parts: Range<u32>,
}

/// A stretch of a file that belongs to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The tensor that it is part of.
    pub tensor: TensorId,
    /// Where in the tensor it begins.
    pub tensor_offset: u64,
    /// The file.
    pub file: FileId,
    /// Where in the file it begins.
    pub file_offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Where in the slot its first byte belongs. A block of one part is read straight into its slot, from the aligned
    /// offset below `file_offset`, so there this is `file_offset` modulo the alignment.
    pub slot_offset: u32,
}

/// A table of which rows are gathered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowTable {
    /// The tensor.
    pub tensor: TensorId,
    /// Its rows.
    pub rows: u64,
    /// Bytes of a row.
    pub row_bytes: u64,
}

/// Rows of one unit that lie together in one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The block.
    pub block: BlockId,
    /// First row, within the unit.
    pub row: u64,
    /// Number of rows.
    pub rows: u64,
    /// Where in the slot the first row begins.
    pub slot_offset: u32,
    /// Length in bytes.
    pub bytes: u64,
}

/// Why a header makes no catalog. The message names the tensor, the cause and the cure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// Two tensors of one name.
    #[error("tensor '{name}' is there twice: the files of two models may be mixed up")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A size that does not fit 64 bits, or makes no whole number of quantisation groups.
    #[error("tensor '{name}': a shape of {shape:?} is impossible for {dtype}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its type.
        dtype: DType,
    },
    /// Bytes beyond the file's end.
    #[error(
        "{}: tensor '{name}' needs bytes {offset} to {end} but the file has {file_bytes}: it is truncated or damaged; \
         fetch it again", file.display()
    )]
    BeyondEnd {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Where the tensor begins.
        offset: u64,
        /// Where it would end.
        end: u64,
        /// The file's length.
        file_bytes: u64,
    },
    /// A file number that no file has.
    #[error("tensor '{name}' refers to file {file}, which was never added")]
    NoFile {
        /// The tensor.
        name: String,
        /// The number.
        file: FileId,
    },
    /// More blocks than any real model has.
    #[error("the header describes {blocks} blocks, more than {BLOCKS_HARD_MAX}: it is damaged")]
    TooMany {
        /// How many.
        blocks: u64,
    },
}

#[derive(Clone, Debug)]
struct FileEntry {
    path: PathBuf,
    bytes: u64,
}

/// Collects files and tensors, then cuts them.
#[derive(Clone, Debug, Default)]
pub struct CatalogBuilder {
    files: Vec<FileEntry>,
    tensors: Vec<RawTensor>,
    payload_bytes: Option<u64>,
}

impl CatalogBuilder {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file of `bytes` bytes.
    pub fn file(&mut self, path: impl Into<PathBuf>, bytes: u64) -> FileId {
        self.files.push(FileEntry { path: path.into(), bytes });
        FileId(self.files.len() as u32 - 1)
    }

    /// Adds a tensor. It is checked by [`Self::build`].
    pub fn tensor(&mut self, tensor: RawTensor) -> TensorId {
        self.tensors.push(tensor);
        TensorId(self.tensors.len() as u32 - 1)
    }

    /// The tensors so far, so that a caller who knows the model can change their roles.
    pub fn tensors_mut(&mut self) -> &mut [RawTensor] {
        &mut self.tensors
    }

    /// Sets the payload of a slot (rounded up to [`ALIGN_BYTES`]) instead of choosing the one that wastes least.
    pub fn payload_bytes(&mut self, bytes: u64) {
        self.payload_bytes = Some(bytes.max(1).next_multiple_of(ALIGN_BYTES));
    }

    /// Checks every tensor and cuts it into blocks.
    ///
    /// # Errors
    /// Any [`CatalogError`]; the first tensor that is wrong is named.
    pub fn build(self) -> Result<Catalog, CatalogError> {
        let mut tensors = Vec::with_capacity(self.tensors.len());
        let mut by_name = BTreeMap::new();
        for (index, raw) in self.tensors.iter().enumerate() {
            let tensor = self.check(raw)?;
            if by_name.insert(raw.name.clone(), TensorId(index as u32)).is_some() {
                return Err(CatalogError::Duplicate { name: raw.name.clone() });
            }
            tensors.push(tensor);
        }
        let cut: Vec<Units> =
            (self.tensors.iter().zip(&tensors)).filter_map(|(raw, t)| Units::of(raw.role, t)).collect();
        let payload = self.payload_bytes.unwrap_or_else(|| choose_payload_bytes(&cut));
        let largest_row = cut.iter().map(|u| u.rows_min() * u.row_bytes).max().unwrap_or(0);
        let payload = payload.max(largest_row.next_multiple_of(ALIGN_BYTES)).max(ALIGN_BYTES);
        let blocks: u64 = cut.iter().map(|u| u.units.saturating_mul(u.cut(payload).0)).fold(0, u64::saturating_add);
        if blocks > BLOCKS_HARD_MAX {
            return Err(CatalogError::TooMany { blocks });
        }
        let weight_bytes = tensors.iter().map(|t| t.bytes).sum();
        let mut catalog = Catalog {
            files: self.files,
            tensors,
            blocks: Vec::new(),
            parts: Vec::new(),
            tables: Vec::new(),
            by_name,
            slot_bytes: payload + ALIGN_BYTES,
            weight_bytes,
        };
        catalog.lay_out(&self.tensors, payload);
        Ok(catalog)
    }

    fn check(&self, raw: &RawTensor) -> Result<Tensor, CatalogError> {
        let shape_error = || CatalogError::Shape { name: raw.name.clone(), shape: raw.shape.clone(), dtype: raw.dtype };
        let file = self
            .files
            .get(raw.file.index())
            .ok_or_else(|| CatalogError::NoFile { name: raw.name.clone(), file: raw.file })?;
        let columns = raw.shape.last().copied().unwrap_or(1);
        let row_bytes = raw.dtype.row_bytes(columns).ok_or_else(shape_error)?;
        let rows = raw.shape.iter().rev().skip(1).try_fold(1u64, |rows, &d| rows.checked_mul(d));
        let bytes = rows.and_then(|rows| rows.checked_mul(row_bytes)).ok_or_else(shape_error)?;
        if bytes == 0 {
            return Err(shape_error());
        }
        let end = raw.offset.checked_add(bytes).ok_or_else(shape_error)?;
        if end > file.bytes {
            return Err(CatalogError::BeyondEnd {
                file: file.path.clone(),
                name: raw.name.clone(),
                offset: raw.offset,
                end,
                file_bytes: file.bytes,
            });
        }
        Ok(Tensor {
            name: raw.name.clone(),
            dtype: raw.dtype,
            shape: raw.shape.clone(),
            file: raw.file,
            offset: raw.offset,
            bytes,
            row_bytes,
            layout: Layout::TableOnly,
            table: None,
        })
    }
}

/// A matrix, or the fused matrices of experts, as the cutter sees it.
#[derive(Clone, Copy, Debug)]
struct Units {
    units: u64,
    rows: u64,
    row_bytes: u64,
}

impl Units {
    fn of(role: Role, tensor: &Tensor) -> Option<Self> {
        let rows_all = tensor.bytes / tensor.row_bytes;
        let units = match role {
            Role::Matrix | Role::TableAndMatrix => 1,
            Role::Experts => match tensor.shape.len() {
                0..=2 => 1,
                _ => tensor.shape[0],
            },
            Role::Small | Role::Table | Role::Contiguous => return None,
        };
        Some(Self { units, rows: rows_all / units, row_bytes: tensor.row_bytes })
    }

    /// Rows between two allowed cuts.
    fn rows_min(&self) -> u64 {
        let mut rows = 1;
        while rows < CUT_QUANTUM_BYTES && !(rows * self.row_bytes).is_multiple_of(CUT_QUANTUM_BYTES) {
            rows *= 2;
        }
        rows.min(self.rows)
    }

    /// (blocks, rows of a block) of one unit under this payload.
    fn cut(&self, payload_bytes: u64) -> (u64, u64) {
        let quantum = self.rows_min();
        let rows_max = (payload_bytes / self.row_bytes / quantum * quantum).max(quantum);
        let blocks = self.rows.div_ceil(rows_max);
        let rows = self.rows.div_ceil(blocks).next_multiple_of(quantum);
        (self.rows.div_ceil(rows), rows)
    }
}

/// The payload, in whole alignment units, that makes the slots of all blocks together smallest. Experts are often a
/// little smaller than the least payload and fill no larger one; then a smaller one serves, as long as it hardly cuts
/// into more blocks.
fn choose_payload_bytes(cut: &[Units]) -> u64 {
    let mut shapes: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    let mut total: u64 = 0;
    for u in cut {
        *shapes.entry((u.rows, u.row_bytes)).or_default() += u.units;
        total = total.saturating_add(u.units * u.rows * u.row_bytes);
    }
    let low = (total / SMALL_MODEL_BLOCKS).min(PAYLOAD_BYTES_MIN);
    let low = low.max((total / BLOCKS_SOFT_MAX).min(PAYLOAD_BYTES_MAX)).next_multiple_of(ALIGN_BYTES).max(ALIGN_BYTES);
    let blocks = |payload: u64| {
        shapes.iter().fold(0u64, |sum, (&(rows, row_bytes), &units)| {
            sum.saturating_add(Units { units, rows, row_bytes }.cut(payload).0.saturating_mul(units))
        })
    };
    // The bytes of all slots, the payload, and how many blocks; the largest payload among equals.
    let least = |from: u64, to: u64, blocks_max: u64| {
        let mut best = (u64::MAX, from, u64::MAX);
        let mut payload = from;
        while payload <= to {
            let blocks = blocks(payload);
            let slots_bytes = (payload + ALIGN_BYTES).saturating_mul(blocks);
            if slots_bytes <= best.0 && blocks <= blocks_max {
                best = (slots_bytes, payload, blocks);
            }
            payload += ALIGN_BYTES;
        }
        best
    };
    let best = least(low, low * 2, u64::MAX);
    let half = (low / 2).next_multiple_of(ALIGN_BYTES).max(ALIGN_BYTES);
    let finer = least(half, low, best.2.saturating_add(best.2 / FINER_BLOCKS_SHARE));
    if finer.0 < best.0 - best.0 / FINER_GAIN_SHARE { finer.1 } else { best.1 }
}

/// The immutable description of a model: its tensors, blocks and row tables.
#[derive(Clone, Debug)]
pub struct Catalog {
    files: Vec<FileEntry>,
    tensors: Vec<Tensor>,
    blocks: Vec<Block>,
    parts: Vec<Part>,
    tables: Vec<RowTable>,
    by_name: BTreeMap<String, TensorId>,
    slot_bytes: u64,
    weight_bytes: u64,
}

impl Catalog {
    fn lay_out(&mut self, raw: &[RawTensor], payload: u64) {
        for (index, RawTensor { role, .. }) in raw.iter().enumerate() {
            let (role, id) = (*role, TensorId(index as u32));
            let tensor = &self.tensors[index];
            if matches!(role, Role::Table | Role::TableAndMatrix) {
                let rows = tensor.bytes / tensor.row_bytes;
                self.tables.push(RowTable { tensor: id, rows, row_bytes: tensor.row_bytes });
                self.tensors[index].table = Some(TableId(self.tables.len() as u32 - 1));
            }
            let tensor = &self.tensors[index];
            match role {
                Role::Table => {}
                Role::Small if tensor.bytes <= payload.min(BUNDLE_BYTES_MAX) => {}
                Role::Small | Role::Contiguous => self.lay_out_contiguous(id),
                Role::Matrix | Role::Experts | Role::TableAndMatrix => self.lay_out_cut(id, role, payload),
            }
        }
        self.lay_out_bundles(raw, payload);
    }

    fn lay_out_cut(&mut self, id: TensorId, role: Role, payload: u64) {
        let tensor = &self.tensors[id.index()];
        let Some(units) = Units::of(role, tensor) else { return };
        let (blocks, rows_per_block) = units.cut(payload);
        let first = BlockId(self.blocks.len() as u32);
        let (file, offset) = (tensor.file, tensor.offset);
        for unit in 0..units.units {
            for block in 0..blocks {
                let row = block * rows_per_block;
                let rows = rows_per_block.min(units.rows - row);
                let tensor_offset = (unit * units.rows + row) * units.row_bytes;
                let bytes = rows * units.row_bytes;
                self.push_single(id, tensor_offset, file, offset + tensor_offset, bytes);
            }
        }
        self.tensors[id.index()].layout = Layout::Cut {
            first,
            units: units.units as u32,
            blocks_per_unit: blocks as u32,
            rows_per_unit: units.rows,
            rows_per_block,
        };
    }

    fn lay_out_contiguous(&mut self, id: TensorId) {
        let tensor = &self.tensors[id.index()];
        let (file, offset, bytes) = (tensor.file, tensor.offset, tensor.bytes);
        let block = BlockId(self.blocks.len() as u32);
        self.push_single(id, 0, file, offset, bytes);
        self.tensors[id.index()].layout = Layout::Whole { block, slot_offset: (offset % ALIGN_BYTES) as u32 };
    }

    fn push_single(&mut self, tensor: TensorId, tensor_offset: u64, file: FileId, file_offset: u64, bytes: u64) {
        let shift = file_offset % ALIGN_BYTES;
        let at = self.parts.len() as u32;
        self.parts.push(Part { tensor, tensor_offset, file, file_offset, bytes, slot_offset: shift as u32 });
        let span = (shift + bytes).next_multiple_of(ALIGN_BYTES);
        self.blocks.push(Block { bytes, slots: span.div_ceil(self.slot_bytes) as u32, parts: at..at + 1 });
    }

    /// Packs what is small into shared blocks, in the order of the file.
    fn lay_out_bundles(&mut self, raw: &[RawTensor], payload: u64) {
        let payload = payload.min(BUNDLE_BYTES_MAX);
        let mut open: Option<(Block, u64)> = None;
        for (index, raw) in raw.iter().enumerate() {
            let tensor = &self.tensors[index];
            if raw.role != Role::Small || tensor.bytes > payload {
                continue;
            }
            let fits = |used: u64| used.next_multiple_of(BUNDLE_ALIGN_BYTES) + tensor.bytes <= payload;
            let (mut block, used) = match open.take() {
                Some((block, used)) if fits(used) => (block, used),
                full => {
                    self.blocks.extend(full.map(|(block, _)| block));
                    let at = self.parts.len() as u32;
                    (Block { bytes: 0, slots: 1, parts: at..at }, 0)
                }
            };
            let slot_offset = used.next_multiple_of(BUNDLE_ALIGN_BYTES) as u32;
            let id = TensorId(index as u32);
            let bytes = tensor.bytes;
            let (file, file_offset) = (tensor.file, tensor.offset);
            self.parts.push(Part { tensor: id, tensor_offset: 0, file, file_offset, bytes, slot_offset });
            block.parts.end += 1;
            block.bytes += bytes;
            self.tensors[index].layout = Layout::Whole { block: BlockId(self.blocks.len() as u32), slot_offset };
            open = Some((block, u64::from(slot_offset) + bytes));
        }
        self.blocks.extend(open.map(|(block, _)| block));
    }

    /// Whether a block is read straight into its slot (one part, aligned); bundles are gathered from several places.
    #[must_use]
    pub fn is_single(&self, block: BlockId) -> bool {
        let parts = self.parts(block);
        parts.len() == 1 && u64::from(parts[0].slot_offset) == parts[0].file_offset % ALIGN_BYTES
    }

    /// Files, with the length that each had when its header was read.
    pub fn files(&self) -> impl ExactSizeIterator<Item = (&Path, u64)> {
        self.files.iter().map(|f| (f.path.as_path(), f.bytes))
    }

    /// The path of a file.
    #[must_use]
    pub fn path(&self, file: FileId) -> &Path {
        self.files.get(file.index()).map_or(Path::new(""), |f| f.path.as_path())
    }

    /// All tensors, in the order in which they were added.
    #[must_use]
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// All blocks.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// All row tables.
    #[must_use]
    pub fn tables(&self) -> &[RowTable] {
        &self.tables
    }

    /// The parts of a block, in the order of their places in the slot.
    #[must_use]
    pub fn parts(&self, block: BlockId) -> &[Part] {
        let Range { start, end } = self.blocks[block.index()].parts;
        &self.parts[start as usize..end as usize]
    }

    /// The tensor of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<TensorId> {
        self.by_name.get(name).copied()
    }

    /// A tensor.
    #[must_use]
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.index()]
    }

    /// Bytes of one slot, padding included: a multiple of [`ALIGN_BYTES`].
    #[must_use]
    pub fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Weight bytes of all tensors.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The pieces that hold a unit (an expert; 0 for a plain matrix or a vector), in the order of their rows. Empty
    /// for a table of which only rows are gathered, and for a unit that does not exist.
    #[must_use]
    pub fn pieces(&self, id: TensorId, unit: u32) -> Vec<Piece> {
        let tensor = self.tensor(id);
        match tensor.layout {
            Layout::TableOnly => Vec::new(),
            Layout::Whole { block, slot_offset } if unit == 0 => {
                let rows = tensor.bytes / tensor.row_bytes;
                vec![Piece { block, row: 0, rows, slot_offset, bytes: tensor.bytes }]
            }
            Layout::Cut { first, units, blocks_per_unit, rows_per_unit, rows_per_block } if unit < units => (0
                ..blocks_per_unit)
                .map(|i| {
                    let block = BlockId(first.0 + unit * blocks_per_unit + i);
                    let row = u64::from(i) * rows_per_block;
                    let rows = rows_per_block.min(rows_per_unit - row);
                    let slot_offset = self.parts(block)[0].slot_offset;
                    Piece { block, row, rows, slot_offset, bytes: rows * tensor.row_bytes }
                })
                .collect(),
            Layout::Whole { .. } | Layout::Cut { .. } => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(name: &str, dtype: DType, shape: &[u64], offset: u64, role: Role) -> RawTensor {
        RawTensor { name: name.into(), dtype, shape: shape.into(), file: FileId(0), offset, role }
    }

    #[test]
    fn every_byte_of_a_cut_tensor_is_in_exactly_one_block() {
        let mut builder = CatalogBuilder::new();
        builder.file("m", 1 << 30);
        let m = builder.tensor(raw("m", DType::Q6_K, &[4099, 2048], 100, Role::Matrix));
        let e = builder.tensor(raw("e", DType::BF16, &[8, 768, 2048], 40 << 20, Role::Experts));
        let catalog = builder.build().unwrap();
        for (id, units) in [(m, 1), (e, 8)] {
            let tensor = catalog.tensor(id);
            let mut at = 0;
            for unit in 0..units {
                let mut row = 0;
                for piece in catalog.pieces(id, unit) {
                    assert_eq!(piece.row, row);
                    row += piece.rows;
                    let part = catalog.parts(piece.block)[0];
                    assert_eq!(part.tensor_offset, at);
                    assert_eq!(part.file_offset, tensor.offset + at);
                    assert_eq!(part.tensor_offset % 4, 0, "cuts fall on whole words");
                    at += piece.bytes;
                    assert!(u64::from(piece.slot_offset) + piece.bytes <= catalog.slot_bytes());
                }
            }
            assert_eq!(at, tensor.bytes);
        }
    }

    #[test]
    fn slots_waste_little_on_a_real_shape() {
        // TinyLlama 1.1B, f16.
        let mut builder = CatalogBuilder::new();
        builder.file("m", 4 << 30);
        let mut offset = 0;
        let mut add = |name: String, rows: u64| {
            builder.tensor(raw(&name, DType::F16, &[rows, 2048], offset, Role::Matrix));
            offset += rows * 4096;
        };
        for layer in 0..22 {
            for (name, rows) in [("q", 2048), ("k", 256), ("v", 256), ("o", 2048), ("g", 5632), ("u", 5632)] {
                add(format!("{name}{layer}"), rows);
            }
        }
        add("head".into(), 32000);
        let catalog = builder.build().unwrap();
        let slots = catalog.blocks().len() as u64 * catalog.slot_bytes();
        assert!(slots as f64 <= catalog.weight_bytes() as f64 * 1.005, "{slots} {}", catalog.weight_bytes());
    }

    /// Experts of 504 KiB lay in slots of 820 KiB, the least of a model of 425 MiB cut into 512 blocks: of a budget, three
    /// eighths held nothing.
    #[test]
    fn experts_a_little_smaller_than_the_least_slot_get_a_slot_of_their_size() {
        for (experts, width, blocks_max) in [(32, 896, 850), (128, 1728, 3200)] {
            let mut builder = CatalogBuilder::new();
            builder.file("m", 64 << 30);
            let mut offset = 0;
            let mut add = |name: String, shape: &[u64], role| {
                builder.tensor(raw(&name, DType::Q4_0, shape, offset, role));
                offset += shape.iter().product::<u64>() / 32 * 18;
            };
            for layer in 0..8 {
                add(format!("q{layer}"), &[1024, 1024], Role::Matrix);
                add(format!("o{layer}"), &[1024, 1024], Role::Matrix);
                for name in ["gate", "up"] {
                    add(format!("{name}{layer}"), &[experts, width, 1024], Role::Experts);
                }
                add(format!("down{layer}"), &[experts, 1024, width], Role::Experts);
            }
            add("head".into(), &[32000, 1024], Role::Matrix);
            let catalog = builder.build().unwrap();
            let slots = catalog.blocks().len() as u64 * catalog.slot_bytes();
            assert!(slots as f64 <= catalog.weight_bytes() as f64 * 1.03, "{slots} {}", catalog.weight_bytes());
            assert!(catalog.blocks().len() <= blocks_max, "{}", catalog.blocks().len());
        }
    }

    /// TinyLlama 1.1B, q4_0: half as many blocks again would save a twentieth of the slots.
    #[test]
    fn what_is_no_mixture_is_not_cut_finer_for_little() {
        let mut builder = CatalogBuilder::new();
        builder.file("m", 4 << 30);
        let mut offset = 0;
        let mut add = |name: String, rows: u64, cols: u64| {
            builder.tensor(raw(&name, DType::Q4_0, &[rows, cols], offset, Role::Matrix));
            offset += rows * cols / 32 * 18;
        };
        for layer in 0..22 {
            for (name, rows) in [("q", 2048), ("k", 256), ("v", 256), ("o", 2048), ("g", 5632), ("u", 5632)] {
                add(format!("{name}{layer}"), rows, 2048);
            }
            add(format!("d{layer}"), 2048, 5632);
        }
        add("head".into(), 32000, 2048);
        let catalog = builder.build().unwrap();
        assert!(catalog.blocks().len() < 560, "{}", catalog.blocks().len());
    }

    #[test]
    fn small_tensors_share_a_block_at_aligned_places() {
        let mut builder = CatalogBuilder::new();
        builder.file("m", 1 << 20);
        let a = builder.tensor(raw("a", DType::F32, &[10], 0, Role::Small));
        let b = builder.tensor(raw("b", DType::F32, &[10], 40, Role::Small));
        let catalog = builder.build().unwrap();
        assert_eq!(catalog.blocks().len(), 1);
        assert_eq!(catalog.pieces(a, 0)[0].slot_offset, 0);
        assert_eq!(catalog.pieces(b, 0)[0].slot_offset, 256);
        assert!(!catalog.is_single(BlockId(0)));
    }

    #[test]
    fn hostile_shapes_are_refused() {
        for (shape, offset) in [(&[u64::MAX, 2][..], 0), (&[0, 4], 0), (&[1, 4], u64::MAX), (&[3, 100_000], 0)] {
            let mut builder = CatalogBuilder::new();
            builder.file("m", 1 << 10);
            builder.tensor(raw("t", DType::F32, shape, offset, Role::Matrix));
            assert!(builder.build().is_err(), "{shape:?}");
        }
    }

    #[test]
    fn a_contiguous_tensor_is_one_block_in_adjacent_slots() {
        let mut builder = CatalogBuilder::new();
        builder.file("m", 1 << 30);
        builder.payload_bytes(1 << 20);
        let t = builder.tensor(raw("t", DType::F32, &[1024, 1024], 12, Role::Contiguous));
        let catalog = builder.build().unwrap();
        let piece = catalog.pieces(t, 0)[0];
        assert_eq!((piece.slot_offset, catalog.blocks()[0].slots), (12, 4));
    }
}
