//! How a coordinator looks by gRPC: answers, statuses with their reasons, deadlines, health.

use std::{net::SocketAddr, time::Duration};

use sida_coordinator::{Listeners, PredictorSource, REQUEST_BYTES_MAX, serve};
use sida_proto::v1::{
    self, EncodeRequest, GenerateRequest, RoutingOptions, ScoreRequest, cluster_client::ClusterClient,
    inference_client::InferenceClient,
};
use sida_rpc::{Channel, ClientConfig, Reason, client::deadline_status, connect};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, codec::CompressionEncoding};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::plain_experts::{Behaviour, PlainCluster, start};

pub(crate) const TEXT: &str = "sst2 sentence: a gorgeous , witty , seductive movie .";

/// A coordinator that is asked by gRPC, or by HTTP.
pub(crate) struct Served {
    pub(crate) cluster: PlainCluster,
    pub(crate) channel: Channel,
    pub(crate) http: SocketAddr,
    shutdown: CancellationToken,
    server: JoinHandle<()>,
}

pub(crate) async fn served() -> Served {
    let cluster = start(2, PredictorSource::Off, |config| {
        config.server.health_period = Duration::from_millis(50);
        // How long a request waits for nodes that are gone.
        config.expert_call_timeout = Duration::from_secs(1);
    });
    let cluster = cluster.await;
    let listen = || TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)));
    let (grpc, http) = (listen().await.expect("a port"), listen().await.expect("a port"));
    let address = grpc.local_addr().expect("address").to_string();
    let http_address = http.local_addr().expect("address");
    let shutdown = CancellationToken::new();
    let listeners = Listeners { grpc, http: Some(http) };
    let serving = serve(cluster.coordinator.clone(), listeners, shutdown.clone());
    let server = tokio::spawn(async { serving.await.expect("served") });
    let channel = connect(&address, &ClientConfig::default()).await.expect("connected");
    Served { cluster, channel, http: http_address, shutdown, server }
}

