//! Nodes that do what a test says, and a clock that is a number: a [`Driver`] by hand.

use std::{cell::Cell, ops::Range, time::Duration};

use super::{Bounds, Call, Driver, LayerCalls, Note, Outlook};
use crate::{
    ExpertId, Grouping, LayerId, Placement, Routes,
    failover::{CallFailure, RetryBudget},
    placement::Extent,
};

pub(super) const PATIENCE: Duration = ms(2000);
/// Silence that nodes are granted here.
pub(super) const SILENCE: Duration = ms(100);

pub(super) const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Nodes a, b and c; expert 0 is held by a and b, 1 by b and c, 2 by c and a, and so on.
pub(super) struct Nodes {
    pub(super) placement: Placement,
    pub(super) up: Vec<bool>,
    /// When each was heard last.
    pub(super) heard: Vec<Duration>,
    pub(super) has_newer: bool,
    pub(super) is_wanted: Cell<bool>,
    pub(super) budget: RetryBudget,
    pub(super) given_up: Vec<(u64, usize, bool)>,
    pub(super) paces: Vec<(usize, bool)>,
    pub(super) notes: Vec<&'static str>,
}

impl Nodes {
    pub(super) fn new(nodes: usize) -> Self {
        let extent = Extent { moe_layers: 1, num_experts: 6, replicas: 2 };
        let names = ["a", "b", "c"][..nodes].iter().map(|&name| name.into()).collect();
        let holders: Vec<u32> = (0..6).flat_map(|e| [e % nodes as u32, (e + 1) % nodes as u32]).collect();
        let (counts, holders) = match nodes {
            1 => (vec![1; 6], vec![0; 6]),
            _ => (vec![2; 6], holders),
        };
        Self {
            placement: Placement::from_parts(1, extent, names, &counts, &holders).unwrap(),
            up: vec![true; nodes],
            heard: vec![Duration::ZERO; nodes],
            has_newer: false,
            is_wanted: Cell::new(true),
            budget: RetryBudget::new(0.2, 10.0),
            given_up: Vec::new(),
            paces: Vec::new(),
            notes: Vec::new(),
        }
    }
}

impl Driver for Nodes {
    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn has_newer_placement(&self) -> bool {
        self.has_newer
    }

    fn is_up(&self, node: usize, _: Duration) -> bool {
        self.up[node]
    }

    fn silent_until(&self, node: usize, sent: Duration) -> Duration {
        self.heard[node].max(sent) + SILENCE
    }

    fn is_wanted(&self, _: &Range<usize>, _: Duration) -> bool {
        self.is_wanted.get()
    }

    fn note_call(&mut self, now: Duration) {
        self.budget.call(now);
    }

    fn take_retry(&mut self, now: Duration) -> bool {
        self.budget.take_retry(now)
    }

    fn give_up(&mut self, call_id: u64, node: usize, is_wanted: bool, _: Duration) {
        self.given_up.push((call_id, node, is_wanted));
        self.up[node] &= !is_wanted;
    }

    fn note_pace(&mut self, node: usize, straggled: bool, _: Duration) {
        self.paces.push((node, straggled));
    }

    fn note(&mut self, note: Note<'_>) {
        self.notes.push(match note {
            Note::Failed { is_reshared: false, .. } => "failed",
            Note::Failed { is_reshared: true, .. } => "reshared",
            Note::AskedAgain(_) => "asked again",
            Note::RetryRefused => "refused",
            Note::Waits(_) => "waits",
        });
    }
}

/// A layer with so many rows for each of these experts.
pub(super) fn layer(experts: &[(u16, usize)], rows_max: usize) -> LayerCalls {
    layer_after(experts, rows_max, Outlook::default(), ms(0))
}

pub(super) fn layer_after(experts: &[(u16, usize)], rows_max: usize, outlook: Outlook, now: Duration) -> LayerCalls {
    let experts = experts.iter().flat_map(|&(expert, rows)| vec![Some(ExpertId(expert)); rows]).collect::<Vec<_>>();
    let grouping = Grouping::new(&Routes { top_k: 1, weights: vec![1.0; experts.len()], experts });
    let bounds = Bounds { rows_max, patience: PATIENCE };
    LayerCalls::begin(LayerId(0), &grouping, bounds, outlook, now)
}

/// Who is asked for which experts.
pub(super) fn asked(calls: &[Call]) -> Vec<(usize, Vec<(u16, usize)>)> {
    let piece = |call: &Call| call.pieces.iter().map(|piece| (piece.expert.0, piece.rows)).collect();
    calls.iter().map(|call| (call.node, piece(call))).collect()
}

pub(super) fn send(calls: &mut LayerCalls, nodes: &Nodes, id: u64, call: Call, now: Duration, allowed: Duration) {
    let deadline = calls.deadline(allowed, now);
    calls.sent(nodes, id, call, now, deadline);
}

pub(super) fn lost() -> CallFailure {
    CallFailure::Disconnected { reason: "lost".into() }
}
