//! Traces as a collector receives them: whole, nested, and explaining where the time went.

use std::collections::{BTreeMap, BTreeSet};

use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use sida_proto::v1::{GenerateRequest, inference_client::InferenceClient};
use sida_tests::{Sandbox, SandboxConfig, binary};
use tokio::process::Command;
use tokio_stream::StreamExt;
use tonic::Request;

use crate::collector::{Collector, Received};

const TEXT: &str = "sst2 sentence: a gorgeous , witty , seductive movie .";
/// Requests of each mode that are looked at; the first of all also finds everything cold.
const REQUESTS: usize = 3;
/// Of the model that ships: three MoE layers in the encoder, three in the decoder.
const ENCODER_LAYERS: [&str; 3] = ["0", "1", "2"];
const DECODER_LAYERS: [&str; 3] = ["3", "4", "5"];
/// Spans that only hold others: what is within them and in none of those others is not explained.
const CONTAINERS: [&str; 4] = ["sida.v1.Inference/Generate", "text_completion switch-tiny-64", "encode", "decode"];
/// Clocks of two processes are read at different moments.
const SLACK_NANOS: u64 = 2_000_000;
/// An answer is sent before the spans of its work are closed, and their thread may be kept waiting for a processor
/// meanwhile.
const LATE_NANOS: u64 = 500_000_000;

/// The spans of one trace.
struct Trace(BTreeMap<Vec<u8>, Received>);

impl Trace {
    fn of(spans: &[Received], trace: &[u8]) -> Self {
        let spans: Vec<_> = spans.iter().filter(|span| span.trace == trace).collect();
        let by_id: BTreeMap<_, _> = spans.iter().map(|&span| (span.id.clone(), span.clone())).collect();
        assert_eq!(by_id.len(), spans.len(), "no two spans share an id");
        Self(by_id)
    }

    fn children(&self, id: &[u8]) -> Vec<&Received> {
        let mut children: Vec<_> = self.0.values().filter(|span| span.parent == id).collect();
        children.sort_by_key(|span| span.start);
        children
    }

    /// The one child of a name.
    fn child(&self, of: &Received, name: &str) -> &Received {
        let found: Vec<_> = self.children(&of.id).into_iter().filter(|span| span.name == name).collect();
        assert_eq!(found.len(), 1, "{name} below {}: {:?}", of.name, self.names(of));
        found[0]
    }

    fn all(&self, of: &Received, name: &str) -> Vec<&Received> {
        self.children(&of.id).into_iter().filter(|span| span.name == name).collect()
    }

    fn names(&self, of: &Received) -> Vec<&str> {
        self.children(&of.id).into_iter().map(|span| span.name.as_str()).collect()
    }

    fn root(&self) -> &Received {
        let roots: Vec<_> = self.0.values().filter(|span| span.parent.is_empty()).collect();
        assert_eq!(roots.len(), 1, "{roots:#?}");
        roots[0]
    }

    /// The share of `whole` in which one of `parts` was under way.
    fn share<'a>(whole: &Received, parts: impl Iterator<Item = &'a Received>) -> f64 {
        let mut parts: Vec<_> =
            parts.map(|part| (part.start.max(whole.start), part.end.min(whole.end))).filter(|(a, b)| a < b).collect();
        parts.sort_unstable();
        let (mut covered, mut until) = (0, whole.start);
        for (start, end) in parts {
            covered += end.saturating_sub(start.max(until));
            until = until.max(end);
        }
        covered as f64 / (whole.end - whole.start) as f64
    }

    /// Spans that say what was done or waited for.
    fn work(&self) -> impl Iterator<Item = &Received> {
        self.0.values().filter(|span| !CONTAINERS.contains(&span.name.as_str()))
    }
}

