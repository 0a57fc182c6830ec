//! Why a predictor-node cannot serve. What is wrong with a single call is told to its caller by `service`.

use std::{io, path::PathBuf};

use sida_predictor::PredictorError;
use sida_routing::NodeId;
use sida_rpc::ServerError;
use thiserror::Error;

/// Why a predictor-node ends.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum PredictorNodeError {
    #[error("the cluster has no predictor-node called {node}")]
    NotAMember { node: NodeId },
    #[error("cannot learn in {}: {source}", dir.display())]
    LearnDir { dir: PathBuf, source: io::Error },
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    #[error(transparent)]
    Predictor(#[from] PredictorError),
    #[error(transparent)]
    Server(#[from] ServerError),
}

impl PredictorNodeError {
    /// Whether trying again will fail again; see [`PredictorError::is_lasting`].
    pub fn is_lasting(&self) -> bool {
        use io::ErrorKind::{AlreadyExists, NotADirectory, PermissionDenied, ReadOnlyFilesystem};
        match self {
            Self::Predictor(error) => error.is_lasting(),
            Self::LearnDir { source, .. } => {
                [AlreadyExists, NotADirectory, PermissionDenied, ReadOnlyFilesystem].contains(&source.kind())
            }
            _ => false,
        }
    }
}
