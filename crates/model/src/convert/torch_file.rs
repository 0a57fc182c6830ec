//! One `pytorch_model.bin`: a zip archive of stored (never compressed) files, `*/data.pkl` with what the
//! tensors are and `*/data/KEY` with their bytes. It is mapped, so a tensor's bytes are copied once, from
//! the page cache to the output.

use std::{
    collections::HashMap,
    io::{self, Cursor, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use zip::{CompressionMethod, ZipArchive};

use super::{
    ConvertError,
    pickle::{self, PickledTensor, Values},
};
use crate::{ModelError, StoredDType, mistaken_file, regular_file, shards::TensorSpec};

/// A longer `data.pkl` is refused; 300 bytes a tensor make this 50,000 tensors.
const PICKLE_BYTES_MAX: usize = 16 << 20;
/// How a zip archive begins.
const ZIP: &[u8] = b"PK\x03\x04";
/// Tensors may share bytes (tied weights do), but not blow a file up beyond this factor.
const SHARING_MAX: u64 = 4;

/// An open checkpoint file.
pub(super) struct TorchFile {
    map: Mmap,
    tensors: HashMap<String, Source>,
    /// Tensors that hold no weights, and what they hold.
    others: HashMap<String, &'static str>,
}

/// Where a tensor's values are.
struct Source {
    spec: TensorSpec,
    /// Within the map: its storage from the tensor's first value on.
    bytes: Range<usize>,
    /// In elements, as long as the shape.
    stride: Vec<usize>,
}

impl TorchFile {
    /// Maps the file and checks that every tensor lies within its storage.
    pub(super) fn open(path: &Path) -> Result<Self, ConvertError> {
        let failed = |source| ModelError::Read { path: path.to_owned(), source };
        let file = regular_file::open(path)?;
        let mistaken =
            |found| ModelError::MistakenFile { path: path.to_owned(), expected: "a PyTorch checkpoint", found };
        if file.metadata().map_err(failed)?.len() == 0 {
            // Nothing cannot be mapped.
            return Err(mistaken("empty").into());
        }
        // SAFETY: the file is not changed while it is converted, as for all model files.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        let archive = Archive::open(path, &map).map_err(|error| match mistaken_file::recognise(&map) {
            // A zip archive is what it should be, so it was refused for something else.
            Some(found) if !map.starts_with(ZIP) => mistaken(found).into(),
            _ => error,
        })?;
        let pickled = archive.pickle(&map)?;
        let pickled =
            pickle::tensors(pickled).map_err(|source| ConvertError::Pickle { file: path.to_owned(), source })?;
        let (mut tensors, mut others) = (HashMap::new(), HashMap::new());
        let mut total = 0u64;
        for tensor in pickled {
            let dtype = match tensor.storage.values {
                Values::Weights(dtype) => dtype,
                Values::Other(values) => {
                    others.insert(tensor.name, values);
                    continue;
                }
            };
            let source = archive.locate(&tensor, dtype)?;
            total = total.saturating_add(source.spec.bytes());
            tensors.insert(tensor.name, source);
        }
        if total > SHARING_MAX * map.len() as u64 {
            return Err(archive.refuse(format!("{} bytes of file claim {total} bytes of tensors", map.len())));
        }
        Ok(Self { map, tensors, others })
    }

    /// The tensors it holds, in no order.
    pub(super) fn specs(&self) -> impl Iterator<Item = &TensorSpec> {
        self.tensors.values().map(|source| &source.spec)
    }

    /// What a tensor is. Panics if the file holds no weights of this name.
    pub(super) fn spec(&self, tensor: &str) -> &TensorSpec {
        &self.tensors[tensor].spec
    }

    /// The tensors in it that hold no weights, and what they hold, in no order.
    pub(super) fn others(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.others.iter().map(|(name, &values)| (name.as_str(), values))
    }

    /// Whether it holds a tensor.
    pub(super) fn holds(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor) || self.others.contains_key(tensor)
    }

    /// Whether a tensor has the values of one of `other`. Panics if the files do not hold them.
    pub(super) fn is_copy(&self, copy: &str, other: &Self, of: &str) -> bool {
        let (one, two) = (&self.tensors[copy], &other.tensors[of]);
        let is_alike = (one.spec.dtype, &one.spec.shape) == (two.spec.dtype, &two.spec.shape);
        let is_same_view = std::ptr::eq(self, other) && (&one.bytes, &one.stride) == (&two.bytes, &two.stride);
        is_alike && (is_same_view || self.values(copy) == other.values(of))
    }

    fn values(&self, tensor: &str) -> Vec<u8> {
        let mut values = Vec::new();
        self.write(tensor, &mut values).expect("memory takes what is written");
        values
    }

    /// Writes a tensor's values row-major. Panics if the file does not hold it.
    pub(super) fn write(&self, tensor: &str, out: &mut dyn Write) -> io::Result<()> {
        let Source { spec, bytes, stride } = &self.tensors[tensor];
        let size = spec.dtype.bytes(1);
        let storage = &self.map[bytes.clone()];
        if is_contiguous(&spec.shape, stride) {
            return out.write_all(&storage[..spec.bytes() as usize]);
        }
        // A view, such as a transposed matrix: value by value.
        let mut index = vec![0usize; spec.shape.len()];
        for _ in 0..spec.bytes() / size as u64 {
            let at: usize = index.iter().zip(stride).map(|(i, stride)| i * stride).sum();
            out.write_all(&storage[at * size..][..size])?;
            for (i, &extent) in index.iter_mut().zip(&spec.shape).rev() {
                *i += 1;
                if *i < extent {
                    break;
                }
                *i = 0;
            }
        }
        Ok(())
    }
}

