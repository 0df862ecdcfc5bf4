//! Low-level writers of safetensors and GGUF files: a header from a list of tensors, then their bytes as a stream.
//!
//! A file is written beside its place under another name and moved there when it is complete, so a write that fails or
//! is abandoned leaves nothing behind. Nothing here knows what the tensors mean; see [`crate::synth`] for that.

use crate::error::{ErrorKind, FormatError};
use crate::gguf_value::{GgufArray, GgufValue};
use overspill_core::DType;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const GGUF_ALIGNMENT_DEFAULT: u64 = 32;
/// Readers like the data of a safetensors file to begin at a multiple of this.
const SAFETENSORS_ALIGNMENT: usize = 8;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Element type. Safetensors files take floats only.
    pub dtype: DType,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// Its length in bytes; `None` if its rows are no whole groups, or it overflows.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        let row_bytes = self.dtype.row_bytes(self.shape.last().copied().unwrap_or(1))?;
        self.shape.iter().rev().skip(1).try_fold(row_bytes, |bytes, &d| bytes.checked_mul(d))
    }

    fn checked_bytes(&self, path: &Path) -> Result<u64, FormatError> {
        self.bytes().ok_or_else(|| {
            let cause = format!("a shape of {:?} is impossible for {}", self.shape, self.dtype);
            FormatError::new(ErrorKind::BadRequest, path, cause, "choose other dimensions or another type")
                .tensor(&self.name)
        })
    }
}

/// A file's header, and where its tensors' bytes will be.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The header, padded up to where the first tensor begins.
    pub header: Vec<u8>,
    /// For each tensor: where in the file it begins, and its length in bytes.
    pub places: Vec<(u64, u64)>,
    /// Length of the whole file.
    pub file_bytes: u64,
}

/// Lays out a safetensors file. `path` is only named in errors.
///
/// # Errors
/// `BadRequest` for a shape that is impossible for its type, or a quantised type.
pub fn safetensors_layout(path: &Path, tensors: &[TensorSpec]) -> Result<Layout, FormatError> {
    let mut text = r#"{"__metadata__":{"format":"pt"}"#.to_owned();
    let mut at = 0u64;
    let mut places = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let bytes = tensor.checked_bytes(path)?;
        let dtype = match tensor.dtype {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            other => {
                let cause = format!("safetensors files have no type {other}");
                let error =
                    FormatError::new(ErrorKind::BadRequest, path, cause, "choose f32, f16 or bf16, or write GGUF");
                return Err(error.tensor(&tensor.name));
            }
        };
        let end = add(path, at, bytes)?;
        let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [at, end] });
        // By hand, because a map would sort the names or not, as some other crate's features decide.
        text.push_str(&format!(",{}:{entry}", Value::from(tensor.name.as_str())));
        places.push((at, bytes));
        at = end;
    }
    text.push('}');
    let mut text = text.into_bytes();
    text.resize(text.len().next_multiple_of(SAFETENSORS_ALIGNMENT), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    let data = header.len() as u64;
    let places = places.into_iter().map(|(at, bytes)| (data + at, bytes)).collect();
    Ok(Layout { header, places, file_bytes: add(path, data, at)? })
}

/// Lays out a GGUF file, version 3, with the alignment that `general.alignment` gives if it is there. `path` is only
/// named in errors.
///
/// # Errors
/// `BadRequest` for a shape that is impossible for its type, or an impossible alignment.
pub fn gguf_layout(path: &Path, pairs: &[(String, GgufValue)], tensors: &[TensorSpec]) -> Result<Layout, FormatError> {
    let alignment = pairs.iter().find(|(key, _)| key == "general.alignment").map(|(_, value)| value.as_u64());
    let alignment = match alignment {
        None => GGUF_ALIGNMENT_DEFAULT,
        Some(Some(alignment)) if alignment.is_power_of_two() && alignment <= 1 << 30 => alignment,
        Some(_) => {
            let error = FormatError::new(ErrorKind::BadRequest, path, "not a power of two", "choose 32");
            return Err(error.key("general.alignment"));
        }
    };
    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((pairs.len() as u64).to_le_bytes());
    for (key, value) in pairs {
        put_string(&mut header, key.as_bytes());
        put_value(&mut header, value);
    }
    let mut at = 0u64;
    let mut places = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let bytes = tensor.checked_bytes(path)?;
        put_string(&mut header, tensor.name.as_bytes());
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        for dim in tensor.shape.iter().rev() {
            header.extend(dim.to_le_bytes());
        }
        header.extend(tensor.dtype.info().ggml_type.to_le_bytes());
        header.extend(at.to_le_bytes());
        places.push((at, bytes));
        let end = add(path, at, bytes)?;
        at = add(path, end, end.wrapping_neg() % alignment)?;
    }
    header.resize(header.len().next_multiple_of(alignment as usize), 0);
    let data = header.len() as u64;
    let file_bytes = add(path, data, at)?;
    let places = places.into_iter().map(|(at, bytes)| (data + at, bytes)).collect();
    Ok(Layout { header, places, file_bytes })
}

