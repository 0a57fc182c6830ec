//! One run: all processes, and one event after another until the end or the first violation.

use std::collections::BTreeMap;

use rand::Rng;
use sida_routing::{Candidate, Placement, failover::BreakerState};

use crate::{
    coordinator::{Coordinator, SMALL, Shape, node_name},
    core::{Core, pair},
    etcd::{Etcd, LEASE},
    event::{Actor, Event, Message, Micros},
    expert_node::ExpertNode,
    faults::{self, FAULTS_END, Fault},
    ledger::{Counts, REACHABLE_MIN},
    requests::PATIENCE,
    session::RELIST,
};

/// By then the cluster has come to rest after the last fault: noticed by everybody (a list and a session's
/// patience), dead registrations gone, a new writer's wait for those it has not seen over, and every copy moved at the pace that is set.
const SETTLED: Micros = FAULTS_END + RELIST + 2 * LEASE + 2_500_000 + MOVES;
/// The moves of every copy of every expert, one exchange after another.
const MOVES: Micros = {
    let Shape { extent, policy, pace } = SMALL;
    let copies = (extent.moe_layers * extent.num_experts * (policy.replicas + policy.hot_replicas_max)) as u64;
    copies * 60_000_000 / pace.moves_per_minute as u64 + 12 * 250_000
};
/// Time for all lanes to be tried again.
const END: Micros = SETTLED + 11_000_000;

/// What became of a run.
pub(crate) struct Outcome {
    pub(crate) violation: Option<String>,
    pub(crate) trace: String,
    pub(crate) counts: Counts,
}

pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) etcd: Etcd,
    pub(crate) coordinators: Vec<Option<Coordinator>>,
    pub(crate) nodes: Vec<Option<ExpertNode>>,
    pub(crate) weights: Vec<f64>,
    /// What happens to a process that stands still waits until it goes on.
    stopped: BTreeMap<Actor, Vec<Event>>,
    /// What is on a way that is cut.
    parked: BTreeMap<(Actor, Actor), Vec<Event>>,
    /// When which coordinator could reach which node.
    reached: BTreeMap<(usize, usize), Reached>,
}

/// When somebody could be reached.
#[derive(Default)]
struct Reached {
    /// From when to when.
    times: Vec<(Micros, Micros)>,
    /// Since when it can be reached now.
    since: Option<Micros>,
}

/// Runs the cluster of a seed.
pub(crate) fn run(seed: u64, traced: bool) -> Outcome {
    let mut core = Core::new(SMALL, seed, traced);
    let coordinators = core.rng.random_range(1..4);
    let nodes: usize = core.rng.random_range(3..7);
    let weights: Vec<f64> = (0..nodes).map(|_| f64::from(core.rng.random_range(1..4u32))).collect();
    core.note(|| format!("seed {seed}: {coordinators} coordinators, expert-nodes of weights {weights:?}"));
    faults::schedule(&mut core, coordinators, nodes);
    let mut world = World::new(core, coordinators, weights);
    world.run();
    let trace = world.core.take_trace();
    Outcome { violation: world.core.ledger.violation.take(), trace, counts: world.core.ledger.counts }
}

impl World {
    /// Nobody runs yet; so many coordinators, and an expert-node of each weight.
    pub(crate) fn new(core: Core, coordinators: usize, weights: Vec<f64>) -> Self {
        Self {
            core,
            etcd: Etcd::new(),
            coordinators: (0..coordinators).map(|_| None).collect(),
            nodes: weights.iter().map(|_| None).collect(),
            weights,
            stopped: BTreeMap::new(),
            parked: BTreeMap::new(),
            reached: BTreeMap::new(),
        }
    }

    fn run(&mut self) {
        let mut has_settled = false;
        while let Some(event) = self.core.pop() {
            if self.core.now >= SETTLED && !has_settled {
                has_settled = true;
                self.check_settled();
            }
            if self.core.now >= END {
                self.check_end();
                break;
            }
            self.step(event);
            if self.core.ledger.violation.is_some() {
                break;
            }
        }
        if let Some(violation) = self.core.ledger.violation.clone() {
            self.core.note(|| violation);
        }
    }

