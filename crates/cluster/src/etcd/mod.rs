//! Membership by etcd: who is alive (keys under leases), who writes the placement (a key that one coordinator
//! holds), and the placement itself.
//!
//! The problem: every part of this can stop for a while or for ever, and come back believing what is no longer true.
//! So nothing here is trusted for longer than it can be: a watch is repeated by a listing, a lease that may have run
//! out by this node's own clock counts as run out, and what a writer writes is compared in etcd, in the same
//! transaction, with the key by which it leads and with the placement that it started from. And nothing here is
//! needed for answering: while etcd is away the last view stays.
//!
//! In reading order: [`config`], [`error`], `keys` (what stands where), `listing` (what was read), `session` (one
//! connection: `connect`, `lease`, `register`, `election`, `writer`), `follow` (the task that goes from one connection
//! to the next). Who counts as a member, and what the writer writes, is decided by `sida_routing::membership`.

pub mod config;
#[cfg(feature = "etcd")]
mod connect;
#[cfg(feature = "etcd")]
mod election;
pub mod error;
#[cfg(feature = "etcd")]
mod follow;
#[cfg(feature = "etcd")]
mod keys;
#[cfg(feature = "etcd")]
mod lease;
#[cfg(feature = "etcd")]
mod listing;
#[cfg(feature = "etcd")]
mod register;
#[cfg(feature = "etcd")]
mod session;
#[cfg(feature = "etcd")]
mod writer;

use sida_routing::{Digest, Extent};

pub use config::{EtcdConfig, EtcdTls, EtcdUser};
pub use error::EtcdError;

use crate::{Cluster, Member};

/// A node that joins a cluster.
#[derive(Clone, Debug)]
pub struct Joining {
    /// The node, as the others shall see it.
    pub member: Member,
    /// The model that the node serves. Members of other models are not seen.
    pub model: Digest,
    /// The extent of the model, and how many holders an expert shall have.
    pub extent: Extent,
}

impl Cluster {
    /// The cluster that etcd keeps, with this node as a member. Returns at once, whether or not etcd answers yet:
    /// the task that follows it goes on for as long as there is a handle. Must be called in a tokio runtime.
    #[cfg(feature = "etcd")]
    pub fn join(config: EtcdConfig, joining: Joining) -> Result<Self, EtcdError> {
        follow::start(config, joining)
    }

    /// This build knows no etcd.
    #[cfg(not(feature = "etcd"))]
    pub fn join(_: EtcdConfig, _: Joining) -> Result<Self, EtcdError> {
        Err(EtcdError::NotBuilt)
    }
}
