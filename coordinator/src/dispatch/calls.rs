//! What an expert call is here: rows gathered for it, a span of its own, and words for what became of it. What is asked of
//! whom is decided by `sida_routing::dispatch`.

use std::time::Instant;

use sida_routing::{
    Grouping, NodeId,
    dispatch::{Call, GivenUp, Piece, Why},
    failover::CallFailure,
};
use sida_telemetry::Span;

use crate::{
    answer::request_error::RequestError,
    dispatch::{layer_rows::LayerRows, nodes::Roster},
};

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

/// Why the requests fail whose rows nobody computes.
pub(crate) fn error(given_up: GivenUp, rows: &LayerRows<'_>) -> RequestError {
    let GivenUp { key, tried, why, rows: range } = given_up;
    match why {
        Why::Unwanted => {
            let gone = rows.callers.gone(&rows.grouping.tokens[range], Instant::now());
            gone.expect("who has left does not come back")
        }
        Why::Unavailable => RequestError::ExpertUnavailable { key, tried: reasons(&tried) },
        Why::RetriesExhausted => RequestError::RetriesExhausted { key, tried: reasons(&tried) },
    }
}

/// The nodes that were asked, each with its reason in words.
fn reasons(tried: &[(NodeId, CallFailure)]) -> Vec<(NodeId, String)> {
    tried.iter().map(|(node, failure)| (node.clone(), failure.to_string())).collect()
}
