//! What a hundred expert-nodes ask of etcd. The figures are in docs/operations.md. Runs with `SIDA_LONG_TESTS=1`.
//!
//! The members are tasks of this process that do with etcd what nodes do, each on a connection of its own; they load
//! nothing, so they are ready at once.

use std::time::{Duration, Instant};

use sida_cluster::{Address, Cluster, EtcdConfig, Joining, Member, Role};
use sida_routing::{Candidate, Digest, Extent, NodeId, Placement, placement::moves};
use sida_tests::Etcd;
use tokio::{task::JoinSet, time::sleep};

const NODES: usize = 100;
const COORDINATORS: usize = 3;
const EXTENT: Extent = Extent { moe_layers: 12, num_experts: 512, replicas: 2 };
/// Far more than anything takes.
const LIMIT: Duration = Duration::from_secs(300);

/// A member. It is gone without a word when it is dropped.
struct One {
    name: NodeId,
    cluster: Cluster,
    _following: JoinSet<()>,
}

/// Joins the cluster at these endpoints, with the lease, the pace and the listings that are the default.
fn join(endpoints: &str, role: Role, number: usize) -> One {
    let name = NodeId::from(format!("{role}-{number}"));
    let member =
        Member { node: name.clone(), role, address: Address::Grpc(format!("10.0.0.{number}:50051")), weight: 1.0 };
    let joining = Joining { member, model: Digest([7; 32]), extent: EXTENT };
    let config = EtcdConfig::new(vec![endpoints.to_owned()], "default".to_owned());
    let cluster = Cluster::join(config, joining).expect("sound settings");
    let mut following = JoinSet::new();
    if role == Role::ExpertNode {
        let (mut changed, cluster) = (cluster.changed(), cluster.clone());
        following.spawn(async move {
            while changed.changed().await.is_ok() {
                cluster.report_ready(cluster.placement().epoch());
            }
        });
    }
    One { name, cluster, _following: following }
}

/// What etcd has done so far.
#[derive(Clone, Copy)]
struct Work {
    at: Instant,
    cpu: Duration,
    sent: f64,
    watched: f64,
    renewed: f64,
    written: f64,
}

impl Work {
    fn of(etcd: &Etcd) -> Self {
        Self {
            at: Instant::now(),
            cpu: etcd.cpu(),
            sent: etcd.metric("etcd_network_client_grpc_sent_bytes_total"),
            watched: etcd.metric("etcd_debugging_mvcc_events_total"),
            renewed: etcd.metric("etcd_debugging_lease_renewed_total"),
            written: etcd.metric("etcd_mvcc_put_total"),
        }
    }

    fn tell(&self, what: &str, etcd: &Etcd, took: Duration, epochs: u64) {
        let now = Self::of(etcd);
        println!(
            "{what}: {took:.1?}, {epochs} placements; over {:.1?} etcd took {:.2?} of CPU, sent {:.2} MB, told {:.0} \
             events, renewed {:.0} leases, wrote {:.0} keys",
            self.at.elapsed(),
            now.cpu - self.cpu,
            (now.sent - self.sent) / 1e6,
            now.watched - self.watched,
            now.renewed - self.renewed,
            now.written - self.written,
        );
    }
}

/// Waits until every member knows one placement, and it is the one that the expert-nodes among them should have. Tells
/// its epoch.
async fn at_rest(members: &[One]) -> u64 {
    let started = Instant::now();
    let names = members.iter().skip(COORDINATORS).map(|member| member.name.clone());
    let candidates: Vec<Candidate> = names.map(|node| Candidate { node, weight: 1.0 }).collect();
    let target = Placement::compute(0, EXTENT, &candidates).expect("names and weights of ours");
    loop {
        let placements: Vec<_> = members.iter().map(|member| member.cluster.placement_as_written()).collect();
        let epoch = placements[0].epoch();
        let is_one = placements.iter().all(|placement| placement.epoch() == epoch);
        if is_one && placements[0].nodes() == target.nodes() && placements[0].same_holders(&target) {
            return epoch;
        }
        assert!(started.elapsed() < LIMIT, "not at rest: epoch {epoch} on {} nodes", placements[0].nodes().len());
        sleep(Duration::from_millis(20)).await;
    }
}

/// A large cluster would ask more of etcd than that has.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_members_share_an_etcd() {
    if std::env::var_os("SIDA_LONG_TESTS").is_none() {
        return println!("SKIPPED: runs with SIDA_LONG_TESTS=1");
    }
    let etcd = Etcd::start(1);
    let endpoints = etcd.endpoints();
    let (began, work) = (Instant::now(), Work::of(&etcd));
    let coordinators = (0..COORDINATORS).map(|number| join(&endpoints, Role::Coordinator, number));
    let mut members: Vec<One> = coordinators.collect();
    members.extend((0..NODES).map(|number| join(&endpoints, Role::ExpertNode, number)));
    let epoch = at_rest(&members).await;
    work.tell("start of all", &etcd, began.elapsed(), epoch);

    let work = Work::of(&etcd);
    sleep(Duration::from_secs(30)).await;
    work.tell("nothing happens", &etcd, Duration::from_secs(30), 0);

    for (what, number) in [("a node dies", None), ("it comes back", Some(NODES - 1))] {
        let (before, began, work) = (members[0].cluster.placement_as_written(), Instant::now(), Work::of(&etcd));
        match number {
            None => drop(members.pop()),
            Some(number) => members.push(join(&endpoints, Role::ExpertNode, number)),
        }
        let epoch = at_rest(&members).await;
        work.tell(what, &etcd, began.elapsed(), epoch - before.epoch());
        println!("{} copies moved", moves(&before, &members[0].cluster.placement_as_written()));
    }
}
