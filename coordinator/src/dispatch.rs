//! One MoE layer's rows, to the experts and back: grouped rows are shared out among the nodes that hold their
//! experts, remote nodes are asked first, nodes in this process compute on this thread meanwhile, and the
//! results are combined in the order of the groups, so that a sum never depends on who answered first.
//!
//! A call that fails goes to the next node within the same layer; rows are idempotent. Only when nobody is
//! left is a group given up, and with it the requests whose rows are in it; never a skipped expert.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender};
use sida_cluster::experts::{CallError, CallReport, ExpertCall, LocalExperts};
use sida_proto::wire::rows::copy_from_payload;
use sida_routing::{ExpertId, ExpertKey, Group, Grouping, LayerId, NodeId};
use sida_rpc::Reason;
use sida_telemetry::{counter, names};

use crate::{
    lane::{CallFailure, Computed, Lane, Reply},
    nodes::{Nodes, Reach, Roster},
    request::RequestError,
};

/// Sends rows to experts. One per thread that does: its buffers are kept from layer to layer.
pub(crate) struct Dispatch {
    nodes: Arc<Nodes>,
    d_model: usize,
    /// Rows of one call at most; more are sent as several.
    rows_max: usize,
    /// How long the last node that could answer is waited for.
    patience: Duration,
    replies: (Sender<Reply>, Receiver<Reply>),
    /// (rows of the layer, d_model), in grouped order.
    results: Vec<f32>,
    /// (rows of a call, d_model): what goes to a node, and what a node in this process makes of it.
    gathered: Vec<f32>,
    computed: Vec<f32>,
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

/// A run of grouped rows for one expert: what is sent, and sent again, as a whole.
struct Piece {
    expert: ExpertId,
    first_row: usize,
    rows: usize,
    /// Nodes that failed it, and why.
    tried: Vec<(usize, CallFailure)>,
    /// A message with it and others was refused: it goes by itself from now on, so that an expert that cannot
    /// be loaded does not take the others with it.
    alone: bool,
}

/// Pieces for one node, in one message.
struct Call {
    node: usize,
    pieces: Vec<Piece>,
}

/// A call on its way.
struct Outstanding {
    call_id: u64,
    call: Call,
    sent: Instant,
    deadline: Instant,
}

impl Call {
    fn rows(&self) -> usize {
        self.pieces.iter().map(|piece| piece.rows).sum()
    }

    fn groups(&self) -> Vec<Group> {
        self.pieces.iter().map(|piece| Group { expert: piece.expert, rows: piece.rows as u32 }).collect()
    }
}

impl Dispatch {
    /// `rows_max` bounds one message, at least 1; `patience`, the wait for a node when no other can answer.
    pub(crate) fn new(nodes: Arc<Nodes>, d_model: usize, rows_max: usize, patience: Duration) -> Self {
        let replies = crossbeam_channel::unbounded();
        let (results, gathered, computed) = Default::default();
        Self { nodes, d_model, rows_max, patience, replies, results, gathered, computed }
    }

    /// `out[token] += weight * expert(x[token])` for every row of `grouping`; `x` and `out` are (tokens,
    /// d_model).
    pub(crate) fn moe(&mut self, layer: LayerId, grouping: &Grouping, x: &[f32], out: &mut [f32]) -> Dispatched {
        let roster = self.nodes.roster();
        let mut dispatched = Dispatched::default();
        // Pieces that nobody computed add nothing, so whatever an earlier layer left here must go.
        self.results.clear();
        self.results.resize(grouping.tokens.len() * self.d_model, 0.0);
        let mut waiting = self.pieces(grouping);
        while !waiting.is_empty() {
            let calls = self.share_out(&roster, layer, waiting, &mut dispatched);
            waiting = self.round(&roster, layer, grouping, x, calls, &mut dispatched);
        }
        grouping.combine(0, &self.results, self.d_model, out);
        dispatched
    }

    /// The groups, those beyond the size of a message cut up.
    fn pieces(&self, grouping: &Grouping) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(grouping.groups.len());
        let mut first_row = 0;
        for group in &grouping.groups {
            let end = first_row + group.rows as usize;
            while first_row < end {
                let rows = self.rows_max.min(end - first_row);
                pieces.push(Piece { expert: group.expert, first_row, rows, tried: Vec::new(), alone: false });
                first_row += rows;
            }
        }
        pieces
    }

