//! Metrics of this process: the recorder behind `counter!`, `gauge!` and `histogram!`, and the small HTTP
//! server that Prometheus and the kubelet ask. [`install`] is called once by whoever serves metrics; without
//! it every record is dropped at no cost, which is what `sida ask` and most tests want.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use thiserror::Error;
use tokio::{net::TcpListener, time};
use tokio_util::sync::CancellationToken;

use crate::names;

/// Upper bounds of duration buckets, in seconds: 50 us (a small expert call) to 2 minutes (a long stream).
const DURATION_BUCKETS: &[f64] = &[
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0, 120.0,
];

/// Upper bounds of token buckets: one decoding sequence to the largest batch.
const TOKEN_BUCKETS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// How often histogram samples move from their buffers to their buckets: bounds memory between scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Why metrics cannot be had.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum MetricsError {
    #[error("cannot install the metrics recorder: {0}")]
    Install(#[from] BuildError),
    #[error("metrics server failed: {0}")]
    Serve(#[from] io::Error),
}

/// The recorder of this process.
#[derive(Clone)]
pub struct Metrics {
    recorder: PrometheusHandle,
}

/// Whether this process can take requests, as a metrics server's `/readyz` asks it.
pub type Readiness = Arc<dyn Fn() -> bool + Send + Sync>;

/// Installs the recorder; later calls in the same process get the same one, so that several nodes may ask.
pub fn install() -> Result<Metrics, MetricsError> {
    static INSTALLED: Mutex<Option<Metrics>> = Mutex::new(None);
    // A panic while it was held leaves either nothing or a whole recorder: both are usable.
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(metrics) = &*installed {
        return Ok(metrics.clone());
    }
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), DURATION_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_tokens".into()), TOKEN_BUCKETS)?
        .install_recorder()?;
    names::describe();
    Ok(installed.insert(Metrics { recorder }).clone())
}

impl Metrics {
    /// Every metric as Prometheus text.
    pub fn render(&self) -> String {
        self.recorder.render()
    }

    /// Answers `GET /metrics`, `/healthz` (this process runs) and `/readyz` (503 while `ready` says no) on
    /// `listener` until `shutdown`.
    pub async fn serve(
        &self,
        listener: TcpListener,
        ready: Readiness,
        shutdown: CancellationToken,
    ) -> Result<(), MetricsError> {
        let routes = Router::new()
            .route("/metrics", get(scrape))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(readiness))
            .with_state(Shared { recorder: self.recorder.clone(), ready });
        let serving = axum::serve(listener, routes).with_graceful_shutdown(shutdown.clone().cancelled_owned());
        // A scraper that keeps its connection open must not hold the process up: shutdown ends the wait.
        tokio::select! {
            served = async { serving.await } => served.map_err(MetricsError::from),
            () = self.keep_up() => Ok(()),
            () = shutdown.cancelled() => Ok(()),
        }
    }

    async fn keep_up(&self) {
        let mut ticks = time::interval(UPKEEP_INTERVAL);
        loop {
            ticks.tick().await;
            self.recorder.run_upkeep();
        }
    }
}

#[derive(Clone)]
struct Shared {
    recorder: PrometheusHandle,
    ready: Readiness,
}

async fn scrape(State(shared): State<Shared>) -> impl IntoResponse {
    ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], shared.recorder.render())
}

async fn readiness(State(shared): State<Shared>) -> (StatusCode, &'static str) {
    if (shared.ready)() { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    async fn request(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_scrape_sees_buckets_and_help_and_the_server_stops() {
        // Broken: Prometheus would scrape summaries or nothing, or the process would not end.
        let metrics = install().unwrap();
        let again = install().unwrap();
        crate::histogram!(names::PREDICT_DURATION_SECONDS).record(0.0003);
        crate::counter!(names::EXPERT_LOADS_TOTAL, names::KIND => "demand").increment(2);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let server = {
            let shutdown = shutdown.clone();
            tokio::spawn(async move { again.serve(listener, Arc::new(|| false), shutdown).await })
        };
        let text = request(address, "/metrics").await;
        assert!(text.contains("sida_predict_duration_seconds_bucket{le=\"0.0005\"} 1"), "{text}");
        assert!(text.contains("# HELP sida_expert_loads_total "), "{text}");
        assert!(text.contains("sida_expert_loads_total{kind=\"demand\"} 2"), "{text}");
        assert!(metrics.render().contains("sida_expert_loads_total"));
        assert!(request(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(request(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        let held_open = TcpStream::connect(address).await.unwrap();
        shutdown.cancel();
        time::timeout(Duration::from_secs(2), server).await.unwrap().unwrap().unwrap();
        drop(held_open);
    }

    #[test]
    fn every_histogram_has_buckets() {
        // Broken: a histogram would be exported as a summary, which cannot be added up over nodes.
        for (name, ..) in names::HISTOGRAMS {
            assert!(name.ends_with("_seconds") || name.ends_with("_tokens"), "{name} has no buckets");
        }
    }
}
