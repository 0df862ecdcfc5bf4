//! The metadata of a GGUF file: keys and typed values.
//!
//! Arrays of strings (a vocabulary of 150,000 tokens) are kept as one buffer and the ends of its pieces, so that they
//! take no more memory than they take in the file.

use crate::error::FormatError;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A value.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum GgufValue {
    /// 8-bit unsigned integer.
    U8(u8),
    /// 8-bit signed integer.
    I8(i8),
    /// 16-bit unsigned integer.
    U16(u16),
    /// 16-bit signed integer.
    I16(i16),
    /// 32-bit unsigned integer.
    U32(u32),
    /// 32-bit signed integer.
    I32(i32),
    /// 64-bit unsigned integer.
    U64(u64),
    /// 64-bit signed integer.
    I64(i64),
    /// Single precision.
    F32(f32),
    /// Double precision.
    F64(f64),
    /// Truth value.
    Bool(bool),
    /// Text. Bytes that aren't UTF-8 have become U+FFFD.
    Str(String),
    /// An array of one element type. Arrays of arrays are refused when a file is opened.
    Array(GgufArray),
}

impl GgufValue {
    /// The type's name, as the GGUF specification writes it, lower case.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "uint8",
            Self::I8(_) => "int8",
            Self::U16(_) => "uint16",
            Self::I16(_) => "int16",
            Self::U32(_) => "uint32",
            Self::I32(_) => "int32",
            Self::U64(_) => "uint64",
            Self::I64(_) => "int64",
            Self::F32(_) => "float32",
            Self::F64(_) => "float64",
            Self::Bool(_) => "bool",
            Self::Str(_) => "string",
            Self::Array(_) => "array",
        }
    }

    /// Any integer that isn't negative.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            Self::I8(v) => v.try_into().ok(),
            Self::I16(v) => v.try_into().ok(),
            Self::I32(v) => v.try_into().ok(),
            Self::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// Any float.
    #[must_use]
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::F32(v) => Some(v),
            Self::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// A truth value.
    #[must_use]
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(v) = *self { Some(v) } else { None }
    }

    /// Text.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        if let Self::Str(v) = self { Some(v) } else { None }
    }

    /// An array.
    #[must_use]
    pub fn as_array(&self) -> Option<&GgufArray> {
        if let Self::Array(v) = self { Some(v) } else { None }
    }
}

/// An array, by element type.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum GgufArray {
    /// 8-bit unsigned integers.
    U8(Vec<u8>),
    /// 8-bit signed integers.
    I8(Vec<i8>),
    /// 16-bit unsigned integers.
    U16(Vec<u16>),
    /// 16-bit signed integers.
    I16(Vec<i16>),
    /// 32-bit unsigned integers.
    U32(Vec<u32>),
    /// 32-bit signed integers.
    I32(Vec<i32>),
    /// 64-bit unsigned integers.
    U64(Vec<u64>),
    /// 64-bit signed integers.
    I64(Vec<i64>),
    /// Single precision.
    F32(Vec<f32>),
    /// Double precision.
    F64(Vec<f64>),
    /// Truth values.
    Bool(Vec<bool>),
    /// Strings.
    Str(GgufStrings),
}

impl GgufArray {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::F64(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::Str(v) => v.len(),
        }
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The strings, if it holds strings.
    #[must_use]
    pub fn as_strings(&self) -> Option<&GgufStrings> {
        if let Self::Str(v) = self { Some(v) } else { None }
    }

    /// Element `index` as an integer, if it is one and fits.
    #[must_use]
    pub fn i64(&self, index: usize) -> Option<i64> {
        match self {
            Self::U8(v) => v.get(index).map(|&v| v.into()),
            Self::I8(v) => v.get(index).map(|&v| v.into()),
            Self::U16(v) => v.get(index).map(|&v| v.into()),
            Self::I16(v) => v.get(index).map(|&v| v.into()),
            Self::U32(v) => v.get(index).map(|&v| v.into()),
            Self::I32(v) => v.get(index).map(|&v| v.into()),
            Self::U64(v) => v.get(index).and_then(|&v| v.try_into().ok()),
            Self::I64(v) => v.get(index).copied(),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::Str(_) => None,
        }
    }

    /// Element `index` as a float, if it is one.
    #[must_use]
    pub fn f32(&self, index: usize) -> Option<f32> {
        match self {
            Self::F32(v) => v.get(index).copied(),
            Self::F64(v) => v.get(index).map(|&v| v as f32),
            _ => None,
        }
    }

    /// Element `index` as a truth value, if it is one.
    #[must_use]
    pub fn bool(&self, index: usize) -> Option<bool> {
        if let Self::Bool(v) = self { v.get(index).copied() } else { None }
    }
}

