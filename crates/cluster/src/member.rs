//! One member of the cluster: its name, its role, and how to reach it.

use std::{fmt, sync::Arc};

use sida_routing::NodeId;

use crate::experts::LocalExperts;

/// The longest name or address: that of a DNS name with a port.
pub const TEXT_BYTES_MAX: usize = 260;

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

impl Address {
    /// Whether both lead to the same node.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Grpc(a), Self::Grpc(b)) => a == b,
            (Self::Local(a), Self::Local(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
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

impl Role {
    /// The role of this name, as [`fmt::Display`] writes it.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Coordinator, Self::ExpertNode, Self::PredictorNode].into_iter().find(|role| role.to_string() == name)
    }
}

/// Whether `name` can be a node's: letters, digits, `-`, `_` and `.`.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !name.is_empty() && name.len() <= TEXT_BYTES_MAX && name.bytes().all(plain)
}

/// Whether `address` is `host:port` with a port above 0; an IPv6 host stands in brackets.
pub fn is_host_and_port(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_is_good = match bracketed {
        Some(ipv6) => ipv6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)),
    };
    host_is_good && address.len() <= TEXT_BYTES_MAX && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_text_of_bounded_length() {
        // Broken: a name could leave its place in etcd, break a log line or a certificate, or fill the memory.
        for name in ["a", "Expert-Node_0.prod", &"n".repeat(TEXT_BYTES_MAX)] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "a/b", "a b", "a\n", "caf\u{e9}", "a:1", &"n".repeat(TEXT_BYTES_MAX + 1)] {
            assert!(!is_name(name), "{name}");
        }
    }

    #[test]
    fn addresses_are_a_host_and_a_port() {
        // Broken: a node would be announced at an address that nobody can reach, or a good one be refused.
        let long = |host: usize| format!("{}:65535", "h".repeat(host));
        let good = ["10.0.0.7:1", "expert_node-1.sida.svc:50051", "[::1]:65535", &long(TEXT_BYTES_MAX - 6)];
        for address in good {
            assert!(is_host_and_port(address), "{address}");
        }
        let bad = [
            "",
            ":1",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "host:x",
            "ho st:1",
            "ho/st:1",
            "::1:50051",
            "[::1:5",
            "[host]:5",
        ];
        for address in bad.iter().copied().chain([&*long(TEXT_BYTES_MAX - 5)]) {
            assert!(!is_host_and_port(address), "{address}");
        }
    }

    #[test]
    fn roles_and_addresses_are_known_by_their_names() {
        // Broken: a node would be taken for another kind, or one that moved for one that is still where it was.
        for (role, name) in [
            (Role::Coordinator, "coordinator"),
            (Role::ExpertNode, "expert-node"),
            (Role::PredictorNode, "predictor-node"),
        ] {
            assert_eq!((role.to_string().as_str(), Role::from_name(name)), (name, Some(role)));
        }
        assert_eq!(Role::from_name("expert"), None);
        let at = |address: &str| Address::Grpc(address.into());
        assert!(at("a:1").is_same(&at("a:1")) && !at("a:1").is_same(&at("a:2")));
        assert_eq!(format!("{} {:?}", at("a:1"), at("a:1")), "a:1 a:1");
    }
}
