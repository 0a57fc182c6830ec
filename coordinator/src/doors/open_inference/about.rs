//! What the server and its model are, as the Open Inference Protocol says it by gRPC and by HTTP.

use serde_json::{Value, json};
use sida_proto::inference::{ModelMetadataResponse, ServerMetadataResponse, model_metadata_response::TensorMetadata};
use tonic::Status;

use crate::coordinator::Coordinator;
use crate::doors::open_inference::question::{EMBEDDING, FINISH_REASON, TEXT_OUTPUT, VERSION};

/// The server.
pub(crate) fn server_message() -> ServerMetadataResponse {
    ServerMetadataResponse {
        name: "sida".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        extensions: vec!["binary_tensor_data".to_owned()],
    }
}

/// The model.
pub(crate) fn model_message(coordinator: &Coordinator) -> ModelMetadataResponse {
    let config = coordinator.checkpoint().config();
    ModelMetadataResponse {
        name: coordinator.checkpoint().name().to_owned(),
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
    }
}

/// The server, as JSON.
pub(crate) fn server() -> Value {
    let ServerMetadataResponse { name, version, extensions } = server_message();
    json!({"name": name, "version": version, "extensions": extensions})
}

/// The model, as JSON.
pub(crate) fn model(coordinator: &Coordinator) -> Value {
    let ModelMetadataResponse { name, versions, platform, inputs, outputs } = model_message(coordinator);
    let tensors = |tensors: Vec<TensorMetadata>| -> Vec<Value> {
        let tensor =
            |TensorMetadata { name, datatype, shape }| json!({"name": name, "datatype": datatype, "shape": shape});
        tensors.into_iter().map(tensor).collect()
    };
    let (inputs, outputs) = (tensors(inputs), tensors(outputs));
    json!({"name": name, "versions": versions, "platform": platform, "inputs": inputs, "outputs": outputs})
}

/// Whether a request names the model that is served.
pub(crate) fn is_ours(coordinator: &Coordinator, name: &str, version: &str) -> Result<(), Status> {
    let model = coordinator.checkpoint().name();
    match ["", VERSION].contains(&version) {
        _ if name != model => Err(Status::not_found(format!("model_name is {name:?}, expected {model:?}"))),
        true => Ok(()),
        false => Err(Status::not_found(format!("model_version is {version:?}, expected {VERSION:?}, or none"))),
    }
}

fn tensor(name: &str, datatype: &str, shape: &[i64]) -> TensorMetadata {
    TensorMetadata { name: name.to_owned(), datatype: datatype.to_owned(), shape: shape.to_vec() }
}
