//! [`super::openai`] and [`super::load`] against a server that speaks as it is told to, by real connections.

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sida_coordinator::GenerateParams;
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};

use super::{
    answer::{Answer, Failure},
    load::{self, Load, Open, Pattern},
    openai::OpenAi,
    slo::Slo,
    url::BaseUrl,
    workload::Method,
};
use crate::api_key::ApiKey;

/// What the server does about a request.
#[derive(Clone)]
enum Script {
    /// A status with a body of JSON.
    Says(u16, String),
    /// A stream of such pieces.
    Streams(Vec<Piece>),
    /// Nothing, ever.
    Sleeps,
}

#[derive(Clone)]
enum Piece {
    Text(String),
    Wait(Duration),
    /// The connection ends here.
    Break,
}

/// What the server has seen.
#[derive(Default)]
struct Seen {
    connections: AtomicUsize,
    /// Path, `Authorization`, body.
    requests: Mutex<Vec<(String, String, Value)>>,
    came: Mutex<Vec<Instant>>,
}

struct Server {
    base: BaseUrl,
    seen: Arc<Seen>,
    /// As many requests as it works on at a time, and how long each takes it.
    work: Arc<(Semaphore, Duration)>,
}

impl Server {
    async fn start(script: Script) -> Self {
        Self::slow(script, 1000, Duration::ZERO).await
    }

    async fn slow(script: Script, at_a_time: usize, service: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}/v1", listener.local_addr().unwrap()).parse().unwrap();
        let server = Self { base, seen: Arc::default(), work: Arc::new((Semaphore::new(at_a_time), service)) };
        let (seen, work) = (server.seen.clone(), server.work.clone());
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                seen.connections.fetch_add(1, Ordering::Relaxed);
                let (seen, work, script) = (seen.clone(), work.clone(), script.clone());
                let serve = service_fn(move |request| respond(request, seen.clone(), work.clone(), script.clone()));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(connection), serve));
            }
        });
        server
    }

    async fn client(&self) -> OpenAi {
        OpenAi::open(&self.base, Some(ApiKey::from("sk-0123456789".to_owned())), None, Some("m")).await.unwrap()
    }

    async fn ask(&self, method: Method) -> Result<Answer, Failure> {
        let answer = self.client().await.ask(method, "hello", &GenerateParams::default()).await;
        timeout(Duration::from_secs(20), async { answer }).await.expect("it does not hang")
    }
}

async fn respond(
    request: Request<Incoming>,
    seen: Arc<Seen>,
    work: Arc<(Semaphore, Duration)>,
    script: Script,
) -> Result<Response<BoxBody<Bytes, std::io::Error>>, Infallible> {
    seen.came.lock().unwrap().push(Instant::now());
    let header = |name| request.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
    let (path, key) = (request.uri().path().to_owned(), header("authorization"));
    let body = request.into_body().collect().await.unwrap().to_bytes();
    seen.requests.lock().unwrap().push((path, key, serde_json::from_slice(&body).unwrap_or_default()));
    let turn = work.0.acquire().await.unwrap();
    sleep(work.1).await;
    drop(turn);
    let (status, kind, pieces) = match script {
        Script::Says(status, text) => (status, "application/json", vec![Piece::Text(text)]),
        Script::Streams(pieces) => (200, "text/event-stream; charset=utf-8", pieces),
        Script::Sleeps => std::future::pending().await,
    };
    let pieces = stream::iter(pieces).filter_map(|piece| async move {
        match piece {
            Piece::Text(text) => Some(Ok(Frame::data(Bytes::from(text)))),
            Piece::Break => Some(Err(std::io::Error::other("scripted"))),
            Piece::Wait(time) => {
                sleep(time).await;
                None
            }
        }
    });
    let status = StatusCode::from_u16(status).unwrap();
    Ok(Response::builder()
        .status(status)
        .header(CONTENT_TYPE, kind)
        .body(BoxBody::new(StreamBody::new(pieces)))
        .unwrap())
}

fn event(data: &str) -> Piece {
    Piece::Text(format!("data: {data}\n\n"))
}

fn token(text: &str) -> Piece {
    event(&json!({"choices": [{"text": text, "delta": {"content": text}, "finish_reason": null}]}).to_string())
}

