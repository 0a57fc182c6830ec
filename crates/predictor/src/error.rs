//! Everything that can be wrong with a predictor, or with what is asked of it.

use std::{io, path::PathBuf};

use sida_model::{ModelError, error::is_of_place};
use sida_routing::{Digest, HashTableError};
use thiserror::Error;

use crate::MadeFor;

/// Why a predictor cannot be opened, used or trained.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum PredictorError {
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("{}: tensor {tensor} {reason}", path.display())]
    Tensor { path: PathBuf, tensor: String, reason: String },
    #[error(
        "{} predicts for another model, {found} ({}), this is {expected} ({}): either its config.json or weights were changed \
         after the predictor was trained, or it is another model, for which `sida train-predictor` trains one",
        path.display(), shapes[0], shapes[1]
    )]
    Model {
        path: PathBuf,
        expected: Digest,
        found: Digest,
        /// Of the file's model, and of this one.
        shapes: Box<[MadeFor; 2]>,
    },
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    Token { id: u32, vocab_size: usize },
    #[error("{states} predictor states for {sequences} sequences")]
    States { states: usize, sequences: usize },
    #[error("predictor state {reason}")]
    State { reason: String },
    #[error("the encoder's output {reason}")]
    Input { reason: String },
    #[error("no text to learn from: {reason}")]
    Texts { reason: String },
    #[error("too little to calibrate with: {reason}")]
    TooFewHeldOut { reason: String },
    #[error("{field} is {found}, expected {expected}")]
    Option { field: &'static str, found: String, expected: String },
    #[error("{}: cannot learn on: {reason}", path.display())]
    NotTrainable { path: PathBuf, reason: String },
    #[error("training was given up")]
    GivenUp,
    #[error("cannot start a thread: {reason}")]
    Threads { reason: String },
    #[error("cannot train: {0}")]
    Training(#[from] candle_core::Error),
    #[error(transparent)]
    Table(#[from] HashTableError),
    #[error(transparent)]
    Run(#[from] ModelError),
}

impl PredictorError {
    /// Whether trying again will fail again; see [`ModelError::is_lasting`].
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Run(error) => error.is_lasting(),
            Self::Write { source, .. } => is_of_place(source),
            Self::File { .. }
            | Self::Tensor { .. }
            | Self::Model { .. }
            | Self::Texts { .. }
            | Self::TooFewHeldOut { .. }
            | Self::Option { .. }
            | Self::NotTrainable { .. } => true,
            _ => false,
        }
    }
}
