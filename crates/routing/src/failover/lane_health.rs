//! What is known of an expert-node behind a lane, from its connection, its signs of life and what became of its calls:
//! whether it is called at all, and for how long an answer is waited for. One per lane, kept by it.
//!
//! A node is called only if its lane is connected, it was not silent for too long, and its [`Breaker`] lets a call
//! through. A node that was silent is not tried with a request's rows: its next message, or a new connection, shows that
//! it lives.

use std::time::Duration;

use super::{Breaker, BreakerState, CallFailure, Silence, call_deadline::CallDeadline};

/// How fast rows travel at least, in bytes per microsecond: that of a network of 1 Gbit/s. What travels is no sign of
/// life until it has arrived, so large messages get the time that they need.
const BYTES_PER_MICROSECOND: usize = 100;
/// After so many answers in a row that were far later than others' a node is passed over.
const STRAGGLES_MAX: u32 = 3;
/// How long a node may stay silent for too long before its connection is given up, too.
pub const SUSPECT_LIMIT: Duration = Duration::from_secs(3);

/// How an expert-node behind a lane is, as far as is known.
#[derive(Clone, Debug)]
pub struct LaneHealth {
    is_connected: bool,
    /// Since when the node is silent for too long. Reset by the next message, and by a new connection.
    suspect: Option<Duration>,
    silence: Silence,
    breaker: Breaker,
    /// Answers in a row that were far later than those of other nodes.
    straggles: u32,
    deadline: CallDeadline,
    /// Calls that are not answered yet, and the bytes of their rows.
    pending: usize,
    inflight_bytes: usize,
}

/// A call that is pending on a lane.
#[derive(Clone, Copy, Debug)]
pub struct PendingCall {
    /// Its rows.
    pub rows: usize,
    /// The bytes of those that travel.
    pub bytes: usize,
    /// When it was sent.
    pub sent: Duration,
}

impl LaneHealth {
    /// Of a lane that was not connected yet.
    pub fn unknown() -> Self {
        Self {
            is_connected: false,
            suspect: None,
            silence: Silence::new(),
            breaker: Breaker::new(),
            straggles: 0,
            deadline: CallDeadline::new(),
            pending: 0,
            inflight_bytes: 0,
        }
    }

    /// The connection stands.
    pub fn connected(&mut self) {
        (self.is_connected, self.suspect) = (true, None);
    }

    /// There is no connection, and whatever was pending is lost.
    pub fn disconnected(&mut self, now: Duration) {
        self.is_connected = false;
        self.silence.end();
        self.inflight_bytes = 0;
        if std::mem::take(&mut self.pending) > 0 {
            self.breaker.failed(now);
        }
    }

    /// A sign of life came: any message.
    pub fn heard(&mut self, now: Duration) {
        self.silence.heard(now);
        self.suspect = None;
    }

    /// A call was sent.
    pub fn sent(&mut self, call: &PendingCall) {
        self.pending += 1;
        self.inflight_bytes += call.bytes;
        self.silence.begin(call.sent);
        self.breaker.begin(call.sent);
    }

    /// A pending call was computed; of the time since it was sent, so many `loads` took `load`.
    pub fn computed(&mut self, call: &PendingCall, loads: u32, load: Duration, now: Duration) {
        self.end(call);
        self.deadline.note(call.rows, now.saturating_sub(call.sent), loads, load);
        self.breaker.succeeded(now);
    }

    /// A pending call was answered without results. A node that refuses lives.
    pub fn refused(&mut self, call: &PendingCall, failure: &CallFailure, now: Duration) {
        self.end(call);
        match failure.is_of_the_node() {
            true => self.breaker.failed(now),
            false => self.breaker.succeeded(now),
        }
    }

    /// A pending call is given up. Unless nobody wants it any more, the node counts as hung until its next message: one
    /// that is merely late says something within a heartbeat, since it still works.
    pub fn gave_up(&mut self, call: &PendingCall, is_wanted: bool, now: Duration) {
        self.end(call);
        match is_wanted {
            true => {
                self.suspect.get_or_insert(now);
                self.breaker.failed(now);
            }
            false => self.breaker.abandoned(),
        }
    }

    /// A call that was computed was, or was not, on its way much longer than those to other nodes. A node for which that
    /// happens time and again is left to its breaker; returns whether it is now.
    pub fn pace(&mut self, straggled: bool, now: Duration) -> bool {
        self.straggles = if straggled { self.straggles + 1 } else { 0 };
        let is_slow = self.straggles >= STRAGGLES_MAX;
        if is_slow {
            self.breaker.failed(now);
        }
        is_slow
    }

    /// Whether a call would be answered, as far as is known.
    pub fn is_up(&self, now: Duration) -> bool {
        self.is_connected && self.suspect.is_none() && self.breaker.allows(now)
    }

    /// Whether the connection stands.
    pub fn is_connected(&self) -> bool {
        self.is_connected
    }

    /// Whether the node has been silent for so long that its connection is given up, too.
    pub fn is_lost(&self, now: Duration) -> bool {
        self.suspect.is_some_and(|since| now > since + SUSPECT_LIMIT)
    }

