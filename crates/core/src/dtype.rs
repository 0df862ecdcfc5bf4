//! Geometry of the element types that weights are stored in: how many elements share a group of how many bytes.
//!
//! The layouts are ggml's (`ggml-common.h`) for the quantised types and IEEE or bfloat16 for the others. This module
//! knows sizes only; decoding is the runtime's business. A new quantisation is one row of [`TABLE`].

/// Element type of a tensor as stored on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[allow(non_camel_case_types, reason = "the field writes these names so, and users type them")]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of an f32.
    BF16,
    /// 32 elements: f16 scale, 16 bytes of 4-bit values less 8.
    Q4_0,
    /// 32 elements: f16 scale, f16 minimum, 16 bytes of 4-bit values.
    Q4_1,
    /// 32 elements: f16 scale, 32 high bits, 16 bytes of low 4 bits, less 16.
    Q5_0,
    /// 32 elements: f16 scale, f16 minimum, 32 high bits, 16 bytes of low 4 bits.
    Q5_1,
    /// 32 elements: f16 scale, 32 signed bytes.
    Q8_0,
    /// 256 elements: f16 scale, f16 minimum scale, 12 bytes of 6-bit scales, 128 bytes of 4-bit values.
    Q4_K,
    /// 256 elements: as Q4_K with 32 bytes of fifth bits.
    Q5_K,
    /// 256 elements: 128 bytes of low 4 bits, 64 of high 2 bits, 16 signed scales, f16 scale.
    Q6_K,
}

/// One row of the table of element types.
#[derive(Clone, Copy, Debug)]
pub struct DTypeInfo {
    /// The type described.
    pub dtype: DType,
    /// Its name in the CLI and in reports, lower case.
    pub name: &'static str,
    /// Elements that share one group.
    pub group_elements: u32,
    /// Bytes of one group.
    pub group_bytes: u32,
    /// The type's number in GGUF files (`enum ggml_type`).
    pub ggml_type: u32,
    /// Whether a stored value is a plain float, not a quantised one.
    pub is_float: bool,
}

/// Every element type, in the order of [`DType`]'s variants.
pub const TABLE: &[DTypeInfo] = &[
    row(DType::F32, "f32", 1, 4, 0, true),
    row(DType::F16, "f16", 1, 2, 1, true),
    row(DType::BF16, "bf16", 1, 2, 30, true),
    row(DType::Q4_0, "q4_0", 32, 18, 2, false),
    row(DType::Q4_1, "q4_1", 32, 20, 3, false),
    row(DType::Q5_0, "q5_0", 32, 22, 6, false),
    row(DType::Q5_1, "q5_1", 32, 24, 7, false),
    row(DType::Q8_0, "q8_0", 32, 34, 8, false),
    row(DType::Q4_K, "q4_k", 256, 144, 12, false),
    row(DType::Q5_K, "q5_k", 256, 176, 13, false),
    row(DType::Q6_K, "q6_k", 256, 210, 14, false),
];

const fn row(
    dtype: DType,
    name: &'static str,
    group_elements: u32,
    group_bytes: u32,
    ggml_type: u32,
    is_float: bool,
) -> DTypeInfo {
    DTypeInfo { dtype, name, group_elements, group_bytes, ggml_type, is_float }
}

impl DType {
    /// The type's geometry.
    #[must_use]
    pub fn info(self) -> &'static DTypeInfo {
        &TABLE[self as usize]
    }

    /// Name in the CLI and in reports, lower case (`q4_k`).
    #[must_use]
    pub fn name(self) -> &'static str {
        self.info().name
    }

    /// Whether a stored value is a plain float.
    #[must_use]
    pub fn is_float(self) -> bool {
        self.info().is_float
    }

    /// The type of a ggml type number, if it is one that we read.
    #[must_use]
    pub fn from_ggml(ggml_type: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.ggml_type == ggml_type).map(|row| row.dtype)
    }

    /// The type of this name, upper or lower case.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.name.eq_ignore_ascii_case(name)).map(|row| row.dtype)
    }

    /// Bytes of a row of `elements` elements; `None` if the row is no whole number of groups, or overflows.
    #[must_use]
    pub fn row_bytes(self, elements: u64) -> Option<u64> {
        let info = self.info();
        let group = u64::from(info.group_elements);
        if !elements.is_multiple_of(group) {
            return None;
        }
        (elements / group).checked_mul(u64::from(info.group_bytes))
    }
}

impl core::fmt::Display for DType {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_variants() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(row.dtype as usize, index, "{}", row.name);
            assert_eq!(DType::from_name(row.name), Some(row.dtype));
            assert_eq!(DType::from_ggml(row.ggml_type), Some(row.dtype));
        }
    }

    #[test]
    fn rows_are_whole_groups_and_do_not_overflow() {
        assert_eq!(DType::Q4_K.row_bytes(512), Some(288));
        assert_eq!(DType::Q4_K.row_bytes(128), None);
        assert_eq!(DType::F32.row_bytes(u64::MAX), None);
    }
}
