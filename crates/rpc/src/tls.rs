//! TLS and mutual TLS from PEM files. Read by [`crate::server`] and [`crate::client`] when they start.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

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
}

impl ServerTls {
    pub(crate) fn load(&self) -> Result<ServerTlsConfig, TlsError> {
        let identity = Identity::from_pem(pem(&self.certificate)?, pem(&self.key)?);
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

fn pem(file: &Path) -> Result<Vec<u8>, TlsError> {
    let read = |source| TlsError::Read { file: file.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(file).map_err(read)?.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > PEM_BYTES_MAX {
        return Err(TlsError::Length { file: file.to_owned(), expected: PEM_BYTES_MAX });
    }
    Ok(bytes)
}
