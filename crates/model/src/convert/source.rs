//! What is converted: a checkpoint of PyTorch, or one of safetensors whose weights become blocks.

use std::{
    io::{self, Write},
    path::Path,
    sync::Arc,
};

use super::{ConvertError, tensor_names, torch_checkpoint::TorchCheckpoint};
use crate::{BlockFormats, Checkpoint, ModelConfig, ModelError, StoredDType, shards::TensorSpec};

/// An open checkpoint, of either kind.
pub(super) enum Source {
    Torch(TorchCheckpoint),
    Safetensors(Arc<Checkpoint>),
}

/// Tensors that were left out, with what they hold; and what was taken off names, and off how many.
type LeftOut = (Vec<(String, &'static str)>, Vec<(String, usize)>);

impl Source {
    /// Safetensors are as they should be unless they are to become blocks.
    pub(super) fn open(dir: &Path, config: &ModelConfig, formats: BlockFormats) -> Result<Self, ConvertError> {
        let has_safetensors =
            || ["model.safetensors", "model.safetensors.index.json"].map(|name| dir.join(name).exists());
        if formats.is_any() && has_safetensors().contains(&true) {
            let checkpoint = Checkpoint::open(dir)?;
            checkpoint.check_tensors()?;
            return Ok(Self::Safetensors(checkpoint));
        }
        Ok(Self::Torch(TorchCheckpoint::open(dir, config.names)?))
    }

    /// What is to be written, as it is stored, by name; and the tied copies that are not.
    pub(super) fn specs(&self, config: &ModelConfig) -> Result<(Vec<TensorSpec>, Vec<String>), ModelError> {
        match self {
            Self::Torch(torch) => {
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
            Self::Torch(torch) => torch.spec(name).dtype,
            Self::Safetensors(checkpoint) => checkpoint.dtype(name).expect("it was listed"),
        }
    }

    /// Writes its data.
    pub(super) fn write(&self, name: &str, out: &mut dyn Write) -> io::Result<()> {
        match self {
            Self::Torch(torch) => torch.write(name, out),
            Self::Safetensors(checkpoint) => {
                let tensor = checkpoint.tensor(name).map_err(io::Error::other)?;
                out.write_all(tensor.bytes)?;
                checkpoint.release(name);
                Ok(())
            }
        }
    }

    /// What of it was not written.
    pub(super) fn left_out(self) -> LeftOut {
        match self {
            Self::Torch(torch) => (torch.others.into_iter().collect(), torch.names.dropped.into_iter().collect()),
            Self::Safetensors(_) => (Vec::new(), Vec::new()),
        }
    }
}
