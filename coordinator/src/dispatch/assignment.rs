//! Assigns a layer's rows to expert-nodes: a node for every piece, as few calls as their sizes allow, retries within
//! their budget, and a verdict over pieces that no node can be asked for. `dispatch` assigns again and again until no
//! piece is left.

use std::time::Instant;

use sida_routing::ExpertKey;
use sida_telemetry::{counter, names};

use crate::{
    answer::request_error::RequestError,
    dispatch::{
        calls::{self, Call, Piece},
        dispatch::Dispatched,
        layer_rows::LayerRows,
        node_wait::NodeWait,
        nodes::{Nodes, Roster},
    },
};

/// Pieces that were assigned to nodes, and those that wait.
pub(crate) struct Assignment {
    /// The calls that are to be made now.
    pub(crate) calls: Vec<Call>,
    /// The pieces that wait for a node to come back, or for the retry budget.
    pub(crate) held: Vec<Piece>,
}

/// Assigns `pieces` to nodes; a call has at most `rows_max` rows. Pieces that no node can be asked for, and that need
/// not wait, are noted in `dispatched` as failed.
pub(crate) fn assign(
    nodes: &Nodes,
    roster: &Roster,
    rows: &LayerRows<'_>,
    rows_max: usize,
    pieces: Vec<Piece>,
    waiting: &mut NodeWait,
    dispatched: &mut Dispatched,
) -> Assignment {
    let now = Instant::now();
    let (may_ask_again, mut asked_again) = (waiting.may_ask_again(now), false);
    let mut open: Vec<Option<Call>> = roster.links.iter().map(|_| None).collect();
    let mut assignment = Assignment { calls: Vec::with_capacity(open.len()), held: Vec::new() };
    for piece in pieces {
        let key = ExpertKey { layer: rows.layer, expert: piece.expert };
        // The callers may have left while the nodes before were asked.
        if !piece.tried.is_empty()
            && let Some(reason) = rows.callers.gone(&rows.grouping.tokens[piece.range()], now)
        {
            dispatched.failed.push((piece.range(), reason));
            continue;
        }
        let mut chosen = calls::choose(roster, key, &piece, now);
        if chosen.is_none() && may_ask_again {
            chosen = calls::choose_again(roster, key, &piece, now);
            asked_again |= chosen.is_some();
        }
        let Some(node) = chosen else {
            match waiting.verdict(roster, key, &piece) {
                Some(error) => dispatched.failed.push((piece.range(), error)),
                None => assignment.held.push(piece),
            }
            continue;
        };
        if piece.alone {
            assignment.calls.push(Call { node, pieces: vec![piece] });
            continue;
        }
        let slot = &mut open[node];
        if slot.as_ref().is_some_and(|call| call.rows() + piece.rows > rows_max) {
            assignment.calls.extend(slot.take());
        }
        slot.get_or_insert_with(|| Call { node, pieces: Vec::new() }).pieces.push(piece);
    }
    if asked_again {
        waiting.asked_again(now);
    }
    assignment.calls.extend(open.into_iter().flatten());
    let Assignment { calls, held } = &mut assignment;
    calls.retain_mut(|call| {
        let is_made = may_be_made(nodes, call, now, dispatched);
        if !is_made {
            hold(roster, rows, call, now, waiting, held, dispatched);
        }
        is_made
    });
    assignment
}

/// Whether a call is within the retry budget, which bounds the calls that are made after others failed.
fn may_be_made(nodes: &Nodes, call: &Call, now: Instant, dispatched: &mut Dispatched) -> bool {
    let Some((_, failure)) = call.pieces.iter().find_map(|piece| piece.tried.last()) else {
        nodes.note_call(now);
        return true;
    };
    // The budget prevents storms, in which nodes fail because they have too much to do. A node that cannot load an
    // expert answers at once and is asked once for each piece, so that needs no budget.
    if !failure.may_pass() || nodes.take_retry(now) {
        counter!(names::FAILOVERS_TOTAL, names::REASON => failure.label()).increment(1);
        dispatched.failovers += 1;
        return true;
    }
    false
}

/// The pieces of a call that is not made wait for the budget, as long as anything may be waited for.
fn hold(
    roster: &Roster,
    rows: &LayerRows<'_>,
    call: &mut Call,
    now: Instant,
    waiting: &mut NodeWait,
    held: &mut Vec<Piece>,
    dispatched: &mut Dispatched,
) {
    if !call.pieces.iter().any(|piece| piece.is_refused) {
        counter!(names::RETRIES_REFUSED_TOTAL).increment(1);
    }
    for mut piece in call.pieces.drain(..) {
        piece.is_refused = true;
        if !waiting.is_over() {
            held.push(piece);
            continue;
        }
        let key = ExpertKey { layer: rows.layer, expert: piece.expert };
        // Where every node has failed, that is the reason, whatever the budget says of asking once more.
        let in_vain = match calls::choose(roster, key, &piece, now) {
            None => waiting.verdict(roster, key, &piece),
            Some(_) => None,
        };
        let tried = || calls::reasons(&piece.tried);
        let error = in_vain.unwrap_or_else(|| RequestError::RetriesExhausted { key, tried: tried() });
        dispatched.failed.push((piece.range(), error));
    }
}
