//! One layer's expert calls from the first to the last: a state machine in rounds. In a round every piece that is left is
//! assigned to a node; when all calls of the round are answered or given up, the pieces of those that failed make the
//! next one.
//!
//! A call that fails goes to another node; rows are idempotent. When all have failed, rows wait for one to come back.
//! Only when nobody does is a piece given up; never a skipped expert.

use std::time::Duration;

use super::{
    Call, Driver, GivenUp, Note, Piece, Why,
    node_wait::{NodeWait, Outlook},
    outstanding::Outstanding,
};
use crate::{ExpertKey, Grouping, LayerId, failover::CallFailure};

/// How often the rows of one layer are shared out again under a newer placement.
const RESHARES_MAX: u32 = 3;
/// A call straggles that is on its way for longer than this and four times those to other nodes.
const STRAGGLE_MIN: Duration = Duration::from_millis(10);

/// Bounds of a layer's calls.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Rows of one call at most; more are sent as several. At least 1.
    pub rows_max: usize,
    /// How long the last node that could answer is waited for, and for any to come back when all have failed.
    pub patience: Duration,
}

/// The calls of one layer that is under way.
#[derive(Debug)]
pub struct LayerCalls {
    pub(super) layer: LayerId,
    pub(super) bounds: Bounds,
    /// Those that are to be assigned in the next round.
    pub(super) pieces: Vec<Piece>,
    pub(super) outstanding: Vec<Outstanding>,
    pub(super) waiting: NodeWait,
    /// Until when nobody is asked, since nobody could be.
    pub(super) pause: Option<Duration>,
    /// How often in a row this round was looked at too late.
    pub(super) late_looks: u32,
    /// Of the calls of this round, by node: how long they were on their way, without loads, computation and what their
    /// size explains.
    on_the_way: Vec<(usize, Duration)>,
    pub(super) given_up: Vec<GivenUp>,
    pub(super) failovers: u64,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Make the calls of [`LayerCalls::ask`], with the nodes as they are now.
    Ask,
    /// Wait for answers, and call [`LayerCalls::look`] if none comes until then.
    Wait(Duration),
    /// All is computed or given up.
    Done,
}

/// What became of a layer.
#[derive(Debug)]
pub struct Finished {
    /// What nobody computed.
    pub given_up: Vec<GivenUp>,
    /// Calls that went to another node after a failure.
    pub failovers: u64,
    /// What the layers after this one are to know.
    pub outlook: Outlook,
}

impl LayerCalls {
    /// Of a layer that begins, by what the layers before it found.
    pub fn begin(layer: LayerId, grouping: &Grouping, bounds: Bounds, outlook: Outlook, now: Duration) -> Self {
        Self {
            layer,
            bounds,
            pieces: Piece::of(grouping, bounds.rows_max),
            outstanding: Vec::new(),
            waiting: NodeWait::new(bounds.patience, outlook, now),
            pause: None,
            late_looks: 0,
            on_the_way: Vec::new(),
            given_up: Vec::new(),
            failovers: 0,
        }
    }

    /// Of which layer.
    pub fn layer(&self) -> LayerId {
        self.layer
    }

    /// What is to be done now.
    pub fn next(&mut self, driver: &mut impl Driver, now: Duration) -> Next {
        if let Some(until) = self.looks_at() {
            return Next::Wait(until);
        }
        self.note_stragglers(driver, now);
        match self.pieces.is_empty() {
            true => Next::Done,
            false => Next::Ask,
        }
    }

    /// When a call that is sent now is given up, signs of life or not, if its node was allowed so long for it.
    pub fn deadline(&self, allowed: Duration, now: Duration) -> Duration {
        now + allowed.min(self.bounds.patience)
    }

    /// A call was sent; its answer will come under this id.
    pub fn sent(&mut self, driver: &impl Driver, id: u64, call: Call, sent: Duration, deadline: Duration) {
        let look = driver.silent_until(call.node, sent).min(deadline);
        self.outstanding.push(Outstanding { id, call, sent, deadline, look });
    }

    /// The call that the answer of this id is to; `None` if it was given up meanwhile. What the answer is comes next, by
    /// [`Self::computed`] or [`Self::failed`].
    pub fn answered(&mut self, id: u64) -> Option<Call> {
        let at = self.outstanding.iter().position(|one| one.id == id)?;
        Some(self.outstanding.swap_remove(at).call)
    }

    /// A node has computed a call.
    pub fn computed(&mut self, now: Duration) {
        self.waiting.answered(now);
    }

    /// A call that was computed was on its way for so long.
    pub fn travelled(&mut self, node: usize, on_the_way: Duration) {
        self.on_the_way.reserve(self.outstanding.len() + 1);
        self.on_the_way.push((node, on_the_way));
    }

    /// A call failed: its pieces wait for another node, or for the same under a newer placement.
    pub fn failed(&mut self, driver: &mut impl Driver, call: Call, failure: &CallFailure) {
        let several = call.pieces.len() > 1;
        let is_reshared = *failure == CallFailure::Stale
            && call.pieces.iter().all(|piece| piece.reshares < RESHARES_MAX)
            && driver.has_newer_placement();
        driver.note(Note::Failed { call: &call, failure, is_reshared });
        let node = &driver.placement().nodes()[call.node];
        for mut piece in call.pieces {
            if is_reshared {
                piece.reshares += 1;
            } else if several && failure.is_of_one_expert() {
                piece.alone = true;
            } else {
                piece.failed(node, failure.clone());
            }
            self.pieces.push(piece);
        }
    }

    /// What became of it all.
    pub fn finish(self) -> Finished {
        debug_assert!(self.pieces.is_empty() && self.outstanding.is_empty(), "a layer that is still under way");
        Finished { given_up: self.given_up, failovers: self.failovers, outlook: self.waiting.outlook() }
    }

    /// Nobody is asked for the piece any more.
    pub(super) fn give_up_piece(&mut self, piece: Piece, why: Why) {
        let (key, rows) = (self.key(&piece), piece.range());
        self.given_up.push(GivenUp { key, rows, tried: piece.tried, why });
    }

    pub(super) fn key(&self, piece: &Piece) -> ExpertKey {
        ExpertKey { layer: self.layer, expert: piece.expert }
    }

    /// Tells the lanes of one round how they kept pace: one behind a link that is slow holds up every layer without ever
    /// being late enough to be given up.
    fn note_stragglers(&mut self, driver: &mut impl Driver, now: Duration) {
        let on_the_way = std::mem::take(&mut self.on_the_way);
        let Some(&(slowest, longest)) = on_the_way.iter().max_by_key(|(_, took)| *took) else { return };
        let others = on_the_way.iter().filter(|(node, _)| *node != slowest);
        let Some(second) = others.map(|(_, took)| *took).max() else { return };
        let straggled = longest > STRAGGLE_MIN + 4 * second;
        for (node, _) in on_the_way {
            driver.note_pace(node, straggled && node == slowest, now);
        }
    }
}
