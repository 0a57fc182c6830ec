//! Where a cluster's members come from and how that stands, for those who look after it: `sida status` and health.

use std::collections::BTreeMap;

use sida_routing::NodeId;

/// The source of a cluster's members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A static file or one process: nobody joins or leaves.
    Fixed,
    /// etcd.
    Etcd {
        /// Whether etcd answers. While it does not, the last view stays.
        connected: bool,
    },
}

/// The membership as one node knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Membership {
    /// Where the members come from.
    pub source: Source,
    /// The coordinator that writes the placement; none where the membership is fixed.
    pub leader: Option<NodeId>,
    /// Up to which epoch each expert-node has loaded what is placed on it.
    pub ready: BTreeMap<NodeId, u64>,
}

impl Membership {
    /// Nobody joins or leaves.
    pub(crate) fn fixed() -> Self {
        Self { source: Source::Fixed, leader: None, ready: BTreeMap::new() }
    }

    /// etcd, not reached yet.
    pub(crate) fn etcd() -> Self {
        Self { source: Source::Etcd { connected: false }, ..Self::fixed() }
    }

    /// Whether nobody joins or leaves.
    pub fn is_fixed(&self) -> bool {
        self.source == Source::Fixed
    }
}
