//! How a coordinator looks to OpenAI's clients: answers, streams, refusals, deadlines, callers who go away, the end.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::symlink,
    path::Path,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use futures::{StreamExt, future::join_all};
use serde_json::{Value, json};
use sida_coordinator::{CoordinatorConfig, GenerateParams, Listeners, PredictorSource, Prompt, RequestLimits, serve};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    plain_experts::{Behaviour, PlainCluster, decoder_only_dir, model_dir, start_model},
    plain_http::{JSON, ask, parsed, post, send},
};

pub(crate) const TEXT: &str = "sst2 sentence: a gorgeous , witty , seductive movie .";

pub(crate) struct Served {
    pub(crate) cluster: PlainCluster,
    pub(crate) http: SocketAddr,
    shutdown: CancellationToken,
    server: JoinHandle<()>,
}

pub(crate) async fn served(model: &Path, configure: impl FnOnce(&mut CoordinatorConfig)) -> Served {
    let cluster = start_model(model, 2, PredictorSource::Off, |config| {
        config.server.health_period = Duration::from_millis(50);
        configure(config);
    })
    .await;
    let listen = || TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)));
    let (grpc, http) = (listen().await.expect("a port"), listen().await.expect("a port"));
    let address = http.local_addr().expect("address");
    let shutdown = CancellationToken::new();
    let serving = serve(cluster.coordinator.clone(), Listeners { grpc, http: Some(http) }, shutdown.clone());
    let server = tokio::spawn(async { serving.await.expect("served") });
    Served { cluster, http: address, shutdown, server }
}

/// The decoder-only model with a chat template.
pub(crate) fn chat_model() -> TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(decoder_only_dir()).expect("model") {
        let path = entry.expect("a file").path();
        symlink(&path, dir.path().join(path.file_name().expect("a name"))).expect("a link");
    }
    let template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}\
                    {% if messages[0].role == 'assistant' %}{{ raise_exception('users begin') }}{% endif %}assistant:";
    fs::write(dir.path().join("chat_template.jinja"), template).expect("written");
    dir
}

