//! Tools by the door of OpenAI's clients: calls that have to be made, whole and in events, of a model that has learnt nothing of
//! them, and what is refused.

use std::{fs, path::Path};

use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    openai_door::{chat_model, chunks, served},
    plain_http::post,
};

/// The model with a template that tells it of tools.
fn tool_model() -> TempDir {
    let dir = chat_model();
    let template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}\
                    {% for message in messages %}{{ message.role }}: {{ message.content }}\
                    {% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n\
                    {% endfor %}assistant:";
    fs::write(Path::new(dir.path()).join("chat_template.jinja"), template).expect("written");
    dir
}

fn tools() -> Value {
    let weather = json!({
        "type": "object",
        "properties": {"city": {"enum": ["Rom", "Wien"]}, "hour": {"$ref": "#/$defs/hour"}},
        "required": ["city", "hour"],
        "additionalProperties": false,
        "$defs": {"hour": {"type": "integer", "minimum": 0, "maximum": 23}},
    });
    let nothing = json!({"type": "object", "properties": {}, "additionalProperties": false});
    json!([
        {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": weather}},
        {"type": "function", "function": {"name": "stop", "parameters": nothing}},
    ])
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Weather {
    city: String,
    hour: u8,
}

/// Panics unless it is a call of one of [`tools`]; its name.
fn check(call: &Value) -> String {
    assert!(call["type"] == "function" && call["id"].as_str().is_some_and(|id| id.starts_with("call-")), "{call}");
    let function = &call["function"];
    let arguments = function["arguments"].as_str().expect("arguments");
    match function["name"].as_str() {
        Some("weather") => {
            let weather: Weather = serde_json::from_str(arguments).unwrap_or_else(|error| panic!("{error} in {call}"));
            assert!(["Rom", "Wien"].contains(&&*weather.city) && weather.hour < 24, "{call}");
        }
        Some("stop") => assert_eq!(arguments, "{}"),
        _ => panic!("{call}"),
    }
    function["name"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_asked_for_are_made() {
    // Would break: an agent that has to have a call gets a text, arguments that it cannot read, or in a stream nothing at all.
    let dir = tool_model();
    let served = served(dir.path(), |config| config.request_limits.prompt_tokens_max = 1024).await;
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (choice, several) in [(json!("required"), true), (json!("required"), false), (named.clone(), true)] {
        let mut request = json!({
            "messages": [{"role": "user", "content": "Is it raining?"}], "tools": tools(), "tool_choice": choice,
            "parallel_tool_calls": several, "max_tokens": 900, "temperature": 1.0, "seed": 5,
        });
        let answer = post(served.http, "/v1/chat/completions", &request).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let choice = &answer.json()["choices"][0];
        // Of a model that goes on with calls for ever the last one may be cut off, with what there is of its arguments.
        let is_whole = choice["finish_reason"] == "tool_calls";
        assert!(is_whole || several, "{choice}");
        let calls = choice["message"]["tool_calls"].as_array().expect("calls");
        let whole_calls = if is_whole { &calls[..] } else { &calls[..calls.len() - 1] };
        let names: Vec<String> = whole_calls.iter().map(check).collect();
        assert!(several || calls.len() == 1, "{choice}");
        assert!(request["tool_choice"] != named || names.iter().all(|name| name == "weather"), "{choice}");
        assert!(!is_whole || choice["message"]["content"].is_null(), "nothing else is said: {choice}");

        request["stream"] = true.into();
        let answer = post(served.http, "/v1/chat/completions", &request).await;
        let parts = chunks(&answer.events());
        let deltas = parts.iter().map(|part| &part["choices"][0]["delta"]);
        let told: Vec<&Value> = deltas.filter_map(|delta| delta["tool_calls"].as_array()).flatten().collect();
        let streamed: Vec<_> = told.iter().map(|call| (call["index"].as_u64(), &call["function"])).collect();
        let expected: Vec<_> = (0..).map(Some).zip(calls.iter().map(|call| &call["function"])).collect();
        assert_eq!(streamed, expected);
        assert_eq!(parts.last().expect("parts")["choices"][0]["finish_reason"], choice["finish_reason"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_the_limit_cuts_is_told_as_far_as_it_goes() {
    // Would break: an agent shows its user half a call as what the model said, and does not know that a call was cut.
    let dir = tool_model();
    let served = served(dir.path(), |config| config.request_limits.prompt_tokens_max = 1024).await;
    let named = json!({"type": "function", "function": {"name": "weather"}});
    let mut request = json!({
        "messages": [{"role": "user", "content": "Is it raining?"}], "tools": tools(), "tool_choice": named,
        "parallel_tool_calls": false, "max_tokens": 900,
    });
    let whole = post(served.http, "/v1/chat/completions", &request).await.json();
    let whole = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
    let without_blanks = |arguments: &Value| -> String {
        arguments.as_str().expect("arguments").chars().filter(|character| !character.is_whitespace()).collect()
    };
    let whole = without_blanks(&whole["arguments"]);
    let mut partial_calls = 0;
    for max_tokens in (1..200).step_by(4) {
        request["max_tokens"] = max_tokens.into();
        let answer = post(served.http, "/v1/chat/completions", &request).await.json();
        let choice = &answer["choices"][0];
        if choice["finish_reason"] == "tool_calls" {
            break;
        }
        assert_eq!(choice["finish_reason"], "length", "{choice}");
        let Some(calls) = choice["message"]["tool_calls"].as_array() else { continue };
        let arguments = without_blanks(&calls[0]["function"]["arguments"]);
        assert!(calls[0]["function"]["name"] == "weather" && calls.len() == 1, "{choice}");
        assert!(whole.starts_with(&arguments), "{arguments} of {whole}");
        assert!(choice["message"]["content"].is_null(), "{choice}");
        partial_calls += 1;
    }
    assert!(partial_calls > 2, "{partial_calls}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_with_calls_goes_on() {
    // Would break: an agent cannot tell the model what a tool answered; or a model of its own choice cannot just talk.
    let dir = tool_model();
    let served = served(dir.path(), |config| config.request_limits.prompt_tokens_max = 1024).await;
    let call = json!({"id": "1", "type": "function", "function": {"name": "stop", "arguments": "{}"}});
    let mut request = json!({
        "messages": [
            {"role": "user", "content": "Stop."},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "done"},
        ],
        "tools": tools(), "max_tokens": 8, "ignore_eos": true,
    });
    let told = post(served.http, "/v1/chat/completions", &request).await.json();
    assert!(told["choices"][0]["message"]["content"].is_string(), "{told}");
    assert_eq!(told["choices"][0]["finish_reason"], "length");
    request["tool_choice"] = "none".into();
    let untold = post(served.http, "/v1/chat/completions", &request).await.json();
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64();
    assert!(tokens(&told) > tokens(&untold), "the model is told of tools where it may call them");
}

#[tokio::test(flavor = "multi_thread")]
async fn tools_that_cannot_be_called_are_refused() {
    // Would break: an agent believes that its tools were seen.
    let (with, without) = (tool_model(), chat_model());
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let plain = served(without.path(), |_| ()).await;
    let request = json!({"messages": messages, "tools": tools()});
    let refused = post(plain.http, "/v1/chat/completions", &request).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("tools")), "{refused:?}");
    let served = served(with.path(), |_| ()).await;
    let function = json!({"name": "a", "parameters": {"type": "text"}});
    let wrong = json!([{"type": "function", "function": function}]);
    let format = json!({"type": "json_object"});
    for (request, param) in [
        (json!({"messages": messages, "tools": wrong, "tool_choice": "required"}), "tools"),
        (
            json!({"messages": messages, "tools": tools(), "tool_choice": "required", "response_format": format}),
            "response_format",
        ),
    ] {
        let refused = post(served.http, "/v1/chat/completions", &request).await;
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!(param)), "{refused:?}");
    }
}
