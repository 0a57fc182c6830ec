//! What the server and its model are, as the Open Inference Protocol says it by gRPC and by HTTP.

use serde_json::{Value, json};
use sida_proto::inference::{
    DataType, ModelConfig, ModelInput, ModelMetadataResponse, ModelOutput, ModelTransactionPolicy,
    ServerMetadataResponse, model_metadata_response::TensorMetadata,
};
use tonic::Status;

use crate::coordinator::Coordinator;
use crate::doors::open_inference::question::{EMBEDDING, FINISH_REASON, TEXT_INPUT, TEXT_OUTPUT, VERSION};

/// What is served of Triton's extensions.
const EXTENSIONS: [&str; 5] = ["binary_tensor_data", "generate", "model_configuration", "parameters", "statistics"];

/// The server.
pub(crate) fn server_message() -> ServerMetadataResponse {
    ServerMetadataResponse {
        name: "sida".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        extensions: EXTENSIONS.map(str::to_owned).to_vec(),
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
            tensor(TEXT_INPUT, "BYTES", &[-1]),
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

/// The model, as Triton's clients look at it.
pub(crate) fn config_message(coordinator: &Coordinator) -> ModelConfig {
    let ModelMetadataResponse { name, platform, inputs, outputs, .. } = model_message(coordinator);
    let input = |tensor: TensorMetadata| ModelInput {
        data_type: data_type(&tensor.datatype).into(),
        optional: tensor.name != TEXT_INPUT,
        name: tensor.name,
        dims: tensor.shape,
    };
    let output = |tensor: TensorMetadata| ModelOutput {
        data_type: data_type(&tensor.datatype).into(),
        name: tensor.name,
        dims: tensor.shape,
    };
    ModelConfig {
        name,
        platform,
        max_batch_size: 0,
        input: inputs.into_iter().map(input).collect(),
        output: outputs.into_iter().map(output).collect(),
        backend: "sida".to_owned(),
        model_transaction_policy: Some(ModelTransactionPolicy { decoupled: true }),
    }
}

/// The same, as JSON.
pub(crate) fn config(coordinator: &Coordinator) -> Value {
    let ModelConfig { name, platform, max_batch_size, input, output, backend, .. } = config_message(coordinator);
    let type_name = |data_type: i32| DataType::try_from(data_type).unwrap_or_default().as_str_name();
    let input = input.into_iter().map(|ModelInput { name, data_type, dims, optional }| {
        json!({"name": name, "data_type": type_name(data_type), "dims": dims, "optional": optional})
    });
    let output = output.into_iter().map(
        |ModelOutput { name, data_type, dims }| json!({"name": name, "data_type": type_name(data_type), "dims": dims}),
    );
    json!({
        "name": name, "platform": platform, "backend": backend, "max_batch_size": max_batch_size,
        "input": input.collect::<Vec<_>>(), "output": output.collect::<Vec<_>>(),
        "model_transaction_policy": {"decoupled": true},
    })
}

/// What Triton calls a type of this protocol.
fn data_type(name: &str) -> DataType {
    match name {
        "BOOL" => DataType::TypeBool,
        "FP32" => DataType::TypeFp32,
        "BYTES" => DataType::TypeString,
        _ => DataType::TypeInvalid,
    }
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
