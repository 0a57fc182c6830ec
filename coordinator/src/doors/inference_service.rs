//! Serves `sida.v1.Inference`: takes requests off the wire, hands them to the [`Coordinator`], and puts answers back.
//! `intake::accept` decides what is allowed, and `answer::fault` what a failure looks like.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt};
use sida_model::{ExpertStore, Stack};
use sida_proto::v1::{self, inference_server::Inference};
use sida_rpc::{Client, Deadline, Fault, MESSAGE_BYTES_MAX, RequestId, trace};
use sida_telemetry::{TraceContext, gauge, names};
use tonic::{Code, Request, Response, Status};

use crate::{
    answer::{output::Pooling, request_error::RequestError, token_stream::TokenStream},
    coordinator::Coordinator,
    doors::{
        messages::{self, CallMetadata, EncodeCall},
        request_count,
    },
    intake::accept::{EncodeParams, refused},
    measures::door::Door,
    start::CoordinatorError,
};

/// The service.
pub(crate) struct InferenceService {
    coordinator: Coordinator,
    model: v1::ModelResponse,
}

impl InferenceService {
    pub(crate) fn new(coordinator: Coordinator) -> Result<Self, CoordinatorError> {
        let model = describe(&coordinator)?;
        request_count::register();
        gauge!(names::MODEL_EXPERT_BYTES).set(model.experts_bytes as f64);
        Ok(Self { coordinator, model })
    }

    /// Refuses texts whose rows may be more than a message holds, before any is encoded.
    fn check_size(&self, all: &[EncodeParams]) -> Result<(), RequestError> {
        let tokens_max = self.coordinator.config().request_limits.prompt_tokens_max;
        let row_bytes = self.model.d_model as usize * size_of::<f32>();
        let rows = |params: &EncodeParams| if params.pooling == Pooling::None { tokens_max } else { 1 };
        let most = MESSAGE_BYTES_MAX / row_bytes.max(1);
        let needed = all.iter().map(rows).sum::<usize>();
        if needed < most {
            return Ok(());
        }
        let found = format!("{} texts, which may have {needed} rows", all.len());
        Err(refused("texts", found, format!("fewer than {most} rows in one answer")))
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let asked = Asked::of("Generate", &request);
        let caller = caller(&request);
        let tokens = async {
            let params = messages::generate_params(request.into_inner(), caller)?;
            self.coordinator.generate(params).await
        };
        let tokens = tokens.await.map_err(|error| asked.fail(&error))?;
        Ok(Response::new(Box::pin(Answer { tokens, asked })))
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let asked = Asked::of("Score", &request);
        let caller = caller(&request);
        let scores = async {
            let params = messages::score_params(request.into_inner(), caller)?;
            self.coordinator.score(params).await
        };
        let scores = scores.await.map_err(|error| asked.fail(&error))?;
        Ok(Response::new(scores.into()))
    }

    async fn encode(&self, request: Request<v1::EncodeRequest>) -> Result<Response<v1::EncodeResponse>, Status> {
        let asked = Asked::of("Encode", &request);
        let caller = caller(&request);
        let encoded = async {
            match messages::encode_call(request.into_inner(), caller)? {
                EncodeCall::One(params) => Ok(self.coordinator.encode(params).await?.into()),
                EncodeCall::Each(all) => {
                    self.check_size(&all)?;
                    let encodings = self.coordinator.encode_all(all).await?.into_iter().map(Into::into).collect();
                    Ok(v1::EncodeResponse { encodings, ..Default::default() })
                }
            }
        };
        encoded.await.map(Response::new).map_err(|error| asked.fail(&error))
    }

    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let asked = Asked::of("Tokenize", &request);
        let v1::TokenizeRequest { text, without_special_tokens } = request.into_inner();
        let tokens = self.coordinator.tokenize(&text, !without_special_tokens).await;
        let tokens = tokens.map_err(|error| asked.fail(&error))?;
        Ok(Response::new(v1::TokenizeResponse { tokens }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let asked = Asked::of("Detokenize", &request);
        let text = self.coordinator.detokenize(&request.into_inner().tokens).await;
        let text = text.map_err(|error| asked.fail(&error))?;
        Ok(Response::new(v1::DetokenizeResponse { text }))
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
        family: config.family.to_owned(),
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

/// What a gRPC call says of its caller.
pub(crate) fn caller<T>(request: &Request<T>) -> CallMetadata {
    CallMetadata {
        deadline: Deadline::of(request).map(|deadline| deadline.0.into_std()),
        trace: trace::context_of(request),
        client: Client::of(request),
        door: Door::Grpc,
    }
}

/// A request that is being answered, as the log calls it.
#[derive(Clone)]
pub(crate) struct Asked {
    method: &'static str,
    request_id: Option<RequestId>,
    client: Option<Client>,
    trace: Option<TraceContext>,
}

impl Asked {
    pub(crate) fn of<T>(method: &'static str, request: &Request<T>) -> Self {
        let (request_id, client) = (RequestId::of(request), Client::of(request));
        Self { method, request_id, client, trace: trace::context_of(request) }
    }

    /// The status of a failure. One that is a fault of ours is logged: its caller can do nothing about it.
    pub(crate) fn fail(&self, error: &RequestError) -> Status {
        let status = Status::from(Fault::from(error.clone()));
        if status.code() == Code::Internal {
            let request_id = self.request_id.as_ref().map(tracing::field::display);
            let trace_id = self.trace.map(|trace| tracing::field::display(trace.trace_id()));
            let client = self.client.as_ref().map(tracing::field::display);
            let method = self.method;
            tracing::error!(method, request_id, client, trace_id, %error, "a request failed by a fault of ours");
        }
        status
    }
}

/// The stream of a generation's tokens.
struct Answer {
    tokens: TokenStream,
    asked: Asked,
}

impl Stream for Answer {
    type Item = Result<v1::GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Poll::Ready(token) = self.tokens.poll_next_unpin(cx) else { return Poll::Pending };
        Poll::Ready(match token {
            Some(Ok(token)) => Some(Ok(token.into())),
            Some(Err(error)) => Some(Err(self.asked.fail(&error))),
            None => None,
        })
    }
}