fn add(path: &Path, a: u64, b: u64) -> Result<u64, FormatError> {
    a.checked_add(b).ok_or_else(|| {
        FormatError::new(ErrorKind::BadRequest, path, "a model of more than 2^64 bytes", "choose smaller dimensions")
    })
}

fn put_string(out: &mut Vec<u8>, string: &[u8]) {
    out.extend((string.len() as u64).to_le_bytes());
    out.extend(string);
}

fn put_value(out: &mut Vec<u8>, value: &GgufValue) {
    macro_rules! put {
        ($kind:literal, $value:expr) => {{
            out.extend(($kind as u32).to_le_bytes());
            out.extend($value.to_le_bytes());
        }};
    }
    match value {
        GgufValue::U8(v) => put!(0, v),
        GgufValue::I8(v) => put!(1, v),
        GgufValue::U16(v) => put!(2, v),
        GgufValue::I16(v) => put!(3, v),
        GgufValue::U32(v) => put!(4, v),
        GgufValue::I32(v) => put!(5, v),
        GgufValue::F32(v) => put!(6, v),
        GgufValue::Bool(v) => put!(7, u8::from(*v)),
        GgufValue::Str(v) => {
            out.extend(8u32.to_le_bytes());
            put_string(out, v.as_bytes());
        }
        GgufValue::Array(v) => {
            out.extend(9u32.to_le_bytes());
            put_array(out, v);
        }
        GgufValue::U64(v) => put!(10, v),
        GgufValue::I64(v) => put!(11, v),
        GgufValue::F64(v) => put!(12, v),
    }
}

fn put_array(out: &mut Vec<u8>, array: &GgufArray) {
    macro_rules! put {
        ($kind:literal, $values:expr) => {{
            out.extend(($kind as u32).to_le_bytes());
            out.extend(($values.len() as u64).to_le_bytes());
            out.extend($values.iter().flat_map(|v| v.to_le_bytes()));
        }};
    }
    match array {
        GgufArray::U8(v) => put!(0, v),
        GgufArray::I8(v) => put!(1, v),
        GgufArray::U16(v) => put!(2, v),
        GgufArray::I16(v) => put!(3, v),
        GgufArray::U32(v) => put!(4, v),
        GgufArray::I32(v) => put!(5, v),
        GgufArray::F32(v) => put!(6, v),
        GgufArray::Bool(v) => {
            let bytes: Vec<u8> = v.iter().map(|&v| v.into()).collect();
            put!(7, bytes);
        }
        GgufArray::Str(v) => {
            out.extend(8u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            for index in 0..v.len() {
                put_string(out, v.bytes(index).unwrap_or_default());
            }
        }
        GgufArray::U64(v) => put!(10, v),
        GgufArray::I64(v) => put!(11, v),
        GgufArray::F64(v) => put!(12, v),
    }
}

/// A file that appears under its name only when it is complete.
struct PendingFile {
    file: File,
    path: PathBuf,
    pending: PathBuf,
    is_done: bool,
}

impl PendingFile {
    fn create(path: &Path) -> Result<Self, FormatError> {
        let pending = pending_path(path)?;
        let file = File::options().write(true).create_new(true).open(&pending);
        let file = file.map_err(|e| FormatError::io(path, "create it", e))?;
        Ok(Self { file, path: path.to_owned(), pending, is_done: false })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.file.write_all(bytes).map_err(|e| FormatError::io(&self.path, "write it", e))
    }

    fn finish(mut self) -> Result<(), FormatError> {
        self.file.sync_all().map_err(|e| FormatError::io(&self.path, "write it", e))?;
        std::fs::rename(&self.pending, &self.path).map_err(|e| FormatError::io(&self.path, "move it into place", e))?;
        self.is_done = true;
        Ok(())
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if !self.is_done {
            // Nothing can be done about a failure, and the failure that led here is being reported.
            let _ = std::fs::remove_file(&self.pending);
        }
    }
}

/// A name beside `path` that no other writer uses.
pub(crate) fn pending_path(path: &Path) -> Result<PathBuf, FormatError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else {
        return Err(FormatError::new(ErrorKind::BadRequest, path, "not the name of a file", "name the output"));
    };
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Ok(path.with_file_name(format!(".{}.{}-{count}.partial", name.to_string_lossy(), std::process::id())))
}

/// Writes a whole small file, all or nothing.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    let mut file = PendingFile::create(path)?;
    file.write(bytes)?;
    file.finish()
}

/// A safetensors or GGUF file that is being written: the tensors' bytes follow each other in the order of the list
/// that it was created with; padding is added where it belongs.
///
/// Dropped before [`Self::finish`], it leaves nothing behind.
pub struct TensorFile {
    out: PendingFile,
    places: Vec<(u64, u64)>,
    file_bytes: u64,
    tensor: usize,
    at: u64,
}

impl TensorFile {
    /// Begins a safetensors file.
    ///
    /// # Errors
    /// As [`safetensors_layout`]; `NotFound` or `Io` if the file cannot be created or written.
    pub fn create_safetensors(path: &Path, tensors: &[TensorSpec]) -> Result<Self, FormatError> {
        Self::create(path, safetensors_layout(path, tensors)?)
    }

