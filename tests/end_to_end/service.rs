//! What a platform asks of a service: health, reflection, deadlines, an orderly end.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sida_proto::v1::inference_client::InferenceClient;
use sida_rpc::{Reason, client::deadline_status};
use sida_tests::{
    Sandbox, SandboxConfig,
    binary::{command, repository},
};
use tokio_stream::StreamExt;
use tonic::{Code, Request};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::client::{generate, greedy};

const TEXT: &str = "sst2 sentence: a small film with a large heart .";

/// A load balancer would send requests to a coordinator whose expert-nodes are gone.
#[tokio::test(flavor = "multi_thread")]
async fn health_is_that_of_the_experts() {
    let mut sandbox = Sandbox::start(SandboxConfig::default()).await;
    assert_eq!(sandbox.health("sida.v1.Inference").await.expect("a state"), ServingStatus::Serving);
    assert_eq!(sandbox.health("no.such.Service").await.expect_err("no state").code(), Code::NotFound);
    sandbox.take("expert-node-0").kill();
    sandbox.take("expert-node-1").kill();
    let limit = Instant::now() + Duration::from_secs(30);
    while sandbox.health("").await.expect("a state") == ServingStatus::Serving {
        assert!(Instant::now() < limit, "the coordinator still says that it serves");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// grpcurl and its like could not call the service without its .proto files.
#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_the_services() {
    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    let ask = |message| ServerReflectionRequest { host: String::new(), message_request: Some(message) };
    let asked = tokio_stream::iter([
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol("sida.v1.GenerateRequest".into())),
    ]);
    let mut client = ServerReflectionClient::new(sandbox.channel());
    let mut answers = client.server_reflection_info(asked).await.expect("a stream").into_inner();
    let mut next = async || answers.next().await.expect("an answer").expect("no error").message_response;
    let Some(MessageResponse::ListServicesResponse(services)) = next().await else { panic!("no list of services") };
    let names: Vec<_> = services.service.iter().map(|service| service.name.as_str()).collect();
    for expected in ["sida.v1.Inference", "sida.v1.Cluster", "grpc.health.v1.Health"] {
        assert!(names.contains(&expected), "{names:?}");
    }
    let Some(MessageResponse::FileDescriptorResponse(files)) = next().await else { panic!("no file") };
    assert!(!files.file_descriptor_proto.is_empty());
}

/// A caller that can wait no longer would not be told, or would be told that it cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn deadlines_end_requests() {
    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    let mut endless = greedy(TEXT, 1024);
    endless.ignore_eos = true;
    let started = Instant::now();
    let mut request = Request::new(endless);
    request.set_timeout(Duration::from_millis(40));
    let asked = InferenceClient::new(sandbox.channel()).generate(request).await;
    let ended = match asked {
        Err(status) => status,
        Ok(answer) => {
            let mut stream = answer.into_inner();
            loop {
                match stream.next().await {
                    Some(Ok(token)) => assert!(token.finish.is_none(), "1,024 tokens within 40 ms"),
                    Some(Err(status)) => break status,
                    None => panic!("the stream ended without an error"),
                }
            }
        }
    };
    assert_eq!(deadline_status(ended).code(), Code::DeadlineExceeded);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    generate(&sandbox.channel(), greedy(TEXT, 4)).await.expect("the next request is answered");
}

/// A rolling update would cut answers short.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains() {
    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    let mut long = greedy(TEXT, 400);
    long.ignore_eos = true;
    let mut stream = InferenceClient::new(sandbox.channel()).generate(long).await.expect("a stream").into_inner();
    stream.next().await.expect("a token").expect("no error");
    let channel = sandbox.channel();
    let ended = tokio::task::spawn_blocking(move || sandbox.terminate());
    let mut tokens = 1;
    while let Some(token) = stream.next().await {
        token.expect("the answer goes on to its end");
        tokens += 1;
    }
    assert_eq!(tokens, 400);
    assert!(ended.await.expect("no panic").success());
    let refused = generate(&channel, greedy(TEXT, 4)).await.err().expect("nobody is there any more");
    assert_eq!(refused.code(), Code::Unavailable, "{:?}", Reason::of(&refused));
}

/// A cluster that nobody asks for a minute would lose its lanes: streams that are silent are no requests that are late.
#[tokio::test(flavor = "multi_thread")]
async fn idle_lanes_stay() {
    let limit = Duration::from_secs(2);
    let flags = vec![format!("--stall-timeout={}s", limit.as_secs())];
    let sandbox = Sandbox::start(SandboxConfig { flags, ..SandboxConfig::default() }).await;
    for _ in 0..2 {
        generate(&sandbox.channel(), greedy(TEXT, 4)).await.expect("an answer");
        tokio::time::sleep(2 * limit).await;
    }
    let log = sandbox.process("coordinator-0").log();
    assert!(!log.contains("lost the lane"), "{log}");
}

/// The load generator would measure another thing than a coordinator serves, or lose what it measured.
#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_is_measured_under_an_open_loop() {
    let sandbox = Sandbox::start(SandboxConfig::default()).await;
    let page = tempfile::NamedTempFile::new().expect("a file");
    let mut command = command();
    command.current_dir(repository()).args(["bench", "--endpoint", sandbox.address(), "--json"]);
    command.args(["--rate", "100", "--requests", "30", "--warmup", "10", "--max-tokens", "4", "--ignore-eos"]);
    command.args(["--slo", "ttft=10s,e2e=20s", "--report"]).arg(page.path());
    let output = tokio::task::spawn_blocking(move || command.output().expect("sida runs")).await.expect("it ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&report["requests"], &report["failures"], &report["good_share"]),
        (&json!(20), &json!({}), &json!(1.0))
    );
    let samples = report["samples"].as_array().expect("samples");
    assert!(samples.iter().all(|sample| sample["tokens"] == 4 && sample["ttft_ms"].is_number()), "{samples:?}");
    assert!(report["ttft_ms"]["p50"].as_f64() <= report["e2e_ms"]["p50"].as_f64(), "{report}");
    assert!(report["budget"]["experts"].as_u64() > Some(0), "{report}");
    let html = std::fs::read_to_string(page.path()).expect("a page");
    assert!(html.contains("</svg>") && html.contains(sandbox.address()));
}
