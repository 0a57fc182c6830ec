//! What each client may use: told apart by keys, at every door, and changed without a restart.

use std::{fs, path::Path, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use serde_json::json;
use sida_coordinator::{EncodeParams, GenerateParams, PredictorSource, RequestError};
use sida_rpc::{Client, Fault, Gate, KeyFile, Reason};
use tokio::io::AsyncReadExt;

use crate::{
    openai_door::{Served, TEXT, served},
    plain_experts::{Behaviour, PlainCluster, model_dir, start},
    plain_http::{Answer, JSON, ask, parsed, send},
};

const CAROL: &str = "0123456789abcdef-carol";
const DAVE: &str = "0123456789abcdef-dave";

async fn served_with(keys: &Path, lines: &str) -> Served {
    fs::write(keys, lines).expect("written");
    let gate = Gate::open(KeyFile::Clients(keys.to_owned())).expect("keys");
    served(&model_dir(), |config| {
        config.server.gate = gate;
        config.server.reload_period = Duration::from_millis(20);
    })
    .await
}

fn headers(key: &str) -> String {
    format!("{JSON}authorization: Bearer {key}\r\n")
}

async fn complete(served: &Served, key: &str, max_tokens: usize) -> Answer {
    let body = json!({"prompt": TEXT, "max_tokens": max_tokens}).to_string();
    ask(served.http, "POST", "/v1/completions", &headers(key), body.as_bytes()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_has_limits_of_its_own_which_change_with_the_file() {
    // Would break: a client that had its minute's worth goes on, takes it from others, is not told when to come back, or has to
    // wait for a restart until its operator's new limit holds.
    let metrics = sida_telemetry::metrics::install().expect("a recorder");
    let dir = tempfile::tempdir().expect("a folder");
    let keys = dir.path().join("keys");
    let served =
        served_with(&keys, &format!("carol:{CAROL} requests-per-minute=1\ndave:{DAVE} tokens-per-minute=50\n")).await;
    let first = complete(&served, CAROL, 2).await;
    let told = |answer: &Answer, what: &str| answer.header(&format!("x-ratelimit-{what}")).map(str::to_owned);
    let requests = (told(&first, "limit-requests"), told(&first, "remaining-requests"));
    assert_eq!((first.status, requests), (200, (Some("1".to_owned()), Some("0".to_owned()))), "{first:?}");
    assert_eq!(told(&first, "limit-tokens"), None);
    let second = complete(&served, CAROL, 2).await;
    assert_eq!((second.status, &second.json()["error"]["code"]), (429, &json!("rate_limit_exceeded")), "{second:?}");
    assert_eq!(second.json()["error"]["param"], "requests-per-minute");
    let seconds: u64 = second.header("retry-after").and_then(|after| after.parse().ok()).expect("when to come back");
    assert!((1..=60).contains(&seconds), "{seconds}");

    let dave = complete(&served, DAVE, 2).await;
    assert_eq!((dave.status, told(&dave, "limit-tokens").as_deref()), (200, Some("50")), "{dave:?}");
    let never = complete(&served, DAVE, 1000).await;
    assert_eq!(never.status, 400, "no minute has so many tokens: {never:?}");
    for (path, body) in [
        ("/v1/completions", json!({"prompt": [TEXT, TEXT], "max_tokens": 2})),
        ("/v1/embeddings", json!({"input": [TEXT, TEXT]})),
    ] {
        let never = ask(served.http, "POST", path, &headers(CAROL), body.to_string().as_bytes()).await;
        assert_eq!(never.status, 400, "no minute has so many requests: {never:?}");
    }

    fs::write(&keys, format!("carol:{CAROL} requests-per-minute=1000\n")).expect("written");
    let changed = async {
        while complete(&served, CAROL, 1).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), changed).await.expect("long before her minute is over");
    assert_eq!(complete(&served, DAVE, 1).await.status, 401);
    let rendered = metrics.render();
    for counted in ["limited_total{client=\"carol\",limit=\"requests-per-minute\"}", "tokens_total{client=\"dave\"}"] {
        assert!(rendered.contains(&format!("sida_client_{counted}")), "{counted} in {rendered}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_taken_away_ends_its_streams() {
    // Would break: who was locked out has the rest of a long answer, and what is computed for it keeps others waiting.
    let dir = tempfile::tempdir().expect("a folder");
    let keys = dir.path().join("keys");
    let served = served_with(&keys, &format!("carol:{CAROL}\ndave:{DAVE}\n")).await;
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Slow(Duration::from_millis(20))));
    let body = json!({"prompt": TEXT, "max_tokens": 1000, "ignore_eos": true, "stream": true}).to_string();
    let mut stream = send(served.http, "POST", "/v1/completions", &headers(CAROL), body.as_bytes()).await;
    let mut bytes = vec![0; 512];
    stream.read_exact(&mut bytes).await.expect("it has begun");
    fs::write(&keys, format!("dave:{DAVE}\n")).expect("written");
    let rest = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut bytes)).await;
    rest.expect("it ends").expect("read");
    let answer = parsed(&bytes);
    let last: serde_json::Value = serde_json::from_str(answer.events().last().expect("events")).expect("JSON");
    assert_eq!((answer.status, &last["error"]["code"]), (200, &json!("invalid_api_key")), "{last}");
    let ended = async {
        while served.cluster.coordinator.status().await.requests_inflight > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), ended).await.expect("nothing is computed for it");
    assert_eq!(complete(&served, DAVE, 1).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_of_one_call_are_let_in_together_or_not_at_all() {
    // Would break: a call of several prompts is refused, and what some of them might have taken is charged all the same; or one
    // that no minute has room for is told to come back.
    let dir = tempfile::tempdir().expect("a folder");
    let keys = dir.path().join("keys");
    let served = served_with(&keys, &format!("dave:{DAVE} tokens-per-minute=1000\n")).await;
    let remaining = |answer: &Answer| -> u64 {
        answer.header("x-ratelimit-remaining-tokens").and_then(|left| left.parse().ok()).expect("what is left")
    };
    let ask_all = |path: &'static str, body: serde_json::Value| {
        let (http, body) = (served.http, body.to_string());
        async move { ask(http, "POST", path, &headers(DAVE), body.as_bytes()).await }
    };
    // Each of them would fit.
    let never = ask_all("/v1/completions", json!({"prompt": [TEXT, TEXT, TEXT], "max_tokens": 400})).await;
    assert_eq!((never.status, &never.json()["error"]["param"]), (400, &json!("tokens-per-minute")), "{never:?}");
    assert_eq!(remaining(&never), 1000, "{never:?}");
    // Most of a minute's worth, which comes back evenly: a minute later all of it would be there again.
    let first = ask_all("/v1/embeddings", json!({"input": vec![TEXT; 45]})).await;
    assert_eq!(first.status, 200, "{first:?}");
    let left = remaining(&first);
    let later = ask_all("/v1/completions", json!({"prompt": [TEXT, TEXT], "max_tokens": 470})).await;
    assert_eq!((later.status, &later.json()["error"]["code"]), (429, &json!("rate_limit_exceeded")), "{later:?}");
    assert!(remaining(&later) >= left, "{left} were left: {later:?}");
    // What cannot be read is refused with all that comes with it.
    let (long, field) = ("a ".repeat(4000), "prompt[1]");
    let unread = ask_all("/v1/completions", json!({"prompt": [TEXT, long], "max_tokens": 1})).await;
    assert_eq!((unread.status, &unread.json()["error"]["param"]), (400, &json!(field)), "{unread:?}");
    let many = vec![TEXT; 200];
    let texts = ask_all("/v1/embeddings", json!({"input": many})).await;
    assert_eq!((texts.status, &texts.json()["error"]["param"]), (400, &json!("tokens-per-minute")), "{texts:?}");
    assert!(remaining(&texts) >= left, "{left} were left: {texts:?}");
}

