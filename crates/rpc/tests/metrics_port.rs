//! The port of metrics and probes over real sockets.

use std::{net::SocketAddr, time::Duration};

use sida_rpc::{Readiness, metrics_port};
use sida_telemetry::metrics;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time,
};
use tokio_util::sync::CancellationToken;

async fn request(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_and_probes_are_answered_whoever_else_is_silent() {
    // Broken: Prometheus or the kubelet would be kept out by sockets that say nothing, or the process would not end.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (shutdown, head_timeout) = (CancellationToken::new(), Duration::from_millis(300));
    let metrics = metrics::install().unwrap();
    let server =
        tokio::spawn(metrics_port::serve(metrics, Readiness::default(), listener, head_timeout, shutdown.clone()));
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut all_places = Vec::new();
    for _ in 0..80 {
        all_places.push(TcpStream::connect(address).await.unwrap());
    }
    let scrape = request(address, "/metrics").await;
    assert!(scrape.starts_with("HTTP/1.1 200") && scrape.contains("sida_runtime_workers "), "{scrape}");
    assert!(request(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(request(address, "/readyz").await.starts_with("HTTP/1.1 503"));
    assert!(request(address, "/else").await.starts_with("HTTP/1.1 404"));
    // A reset is an end, too.
    let ended = time::timeout(Duration::from_secs(1), silent.read(&mut [0; 256])).await;
    assert!(matches!(ended.expect("closed"), Ok(0) | Err(_)));
    let mut late = TcpStream::connect(address).await.unwrap();
    late.write_all(b"GET /metrics HTTP/1.1\r\n").await.unwrap();
    let mut answer = Vec::new();
    let ended = time::timeout(Duration::from_secs(2), late.read_to_end(&mut answer)).await;
    ended.expect("a head has a limit, too").unwrap();
    let held_open = TcpStream::connect(address).await.unwrap();
    shutdown.cancel();
    time::timeout(Duration::from_secs(2), server).await.unwrap().unwrap();
    drop((held_open, all_places));
}
