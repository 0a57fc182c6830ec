//! Expert-nodes and a predictor-node behind real sockets, at their plainest: the wire's other side, without
//! what real nodes do about memory and limits.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use sida_cluster::experts::{ExpertCall, LocalExperts};
use sida_predictor::{HashPredictor, PredictorState};
use sida_proto::{
    v1::{
        self,
        experts_server::{Experts, ExpertsServer},
        lane_request::Kind,
        predictor_server::{Predictor, PredictorServer},
    },
    wire::{Bounds, CallRows, Stack},
};
use sida_routing::Labels;
use sida_rpc::{Gate, MESSAGE_BYTES_MAX, Server, ServerConfig};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, service::Routes};

use crate::{noise_predictor::NoisePredictor, plain_experts::PlainExperts};

/// Bounds of the model of this repository.
pub(crate) const BOUNDS: Bounds = Bounds {
    moe_layers: 6,
    num_experts: 64,
    d_model: 128,
    vocab_size: 8192,
    rows_max: 8192,
    tokens_max: 8192,
    sequences_max: 64,
};

/// Calls that a node computes at the same time.
const CALLS_MAX: usize = 4;

/// A node that is being served.
pub(crate) struct PlainNode {
    pub(crate) address: SocketAddr,
    /// Its own, with which all its connections end. `None` once it is killed.
    runtime: Option<Runtime>,
}

impl PlainNode {
    /// Ends it at once, connections and all, as a crash would.
    pub(crate) async fn kill(&mut self) {
        let runtime = self.runtime.take().expect("a node that runs");
        let ended = tokio::task::spawn_blocking(|| runtime.shutdown_timeout(Duration::from_secs(10)));
        ended.await.expect("its end");
    }

    async fn serve(routes: Routes, address: SocketAddr) -> Self {
        Self::serve_for(Gate::default(), routes, address).await
    }

    async fn serve_for(gate: Gate, routes: Routes, address: SocketAddr) -> Self {
        // A node that comes back takes its old port, which may linger for a moment.
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let address = listener.local_addr().expect("address");
        let listener = listener.into_std().expect("a listener");
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            let config = ServerConfig { gate, ..ServerConfig::default() };
            let serving = Server::new(config).routes(routes).serve(listener, CancellationToken::new());
            serving.await.expect("served");
        });
        Self { address, runtime: Some(runtime) }
    }
}

