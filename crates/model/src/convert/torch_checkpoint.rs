//! A checkpoint of `pytorch_model.bin` files, open: which of them holds which tensor, and which tensors are copies of others.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    ConvertError, INDEX, SINGLE,
    tensor_names::{self, Renamed},
    torch_file::TorchFile,
};
use crate::{ModelConfig, bounded_file, manifest::is_plain_file_name, names::TensorNames, shards::TensorSpec};

/// A longer index is refused.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// The files of a checkpoint, open.
pub(super) struct TorchCheckpoint {
    dir: PathBuf,
    files: Vec<TorchFile>,
    /// For each tensor by its stored name, which of `files` holds it.
    holder: BTreeMap<String, usize>,
    pub(super) names: Renamed,
    /// Tensors that hold no weights, and what they hold.
    pub(super) others: BTreeMap<String, &'static str>,
}

/// `pytorch_model.bin.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl TorchCheckpoint {
    pub(super) fn open(dir: &Path, tensor_names: TensorNames) -> Result<Self, ConvertError> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            let file = TorchFile::open(&single)?;
            let names: Vec<_> = file.specs().map(|spec| spec.name.as_str()).collect();
            let others = file.others().map(|(name, _)| name);
            let holder = names.into_iter().chain(others).map(|name| (name.to_owned(), 0)).collect();
            return Self::of(dir, vec![file], holder, tensor_names);
        }
        if index.exists() {
            return Self::open_shards(dir, &index, tensor_names);
        }
        let is_safetensors = |name| dir.join(name).exists();
        let hint = if ["model.safetensors", "model.safetensors.index.json"].into_iter().any(is_safetensors) {
            ": it is safetensors already and needs no conversion but to fewer bits (--experts, --dense)"
        } else {
            ""
        };
        Err(ConvertError::NoPickle { dir: dir.to_owned(), hint })
    }

    fn open_shards(dir: &Path, path: &Path, tensor_names: TensorNames) -> Result<Self, ConvertError> {
        let index: Index = bounded_file::read_json(path, INDEX_BYTES_MAX)?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        let mut files = Vec::new();
        for &shard in &names {
            if !is_plain_file_name(shard) {
                return Err(ConvertError::ShardName { index: path.to_owned(), shard: shard.clone() });
            }
            files.push(TorchFile::open(&dir.join(shard))?);
        }
        let mut holder = BTreeMap::new();
        for (tensor, shard) in &index.weight_map {
            let file = names.iter().position(|&name| name == shard).expect("every shard was opened");
            if !files[file].holds(tensor) {
                let (index, tensor, shard) = (path.to_owned(), tensor.clone(), shard.clone());
                return Err(ConvertError::ShardTensor { index, tensor, shard });
            }
            holder.insert(tensor.clone(), file);
        }
        Self::of(dir, files, holder, tensor_names)
    }

    fn of(
        dir: &Path,
        files: Vec<TorchFile>,
        holder: BTreeMap<String, usize>,
        names: TensorNames,
    ) -> Result<Self, ConvertError> {
        let names = tensor_names::renamed(holder.keys(), names)?;
        let kinds: BTreeMap<_, _> = files.iter().flat_map(TorchFile::others).collect();
        let others = names.stored.iter().filter_map(|(name, stored)| Some((name.clone(), *kinds.get(&**stored)?)));
        let others = others.collect();
        Ok(Self { dir: dir.to_owned(), files, holder, names, others })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// What to write, by name, and the tied copies that are not written. A tensor that config.json ties to another one but
    /// whose values differ is none.
    pub(super) fn untied(&self, config: &ModelConfig) -> (Vec<TensorSpec>, Vec<String>) {
        let mut names = if config.tie_word_embeddings { config.names.tied().to_vec() } else { Vec::new() };
        names.dedup();
        let held: Vec<String> = names.into_iter().filter(|name| self.names.stored.contains_key(name)).collect();
        let copies = held.iter().skip(1).filter(|copy| self.is_copy(copy, &held[0]));
        let mut tied: Vec<String> = copies.cloned().collect();
        tied.sort();
        let is_kept = |name: &String| !self.others.contains_key(name) && !tied.contains(name);
        let kept = self.names.stored.iter().filter(|(name, _)| is_kept(name));
        let spec = |(name, stored): (&String, &String)| TensorSpec {
            name: name.clone(),
            ..self.files[self.holder[stored]].spec(stored).clone()
        };
        let specs = kept.map(spec).collect();
        (specs, tied)
    }

    /// A tensor as it is stored, by the name that it is loaded by.
    pub(super) fn spec(&self, name: &str) -> &TensorSpec {
        let stored = &self.names.stored[name];
        self.files[self.holder[stored]].spec(stored)
    }

    /// Writes its data.
    pub(super) fn write(&self, name: &str, out: &mut dyn Write) -> io::Result<()> {
        let stored = &self.names.stored[name];
        self.files[self.holder[stored]].write(stored, out)
    }

    fn is_copy(&self, copy: &str, of: &str) -> bool {
        let [copy, of] = [copy, of].map(|name| &self.names.stored[name]);
        let (one, other) = (&self.files[self.holder[copy]], &self.files[self.holder[of]]);
        one.is_copy(copy, other, of)
    }
}
