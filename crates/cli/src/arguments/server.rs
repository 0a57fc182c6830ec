//! Where a node listens, how it proves itself there, whom it lets stay connected, and how long it drains.

use std::{
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use sida_coordinator::{CoordinatorConfig, CorsOrigin, Listeners};
use sida_rpc::{Gate, NamePattern, Readiness, ServerConfig, ServerTls, metrics_port, tls::TlsError};
use sida_telemetry::metrics::{self, Metrics};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::connection::ConnectionArguments;
use crate::{bad_configuration::BadConfiguration, open_files, time_span, whole_number};

/// Says that a port is not served.
const OFF: &str = "off";

/// Where the nodes of a cluster serve metrics unless the flag says otherwise: Prometheus is elsewhere.
pub(crate) const METRICS_OF_NODES: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 9090);

/// Where a server for OpenAI's clients listens.
#[derive(Args, Clone, Debug)]
pub(crate) struct HttpArguments {
    /// Serve OpenAI's clients by HTTP at http://HOST:PORT/v1; off: nowhere [default: `up` 127.0.0.1:8000 if it is free,
    /// `coordinator` nowhere]
    #[arg(long, value_name = "HOST:PORT")]
    http_listen: Option<String>,
    /// Let web pages of these origins ask that port from browsers, as https://chat.example.org, with commas between them; *
    /// stands for all [default: none]
    #[arg(long, value_name = "ORIGINS", value_delimiter = ',')]
    http_cors_origins: Vec<CorsOrigin>,
}

impl HttpArguments {
    /// Which pages may ask.
    pub(crate) fn apply(&self, config: &mut CoordinatorConfig) {
        config.http_cors_origins = self.http_cors_origins.clone();
    }

    /// The port of the flag, or `default` if that is free.
    pub(crate) async fn bind(&self, default: Option<SocketAddr>) -> anyhow::Result<Option<TcpListener>> {
        match (self.http_listen.as_deref(), default) {
            (Some(OFF), _) | (None, None) => Ok(None),
            (Some(address), _) => Ok(Some(bind("--http-listen", address).await?)),
            (None, Some(default)) => match TcpListener::bind(default).await {
                Ok(listener) => Ok(Some(listener)),
                Err(error) => {
                    tracing::warn!("HTTP is not served: {default}: {error}; name a port by --http-listen");
                    Ok(None)
                }
            },
        }
    }
}

/// What every server has.
#[derive(Args, Clone, Debug)]
pub(crate) struct ServerArguments {
    /// Serve Prometheus metrics at http://HOST:PORT/metrics; off: nowhere [default: port 9090 if it is free]
    #[arg(long, value_name = "HOST:PORT")]
    metrics_listen: Option<String>,
    /// PEM file of the authorities whose clients are let in [default: all clients]
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Of those, let in only clients with one of these names in their certificate (subject, DNS name or URI), with commas
    /// between them; one that begins with * stands for all that end so [default: all of them]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "tls_client_ca")]
    tls_client_names: Vec<NamePattern>,
    /// How long requests may go on after Ctrl-C or SIGTERM
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time_span::parse)]
    drain: Duration,
    /// How many clients may be connected; one more takes the place of who had no request for the longest time
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = whole_number::one_or_more::<u32>)]
    connections_max: u32,
    /// How long a client may take to begin to speak: TLS and HTTP/2's first bytes, or the head of a request for metrics
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time_span::parse)]
    handshake_timeout: Duration,
    /// How long a client may stay connected without a request; it connects again for its next
    #[arg(long, value_name = "TIME", default_value = "30m", value_parser = time_span::parse)]
    idle_timeout: Duration,
    /// How long a client may take to send a request, or a message of a stream, and may take nothing of its answer
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = time_span::parse)]
    stall_timeout: Duration,
    /// How long a client may be silent before it is asked whether it is still there
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = time_span::parse)]
    keepalive_interval: Duration,
    /// How long it may take to say so
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time_span::parse)]
    keepalive_timeout: Duration,
}

