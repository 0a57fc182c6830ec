//! The node's side of a lane: hints and calls of one coordinator come in, results go out, in any order.
//!
//! A lane that sends more than it may have in flight is not read until some of it is answered, so HTTP/2 flow
//! control slows its sender and nobody else. A call's permits go with its answer and are given back when the
//! answer leaves for the network: what a slow reader does not take counts as in flight.
//!
//! While calls are in flight a lane is never silent: `responses` puts a sign of life where there is no answer for a
//! while. Signs of life come from tokio's threads, which no computation holds, so that a coordinator can tell a node
//! that hangs from one that has much to do. A call of an older placement than the node's is refused (`epochs`).
//!
//! A coordinator of this machine may offer a window, in which rows and results stay on GPUs; calls then only name them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use crossbeam_channel::Sender;
use futures::{Stream, stream};
use sida_cluster::experts::LocalExperts;
use sida_model::{ExpertWindow, Precision, WindowHandle};
use sida_proto::{
    v1::{self, LaneRequest, LaneResponse, lane_request::Kind},
    wire::{self, Bounds},
};
use sida_routing::PlanId;
use sida_rpc::{Fault, Reason};
use tokio::sync::{
    Semaphore,
    mpsc::{UnboundedSender, unbounded_channel},
    watch,
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::{
    call_queue::Job,
    config::ExpertNodeLimits,
    engine::Engine,
    epochs::Epochs,
    responses::{Answer, CallInFlight, Permits, Responses},
};

/// Payloads are counted in units of this, since a semaphore counts to 2^29 at least and a lane may have more
/// bytes than that.
const BYTES_PER_PERMIT: usize = 1024;

/// Rows of a window at most: what its memory is taken for.
const WINDOW_ROWS_MAX: usize = 1 << 16;

/// The id of the next plan of a lane within the node. It starts high, out of the way of the ids that a coordinator in
/// this process gives by itself.
static NEXT_PLAN: AtomicU64 = AtomicU64::new(1 << 63);

/// What the lanes of a node share.
pub(crate) struct Lanes {
    pub(crate) engine: Arc<Engine>,
    pub(crate) bounds: Bounds,
    pub(crate) jobs: Sender<Job>,
    pub(crate) limits: ExpertNodeLimits,
    pub(crate) epochs: Epochs,
    /// Calls in flight on all lanes.
    pub(crate) calls: Arc<Semaphore>,
    pub(crate) shutdown: CancellationToken,
}

/// The reading side of a lane.
struct Lane {
    /// The window, if there is one. The first field, so that it is closed before the lane lets go of the engine (see
    /// [`crate::run`]).
    window: Option<Arc<dyn ExpertWindow>>,
    lanes: Arc<Lanes>,
    answers: UnboundedSender<Answer>,
    /// How many calls were read and not yet answered.
    in_flight: Arc<watch::Sender<usize>>,
    calls: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    /// Plans of this lane: their names on the lane, and within the node. Several coordinators may use the same.
    plans: BTreeMap<u64, PlanId>,
}

/// Serves a lane until either side ends it.
pub(crate) fn open(
    lanes: Arc<Lanes>,
    requests: Streaming<LaneRequest>,
) -> impl Stream<Item = Result<LaneResponse, Status>> + Send + 'static {
    let (answers, outgoing) = unbounded_channel();
    let (in_flight, watched) = watch::channel(0);
    let in_flight = Arc::new(in_flight);
    let (calls, bytes) = (lanes.limits.lane_calls_max, bytes_permits(lanes.limits.lane_bytes_max));
    let (calls, bytes) = (Arc::new(Semaphore::new(calls)), Arc::new(Semaphore::new(bytes as usize)));
    let lane = Lane { window: None, lanes, answers, in_flight, calls, bytes, plans: BTreeMap::new() };
    tokio::spawn(lane.read(requests));
    stream::unfold(Responses::new(outgoing, watched), Responses::next)
}

impl Lane {
    async fn read(mut self, mut requests: Streaming<LaneRequest>) {
        let shutdown = self.lanes.shutdown.clone();
        loop {
            let request = tokio::select! {
                request = requests.message() => request,
                () = self.answers.closed() => break,
                // Calls in flight end; what is still unread goes to another node when the lane is seen to end.
                () = shutdown.cancelled() => break,
            };
            match request {
                Ok(Some(request)) => self.take(request).await,
                Ok(None) => break,
                Err(status) => {
                    self.refuse(status).await;
                    break;
                }
            }
        }
        for plan in std::mem::take(&mut self.plans).into_values() {
            self.lanes.engine.release(plan);
        }
    }

    async fn take(&mut self, request: LaneRequest) {
        match request.kind {
            Some(Kind::Activations(activations)) => self.call(activations).await,
            Some(Kind::Plan(plan)) => self.plan(plan),
            Some(Kind::Release(release)) => self.release(release.plan_id),
            Some(Kind::Window(window)) => self.open_window(window).await,
            None => tracing::warn!(node = %self.lanes.engine.node(), "a lane sent a request of unknown kind"),
        }
    }

