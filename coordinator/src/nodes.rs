//! The expert-nodes as this coordinator reaches them: one link per node, and who is asked for an expert.
//! Follows the cluster's membership; read by `dispatch`, `preload`, `health` and the status service.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use metrics::Histogram;
use parking_lot::RwLock;
use sida_cluster::{
    Cluster, View,
    experts::LocalExperts,
    member::{Address, Member, Role},
};
use sida_routing::{ExpertKey, NodeId, Placement, Plan, PlanId};
use sida_telemetry::{gauge, histogram, names};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::lane::{Lane, LaneConfig};

/// One expert-node.
pub(crate) struct Link {
    /// Its name.
    pub(crate) node: NodeId,
    /// The way to it.
    pub(crate) reach: Reach,
    /// How long its calls take.
    pub(crate) durations: Histogram,
}

/// The way to an expert-node.
pub(crate) enum Reach {
    /// In this process: called directly.
    Local(Arc<dyn LocalExperts>),
    /// By gRPC.
    Remote(Arc<Lane>),
}

impl Link {
    /// Whether a call would reach it as far as is known: in this process, or connected and not lately silent.
    pub(crate) fn is_up(&self, now: Instant) -> bool {
        match &self.reach {
            Reach::Local(_) => true,
            Reach::Remote(lane) => lane.is_up(now),
        }
    }

    /// Gives it a hint. A lost hint costs time only.
    pub(crate) fn plan(&self, plan: Plan) {
        match &self.reach {
            Reach::Local(experts) => experts.plan(plan),
            Reach::Remote(lane) => lane.plan(&plan),
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
    /// Who should hold what.
    pub(crate) placement: Arc<Placement>,
    /// Invariant: in the order of `placement.nodes()`.
    pub(crate) links: Vec<Arc<Link>>,
}

impl Roster {
    /// Whom to ask for `key`, as an index into `links`: the first of its holders that is up, else any other
    /// node that is up (it loads the expert from its own store), else whoever is left. Never one of `tried`.
    pub(crate) fn choose(&self, key: ExpertKey, tried: &[usize], now: Instant) -> Option<usize> {
        let holders = self.placement.holder_indices(key).iter().map(|&node| usize::from(node));
        // Rotated by the expert, so that the experts of a dead node do not all go to the same other one.
        let start = usize::from(key.expert.0);
        let others = (0..self.links.len()).map(|at| (at + start) % self.links.len());
        let untried = || holders.clone().chain(others.clone()).filter(|node| !tried.contains(node));
        untried().find(|&node| self.links[node].is_up(now)).or_else(|| untried().next())
    }

    /// Whether somebody who is up was not `asked` yet.
    pub(crate) fn anyone_else(&self, asked: &[usize], now: Instant) -> bool {
        self.links.iter().enumerate().any(|(node, link)| !asked.contains(&node) && link.is_up(now))
    }
}

/// The current [`Roster`].
pub(crate) struct Nodes {
    roster: RwLock<Arc<Roster>>,
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
        let shutdown = CancellationToken::new();
        let mut changes = cluster.changed();
        let connect = {
            let runtime = runtime.clone();
            let shutdown = shutdown.clone();
            move |view: &View, old: &[Arc<Link>]| roster(view, old, &config, &runtime, &shutdown)
        };
        let roster = RwLock::new(Arc::new(connect(&cluster.view(), &[])));
        let nodes = Arc::new(Self { roster, end: shutdown.clone() });
        let following = Arc::downgrade(&nodes);
        runtime.spawn(async move {
            // The publisher outlives us or is gone; then the last view stays.
            while let Some(Ok(())) = shutdown.run_until_cancelled(changes.changed()).await {
                let view = changes.borrow_and_update().clone();
                let Some(nodes) = following.upgrade() else { return };
                let roster = connect(&view, &nodes.roster().links);
                tracing::info!(epoch = view.placement.epoch(), nodes = roster.links.len(), "placement changed");
                *nodes.roster.write() = Arc::new(roster);
            }
        });
        nodes
    }

    /// Everyone now. Consistent for as long as the caller holds it.
    pub(crate) fn roster(&self) -> Arc<Roster> {
        self.roster.read().clone()
    }

    /// Ends the lanes: nobody will call any more.
    pub(crate) fn close(&self) {
        self.end.cancel();
    }

    /// Waits until every remote node is connected, `patience` at most; says which are not.
    pub(crate) async fn connected(&self, patience: Duration) -> Vec<NodeId> {
        let deadline = Instant::now() + patience;
        loop {
            let now = Instant::now();
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
    Roster { placement: view.placement.clone(), links }
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
    Link { node: member.node.clone(), reach, durations }
}
