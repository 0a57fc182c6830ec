//! One MoE layer's rows, to the experts and back: grouped rows are shared out among the nodes that hold their
//! experts, remote nodes are asked first, nodes in this process compute meanwhile, and the
//! results are combined in the order of the groups, so that a sum never depends on who answered first. Rows on a device
//! stay there as far as nodes can compute or read them there (`layer_rows`).
//!
//! Between [`Dispatch::begin`] and [`Dispatch::finish`] a layer is under way: whoever dispatches may compute something else
//! meanwhile, and begin another.
//!
//! A call that fails goes to the next node within the same layer; rows are idempotent. When all have failed, rows wait
//! for one to come back (`node_wait`). Only when nobody does is a group given up, and with it the requests whose rows are
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
use sida_model::{ModelError, ResidentExperts, RowsOnDevice};
use sida_proto::wire::rows::copy_from_payload;
use sida_routing::Grouping;
use sida_telemetry::Span;

use crate::{
    answer::request_error::RequestError,
    dispatch::{
        assignment::{self, Assignment},
        calls::{self, Call, Piece},
        here::{self, Here, Made},
        layer_rows::{Activations, LayerRows},
        node_wait::NodeWait,
        nodes::{Nodes, Reach, Roster},
        outstanding::{self, LOOK_PERIOD, Outstanding},
        remote::{
            call_failure::CallFailure,
            lane::{Lane, travel},
            lane_call::{Computed, Outgoing, Reply, Results},
        },
    },
};

/// How often the rows of one layer are shared out again under a newer placement.
const RESHARES_MAX: u32 = 3;
/// A call straggles that is on its way for longer than this and four times those to other nodes.
const STRAGGLE_MIN: Duration = Duration::from_millis(10);
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
    /// Those that no layer under way has.
    inboxes: Vec<Inbox>,
    /// (rows of a call, d_model): what goes to a node in another process.
    gathered: Vec<f32>,
    /// Calls to nodes in this process.
    here: Here,
}

/// Where what comes back of a layer is put.
struct Inbox {
    replies: (Sender<Reply>, Receiver<Reply>),
    /// (rows of the layer, d_model), in grouped order; empty until the first that come to this machine's memory.
    results: Vec<f32>,
}

/// A layer whose rows are on their way.
pub(crate) struct UnderWay {
    roster: Arc<Roster>,
    outstanding: Vec<Outstanding>,
    /// What is to be shared out again when no call is outstanding any more.
    pieces: Vec<Piece>,
    waiting: NodeWait,
    inbox: Inbox,
    dispatched: Dispatched,
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
    /// (tokens, d_model): `weight * expert(x)` of every token; `None` where that was added on a device.
    pub(crate) out: Option<Vec<f32>>,
}

impl Dispatch {
    /// `rows_max` bounds one message, at least 1; `patience`, the wait for a node when no other can answer, or none.
    pub(crate) fn new(nodes: Arc<Nodes>, d_model: usize, rows_max: usize, patience: Duration) -> Self {
        let (inboxes, gathered, here) = Default::default();
        Self { nodes, d_model, rows_max, patience, is_given_up: false, inboxes, gathered, here }
    }

    /// Whether rows leave this process.
    pub(crate) fn is_remote(&self) -> bool {
        self.nodes.roster().links.iter().any(|link| matches!(link.reach, Reach::Remote(_)))
    }

    /// The experts of a node of this process that lie where `rows` do.
    pub(crate) fn resident_beside(&self, rows: &RowsOnDevice<'_>) -> Option<Arc<dyn ResidentExperts>> {
        self.nodes.roster().links.iter().find_map(|link| match &link.reach {
            Reach::Local(experts) => experts.resident_beside(rows),
            Reach::Remote(_) => None,
        })
    }

    /// `weight * expert(x)` of every row of the layer.
    pub(crate) fn moe(
        &mut self,
        rows: &LayerRows<'_>,
        mut activations: Activations<'_>,
    ) -> Result<Dispatched, ModelError> {
        let under_way = self.begin(rows, &mut activations)?;
        self.finish(under_way, rows, activations)
    }