/// Where each stored file of the archive lies.
struct Archive<'a> {
    path: &'a Path,
    entries: HashMap<String, Range<usize>>,
    /// What precedes `data.pkl` in names.
    root: String,
}

impl<'a> Archive<'a> {
    fn open(path: &'a Path, map: &[u8]) -> Result<Self, ConvertError> {
        let refuse = |reason: String| ConvertError::Archive { file: path.to_owned(), reason };
        let unreadable = |error| {
            refuse(format!("not a whole zip archive ({error}); PyTorch before 1.6 wrote another format, save it anew"))
        };
        let mut zip = ZipArchive::new(Cursor::new(map)).map_err(unreadable)?;
        let mut entries = HashMap::new();
        let mut root = None;
        for index in 0..zip.len() {
            let entry = zip.by_index_raw(index).map_err(unreadable)?;
            let name = entry.name().map_err(unreadable)?.into_owned();
            if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
                return Err(refuse(format!("{name:?} is compressed or encrypted, which PyTorch never does")));
            }
            let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
            let len = usize::try_from(entry.size()).ok();
            let range = start.zip(len).and_then(|(start, len)| Some(start..start.checked_add(len)?));
            let range = range.filter(|range| range.end <= map.len());
            let range = range.ok_or_else(|| refuse(format!("{name:?} reaches beyond the end of the file")))?;
            if let Some(prefix) = name.strip_suffix("data.pkl")
                && root.replace(prefix.to_owned()).is_some()
            {
                return Err(refuse("more than one data.pkl".to_owned()));
            }
            entries.insert(name, range);
        }
        let root = root.ok_or_else(|| refuse("no data.pkl: not a PyTorch checkpoint".to_owned()))?;
        let archive = Self { path, entries, root };
        match archive.entry("byteorder").map(|range| &map[range]) {
            None | Some(b"little") => Ok(archive),
            Some(_) => Err(archive.refuse("values are not little-endian".to_owned())),
        }
    }

    fn entry(&self, name: &str) -> Option<Range<usize>> {
        self.entries.get(&format!("{}{name}", self.root)).cloned()
    }

    fn pickle<'m>(&self, map: &'m [u8]) -> Result<&'m [u8], ConvertError> {
        let range = self.entry("data.pkl").ok_or_else(|| self.refuse("no data.pkl".to_owned()))?;
        if range.len() > PICKLE_BYTES_MAX {
            let bytes = range.len();
            return Err(self.refuse(format!("data.pkl has {bytes} bytes, more than the {PICKLE_BYTES_MAX} allowed")));
        }
        Ok(&map[range])
    }

    /// Checks what the pickle claims of a tensor against its storage's real size.
    fn locate(&self, tensor: &PickledTensor, dtype: StoredDType) -> Result<Source, ConvertError> {
        let refuse = |reason| self.refuse(format!("tensor {}: {reason}", tensor.name));
        let storage = self.entry(&format!("data/{}", tensor.storage.key));
        let storage = storage.ok_or_else(|| refuse(format!("its storage {:?} is missing", tensor.storage.key)))?;
        let size = dtype.bytes(1);
        let extents =
            |extents: &[u64]| extents.iter().map(|&extent| usize::try_from(extent).ok()).collect::<Option<Vec<_>>>();
        let spans = (extents(&tensor.shape).zip(extents(&tensor.stride)))
            .filter(|(shape, stride)| shape.len() == stride.len())
            .and_then(|(shape, stride)| {
                let values = values_spanned(&shape, &stride)?;
                let start = usize::try_from(tensor.offset).ok()?.checked_mul(size)?;
                let end = start.checked_add(values.checked_mul(size)?)?;
                (end <= storage.len()).then_some((shape, stride, start))
            });
        let Some((shape, stride, start)) = spans else {
            let (shape, stride, offset, len) = (&tensor.shape, &tensor.stride, tensor.offset, storage.len());
            return Err(refuse(format!(
                "shape {shape:?} with strides {stride:?} from value {offset} on is outside its storage of {len} bytes"
            )));
        };
        let spec = TensorSpec { name: tensor.name.clone(), dtype, shape };
        Ok(Source { spec, bytes: storage.start + start..storage.end, stride })
    }

    fn refuse(&self, reason: String) -> ConvertError {
        ConvertError::Archive { file: PathBuf::from(self.path), reason }
    }
}

/// How many values lie between a tensor's first and last, both included; 0 for an empty one. `None` when
/// that, or the number of values, is beyond all bounds.
fn values_spanned(shape: &[usize], stride: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent))?.checked_mul(8)?;
    if shape.contains(&0) {
        return Some(0);
    }
    shape
        .iter()
        .zip(stride)
        .try_fold(1usize, |last, (&extent, &stride)| last.checked_add((extent - 1).checked_mul(stride)?))
}

/// Whether values follow one another row-major.
fn is_contiguous(shape: &[usize], stride: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(stride).rev().all(|(&extent, &stride)| {
        let follows = extent == 1 || stride == expected;
        expected *= extent;
        follows
    })
}
