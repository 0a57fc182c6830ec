//! The server of every node: its own services, health and reflection behind the same layers and limits. Nodes
//! build one in `run` and serve it on the listener they were given.
//!
//! ```
//! use sida_rpc::{Server, ServerConfig, ServerError};
//! use tokio::net::TcpListener;
//! use tokio_util::sync::CancellationToken;
//! use tonic::service::Routes;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), ServerError> {
//! # let node = Routes::default();
//! # let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
//! let shutdown = CancellationToken::new();
//! # shutdown.cancel();
//! Server::new(ServerConfig::default())
//!     .routes(node)
//!     .check("sida.v1.Experts", || async { Ok(()) })
//!     .serve(listener, shutdown)
//!     .await
//! # }
//! ```

use std::{future::Future, sync::Arc, time::Duration};

use hyper::server::conn::http2;
use hyper_util::rt::TokioTimer;
use thiserror::Error;
use tokio::{net::TcpListener, time};
use tokio_util::sync::CancellationToken;
use tonic::{Status, codec::CompressionEncoding, service::Routes};
use tonic_health::{
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};
use tower::ServiceBuilder;

use crate::{
    accept::accept,
    answer_body::AnswerExecutor,
    around::Around,
    authentication::{AuthenticationLayer, Gate, is_open_service},
    client_streams::client_streams,
    connection::{ConnectionService, Connector},
    deadline,
    drain::Drain,
    health::{Alive, Check, CheckResult, Health, Readiness},
    health_service::NodeHealth,
    key_taken_away,
    metadata::{self, HEADER_LIST_BYTES_MAX},
    outcome::{Observer, Outcome, OutcomeLayer},
    refusals,
    reload::follow_if_any,
    request_id,
    tls::{HTTP2, PortTls, ServerTls, TlsError},
    trace,
};

/// The largest message taken or sent. tonic keeps this limit in each generated service and client, so whoever
/// makes one has to pass it on by `max_decoding_message_size` and `max_encoding_message_size`.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// What is left after the drain limit for the last statuses to go out before connections are dropped.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(500);

/// Limits of a server. The default is right for traffic between nodes on one network.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// HTTP/2 window of one stream: how many bytes may be on their way before the receiver has read any. A
    /// batch's activations are MiB, so that tonic's 1 MiB would stop them once per round trip.
    pub stream_window_bytes: u32,
    /// HTTP/2 window of all streams of a connection.
    pub connection_window_bytes: u32,
    /// Largest HTTP/2 frame: large payloads in few frames.
    pub frame_bytes_max: u32,
    /// Streams of one connection at a time; a peer that opens more waits.
    pub streams_per_connection_max: u32,
    /// Connections at a time. When one more comes, the one that had no call for the longest time has to leave; while
    /// all have calls, it waits.
    pub connections_max: usize,
    /// How long a peer may take from connecting to speaking HTTP/2, TLS included.
    pub handshake_timeout: Duration,
    /// How long a connection may be without a call before it is told to leave. Clients connect again when they call.
    pub idle_timeout: Duration,
    /// How long a peer may take for a request, or for one message of a stream, from its first byte to its last; and how
    /// long it may take nothing of an answer.
    pub stall_timeout: Duration,
    /// Memory of all requests that are being received, as far as they are large. The largest of them ends when it is
    /// exceeded.
    pub receiving_bytes_max: usize,
    /// How fast large requests come, all together; `None`: as they are sent.
    pub large_bytes_per_second: Option<u32>,
    /// How often a silent connection is pinged, to find peers that are gone without a word.
    pub keepalive_interval: Duration,
    /// How long such a ping may take.
    pub keepalive_timeout: Duration,
    /// How long calls in flight may go on after shutdown.
    pub drain_limit: Duration,
    /// Time between two health checks, and the longest that one may take.
    pub health_period: Duration,
    /// Set to whether the node is SERVING.
    pub readiness: Readiness,
    /// TLS; `None`: plain text.
    pub tls: Option<ServerTls>,
    /// Who may call what tells more than whether the node is well.
    pub gate: Gate,
    /// How often files of certificates and keys are looked at for changes.
    pub reload_period: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            stream_window_bytes: 16 << 20,
            connection_window_bytes: 32 << 20,
            frame_bytes_max: 1 << 20,
            streams_per_connection_max: 1024,
            connections_max: 1024,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30 * 60),
            stall_timeout: Duration::from_secs(60),
            receiving_bytes_max: 1 << 30,
            large_bytes_per_second: None,
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            drain_limit: Duration::from_secs(30),
            health_period: Duration::from_secs(5),
            readiness: Readiness::default(),
            tls: None,
            gate: Gate::default(),
            reload_period: Duration::from_secs(5),
        }
    }
}

/// Why a server cannot serve.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ServerError {
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("descriptors: {0}")]
    Descriptors(#[from] prost::DecodeError),
}

/// A server that is being put together.
pub struct Server {
    config: ServerConfig,
    routes: Routes,
    descriptors: Vec<&'static [u8]>,
    checks: Vec<Check>,
    is_alive: Option<Alive>,
    leaving: Option<CancellationToken>,
    observer: Option<Observer>,
}

impl Server {
    /// A server with nothing to serve yet.
    pub fn new(config: ServerConfig) -> Self {
        Self {
            config,
            routes: Routes::default(),
            descriptors: Vec::new(),
            checks: Vec::new(),
            is_alive: None,
            leaving: None,
            observer: None,
        }
    }

    /// Serves `routes`: all of the node's own services.
    #[must_use]
    pub fn routes(mut self, routes: Routes) -> Self {
        self.routes = routes;
        self
    }