    /// Sends the rows to their nodes; those in this process compute theirs at once.
    pub(crate) fn begin(
        &mut self,
        rows: &LayerRows<'_>,
        activations: &mut Activations<'_>,
    ) -> Result<UnderWay, ModelError> {
        let mut inbox = self.inboxes.pop().unwrap_or_default();
        // Pieces that nobody computed add nothing, so whatever an earlier layer left here must go.
        inbox.results.clear();
        let mut under_way = UnderWay {
            roster: self.nodes.roster(),
            outstanding: Vec::new(),
            pieces: Piece::of(rows.grouping, self.rows_max),
            waiting: NodeWait::new(self.patience, self.is_given_up),
            inbox,
            dispatched: Dispatched::default(),
        };
        self.ask(&mut under_way, rows, activations)?;
        Ok(under_way)
    }

    /// Waits for the answers, and asks others for what failed, until all is there or given up. `rows` and `activations` are those
    /// that it began with.
    pub(crate) fn finish(
        &mut self,
        mut under_way: UnderWay,
        rows: &LayerRows<'_>,
        mut activations: Activations<'_>,
    ) -> Result<Dispatched, ModelError> {
        loop {
            self.collect(&mut under_way, rows, &mut activations)?;
            if under_way.pieces.is_empty() {
                break;
            }
            under_way.roster = self.nodes.roster();
            self.ask(&mut under_way, rows, &mut activations)?;
        }
        let UnderWay { waiting, inbox, mut dispatched, .. } = under_way;
        self.is_given_up = waiting.is_given_up();
        let results = Some(&inbox.results[..]).filter(|results| !results.is_empty());
        dispatched.out = activations.combine(rows.grouping, results, self.d_model)?;
        self.inboxes.push(inbox);
        Ok(dispatched)
    }

    /// Shares out the pieces and makes the calls, remote ones first; those of calls that failed are left.
    fn ask(
        &mut self,
        under_way: &mut UnderWay,
        rows: &LayerRows<'_>,
        activations: &mut Activations<'_>,
    ) -> Result<(), ModelError> {
        let UnderWay { roster, outstanding, pieces, waiting, inbox, dispatched } = under_way;
        let (roster, open) = (&**roster, std::mem::take(pieces));
        let Assignment { calls, held } =
            assignment::assign(&self.nodes, roster, rows, self.rows_max, open, waiting, dispatched);
        if calls.is_empty() && !held.is_empty() {
            waiting.pause();
        }
        *pieces = held;
        let mut local = Vec::new();
        for call in calls {
            match &roster.links[call.node].reach {
                Reach::Local(experts) => local.push((experts.clone(), call)),
                Reach::Remote(lane) => {
                    let in_window = lane.has_window() && activations.device().is_some();
                    match activations.device().filter(|_| in_window) {
                        Some(device) => device.settle()?,
                        None => calls::gather(
                            rows.grouping,
                            activations.x()?,
                            self.d_model,
                            &call.pieces,
                            &mut self.gathered,
                        ),
                    }
                    match self.send(roster, lane, rows, in_window, call, &inbox.replies.0) {
                        Ok(sent) => outstanding.push(sent),
                        Err((call, failure)) => self.give_back(roster, rows, call, failure, pieces),
                    }
                }
            }
        }
        let (mut load_max, mut here) = (Duration::ZERO, Vec::with_capacity(local.len()));
        let mut made = Vec::with_capacity(local.len());
        for (experts, call) in local {
            match here::start_on_device(roster, rows, activations, &*experts, &call)? {
                Some((outcome, took)) => made.push((call, outcome, took)),
                None => here.push((experts, call)),
            }
        }
        if !here.is_empty() {
            let results = kept(&mut inbox.results, rows.grouping, self.d_model);
            let computed = self.here.make(roster, rows, activations.x()?, self.d_model, here, results);
            made.extend(computed.into_iter().map(|Made { call, outcome, took, .. }| (call, outcome, took)));
        }
        for (call, outcome, took) in made {
            match outcome {
                Ok(report) => {
                    waiting.answered();
                    roster.links[call.node].durations.record(took);
                    load_max = load_max.max(report.load);
                    dispatched.demand_loads += u64::from(report.demand_loads);
                }
                Err(failure) => self.give_back(roster, rows, call, failure, pieces),
            }
        }
        // They load at the same time.
        dispatched.load += load_max;
        Ok(())
    }

