//! A coordinator's requests, layer by layer: a clock and a network for `sida_routing::dispatch`, which decides whom a
//! layer's rows are asked of, as it does for the lanes and threads of a real coordinator.

use std::{collections::BTreeSet, ops::Range, rc::Rc, time::Duration};

use rand::Rng;
use sida_routing::{
    ExpertId, ExpertKey, Grouping, LayerId, Routes,
    dispatch::{Bounds, Call, Finished, GivenUp, LayerCalls, Next, Why},
    failover::{
        CallFailure,
        lane_health::{PendingCall, travel},
        silence::ALLOWED_MIN,
    },
};

use crate::{
    coordinator::{Coordinator, Roster, node_name},
    core::Core,
    driver::LayerDriver,
    event::{Actor, Message, Micros, Timer},
    ledger::{Answered, CALL_NORMAL_MAX},
};

/// Between two requests of a coordinator.
const ARRIVAL: Range<Micros> = 60_000..240_000;
/// Passes over the layers: an encoder's, and a few tokens.
const LAYERS: usize = 4;
/// Rows for an expert.
const ROWS: Range<usize> = 1..24;
/// Of one call, at most.
const ROWS_MAX: usize = 32;
const ROW_BYTES: usize = 512;
/// How long a layer is tried before its request fails.
pub(crate) const PATIENCE: Micros = 5_000_000;
/// Some callers leave after so long.
const LEAVES_AFTER: Range<Micros> = 1_000..500_000;

pub(crate) struct Request {
    calls: LayerCalls,
    pub(crate) course: Course,
}

/// How a request goes.
pub(crate) struct Course {
    started: Micros,
    /// When its caller leaves, if it does.
    pub(crate) leaves: Option<Micros>,
    /// The layers still to come, the next one last.
    layers: Vec<(LayerId, Grouping)>,
    layer_started: Micros,
    /// Rows of the layer that nobody has computed.
    rows: usize,
    /// The nodes there were when the layer began, and those that failed some of it.
    known: Vec<usize>,
    pub(crate) tried: BTreeSet<usize>,
    /// The nodes of this round of calls.
    pub(crate) roster: Rc<Roster>,
    /// When it is looked whether calls are to be given up.
    alarm: Option<Micros>,
    /// The slowest answered calls of the rounds done, and of this one.
    worked: Micros,
    worked_of_round: Micros,
    /// Calls that were sent and failed.
    pub(crate) failures: u32,
    /// Something other than one lost node holds it up.
    pub(crate) is_excused: bool,
    /// Its coordinator stood still meanwhile.
    stood_still: bool,
}

/// A call on its way.
pub(crate) struct Sent {
    request: u64,
    node: usize,
    pub(crate) pending: PendingCall,
}

impl Coordinator {
    /// A client sends a request.
    pub(crate) fn arrive(&mut self, core: &mut Core) {
        let next = core.rng.random_range(ARRIVAL);
        core.timer_in(next, self.me, Timer::Arrival);
        let mut layers: Vec<_> = (0..LAYERS).map(|layer| rows(core, layer)).collect();
        let leaves = core.rng.random_bool(0.05).then(|| core.now + core.rng.random_range(LEAVES_AFTER));
        // Not ready: clients are sent elsewhere.
        let Some(roster) = self.roster.clone() else { return };
        let first = layers.pop().expect("there are some");
        let calls = self.begin(core, &first);
        let course = Course {
            started: core.now,
            leaves,
            layers,
            layer_started: core.now,
            rows: first.1.tokens.len(),
            known: roster.nodes.clone(),
            tried: BTreeSet::new(),
            roster,
            alarm: None,
            worked: 0,
            worked_of_round: 0,
            failures: 0,
            is_excused: false,
            stood_still: false,
        };
        self.next_id += 1;
        self.drive(core, self.next_id, Request { calls, course });
    }

    fn begin(&mut self, core: &Core, (layer, grouping): &(LayerId, Grouping)) -> LayerCalls {
        grouping.groups.iter().for_each(|group| self.wanted(ExpertKey { layer: *layer, expert: group.expert }));
        let bounds = Bounds { rows_max: ROWS_MAX, patience: Duration::from_micros(PATIENCE) };
        LayerCalls::begin(*layer, grouping, bounds, self.outlook, core.time())
    }

