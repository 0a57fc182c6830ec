//! Requests of every door: what a caller sends before anything is computed for it.

use std::panic::AssertUnwindSafe;

use bytes::Bytes;
use prost::Message;
use serde_json::{Value, json};
use sida_coordinator::readers::{self, SchemaReader};
use sida_proto::{
    inference::{
        InferParameter, InferTensorContents, ModelInferRequest,
        infer_parameter::ParameterChoice,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    v1,
};

use crate::fuzz;

fn texts(values: &[Value]) -> Vec<Vec<u8>> {
    values.iter().map(|value| value.to_string().into_bytes()).collect()
}

/// What both endpoints that generate know.
fn generation(mut request: Value) -> Value {
    let fields = json!({
        "model": "m", "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "seed": -3, "stop": ["a", "b"],
        "max_tokens": 7, "min_tokens": 1, "ignore_eos": false, "frequency_penalty": 1, "presence_penalty": -1,
        "repetition_penalty": 1.1, "logit_bias": {"7": -100}, "stream": true, "stream_options": {"include_usage": true},
        "routing": {"mode": "hash", "alpha": "predicted"}, "user": "u", "metadata": {"a": [1, {"b": null}]},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    });
    request.as_object_mut().expect("fields").extend(fields.as_object().expect("fields").clone());
    request
}

/// A body could end a coordinator, or take its memory.
#[test]
fn completions() {
    let prompts = [json!("a"), json!(["a", "é"]), json!([1, 2]), json!([[1], [2, 3]])];
    let requests = prompts.map(|prompt| generation(json!({"prompt": prompt, "echo": true, "logprobs": 3})));
    fuzz!(texts(&requests), |body| readers::openai("/v1/completions", body));
}

/// A body could end a coordinator, or take its memory.
#[test]
fn chats() {
    let request = generation(json!({
        "messages": [
            {"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}], "name": "n"},
            {"role": "assistant", "content": "c"},
        ],
        "max_completion_tokens": 5, "logprobs": true, "top_logprobs": 2, "chat_template_kwargs": {"a": {"b": [true]}},
    }));
    fuzz!(texts(&[request]), |body| readers::openai("/v1/chat/completions", body));
}

/// A body could end a coordinator, or take its memory.
#[test]
fn embeddings_and_tokens() {
    let paths = ["/v1/embeddings", "/tokenize", "/detokenize"];
    let requests = [
        json!({"input": ["a", "b"], "encoding_format": "base64", "dimensions": 8, "truncate": true, "normalize": false}),
        json!({"prompt": "a", "add_special_tokens": false}),
        json!({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": true}),
        json!({"tokens": [1, 2, 3]}),
    ];
    fuzz!(texts(&requests), |body| paths.iter().any(|path| readers::openai(path, body)));
}

fn raw(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A body could end a coordinator, or be read beyond its end.
#[test]
fn open_inference_bodies() {
    let text = raw("a film");
    let request = json!({
        "id": "7", "parameters": {"max_tokens": 3, "temperature": 0.5, "stop": "x", "binary_data_output": true},
        "inputs": [
            {"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": text.len()}},
            {"name": "stream", "shape": [1, 1], "datatype": "BOOL", "data": [[false]]},
        ],
        "outputs": [{"name": "text_output", "parameters": {"binary_data": false}}],
    });
    let json = request.to_string();
    // The length of the JSON comes first, as a header says it.
    let length = u16::try_from(json.len()).expect("it is short");
    let seed = [&length.to_le_bytes()[..], json.as_bytes(), &text].concat();
    fuzz!([seed], |bytes| match bytes {
        [low, high, body @ ..] => readers::open_inference(body, usize::from(u16::from_le_bytes([*low, *high]))),
        _ => false,
    });
}

/// A body could end a coordinator, or take its memory.
#[test]
fn generate_bodies() {
    let requests = [
        json!({"id": "7", "text_input": "a", "stream": true, "parameters": {"max_tokens": 3, "timeout": 9}}),
        json!({"text_input": "a", "max_tokens": 3, "bad_words": "", "sampling_parameters": "{\"seed\": \"3\"}"}),
    ];
    fuzz!(texts(&requests), readers::generate);
}

/// A message could end a coordinator, or be read beyond its end.
#[test]
fn open_inference_messages() {
    let input = |name: &str, datatype: &str, contents: Option<InferTensorContents>| InferInputTensor {
        name: name.to_owned(),
        datatype: datatype.to_owned(),
        shape: vec![1],
        contents,
        ..Default::default()
    };
    let listed = InferTensorContents { bytes_contents: vec![Bytes::from_static(b"a")], ..Default::default() };
    let flag = InferTensorContents { bool_contents: vec![true], ..Default::default() };
    let parameter = |choice| InferParameter { parameter_choice: Some(choice) };
    let parameters = [
        ("max_tokens".to_owned(), parameter(ParameterChoice::Int64Param(3))),
        ("temperature".to_owned(), parameter(ParameterChoice::DoubleParam(0.5))),
        ("routing_mode".to_owned(), parameter(ParameterChoice::StringParam("hash".to_owned()))),
    ];
    let in_lists = ModelInferRequest {
        model_name: "m".to_owned(),
        id: "7".to_owned(),
        parameters: parameters.into(),
        inputs: vec![input("text_input", "BYTES", Some(listed)), input("stream", "BOOL", Some(flag))],
        outputs: vec![InferRequestedOutputTensor { name: "text_output".to_owned(), ..Default::default() }],
        ..Default::default()
    };
    let in_raw = ModelInferRequest {
        inputs: vec![input("text_input", "BYTES", None), input("sampling_parameters", "BYTES", None)],
        raw_input_contents: vec![raw("a film").into(), raw(r#"{"seed": "3", "stop": ["x"]}"#).into()],
        ..Default::default()
    };
    fuzz!([in_lists.encode_to_vec(), in_raw.encode_to_vec()], readers::infer_message);
}

/// A message could end a coordinator, or ask for what nobody sees.
#[test]
fn messages() {
    let (tokens, routing) = (vec![1, 2, 3], Some(v1::RoutingOptions { mode: v1::RoutingMode::Hash.into(), alpha: 1 }));
    let generate = v1::GenerateRequest {
        text: "a".to_owned(),
        routing,
        min_tokens: Some(1),
        temperature: Some(0.5),
        stop: vec!["x".to_owned()],
        logprobs: Some(2),
        logit_bias: [(3, 1.5)].into(),
        ..Default::default()
    };
    let score = v1::ScoreRequest { tokens, targets: vec!["b".to_owned()], routing, ..Default::default() };
    let encode = v1::EncodeRequest { texts: vec!["a".to_owned(), "b".to_owned()], routing, ..Default::default() };
    // The first byte says which of them it is.
    let seed = |kind: u8, message: Vec<u8>| [vec![kind], message].concat();
    let seeds = [seed(0, generate.encode_to_vec()), seed(1, score.encode_to_vec()), seed(2, encode.encode_to_vec())];
    fuzz!(seeds, |bytes| match bytes {
        [kind, message @ ..] => readers::message(["Generate", "Score", "Encode"][usize::from(kind % 3)], message),
        [] => false,
    });
}

/// A schema could hold up what others wait for, or take the memory.
#[test]
fn schemas() {
    // Each schema gets a grammar of its own: one that fails leaves nothing behind.
    let reader = AssertUnwindSafe(SchemaReader::new().expect("a reader"));
    let schemas = [
        json!({
            "type": "object", "required": ["a"], "additionalProperties": false,
            "properties": {
                "a": {"type": "string", "maxLength": 8, "pattern": "^[a-z]{1,4}$"}, "b": {"enum": ["x", 1, null]},
                "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "minItems": 1, "maxItems": 3},
            },
            "$defs": {"d": {"type": "integer", "minimum": 0, "maximum": 5, "multipleOf": 2}},
        }),
        json!({"anyOf": [{"type": "number", "exclusiveMinimum": 0.5}, {"const": {"a": [1, 2]}}, {"type": "string", "format": "date"}]}),
        json!({"allOf": [{"type": "object", "properties": {"a": {"type": "null"}}}, {"required": ["a"]}], "$schema": "x"}),
    ];
    fuzz!(texts(&schemas), |schema| {
        let reader = &reader;
        reader.read(schema)
    });
}
