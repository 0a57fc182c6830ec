//! Newtypes for everything that is named by a number or a short text, so that a layer is never taken for
//! an expert. Used by every crate.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// An MoE layer, counted in execution order: the encoder's sparse blocks first, then the decoder's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LayerId(pub u16);

/// An expert within one MoE layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExpertId(pub u16);

/// One expert of the whole model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExpertKey {
    /// The MoE layer it belongs to.
    pub layer: LayerId,
    /// Which of that layer's experts.
    pub expert: ExpertId,
}

/// The name of a node, unique within a cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for NodeId {
    fn from(name: String) -> Self {
        Self(name.into())
    }
}

impl From<&str> for NodeId {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl From<NodeId> for String {
    fn from(id: NodeId) -> Self {
        id.0.as_ref().to_owned()
    }
}

/// SHA-256 of a model or of a predictor: two nodes work together only when theirs agree.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest behind a byte string from the wire or a file; `None` unless it has 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ExpertKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} expert {}", self.layer, self.expert)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_digests_are_written_as_people_and_files_need_them() {
        // Broken: logs and errors would not say which expert, node or model they mean, or a record would be read as another.
        let key = ExpertKey { layer: LayerId(3), expert: ExpertId(7) };
        assert_eq!(format!("{key}: {} {}", key.layer, key.expert), "layer 3 expert 7: 3 7");
        let node = NodeId::from("expert-node-0");
        assert_eq!((node.as_str(), node.to_string().as_str()), ("expert-node-0", "expert-node-0"));
        assert_eq!(NodeId::from(String::from(node.clone())), node);
        let bytes: Vec<u8> = (0..32).collect();
        let digest = Digest::from_slice(&bytes).unwrap();
        assert_eq!(digest.0[..], bytes);
        assert_eq!(digest.to_string(), "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f");
        assert_eq!(format!("{digest:?}"), format!("Digest({digest})"));
        assert_eq!((Digest::from_slice(&bytes[1..]), Digest::from_slice(&[0; 33])), (None, None));
    }
}
