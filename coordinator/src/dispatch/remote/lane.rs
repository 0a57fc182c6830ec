//! The client's side of `Experts.Lane`: one stream to one expert-node that carries hints and rows one way and
//! results the other. The forward thread sends and waits on plain channels; a task per lane keeps the
//! connection and carries the bytes.
//!
//! A call crosses as few threads as it can: the forward thread puts the message into the stream's channel
//! (waking the connection), and the lane's task hands the answer straight to the channel the forward thread
//! waits on.
//!
//! A node is called only if its lane is connected, has not been silent for too long, and its breaker lets a call
//! through (`sida_routing::failover` decides the last two). A lane that was silent is not tried with a request's rows:
//! the next message, or a new connection, shows that the node lives.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::Sender;
use metrics::Gauge;
use parking_lot::{Condvar, Mutex};
use sida_model::ResultsWindow;
use sida_proto::v1::{self, lane_request::Kind};
use sida_routing::{
    NodeId, Plan, PlanId,
    failover::{Breaker, BreakerState, Silence},
};
use sida_telemetry::{TraceContext, gauge, names};
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc},
};
use tokio_util::sync::CancellationToken;

use crate::dispatch::remote::{
    call_deadline::CallDeadline,
    call_failure::CallFailure,
    lane_call::{Computed, Outgoing, Reply},
    lane_window::LaneWindow,
};

/// How fast rows travel at least, in bytes per microsecond: that of a network of 1 Gbit/s. What travels is no sign of
/// life until it has arrived, so large messages get the time that they need.
const BYTES_PER_MICROSECOND: usize = 100;

/// After so many answers in a row that were far later than others' a node is passed over.
const STRAGGLES_MAX: u32 = 3;

/// The id of the next call. All lanes count together, so that answers from several of them can share a channel.
static NEXT_CALL: AtomicU64 = AtomicU64::new(1);

/// Bounds of a lane.
#[derive(Clone, Debug)]
pub(crate) struct LaneConfig {
    /// Bytes of rows that may be under way at a time.
    pub(crate) inflight_bytes_max: usize,
    /// Width of a row.
    pub(crate) d_model: usize,
    /// How connections are made, and the model that the node must hold.
    pub(crate) connector: Arc<crate::dispatch::remote::lane_connection::Connector>,
}

/// A lane to one expert-node. Connects, and reconnects, by itself.
pub(crate) struct Lane {
    node: NodeId,
    address: String,
    inflight_bytes_max: usize,
    d_model: usize,
    state: Mutex<LaneState>,
    /// Notified when bytes came free, or the connection was lost.
    room: Condvar,
    /// Notified when the node may be back, so that the lane connects at once.
    retry: Notify,
    /// The moment from which `breaker` and `silence` count time.
    origin: Instant,
    breaker_state: Gauge,
}

struct LaneState {
    /// The channel into the stream; `None` while not connected.
    outgoing: Option<mpsc::UnboundedSender<v1::LaneRequest>>,
    /// Why the lane is not connected.
    lost: String,
    pending: HashMap<u64, PendingCall>,
    /// Invariant: the sum of `bytes` over `pending`.
    inflight_bytes: usize,
    deadline: CallDeadline,
    silence: Silence,
    /// Since when the node is silent for too long. Reset by the next message, and by a new connection.
    suspect: Option<Instant>,
    breaker: Breaker,
    /// Answers in a row that were far later than those of other nodes.
    straggles: u32,
    window: LaneWindow<ResultsWindow>,
}

/// A call that waits for its answer.
struct PendingCall {
    replies: Sender<Reply>,
    rows: usize,
    bytes: usize,
    sent: Instant,
    /// Where the results will be, unless they travel.
    window: Option<Arc<ResultsWindow>>,
}

impl Lane {
    /// A lane to `address` that a task on `runtime` keeps connected until `shutdown`.
    pub(crate) fn open(
        node: NodeId,
        address: String,
        config: LaneConfig,
        runtime: &Handle,
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        let origin = Instant::now();
        let state = LaneState {
            outgoing: None,
            lost: "not yet tried".to_owned(),
            pending: HashMap::new(),
            inflight_bytes: 0,
            deadline: CallDeadline::new(),
            silence: Silence::new(),
            suspect: None,
            breaker: Breaker::new(),
            straggles: 0,
            window: LaneWindow::closed(),
        };
        let breaker_state = gauge!(names::BREAKER_STATE, names::NODE => node.to_string());
        breaker_state.set(0.0);
        let lane = Arc::new(Self {
            node,
            address,
            inflight_bytes_max: config.inflight_bytes_max,
            d_model: config.d_model,
            state: Mutex::new(state),
            room: Condvar::new(),
            retry: Notify::new(),
            origin,
            breaker_state,
        });
        runtime.spawn(crate::dispatch::remote::lane_connection::keep(
            Arc::downgrade(&lane),
            config.connector,
            shutdown,
        ));
        lane
    }

