//! One member of the cluster: its name, its role, and how to reach it.

use std::{fmt, sync::Arc};

use sida_routing::NodeId;

use crate::experts::LocalExperts;

/// What a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Front door, backbone, dispatch.
    Coordinator,
    /// Holds experts.
    ExpertNode,
    /// Serves the hash predictor.
    PredictorNode,
}

/// How a coordinator reaches a member.
#[derive(Clone)]
pub enum Address {
    /// `host:port`, by gRPC.
    Grpc(String),
    /// An expert-node in this process: called directly, no gRPC.
    Local(Arc<dyn LocalExperts>),
}

/// One member.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name.
    pub node: NodeId,
    /// What it does.
    pub role: Role,
    /// How to reach it.
    pub address: Address,
    /// Share of the experts it takes, relative to the other expert-nodes. Positive and finite.
    pub weight: f64,
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grpc(address) => f.write_str(address),
            Self::Local(_) => f.write_str("in-process"),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Coordinator => "coordinator",
            Self::ExpertNode => "expert-node",
            Self::PredictorNode => "predictor-node",
        })
    }
}
