//! A client of a coordinator, whether that runs in this process or behind an address. Used by the commands that ask:
//! `ask`, `bench`, `eval` and `status`.

use std::time::Instant;

use anyhow::Context;
use futures::{StreamExt, stream::BoxStream};
use sida_coordinator::{
    Alpha, Coordinator, EncodeParams, GenerateParams, Pooling, Prompt, RequestError, RoutingMode, ScoreParams,
};
use sida_model::{ExpertStore, ModelError, Stack};
use sida_proto::v1::{self, cluster_client::ClusterClient, inference_client::InferenceClient};
use sida_rpc::{Channel, Fault, MESSAGE_BYTES_MAX, trace};
use sida_telemetry::Span;
use tonic::{Request, Status};

use crate::{arguments::keys::CallerArguments, told::FirstCall};

/// A coordinator that can be asked. Cheap to clone.
#[derive(Clone)]
pub(crate) enum CoordinatorClient {
    /// In this process: called directly.
    InProcess(Coordinator),
    /// By gRPC.
    Remote(Box<Clients>),
}

/// The services of a coordinator behind an address.
#[derive(Clone)]
pub(crate) struct Clients {
    inference: InferenceClient<Channel>,
    cluster: ClusterClient<Channel>,
}

/// What is shown of a model beside an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ModelFacts {
    pub(crate) name: String,
    pub(crate) moe_layers: usize,
    /// Of `moe_layers`, those of the encoder: the first.
    pub(crate) encoder_moe_layers: usize,
    pub(crate) num_experts: usize,
    /// Bytes of all experts.
    pub(crate) experts_bytes: u64,
}

/// An answer as it comes. The last message carries `finish`.
pub(crate) type Tokens = BoxStream<'static, Result<v1::GenerateResponse, Status>>;

impl CoordinatorClient {
    /// The coordinator at `endpoint`: `host:port`, or with `http://` or `https://` before it.
    pub(crate) async fn connect(endpoint: &str, caller: &CallerArguments) -> anyhow::Result<Self> {
        Ok(Self::over(sida_rpc::connect(endpoint, &caller.client()).await?))
    }

    /// The same, connected at the first question, and again at each that comes after the connection was lost. Has to be called
    /// within a tokio runtime.
    pub(crate) fn connect_lazy(endpoint: &str, caller: &CallerArguments) -> anyhow::Result<Self> {
        Ok(Self::over(sida_rpc::connect_lazy(endpoint, &caller.client())?))
    }

