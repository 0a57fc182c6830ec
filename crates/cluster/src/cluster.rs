//! The cluster as a node sees it now: its members and the placement made from them. Made by the command line
//! (static file, embedded cluster, etcd) and the tests, handed to every node's `run`.
//!
//! A node reads; whoever keeps the membership publishes. Both sides meet in one watch channel of whole
//! [`View`]s: members and placement change together, so a reader never sees an expert placed on a node it
//! has not heard of. [`Cluster::fixed`] publishes once and never again; [`Cluster::join`] starts a task that
//! follows etcd and publishes what it finds.
//!
//! What a node tells the others goes the other way through the same handle: that it has loaded what is placed on it
//! ([`Cluster::report_ready`]), what it is asked for ([`Cluster::note_demand`]), that it ends ([`Cluster::leave`]).
//! In a fixed cluster nobody listens, and all of that does nothing.

use std::{sync::Arc, time::Duration};

use sida_routing::{Candidate, Digest, Extent, HashTable, NodeId, Placement, PlacementError};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

pub use crate::view::View;
use crate::{
    member::{Member, Role},
    membership::Membership,
    published::Published,
    view::expert_nodes,
};

/// The epoch of a placement that nobody recomputes.
const FIXED_EPOCH: u64 = 1;

/// A handle on the cluster. Cheap to clone; all clones see the same changes.
#[derive(Clone)]
pub struct Cluster {
    views: watch::Receiver<View>,
    /// Keeps the channel of a fixed cluster open: a closed one would look like a lost membership to those
    /// who wait for changes.
    published: Arc<Published>,
    /// Ends the task that follows the membership with the last handle.
    _end: Option<Arc<DropGuard>>,
}

/// Why there is no cluster to be had.
#[derive(Clone, Debug, Error, PartialEq)]
#[allow(missing_docs)]
pub enum ClusterError {
    #[error("two members are called {node}")]
    Duplicate { node: NodeId },
    #[error("experts cannot be placed: {0}")]
    Placement(#[from] PlacementError),
}

impl Cluster {
    /// A cluster whose members never change. `moe_layers` and `num_experts` are the model's; each expert is
    /// placed on `replicas` expert-nodes (1: its primary alone), weighted by [`Member::weight`]. A node that
    /// calls nobody (an expert-node, a predictor-node) may leave the others out.
    pub fn fixed(
        members: Vec<Member>,
        moe_layers: usize,
        num_experts: usize,
        replicas: usize,
    ) -> Result<Self, ClusterError> {
        Ok(Self::new(Arc::new(fixed(members, moe_layers, num_experts, replicas)?), None))
    }

    /// The same for the model of this digest: a newer placement of it can be adopted. Nobody makes one in a fixed
    /// cluster; this is for tests of nodes that hear of one.
    pub fn fixed_of(
        model: Digest,
        members: Vec<Member>,
        moe_layers: usize,
        num_experts: usize,
        replicas: usize,
    ) -> Result<Self, ClusterError> {
        Ok(Self::new(Arc::new(fixed(members, moe_layers, num_experts, replicas)?.of_model(model)), None))
    }

    /// A handle on what somebody publishes.
    pub(crate) fn new(published: Arc<Published>, end: Option<DropGuard>) -> Self {
        Self { views: published.views(), published, _end: end.map(Arc::new) }
    }

    /// Members and placement that belong together.
    pub fn view(&self) -> View {
        self.views.borrow().clone()
    }

    /// Everyone known now.
    pub fn members(&self) -> Arc<[Member]> {
        self.views.borrow().members.clone()
    }

    /// The placement now; [`Placement::epoch`] tells versions apart.
    pub fn placement(&self) -> Arc<Placement> {
        self.views.borrow().placement.clone()
    }

    /// The placement as it was written, whether or not its nodes are members: what to tell another node of.
    pub fn placement_as_written(&self) -> Arc<Placement> {
        self.published.placement()
    }

    /// The members of one role now.
    pub fn members_of(&self, role: Role) -> Vec<Member> {
        self.views.borrow().members.iter().filter(|member| member.role == role).cloned().collect()
    }

    /// Wakes at every later change: `changed().await`, then [`watch::Receiver::borrow_and_update`].
    pub fn changed(&self) -> watch::Receiver<View> {
        let mut views = self.views.clone();
        views.mark_unchanged();
        views
    }

    /// Whether nobody ever joins or leaves.
    pub fn is_fixed(&self) -> bool {
        self.published.membership().is_fixed()
    }

    /// Where the membership comes from and how that stands.
    pub fn membership(&self) -> Membership {
        self.published.membership()
    }

