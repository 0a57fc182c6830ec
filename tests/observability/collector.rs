//! An OpenTelemetry collector: takes traces by OTLP over gRPC, on a real socket, and keeps them for a test to look at.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::span::SpanKind,
};
use parking_lot::Mutex;
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

/// A span as it came.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    /// `service.name` of who sent it.
    pub(crate) service: String,
    pub(crate) trace: Vec<u8>,
    pub(crate) id: Vec<u8>,
    /// Empty: none.
    pub(crate) parent: Vec<u8>,
    pub(crate) name: String,
    pub(crate) kind: SpanKind,
    /// Nanoseconds since 1970.
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) attributes: BTreeMap<String, String>,
    /// Spans of any trace.
    pub(crate) links: Vec<Vec<u8>>,
}

/// A collector that runs until it is dropped.
pub(crate) struct Collector {
    received: Arc<Mutex<Vec<Received>>>,
    address: String,
    serving: JoinHandle<()>,
}

struct Receiver {
    received: Arc<Mutex<Vec<Received>>>,
    takes: bool,
}

impl Collector {
    pub(crate) async fn start() -> Self {
        Self::start_as(true).await
    }

    /// One that takes nothing, but keeps what it is sent all the same.
    pub(crate) async fn unavailable() -> Self {
        Self::start_as(false).await
    }

    async fn start_as(takes: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("its address"));
        let received = Arc::new(Mutex::new(Vec::new()));
        let service = TraceServiceServer::new(Receiver { received: received.clone(), takes });
        let server = tonic::transport::Server::builder().add_service(service);
        let serving = tokio::spawn(async move {
            server.serve_with_incoming(TcpIncoming::from(listener)).await.expect("a server");
        });
        Self { received, address, serving }
    }

    /// As `--otlp-endpoint` takes it.
    pub(crate) fn endpoint(&self) -> &str {
        &self.address
    }

    /// What came so far.
    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().clone()
    }

    /// Waits until what came is enough, and nothing more has come for a while; gives it.
    pub(crate) async fn wait(&self, is_enough: impl Fn(&[Received]) -> bool) -> Vec<Received> {
        let started = Instant::now();
        let mut before = 0;
        loop {
            tokio::time::sleep(Duration::from_millis(2500)).await; // Spans leave their nodes once a second.
            let now = self.received();
            if is_enough(&now) && now.len() == before {
                return now;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "{} spans came: {now:#?}", now.len());
            before = now.len();
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let text = |value: Option<Value>| match value {
            Some(Value::StringValue(text)) => text,
            Some(Value::IntValue(number)) => number.to_string(),
            other => format!("{other:?}"),
        };
        for of_resource in request.into_inner().resource_spans {
            let resource = of_resource.resource.unwrap_or_default();
            let named = resource.attributes.into_iter().find(|attribute| attribute.key == "service.name");
            let service = text(named.and_then(|attribute| attribute.value?.value));
            for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let attributes = span.attributes.into_iter();
                let attributes = attributes.map(|a| (a.key, text(a.value.and_then(|value| value.value)))).collect();
                self.received.lock().push(Received {
                    service: service.clone(),
                    kind: SpanKind::try_from(span.kind).expect("a kind of span"),
                    trace: span.trace_id,
                    id: span.span_id,
                    parent: span.parent_span_id,
                    name: span.name,
                    start: span.start_time_unix_nano,
                    end: span.end_time_unix_nano,
                    attributes,
                    links: span.links.into_iter().map(|link| link.span_id).collect(),
                });
            }
        }
        match self.takes {
            true => Ok(Response::new(ExportTraceServiceResponse::default())),
            false => Err(Status::unavailable("it takes nothing")),
        }
    }
}
