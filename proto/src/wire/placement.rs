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

#[cfg(test)]
mod tests {
    use sida_routing::{Candidate, PlacementError};

    use super::*;
    use crate::wire::decode;

    fn record() -> PlacementRecord {
        let extent = Extent { moe_layers: 2, num_experts: 8, replicas: 2 };
        let candidates = ["a", "b", "c"].map(|name| Candidate { node: name.into(), weight: 1.0 });
        let placement = Placement::compute(7, extent, &candidates).unwrap();
        PlacementRecord { model: Digest([5; 32]), placement: Arc::new(placement) }
    }

    #[test]
    fn what_is_written_is_read() {
        // Broken: nodes of one build would send rows to other nodes than the writer of the placement meant.
        assert_eq!(decode::placement(&record().encode().unwrap()), Ok(record()));
    }

    #[test]
    fn what_is_no_placement_is_refused() {
        // Broken: one damaged key in etcd would place experts on nodes that are none, or be kept without a bound.
        let refused = |spoil: &dyn Fn(&mut v1::PlacementRecord)| {
            let mut message = v1::PlacementRecord::from(&record());
            spoil(&mut message);
            message.check().unwrap_err()
        };
        let name = |bytes: usize| {
            let mut message = v1::PlacementRecord::from(&record());
            message.nodes[2] = "c".repeat(bytes);
            message.check().is_ok()
        };
        assert_eq!([name(0), name(NODE_NAME_BYTES_MAX), name(NODE_NAME_BYTES_MAX + 1)], [false, true, false]);
        assert!(matches!(refused(&|m| m.holders[0] = 3), WireError::Placement(PlacementError::Holder { .. })));
        assert!(matches!(refused(&|m| m.model_digest.truncate(31)), WireError::Digest { found: 31, .. }));
        let long = vec![0; RECORD_BYTES_MAX + 1];
        let (min, max) = (0, RECORD_BYTES_MAX as u64);
        let refused = WireError::Count { field: "PlacementRecord (bytes)", found: max + 1, min, max };
        assert_eq!(decode::placement(&long), Err(refused));
    }

    #[test]
    fn what_nobody_takes_is_not_written() {
        // Broken: the writer would store a placement that every node refuses.
        let extent = Extent { moe_layers: 64, num_experts: 1024, replicas: 8 };
        let candidates: Vec<_> =
            (0..8).map(|i| Candidate { node: format!("n{i}").as_str().into(), weight: 1.0 }).collect();
        let placement = Arc::new(Placement::compute(1, extent, &candidates).unwrap());
        let large = PlacementRecord { placement, ..record() };
        assert!(matches!(large.encode(), Ok(bytes) if bytes.len() > RECORD_BYTES_MAX / 2));
        let candidates: Vec<_> =
            (0..16).map(|i| Candidate { node: format!("n{i:02}").as_str().into(), weight: 1.0 }).collect();
        let placement = Placement::compute(1, Extent { replicas: 16, ..extent }, &candidates).unwrap();
        let larger = PlacementRecord { placement: Arc::new(placement), ..record() };
        assert!(matches!(larger.encode(), Err(WireError::Count { .. })));
    }
}
