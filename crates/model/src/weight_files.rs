//! The safetensors files of a model directory, memory-mapped: which tensor lies where. Headers are read
//! and checked when a model is opened, weights only when they are used. Called by [`crate::Checkpoint`].

use std::{
    collections::HashMap,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use memmap2::{Advice, Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensorError, SafeTensors, tensor::TensorInfo};
use serde::Deserialize;

use crate::{
    ModelError, StoredDType, bounded_file, manifest::is_plain_file_name, mistaken_file, regular_file,
    safetensors_dtype, shards::blocks_key,
};

/// The one file of a model that is not sharded.
const SINGLE: &str = "model.safetensors";
/// Names the shards of one that is.
const INDEX: &str = "model.safetensors.index.json";
/// The longest index that is read: 100 bytes a tensor make this half a million tensors.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// More shards than any published model has; each costs a file handle and a mapping.
const SHARDS_MAX: usize = 4096;

/// All tensors of a model, by name.
#[derive(Debug)]
pub(crate) struct WeightFiles {
    files: Vec<MappedFile>,
    tensors: HashMap<String, StoredTensor>,
}

/// A file, to be read through its map or by copying out of it.
#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    file: File,
    map: Mmap,
}

/// Where a tensor lies.
#[derive(Debug)]
pub(crate) struct StoredTensor {
    file: usize,
    /// Invariant: within the file's map, and as long as `weights`, or else `dtype`, and shape say.
    range: Range<usize>,
    /// As the header says.
    pub(crate) dtype: Dtype,
    /// What its values are stored as; `None` where they are no weights.
    pub(crate) weights: Option<StoredDType>,
    /// In values.
    pub(crate) shape: Vec<usize>,
    /// Whether its bytes were compared with the manifest.
    pub(crate) verified: AtomicBool,
}

impl StoredTensor {
    pub(crate) fn bytes(&self) -> usize {
        self.range.len()
    }
}

impl WeightFiles {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    pub(crate) fn open(dir: &Path) -> Result<Self, ModelError> {
        let mut files = Self { files: Vec::new(), tensors: HashMap::new() };
        if dir.join(SINGLE).exists() {
            files.tensors = files.map(&dir.join(SINGLE))?;
        } else if dir.join(INDEX).exists() {
            files.open_shards(dir, &dir.join(INDEX))?;
        } else {
            let converts =
                ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|name| dir.join(name).exists());
            let hint = if converts { "; `sida convert` makes them from pytorch_model.bin" } else { "" };
            return Err(ModelError::NoWeights { dir: dir.to_owned(), hint });
        }
        Ok(files)
    }

    fn open_shards(&mut self, dir: &Path, index: &Path) -> Result<(), ModelError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: HashMap<String, String>,
        }
        let Index { weight_map } = bounded_file::read_json(index, INDEX_BYTES_MAX)?;
        let mut shards: HashMap<String, HashMap<String, StoredTensor>> = HashMap::new();
        for (tensor, shard) in weight_map {
            if !is_plain_file_name(&shard) {
                return Err(ModelError::ShardName { index: index.to_owned(), shard });
            }
            if !shards.contains_key(&shard) {
                if shards.len() == SHARDS_MAX {
                    let reason = format!("names more than {SHARDS_MAX} shards");
                    return Err(ModelError::Header { file: index.to_owned(), reason });
                }
                let tensors = self.map(&dir.join(&shard))?;
                shards.insert(shard.clone(), tensors);
            }
            match shards.get_mut(&shard).and_then(|tensors| tensors.remove(&tensor)) {
                Some(stored) => self.tensors.insert(tensor, stored),
                None => return Err(ModelError::ShardTensor { index: index.to_owned(), tensor, shard }),
            };
        }
        Ok(())
    }

    /// Maps one file and reads its header.
    fn map(&mut self, path: &Path) -> Result<HashMap<String, StoredTensor>, ModelError> {
        let failed = |source| ModelError::Read { path: path.to_owned(), source };
        let file = regular_file::open(path)?;
        if file.metadata().map_err(failed)?.len() == 0 {
            // Nothing cannot be mapped.
            return Err(damaged(path, b"", &SafeTensorError::HeaderTooSmall));
        }
        // SAFETY: read-only. The one who deploys must replace a model's directory, not change files in it: a file
        // cut short under a running process ends it (SIGBUS), as with any program that maps files.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| damaged(path, &map, &error))?;
        let data = 8 + header; // the header's length takes 8 bytes
        let mut tensors = HashMap::new();
        for (name, info) in metadata.tensors() {
            let blocks = metadata.metadata().as_ref().and_then(|metadata| metadata.get(&blocks_key(&name)));
            let (weights, shape) = match blocks {
                Some(format) => {
                    let of_blocks = of_blocks(format, info);
                    let (blocks, shape) = of_blocks.map_err(|reason| ModelError::Header {
                        file: path.to_owned(),
                        reason: format!("tensor {name} {reason}"),
                    })?;
                    (Some(blocks), shape)
                }
                None => (safetensors_dtype::stored(info.dtype), info.shape.clone()),
            };
            let range = data + info.data_offsets.0..data + info.data_offsets.1;
            let (file, verified) = (self.files.len(), AtomicBool::new(false));
            tensors.insert(name, StoredTensor { file, range, dtype: info.dtype, weights, shape, verified });
        }
        self.files.push(MappedFile { path: path.to_owned(), file, map });
        Ok(tensors)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The bytes of one tensor; reading them may read the disk.
    pub(crate) fn bytes(&self, tensor: &StoredTensor) -> &[u8] {
        &self.files[tensor.file].map[tensor.range.clone()]
    }

    /// Copies `into.len()` bytes of a tensor from `at` on. Not through the map: that costs a page fault every 64 KB and
    /// leaves pages in this process (measured: 3.4 GB/s, against 9 to 16 by reading).
    pub(crate) fn read(&self, tensor: &StoredTensor, at: usize, into: &mut [u8]) -> Result<(), ModelError> {
        let MappedFile { path, file, .. } = &self.files[tensor.file];
        let failed = |source| ModelError::Read { path: path.clone(), source };
        file.read_exact_at(into, (tensor.range.start + at) as u64).map_err(failed)
    }

    /// Asks the kernel to read `bytes` of a tensor from `at` on ahead. Only advice: a failure costs time.
    pub(crate) fn will_need(&self, tensor: &StoredTensor, at: usize, bytes: usize) {
        let _ = self.files[tensor.file].map.advise_range(Advice::WillNeed, tensor.range.start + at, bytes);
    }

    /// Gives back the memory of a tensor that was copied out; the page cache may keep it. Only advice.
    pub(crate) fn release(&self, tensor: &StoredTensor) {
        // SAFETY: the map is read-only and backed by a file, so a dropped page reads the same again.
        let _ = unsafe {
            self.files[tensor.file].map.unchecked_advise_range(
                UncheckedAdvice::DontNeed,
                tensor.range.start,
                tensor.range.len(),
            )
        };
    }
}

