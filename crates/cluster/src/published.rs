//! The state that is published of a cluster, and what this node reports, between the handles ([`crate::Cluster`]) and
//! the keeper of the membership (the task of `etcd`; in a fixed cluster there is none).
//!
//! The placement as it was written is kept beside the view that is cut to the members: a node that comes back finds
//! what it held without anybody writing anything.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use sida_routing::{
    Demand, Digest, ExpertKey, HashTable, NodeId, Placement, PlacementError,
    membership::{Verdict, judge},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    member::Member,
    membership::{Membership, Source},
    view::{View, expert_nodes},
};

pub(crate) struct Published {
    known: Mutex<KnownCluster>,
    views: watch::Sender<View>,
    /// The epoch up to which this node is ready.
    ready: watch::Sender<u64>,
    demand: Mutex<Demand>,
    /// Cancelled when this node wants to leave.
    leaving: CancellationToken,
    /// Cancelled when this node has left.
    left: CancellationToken,
}

/// What is known of the cluster now.
struct KnownCluster {
    /// The model whose experts are placed; `None` where that is not known.
    model: Option<Digest>,
    members: Arc<[Member]>,
    /// The placement as it was written.
    placement: Arc<Placement>,
    membership: Membership,
}

impl Published {
    /// Publishes a first view.
    pub(crate) fn new(
        members: Arc<[Member]>,
        placement: Placement,
        membership: Membership,
    ) -> Result<Self, PlacementError> {
        let placement = Arc::new(placement);
        let (views, _) = watch::channel(View::of(members.clone(), &placement)?);
        let demand = Demand::new(placement.extent().moe_layers, placement.extent().num_experts);
        Ok(Self {
            known: Mutex::new(KnownCluster { model: None, members, placement, membership }),
            views,
            ready: watch::channel(0).0,
            demand: Mutex::new(demand),
            leaving: CancellationToken::new(),
            left: CancellationToken::new(),
        })
    }

    /// Lets placements of `model` be adopted.
    pub(crate) fn of_model(mut self, model: Digest) -> Self {
        self.known.get_mut().model = Some(model);
        self
    }

    pub(crate) fn views(&self) -> watch::Receiver<View> {
        self.views.subscribe()
    }

    pub(crate) fn membership(&self) -> Membership {
        self.known.lock().membership.clone()
    }

    /// The newest placement, as it was written.
    pub(crate) fn placement(&self) -> Arc<Placement> {
        self.known.lock().placement.clone()
    }

    /// Takes over a placement that another node knows, if it is newer than the known one and of the same model.
    pub(crate) fn adopt(&self, model: Digest, placement: Placement) -> bool {
        let mut known = self.known.lock();
        let own = known.model.unwrap_or(model);
        let taken = judge(Some((&known.placement, own)), &placement, model) == Verdict::Adopt;
        if taken {
            tracing::info!(epoch = placement.epoch(), "took over a newer placement from another node");
            known.placement = Arc::new(placement);
            self.publish(&known);
        }
        taken
    }

    /// Takes over what the source of the membership has: members, and the placement where there is one. A placement
    /// that is older than the known one is left out: another node has told of the newer one, which will come from the
    /// source, too.
    pub(crate) fn take(&self, members: Vec<Member>, model: Digest, placement: Option<&Arc<Placement>>) {
        let mut known = self.known.lock();
        known.members = or_last_expert_nodes(members, &known.members).into();
        if let Some(placement) = placement {
            let own = known.model.unwrap_or(model);
            match judge(Some((&known.placement, own)), placement, model) {
                Verdict::Adopt => known.placement = placement.clone(),
                Verdict::Known | Verdict::Older => {}
                refused => tracing::error!(epoch = placement.epoch(), ?refused, "a placement in etcd is not taken"),
            }
        }
        self.publish(&known);
    }

    fn publish(&self, known: &KnownCluster) {
        match View::of(known.members.clone(), &known.placement) {
            Ok(view) => {
                self.views.send_if_modified(|published| {
                    let changed = !published.is_same(&view);
                    if changed {
                        *published = view;
                    }
                    changed
                });
            }
            // Names are checked and unique before they come here, so this takes more nodes than can be placed on.
            Err(error) => tracing::error!(%error, "the last view of the cluster stays"),
        }
    }

    /// Notes whether the source of the membership is connected.
    pub(crate) fn set_connected(&self, connected: bool) {
        self.known.lock().membership.source = Source::Etcd { connected };
    }

    pub(crate) fn set_leader(&self, leader: Option<NodeId>, ready: BTreeMap<NodeId, u64>) {
        let membership = &mut self.known.lock().membership;
        (membership.leader, membership.ready) = (leader, ready);
    }

    pub(crate) fn report_ready(&self, epoch: u64) {
        self.ready.send_if_modified(|ready| std::mem::replace(ready, epoch.max(*ready)) < epoch);
    }

