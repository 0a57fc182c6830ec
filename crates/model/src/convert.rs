//! `pytorch_model.bin` to safetensors, once, with a manifest: the only code that reads pickle. Called by
//! `sida convert`.
//!
//! In reading order: `pickle` (what a state dictionary says, without running it), `torch_file` (where a
//! tensor's bytes are).

mod pickle;
mod torch_file;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use thiserror::Error;

pub use pickle::PickleError;

use self::torch_file::TorchFile;
use crate::{
    ModelConfig, ModelError, bounded_file,
    fresh_directory::FreshDirectory,
    manifest::{Manifest, is_plain_file_name},
    names,
    shards::{self, TensorSpec},
};

const SINGLE: &str = "pytorch_model.bin";
const INDEX: &str = "pytorch_model.bin.index.json";
/// A longer index is refused.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// What is copied beside the weights, where it exists.
const COPIED: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
];
/// A longer file is not copied but refused: none of them holds weights.
const COPIED_BYTES_MAX: u64 = 64 << 20;

/// Why a checkpoint cannot be converted.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum ConvertError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{} holds neither {SINGLE} nor {INDEX}{hint}", dir.display())]
    NoPickle { dir: PathBuf, hint: &'static str },
    #[error("{}: {reason}", file.display())]
    Archive { file: PathBuf, reason: String },
    #[error("{}: {source}", file.display())]
    Pickle { file: PathBuf, source: PickleError },
    #[error("{}: shard name {shard:?} is not a plain file name", index.display())]
    ShardName { index: PathBuf, shard: String },
    #[error("{}: tensor {tensor} should be in {shard}, which does not hold it", index.display())]
    ShardTensor { index: PathBuf, tensor: String, shard: String },
}

/// What a conversion wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// Tensors left out because another one holds the same weights.
    pub tied: Vec<String>,
}

