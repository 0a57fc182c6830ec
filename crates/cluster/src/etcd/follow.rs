//! The task that follows a cluster in etcd: one connection after the other, for as long as there is a handle on the
//! cluster. Here is what outlives a connection: the lease, who was there before, and what this node has published.

use std::{sync::Arc, time::Duration};

use sida_proto::wire::{PlacementRecord, placement::RECORD_BYTES_MAX};
use sida_routing::{
    Placement, Policy,
    membership::{Decision, Members, Pace, Standing, Writer},
};
use sida_telemetry::{
    counter, gauge,
    names::{self, On},
};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use super::{
    EtcdConfig, EtcdError, Joining,
    lease::Lease,
    listing::Listing,
    session::{self, ConnectionLost},
};
use crate::{
    Cluster,
    member::{Address, Member, Role, is_host_and_port, is_name},
    member_record::MemberRecord,
    membership::Membership,
    published::Published,
    view,
};

/// The first and the longest pause between two connections. A quarter of a lease is enough, too: whoever comes back
/// with etcd must be there before its lease has run out.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Holders more than asked for that a hot expert can get.
const HOT_REPLICAS_MAX: usize = 2;
/// Copies that one placement adds to the one before.
const COPIES_MAX: usize = 256;
/// Bytes of a holder in a record: an index of two varint bytes.
const HOLDER_BYTES: usize = 2;

/// What goes on from one connection to the next.
pub(super) struct Follower {
    pub(super) config: EtcdConfig,
    pub(super) joining: Joining,
    pub(super) published: Arc<Published>,
    pub(super) lease: Option<Lease>,
    members: Members<MemberRecord>,
    /// The term as the writer of the placement, while there is one.
    writer: Option<Writer>,
    /// When the writer wants to decide again.
    decides_at: Option<Duration>,
    /// The moment from which time is counted.
    origin: Instant,
    /// Whether etcd was last told to be there; `None`: nothing was told yet.
    told: Option<bool>,
    twin_told: bool,
    strangers: usize,
}

/// Starts the task.
pub(super) fn start(config: EtcdConfig, joining: Joining) -> Result<Cluster, EtcdError> {
    config.check()?;
    check(&joining)?;
    let members = vec![joining.member.clone()];
    let published = Published::new(members.into(), view::nowhere(joining.extent)?, Membership::etcd())?;
    let published = Arc::new(published.of_model(joining.model));
    let lease_ttl = config.lease_ttl;
    let follower = Follower {
        config,
        joining,
        published: published.clone(),
        lease: None,
        members: Members::new(lease_ttl),
        writer: None,
        decides_at: None,
        origin: Instant::now(),
        told: None,
        twin_told: false,
        strangers: 0,
    };
    let end = CancellationToken::new();
    let ended = end.clone();
    tokio::spawn(async move { ended.run_until_cancelled_owned(follow(follower)).await });
    Ok(Cluster::new(published, Some(end.drop_guard())))
}

fn check(joining: &Joining) -> Result<(), EtcdError> {
    let Member { node, address, .. } = &joining.member;
    if !is_name(node.as_str()) {
        return Err(EtcdError::Member { found: node.to_string() });
    }
    if !matches!(address, Address::Grpc(address) if is_host_and_port(address)) {
        return Err(EtcdError::Member { found: address.to_string() });
    }
    let extent = joining.extent;
    let holders = extent.experts().saturating_mul(extent.replicas);
    let bytes = holders.saturating_mul(HOLDER_BYTES).saturating_add(extent.experts());
    if bytes > RECORD_BYTES_MAX {
        return Err(EtcdError::TooLarge { replicas: extent.replicas, expected: RECORD_BYTES_MAX });
    }
    Ok(())
}

