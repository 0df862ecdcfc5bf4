//! The header of one safetensors file.
//!
//! The `safetensors` crate is the authority on what is valid. Its errors name neither file nor cause well enough for
//! a person, and it keeps only the last of two tensors of one name, so a reading of our own comes first and says what
//! exactly is wrong; a header is believed when both readings agree.

use crate::error::FormatError;
use crate::read::HeaderReader;
use overspill_core::DType;
use safetensors::Dtype as StDtype;
use safetensors::tensor::Metadata as StMetadata;
use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

/// The limit of the `safetensors` crate and of every other reader.
const HEADER_BYTES_MAX: u64 = 100_000_000;
const LENGTH_BYTES: u64 = 8;
const AGAIN: &str = "the file is damaged; fetch it again";

/// A tensor as the header describes it.
pub(crate) struct Entry {
    pub name: String,
    /// `Err` is the name of a type that is valid but not read.
    pub dtype: Result<DType, String>,
    pub shape: Vec<u64>,
    /// Offset in the file, not in the data section.
    pub offset: u64,
}

/// One file's header.
pub(crate) struct Header {
    pub file_bytes: u64,
    /// In the order of their offsets.
    pub entries: Vec<Entry>,
}

/// A tensor's description, before anything about it is believed.
#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// All descriptions in the order of the text, doubles included.
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor descriptions")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// Reads the header of the file at `path`, and nothing after it.
pub(crate) fn read_header(path: &Path) -> Result<Header, FormatError> {
    let mut reader = HeaderReader::open(path)?;
    let header_bytes = u64::from_le_bytes(reader.array("the header's length")?);
    if header_bytes > reader.left() {
        return Err(FormatError::bad(
            path,
            format!("the header's length is given as {header_bytes} bytes, but the file has only {}", reader.bytes()),
            "it is truncated, or no safetensors file; fetch it again",
        ));
    }
    if header_bytes > HEADER_BYTES_MAX {
        return Err(FormatError::bad(
            path,
            format!("a header of {header_bytes} bytes, more than the {HEADER_BYTES_MAX} that the format allows"),
            AGAIN,
        ));
    }
    let mut text = Vec::new();
    reader.append(header_bytes, &mut text, "the header")?;
    let data_bytes = reader.left();
    let entries = parse(path, &text, header_bytes + LENGTH_BYTES, data_bytes)?;
    Ok(Header { file_bytes: reader.bytes(), entries })
}

fn parse(path: &Path, text: &[u8], data_offset: u64, data_bytes: u64) -> Result<Vec<Entry>, FormatError> {
    let RawHeader(mut raw) = serde_json::from_slice(text)
        .map_err(|e| FormatError::bad(path, format!("the header isn't valid: {e}"), AGAIN).with_source(e))?;
    raw.sort_by_key(|(_, a)| a.data_offsets);
    check_names(path, &raw)?;
    let mut entries = Vec::with_capacity(raw.len());
    let mut end = 0;
    for (name, raw) in raw {
        let dtype = check_entry(path, &name, &raw, end, data_bytes)?;
        end = raw.data_offsets.1;
        let offset = data_offset + raw.data_offsets.0;
        entries.push(Entry { name, dtype, shape: raw.shape, offset });
    }
    if end != data_bytes {
        let cause = format!("{} bytes follow the last tensor, which the format doesn't allow", data_bytes - end);
        return Err(FormatError::bad(path, cause, AGAIN));
    }
    let agreed: StMetadata = serde_json::from_slice(text)
        .map_err(|e| FormatError::bad(path, format!("the header isn't valid: {e}"), AGAIN).with_source(e))?;
    if agreed.data_len() as u64 != data_bytes {
        return Err(FormatError::bad(path, "the header doesn't describe the whole file", AGAIN));
    }
    Ok(entries)
}

fn check_names(path: &Path, raw: &[(String, RawEntry)]) -> Result<(), FormatError> {
    let mut names = BTreeSet::new();
    for (name, _) in raw {
        if !names.insert(name.as_str()) {
            return Err(FormatError::bad(path, "the header describes it twice", AGAIN).tensor(name));
        }
    }
    Ok(())
}

/// Checks one description against the end of the one before it, and gives its type.
fn check_entry(
    path: &Path,
    name: &str,
    raw: &RawEntry,
    end_before: u64,
    data_bytes: u64,
) -> Result<Result<DType, String>, FormatError> {
    let bad = |cause: String, cure: &str| FormatError::bad(path, cause, cure).tensor(name);
    let (begin, end) = raw.data_offsets;
    if end < begin {
        return Err(bad(format!("it ends at byte {end}, before its begin at {begin}"), AGAIN));
    }
    if begin < end_before {
        return Err(bad(format!("its bytes {begin} to {end} overlap those of another tensor"), AGAIN));
    }
    if begin > end_before {
        let cause = format!("it begins at byte {begin}, but the tensor before it ends at {end_before}");
        return Err(bad(cause, AGAIN));
    }
    if end > data_bytes {
        let cause = format!("its bytes {begin} to {end} lie beyond the {data_bytes} that the file has for tensors");
        return Err(bad(cause, "the file is truncated; fetch it again"));
    }
    let Ok(dtype) = StDtype::deserialize(StrDeserializer::<serde::de::value::Error>::new(&raw.dtype)) else {
        return Err(unread(path, name, &raw.dtype));
    };
    let bits = raw.shape.iter().try_fold(dtype.bitsize() as u64, |all, &d| all.checked_mul(d));
    let Some(bits) = bits else {
        return Err(bad(format!("the dimensions {} overflow", dims(&raw.shape)), AGAIN));
    };
    if bits != (end - begin).saturating_mul(8) {
        let cause = format!(
            "a shape of {} in {} takes {} bytes, but it is given {}",
            dims(&raw.shape),
            raw.dtype,
            bits.div_ceil(8),
            end - begin
        );
        return Err(bad(cause, AGAIN));
    }
    Ok(match dtype {
        StDtype::F32 => Ok(DType::F32),
        StDtype::F16 => Ok(DType::F16),
        StDtype::BF16 => Ok(DType::BF16),
        _ => Err(raw.dtype.clone()),
    })
}

/// The error for a type that isn't read.
pub(crate) fn unread(path: &Path, name: &str, dtype: &str) -> FormatError {
    FormatError::bad(
        path,
        format!("elements of type {}, which is not read", crate::error::shown(dtype)),
        "F32, F16 and BF16 are; convert the model to one of them",
    )
    .tensor(name)
}

/// Dimensions as text, of bounded length.
pub(crate) fn dims(shape: &[u64]) -> String {
    const DIMS_MAX: usize = 8;
    match shape.get(..DIMS_MAX) {
        Some(first) if shape.len() > DIMS_MAX => format!("{first:?} (of {} dimensions)", shape.len()),
        _ => format!("{shape:?}"),
    }
}
