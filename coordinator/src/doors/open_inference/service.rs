//! Serves `inference.GRPCInferenceService` over a [`Coordinator`]: one answer to one request, or a stream of requests that are
//! answered side by side, each token by token where it asks for that.

use std::pin::Pin;

use futures::{Stream, StreamExt, future, stream};
use sida_proto::inference::{
    ModelConfigRequest, ModelConfigResponse, ModelInferRequest, ModelInferResponse, ModelMetadataRequest,
    ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse, ModelStatisticsRequest, ModelStatisticsResponse,
    ModelStreamInferResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse,
    ServerReadyRequest, ServerReadyResponse, grpc_inference_service_server::GrpcInferenceService,
};
use sida_rpc::Fault;
use tonic::{Request, Response, Status, Streaming};

use crate::doors::open_inference::{
    about,
    question::Question,
    response::{Envelope, Generated, streamed},
    statistics,
    whole::{generations, tokens, whole},
};
use crate::{
    coordinator::Coordinator,
    doors::{
        inference_service::{Asked, caller},
        messages::CallMetadata,
        openai::error::ApiError,
    },
    intake::accept::GenerateParams,
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
        Ok(Response::new(ServerReadyResponse { ready: self.coordinator.is_ready().await }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let is_ours = self.is_ours(&name, &version).is_ok();
        Ok(Response::new(ModelReadyResponse { ready: is_ours && self.coordinator.is_ready().await }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(about::server_message()))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        self.is_ours(&name, &version)?;
        Ok(Response::new(about::model_message(&self.coordinator)))
    }

    async fn model_config(
        &self,
        request: Request<ModelConfigRequest>,
    ) -> Result<Response<ModelConfigResponse>, Status> {
        let ModelConfigRequest { name, version } = request.into_inner();
        self.is_ours(&name, &version)?;
        Ok(Response::new(ModelConfigResponse { config: Some(about::config_message(&self.coordinator)) }))
    }

    async fn model_statistics(
        &self,
        request: Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        let ModelStatisticsRequest { name, version } = request.into_inner();
        if !name.is_empty() {
            self.is_ours(&name, &version)?;
        }
        Ok(Response::new(ModelStatisticsResponse { model_stats: vec![statistics::message(&self.coordinator)] }))
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
    fn envelope(&self, request: &ModelInferRequest) -> Envelope {
        Envelope { model: self.coordinator.checkpoint().name().to_owned(), id: request.id.clone() }
    }

    fn is_ours(&self, name: &str, version: &str) -> Result<(), Status> {
        about::is_ours(&self.coordinator, name, version)
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
    let tokens = tokens(&coordinator, params).await.map_err(|error| asked.fail(&error))?;
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
