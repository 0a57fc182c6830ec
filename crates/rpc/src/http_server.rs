//! The server of what is not gRPC: HTTP/1.1 and HTTP/2 on a port of its own, whose connections have the limits, the TLS and
//! the end of those of [`crate::server`]. Every request gets a trace and an id; what it is answered with is up to the routes.
//!
//! ```
//! use axum::{Router, routing::get};
//! use sida_rpc::{ServerConfig, ServerError, http_server};
//! use tokio::net::TcpListener;
//! use tokio_util::sync::CancellationToken;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), ServerError> {
//! let routes = Router::new().route("/health", get(|| async { "yes" }));
//! # let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
//! let (shutdown, late) = (CancellationToken::new(), CancellationToken::new());
//! # shutdown.cancel();
//! http_server::serve(&ServerConfig::default(), routes, listener, shutdown, late).await
//! # }
//! ```

use std::sync::Arc;

use axum::Router;
use http::Response;
use hyper::server::conn::http1;
use hyper_util::rt::TokioTimer;
use tokio::{net::TcpListener, time};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::ServiceBuilder;

use crate::{
    accept::accept,
    connection::{CallLimits, ConnectionService, Connector, Http1},
    http_trace::HttpTraceLayer,
    metadata::HEADER_LIST_BYTES_MAX,
    receiving::Receiving,
    reload::Reloading,
    request_id::RequestIdLayer,
    server::{LAST_WORDS, ServerConfig, ServerError, http2_builder},
    tls::{HTTP1, HTTP2, PortTls},
};

/// Serves `routes` on `listener` until `shutdown`. Then no connection is accepted and requests in flight may finish; at the
/// drain limit `late` is cancelled, by which the routes end what is left with an error, and soon after connections are
/// dropped.
pub async fn serve(
    config: &ServerConfig,
    routes: Router,
    listener: TcpListener,
    shutdown: CancellationToken,
    late: CancellationToken,
) -> Result<(), ServerError> {
    let port_tls = config.tls.clone().map(|tls| PortTls { tls, protocols: &[HTTP2, HTTP1] });
    let tls = port_tls.map(Reloading::open).transpose()?;
    let connector = Arc::new(Connector {
        service: layered(routes),
        http2: http2_builder(config),
        http1: Some(http1_of(config)),
        tls: tls.clone(),
        client_names: config.tls.clone().map_or_else(Vec::new, |tls| tls.client_names),
        handshake_timeout: config.handshake_timeout,
        idle_timeout: config.idle_timeout,
        keepalive: (config.keepalive_interval, config.keepalive_timeout),
        // A request is its whole body here.
        limits: Arc::new(CallLimits {
            stall_timeout: config.stall_timeout,
            receiving: Receiving::new(config.receiving_bytes_max),
            streams: None,
        }),
    });
    let serving =
        accept(listener, config.connections_max, &shutdown, |stream, peer| connector.clone().serve(stream, peer));
    let ending = async {
        shutdown.cancelled().await;
        time::sleep(config.drain_limit).await;
        late.cancel();
        time::sleep(LAST_WORDS).await;
    };
    let following = async {
        match tls {
            Some(tls) => match tls.follow(config.reload_period).await {},
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = serving => {}
        () = following => {}
        () = ending => tracing::warn!(limit = ?config.drain_limit, "HTTP connections were still open at the drain limit"),
    }
    Ok(())
}

fn layered(routes: Router) -> impl ConnectionService {
    ServiceBuilder::new()
        // Outermost: a span is the whole request, and log lines within carry its trace.
        .layer(HttpTraceLayer)
        .layer(RequestIdLayer)
        .map_response(|response: Response<axum::body::Body>| response.map(Body::new))
        .service(routes)
}

fn http1_of(config: &ServerConfig) -> Http1 {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        // Counted by ourselves, from the first byte of a head.
        .header_read_timeout(None)
        .max_buf_size(HEADER_LIST_BYTES_MAX as usize);
    Http1 { builder, head_timeout: config.handshake_timeout }
}
