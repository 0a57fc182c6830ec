//! Outstanding calls to nodes of other processes, and which of them are given up: their node gives no sign of life or
//! is far too late while another node could answer, or no caller wants the answer any more.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sida_telemetry::Span;

use crate::dispatch::{
    calls::{self, Call},
    layer_rows::LayerRows,
    nodes::Roster,
    remote::{call_failure::CallFailure, lane::Lane},
};

/// How soon a call that is overdue is looked at again, while no other node could answer it.
pub(crate) const LOOK_PERIOD: Duration = Duration::from_millis(25);

/// A call that was sent and is not answered yet.
pub(crate) struct Outstanding {
    /// Where it went.
    pub(crate) lane: Arc<Lane>,
    pub(crate) call_id: u64,
    pub(crate) call: Call,
    /// The call's span; ends with the call.
    pub(crate) span: Option<Span>,
    pub(crate) sent: Instant,
    /// When the call is given up, signs of life or not, if another node could answer.
    pub(crate) deadline: Instant,
    /// When to look whether the call should be given up.
    pub(crate) look: Instant,
}

/// Takes the calls that are given up out of `outstanding`, and sets when to look at the others again.
pub(crate) fn given_up(
    roster: &Roster,
    rows: &LayerRows<'_>,
    outstanding: &mut Vec<Outstanding>,
    patience: Duration,
    now: Instant,
) -> Vec<(Call, CallFailure)> {
    let mut given_up = Vec::new();
    let mut at = 0;
    while at < outstanding.len() {
        let one = &mut outstanding[at];
        let (silent, last) = (one.lane.silent_until(one.sent), one.sent + patience);
        let waited = now - one.sent;
        let failure = match () {
            // A call is looked at when the earlier of these has passed; a sign of life may have moved it meanwhile.
            () if now < silent.min(one.deadline) => None,
            () if rows.is_for_nobody(&one.call, now) => Some(CallFailure::Unwanted),
            // Tight limits are of use only while another node could be asked. A node that is alive but late is not left
            // for one that was late before: the two would take turns, and neither would come to its end.
            () if now < last
                && !calls::anyone_else(roster, &one.call, now)
                && !(now >= silent && calls::anyone_back(roster, &one.call, now)) =>
            {
                None
            }
            () if now >= silent => Some(CallFailure::Silent { waited }),
            () => Some(CallFailure::Late { waited }),
        };
        match failure {
            Some(failure) => {
                one.lane.give_up(one.call_id, !matches!(failure, CallFailure::Unwanted), now);
                given_up.push((outstanding.swap_remove(at).call, failure));
            }
            None => {
                one.look = silent.min(one.deadline).max(now + LOOK_PERIOD).min(last.max(now + LOOK_PERIOD));
                at += 1;
            }
        }
    }
    given_up
}
