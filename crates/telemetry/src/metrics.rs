//! Metrics of this process: the recorder behind `counter!`, `gauge!` and `histogram!`. [`install`] is called once by
//! whoever serves metrics; without it every record is dropped at no cost, which is what `sida ask` and most tests want.

use std::{
    convert::Infallible,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use thiserror::Error;
use tokio::time;

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
}

/// The recorder of this process.
#[derive(Clone)]
pub struct Metrics {
    recorder: PrometheusHandle,
}

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

    /// Measures the runtime that it is called in, and bounds the memory of samples between scrapes, for ever.
    pub async fn keep_up(&self) -> Infallible {
        let mut ticks = time::interval(UPKEEP_INTERVAL);
        let mut runtime = RuntimeMeasures::of_current();
        loop {
            ticks.tick().await;
            runtime.look();
            self.recorder.run_upkeep();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_scrape_sees_buckets_and_help() {
        // Broken: Prometheus would scrape summaries or nothing.
        let metrics = install().unwrap();
        let again = install().unwrap();
        crate::histogram!(names::PREDICT_DURATION_SECONDS).record(0.0003);
        crate::counter!(names::EXPERT_LOADS_TOTAL, names::KIND => "demand").increment(2);
        let _never = time::timeout(Duration::from_millis(10), again.keep_up()).await;
        let text = again.render();
        assert!(text.contains("sida_predict_duration_seconds_bucket{le=\"0.0005\"} 1"), "{text}");
        assert!(text.contains("sida_build_info{version=\""), "{text}");
        assert!(text.contains("sida_runtime_workers "), "{text}");
        assert!(text.contains("# HELP sida_expert_loads_total "), "{text}");
        assert!(text.contains("sida_expert_loads_total{kind=\"demand\"} 2"), "{text}");
        assert!(metrics.render().contains("sida_expert_loads_total"));
    }
}
