//! The Open Inference Protocol by HTTP: tensors in JSON and behind it, Triton's generate, what the model is and was
//! asked, and refusals in this protocol's own form.

use std::fs;

use futures::StreamExt;
use serde_json::{Value, json};
use sida_coordinator::{GenerateParams, Prompt};
use sida_rpc::{Gate, KeyFile};

use crate::{
    openai_door::{Served, TEXT, served},
    plain_experts::model_dir,
    plain_http::{JSON, ask, post},
};

const MODEL: &str = "/v2/models/switch-tiny-64";

async fn text_of(served: &Served) -> String {
    let params = GenerateParams { prompt: Prompt::Text(TEXT.into()), max_tokens: 8, ..Default::default() };
    let tokens = served.cluster.coordinator.generate(params).await.expect("accepted");
    tokens.map(|token| token.expect("a token").text).collect().await
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_may_come_in_part_as_raw_bytes() {
    // Would break: a client that sends its texts raw and its flags in JSON, as Triton's lets it, is refused.
    let served = served(&model_dir(), |_| ()).await;
    let texts = [&(TEXT.len() as u32).to_le_bytes()[..], TEXT.as_bytes()].concat();
    let input = |name: &str, datatype: &str, more: Value| {
        let mut input = json!({"name": name, "shape": [1], "datatype": datatype});
        input.as_object_mut().expect("fields").extend(more.as_object().expect("fields").clone());
        input
    };
    let head = json!({
        "id": "7",
        "inputs": [
            input("stream", "BOOL", json!({"data": [false]})),
            input("text_input", "BYTES", json!({"parameters": {"binary_data_size": texts.len()}})),
            input("sampling_parameters", "BYTES", json!({"data": ["{\"max_tokens\": 8}"]})),
        ],
    })
    .to_string();
    let length = format!("inference-header-content-length: {}\r\n", head.len());
    let answer =
        ask(served.http, "POST", &format!("{MODEL}/infer"), &length, &[head.as_bytes(), &texts].concat()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["outputs"][0]["data"], json!([text_of(&served).await]));
    // Of the wrong type, beside raw ones.
    let head = head.replace("[false]", "[\"no\"]");
    let length = format!("inference-header-content-length: {}\r\n", head.len());
    let refused =
        ask(served.http, "POST", &format!("{MODEL}/infer"), &length, &[head.as_bytes(), &texts].concat()).await;
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(refused.json()["error"].as_str().expect("a text").contains("stream"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn generate_answers_as_all_others_do() {
    // Would break: curl as Triton's documents have it is not answered, or another text than by the other doors.
    let served = served(&model_dir(), |_| ()).await;
    let expected = text_of(&served).await;
    let request = json!({"id": "7", "text_input": TEXT, "parameters": {"stream": false, "max_tokens": 8}});
    // As curl sends it, which knows no JSON.
    let form = "content-type: application/x-www-form-urlencoded\r\n";
    let answer = ask(served.http, "POST", &format!("{MODEL}/generate"), form, request.to_string().as_bytes()).await;
    let whole = json!({
        "model_name": "switch-tiny-64", "model_version": "1", "id": "7", "text_output": expected, "finish_reason": "stop",
    });
    assert_eq!((answer.status, answer.json()), (200, whole), "{answer:?}");
    let request = json!({"text_input": TEXT, "max_tokens": 8, "stream": true});
    let answer = post(served.http, &format!("{MODEL}/versions/1/generate_stream"), &request).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"), "{answer:?}");
    let parts: Vec<Value> = answer.events().iter().map(|part| serde_json::from_str(part).expect("JSON")).collect();
    let text: String = parts.iter().map(|part| part["text_output"].as_str().expect("a text")).collect();
    assert_eq!(text, expected);
    assert_eq!(parts.iter().filter(|part| part["finish_reason"] != "").count(), 1, "{parts:?}");
    let refused = post(served.http, &format!("{MODEL}/generate"), &request).await;
    assert!(refused.status == 400 && refused.body.contains("generate_stream"), "{refused:?}");
    let refused = post(served.http, &format!("{MODEL}/generate_stream"), &json!({"text_input": ""})).await;
    assert!(refused.status == 400 && refused.json()["error"].is_string(), "{refused:?}");

    let stats = ask(served.http, "GET", &format!("{MODEL}/stats"), "", b"").await.json();
    assert_eq!(ask(served.http, "GET", "/v2/models/stats", "", b"").await.json(), stats);
    let stats = &stats["model_stats"][0];
    assert_eq!(
        (&stats["inference_count"], &stats["inference_stats"]["fail"]["count"]),
        (&json!(2), &json!(1)),
        "{stats}"
    );
    let success = &stats["inference_stats"]["success"];
    assert!(success["count"] == 2 && success["ns"].as_u64() > Some(0), "{stats}");
    let config = ask(served.http, "GET", &format!("{MODEL}/config"), "", b"").await.json();
    assert_eq!(
        config["input"][0],
        json!({"name": "text_input", "data_type": "TYPE_STRING", "dims": [-1], "optional": false})
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_this_protocols() {
    // Would break: a client of Triton that has no key, or asks for what is not there, shows an error that it cannot read.
    let dir = tempfile::tempdir().expect("a folder");
    let keys = dir.path().join("keys");
    fs::write(&keys, "who:a-key-that-is-long-enough\n").expect("written");
    let served = served(&model_dir(), |config| {
        config.server.gate = Gate::open(KeyFile::Clients(keys)).expect("keys");
    })
    .await;
    let key = format!("{JSON}authorization: Bearer a-key-that-is-long-enough\r\n");
    for (method, path, headers, status, named) in [
        ("GET", MODEL, "", 401, "key"),
        ("GET", "/v2", "", 401, "key"),
        ("GET", "/v2/nothing", key.as_str(), 404, "/v2/nothing"),
        ("GET", "/v2/models/another", key.as_str(), 404, "another"),
        ("GET", "/v2/models/switch-tiny-64/infer", key.as_str(), 405, "POST"),
        ("POST", "/v2", key.as_str(), 405, "POST"),
        ("POST", "/v2/models/switch-tiny-64/generate", "x-request-timeout: soon\r\n", 400, "x-request-timeout"),
    ] {
        let refused = ask(served.http, method, path, headers, b"{}").await;
        assert_eq!(refused.status, status, "{method} {path}: {refused:?}");
        let told = refused.json();
        assert!(told["error"].as_str().is_some_and(|message| message.contains(named)), "{path}: {told}");
        assert_eq!(told.as_object().map(|fields| fields.len()), Some(1), "{told}");
        assert_eq!(refused.header("www-authenticate"), (status == 401).then_some("Bearer"), "{refused:?}");
    }
    let openais = ask(served.http, "GET", "/v1/models", "", b"").await;
    assert_eq!(openais.json()["error"]["code"], "invalid_api_key", "{openais:?}");
    assert_eq!(ask(served.http, "GET", "/v2/health/ready", "", b"").await.status, 200, "probes have no key");
}
