//! Answers that follow a schema: by both doors, drawn and greedy, whole and as they come, of models that have learnt
//! nothing of JSON.

use futures::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};
use sida_coordinator::{FinishReason, GenerateParams, RequestError, Sampling};

use crate::{
    openai_door::{chat_model, chunks, served},
    plain_experts::model_dir,
    plain_http::post,
};

/// What [`schema`] allows.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Review {
    film: String,
    #[serde(rename = "verdict")]
    _verdict: Verdict,
    stars: Vec<i8>,
    #[serde(rename = "seen")]
    _seen: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Good,
    Dull,
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "film": {"type": "string", "maxLength": 8},
            "verdict": {"enum": ["good", "dull"]},
            "stars": {"type": "array", "items": {"$ref": "#/$defs/stars"}, "minItems": 1, "maxItems": 3},
            "seen": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        },
        "required": ["film", "verdict", "stars", "seen"],
        "additionalProperties": false,
        "$defs": {"stars": {"type": "integer", "minimum": 0, "maximum": 5}},
    })
}

/// Panics unless `text` follows [`schema`].
fn check(text: &str) {
    let review: Review = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text:?}"));
    assert!(review.film.chars().count() <= 8 && (1..=3).contains(&review.stars.len()), "{text:?}");
    assert!(review.stars.iter().all(|stars| (0..=5).contains(stars)), "{text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_follows_its_schema() {
    // Would break: an application parses an answer that it asked to be JSON, and cannot.
    let dir = chat_model();
    let served = served(dir.path(), |_| ()).await;
    let messages = json!([{"role": "user", "content": "review"}]);
    let format = json!({"type": "json_schema", "json_schema": {"name": "review", "strict": true, "schema": schema()}});
    for seed in 0..5 {
        let request = json!({
            "messages": messages, "response_format": format, "temperature": 1.5, "seed": 4 * seed, "n": 4,
            "max_tokens": 900, "logprobs": true,
        });
        let answer = post(served.http, "/v1/chat/completions", &request).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        for choice in answer.json()["choices"].as_array().expect("choices") {
            assert_eq!(choice["finish_reason"], "stop", "{choice}");
            check(choice["message"]["content"].as_str().expect("a text"));
            assert!(choice["logprobs"]["content"].as_array().expect("tokens").len() > 10);
        }
    }
    let request = json!({
        "messages": messages, "response_format": {"type": "json_object"}, "stream": true, "max_tokens": 200, "temperature": 0,
    });
    let answer = post(served.http, "/v1/chat/completions", &request).await;
    let (events, mut text) = (answer.events(), String::new());
    let chunks = chunks(&events);
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).for_each(|part| text += part);
    assert!(text.starts_with('{'), "{text:?}");
    let reason = &chunks.last().expect("chunks")["choices"][0]["finish_reason"];
    assert!(reason == "length" || serde_json::from_str::<Value>(&text).is_ok(), "{text:?} ended by {reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_with_an_encoder_follows_it_too() {
    // Would break: what the model's own rules force or its tokenizer does to blanks gets into an answer that has a schema.
    let served = served(&model_dir(), |_| ()).await;
    for (seed, temperature) in [(1, 0.0), (2, 1.0), (3, 2.0)] {
        let params = GenerateParams {
            prompt: "sst2 sentence: a fine film .".into(),
            json_schema: Some(schema().to_string()),
            max_tokens: 900,
            sampling: Sampling { seed: Some(seed), temperature: Some(temperature), ..Default::default() },
            ..Default::default()
        };
        let tokens: Vec<_> = served.cluster.coordinator.generate(params).await.expect("accepted").collect().await;
        let tokens: Vec<_> = tokens.into_iter().map(|token| token.expect("token")).collect();
        let finish = tokens.last().and_then(|token| token.finish.as_ref()).expect("an end");
        assert_eq!(finish.reason, FinishReason::End);
        check(&tokens.iter().map(|token| token.text.as_str()).collect::<String>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_followed_is_refused() {
    // Would break: an answer follows half of what was asked, or a schema that nobody can follow ends the step of all.
    let dir = chat_model();
    let served = served(dir.path(), |_| ()).await;
    let messages = json!([{"role": "user", "content": "review"}]);
    let refused = async |more: Value| {
        let mut request = json!({"messages": messages, "response_format": {"type": "json_object"}, "max_tokens": 5});
        request.as_object_mut().expect("fields").extend(more.as_object().expect("fields").clone());
        let answer = post(served.http, "/v1/chat/completions", &request).await;
        assert_eq!(answer.status, 400, "{answer:?}");
        answer.json()["error"]["param"].as_str().unwrap_or_default().to_owned()
    };
    let with = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}});
    assert_eq!(refused(with(json!({"type": "text"}))).await, "response_format");
    assert_eq!(refused(with(json!({"not": {"type": "null"}}))).await, "response_format");
    assert_eq!(refused(json!({"min_tokens": 3})).await, "min_tokens");
    assert_eq!(refused(json!({"ignore_eos": true})).await, "ignore_eos");
    for field in ["guided_json", "guided_regex", "structured_outputs", "grammar"] {
        assert_eq!(refused(json!({field: {}})).await, field);
    }
    let params = GenerateParams { prompt: "a".into(), json_schema: Some("{".to_owned()), ..Default::default() };
    let error = served.cluster.coordinator.generate(params).await.err();
    assert!(matches!(error, Some(RequestError::JsonSchema { .. })), "{error:?}");
}
