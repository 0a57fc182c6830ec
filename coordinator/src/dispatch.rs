//! One MoE layer's rows, to the experts and back: grouped rows are shared out among the nodes that hold their
//! experts, remote nodes are asked first, nodes in this process compute meanwhile, and the
//! results are combined in the order of the groups, so that a sum never depends on who answered first.
//!
//! A call that fails goes to the next node within the same layer; rows are idempotent. When all have failed, rows wait
//! for one to come back (`waiting`). Only when nobody does is a group given up, and with it the requests whose rows are
//! in it; never a skipped expert.
//!
//! While another node could answer, a call is given up when its node gives no sign of life, or
//! lives but takes far longer than such calls took (`call_deadline`). A node that knows a newer placement refuses;
//! then its rows are shared out again under that. `routing::failover` bounds what is asked again.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};
use sida_cluster::experts::ExpertCall;
use sida_model::Dense;
use sida_proto::wire::rows::copy_from_payload;
use sida_routing::{Grouping, LayerId};
use sida_telemetry::{Span, TraceContext};

use crate::{
    beside,
    call_failure::CallFailure,
    callers::Callers,
    calls::{self, Call, Piece},
    here::{Here, Made},
    lane::{Computed, Lane, Reply, travel},
    nodes::{Nodes, Reach, Roster},
    request::RequestError,
    share_out::{self, Shared},
    waiting::Waiting,
};

/// How often the rows of one layer are shared out again under a newer placement.
const RESHARES_MAX: u32 = 3;
/// A call straggles that is on its way for longer than this and four times those to other nodes.
const STRAGGLE_MIN: Duration = Duration::from_millis(10);
/// How soon a call that should be given up is looked at again, while nobody else could answer it.
const LOOK_PERIOD: Duration = Duration::from_millis(25);
/// When this thread was woken so late, its machine was busy, and answers may have come without being read yet: nobody
/// is given up for that, so many times in a row.
const LATE_WAKE: Duration = Duration::from_millis(20);
const LATE_WAKES_MAX: u32 = 4;

/// Sends rows to experts. One per thread that does: its buffers are kept from layer to layer.
pub(crate) struct Dispatch {
    nodes: Arc<Nodes>,
    d_model: usize,
    /// Rows of one call at most; more are sent as several.
    rows_max: usize,
    /// How long the last node that could answer is waited for, and for any to come back when all have failed.
    patience: Duration,
    /// The last layer waited for that in vain.
    is_given_up: bool,
    replies: (Sender<Reply>, Receiver<Reply>),
    /// (rows of the layer, d_model), in grouped order.
    results: Vec<f32>,
    /// (rows of a call, d_model): what goes to a node in another process.
    gathered: Vec<f32>,
    /// Calls to nodes in this process.
    here: Here,
}

/// One layer's rows.
pub(crate) struct LayerRows<'a> {
    /// Which of the MoE layers.
    pub(crate) layer: LayerId,
    /// Which row goes to which expert.
    pub(crate) grouping: &'a Grouping,
    /// (tokens, d_model)
    pub(crate) x: &'a [f32],
    /// Who waits for them.
    pub(crate) callers: Callers<'a>,
    /// Of the layer's span: calls go below it.
    pub(crate) trace: Option<TraceContext>,
}

/// What a layer's rows cost.
#[derive(Default)]
pub(crate) struct Dispatched {
    /// Waiting for experts to be loaded.
    pub(crate) load: Duration,
    /// Experts that had to be loaded first.
    pub(crate) demand_loads: u64,
    /// Calls that went to another node after a failure.
    pub(crate) failovers: u64,
    /// Runs of grouped rows that nobody could compute; their results are 0.
    pub(crate) failed: Vec<(std::ops::Range<usize>, RequestError)>,
}

/// A call on its way.
struct Outstanding {
    call_id: u64,
    call: Call,
    /// Ends when the call is over, however it ends.
    span: Option<Span>,
    sent: Instant,
    /// When it is given up, signs of life or not, if somebody else could answer.
    deadline: Instant,
    /// When to look whether it should be given up.
    look: Instant,
}

impl Dispatch {
    /// `rows_max` bounds one message, at least 1; `patience`, the wait for a node when no other can answer, or none.
    pub(crate) fn new(nodes: Arc<Nodes>, d_model: usize, rows_max: usize, patience: Duration) -> Self {
        let replies = crossbeam_channel::unbounded();
        let (results, gathered, here) = Default::default();
        Self { nodes, d_model, rows_max, patience, is_given_up: false, replies, results, gathered, here }
    }

