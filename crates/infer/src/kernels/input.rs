//! Activations, prepared once for every matrix that they meet: padded f32, or 8 bits in groups with a scale each.
//!
//! Groups are those of the weights that they will meet: 32 elements (as ggml's Q8_0), or 256 with a sum for each 16
//! (as ggml's Q8_K), but scales stay f32. Each token is rounded on its own, so a token's numbers never depend on the
//! batch. What is not here: products.

use super::{Activations, Pool};
use overspill::DType;

/// Elements to which f32 activations are padded with zeros: the width of the accumulators.
pub(crate) const LANES: usize = 8;
/// Floats of a cache line. Tokens begin on one, and never a power of two apart, lest they compete for few cache sets.
const LINE: usize = 16;
/// Groups whose largest element is smaller than this are taken for zeros: their scale would lose its precision.
const TINY: f32 = 1e-30;
/// Adding this rounds an f32 below 2^22 to the nearest integer, ties to even, in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// How activations are prepared, which the weights' type decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Single precision.
    F32,
    /// 8 bits in groups of 32.
    Q8Group32,
    /// 8 bits in groups of 256.
    Q8Group256,
}

impl Kind {
    /// What weights of this type need. Float weights meet f32 activations whatever is asked for.
    #[must_use]
    pub fn of(dtype: DType, activations: Activations) -> Self {
        match (activations, dtype.info().group_elements) {
            (Activations::Q8, 32) => Self::Q8Group32,
            (Activations::Q8, 256) => Self::Q8Group256,
            _ => Self::F32,
        }
    }
}

/// Prepared activations `[batch][cols]`. Reuse one: it allocates only when it must grow.
#[derive(Debug)]
pub struct Input {
    kind: Kind,
    batch: usize,
    cols: usize,
    /// One record a token; its parts by [`Layout`].
    words: Vec<f32>,
    /// Where in `words` the first cache line begins.
    start: usize,
    stride: usize,
}

impl Default for Input {
    fn default() -> Self {
        Self { kind: Kind::F32, batch: 0, cols: 0, words: Vec::new(), start: 0, stride: 0 }
    }
}

/// Where the parts of a token's record are, in words of 4 bytes.
#[derive(Clone, Copy)]
struct Layout {
    /// The 8-bit values, widened to 16 bits (groups of 32 only).
    wide: usize,
    /// Scales, one a group.
    scales: usize,
    /// Sums: i32 one a group of 32, or i16 one for each 16 elements.
    sums: usize,
    /// scale × sum, one a group of 32; or i16 sums of 32, two to a word (groups of 256).
    more_sums: usize,
    end: usize,
}

impl Layout {
    fn of(kind: Kind, cols: usize) -> Self {
        match kind {
            Kind::F32 => {
                let end = cols.next_multiple_of(LANES);
                Self { wide: end, scales: end, sums: end, more_sums: end, end }
            }
            Kind::Q8Group32 => {
                let (wide, groups) = (cols / 4, cols / 32);
                let scales = wide + cols / 2;
                Self { wide, scales, sums: scales + groups, more_sums: scales + 2 * groups, end: scales + 3 * groups }
            }
            Kind::Q8Group256 => {
                let (wide, groups) = (cols / 4, cols / 256);
                let sums = wide + groups;
                let more_sums = sums + cols / 32;
                Self { wide, scales: wide, sums, more_sums, end: more_sums + cols / 64 }
            }
        }
    }
}

/// One token's activations in groups of 32.
#[derive(Clone, Copy)]
pub(crate) struct Token32<'a> {
    /// The values, -127..=127.
    pub q: &'a [i8],
    /// The same, 16 bits wide.
    pub wide: &'a [i16],
    /// Scale of each group.
    pub scales: &'a [f32],
    /// Sum of each group's values.
    pub sums: &'a [i32],
    /// Scale × sum of each group.
    pub scaled_sums: &'a [f32],
}

