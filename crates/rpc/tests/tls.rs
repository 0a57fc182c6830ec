//! TLS and mutual TLS over real sockets, and what a person is told when they do not fit.

mod echo;

use std::path::{Path, PathBuf};

use echo::{Running, unary};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use sida_rpc::{ClientConfig, ClientError, ClientTls, Server, ServerConfig, ServerError, ServerTls};
use tokio::net::TcpListener;
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
