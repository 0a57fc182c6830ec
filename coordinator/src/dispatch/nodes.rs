//! The expert-nodes as this coordinator reaches them: one link per node.
//! Follows the membership of the cluster.
//!
//! An expert-node may know a newer placement than this coordinator, which then takes it over in the middle of a
//! request ([`Nodes::adopt`]).

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use metrics::Histogram;
use parking_lot::{Mutex, RwLock};
use sida_cluster::{
    Cluster, View,
    experts::LocalExperts,
    member::{Address, Member, Role},
};
use sida_proto::wire::decode;
use sida_routing::{
    ExpertKey, NodeId, Placement, Plan, PlanId,
    failover::{self, RetryBudget},
};
use sida_telemetry::{Seldom, gauge, histogram, names};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::dispatch::remote::{
    clock::Clock,
    lane::{Lane, LaneConfig},
};

/// The retry budget: this share of all calls, and so many a second whatever their share.
const RETRY_SHARE: f64 = 0.2;
const RETRIES_PER_SECOND_MIN: f64 = 10.0;

/// One expert-node.
pub(crate) struct Link {
    /// The node's name.
    pub(crate) node: NodeId,
    /// The way to it.
    pub(crate) reach: Reach,
    /// How long calls to the node take.
    pub(crate) durations: Histogram,
    /// Log lines of calls to it that failed.
    pub(crate) failures: Seldom,
}

/// The way to an expert-node.
pub(crate) enum Reach {
    /// In this process: called directly.
    Local(Arc<dyn LocalExperts>),
    /// By gRPC.
    Remote(Arc<Lane>),
}

impl Link {
    /// Whether a call would reach the node, as far as is known: it is in this process, or connected and not lately
    /// silent.
    pub(crate) fn is_up(&self, now: Duration) -> bool {
        match &self.reach {
            Reach::Local(_) => true,
            Reach::Remote(lane) => lane.health(|health| health.is_up(now)),
        }
    }

    /// Gives the node a hint made from a placement of this epoch. A lost hint costs time only.
    pub(crate) fn plan(&self, plan: Plan, placement_epoch: u64) {
        match &self.reach {
            Reach::Local(experts) => experts.plan(plan),
            Reach::Remote(lane) => lane.plan(&plan, placement_epoch),
        }
    }

    /// Takes a hint back.
    pub(crate) fn release(&self, plan: PlanId) {
        match &self.reach {
            Reach::Local(experts) => experts.release(plan),
            Reach::Remote(lane) => lane.release(plan),
        }
    }
}

/// All expert-nodes and the placement on them at one moment.
pub(crate) struct Roster {
    /// The placement of experts on the nodes.
    pub(crate) placement: Arc<Placement>,
    /// Invariant: those of `placement.nodes()`, in that order, so that a node's index there is its link's.
    pub(crate) links: Vec<Arc<Link>>,
    /// How many experts are placed on each.
    placed: Vec<usize>,
}

impl Roster {
    /// The node that is asked first for `key`, as an index into `links`.
    pub(crate) fn first_asked(&self, key: ExpertKey, now: Duration) -> Option<usize> {
        let is_up = |node: usize| self.links[node].is_up(now);
        failover::choose(self.placement.holder_indices(key), self.links.len(), key.expert, &is_up, &[])
    }

    /// Whether some node computes sooner for plans, as far as is known.
    pub(crate) fn gains_by_plans(&self) -> bool {
        let gains = |link: &Arc<Link>| match &link.reach {
            Reach::Local(experts) => experts.gains_by_plans(),
            Reach::Remote(lane) => lane.gains_by_plans(),
        };
        !self.all_resident() && self.links.iter().any(gains)
    }

    /// Whether nothing has to be loaded any more, whichever node is asked for it. Not known of nodes in other processes.
    /// One in this process is asked for nothing but what is placed on it, so when it holds as many, these are they, and
    /// none ever leaves.
    pub(crate) fn all_resident(&self) -> bool {
        let holds_all = |(link, &placed): (&Arc<Link>, &usize)| match &link.reach {
            Reach::Local(experts) => experts.resident_count() >= placed,
            Reach::Remote(_) => false,
        };
        !self.links.is_empty() && self.links.iter().zip(&self.placed).all(holds_all)
    }
}

/// The current [`Roster`].
pub(crate) struct Nodes {
    cluster: Cluster,
    config: LaneConfig,
    runtime: Handle,
    roster: RwLock<Arc<Roster>>,
    /// The retry budget of all calls of this coordinator.
    retries: Mutex<RetryBudget>,
    /// Log lines of calls that wait, since every node failed.
    pub(crate) waits: Seldom,
    /// Ends the tasks that follow the membership and keep the lanes.
    end: CancellationToken,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

impl Nodes {
    /// Links to all expert-nodes of `cluster`, kept up to date by a task on `runtime` until they are dropped.
    pub(crate) fn follow(cluster: &Cluster, config: LaneConfig, runtime: &Handle) -> Arc<Self> {
        let end = CancellationToken::new();
        let mut changes = cluster.changed();
        let first = roster(&cluster.view(), &[], &config, runtime, &end);
        let nodes = Arc::new(Self {
            cluster: cluster.clone(),
            config,
            runtime: runtime.clone(),
            roster: RwLock::new(Arc::new(first)),
            retries: Mutex::new(RetryBudget::new(RETRY_SHARE, RETRIES_PER_SECOND_MIN)),
            waits: Seldom::default(),
            end: end.clone(),
        });
        let following = Arc::downgrade(&nodes);
        runtime.spawn(async move {
            // When the publisher of views is gone, the last view stays.
            while let Some(Ok(())) = end.run_until_cancelled(changes.changed()).await {
                let Some(nodes) = following.upgrade() else { return };
                nodes.refresh();
            }
        });
        nodes
    }

