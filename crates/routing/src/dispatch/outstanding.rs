//! Calls that were sent and are not answered yet, and which of them are given up: their node gives no sign of life or is
//! far too late while another node could answer, or no caller wants the answer any more.

use std::time::Duration;

use super::{
    Call, Driver, LayerCalls,
    assignment::{anyone_back, anyone_else},
};
use crate::failover::CallFailure;

/// How soon a call that is overdue is looked at again, while no other node could answer it.
const LOOK_PERIOD: Duration = Duration::from_millis(25);
/// Whoever looks so late was kept from it, and answers may have come without being read yet: nobody is given up for that,
/// so many times in a row.
const LATE_LOOK: Duration = Duration::from_millis(20);
const LATE_LOOKS_MAX: u32 = 4;

/// A call that was sent and is not answered yet.
#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) id: u64,
    pub(super) call: Call,
    pub(super) sent: Duration,
    /// When the call is given up, signs of life or not, if another node could answer.
    pub(super) deadline: Duration,
    /// When to look whether the call should be given up.
    pub(super) look: Duration,
}

impl LayerCalls {
    /// When to look next, if no answer comes before.
    pub(super) fn looks_at(&self) -> Option<Duration> {
        self.outstanding.iter().map(|one| one.look).min().or(self.pause)
    }

    /// No answer came until the time to look: gives up calls whose time has come, and sets when to look at the others
    /// again.
    pub fn look(&mut self, driver: &mut impl Driver, now: Duration) {
        let Some(look) = self.looks_at().filter(|look| *look <= now) else { return };
        self.waiting.patience.passed(look, now);
        self.pause = None;
        if now > look + LATE_LOOK && self.late_looks < LATE_LOOKS_MAX {
            self.late_looks += 1;
            self.outstanding.iter_mut().for_each(|one| one.look = one.look.max(now + LOOK_PERIOD));
            return;
        }
        self.late_looks = 0;
        let mut at = 0;
        while at < self.outstanding.len() {
            match self.over(driver, &self.outstanding[at], now) {
                Ok(look) => {
                    self.outstanding[at].look = look;
                    at += 1;
                }
                Err(failure) => {
                    let Outstanding { id, call, .. } = self.outstanding.swap_remove(at);
                    driver.give_up(id, call.node, failure != CallFailure::Unwanted, now);
                    self.failed(driver, call, &failure);
                }
            }
        }
    }

    /// When to look at a call again, or why it is given up.
    fn over(&self, driver: &impl Driver, one: &Outstanding, now: Duration) -> Result<Duration, CallFailure> {
        let Outstanding { call, sent, deadline, .. } = one;
        let (silent, last) = (driver.silent_until(call.node, *sent), *sent + self.bounds.patience);
        let waited = now.saturating_sub(*sent);
        // A call is looked at when the earlier of these has passed; a sign of life may have moved it meanwhile.
        let due = silent.min(*deadline);
        if now >= due {
            if call.pieces.iter().all(|piece| !driver.is_wanted(&piece.range(), now)) {
                return Err(CallFailure::Unwanted);
            }
            // Tight limits are of use only while another node could be asked. A node that is alive but late is not left
            // for one that was late before: the two would take turns, and neither would come to its end.
            let could_be_another =
                || anyone_else(driver, call, now) || (now >= silent && anyone_back(driver, call, now));
            if now >= last || could_be_another() {
                return Err(match now >= silent {
                    true => CallFailure::Silent { waited },
                    false => CallFailure::Late { waited },
                });
            }
        }
        let again = now + LOOK_PERIOD;
        Ok(due.clamp(again, last.max(again)))
    }
}
