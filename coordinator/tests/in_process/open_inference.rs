//! The Open Inference Protocol, as its clients use it: their messages give what a caller in this process gets.

use bytes::{Buf, Bytes};
use futures::{StreamExt, stream};
use sida_coordinator::{GenerateParams, Sampling};
use sida_proto::inference::{
    DataType, InferParameter, InferTensorContents, ModelConfigRequest, ModelInferRequest, ModelInferResponse,
    ModelMetadataRequest, ModelReadyRequest, ModelStatisticsRequest, ModelStreamInferResponse, ServerLiveRequest,
    ServerReadyRequest,
    grpc_inference_service_client::GrpcInferenceServiceClient,
    infer_parameter::ParameterChoice,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
};
use sida_rpc::Channel;
use tonic::Code;

use crate::front_door::{Served, TEXT, served};

pub(crate) type Client = GrpcInferenceServiceClient<Channel>;

/// A request to go on from `texts`.
pub(crate) fn asking(served: &Served, texts: &[&str]) -> ModelInferRequest {
    let bytes_contents = texts.iter().map(|text| Bytes::copy_from_slice(text.as_bytes())).collect();
    ModelInferRequest {
        model_name: served.cluster.coordinator.checkpoint().name().to_owned(),
        id: "seven".to_owned(),
        inputs: vec![InferInputTensor {
            name: "text_input".to_owned(),
            datatype: "BYTES".to_owned(),
            shape: vec![texts.len() as i64],
            contents: Some(InferTensorContents { bytes_contents, ..Default::default() }),
            ..Default::default()
        }],
        ..Default::default()
    }
}

pub(crate) fn with(mut request: ModelInferRequest, name: &str, choice: ParameterChoice) -> ModelInferRequest {
    request.parameters.insert(name.to_owned(), InferParameter { parameter_choice: Some(choice) });
    request
}

/// The same, token by token.
pub(crate) fn streamed(mut request: ModelInferRequest) -> ModelInferRequest {
    request.inputs.push(InferInputTensor {
        name: "stream".to_owned(),
        datatype: "BOOL".to_owned(),
        shape: vec![1],
        contents: Some(InferTensorContents { bool_contents: vec![true], ..Default::default() }),
        ..Default::default()
    });
    request
}

/// The elements of an output of BYTES.
pub(crate) fn texts(response: &ModelInferResponse, name: &str) -> Vec<String> {
    let place = response.outputs.iter().position(|output| output.name == name).expect(name);
    let mut raw = response.raw_output_contents[place].clone();
    let mut elements = Vec::new();
    while raw.has_remaining() {
        let length = raw.get_u32_le() as usize;
        elements.push(String::from_utf8(raw.split_to(length).into()).expect("UTF-8"));
    }
    assert_eq!(response.outputs[place].shape, [elements.len() as i64]);
    elements
}

async fn text_of(served: &Served, params: GenerateParams) -> String {
    let tokens = served.cluster.coordinator.generate(params).await.expect("accepted");
    tokens.map(|token| token.expect("generated").text).collect().await
}

