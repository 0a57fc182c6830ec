//! Where spans go: to an OpenTelemetry collector by OTLP over gRPC, in batches, beside everything else. Started once
//! per process by the command line where `--otlp-endpoint` says so; without it there are no spans at all.
//!
//! Spans wait in a bounded queue; when the collector is slow or away they are dropped, never waited for.

use std::{
    io,
    sync::OnceLock,
    time::{Duration, Instant, SystemTime},
};

use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{ExporterBuildError, RetryPolicy, SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanProcessor},
};
use thiserror::Error;
use tokio::runtime::{Builder, Runtime};

/// Spans that wait at most: some 10 MB of them.
const QUEUE_SPANS_MAX: usize = 16_384;
/// Spans of one message to the collector.
const BATCH_SPANS_MAX: usize = 1024;
/// How long spans wait for others to go with them.
const BATCH_DELAY: Duration = Duration::from_secs(1);
/// How long the collector may take for a message, and what is left may take at the end.
const EXPORT_LIMIT: Duration = Duration::from_secs(5);

/// How often a message is sent again that the collector did not take, a tenth of a second later: a connection may just have ended.
/// A process that ends waits for it, and would for two seconds with as many as the exporter has by itself.
const RETRIES_MAX: usize = 1;

static EXPORT: OnceLock<Export> = OnceLock::new();

/// Which spans go where.
#[derive(Clone, Debug, PartialEq)]
pub struct OtlpConfig {
    /// The collector, as `http://collector:4317`.
    pub endpoint: String,
    /// The share of traces that are recorded where the caller did not decide, 0 to 1.
    pub sampling: f64,
    /// What this process is: `service.name`.
    pub service: String,
    /// Which of them: `service.instance.id`.
    pub instance: String,
}

/// Why spans cannot be exported.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum OtlpError {
    #[error("cannot make an exporter for {endpoint}: {source}")]
    Exporter { endpoint: String, source: ExporterBuildError },
    #[error("cannot start its thread: {0}")]
    Thread(#[from] io::Error),
    #[error("spans are exported already")]
    AlreadyOn,
}

/// Times of spans: the system's clock when export began, and what has passed since, which no correction of that clock
/// can turn back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    origin: Instant,
    origin_time: SystemTime,
}

impl Clock {
    pub(crate) fn at(&self, instant: Instant) -> SystemTime {
        match instant.checked_duration_since(self.origin) {
            Some(after) => self.origin_time + after,
            None => self.origin_time - self.origin.duration_since(instant),
        }
    }
}

struct Export {
    processor: BatchSpanProcessor,
    sampling: f64,
    clock: Clock,
    /// Carries the exporter's bytes, so that it lives as long as the process whatever runtime a command uses.
    _runtime: Runtime,
}

/// Sends what is left when it is dropped.
pub struct Exporting(());

/// Begins to export. The collector need not be there yet.
pub fn start(config: &OtlpConfig) -> Result<Exporting, OtlpError> {
    let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("otlp").enable_all().build()?;
    let in_runtime = runtime.enter();
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&config.endpoint)
        .with_timeout(EXPORT_LIMIT)
        .with_retry_policy(RetryPolicy::default().with_max_retries(RETRIES_MAX))
        .build()
        .map_err(|source| OtlpError::Exporter { endpoint: config.endpoint.clone(), source })?;
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(QUEUE_SPANS_MAX)
        .with_max_export_batch_size(BATCH_SPANS_MAX)
        .with_scheduled_delay(BATCH_DELAY)
        .build();
    let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
    drop(in_runtime);
    let resource = Resource::builder_empty()
        .with_service_name(config.service.clone())
        .with_attribute(KeyValue::new("service.namespace", "sida"))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("service.instance.id", config.instance.clone()))
        .build();
    processor.set_resource(&resource);
    let clock = Clock { origin: Instant::now(), origin_time: SystemTime::now() };
    let export = Export { processor, sampling: config.sampling, clock, _runtime: runtime };
    EXPORT.set(export).map_err(|_| OtlpError::AlreadyOn)?;
    Ok(Exporting(()))
}

impl Drop for Exporting {
    fn drop(&mut self) {
        if let Some(export) = EXPORT.get()
            && let Err(error) = export.processor.shutdown_with_timeout(EXPORT_LIMIT)
        {
            tracing::debug!(%error, "the last spans were not taken");
        }
    }
}

/// Whether spans are recorded at all.
pub(crate) fn is_on() -> bool {
    EXPORT.get().is_some()
}

/// Whether a trace that begins here is recorded.
pub(crate) fn samples_root() -> bool {
    EXPORT.get().is_some_and(|export| rand::random::<f64>() < export.sampling)
}

/// Puts a span into the queue.
pub(crate) fn send(span: impl FnOnce(&Clock) -> SpanData) {
    if let Some(export) = EXPORT.get() {
        export.processor.on_end(span(&export.clock));
    }
}

/// Who made the spans.
pub(crate) fn scope() -> InstrumentationScope {
    static SCOPE: OnceLock<InstrumentationScope> = OnceLock::new();
    SCOPE.get_or_init(|| InstrumentationScope::builder("sida").with_version(env!("CARGO_PKG_VERSION")).build()).clone()
}