    /// One event, and what must hold after it.
    pub(crate) fn step(&mut self, event: Event) {
        self.core.ledger.counts.events += 1;
        self.etcd.expire(&mut self.core);
        self.core.note(|| event.to_string());
        self.happen(event);
        self.check_failures();
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Fault(fault) => self.fault(fault),
            Event::Deliver { from, to, .. } if self.core.is_cut(from, to) => {
                // A call to the store is given up meanwhile; a lane's bytes are sent again when the way is free.
                if from != Actor::Etcd && to != Actor::Etcd {
                    self.parked.entry(pair(from, to)).or_default().push(event);
                }
            }
            Event::Deliver { to: actor, .. } | Event::Timer { actor, .. } if self.stopped.contains_key(&actor) => {
                self.stopped.get_mut(&actor).expect("just seen").push(event);
            }
            Event::Deliver { from, to: Actor::Etcd, message, .. } => {
                if let (Message::Store { id, op }, true) = (message, self.etcd.is_up) {
                    let life = self.core.life(from);
                    self.etcd.handle(&mut self.core, from, life, id, op);
                }
            }
            Event::Deliver { from, to, life, message } => self.deliver(from, to, life, message),
            Event::Timer { actor, life, timer } => {
                if life != self.core.life(actor) {
                    return;
                }
                match actor {
                    Actor::Coordinator(at) => {
                        if let Some(coordinator) = &mut self.coordinators[at] {
                            coordinator.on_timer(&mut self.core, timer);
                        }
                    }
                    Actor::Node(at) => {
                        if let Some(node) = &mut self.nodes[at] {
                            node.on_timer(&mut self.core, timer);
                        }
                        self.bury(at);
                    }
                    Actor::Etcd => unreachable!("the store has no alarms"),
                }
            }
        }
    }

    fn deliver(&mut self, from: Actor, to: Actor, life: u32, message: Message) {
        let is_same = life == self.core.life(to);
        match to {
            Actor::Coordinator(at) => {
                if let Some(coordinator) = self.coordinators[at].as_mut().filter(|_| is_same) {
                    coordinator.on_message(&mut self.core, from, message);
                }
            }
            Actor::Node(at) => match self.nodes[at].as_mut().filter(|_| is_same) {
                Some(node) => {
                    node.on_message(&mut self.core, from, message);
                    self.bury(at);
                }
                // Nobody listens there.
                None if matches!(message, Message::Call { .. }) => self.core.send(to, from, Message::LaneLost),
                None => {}
            },
            Actor::Etcd => unreachable!("handled before"),
        }
    }

    /// Ends the process of an expert-node that has left.
    fn bury(&mut self, at: usize) {
        if self.nodes[at].as_ref().is_some_and(|node| node.has_left) {
            self.kill(Actor::Node(at));
            self.note_reach();
        }
    }

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Kill(actor) => self.kill(actor),
            Fault::Start(actor) => self.start(actor),
            Fault::Stop(actor) => {
                if self.is_running(actor) {
                    self.stopped.entry(actor).or_default();
                }
            }
            Fault::Resume(actor) => {
                for event in self.stopped.remove(&actor).unwrap_or_default() {
                    self.core.push(self.core.now, event);
                }
                if let Actor::Coordinator(at) = actor
                    && let Some(coordinator) = &mut self.coordinators[at]
                {
                    coordinator.excuse_all();
                }
            }
            Fault::Leave(actor) => {
                if let Actor::Node(at) = actor
                    && let Some(node) = &mut self.nodes[at]
                    && !self.stopped.contains_key(&actor)
                {
                    node.leave(&mut self.core, 5_000_000);
                }
            }
            Fault::Cut(a, b) => _ = self.core.cut.insert(pair(a, b)),
            Fault::Mend(a, b) => {
                self.core.cut.remove(&pair(a, b));
                for event in self.parked.remove(&pair(a, b)).unwrap_or_default() {
                    self.core.push(self.core.now, event);
                }
            }
            Fault::Slow(a, b, more) => _ = self.core.slow.insert(pair(a, b), more),
            Fault::Fast(a, b) => _ = self.core.slow.remove(&pair(a, b)),
            Fault::Unreadable(at, key) => {
                if let Some(node) = &mut self.nodes[at] {
                    node.unreadable = Some(key);
                }
            }
            Fault::Readable(at) => {
                if let Some(node) = &mut self.nodes[at] {
                    node.unreadable = None;
                }
            }
            Fault::Reset(coordinator, node) => self.core.send(node, coordinator, Message::LaneLost),
            Fault::StoreAway => self.etcd.stop(&self.core),
            Fault::StoreBack { leases_run_out } => self.etcd.start(&mut self.core, leases_run_out),
            Fault::Compact => self.etcd.compact(&mut self.core),
            Fault::WatchLoss(percent) => self.core.watch_loss = f64::from(percent) / 100.0,
            Fault::End => {
                self.core.is_quiet = true;
                // Whoever was told to leave and has not ended yet ends, and everybody starts.
                for at in 0..self.nodes.len() {
                    if self.nodes[at].as_ref().is_some_and(ExpertNode::is_leaving) {
                        self.kill(Actor::Node(at));
                    }
                    self.start(Actor::Node(at));
                }
            }
        }
        self.note_reach();
    }

    fn is_running(&self, actor: Actor) -> bool {
        match actor {
            Actor::Etcd => self.etcd.is_up,
            Actor::Coordinator(at) => self.coordinators[at].is_some(),
            Actor::Node(at) => self.nodes[at].is_some(),
        }
    }

    fn start(&mut self, actor: Actor) {
        if self.is_running(actor) {
            return;
        }
        *self.core.lives.entry(actor).or_default() += 1;
        match actor {
            Actor::Coordinator(at) => {
                let nodes = self.nodes.len();
                self.coordinators[at] = Some(Coordinator::start(&mut self.core, at, nodes));
            }
            Actor::Node(at) => self.nodes[at] = Some(ExpertNode::start(&mut self.core, at, self.weights[at])),
            Actor::Etcd => unreachable!("the store comes back, it does not start"),
        }
    }

    fn kill(&mut self, actor: Actor) {
        self.stopped.remove(&actor);
        match actor {
            Actor::Coordinator(at) => self.coordinators[at] = None,
            Actor::Node(at) => {
                self.nodes[at] = None;
                for coordinator in 0..self.coordinators.len() {
                    self.core.send(actor, Actor::Coordinator(coordinator), Message::LaneLost);
                }
            }
            Actor::Etcd => unreachable!("the store goes away, it is not killed"),
        }
    }

    /// Notes who can reach whom from now on.
    fn note_reach(&mut self) {
        let now = self.core.now;
        for (at, node) in self.nodes.iter().enumerate() {
            let actor = Actor::Node(at);
            let stays = node.as_ref().is_some_and(|node| !node.is_leaving());
            if stays && !self.stopped.contains_key(&actor) && !self.core.is_cut(actor, Actor::Etcd) {
                self.core.fit.insert(node_name(at));
            } else {
                self.core.fit.remove(&node_name(at));
                self.core.well.remove(&node_name(at));
            }
        }
        for coordinator in 0..self.coordinators.len() {
            for node in 0..self.nodes.len() {
                let (from, to) = (Actor::Coordinator(coordinator), Actor::Node(node));
                let runs = |actor| self.is_running(actor) && !self.stopped.contains_key(&actor);
                let reaches = runs(from) && runs(to) && !self.core.is_cut(from, to);
                let Reached { times, since } = self.reached.entry((coordinator, node)).or_default();
                match (reaches, *since) {
                    (true, None) => *since = Some(now),
                    (false, Some(began)) => {
                        times.push((began, now));
                        *since = None;
                    }
                    _ => {}
                }
            }
        }
    }

    /// A request may fail only if no node could be reached for long enough while it was tried.
    fn check_failures(&mut self) {
        for (actor, request, since, roster) in std::mem::take(&mut self.core.failures) {
            let Actor::Coordinator(coordinator) = actor else { unreachable!("only coordinators have requests") };
            let now = self.core.now;
            // A request that fails at once does so because those before it have waited for long enough.
            let since = since.min(now.saturating_sub(PATIENCE));
            let lasted = |&(from, to): &(Micros, Micros)| to.min(now).saturating_sub(from.max(since)) >= REACHABLE_MIN;
            for node in roster {
                let Some(Reached { times, since: open }) = self.reached.get(&(coordinator, node)) else { continue };
                if times.iter().any(lasted) || open.is_some_and(|from| lasted(&(from, now))) {
                    self.core.ledger.violated(|| {
                        format!("{actor:?} request {request} failed after {PATIENCE} us although node {node} could be reached")
                    });
                }
            }
        }
    }

    /// Everybody acts on the same placement, every expert is where it should be, and loaded there.
    fn check_settled(&mut self) {
        let nodes = self.weights.iter().enumerate();
        let candidates: Vec<Candidate> = nodes.map(|(at, &weight)| Candidate { node: node_name(at), weight }).collect();
        let expected = Placement::compute(1, SMALL.extent, &candidates).expect("names and weights of ours");
        let ledger = &mut self.core.ledger;
        let Some(stored) = self.etcd.placement() else { return ledger.violated(|| "nothing was placed".to_owned()) };
        for key in expected.keys() {
            let (should, is): (Vec<_>, Vec<_>) = (expected.holders(key).collect(), stored.holders(key).collect());
            if is.len() > SMALL.policy.replicas + SMALL.policy.hot_replicas_max || !is.starts_with(&should) {
                ledger.violated(|| format!("not at rest: {key} is held by {is:?}, expected {should:?}"));
            }
        }
        for (at, node) in self.nodes.iter().enumerate() {
            let is_right = |node: &ExpertNode| node.epoch() == stored.epoch() && node.has_loaded(stored);
            if !node.as_ref().is_some_and(is_right) {
                let epoch = node.as_ref().map(ExpertNode::epoch);
                ledger.violated(|| format!("not at rest: node {at} is at {epoch:?}, stored is {}", stored.epoch()));
            }
        }
        for (at, coordinator) in self.coordinators.iter().enumerate() {
            let epoch = coordinator.as_ref().and_then(Coordinator::placement).map(Placement::epoch);
            if epoch != Some(stored.epoch()) {
                ledger.violated(|| {
                    format!("not at rest: coordinator {at} is at {epoch:?}, stored is {}", stored.epoch())
                });
            }
        }
    }

    /// Every lane is used again, and retries stayed within their budget.
    fn check_end(&mut self) {
        let time = self.core.time();
        let ledger = &mut self.core.ledger;
        for coordinator in self.coordinators.iter().flatten() {
            let me = coordinator.me;
            for (node, lane) in coordinator.lanes.iter().enumerate() {
                let state = lane.breaker(time);
                // Who is first for no expert is not asked now that nothing fails.
                let is_asked = |placement: &Placement| placement.experts_of(&node_name(node)).next().is_some();
                let is_asked = coordinator.placement().is_some_and(is_asked);
                if !lane.is_connected() || (is_asked && state != BreakerState::Closed) {
                    ledger.violated(|| format!("{me:?} does not use node {node} any more: {state:?}"));
                }
            }
            let allowed = 100.0 + 0.2 * coordinator.first_calls as f64 + 10.0 * time.as_secs_f64();
            if coordinator.retries as f64 > allowed {
                ledger.violated(|| format!("{me:?} made {} retries, at most {allowed}", coordinator.retries));
            }
        }
    }
}
