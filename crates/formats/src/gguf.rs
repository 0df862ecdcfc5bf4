//! GGUF files, versions 2 and 3, little-endian, in one file or split by `gguf-split`.
//!
//! Written against the specification in ggml's `docs/gguf.md`. Every count and length is compared with what the file
//! has left before anything is allocated for it. GGUF lists dimensions innermost first; here they are reversed.

use crate::error::{FormatError, shown};
use crate::gguf_value::{GgufArray, GgufMetadata, GgufStrings, GgufValue};
use crate::read::HeaderReader;
use crate::role::{is_head, role_of};
use crate::safetensors_file::dims;
use crate::{Format, Metadata, ModelFiles, build};
use overspill_core::dtype::TABLE;
use overspill_core::{CatalogBuilder, DType, RawTensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 4] = b"GGUF";
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 30;
/// ggml's own limit.
const DIMS_MAX: u32 = 4;
/// The specification's limit for keys.
const KEY_BYTES_MAX: u64 = 65_535;
const TENSOR_NAME_BYTES_MAX: u64 = 4096;
/// No real header comes near; a vocabulary of 256,000 tokens takes about 16 MiB.
const HEADER_BYTES_MAX: u64 = 256 << 20;
const PAIRS_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 20;
/// The fewest bytes that a key with its value, and a tensor's description, can take.
const PAIR_BYTES_MIN: u64 = 8 + 4 + 1;
const INFO_BYTES_MIN: u64 = 8 + 4 + 4 + 8;
/// `gguf-split` numbers shards with five digits.
const SHARDS_MAX: u64 = 99_999;
const AGAIN: &str = "the file is damaged; fetch it again";

/// Names of ggml's types by number, for errors about those that aren't read.
const GGML_TYPES: &[&str] = &[
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_2",
    "Q4_3",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q8_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_S",
    "IQ4_XS",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4",
    "Q4_0_4_8",
    "Q4_0_8_8",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL_4_4",
    "IQ4_NL_4_8",
    "IQ4_NL_8_8",
    "MXFP4",
];

/// A tensor as the header describes it.
struct Info {
    name: String,
    dtype: DType,
    /// Outermost first.
    shape: Vec<u64>,
    /// Offset in the file.
    offset: u64,
    bytes: u64,
}

/// One file's header.
struct Header {
    path: PathBuf,
    bytes: u64,
    metadata: GgufMetadata,
    infos: Vec<Info>,
}

/// Opens a GGUF model from its file, or from any file of a split one.
pub(crate) fn open(path: &Path) -> Result<ModelFiles, FormatError> {
    let header = read_header(path)?;
    let count = header.metadata.get("split.count").map(GgufValue::as_u64);
    let shards = match count {
        Some(count) => read_shards(header, count)?,
        None => vec![header],
    };
    let tied = !shards.iter().flat_map(|shard| &shard.infos).any(|info| is_head(&info.name));
    let mut builder = CatalogBuilder::new();
    let mut names = BTreeSet::new();
    let mut metadata = None;
    for shard in shards {
        let file = builder.file(&shard.path, shard.bytes);
        metadata.get_or_insert(shard.metadata);
        for Info { name, dtype, shape, offset, .. } in shard.infos {
            if !names.insert(name.clone()) {
                return Err(FormatError::bad(&shard.path, "described twice", AGAIN).tensor(&name));
            }
            let role = role_of(&name, dtype, &shape, tied);
            builder.tensor(RawTensor { name, dtype, shape, file, offset, role });
        }
    }
    let Some(metadata) = metadata else {
        return Err(FormatError::bad(path, "no shard is left of it", AGAIN));
    };
    Ok(ModelFiles {
        catalog: build(builder, path)?,
        metadata: Metadata::Gguf(metadata),
        format: Format::Gguf,
        path: path.to_owned(),
        skipped: Vec::new(),
    })
}

/// `stem` and number of shards of a name `stem-00001-of-00003.gguf`.
fn split_name(path: &Path) -> Option<(&str, u64)> {
    let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (rest, count) = name.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    (is_number(count) && is_number(number)).then_some(())?;
    Some((stem, count.parse().ok()?))
}