    /// The address of the node.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// The name of the node.
    pub(crate) fn node(&self) -> &NodeId {
        &self.node
    }

    /// Whether a call would be answered, as far as is known.
    pub(crate) fn is_up(&self, now: Instant) -> bool {
        let state = self.state.lock();
        state.outgoing.is_some() && state.suspect.is_none() && state.breaker.allows(self.since(now))
    }

    /// How long a call may take before somebody else is asked, signs of life or not.
    pub(crate) fn allow(&self, rows: usize, experts: usize) -> Duration {
        self.state.lock().deadline.allow(rows, experts)
    }

    /// Until when a call that left at `sent` waits for a sign of life.
    pub(crate) fn silent_until(&self, sent: Instant) -> Instant {
        let state = self.state.lock();
        let of_the_call = self.since(sent) + state.silence.allowed(true);
        let deadline = state.silence.deadline(true).unwrap_or_default().max(of_the_call);
        self.origin + deadline + travel(state.inflight_bytes)
    }

    /// For how long the node has been silent beyond what is allowed; `None` if it is not.
    pub(crate) fn suspect_for(&self, now: Instant) -> Option<Duration> {
        self.state.lock().suspect.map(|since| now.saturating_duration_since(since))
    }

    /// Sends a call under a placement's epoch and returns its id; the answer, or the loss of the connection, comes to
    /// `replies`. Waits until `give_up` for room where too many bytes are under way.
    pub(crate) fn start(
        &self,
        outgoing: Outgoing<'_>,
        placement_epoch: u64,
        trace: Option<TraceContext>,
        replies: &Sender<Reply>,
        give_up: Instant,
    ) -> Result<u64, CallFailure> {
        let call_id = NEXT_CALL.fetch_add(1, Ordering::Relaxed);
        let (activations, rows) = outgoing.message(call_id, self.d_model);
        let bytes = activations.payload.len();
        let is_in_window = matches!(outgoing, Outgoing::InWindow(..));
        let traceparent = trace.map(|trace| trace.to_string()).unwrap_or_default();
        let activations = v1::Activations { placement_epoch, traceparent, ..activations };
        let mut state = self.state.lock();
        // A call larger than the limit by itself goes when nothing else is under way.
        while state.inflight_bytes > 0 && state.inflight_bytes + bytes > self.inflight_bytes_max {
            if self.room.wait_until(&mut state, give_up).timed_out() {
                return Err(CallFailure::Congested { limit: self.inflight_bytes_max });
            }
        }
        let window = state.window.free().filter(|_| is_in_window).cloned();
        if is_in_window && window.is_none() {
            // The window went with the connection.
            return Err(CallFailure::Disconnected { reason: state.lost.clone() });
        }
        state.send(Kind::Activations(activations))?;
        let sent = Instant::now();
        state.silence.begin(self.since(sent));
        state.inflight_bytes += bytes;
        state.pending.insert(call_id, PendingCall { replies: replies.clone(), rows, bytes, sent, window });
        self.on_breaker(&mut state, sent, Breaker::begin);
        Ok(call_id)
    }

    /// Gives a call up; its answer, if it comes after all, is dropped. Unless nobody wants it any more, the node counts
    /// as hung until its next message: one that is merely late says something within a heartbeat, since it still works.
    pub(crate) fn give_up(&self, call_id: u64, is_wanted: bool, now: Instant) {
        let mut state = self.state.lock();
        if let Some(pending) = state.take(call_id) {
            if pending.window.is_some() {
                state.window.gave_up(call_id);
            }
            if is_wanted {
                state.suspect.get_or_insert(now);
                self.on_breaker(&mut state, now, Breaker::failed);
            } else {
                self.on_breaker(&mut state, now, |breaker, _| breaker.abandoned());
            }
            drop(state);
            self.room.notify_all();
        }
    }

    /// Notes whether a call that was answered was on its way much longer than those to other nodes. A node for which
    /// that happens time and again is left to its breaker.
    pub(crate) fn note_pace(&self, straggled: bool, now: Instant) {
        let mut state = self.state.lock();
        state.straggles = if straggled { state.straggles + 1 } else { 0 };
        if state.straggles >= STRAGGLES_MAX {
            tracing::debug!(node = %self.node, "answers are far later than those of other nodes");
            self.on_breaker(&mut state, now, Breaker::failed);
        }
    }

    /// Sends a hint under a placement's epoch; it is lost where there is no connection.
    pub(crate) fn plan(&self, plan: &Plan, placement_epoch: u64) {
        let plan = v1::Plan { placement_epoch, ..v1::Plan::from(plan) };
        // A lost hint costs a load on demand, and the lost connection is logged where it was lost.
        let _ = self.state.lock().send(Kind::Plan(plan));
    }

