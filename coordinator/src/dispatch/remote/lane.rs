//! The client's side of `Experts.Lane`: one stream to one expert-node that carries hints and rows one way and
//! results the other. The forward thread sends and waits on plain channels; a task per lane keeps the
//! connection and carries the bytes.
//!
//! A call crosses as few threads as it can: the forward thread puts the message into the stream's channel
//! (waking the connection), and the lane's task hands the answer straight to the channel the forward thread
//! waits on.
//!
//! Whether a node is called at all, and for how long it is waited for, `sida_routing::failover::LaneHealth` decides; the lane
//! tells it what happens.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use crossbeam_channel::Sender;
use metrics::Gauge;
use parking_lot::{Condvar, Mutex};
use sida_model::ResultsWindow;
use sida_proto::v1::{self, lane_request::Kind};
use sida_routing::{
    NodeId, Plan, PlanId,
    failover::{BreakerState, CallFailure, LaneHealth, lane_health::PendingCall},
};
use sida_telemetry::{TraceContext, gauge, names};
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc},
};
use tokio_util::sync::CancellationToken;

use crate::dispatch::remote::{
    clock::Clock,
    lane_call::{Computed, Outgoing, Reply},
    lane_window::LaneWindow,
};

/// The id of the next call. All lanes count together, so that answers from several of them can share a channel.
static NEXT_CALL: AtomicU64 = AtomicU64::new(1);

/// Bounds of a lane.
#[derive(Clone, Debug)]
pub(crate) struct LaneConfig {
    /// Bytes of rows that may be under way at a time.
    pub(crate) inflight_bytes_max: usize,
    /// Width of a row.
    pub(crate) d_model: usize,
    /// The time that all lanes are judged in.
    pub(crate) clock: Clock,
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
    clock: Clock,
    breaker_state: Gauge,
}

struct LaneState {
    /// The channel into the stream; `None` while not connected.
    outgoing: Option<mpsc::UnboundedSender<v1::LaneRequest>>,
    /// Why the lane is not connected.
    lost: String,
    pending: HashMap<u64, Waiting>,
    health: LaneHealth,
    /// What the node said last on this connection.
    gains_by_plans: bool,
    window: LaneWindow<ResultsWindow>,
}

/// A call that waits for its answer.
struct Waiting {
    replies: Sender<Reply>,
    call: PendingCall,
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
        let state = LaneState {
            outgoing: None,
            lost: "not yet tried".to_owned(),
            pending: HashMap::new(),
            health: LaneHealth::unknown(),
            gains_by_plans: false,
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
            clock: config.clock,
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

    /// What is known of the node.
    pub(crate) fn health<R>(&self, ask: impl FnOnce(&LaneHealth) -> R) -> R {
        ask(&self.state.lock().health)
    }

    /// Whether the node has been silent for so long that its connection is given up, too.
    pub(crate) fn is_lost(&self) -> bool {
        self.health(|health| health.is_lost(self.clock.now()))
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
        while !state.health.has_room(bytes, self.inflight_bytes_max) {
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
        let call = PendingCall { rows, bytes, sent: self.clock.now() };
        self.judge(&mut state, call.sent, |health| health.sent(&call));
        state.pending.insert(call_id, Waiting { replies: replies.clone(), call, window });
        Ok(call_id)
    }

    /// Gives a call up; its answer, if it comes after all, is dropped. Unless nobody wants it any more, that speaks against
    /// the node.
    pub(crate) fn give_up(&self, call_id: u64, is_wanted: bool, now: Duration) {
        let mut state = self.state.lock();
        let Some(Waiting { call, window, .. }) = state.pending.remove(&call_id) else { return };
        if window.is_some() {
            state.window.gave_up(call_id);
        }
        self.judge(&mut state, now, |health| health.gave_up(&call, is_wanted, now));
        drop(state);
        self.room.notify_all();
    }

    /// Notes whether a call that was answered was on its way much longer than those to other nodes.
    pub(crate) fn note_pace(&self, straggled: bool, now: Duration) {
        if self.judge(&mut self.state.lock(), now, |health| health.pace(straggled, now)) {
            tracing::debug!(node = %self.node, "answers are far later than those of other nodes");
        }
    }

    /// Whether the node computes sooner for plans, as far as is known.
    pub(crate) fn gains_by_plans(&self) -> bool {
        self.state.lock().gains_by_plans
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
        state.health.connected();
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
        state.gains_by_plans = false;
        state.lost = reason.to_owned();
        // Closing it waits for the device.
        let window = std::mem::replace(&mut state.window, LaneWindow::closed());
        let pending = std::mem::take(&mut state.pending);
        let now = self.clock.now();
        self.judge(&mut state, now, |health| health.disconnected(now));
        drop(state);
        self.room.notify_all();
        for (call_id, waiting) in pending {
            let lost = CallFailure::Disconnected { reason: reason.to_owned() };
            waiting.reply(Reply { call_id, outcome: Err(lost), newer_placement: Bytes::new() });
        }
        drop(window);
    }

    /// A sign of life came.
    pub(crate) fn alive(&self) {
        self.state.lock().health.heard(self.clock.now());
    }

    /// An answer came.
    pub(crate) fn answered(&self, results: v1::Results) {
        let call_id = results.call_id;
        let now = self.clock.now();
        let mut state = self.state.lock();
        state.health.heard(now);
        let Some(waiting) = state.pending.remove(&call_id) else {
            state.window.answered(call_id);
            tracing::debug!(node = %self.node, call_id, "an answer came after its call was given up");
            return;
        };
        let call = waiting.call;
        let took = now.saturating_sub(call.sent);
        let reply = Reply::of(results, waiting.window.as_ref(), (call.rows, self.d_model), took);
        self.judge(&mut state, now, |health| match &reply.outcome {
            Ok(Computed { report, .. }) => health.computed(&call, report.demand_loads, report.load, now),
            Err(failure) => health.refused(&call, failure, now),
        });
        if let Ok(Computed { gains_by_plans, .. }) = reply.outcome {
            state.gains_by_plans = gains_by_plans;
        }
        drop(state);
        self.room.notify_all();
        waiting.reply(reply);
    }

    /// Notes what happened, and tells the metric how the breaker stands after it.
    fn judge<R>(&self, state: &mut LaneState, now: Duration, happened: impl FnOnce(&mut LaneHealth) -> R) -> R {
        let result = happened(&mut state.health);
        self.breaker_state.set(match state.health.breaker(now) {
            BreakerState::Closed => 0.0,
            BreakerState::Probation => 1.0,
            BreakerState::Open => 2.0,
        });
        result
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
}

impl Waiting {
    fn reply(self, reply: Reply) {
        // The thread that waited may have ended with the scheduler.
        let _ = self.replies.send(reply);
    }
}
