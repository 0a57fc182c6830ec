//! Why a node cannot join a cluster by etcd. What goes wrong later is retried for ever, and told to the log.

use std::io;

use sida_routing::PlacementError;
use thiserror::Error;

use super::config::{CLUSTER_BYTES_MAX, LEASE_TTL_MAX, LEASE_TTL_MIN};

/// Wrong from the start.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum EtcdError {
    #[error("this build knows no etcd: build it with the cargo feature `etcd` (`cargo build --features etcd`)")]
    NotBuilt,
    #[error("no etcd endpoint is named")]
    NoEndpoint,
    #[error("etcd endpoint {endpoint:?}, expected host:port, with http:// or https:// before it or not")]
    Endpoint { endpoint: String },
    #[error("etcd endpoint {endpoint} is plain text, but TLS towards etcd is asked for")]
    PlainEndpoint { endpoint: String },
    #[error("cluster {cluster:?}, expected 1 to {CLUSTER_BYTES_MAX} letters, digits, '-', '_' and '.'")]
    Cluster { cluster: String },
    #[error("lease of {found:?}, expected {LEASE_TTL_MIN:?} to {LEASE_TTL_MAX:?}")]
    LeaseTtl { found: std::time::Duration },
    #[error("cannot read {file}: {source}")]
    Read { file: String, source: io::Error },
    #[error("{file} holds no password")]
    NoPassword { file: String },
    #[error("{found:?} is not a name or an address by which others can reach this node")]
    Member { found: String },
    #[error("experts cannot be placed: {0}")]
    Placement(#[from] PlacementError),
    #[error(
        "{replicas} holders for each expert of this model would take more than the {expected} bytes of a record in etcd"
    )]
    TooLarge { replicas: usize, expected: usize },
}
