//! A coordinator's requests: layer by layer, every expert of a layer is asked of some node until one answers.
//! What `dispatch` and the lanes do, with the same decisions of `sida_routing::failover`.

use std::time::Duration;

use rand::Rng;
use sida_routing::{
    ExpertId, ExpertKey, LayerId, Placement,
    failover::{BreakerState, Patience, choose, patience::LOOK, silence::HEARTBEAT},
};

use crate::{
    coordinator::Coordinator,
    core::Core,
    event::{Actor, Message, Micros, Timer},
    ledger::{Answered, CALL_NORMAL_MAX},
};

/// Between two requests of a coordinator.
const ARRIVAL: std::ops::Range<Micros> = 60_000..240_000;
/// Passes over the layers: an encoder's, and a few tokens.
const LAYERS: usize = 4;
/// How long a piece is tried before its request fails.
pub(crate) const PATIENCE: Micros = 5_000_000;

pub(crate) struct Request {
    started: Micros,
    /// Experts of the layers still to come, and of the current one last.
    layers: Vec<Vec<ExpertKey>>,
    pieces: Vec<Piece>,
    layer_started: Micros,
    /// The nodes there were when the layer began.
    roster: Vec<usize>,
    /// The slowest answered calls of the layers done.
    worked: Micros,
    worked_of_layer: Micros,
    /// Calls that were refused as of the past.
    refused: Micros,
    failures: u32,
    is_excused: bool,
}

struct Piece {
    key: ExpertKey,
    tried: Vec<usize>,
    patience: Patience,
    /// When it is looked again who is back, while everybody was asked.
    looks_at: Option<Duration>,
    is_done: bool,
}

/// A call on its way.
pub(crate) struct Call {
    request: u64,
    piece: usize,
    node: usize,
    sent: Micros,
}

impl Coordinator {
    /// A client sends a request.
    pub(crate) fn arrive(&mut self, core: &mut Core) {
        let next = core.rng.random_range(ARRIVAL);
        core.timer_in(next, self.me, Timer::Arrival);
        let layers: Vec<Vec<ExpertKey>> = (0..LAYERS).map(|layer| experts(core, layer)).collect();
        if self.placement.is_none() {
            // Not ready: clients are sent elsewhere.
            return;
        }
        self.next_id += 1;
        let request = Request {
            started: core.now,
            layers,
            pieces: Vec::new(),
            layer_started: core.now,
            roster: Vec::new(),
            worked: 0,
            worked_of_layer: 0,
            refused: 0,
            failures: 0,
            is_excused: false,
        };
        self.requests.insert(self.next_id, request);
        self.next_layer(core, self.next_id);
    }

    fn next_layer(&mut self, core: &mut Core, id: u64) {
        let request = self.requests.get_mut(&id).expect("a request under way");
        request.worked += std::mem::take(&mut request.worked_of_layer);
        request.layer_started = core.now;
        request.roster.clone_from(&self.roster);
        let Some(keys) = request.layers.pop() else {
            let &mut Request { started, worked, refused, failures, is_excused, .. } = request;
            let answered = Answered { took: core.now - started, worked: worked + refused, failures, is_excused };
            core.ledger.answered(self.me, id, &answered);
            self.requests.remove(&id);
            return;
        };
        let patience = Patience::new(Duration::from_micros(PATIENCE), core.time());
        let piece = |&key: &ExpertKey| {
            let (tried, patience) = (Vec::new(), patience.clone());
            Piece { key, tried, patience, looks_at: None, is_done: false }
        };
        request.pieces = keys.iter().map(piece).collect();
        for (piece, key) in keys.into_iter().enumerate() {
            self.wanted(key);
            self.first_calls += 1;
            self.budget.call(core.time());
            self.ask(core, id, piece);
        }
    }

