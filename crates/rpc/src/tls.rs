//! TLS and mutual TLS from PEM files. Read by [`crate::server`] and [`crate::client`] when they start.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use sida_telemetry::{gauge, names};
use thiserror::Error;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// The largest PEM file read: far above any chain.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// How a server proves itself, and whom it lets in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    /// PEM file of the certificate chain.
    pub certificate: PathBuf,
    /// PEM file of its private key.
    pub key: PathBuf,
    /// PEM file of the authorities whose clients are let in (mutual TLS); `None`: anyone.
    pub client_authorities: Option<PathBuf>,
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
    #[error("cannot read {file}: {source}")]
    Read { file: PathBuf, source: io::Error },
    #[error("{file} is longer than {expected} bytes")]
    Length { file: PathBuf, expected: u64 },
    #[error("{file} does not begin with a certificate")]
    Certificate { file: PathBuf },
}

impl ServerTls {
    pub(crate) fn load(&self) -> Result<ServerTlsConfig, TlsError> {
        let chain = pem(&self.certificate)?;
        let not_after = not_after(&chain).ok_or_else(|| TlsError::Certificate { file: self.certificate.clone() })?;
        gauge!(names::TLS_CERTIFICATE_NOT_AFTER_SECONDS).set(not_after as f64);
        let identity = Identity::from_pem(chain, pem(&self.key)?);
        let config = ServerTlsConfig::new().identity(identity);
        Ok(match &self.client_authorities {
            None => config,
            Some(file) => config.client_ca_root(Certificate::from_pem(pem(file)?)),
        })
    }
}

impl ClientTls {
    pub(crate) fn load(&self) -> Result<ClientTlsConfig, TlsError> {
        let mut config = match &self.authorities {
            None => ClientTlsConfig::new().with_native_roots(),
            Some(file) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem(file)?)),
        };
        if let Some((certificate, key)) = &self.identity {
            config = config.identity(Identity::from_pem(pem(certificate)?, pem(key)?));
        }
        if let Some(domain) = &self.domain {
            config = config.domain_name(domain);
        }
        Ok(config)
    }
}

/// When the first certificate of a chain expires, as a Unix time.
fn not_after(chain: &[u8]) -> Option<i64> {
    let (_, first) = x509_parser::pem::parse_x509_pem(chain).ok()?;
    Some(first.parse_x509().ok()?.validity().not_after.timestamp())
}

fn pem(file: &Path) -> Result<Vec<u8>, TlsError> {
    let read = |source| TlsError::Read { file: file.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(file).map_err(read)?.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > PEM_BYTES_MAX {
        return Err(TlsError::Length { file: file.to_owned(), expected: PEM_BYTES_MAX });
    }
    Ok(bytes)
}
