//! Why an expert-node does not start. What goes wrong within one call is
//! [`sida_cluster::experts::CallError`].

use std::io;

use sida_model::ModelError;
use sida_rpc::ServerError;
use thiserror::Error;

use crate::slots::SlabError;

/// Why an expert-node does not start, or stops.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum ExpertNodeError {
    #[error(
        "expert memory of {budget_bytes} bytes is too small: it must hold at least two experts of this model, \
         so --expert-memory needs {smallest_bytes} bytes ({smallest_percent:.2}%) or more"
    )]
    BudgetTooSmall { budget_bytes: u64, smallest_bytes: u64, smallest_percent: f64 },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Memory(#[from] SlabError),
    #[error("cannot start a thread: {0}")]
    Thread(#[from] io::Error),
    #[error(transparent)]
    Server(#[from] ServerError),
}