    fn over(channel: Channel) -> Self {
        let inference = InferenceClient::new(channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Self::Remote(Box::new(Clients { inference, cluster: ClusterClient::new(channel) }))
    }

    /// Refuses to go on with files of a model in this process that were found to be damaged. A coordinator says only that no
    /// expert-node could compute an expert, since in a cluster another node's files may be whole.
    pub(crate) fn check_model(&self) -> Result<(), ModelError> {
        match self {
            Self::InProcess(coordinator) => coordinator.checkpoint().damage().map_or(Ok(()), Err),
            Self::Remote(_) => Ok(()),
        }
    }

    /// Generates text.
    pub(crate) async fn generate(&self, params: GenerateParams) -> Result<Tokens, Status> {
        match self {
            Self::InProcess(coordinator) => {
                let tokens = coordinator.generate(params).await.map_err(status)?;
                Ok(tokens.map(|token| token.map(v1::GenerateResponse::from).map_err(status)).boxed())
            }
            Self::Remote(clients) => {
                let (span, request) = traced("sida.v1.Inference/Generate", params.deadline, generate_request(params));
                let tokens = clients.inference.clone().generate(request).await?.into_inner();
                // The call ends with its last token.
                Ok(tokens.inspect(move |_| _ = &span).boxed())
            }
        }
    }

    /// Encoder states.
    pub(crate) async fn encode(&self, params: EncodeParams) -> Result<v1::EncodeResponse, Status> {
        match self {
            Self::InProcess(coordinator) => Ok(coordinator.encode(params).await.map_err(status)?.into()),
            Self::Remote(clients) => {
                let pooling = match params.pooling {
                    Pooling::Mean => v1::Pooling::Mean,
                    Pooling::None => v1::Pooling::None,
                };
                let routing = Some(routing_options(params.routing));
                let (text, tokens) = text_or_tokens(params.prompt);
                let request = v1::EncodeRequest {
                    text,
                    tokens,
                    routing,
                    pooling: pooling.into(),
                    truncate: params.truncate,
                    normalize: params.normalize,
                    priority: params.priority,
                    ..Default::default()
                };
                let (_span, request) = traced("sida.v1.Inference/Encode", params.deadline, request);
                Ok(clients.inference.clone().encode(request).await?.into_inner())
            }
        }
    }

    /// The likelihood of each target.
    pub(crate) async fn score(&self, params: ScoreParams) -> Result<v1::ScoreResponse, Status> {
        match self {
            Self::InProcess(coordinator) => Ok(coordinator.score(params).await.map_err(status)?.into()),
            Self::Remote(clients) => {
                let routing = Some(routing_options(params.routing));
                let (text, tokens) = text_or_tokens(params.prompt);
                let ScoreParams { targets, priority, .. } = params;
                let request = v1::ScoreRequest { text, tokens, targets, routing, priority };
                let (_span, request) = traced("sida.v1.Inference/Score", params.deadline, request);
                Ok(clients.inference.clone().score(request).await?.into_inner())
            }
        }
    }

    /// What is served. Asked first of a coordinator elsewhere.
    pub(crate) async fn model(&self) -> anyhow::Result<ModelFacts> {
        match self {
            Self::InProcess(coordinator) => {
                let checkpoint = coordinator.checkpoint();
                let config = checkpoint.config();
                let expert_bytes = ExpertStore::open(checkpoint.clone())?.shape().bytes() as u64;
                let moe_layers = config.moe_layer_count();
                Ok(ModelFacts {
                    name: checkpoint.name().to_owned(),
                    moe_layers,
                    encoder_moe_layers: config.moe_layers(Stack::Encoder).len(),
                    num_experts: config.num_experts,
                    experts_bytes: expert_bytes * (moe_layers * config.num_experts) as u64,
                })
            }
            Self::Remote(clients) => {
                let model = clients.inference.clone().model(v1::ModelRequest {}).await.context(FirstCall)?;
                Ok(ModelFacts::from(model.into_inner()))
            }
        }
    }

    /// The cluster as its coordinator sees it.
    pub(crate) async fn status(&self) -> Result<v1::StatusResponse, Status> {
        match self {
            Self::InProcess(coordinator) => Ok(coordinator.status().await),
            Self::Remote(clients) => Ok(clients.cluster.clone().status(v1::StatusRequest {}).await?.into_inner()),
        }
    }
}

/// A call in a trace of its own, which the server goes on with.
fn traced<M>(name: &'static str, deadline: Option<Instant>, message: M) -> (Span, Request<M>) {
    let span = Span::of_caller(None, || name.into()).as_client();
    let mut request = Request::new(message);
    if let Some(deadline) = deadline {
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    }
    if span.is_recorded() {
        trace::pass_on(span.context(), request.metadata_mut());
    }
    (span, request)
}

/// The most MoE layers and experts that are believed of another process: beyond it a picture is not drawn.
const LAYERS_MAX: u32 = 1024;
const EXPERTS_MAX: u32 = 1 << 16;

impl From<v1::ModelResponse> for ModelFacts {
    fn from(model: v1::ModelResponse) -> Self {
        let moe_layers = model.moe_layers.min(LAYERS_MAX);
        Self {
            name: model.name,
            moe_layers: moe_layers as usize,
            encoder_moe_layers: model.encoder_moe_layers.min(moe_layers) as usize,
            num_experts: model.num_experts.min(EXPERTS_MAX) as usize,
            experts_bytes: model.experts_bytes,
        }
    }
}

/// A refusal of this process's coordinator, as another's would look.
fn status(error: RequestError) -> Status {
    Fault::from(error).into()
}

fn generate_request(params: GenerateParams) -> v1::GenerateRequest {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let (text, tokens) = text_or_tokens(params.prompt);
    let sampling = params.sampling;
    v1::GenerateRequest {
        routing: Some(routing_options(params.routing)),
        text,
        tokens,
        choices: count(params.choices),
        logprobs: params.logprobs.map(count),
        max_tokens: count(params.max_tokens),
        min_tokens: params.min_tokens.map(count),
        ignore_eos: params.ignore_eos,
        temperature: sampling.temperature,
        top_k: sampling.top_k.map(count),
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        frequency_penalty: sampling.frequency_penalty,
        presence_penalty: sampling.presence_penalty,
        logit_bias: sampling.logit_bias.into_iter().collect(),
        seed: sampling.seed,
        stop: params.stop,
        json_schema: params.json_schema.unwrap_or_default(),
        priority: params.priority,
    }
}

/// The two fields of a message that a prompt may be in.
fn text_or_tokens(prompt: Prompt) -> (String, Vec<u32>) {
    match prompt {
        Prompt::Text(text) => (text, Vec::new()),
        Prompt::Tokens(tokens) => (String::new(), tokens),
    }
}

fn routing_options(mode: RoutingMode) -> v1::RoutingOptions {
    let (mode, alpha) = match mode {
        RoutingMode::Exact => (v1::RoutingMode::Exact, v1::AlphaSource::Unspecified),
        RoutingMode::Guided => (v1::RoutingMode::Guided, v1::AlphaSource::Unspecified),
        RoutingMode::Hash { alpha: Alpha::Router } => (v1::RoutingMode::Hash, v1::AlphaSource::Router),
        RoutingMode::Hash { alpha: Alpha::Predicted } => (v1::RoutingMode::Hash, v1::AlphaSource::Predicted),
    };
    v1::RoutingOptions { mode: mode.into(), alpha: alpha.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_processs_claims_are_bounded() {
        // Broken: a server that claims four billion layers would make the client allocate for them.
        let claim = v1::ModelResponse {
            moe_layers: u32::MAX,
            encoder_moe_layers: u32::MAX,
            num_experts: u32::MAX,
            ..Default::default()
        };
        let facts = ModelFacts::from(claim);
        assert!(facts.encoder_moe_layers <= facts.moe_layers && facts.moe_layers <= 1024);
        assert!(facts.num_experts <= 65536);
    }
}
