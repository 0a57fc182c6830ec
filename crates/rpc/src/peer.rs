//! One connection as its server sees it: how many calls are open on it, since when none is, and whether it was asked to
//! leave. What [`crate::connections`] chooses by, and [`crate::connection`] waits for.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;

use crate::{
    allowance::Allowance,
    who_leaves::{Origin, Staying},
};

/// Frames beside its calls that a client may need for one of an answer, which is of so many bytes at most where the client
/// has not said otherwise: it tells its windows, of the call and of the connection, and asks how far it is away, which counts
/// for more.
const FRAMES_FOR_ONE: u32 = 16;
const FRAME_BYTES: usize = 16 << 10;

/// How long a client may take from connecting to its first call: handshakes over a long way.
const FRESH_FOR: Duration = Duration::from_secs(2);

/// A call that is cut off this soon, before anything of its answer went out, was begun for nothing, which is what it costs. It
/// counts as so many, and each call that is answered earns as many: who asks two servers and lets go of the slower one is borne.
const SOON: Duration = Duration::from_millis(20);
const CUT_SOON: u32 = 16;
const CUTS_FOR_ONE: u32 = 16;

/// How long a connection counts as in use after a call.
const IN_USE_FOR: Duration = Duration::from_secs(1);

/// A connection from when it was accepted.
#[derive(Debug)]
pub(crate) struct Peer {
    origin: Origin,
    came: Instant,
    calls: watch::Sender<Calls>,
    /// Cancelled when this connection has to go: its server ends, or another needs its place.
    pub(crate) leave: CancellationToken,
    /// Cancelled where another needs its place, so that its calls may not go on for ever.
    pub(crate) displaced: CancellationToken,
    /// Cancelled when it takes too long to leave; it is ended without a farewell.
    pub(crate) expelled: CancellationToken,
    /// Cancelled when it does harm: nothing more is read of it.
    pub(crate) harmful: CancellationToken,
    cut_off: Mutex<Allowance>,
    idle_frames: Mutex<Allowance>,
    /// Told when the last open call ends.
    quieter: Arc<Notify>,
}

#[derive(Clone, Copy, Debug)]
struct Calls {
    open: usize,
    /// When the last call ended, or the connection came.
    last: Instant,
}

/// A call is open for as long as this is there.
#[derive(Debug)]
pub(crate) struct OpenCall {
    peer: Arc<Peer>,
    since: Instant,
    /// Whether a part of its answer was handed out.
    is_begun: bool,
    /// Whether all of its answer was handed out. If this is dropped before, the call was cut off.
    pub(crate) is_answered: bool,
}

impl Peer {
    /// A connection that has just come from `origin`. `quieter` is told whenever its last call ends.
    pub(crate) fn new(origin: Origin, quieter: Arc<Notify>) -> Self {
        let now = Instant::now();
        Self {
            origin,
            came: now,
            calls: watch::Sender::new(Calls { open: 0, last: now }),
            leave: CancellationToken::new(),
            displaced: CancellationToken::new(),
            expelled: CancellationToken::new(),
            harmful: CancellationToken::new(),
            cut_off: Mutex::new(Allowance::new(now)),
            idle_frames: Mutex::new(Allowance::new(now)),
            quieter,
        }
    }

    /// As [`crate::who_leaves`] looks at it.
    pub(crate) fn seen(&self, now: Instant) -> Staying {
        let Calls { open, last } = *self.calls.borrow();
        let is_fresh = open == 0 && last == self.came && now - self.came < FRESH_FOR;
        let is_busy = open > 0 && !self.harmful.is_cancelled();
        let is_in_use = last != self.came && now - last < IN_USE_FOR;
        Staying { origin: self.origin, is_busy, is_fresh, is_in_use, last }
    }

    /// Has to leave, since another needs its place.
    pub(crate) fn displace(&self) {
        self.displaced.cancel();
        self.leave.cancel();
    }

    /// A call ended at `now`. A peer that does nothing but cut off calls is ended.
    fn call_ended(&self, end: CallEnd, now: Instant) {
        let mut cut_off = self.cut_off.lock().unwrap_or_else(PoisonError::into_inner);
        let is_borne = match end {
            CallEnd::Answered => {
                cut_off.earn(CUTS_FOR_ONE);
                true
            }
            CallEnd::CutOff => cut_off.is_borne(1, now),
            CallEnd::CutOffSoon => cut_off.is_borne(CUT_SOON, now),
        };
        if !is_borne {
            tracing::debug!("a peer cuts off its calls faster than any client loses patience");
            self.harmful.cancel();
        }
    }

    /// The peer sent so many frames that do nothing for a call: whether that is borne. One that does nothing else is ended.
    pub(crate) fn sends_idle_frames(&self, frames: u32) -> bool {
        let mut idle_frames = self.idle_frames.lock().unwrap_or_else(PoisonError::into_inner);
        let is_borne = idle_frames.is_borne(frames, Instant::now());
        if !is_borne {
            tracing::debug!("a peer sends more frames that do nothing for a call than any client needs");
            self.harmful.cancel();
        }
        is_borne
    }