    pub(crate) fn ready(&self) -> watch::Receiver<u64> {
        self.ready.subscribe()
    }

    pub(crate) fn note_demand<'a>(&self, tables: impl IntoIterator<Item = &'a HashTable>) {
        if self.known.lock().membership.is_fixed() {
            return;
        }
        let mut demand = self.demand.lock();
        for table in tables {
            for layer in table.layers() {
                for token in 0..table.shape().tokens {
                    if let Some(&expert) = table.experts(layer, token).first() {
                        demand.note(ExpertKey { layer, expert }, 1);
                    }
                }
            }
        }
    }

    /// What was asked for lately, after `change`.
    pub(crate) fn demand(&self, change: impl FnOnce(&mut Demand)) -> Demand {
        let mut demand = self.demand.lock();
        change(&mut demand);
        demand.clone()
    }

    pub(crate) async fn leave(&self, patience: Duration) {
        if !self.membership().is_fixed() {
            self.leaving.cancel();
            let _ = tokio::time::timeout(patience, self.left.cancelled()).await;
        }
    }

    pub(crate) fn leaving(&self) -> &CancellationToken {
        &self.leaving
    }

    pub(crate) fn left(&self) -> &CancellationToken {
        &self.left
    }
}

/// `members`; where no expert-node is left among them, with those that were there last. They may only have lost etcd
/// and not their coordinators, and who asks them in vain finds that out at once.
fn or_last_expert_nodes(mut members: Vec<Member>, last: &[Member]) -> Vec<Member> {
    if expert_nodes(&members).next().is_none() {
        let is_new = |node: &Member| members.iter().all(|member| member.node != node.node);
        let kept: Vec<Member> = expert_nodes(last).filter(|node| is_new(node)).cloned().collect();
        members.extend(kept);
    }
    members
}

#[cfg(test)]
mod tests {
    use sida_routing::{Candidate, Extent};

    use super::*;
    use crate::{
        member::{Address, Role},
        view,
    };

    const EXTENT: Extent = Extent { moe_layers: 1, num_experts: 8, replicas: 2 };
    const MODEL: Digest = Digest([7; 32]);

    fn members(names: &[(&str, Role)]) -> Vec<Member> {
        let address = Address::Grpc("127.0.0.1:1".into());
        let member =
            |&(name, role): &(&str, Role)| Member { node: name.into(), role, address: address.clone(), weight: 1.0 };
        names.iter().map(member).collect()
    }

    fn placement(epoch: u64) -> Arc<Placement> {
        let candidates = ["a", "b"].map(|name| Candidate { node: name.into(), weight: 1.0 });
        Arc::new(Placement::compute(epoch, EXTENT, &candidates).unwrap())
    }

    fn names(published: &Published) -> Vec<String> {
        published.views().borrow().members.iter().map(|member| member.node.to_string()).collect()
    }

    #[test]
    fn the_last_expert_nodes_stay_until_others_come() {
        // Broken: nodes that are cut off from etcd and from nobody else would no longer be asked.
        let own = ("c", Role::Coordinator);
        let nowhere = view::nowhere(EXTENT).unwrap();
        let published = Published::new(members(&[own]).into(), nowhere, Membership::etcd()).unwrap().of_model(MODEL);
        assert_eq!(names(&published), ["c"]);
        published.take(members(&[own, ("a", Role::ExpertNode), ("b", Role::ExpertNode)]), MODEL, None);
        published.take(members(&[own, ("a", Role::ExpertNode)]), MODEL, None);
        assert_eq!(names(&published), ["c", "a"]);
        published.take(members(&[own]), MODEL, None);
        assert_eq!(names(&published), ["c", "a"]);
        published.take(members(&[own, ("d", Role::ExpertNode)]), MODEL, None);
        assert_eq!(names(&published), ["c", "d"]);
    }

    #[test]
    fn no_view_goes_back() {
        // Broken: a late event, or a coordinator that was paused, would undo a move.
        let nowhere = view::nowhere(EXTENT).unwrap();
        let all = members(&[("a", Role::ExpertNode), ("b", Role::ExpertNode)]);
        let published = Published::new(all.clone().into(), nowhere, Membership::etcd()).unwrap().of_model(MODEL);
        let epoch = || published.views().borrow().placement.epoch();
        published.take(all.clone(), MODEL, Some(&placement(4)));
        assert!(published.adopt(MODEL, Placement::clone(&placement(6))));
        assert!(!published.adopt(MODEL, Placement::clone(&placement(5))));
        assert!(!published.adopt(Digest([8; 32]), Placement::clone(&placement(9))), "another model's");
        published.take(all, MODEL, Some(&placement(5)));
        assert_eq!(epoch(), 6);
    }
}