    /// Takes the cluster's view as it is now.
    fn refresh(&self) {
        let mut current = self.roster.write();
        let view = self.cluster.view();
        let new = roster(&view, &current.links, &self.config, &self.runtime, &self.end);
        if new.placement.epoch() != current.placement.epoch() {
            tracing::info!(epoch = view.placement.epoch(), nodes = new.links.len(), "placement changed");
        }
        for link in &new.links {
            // A node that a new view names may have come back.
            if let Reach::Remote(lane) = &link.reach {
                lane.retry_now();
            }
        }
        *current = Arc::new(new);
    }

    /// Takes over the placement that an expert-node refused a call with, an encoded `sida.v1.PlacementRecord`.
    pub(crate) fn adopt(&self, record: &Bytes) {
        match decode::placement(record) {
            Ok(record) => {
                self.cluster.adopt(record.model, Arc::unwrap_or_clone(record.placement));
                // The membership may have brought it here before, and the roster not have followed yet.
                if self.cluster.placement().epoch() > self.roster().placement.epoch() {
                    self.refresh();
                }
            }
            Err(error) => tracing::warn!(%error, "an expert-node's placement cannot be read"),
        }
    }

    /// Notes a call that is made for the first time.
    pub(crate) fn note_call(&self, now: Duration) {
        self.retries.lock().call(now);
    }

    /// Whether a call may be made again.
    pub(crate) fn take_retry(&self, now: Duration) -> bool {
        self.retries.lock().take_retry(now)
    }

    /// The time that all decisions on these nodes are made in.
    pub(crate) fn clock(&self) -> Clock {
        self.config.clock
    }

    /// All expert-nodes as they are now. The caller's copy does not change.
    pub(crate) fn roster(&self) -> Arc<Roster> {
        self.roster.read().clone()
    }

    /// Ends the lanes. No call can be made after that.
    pub(crate) fn close(&self) {
        self.end.cancel();
    }

    /// Waits until every remote node is connected, `patience` at most; says which are not.
    pub(crate) async fn connected(&self, patience: Duration) -> Vec<NodeId> {
        let deadline = self.clock().now() + patience;
        loop {
            let now = self.clock().now();
            let roster = self.roster();
            let missing = roster.links.iter().filter(|link| !link.is_up(now)).map(|link| link.node.clone());
            let missing: Vec<NodeId> = missing.collect();
            if missing.is_empty() || now >= deadline {
                return missing;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The links of a view; those of `old` that lead to the same place stay as they are.
fn roster(
    view: &View,
    old: &[Arc<Link>],
    config: &LaneConfig,
    runtime: &Handle,
    shutdown: &CancellationToken,
) -> Roster {
    gauge!(names::PLACEMENT_EPOCH).set(view.placement.epoch() as f64);
    let members = view.members.iter().filter(|member| member.role == Role::ExpertNode);
    let mut links: Vec<Arc<Link>> = members
        .map(|member| match old.iter().find(|link| leads_to(link, member)) {
            Some(link) => link.clone(),
            None => Arc::new(link(member, config, runtime, shutdown)),
        })
        .collect();
    links.sort_by(|a, b| a.node.cmp(&b.node));
    debug_assert!(links.iter().map(|link| &link.node).eq(view.placement.nodes()));
    let placed = links.iter().map(|link| view.placement.held_by(&link.node).count()).collect();
    Roster { placement: view.placement.clone(), links, placed }
}

fn leads_to(link: &Link, member: &Member) -> bool {
    link.node == member.node
        && match (&link.reach, &member.address) {
            (Reach::Local(mine), Address::Local(theirs)) => Arc::ptr_eq(mine, theirs),
            (Reach::Remote(lane), Address::Grpc(address)) => lane.address() == address,
            _ => false,
        }
}

fn link(member: &Member, config: &LaneConfig, runtime: &Handle, shutdown: &CancellationToken) -> Link {
    let reach = match &member.address {
        Address::Local(experts) => Reach::Local(experts.clone()),
        Address::Grpc(address) => Reach::Remote(Lane::open(
            member.node.clone(),
            address.clone(),
            config.clone(),
            runtime,
            shutdown.child_token(),
        )),
    };
    let durations = histogram!(names::DISPATCH_DURATION_SECONDS, names::NODE => member.node.to_string());
    Link { node: member.node.clone(), reach, durations, failures: Seldom::default() }
}
