//! Why an expert-node does not start. What goes wrong within one call is
//! [`sida_cluster::experts::CallError`].

use std::io;

use sida_model::ModelError;
use sida_rpc::ServerError;
use thiserror::Error;

use crate::{slots::SlabError, smallest_memory};

/// Why an expert-node does not start, or stops.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum ExpertNodeError {
    #[error(
        "expert memory of {budget_bytes} bytes is too small: it must hold at least two experts of this model, \
         so --expert-memory needs {} or more",
        told(*needed_bytes, *experts_bytes)
    )]
    BudgetTooSmall {
        budget_bytes: u64,
        /// What is needed at least.
        needed_bytes: u64,
        /// What all experts of the model take, of which a share would be given.
        experts_bytes: u64,
    },
    #[error("{0}")]
    Model(#[from] ModelError),
    #[error(transparent)]
    Memory(#[from] SlabError),
    #[error("cannot start a thread: {0}")]
    Thread(#[from] io::Error),
    #[error(transparent)]
    Server(#[from] ServerError),
}

fn told(needed_bytes: u64, experts_bytes: u64) -> String {
    let smallest = smallest_memory::smallest(needed_bytes, experts_bytes, &[1.0]);
    smallest.map_or_else(|| format!("{needed_bytes} bytes"), |smallest| smallest.to_string())
}
