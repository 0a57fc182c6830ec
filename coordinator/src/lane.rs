//! The client's side of `Experts.Lane`: one stream to one expert-node that carries hints and rows one way and
//! results the other. The forward thread sends and waits on plain channels; a task per lane keeps the
//! connection and carries the bytes.
//!
//! A call crosses as few threads as it can: the forward thread puts the message into the stream's channel
//! (waking the connection), and the lane's task hands the answer straight to the channel the forward thread
//! waits on.

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
use parking_lot::{Condvar, Mutex};
use sida_cluster::experts::{CallReport, ExpertCall};
use sida_proto::{
    v1::{self, lane_request::Kind},
    wire,
};
use sida_routing::{NodeId, Plan, PlanId};
use sida_rpc::Reason;
use thiserror::Error;
use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::sync::CancellationToken;

use crate::call_deadline::CallDeadline;

/// How long a node that was silent is asked only when nobody else is left; doubles with each silence.
const SILENCE_MIN: Duration = Duration::from_millis(100);
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// Names calls. One sequence for all lanes, so that answers from several of them can share a channel.
static NEXT_CALL: AtomicU64 = AtomicU64::new(1);

/// Bounds of a lane.
#[derive(Clone, Debug)]
pub(crate) struct LaneConfig {
    /// Bytes of rows that may be under way at a time.
    pub(crate) inflight_bytes_max: usize,
    /// Width of a row.
    pub(crate) d_model: usize,
    /// How connections are made, and the model that the node must hold.
    pub(crate) connector: Arc<crate::lane_connection::Connector>,
}

/// A lane to one expert-node. Connects, and reconnects, by itself.
pub(crate) struct Lane {
    node: NodeId,
    address: String,
    inflight_bytes_max: usize,
    d_model: usize,
    state: Mutex<State>,
    /// Bytes came free, or the connection was lost.
    room: Condvar,
}

struct State {
    /// The way out; `None` while not connected.
    outgoing: Option<mpsc::UnboundedSender<v1::LaneRequest>>,
    /// Why it is not connected.
    lost: String,
    pending: HashMap<u64, Pending>,
    /// Invariant: the sum of `bytes` over `pending`.
    inflight_bytes: usize,
    deadline: CallDeadline,
    silences: u32,
    silent_until: Option<Instant>,
}

/// A call that waits for its answer.
struct Pending {
    replies: Sender<Reply>,
    rows: usize,
    bytes: usize,
    sent: Instant,
}

/// What became of a call.
pub(crate) struct Reply {
    /// As [`Lane::start`] returned it.
    pub(crate) call_id: u64,
    /// The rows, or why there are none.
    pub(crate) outcome: Result<Computed, CallFailure>,
}

/// Rows that an expert-node computed.
pub(crate) struct Computed {
    /// (rows, d_model) as a payload of exactly that length.
    pub(crate) payload: Bytes,
    /// What it cost there.
    pub(crate) report: CallReport,
    /// How long it took, seen from here.
    pub(crate) took: Duration,
}

/// Why an expert-node did not answer a call with rows.
#[derive(Clone, Debug, Error)]
#[allow(missing_docs)]
pub(crate) enum CallFailure {
    #[error("not connected: {reason}")]
    Disconnected { reason: String },
    #[error("no answer within {waited:?}")]
    Silent { waited: Duration },
    #[error("more than {limit} bytes under way")]
    Congested { limit: usize },
    #[error("{message}")]
    Refused { reason: Reason, message: String },
    #[error("malformed answer: {reason}")]
    Malformed { reason: String },
    #[error("it panicked")]
    Panicked,
}

impl CallFailure {
    /// Whether it may have been one expert of the call that failed rather than the node.
    pub(crate) fn is_of_one_expert(&self) -> bool {
        matches!(self, Self::Refused { reason: Reason::ExpertLoadFailed | Reason::Internal, .. } | Self::Panicked)
    }

