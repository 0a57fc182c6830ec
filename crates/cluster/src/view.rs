//! What readers of a cluster see, made from what is known: the members that there are, and the newest placement
//! cut to them. Called by [`crate::cluster`] whenever either changes.

use std::sync::Arc;

use sida_routing::{Extent, NodeId, Placement, PlacementError};

use crate::member::{Member, Role};

/// Members and placement at one moment. Cheap to clone.
#[derive(Clone, Debug)]
pub struct View {
    /// Everyone known, in the order of the source.
    /// Invariant: names are unique.
    pub members: Arc<[Member]>,
    /// Experts on the expert-nodes among `members`.
    /// Invariant: its nodes are exactly those, so that whoever has the view can reach every holder.
    pub placement: Arc<Placement>,
}

impl View {
    /// The view of `members` with `placement`, which may name nodes that are gone and not name nodes that are new:
    /// who is gone holds nothing, who is new holds nothing yet and can be asked when nobody else is left.
    pub(crate) fn of(members: Arc<[Member]>, placement: &Arc<Placement>) -> Result<Self, PlacementError> {
        let mut nodes: Vec<NodeId> = expert_nodes(&members).map(|member| member.node.clone()).collect();
        nodes.sort();
        let placement = if nodes == placement.nodes() { placement.clone() } else { Arc::new(cut(placement, nodes)?) };
        Ok(Self { members, placement })
    }

    /// Whether a reader would see no difference.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let alike = |a: &Member, b: &Member| {
            (&a.node, a.role, a.weight.to_bits()) == (&b.node, b.role, b.weight.to_bits())
                && a.address.is_same(&b.address)
        };
        self.members.len() == other.members.len()
            && self.members.iter().zip(other.members.iter()).all(|(a, b)| alike(a, b))
            && self.placement == other.placement
    }
}

/// The expert-nodes among `members`.
pub(crate) fn expert_nodes(members: &[Member]) -> impl Iterator<Item = &Member> {
    members.iter().filter(|member| member.role == Role::ExpertNode)
}

/// A placement of this extent on nobody, older than any other.
pub(crate) fn nowhere(extent: Extent) -> Result<Placement, PlacementError> {
    let counts = vec![0; extent.moe_layers * extent.num_experts];
    Placement::from_parts(0, extent, Vec::new(), &counts, &[])
}

/// The same placement on `nodes`, ascending.
fn cut(placement: &Placement, nodes: Vec<NodeId>) -> Result<Placement, PlacementError> {
    let places: Vec<Option<u32>> =
        placement.nodes().iter().map(|node| nodes.binary_search(node).ok().map(|place| place as u32)).collect();
    let (mut counts, mut holders) = (Vec::new(), Vec::new());
    for key in placement.keys() {
        let before = holders.len();
        holders.extend(placement.holder_indices(key).iter().filter_map(|&node| places[usize::from(node)]));
        counts.push((holders.len() - before) as u32);
    }
    Placement::from_parts(placement.epoch(), placement.extent(), nodes, &counts, &holders)
}

#[cfg(test)]
mod tests {
    use sida_routing::{Candidate, ExpertId, ExpertKey, LayerId};

    use super::*;
    use crate::member::Address;

    fn members(names: &[&str]) -> Arc<[Member]> {
        let member = |name: &&str| Member {
            node: (*name).into(),
            role: Role::ExpertNode,
            address: Address::Grpc("127.0.0.1:1".into()),
            weight: 1.0,
        };
        names.iter().map(member).collect()
    }

    #[test]
    fn a_view_places_on_its_members_only() {
        // Broken: rows would be sent to a node that has no address, or a new node could not be asked at all.
        let extent = Extent { moe_layers: 2, num_experts: 16, replicas: 2 };
        let candidates = ["a", "b", "c"].map(|name| Candidate { node: name.into(), weight: 1.0 });
        let placement = Arc::new(Placement::compute(5, extent, &candidates).unwrap());
        let view = View::of(members(&["d", "c", "a"]), &placement).unwrap();
        assert_eq!(view.placement.nodes(), [NodeId::from("a"), "c".into(), "d".into()]);
        assert_eq!(view.placement.epoch(), 5);
        for key in placement.keys() {
            let left: Vec<_> = placement.holders(key).filter(|node| node.as_str() != "b").collect();
            assert_eq!(view.placement.holders(key).collect::<Vec<_>>(), left, "{key}");
        }
        let whole = View::of(members(&["a", "b", "c"]), &placement).unwrap();
        assert!(Arc::ptr_eq(&whole.placement, &placement) && !whole.is_same(&view) && whole.is_same(&whole));
    }

    #[test]
    fn a_reader_sees_every_difference() {
        // Broken: a coordinator would go on with an old address, role or weight of a node.
        let extent = Extent { moe_layers: 1, num_experts: 4, replicas: 1 };
        let placement = Arc::new(nowhere(extent).unwrap());
        let view = |members: Arc<[Member]>| View::of(members, &placement).unwrap();
        let both = view(members(&["a", "b"]));
        assert!(both.is_same(&view(members(&["a", "b"]))));
        let changed = |change: &dyn Fn(&mut Member)| {
            let mut members = members(&["a", "b"]);
            change(&mut Arc::get_mut(&mut members).unwrap()[1]);
            View { members, ..both.clone() }
        };
        for other in [
            changed(&|member| member.node = "c".into()),
            changed(&|member| member.role = Role::Coordinator),
            changed(&|member| member.weight = 2.0),
            changed(&|member| member.address = Address::Grpc("127.0.0.1:2".into())),
            View { members: members(&["a"]), ..both.clone() },
            View { placement: Arc::new(nowhere(extent).unwrap().with_epoch(1)), ..both.clone() },
        ] {
            assert!(!both.is_same(&other) && !other.is_same(&both), "{other:?}");
        }
    }

    #[test]
    fn before_the_first_placement_everybody_can_be_asked() {
        // Broken: a cluster would answer nothing until a coordinator was elected.
        let extent = Extent { moe_layers: 1, num_experts: 4, replicas: 2 };
        let view = View::of(members(&["a"]), &Arc::new(nowhere(extent).unwrap())).unwrap();
        assert_eq!((view.placement.epoch(), view.placement.nodes().len()), (0, 1));
        let key = ExpertKey { layer: LayerId(0), expert: ExpertId(3) };
        assert_eq!(view.placement.holders(key).count(), 0);
    }
}
