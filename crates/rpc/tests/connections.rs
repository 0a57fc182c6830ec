//! Peers that connect and say nothing, over real sockets: each is closed in time, and none costs others anything.

mod echo;

use std::time::{Duration, Instant};

use echo::{Running, count, unary};
use futures::{StreamExt, future};
use sida_rpc::ServerConfig;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time,
};
use tonic::Request;

/// HTTP/2's first bytes: the preface, and settings that say nothing.
const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn plain() -> ServerConfig {
    ServerConfig { health_period: Duration::from_millis(20), ..ServerConfig::default() }
}

/// A connection on which nothing, or no more than `said`, is said.
async fn silent(running: &Running, said: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(&running.address).await.unwrap();
    stream.write_all(said).await.unwrap();
    stream
}

/// How long the server keeps `stream` open; reads whatever it says until then.
async fn open_for(mut stream: TcpStream) -> Duration {
    let start = Instant::now();
    let mut said = Vec::new();
    // A reset is an end, too.
    let read = stream.read_to_end(&mut said);
    let _ = time::timeout(Duration::from_secs(10), read).await.expect("the server closes it");
    start.elapsed()
}

#[tokio::test]
async fn a_silent_peer_does_not_hold_up_the_end_of_a_node() {
    // Broken: one idle scan of a port would make every restart take the whole drain limit.
    let running = Running::start(plain(), |server| server).await;
    let peers = [silent(&running, b"").await, silent(&running, &GREETING[..10]).await];
    time::sleep(Duration::from_millis(100)).await;
    let start = Instant::now();
    running.stop().await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    for peer in peers {
        open_for(peer).await;
    }
}

#[tokio::test]
async fn a_peer_that_does_not_answer_the_goodbye_is_left_behind() {
    // Broken: a client that is stopped would make a restart take the whole drain limit.
    let running = Running::start(plain(), |server| server).await;
    let peer = silent(&running, GREETING).await;
    time::sleep(Duration::from_millis(100)).await;
    let start = Instant::now();
    running.stop().await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    open_for(peer).await;
}

#[tokio::test]
async fn a_handshake_has_a_limit() {
    // Broken: peers that say nothing would collect until there is no descriptor left.
    let handshake_timeout = Duration::from_millis(200);
    let running = Running::start(ServerConfig { handshake_timeout, ..plain() }, |server| server).await;
    for said in [&b""[..], &GREETING[..10]] {
        let open = open_for(silent(&running, said).await).await;
        assert!(open >= handshake_timeout / 2 && open < Duration::from_secs(2), "{open:?}");
    }
    let open = open_for(silent(&running, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await).await;
    assert!(open < handshake_timeout, "what is not HTTP/2 is closed at once: {open:?}");
    let channel = running.channel().await;
    time::sleep(2 * handshake_timeout).await;
    assert!(unary(&channel, Request::new(b"x".to_vec())).await.is_ok(), "it spoke in time");
    running.stop().await;
}

#[tokio::test]
async fn a_connection_without_a_call_is_told_to_leave() {
    // Broken: clients that forgot about their connections would use them up, or one would be closed under a call.
    let idle_timeout = Duration::from_millis(200);
    let running = Running::start(ServerConfig { idle_timeout, ..plain() }, |server| server).await;
    let stream = TcpStream::connect(&running.address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    let left = time::timeout(Duration::from_secs(2), connection).await.expect("told to leave");
    left.expect("a goodbye, not a broken connection");
    drop(client);
    let channel = running.channel().await;
    let mut numbers = count(&channel, Request::new(Vec::new())).await;
    let start = Instant::now();
    while start.elapsed() < 3 * idle_timeout {
        numbers.next().await.unwrap().expect("a call keeps its connection");
    }
    drop(numbers);
    for _ in 0..3 {
        time::sleep(2 * idle_timeout).await;
        unary(&channel, Request::new(b"x".to_vec())).await.expect("a client connects again by itself");
    }
    running.stop().await;
}

#[tokio::test]
async fn silent_peers_keep_nobody_out() {
    // Broken: a few sockets that anybody can open would end the service for all others.
    let running = Running::start(ServerConfig { connections_max: 3, ..plain() }, |server| server).await;
    let channel = running.channel().await;
    let mut numbers = count(&channel, Request::new(Vec::new())).await;
    let mut peers = Vec::new();
    for said in [&b""[..], GREETING, b"", GREETING] {
        peers.push(silent(&running, said).await);
    }
    let answered = async { unary(&running.channel().await, Request::new(b"x".to_vec())).await };
    let answer = time::timeout(Duration::from_secs(8), answered).await.expect("a place is made for it");
    assert_eq!(answer.unwrap().into_inner(), b"x");
    numbers.next().await.unwrap().expect("a connection with a call keeps its place");
    let first = peers.swap_remove(0);
    assert!(open_for(first).await < Duration::from_millis(100), "it was silent for the longest time");
    drop((numbers, peers));
    running.stop().await;
}

#[tokio::test]
async fn who_sends_little_but_control_frames_is_ended() {
    // Would break: a peer that pings as fast as it can, or sets the same again and again, takes a processor for as long as it
    // likes, or comes again as soon as it is ended.
    let hour = Duration::from_secs(3600);
    let config = ServerConfig { keepalive_interval: hour, keepalive_timeout: hour, ..plain() };
    let running = Running::start(config, |server| server).await;
    let (ping, settings, window) =
        (b"\0\0\x08\x06\0\0\0\0\0pingping", b"\0\0\0\x04\0\0\0\0\0", b"\0\0\x04\x08\0\0\0\0\0\0\0\0\x01");
    let frames: [(&str, &[u8]); 4] =
        [("PING", ping), ("SETTINGS", settings), ("WINDOW_UPDATE", window), ("of no kind", b"\0\0\0\xf0\0\0\0\0\0")];
    let running_at = &running;
    let floods = frames.map(|(kind, frame)| async move {
        let begun = Instant::now();
        let (mut reader, mut writer) = silent(running_at, GREETING).await.into_split();
        let flooding = async {
            let many = frame.repeat(256);
            // An error is the end.
            while writer.write_all(&many).await.is_ok() {}
        };
        let answers = async {
            let mut said = vec![0; 64 << 10];
            while reader.read(&mut said).await.is_ok_and(|bytes| bytes > 0) {}
        };
        let ended = async {
            tokio::select! {
                () = flooding => {}
                () = answers => {}
            }
        };
        time::timeout(Duration::from_secs(60), ended).await.unwrap_or_else(|_| panic!("{kind} goes on"));
        assert!(begun.elapsed() > Duration::from_secs(2), "{kind} does not wait for its end");
    });
    future::join_all(floods).await;
    // Whoever asks for something is answered as ever.
    let channel = running.channel().await;
    for _ in 0..100 {
        unary(&channel, Request::new(b"asks".to_vec())).await.unwrap();
    }
    running.stop().await;
}