    /// The `reason` label of `sida_failovers_total`.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Disconnected { .. } => "disconnected",
            Self::Silent { .. } => "silent",
            Self::Congested { .. } => "congested",
            Self::Refused { .. } => "refused",
            Self::Malformed { .. } => "malformed",
            Self::Panicked => "panicked",
        }
    }
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
        let state = State {
            outgoing: None,
            lost: "not yet tried".to_owned(),
            pending: HashMap::new(),
            inflight_bytes: 0,
            deadline: CallDeadline::new(),
            silences: 0,
            silent_until: None,
        };
        let lane = Arc::new(Self {
            node,
            address,
            inflight_bytes_max: config.inflight_bytes_max,
            d_model: config.d_model,
            state: Mutex::new(state),
            room: Condvar::new(),
        });
        runtime.spawn(crate::lane_connection::keep(Arc::downgrade(&lane), config.connector, shutdown));
        lane
    }

    /// Where it leads.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// The node it leads to.
    pub(crate) fn node(&self) -> &NodeId {
        &self.node
    }

    /// Connected, and not lately silent.
    pub(crate) fn is_up(&self, now: Instant) -> bool {
        let state = self.state.lock();
        state.outgoing.is_some() && state.silent_until.is_none_or(|until| now >= until)
    }

    /// How long a call may take before somebody else is asked.
    pub(crate) fn allow(&self, rows: usize, experts: usize) -> Duration {
        self.state.lock().deadline.allow(rows, experts)
    }

    /// Sends a call and returns its id; the answer, or the loss of the connection, comes to `replies`. Waits
    /// until `give_up` for room where too many bytes are under way.
    pub(crate) fn start(
        &self,
        call: ExpertCall<'_>,
        replies: &Sender<Reply>,
        give_up: Instant,
    ) -> Result<u64, CallFailure> {
        let bytes = size_of_val(call.activations);
        let call_id = NEXT_CALL.fetch_add(1, Ordering::Relaxed);
        let activations = v1::Activations::new(call_id, call.layer, call.groups, call.activations);
        let mut state = self.state.lock();
        // A call larger than the limit by itself goes when nothing else is under way.
        while state.inflight_bytes > 0 && state.inflight_bytes + bytes > self.inflight_bytes_max {
            if self.room.wait_until(&mut state, give_up).timed_out() {
                return Err(CallFailure::Congested { limit: self.inflight_bytes_max });
            }
        }
        state.send(Kind::Activations(activations))?;
        let rows = call.activations.len() / self.d_model;
        state.inflight_bytes += bytes;
        state.pending.insert(call_id, Pending { replies: replies.clone(), rows, bytes, sent: Instant::now() });
        Ok(call_id)
    }

    /// Gives a call up after it was silent for too long; its answer, if it comes after all, is dropped.
    pub(crate) fn give_up(&self, call_id: u64, now: Instant) {
        let mut state = self.state.lock();
        if state.take(call_id).is_some() {
            let silence = SILENCE_MIN * 2u32.saturating_pow(state.silences.min(16));
            state.silences += 1;
            state.silent_until = Some(now + silence.min(SILENCE_MAX));
            drop(state);
            self.room.notify_all();
        }
    }

    /// Sends a hint; it is lost where there is no connection.
    pub(crate) fn plan(&self, plan: &Plan) {
        // A lost hint costs a load on demand, and the lost connection is logged where it was lost.
        let _ = self.state.lock().send(Kind::Plan(v1::Plan::from(plan)));
    }

    /// Takes a hint back.
    pub(crate) fn release(&self, plan: PlanId) {
        // A node forgets the hints of a lane that ends.
        let _ = self.state.lock().send(Kind::Release(v1::Release::from(plan)));
    }

    /// The connection stands; messages go to `outgoing` from now on.
    pub(crate) fn connected(&self, outgoing: mpsc::UnboundedSender<v1::LaneRequest>) {
        let mut state = self.state.lock();
        state.outgoing = Some(outgoing);
        (state.silences, state.silent_until) = (0, None);
    }

    /// There is no connection: whatever waits for an answer learns it now.
    pub(crate) fn disconnected(&self, reason: &str) {
        let mut state = self.state.lock();
        state.outgoing = None;
        state.lost = reason.to_owned();
        state.inflight_bytes = 0;
        let pending = std::mem::take(&mut state.pending);
        drop(state);
        self.room.notify_all();
        for (call_id, pending) in pending {
            self.reply(call_id, pending, Err(CallFailure::Disconnected { reason: reason.to_owned() }));
        }
    }

    /// An answer came.
    pub(crate) fn answered(&self, results: v1::Results) {
        let call_id = results.call_id;
        let mut state = self.state.lock();
        let Some(pending) = state.take(call_id) else {
            tracing::debug!(node = %self.node, call_id, "an answer came after its call was given up");
            return;
        };
        let took = pending.sent.elapsed();
        let outcome = computed(results, pending.rows, self.d_model, took);
        if let Ok(Computed { report, .. }) = &outcome {
            state.deadline.note(pending.rows, took, report.demand_loads, report.load);
        }
        (state.silences, state.silent_until) = (0, None);
        drop(state);
        self.room.notify_all();
        self.reply(call_id, pending, outcome);
    }

    fn reply(&self, call_id: u64, pending: Pending, outcome: Result<Computed, CallFailure>) {
        // Whoever waited may have ended with the engine.
        let _ = pending.replies.send(Reply { call_id, outcome });
    }
}

impl State {
    fn send(&self, kind: Kind) -> Result<(), CallFailure> {
        let request = v1::LaneRequest { kind: Some(kind) };
        match &self.outgoing {
            Some(outgoing) if outgoing.send(request).is_ok() => Ok(()),
            _ => Err(CallFailure::Disconnected { reason: self.lost.clone() }),
        }
    }

    fn take(&mut self, call_id: u64) -> Option<Pending> {
        let pending = self.pending.remove(&call_id)?;
        self.inflight_bytes -= pending.bytes;
        Some(pending)
    }
}

/// The rows of an answer, checked against the call.
fn computed(results: v1::Results, rows: usize, d_model: usize, took: Duration) -> Result<Computed, CallFailure> {
    match results.check(rows, d_model) {
        Ok(wire::Answer::Done { payload, report }) => {
            let report = CallReport {
                hits: report.hits,
                demand_loads: report.demand_loads,
                load: Duration::from_micros(report.load_us),
                compute: Duration::from_micros(report.compute_us),
            };
            Ok(Computed { payload, report, took })
        }
        Ok(wire::Answer::Failed(v1::CallError { reason, message, .. })) => {
            let reason = Reason::from_name(&reason).unwrap_or(Reason::Internal);
            Err(CallFailure::Refused { reason, message })
        }
        Err(error) => Err(CallFailure::Malformed { reason: error.to_string() }),
    }
}
