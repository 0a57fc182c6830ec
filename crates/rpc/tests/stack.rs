//! The server stack over real sockets: names, deadlines, limits, health, reflection and the end of a node.

mod echo;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use echo::{Running, count, unary, with_header};
use futures::StreamExt;
use sida_rpc::{MESSAGE_BYTES_MAX, METADATA_BYTES_MAX, Readiness, Reason, ServerConfig};
use tonic::{Code, Request};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_check_response, health_client::HealthClient},
};
use tonic_reflection::pb::{v1, v1alpha};

fn plain() -> ServerConfig {
    ServerConfig { health_period: Duration::from_millis(20), ..ServerConfig::default() }
}

#[tokio::test]
async fn requests_have_names() {
    // Broken: an error report could not be matched with the logs of three nodes.
    let running = Running::start(plain(), |server| server).await;
    let channel = running.channel().await;
    let answer = unary(&channel, with_header("who", "x-request-id", "abc-1")).await.unwrap();
    assert_eq!(answer.metadata().get("x-request-id").unwrap(), "abc-1");
    assert!(answer.get_ref().starts_with(b"abc-1 None"));
    let failed = unary(&channel, with_header("fail", "x-request-id", "abc-2")).await.unwrap_err();
    assert_eq!(failed.metadata().get("x-request-id").unwrap(), "abc-2");
    let made = unary(&channel, Request::new(b"x".to_vec())).await.unwrap();
    assert_eq!(made.metadata().get("x-request-id").unwrap().len(), 36);
    running.stop().await;
}