/// One token's activations in groups of 256.
#[derive(Clone, Copy)]
pub(crate) struct Token256<'a> {
    /// The values, -127..=127.
    pub q: &'a [i8],
    /// Scale of each group.
    pub scales: &'a [f32],
    /// Sum of each 16 values.
    pub sums: &'a [i16],
    /// Sums s of each 32 values, two to a word: (s0, s2), (s1, s3), (s4, s6), (s5, s7).
    pub pairs: &'a [i32],
}

impl<'a> Token32<'a> {
    /// The values, four to a word.
    #[inline(always)]
    pub fn words(&self) -> &'a [i32] {
        bytemuck::cast_slice(self.q)
    }

    /// The 16-bit values, two to a word.
    #[inline(always)]
    pub fn wide_words(&self) -> &'a [i32] {
        bytemuck::cast_slice(self.wide)
    }
}

impl<'a> Token256<'a> {
    /// The values, four to a word.
    #[inline(always)]
    pub fn words(&self) -> &'a [i32] {
        bytemuck::cast_slice(self.q)
    }

    /// The sums, two to a word.
    #[inline(always)]
    pub fn sum_words(&self) -> &'a [i32] {
        bytemuck::cast_slice(self.sums)
    }
}

impl Input {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How the activations are prepared. Weights whose [`Kind::of`] is the same can share them.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Tokens.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Elements of a token.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Takes `x`, `[batch][cols]`, for weights of type `dtype`. A group of 8-bit activations with a value that is not
    /// finite becomes NaN, so that the fault shows.
    ///
    /// # Panics
    /// If `x.len()` is not `batch * cols`, or `cols` is no whole number of the weights' groups.
    pub fn prepare(
        &mut self,
        pool: &Pool,
        x: &[f32],
        batch: usize,
        cols: usize,
        dtype: DType,
        activations: Activations,
    ) {
        assert_eq!(Some(x.len()), batch.checked_mul(cols), "activations of {batch} tokens of {cols} elements");
        assert!(dtype.row_bytes(cols as u64).is_some(), "{cols} columns are no whole groups of {dtype}");
        let kind = Kind::of(dtype, activations);
        let layout = Layout::of(kind, cols);
        (self.kind, self.batch, self.cols) = (kind, batch, cols);
        self.stride = layout.end.next_multiple_of(LINE);
        if self.stride.is_multiple_of(2 * LINE) {
            self.stride += LINE;
        }
        let words = self.stride * batch + LINE;
        if self.words.len() < words {
            self.words.resize(words, 0.0);
        }
        let misplaced = self.words.as_ptr() as usize / size_of::<f32>() % LINE;
        self.start = (LINE - misplaced) % LINE;
        let (start, stride) = (self.start, self.stride);
        let records = &mut self.words[start..start + stride * batch];
        let quantise = super::table::quantiser();
        pool.for_chunks(records, stride, &|token, record| {
            let x = &x[token * cols..(token + 1) * cols];
            if kind == Kind::F32 {
                record[..cols].copy_from_slice(x);
                record[cols..layout.end].fill(0.0);
            } else {
                quantise(kind, x, record);
            }
        });
    }

    fn record(&self, token: usize) -> &[f32] {
        let at = self.start + token * self.stride;
        &self.words[at..at + self.stride]
    }

    /// A token's f32 activations, padded with zeros to a multiple of [`LANES`].
    pub(crate) fn f32(&self, token: usize) -> &[f32] {
        debug_assert_eq!(self.kind, Kind::F32);
        &self.record(token)[..self.cols.next_multiple_of(LANES)]
    }

