//! Who asks: clients known by their keys at the door and in the metrics, and the turns that they take.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use futures::future::{join, join_all};
use parking_lot::Mutex;
use sida_coordinator::{CoordinatorConfig, EncodeParams, Encoding, PredictorSource, RequestError, serve};
use sida_proto::v1::{self, EncodeRequest, cluster_client::ClusterClient, inference_client::InferenceClient};
use sida_rpc::{Client, ClientConfig, Gate, KeyFile, OwnKey, Reason, connect};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::plain_experts::{Behaviour, PlainCluster, start};

const TEXT: &str = "sst2 sentence: a gorgeous , witty , seductive movie .";
const KEY: &str = "0123456789abcdef-alice";

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_needs_a_key_and_is_counted_by_its_name() {
    // Would break: a coordinator with keys answers everybody, tells strangers of its cluster, or does not say who used it.
    let metrics = sida_telemetry::metrics::install().expect("a recorder");
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("keys");
    fs::write(&file, format!("alice:{KEY}\n")).expect("written");
    let gate = Gate::open(KeyFile::Clients(file)).expect("keys");
    let cluster = start(1, PredictorSource::Off, |config| config.server.gate = gate).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("address").to_string();
    let shutdown = CancellationToken::new();
    let server = tokio::spawn(serve(cluster.coordinator.clone(), listener, shutdown.clone()));
    let channel = async |key: Option<&str>| {
        let key = key.map(|key| OwnKey::Text(key.to_owned()));
        connect(&address, &ClientConfig { key, ..ClientConfig::default() }).await.expect("connected")
    };
    let request = || EncodeRequest { text: TEXT.into(), ..Default::default() };
    let alice = channel(Some(KEY)).await;
    InferenceClient::new(alice.clone()).encode(request()).await.expect("answered");
    ClusterClient::new(alice).status(v1::StatusRequest {}).await.expect("answered");
    for key in [None, Some("0123456789abcdef-bob")] {
        let stranger = channel(key).await;
        let asked = InferenceClient::new(stranger.clone()).encode(request()).await.expect_err("refused");
        let model = InferenceClient::new(stranger.clone()).model(v1::ModelRequest {}).await.expect_err("refused");
        let status = ClusterClient::new(stranger).status(v1::StatusRequest {}).await.expect_err("refused");
        for refused in [asked, model, status] {
            let found = (refused.code(), Reason::of(&refused));
            assert_eq!(found, (Code::Unauthenticated, Some(Reason::Unauthenticated)), "{refused}");
        }
    }
    let counted = |line: &str| metrics.render().lines().any(|found| found.starts_with(line));
    let told = async {
        while !counted("sida_client_requests_total{client=\"alice\",code=\"OK\"} 1") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), told).await.expect("counted by its name");
    assert!(counted("sida_client_requests_total{client=\"\",code=\"UNAUTHENTICATED\"} "));
    assert!(!metrics.render().contains(KEY));
    shutdown.cancel();
    server.await.expect("no panic").expect("served");
}

/// A coordinator that computes one request of `TEXT` at a time, so slowly that all others wait until
/// [`PlainExperts::behave`] is told something else.
///
/// [`PlainExperts::behave`]: crate::plain_experts::PlainExperts::behave
async fn one_at_a_time(configure: impl FnOnce(&mut CoordinatorConfig)) -> PlainCluster {
    let cluster = start(1, PredictorSource::Off, |config| {
        config.limits.tokens_max = 20;
        configure(config);
    })
    .await;
    cluster.nodes[0].behave(Behaviour::Slow(Duration::from_millis(500)));
    cluster
}

/// How so many requests of a client ended, all sent at once; `order` is told of each as it is answered.
async fn ask(
    cluster: &PlainCluster,
    client: &'static str,
    requests: usize,
    order: &Mutex<Vec<&'static str>>,
) -> Vec<Result<Encoding, RequestError>> {
    let request = |_| async {
        let client_name = Some(Client::of_key(client));
        let params = EncodeParams { prompt: TEXT.into(), client: client_name, ..Default::default() };
        let answer = cluster.coordinator.encode(params).await;
        order.lock().push(client);
        answer
    };
    join_all((0..requests).map(request)).await
}

