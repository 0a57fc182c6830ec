//! Who asks: clients known by their keys, at the door and in the metrics.

use std::{fs, time::Duration};

use sida_coordinator::{PredictorSource, serve};
use sida_proto::v1::{self, EncodeRequest, cluster_client::ClusterClient, inference_client::InferenceClient};
use sida_rpc::{ClientConfig, Gate, KeyFile, OwnKey, Reason, connect};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::plain_experts::start;

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
