//! One MoE layer's rows, to the experts and back. `sida_routing::dispatch` decides which node is asked for which rows,
//! again or not any more; here its calls are made, remote ones first, nodes in this process compute meanwhile, and the
//! results are combined in the order of the groups, so that a sum never depends on who answered first. Rows on a device
//! stay there as far as nodes can compute or read them there (`layer_rows`).
//!
//! Between [`Dispatch::begin`] and [`Dispatch::finish`] a layer is under way: whoever dispatches may compute something else
//! meanwhile, and begin another.

use std::{ops::Range, sync::Arc, time::Duration};

use crossbeam_channel::{Receiver, Sender};
use sida_cluster::experts::ExpertCall;
use sida_model::{ModelError, ResidentExperts, RowsOnDevice};
use sida_proto::wire::rows::copy_from_payload;
use sida_routing::{
    Grouping,
    dispatch::{Bounds, Call, Finished, LayerCalls, Next, Outlook},
    failover::{CallFailure, lane_health::travel},
};
use sida_telemetry::Span;

use crate::{
    answer::request_error::RequestError,
    dispatch::{
        calls,
        driver::LayerDriver,
        here::{self, Here, Made},
        layer_rows::{Activations, LayerRows},
        nodes::{Nodes, Reach, Roster},
        remote::{
            lane::Lane,
            lane_call::{Computed, Outgoing, Reply, Results},
        },
    },
};

/// Sends rows to experts. One per thread that does: its buffers are kept from layer to layer.
pub(crate) struct Dispatch {
    nodes: Arc<Nodes>,
    d_model: usize,
    bounds: Bounds,
    /// Whether nodes that are away are worth waiting for, as the layers so far found it.
    outlook: Outlook,
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
    /// The nodes of this round of calls.
    roster: Arc<Roster>,
    calls: LayerCalls,
    /// The spans of calls that were sent, by id.
    spans: Vec<(u64, Span)>,
    inbox: Inbox,
    dispatched: Dispatched,
    /// The longest load in other processes in this round.
    remote_load: Duration,
}

/// What a layer's rows cost.
#[derive(Default)]
pub(crate) struct Dispatched {
    /// Waiting for experts to be loaded.
    pub(crate) load: Duration,
    /// Experts that had to be loaded first.
    pub(crate) demand_loads: u64,
    /// Calls that were made again after one failed.
    pub(crate) failovers: u64,
    /// Runs of grouped rows that nobody could compute; their results are 0.
    pub(crate) failed: Vec<(Range<usize>, RequestError)>,
    /// (tokens, d_model): `weight * expert(x)` of every token; `None` where that was added on a device.
    pub(crate) out: Option<Vec<f32>>,
}

impl Dispatch {
    /// `rows_max` bounds one message, at least 1; `patience`, the wait for a node when no other can answer, or none.
    pub(crate) fn new(nodes: Arc<Nodes>, d_model: usize, rows_max: usize, patience: Duration) -> Self {
        let (inboxes, gathered, here) = Default::default();
        let bounds = Bounds { rows_max, patience };
        Self { nodes, d_model, bounds, outlook: Outlook::default(), inboxes, gathered, here }
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
        let now = self.nodes.clock().now();
        let mut under_way = UnderWay {
            roster: self.nodes.roster(),
            calls: LayerCalls::begin(rows.layer, rows.grouping, self.bounds, self.outlook, now),
            spans: Vec::new(),
            inbox,
            dispatched: Dispatched::default(),
            remote_load: Duration::ZERO,
        };
        self.ask(&mut under_way, rows, activations, now)?;
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
        let clock = self.nodes.clock();
        loop {
            let now = clock.now();
            let (calls, mut driver) = under_way.driven(&self.nodes, rows);
            match calls.next(&mut driver, now) {
                Next::Done => break,
                Next::Ask => {
                    under_way.roster = self.nodes.roster();
                    self.ask(&mut under_way, rows, &mut activations, now)?;
                }
                Next::Wait(until) => match under_way.inbox.replies.1.recv_deadline(clock.instant(until)) {
                    Ok(reply) => self.take(&mut under_way, rows, &mut activations, reply)?,
                    Err(_) => {
                        let (calls, mut driver) = under_way.driven(&self.nodes, rows);
                        calls.look(&mut driver, clock.now());
                    }
                },
            }
        }
        let UnderWay { calls, inbox, mut dispatched, remote_load, .. } = under_way;
        let Finished { given_up, failovers, outlook } = calls.finish();
        self.outlook.learn(outlook);
        dispatched.load += remote_load;
        dispatched.failovers = failovers;
        let failed = given_up.into_iter().map(|one| (one.rows.clone(), calls::error(one, rows)));
        dispatched.failed = failed.collect();
        let results = Some(&inbox.results[..]).filter(|results| !results.is_empty());
        dispatched.out = activations.combine(rows.grouping, results, self.d_model)?;
        self.inboxes.push(inbox);
        Ok(dispatched)
    }

