//! Checkpoints of safetensors whose matrices are stored in fewer bits: integers of 4 or 8 bits, several in a word, with a scale for
//! so many neighbours of a row (GPTQ, AWQ, compressed-tensors), or FP8. A value of the former is what a value of a block is, an integer
//! times a binary16, and FP8 has blocks of its own, so matrices become blocks, groups repeating their scale, and none changes.
//!
//! In reading order: `scheme` (what config.json says of them), `targets` (of which), `tensors` (what a matrix is made of),
//! `integers` and `float8` (one matrix of these, and the blocks that it becomes).

mod float8;
mod integers;
mod scheme;
mod targets;
mod tensors;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    path::{Path, PathBuf},
};

use safetensors::Dtype;
use serde_json::{Map, Value};

use self::{float8::Float8, integers::Integers, scheme::Scheme, tensors::Tensors};
use super::{COPIED_BYTES_MAX, ConvertError, copied, tensor_names};
use crate::{
    BlockFormats, ModelConfig, ModelError, StoredDType, bounded_file,
    config::{CONFIG, CONFIG_BYTES_MAX, QUANTIZATION, quantization},
    shards::{self, TensorSpec},
    weight_files::WeightFiles,
};

/// Such a checkpoint, open.
#[derive(Debug)]
pub(super) struct Quantized {
    dir: PathBuf,
    files: WeightFiles,
    /// By the name that it is loaded by.
    tensors: BTreeMap<String, Stored>,
}

#[derive(Debug)]
enum Stored {
    /// As it is.
    Plain(TensorSpec),
    Integers(Integers),
    Float8(Float8),
}

impl Stored {
    fn spec(&self) -> TensorSpec {
        match self {
            Self::Plain(spec) => spec.clone(),
            Self::Integers(matrix) => matrix.spec(),
            Self::Float8(matrix) => matrix.spec(),
        }
    }
}

impl Quantized {
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
        let tensors = tensors(&files, &scheme, &path)?;
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
            Stored::Integers(matrix) => matrix.write(self.files(), out),
            Stored::Float8(matrix) => matrix.write(self.files(), out),
            Stored::Plain(_) => {
                let stored = self.files.get(name).expect("it was listed");
                out.write_all(self.files.bytes(stored))?;
                self.files.release(stored);
                Ok(())
            }
        }
    }

    fn files(&self) -> Tensors<'_> {
        Tensors { files: &self.files, dir: &self.dir }
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
        let biases = self.tensors.values().filter_map(|stored| match stored {
            Stored::Integers(matrix) => Some(matrix.bias()),
            Stored::Float8(matrix) => Some(matrix.bias()),
            Stored::Plain(_) => None,
        });
        for bias in biases.filter(|bias| !known.contains(bias.as_str())) {
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

/// The tensors of files by the names that they are loaded by. `config` is the path of what says the scheme.
fn tensors(files: &WeightFiles, scheme: &Scheme, config: &Path) -> Result<BTreeMap<String, Stored>, ConvertError> {
    let (mut tensors, mut matrices) = (BTreeMap::new(), BTreeSet::new());
    for name in files.names() {
        let stored = files.get(name).expect("it is one of them");
        let is_float8 = matches!(scheme, Scheme::Float8 { .. }) && stored.dtype == Dtype::F8_E4M3;
        let is_part = |part| scheme.parts().contains(&part) || is_float8 && part == "weight";
        if let Some((matrix, _)) = name.rsplit_once('.').filter(|&(_, part)| is_part(part)) {
            matrices.insert(matrix);
            continue;
        }
        let dtype = stored.weights.ok_or_else(|| ModelError::TensorDType {
            tensor: name.to_owned(),
            expected: match scheme {
                Scheme::Integers(layout, _) => {
                    format!("F32, BF16 or F16, or integers in {}", layout.parts().join(", "))
                }
                Scheme::Float8 { .. } => "F32, BF16, F16 or F8_E4M3".to_owned(),
            },
            found: format!("{:?}", stored.dtype),
        })?;
        let spec = TensorSpec { name: name.to_owned(), dtype, shape: stored.shape.clone() };
        tensors.insert(name.to_owned(), Stored::Plain(spec));
    }
    let of = Tensors { files, dir: config.parent().unwrap_or(config) };
    let opened: Vec<Stored> = match scheme {
        Scheme::Integers(layout, forms) => (forms.of(matrices, config)?.into_iter())
            .map(|(name, forms)| Integers::open(name, *layout, &forms, of).map(Stored::Integers))
            .collect::<Result<_, _>>()?,
        Scheme::Float8 { scale, squares } => (squares.of(matrices, config)?.into_iter())
            .map(|(name, squares)| Float8::open(name, scale, &squares, of).map(Stored::Float8))
            .collect::<Result<_, _>>()?,
    };
    for matrix in opened {
        let tensor = matrix.spec().name;
        if tensors.insert(tensor.clone(), matrix).is_some() {
            let (found, expected) = ("values, and integers are there, too".to_owned(), "one of the two".to_owned());
            return Err(ConvertError::Packed { tensor, found, expected });
        }
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests;
