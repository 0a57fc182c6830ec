//! The JSON form of the Open Inference Protocol: requests become the messages that gRPC carries, and responses are written from
//! them. Tensors may stand behind the JSON as raw bytes (the binary data extension), which is how Triton's clients send them.

use std::collections::BTreeSet;

use bytes::{BufMut, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sida_proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
    infer_parameter::ParameterChoice,
    model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    model_infer_response::InferOutputTensor,
};

use crate::doors::open_inference::tensor;
use crate::doors::openai::error::ApiError;

/// The parameter of an input that says how many raw bytes of it follow.
const RAW_SIZE: &str = "binary_data_size";
/// The parameters by which a request asks for an output, or for all, as raw bytes.
const RAW_OUTPUT: &str = "binary_data";
const RAW_OUTPUTS: &str = "binary_data_output";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonRequest {
    #[serde(default)]
    id: String,
    #[serde(default)]
    parameters: Map<String, Value>,
    inputs: Vec<JsonInput>,
    #[serde(default)]
    outputs: Vec<JsonOutput>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonInput {
    name: String,
    shape: Vec<i64>,
    datatype: String,
    #[serde(default)]
    parameters: Map<String, Value>,
    data: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonOutput {
    name: String,
    #[serde(default)]
    parameters: Map<String, Value>,
}

/// Which outputs are wanted as raw bytes.
pub(crate) struct RawOutputs {
    all: bool,
    names: BTreeSet<String>,
}

/// The request in `body`, whose first `json_bytes` are JSON and whose others are raw tensors.
pub(crate) fn request(body: Bytes, json_bytes: usize) -> Result<(ModelInferRequest, RawOutputs), ApiError> {
    let mut raw = body;
    if json_bytes > raw.len() {
        let expected = format!("at most the {} bytes of the body", raw.len());
        return Err(ApiError::field(crate::doors::open_inference::http::JSON_LENGTH, json_bytes, expected));
    }
    let text = raw.split_to(json_bytes);
    let not_json = |error| ApiError::invalid("invalid_json", format!("the body is no inference request: {error}"));
    let JsonRequest { id, mut parameters, inputs, outputs } = serde_json::from_slice(&text).map_err(not_json)?;
    let all = parameters.remove(RAW_OUTPUTS).is_some_and(|value| value == true);
    let is_raw = |output: &&JsonOutput| output.parameters.get(RAW_OUTPUT).is_some_and(|value| *value == true);
    let names = outputs.iter().filter(is_raw).map(|output| output.name.clone()).collect();
    let (mut tensors, mut contents) = (Vec::new(), Vec::new());
    for input in inputs {
        let (tensor, raw) = read_input(input, &mut raw)?;
        tensors.push(tensor);
        contents.push(raw);
    }
    // Where some come as raw bytes all are made so, as gRPC wants it.
    let raw_input_contents: Vec<Bytes> = match contents.iter().any(Option::is_some) {
        true => {
            tensors.iter_mut().zip(contents).map(|(tensor, raw)| raw.unwrap_or_else(|| tensor::raw(tensor))).collect()
        }
        false => Vec::new(),
    };
    if !raw.is_empty() {
        return Err(ApiError::field(
            "inputs",
            format!("followed by {} bytes of no tensor", raw.len()),
            "as many as they say",
        ));
    }
    let outputs =
        outputs.into_iter().map(|output| InferRequestedOutputTensor { name: output.name, ..Default::default() });
    let request = ModelInferRequest {
        id,
        parameters: parameters.into_iter().map(parameter).collect::<Result<_, _>>()?,
        inputs: tensors,
        outputs: outputs.collect(),
        raw_input_contents,
        ..Default::default()
    };
    Ok((request, RawOutputs { all, names }))
}

/// One input, and its raw bytes if it has them in `raw`.
fn read_input(input: JsonInput, raw: &mut Bytes) -> Result<(InferInputTensor, Option<Bytes>), ApiError> {
    let JsonInput { name, shape, datatype, parameters, data } = input;
    let mut tensor = InferInputTensor { name, shape, datatype, ..Default::default() };
    let size = parameters.get(RAW_SIZE).map(|value| {
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.filter(|&size| size <= raw.len()).ok_or_else(|| {
            tensor::wrong(
                &tensor,
                format!("{RAW_SIZE} {value}"),
                format!("at most the {} bytes that are left", raw.len()),
            )
        })
    });
    match (size.transpose()?, data) {
        (Some(size), None) => Ok((tensor, Some(raw.split_to(size)))),
        (None, Some(data)) => {
            let mut contents = InferTensorContents::default();
            flatten(&data, &mut contents)
                .ok_or_else(|| tensor::wrong(&tensor, "data of another kind", "texts or flags"))?;
            tensor.contents = Some(contents);
            Ok((tensor, None))
        }
        (Some(_), Some(_)) => Err(tensor::wrong(&tensor, format!("both data and {RAW_SIZE}"), "one of them")),
        (None, None) => Err(tensor::wrong(&tensor, "no data", format!("data, or {RAW_SIZE}"))),
    }
}

/// The elements of `data`, which may be nested as its shape is; `None` where one is neither text nor flag.
fn flatten(data: &Value, contents: &mut InferTensorContents) -> Option<()> {
    match data {
        Value::Array(elements) => return elements.iter().try_for_each(|element| flatten(element, contents)),
        Value::String(text) => contents.bytes_contents.push(text.clone().into()),
        Value::Bool(flag) => contents.bool_contents.push(*flag),
        _ => return None,
    }
    Some(())
}

fn parameter((name, value): (String, Value)) -> Result<(String, InferParameter), ApiError> {
    let choice = match &value {
        Value::Bool(value) => ParameterChoice::BoolParam(*value),
        Value::String(text) => ParameterChoice::StringParam(text.clone()),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => ParameterChoice::Int64Param(value),
            (None, Some(value)) => ParameterChoice::Uint64Param(value),
            (None, None) => ParameterChoice::DoubleParam(number.as_f64().unwrap_or(f64::NAN)),
        },
        _ => return Err(ApiError::field(name, value, "a number, a text, true or false")),
    };
    Ok((name, InferParameter { parameter_choice: Some(choice) }))
}

/// `response` as JSON, and the raw bytes of the outputs that are wanted so.
pub(crate) fn response(response: &ModelInferResponse, raw: &RawOutputs) -> (Value, Bytes) {
    let mut behind = BytesMut::new();
    let outputs = response.outputs.iter().zip(&response.raw_output_contents).map(|(output, contents)| {
        let InferOutputTensor { name, datatype, shape, .. } = output;
        if raw.all || raw.names.contains(name) {
            behind.put_slice(contents);
            return json!({"name": name, "datatype": datatype, "shape": shape, "parameters": {RAW_SIZE: contents.len()}});
        }
        json!({"name": name, "datatype": datatype, "shape": shape, "data": tensor::values(output, contents)})
    });
    let outputs: Vec<Value> = outputs.collect();
    let ModelInferResponse { model_name, model_version, id, .. } = response;
    let mut all = json!({"model_name": model_name, "model_version": model_version, "outputs": outputs});
    if !id.is_empty() {
        all["id"] = json!(id);
    }
    (all, behind.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &Value, raw: &[u8]) -> Result<ModelInferRequest, ApiError> {
        let text = json.to_string();
        let body = [text.as_bytes(), raw].concat();
        request(body.into(), text.len()).map(|(request, _)| request)
    }

    #[test]
    fn both_ways_of_data_are_read() {
        // Would break: a client's tensors are refused or change, whichever way its library sends them.
        let plain = of(
            &json!({"id": "7", "parameters": {"max_tokens": 3, "temperature": 0.5, "ignore_eos": true, "stop": "x"},
                "inputs": [{"name": "text_input", "shape": [2, 1], "datatype": "BYTES", "data": [["a"], ["b"]]}]}),
            &[],
        )
        .unwrap();
        assert_eq!(plain.inputs[0].contents.as_ref().unwrap().bytes_contents, ["a", "b"]);
        assert_eq!((plain.id.as_str(), plain.parameters.len()), ("7", 4));
        let raw = of(
            &json!({"inputs": [{"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": {RAW_SIZE: 5}}]}),
            &[1, 0, 0, 0, b'a'],
        )
        .unwrap();
        assert_eq!(raw.raw_input_contents, [&[1, 0, 0, 0, b'a'][..]]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        // Would break: a malformed request is taken for another one, or ends the server.
        let input = |more: Value| {
            let mut input = json!({"name": "text_input", "shape": [1], "datatype": "BYTES"});
            input.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"inputs": [input]})
        };
        for (json, raw, named) in [
            (json!({}), &[][..], "inputs"),
            (json!({"inputs": [], "priority": 3}), &[], "priority"),
            (input(json!({})), &[], "no data"),
            (input(json!({"data": [1]})), &[], "another kind"),
            (input(json!({"data": ["a"], "parameters": {RAW_SIZE: 0}})), &[], "both data"),
            (input(json!({"parameters": {RAW_SIZE: 9}})), &[0], "at most the 1 bytes"),
            (input(json!({"parameters": {RAW_SIZE: u64::MAX}})), &[0], "at most the 1 bytes"),
            (input(json!({"data": ["a"]})), &[0], "no tensor"),
            (json!({"inputs": [], "parameters": {"a": []}}), &[], "a is []"),
        ] {
            let error = of(&json, raw).expect_err(named).json().to_string();
            assert!(error.contains(named), "{error}");
        }
        assert!(request(Bytes::from_static(b"{}"), 3).is_err());
    }
}
