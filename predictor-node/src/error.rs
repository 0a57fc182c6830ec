//! Why a predictor-node cannot serve. What is wrong with a single call is told to its caller by `service`.

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
    #[error(transparent)]
    Server(#[from] ServerError),
}