    /// `out[token] += weight * expert(x[token])` for every row of the layer; `out` is (tokens, d_model).
    pub(crate) fn moe(&mut self, rows: &LayerRows<'_>, out: &mut [f32]) -> Dispatched {
        let mut dispatched = Dispatched::default();
        // Pieces that nobody computed add nothing, so whatever an earlier layer left here must go.
        self.results.clear();
        self.results.resize(rows.grouping.tokens.len() * self.d_model, 0.0);
        let mut waiting = Waiting::new(self.patience, self.is_given_up);
        let mut pieces = Piece::of(rows.grouping, self.rows_max);
        while !pieces.is_empty() {
            let roster = self.nodes.roster();
            let (nodes, rows_max) = (&*self.nodes, self.rows_max);
            let Shared { calls, held } =
                share_out::share_out(nodes, &roster, rows, rows_max, pieces, &mut waiting, &mut dispatched);
            if calls.is_empty() && !held.is_empty() {
                waiting.pause();
            }
            pieces = self.round(&roster, rows, calls, &mut waiting, &mut dispatched);
            pieces.extend(held);
        }
        self.is_given_up = waiting.is_given_up();
        rows.grouping.combine(0, &self.results, self.d_model, out);
        dispatched
    }

    /// See [`beside::compute`].
    pub(crate) fn beside(&self, layer: LayerId, grouping: &Grouping, dense: &mut Dense) -> Option<Dispatched> {
        beside::compute(&self.nodes.roster(), layer, grouping, dense)
    }

    /// Makes the calls, remote ones first; returns the pieces of those that failed.
    fn round(
        &mut self,
        roster: &Roster,
        rows: &LayerRows<'_>,
        calls: Vec<Call>,
        waiting: &mut Waiting,
        dispatched: &mut Dispatched,
    ) -> Vec<Piece> {
        let mut failed = Vec::new();
        let mut outstanding = Vec::new();
        let mut local = Vec::new();
        for call in calls {
            match &roster.links[call.node].reach {
                Reach::Local(experts) => local.push((experts.clone(), call)),
                Reach::Remote(lane) => {
                    if let Err((call, failure)) = self.send(roster, lane, rows, call, &mut outstanding) {
                        self.give_back(roster, rows, call, failure, &mut failed);
                    }
                }
            }
        }
        let mut load_max = Duration::ZERO;
        for Made { call, outcome, took, .. } in self.here.make(roster, rows, self.d_model, local, &mut self.results) {
            match outcome {
                Ok(report) => {
                    waiting.answered();
                    roster.links[call.node].durations.record(took);
                    load_max = load_max.max(report.load);
                    dispatched.demand_loads += u64::from(report.demand_loads);
                }
                Err(failure) => self.give_back(roster, rows, call, failure, &mut failed),
            }
        }
        // They load at the same time.
        dispatched.load += load_max;
        self.collect(roster, rows, outstanding, waiting, dispatched, &mut failed);
        failed
    }

    /// Sends a call's rows down a lane; then it is outstanding.
    fn send(
        &mut self,
        roster: &Roster,
        lane: &Lane,
        rows: &LayerRows<'_>,
        call: Call,
        outstanding: &mut Vec<Outstanding>,
    ) -> Result<(), (Call, CallFailure)> {
        calls::gather(rows.grouping, rows.x, self.d_model, &call.pieces, &mut self.gathered);
        let sent = Instant::now();
        let deadline = sent + lane.allow(call.rows(), call.pieces.len()).min(self.patience);
        let (groups, epoch) = (call.groups(), roster.placement.epoch());
        let expert_call = ExpertCall { layer: rows.layer, groups: &groups, activations: &self.gathered };
        let span = calls::span(roster, rows, &call).map(Span::as_client);
        let trace = span.as_ref().map(Span::context);
        match lane.start(expert_call, epoch, trace, &self.replies.0, deadline) {
            Ok(call_id) => {
                let look = lane.silent_until(sent).min(deadline);
                outstanding.push(Outstanding { call_id, call, span, sent, deadline, look });
                Ok(())
            }
            Err(failure) => Err((call, failure)),
        }
    }

    /// Waits for the answers to all calls that are under way, each until it is given up.
    fn collect(
        &mut self,
        roster: &Roster,
        rows: &LayerRows<'_>,
        mut outstanding: Vec<Outstanding>,
        waiting: &mut Waiting,
        dispatched: &mut Dispatched,
        failed: &mut Vec<Piece>,
    ) {
        let mut load_max = Duration::ZERO;
        let mut late_wakes = 0;
        // By node: how long its call was on its way, without loads, computation and what the size of it explains.
        let mut on_the_way: Vec<(usize, Duration)> = Vec::with_capacity(outstanding.len());
        while let Some(look) = outstanding.iter().map(|call| call.look).min() {
            let Ok(Reply { call_id, outcome }) = self.replies.1.recv_deadline(look) else {
                let now = Instant::now();
                waiting.passed(look, now);
                if now > look + LATE_WAKE && late_wakes < LATE_WAKES_MAX {
                    late_wakes += 1;
                    outstanding.iter_mut().for_each(|call| call.look = call.look.max(now + LOOK_PERIOD));
                    continue;
                }
                late_wakes = 0;
                for (call, failure) in self.given_up(roster, rows, &mut outstanding, now) {
                    self.give_back(roster, rows, call, failure, failed);
                }
                continue;
            };
            // The answer to a call that was given up meanwhile is nobody's.
            let Some(at) = outstanding.iter().position(|call| call.call_id == call_id) else { continue };
            let Outstanding { call, span, .. } = outstanding.swap_remove(at);
            drop(span);
            match outcome {
                Ok(Computed { payload, report, took }) => {
                    waiting.answered();
                    roster.links[call.node].durations.record(took);
                    load_max = load_max.max(report.load);
                    let explained = report.load + report.compute + travel(payload.len());
                    on_the_way.push((call.node, took.saturating_sub(explained)));
                    dispatched.demand_loads += u64::from(report.demand_loads);
                    let mut from = &payload[..];
                    for piece in &call.pieces {
                        let (rows, rest) = from.split_at(piece.rows * self.d_model * size_of::<f32>());
                        let to = &mut self.results[piece.first_row * self.d_model..][..piece.rows * self.d_model];
                        copy_from_payload(rows, to);
                        from = rest;
                    }
                }
                Err(failure) => self.give_back(roster, rows, call, failure, failed),
            }
        }
        note_stragglers(roster, &on_the_way);
        // Remote nodes load at the same time.
        dispatched.load += load_max;
    }