    /// A call begins.
    pub(crate) fn call(self: &Arc<Self>) -> OpenCall {
        self.calls.send_modify(|calls| calls.open += 1);
        OpenCall { peer: self.clone(), since: Instant::now(), is_begun: false, is_answered: false }
    }

    /// Since when no call is open; `None` while one is.
    pub(crate) fn quiet_since(&self) -> Option<Instant> {
        let calls = *self.calls.borrow();
        (calls.open == 0).then_some(calls.last)
    }

    /// Waits until no call has been open for `span`, of which nothing before `from` counts.
    pub(crate) async fn quiet_for(&self, span: Duration, from: Instant) {
        let mut calls = self.calls.subscribe();
        loop {
            let Calls { open, last } = *calls.borrow_and_update();
            let enough = async {
                match last.max(from).checked_add(span) {
                    Some(enough) if open == 0 => time::sleep_until(enough).await,
                    // In a call, or for longer than a clock can tell.
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = enough => return,
                // Never an error: the sender is ours.
                _ = calls.changed() => {}
            }
        }
    }
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallEnd {
    Answered,
    CutOff,
    /// It was begun for nothing.
    CutOffSoon,
}

impl OpenCall {
    /// How it ended, if that was at `now`.
    fn end(&self, now: Instant) -> CallEnd {
        match self.is_answered {
            true => CallEnd::Answered,
            false if self.is_begun || now - self.since >= SOON => CallEnd::CutOff,
            false => CallEnd::CutOffSoon,
        }
    }

    /// So many bytes of its answer go out.
    pub(crate) fn hands_out(&mut self, bytes: usize) {
        self.is_begun = true;
        let frames = u32::try_from(bytes.div_ceil(FRAME_BYTES)).unwrap_or(u32::MAX);
        let earned = FRAMES_FOR_ONE.saturating_mul(frames);
        self.peer.idle_frames.lock().unwrap_or_else(PoisonError::into_inner).earn(earned);
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        let mut is_last = false;
        self.peer.calls.send_modify(|calls| {
            calls.open -= 1;
            calls.last = Instant::now();
            is_last = calls.open == 0;
        });
        let now = Instant::now();
        self.peer.call_ended(self.end(now), now);
        if is_last {
            self.peer.quieter.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn who_cuts_off_what_was_begun_for_nothing_does_harm_sooner() {
        // Would break: a peer that opens and resets calls as fast as it can takes a processor; or a client that reads the
        // beginnings of many answers, or a proxy that was answered much, loses its connection.
        let new = || Arc::new(Peer::new(IpAddr::from([127, 0, 0, 1]).into(), Arc::default()));
        let borne = |answered: usize, end: CallEnd| {
            let peer = new();
            (0..answered).for_each(|_| peer.call_ended(CallEnd::Answered, peer.came));
            let cut_off = (0..1 << 16).take_while(|_| {
                peer.call_ended(end, peer.came);
                !peer.harmful.is_cancelled()
            });
            cut_off.count()
        };
        assert_eq!(borne(0, CallEnd::CutOffSoon), 128);
        assert_eq!(borne(0, CallEnd::CutOff), 2048);
        assert_eq!(borne(200, CallEnd::CutOffSoon), 128 + 200);
        assert_eq!(borne(1 << 12, CallEnd::CutOffSoon), 1024, "no more is earned");
        let mut call = new().call();
        let begun = call.since;
        assert_eq!([begun, begun + SOON].map(|now| call.end(now)), [CallEnd::CutOffSoon, CallEnd::CutOff]);
        call.hands_out(1);
        assert_eq!(call.end(begun), CallEnd::CutOff, "somebody read the beginning");
        call.is_answered = true;
        assert_eq!(call.end(begun), CallEnd::Answered);
    }

    #[tokio::test]
    async fn a_connection_is_quiet_when_its_last_call_has_ended() {
        // Broken: a connection would be closed under a call, or never.
        let span = Duration::from_millis(60);
        let peer = Arc::new(Peer::new(IpAddr::from([127, 0, 0, 1]).into(), Arc::default()));
        let start = Instant::now();
        assert!(peer.quiet_since().is_some_and(|since| since <= start));
        let (first, second) = (peer.call(), peer.call());
        assert_eq!(peer.quiet_since(), None);
        drop(first);
        assert_eq!(peer.quiet_since(), None, "one call is still open");
        let waiting = peer.quiet_for(span, start);
        tokio::pin!(waiting);
        assert!(time::timeout(2 * span, &mut waiting).await.is_err());
        let ended = Instant::now();
        drop(second);
        assert!(peer.quiet_since().is_some_and(|since| since >= ended));
        waiting.await;
        assert!(ended.elapsed() >= span);
        let from = Instant::now();
        peer.quiet_for(span, from).await;
        assert!(from.elapsed() >= span, "quiet before `from` does not count");
    }
}
