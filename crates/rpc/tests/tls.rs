//! TLS and mutual TLS over real sockets, and what a person is told when they do not fit.

mod echo;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use echo::{Running, unary};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use sida_rpc::{ClientConfig, ClientError, ClientTls, Server, ServerConfig, ServerError, ServerTls};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time,
};
use tokio_util::sync::CancellationToken;
use tonic::Request;

/// Writes an authority and two certificates of it; both carry the name `node`.
fn certificates(dir: &Path) {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    std::fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    for name in ["server", "client"] {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["node".to_owned()]).unwrap();
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
