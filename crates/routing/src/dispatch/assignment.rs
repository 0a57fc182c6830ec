//! A node for every piece: as few calls as their sizes allow, retries within their budget, and a verdict over pieces that
//! no node can be asked for.

use std::time::Duration;

use super::{Call, Driver, LayerCalls, Note, Why};
use crate::{
    ExpertKey, NodeId,
    failover::{self, CallFailure, patience::LOOK},
};

impl LayerCalls {
    /// The calls of a new round, to be made now. Pieces that no node can be asked for wait for the next round, or are
    /// given up.
    pub fn ask(&mut self, driver: &mut impl Driver, now: Duration) -> Vec<Call> {
        let (may_ask_again, mut asked_again) = (self.waiting.patience.may_ask_again(now), false);
        let nodes = driver.placement().nodes().len();
        let mut open: Vec<Option<Call>> = (0..nodes).map(|_| None).collect();
        let mut calls = Vec::with_capacity(nodes);
        for piece in std::mem::take(&mut self.pieces) {
            let key = self.key(&piece);
            // The callers may have left while the nodes before were asked.
            if !piece.tried.is_empty() && !driver.is_wanted(&piece.range(), now) {
                self.give_up_piece(piece, Why::Unwanted);
                continue;
            }
            let mut chosen = choose(driver, key, &piece.tried, now);
            if chosen.is_none() && may_ask_again {
                chosen = choose_again(driver, key, &piece.tried, now);
                asked_again |= chosen.is_some();
            }
            let Some(node) = chosen else {
                match self.waiting.is_in_vain(driver, key, &piece.tried, now) {
                    true => self.give_up_piece(piece, Why::Unavailable),
                    false => self.pieces.push(piece),
                }
                continue;
            };
            if piece.alone {
                calls.push(Call { node, pieces: vec![piece] });
                continue;
            }
            let slot = &mut open[node];
            if slot.as_ref().is_some_and(|call| call.rows() + piece.rows > self.bounds.rows_max) {
                calls.extend(slot.take());
            }
            slot.get_or_insert_with(|| Call { node, pieces: Vec::new() }).pieces.push(piece);
        }
        if asked_again {
            self.waiting.patience.asked_again(now);
        }
        calls.extend(open.into_iter().flatten());
        calls.retain_mut(|call| {
            let is_made = self.may_be_made(driver, call, now);
            if !is_made {
                self.hold(driver, call, now);
            }
            is_made
        });
        self.late_looks = 0;
        self.pause = (calls.is_empty() && !self.pieces.is_empty()).then_some(now + LOOK);
        calls
    }

    /// Whether a call is within the retry budget, which bounds the calls that are made after others failed.
    fn may_be_made(&mut self, driver: &mut impl Driver, call: &Call, now: Duration) -> bool {
        let Some((_, failure)) = call.pieces.iter().find_map(|piece| piece.tried.last()) else {
            driver.note_call(now);
            return true;
        };
        // The budget prevents storms, in which nodes fail because they have too much to do. A node that cannot load an
        // expert answers at once and is asked once for each piece, so that needs no budget.
        let is_made = !failure.may_pass() || driver.take_retry(now);
        if is_made {
            driver.note(Note::AskedAgain(failure));
            self.failovers += 1;
        }
        is_made
    }

    /// The pieces of a call that is not made wait for the budget, as long as anything may be waited for.
    fn hold(&mut self, driver: &mut impl Driver, call: &mut Call, now: Duration) {
        if !call.pieces.iter().any(|piece| piece.is_refused) {
            driver.note(Note::RetryRefused);
        }
        for mut piece in call.pieces.drain(..) {
            piece.is_refused = true;
            if !self.waiting.patience.is_over() {
                self.pieces.push(piece);
                continue;
            }
            // Where every node has failed, that is the reason, whatever the budget says of asking once more.
            let key = self.key(&piece);
            let is_in_vain = choose(driver, key, &piece.tried, now).is_none()
                && self.waiting.is_in_vain(driver, key, &piece.tried, now);
            self.give_up_piece(piece, if is_in_vain { Why::Unavailable } else { Why::RetriesExhausted });
        }
    }
}

/// The node to ask for an expert, of those that have not failed: the first of its holders that is up, else any other
/// node that is up (that node loads the expert from its own store), else any that is left.
fn choose(driver: &impl Driver, key: ExpertKey, tried: &[(NodeId, CallFailure)], now: Duration) -> Option<usize> {
    let placement = driver.placement();
    let tried: Vec<usize> = tried.iter().filter_map(|(node, _)| position(driver, node)).collect();
    let is_up = |node: usize| driver.is_up(node, now);
    failover::choose(placement.holder_indices(key), placement.nodes().len(), key.expert, &is_up, &tried)
}

/// The node to ask where every node has failed: one that has come back since.
fn choose_again(driver: &impl Driver, key: ExpertKey, tried: &[(NodeId, CallFailure)], now: Duration) -> Option<usize> {
    let is_back = |(node, failure): &(NodeId, CallFailure)| {
        failure.may_pass() && position(driver, node).is_some_and(|node| driver.is_up(node, now))
    };
    let away: Vec<_> = tried.iter().filter(|tried| !is_back(tried)).cloned().collect();
    choose(driver, key, &away, now)
}

/// Whether a node that is up was not asked for any of a call's pieces yet.
pub(super) fn anyone_else(driver: &impl Driver, call: &Call, now: Duration) -> bool {
    is_anyone_up(driver, call, |_| true, now)
}

/// Whether a node that is up was not asked yet, or failed for a reason that may have passed.
pub(super) fn anyone_back(driver: &impl Driver, call: &Call, now: Duration) -> bool {
    is_anyone_up(driver, call, |failure| !failure.may_pass(), now)
}

/// Whether a node is up, other than the call's and those that failed it in a way that `counts`.
fn is_anyone_up(driver: &impl Driver, call: &Call, counts: impl Fn(&CallFailure) -> bool, now: Duration) -> bool {
    let failed = call.pieces.iter().flat_map(|piece| &piece.tried).filter(|(_, failure)| counts(failure));
    let mut asked: Vec<usize> = failed.filter_map(|(node, _)| position(driver, node)).collect();
    asked.push(call.node);
    (0..driver.placement().nodes().len()).any(|node| !asked.contains(&node) && driver.is_up(node, now))
}

fn position(driver: &impl Driver, node: &NodeId) -> Option<usize> {
    driver.placement().node_index(node).map(usize::from)
}
