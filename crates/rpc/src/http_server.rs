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
    around::Around,
    connection::{ConnectionService, Connector, Http1},
    http_trace,
    metadata::HEADER_LIST_BYTES_MAX,
    reload::follow_if_any,
    request_id,
    server::{LAST_WORDS, ServerConfig, ServerError},
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
    let tls = PortTls::open_if_any(config.tls.clone(), &[HTTP2, HTTP1])?;
    // A request is its whole body here: nothing is a stream of messages.
    let connector = Connector::new(config, layered(routes), tls.clone(), Some(http1_of(config)), None);
    let serving =
        accept(listener, config.connections_max, &shutdown, |stream, peer| connector.clone().serve(stream, peer));
    let ending = async {
        shutdown.cancelled().await;
        time::sleep(config.drain_limit).await;
        late.cancel();
        time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        () = serving => {}
        never = follow_if_any(tls, config.reload_period) => match never {},
        () = ending => tracing::warn!(limit = ?config.drain_limit, "HTTP connections were still open at the drain limit"),
    }
    Ok(())
}

fn layered(routes: Router) -> impl ConnectionService {
    ServiceBuilder::new()
        // Outermost: a span is the whole request, and log lines within carry its trace.
        .layer(Around(http_trace::traced))
        .layer(Around(request_id::named))
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
