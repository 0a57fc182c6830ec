//! TLS and mutual TLS from PEM files. A server reads them when it starts and again when they change ([`crate::reload`]): who
//! connects then sees the new certificate, and what is connected goes on. A client ([`crate::client`]) reads them for every
//! connection that it asks for.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use sida_telemetry::{gauge, names};
use thiserror::Error;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, RootCertStore,
        pki_types::{
            CertificateDer, PrivateKeyDer,
            pem::{self, PemObject},
        },
        server::{VerifierBuilderError, WebPkiClientVerifier},
    },
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use crate::{
    certificate_names::NamePattern,
    reload::{FileError, FromFiles, ReadFile, Reloading, read},
};

/// How a server proves itself, and whom it lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// PEM file of the certificate chain.
    pub certificate: PathBuf,
    /// PEM file of its private key.
    pub key: PathBuf,
    /// PEM file of the authorities whose clients are let in (mutual TLS); `None`: anyone.
    pub client_authorities: Option<PathBuf>,
    /// Of their clients, only those with such a name in their certificate; empty: all of them.
    pub client_names: Vec<NamePattern>,
}

impl ServerTls {
    /// Refuses files that no server could use, as it does itself when it begins to serve.
    pub fn check(&self) -> Result<(), TlsError> {
        PortTls::open_if_any(Some(self.clone()), &[HTTP2]).map(drop)
    }
}

/// Whom a client trusts, and how it proves itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// PEM file of the authorities whose servers are trusted; `None`: those of the operating system.
    pub authorities: Option<PathBuf>,
    /// PEM files of the certificate chain and its private key (mutual TLS).
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that the server's certificate must carry; `None`: the host of its address.
    pub domain: Option<String>,
}

/// Why a PEM file cannot be used.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum TlsError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{file} does not begin with a certificate")]
    Certificate { file: PathBuf },
    #[error("{file} holds no certificate")]
    NoCertificate { file: PathBuf },
    #[error("{file} is not PEM of what it should be: {source}")]
    Pem { file: PathBuf, source: pem::Error },
    #[error("{files} cannot be used together: {source}")]
    Identity { files: String, source: rustls::Error },
    #[error("{file} holds no authority that can be trusted: {source}")]
    Authorities { file: PathBuf, source: VerifierBuilderError },
}

/// The protocols that TLS agrees on: gRPC knows the first only.
pub(crate) const HTTP2: &[u8] = b"h2";
pub(crate) const HTTP1: &[u8] = b"http/1.1";

/// How the connections to a port are made secure.
#[derive(Clone, Debug)]
pub(crate) struct PortTls {
    tls: ServerTls,
    /// What is spoken there, the best first.
    protocols: &'static [&'static [u8]],
}

impl PortTls {
    /// The TLS of a port that speaks these protocols, if it has any.
    pub(crate) fn open_if_any(
        tls: Option<ServerTls>,
        protocols: &'static [&'static [u8]],
    ) -> Result<Option<Arc<Reloading<Self>>>, TlsError> {
        tls.map(|tls| Reloading::open(Self { tls, protocols })).transpose()
    }
}

/// What the files of a port's TLS hold.
pub(crate) struct PemFiles {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_authorities: Option<Vec<u8>>,
}

impl FromFiles for PortTls {
    type Contents = PemFiles;
    type Made = TlsAcceptor;
    type Error = TlsError;
    const NAME: &'static str = "certificates";
    const RELOADS: &'static str = names::TLS_RELOADS_TOTAL;

    fn contents(&self, read: &mut ReadFile<'_>) -> Result<PemFiles, FileError> {
        let ServerTls { certificate, key, client_authorities, .. } = &self.tls;
        Ok(PemFiles {
            certificate: read(certificate)?,
            key: read(key)?,
            client_authorities: client_authorities.as_deref().map(read).transpose()?,
        })
    }

    fn make(&self, contents: &PemFiles) -> Result<TlsAcceptor, TlsError> {
        let ServerTls { certificate, key: key_file, client_authorities, .. } = &self.tls;
        let PemFiles { certificate: chain, key, client_authorities: authorities } = contents;
        let not_after = not_after(chain).ok_or_else(|| TlsError::Certificate { file: certificate.clone() })?;
        let chain = certificates(certificate, chain)?;
        let not_key = |source| TlsError::Pem { file: key_file.clone(), source };
        let key = PrivateKeyDer::from_pem_slice(key).map_err(not_key)?;
        let builder = rustls::ServerConfig::builder();
        let builder = match client_authorities.as_ref().zip(authorities.as_ref()) {
            None => builder.with_no_client_auth(),
            Some((file, authorities)) => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(certificates(file, authorities)?);
                let refused = |source| TlsError::Authorities { file: file.clone(), source };
                builder.with_client_cert_verifier(WebPkiClientVerifier::builder(roots.into()).build().map_err(refused)?)
            }
        };
        let files = || format!("{} and {}", certificate.display(), key_file.display());
        let refused = |source| TlsError::Identity { files: files(), source };
        let mut config = builder.with_single_cert(chain, key).map_err(refused)?;
        config.alpn_protocols.extend(self.protocols.iter().map(|protocol| protocol.to_vec()));
        gauge!(names::TLS_CERTIFICATE_NOT_AFTER_SECONDS).set(not_after as f64);
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

impl ClientTls {
    pub(crate) fn load(&self) -> Result<ClientTlsConfig, TlsError> {
        let mut config = match &self.authorities {
            None => ClientTlsConfig::new().with_native_roots(),
            Some(file) => {
                let pem = read(file)?;
                // An empty file, or one with a key, would trust nobody, and be blamed on the server.
                if certificates(file, &pem)?.is_empty() {
                    return Err(TlsError::NoCertificate { file: file.clone() });
                }
                ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem))
            }
        };
        if let Some((certificate, key)) = &self.identity {
            config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        if let Some(domain) = &self.domain {
            config = config.domain_name(domain);
        }
        Ok(config)
    }
}

/// All certificates of `pem`, the content of `file`.
fn certificates(file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let refused = |source| TlsError::Pem { file: file.to_owned(), source };
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(refused)
}

/// When the first certificate of a chain expires, as a Unix time.
fn not_after(chain: &[u8]) -> Option<i64> {
    let (_, first) = x509_parser::pem::parse_x509_pem(chain).ok()?;
    Some(first.parse_x509().ok()?.validity().not_after.timestamp())
}