    /// Takes out of `outstanding` what need not be waited for any longer, and says when to look at the others again.
    fn given_up(
        &self,
        roster: &Roster,
        rows: &LayerRows<'_>,
        outstanding: &mut Vec<Outstanding>,
        now: Instant,
    ) -> Vec<(Call, CallFailure)> {
        let mut given_up = Vec::new();
        let mut at = 0;
        while at < outstanding.len() {
            let one = &mut outstanding[at];
            let Reach::Remote(lane) = &roster.links[one.call.node].reach else {
                unreachable!("only calls to remote nodes are outstanding");
            };
            let (silent, last) = (lane.silent_until(one.sent), one.sent + self.patience);
            let waited = now - one.sent;
            let failure = match () {
                // When to look is the earliest of these, unless a sign of life came meanwhile.
                () if now < silent.min(one.deadline) => None,
                () if rows.is_for_nobody(&one.call, now) => Some(CallFailure::Unwanted),
                // Tight limits are of use only while somebody else could be asked. Who is alive but late is not left
                // for one who was so before: they would take turns, and none would come to its end.
                () if now < last
                    && !calls::anyone_else(roster, &one.call, now)
                    && !(now >= silent && calls::anyone_back(roster, &one.call, now)) =>
                {
                    None
                }
                () if now >= silent => Some(CallFailure::Silent { waited }),
                () => Some(CallFailure::Late { waited }),
            };
            match failure {
                Some(failure) => {
                    lane.give_up(one.call_id, !matches!(failure, CallFailure::Unwanted), now);
                    given_up.push((outstanding.swap_remove(at).call, failure));
                }
                None => {
                    one.look = silent.min(one.deadline).max(now + LOOK_PERIOD).min(last.max(now + LOOK_PERIOD));
                    at += 1;
                }
            }
        }
        given_up
    }

    /// A call failed: its pieces wait for another node, or for the same under a newer placement.
    fn give_back(
        &self,
        roster: &Roster,
        rows: &LayerRows<'_>,
        call: Call,
        failure: CallFailure,
        failed: &mut Vec<Piece>,
    ) {
        let node = &roster.links[call.node].node;
        let several = call.pieces.len() > 1;
        let reshared = match &failure {
            CallFailure::Stale { newer } => {
                call.pieces.iter().all(|piece| piece.reshares < RESHARES_MAX)
                    && self.nodes.adopt(newer, roster.placement.epoch())
            }
            _ => false,
        };
        match &failure {
            _ if reshared => {
                tracing::info!(%node, rows = call.rows(), "a node knows a newer placement; its rows are shared out again")
            }
            CallFailure::Unwanted => {
                tracing::debug!(%node, rows = call.rows(), "nobody waits for an expert call any more")
            }
            failure => {
                let trace_id = rows.trace.map(|trace| tracing::field::display(trace.trace_id()));
                tracing::warn!(%node, rows = call.rows(), trace_id, %failure, "an expert call failed");
            }
        }
        for mut piece in call.pieces {
            if reshared {
                piece.reshares += 1;
            } else if several && failure.is_of_one_expert() {
                piece.alone = true;
            } else {
                piece.failed(node, failure.clone());
            }
            failed.push(piece);
        }
    }
}

impl LayerRows<'_> {
    /// Whether nobody waits for any row of a call any more.
    fn is_for_nobody(&self, call: &Call, now: Instant) -> bool {
        call.pieces.iter().all(|piece| self.callers.gone(&self.grouping.tokens[piece.range()], now).is_some())
    }
}

/// Tells the lanes of one round how they kept pace: one behind a link that is slow holds up every layer without ever
/// being late enough to be given up.
fn note_stragglers(roster: &Roster, on_the_way: &[(usize, Duration)]) {
    let Some(&(slowest, longest)) = on_the_way.iter().max_by_key(|(_, took)| *took) else { return };
    let Some(second) = on_the_way.iter().filter(|(node, _)| *node != slowest).map(|(_, took)| *took).max() else {
        return;
    };
    let straggled = longest > STRAGGLE_MIN + 4 * second;
    let now = Instant::now();
    for &(node, _) in on_the_way {
        if let Reach::Remote(lane) = &roster.links[node].reach {
            lane.note_pace(straggled && node == slowest, now);
        }
    }
}