/// Waits until so many requests do.
async fn until_queued(cluster: &PlainCluster, requests: u64) {
    let queued = async {
        while cluster.coordinator.status().await.requests_queued < requests {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), queued).await.expect("they wait");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_floods_delays_others_little() {
    // Would break: one client's batch job makes everybody wait until it is done.
    let cluster = one_at_a_time(|_| ()).await;
    let order = Mutex::new(Vec::new());
    let flood = ask(&cluster, "flood", 40, &order);
    let others = async {
        until_queued(&cluster, 35).await;
        let others = ask(&cluster, "other", 2, &order);
        let release = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            cluster.nodes[0].behave(Behaviour::Slow(Duration::from_millis(5)));
        };
        join(others, release).await.0
    };
    let (flood, others) = join(flood, others).await;
    assert!(flood.iter().chain(&others).all(Result::is_ok), "all are answered");
    // Those that were prepared or running already, and one for each of the other's.
    let before = order.lock().iter().rposition(|client| *client == "other").expect("it was answered");
    assert!(before <= 12, "{before} requests were answered before the second one of the other");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_has_room_for_another_client() {
    // Would break: whoever fills the queue first keeps everybody else out.
    let cluster = one_at_a_time(|config| config.limits.queue_max = 8).await;
    let order = Mutex::new(Vec::new());
    // Some leave the queue to be prepared: who is refused asks again until it is full.
    let full = AtomicBool::new(false);
    let ask_until_full = async || {
        loop {
            let answer = ask(&cluster, "flood", 1, &order).await.remove(0);
            if !matches!(answer, Err(RequestError::QueueFull { .. })) || full.load(Ordering::Relaxed) {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let flood = join_all((0..30).map(|_| ask_until_full()));
    let others = async {
        until_queued(&cluster, 8).await;
        full.store(true, Ordering::Relaxed);
        let release = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            cluster.nodes[0].behave(Behaviour::Works);
        };
        join(ask(&cluster, "other", 4, &order), release).await.0
    };
    let (flood, others) = join(flood, others).await;
    assert!(others.iter().all(Result::is_ok), "it had no more than its share: {others:?}");
    let mut displaced = 0;
    for error in flood.into_iter().filter_map(Result::err) {
        let retry_after = match error {
            RequestError::QueueFull { retry_after, limit: 8 } => retry_after,
            RequestError::ClientShare { retry_after, .. } => {
                displaced += 1;
                retry_after
            }
            error => panic!("{error}"),
        };
        assert!(retry_after >= Duration::from_millis(100) && retry_after <= Duration::from_secs(60));
    }
    assert!(displaced > 0, "somebody made room");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_in_time_is_told_at_once() {
    // Would break: a request waits until its deadline for an answer that nobody had time for; or an idle node refuses.
    let cluster = one_at_a_time(|_| ()).await;
    cluster.nodes[0].behave(Behaviour::Slow(Duration::from_millis(30)));
    let encode = async |left| {
        let deadline = Some(Instant::now() + left);
        let client = Some(Client::of_key("flood"));
        cluster.coordinator.encode(EncodeParams { prompt: TEXT.into(), deadline, client, ..Default::default() }).await
    };
    encode(Duration::from_secs(20)).await.expect("nobody is before it");
    let order = Mutex::new(Vec::new());
    let flood = ask(&cluster, "flood", 60, &order);
    let late = async {
        // Until it was measured how fast requests leave: then some 50 wait, each for 90 ms and more.
        while order.lock().len() < 5 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let start = Instant::now();
        let error = encode(Duration::from_secs(1)).await.expect_err("it cannot be in time");
        assert!(matches!(error, RequestError::NoTime { time, left, .. } if time > left), "{error}");
        assert!(start.elapsed() < Duration::from_millis(900), "not at the deadline: {:?}", start.elapsed());
        cluster.nodes[0].behave(Behaviour::Works);
        encode(Duration::from_secs(60)).await.expect("in time");
    };
    let (flood, ()) = join(flood, late).await;
    assert!(flood.iter().all(Result::is_ok));
    encode(Duration::from_secs(20)).await.expect("what was measured refuses nobody who is alone");
}
