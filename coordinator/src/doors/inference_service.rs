//! Serves `sida.v1.Inference`: takes requests off the wire, hands them to the [`Coordinator`], and puts answers back.
//! `intake::accept` decides what is allowed, and `answer::fault` what a failure looks like.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use futures::{Stream, StreamExt};
use sida_model::{ExpertStore, Stack};
use sida_proto::v1::{self, inference_server::Inference};
use sida_rpc::{Deadline, Fault, RequestId, trace};
use sida_telemetry::{TraceContext, counter, gauge, histogram, names};
use tonic::{Code, Request, Response, Status};

use crate::{
    answer::request_error::RequestError,
    coordinator::{Coordinator, TokenStream},
    doors::messages::{self, CallMetadata},
    start::CoordinatorError,
};

/// The methods whose requests are counted.
const METHODS: [&str; 3] = ["Generate", "Score", "Encode"];
/// Codes whose counts are exported from the start, since alerts ask for their rates.
const COUNTED_CODES: [Code; 7] = [
    Code::Ok,
    Code::Cancelled,
    Code::InvalidArgument,
    Code::DeadlineExceeded,
    Code::ResourceExhausted,
    Code::Internal,
    Code::Unavailable,
];

/// The service.
pub(crate) struct InferenceService {
    coordinator: Coordinator,
    model: v1::ModelResponse,
}

impl InferenceService {
    pub(crate) fn new(coordinator: Coordinator) -> Result<Self, CoordinatorError> {
        let model = describe(&coordinator)?;
        gauge!(names::MODEL_EXPERT_BYTES).set(model.experts_bytes as f64);
        for method in METHODS {
            drop(histogram!(names::REQUEST_DURATION_SECONDS, names::METHOD => method));
            for code in COUNTED_CODES.map(code_name) {
                counter!(names::REQUESTS_TOTAL, names::METHOD => method, names::CODE => code).increment(0);
            }
        }
        Ok(Self { coordinator, model })
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let mut answering = Answering::begin("Generate", &request);
        let caller = caller(&request);
        let tokens = async {
            let params = messages::generate_params(request.into_inner(), caller)?;
            self.coordinator.generate(params).await
        };
        let tokens = tokens.await.map_err(|error| answering.fail(error))?;
        Ok(Response::new(Box::pin(Answer { tokens, answering })))
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let mut answering = Answering::begin("Score", &request);
        let caller = caller(&request);
        let scores = async {
            let params = messages::score_params(request.into_inner(), caller)?;
            self.coordinator.score(params).await
        };
        let scores = scores.await.map_err(|error| answering.fail(error))?;
        answering.code = Code::Ok;
        Ok(Response::new(scores.into()))
    }

    async fn encode(&self, request: Request<v1::EncodeRequest>) -> Result<Response<v1::EncodeResponse>, Status> {
        let mut answering = Answering::begin("Encode", &request);
        let caller = caller(&request);
        let encoding = async {
            let params = messages::encode_params(request.into_inner(), caller)?;
            self.coordinator.encode(params).await
        };
        let encoding = encoding.await.map_err(|error| answering.fail(error))?;
        answering.code = Code::Ok;
        Ok(Response::new(encoding.into()))
    }

    async fn model(&self, _request: Request<v1::ModelRequest>) -> Result<Response<v1::ModelResponse>, Status> {
        Ok(Response::new(self.model.clone()))
    }
}

/// The model that this service serves.
fn describe(coordinator: &Coordinator) -> Result<v1::ModelResponse, CoordinatorError> {
    let checkpoint = coordinator.checkpoint();
    let config = checkpoint.config();
    let moe_layers = config.moe_layer_count();
    let expert_bytes = match moe_layers {
        0 => 0,
        _ => ExpertStore::open(checkpoint.clone())?.shape().bytes() as u64,
    };
    Ok(v1::ModelResponse {
        name: checkpoint.name().to_owned(),
        digest: checkpoint.digest().0.to_vec().into(),
        family: "switch_transformers".to_owned(),
        d_model: config.d_model as u32,
        moe_layers: moe_layers as u32,
        encoder_moe_layers: config.moe_layers(Stack::Encoder).len() as u32,
        num_experts: config.num_experts as u32,
        vocab_size: config.vocab_size as u32,
        prompt_tokens_max: coordinator.config().request_limits.prompt_tokens_max as u32,
        expert_bytes,
        experts_bytes: expert_bytes * (moe_layers * config.num_experts) as u64,
        predictor_digest: coordinator.predictor_digest().map(|digest| digest.0.to_vec().into()).unwrap_or_default(),
    })
}

fn caller<T>(request: &Request<T>) -> CallMetadata {
    CallMetadata {
        deadline: Deadline::of(request).map(|deadline| deadline.0.into_std()),
        trace: trace::context_of(request),
    }
}

/// A request that is being answered; counted when it is dropped, however it ended.
struct Answering {
    method: &'static str,
    since: Instant,
    /// CANCELLED until the request is answered: if it is dropped before, the caller went away.
    code: Code,
    /// What it is called in the log.
    request_id: Option<RequestId>,
    trace: Option<TraceContext>,
}

impl Answering {
    fn begin<T>(method: &'static str, request: &Request<T>) -> Self {
        let (request_id, trace) = (RequestId::of(request), trace::context_of(request));
        Self { method, since: Instant::now(), code: Code::Cancelled, request_id, trace }
    }

    /// The status of a failure. One that is a fault of ours is logged: its caller can do nothing about it.
    fn fail(&mut self, error: RequestError) -> Status {
        let status = Status::from(Fault::from(error.clone()));
        self.code = status.code();
        if self.code == Code::Internal {
            let request_id = self.request_id.as_ref().map(tracing::field::display);
            let trace_id = self.trace.map(|trace| tracing::field::display(trace.trace_id()));
            tracing::error!(method = self.method, request_id, trace_id, %error, "a request failed by a fault of ours");
        }
        status
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        let code = code_name(self.code);
        counter!(names::REQUESTS_TOTAL, names::METHOD => self.method, names::CODE => code).increment(1);
        histogram!(names::REQUEST_DURATION_SECONDS, names::METHOD => self.method).record(self.since.elapsed());
    }
}

/// A code as gRPC spells it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        _ => "UNKNOWN",
    }
}

/// The stream of a generation's tokens.
struct Answer {
    tokens: TokenStream,
    answering: Answering,
}

impl Stream for Answer {
    type Item = Result<v1::GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Poll::Ready(token) = self.tokens.poll_next_unpin(cx) else { return Poll::Pending };
        Poll::Ready(match token {
            Some(Ok(token)) => {
                if token.finish.is_some() {
                    self.answering.code = Code::Ok;
                }
                Some(Ok(token.into()))
            }
            Some(Err(error)) => Some(Err(self.answering.fail(error))),
            None => None,
        })
    }
}