/// Many strings in one buffer. They needn't be UTF-8: pieces of a byte-level vocabulary may be cut inside a character.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GgufStrings {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl GgufStrings {
    /// An empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a string. False, and nothing appended, if all strings together would pass 4 GiB.
    pub fn push(&mut self, string: &[u8]) -> bool {
        let Ok(end) = u32::try_from(self.bytes.len() + string.len()) else { return false };
        self.bytes.extend_from_slice(string);
        self.ends.push(end);
        true
    }

    /// Ends the string whose bytes `fill` appends to the buffer.
    pub(crate) fn push_with<E>(&mut self, fill: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), E> {
        fill(&mut self.bytes)?;
        // The reader bounds a whole header far below 4 GiB.
        self.ends.push(u32::try_from(self.bytes.len()).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Number of strings.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of string `index`.
    #[must_use]
    pub fn bytes(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)? as usize;
        let begin = index.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        self.bytes.get(begin..end)
    }

    /// String `index` as text; what isn't UTF-8 becomes U+FFFD.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Cow<'_, str>> {
        self.bytes(index).map(String::from_utf8_lossy)
    }

    /// All strings, as text.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Cow<'_, str>> {
        (0..self.len()).map(|index| self.get(index).unwrap_or_default())
    }
}

impl<S: AsRef<[u8]>> FromIterator<S> for GgufStrings {
    /// Strings beyond 4 GiB in all are left out.
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Self {
        let mut all = Self::new();
        for string in strings {
            if !all.push(string.as_ref()) {
                break;
            }
        }
        all
    }
}

/// All metadata of a GGUF model (of a split one, what its first file says).
#[derive(Clone, Debug)]
pub struct GgufMetadata {
    path: PathBuf,
    version: u32,
    values: BTreeMap<String, GgufValue>,
}

impl GgufMetadata {
    pub(crate) fn new(path: &Path, version: u32, values: BTreeMap<String, GgufValue>) -> Self {
        Self { path: path.to_owned(), version, values }
    }

    /// The file that it was read from, for error messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version of the GGUF format: 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.values.get(key)
    }

    /// All keys and values, in the order of the keys.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &GgufValue)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// An integer of any width that isn't negative; `None` if the key is absent or something else.
    #[must_use]
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// A float of any width; `None` if the key is absent or something else.
    #[must_use]
    pub fn f32(&self, key: &str) -> Option<f32> {
        self.get(key)?.as_f32()
    }

    /// A truth value; `None` if the key is absent or something else.
    #[must_use]
    pub fn bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// Text; `None` if the key is absent or something else.
    #[must_use]
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// An array; `None` if the key is absent or something else.
    #[must_use]
    pub fn array(&self, key: &str) -> Option<&GgufArray> {
        self.get(key)?.as_array()
    }

    /// An array of strings; `None` if the key is absent or something else.
    #[must_use]
    pub fn strings(&self, key: &str) -> Option<&GgufStrings> {
        self.array(key)?.as_strings()
    }

    /// As [`Self::u64`], for a key that must be there.
    ///
    /// # Errors
    /// `BadFile` that names the file and the key, and tells an absent key from one of another type.
    pub fn require_u64(&self, key: &str) -> Result<u64, FormatError> {
        self.u64(key).ok_or_else(|| self.wanting(key, "an integer that isn't negative"))
    }

    /// As [`Self::f32`], for a key that must be there.
    ///
    /// # Errors
    /// As [`Self::require_u64`].
    pub fn require_f32(&self, key: &str) -> Result<f32, FormatError> {
        self.f32(key).ok_or_else(|| self.wanting(key, "a float"))
    }

    /// As [`Self::str`], for a key that must be there.
    ///
    /// # Errors
    /// As [`Self::require_u64`].
    pub fn require_str(&self, key: &str) -> Result<&str, FormatError> {
        self.str(key).ok_or_else(|| self.wanting(key, "text"))
    }

    /// As [`Self::array`], for a key that must be there.
    ///
    /// # Errors
    /// As [`Self::require_u64`].
    pub fn require_array(&self, key: &str) -> Result<&GgufArray, FormatError> {
        self.array(key).ok_or_else(|| self.wanting(key, "an array"))
    }

    fn wanting(&self, key: &str, wanted: &str) -> FormatError {
        let cause = match self.get(key) {
            Some(value) => format!("of type {}, where {wanted} was expected", value.type_name()),
            None => "missing".to_owned(),
        };
        FormatError::bad(&self.path, cause, "convert the model again with a current converter").key(key)
    }
}