/// `sida ask` could not be followed through the cluster: a span is missing, hangs below the wrong one, lies outside of
/// it, or all of them together leave the time unexplained.
#[tokio::test(flavor = "multi_thread")]
async fn one_request_is_explained() {
    let collector = Collector::start().await;
    let sandbox = sandbox(&collector).await;
    // In `guided` every request is predicted; in `exact` only while nodes gain by it.
    for mode in ["guided", "exact"].into_iter().flat_map(|mode| [mode; REQUESTS]) {
        let asked = Command::from(binary::command())
            .args(["ask", "--endpoint", sandbox.address(), "--otlp-endpoint", collector.endpoint()])
            .args(["--otlp-sampling", "1", "--mode", mode, "--ignore-eos", "--max-tokens", "32", TEXT])
            .output()
            .await
            .expect("sida runs");
        assert!(asked.status.success(), "{asked:?}");
    }
    let is_client = |span: &&Received| span.service == "sida-client";
    let spans = collector.wait(|spans| spans.iter().filter(is_client).count() == 2 * REQUESTS).await;
    let ids: BTreeSet<_> = spans.iter().map(|span| &span.trace).collect();
    assert_eq!(ids.len(), 2 * REQUESTS, "only what the caller wants is recorded");
    let mut traces: Vec<_> = ids.into_iter().map(|id| Trace::of(&spans, id)).collect();
    traces.sort_by_key(|trace| trace.root().start);
    for (number, asked) in traces.chunks(REQUESTS).enumerate() {
        let shares: Vec<f64> = asked.iter().map(|trace| explained(trace, number == 0)).collect();
        // A thread that has to wait for a processor between two spans leaves a hole in one request; one that belongs to a
        // span which is missing is in all of them.
        assert!(shares.iter().any(|share| *share >= 0.95), "{shares:?}");
    }
}

/// Checks a request of 32 tokens, which surely `is_predicted` or may not be; returns the share of its time that spans explain.
fn explained(trace: &Trace, is_predicted: bool) -> f64 {
    let client = trace.root();
    assert_eq!((client.service.as_str(), client.kind), ("sida-client", SpanKind::Client));
    let server = trace.child(client, "sida.v1.Inference/Generate");
    assert_eq!((server.service.as_str(), server.kind), ("sida-coordinator", SpanKind::Server));
    assert_eq!(server.attributes["rpc.grpc.status_code"], "0");
    let request = trace.child(server, "text_completion switch-tiny-64");
    for (key, value) in [
        ("gen_ai.operation.name", "text_completion"),
        ("gen_ai.request.model", "switch-tiny-64"),
        ("gen_ai.request.max_tokens", "32"),
        ("gen_ai.usage.output_tokens", "32"),
    ] {
        assert_eq!(request.attributes[key], value, "{key}");
    }
    assert!(request.attributes.contains_key("gen_ai.usage.input_tokens"));
    for name in ["tokenize", "queue", "join"] {
        trace.child(request, name);
    }
    if is_predicted {
        trace.child(request, "preload");
        assert_predicted(trace, request);
    }
    assert_pass(trace, trace.child(request, "encode"), &ENCODER_LAYERS);
    let steps = trace.all(request, "decode");
    assert_eq!(steps.len(), 32);
    for step in &steps {
        trace.child(step, "output");
        if is_predicted {
            trace.child(step, "preload");
            let predict = trace.child(step, "predict");
            assert!(
                trace.children(&predict.id).is_empty(),
                "a net that reads the input predicts steps in the coordinator"
            );
        }
        assert_pass(trace, step, &DECODER_LAYERS);
    }
    assert_nested(trace);
    // Of the cluster's time: what the client's span has before and after it is the way there and back.
    let share = Trace::share(server, trace.work());
    println!("{} spans explain {:.1}% of {} us", trace.0.len(), 100.0 * share, (server.end - server.start) / 1000);
    share
}