/// Converts `source` (config.json, and pytorch_model.bin or its shards with their index) into `out`, which
/// must not exist or be empty: safetensors of at most 4 GB each, the config and tokenizer files, and a
/// manifest. Values keep their dtype; copies of the embedding are dropped as transformers does when it ties
/// them. On failure nothing is left at `out`. Reports (bytes written, bytes total).
pub fn convert(source: &Path, out: &Path, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Converted, ConvertError> {
    let config = ModelConfig::open(source)?;
    let input = Input::open(source)?;
    let (specs, tied) = input.untied(config.tie_word_embeddings);
    let directory = FreshDirectory::create(out)?;
    write(&input, source, directory.path(), &specs, on_progress)?;
    directory.finish()?;
    Ok(Converted { tensors: specs.len(), bytes: specs.iter().map(TensorSpec::bytes).sum(), tied })
}

/// Writes a manifest into a directory that holds safetensors already. Reports (bytes hashed, bytes total).
pub fn write_manifest(dir: &Path, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Manifest, ModelError> {
    let manifest = Manifest::of_directory(dir, on_progress)?;
    manifest.write()?;
    Ok(manifest)
}

fn write(
    input: &Input,
    source: &Path,
    out: &Path,
    specs: &[TensorSpec],
    on_progress: &mut dyn FnMut(u64, u64),
) -> Result<(), ConvertError> {
    for name in COPIED {
        let path = source.join(name);
        if path.exists() {
            let content = bounded_file::read(&path, COPIED_BYTES_MAX)?;
            let path = out.join(name);
            fs::write(&path, content).map_err(|source| ModelError::Write { path, source })?;
        }
    }
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let mut done = 0;
    shards::write(out, specs, shards::SHARD_BYTES_MAX, &mut |spec, file| {
        input.files[input.holder[&spec.name]].write(&spec.name, file)?;
        done += spec.bytes();
        on_progress(done, total);
        Ok(())
    })?;
    write_manifest(out, &mut |_, _| ())?;
    Ok(())
}

/// The files of a checkpoint, open.
struct Input {
    files: Vec<TorchFile>,
    /// For each tensor, which of `files` holds it.
    holder: BTreeMap<String, usize>,
}

/// `pytorch_model.bin.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Input {
    fn open(dir: &Path) -> Result<Self, ConvertError> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            let file = TorchFile::open(&single)?;
            let holder = file.specs().map(|spec| (spec.name.clone(), 0)).collect();
            return Ok(Self { files: vec![file], holder });
        }
        if index.exists() {
            return Self::open_shards(dir, &index);
        }
        let is_safetensors = |name| dir.join(name).exists();
        let hint = if ["model.safetensors", "model.safetensors.index.json"].into_iter().any(is_safetensors) {
            ": it is safetensors already and needs no conversion"
        } else {
            ""
        };
        Err(ConvertError::NoPickle { dir: dir.to_owned(), hint })
    }

    fn open_shards(dir: &Path, path: &Path) -> Result<Self, ConvertError> {
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
        Ok(Self { files, holder })
    }

    /// What to write, by name, and the tied copies that are not written. A tensor that config.json ties to another one but
    /// whose values differ is none.
    fn untied(&self, tie_word_embeddings: bool) -> (Vec<TensorSpec>, Vec<String>) {
        let names = if tie_word_embeddings { names::tied().to_vec() } else { Vec::new() };
        let held: Vec<String> = names.into_iter().filter(|name| self.holder.contains_key(name)).collect();
        let copies = held.iter().skip(1).filter(|copy| self.is_copy(copy, &held[0]));
        let mut tied: Vec<String> = copies.cloned().collect();
        tied.sort();
        let mut specs = Vec::new();
        for (file, torch_file) in self.files.iter().enumerate() {
            let held = torch_file.specs().filter(|spec| self.holder.get(&spec.name) == Some(&file));
            specs.extend(held.filter(|spec| !tied.contains(&spec.name)).cloned());
        }
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        (specs, tied)
    }

    fn is_copy(&self, copy: &str, of: &str) -> bool {
        let (one, other) = (&self.files[self.holder[copy]], &self.files[self.holder[of]]);
        one.is_copy(copy, other, of)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;
    use crate::StoredDType;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
    }

    /// Every tensor of a converted directory as float32, by name.
    fn values(dir: &Path) -> BTreeMap<String, (String, Vec<f32>)> {
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let widen = |view: safetensors::tensor::TensorView<'_>| {
            let dtype = StoredDType::from_safetensors(view.dtype()).unwrap();
            (format!("{dtype}{:?}", view.shape()), dtype.widen(view.data()))
        };
        file.tensors().into_iter().map(|(name, view)| (name, widen(view))).collect()
    }

    /// Values of a PyTorch checkpoint would be lost, moved or changed on their way.
    #[test]
    fn keeps_every_value_of_single_and_sharded_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["torch-single", "torch-sharded"] {
            let out = dir.path().join(name);
            let mut last = (0, 0);
            let converted = convert(&fixture(name), &out, &mut |done, total| last = (done, total)).unwrap();
            assert_eq!(
                converted.tied,
                ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"]
            );
            assert_eq!(last, (converted.bytes, converted.bytes));
            let values = values(&out);
            assert_eq!(values.len(), converted.tensors);
            for (n, (name, (_, values))) in values.iter().enumerate() {
                for (i, &value) in values.iter().enumerate() {
                    assert_eq!(value, ((7 * i + n) % 64) as f32 - 32.0, "{name} value {i}");
                }
            }
            assert_eq!(values["encoder.block.0.layer.1.mlp.wi.weight"].0, "BF16[16, 8]");
            assert_eq!(values["encoder.block.1.layer.1.mlp.router.classifier.weight"].0, "F32[2, 8]");
            assert_eq!(values["encoder.final_layer_norm.weight"].0, "F16[8]");
            let manifest = Manifest::read(&out).unwrap().expect("a manifest is written");
            manifest.verify_directory(&mut |_, _| ()).unwrap();
        }
    }

    /// Weights of a model would be taken for copies of others, and lost.
    #[test]
    fn keeps_a_tied_tensor_that_differs() {
        let dir = tempfile::tempdir().unwrap();
        let (source, out) = (dir.path().join("source"), dir.path().join("out"));
        fs::create_dir(&source).unwrap();
        for entry in fs::read_dir(fixture("torch-sharded")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, source.join(path.file_name().unwrap())).unwrap();
        }
        convert(&source, &out, &mut |_, _| ()).unwrap();
        let converted = fs::read(out.join("model.safetensors")).unwrap();
        let shared = SafeTensors::deserialize(&converted).unwrap().tensor("shared.weight").unwrap().data().to_vec();
        // Another file, which has all tensors once more, is where one of the copies comes from.
        let other = "pytorch_model-00003-of-00003.bin";
        let mut bytes = fs::read(fixture("torch-single").join(SINGLE)).unwrap();
        let at = bytes.windows(shared.len()).position(|window| window == shared).unwrap();
        bytes[at] ^= 1;
        fs::write(source.join(other), bytes).unwrap();
        let mut index: serde_json::Value = serde_json::from_slice(&fs::read(source.join(INDEX)).unwrap()).unwrap();
        index["weight_map"]["lm_head.weight"] = other.into();
        fs::write(source.join(INDEX), index.to_string()).unwrap();
        fs::remove_dir_all(&out).unwrap();
        let tied = convert(&source, &out, &mut |_, _| ()).unwrap().tied;
        assert_eq!(tied, ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"]);
        let values = values(&out);
        assert_ne!(values["lm_head.weight"], values["shared.weight"]);
    }

    /// Somebody's files would be overwritten.
    #[test]
    fn refuses_an_output_that_holds_something() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "").unwrap();
        let error = convert(&fixture("torch-single"), dir.path(), &mut |_, _| ()).unwrap_err();
        assert!(matches!(error, ConvertError::Model(ModelError::NotEmpty { .. })), "{error}");
    }

    /// A hostile or broken checkpoint would panic, be half converted, or leave litter behind.
    #[test]
    fn refuses_broken_checkpoints_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (source, out) = (dir.path().join("source"), dir.path().join("out"));
        fs::create_dir(&source).unwrap();
        fs::copy(fixture("torch-single/config.json"), source.join("config.json")).unwrap();
        let whole = fs::read(fixture("torch-single").join(SINGLE)).unwrap();
        let refused = |bytes: &[u8]| {
            fs::write(source.join(SINGLE), bytes).unwrap();
            convert(&source, &out, &mut |_, _| ()).unwrap_err().to_string()
        };
        for len in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
            assert!(refused(&whole[..len]).contains(SINGLE));
        }
        let replaced = |from: &str, to: &str| {
            assert_eq!(from.len(), to.len());
            let mut bytes = whole.clone();
            let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            bytes
        };
        let attack = refused(&replaced("torch._utils\n_rebuild_tensor_v2", "posixxxxxxxx\nsystemmmmmmmmmmmmm"));
        assert!(attack.contains("systemmmmmmmmmmmmm") && attack.contains("attack"), "{attack}");
        assert!(refused(&replaced("BFloat16Storage", "Complex6Storage")).contains("Complex6Storage"));
        assert!(!out.exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the source is left");
    }

    /// An index would lead out of the model's directory, or a missing tensor would go unnoticed.
    #[test]
    fn refuses_hostile_indexes() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        for entry in fs::read_dir(fixture("torch-sharded")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, source.join(path.file_name().unwrap())).unwrap();
        }
        for (shard, expected) in [
            ("../pytorch_model-00001-of-00002.bin", "not a plain file name"),
            ("pytorch_model-00001-of-00002.bin", "does not hold it"),
        ] {
            let index = format!(r#"{{"weight_map": {{"no.such.tensor": "{shard}"}}}}"#);
            fs::write(source.join(INDEX), index).unwrap();
            let error = convert(&source, &dir.path().join("out"), &mut |_, _| ()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