/// The format and the shape, in values, of a tensor that a header says is stored in blocks; or what is wrong with it.
fn of_blocks(format: &str, info: &TensorInfo) -> Result<(StoredDType, Vec<usize>), String> {
    let all = StoredDType::BLOCKS;
    let Some(blocks) = all.into_iter().find(|blocks| blocks.to_string() == format) else {
        let known = all.map(|blocks| blocks.to_string()).join(" or ");
        return Err(format!("is in blocks of {format:?}, expected {known}"));
    };
    let (_, block_bytes) = blocks.block();
    match info.shape.split_last() {
        Some((&row, outer))
            if info.dtype == safetensors_dtype::in_safetensors(blocks) && row.is_multiple_of(block_bytes) =>
        {
            Ok((blocks, [outer, &[blocks.values(row)]].concat()))
        }
        _ => {
            let (dtype, shape) = (info.dtype, &info.shape);
            Err(format!(
                "is {dtype:?} {shape:?}, expected U8 and rows of {block_bytes} bytes for each block of {blocks}"
            ))
        }
    }
}

/// A header that safetensors refuses, with what a person needs to see the cause.
pub(crate) fn damaged(path: &Path, bytes: &[u8], error: &SafeTensorError) -> ModelError {
    if let Some(found) = mistaken_file::recognise(bytes) {
        return ModelError::MistakenFile { path: path.to_owned(), expected: "safetensors", found };
    }
    let claimed = bytes.first_chunk().map(|&length| u64::from_le_bytes(length));
    let reason = match (error, claimed) {
        (SafeTensorError::HeaderTooLarge, Some(claimed)) => {
            format!("claims a header of {claimed} bytes, more than the 100 MB allowed")
        }
        (SafeTensorError::InvalidHeaderLength, Some(claimed)) => {
            format!("claims a header of {claimed} bytes, but the file has {}", bytes.len())
        }
        (SafeTensorError::MetadataIncompleteBuffer, _) => {
            format!("its tensors do not fill its {} bytes: truncated, or with data that no tensor owns", bytes.len())
        }
        _ => error.to_string(),
    };
    ModelError::Header { file: PathBuf::from(path), reason }
}