pub(crate) fn chunks(events: &[&str]) -> Vec<Value> {
    assert_eq!(events.last(), Some(&"[DONE]"), "{events:?}");
    events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn completions() {
    // Would break: an application gets another answer by HTTP than by gRPC, or pieces that are not the whole.
    let served = served(&model_dir(), |_| ()).await;
    let params = GenerateParams { prompt: Prompt::Text(TEXT.into()), max_tokens: 12, ..Default::default() };
    let tokens: Vec<_> = served.cluster.coordinator.generate(params).await.expect("accepted").collect().await;
    let tokens: Vec<_> = tokens.into_iter().map(|token| token.expect("token")).collect();
    let expected: String = tokens.iter().map(|token| token.text.as_str()).collect();

    let mut request = json!({"model": "switch-tiny-64", "prompt": TEXT, "max_tokens": 12, "user": "u"});
    let headers = format!("{JSON}x-request-id: a-1\r\n");
    let answer = ask(served.http, "POST", "/v1/completions", &headers, request.to_string().as_bytes()).await;
    assert_eq!((answer.status, answer.header("x-request-id")), (200, Some("a-1")), "{answer:?}");
    let whole = answer.json();
    assert_eq!((&whole["object"], &whole["id"]), (&json!("text_completion"), &json!("cmpl-a-1")));
    let choice = json!({"index": 0, "text": expected, "logprobs": null, "finish_reason": "stop"});
    assert_eq!(whole["choices"], json!([choice]));
    assert_eq!(whole["usage"]["completion_tokens"], tokens.len());
    assert_eq!(whole["usage"]["sida"]["routing"]["mode"], "exact");
    assert!(whole["usage"]["sida"]["timings_us"]["total"].as_u64() > Some(0));

    let guided = json!({"prompt": TEXT, "max_tokens": 2, "routing": {"mode": "guided"}});
    let cost = post(served.http, "/v1/completions", &guided).await.json()["usage"]["sida"].take();
    assert_eq!((&cost["routing"], &cost["rerouted"]), (&json!({"mode": "guided", "alpha": null}), &json!(0)));
    assert_eq!(cost["unpredicted"], true, "nothing predicts here");

    request["stream"] = true.into();
    request["stream_options"] = json!({"include_usage": true});
    request["echo"] = true.into();
    let answer = post(served.http, "/v1/completions", &request).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let events = answer.events();
    let chunks = chunks(&events);
    let (last, parts) = chunks.split_last().expect("chunks");
    let text: String = parts.iter().map(|part| part["choices"][0]["text"].as_str().expect("a text")).collect();
    assert_eq!(text, format!("{TEXT}{expected}"));
    assert!(parts.iter().all(|part| part["usage"].is_null() && part["id"] == last["id"]));
    assert_eq!((&last["choices"], &last["usage"]["prompt_tokens"]), (&json!([]), &whole["usage"]["prompt_tokens"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prompts_and_answers() {
    // Would break: answers stand beside other prompts than their own, or seeds give other draws in company.
    let served = served(&model_dir(), |_| ()).await;
    let ids = post(served.http, "/tokenize", &json!({"prompt": "sst2 sentence: dull ."})).await.json();
    let back = post(served.http, "/detokenize", &json!({"tokens": ids["tokens"]})).await.json();
    assert_eq!(
        (ids["count"].as_u64(), &back["prompt"]),
        (ids["tokens"].as_array().map(|all| all.len() as u64), &json!("sst2 sentence: dull ."))
    );
    let ask = async |prompt: Value, n: usize, seed: usize| {
        let request = json!({
            "prompt": prompt, "n": n, "seed": seed, "temperature": 1.5, "max_tokens": 5, "ignore_eos": true, "logprobs": 2,
        });
        let answer = post(served.http, "/v1/completions", &request).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["choices"].as_array().expect("choices").clone()
    };
    let all = ask(json!([ids["tokens"], ids["tokens"]]), 2, 7).await;
    assert_eq!(all.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for (index, choice) in all.iter().enumerate() {
        let alone = ask(json!("sst2 sentence: dull ."), 1, 7 + index % 2).await;
        assert_eq!(choice["text"], alone[0]["text"], "{index}");
        assert_eq!(choice["logprobs"], alone[0]["logprobs"], "{index}");
        let logprobs = &choice["logprobs"];
        let length = |list: &str| logprobs[list].as_array().map(Vec::len);
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(length(list), Some(5), "{list} of {logprobs}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chats() {
    // Would break: a model reads a conversation in another form than its template's, or what a text begins with twice.
    let dir = chat_model();
    let served = served(dir.path(), |_| ()).await;
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "the router"}]}, {"role": "assistant", "content": "chose"},
        {"role": "user", "content": "what"},
    ]);
    let written = "user: the router\nassistant: chose\nuser: what\nassistant:";
    let request = json!({"prompt": written, "max_tokens": 8});
    let expected = post(served.http, "/v1/completions", &request).await.json()["choices"][0]["text"].clone();
    let mut request = json!({"messages": messages, "max_completion_tokens": 8, "logprobs": true, "top_logprobs": 1});
    let answer = post(served.http, "/v1/chat/completions", &request).await;
    let whole = answer.json();
    let choice = &whole["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&expected, &json!("length")), "{whole}");
    let content = choice["logprobs"]["content"].as_array().expect("log-probabilities");
    // Greedy: each token is the likeliest in its place.
    assert!(content.len() == 8 && content.iter().all(|entry| entry["top_logprobs"][0]["logprob"] == entry["logprob"]));

    request["stream"] = true.into();
    let answer = post(served.http, "/v1/chat/completions", &request).await;
    let events = answer.events();
    let chunks = chunks(&events);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(json!(text), expected);
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    let tokens = post(served.http, "/tokenize", &json!({"messages": messages})).await.json();
    assert_eq!(tokens["count"], whole["usage"]["prompt_tokens"]);

    let refused = json!({"messages": [{"role": "assistant", "content": "I begin"}]});
    let refused = post(served.http, "/v1/chat/completions", &refused).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("messages")));
    assert!(refused.body.contains("users begin"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings() {
    // Would break: an index is filled with vectors of another text, or two encodings of one vector differ.
    let served = served(&model_dir(), |_| ()).await;
    let request = json!({"input": [TEXT, "dull"], "encoding_format": "float"});
    let both = post(served.http, "/v1/embeddings", &request).await.json();
    let vector = |answer: &Value, index: usize| {
        let vector = answer["data"][index]["embedding"].as_array().expect("a vector");
        vector.iter().map(|number| number.as_f64().expect("a number")).collect::<Vec<f64>>()
    };
    let length = |vector: &[f64]| vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    assert!((length(&vector(&both, 0)) - 1.0).abs() < 1e-5 && both["data"][1]["index"] == 1);
    let request = json!({"input": "dull", "normalize": false, "dimensions": vector(&both, 0).len()});
    let raw = post(served.http, "/v1/embeddings", &request).await.json();
    let raw = vector(&raw, 0);
    let scaled: Vec<f64> = raw.iter().map(|x| x / length(&raw)).collect();
    assert!(scaled.iter().zip(vector(&both, 1)).all(|(a, b)| (a - b).abs() < 1e-5));
    let long = json!({"input": "good ".repeat(600), "truncate": true});
    let cut = post(served.http, "/v1/embeddings", &long).await.json();
    assert_eq!(cut["usage"]["prompt_tokens"], RequestLimits::default().prompt_tokens_max);
    let refused = post(served.http, "/v1/embeddings", &json!({"input": ["dull", "good ".repeat(600)]})).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("input[1]")), "{refused:?}");
}

/// Method, path, headers and body of a request; status, code and field of its refusal.
type Case<'a> = (&'a str, &'a str, &'a str, &'a [u8], u16, &'a str, Value);

#[tokio::test(flavor = "multi_thread")]
async fn refusals() {
    // Would break: a client cannot tell what was wrong, or one bad request ends the door for everybody.
    let served = served(&model_dir(), |_| ()).await;
    let completions = "/v1/completions";
    let cases: [Case<'_>; 16] = [
        ("POST", completions, JSON, br#"{"model": "gpt-4", "prompt": "a"}"#, 404, "model_not_found", json!("model")),
        ("GET", "/v1/models/gpt-4/x", "", b"", 404, "model_not_found", json!("model")),
        ("GET", "/v3/models", "", b"", 404, "not_found", Value::Null),
        ("GET", completions, "", b"", 405, "method_not_allowed", Value::Null),
        ("POST", completions, "content-type: text/plain\r\n", b"{}", 415, "unsupported_media_type", Value::Null),
        ("POST", completions, "", b"{}", 415, "unsupported_media_type", Value::Null),
        ("POST", completions, JSON, b"{\"prompt\": ", 400, "invalid_json", Value::Null),
        ("POST", completions, JSON, b"{\"prompt\": \"\xff\"}", 400, "invalid_json", Value::Null),
        ("POST", completions, JSON, b"[1]", 400, "invalid_json", Value::Null),
        ("POST", completions, JSON, b"{}", 400, "missing_required_parameter", json!("prompt")),
        ("POST", completions, JSON, br#"{"prompt": " "}"#, 400, "empty_text", json!("prompt")),
        ("POST", completions, JSON, br#"{"prompt": [99999999]}"#, 400, "invalid_value", json!("prompt")),
        (
            "POST",
            completions,
            JSON,
            br#"{"prompt": "a", "temperature": 1e39}"#,
            400,
            "invalid_value",
            json!("temperature"),
        ),
        (
            "POST",
            completions,
            JSON,
            br#"{"prompt": "a", "guided_json": {}}"#,
            400,
            "unsupported_parameter",
            json!("guided_json"),
        ),
        ("POST", completions, "x-request-timeout: soon\r\n", b"{}", 400, "invalid_value", json!("x-request-timeout")),
        (
            "POST",
            "/v1/chat/completions",
            JSON,
            br#"{"messages": [{"role": "user", "content": "Hi"}]}"#,
            400,
            "no_chat_template",
            Value::Null,
        ),
    ];
    for (method, path, headers, body, status, code, param) in cases {
        let answer = ask(served.http, method, path, headers, body).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["code"], &error["param"]), (status, &json!(code), &param), "{answer:?}");
        assert!(error["message"].is_string() && answer.header("x-request-id").is_some(), "{answer:?}");
        assert_eq!(answer.header("allow").is_some(), status == 405, "{answer:?}");
    }
    let long = format!("{{\"prompt\": \"{}\"}}", "a".repeat(9 << 20));
    assert_eq!(ask(served.http, "POST", completions, JSON, &long.as_bytes()[..100]).await.status, 400, "it is no JSON");
    let mut stream = send(served.http, "POST", completions, JSON, long.as_bytes()).await;
    let mut bytes = Vec::new();
    // The rest of the body is not read, so that the connection may be reset behind the answer.
    let _ = stream.read_to_end(&mut bytes).await;
    assert_eq!(parsed(&bytes).status, 413);
    let answer = post(served.http, completions, &json!({"prompt": TEXT, "max_tokens": 1})).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let models = ask(served.http, "GET", "/v1/models", "", b"").await.json();
    assert_eq!(models["data"][0]["id"], "switch-tiny-64");
    assert_eq!(ask(served.http, "GET", "/v1/models/switch-tiny-64", "", b"").await.json(), models["data"][0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_come_back() {
    // Would break: clients that are refused come back at once, and keep a queue full by asking.
    let served = served(&model_dir(), |config| {
        config.limits.tokens_max = 20;
        config.limits.queue_max = 1;
    })
    .await;
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Slow(Duration::from_millis(20))));
    let request = json!({"prompt": TEXT, "max_tokens": 2});
    let answers = join_all((0..40).map(|_| post(served.http, "/v1/completions", &request))).await;
    let refused = answers.iter().find(|answer| answer.status != 200).expect("only some of them find a place");
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (429, &json!("rate_limit_error")), "{refused:?}");
    assert!(refused.header("retry-after").and_then(|seconds| seconds.parse::<u64>().ok()).is_some_and(|s| s >= 1));
    // Who asks for more at once than may ever wait is not told to come back.
    for request in [json!({"prompt": [TEXT, TEXT]}), json!({"prompt": [TEXT, TEXT], "echo": true})] {
        let never = post(served.http, "/v1/completions", &request).await;
        assert_eq!((never.status, never.header("retry-after")), (400, None), "{never:?}");
    }
    assert_eq!(post(served.http, "/v1/embeddings", &json!({"input": [TEXT, TEXT]})).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_and_faults() {
    // Would break: a caller's time passes unnoticed, or an error within a stream looks like the end of the answer.
    let served = served(&model_dir(), |config| config.expert_call_timeout = Duration::from_secs(1)).await;
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Slow(Duration::from_millis(20))));
    let request = json!({"prompt": TEXT, "max_tokens": 500, "ignore_eos": true});
    let timeout = format!("{JSON}x-request-timeout: 0.3\r\n");
    let since = Instant::now();
    let answer = ask(served.http, "POST", "/v1/completions", &timeout, request.to_string().as_bytes()).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (504, &json!("deadline_exceeded")), "{answer:?}");
    assert!(since.elapsed() < Duration::from_secs(5));
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Slow(Duration::from_millis(2))));
    let request = json!({"prompt": TEXT, "max_tokens": 1000, "ignore_eos": true, "stream": true});
    let timeout = format!("{JSON}x-request-timeout: 1\r\n");
    let answer = ask(served.http, "POST", "/v1/completions", &timeout, request.to_string().as_bytes()).await;
    let events = answer.events();
    assert_eq!(answer.status, 200, "{answer:?}");
    let last: Value = serde_json::from_str(events.last().expect("events")).expect("no [DONE]");
    assert_eq!(last["error"]["code"], "deadline_exceeded");
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::ShutsDown));
    let answer = post(served.http, "/v1/completions", &request).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("expert_unavailable")), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_away_is_not_computed_for() {
    // Would break: callers who give up keep their places, and those who stay wait for answers that nobody reads.
    // A health check is an expert call, too.
    let served = served(&model_dir(), |config| config.server.health_period = Duration::from_secs(600)).await;
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Slow(Duration::from_millis(2))));
    for stream in [true, false] {
        let request = json!({"prompt": TEXT, "max_tokens": 1000, "ignore_eos": true, "stream": stream});
        let mut connection = send(served.http, "POST", "/v1/completions", JSON, request.to_string().as_bytes()).await;
        let rows = || served.cluster.nodes.iter().map(|node| node.rows.load(Ordering::Relaxed)).sum::<u64>();
        if stream {
            connection.read_u8().await.expect("it begins");
        } else {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        drop(connection);
        let since = Instant::now();
        loop {
            let before = rows();
            tokio::time::sleep(Duration::from_millis(100)).await;
            if rows() == before {
                break;
            }
            assert!(since.elapsed() < Duration::from_secs(5), "it goes on");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_node() {
    // Would break: a rollout cuts answers off, waits for them without a limit, or leaves clients without a word.
    for (drain, tokens) in [(Duration::from_secs(30), 30), (Duration::from_millis(200), 1000)] {
        let served = served(&model_dir(), |config| config.server.drain_limit = drain).await;
        let settled = async {
            while ask(served.http, "GET", "/health", "", b"").await.status != 200 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), settled).await.expect("ready");
        served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Slow(Duration::from_millis(2))));
        let request = json!({"prompt": TEXT, "max_tokens": tokens, "ignore_eos": true, "stream": true});
        let mut connection = send(served.http, "POST", "/v1/completions", JSON, request.to_string().as_bytes()).await;
        let mut bytes = vec![connection.read_u8().await.expect("it begins")];
        served.shutdown.cancel();
        connection.read_to_end(&mut bytes).await.expect("the rest");
        let answer = parsed(&bytes);
        let last = *answer.events().last().expect("events");
        match tokens {
            30 => assert_eq!(last, "[DONE]"),
            _ => assert!(last.contains("shutting_down"), "{last}"),
        }
        tokio::time::timeout(Duration::from_secs(10), served.server).await.expect("it ended").expect("no panic");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn times_are_told_by_door() {
    // Would break: a dashboard shows the time to the first token of one door as that of another, or of none.
    let metrics = sida_telemetry::metrics::install().expect("a recorder");
    let served = served(&model_dir(), |_| ()).await;
    let requests = [
        ("openai", "/v1/completions", json!({"prompt": TEXT, "max_tokens": 3, "ignore_eos": true})),
        (
            "open_inference",
            "/v2/models/switch-tiny-64/generate",
            json!({"text_input": TEXT, "max_tokens": 3, "ignore_eos": true}),
        ),
    ];
    for (door, path, request) in requests {
        let counts = || {
            ["sida_time_to_first_token_seconds", "sida_time_per_output_token_seconds"].map(|name| {
                let (line, text) = (format!("{name}_count{{door=\"{door}\"}} "), metrics.render());
                text.lines().find_map(|found| found.strip_prefix(&line)?.parse::<u64>().ok()).unwrap_or(0)
            })
        };
        let before = counts();
        assert_eq!(post(served.http, path, &request).await.status, 200);
        // Other tests of this process may have added to it, too.
        assert!(
            counts().iter().zip(before).all(|(&after, before)| after > before),
            "{door}: {before:?}, {:?}",
            counts()
        );
    }
}
