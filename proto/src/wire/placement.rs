//! `PlacementRecord` <-> [`sida_routing::Placement`] and the model it is for. Written to etcd by the elected
//! coordinator and read by every node; sent by an expert-node to a coordinator that is behind.

use std::sync::Arc;

use prost::Message;
use sida_routing::{Digest, Extent, NodeId, Placement};

use super::{WireError, digest, residency::NODE_NAME_BYTES_MAX, within};
use crate::v1;

/// The longest encoded record: what etcd takes in one request by default is 1.5 MiB.
pub const RECORD_BYTES_MAX: usize = 1 << 20;

/// A placement and its model.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacementRecord {
    /// Whose experts are placed.
    pub model: Digest,
    /// Where. Shared, since it is large and many look at it.
    pub placement: Arc<Placement>,
}

impl v1::PlacementRecord {
    /// The record, if every expert's holders are nodes that it names.
    pub fn check(self) -> Result<PlacementRecord, WireError> {
        for node in &self.nodes {
            within("PlacementRecord.nodes (bytes of a name)", node.len(), 1, NODE_NAME_BYTES_MAX)?;
        }
        let extent = Extent {
            moe_layers: self.moe_layers as usize,
            num_experts: self.num_experts as usize,
            replicas: self.replicas as usize,
        };
        let nodes: Vec<NodeId> = self.nodes.into_iter().map(NodeId::from).collect();
        let placement = Placement::from_parts(self.epoch, extent, nodes, &self.holder_counts, &self.holders)?;
        Ok(PlacementRecord {
            model: digest("PlacementRecord.model_digest", &self.model_digest)?,
            placement: Arc::new(placement),
        })
    }
}

impl PlacementRecord {
    /// The bytes, or an error if they are more than anybody takes.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let bytes = v1::PlacementRecord::from(self).encode_to_vec();
        within("PlacementRecord (bytes)", bytes.len(), 0, RECORD_BYTES_MAX)?;
        Ok(bytes)
    }
}

impl From<&PlacementRecord> for v1::PlacementRecord {
    fn from(record: &PlacementRecord) -> Self {
        let PlacementRecord { model, placement } = record;
        let extent = placement.extent();
        let (mut holder_counts, mut holders) = (Vec::new(), Vec::new());
        for key in placement.keys() {
            let indices = placement.holder_indices(key);
            holder_counts.push(indices.len() as u32);
            holders.extend(indices.iter().map(|&node| u32::from(node)));
        }
        Self {
            epoch: placement.epoch(),
            model_digest: model.0.to_vec().into(),
            moe_layers: extent.moe_layers as u32,
            num_experts: extent.num_experts as u32,
            replicas: extent.replicas as u32,
            nodes: placement.nodes().iter().map(NodeId::to_string).collect(),
            holder_counts,
            holders,
        }
    }
}