    /// A token's activations in groups of 32.
    pub(crate) fn group32(&self, token: usize) -> Token32<'_> {
        debug_assert_eq!(self.kind, Kind::Q8Group32);
        let (layout, record) = (Layout::of(self.kind, self.cols), self.record(token));
        Token32 {
            q: bytemuck::cast_slice(&record[..layout.wide]),
            wide: bytemuck::cast_slice(&record[layout.wide..layout.scales]),
            scales: &record[layout.scales..layout.sums],
            sums: bytemuck::cast_slice(&record[layout.sums..layout.more_sums]),
            scaled_sums: &record[layout.more_sums..layout.end],
        }
    }

    /// A token's activations in groups of 256.
    pub(crate) fn group256(&self, token: usize) -> Token256<'_> {
        debug_assert_eq!(self.kind, Kind::Q8Group256);
        let (layout, record) = (Layout::of(self.kind, self.cols), self.record(token));
        Token256 {
            q: bytemuck::cast_slice(&record[..layout.wide]),
            scales: &record[layout.scales..layout.sums],
            sums: bytemuck::cast_slice(&record[layout.sums..layout.more_sums]),
            pairs: bytemuck::cast_slice(&record[layout.more_sums..layout.end]),
        }
    }
}

/// Rounds one token to 8 bits, into its record. Inlined into a function for each instruction set; the arithmetic is
/// exact or rounded once, so all agree to the bit.
#[inline(always)]
pub(super) fn quantise(kind: Kind, x: &[f32], record: &mut [f32]) {
    let layout = Layout::of(kind, x.len());
    let (q, rest) = record[..layout.end].split_at_mut(layout.wide);
    let q: &mut [i8] = bytemuck::cast_slice_mut(q);
    if kind == Kind::Q8Group32 {
        let (wide, rest) = rest.split_at_mut(layout.scales - layout.wide);
        let wide: &mut [i16] = bytemuck::cast_slice_mut(wide);
        let (scales, rest) = rest.split_at_mut(layout.sums - layout.scales);
        let (sums, scaled_sums) = rest.split_at_mut(layout.more_sums - layout.sums);
        let sums: &mut [i32] = bytemuck::cast_slice_mut(sums);
        for (group, x) in x.chunks_exact(32).enumerate() {
            let q = &mut q[32 * group..32 * group + 32];
            scales[group] = quantise_group(x, q);
            let mut sum = 0;
            for (wide, &q) in wide[32 * group..32 * group + 32].iter_mut().zip(&*q) {
                *wide = i16::from(q);
                sum += i32::from(q);
            }
            sums[group] = sum;
            scaled_sums[group] = scales[group] * sum as f32;
        }
    } else {
        let (scales, rest) = rest.split_at_mut(layout.sums - layout.scales);
        let (sums, pairs) = rest.split_at_mut(layout.more_sums - layout.sums);
        let sums: &mut [i16] = bytemuck::cast_slice_mut(sums);
        let pairs: &mut [i16] = bytemuck::cast_slice_mut(pairs);
        for (group, x) in x.chunks_exact(256).enumerate() {
            let q = &mut q[256 * group..256 * group + 256];
            scales[group] = quantise_group(x, q);
            for (sum, q) in sums[16 * group..16 * group + 16].iter_mut().zip(q.chunks_exact(16)) {
                *sum = q.iter().map(|&q| i16::from(q)).sum();
            }
            for (place, sum) in [0, 2, 1, 3, 4, 6, 5, 7].into_iter().zip(sums[16 * group..].chunks_exact(2)) {
                pairs[8 * group + place] = sum[0] + sum[1];
            }
        }
    }
}

/// Rounds a group to multiples of the scale that is returned, so that its largest element becomes ±127.
#[inline(always)]
fn quantise_group(x: &[f32], q: &mut [i8]) -> f32 {
    // The bits of a magnitude order as the magnitude does, and put infinity and NaN above everything.
    let largest = x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        q.fill(0);
        return f32::NAN;
    }
    if largest < TINY {
        q.fill(0);
        return 0.0;
    }
    let inverse = 127.0 / largest;
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * inverse + ROUND).to_bits() as i8;
    }
    largest / 127.0
}
