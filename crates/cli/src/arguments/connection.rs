//! How a cluster's nodes are reached and how this process proves itself to them.

use std::path::PathBuf;

use clap::Args;
use sida_rpc::{ClientConfig, ClientTls};

/// TLS towards other nodes. Without any of these, connections are plain text (or TLS with the operating
/// system's authorities where an address says `https://`).
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ConnectionArguments {
    /// PEM file of the authorities whose servers are trusted
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// PEM file of this process's certificate chain
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// PEM file of its private key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// The name that servers' certificates must carry [default: the host of their address]
    #[arg(long, value_name = "NAME")]
    tls_domain: Option<String>,
}

impl ConnectionArguments {
    /// The client side of every connection this process makes.
    pub(crate) fn client(&self) -> ClientConfig {
        let identity = self.tls_cert.clone().zip(self.tls_key.clone());
        let is_wanted = self.tls_ca.is_some() || self.tls_domain.is_some() || identity.is_some();
        let tls = is_wanted.then(|| ClientTls {
            authorities: self.tls_ca.clone(),
            identity,
            domain: self.tls_domain.clone(),
        });
        ClientConfig { tls, ..ClientConfig::default() }
    }
}
