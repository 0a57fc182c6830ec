//! Connects to one member of etcd. Certificates and passwords are read anew
//! each time, so that they can be renewed on disk.

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};

use super::{
    config::{EtcdConfig, Pems},
    error::EtcdError,
};

/// A client of `endpoint`. That it answers shows only when it is asked.
pub(super) async fn connect(config: &EtcdConfig, endpoint: &str) -> Result<Client, ConnectError> {
    let patience = config.call_timeout();
    // Pings find a peer that is gone without a word; `require_leader` ends a watch of a member that is cut off from
    // the others, which would else stay silent for ever.
    let mut options = ConnectOptions::new()
        .with_connect_timeout(patience)
        .with_keep_alive(patience, patience)
        .with_require_leader(true);
    if let Some(tls) = &config.tls {
        options = options.with_tls(tls_options(tls.read()?));
    } else if endpoint.starts_with("https://") {
        options = options.with_tls(tls_options(Pems { authorities: None, identity: None }));
    }
    if let Some(user) = &config.user {
        options = options.with_user(user.name.as_str(), user.password()?.0);
    }
    Ok(Client::connect([endpoint], Some(options)).await?)
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error(transparent)]
    Config(#[from] EtcdError),
    #[error(transparent)]
    Etcd(#[from] etcd_client::Error),
}

fn tls_options(pems: Pems) -> TlsOptions {
    let tls = TlsOptions::new();
    let tls = match pems.authorities {
        Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
        None => tls.with_native_roots(),
    };
    match pems.identity {
        Some((certificate, key)) => tls.identity(Identity::from_pem(certificate, key)),
        None => tls,
    }
}
