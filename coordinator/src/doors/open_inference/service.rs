//! Serves `inference.GRPCInferenceService` over a [`Coordinator`]: one answer to one request, or a stream of requests that are
//! answered side by side, each token by token where it asks for that.

use std::{pin::Pin, time::Instant};

use futures::{Stream, StreamExt, future, stream};
use sida_proto::inference::{
    ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest,
    ModelReadyResponse, ModelStreamInferResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
    grpc_inference_service_server::GrpcInferenceService, model_metadata_response::TensorMetadata,
};
use sida_rpc::Fault;
use tonic::{Request, Response, Status, Streaming};

use super::{
    parameters,
    question::{EMBEDDING, FINISH_REASON, Question, TEXT_OUTPUT, VERSION},
    response::{Envelope, Generated, streamed},
};
use crate::{
    answer::{output::Pooling, request_error::RequestError},
    coordinator::{Coordinator, TokenStream},
    doors::{
        inference_service::{Asked, caller},
        messages::CallMetadata,
        openai::error::ApiError,
    },
    intake::accept::{EncodeParams, GenerateParams},
};

/// How many requests of one stream are answered at a time. Further ones wait to be read.
const SIDE_BY_SIDE_MAX: usize = 64;

/// The service.
pub(crate) struct OpenInferenceService {
    pub(crate) coordinator: Coordinator,
}

type Responses = Pin<Box<dyn Stream<Item = ModelStreamInferResponse> + Send>>;

#[tonic::async_trait]
impl GrpcInferenceService for OpenInferenceService {
    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: self.coordinator.is_alive() }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.coordinator.probe().await.is_ok() }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let is_ours = self.is_ours(&name, &version).is_ok();
        Ok(Response::new(ModelReadyResponse { ready: is_ours && self.coordinator.probe().await.is_ok() }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(ServerMetadataResponse { name: "sida".to_owned(), version, extensions: Vec::new() }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        self.is_ours(&name, &version)?;
        let config = self.coordinator.checkpoint().config();
        Ok(Response::new(ModelMetadataResponse {
            name: self.model().to_owned(),
            versions: vec![VERSION.to_owned()],
            platform: config.family.to_owned(),
            inputs: vec![
                tensor("text_input", "BYTES", &[-1]),
                tensor("sampling_parameters", "BYTES", &[1]),
                tensor("stream", "BOOL", &[1]),
            ],
            outputs: vec![
                tensor(TEXT_OUTPUT, "BYTES", &[-1]),
                tensor(FINISH_REASON, "BYTES", &[-1]),
                tensor(EMBEDDING, "FP32", &[-1, config.d_model as i64]),
            ],
        }))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let (asked, caller) = (Asked::of("ModelInfer", &request), caller(&request));
        let request = request.into_inner();
        self.is_ours(&request.model_name, &request.model_version)?;
        let envelope = self.envelope(&request);
        let question = Question::of(request).map_err(refused)?;
        if question.streams {
            let expected = "false: one call has one response, ModelStreamInfer has several";
            return Err(refused(ApiError::field("stream", true, expected)));
        }
        let answered = whole(&self.coordinator, &envelope, question, caller).await;
        answered.map(Response::new).map_err(|error| asked.fail(&error))
    }

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let (asked, caller) = (Asked::of("ModelStreamInfer", &request), caller(&request));
        let coordinator = self.coordinator.clone();
        let service = Self { coordinator };
        let answers = request.into_inner().map(move |request| match request {
            Ok(request) => service.answers(request, caller.clone(), asked.clone()).map(Ok).left_stream(),
            // The requests themselves cannot be read any further.
            Err(status) => stream::once(future::ready(Err(status))).right_stream(),
        });
        Ok(Response::new(Box::pin(answers.flatten_unordered(SIDE_BY_SIDE_MAX))))
    }
}

impl OpenInferenceService {
    fn model(&self) -> &str {
        self.coordinator.checkpoint().name()
    }

    fn envelope(&self, request: &ModelInferRequest) -> Envelope {
        Envelope { model: self.model().to_owned(), id: request.id.clone() }
    }

    /// Whether a request names the model that is served.
    fn is_ours(&self, name: &str, version: &str) -> Result<(), Status> {
        let model = self.model();
        match ["", VERSION].contains(&version) {
            _ if name != model => Err(Status::not_found(format!("model_name is {name:?}, expected {model:?}"))),
            true => Ok(()),
            false => Err(Status::not_found(format!("model_version is {version:?}, expected {VERSION:?}, or none"))),
        }
    }