    /// Takes a hint back.
    pub(crate) fn release(&self, plan: PlanId) {
        // A node forgets the hints of a lane that ends.
        let _ = self.state.lock().send(Kind::Release(v1::Release::from(plan)));
    }

    /// Something says that the node may be back: if there is no connection, the next attempt is made now.
    pub(crate) fn retry_now(&self) {
        if self.state.lock().outgoing.is_none() {
            self.retry.notify_one();
        }
    }

    /// Waits for [`Self::retry_now`].
    pub(crate) async fn may_be_back(&self) {
        self.retry.notified().await;
    }

    /// The connection stands; messages go to `outgoing` from now on.
    pub(crate) fn connected(&self, outgoing: mpsc::UnboundedSender<v1::LaneRequest>) {
        let mut state = self.state.lock();
        state.outgoing = Some(outgoing);
        state.suspect = None;
    }

    /// The node's side of a window is open, too: rows need not travel any more.
    pub(crate) fn window_opened(&self, results: ResultsWindow) {
        self.state.lock().window.open(results);
    }

    /// Whether rows on this coordinator's device may stay there.
    pub(crate) fn has_window(&self) -> bool {
        self.state.lock().window.free().is_some()
    }

    /// There is no connection: whatever waits for an answer learns it now.
    pub(crate) fn disconnected(&self, reason: &str) {
        let mut state = self.state.lock();
        state.outgoing = None;
        state.lost = reason.to_owned();
        // Closing it waits for the device.
        let window = std::mem::replace(&mut state.window, LaneWindow::closed());
        state.inflight_bytes = 0;
        let pending = std::mem::take(&mut state.pending);
        state.silence.end();
        if !pending.is_empty() {
            self.on_breaker(&mut state, Instant::now(), Breaker::failed);
        }
        drop(state);
        self.room.notify_all();
        for (call_id, pending) in pending {
            self.reply(call_id, pending, Err(CallFailure::Disconnected { reason: reason.to_owned() }));
        }
        drop(window);
    }

    /// A sign of life came.
    pub(crate) fn alive(&self) {
        self.state.lock().heard(self.since(Instant::now()));
    }

    /// An answer came.
    pub(crate) fn answered(&self, results: v1::Results) {
        let call_id = results.call_id;
        let now = Instant::now();
        let mut state = self.state.lock();
        state.heard(self.since(now));
        let Some(pending) = state.take(call_id) else {
            state.window.answered(call_id);
            tracing::debug!(node = %self.node, call_id, "an answer came after its call was given up");
            return;
        };
        let took = now - pending.sent;
        let outcome = Computed::of(results, pending.window.as_ref(), (pending.rows, self.d_model), took);
        match &outcome {
            Ok(Computed { report, .. }) => {
                state.deadline.note(pending.rows, took, report.demand_loads, report.load);
                self.on_breaker(&mut state, now, Breaker::succeeded);
            }
            Err(failure) if failure.is_of_the_node() => self.on_breaker(&mut state, now, Breaker::failed),
            // A node that refuses lives.
            Err(_) => self.on_breaker(&mut state, now, Breaker::succeeded),
        }
        drop(state);
        self.room.notify_all();
        self.reply(call_id, pending, outcome);
    }

    fn reply(&self, call_id: u64, pending: PendingCall, outcome: Result<Computed, CallFailure>) {
        // The thread that waited may have ended with the scheduler.
        let _ = pending.replies.send(Reply { call_id, outcome });
    }

    /// Tells the breaker what happened, and the metric how it stands.
    fn on_breaker(&self, state: &mut LaneState, now: Instant, happened: impl FnOnce(&mut Breaker, Duration)) {
        let since = self.since(now);
        happened(&mut state.breaker, since);
        self.breaker_state.set(match state.breaker.state(since) {
            BreakerState::Closed => 0.0,
            BreakerState::Probation => 1.0,
            BreakerState::Open => 2.0,
        });
    }

    fn since(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.origin)
    }
}

impl LaneState {
    fn send(&self, kind: Kind) -> Result<(), CallFailure> {
        let request = v1::LaneRequest { kind: Some(kind) };
        match &self.outgoing {
            Some(outgoing) if outgoing.send(request).is_ok() => Ok(()),
            _ => Err(CallFailure::Disconnected { reason: self.lost.clone() }),
        }
    }

    fn heard(&mut self, now: Duration) {
        self.silence.heard(now);
        self.suspect = None;
    }

    fn take(&mut self, call_id: u64) -> Option<PendingCall> {
        let pending = self.pending.remove(&call_id)?;
        self.inflight_bytes -= pending.bytes;
        if self.pending.is_empty() {
            self.silence.end();
        }
        Some(pending)
    }
}

/// How long the rows of a call and those of its answer may travel.
pub(crate) fn travel(bytes: usize) -> Duration {
    Duration::from_micros((2 * bytes / BYTES_PER_MICROSECOND) as u64)
}
