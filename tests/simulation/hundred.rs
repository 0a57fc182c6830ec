//! A hundred expert-nodes and 6,144 experts: how long the cluster takes to come to rest after what happens to it, and
//! how many copies of experts that moves. The figures are in docs/operations.md. `SIDA_LONG_TESTS=1` runs five seeds
//! instead of one.

use std::time::Duration;

use sida_routing::{Candidate, Extent, Placement, Policy, membership::Pace};

use crate::{
    coordinator::{Coordinator, Shape, node_name},
    core::Core,
    etcd::LEASE,
    event::{Actor, Event, Micros},
    expert_node::ExpertNode,
    faults::Fault,
    world::World,
};

const NODES: usize = 100;
const COORDINATORS: usize = 3;
/// What a cluster is started with where no flag says otherwise, but for the lease.
const LARGE: Shape = Shape {
    extent: Extent { moe_layers: 12, num_experts: 512, replicas: 2 },
    policy: Policy { replicas: 2, hot_replicas_max: 2, moves_max: 256 },
    pace: Pace {
        moves_per_minute: 600,
        step_interval: Duration::from_millis(250),
        absence_borne: Duration::from_micros(LEASE),
        gather: Duration::from_secs(2),
    },
};
/// How often it is looked whether the cluster is at rest.
const LOOK: Micros = 100_000;
/// Nothing takes so long.
const REST_MAX: Micros = 600_000_000;

impl World {
    /// Lets everything happen that is due before `until`.
    fn advance(&mut self, until: Micros) {
        while self.core.next_at().is_some_and(|at| at < until) {
            let event = self.core.pop().expect("there is one");
            self.step(event);
            assert_eq!(self.core.ledger.violation, None);
        }
    }

    /// Whether every process that runs acts on the placement that is stored, it is the one that these nodes should
    /// have, and all of them have loaded what it places on them.
    fn is_at_rest(&self) -> bool {
        let Some(stored) = self.etcd.placement() else { return false };
        let is_right = |node: &ExpertNode| node.epoch() == stored.epoch() && node.has_loaded(stored);
        let follows = |it: &Coordinator| it.placement().map(Placement::epoch) == Some(stored.epoch());
        if !self.nodes.iter().flatten().all(is_right) || !self.coordinators.iter().flatten().all(follows) {
            return false;
        }
        let runs = self.nodes.iter().enumerate().filter(|(_, node)| node.is_some());
        let candidate = |(at, _)| Candidate { node: node_name(at), weight: self.weights[at] };
        let candidates: Vec<Candidate> = runs.map(candidate).collect();
        stored.same_holders(&Placement::compute(0, LARGE.extent, &candidates).expect("names and weights of ours"))
    }

    /// Something happens; tells how long it takes until the cluster is at rest again.
    fn measure(&mut self, what: &str, faults: &[Fault]) -> Duration {
        let (began, before) = (self.core.now, self.core.ledger.counts);
        faults.iter().for_each(|&fault| self.core.push(began, Event::Fault(fault)));
        // Those that run take a moment to notice.
        self.advance(began + LEASE);
        let mut now = began + LEASE;
        while !self.is_at_rest() {
            assert!(now < began + REST_MAX, "{what}: not at rest after {REST_MAX} us");
            now += LOOK;
            self.advance(now);
        }
        let (took, after) = (Duration::from_micros(now - began), self.core.ledger.counts);
        println!(
            "{what}: at rest after {took:.1?}; {} copies moved in {} placements; {} requests, {} failed, {} calls asked \
             again; {} events",
            after.moves - before.moves,
            after.placements - before.placements,
            after.requests - before.requests,
            after.failed_requests - before.failed_requests,
            after.failed_calls - before.failed_calls,
            after.events - before.events,
        );
        assert_eq!(after.failed_requests, before.failed_requests, "{what}");
        took
    }
}

fn number_of_copies(world: &World, nodes: std::ops::Range<usize>) -> u64 {
    let placement = world.etcd.placement().expect("it was at rest");
    nodes.map(|node| placement.held_by(&node_name(node)).count() as u64).sum()
}

/// A large cluster would take long to recover, move more than what was lost, or fail requests meanwhile.
#[test]
fn a_hundred_nodes_come_to_rest() {
    let is_long = std::env::var_os("SIDA_LONG_TESTS").is_some();
    let seeds = if is_long { 5 } else { 1 };
    for seed in 0..seeds {
        println!("seed {seed}");
        let mut world = World::new(Core::new(LARGE, seed, false), COORDINATORS, vec![1.0; NODES]);
        // The load stays as it is: hot experts would move by themselves.
        world.core.is_quiet = true;
        let coordinators = (0..COORDINATORS).map(Actor::Coordinator);
        let everybody: Vec<Fault> = coordinators.chain((0..NODES).map(Actor::Node)).map(Fault::Start).collect();
        world.measure("start of all", &everybody);

        let moves = |world: &World| world.core.ledger.counts.moves;
        let (lost, before) = (number_of_copies(&world, 0..1), moves(&world));
        world.measure("death of 1 node", &[Fault::Kill(Actor::Node(0))]);
        assert_eq!(moves(&world) - before, lost, "only what it held moves");
        world.measure("its return", &[Fault::Start(Actor::Node(0))]);

        let ten: Vec<Actor> = (1..11).map(Actor::Node).collect();
        world.measure("death of 10 nodes", &ten.iter().map(|&node| Fault::Kill(node)).collect::<Vec<_>>());
        // The return of all ten takes a minute to simulate.
        let back = if is_long { &ten[..] } else { &ten[..1] };
        world.measure("their return", &back.iter().map(|&node| Fault::Start(node)).collect::<Vec<_>>());

        let before = moves(&world);
        world.core.push(world.core.now, Event::Fault(Fault::StoreAway));
        world.advance(world.core.now + 60_000_000);
        world.measure("etcd back after 60 s", &[Fault::StoreBack { leases_run_out: true }]);
        assert_eq!(moves(&world), before, "nobody came or went");
        let leader = Actor::Coordinator(0);
        world.measure("death of a coordinator", &[Fault::Kill(leader)]);
    }
}