async fn health(channel: &Channel, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.into() };
    let answer = HealthClient::new(channel.clone()).check(request).await.expect("known service");
    answer.into_inner().status()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers() {
    // Would break: a gRPC client gets another answer than a caller in this process, or half of it.
    let served = served().await;
    let mut client = InferenceClient::new(served.channel.clone());
    let request = GenerateRequest { text: TEXT.into(), max_tokens: 16, ..Default::default() };
    let mut stream = client.generate(request).await.expect("accepted").into_inner();
    let (mut tokens, mut last) = (0, None);
    while let Some(response) = stream.message().await.expect("token") {
        tokens += 1;
        last = Some(response);
    }
    let finish = last.and_then(|response| response.finish).expect("the last response says how it ended");
    assert_eq!((finish.generated_tokens, finish.reason()), (tokens, v1::FinishReason::End));
    let trace = finish.trace.expect("trace");
    assert!(trace.unpredicted && trace.layers.len() == 6 && trace.timings.expect("timings").total_us > 0);

    let request = EncodeRequest { text: TEXT.into(), pooling: v1::Pooling::None.into(), ..Default::default() };
    let encoding = client.encode(request).await.expect("encoded").into_inner();
    assert_eq!(encoding.states.len(), (encoding.rows * encoding.d_model * 4) as usize);
    let targets = vec!["positive".to_owned(), "negative".to_owned()];
    let request = ScoreRequest { text: TEXT.into(), targets, ..Default::default() };
    let scores = client.score(request).await.expect("scored").into_inner().scores;
    assert!(scores.len() == 2 && scores[0].log_likelihood > scores[1].log_likelihood);

    let model = client.model(v1::ModelRequest {}).await.expect("model").into_inner();
    assert_eq!((model.num_experts, model.moe_layers, model.encoder_moe_layers), (64, 6, 3));
    let status = ClusterClient::new(served.channel).status(v1::StatusRequest {}).await.expect("status").into_inner();
    assert_eq!((status.nodes.len(), status.requests_total), (2, 3));
    assert_eq!(status.nodes.iter().map(|node| node.experts_placed).sum::<u64>(), 6 * 64);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_says_how_it_was_routed() {
    // Would break: a client asks for a routing mode and is answered in another, or is not told that nothing was predicted.
    let served = served().await;
    let mut client = InferenceClient::new(served.channel.clone());
    for mode in [v1::RoutingMode::Exact, v1::RoutingMode::Guided, v1::RoutingMode::Hash] {
        let (text, routing) = (TEXT.to_owned(), Some(RoutingOptions { mode: mode.into(), ..Default::default() }));
        let request = EncodeRequest { text: text.clone(), routing, ..Default::default() };
        let encoded = client.encode(request).await.expect("encoded").into_inner().trace;
        let targets = vec!["positive".to_owned()];
        let request = ScoreRequest { text: text.clone(), targets, routing, ..Default::default() };
        let scored = client.score(request).await.expect("scored").into_inner().trace;
        let request = GenerateRequest { text, max_tokens: 1, routing, ..Default::default() };
        let mut stream = client.generate(request).await.expect("accepted").into_inner();
        let token = stream.message().await.expect("a token").expect("the only one");
        for trace in [encoded, scored, token.finish.expect("it is the last").trace] {
            let trace = trace.expect("a trace");
            assert_eq!((trace.mode(), trace.unpredicted, trace.rerouted), (mode, true, 0));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses() {
    // Would break: clients cannot tell what was wrong with a request, or retry what can never work.
    let served = served().await;
    let mut client = InferenceClient::new(served.channel.clone());
    let unknown = Some(RoutingOptions { mode: 99, ..Default::default() });
    let text = TEXT.to_owned();
    let cases = [
        (EncodeRequest::default(), Code::InvalidArgument, Reason::EmptyText),
        (EncodeRequest { text: "good ".repeat(600), ..Default::default() }, Code::InvalidArgument, Reason::TextTooLong),
        (
            EncodeRequest { text: text.clone(), routing: unknown, ..Default::default() },
            Code::InvalidArgument,
            Reason::InvalidRequest,
        ),
        (
            EncodeRequest { text: text.clone(), pooling: 7, ..Default::default() },
            Code::InvalidArgument,
            Reason::InvalidRequest,
        ),
    ];
    for (request, code, reason) in cases {
        let status = client.encode(request).await.expect_err("refused");
        assert_eq!((status.code(), Reason::of(&status)), (code, Some(reason)), "{status:?}");
    }
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::ShutsDown));
    let status = client.encode(EncodeRequest { text, ..Default::default() }).await.expect_err("no node works");
    assert_eq!((status.code(), Reason::of(&status)), (Code::Unavailable, Some(Reason::ExpertUnavailable)));
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_requests() {
    // Would break: clients that compress by default are refused, or a small message takes all memory.
    let served = served().await;
    let plain = InferenceClient::new(served.channel.clone());
    let mut gzip = plain.clone().send_compressed(CompressionEncoding::Gzip);
    let request = |text: String| EncodeRequest { text, ..Default::default() };
    let expected = plain.clone().encode(request(TEXT.into())).await.expect("encoded").into_inner().states;
    assert_eq!(gzip.encode(request(TEXT.into())).await.expect("encoded").into_inner().states, expected);
    let bomb = gzip.encode(request("a".repeat(REQUEST_BYTES_MAX + 1))).await.expect_err("refused");
    assert_eq!(bomb.code(), Code::ResourceExhausted, "{bomb}");
    assert!(bomb.message().contains(&REQUEST_BYTES_MAX.to_string()), "{bomb}");
    gzip.encode(request(TEXT.into())).await.expect("the connection lives on");
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines() {
    // Would break: a caller's deadline passes unnoticed, or is reported as something else.
    let served = served().await;
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Slow(Duration::from_millis(20))));
    let mut client = InferenceClient::new(served.channel.clone());
    let request = GenerateRequest { text: TEXT.into(), max_tokens: 500, min_tokens: Some(500), ..Default::default() };
    let mut request = Request::new(request);
    request.set_timeout(Duration::from_millis(300));
    let status = match client.generate(request).await {
        Err(status) => status,
        Ok(stream) => {
            let mut stream = stream.into_inner();
            loop {
                match stream.message().await {
                    Ok(response) => assert!(response.is_some(), "it ended without a status"),
                    Err(status) => break status,
                }
            }
        }
    };
    assert_eq!(deadline_status(status).code(), Code::DeadlineExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_however_they_end() {
    // Would break: alerts and dashboards miss what is refused before the service sees it, or take a missed deadline for a
    // caller who changed his mind.
    let metrics = sida_telemetry::metrics::install().expect("a recorder");
    let served = served().await;
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Slow(Duration::from_millis(20))));
    let mut client = InferenceClient::new(served.channel.clone());
    // The port is open before the server behind it runs; what has answered once exports its counts.
    client.model(v1::ModelRequest {}).await.expect("model");
    for (timeout, code) in [("40m", "DEADLINE_EXCEEDED"), ("soon", "INVALID_ARGUMENT")] {
        let count = || {
            let line = format!("sida_requests_total{{door=\"grpc\",method=\"Score\",code=\"{code}\"}} ");
            let text = metrics.render();
            text.lines()
                .find_map(|found| found.strip_prefix(&line)?.parse::<u64>().ok())
                .expect("exported from the start")
        };
        let before = count();
        let targets = vec!["positive".to_owned()];
        let mut request = Request::new(ScoreRequest { text: TEXT.into(), targets, ..Default::default() });
        request.metadata_mut().insert("grpc-timeout", timeout.parse().expect("ASCII"));
        client.score(request).await.expect_err("too little time");
        let counted = async {
            while count() == before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), counted)
            .await
            .unwrap_or_else(|_| panic!("{timeout} is not {code}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_an_expert_call_and_shutdown_drains() {
    // Would break: a coordinator without working experts gets traffic; a rollout cuts answers off.
    let served = served().await;
    let settle = Duration::from_millis(300);
    tokio::time::sleep(settle).await;
    assert_eq!(health(&served.channel, "sida.v1.Inference").await, ServingStatus::Serving);
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::ShutsDown));
    tokio::time::sleep(settle).await;
    assert_eq!(health(&served.channel, "sida.v1.Inference").await, ServingStatus::NotServing);
    served.cluster.nodes.iter().for_each(|node| node.behave(Behaviour::Slow(Duration::from_millis(2))));

    let mut client = InferenceClient::new(served.channel.clone());
    let request = GenerateRequest { text: TEXT.into(), min_tokens: Some(30), max_tokens: 30, ..Default::default() };
    let mut stream = client.generate(request).await.expect("accepted").into_inner();
    served.shutdown.cancel();
    let mut tokens = 0;
    while let Some(response) = stream.message().await.expect("it is answered to its end") {
        tokens += 1;
        assert_eq!(response.finish.is_some(), tokens == 30);
    }
    assert_eq!(tokens, 30);
    drop((stream, client, served.channel));
    tokio::time::timeout(Duration::from_secs(5), served.server).await.expect("it ended").expect("no panic");
}