    /// Waits for room within the limits, then queues the call.
    async fn call(&self, activations: v1::Activations) {
        // A call larger than the limit by itself goes when nothing else is in flight.
        let received = Instant::now();
        let bytes = bytes_permits(activations.payload.len().min(self.lanes.limits.lane_bytes_max));
        let in_flight = CallInFlight::begin(&self.in_flight);
        let permits = async {
            let call = self.calls.clone().acquire_owned().await.ok()?;
            let bytes = self.bytes.clone().acquire_many_owned(bytes).await.ok()?;
            let node = self.lanes.calls.clone().acquire_owned().await.ok()?;
            Some(Permits::new([call, bytes, node], in_flight))
        };
        let Some(permits) = permits.await else { return }; // Nobody closes these semaphores.
        let answers = self.answers.clone();
        let answer: Box<dyn FnOnce(v1::Results) + Send> = Box::new(move |results| {
            // An error says that the lane is gone, and with it whoever waited for the answer.
            let _ = answers.send(Answer::of(results, permits));
        });
        if let Some(refusal) = self.lanes.epochs.refusal(activations.placement_epoch) {
            return answer(v1::Results::failed(activations.call_id, refusal));
        }
        // An error says that the threads are gone; the lane ends with them, which answers its calls.
        let window = self.window.clone();
        let _ = self.lanes.jobs.send(Job::Call { activations, window, received, answer });
    }

    /// Takes up a coordinator's offer of a window, or says why not.
    async fn open_window(&mut self, offered: v1::Window) {
        let engine = self.lanes.engine.clone();
        let opened = match offered.check(WINDOW_ROWS_MAX) {
            _ if self.window.is_some() => Err("the lane has a window".to_owned()),
            Ok(Ok(offered)) => {
                let open = move || engine.open_window(&handle(offered)?).map_err(|error| error.to_string());
                tokio::task::spawn_blocking(open).await.unwrap_or_else(|error| Err(error.to_string()))
            }
            Ok(Err(refusal)) => Err(format!("an offer cannot be a refusal: {refusal}")),
            Err(error) => Err(error.to_string()),
        };
        let answer = match opened {
            Ok(window) => {
                let answer = answer_of(window.results());
                self.window = Some(window);
                answer
            }
            Err(refusal) => {
                tracing::debug!(node = %self.lanes.engine.node(), refusal, "no window for a lane");
                v1::Window::refused(refusal)
            }
        };
        // An error says that the lane is gone.
        let _ = self.answers.send(Answer::window(answer));
    }

    fn plan(&mut self, plan: v1::Plan) {
        let lane_id = plan.plan_id;
        if self.lanes.epochs.is_stale(plan.placement_epoch) {
            return tracing::debug!(node = %self.lanes.engine.node(), plan = lane_id, "hint of an older placement");
        }
        let mut plan = match plan.check(&self.lanes.bounds) {
            Ok(plan) => plan,
            Err(error) => {
                // A hint: whoever sent it loses time, not results.
                return tracing::warn!(node = %self.lanes.engine.node(), plan = lane_id, %error, "plan refused");
            }
        };
        self.release(lane_id);
        if self.plans.len() >= self.lanes.limits.plans_max {
            // What is used last is given up: this plan, or another if its batch begins.
            if !plan.begins {
                return tracing::debug!(node = %self.lanes.engine.node(), plan = lane_id, "more plans than are kept");
            }
            self.plans.pop_last().into_iter().for_each(|(_, last)| self.lanes.engine.release(last));
        }
        plan.id = PlanId(NEXT_PLAN.fetch_add(1, Ordering::Relaxed));
        self.plans.insert(lane_id, plan.id);
        self.lanes.engine.plan(plan);
    }

    fn release(&mut self, lane_id: u64) {
        if let Some(plan) = self.plans.remove(&lane_id) {
            self.lanes.engine.release(plan);
        }
    }

    /// Ends the lane because of what was sent on it, after the calls in flight are answered.
    async fn refuse(&self, status: Status) {
        let calls = self.lanes.limits.lane_calls_max as u32;
        let Ok(_all) = self.calls.acquire_many(calls).await else { return };
        let fault = Fault::new(Reason::MalformedMessage, format!("a request cannot be read: {}", status.message()));
        let _ = self.answers.send(Answer::end(fault.into()));
    }
}

/// The handle of an offered window, as devices know it.
fn handle(offered: wire::Window) -> Result<WindowHandle, String> {
    let wire::Window { machine, handle, rows, dtype } = offered;
    let precision = match dtype {
        v1::DType::DtypeBf16 => Precision::Bf16,
        v1::DType::DtypeF32 | v1::DType::DtypeUnspecified => Precision::F32,
        v1::DType::DtypeF16 => return Err("its rows are float16, expected float32 or bfloat16".to_owned()),
    };
    Ok(WindowHandle { machine, memory: handle, rows, precision })
}

fn answer_of(results: &WindowHandle) -> v1::Window {
    let (machine, handle, rows) = (results.machine.clone(), results.memory, results.rows);
    // Results are float32, on the wire, too.
    (&wire::Window { machine, handle, rows, dtype: v1::DType::DtypeF32 }).into()
}

/// What so many bytes count as.
fn bytes_permits(bytes: usize) -> u32 {
    bytes.div_ceil(BYTES_PER_PERMIT).clamp(1, Semaphore::MAX_PERMITS.min(u32::MAX as usize)) as u32
}