pub(crate) async fn all(client: &mut Client, requests: Vec<ModelInferRequest>) -> Vec<ModelStreamInferResponse> {
    let responses = client.model_stream_infer(stream::iter(requests)).await.expect("accepted").into_inner();
    responses.map(|response| response.expect("the stream goes on")).collect().await
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_the_models_own() {
    // Would break: clients of this protocol get another text than all others, or embeddings that are not the model's.
    let served = served().await;
    let mut client = Client::new(served.channel.clone());
    assert!(client.server_live(ServerLiveRequest {}).await.expect("live").into_inner().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.expect("ready").into_inner().ready);
    let name = served.cluster.coordinator.checkpoint().name().to_owned();
    for (name, version, expected) in
        [(name.clone(), "", true), (name.clone(), "1", true), (name.clone(), "2", false), ("x".into(), "", false)]
    {
        let request = ModelReadyRequest { name, version: version.to_owned() };
        assert_eq!(client.model_ready(request).await.expect("answered").into_inner().ready, expected, "{version}");
    }
    let config =
        client.model_config(ModelConfigRequest { name: name.clone(), ..Default::default() }).await.expect("config");
    let config = config.into_inner().config.expect("a config");
    assert_eq!((config.input.len(), config.input[0].data_type()), (3, DataType::TypeString));
    let statistics = async |client: &mut Client| {
        let all = client.model_statistics(ModelStatisticsRequest::default()).await.expect("statistics").into_inner();
        let success = all.model_stats[0].inference_stats.expect("they are there").success.expect("a count");
        (all.model_stats[0].inference_count, success.count)
    };
    assert_eq!(statistics(&mut client).await, (0, 0));
    let metadata = client.model_metadata(ModelMetadataRequest { name, ..Default::default() }).await.expect("metadata");
    let metadata = metadata.into_inner();
    assert_eq!((metadata.inputs[0].name.as_str(), metadata.outputs[2].name.as_str()), ("text_input", "embedding"));

    let drawn = |seed| Sampling { temperature: Some(0.9), seed: Some(seed), ..Sampling::default() };
    let params =
        |text: &str| GenerateParams { prompt: text.into(), max_tokens: 12, sampling: drawn(5), ..Default::default() };
    let request = asking(&served, &[TEXT, "a quiet film"]);
    let request = with(request, "max_tokens", ParameterChoice::Int64Param(12));
    let request = with(request, "temperature", ParameterChoice::DoubleParam(0.9));
    let request = with(request, "seed", ParameterChoice::Uint64Param(5));
    let response = client.model_infer(request).await.expect("answered").into_inner();
    let expected = [text_of(&served, params(TEXT)).await, text_of(&served, params("a quiet film")).await];
    assert_eq!((texts(&response, "text_output"), response.id.as_str()), (expected.to_vec(), "seven"));
    assert!(texts(&response, "finish_reason").iter().all(|reason| ["stop", "length"].contains(&reason.as_str())));

    let embedding = InferRequestedOutputTensor { name: "embedding".to_owned(), ..Default::default() };
    let request = ModelInferRequest { outputs: vec![embedding], ..asking(&served, &[TEXT, TEXT]) };
    let response = client.model_infer(request).await.expect("encoded").into_inner();
    let d_model = served.cluster.coordinator.checkpoint().config().d_model;
    assert_eq!(response.outputs[0].shape, [2, d_model as i64]);
    let raw = &response.raw_output_contents[0];
    assert_eq!(statistics(&mut client).await, (4, 2), "texts, and requests");
    assert_eq!(raw.len(), 2 * d_model * 4);
    assert_eq!(raw[..d_model * 4], raw[d_model * 4..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_answers_side_by_side() {
    // Would break: one bad request ends the stream of all, tokens are lost, or nobody can tell which request they answer.
    let served = served().await;
    let mut client = Client::new(served.channel.clone());
    let marked = with(
        streamed(asking(&served, &[TEXT])),
        "triton_enable_empty_final_response",
        ParameterChoice::BoolParam(true),
    );
    let bad = ModelInferRequest {
        id: "bad".to_owned(),
        ..with(asking(&served, &[TEXT]), "best_of", ParameterChoice::Int64Param(2))
    };
    let unknown =
        ModelInferRequest { id: "unknown".to_owned(), model_name: "x".to_owned(), ..asking(&served, &[TEXT]) };
    let responses = all(&mut client, vec![bad, marked, unknown]).await;
    let of = |id: &str| -> Vec<_> {
        let is_of =
            |response: &&ModelStreamInferResponse| response.infer_response.as_ref().expect("it has an id").id == id;
        responses.iter().filter(is_of).collect()
    };
    assert!(of("bad")[0].error_message.contains("best_of"), "{responses:?}");
    assert!(of("unknown")[0].error_message.contains("model_name"), "{responses:?}");
    let tokens: Vec<_> = of("seven").into_iter().filter_map(|response| response.infer_response.as_ref()).collect();
    let text: String = tokens.iter().flat_map(|response| texts(response, "text_output")).collect();
    assert_eq!(text, text_of(&served, GenerateParams { prompt: TEXT.into(), ..Default::default() }).await);
    for (place, response) in tokens.iter().enumerate() {
        let is_last = place + 1 == tokens.len();
        let mark = &response.parameters["triton_final_response"].parameter_choice;
        assert_eq!(*mark, Some(ParameterChoice::BoolParam(is_last)));
        assert_eq!(texts(response, "finish_reason")[0].is_empty(), !is_last);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_name_what_was_wrong() {
    // Would break: a client cannot tell a mistake of its own from a server that fails.
    let served = served().await;
    let mut client = Client::new(served.channel.clone());
    let unknown = ModelInferRequest { model_name: "x".to_owned(), ..asking(&served, &[TEXT]) };
    for (request, code, named) in [
        (unknown, Code::NotFound, "model_name"),
        (streamed(asking(&served, &[TEXT])), Code::InvalidArgument, "stream"),
        (asking(&served, &[""]), Code::InvalidArgument, "empty"),
        (asking(&served, &[]), Code::InvalidArgument, "text_input"),
        (
            with(asking(&served, &[TEXT]), "temperature", ParameterChoice::DoubleParam(f64::NAN)),
            Code::InvalidArgument,
            "temperature",
        ),
        (
            with(asking(&served, &[TEXT]), "max_tokens", ParameterChoice::Int64Param(i64::MAX)),
            Code::InvalidArgument,
            "max_tokens",
        ),
    ] {
        let status = client.model_infer(request).await.expect_err(named);
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(named), "{status}");
    }
}
