//! A GGUF file, or all parts of one that was split, memory-mapped: what it says, and which tensor lies where.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::{Mmap, UncheckedAdvice};

use super::{
    header::{Header, MAGIC, TensorInfo, Value},
    metadata::Metadata,
};
use crate::{ModelError, StoredDType, convert::ConvertError, mistaken_file, regular_file};

/// More parts than any published file has; each costs a file handle and a mapping.
const PARTS_MAX: usize = 1024;
/// What a split file says of itself: which part it is, of how many, and of how many tensors.
const SPLIT_NUMBER: &str = "split.no";
const SPLIT_COUNT: &str = "split.count";
const SPLIT_TENSORS: &str = "split.tensors.count";

/// GGML's numbers of the formats that are read.
const FORMATS: [(u32, StoredDType); 11] = [
    (0, StoredDType::F32),
    (1, StoredDType::F16),
    (30, StoredDType::BF16),
    (8, StoredDType::Q8_0),
    (2, StoredDType::Q4_0),
    (3, StoredDType::Q4_1),
    (6, StoredDType::Q5_0),
    (7, StoredDType::Q5_1),
    (12, StoredDType::Q4K),
    (13, StoredDType::Q5K),
    (14, StoredDType::Q6K),
];
/// And of others, for errors.
const OTHER_FORMATS: [(u32, &str); 22] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// The parts of a file, open.
#[derive(Debug)]
pub(super) struct Files {
    path: PathBuf,
    maps: Vec<Mmap>,
    values: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Tensor>,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    file: usize,
    /// Invariant: within the file, and as long as dtype and shape say.
    range: Range<usize>,
    pub(super) dtype: StoredDType,
    /// Outermost first.
    pub(super) shape: Vec<usize>,
}

impl Files {
    /// Opens the file, or the first part of one that was split, and then all of them.
    pub(super) fn open(path: &Path) -> Result<Self, ConvertError> {
        let mut files =
            Self { path: path.to_owned(), maps: Vec::new(), values: BTreeMap::new(), tensors: BTreeMap::new() };
        files.values = files.add(path, None)?;
        let split = |values, key| Metadata { path, values }.size_if_any(key);
        let count = split(&files.values, SPLIT_COUNT)?.unwrap_or(1);
        let refuse = |key, found: usize, expected: String| {
            Metadata { path, values: &files.values }.refuse(key, found.to_string(), expected)
        };
        if count > PARTS_MAX {
            return Err(refuse(SPLIT_COUNT, count, format!("at most {PARTS_MAX} parts")));
        }
        let number = split(&files.values, SPLIT_NUMBER)?.unwrap_or(0);
        let tensors = split(&files.values, SPLIT_TENSORS)?;
        if number != 0 {
            return Err(refuse(SPLIT_NUMBER, number, format!("0: name the first of the {count} parts")));
        }
        for part in 1..count {
            files.add(&part_path(path, part, count)?, Some((part, count)))?;
        }
        match tensors {
            Some(expected) if count > 1 && expected != files.tensors.len() => {
                let meta = Metadata { path, values: &files.values };
                Err(meta.refuse(
                    SPLIT_TENSORS,
                    expected.to_string(),
                    format!("the {} of all parts", files.tensors.len()),
                ))
            }
            _ => Ok(files),
        }
    }

    /// Maps one more part, and returns what it says. `split`: which part it has to be, of how many.
    fn add(&mut self, path: &Path, split: Option<(usize, usize)>) -> Result<BTreeMap<String, Value>, ConvertError> {
        let failed = |source| ModelError::Read { path: path.to_owned(), source };
        let refuse = |reason| ConvertError::Gguf { file: path.to_owned(), reason };
        let file = regular_file::open(path)?;
        if file.metadata().map_err(failed)?.len() == 0 {
            return Err(ModelError::MistakenFile { path: path.to_owned(), expected: "GGUF", found: "empty" }.into());
        }
        // SAFETY: read-only. A file that is cut short while it is converted ends the process, as with any program that maps
        // files.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        if let (false, Some(found)) = (map.starts_with(MAGIC), mistaken_file::recognise(&map)) {
            return Err(ModelError::MistakenFile { path: path.to_owned(), expected: "GGUF", found }.into());
        }
        let Header { values, tensors, data_at, alignment } = Header::parse(&map).map_err(refuse)?;
        if let Some((part, count)) = split {
            let meta = Metadata { path, values: &values };
            for (key, expected) in [(SPLIT_NUMBER, part), (SPLIT_COUNT, count)] {
                let found = meta.size(key)?;
                if found != expected {
                    return Err(meta.refuse(key, found.to_string(), expected.to_string()));
                }
            }
        }
        let mut ranges = Vec::with_capacity(tensors.len());
        for info in tensors {
            let tensor = located(&info, self.maps.len(), data_at, map.len()).map_err(refuse)?;
            ranges.push((tensor.range.clone(), info.name.clone()));
            if self.tensors.insert(info.name.clone(), tensor).is_some() {
                return Err(refuse(format!("holds tensor {} twice, or another part does, too", info.name)));
            }
        }
        check_filled(ranges, data_at, map.len(), alignment).map_err(refuse)?;
        self.maps.push(map);
        Ok(values)
    }

    /// What the (first) file says.
    pub(super) fn metadata(&self) -> Metadata<'_> {
        Metadata { path: &self.path, values: &self.values }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// What a file calls one of its tensors, for messages.
    pub(super) fn name(&self, tensor: &Tensor) -> String {
        let is_it = |(_, other): &(&String, &Tensor)| (other.file, &other.range) == (tensor.file, &tensor.range);
        self.tensors.iter().find(is_it).map_or_else(String::new, |(name, _)| name.clone())
    }

    /// The bytes of a tensor, or some of them.
    pub(super) fn bytes(&self, tensor: &Tensor, of_it: Range<usize>) -> &[u8] {
        &self.maps[tensor.file][tensor.range.clone()][of_it]
    }

    /// Gives back the memory of a tensor that was copied. Only advice.
    pub(super) fn release(&self, tensor: &Tensor) {
        let (start, length) = (tensor.range.start, tensor.range.len());
        // SAFETY: the map is read-only and backed by a file, so a dropped page reads the same again.
        let _ = unsafe { self.maps[tensor.file].unchecked_advise_range(UncheckedAdvice::DontNeed, start, length) };
    }
}

