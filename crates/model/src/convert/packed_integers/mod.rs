//! Checkpoints of safetensors whose matrices are integers of 4 or 8 bits, several in a word, with a scale for so many neighbours of
//! a row: GPTQ and compressed-tensors. Such a value is what a value of a block is, its integer times a binary16, so matrices become
//! blocks, groups repeating their scale, and none changes.
//!
//! In reading order: `scheme` (what config.json says of them), `matrix` (one of them: its tensors, and the blocks that it becomes).

mod matrix;
mod scheme;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use self::{matrix::Matrix, scheme::Scheme};
use super::{COPIED_BYTES_MAX, ConvertError, copied, tensor_names};
use crate::{
    BlockFormats, ModelConfig, ModelError, StoredDType, bounded_file,
    config::{CONFIG, CONFIG_BYTES_MAX, QUANTIZATION, quantization},
    shards::{self, TensorSpec},
    weight_files::WeightFiles,
};

/// Such a checkpoint, open.
#[derive(Debug)]
pub(super) struct PackedIntegers {
    dir: PathBuf,
    files: WeightFiles,
    /// By the name that it is loaded by.
    tensors: BTreeMap<String, Stored>,
}

#[derive(Debug)]
enum Stored {
    /// As it is.
    Plain(TensorSpec),
    Packed(Matrix),
}

impl Stored {
    fn spec(&self) -> TensorSpec {
        match self {
            Self::Plain(spec) => spec.clone(),
            Self::Packed(matrix) => matrix.spec(),
        }
    }
}

impl PackedIntegers {
    /// Opens a directory whose config.json says that it is one, and refuses what would not become the same model. `None` for all
    /// other directories.
    pub(super) fn open_if_any(dir: &Path) -> Result<Option<Self>, ConvertError> {
        let path = dir.join(CONFIG);
        let mut json: Map<String, Value> = bounded_file::read_json(&path, CONFIG_BYTES_MAX)?;
        let Some(scheme) = Scheme::read(json.get(QUANTIZATION).unwrap_or(&Value::Null), &path)? else {
            return Ok(None);
        };
        json.insert(QUANTIZATION.to_owned(), quantization());
        let config = ModelConfig::parse(Value::from(json).to_string().as_bytes(), &path)?;
        let files = WeightFiles::open(dir)?;
        let tensors = tensors(&files, &scheme, dir)?;
        let opened = Self { dir: dir.to_owned(), files, tensors };
        tensor_names::check(&config, &opened.specs(), &BTreeMap::new(), dir)?;
        opened.check_biases(&config)?;
        Ok(Some(opened))
    }

    /// What is to be written, by name.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        self.tensors.values().map(Stored::spec).collect()
    }

    pub(super) fn dtype(&self, name: &str) -> StoredDType {
        self.tensors[name].spec().dtype
    }

    /// Writes the data of a tensor.
    pub(super) fn write(&self, name: &str, out: &mut dyn Write) -> io::Result<()> {
        match &self.tensors[name] {
            Stored::Packed(matrix) => matrix.write(&self.files, out),
            Stored::Plain(_) => {
                let stored = self.files.get(name).expect("it was listed");
                out.write_all(self.files.bytes(stored))?;
                self.files.release(stored);
                Ok(())
            }
        }
    }

    /// Writes what is beside the weights. config.json says of blocks what it said of integers.
    pub(super) fn write_beside(&self, out: &Path, formats: BlockFormats) -> Result<(), ModelError> {
        copied(&self.dir, out, formats)?;
        let mut config: Map<String, Value> = bounded_file::read_json(&self.dir.join(CONFIG), COPIED_BYTES_MAX)?;
        config.insert(QUANTIZATION.to_owned(), quantization());
        shards::write_json(out.join(CONFIG), &Value::from(config))
    }

    /// Software that makes such files gives matrices biases that the model does not have, of zeros. Others would be lost.
    fn check_biases(&self, config: &ModelConfig) -> Result<(), ConvertError> {
        let required = tensor_names::required(config, |name| self.tensors.contains_key(name));
        let known: BTreeSet<&str> = required.iter().map(|(name, _)| name.as_str()).collect();
        let packed = self.tensors.values().filter_map(|stored| match stored {
            Stored::Packed(matrix) => Some(matrix.bias()),
            Stored::Plain(_) => None,
        });
        for bias in packed.filter(|bias| !known.contains(bias.as_str())) {
            let bytes = self.files.get(&bias).map(|stored| self.files.bytes(stored));
            if bytes.is_some_and(|bytes| bytes.iter().any(|&byte| byte != 0)) {
                let (found, expected) =
                    ("a bias that is not 0".to_owned(), "none: the model has no such bias".to_owned());
                return Err(ConvertError::Packed { tensor: bias, found, expected });
            }
        }
        Ok(())
    }
}

/// The tensors of files by the names that they are loaded by.
fn tensors(files: &WeightFiles, scheme: &Scheme, dir: &Path) -> Result<BTreeMap<String, Stored>, ConvertError> {
    let (mut tensors, mut packed) = (BTreeMap::new(), BTreeSet::new());
    for name in files.names() {
        let part = name.rsplit_once('.').filter(|(_, part)| scheme.layout.parts().contains(part));
        if let Some((matrix, _)) = part {
            packed.insert(matrix);
            continue;
        }
        let stored = files.get(name).expect("it is one of them");
        let dtype = stored.weights.ok_or_else(|| ModelError::TensorDType {
            tensor: name.to_owned(),
            expected: format!("F32, BF16 or F16, or integers in {}", scheme.layout.parts().join(", ")),
            found: format!("{:?}", stored.dtype),
        })?;
        let spec = TensorSpec { name: name.to_owned(), dtype, shape: stored.shape.clone() };
        tensors.insert(name.to_owned(), Stored::Plain(spec));
    }
    for name in packed {
        let matrix = Matrix::open(name, scheme, files, dir)?;
        let tensor = matrix.spec().name;
        if tensors.insert(tensor.clone(), Stored::Packed(matrix)).is_some() {
            let (found, expected) = ("values, and integers are there, too".to_owned(), "one of the two".to_owned());
            return Err(ConvertError::Packed { tensor, found, expected });
        }
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests;
