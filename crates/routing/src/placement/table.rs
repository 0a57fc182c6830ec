//! A placement: every expert's holders in the order in which they are asked. Read on every layer of every
//! request, so a look-up is two loads and no hash.

use super::Extent;
use crate::{ExpertId, ExpertKey, LayerId, NodeId};

/// Expert -> ordered holders.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    pub(super) epoch: u64,
    pub(super) extent: Extent,
    /// Invariant: strictly ascending.
    pub(super) nodes: Vec<NodeId>,
    /// (moe_layers * num_experts + 1,): expert i's holders are `holders[starts[i]..starts[i + 1]]`.
    /// Invariant: ascending, from 0 to the length of `holders`.
    pub(super) starts: Vec<u32>,
    /// Indices into `nodes`, primary first.
    /// Invariant: those of an expert are distinct.
    pub(super) holders: Vec<u16>,
}

impl Placement {
    /// The same holders under another epoch.
    pub fn with_epoch(self, epoch: u64) -> Self {
        Self { epoch, ..self }
    }

    /// Which version of the placement this is; a later one is greater.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What it was computed for.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// The nodes placed on, by ascending name.
    pub fn nodes(&self) -> &[NodeId] {
        &self.nodes
    }

    /// Where `node` is in [`Placement::nodes`].
    pub fn node_index(&self, node: &NodeId) -> Option<u16> {
        self.nodes.binary_search(node).ok().map(|at| at as u16)
    }

    /// Who holds `key`, primary first, as indices into [`Placement::nodes`]. Empty when there are no nodes or
    /// the model has no such expert.
    pub fn holder_indices(&self, key: ExpertKey) -> &[u16] {
        let (layer, expert) = (usize::from(key.layer.0), usize::from(key.expert.0));
        if layer >= self.extent.moe_layers || expert >= self.extent.num_experts {
            return &[];
        }
        self.holders_at(layer * self.extent.num_experts + expert)
    }

    /// Who holds `key`, primary first.
    pub fn holders(&self, key: ExpertKey) -> impl Iterator<Item = &NodeId> {
        self.holder_indices(key).iter().map(|&node| &self.nodes[usize::from(node)])
    }

    /// Who should compute `key`.
    pub fn primary(&self, key: ExpertKey) -> Option<&NodeId> {
        self.holders(key).next()
    }

    /// The experts whose primary is `node`, ascending.
    pub fn experts_of<'a>(&'a self, node: &'a NodeId) -> impl Iterator<Item = ExpertKey> + 'a {
        let node = self.node_index(node);
        self.keys().filter(move |&key| node.is_some_and(|node| self.holder_indices(key).first() == Some(&node)))
    }

    /// The experts that `node` holds, as primary or as replica, ascending.
    pub fn held_by<'a>(&'a self, node: &'a NodeId) -> impl Iterator<Item = ExpertKey> + 'a {
        let node = self.node_index(node);
        self.keys().filter(move |&key| node.is_some_and(|node| self.holder_indices(key).contains(&node)))
    }

    /// Every expert of the model, ascending.
    pub fn keys(&self) -> impl Iterator<Item = ExpertKey> + use<> {
        let experts = self.extent.num_experts as u32;
        (0..self.extent.moe_layers as u32).flat_map(move |layer| {
            (0..experts).map(move |expert| ExpertKey { layer: LayerId(layer as u16), expert: ExpertId(expert as u16) })
        })
    }

    /// Whether every expert has the same holders in the same order; epochs and idle nodes may differ.
    pub fn same_holders(&self, other: &Self) -> bool {
        let names = |placement: &'_ Self, i: usize| -> Vec<NodeId> {
            placement.holders_at(i).iter().map(|&node| placement.nodes[usize::from(node)].clone()).collect()
        };
        if !self.extent.same_experts(&other.extent) || self.starts != other.starts {
            return false;
        }
        let same_nodes = self.nodes == other.nodes;
        if same_nodes {
            self.holders == other.holders
        } else {
            (0..self.extent.experts()).all(|i| names(self, i) == names(other, i))
        }
    }

    /// Holders of every expert, layer by layer; together with [`Placement::all_holders`] what
    /// [`Placement::from_parts`] takes.
    pub fn counts(&self) -> impl Iterator<Item = u32> {
        self.starts.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// The holders of all experts, one expert after another.
    pub fn all_holders(&self) -> &[u16] {
        &self.holders
    }

    /// The holders of expert `i`, counted layer by layer.
    pub(super) fn holders_at(&self, i: usize) -> &[u16] {
        &self.holders[self.starts[i] as usize..self.starts[i + 1] as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Candidate;

    #[test]
    fn what_is_not_there_has_no_holders_and_holds_nothing() {
        // Broken: a hint for another model would be sent to nodes that never hold such an expert, or end a coordinator.
        let key = |layer, expert| ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) };
        let candidates = ["a", "b"].map(|name| Candidate { node: name.into(), weight: 1.0 });
        let extent = Extent { moe_layers: 2, num_experts: 3, replicas: 1 };
        let placement = Placement::compute(1, extent, &candidates).unwrap();
        assert_eq!(placement.holder_indices(key(1, 2)).len(), 1);
        for outside in [key(0, 3), key(1, 3), key(2, 0), key(9, 9)] {
            assert_eq!((placement.holder_indices(outside), placement.primary(outside)), (&[][..], None));
        }
        let stranger = NodeId::from("stranger");
        let extent = Extent { moe_layers: 1, num_experts: 2, replicas: 1 };
        let empty = Placement::from_parts(1, extent, vec!["a".into()], &[0, 1], &[0]).unwrap();
        assert_eq!((empty.experts_of(&stranger).count(), empty.held_by(&stranger).count()), (0, 0));
        assert_eq!(empty.experts_of(&"a".into()).collect::<Vec<_>>(), [key(0, 1)]);
    }

    #[test]
    fn the_same_holders_are_those_of_every_expert() {
        // Broken: a step that moves experts would not be published, or one that moves none would be, for ever.
        let extent = |moe_layers, num_experts| Extent { moe_layers, num_experts, replicas: 1 };
        let parts = |extent, names: &[&str], counts: &[u32], holders: &[u32]| {
            let names = names.iter().map(|&name| name.into()).collect();
            Placement::from_parts(1, extent, names, counts, holders).unwrap()
        };
        let placement = parts(extent(1, 2), &["a", "b"], &[1, 1], &[0, 1]);
        let idle = parts(extent(1, 2), &["a", "aa", "b"], &[1, 1], &[0, 2]);
        assert!(placement.same_holders(&idle.with_epoch(9)), "idle nodes and epochs may differ");
        for other in [
            parts(extent(2, 1), &["a", "b"], &[1, 1], &[0, 1]),
            parts(extent(1, 2), &["a", "b"], &[1, 1], &[1, 0]),
            parts(extent(1, 2), &["a", "b"], &[0, 2], &[0, 1]),
            parts(extent(1, 2), &["a", "aa", "b"], &[1, 1], &[0, 1]),
        ] {
            assert!(!placement.same_holders(&other) && !other.same_holders(&placement), "{other:?}");
        }
    }
}
