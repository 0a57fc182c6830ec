//! The server of what is not gRPC, over real sockets: both versions of HTTP, names, slow peers, and the end.

use std::{net::SocketAddr, time::Duration};

use axum::{Router, routing::get};
use sida_rpc::{ServerConfig, http_server};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time,
};
use tokio_util::sync::CancellationToken;

struct Running {
    address: SocketAddr,
    shutdown: CancellationToken,
    server: JoinHandle<()>,
}

async fn running(config: ServerConfig) -> Running {
    let slow = || async {
        time::sleep(Duration::from_millis(300)).await;
        "slow"
    };
    let routes = Router::new().route("/quick", get(|| async { "quick" })).route("/slow", get(slow));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (address, shutdown) = (listener.local_addr().expect("address"), CancellationToken::new());
    let until = shutdown.clone();
    let serving = async move {
        http_server::serve(&config, routes, listener, until, CancellationToken::new()).await.expect("served");
    };
    Running { address, shutdown, server: tokio::spawn(serving) }
}

/// What comes back on a connection until it ends.
async fn exchanged(address: SocketAddr, said: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    stream.write_all(said.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer
}

#[tokio::test]
async fn both_versions_are_spoken() {
    // Broken: curl, a proxy that speaks HTTP/2 to its backends, or a request shorter than HTTP/2's first bytes is cut off.
    let running = running(ServerConfig::default()).await;
    let one =
        exchanged(running.address, "GET /quick HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-request-id: r-1\r\n\r\n");
    let one = one.await;
    assert!(one.starts_with("HTTP/1.1 200 OK") && one.contains("x-request-id: r-1") && one.ends_with("quick"), "{one}");
    assert!(exchanged(running.address, "GET /x HTTP/1.0\r\n\r\n").await.contains("404"));
    // Its first letters are those of HTTP/2's.
    assert!(exchanged(running.address, "PRI / HTTP/1.0\r\n\r\n").await.contains("404"));
    let stream = TcpStream::connect(running.address).await.expect("connected");
    let (mut client, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let request = http::Request::get("http://a/quick").body(()).expect("a request");
    let (response, _) = client.send_request(request, true).expect("sent");
    let mut response = response.await.expect("a response");
    assert_eq!(response.status(), 200);
    assert_eq!(response.body_mut().data().await.expect("a body").expect("bytes"), "quick");
}

#[tokio::test]
async fn slow_heads_end_and_kept_connections_stay() {
    // Broken: whoever sends a byte now and then keeps a connection for ever, or a client that asks now and then has to
    // connect again each time.
    let limit = Duration::from_millis(150);
    let running = running(ServerConfig { handshake_timeout: limit, ..ServerConfig::default() }).await;
    let mut kept = TcpStream::connect(running.address).await.expect("connected");
    for _ in 0..2 {
        kept.write_all(b"GET /quick HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
        let mut bytes = [0; 512];
        let length = kept.read(&mut bytes).await.expect("an answer");
        assert!(bytes[..length].ends_with(b"quick"), "it was closed");
        time::sleep(2 * limit).await;
    }
    for said in ["", "GET", "GET /quick HTTP/1.1\r\nx: "] {
        let ended = time::timeout(10 * limit, exchanged(running.address, said)).await;
        assert_eq!(ended.expect("it is closed"), "", "{said:?}");
    }
}

#[tokio::test]
async fn the_end_waits_for_answers() {
    // Broken: a rollout cuts answers off, or waits for a connection that asks nothing.
    let running = running(ServerConfig::default()).await;
    let _silent = TcpStream::connect(running.address).await.expect("connected");
    let asked = tokio::spawn(exchanged(running.address, "GET /slow HTTP/1.1\r\nhost: a\r\n\r\n"));
    time::sleep(Duration::from_millis(100)).await;
    running.shutdown.cancel();
    assert!(asked.await.expect("no panic").ends_with("slow"));
    time::timeout(Duration::from_secs(5), running.server).await.expect("it ended").expect("no panic");
    assert!(TcpStream::connect(running.address).await.is_err(), "it listens still");
}
