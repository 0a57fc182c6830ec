//! What the decisions on a layer's calls stand on here: the nodes of a round, the callers, the retry budget, and the log
//! and the metrics.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use sida_routing::{
    Placement,
    dispatch::{Driver, Note},
    failover::CallFailure,
};
use sida_telemetry::{Span, counter, names};

use crate::dispatch::{
    layer_rows::LayerRows,
    nodes::{Nodes, Reach, Roster},
};

/// Drives the calls of one layer.
pub(crate) struct LayerDriver<'a> {
    pub(crate) nodes: &'a Nodes,
    /// The nodes as they were when the calls of this round were assigned.
    pub(crate) roster: &'a Roster,
    pub(crate) rows: &'a LayerRows<'a>,
    /// The spans of calls that were sent, by id; one ends with its call.
    pub(crate) spans: &'a mut Vec<(u64, Span)>,
}

impl Driver for LayerDriver<'_> {
    fn placement(&self) -> &Placement {
        &self.roster.placement
    }

    fn has_newer_placement(&self) -> bool {
        self.nodes.roster().placement.epoch() > self.roster.placement.epoch()
    }

    fn is_up(&self, node: usize, now: Duration) -> bool {
        self.roster.links[node].is_up(now)
    }

    fn silent_until(&self, node: usize, sent: Duration) -> Duration {
        match &self.roster.links[node].reach {
            // It answers before anyone could look.
            Reach::Local(_) => Duration::MAX,
            Reach::Remote(lane) => lane.health(|health| health.silent_until(sent)),
        }
    }

    fn is_wanted(&self, rows: &Range<usize>, now: Duration) -> bool {
        let now = self.nodes.clock().instant(now);
        self.rows.callers.gone(&self.rows.grouping.tokens[rows.clone()], now).is_none()
    }

    fn note_call(&mut self, now: Duration) {
        self.nodes.note_call(now);
    }

    fn take_retry(&mut self, now: Duration) -> bool {
        self.nodes.take_retry(now)
    }

    fn give_up(&mut self, call_id: u64, node: usize, is_wanted: bool, now: Duration) {
        self.spans.retain(|(id, _)| *id != call_id);
        if let Reach::Remote(lane) = &self.roster.links[node].reach {
            lane.give_up(call_id, is_wanted, now);
        }
    }

    fn note_pace(&mut self, node: usize, straggled: bool, now: Duration) {
        if let Reach::Remote(lane) = &self.roster.links[node].reach {
            lane.note_pace(straggled, now);
        }
    }

    fn note(&mut self, note: Note<'_>) {
        match note {
            // What a health check tries is nobody's request.
            Note::AskedAgain(_) if !self.rows.callers.are_any() => {}
            Note::AskedAgain(failure) => {
                counter!(names::FAILOVERS_TOTAL, names::REASON => failure.label()).increment(1);
            }
            Note::RetryRefused => counter!(names::RETRIES_REFUSED_TOTAL).increment(1),
            Note::Waits(key) => {
                if let Some(lines_left_out) = self.nodes.waits.next(Instant::now()) {
                    tracing::warn!(%key, lines_left_out, "every expert-node failed; waiting for one to come back");
                }
            }
            Note::Failed { call, failure, is_reshared } => {
                let (link, rows) = (&self.roster.links[call.node], call.rows());
                let node = &link.node;
                match failure {
                    _ if is_reshared => {
                        tracing::info!(%node, rows, "a node knows a newer placement; its rows are shared out again");
                    }
                    CallFailure::Unwanted => tracing::debug!(%node, rows, "nobody waits for an expert call any more"),
                    failure => {
                        if let Some(lines_left_out) = link.failures.next(Instant::now()) {
                            let trace_id = self.rows.trace.map(|trace| tracing::field::display(trace.trace_id()));
                            tracing::warn!(%node, rows, trace_id, %failure, lines_left_out, "an expert call failed");
                        }
                    }
                }
            }
        }
    }
}