    /// Chooses a node for every piece; those of a node make as few messages as their size allows. Pieces for
    /// which nobody is left are noted as failed.
    fn share_out(&self, roster: &Roster, layer: LayerId, pieces: Vec<Piece>, dispatched: &mut Dispatched) -> Vec<Call> {
        let now = Instant::now();
        let mut open: Vec<Option<Call>> = roster.links.iter().map(|_| None).collect();
        let mut calls = Vec::with_capacity(open.len());
        let mut tried = Vec::new();
        for piece in pieces {
            let key = ExpertKey { layer, expert: piece.expert };
            tried.clear();
            tried.extend(piece.tried.iter().map(|(node, _)| *node));
            let Some(node) = roster.choose(key, &tried, now) else {
                let rows = piece.first_row..piece.first_row + piece.rows;
                dispatched.failed.push((rows, unavailable(roster, key, piece.tried)));
                continue;
            };
            if piece.alone {
                calls.push(Call { node, pieces: vec![piece] });
                continue;
            }
            let slot = &mut open[node];
            if slot.as_ref().is_some_and(|call| call.rows() + piece.rows > self.rows_max) {
                calls.extend(slot.take());
            }
            slot.get_or_insert_with(|| Call { node, pieces: Vec::new() }).pieces.push(piece);
        }
        calls.extend(open.into_iter().flatten());
        for (_, failure) in calls.iter().filter_map(|call: &Call| call.pieces[0].tried.last()) {
            counter!(names::FAILOVERS_TOTAL, names::REASON => failure.label()).increment(1);
            dispatched.failovers += 1;
        }
        calls
    }

    /// Makes the calls, remote ones first; returns the pieces of those that failed.
    fn round(
        &mut self,
        roster: &Roster,
        layer: LayerId,
        grouping: &Grouping,
        x: &[f32],
        calls: Vec<Call>,
        dispatched: &mut Dispatched,
    ) -> Vec<Piece> {
        let mut failed = Vec::new();
        let mut outstanding = Vec::new();
        let mut local = Vec::new();
        for call in calls {
            match &roster.links[call.node].reach {
                Reach::Local(experts) => local.push((experts.clone(), call)),
                Reach::Remote(lane) => match self.send(roster, lane, layer, grouping, x, &call) {
                    Ok((call_id, sent, deadline)) => outstanding.push(Outstanding { call_id, call, sent, deadline }),
                    Err(failure) => give_back(roster, call, failure, &mut failed),
                },
            }
        }
        for (experts, call) in local {
            let start = Instant::now();
            match self.compute(&*experts, layer, grouping, x, &call) {
                Ok(report) => {
                    roster.links[call.node].durations.record(start.elapsed());
                    dispatched.load += report.load;
                    dispatched.demand_loads += u64::from(report.demand_loads);
                }
                Err(failure) => give_back(roster, call, failure, &mut failed),
            }
        }
        self.collect(roster, outstanding, dispatched, &mut failed);
        failed
    }

    /// Sends a call's rows down a lane. Returns its id, when it was sent, and until when it is waited for.
    fn send(
        &mut self,
        roster: &Roster,
        lane: &Lane,
        layer: LayerId,
        grouping: &Grouping,
        x: &[f32],
        call: &Call,
    ) -> Result<(u64, Instant, Instant), CallFailure> {
        gather(grouping, x, self.d_model, &call.pieces, &mut self.gathered);
        let sent = Instant::now();
        // A tight deadline is of use only while somebody else could be asked.
        let tried = call.pieces.iter().flat_map(|piece| &piece.tried).map(|(node, _)| *node);
        let asked: Vec<usize> = tried.chain([call.node]).collect();
        let allowed = if roster.anyone_else(&asked, sent) {
            lane.allow(call.rows(), call.pieces.len()).min(self.patience)
        } else {
            self.patience
        };
        let deadline = sent + allowed;
        let call = ExpertCall { layer, groups: &call.groups(), activations: &self.gathered };
        Ok((lane.start(call, &self.replies.0, deadline)?, sent, deadline))
    }