impl Tensor {
    /// How many bytes it has.
    pub(super) fn bytes(&self) -> usize {
        self.range.len()
    }
}

/// Where the bytes of a tensor are in its file of `length` bytes; or what is wrong.
fn located(info: &TensorInfo, file: usize, data_at: u64, length: usize) -> Result<Tensor, String> {
    let TensorInfo { name, shape, format, at } = info;
    let Some(&(_, dtype)) = FORMATS.iter().find(|(number, _)| number == format) else {
        let other = OTHER_FORMATS.iter().find(|(number, _)| number == format);
        let found = other.map_or_else(|| format!("number {format}"), |(_, name)| (*name).to_owned());
        let expected = FORMATS.map(|(_, dtype)| dtype.to_string()).join(", ");
        return Err(format!("tensor {name} is in format {found}, expected one of {expected}"));
    };
    let (block_values, block_bytes) = dtype.block();
    let row = shape.last().copied().unwrap_or(0);
    if !row.is_multiple_of(block_values) {
        return Err(format!(
            "tensor {name} is {shape:?} in {dtype}, expected rows of whole blocks of {block_values} values"
        ));
    }
    let values = shape.iter().try_fold(1_usize, |values, &size| values.checked_mul(size));
    let bytes = values.and_then(|values| (values / block_values).checked_mul(block_bytes));
    let start = data_at.checked_add(*at).and_then(|start| usize::try_from(start).ok());
    let end = bytes.zip(start).and_then(|(bytes, start)| start.checked_add(bytes));
    match (start, end) {
        (Some(start), Some(end)) if end <= length => {
            Ok(Tensor { file, range: start..end, dtype, shape: shape.clone() })
        }
        _ => Err(format!(
            "tensor {name} ({shape:?} in {dtype}, from byte {at} of the data on) does not lie within the file's {length} bytes: it \
             is cut short"
        )),
    }
}

/// Refuses tensors that lie over each other, and data that is nobody's, as where a header names one too few: only what fills the
/// file up to the next multiple of its alignment may be between.
fn check_filled(
    mut ranges: Vec<(Range<usize>, String)>,
    data_at: u64,
    length: usize,
    alignment: u64,
) -> Result<(), String> {
    ranges.sort_unstable_by_key(|(range, _)| range.start);
    let mut end = data_at as usize;
    let ends = std::iter::once((length..length, "the end of the file".to_owned()));
    for (range, name) in ranges.into_iter().chain(ends) {
        match range.start.checked_sub(end) {
            None if range.is_empty() => {} // Without tensors nothing need follow a header.
            None => return Err(format!("tensor {name} begins within another one, at byte {}", range.start)),
            Some(between) if between as u64 >= alignment => {
                return Err(format!("holds {between} bytes before {name} that are no tensor's"));
            }
            Some(_) => {}
        }
        end = range.end;
    }
    Ok(())
}

/// The path of a part: `model-00001-of-00003.gguf` is the first of three.
fn part_path(first: &Path, part: usize, count: usize) -> Result<PathBuf, ConvertError> {
    let ending = |part: usize| format!("-{:05}-of-{count:05}.gguf", part + 1);
    let name = first.file_name().and_then(|name| name.to_str());
    match name.and_then(|name| name.strip_suffix(&ending(0))) {
        Some(begins) => Ok(first.with_file_name(format!("{begins}{}", ending(part)))),
        None => Err(ConvertError::Gguf {
            file: first.to_owned(),
            reason: format!("says that it is the first of {count} parts, expected a name that ends with {}", ending(0)),
        }),
    }
}