impl ServerArguments {
    /// The gRPC server's settings; it lets in whom `gate` does and tells `readiness` whether it serves. Refuses files of TLS
    /// that cannot be used: a model may be loaded for minutes before it begins to serve.
    pub(crate) fn server(
        &self,
        connection: &ConnectionArguments,
        gate: Gate,
        readiness: Readiness,
    ) -> Result<ServerConfig, TlsError> {
        open_files::allow(self.connections_max);
        let identity = connection.tls_cert.clone().zip(connection.tls_key.clone());
        let tls = identity.map(|(certificate, key)| ServerTls {
            certificate,
            key,
            client_authorities: self.tls_client_ca.clone(),
            client_names: self.tls_client_names.clone(),
        });
        tls.as_ref().map_or(Ok(()), ServerTls::check)?;
        Ok(ServerConfig {
            drain_limit: self.drain,
            connections_max: self.connections_max as usize,
            handshake_timeout: self.handshake_timeout,
            idle_timeout: self.idle_timeout,
            stall_timeout: self.stall_timeout,
            keepalive_interval: self.keepalive_interval,
            keepalive_timeout: self.keepalive_timeout,
            tls,
            gate,
            readiness,
            ..ServerConfig::default()
        })
    }

    /// Installs the metrics recorder, and takes the address of the flag for it, or `default` if that is
    /// free: a second node of one machine shall start all the same. Call before the nodes start: what they
    /// record earlier is lost.
    pub(crate) async fn metrics(&self, default: SocketAddr) -> anyhow::Result<MetricsPort> {
        let listener = match self.metrics_listen.as_deref() {
            Some(OFF) => None,
            Some(address) => Some(bind("--metrics-listen", address).await?),
            None => match TcpListener::bind(default).await {
                Ok(listener) => Some(listener),
                Err(error) => {
                    tracing::warn!("no metrics are served: {default}: {error}; name a port by --metrics-listen");
                    None
                }
            },
        };
        let open = listener.map(|listener| anyhow::Ok((metrics::install()?, listener))).transpose()?;
        Ok(MetricsPort { open, head_timeout: self.handshake_timeout })
    }
}

/// The port of metrics, where nobody is answered yet.
pub(crate) struct MetricsPort {
    open: Option<(Metrics, TcpListener)>,
    head_timeout: Duration,
}

impl MetricsPort {
    /// Answers from here on, and says where: once nothing of what was said to the process can be refused any more, and before it
    /// loads, which may take long. Answers until the process ends: who scrapes wants the last counts of a node that drains, too.
    pub(crate) fn serve(self, readiness: Readiness) {
        let Some((metrics, listener)) = self.open else { return };
        if let Ok(address) = listener.local_addr() {
            tracing::info!("metrics on http://{address}/metrics");
        }
        tokio::spawn(metrics_port::serve(metrics, readiness, listener, self.head_timeout, CancellationToken::new()));
    }
}

/// A listener on the `host:port` that a flag, or what is called so, says; port 0 takes any that is free.
pub(crate) async fn bind(flag: &str, address: &str) -> Result<TcpListener, BadConfiguration> {
    let refused = |error: io::Error| match error.kind() {
        io::ErrorKind::InvalidInput => BadConfiguration::because(
            format!("{flag} is {address:?}, expected HOST:PORT with a port of 0 to 65535"),
            error,
        ),
        _ => BadConfiguration::because(format!("cannot listen on {flag} {address}"), error),
    };
    let resolved: Vec<SocketAddr> = address.to_socket_addrs().map_err(refused)?.collect();
    TcpListener::bind(resolved.as_slice()).await.map_err(refused)
}

/// Tells the address on standard output, for scripts that start a node on port 0.
pub(crate) fn announce(listener: &TcpListener) -> anyhow::Result<()> {
    writeln!(io::stdout(), "listening on {}", listener.local_addr()?)?;
    Ok(())
}

/// The same of the doors of a coordinator.
pub(crate) fn announce_doors(listeners: &Listeners) -> anyhow::Result<()> {
    if let Some(http) = &listeners.http {
        writeln!(io::stdout(), "listening for HTTP on {}", http.local_addr()?)?;
    }
    announce(&listeners.grpc)
}