    /// Does what there is to do for a request now.
    fn drive(&mut self, core: &mut Core, id: u64, mut request: Request) {
        loop {
            let now = core.time();
            match self.with_calls(core, &mut request, |calls, driver| calls.next(driver, now)) {
                Next::Wait(until) => {
                    let until = Micros::try_from(until.as_nanos().div_ceil(1000)).expect("a time of this run");
                    let alarm = &mut request.course.alarm;
                    if alarm.is_none_or(|alarm| alarm > until) {
                        *alarm = Some(until);
                        core.timer_at(until, self.me, Timer::Look { request: id });
                    }
                    self.requests.insert(id, request);
                    return;
                }
                Next::Ask => {
                    let course = &mut request.course;
                    course.worked += std::mem::take(&mut course.worked_of_round);
                    course.roster = self.roster.clone().expect("requests come after the first placement");
                    for call in self.with_calls(core, &mut request, |calls, driver| calls.ask(driver, now)) {
                        self.call(core, id, &mut request, call);
                    }
                }
                Next::Done => match self.end_layer(core, id, request) {
                    Some(next) => request = next,
                    None => return,
                },
            }
        }
    }

    /// Lets the calls of a request decide.
    fn with_calls<R>(
        &mut self,
        core: &mut Core,
        request: &mut Request,
        decide: impl FnOnce(&mut LayerCalls, &mut LayerDriver<'_>) -> R,
    ) -> R {
        let Request { calls, course } = request;
        decide(calls, &mut LayerDriver { core, coordinator: self, roster: course.roster.clone(), course })
    }

    /// Tells the calls of a request what happened, and does what there is to do then.
    fn happened(&mut self, core: &mut Core, id: u64, what: impl FnOnce(&mut LayerCalls, &mut LayerDriver<'_>)) {
        let mut request = self.requests.remove(&id).expect("a call ends before its request");
        self.with_calls(core, &mut request, what);
        self.drive(core, id, request);
    }

    /// Makes a call.
    fn call(&mut self, core: &mut Core, id: u64, request: &mut Request, call: Call) {
        let node = request.course.roster.nodes[call.node];
        let lane = &mut self.lanes[node];
        if !lane.is_connected() {
            let failure = CallFailure::Disconnected { reason: "there is no connection".to_owned() };
            return self.with_calls(core, request, |calls, driver| calls.failed(driver, call, &failure));
        }
        let sent = core.time();
        let deadline = request.calls.deadline(lane.allows(call.rows(), call.pieces.len()), sent);
        let pending = PendingCall { rows: call.rows(), bytes: call.rows() * ROW_BYTES, sent };
        lane.sent(&pending);
        self.next_id += 1;
        let number = self.next_id;
        self.sent.insert(number, Sent { request: id, node, pending });
        let layer = request.calls.layer();
        let keys = call.pieces.iter().map(|piece| ExpertKey { layer, expert: piece.expert }).collect();
        let epoch = request.course.roster.placement.epoch();
        core.send(self.me, Actor::Node(node), Message::Call { call: number, keys, epoch });
        self.with_calls(core, request, |calls, driver| calls.sent(driver, number, call, sent, deadline));
    }

    /// A message came from a node.
    pub(crate) fn on_lane(&mut self, core: &mut Core, node: usize, message: Message) {
        let now = core.time();
        match message {
            Message::Connected => return self.lanes[node].connected(),
            Message::LaneLost => return self.disconnected(core, node),
            _ => self.lanes[node].heard(now),
        }
        match message {
            Message::Alive => {}
            Message::Done { call: number, loads, load, compute } => {
                let Some(Sent { request, pending, .. }) = self.sent.remove(&number) else { return };
                self.lanes[node].computed(&pending, loads, load, now);
                let took = now - pending.sent;
                let on_the_way = took.saturating_sub(load + compute + travel(pending.bytes));
                self.happened(core, request, |calls, driver| {
                    let call = calls.answered(number).expect("a call that is under way");
                    calls.computed(now);
                    calls.travelled(call.node, on_the_way);
                    driver.course.answered(took);
                    driver.course.rows -= call.rows();
                });
            }
            Message::Refused { call: number, failure, newer } => {
                if let Some(newer) = newer {
                    core.ledger.counts.stale_calls += 1;
                    self.adopt(core, &newer);
                }
                let Some(Sent { request, pending, .. }) = self.sent.remove(&number) else { return };
                self.lanes[node].refused(&pending, &failure, now);
                self.happened(core, request, |calls, driver| {
                    let call = calls.answered(number).expect("a call that is under way");
                    driver.course.answered(now - pending.sent);
                    calls.failed(driver, call, &failure);
                });
            }
            other => unreachable!("an expert-node does not send {other:?}"),
        }
    }

    /// The connection to a node is lost, and all calls on it.
    pub(crate) fn disconnected(&mut self, core: &mut Core, node: usize) {
        self.lanes[node].disconnected(core.time());
        let on_it = |(&number, sent): (&u64, &Sent)| (sent.node == node).then_some((number, sent.request));
        let lost: Vec<(u64, u64)> = self.sent.iter().filter_map(on_it).collect();
        lost.iter().for_each(|(number, _)| _ = self.sent.remove(number));
        for (number, request) in lost {
            let failure = CallFailure::Disconnected { reason: "the connection was lost".to_owned() };
            self.happened(core, request, |calls, driver| {
                let call = calls.answered(number).expect("a call that is under way");
                driver.course.failures += 1;
                calls.failed(driver, call, &failure);
            });
        }
    }

    /// It is time to look whether calls of a request are to be given up.
    pub(crate) fn look(&mut self, core: &mut Core, id: u64) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let now = core.time();
        if request.course.alarm.is_some_and(|alarm| alarm <= core.now) {
            request.course.alarm = None;
        }
        // A call is borne beyond its time while nobody else could answer it.
        let course = &request.course;
        let is_overdue = |sent: &&Sent| sent.request == id && now >= sent.pending.sent + ALLOWED_MIN;
        let is_alone = |sent: &Sent| {
            let others = course.roster.nodes.iter().filter(|&node| *node != sent.node && !course.tried.contains(node));
            !others.clone().any(|&node| self.lanes[node].is_up(now))
        };
        let is_borne = self.sent.values().filter(is_overdue).any(is_alone);
        self.happened(core, id, |calls, driver| {
            driver.course.is_excused |= is_borne;
            calls.look(driver, now);
        });
    }

    /// All of a layer is computed or given up. Returns the request if it has another layer.
    fn end_layer(&mut self, core: &mut Core, id: u64, request: Request) -> Option<Request> {
        let Request { calls, mut course } = request;
        let Finished { given_up, outlook, .. } = calls.finish();
        self.outlook.learn(outlook);
        course.worked += std::mem::take(&mut course.worked_of_round);
        let (me, left, named) = (self.me, course.rows, given_up.iter().map(|one| one.rows.len()).sum::<usize>());
        if left != named {
            core.ledger
                .violated(|| format!("{me:?} request {id}: {left} rows were not computed, {named} are said to be"));
        }
        if let Some(leaves) = course.leaves.filter(|leaves| *leaves <= core.now) {
            core.ledger.left(self.me, id, core.now - leaves, course.stood_still);
            return None;
        }
        if !given_up.is_empty() {
            self.fail(core, id, &course, &given_up);
            return None;
        }
        if let Some(next) = course.layers.pop() {
            let calls = self.begin(core, &next);
            course.layer_started = core.now;
            course.rows = next.1.tokens.len();
            course.known.clone_from(&self.roster.as_ref().expect("it is known once and for all").nodes);
            course.tried.clear();
            return Some(Request { calls, course });
        }
        let Course { started, worked, failures, is_excused, .. } = course;
        core.ledger.answered(self.me, id, &Answered { took: core.now - started, worked, failures, is_excused });
        None
    }

    fn fail(&mut self, core: &mut Core, id: u64, course: &Course, given_up: &[GivenUp]) {
        core.ledger.counts.failed_requests += 1;
        let me = self.me;
        core.note(|| format!("{me:?} request {id} failed: {given_up:?}"));
        if given_up.iter().any(|one| one.why == Why::Unwanted) {
            core.ledger.violated(|| format!("{me:?} gives request {id} up, which is wanted"));
        }
        // A node that was placed on only lately was not known for all that time; and one that cannot compute an expert
        // answers to no purpose.
        let roster = self.roster.as_ref().expect("it is known once and for all");
        let refused = |node: usize| {
            let tried = given_up.iter().flat_map(|one| &one.tried);
            tried.clone().any(|(name, failure)| *name == node_name(node) && !failure.may_pass())
        };
        let known = course.known.iter().copied().filter(|node| roster.nodes.contains(node) && !refused(*node));
        core.failures.push((self.me, id, course.layer_started, known.collect()));
    }

    /// The process stood still: what it had under way proves nothing.
    pub(crate) fn excuse_all(&mut self) {
        for Request { course, .. } in self.requests.values_mut() {
            (course.is_excused, course.stood_still) = (true, true);
        }
    }
}

impl Course {
    /// A call was answered after so long.
    fn answered(&mut self, took: Duration) {
        let took = took.as_micros() as Micros;
        // Its node stood still and went on in time, or the coordinator did.
        self.is_excused |= took > CALL_NORMAL_MAX;
        self.worked_of_round = self.worked_of_round.max(took);
    }
}

/// Rows of a layer for one to three experts; half of them go to a third of the experts.
fn rows(core: &mut Core, layer: usize) -> (LayerId, Grouping) {
    let extent = core.shape.extent;
    let mut experts = Vec::new();
    for _ in 0..core.rng.random_range(1..4) {
        let hot = core.rng.random_bool(0.3);
        let expert = core.rng.random_range(0..if hot { 1 } else { extent.num_experts as u16 });
        experts.extend(std::iter::repeat_n(Some(ExpertId(expert)), core.rng.random_range(ROWS)));
    }
    let weights = vec![1.0; experts.len()];
    (LayerId((layer % extent.moe_layers) as u16), Grouping::new(&Routes { top_k: 1, experts, weights }))
}