    /// Makes the calls of a round, remote ones first.
    fn ask(
        &mut self,
        under_way: &mut UnderWay,
        rows: &LayerRows<'_>,
        activations: &mut Activations<'_>,
        now: Duration,
    ) -> Result<(), ModelError> {
        // Nodes load at the same time: those of other processes since the round before began.
        under_way.dispatched.load += std::mem::take(&mut under_way.remote_load);
        let roster = under_way.roster.clone();
        let mut local = Vec::new();
        let (calls, mut driver) = under_way.driven(&self.nodes, rows);
        for call in calls.ask(&mut driver, now) {
            match &roster.links[call.node].reach {
                Reach::Local(experts) => local.push((experts, call)),
                Reach::Remote(lane) => self.send(under_way, lane, rows, activations, call)?,
            }
        }
        let (mut load_max, mut here) = (Duration::ZERO, Vec::with_capacity(local.len()));
        let mut made = Vec::with_capacity(local.len());
        for (experts, call) in local {
            match here::start_on_device(&roster, rows, activations, &**experts, &call)? {
                Some((outcome, took)) => made.push((call, outcome, took)),
                None => here.push((experts, call)),
            }
        }
        if !here.is_empty() {
            let results = kept(&mut under_way.inbox.results, rows.grouping, self.d_model);
            let computed = self.here.make(&roster, rows, activations.x()?, self.d_model, here, results);
            made.extend(computed.into_iter().map(|Made { call, outcome, took, .. }| (call, outcome, took)));
        }
        for (call, outcome, took) in made {
            match outcome {
                Ok(report) => {
                    under_way.calls.computed(self.nodes.clock().now());
                    roster.links[call.node].durations.record(took);
                    load_max = load_max.max(report.load);
                    under_way.dispatched.demand_loads += u64::from(report.demand_loads);
                }
                Err(failure) => under_way.failed(&self.nodes, rows, call, &failure),
            }
        }
        // They load at the same time.
        under_way.dispatched.load += load_max;
        Ok(())
    }

    /// Sends a call down a lane, with its rows or with where they are; then it is under way.
    fn send(
        &mut self,
        under_way: &mut UnderWay,
        lane: &Lane,
        rows: &LayerRows<'_>,
        activations: &mut Activations<'_>,
        call: Call,
    ) -> Result<(), ModelError> {
        let (d_model, clock) = (self.d_model, self.nodes.clock());
        let in_window = lane.has_window() && activations.device().is_some();
        match activations.device().filter(|_| in_window) {
            Some(device) => device.settle()?,
            None => calls::gather(rows.grouping, activations.x()?, d_model, &call.pieces, &mut self.gathered),
        }
        let sent = clock.now();
        let allowed = lane.health(|health| health.allows(call.rows(), call.pieces.len()));
        let deadline = under_way.calls.deadline(allowed, sent);
        let (groups, placed, epoch) = (call.groups(), call.placed_groups(), under_way.roster.placement.epoch());
        let outgoing = match in_window {
            true => Outgoing::InWindow(rows.layer, &placed),
            false => Outgoing::Rows(ExpertCall { layer: rows.layer, groups: &groups, activations: &self.gathered }),
        };
        let span = calls::span(&under_way.roster, rows, &call).map(Span::as_client);
        let trace = span.as_ref().map(Span::context);
        match lane.start(outgoing, epoch, trace, &under_way.inbox.replies.0, clock.instant(deadline)) {
            Ok(id) => {
                under_way.spans.extend(span.map(|span| (id, span)));
                let (calls, driver) = under_way.driven(&self.nodes, rows);
                calls.sent(&driver, id, call, sent, deadline);
            }
            Err(failure) => under_way.failed(&self.nodes, rows, call, &failure),
        }
        Ok(())
    }

    /// Takes what came for a call: results, or why there are none.
    fn take(
        &mut self,
        under_way: &mut UnderWay,
        rows: &LayerRows<'_>,
        activations: &mut Activations<'_>,
        reply: Reply,
    ) -> Result<(), ModelError> {
        let Reply { call_id, outcome, newer_placement } = reply;
        // The answer to a call that was given up meanwhile is nobody's.
        let Some(call) = under_way.calls.answered(call_id) else { return Ok(()) };
        under_way.spans.retain(|(id, _)| *id != call_id);
        let Computed { results, report, took, .. } = match outcome {
            Ok(computed) => computed,
            Err(failure) => {
                if failure == CallFailure::Stale {
                    self.nodes.adopt(&newer_placement);
                }
                under_way.failed(&self.nodes, rows, call, &failure);
                return Ok(());
            }
        };
        under_way.calls.computed(self.nodes.clock().now());
        let explained = report.load + report.compute + travel(results.bytes());
        under_way.calls.travelled(call.node, took.saturating_sub(explained));
        under_way.roster.links[call.node].durations.record(took);
        under_way.remote_load = under_way.remote_load.max(report.load);
        under_way.dispatched.demand_loads += u64::from(report.demand_loads);
        match results {
            Results::InWindow(window) => {
                let device = activations.device().expect("a call through a window is of rows on a device");
                device.take(&window, &call)?;
            }
            Results::Payload(payload) => {
                let results = kept(&mut under_way.inbox.results, rows.grouping, self.d_model);
                let mut from = &payload[..];
                for piece in &call.pieces {
                    let (rows, rest) = from.split_at(piece.rows * self.d_model * size_of::<f32>());
                    let to = &mut results[piece.first_row * self.d_model..][..piece.rows * self.d_model];
                    copy_from_payload(rows, to);
                    from = rest;
                }
            }
        }
        Ok(())
    }
}

impl UnderWay {
    /// The calls, and what they are decided on in this round.
    fn driven<'a>(&'a mut self, nodes: &'a Nodes, rows: &'a LayerRows<'a>) -> (&'a mut LayerCalls, LayerDriver<'a>) {
        (&mut self.calls, LayerDriver { nodes, roster: &self.roster, rows, spans: &mut self.spans })
    }

    /// A call of this round failed.
    fn failed(&mut self, nodes: &Nodes, rows: &LayerRows<'_>, call: Call, failure: &CallFailure) {
        let (calls, mut driver) = self.driven(nodes, rows);
        calls.failed(&mut driver, call, failure);
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
