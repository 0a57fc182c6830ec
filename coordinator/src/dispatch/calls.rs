//! Expert calls: the rows of a layer are cut into pieces of one expert each, the pieces for one node make a call, and a
//! node is chosen for each piece.

use std::time::Instant;

use sida_routing::{ExpertId, ExpertKey, Group, Grouping, NodeId, PlacedGroup};
use sida_telemetry::Span;

use crate::dispatch::{layer_rows::LayerRows, nodes::Roster, remote::call_failure::CallFailure};

/// A run of grouped rows for one expert. A piece is sent, and sent again, as a whole.
pub(crate) struct Piece {
    pub(crate) expert: ExpertId,
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
    /// The nodes that failed the piece, each with its last reason. They are kept by name, since the roster may change
    /// meanwhile.
    /// Invariant: each node is in it once, and the node that failed last comes last.
    pub(crate) tried: Vec<(NodeId, CallFailure)>,
    /// The budget had no retry for the piece, and the metric has counted that.
    pub(crate) is_refused: bool,
    /// How often a node refused the piece because it knew a newer placement.
    pub(crate) reshares: u32,
    /// A call with this piece and others was refused. The piece goes by itself from now on, so that an expert that
    /// cannot be loaded does not take the others with it.
    pub(crate) alone: bool,
}

/// An expert call: pieces for one node, in one message.
pub(crate) struct Call {
    pub(crate) node: usize,
    pub(crate) pieces: Vec<Piece>,
}

impl Piece {
    /// The groups of a layer as pieces of at most `rows_max` rows.
    pub(crate) fn of(grouping: &Grouping, rows_max: usize) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(grouping.groups.len());
        let mut first_row = 0;
        for group in &grouping.groups {
            let end = first_row + group.rows as usize;
            while first_row < end {
                let rows = rows_max.min(end - first_row);
                let (expert, tried) = (group.expert, Vec::new());
                let (is_refused, reshares, alone) = Default::default();
                pieces.push(Piece { expert, first_row, rows, tried, is_refused, reshares, alone });
                first_row += rows;
            }
        }
        pieces
    }

    /// Notes that a node failed the piece.
    pub(crate) fn failed(&mut self, node: &NodeId, failure: CallFailure) {
        self.tried.retain(|(tried, _)| tried != node);
        self.tried.push((node.clone(), failure));
    }

    /// Where the piece's rows are among the grouped rows of the layer.
    pub(crate) fn range(&self) -> std::ops::Range<usize> {
        self.first_row..self.first_row + self.rows
    }
}

impl Call {
    /// The rows of all pieces.
    pub(crate) fn rows(&self) -> usize {
        self.pieces.iter().map(|piece| piece.rows).sum()
    }

    /// Where each row is among the grouped rows of the layer.
    pub(crate) fn places(&self) -> Vec<u32> {
        self.pieces.iter().flat_map(Piece::range).map(|place| place as u32).collect()
    }

    /// The groups as a call through a window names them.
    pub(crate) fn placed_groups(&self) -> Vec<PlacedGroup> {
        let placed = |piece: &Piece| PlacedGroup {
            expert: piece.expert,
            first: piece.first_row as u32,
            rows: piece.rows as u32,
        };
        self.pieces.iter().map(placed).collect()
    }

    /// The groups as a message with rows names them.
    pub(crate) fn groups(&self) -> Vec<Group> {
        self.pieces.iter().map(|piece| Group { expert: piece.expert, rows: piece.rows as u32 }).collect()
    }
}

/// The node to ask for a piece, of those that have not failed it.
pub(crate) fn choose(roster: &Roster, key: ExpertKey, piece: &Piece, now: Instant) -> Option<usize> {
    roster.choose(key, &tried(roster, &piece.tried), now)
}

/// The node to ask for a piece that every node has failed: one that has come back since.
pub(crate) fn choose_again(roster: &Roster, key: ExpertKey, piece: &Piece, now: Instant) -> Option<usize> {
    let is_back = |(node, failure): &(NodeId, CallFailure)| {
        let link = roster.position(node).map(|at| &roster.links[at]);
        failure.may_pass() && link.is_some_and(|link| link.is_up(now))
    };
    let away: Vec<_> = piece.tried.iter().filter(|tried| !is_back(tried)).cloned().collect();
    roster.choose(key, &tried(roster, &away), now)
}

/// The indices of the nodes that were tried.
fn tried(roster: &Roster, tried: &[(NodeId, CallFailure)]) -> Vec<usize> {
    tried.iter().filter_map(|(node, _)| roster.position(node)).collect()
}

/// Whether a node that is up was not asked yet.
pub(crate) fn anyone_else(roster: &Roster, call: &Call, now: Instant) -> bool {
    let mut asked: Vec<usize> = call.pieces.iter().flat_map(|piece| tried(roster, &piece.tried)).collect();
    asked.push(call.node);
    roster.anyone_else(&asked, now)
}

/// Whether a node that is up was not asked yet, or failed for a reason that may have passed.
pub(crate) fn anyone_back(roster: &Roster, call: &Call, now: Instant) -> bool {
    let for_good = |(_, failure): &&(NodeId, CallFailure)| !failure.may_pass();
    let for_good = call.pieces.iter().flat_map(|piece| piece.tried.iter().filter(for_good));
    let mut asked: Vec<usize> = for_good.filter_map(|(node, _)| roster.position(node)).collect();
    asked.push(call.node);
    roster.anyone_else(&asked, now)
}

/// Copies the rows of `pieces`, one after another, from `x` (tokens, d_model) into `rows`.
pub(crate) fn gather(grouping: &Grouping, x: &[f32], d_model: usize, pieces: &[Piece], rows: &mut Vec<f32>) {
    rows.clear();
    for piece in pieces {
        for &token in &grouping.tokens[piece.first_row..][..piece.rows] {
            rows.extend_from_slice(&x[token as usize * d_model..][..d_model]);
        }
    }
}

/// The span of a call that begins now, within the layer's.
pub(crate) fn span(roster: &Roster, rows: &LayerRows<'_>, call: &Call) -> Option<Span> {
    let mut span = Span::below(rows.trace?, "expert call");
    if span.is_recorded() {
        span.set("sida.node", roster.links[call.node].node.to_string());
        span.set("sida.layer", i64::from(rows.layer.0));
        span.set("sida.experts", call.pieces.len() as i64);
        span.set("sida.rows", call.rows() as i64);
    }
    Some(span)
}

/// The nodes that were asked, each with its reason in words.
pub(crate) fn reasons(tried: &[(NodeId, CallFailure)]) -> Vec<(NodeId, String)> {
    tried.iter().map(|(node, failure)| (node.clone(), failure.to_string())).collect()
}