/// A request that shared its steps with others would not be explained, or nobody could tell with whom it did.
#[tokio::test(flavor = "multi_thread")]
async fn requests_of_one_batch_are_linked() {
    let collector = Collector::start().await;
    let sandbox = sandbox(&collector).await;
    let ask = |number: usize| {
        let channel = sandbox.channel();
        async move {
            let mut request = Request::new(GenerateRequest {
                text: TEXT.to_owned(),
                max_tokens: 64,
                ignore_eos: true,
                ..Default::default()
            });
            let traceparent = format!("00-{:032x}-00000000000000aa-01", number + 1);
            request.metadata_mut().insert("traceparent", traceparent.parse().expect("metadata"));
            let mut answer = InferenceClient::new(channel).generate(request).await.expect("an answer").into_inner();
            while let Some(token) = answer.next().await {
                token.expect("a token");
            }
        }
    };
    tokio::join!(ask(0), ask(1), ask(2));
    let is_request = |span: &Received| span.name.starts_with("text_completion");
    let spans = collector.wait(|spans| spans.iter().filter(|span| is_request(span)).count() == 3).await;
    let by_id: BTreeMap<_, _> = spans.iter().map(|span| (&span.id, span)).collect();
    let mut shared = 0;
    for request in spans.iter().filter(|span| is_request(span)) {
        let steps: Vec<_> = spans.iter().filter(|span| span.parent == request.id).collect();
        // The prompts of those who join it are no work of its own, and it waits for them.
        let prompts = spans.iter().filter(|span| span.name == "encode");
        let share = Trace::share(request, steps.iter().copied().chain(prompts));
        assert!(share >= 0.9, "{share} of {request:?} is explained");
        for step in steps.iter().filter(|step| step.name == "decode" && !step.links.is_empty()) {
            shared += 1;
            for link in &step.links {
                // The step of the first request links to the others' requests, theirs link to that step.
                let linked = by_id[link];
                assert!(is_request(linked) || linked.name == "decode", "{linked:?}");
                assert_ne!(linked.trace, step.trace);
            }
        }
    }
    assert!(shared > 0, "three requests at once shared no step");
}

/// Every process that is told to end would go on for seconds because a collector is away, that nobody needs for an answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_takes_nothing_is_asked_twice() {
    let collector = Collector::unavailable().await;
    let asked = Command::from(binary::command())
        .args(["ask", "--otlp-endpoint", collector.endpoint(), "--otlp-sampling", "1", TEXT])
        .output()
        .await
        .expect("sida runs");
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
    let mut sent = BTreeMap::<Vec<u8>, usize>::new();
    for span in collector.received() {
        *sent.entry(span.id).or_default() += 1;
    }
    assert!(!sent.is_empty() && sent.values().all(|&times| times == 2), "{sent:?}");
}

/// Two expert-nodes, a predictor-node and a coordinator, which record what callers want recorded.
async fn sandbox(collector: &Collector) -> Sandbox {
    let flags = ["--otlp-endpoint", collector.endpoint(), "--otlp-sampling", "0"].map(str::to_owned).to_vec();
    // On a machine that is busy with other tests a prediction may take longer than it should.
    let coordinator_flags = ["--predict-timeout", "10s"].map(str::to_owned).to_vec();
    Sandbox::start(SandboxConfig { predictor_nodes: 1, coordinator_flags, flags, ..SandboxConfig::default() }).await
}

/// The prediction below `of` went to the predictor-node.
fn assert_predicted(trace: &Trace, of: &Received) {
    let predict = trace.child(of, "predict");
    let client = trace.child(predict, "sida.v1.Predictor/Predict");
    assert_eq!(client.kind, SpanKind::Client);
    let server = trace.child(client, "sida.v1.Predictor/Predict");
    assert_eq!((server.service.as_str(), server.kind), ("sida-predictor-node", SpanKind::Server));
    trace.child(server, "compute");
}

/// A pass dispatched these layers, each to expert-nodes that computed.
fn assert_pass(trace: &Trace, pass: &Received, layers: &[&str]) {
    let dispatches = trace.all(pass, "dispatch");
    let found: Vec<_> = dispatches.iter().map(|dispatch| dispatch.attributes["sida.layer"].as_str()).collect();
    assert_eq!(found, layers);
    for dispatch in dispatches {
        let calls = trace.all(dispatch, "expert call");
        assert!(!calls.is_empty());
        for call in calls {
            assert_eq!(call.kind, SpanKind::Client);
            let compute = trace.child(call, "compute");
            assert_eq!((compute.service.as_str(), compute.kind), ("sida-expert-node", SpanKind::Server));
            assert_eq!(compute.attributes["sida.node"], call.attributes["sida.node"]);
            assert_eq!(compute.attributes["sida.layer"], dispatch.attributes["sida.layer"]);
        }
    }
}

/// Every span lies within the one that it is below.
fn assert_nested(trace: &Trace) {
    for span in trace.0.values().filter(|span| !span.parent.is_empty()) {
        let parent = trace.0.get(&span.parent).unwrap_or_else(|| panic!("the parent of {span:?} did not come"));
        assert!(
            span.start + SLACK_NANOS >= parent.start && span.end <= parent.end + LATE_NANOS,
            "{} lies outside of {}: {span:?} {parent:?}",
            span.name,
            parent.name
        );
    }
}