/// All shards in their order, given one of them.
fn read_shards(opened: Header, count: Option<u64>) -> Result<Vec<Header>, FormatError> {
    let path = opened.path.clone();
    let bad = |key: &str, cause: String, cure: &str| Err(FormatError::bad(&path, cause, cure).key(key));
    let count = match count {
        Some(count @ 1..=SHARDS_MAX) => count,
        _ => return bad("split.count", "not a number of files".into(), AGAIN),
    };
    if count == 1 {
        return Ok(vec![opened]);
    }
    let Some((stem, named)) = split_name(&path) else {
        let cause =
            format!("one of {count} files of a split model, but the name isn't like 'name-00001-of-{count:05}.gguf'");
        return bad("split.count", cause, "give the files the names that gguf-split gave them");
    };
    if named != count {
        return bad("split.count", format!("{count} files, but the name says {named}"), "restore the file's name");
    }
    let mut opened = Some(opened);
    let mut shards = Vec::new();
    for number in 0..count {
        let file = path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", number + 1));
        let shard = match opened.take_if(|opened| opened.path == file) {
            Some(shard) => shard,
            None if !file.try_exists().map_err(|e| FormatError::io(&file, "look for it", e))? => {
                let cause = format!("file {} of {count} of this split model is missing", number + 1);
                return Err(FormatError::bad(&file, cause, "fetch it and put it beside the others"));
            }
            None => read_header(&file)?,
        };
        let said = |key: &str| shard.metadata.u64(key);
        if said("split.count") != Some(count) || said("split.no") != Some(number) {
            let cause = format!("it says that it is another file than number {} of {count}", number + 1);
            return Err(FormatError::bad(&file, cause, "fetch the whole set again").key("split.no"));
        }
        shards.push(shard);
    }
    let there: u64 = shards.iter().map(|shard| shard.infos.len() as u64).sum();
    match shards.first().and_then(|first| first.metadata.u64("split.tensors.count")) {
        Some(wanted) if wanted != there => {
            let cause = format!("the whole model should have {wanted} tensors, but its files have {there}");
            bad("split.tensors.count", cause, "fetch the whole set again")
        }
        _ => Ok(shards),
    }
}

fn read_header(path: &Path) -> Result<Header, FormatError> {
    let mut reader = HeaderReader::open(path)?;
    if &reader.array::<4>("the magic number")? != MAGIC {
        let cure = "name a .gguf file, or a directory with config.json and safetensors files";
        return Err(FormatError::bad(path, "not a GGUF file: it doesn't begin with 'GGUF'", cure));
    }
    let version = u32_of(&mut reader, "the version")?;
    match version {
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 1..=3) => {
            return Err(FormatError::bad(
                path,
                "a big-endian GGUF file",
                "only little-endian ones are read; convert it",
            ));
        }
        _ => {
            let cause = format!("GGUF version {version}, which is not read");
            return Err(FormatError::bad(path, cause, "versions 2 and 3 are; convert the model again"));
        }
    }
    let tensors = u64_of(&mut reader, "the number of tensors")?;
    let pairs = u64_of(&mut reader, "the number of metadata keys")?;
    check_count(&reader, pairs, PAIR_BYTES_MIN, "metadata keys")?;
    check_count(&reader, tensors, INFO_BYTES_MIN, "tensors")?;
    if pairs > PAIRS_MAX || tensors > TENSORS_MAX {
        let cause = format!("{tensors} tensors and {pairs} metadata keys are more than any real model has");
        return Err(FormatError::bad(path, cause, AGAIN));
    }
    let mut values = BTreeMap::new();
    for _ in 0..pairs {
        let key = read_name(&mut reader, KEY_BYTES_MAX, "a metadata key")?;
        let value = read_value(&mut reader, &key)?;
        if values.contains_key(&key) {
            return Err(FormatError::bad(path, "it is there twice", AGAIN).key(&key));
        }
        values.insert(key, value);
    }
    let metadata = GgufMetadata::new(path, version, values);
    let alignment = alignment(&metadata)?;
    let mut infos = Vec::new();
    for _ in 0..tensors {
        infos.push(read_info(&mut reader)?);
    }
    place(path, &mut infos, reader.at(), alignment, reader.bytes())?;
    Ok(Header { path: path.to_owned(), bytes: reader.bytes(), metadata, infos })
}

fn u32_of(reader: &mut HeaderReader, of: &str) -> Result<u32, FormatError> {
    reader.array(of).map(u32::from_le_bytes)
}

fn u64_of(reader: &mut HeaderReader, of: &str) -> Result<u64, FormatError> {
    reader.array(of).map(u64::from_le_bytes)
}

/// Whether `count` things of at least `each` bytes can be there.
fn check_count(reader: &HeaderReader, count: u64, each: u64, of: &str) -> Result<(), FormatError> {
    match count.checked_mul(each) {
        Some(bytes) if bytes <= reader.left() => Ok(()),
        _ => {
            let cause = format!("the header promises {count} {of}, more than fit the file's {} bytes", reader.bytes());
            Err(FormatError::bad(reader.path(), cause, AGAIN))
        }
    }
}