    /// Sends a call down a lane, with the rows that were gathered or with where they are; then it is outstanding.
    fn send(
        &self,
        roster: &Roster,
        lane: &Arc<Lane>,
        rows: &LayerRows<'_>,
        in_window: bool,
        call: Call,
        replies: &Sender<Reply>,
    ) -> Result<Outstanding, (Call, CallFailure)> {
        let sent = Instant::now();
        let deadline = sent + lane.allow(call.rows(), call.pieces.len()).min(self.patience);
        let (groups, placed, epoch) = (call.groups(), call.placed_groups(), roster.placement.epoch());
        let outgoing = match in_window {
            true => Outgoing::InWindow(rows.layer, &placed),
            false => Outgoing::Rows(ExpertCall { layer: rows.layer, groups: &groups, activations: &self.gathered }),
        };
        let span = calls::span(roster, rows, &call).map(Span::as_client);
        let trace = span.as_ref().map(Span::context);
        match lane.start(outgoing, epoch, trace, replies, deadline) {
            Ok(call_id) => {
                let look = lane.silent_until(sent).min(deadline);
                Ok(Outstanding { lane: lane.clone(), call_id, call, span, sent, deadline, look })
            }
            Err(failure) => Err((call, failure)),
        }
    }

    /// Waits for the answers to all calls that are outstanding, each until it is given up; the pieces of those that failed
    /// are to be shared out again.
    fn collect(
        &mut self,
        under_way: &mut UnderWay,
        rows: &LayerRows<'_>,
        activations: &mut Activations<'_>,
    ) -> Result<(), ModelError> {
        let UnderWay { roster, outstanding, pieces: failed, waiting, inbox, dispatched } = under_way;
        let roster = &**roster;
        let mut load_max = Duration::ZERO;
        let mut late_wakes = 0;
        // By node: how long its call was on its way, without loads, computation and what the size of it explains.
        let mut on_the_way: Vec<(usize, Duration)> = Vec::with_capacity(outstanding.len());
        while let Some(look) = outstanding.iter().map(|call| call.look).min() {
            let Ok(Reply { call_id, outcome }) = inbox.replies.1.recv_deadline(look) else {
                let now = Instant::now();
                waiting.passed(look, now);
                if now > look + LATE_WAKE && late_wakes < LATE_WAKES_MAX {
                    late_wakes += 1;
                    outstanding.iter_mut().for_each(|call| call.look = call.look.max(now + LOOK_PERIOD));
                    continue;
                }
                late_wakes = 0;
                for (call, failure) in outstanding::given_up(roster, rows, outstanding, self.patience, now) {
                    self.give_back(roster, rows, call, failure, failed);
                }
                continue;
            };
            // The answer to a call that was given up meanwhile is nobody's.
            let Some(at) = outstanding.iter().position(|call| call.call_id == call_id) else { continue };
            let Outstanding { call, span, .. } = outstanding.swap_remove(at);
            drop(span);
            match outcome {
                Ok(Computed { results, report, took }) => {
                    waiting.answered();
                    roster.links[call.node].durations.record(took);
                    load_max = load_max.max(report.load);
                    let explained = report.load + report.compute + travel(results.bytes());
                    on_the_way.push((call.node, took.saturating_sub(explained)));
                    dispatched.demand_loads += u64::from(report.demand_loads);
                    match results {
                        Results::InWindow(window) => {
                            let device = activations.device().expect("a call through a window is of rows on a device");
                            device.take(&window, &call)?;
                        }
                        Results::Payload(payload) => {
                            let results = kept(&mut inbox.results, rows.grouping, self.d_model);
                            let mut from = &payload[..];
                            for piece in &call.pieces {
                                let (rows, rest) = from.split_at(piece.rows * self.d_model * size_of::<f32>());
                                let to = &mut results[piece.first_row * self.d_model..][..piece.rows * self.d_model];
                                copy_from_payload(rows, to);
                                from = rest;
                            }
                        }
                    }
                }
                Err(failure) => self.give_back(roster, rows, call, failure, failed),
            }
        }
        note_stragglers(roster, &on_the_way);
        // Remote nodes load at the same time.
        dispatched.load += load_max;
        Ok(())
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

impl Default for Inbox {
    fn default() -> Self {
        Self { replies: crossbeam_channel::unbounded(), results: Vec::new() }
    }
}

/// Room for all results of a layer, 0 where none came yet.
fn kept<'r>(results: &'r mut Vec<f32>, grouping: &Grouping, d_model: usize) -> &'r mut [f32] {
    results.resize(grouping.tokens.len() * d_model, 0.0);
    results
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