    /// Takes over a newer placement that another node knew of first; tells whether it was one. `model` is whose
    /// experts it places. The members stay as they are.
    pub fn adopt(&self, model: Digest, placement: Placement) -> bool {
        self.published.adopt(model, placement)
    }

    /// Says that this node has loaded what the placement of this epoch and those before it place on it, as far as
    /// there is room. An older epoch than was said before changes nothing.
    pub fn report_ready(&self, epoch: u64) {
        self.published.report_ready(epoch);
    }

    /// Counts the tokens of `tables` for the experts that they name first: whoever writes the placement gives more
    /// holders to those that are wanted most.
    pub fn note_demand<'a>(&self, tables: impl IntoIterator<Item = &'a HashTable>) {
        self.published.note_demand(tables);
    }

    /// A token that is cancelled once this node has left the cluster, which it does when `shutdown` is, in `patience`
    /// at most: what a server stops at, so that it still answers while others are told that it goes.
    pub fn left_after(&self, shutdown: CancellationToken, patience: Duration) -> CancellationToken {
        let (left, cluster) = (CancellationToken::new(), self.clone());
        let token = left.clone();
        tokio::spawn(async move {
            shutdown.cancelled().await;
            cluster.leave(patience).await;
            left.cancel();
        });
        token
    }

    /// Leaves the cluster: this node is no longer listed, and nothing new is placed on it. Returns once a placement
    /// without it is in force, or after `patience`; calls that are still sent here must still be answered.
    pub async fn leave(&self, patience: Duration) {
        self.published.leave(patience).await;
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("view", &*self.views.borrow()).finish_non_exhaustive()
    }
}

/// What is published in a cluster whose members never change.
fn fixed(
    members: Vec<Member>,
    moe_layers: usize,
    num_experts: usize,
    replicas: usize,
) -> Result<Published, ClusterError> {
    let mut names: Vec<&NodeId> = members.iter().map(|member| &member.node).collect();
    names.sort();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(ClusterError::Duplicate { node: pair[0].clone() });
    }
    let candidates: Vec<Candidate> =
        expert_nodes(&members).map(|member| Candidate { node: member.node.clone(), weight: member.weight }).collect();
    let extent = Extent { moe_layers, num_experts, replicas };
    let placement = Placement::compute(FIXED_EPOCH, extent, &candidates)?;
    Ok(Published::new(members.into(), placement, Membership::fixed())?)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use sida_routing::{ExpertId, ExpertKey, LayerId};

    use super::*;
    use crate::member::Address;

    fn member(name: &str, role: Role) -> Member {
        Member { node: name.into(), role, address: Address::Grpc("127.0.0.1:1".into()), weight: 1.0 }
    }

    #[test]
    fn only_expert_nodes_hold_experts() {
        // Broken: a coordinator would be asked for an expert.
        let members = vec![
            member("a", Role::Coordinator),
            member("b", Role::ExpertNode),
            member("c", Role::PredictorNode),
            member("d", Role::ExpertNode),
        ];
        let cluster = Cluster::fixed(members, 2, 8, 2).unwrap();
        let key = ExpertKey { layer: LayerId(1), expert: ExpertId(7) };
        let mut holders: Vec<_> = cluster.placement().holders(key).map(NodeId::to_string).collect();
        holders.sort();
        assert_eq!(holders, ["b", "d"]);
        assert_eq!(cluster.members_of(Role::PredictorNode).len(), 1);
        assert!(!cluster.changed().has_changed().unwrap());
    }

    #[test]
    fn names_are_unique() {
        // Broken: one node's health or residency would be taken for another's.
        let twice = vec![member("a", Role::Coordinator), member("a", Role::ExpertNode)];
        assert_eq!(Cluster::fixed(twice, 1, 1, 1).unwrap_err(), ClusterError::Duplicate { node: "a".into() });
    }

    #[test]
    fn sixty_four_nodes_and_6144_experts_are_quick() {
        // Broken: a member that comes or goes would stall the coordinator. It should take below 10 ms; the
        // bound is ten times that, since test machines are shared.
        let members = (0..64).map(|i| member(&format!("expert-node-{i}"), Role::ExpertNode)).collect();
        let start = Instant::now();
        let cluster = Cluster::fixed(members, 24, 256, 3).unwrap();
        let taken = start.elapsed();
        println!("64 nodes x 6144 experts: {taken:?}");
        assert_eq!(cluster.placement().nodes().len(), 64);
        assert!(taken.as_millis() < 100, "{taken:?}");
    }
}