/// One connection after the other, each to the next endpoint.
async fn follow(mut follower: Follower) {
    names::declare(On::Etcd);
    for outcome in ["written", "refused"] {
        counter!(names::PLACEMENT_WRITES_TOTAL, names::OUTCOME => outcome).increment(0);
    }
    let leaving = follower.published.leaving().clone();
    let backoff_max = BACKOFF.1.min(follower.config.lease_ttl / 4);
    let mut backoff = BACKOFF.0;
    for endpoint in follower.config.endpoints.clone().iter().cycle() {
        let was_leaving = leaving.is_cancelled();
        match session::run(&mut follower, endpoint).await {
            Ok(()) => break,
            Err(lost) => {
                if follower.disconnected(endpoint, &lost) {
                    backoff = BACKOFF.0;
                }
            }
        }
        if was_leaving {
            break; // etcd will know by the lease.
        }
        // All nodes lose etcd at the same time; they shall not all come back at the same time.
        let pause = backoff.mul_f64(rand::random_range(0.5..1.0));
        let _ = time::timeout(pause, leaving.cancelled()).await;
        backoff = (backoff * 2).min(backoff_max);
    }
    follower.published.left().cancel();
}

impl Follower {
    pub(super) fn lease(&self) -> Result<Lease, ConnectionLost> {
        self.lease.clone().ok_or_else(|| ConnectionLost::new("there is no lease"))
    }

    /// A connection stands, and this was listed first.
    pub(super) fn connected(&mut self, endpoint: &str, listing: &Listing) {
        self.published.set_connected(true);
        gauge!(names::ETCD_CONNECTED).set(1.0);
        if self.told.replace(true) != Some(true) {
            tracing::info!(endpoint, cluster = self.config.cluster, members = listing.members.len(), "etcd is there");
        }
        self.members.reconnected(self.now());
    }

    /// A connection ended, or did not come about; tells whether there was one.
    fn disconnected(&mut self, endpoint: &str, lost: &ConnectionLost) -> bool {
        self.writer = None;
        gauge!(names::PLACEMENT_LEADER).set(0.0);
        gauge!(names::ETCD_CONNECTED).set(0.0);
        self.published.set_connected(false);
        let was_there = self.told == Some(true);
        if self.told.replace(false) != Some(false) {
            counter!(names::ETCD_DISCONNECTS_TOTAL).increment(1);
            tracing::warn!(endpoint, reason = %lost, "etcd is away; this node goes on with what it knows");
        } else {
            tracing::debug!(endpoint, reason = %lost, "etcd is still away");
        }
        was_there
    }

    /// Everything was listed anew.
    pub(super) fn relisted(&self, listing: &Listing) {
        tracing::debug!(revision = listing.revision, members = listing.members.len(), "listed everything");
    }

    /// Somebody else is listed under this node's name.
    pub(super) fn warn_of_twin(&mut self, address: &str) {
        if !std::mem::replace(&mut self.twin_told, true) {
            let node = &self.joining.member.node;
            tracing::error!(%node, address, "another process is listed under this node's name; give each its own");
        }
    }

    /// Publishes what is listed; tells when that changes by itself.
    pub(super) fn publish(&mut self, listing: &Listing) -> Option<Instant> {
        let (now, model) = (self.now(), self.joining.model);
        let listed = listing.members.iter().map(|(node, record)| (node.clone(), record.clone()));
        self.members.listed(now, listing.revision.unsigned_abs(), listed);
        self.members.expire(now);
        let members: Vec<MemberRecord> = self.members.counting(now).map(|(_, record)| record.clone()).collect();
        let strangers = members.iter().filter(|record| record.model != model).count();
        let ours = || members.iter().filter(|record| record.model == model);
        let ready = ours().map(|record| (record.member.node.clone(), record.ready_epoch)).collect();
        let mut members: Vec<Member> = ours().map(|record| record.member.clone()).collect();
        if !members.iter().any(|member| member.node == self.joining.member.node) {
            members.push(self.joining.member.clone()); // This node is a member to itself, whatever etcd lists.
        }
        if std::mem::replace(&mut self.strangers, strangers) != strangers {
            let told = "members serve another model than this node and are not seen by it";
            tracing::error!(strangers, cluster = self.config.cluster, model = %model, "{told}");
        }
        for role in [Role::Coordinator, Role::ExpertNode, Role::PredictorNode] {
            let count = members.iter().filter(|member| member.role == role).count();
            gauge!(names::MEMBERS, names::ROLE => role.to_string()).set(count as f64);
        }
        let record = listing.placement.record.as_ref().filter(|record| record.model == model);
        self.published.set_leader(listing.leader.as_ref().map(|leader| leader.node.clone()), ready);
        self.published.take(members, model, record.map(|record| &record.placement));
        let again = [self.members.changes_at(), self.decides_at].into_iter().flatten().min();
        again.map(|again| self.origin + again)
    }

