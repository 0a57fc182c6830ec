//! The client of every node: one way to connect to a peer, with the same windows, limits and TLS as the server.
//! Used by coordinators (expert-nodes, predictor-nodes), the command line and the tests.

use std::{
    error::Error as _,
    io,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderValue, Request, Response, header::AUTHORIZATION, uri::Authority};
use thiserror::Error;
use tonic::{
    Code, Status, TimeoutExpired,
    body::Body,
    transport::{self, Endpoint},
};
use tower::Service;

use crate::{
    keys::{KeyError, OwnKey},
    status::{Fault, Reason},
    tls::{ClientTls, TlsError},
};

/// Limits of a client.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// HTTP/2 window of one stream; see [`crate::ServerConfig`].
    pub stream_window_bytes: u32,
    /// HTTP/2 window of all streams of a connection.
    pub connection_window_bytes: u32,
    /// Largest HTTP/2 frame taken.
    pub frame_bytes_max: u32,
    /// How often a silent connection is pinged, also while no call is open, so that the next call does not
    /// have to find out that the peer is gone.
    pub keepalive_interval: Duration,
    /// How long such a ping may take.
    pub keepalive_timeout: Duration,
    /// TLS; `None`: plain text, unless the address says `https://`.
    pub tls: Option<ClientTls>,
    /// The key that is sent with every call, for servers that let in by keys.
    pub key: Option<OwnKey>,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            stream_window_bytes: 16 << 20,
            connection_window_bytes: 32 << 20,
            frame_bytes_max: 1 << 20,
            keepalive_interval: Duration::from_secs(5),
            keepalive_timeout: Duration::from_secs(3),
            tls: None,
            key: None,
        }
    }
}

/// Why there is no connection to be had.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ClientError {
    #[error("{address:?} is no address, expected host:port")]
    Address { address: String },
    #[error("TLS to {address}: {source}")]
    Tls { address: String, source: TlsError },
    #[error("the key for {address}: {source}")]
    Key { address: String, source: KeyError },
    #[error("cannot connect to {address}: {}", root_cause(.error))]
    Connect { address: String, error: transport::Error },
}

impl ClientError {
    /// Whether somebody was there with whom TLS failed.
    pub fn is_of_tls(&self) -> bool {
        let Self::Connect { error, .. } = self else { return matches!(self, Self::Tls { .. }) };
        let mut cause = error.source();
        while let Some(error) = cause {
            // What rustls finds wrong is invalid data to whoever reads the connection.
            if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::InvalidData) {
                return true;
            }
            cause = error.source();
        }
        false
    }
}

/// A way to a server, for the generated clients: sends the key, if any, with every call. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Channel {
    inner: transport::Channel,
    authorization: Option<HeaderValue>,
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = transport::Error;
    type Future = transport::channel::ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        self.inner.call(request)
    }
}

/// Connects to `address`: `host:port`, or with `http://` or `https://` before it.
pub async fn connect(address: &str, config: &ClientConfig) -> Result<Channel, ClientError> {
    let (endpoint, authorization) = (endpoint(address, config)?, authorization(address, config)?);
    let connected = endpoint.connect().await;
    let inner = connected.map_err(|error| ClientError::Connect { address: address.to_owned(), error })?;
    Ok(Channel { inner, authorization })
}

/// A channel that connects at its first call, and again whenever the connection was lost, always with the certificates and
/// the key that were there when this was called. Has to be called within a tokio runtime.
pub fn connect_lazy(address: &str, config: &ClientConfig) -> Result<Channel, ClientError> {
    let authorization = authorization(address, config)?;
    Ok(Channel { inner: endpoint(address, config)?.connect_lazy(), authorization })
}

/// `status`, with DEADLINE_EXCEEDED where tonic's client timer said CANCELLED: a call with a timeout ends by
/// this side's timer as often as by the server's.
pub fn deadline_status(status: Status) -> Status {
    let mut cause = status.source();
    while let Some(error) = cause {
        if status.code() == Code::Cancelled && error.is::<TimeoutExpired>() {
            return Fault::new(Reason::DeadlineExceeded, "no answer within the call's timeout").into();
        }
        cause = error.source();
    }
    status
}

fn authorization(address: &str, config: &ClientConfig) -> Result<Option<HeaderValue>, ClientError> {
    let refused = |source| ClientError::Key { address: address.to_owned(), source };
    config.key.as_ref().map(OwnKey::header).transpose().map_err(refused)
}

fn endpoint(address: &str, config: &ClientConfig) -> Result<Endpoint, ClientError> {
    let https = address.starts_with("https://");
    let tls = config.tls.clone().or_else(|| https.then(ClientTls::default));
    let bare = address.strip_prefix("https://").or_else(|| address.strip_prefix("http://")).unwrap_or(address);
    let scheme = if tls.is_some() { "https" } else { "http" };
    let endpoint = Endpoint::from_shared(format!("{scheme}://{bare}"))
        .ok()
        .filter(|endpoint| endpoint.uri().authority().is_some_and(is_address))
        .ok_or_else(|| ClientError::Address { address: address.to_owned() })?
        .connect_timeout(config.connect_timeout)
        .tcp_nodelay(true)
        .initial_stream_window_size(config.stream_window_bytes)
        .initial_connection_window_size(config.connection_window_bytes)
        .max_frame_size(config.frame_bytes_max)
        .http2_keep_alive_interval(config.keepalive_interval)
        .keep_alive_timeout(config.keepalive_timeout)
        .keep_alive_while_idle(true);
    let Some(tls) = tls else { return Ok(endpoint) };
    let tls = tls.load().map_err(|source| ClientError::Tls { address: address.to_owned(), source })?;
    endpoint.tls_config(tls).map_err(|error| ClientError::Connect { address: address.to_owned(), error })
}

/// Whether it is a host, or a host and a port. What is no port, such as 99999, would be left out without a word.
fn is_address(authority: &Authority) -> bool {
    let host = authority.host();
    !host.is_empty() && (authority.port_u16().is_some() || authority.as_str().ends_with(host))
}

/// What lies at the bottom of a transport error, whose own text says only "transport error".
pub(crate) fn root_cause(error: &transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_are_connected_to() {
        // Broken: a mistyped port would be port 80 of that host, or a path be looked up as a name.
        let is_refused = |address: &str| matches!(endpoint(address, &ClientConfig::default()), Err(ClientError::Address { address: named }) if named == address);
        for fine in ["localhost:50051", "http://10.0.0.1:1", "https://sida.example", "[::1]:50051", "sida"] {
            assert!(!is_refused(fine), "{fine}");
        }
        for wrong in ["", "http://", ":50051", "localhost:99999", "localhost:", "localhost:x", "unix:///run/sida"] {
            assert!(is_refused(wrong), "{wrong}");
        }
    }
}
