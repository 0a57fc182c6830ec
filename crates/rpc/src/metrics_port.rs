//! The small HTTP server beside a node's gRPC: what Prometheus and the kubelet ask. `GET /metrics`, and `/healthz` and
//! `/readyz` with 200, or 503 where the node says no.

use std::time::Duration;

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use sida_telemetry::metrics::Metrics;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::{accept::accept, health::Readiness};

/// Connections at a time. One that asks nothing leaves when another comes.
const CONNECTIONS_MAX: usize = 64;

/// Serves `metrics` and `readiness` on `listener` until `shutdown`, and measures the runtime that it is called in. A
/// request's head may take `head_timeout`, the wait for it included.
pub async fn serve(
    metrics: Metrics,
    readiness: Readiness,
    listener: TcpListener,
    head_timeout: Duration,
    shutdown: CancellationToken,
) {
    let upkeep = metrics.clone();
    let routes = Router::new()
        .route("/metrics", get(|State((metrics, _)): State<Shared>| async move { scrape(&metrics) }))
        .route("/healthz", get(|State((_, readiness)): State<Shared>| async move { told(readiness.is_alive()) }))
        .route("/readyz", get(|State((_, readiness)): State<Shared>| async move { told(readiness.is_ready()) }))
        .with_state((metrics, readiness));
    let mut http1 = http1::Builder::new();
    http1.timer(TokioTimer::new()).header_read_timeout(head_timeout);
    let serve = |stream: TcpStream, peer: std::sync::Arc<crate::peer::Peer>| {
        let connection = http1.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes.clone()));
        async move {
            tokio::select! {
                served = connection => if let Err(error) = served {
                    tracing::debug!(%error, "a connection to the metrics broke off");
                },
                () = peer.leave.cancelled() => {}
            }
        }
    };
    tokio::select! {
        () = accept(listener, CONNECTIONS_MAX, &shutdown, serve) => {}
        never = upkeep.keep_up() => match never {},
    }
}

type Shared = (Metrics, Readiness);

fn scrape(metrics: &Metrics) -> impl IntoResponse + use<> {
    ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], metrics.render())
}

fn told(is_so: bool) -> (StatusCode, &'static str) {
    if is_so { (StatusCode::OK, "yes\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "no\n") }
}
