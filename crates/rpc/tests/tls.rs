//! TLS and mutual TLS over real sockets: who is let in, certificates that are renewed under load, and what a person is told
//! when files do not fit.

mod echo;

use std::{
    net::SocketAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use echo::{Running, count, unary};
use futures::StreamExt;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use sida_rpc::{ClientConfig, ClientError, ClientTls, Server, ServerConfig, ServerError, ServerTls, http_server};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        RootCertStore,
        pki_types::{CertificateDer, pem::PemObject},
    },
};
use tokio_util::sync::CancellationToken;
use tonic::Request;

/// Writes an authority and certificates of it for the name `node`: a server's, a client's, one that is over, and one for
/// another name.
fn certificates(dir: &Path) {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    for name in ["server", "client", "over", "elsewhere"] {
        let key = KeyPair::generate().unwrap();
        let called = if name == "elsewhere" { name } else { "node" };
        let mut params = CertificateParams::new(vec![called.to_owned()]).unwrap();
        if name == "over" {
            params.not_after = date_time_ymd(2001, 1, 1);
        }
        let certificate = params.signed_by(&key, &authority).unwrap();
        std::fs::write(dir.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

fn server(dir: &Path) -> ServerTls {
    ServerTls {
        certificate: dir.join("server.pem"),
        key: dir.join("server.key"),
        client_authorities: Some(dir.join("ca.pem")),
        client_names: Vec::new(),
    }
}

fn client(dir: &Path, identity: Option<(PathBuf, PathBuf)>) -> ClientConfig {
    let tls = ClientTls { authorities: Some(dir.join("ca.pem")), identity, domain: Some("node".into()) };
    ClientConfig { tls: Some(tls), ..ClientConfig::default() }
}

#[tokio::test]
async fn only_known_clients_are_let_in() {
    // Broken: anyone in the network could read activations or send work.
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let config = ServerConfig { tls: Some(server(dir.path())), ..ServerConfig::default() };
    let running = Running::start(config, |server| server).await;
    let call = async |config: ClientConfig| -> Result<(), String> {
        let channel = sida_rpc::connect(&running.address, &config).await.map_err(|error| error.to_string())?;
        unary(&channel, Request::new(b"x".to_vec())).await.map(|_| ()).map_err(|status| status.to_string())
    };
    let identity = (dir.path().join("client.pem"), dir.path().join("client.key"));
    call(client(dir.path(), Some(identity))).await.unwrap();
    assert!(call(client(dir.path(), None)).await.is_err(), "a client without a certificate was let in");
    assert!(call(ClientConfig::default()).await.is_err(), "plain text was let in");
    let over = (dir.path().join("over.pem"), dir.path().join("over.key"));
    assert!(call(client(dir.path(), Some(over))).await.is_err(), "a certificate that is over was let in");
    let other = tempfile::tempdir().unwrap();
    certificates(other.path());
    let of_another = (other.path().join("client.pem"), other.path().join("client.key"));
    assert!(call(client(dir.path(), Some(of_another))).await.is_err(), "another authority's client was let in");
    running.stop().await;
}

#[tokio::test]
async fn only_clients_of_these_names_are_let_in() {
    // Would break: every certificate of an authority that also serves others is one of a member.
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let identity = (dir.path().join("client.pem"), dir.path().join("client.key"));
    for (names, is_let_in) in [(vec!["node"], true), (vec!["x", "*ode"], true), (vec!["*.node", "nod"], false)] {
        let client_names = names.iter().map(|name| name.parse().unwrap()).collect();
        let tls = Some(ServerTls { client_names, ..server(dir.path()) });
        let running = Running::start(ServerConfig { tls, ..ServerConfig::default() }, |server| server).await;
        let answer = ask(&running.address, &client(dir.path(), Some(identity.clone())), "client").await;
        assert_eq!(answer.is_ok(), is_let_in, "{names:?}: {answer:?}");
        if is_let_in {
            assert_eq!(
                answer.unwrap(),
                "rcgen self signed cert false",
                "whoever has no key is called by its certificate"
            );
        }
        running.stop().await;
    }
}

#[tokio::test]
async fn only_the_right_server_is_trusted() {
    // Would break: whoever takes a node's address gets the activations of its callers, or their keys.
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    certificates(dir.path());
    certificates(other.path());
    let trusting = client(dir.path(), None);
    let shown = |dir: &Path, name: &str| {
        Some(ServerTls {
            certificate: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
            client_authorities: None,
            client_names: Vec::new(),
        })
    };
    for (what, tls, is_trusted) in [
        ("the right one", shown(dir.path(), "server"), true),
        ("one that is over", shown(dir.path(), "over"), false),
        ("one for another name", shown(dir.path(), "elsewhere"), false),
        ("one of another authority", shown(other.path(), "server"), false),
        ("none", None, false),
    ] {
        let running = Running::start(ServerConfig { tls, ..ServerConfig::default() }, |server| server).await;
        let answer = ask(&running.address, &trusting, "x").await;
        assert_eq!(answer.is_ok(), is_trusted, "a server shows {what}: {answer:?}");
        running.stop().await;
    }
}

/// The answer to one call on a connection of its own.
async fn ask(address: &str, config: &ClientConfig, what: &str) -> Result<String, String> {
    let channel = sida_rpc::connect(address, config).await.map_err(|error| error.to_string())?;
    let answer = unary(&channel, Request::new(what.into())).await.map_err(|status| status.to_string())?;
    Ok(String::from_utf8(answer.into_inner()).unwrap())
}

/// A volume as Kubernetes mounts a secret: links over one link, which is swapped.
fn swap(volume: &Path, version: &str) {
    let new = volume.join("..new");
    symlink(version, &new).unwrap();
    std::fs::rename(new, volume.join("..data")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_under_load_and_nothing_is_dropped() {
    // Would break: a certificate that is renewed is served only after a restart, or costs calls that are under way.
    let metrics = sida_telemetry::metrics::install().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().to_owned();
    for version in ["first", "second", "broken"] {
        std::fs::create_dir(volume.join(version)).unwrap();
        certificates(&volume.join(version));
    }
    std::fs::write(volume.join("broken/server.key"), "half a k").unwrap();
    swap(&volume, "first");
    let files = ["ca.pem", "server.pem", "server.key"];
    files.iter().for_each(|file| symlink(Path::new("..data").join(file), volume.join(file)).unwrap());
    let tls = Some(ServerTls { client_authorities: None, ..server(&volume) });
    let reload_period = Duration::from_millis(20);
    let running = Running::start(ServerConfig { tls, reload_period, ..ServerConfig::default() }, |server| server).await;
    let both = ["first", "second"].map(|version| std::fs::read_to_string(volume.join(version).join("ca.pem")).unwrap());
    std::fs::create_dir(volume.join("both")).unwrap();
    std::fs::write(volume.join("both/ca.pem"), both.concat()).unwrap();
    let trusting = |version: &str| client(&volume.join(version), None);

    let old = sida_rpc::connect(&running.address, &trusting("first")).await.unwrap();
    let mut numbers = count(&old, Request::new(Vec::new())).await;
    let load_ends = CancellationToken::new();
    let load = (0..3).map(|_| {
        let (address, config, ends) = (running.address.clone(), trusting("both"), load_ends.clone());
        tokio::spawn(async move {
            let mut answered = 0;
            while !ends.is_cancelled() {
                ask(&address, &config, "x").await.unwrap();
                answered += 1;
            }
            answered
        })
    });
    let load: Vec<_> = load.collect();
    let until_trusted = async |version: &str| {
        let trusted = async {
            while ask(&running.address, &trusting(version), "x").await.is_err() {
                time::sleep(Duration::from_millis(10)).await;
            }
        };
        time::timeout(Duration::from_secs(10), trusted).await.expect("new connections see the new certificate");
    };
    until_trusted("first").await;
    let reloads = |outcome: &str| {
        let line = format!("sida_tls_reloads_total{{outcome=\"{outcome}\"}} ");
        metrics.render().lines().find_map(|found| found.strip_prefix(&line)?.parse::<u64>().ok()).unwrap()
    };
    let (loaded, refused) = (reloads("loaded"), reloads("refused"));
    swap(&volume, "second");
    until_trusted("second").await;
    assert!(ask(&running.address, &trusting("first"), "x").await.is_err(), "the old one is not shown any more");
    swap(&volume, "broken");
    time::sleep(10 * reload_period).await;
    ask(&running.address, &trusting("second"), "x").await.expect("a broken pair leaves the old one in service");
    assert!(reloads("loaded") > loaded && reloads("refused") > refused);
    swap(&volume, "first");
    until_trusted("first").await;
    load_ends.cancel();
    for client in load {
        assert!(client.await.expect("no call failed") > 0);
    }
    numbers.next().await.unwrap().expect("what is open goes on");
    unary(&old, Request::new(b"x".to_vec())).await.expect("an old connection goes on");
    drop(numbers);
    running.stop().await;
}

#[tokio::test]
async fn a_peer_that_is_silent_before_or_after_tls_is_closed() {
    // Broken: where connections are secured, silent ones would have no limit.
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let handshake_timeout = Duration::from_millis(300);
    let config = ServerConfig { tls: Some(server(dir.path())), handshake_timeout, ..ServerConfig::default() };
    let running = Running::start(config, |server| server).await;
    let mut silent = TcpStream::connect(&running.address).await.unwrap();
    let mut halfway = TcpStream::connect(&running.address).await.unwrap();
    // The head of a TLS record that never comes.
    halfway.write_all(b"\x16\x03\x01\x02\x00").await.unwrap();
    for stream in [&mut silent, &mut halfway] {
        let ended = time::timeout(Duration::from_secs(5), stream.read(&mut [0; 64])).await;
        // A reset is an end, too.
        assert!(matches!(ended.expect("it is closed"), Ok(0) | Err(_)));
    }
    let _third = TcpStream::connect(&running.address).await.unwrap();
    let start = Instant::now();
    running.stop().await;
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test]
async fn keys_that_do_not_fit_are_named() {
    // Broken: a person would not know which of five files is wrong.
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let refused = async |tls: ServerTls| {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = ServerConfig { tls: Some(tls), ..ServerConfig::default() };
        Server::new(config).serve(listener, CancellationToken::new()).await.unwrap_err().to_string()
    };
    let other = ServerTls { key: dir.path().join("client.key"), ..server(dir.path()) };
    let error = refused(other).await;
    assert!(error.contains("server.pem and") && error.contains("client.key"), "{error}");
    std::fs::write(dir.path().join("server.key"), "no key").unwrap();
    let error = refused(server(dir.path())).await;
    assert!(error.contains("server.key"), "{error}");
    certificates(dir.path());
    std::fs::write(dir.path().join("ca.pem"), "no certificate").unwrap();
    let error = refused(server(dir.path())).await;
    assert!(error.contains("ca.pem"), "{error}");
}

#[tokio::test]
async fn a_missing_file_is_named() {
    // Broken: a person would not know which of five files is missing.
    let dir = tempfile::tempdir().unwrap();
    let config = ServerConfig { tls: Some(server(dir.path())), ..ServerConfig::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = Server::new(config).serve(listener, CancellationToken::new()).await.unwrap_err();
    assert!(matches!(error, ServerError::Tls(_)) && error.to_string().contains("server.pem"), "{error}");
    let error = sida_rpc::connect("127.0.0.1:1", &client(dir.path(), None)).await.unwrap_err();
    assert!(matches!(error, ClientError::Tls { .. }) && error.to_string().contains("ca.pem"), "{error}");
    for address in ["", "no port at all", "http://", ":50051"] {
        let error = sida_rpc::connect(address, &ClientConfig::default()).await.unwrap_err();
        assert!(matches!(error, ClientError::Address { .. }), "{address:?}: {error}");
    }
    let error = sida_rpc::connect("127.0.0.1:1", &ClientConfig::default()).await.unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
}

/// A client that trusts the authority in `dir`, and offers these protocols.
fn rustls_client(dir: &Path, protocols: &[&str]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.join("ca.pem")).unwrap()).unwrap();
    let mut config = tokio_rustls::rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

/// A connection to `node`, secured by this client.
async fn secured(client: &TlsConnector, address: SocketAddr) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(address).await.unwrap();
    client.connect("node".try_into().unwrap(), stream).await.unwrap()
}

#[tokio::test]
async fn http_by_tls_speaks_both_versions_and_follows_its_certificate() {
    // Would break: a browser, curl or a proxy cannot agree on a version of HTTP, a renewed certificate needs a restart,
    // or who forgot the s of https sees a connection that ends without a word.
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let tls = ServerTls { client_authorities: None, ..server(dir.path()) };
    let config = ServerConfig { tls: Some(tls), reload_period: Duration::from_millis(20), ..ServerConfig::default() };
    let routes = Router::new().route("/", get(|| async { "well" }));
    let (listener, shutdown) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), CancellationToken::new());
    let (address, until) = (listener.local_addr().unwrap(), shutdown.clone());
    let serving = async move { http_server::serve(&config, routes, listener, until, CancellationToken::new()).await };
    let serving = tokio::spawn(serving);

    for protocols in [&["http/1.1"][..], &[]] {
        let mut stream = secured(&rustls_client(dir.path(), protocols), address).await;
        assert_eq!(stream.get_ref().1.alpn_protocol(), protocols.first().map(|protocol| protocol.as_bytes()));
        stream.write_all(b"GET / HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("well"), "{answer}");
    }
    let both = rustls_client(dir.path(), &["http/1.1", "h2"]);
    let stream = secured(&both, address).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]), "the better one");
    let served_with = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let asked = http::Request::get("https://node/").body(()).unwrap();
    assert_eq!(client.send_request(asked, true).unwrap().0.await.unwrap().status(), 200);
    let other = rustls_client(dir.path(), &["imap"]);
    let stream = TcpStream::connect(address).await.unwrap();
    assert!(other.connect("node".try_into().unwrap(), stream).await.is_err(), "nothing to agree on");

    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: node\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    plain.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.ends_with("ask it by https:\n"), "{answer}");

    // All files anew, as when an authority is renewed, too. A server may read them while half of them are there.
    certificates(dir.path());
    let renewed = rustls_client(dir.path(), &[]);
    let new = async {
        loop {
            let stream = TcpStream::connect(address).await.unwrap();
            if let Ok(stream) = renewed.connect("node".try_into().unwrap(), stream).await {
                return stream.get_ref().1.peer_certificates().unwrap()[0].clone();
            }
            time::sleep(Duration::from_millis(20)).await;
        }
    };
    let new = time::timeout(Duration::from_secs(30), new).await.expect("it is followed");
    assert_ne!(new, served_with);
    let asked = http::Request::get("https://node/").body(()).unwrap();
    assert_eq!(client.send_request(asked, true).unwrap().0.await.unwrap().status(), 200, "what is connected goes on");
    shutdown.cancel();
    drop(client);
    serving.await.unwrap().unwrap();
}