    /// Whether this node may write the placement: not where it is another model's, as long as that is in use.
    pub(super) fn may_lead(&self, listing: &Listing) -> bool {
        listing.placement.record.as_ref().is_none_or(|record| {
            let in_use = |member: &MemberRecord| member.model == record.model;
            record.model == self.joining.model || !listing.members.values().any(in_use)
        })
    }

    /// Whether this node leads now. A new leader takes over what the one before has concluded from the demand.
    pub(super) fn set_leads(&mut self, leads: bool, listing: &Listing) {
        if self.writer.is_some() == leads {
            return;
        }
        gauge!(names::PLACEMENT_LEADER).set(f64::from(u8::from(leads)));
        self.decides_at = None;
        if !leads {
            self.writer = None;
            return;
        }
        tracing::info!(node = %self.joining.member.node, "this node writes the placement");
        if let Some(record) = &listing.placement.record {
            self.published.demand(|demand| demand.adopt(&record.placement));
        }
        let replicas = self.joining.extent.replicas;
        let policy = Policy { replicas, hot_replicas_max: HOT_REPLICAS_MAX, moves_max: COPIES_MAX };
        let pace = Pace {
            moves_per_minute: self.config.moves_per_minute,
            absence_borne: self.config.lease_ttl,
            ..Pace::default()
        };
        self.writer = Some(Writer::new(policy, pace, self.now()));
    }

    /// What was asked for lately fades, and is concluded from.
    pub(super) fn settle_demand(&self, decay: f64) {
        self.published.demand(|demand| {
            demand.decay(decay);
            demand.settle();
        });
    }

    /// What the leader should write next, if anything. The decision is `sida_routing`'s.
    pub(super) fn next_placement(&mut self, listing: &Listing) -> Option<PlacementRecord> {
        let (now, model, extent) = (self.now(), self.joining.model, self.joining.extent);
        let nodes = self.members.counting(now).map(|(_, record)| record);
        let nodes = nodes.filter(|record| record.model == model && record.member.role == Role::ExpertNode);
        let standing = |record: &MemberRecord| Standing {
            node: record.member.node.clone(),
            weight: record.member.weight,
            // A node that leaves takes itself off the list.
            is_leaving: false,
            ready_epoch: record.ready_epoch,
        };
        let standings: Vec<Standing> = nodes.map(standing).collect();
        let stored_epoch = listing.placement.record.as_ref().map_or(0, |record| record.placement.epoch());
        let current = self.current();
        let demand = self.published.demand(|_| {});
        let decided = self.writer.as_mut()?.decide(now, current.as_deref(), stored_epoch, extent, &standings, &demand);
        match decided.inspect_err(|error| tracing::error!(%error, "experts cannot be placed")).ok()? {
            Decision::Write(placement) => Some(PlacementRecord { model, placement: Arc::new(placement) }),
            Decision::Wait(until) => {
                self.decides_at = until;
                None
            }
        }
    }

    /// The writer's placement is in force.
    pub(super) fn written(&mut self, placement: &Placement) {
        let (now, current) = (self.now(), self.current());
        self.decides_at = None;
        if let Some(writer) = &mut self.writer {
            writer.written(now, current.as_deref(), placement);
        }
    }

    /// The newest placement that is known; `None` before the first.
    fn current(&self) -> Option<Arc<Placement>> {
        Some(self.published.placement()).filter(|placement| placement.epoch() > 0)
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }
}