    /// Begins a GGUF file.
    ///
    /// # Errors
    /// As [`gguf_layout`]; `NotFound` or `Io` if the file cannot be created or written.
    pub fn create_gguf(
        path: &Path,
        pairs: &[(String, GgufValue)],
        tensors: &[TensorSpec],
    ) -> Result<Self, FormatError> {
        Self::create(path, gguf_layout(path, pairs, tensors)?)
    }

    /// Begins a file that has been laid out before.
    ///
    /// # Errors
    /// `NotFound` or `Io` if the file cannot be created or written.
    pub fn create(path: &Path, layout: Layout) -> Result<Self, FormatError> {
        let mut out = PendingFile::create(path)?;
        out.write(&layout.header)?;
        let at = layout.header.len() as u64;
        Ok(Self { out, places: layout.places, file_bytes: layout.file_bytes, tensor: 0, at })
    }

    /// Writes the next bytes of the current tensor, or of it and the tensors after it.
    ///
    /// # Errors
    /// `Io` if the system refuses (a full disk says so); `BadRequest` if there are more bytes than tensors.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), FormatError> {
        while !bytes.is_empty() {
            let Some(&(begin, len)) = self.places.get(self.tensor) else {
                let cause = format!("{} bytes more than its tensors have", bytes.len());
                return Err(FormatError::new(
                    ErrorKind::BadRequest,
                    &self.out.path,
                    cause,
                    "write as many as were announced",
                ));
            };
            self.pad_to(begin)?;
            let left = begin + len - self.at;
            let (now, later) = bytes.split_at(bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
            self.out.write(now)?;
            self.at += now.len() as u64;
            bytes = later;
            if self.at == begin + len {
                self.tensor += 1;
            }
        }
        Ok(())
    }

    fn pad_to(&mut self, offset: u64) -> Result<(), FormatError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.at < offset {
            let len = ZEROS.len().min(usize::try_from(offset - self.at).unwrap_or(usize::MAX));
            self.out.write(&ZEROS[..len])?;
            self.at += len as u64;
        }
        Ok(())
    }

    /// Makes the file durable and moves it to its place.
    ///
    /// # Errors
    /// `BadRequest` if bytes of a tensor are missing; `Io` if the system refuses.
    pub fn finish(mut self) -> Result<(), FormatError> {
        if self.tensor < self.places.len() {
            let cause = format!("only {} of its {} tensors were written", self.tensor, self.places.len());
            return Err(FormatError::new(
                ErrorKind::BadRequest,
                &self.out.path,
                cause,
                "write as many as were announced",
            ));
        }
        self.pad_to(self.file_bytes)?;
        self.out.finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn tensor(name: &str, dtype: DType, shape: &[u64]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }

    /// A path of its own in the system's directory for such files.
    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("overspill-write-{}-{name}", std::process::id()))
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_said_and_nothing_stays() {
        let path = path("full");
        let pending = pending_path(&path).unwrap();
        std::fs::write(&pending, "half").unwrap();
        // Every write to this device fails for want of room.
        let file = File::options().write(true).open("/dev/full").unwrap();
        let out = PendingFile { file, path: path.clone(), pending: pending.clone(), is_done: false };
        let mut file = TensorFile { out, places: vec![(0, 4)], file_bytes: 4, tensor: 0, at: 0 };
        let error = file.write(&[1, 2, 3, 4]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("make room on the disk"), "{error}");
        assert!(pending.exists());
        drop(file);
        assert!(!pending.exists() && !path.exists());
    }

    #[test]
    fn as_many_bytes_as_were_announced_or_no_file() {
        let path = path("short");
        let tensors = [tensor("a", DType::F32, &[2]), tensor("b", DType::F16, &[3])];
        let mut file = TensorFile::create_gguf(&path, &[], &tensors).unwrap();
        file.write(&[0; 13]).unwrap();
        assert!(file.finish().unwrap_err().to_string().contains("only 1 of its 2 tensors"));
        assert!(!path.exists());
        let mut file = TensorFile::create_safetensors(&path, &tensors).unwrap();
        file.write(&[0; 14]).unwrap();
        assert!(file.write(&[0]).unwrap_err().to_string().contains("1 bytes more"));
        file.finish().unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn impossible_tensors_are_refused() {
        let path = Path::new("m");
        let error = safetensors_layout(path, &[tensor("x", DType::Q8_0, &[32])]).unwrap_err();
        assert!(error.to_string().contains("tensor 'x'") && error.to_string().contains("q8_0"), "{error}");
        for shape in [&[1u64 << 40, 1 << 40][..], &[u64::MAX, 1]] {
            let error = gguf_layout(path, &[], &[tensor("x", DType::F32, shape)]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::BadRequest);
        }
        let pairs = [("general.alignment".to_owned(), GgufValue::U32(24))];
        assert!(gguf_layout(path, &pairs, &[]).unwrap_err().to_string().contains("general.alignment"));
    }
}