    /// The responses to one request of a stream. One that fails does not end the stream.
    fn answers(&self, request: ModelInferRequest, caller: CallMetadata, asked: Asked) -> Responses {
        let envelope = self.envelope(&request);
        if let Err(status) = self.is_ours(&request.model_name, &request.model_version) {
            return one(envelope.error(status.message().to_owned()));
        }
        let coordinator = self.coordinator.clone();
        let responses = async move {
            let begun = begin(coordinator, &envelope, request, caller, asked).await;
            begun.unwrap_or_else(|status| one(envelope.error(status.message().to_owned())))
        };
        Box::pin(stream::once(responses).flatten())
    }
}

/// Begins to answer a request of a stream.
async fn begin(
    coordinator: Coordinator,
    envelope: &Envelope,
    request: ModelInferRequest,
    caller: CallMetadata,
    asked: Asked,
) -> Result<Responses, Status> {
    let question = Question::of(request).map_err(refused)?;
    let marks_last = question.marks_last;
    if !question.streams || question.embeds() {
        let response = whole(&coordinator, envelope, question, caller).await.map_err(|error| asked.fail(&error))?;
        return Ok(one(streamed(response, marks_last, true)));
    }
    let texts = question.texts.len();
    let [params] = <[GenerateParams; 1]>::try_from(generations(&question, caller))
        .map_err(|_| refused(ApiError::field("text_input (its elements)", texts, "1 where stream is true")))?;
    let tokens = coordinator.generate(params).await.map_err(|error| asked.fail(&error))?;
    let envelope = envelope.clone();
    Ok(Box::pin(tokens.map(move |token| match token {
        Ok(token) => {
            let finish = token.finish.map(|finish| finish.reason);
            let part = Generated { text: token.text, finish };
            streamed(envelope.generation(&question.outputs, &[part]), marks_last, finish.is_some())
        }
        Err(error) => envelope.error(asked.fail(&error).message().to_owned()),
    })))
}

fn one(response: ModelStreamInferResponse) -> Responses {
    Box::pin(stream::once(future::ready(response)))
}

/// The status of a request that asks for what is not served.
fn refused(error: ApiError) -> Status {
    Fault::from(error).into()
}

/// The one response to a request: all of its texts are answered, or it fails with the first that is not.
async fn whole(
    coordinator: &Coordinator,
    envelope: &Envelope,
    question: Question,
    caller: CallMetadata,
) -> Result<ModelInferResponse, RequestError> {
    if question.embeds() {
        let encodings = coordinator.encode_all(encodings(&question, caller)).await?;
        return Ok(envelope.embeddings(encodings));
    }
    let texts = generations(&question, caller)
        .into_iter()
        .map(|params| async { collected(coordinator.generate(params).await?).await });
    Ok(envelope.generation(&question.outputs, &future::try_join_all(texts).await?))
}

/// The text of all tokens.
async fn collected(mut tokens: TokenStream) -> Result<Generated, RequestError> {
    let mut all = Generated { text: String::new(), finish: None };
    while let Some(token) = tokens.next().await {
        let token = token?;
        all.text.push_str(&token.text);
        all.finish = token.finish.map(|finish| finish.reason);
    }
    Ok(all)
}

fn generations(question: &Question, caller: CallMetadata) -> Vec<GenerateParams> {
    let CallMetadata { deadline, trace, client } = caller;
    let deadline = question.deadline(deadline, Instant::now());
    let params = |text: &String| GenerateParams {
        deadline,
        trace,
        client: client.clone(),
        ..parameters::generation(&question.wanted, text)
    };
    question.texts.iter().map(params).collect()
}

fn encodings(question: &Question, caller: CallMetadata) -> Vec<EncodeParams> {
    let CallMetadata { deadline, trace, client } = caller;
    let deadline = question.deadline(deadline, Instant::now());
    let params = |text: &String| EncodeParams {
        prompt: text.clone().into(),
        routing: question.wanted.routing,
        pooling: Pooling::Mean,
        deadline,
        trace,
        client: client.clone(),
        ..EncodeParams::default()
    };
    question.texts.iter().map(params).collect()
}

fn tensor(name: &str, datatype: &str, shape: &[i64]) -> TensorMetadata {
    TensorMetadata { name: name.to_owned(), datatype: datatype.to_owned(), shape: shape.to_vec() }
}
