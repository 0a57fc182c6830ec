//! What is converted: a checkpoint of PyTorch, one of safetensors whose weights become blocks or are quantised, or a GGUF
//! file.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{ConvertError, copied, gguf::Gguf, quantized::Quantized, tensor_names, torch_checkpoint::TorchCheckpoint};
use crate::{BlockFormats, Checkpoint, ModelConfig, ModelError, StoredDType, config::CONFIG, shards::TensorSpec};

/// An open checkpoint, of any kind.
pub(super) enum Source {
    Torch(Box<ModelConfig>, TorchCheckpoint),
    Safetensors(Arc<Checkpoint>),
    Gguf(Box<Gguf>),
    Quantized(Box<Quantized>),
}

/// The first GGUF file by name of a directory that has no config.json.
fn gguf_alone(dir: &Path) -> Option<PathBuf> {
    if dir.join(CONFIG).exists() {
        return None;
    }
    // What cannot be listed is told by whoever reads config.json.
    let files = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    files.filter(|file| file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))).min()
}

/// Tensors that were left out, with what they hold; and what was taken off names, and off how many.
type LeftOut = (Vec<(String, &'static str)>, Vec<(String, usize)>);

impl Source {
    /// A file is GGUF, and a directory what is in it. Safetensors are as they should be unless they are to become blocks.
    pub(super) fn open(dir: &Path, formats: BlockFormats) -> Result<Self, ConvertError> {
        if dir.is_file() {
            return Ok(Self::Gguf(Box::new(Gguf::open(dir)?)));
        }
        if !dir.is_dir() {
            let source = io::Error::new(io::ErrorKind::NotFound, "there is no directory and no file of that name");
            return Err(ModelError::Read { path: dir.to_owned(), source }.into());
        }
        if let Some(file) = gguf_alone(dir) {
            return Err(ConvertError::GgufUnnamed { dir: dir.to_owned(), file });
        }
        if let Some(quantized) = Quantized::open_if_any(dir)? {
            return Ok(Self::Quantized(Box::new(quantized)));
        }
        let config = ModelConfig::open(dir)?;
        let has_safetensors =
            || ["model.safetensors", "model.safetensors.index.json"].map(|name| dir.join(name).exists());
        if formats.is_any() && has_safetensors().contains(&true) {
            let checkpoint = Checkpoint::open(dir)?;
            checkpoint.check_tensors()?;
            return Ok(Self::Safetensors(checkpoint));
        }
        let torch = TorchCheckpoint::open(dir, config.names)?;
        Ok(Self::Torch(Box::new(config), torch))
    }

    /// What is to be written, as it is stored, by name; and the tied copies that are not.
    pub(super) fn specs(&self) -> Result<(Vec<TensorSpec>, Vec<String>), ModelError> {
        match self {
            Self::Gguf(gguf) => Ok((gguf.specs(), Vec::new())),
            Self::Quantized(quantized) => Ok((quantized.specs(), Vec::new())),
            Self::Torch(config, torch) => {
                let (specs, tied) = torch.untied(config);
                tensor_names::check(config, &specs, &torch.others, torch.dir())?;
                Ok((specs, tied))
            }
            Self::Safetensors(checkpoint) => {
                let mut names: Vec<&str> = checkpoint.names().collect();
                names.sort_unstable();
                let spec = |name: &str| {
                    let (dtype, shape) = (checkpoint.dtype(name)?, checkpoint.describe(name)?.1.to_vec());
                    Ok(TensorSpec { name: name.to_owned(), dtype, shape })
                };
                Ok((names.into_iter().map(spec).collect::<Result<_, ModelError>>()?, Vec::new()))
            }
        }
    }

    /// What a tensor of those is stored as.
    pub(super) fn dtype(&self, name: &str) -> StoredDType {
        match self {
            Self::Gguf(gguf) => gguf.dtype(name),
            Self::Quantized(quantized) => quantized.dtype(name),
            Self::Torch(_, torch) => torch.spec(name).dtype,
            Self::Safetensors(checkpoint) => checkpoint.dtype(name).expect("it was listed"),
        }
    }

    /// Writes its data.
    pub(super) fn write(&self, name: &str, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Gguf(gguf) => gguf.write(name, out),
            Self::Quantized(quantized) => quantized.write(name, out),
            Self::Torch(_, torch) => torch.write(name, out),
            Self::Safetensors(checkpoint) => {
                let tensor = checkpoint.tensor(name).map_err(io::Error::other)?;
                out.write_all(tensor.bytes)?;
                checkpoint.release(name);
                Ok(())
            }
        }
    }

    /// Writes what is beside the weights.
    pub(super) fn write_beside(&self, out: &Path, formats: BlockFormats) -> Result<(), ConvertError> {
        match self {
            Self::Gguf(gguf) => gguf.write_beside(out, formats),
            Self::Quantized(quantized) => Ok(quantized.write_beside(out, formats)?),
            Self::Torch(_, torch) => Ok(copied(torch.dir(), out, formats)?),
            Self::Safetensors(checkpoint) => Ok(copied(checkpoint.dir(), out, formats)?),
        }
    }

    /// What of it was not written.
    pub(super) fn left_out(self) -> LeftOut {
        match self {
            Self::Torch(_, torch) => (torch.others.into_iter().collect(), torch.names.dropped.into_iter().collect()),
            Self::Safetensors(_) | Self::Gguf(_) | Self::Quantized(_) => (Vec::new(), Vec::new()),
        }
    }
}