    /// Asks some node for a piece.
    pub(crate) fn ask(&mut self, core: &mut Core, id: u64, piece: usize) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let placement = self.placement.as_ref().expect("requests come after the first placement");
        let Piece { key, tried, patience, looks_at, .. } = &mut request.pieces[piece];
        let (key, now) = (*key, core.time());
        patience.passed(looks_at.take().unwrap_or(now), now);
        loop {
            let (lanes, roster) = (&self.lanes, &self.roster);
            let up = |at: usize| lanes[roster[at]].is_connected && lanes[roster[at]].breaker.allows(now);
            let tried_at: Vec<usize> = (0..roster.len()).filter(|&at| tried.contains(&roster[at])).collect();
            let chosen = choose(placement.holder_indices(key), roster.len(), key.expert, &up, &tried_at);
            match chosen.map(|at| roster[at]) {
                Some(node) if lanes[node].is_connected => {
                    let epoch = placement.epoch();
                    return self.call(core, id, piece, node, key, epoch);
                }
                Some(node) => tried.push(node),
                // Everybody was asked: again whoever is back, as long as the request may take.
                None if patience.may_ask_again(now) && roster.iter().any(|&node| lanes[node].is_connected) => {
                    patience.asked_again(now);
                    tried.retain(|&node| !lanes[node].is_connected);
                }
                None => break,
            }
        }
        request.is_excused = true;
        if patience.is_over() {
            let since = request.layer_started;
            self.fail(core, id, since);
        } else {
            *looks_at = Some(now + LOOK);
            core.timer_in(LOOK.as_micros() as Micros, self.me, Timer::Retry { request: id, piece });
        }
    }

    fn call(&mut self, core: &mut Core, id: u64, piece: usize, node: usize, key: ExpertKey, epoch: u64) {
        self.next_id += 1;
        let call = self.next_id;
        let lane = &mut self.lanes[node];
        lane.breaker.begin(core.time());
        lane.silence.begin(core.time());
        self.calls.insert(call, Call { request: id, piece, node, sent: core.now });
        core.send(self.me, Actor::Node(node), Message::Call { call, key, epoch });
        self.watch(core, node);
    }

    pub(crate) fn on_lane(&mut self, core: &mut Core, node: usize, message: Message) {
        let lane = &mut self.lanes[node];
        match message {
            Message::Connected => {
                lane.is_connected = true;
                lane.silence.end();
            }
            Message::LaneLost => {
                lane.is_connected = false;
                self.give_up(core, node);
            }
            Message::Alive => lane.silence.heard(core.time()),
            Message::Done { call } => {
                self.heard(core, node);
                if let Some(Call { request, piece, sent, .. }) = self.calls.remove(&call) {
                    self.end_silence(node);
                    self.done(core, request, piece, sent);
                }
            }
            Message::Stale { call, newer } => {
                core.ledger.counts.stale_calls += 1;
                self.heard(core, node);
                self.adopt(core, &newer);
                if let Some(Call { request, piece, sent, .. }) = self.calls.remove(&call) {
                    self.end_silence(node);
                    if let Some(request) = self.requests.get_mut(&request) {
                        request.refused += core.now - sent;
                    }
                    self.ask(core, request, piece);
                }
            }
            other => unreachable!("an expert-node does not send {other:?}"),
        }
    }

    fn heard(&mut self, core: &mut Core, node: usize) {
        let lane = &mut self.lanes[node];
        lane.silence.heard(core.time());
        lane.breaker.succeeded(core.time());
    }

    /// A node with nothing pending has nothing to say.
    fn end_silence(&mut self, node: usize) {
        if self.calls.values().all(|call| call.node != node) {
            self.lanes[node].silence.end();
        }
    }

    fn done(&mut self, core: &mut Core, id: u64, piece: usize, sent: Micros) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let took = core.now - sent;
        if took > CALL_NORMAL_MAX {
            // Answered, but late: its node stood still and went on in time, or the coordinator did.
            request.is_excused = true;
        }
        request.worked_of_layer = request.worked_of_layer.max(took);
        request.pieces[piece].is_done = true;
        if request.pieces.iter().all(|piece| piece.is_done) {
            self.next_layer(core, id);
        }
    }

    /// Whether somebody other than `node` could be asked.
    fn others(&self, core: &Core, node: usize) -> bool {
        let is_up = |&other: &usize| {
            let lane = &self.lanes[other];
            other != node && lane.is_connected && lane.breaker.state(core.time()) == BreakerState::Closed
        };
        self.roster.iter().any(is_up)
    }

    /// Sets the alarm for a node's silence.
    fn watch(&mut self, core: &mut Core, node: usize) {
        let others = self.others(core, node);
        if let Some(deadline) = self.lanes[node].silence.deadline(others) {
            // What others there are may change meanwhile.
            let deadline = Micros::try_from(deadline.as_micros()).expect("a time of this run");
            let again = core.now + 2 * HEARTBEAT.as_micros() as Micros;
            let alarm = deadline.min(again);
            let lane = &mut self.lanes[node];
            if lane.alarm.is_none_or(|set| set <= core.now || set > alarm) {
                lane.alarm = Some(alarm);
                core.timer_at(alarm, self.me, Timer::Silence { node });
            }
        }
    }

    pub(crate) fn check_silence(&mut self, core: &mut Core, node: usize) {
        if self.lanes[node].alarm.is_none_or(|set| set > core.now) {
            return;
        }
        self.lanes[node].alarm = None;
        let others = self.others(core, node);
        if !others {
            self.excuse(node);
        }
        if self.lanes[node].silence.is_over(core.time(), others) {
            let me = self.me;
            core.note(|| format!("{me:?}: node {node} is silent"));
            self.give_up(core, node);
        } else {
            self.watch(core, node);
        }
    }

    /// Requests that wait for `node` have nobody else to ask.
    fn excuse(&mut self, node: usize) {
        for call in self.calls.values().filter(|call| call.node == node) {
            if let Some(request) = self.requests.get_mut(&call.request) {
                request.is_excused = true;
            }
        }
    }

    /// Gives all calls to a node up and asks others.
    fn give_up(&mut self, core: &mut Core, node: usize) {
        let lost: Vec<u64> = self.calls.iter().filter(|(_, call)| call.node == node).map(|(&id, _)| id).collect();
        let lane = &mut self.lanes[node];
        lane.silence.end();
        if !lost.is_empty() {
            lane.breaker.failed(core.time());
        }
        for call in lost {
            let Call { request: id, piece, .. } = self.calls.remove(&call).expect("just found");
            core.ledger.counts.failed_calls += 1;
            let Some(request) = self.requests.get_mut(&id) else { continue };
            request.failures += 1;
            request.pieces[piece].tried.push(node);
            if self.budget.take_retry(core.time()) {
                self.retries += 1;
                self.ask(core, id, piece);
            } else {
                request.is_excused = true;
                let after = self.budget.retry_after(core.time()).expect("the budget fills");
                let retry = Timer::Retry { request: id, piece };
                core.timer_in(after.as_micros() as Micros, self.me, retry);
            }
        }
    }

    fn fail(&mut self, core: &mut Core, id: u64, since: Micros) {
        let Some(request) = self.requests.remove(&id) else { return };
        core.ledger.counts.failed_requests += 1;
        // A node that was placed on only lately was not known for all that time.
        let known = request.roster.into_iter().filter(|node| self.roster.contains(node)).collect();
        core.failures.push((self.me, id, since, known));
    }

    /// The process stood still: what it had under way proves nothing.
    pub(crate) fn excuse_all(&mut self) {
        self.requests.values_mut().for_each(|request| request.is_excused = true);
    }

    /// What is placed, for the end of the run.
    pub(crate) fn placement(&self) -> Option<&Placement> {
        self.placement.as_ref()
    }
}

/// One to three experts of a layer; half of the rows go to a third of them.
fn experts(core: &mut Core, layer: usize) -> Vec<ExpertKey> {
    let extent = core.shape.extent;
    let count = core.rng.random_range(1..4);
    let mut keys = Vec::new();
    while keys.len() < count {
        let hot = core.rng.random_bool(0.3);
        let experts = if hot { 1 } else { extent.num_experts as u16 };
        let expert = ExpertId(core.rng.random_range(0..experts));
        let key = ExpertKey { layer: LayerId((layer % extent.moe_layers) as u16), expert };
        if keys.contains(&key) && keys.len() + 1 >= count {
            break;
        }
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys
}