    /// Computes a call on a node in this process, on this thread.
    fn compute(
        &mut self,
        experts: &dyn LocalExperts,
        layer: LayerId,
        grouping: &Grouping,
        x: &[f32],
        call: &Call,
    ) -> Result<CallReport, CallFailure> {
        gather(grouping, x, self.d_model, &call.pieces, &mut self.gathered);
        self.computed.resize(self.gathered.len(), 0.0);
        let groups = call.groups();
        let expert_call = ExpertCall { layer, groups: &groups, activations: &self.gathered };
        let computed = &mut self.computed;
        // A node's bug must not take the coordinator down with it.
        let outcome = catch_unwind(AssertUnwindSafe(|| experts.compute(expert_call, computed)));
        let report = outcome
            .map_err(|_| CallFailure::Panicked)?
            .map_err(|error| CallFailure::Refused { reason: reason(&error), message: error.to_string() })?;
        let mut from = &self.computed[..];
        for piece in &call.pieces {
            let (rows, rest) = from.split_at(piece.rows * self.d_model);
            self.results[piece.first_row * self.d_model..][..rows.len()].copy_from_slice(rows);
            from = rest;
        }
        Ok(report)
    }

    /// Waits for the answers to all calls that are under way, each until its deadline.
    fn collect(
        &mut self,
        roster: &Roster,
        mut outstanding: Vec<Outstanding>,
        dispatched: &mut Dispatched,
        failed: &mut Vec<Piece>,
    ) {
        let mut load_max = Duration::ZERO;
        while let Some(deadline) = outstanding.iter().map(|call| call.deadline).min() {
            let Ok(Reply { call_id, outcome }) = self.replies.1.recv_deadline(deadline) else {
                let now = Instant::now();
                for late in outstanding.extract_if(.., |call| call.deadline <= now) {
                    if let Reach::Remote(lane) = &roster.links[late.call.node].reach {
                        lane.give_up(late.call_id, now);
                    }
                    let waited = now - late.sent;
                    give_back(roster, late.call, CallFailure::Silent { waited }, failed);
                }
                continue;
            };
            // The answer to a call that was given up meanwhile is nobody's.
            let Some(at) = outstanding.iter().position(|call| call.call_id == call_id) else { continue };
            let Outstanding { call, .. } = outstanding.swap_remove(at);
            match outcome {
                Ok(Computed { payload, report, took }) => {
                    roster.links[call.node].durations.record(took);
                    load_max = load_max.max(report.load);
                    dispatched.demand_loads += u64::from(report.demand_loads);
                    let mut from = &payload[..];
                    for piece in &call.pieces {
                        let (rows, rest) = from.split_at(piece.rows * self.d_model * size_of::<f32>());
                        let to = &mut self.results[piece.first_row * self.d_model..][..piece.rows * self.d_model];
                        copy_from_payload(rows, to);
                        from = rest;
                    }
                }
                Err(failure) => give_back(roster, call, failure, failed),
            }
        }
        // Remote nodes load at the same time.
        dispatched.load += load_max;
    }
}

/// The rows of `pieces`, one after another.
fn gather(grouping: &Grouping, x: &[f32], d_model: usize, pieces: &[Piece], rows: &mut Vec<f32>) {
    rows.clear();
    for piece in pieces {
        for &token in &grouping.tokens[piece.first_row..][..piece.rows] {
            rows.extend_from_slice(&x[token as usize * d_model..][..d_model]);
        }
    }
}

/// A call failed: its pieces wait for another node.
fn give_back(roster: &Roster, call: Call, failure: CallFailure, failed: &mut Vec<Piece>) {
    tracing::warn!(node = %roster.links[call.node].node, rows = call.rows(), %failure, "an expert call failed");
    let several = call.pieces.len() > 1;
    for mut piece in call.pieces {
        if several && failure.is_of_one_expert() {
            piece.alone = true;
        } else {
            piece.tried.push((call.node, failure.clone()));
        }
        failed.push(piece);
    }
}

/// Why a node in this process refused, in the words that one behind a lane would use.
fn reason(error: &CallError) -> Reason {
    match error {
        CallError::Malformed(_) => Reason::MalformedMessage,
        CallError::Load { .. } => Reason::ExpertLoadFailed,
        CallError::ShuttingDown => Reason::ShuttingDown,
    }
}

fn unavailable(roster: &Roster, key: ExpertKey, tried: Vec<(usize, CallFailure)>) -> RequestError {
    let reason = |(node, failure): (usize, CallFailure)| -> (NodeId, String) {
        (roster.links[node].node.clone(), failure.to_string())
    };
    RequestError::ExpertUnavailable { key, tried: tried.into_iter().map(reason).collect() }
}