    /// Reflects an encoded `FileDescriptorSet`; listed are the services that have a [`check`](Self::check).
    #[must_use]
    pub fn descriptors(mut self, descriptors: &'static [u8]) -> Self {
        self.descriptors.push(descriptors);
        self
    }

    /// Reports `service` (as `sida.v1.Experts`) as SERVING while `check` passes.
    #[must_use]
    pub fn check<F, R>(mut self, service: &'static str, check: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = CheckResult> + Send + 'static,
    {
        self.checks.push(Check::new(service, check));
        self
    }

    /// The node is alive while `is_alive` says so, always if this is not called; see [`Readiness::is_alive`]. Asked at
    /// every health check.
    #[must_use]
    pub fn alive(mut self, is_alive: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.is_alive = Some(Box::new(is_alive));
        self
    }

    /// Health says NOT_SERVING from when `leaving` is cancelled, which may be before `shutdown`: the node still
    /// answers while others are told that it goes.
    #[must_use]
    pub fn leaving(mut self, leaving: CancellationToken) -> Self {
        self.leaving = Some(leaving);
        self
    }

    /// Tells `observer` of every call that ended, those that no handler saw included.
    #[must_use]
    pub fn observed(mut self, observer: impl Fn(Outcome<'_>) + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Serves on `listener` until `shutdown`. Then health says NOT_SERVING, no connection is accepted, calls in
    /// flight may finish, and at the drain limit what is left ends with UNAVAILABLE.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) -> Result<(), ServerError> {
        let Self { config, routes, descriptors, checks, is_alive, leaving, observer } = self;
        let leaving = leaving.unwrap_or_else(|| shutdown.clone());
        let reporter = HealthReporter::new();
        let known = HealthService::from_health_reporter(reporter.clone());
        let health_service = HealthServer::new(NodeHealth { known }).accept_compressed(CompressionEncoding::Gzip);
        let period = config.health_period;
        let health = Health { reporter, readiness: config.readiness.clone(), checks, is_alive, period };
        health.register().await;
        let drain = Drain::default();
        let services = health.checks.iter().map(|check| check.service);
        let routes = with_reflection(routes.add_service(health_service), &descriptors, services)?;
        let tls = PortTls::open_if_any(config.tls.clone(), &[HTTP2])?;
        let service = layered(routes, observer, config.gate.clone(), drain.clone());
        let connector = Connector::new(&config, service, tls.clone(), None, Some(client_streams(&descriptors)?));
        let serve = |stream, peer| connector.clone().serve(stream, peer);
        let serving = accept(listener, config.connections_max, &drain.shutdown, serve);
        let ending = async {
            health.run(&leaving).await;
            shutdown.cancelled().await;
            drain.shutdown.cancel();
            time::sleep(config.drain_limit).await;
            drain.limit.cancel();
            time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            () = serving => Ok(()),
            never = follow_if_any(tls, config.reload_period) => match never {},
            () = config.gate.follow(config.reload_period) => Ok(()),
            () = ending => {
                tracing::warn!(limit = ?config.drain_limit, "connections were still open at the drain limit");
                Ok(())
            }
        }
    }
}

/// `routes` behind what every call goes through.
fn layered(routes: Routes, observer: Option<Observer>, gate: Gate, drain: Drain) -> impl ConnectionService {
    let refuse = |fault| Status::from(fault).into_http();
    ServiceBuilder::new()
        // Outermost: a span is the whole call, and log lines within carry its trace.
        .layer(Around(trace::traced))
        // Whatever is answered further in carries the request's name.
        .layer(Around(request_id::named))
        // Counts what the layers below refuse, too.
        .layer(OutcomeLayer { observer })
        .layer(Around(metadata::bounded))
        // Whoever may not call learns no more than that.
        .layer(AuthenticationLayer::new(gate, is_open_service, refuse))
        .layer(Around(deadline::ended_in_time))
        .layer(Around(key_taken_away::ended_without_key))
        // Handlers end by it, and the layers above still see a proper response.
        .layer(Around(move |inner: &mut _, request| drain.ended(inner, request)))
        .layer(Around(refusals::explained))
        .service(routes.prepare())
}

/// HTTP/2 with our limits.
pub(crate) fn http2_builder(config: &ServerConfig) -> http2::Builder<AnswerExecutor> {
    let mut builder = http2::Builder::new(AnswerExecutor { stall_timeout: config.stall_timeout });
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(config.stream_window_bytes)
        .initial_connection_window_size(config.connection_window_bytes)
        .max_frame_size(config.frame_bytes_max)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .max_concurrent_streams(config.streams_per_connection_max)
        .keep_alive_interval(config.keepalive_interval)
        .keep_alive_timeout(config.keepalive_timeout);
    builder
}

/// `routes` with reflection in both versions: v1alpha is what older tools still ask for. It lists `services` and what
/// every node has, although the descriptors tell of more: a client must not be shown what nobody answers here.
fn with_reflection<'a>(
    routes: Routes,
    descriptors: &[&'static [u8]],
    services: impl Iterator<Item = &'a str> + Clone,
) -> Result<Routes, ServerError> {
    let of_every_node =
        ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"];
    let sets = [
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let configured = || {
        let builder = tonic_reflection::server::Builder::configure().include_reflection_service(false);
        let sets = sets.iter().chain(descriptors);
        let builder = sets.fold(builder, |builder, set| builder.register_encoded_file_descriptor_set(set));
        services.clone().chain(of_every_node).fold(builder, |builder, name| builder.with_service_name(name))
    };
    let v1 = configured().build_v1()?.accept_compressed(CompressionEncoding::Gzip);
    let v1alpha = configured().build_v1alpha()?.accept_compressed(CompressionEncoding::Gzip);
    Ok(routes.add_service(v1).add_service(v1alpha))
}
