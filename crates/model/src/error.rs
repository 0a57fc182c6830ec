//! Everything that can be wrong with a model, or with what is asked of it. Each variant names the file,
//! tensor or field, what was expected and what was found.

use std::{io, path::PathBuf};

use sida_routing::{Digest, ExpertKey, LayerId};
use thiserror::Error;

use crate::{DeviceError, GivenUp, StoredDType};

/// Why a model cannot be opened, loaded or run.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum ModelError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} exists and is not empty: nothing is overwritten", dir.display())]
    NotEmpty { dir: PathBuf },
    #[error("{} is being written already, in {}", dir.display(), partial.display())]
    BeingWritten { dir: PathBuf, partial: PathBuf },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} has {bytes} bytes, more than the {limit} allowed", path.display())]
    FileTooLarge { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{} is {found}, expected {expected}", path.display())]
    MistakenFile { path: PathBuf, expected: &'static str, found: &'static str },
    #[error("{} is not valid JSON of its kind: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },

    #[error("{}: architecture {found} is not supported, expected one of {expected}", path.display())]
    Architecture { path: PathBuf, found: String, expected: String },
    #[error("{}: {field} is {found}, expected {expected}", path.display())]
    Config { path: PathBuf, field: &'static str, found: String, expected: String },

    #[error("{} holds neither model.safetensors nor model.safetensors.index.json{hint}", dir.display())]
    NoWeights { dir: PathBuf, hint: &'static str },
    #[error("{}: {reason}", file.display())]
    Header { file: PathBuf, reason: String },
    #[error("{}: shard name {shard:?} is not a plain file name", index.display())]
    ShardName { index: PathBuf, shard: String },
    #[error("{}: tensor {tensor} should be in shard {shard}, which does not hold it", index.display())]
    ShardTensor { index: PathBuf, tensor: String, shard: String },
    #[error("tensor {tensor} is missing from {}", dir.display())]
    TensorMissing { dir: PathBuf, tensor: String },
    #[error("tensor {tensor} is {found:?}, expected {expected:?}")]
    TensorShape { tensor: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("tensor {tensor} is stored as {found}, expected {expected}")]
    TensorDType { tensor: String, expected: String, found: String },
    #[error("tensor {tensor} holds values that are no numbers, or too large for {dtype}")]
    NotBlocks { tensor: String, dtype: StoredDType },
    #[error("tensor {tensor} has SHA-256 {found}, the manifest says {expected}: the file is damaged")]
    TensorDigest { tensor: String, expected: Digest, found: Digest },
    #[error("{}: {reason}", path.display())]
    Manifest { path: PathBuf, reason: String },

    #[error("{}: {reason}", path.display())]
    Tokenizer { path: PathBuf, reason: String },
    #[error("{}: the chat template cannot be used: {reason}", path.display())]
    ChatTemplate { path: PathBuf, reason: String },
    #[error("{}: token {token:?} has id {id}, but the model's vocabulary has {vocab_size}", path.display())]
    Vocabulary { path: PathBuf, token: String, id: u32, vocab_size: usize },
    #[error("text of {bytes} bytes is longer than the {limit} allowed")]
    TextTooLong { bytes: usize, limit: usize },
    #[error("text cannot be tokenized: {reason}")]
    Tokenize { reason: String },

    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenId { id: u32, vocab_size: usize },
    #[error("{what} is {found:?}, expected {expected:?}")]
    Shape { what: &'static str, expected: Vec<usize>, found: Vec<usize> },
    #[error("there are no {bytes} bytes left for {what}")]
    OutOfMemory { what: &'static str, bytes: usize },
    #[error("layer {layer} expert {expert} does not exist: the model has {layers} MoE layers of {num_experts} experts")]
    Expert { layer: LayerId, expert: u16, layers: usize, num_experts: usize },
    #[error(
        "{key} cannot be packed: too many of its weights are far below the others of their row; start without packing (--no-packing)"
    )]
    NotPacked { key: ExpertKey },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    GivenUp(#[from] GivenUp),
}

impl ModelError {
    /// Whether trying again will fail again, since what is wrong is in the model's files or in what was asked for, and
    /// not in the state of the machine.
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Read { source, .. } | Self::Write { source, .. } => is_of_place(source),
            Self::BeingWritten { .. } | Self::OutOfMemory { .. } => false,
            Self::Device(DeviceError::Missing(_) | DeviceError::Refused(_)) => true,
            Self::Device(_) => false,
            _ => true,
        }
    }
}

/// Whether a file cannot be read or written where it is said to be, so that trying again will fail again; a disk that is full
/// may have room next time.
pub fn is_of_place(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, IsADirectory, NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem};
    [NotFound, PermissionDenied, IsADirectory, NotADirectory, InvalidInput, ReadOnlyFilesystem].contains(&error.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_wrong_for_good_and_a_full_disk_is_not() {
        // Would break: what starts this program again gives up on a disk that was full, or tries a wrong directory for ever.
        for (kind, is_lasting) in [
            (io::ErrorKind::NotFound, true),
            (io::ErrorKind::ReadOnlyFilesystem, true),
            (io::ErrorKind::StorageFull, false),
            (io::ErrorKind::Other, false),
        ] {
            let unwritten = ModelError::Write { path: "model".into(), source: kind.into() };
            assert_eq!(unwritten.is_lasting(), is_lasting, "{kind}");
        }
    }
}
