//! Flags that several commands share, one file per group: what the model is, how a request is routed and
//! answered, how much memory the experts get, where a cluster listens, whom it lets in and how it is reached.

pub(crate) mod block_formats;
pub(crate) mod cache;
pub(crate) mod client_limits;
pub(crate) mod connection;
pub(crate) mod device;
pub(crate) mod embedded;
pub(crate) mod etcd;
pub(crate) mod generation;
pub(crate) mod keys;
pub(crate) mod learn;
pub(crate) mod limits;
pub(crate) mod membership;
pub(crate) mod micro_batches;
pub(crate) mod model;
pub(crate) mod predictor;
pub(crate) mod routing;
pub(crate) mod server;