    /// Whether so many bytes may be sent now, of `bytes_max` at a time. What is larger by itself goes when nothing else
    /// is under way.
    pub fn has_room(&self, bytes: usize, bytes_max: usize) -> bool {
        self.inflight_bytes == 0 || self.inflight_bytes + bytes <= bytes_max
    }

    /// How long a call may take before somebody else is asked, signs of life or not.
    pub fn allows(&self, rows: usize, experts: usize) -> Duration {
        self.deadline.allow(rows, experts)
    }

    /// Until when a call that left at `sent` waits for a sign of life.
    pub fn silent_until(&self, sent: Duration) -> Duration {
        let of_the_call = sent + self.silence.allowed(true);
        self.silence.deadline(true).unwrap_or_default().max(of_the_call) + travel(self.inflight_bytes)
    }

    /// What the breaker allows.
    pub fn breaker(&self, now: Duration) -> BreakerState {
        self.breaker.state(now)
    }

    /// A node with nothing pending has nothing to say.
    fn end(&mut self, call: &PendingCall) {
        self.pending -= 1;
        self.inflight_bytes -= call.bytes;
        if self.pending == 0 {
            self.silence.end();
        }
    }
}

/// How long the rows of a call and those of its answer may travel.
pub fn travel(bytes: usize) -> Duration {
    Duration::from_micros((2 * bytes / BYTES_PER_MICROSECOND) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::{
        Blame,
        silence::{ALLOWED_MIN, HEARTBEAT},
    };

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn call(bytes: usize, sent: Duration) -> PendingCall {
        PendingCall { rows: 1, bytes, sent }
    }

    /// Of a connected lane with a call that was sent at 1 s.
    fn with_call(bytes: usize) -> LaneHealth {
        let mut health = LaneHealth::unknown();
        health.connected();
        health.sent(&call(bytes, ms(1000)));
        health
    }

    #[test]
    fn a_node_that_was_silent_is_not_called_before_it_gives_a_sign() {
        // Broken: every request would try a hung node with its rows; or one that is back would never be called again.
        let (pending, later) = (call(0, ms(1000)), ms(60_000));
        for back in [LaneHealth::connected, |health: &mut LaneHealth| health.heard(ms(60_000))] {
            let mut health = with_call(0);
            health.gave_up(&pending, true, ms(1100));
            assert!(!health.is_up(later), "its breaker would let a call through");
            assert!(!health.is_lost(ms(1100) + SUSPECT_LIMIT) && health.is_lost(ms(1101) + SUSPECT_LIMIT));
            back(&mut health);
            assert!(health.is_up(later) && !health.is_lost(later));
        }
        let mut health = with_call(0);
        health.gave_up(&pending, false, ms(1100));
        assert!(health.is_up(ms(1100)), "nobody wanted the answer, and that is all");
    }

    #[test]
    fn a_lost_connection_is_a_failure_if_calls_were_on_it() {
        // Broken: a node that restarts while nothing is asked of it would be left alone; or one that loses calls would not.
        let mut health = with_call(0);
        health.disconnected(ms(1010));
        assert!(!health.is_up(later()) && !health.is_connected());
        health.connected();
        assert!(!health.is_up(ms(1010)) && health.is_up(later()));
        let mut health = LaneHealth::unknown();
        assert!(!health.is_up(ms(0)));
        health.connected();
        health.disconnected(ms(5));
        health.connected();
        assert!(health.is_up(ms(5)));
    }

    fn later() -> Duration {
        ms(60_000)
    }

    #[test]
    fn what_a_refusal_says_of_the_node() {
        // Broken: a node that is fine but lacks an expert would be left alone; or one that shuts down would be called on.
        for (blame, is_up) in [(Blame::Expert, true), (Blame::Node, false)] {
            let mut health = with_call(0);
            health.refused(&call(0, ms(1000)), &CallFailure::Refused { blame, message: String::new() }, ms(1001));
            assert_eq!(health.is_up(ms(1001)), is_up, "{blame:?}");
        }
    }

    #[test]
    fn bytes_under_way_are_given_time_and_bounded() {
        // Broken: large rows on a slow network would be taken for a hang, or a lane would take what it cannot carry.
        let mut health = with_call(10_000_000);
        assert_eq!(health.silent_until(ms(1000)), ms(1000) + ALLOWED_MIN + ms(200));
        assert!(!health.has_room(1, 10_000_000) && health.has_room(1, 10_000_001));
        health.heard(ms(1000) + HEARTBEAT);
        assert_eq!(health.silent_until(ms(1000)), ms(1000) + HEARTBEAT + ALLOWED_MIN + ms(200));
        health.computed(&call(10_000_000, ms(1000)), 0, Duration::ZERO, ms(1040));
        assert!(health.has_room(usize::MAX, 1), "what is too large goes alone");
        assert_eq!(health.allows(1, 0), ms(160), "four times what the last one took");
    }

    #[test]
    fn three_late_answers_in_a_row_are_a_failure() {
        // Broken: a slow link would hold up every layer, or one hiccup would cost a node its calls.
        let mut health = with_call(0);
        let straggles = [true, true, false, true, true, true];
        let slow: Vec<bool> = straggles.into_iter().map(|straggled| health.pace(straggled, ms(1000))).collect();
        assert_eq!(slow, [false, false, false, false, false, true]);
        assert!(!health.is_up(ms(1000)));
    }
}