/// Three tokens, the first after 40 ms, the others 20 ms apart, as servers end it.
fn answer() -> Vec<Piece> {
    let wait = |ms| Piece::Wait(Duration::from_millis(ms));
    vec![
        Piece::Text(": hello\n\n".into()),
        event(r#"{"choices": [{"delta": {"role": "assistant", "content": ""}}]}"#),
        wait(40),
        token("a"),
        wait(20),
        token("b"),
        wait(20),
        token("c"),
        event(r#"{"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]}"#),
        event(r#"{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}"#),
        event("[DONE]"),
    ]
}

/// Each endpoint is asked as OpenAI's clients ask it, and tokens are timed as they come, not when the answer is whole.
#[tokio::test]
async fn streams_are_timed_as_they_come() {
    // Broken: peers could not be measured, or every token would seem to come at the end.
    let server = Server::start(Script::Streams(answer())).await;
    for method in [Method::Generate, Method::Chat] {
        let start = Instant::now();
        let answer = server.ask(method).await.unwrap();
        let first = answer.pace.first.unwrap().duration_since(start);
        assert!(
            first >= Duration::from_millis(40)
                && answer.pace.last.unwrap().duration_since(start) >= first + Duration::from_millis(40)
        );
        assert_eq!((answer.tokens, answer.pace.gaps.len()), (3, 2));
        assert!(answer.pace.gaps.iter().all(|gap| *gap >= Duration::from_millis(10)), "{:?}", answer.pace.gaps);
    }
    let requests = server.seen.requests.lock().unwrap();
    let paths: Vec<&str> = requests.iter().map(|(path, _, _)| path.as_str()).collect();
    assert_eq!(paths, ["/v1/completions", "/v1/chat/completions"]);
    assert!(
        requests
            .iter()
            .all(|(_, key, body)| key == "Bearer sk-0123456789" && body["stream"] == true && body["model"] == "m")
    );
}

#[tokio::test]
async fn embeddings_are_asked_for() {
    // Broken: encoders could not be compared.
    let body = json!({"data": [{"embedding": [0.1, 0.2]}], "usage": {"prompt_tokens": 4}});
    let server = Server::start(Script::Says(200, body.to_string())).await;
    assert_eq!(server.ask(Method::Encode).await.unwrap().tokens, 4);
    let requests = server.seen.requests.lock().unwrap();
    assert_eq!((requests[0].0.as_str(), &requests[0].2["input"]), ("/v1/embeddings", &json!("hello")));
}

#[tokio::test]
async fn connections_are_used_again() {
    // Broken: each request would pay for a connection, which the callers of a service do not.
    let server = Server::start(Script::Streams(vec![token("a"), event("[DONE]")])).await;
    let client = server.client().await;
    for _ in 0..5 {
        client.ask(Method::Generate, "hello", &GenerateParams::default()).await.unwrap();
    }
    assert_eq!(server.seen.connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn the_first_model_is_asked_for_if_none_is_named() {
    // Broken: every peer would need its model's name, or a server that wants a key be blamed for a missing model.
    let open = |server: &Server| {
        let base = server.base.clone();
        async move { OpenAi::open(&base, None, None, None).await.map(drop).map_err(|error| error.to_string()) }
    };
    let models = json!({"data": [{"id": "first"}, {"id": "second"}]}).to_string();
    assert_eq!(open(&Server::start(Script::Says(200, models)).await).await, Ok(()));
    for (script, named) in [
        (Script::Says(401, r#"{"error": {"message": "no key"}}"#.into()), "401: no key"),
        (Script::Says(200, r#"{"data": []}"#.into()), "lists no model"),
        (Script::Says(200, "no JSON".into()), "malformed"),
    ] {
        let error = open(&Server::start(script).await).await.unwrap_err();
        assert!(error.contains(named) && error.contains("--model-name"), "{error}");
    }
    let nobody: BaseUrl = "http://127.0.0.1:1/v1".parse().unwrap();
    let error = OpenAi::open(&nobody, None, None, None).await.err().unwrap().to_string();
    assert!(error.starts_with("cannot connect to http://127.0.0.1:1/v1: "), "{error}");
}

/// Whatever a server does, the request ends with a code of its own.
#[tokio::test]
async fn failures_have_codes() {
    // Broken: a run against a broken server would hang, panic, or count half answers as quick ones.
    let begun = || vec![token("a"), Piece::Wait(Duration::from_millis(5))];
    let then = |piece: Piece| Script::Streams(begun().into_iter().chain([piece]).collect());
    let says =
        |status: u16| Script::Says(status, json!({"error": {"message": format!("status {status}")}}).to_string());
    let endless = vec![Piece::Text(format!(": {}\n", "x".repeat(1 << 20))); 70];
    for (script, code, named) in [
        (says(401), "401", "status 401"),
        (says(404), "404", "status 404"),
        (says(429), "429", "status 429"),
        (says(500), "500", "status 500"),
        (Script::Says(503, String::new()), "503", "Service Unavailable"),
        (Script::Says(307, String::new()), "307", "Temporary Redirect"),
        (Script::Says(200, "{}".into()), "malformed", "application/json"),
        (then(Piece::Break), "broken", "in the middle"),
        (Script::Streams(begun()), "cut off", "after 1 messages"),
        (Script::Streams(vec![]), "cut off", "after 0 messages"),
        (then(event("{\"choices\":")), "malformed", "no JSON"),
        (then(Piece::Text("no event\n\n".into())), "malformed", "server-sent"),
        (then(event(r#"{"error": {"message": "out of memory"}}"#)), "error in stream", "out of memory"),
        (Script::Streams(endless), "too long", "67108864"),
    ] {
        let failure = Server::start(script).await.ask(Method::Generate).await.unwrap_err();
        assert!(failure.code == code && failure.message.contains(named), "{code}: {failure:?}");
    }
    for (body, code) in [("no JSON", "malformed"), ("{}", "malformed")] {
        let failure = Server::start(Script::Says(200, body.into())).await.ask(Method::Encode).await.unwrap_err();
        assert_eq!(failure.code, code);
    }
}

#[tokio::test]
async fn nobody_there_is_told() {
    // Broken: a wrong port would look like a slow server.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base: BaseUrl = format!("http://{}/v1", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    let client = OpenAi::open(&base, None, None, Some("m")).await.unwrap();
    let failure = client.ask(Method::Generate, "hello", &GenerateParams::default()).await.unwrap_err();
    assert!(failure.code == "connect" && failure.message.contains("refused"), "{failure:?}");
}

#[tokio::test]
async fn a_key_that_a_server_repeats_is_hidden() {
    // Broken: a report that is passed on would hold a key.
    let said = json!({"error": {"message": "sk-0123456789 is no key"}}).to_string();
    let in_stream = Script::Streams(vec![event(&said)]);
    for script in [Script::Says(401, said), in_stream] {
        let failure = Server::start(script).await.ask(Method::Generate).await.unwrap_err();
        assert_eq!(failure.message, "[the API key] is no key");
    }
}

fn open_loop(count: u32, gap: Duration, limit: Duration) -> Load {
    let open = Open {
        times: (0..count).map(|number| number * gap).collect(),
        counts_from: Duration::ZERO,
        under_way_max: 1000,
    };
    Load { pattern: Pattern::Open(open), timeout: limit, slo: Slo::default() }
}

fn request_of(
    client: OpenAi,
) -> Arc<impl Fn(usize, u64) -> futures::future::BoxFuture<'static, Result<Answer, Failure>>> {
    let client = Arc::new(client);
    Arc::new(move |_, _| {
        let client = client.clone();
        Box::pin(async move { client.ask(Method::Generate, "hello", &GenerateParams::default()).await }) as _
    })
}

#[tokio::test]
async fn a_server_that_never_answers_is_given_up() {
    // Broken: one request that a server forgets would keep the command for ever.
    let server = Server::start(Script::Sleeps).await;
    let load = open_loop(3, Duration::from_millis(1), Duration::from_millis(50));
    let (samples, _) = load::run(&load, 0, request_of(server.client().await), |_, _, _| {}).await;
    assert_eq!((samples.requests, samples.failures["timeout"].count), (0, 3));
}

/// Ten times what the server can do: it is asked on time all the same, and the wait in its queue is in the figures.
#[tokio::test]
async fn a_server_at_ten_times_its_capacity_is_asked_on_time() {
    // Broken: connections, or what waits for them, would hold requests back, and a server be measured under less than was asked.
    let (count, service) = (40, Duration::from_millis(50));
    let server = Server::slow(Script::Streams(vec![token("a"), event("[DONE]")]), 1, service).await;
    let load = open_loop(count, service / 10, Duration::from_secs(20));
    let start = Instant::now();
    let (samples, _) = load::run(&load, 0, request_of(server.client().await), |_, _, _| {}).await;
    let last = server.seen.came.lock().unwrap().iter().max().unwrap().duration_since(start);
    // The last is due after 195 ms; a server that were waited for would see it after 1,950. Between them is room for a machine
    // that stands still meanwhile.
    assert!(last < Duration::from_millis(1500), "{last:?}");
    let e2e = samples.e2e.percentiles().unwrap();
    assert_eq!((samples.requests, samples.failed_requests()), (u64::from(count), 0));
    assert!(e2e.max > 0.8 * f64::from(count) * 50.0 && e2e.min < 1000.0, "{e2e:?}");
}