/// Appends a string's bytes.
fn read_bytes(reader: &mut HeaderReader, into: &mut Vec<u8>, len_max: u64, of: &str) -> Result<(), FormatError> {
    let len = u64_of(reader, of)?;
    reader.check(len, of)?;
    if len > len_max || reader.at() + len > HEADER_BYTES_MAX {
        let cause = format!("{of} takes {len} bytes at byte {}, more than any real one", reader.at());
        return Err(FormatError::bad(reader.path(), cause, AGAIN));
    }
    reader.append(len, into, of)
}

/// A key or a tensor's name: UTF-8, not empty.
fn read_name(reader: &mut HeaderReader, len_max: u64, of: &str) -> Result<String, FormatError> {
    let at = reader.at();
    let mut bytes = Vec::new();
    read_bytes(reader, &mut bytes, len_max, of)?;
    let name = String::from_utf8(bytes)
        .map_err(|e| FormatError::bad(reader.path(), format!("{of} at byte {at} isn't UTF-8"), AGAIN).with_source(e))?;
    if name.is_empty() {
        return Err(FormatError::bad(reader.path(), format!("{of} at byte {at} is empty"), AGAIN));
    }
    Ok(name)
}

fn read_value(reader: &mut HeaderReader, key: &str) -> Result<GgufValue, FormatError> {
    let of = format!("the value of '{}'", shown(key));
    let kind = u32_of(reader, &of)?;
    Ok(match kind {
        0 => GgufValue::U8(u8::from_le_bytes(reader.array(&of)?)),
        1 => GgufValue::I8(i8::from_le_bytes(reader.array(&of)?)),
        2 => GgufValue::U16(u16::from_le_bytes(reader.array(&of)?)),
        3 => GgufValue::I16(i16::from_le_bytes(reader.array(&of)?)),
        4 => GgufValue::U32(u32::from_le_bytes(reader.array(&of)?)),
        5 => GgufValue::I32(i32::from_le_bytes(reader.array(&of)?)),
        6 => GgufValue::F32(f32::from_le_bytes(reader.array(&of)?)),
        7 => match reader.array::<1>(&of)? {
            [byte @ (0 | 1)] => GgufValue::Bool(byte == 1),
            [byte] => return Err(FormatError::bad(reader.path(), format!("a bool of {byte}"), AGAIN).key(key)),
        },
        8 => {
            let mut bytes = Vec::new();
            read_bytes(reader, &mut bytes, HEADER_BYTES_MAX, &of)?;
            GgufValue::Str(
                String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()),
            )
        }
        9 => GgufValue::Array(read_array(reader, key, &of)?),
        10 => GgufValue::U64(u64::from_le_bytes(reader.array(&of)?)),
        11 => GgufValue::I64(i64::from_le_bytes(reader.array(&of)?)),
        12 => GgufValue::F64(f64::from_le_bytes(reader.array(&of)?)),
        _ => return Err(unknown_kind(reader, key, kind)),
    })
}

fn unknown_kind(reader: &HeaderReader, key: &str, kind: u32) -> FormatError {
    let cause = format!("a value of type {kind}, which GGUF doesn't have");
    FormatError::bad(reader.path(), cause, "the file is damaged, or newer than this program").key(key)
}

fn read_array(reader: &mut HeaderReader, key: &str, of: &str) -> Result<GgufArray, FormatError> {
    let kind = u32_of(reader, of)?;
    let count = u64_of(reader, of)?;
    let each = match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => {
            let cause = "an array of arrays, which no model uses and this program doesn't read";
            return Err(FormatError::bad(reader.path(), cause, AGAIN).key(key));
        }
        _ => return Err(unknown_kind(reader, key, kind)),
    };
    check_count(reader, count, each, "array elements").map_err(|error| error.key(key))?;
    if kind == 8 {
        let mut strings = GgufStrings::new();
        for _ in 0..count {
            strings.push_with(|bytes| read_bytes(reader, bytes, HEADER_BYTES_MAX, of))?;
        }
        return Ok(GgufArray::Str(strings));
    }
    let len = count * each;
    if reader.at() + len > HEADER_BYTES_MAX {
        let cause = format!("an array of {len} bytes, more than any real one");
        return Err(FormatError::bad(reader.path(), cause, AGAIN).key(key));
    }
    let mut bytes = Vec::new();
    reader.append(len, &mut bytes, of)?;
    macro_rules! numbers {
        ($variant:ident, $type:ty) => {
            GgufArray::$variant(bytes.as_chunks().0.iter().map(|&chunk| <$type>::from_le_bytes(chunk)).collect())
        };
    }
    Ok(match kind {
        0 => GgufArray::U8(bytes),
        1 => numbers!(I8, i8),
        2 => numbers!(U16, u16),
        3 => numbers!(I16, i16),
        4 => numbers!(U32, u32),
        5 => numbers!(I32, i32),
        6 => numbers!(F32, f32),
        7 => match bytes.iter().find(|&&byte| byte > 1) {
            Some(byte) => return Err(FormatError::bad(reader.path(), format!("a bool of {byte}"), AGAIN).key(key)),
            None => GgufArray::Bool(bytes.iter().map(|&byte| byte == 1).collect()),
        },
        10 => numbers!(U64, u64),
        11 => numbers!(I64, i64),
        _ => numbers!(F64, f64),
    })
}

