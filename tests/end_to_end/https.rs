//! A client of a coordinator's HTTP port: by TLS or without, with a certificate, a key, or neither.

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use sida_rpc::{ClientTls, OwnKey};

/// The status of an answer to `path` that came on a connection of its own, or why none came.
pub(crate) async fn status(
    address: &str,
    path: &str,
    tls: Option<&ClientTls>,
    key: Option<&OwnKey>,
) -> Result<StatusCode, String> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let mut request = Request::get(format!("{scheme}://{address}{path}"));
    if let Some(OwnKey::Text(key)) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let request = request.body(Empty::<Bytes>::new()).expect("a request");
    let told = |error: &dyn std::fmt::Debug| format!("{error:?}");
    let trusted = config(tls.unwrap_or(&ClientTls::default()))?;
    let builder = HttpsConnectorBuilder::new().with_tls_config(trusted).https_or_http();
    let builder = match tls.and_then(|tls| tls.domain.clone()) {
        Some(domain) => {
            let name = ServerName::try_from(domain).map_err(|error| error.to_string())?;
            builder.with_server_name_resolver(FixedServerNameResolver::new(name))
        }
        None => builder,
    };
    let client = Client::builder(TokioExecutor::new()).build(builder.enable_http1().build());
    let answer = client.request(request).await.map_err(|error| told(&error))?;
    Ok(answer.status())
}

fn config(tls: &ClientTls) -> Result<rustls::ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    if let Some(authorities) = &tls.authorities {
        let found = CertificateDer::pem_file_iter(authorities).expect("a file of authorities");
        roots.add_parsable_certificates(found.map(|found| found.expect("a certificate")));
    }
    let builder = rustls::ClientConfig::builder().with_root_certificates(roots);
    let Some((chain, key)) = &tls.identity else { return Ok(builder.with_no_client_auth()) };
    let chain = CertificateDer::pem_file_iter(chain).expect("a file").map(|found| found.expect("a certificate"));
    let key = PrivateKeyDer::from_pem_file(key).expect("a key");
    builder.with_client_auth_cert(chain.collect(), key).map_err(|error| error.to_string())
}
