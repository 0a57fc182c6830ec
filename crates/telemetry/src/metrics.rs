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

use crate::{
    names::{self, Kind, On},
    runtime::RuntimeMeasures,
};

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

/// What `/healthz` and `/readyz` tell.
#[derive(Clone)]
pub struct Probes {
    /// Whether what computes in this process still does. A process that says no has to be started again.
    pub is_alive: Probe,
    /// Whether this process can take requests now.
    pub is_ready: Probe,
}

/// Asked at every request.
pub type Probe = Arc<dyn Fn() -> bool + Send + Sync>;

/// Installs the recorder; later calls in the same process get the same one, so that several nodes may ask.
pub fn install() -> Result<Metrics, MetricsError> {
    static INSTALLED: Mutex<Option<Metrics>> = Mutex::new(None);
    // A panic while it was held leaves either nothing or a whole recorder: both are usable.
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(metrics) = &*installed {
        return Ok(metrics.clone());
    }
    let mut builder = PrometheusBuilder::new();
    for metric in names::CATALOGUE {
        if let Kind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.into()), buckets)?;
        }
    }
    let recorder = builder.install_recorder()?;
    names::describe();
    names::declare(On::All);
    let revision = option_env!("SIDA_REVISION").unwrap_or("unknown");
    let version = env!("CARGO_PKG_VERSION");
    crate::gauge!(names::BUILD_INFO, names::VERSION => version, names::REVISION => revision).set(1.0);
    Ok(installed.insert(Metrics { recorder }).clone())
}

impl Metrics {
    /// Every metric as Prometheus text.
    pub fn render(&self) -> String {
        self.recorder.render()
    }

    /// Answers `GET /metrics`, `/healthz` and `/readyz` (200, or 503 where a probe says no) on `listener` until
    /// `shutdown`, and measures the runtime that it is called in.
    pub async fn serve(
        &self,
        listener: TcpListener,
        probes: Probes,
        shutdown: CancellationToken,
    ) -> Result<(), MetricsError> {
        let routes = Router::new()
            .route("/metrics", get(scrape))
            .route("/healthz", get(|State(shared): State<Shared>| async move { told(&shared.probes.is_alive) }))
            .route("/readyz", get(|State(shared): State<Shared>| async move { told(&shared.probes.is_ready) }))
            .with_state(Shared { recorder: self.recorder.clone(), probes });
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
        let mut runtime = RuntimeMeasures::of_current();
        loop {
            ticks.tick().await;
            runtime.look();
            self.recorder.run_upkeep();
        }
    }
}

#[derive(Clone)]
struct Shared {
    recorder: PrometheusHandle,
    probes: Probes,
}

async fn scrape(State(shared): State<Shared>) -> impl IntoResponse {
    ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], shared.recorder.render())
}

fn told(probe: &Probe) -> (StatusCode, &'static str) {
    if probe() { (StatusCode::OK, "yes\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "no\n") }
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
            let probes = Probes { is_alive: Arc::new(|| true), is_ready: Arc::new(|| false) };
            tokio::spawn(async move { again.serve(listener, probes, shutdown).await })
        };
        let text = request(address, "/metrics").await;
        assert!(text.contains("sida_predict_duration_seconds_bucket{le=\"0.0005\"} 1"), "{text}");
        assert!(text.contains("sida_build_info{version=\""), "{text}");
        assert!(text.contains("sida_runtime_workers "), "{text}");
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
}
