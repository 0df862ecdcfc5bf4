//! Tensors with the same content. Samples first: of a model as it should be hardly anything is read.

use crate::errors::{Kind, Outcome, stop};
use crate::sizes::human_bytes;
use crate::{doctor, progress};
use overspill::Tensor;
use overspill_formats::ModelFiles;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Seek, SeekFrom};

/// Bytes of each of the samples of a tensor.
const SAMPLE_BYTES: u64 = 4096;
/// Samples of a tensor, spread over it.
const SAMPLES: u64 = 4;
/// Bytes that are read at once.
const CHUNK_BYTES: usize = 1 << 20;
/// Names that a report lists of each group.
const NAMES_SHOWN: usize = 6;

/// What was found.
#[derive(Debug, Serialize)]
pub struct Duplicates {
    /// Groups of tensors with the same content, the most wasteful first.
    pub groups: Vec<Group>,
    /// Bytes that are stored more than once.
    pub wasted_bytes: u64,
    /// Bytes that were read to find out.
    pub read_bytes: u64,
}

/// Tensors with the same content.
#[derive(Debug, Serialize)]
pub struct Group {
    /// Their names.
    pub tensors: Vec<String>,
    /// Bytes of each.
    pub bytes: u64,
}

impl Duplicates {
    /// For people.
    pub fn text(&self) -> String {
        if self.groups.is_empty() {
            return format!("Duplicates: none ({} read to find out)\n", human_bytes(self.read_bytes));
        }
        let mut text = format!("Duplicates: {} are stored more than once\n", human_bytes(self.wasted_bytes));
        for group in &self.groups {
            let names: Vec<String> = group.tensors.iter().take(NAMES_SHOWN).map(|name| shown(name)).collect();
            let more = group.tensors.len().saturating_sub(NAMES_SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let _ = writeln!(text, "  {} each: {}{more}", human_bytes(group.bytes), names.join(", "));
        }
        text
    }
}

/// A name from a file, fit for a terminal.
pub fn shown(name: &str) -> String {
    name.chars().take(90).flat_map(char::escape_debug).collect()
}

/// Finds tensors with the same content.
///
/// # Errors
/// A file that cannot be read, or Ctrl-C.
pub fn find(model: &ModelFiles) -> Outcome<Duplicates> {
    let spinner = progress::spinner("looking for duplicates");
    let mut reader = Reader { model, files: BTreeMap::new(), read_bytes: 0 };
    let mut sampled: BTreeMap<(u64, &'static str, u64), Vec<&Tensor>> = BTreeMap::new();
    let mut alike: BTreeMap<(u64, &'static str), Vec<&Tensor>> = BTreeMap::new();
    for tensor in model.catalog.tensors() {
        alike.entry((tensor.bytes, tensor.dtype.name())).or_default().push(tensor);
    }
    for ((bytes, dtype), tensors) in alike.into_iter().filter(|(_, tensors)| tensors.len() > 1) {
        for tensor in tensors {
            doctor::check_interrupt()?;
            let hash = reader.sample(tensor)?;
            sampled.entry((bytes, dtype, hash)).or_default().push(tensor);
        }
    }
    let mut groups = Vec::new();
    for ((bytes, _, _), tensors) in sampled.into_iter().filter(|(_, tensors)| tensors.len() > 1) {
        let mut hashed: BTreeMap<u64, Vec<&Tensor>> = BTreeMap::new();
        for tensor in tensors {
            hashed.entry(reader.hash(tensor)?).or_default().push(tensor);
        }
        for same in hashed.into_values().filter(|same| same.len() > 1) {
            groups.extend(reader.confirmed(&same)?.map(|tensors| Group { tensors, bytes }));
        }
    }
    spinner.finish_and_clear();
    let wasted = |group: &Group| group.bytes.saturating_mul(group.tensors.len() as u64 - 1);
    groups.sort_by(|a, b| wasted(b).cmp(&wasted(a)).then(a.tensors.cmp(&b.tensors)));
    let wasted_bytes = groups.iter().map(wasted).fold(0, u64::saturating_add);
    Ok(Duplicates { groups, wasted_bytes, read_bytes: reader.read_bytes })
}

struct Reader<'a> {
    model: &'a ModelFiles,
    files: BTreeMap<usize, File>,
    read_bytes: u64,
}

impl Reader<'_> {
    /// Reads bytes of a tensor from an offset within it.
    fn read(&mut self, tensor: &Tensor, offset: u64, to: &mut [u8]) -> Outcome {
        let path = self.model.catalog.path(tensor.file);
        let failed = |error: std::io::Error| {
            let message =
                format!("{}: tensor '{}' cannot be read: {error}; check the disk", path.display(), shown(&tensor.name));
            stop(Kind::Io, message)
        };
        let file = match self.files.entry(tensor.file.index()) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert(File::open(path).map_err(failed)?),
        };
        file.seek(SeekFrom::Start(tensor.offset.saturating_add(offset))).map_err(failed)?;
        file.read_exact(to).map_err(failed)?;
        self.read_bytes += to.len() as u64;
        Ok(())
    }

    fn sample(&mut self, tensor: &Tensor) -> Outcome<u64> {
        let mut hasher = DefaultHasher::new();
        let length = tensor.bytes.min(SAMPLE_BYTES);
        let mut buffer = vec![0u8; length as usize];
        for sample in 0..SAMPLES {
            let offset = (u128::from(tensor.bytes - length) * u128::from(sample) / u128::from(SAMPLES - 1)) as u64;
            self.read(tensor, offset, &mut buffer)?;
            hasher.write(&buffer);
        }
        Ok(hasher.finish())
    }

    fn chunks(&mut self, tensor: &Tensor, mut each: impl FnMut(&mut Self, u64, &[u8]) -> Outcome) -> Outcome {
        let mut buffer = vec![0u8; CHUNK_BYTES.min(tensor.bytes as usize)];
        let mut offset = 0;
        while offset < tensor.bytes {
            doctor::check_interrupt()?;
            let length = (tensor.bytes - offset).min(CHUNK_BYTES as u64) as usize;
            self.read(tensor, offset, &mut buffer[..length])?;
            each(self, offset, &buffer[..length])?;
            offset += length as u64;
        }
        Ok(())
    }

    fn hash(&mut self, tensor: &Tensor) -> Outcome<u64> {
        let mut hasher = DefaultHasher::new();
        self.chunks(tensor, |_, _, bytes| {
            hasher.write(bytes);
            Ok(())
        })?;
        Ok(hasher.finish())
    }

    /// Those of tensors with equal hashes that are equal to the first, byte by byte; `None` if that is the only one.
    fn confirmed(&mut self, tensors: &[&Tensor]) -> Outcome<Option<Vec<String>>> {
        let [first, others @ ..] = tensors else { return Ok(None) };
        let mut names = vec![first.name.clone()];
        for other in others {
            let mut equal = true;
            let mut buffer = vec![0u8; CHUNK_BYTES.min(other.bytes as usize)];
            self.chunks(first, |reader, offset, bytes| {
                if equal {
                    let theirs = &mut buffer[..bytes.len()];
                    reader.read(other, offset, theirs)?;
                    equal = theirs == bytes;
                }
                Ok(())
            })?;
            if equal {
                names.push(other.name.clone());
            }
        }
        Ok((names.len() > 1).then_some(names))
    }
}
