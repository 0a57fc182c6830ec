//! Requests that fail by a fault of ours: each leaves a line in the log, and a coordinator of which nothing else comes is
//! asked no more.

use std::{
    fmt::{Debug, Write},
    net::SocketAddr,
    sync::OnceLock,
    time::Duration,
};

use parking_lot::Mutex;
use sida_coordinator::{PredictorSource, serve};
use sida_proto::v1::{EncodeRequest, GenerateRequest, ScoreRequest, inference_client::InferenceClient};
use sida_rpc::{Channel, ClientConfig, connect};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};

use crate::plain_experts::{model_with, start};

const TEXT: &str = "sst2 sentence: a gorgeous , witty , seductive movie .";

/// What was logged at ERROR in this process, a line each.
static LINES: OnceLock<Mutex<Vec<String>>> = OnceLock::new();

/// Keeps error lines as `name=value name=value`.
struct Lines;

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, "{}={value:?} ", field.name()).expect("a string takes it");
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::ERROR
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        LINES.get_or_init(Mutex::default).lock().push(line.0);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// model.safetensors of the shard that holds a tensor, with not a number in all of it: all bits are set.
fn without_numbers(tensor: &str, mut shard: Vec<u8>) -> Vec<u8> {
    let header = u64::from_le_bytes(*shard.first_chunk().expect("a length")) as usize;
    let text = String::from_utf8(shard[8..8 + header].to_vec()).expect("JSON");
    let (_, entry) = text.split_once(&format!("\"{tensor}\"")).expect("the tensor is in this shard");
    let (_, offsets) = entry.split_once("\"data_offsets\":[").expect("offsets");
    let offsets = offsets.split_once(']').expect("their end").0.split(',');
    let offsets: Vec<usize> = offsets.map(|offset| 8 + header + offset.parse::<usize>().expect("a number")).collect();
    shard[offsets[0]..offsets[1]].fill(0xff);
    shard
}

async fn is_serving(channel: &Channel) -> bool {
    let request = HealthCheckRequest { service: "sida.v1.Inference".into() };
    let answer = HealthClient::new(channel.clone()).check(request).await.expect("known service");
    answer.into_inner().status() == ServingStatus::Serving
}

/// Waits until health says so.
async fn health_is(channel: &Channel, serving: bool) {
    let wait = async {
        while is_serving(channel).await != serving {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap_or_else(|_| panic!("never serving: {serving}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn they_are_logged_and_end_readiness() {
    // Would break: nobody can find out why a request failed with INTERNAL, or a coordinator that answers nobody keeps being
    // asked, or is never asked again.
    tracing::subscriber::set_global_default(Lines).expect("the only one of this process");
    let norm = "decoder.final_layer_norm.weight";
    let (_dir, checkpoint) = model_with("model-00002-of-00002.safetensors", |shard| without_numbers(norm, shard));
    let cluster = start(1, PredictorSource::Off, |config| {
        config.checkpoint = checkpoint;
        config.server.health_period = Duration::from_millis(20);
    })
    .await;
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a port");
    let address = listener.local_addr().expect("address").to_string();
    tokio::spawn(serve(cluster.coordinator.clone(), listener, CancellationToken::new()));
    let channel = connect(&address, &ClientConfig::default()).await.expect("connected");
    let mut client = InferenceClient::new(channel.clone());
    health_is(&channel, true).await;
    for number in 1..=3 {
        assert!(is_serving(&channel).await, "{number}");
        let mut request = Request::new(GenerateRequest { text: TEXT.into(), ..Default::default() });
        request.metadata_mut().insert("x-request-id", format!("generate-{number}").parse().expect("ASCII"));
        let mut stream = client.generate(request).await.expect("accepted").into_inner();
        let status = stream.message().await.expect_err("not a number");
        assert_eq!(status.code(), Code::Internal, "{status:?}");
    }
    health_is(&channel, false).await;
    let mut request = Request::new(ScoreRequest { text: TEXT.into(), targets: vec!["x".into()], ..Default::default() });
    request.metadata_mut().insert("x-request-id", "score-4".parse().expect("ASCII"));
    assert_eq!(client.score(request).await.expect_err("not a number").code(), Code::Internal);
    let lines = LINES.get().expect("lines").lock().clone();
    for id in ["generate-1", "generate-2", "generate-3", "score-4"] {
        let request_id = format!("request_id={id} ");
        let of_request: Vec<_> = lines.iter().filter(|line| line.contains(&request_id)).collect();
        assert!(of_request.len() == 1 && of_request[0].contains("not a number"), "{id}: {lines:?}");
    }
    // The encoder's weights are numbers, and an answer is an answer.
    client.encode(EncodeRequest { text: TEXT.into(), ..Default::default() }).await.expect("encoded");
    health_is(&channel, true).await;
}