impl Drop for PlainNode {
    fn drop(&mut self) {
        // Where it is dropped nothing may wait.
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

/// Any free port.
pub(crate) fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// Serves `experts` on `address`.
pub(crate) async fn serve_experts(experts: Arc<PlainExperts>, address: SocketAddr) -> PlainNode {
    serve_experts_for(Gate::default(), experts, address).await
}

/// The same, for those whom `gate` lets in.
pub(crate) async fn serve_experts_for(gate: Gate, experts: Arc<PlainExperts>, address: SocketAddr) -> PlainNode {
    let service = ExpertsServer::new(PlainService(experts))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    PlainNode::serve_for(gate, Routes::new(service), address).await
}

/// Serves `predictor` on a free port.
pub(crate) async fn serve_predictor(predictor: NoisePredictor) -> PlainNode {
    let predictor = PlainPredictor { predictor, refused_steps: None, told: None };
    PlainNode::serve(Routes::new(PredictorServer::new(predictor)), any_port()).await
}

/// The same, but it refuses steps of the decoder, as a node whose net reads the input. Counts how many it has refused.
pub(crate) async fn serve_predictor_of_prompts(predictor: NoisePredictor) -> (PlainNode, Arc<AtomicUsize>) {
    let refused = Arc::<AtomicUsize>::default();
    let predictor = PlainPredictor { predictor, refused_steps: Some(refused.clone()), told: None };
    (PlainNode::serve(Routes::new(PredictorServer::new(predictor)), any_port()).await, refused)
}

/// The same as [`serve_predictor`], but it says that it learns, and refuses the first labels that it is told. Keeps all others.
pub(crate) async fn serve_predictor_that_learns(predictor: NoisePredictor) -> (PlainNode, Arc<Mutex<Vec<Labels>>>) {
    let told = Arc::<Mutex<Vec<Labels>>>::default();
    let learns = Some((AtomicUsize::new(0), told.clone()));
    let predictor = PlainPredictor { predictor, refused_steps: None, told: learns };
    (PlainNode::serve(Routes::new(PredictorServer::new(predictor)), any_port()).await, told)
}

struct PlainService(Arc<PlainExperts>);

type LaneStream = Pin<Box<dyn Stream<Item = Result<v1::LaneResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Experts for PlainService {
    type LaneStream = LaneStream;

    async fn lane(&self, request: Request<Streaming<v1::LaneRequest>>) -> Result<Response<LaneStream>, Status> {
        for named in ["sida-model-digest", "sida-experts-digest"] {
            assert!(request.metadata().get(named).is_some(), "a lane names its model and the experts of it");
        }
        let experts = self.0.clone();
        let responses = request.into_inner().map(move |request| {
            let experts = experts.clone();
            async move {
                match request.ok()?.kind? {
                    Kind::Plan(plan) => experts.plan(plan.check(&BOUNDS).expect("a sound plan")),
                    Kind::Release(release) => experts.release(release.into()),
                    Kind::Window(_) => panic!("a coordinator without a device has no window to offer"),
                    Kind::Activations(activations) => {
                        let computed = tokio::task::spawn_blocking(move || compute(&experts, activations));
                        let results = v1::lane_response::Kind::Results(computed.await.expect("computed"));
                        return Some(Ok(v1::LaneResponse { kind: Some(results) }));
                    }
                }
                None
            }
        });
        let responses = responses.buffer_unordered(CALLS_MAX).filter_map(std::future::ready);
        Ok(Response::new(Box::pin(responses)))
    }

    async fn residency(&self, _: Request<v1::ResidencyRequest>) -> Result<Response<v1::ResidencyResponse>, Status> {
        Ok(Response::new(self.0.described.lock().clone()))
    }
}

fn compute(experts: &PlainExperts, activations: v1::Activations) -> v1::Results {
    let (epoch, newer_placement) = experts.newer.lock().clone();
    if activations.placement_epoch < epoch {
        let (reason, message) = ("STALE_EPOCH".to_owned(), "a newer one is known".to_owned());
        let error = v1::CallError { code: 9, reason, message, newer_placement };
        return v1::Results::failed(activations.call_id, error);
    }
    let call = activations.check(&BOUNDS).expect("a sound call");
    let CallRows::Sent(activations) = &call.rows else { panic!("rows are said to be in a window") };
    let mut out = vec![0.0; activations.len()];
    let expert_call = ExpertCall { layer: call.layer, groups: &call.groups, activations };
    match experts.compute(expert_call, &mut out) {
        Ok(report) => {
            let gains_nothing_by_plans = !experts.gains_by_plans();
            let report = v1::CallReport { hits: report.hits, gains_nothing_by_plans, ..Default::default() };
            v1::Results::done(call.call_id, out, report)
        }
        Err(error) => {
            let (reason, message) = ("EXPERT_LOAD_FAILED".to_owned(), error.to_string());
            let error = v1::CallError { code: 14, reason, message, ..Default::default() };
            v1::Results::failed(call.call_id, error)
        }
    }
}

struct PlainPredictor {
    predictor: NoisePredictor,
    /// Where steps are refused: how many were.
    refused_steps: Option<Arc<AtomicUsize>>,
    /// Where labels are wanted: how often they came, and those that were taken.
    told: Option<(AtomicUsize, Arc<Mutex<Vec<Labels>>>)>,
}

#[tonic::async_trait]
impl Predictor for PlainPredictor {
    async fn predict(&self, request: Request<v1::PredictRequest>) -> Result<Response<v1::PredictResponse>, Status> {
        let request = request.into_inner().check(&BOUNDS).expect("a sound request");
        let tokens: Vec<&[u32]> = request.sequences.iter().map(Vec::as_slice).collect();
        if let (Stack::Decoder, Some(refused)) = (request.stack, &self.refused_steps) {
            refused.fetch_add(1, Ordering::Relaxed);
            return Err(Status::unimplemented("steps are for the coordinator to predict"));
        }
        let mut states = vec![PredictorState::default(); tokens.len()];
        let mut states: Vec<&mut PredictorState> = states.iter_mut().collect();
        Ok(Response::new(match request.stack {
            Stack::Encoder => v1::PredictResponse::new(&self.predictor.encode(&tokens).expect("tables"), Vec::new()),
            Stack::Decoder => {
                // The state counts the sequence's tokens, so that a test can see that it travels.
                let seen = |(state, tokens): (&bytes::Bytes, &&[u32])| {
                    let before = state.as_ref().try_into().map(u32::from_le_bytes).unwrap_or_default();
                    (before + tokens.len() as u32).to_le_bytes().to_vec().into()
                };
                let after = request.states.iter().zip(&tokens).map(seen).collect();
                v1::PredictResponse::new(&self.predictor.decode(&mut states, &tokens).expect("tables"), after)
            }
        }))
    }

    async fn describe(
        &self,
        _: Request<v1::DescribePredictorRequest>,
    ) -> Result<Response<v1::DescribePredictorResponse>, Status> {
        let model_digest = self.predictor.model_digest().0.to_vec().into();
        let learns = self.told.is_some();
        Ok(Response::new(v1::DescribePredictorResponse { model_digest, learns, ..Default::default() }))
    }

    async fn learn(&self, request: Request<v1::LearnRequest>) -> Result<Response<v1::LearnResponse>, Status> {
        let (calls, told) = self.told.as_ref().expect("it said that it does not learn");
        if calls.fetch_add(1, Ordering::Relaxed) == 0 {
            return Err(Status::unavailable("not yet"));
        }
        told.lock().extend(request.into_inner().check(&BOUNDS, 3).expect("sound labels").sequences);
        Ok(Response::new(v1::LearnResponse {}))
    }
}