fn alignment(metadata: &GgufMetadata) -> Result<u64, FormatError> {
    const KEY: &str = "general.alignment";
    let Some(value) = metadata.get(KEY) else { return Ok(ALIGNMENT_DEFAULT) };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() && alignment <= ALIGNMENT_MAX => Ok(alignment),
        said => {
            let said = said.map_or_else(|| format!("of type {}", value.type_name()), |said| said.to_string());
            let cause = format!("{said}, but an alignment is a power of two");
            Err(FormatError::bad(metadata.path(), cause, AGAIN).key(KEY))
        }
    }
}

/// Reads a description; its offset still counts from the data section.
fn read_info(reader: &mut HeaderReader) -> Result<Info, FormatError> {
    let name = read_name(reader, TENSOR_NAME_BYTES_MAX, "a tensor's name")?;
    let path = reader.path().to_owned();
    let bad = |cause: String| FormatError::bad(&path, cause, AGAIN).tensor(&name);
    let of = format!("the description of tensor '{}'", shown(&name));
    let dims_len = u32_of(reader, &of)?;
    if dims_len > DIMS_MAX {
        return Err(bad(format!("{dims_len} dimensions, more than the {DIMS_MAX} that ggml has")));
    }
    let mut shape = Vec::new();
    for _ in 0..dims_len {
        shape.insert(0, u64_of(reader, &of)?);
    }
    let kind = u32_of(reader, &of)?;
    let offset = u64_of(reader, &of)?;
    let Some(dtype) = DType::from_ggml(kind) else {
        let known = GGML_TYPES.get(kind as usize).map_or_else(String::new, |name| format!(" ({name})"));
        let read: Vec<&str> = TABLE.iter().map(|row| row.name).collect();
        let cause = format!("ggml type {kind}{known}, which is not read");
        let cure = format!("{} are; convert the model to one of them", read.join(", "));
        return Err(FormatError::bad(&path, cause, cure).tensor(&name));
    };
    let columns = shape.last().copied().unwrap_or(1);
    let rows = shape.iter().rev().skip(1).try_fold(1u64, |rows, &d| rows.checked_mul(d));
    let Some(row_bytes) = dtype.row_bytes(columns) else {
        let group = dtype.info().group_elements;
        return Err(bad(format!("rows of {columns} elements are not whole groups of {group}, as {dtype} needs")));
    };
    let Some(bytes) = rows.and_then(|rows| rows.checked_mul(row_bytes)) else {
        return Err(bad(format!("the dimensions {} overflow", dims(&shape))));
    };
    Ok(Info { name, dtype, shape, offset, bytes })
}

/// Makes offsets count from the file's start, and checks that tensors are aligned, inside the file, and apart.
fn place(path: &Path, infos: &mut [Info], header_end: u64, alignment: u64, file_bytes: u64) -> Result<(), FormatError> {
    let data = header_end.next_multiple_of(alignment);
    for info in infos.iter_mut() {
        let bad = |cause: String, cure: &str| FormatError::bad(path, cause, cure).tensor(&info.name);
        if !info.offset.is_multiple_of(alignment) {
            return Err(bad(format!("its offset {} is no multiple of the alignment {alignment}", info.offset), AGAIN));
        }
        let begin = data.checked_add(info.offset);
        let end = begin.and_then(|begin| begin.checked_add(info.bytes));
        let (Some(begin), Some(end)) = (begin, end) else {
            return Err(bad(format!("its offset {} overflows", info.offset), AGAIN));
        };
        if end > file_bytes {
            let cause = format!("its bytes {begin} to {end} lie beyond the file's end at {file_bytes}");
            return Err(bad(cause, "the file is truncated; fetch it again"));
        }
        info.offset = begin;
    }
    let mut order: Vec<&Info> = infos.iter().collect();
    order.sort_by_key(|info| (info.offset, info.bytes));
    for pair in order.windows(2) {
        if let [before, after] = pair
            && after.offset < before.offset + before.bytes
        {
            let cause = format!("its bytes overlap those of '{}'", shown(&before.name));
            return Err(FormatError::bad(path, cause, AGAIN).tensor(&after.name));
        }
    }
    Ok(())
}