async fn few_at_a_time(requests_max: u64) -> PlainCluster {
    start(1, PredictorSource::Off, |config| config.client_limits.requests_max = Some(requests_max)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_has_so_many_requests_at_a_time() {
    // Would break: one client takes every place of the batch and of the queue, although its operator gave it two.
    let cluster = few_at_a_time(2).await;
    cluster.nodes[0].behave(Behaviour::Slow(Duration::from_millis(500)));
    let encode = |client: &'static str| {
        let client = Some(Client::of_key(client));
        cluster.coordinator.encode(EncodeParams { prompt: TEXT.into(), client, ..Default::default() })
    };
    // Two are let in, and are not answered before the others were refused.
    let mut asked: FuturesUnordered<_> = (0..6).map(|_| encode("many")).collect();
    let mut refused = Vec::new();
    while refused.len() < 4 {
        refused.push(asked.next().await.expect("six were asked").expect_err("two are there already"));
    }
    let other = async {
        cluster.nodes[0].behave(Behaviour::Works);
        encode("other").await
    };
    let (answered, other) = futures::future::join(asked.collect::<Vec<_>>(), other).await;
    assert!(answered.iter().all(Result::is_ok), "{answered:?}");
    other.expect("it has its own");
    for error in refused {
        assert!(matches!(error, RequestError::ClientLimit { limit: "requests-max", allowed: 2, .. }), "{error}");
        let fault = Fault::from(error);
        assert_eq!((fault.reason(), fault.retry_hint().is_some()), (Reason::ClientLimit, true));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_an_answer_may_ask_again_at_once() {
    // Would break: a client that sends one request after another is refused, since the one before is still counted.
    let cluster = few_at_a_time(1).await;
    let client = || Some(Client::of_key("one"));
    for _ in 0..20 {
        let params = GenerateParams { prompt: TEXT.into(), max_tokens: 2, client: client(), ..Default::default() };
        let mut answer = cluster.coordinator.generate(params).await.expect("let in");
        while let Some(token) = answer.next().await {
            if token.expect("a token").finish.is_some() {
                break;
            }
        }
        let encode = EncodeParams { prompt: TEXT.into(), client: client(), ..Default::default() };
        cluster.coordinator.encode(encode).await.expect("let in");
    }
}