#[tokio::test]
async fn an_expired_call_is_deadline_exceeded_and_its_handler_is_dropped() {
    // Broken: clients would see CANCELLED, which many do not retry or report as their own doing, and the node
    // would go on working for nobody. Many calls at once, since tonic's own timer in the server races with
    // ours; and by bare HTTP/2, since a tonic client would start a timer as well.
    let mut running = Running::start(plain(), |server| server).await;
    let stream = tokio::net::TcpStream::connect(&running.address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let start = Instant::now();
    let mut calls = Vec::new();
    for _ in 0..200 {
        client = client.ready().await.unwrap();
        let request = http::Request::post("http://node/test.Echo/Unary")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-timeout", "50m");
        let (response, mut body) = client.send_request(request.body(()).unwrap(), false).unwrap();
        // A gRPC frame with the protobuf of a bytes field: "sleep 60000".
        body.send_data(b"\0\0\0\0\x0d\x0a\x0bsleep 60000"[..].into(), true).unwrap();
        calls.push(response);
    }
    for call in calls {
        let status = tonic::Status::from_header_map(call.await.unwrap().headers()).unwrap();
        assert_eq!((status.code(), Reason::of(&status)), (Code::DeadlineExceeded, Some(Reason::DeadlineExceeded)));
    }
    assert!(start.elapsed() >= Duration::from_millis(50) && start.elapsed() < Duration::from_secs(5));
    for _ in 0..200 {
        assert_eq!(running.dropped.recv().await, Some("unary"));
    }
    running.stop().await;
}

#[tokio::test]
async fn handlers_see_the_deadline_and_a_malformed_one_is_refused() {
    // Broken: expert calls would outlive their request; a caller with a typo would wait for ever.
    let running = Running::start(plain(), |server| server).await;
    let channel = running.channel().await;
    let answer = unary(&channel, with_header("who", "grpc-timeout", "30S")).await.unwrap().into_inner();
    assert!(String::from_utf8(answer).unwrap().contains(" Some(29."));
    let malformed = unary(&channel, with_header("who", "grpc-timeout", "5s")).await.unwrap_err();
    assert_eq!(Reason::of(&malformed), Some(Reason::MalformedDeadline));
    running.stop().await;
}

#[tokio::test]
async fn a_stream_ends_at_its_deadline() {
    // Broken: `Generate` would go on past its deadline, since tonic minds it only up to the headers.
    let mut running = Running::start(plain(), |server| server).await;
    let channel = running.channel().await;
    let mut numbers = count(&channel, with_header("", "grpc-timeout", "200m")).await;
    let status = loop {
        if let Err(status) = numbers.next().await.expect("a status ends it") {
            break status;
        }
    };
    assert_eq!(Reason::of(&status), Some(Reason::DeadlineExceeded));
    assert_eq!(running.dropped.recv().await, Some("stream"));
    running.stop().await;
}

#[tokio::test]
async fn large_messages_pass_and_larger_ones_are_refused() {
    // Broken: a batch's activations would be refused at tonic's 4 MiB, or anything would be taken.
    let running = Running::start(plain(), |server| server).await;
    let channel = running.channel().await;
    let large = vec![7; 32 << 20];
    assert_eq!(unary(&channel, Request::new(large.clone())).await.unwrap().into_inner(), large);
    let refused = unary(&channel, Request::new(vec![7; MESSAGE_BYTES_MAX + 1])).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    assert!(unary(&channel, Request::new(b"still here".to_vec())).await.is_ok());
    running.stop().await;
}

#[tokio::test]
async fn health_follows_the_check() {
    // Broken: traffic would be sent to a node that cannot serve it.
    let (well, readiness) = (Arc::new(AtomicBool::new(true)), Readiness::default());
    let seen = well.clone();
    let check = move || {
        let well = seen.load(Ordering::Relaxed);
        async move { if well { Ok(()) } else { Err("unwell".to_owned()) } }
    };
    let config = ServerConfig { readiness: readiness.clone(), ..plain() };
    let running = Running::start(config, |server| server.check("test.Echo", check)).await;
    let mut client = HealthClient::new(running.channel().await);
    let request = |service: &str| HealthCheckRequest { service: service.into() };
    let mut node = client.watch(request("")).await.unwrap().into_inner();
    let mut echo = client.watch(request("test.Echo")).await.unwrap().into_inner();
    for serving in [ServingStatus::Serving, ServingStatus::NotServing, ServingStatus::Serving] {
        well.store(serving == ServingStatus::Serving, Ordering::Relaxed);
        for watch in [&mut node, &mut echo] {
            while watch.next().await.unwrap().unwrap().status != serving as i32 {}
        }
    }
    assert!(client.check(request("test.Unknown")).await.is_err_and(|status| status.code() == Code::NotFound));
    let mut unknown = client.watch(request("test.Unknown")).await.expect("a watch may come before its service");
    let first = unknown.get_mut().next().await.unwrap().unwrap();
    assert_eq!(first.status(), health_check_response::ServingStatus::ServiceUnknown);
    let more = tokio::time::timeout(Duration::from_millis(50), unknown.get_mut().next()).await;
    assert!(more.is_err(), "the stream stays: {more:?}");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(readiness.is_ready());
    let start = Instant::now();
    running.shutdown.cancel();
    for mut watch in [node, echo] {
        assert_eq!(watch.next().await.unwrap().unwrap().status, ServingStatus::NotServing as i32);
        assert!(watch.next().await.unwrap().is_err(), "the watch ends with the node");
    }
    assert!(!readiness.is_ready());
    running.stop().await;
    assert!(start.elapsed() < Duration::from_secs(5), "a watcher holds up the end of the node");
}

#[tokio::test]
async fn liveness_is_not_readiness() {
    // Broken: a node that waits for others would be started again and again, or one whose engine is dead never.
    const SERVING: i32 = ServingStatus::Serving as i32;
    const NOT_SERVING: i32 = ServingStatus::NotServing as i32;
    let readiness = Readiness::default();
    let config = ServerConfig { readiness: readiness.clone(), ..plain() };
    let works = Arc::new(AtomicBool::new(true));
    let is_alive = works.clone();
    let assemble = move |server: sida_rpc::Server| {
        let server = server.check("test.Echo", || async { Err("etcd and every other node are away".to_owned()) });
        server.alive(move || is_alive.load(Ordering::Relaxed))
    };
    let running = Running::start(config, assemble).await;
    let mut health = HealthClient::new(running.channel().await);
    let mut status = async |service: &str| {
        let request = HealthCheckRequest { service: service.to_owned() };
        health.check(request).await.unwrap().into_inner().status
    };
    assert_eq!((status("").await, status("liveness").await), (NOT_SERVING, SERVING));
    assert!(readiness.is_alive() && !readiness.is_ready());
    works.store(false, Ordering::Relaxed);
    let started = Instant::now();
    while status("liveness").await == SERVING {
        assert!(started.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!readiness.is_alive());
    running.stop().await;
}

#[tokio::test]
async fn a_check_that_hangs_is_a_check_that_fails() {
    // Broken: a node whose expert call never returns would stay SERVING.
    let config = plain();
    let running =
        Running::start(config, |server| server.check("test.Echo", std::future::pending::<Result<(), String>>)).await;
    let mut client = HealthClient::new(running.channel().await);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let answer = client.check(HealthCheckRequest { service: "test.Echo".into() }).await.unwrap().into_inner();
    assert_eq!(answer.status, ServingStatus::NotServing as i32);
    running.stop().await;
}

#[tokio::test]
async fn both_reflections_list_what_the_node_serves() {
    // Broken: grpcurl and older tools could not call a node without our proto files, or would be shown services that
    // only other roles have.
    let running = Running::start(plain(), |server| server.check("test.Echo", || async { Ok(()) })).await;
    let channel = running.channel().await;
    let reflection = ["v1.ServerReflection", "v1alpha.ServerReflection"].map(|name| format!("grpc.reflection.{name}"));
    let mut expected = vec!["grpc.health.v1.Health".to_owned(), "test.Echo".to_owned()];
    expected.extend(reflection);
    expected.sort();

    let request = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut answers = client.server_reflection_info(futures::stream::iter([request])).await.unwrap().into_inner();
    match answers.next().await.unwrap().unwrap().message_response {
        Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) => {
            let mut names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
            names.sort();
            assert_eq!(names, expected);
        }
        other => panic!("{other:?}"),
    }

    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers = client.server_reflection_info(futures::stream::iter([request])).await.unwrap().into_inner();
    match answers.next().await.unwrap().unwrap().message_response {
        Some(v1alpha::server_reflection_response::MessageResponse::ListServicesResponse(list)) => {
            let mut names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
            names.sort();
            assert_eq!(names, expected);
        }
        other => panic!("{other:?}"),
    }
    running.stop().await;
}

#[tokio::test]
async fn too_much_metadata_is_refused_by_a_status() {
    // Broken: a client would see UNKNOWN, or lose its connection and all other calls on it.
    let running = Running::start(plain(), |server| server).await;
    let channel = running.channel().await;
    let with_metadata = |bytes: usize| {
        let mut request = Request::new(b"x".to_vec());
        request.metadata_mut().insert("x-long", "m".repeat(bytes).parse().unwrap());
        request
    };
    assert!(unary(&channel, with_metadata(METADATA_BYTES_MAX - 1024)).await.is_ok());
    for bytes in [METADATA_BYTES_MAX, 60 << 10] {
        let refused = unary(&channel, with_metadata(bytes)).await.unwrap_err();
        assert_eq!((refused.code(), Reason::of(&refused)), (Code::ResourceExhausted, Some(Reason::MetadataTooLarge)));
        assert!(refused.message().contains("at most 16384"), "{refused}");
    }
    assert!(unary(&channel, Request::new(b"still here".to_vec())).await.is_ok());
    running.stop().await;
}

#[tokio::test]
async fn calls_in_flight_finish_and_new_ones_are_refused() {
    // Broken: a rolling update would fail requests.
    let running = Running::start(plain(), |server| server).await;
    let channel = running.channel().await;
    let in_flight = {
        let channel = channel.clone();
        tokio::spawn(async move { unary(&channel, Request::new(b"sleep 500".to_vec())).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (address, start) = (running.address.clone(), Instant::now());
    running.stop().await;
    assert!(start.elapsed() >= Duration::from_millis(300) && start.elapsed() < Duration::from_secs(3));
    assert!(in_flight.await.unwrap().is_ok());
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
    assert_eq!(unary(&channel, Request::new(b"x".to_vec())).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn what_outlives_the_drain_is_told_to_go_elsewhere() {
    // Broken: one endless stream would keep a node from ending, or break without a status.
    let config = ServerConfig { drain_limit: Duration::from_millis(200), ..plain() };
    let mut running = Running::start(config, |server| server).await;
    let channel = running.channel().await;
    let mut numbers = count(&channel, Request::new(Vec::new())).await;
    let slow = {
        let channel = channel.clone();
        tokio::spawn(async move { unary(&channel, Request::new(b"sleep 60000".to_vec())).await })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    running.shutdown.cancel();
    let status = loop {
        if let Err(status) = numbers.next().await.expect("a status ends it") {
            break status;
        }
    };
    assert_eq!(Reason::of(&status), Some(Reason::ShuttingDown), "{status}");
    assert_eq!(Reason::of(&slow.await.unwrap().unwrap_err()), Some(Reason::ShuttingDown));
    assert!(running.dropped.recv().await.is_some() && running.dropped.recv().await.is_some());
    running.stop().await;
}

#[tokio::test]
async fn a_client_timer_is_a_deadline_too() {
    // Broken: the same missed deadline would have two codes, depending on whose timer was first.
    let running = Running::start(plain(), |server| server).await;
    let channel = running.channel().await;
    let mut request = Request::new(b"sleep 60000".to_vec());
    request.set_timeout(Duration::from_millis(30));
    let status = sida_rpc::client::deadline_status(unary(&channel, request).await.unwrap_err());
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let other = sida_rpc::client::deadline_status(tonic::Status::cancelled("by a person"));
    assert_eq!(other.code(), Code::Cancelled);
    running.stop().await;
}

/// One call by bare HTTP/2, since a client of gRPC would mind its own timer and make whole messages.
async fn bare(address: &str, timeout: Option<&str>, body: &'static [u8], is_whole: bool) -> tonic::Status {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut request = http::Request::post("http://node/test.Echo/Unary")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    if let Some(timeout) = timeout {
        request = request.header("grpc-timeout", timeout);
    }
    let (response, mut sending) = client.ready().await.unwrap().send_request(request.body(()).unwrap(), false).unwrap();
    sending.send_data(body.into(), is_whole).unwrap();
    tonic::Status::from_header_map(response.await.unwrap().headers()).unwrap()
}

#[tokio::test]
async fn a_message_that_cannot_be_read_is_its_callers_mistake() {
    // Broken: a caller's bug would look like one of ours, and wake somebody at night.
    let running = Running::start(plain(), |server| server).await;
    for body in [
        &b"\0\0\0\0\x04\xff\xff\xff\xff"[..], // a frame of what is no protobuf
        b"\0\0\0\0\x09\x0a",                  // less than the frame says
        b"\x07\0\0\0\0",                      // an unknown flag
        b"",
    ] {
        let status = bare(&running.address, None, body, true).await;
        let expected = (Code::InvalidArgument, Some(Reason::MalformedMessage));
        assert_eq!((status.code(), Reason::of(&status)), expected, "{body:?}: {status}");
    }
    running.stop().await;
}

#[tokio::test]
async fn what_is_not_served_is_named() {
    // Broken: who asks a node of another role would be answered by a code and no word.
    let running = Running::start(plain(), |server| server).await;
    let mut client = HealthClient::new(running.channel().await);
    client.check(HealthCheckRequest::default()).await.unwrap();
    let mut other = tonic::client::Grpc::new(running.channel().await);
    other.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/sida.v1.Cluster/Status");
    let codec = tonic_prost::ProstCodec::<Vec<u8>, Vec<u8>>::default();
    let status = other.unary(Request::new(Vec::new()), path, codec).await.unwrap_err();
    assert_eq!((status.code(), Reason::of(&status)), (Code::Unimplemented, Some(Reason::Unsupported)));
    assert_eq!(status.message(), "this node does not serve /sida.v1.Cluster/Status");
    running.stop().await;
}

#[tokio::test]
async fn every_end_of_a_call_is_told() {
    // Broken: what is refused before a handler sees it would be in no metric, and a missed deadline be counted as a
    // caller who changed his mind.
    let (sender, mut outcomes) = tokio::sync::mpsc::unbounded_channel();
    let observer = move |outcome: sida_rpc::Outcome<'_>| {
        let _ = sender.send((outcome.path.to_owned(), outcome.code));
    };
    let running = Running::start(plain(), |server| server.observed(observer)).await;
    let channel = running.channel().await;
    let mut next = async || {
        let (path, code) = outcomes.recv().await.unwrap();
        assert!(path.starts_with("/test.Echo/"), "{path}");
        code
    };
    unary(&channel, Request::new(b"x".to_vec())).await.unwrap();
    assert_eq!(next().await, Code::Ok);
    unary(&channel, with_header("x", "grpc-timeout", "5s")).await.unwrap_err();
    assert_eq!(next().await, Code::InvalidArgument);
    bare(&running.address, None, b"\0\0\0\0\x04\xff\xff\xff\xff", true).await;
    assert_eq!(next().await, Code::InvalidArgument);
    // "sleep 60000", and a message whose end never comes.
    for (body, is_whole) in [(&b"\0\0\0\0\x0d\x0a\x0bsleep 60000"[..], true), (b"\0\0\0\0\x0d", false)] {
        for timeout in ["1n", "20m"] {
            bare(&running.address, Some(timeout), body, is_whole).await;
            assert_eq!(next().await, Code::DeadlineExceeded, "{timeout}");
        }
    }
    drop(count(&channel, Request::new(Vec::new())).await);
    assert_eq!(next().await, Code::Cancelled);
    running.stop().await;
}
