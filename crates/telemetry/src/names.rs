//! Every metric: name, labels, unit, who exports it and what it means, one line each, so that code, dashboards, alerts
//! and documents cannot drift apart. Nodes record by these names; [`crate::metrics::install`] gives Prometheus their
//! HELP lines and buckets; tests hold the chart's queries and `docs/metrics.md` against [`CATALOGUE`].
//!
//! To add a metric, add a line to the catalogue and record it where it happens.
//!
//! A process may hold several nodes (the embedded cluster), so a series that speaks of one node's state
//! carries [`NODE`].

use ::metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

/// Label: by which door a request came: `grpc`, `openai`, `open_inference`, or `process` of requests of the node's own
/// process.
pub const DOOR: &str = "door";
/// Label: the gRPC method, as `Generate`; of the door for OpenAI's clients the endpoint, as `completions`.
pub const METHOD: &str = "method";
/// Label: the gRPC status code, as `OK` or `DEADLINE_EXCEEDED`.
pub const CODE: &str = "code";
/// Label: the name of a node.
pub const NODE: &str = "node";
/// Label: an MoE layer's number.
pub const LAYER: &str = "layer";
/// Label: an expert's number within its layer.
pub const EXPERT: &str = "expert";
/// Label: which of a few kinds; the metric says which exist.
pub const KIND: &str = "kind";
/// Label: a phase of a request.
pub const PHASE: &str = "phase";
/// Label: how a prediction turned out.
pub const OUTCOME: &str = "outcome";
/// Label: what a member does, as `expert-node`.
pub const ROLE: &str = "role";
/// Label: why.
pub const REASON: &str = "reason";
/// Label: a client, as the file of keys calls it; empty for those without a key.
pub const CLIENT: &str = "client";
/// Label: which of a client's limits, as `tokens-per-minute`.
pub const LIMIT: &str = "limit";
/// Label: the version of the program.
pub const VERSION: &str = "version";
/// Label: the commit that it was built from.
pub const REVISION: &str = "revision";

/// What is measured how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Goes up only.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts values by buckets with these upper bounds.
    Histogram(&'static [f64]),
}

/// Who exports a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Every process.
    All,
    /// Coordinators.
    Coordinator,
    /// Expert-nodes.
    ExpertNode,
    /// Coordinators and expert-nodes.
    Placed,
    /// Whoever predicts as a predictor-node.
    PredictorNode,
    /// Every node of a cluster whose membership is in etcd.
    Etcd,
    /// Every node that serves by TLS.
    Tls,
    /// Every node that lets in by keys.
    Keys,
}

impl On {
    /// As documents say it.
    pub fn name(self) -> &'static str {
        match self {
            On::All => "every node",
            On::Coordinator => "coordinator",
            On::ExpertNode => "expert-node",
            On::Placed => "coordinator, expert-node",
            On::PredictorNode => "predictor-node",
            On::Etcd => "every node, with etcd",
            On::Tls => "every node, with TLS",
            On::Keys => "every node, with keys",
        }
    }
}

/// One line of the catalogue.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// As Prometheus knows it.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What it counts.
    pub unit: Unit,
    /// Who exports it.
    pub on: On,
    /// What it means.
    pub help: &'static str,
}

/// Seconds of work within a step, 10 us to 10 s: expert calls, computation, prediction, phases.
const WORK: &[f64] = &[
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0,
    2.5, 10.0,
];
/// Seconds that a caller waits, 1 ms to 10 minutes: requests, first tokens, queues.
const WAITS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];
/// Seconds of a load, 50 us from memory to minutes from a disk far away.
const LOADS: &[f64] = &[
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0, 120.0, 300.0,
];
/// Tokens of a step: one decoding sequence to the largest batch.
const TOKENS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

macro_rules! catalogue {
    (@kind counter) => { Kind::Counter };
    (@kind gauge) => { Kind::Gauge };
    (@kind histogram $buckets:ident) => { Kind::Histogram($buckets) };
    ($($const:ident = $name:literal, $kind:ident $(($buckets:ident))?, [$($label:ident),*], $unit:ident, $on:ident, $help:literal;)*) => {
        $(#[doc = $help] pub const $const: &str = $name;)*
        /// All metrics, in the order of the documents.
        pub const CATALOGUE: &[Metric] = &[$(Metric {
            name: $name,
            kind: catalogue!(@kind $kind $($buckets)?),
            labels: &[$($label),*],
            unit: Unit::$unit,
            on: On::$on,
            help: $help,
        }),*];
    };
}

#[rustfmt::skip] // One line a metric.
catalogue! {
    REQUESTS_TOTAL = "sida_requests_total", counter, [DOOR, METHOD, CODE], Count, Coordinator, "Requests answered, by door (grpc, openai or open_inference), method or endpoint, and gRPC status code.";
    CLIENT_REQUESTS_TOTAL = "sida_client_requests_total", counter, [CLIENT, CODE], Count, Coordinator, "Requests answered, by client and status code; client is the name of its key, and empty for all without one.";
    CLIENT_TOKENS_TOTAL = "sida_client_tokens_total", counter, [CLIENT], Count, Coordinator, "Tokens of answered requests, of their prompts and of their answers, by client.";
    CLIENT_LIMITED_TOTAL = "sida_client_limited_total", counter, [CLIENT, LIMIT], Count, Coordinator, "Requests refused because their client had all that it may have, by client and by the limit.";
    REQUESTS_INFLIGHT = "sida_requests_inflight", gauge, [], Count, Coordinator, "Requests being worked on.";
    REQUESTS_QUEUED = "sida_requests_queued", gauge, [], Count, Coordinator, "Requests waiting for a place in a batch.";
    CACHE_RESERVED_BYTES = "sida_cache_reserved_bytes", gauge, [], Bytes, Coordinator, "Memory reserved for keys and values of the sequences that run.";
    CACHE_BUDGET_BYTES = "sida_cache_budget_bytes", gauge, [], Bytes, Coordinator, "Memory that keys and values of all running sequences may take (--cache-memory).";
    PREFIX_CACHE_BYTES = "sida_prefix_cache_bytes", gauge, [], Bytes, Coordinator, "Memory of sequences that are over, kept for prompts that begin as they did; it makes room for those that run.";
    PREFIX_CACHE_QUERIED_TOKENS_TOTAL = "sida_prefix_cache_queried_tokens_total", counter, [], Count, Coordinator, "Tokens of prompts whose beginnings were looked for among other sequences.";
    PREFIX_CACHE_HIT_TOKENS_TOTAL = "sida_prefix_cache_hit_tokens_total", counter, [], Count, Coordinator, "Of these, tokens that were found, and so were not computed again.";
    REQUEST_DURATION_SECONDS = "sida_request_duration_seconds", histogram(WAITS), [DOOR, METHOD], Seconds, Coordinator, "A request, from acceptance to its last byte.";
    TIME_TO_FIRST_TOKEN_SECONDS = "sida_time_to_first_token_seconds", histogram(WAITS), [DOOR], Seconds, Coordinator, "From acceptance to the first token.";
    TIME_PER_OUTPUT_TOKEN_SECONDS = "sida_time_per_output_token_seconds", histogram(WORK), [DOOR], Seconds, Coordinator, "Mean time between the tokens of a request after its first.";
    QUEUE_DURATION_SECONDS = "sida_queue_duration_seconds", histogram(WAITS), [], Seconds, Coordinator, "A request's wait for a place in a batch.";
    TOKENS_TOTAL = "sida_tokens_total", counter, [KIND], Count, Coordinator, "Tokens read (kind = prompt) and written (generated).";
    BATCH_TOKENS = "sida_batch_tokens", histogram(TOKENS), [], Count, Coordinator, "Tokens per step of the forward loop.";
    PHASE_DURATION_SECONDS = "sida_phase_duration_seconds", histogram(WORK), [PHASE], Seconds, Coordinator, "One step in each phase: predict (waiting for a prediction), load (waiting for experts), backbone, experts, output.";
    HASH_PREDICTIONS_TOTAL = "sida_hash_predictions_total", counter, [LAYER, OUTCOME], Count, Coordinator, "Routed experts of requests that were predicted: the hash table's first choice (outcome = top1), another of its k (hit), or none (miss). Where expert-nodes gain nothing by plans (hardly any expert has to be loaded, or each is quickly), few requests in exact are predicted.";
    LABELLED_TOKENS_TOTAL = "sida_labelled_tokens_total", counter, [OUTCOME], Count, Coordinator, "Tokens whose routers' choice was told to a predictor-node that learns (outcome = sent), or was not for lack of room or of an answer (dropped).";
    PREDICTIONS_MISSING_TOTAL = "sida_predictions_missing_total", counter, [], Count, Coordinator, "Sequences of a step that were to be predicted and ran without a hash table, since no predictor answered. Where there is none, or expert-nodes gain nothing by plans, few or none in exact are to be.";
    REROUTED_EXPERTS_TOTAL = "sida_rerouted_experts_total", counter, [], Count, Coordinator, "Experts of tokens in mode guided that the router would not have chosen, had it been free.";
    ROUTED_ROWS_TOTAL = "sida_routed_rows_total", counter, [LAYER, EXPERT], Count, Coordinator, "Rows that each expert was given; only for models of at most 4,096 experts in all layers.";
    MODEL_EXPERT_BYTES = "sida_model_expert_bytes", gauge, [], Bytes, Coordinator, "What all experts of the model would take if they were resident at once.";
    DISPATCH_DURATION_SECONDS = "sida_dispatch_duration_seconds", histogram(WORK), [NODE], Seconds, Coordinator, "One call to an expert-node, as the coordinator sees it.";
    FAILOVERS_TOTAL = "sida_failovers_total", counter, [REASON], Count, Coordinator, "Expert calls of requests that were made again after one failed, to another node or to one that was back.";
    RETRIES_REFUSED_TOTAL = "sida_retries_refused_total", counter, [], Count, Coordinator, "Expert calls that were not made again, since too many had failed lately.";
    BREAKER_STATE = "sida_breaker_state", gauge, [NODE], Count, Coordinator, "Breaker before an expert-node: 0 closed, 1 on probation, 2 open.";
    EXPERTS_UNHELD = "sida_experts_unheld", gauge, [], Count, Coordinator, "Experts none of whose holders can be reached; any other node still loads them from its store.";
    PLACEMENT_EPOCH = "sida_placement_epoch", gauge, [], Count, Placed, "Epoch of the placement in use.";

    EXPERT_RESIDENT_BYTES = "sida_expert_resident_bytes", gauge, [NODE], Bytes, ExpertNode, "Bytes of resident experts; never above the budget.";
    EXPERT_BUDGET_BYTES = "sida_expert_budget_bytes", gauge, [NODE], Bytes, ExpertNode, "Bytes that resident experts may take.";
    EXPERT_IDLE_BYTES = "sida_expert_idle_bytes", gauge, [NODE], Bytes, ExpertNode, "Bytes of experts that are resident and in no plan.";
    EXPERTS_RESIDENT = "sida_experts_resident", gauge, [NODE, LAYER], Count, ExpertNode, "Resident experts by layer.";
    EXPERT_LOADS_TOTAL = "sida_expert_loads_total", counter, [NODE, KIND], Count, ExpertNode, "Experts loaded ahead of use (kind = prefetch) or while a call waited (demand).";
    EXPERT_LOAD_BYTES_TOTAL = "sida_expert_load_bytes_total", counter, [NODE, KIND], Bytes, ExpertNode, "Bytes of the experts loaded, by kind of load.";
    EXPERT_LOAD_DURATION_SECONDS = "sida_expert_load_duration_seconds", histogram(LOADS), [NODE, KIND], Seconds, ExpertNode, "One expert's load from the store to its slot.";
    EXPERT_SLOW_LOAD_SHARE = "sida_expert_slow_load_share", gauge, [NODE], Count, ExpertNode, "Share, 0 to 1, of loads that a call or a plan asked for and that took 100 us or more, or went to a device, among them and the uses of experts of late. Up to 0.01, plans gain the node nothing.";
    EXPERT_EVICTIONS_TOTAL = "sida_expert_evictions_total", counter, [NODE], Count, ExpertNode, "Experts dropped to make room.";
    EXPERT_ROWS_TOTAL = "sida_expert_rows_total", counter, [NODE], Count, ExpertNode, "Rows computed by experts.";
    EXPERT_COMPUTE_DURATION_SECONDS = "sida_expert_compute_duration_seconds", histogram(WORK), [NODE], Seconds, ExpertNode, "Computing one expert call, loads left out.";

    PREDICT_DURATION_SECONDS = "sida_predict_duration_seconds", histogram(WORK), [], Seconds, PredictorNode, "Predicting the hash tables of one call.";
    PREDICT_TOKENS_TOTAL = "sida_predict_tokens_total", counter, [], Count, PredictorNode, "Tokens predicted for.";
    LEARN_TOKENS_TOTAL = "sida_learn_tokens_total", counter, [], Count, PredictorNode, "Tokens whose routers' choice a node that learns was told.";
    LEARN_KEPT_TOKENS = "sida_learn_kept_tokens", gauge, [], Count, PredictorNode, "How many of them it keeps.";
    LEARN_TRAININGS_TOTAL = "sida_learn_trainings_total", counter, [OUTCOME], Count, PredictorNode, "Trainings on them whose predictor now serves (outcome = swapped), was no better than the one that serves (not_better), or that failed (failed).";
    LEARN_HIT_RATE = "sida_learn_hit_rate", gauge, [KIND], Count, PredictorNode, "Share of experts of the newest traffic that were the first choice, 0 to 1, when last tested: of the predictor that served then (kind = serving) and of the one that had learnt on (candidate).";

    ETCD_CONNECTED = "sida_etcd_connected", gauge, [], Count, Etcd, "1 while etcd answers, 0 while it does not.";
    ETCD_DISCONNECTS_TOTAL = "sida_etcd_disconnects_total", counter, [], Count, Etcd, "How often etcd was lost.";
    MEMBERS = "sida_members", gauge, [ROLE], Count, Etcd, "Members of the cluster that this node sees, by role.";
    PLACEMENT_LEADER = "sida_placement_leader", gauge, [], Count, Etcd, "1 on the coordinator that writes the placement.";
    PLACEMENT_WRITES_TOTAL = "sida_placement_writes_total", counter, [OUTCOME], Count, Etcd, "Placements written to etcd (outcome = written), or refused by it because another coordinator leads (refused).";

    BUILD_INFO = "sida_build_info", gauge, [VERSION, REVISION], Count, All, "1; the labels say what was built from what.";
    TLS_CERTIFICATE_NOT_AFTER_SECONDS = "sida_tls_certificate_not_after_seconds", gauge, [], Seconds, Tls, "When the certificate that this node serves with expires, as a Unix time.";
    TLS_RELOADS_TOTAL = "sida_tls_reloads_total", counter, [OUTCOME], Count, Tls, "Changed certificates that a port took into service (outcome = loaded), or could not use and went on with the old ones (refused).";
    KEY_RELOADS_TOTAL = "sida_key_reloads_total", counter, [OUTCOME], Count, Keys, "Changed files of keys that were taken into service (outcome = loaded), or could not be used and left the old ones in it (refused).";
    RUNTIME_WORKERS = "sida_runtime_workers", gauge, [], Count, All, "Threads that carry bytes and time (tokio's workers).";
    RUNTIME_BUSY_RATIO = "sida_runtime_busy_ratio", gauge, [], Count, All, "Share of time in which those threads were busy lately, 0 to 1 over all of them.";
    RUNTIME_TASKS = "sida_runtime_tasks", gauge, [], Count, All, "Tasks that they keep.";
    RUNTIME_QUEUED_TASKS = "sida_runtime_queued_tasks", gauge, [], Count, All, "Tasks that wait for one of them in the shared queue.";
}

/// Gives the installed recorder the meaning and unit of every metric. Called once, by
/// [`crate::metrics::install`].
pub(crate) fn describe() {
    for Metric { name, kind, unit, help, .. } in CATALOGUE {
        match kind {
            Kind::Counter => describe_counter!(*name, *unit, *help),
            Kind::Gauge => describe_gauge!(*name, *unit, *help),
            Kind::Histogram(_) => describe_histogram!(*name, *unit, *help),
        }
    }
}

/// Exports what has no labels from the start: a series that appears with its first event shows "No data" until then,
/// and its first increase is seen by no rate. Called by each node; those with labels are made where these are known.
pub fn declare(on: On) {
    for metric in CATALOGUE.iter().filter(|metric| metric.on == on && metric.labels.is_empty()) {
        match metric.kind {
            Kind::Counter => counter!(metric.name).increment(0),
            Kind::Gauge => gauge!(metric.name).increment(0.0),
            Kind::Histogram(_) => drop(histogram!(metric.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, env, fmt::Write, fs};

    use super::*;

    #[test]
    fn names_follow_the_conventions() {
        // Broken: two metrics would share a name, or a dashboard would divide seconds by milliseconds.
        let names: BTreeSet<_> = CATALOGUE.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        for metric in CATALOGUE {
            let name = metric.name;
            assert!(name.starts_with("sida_"), "{name}");
            assert_eq!(name.ends_with("_total"), metric.kind == Kind::Counter, "{name}");
            let is_seconds = name.trim_end_matches("_total").ends_with("_seconds");
            assert_eq!(is_seconds, metric.unit == Unit::Seconds, "{name}");
            let is_bytes = name.trim_end_matches("_total").ends_with("_bytes");
            assert_eq!(is_bytes, metric.unit == Unit::Bytes, "{name}");
        }
    }

    #[test]
    fn buckets_ascend() {
        // Broken: every percentile of the metric would be nonsense.
        for metric in CATALOGUE {
            if let Kind::Histogram(buckets) = metric.kind {
                assert!(!buckets.is_empty() && buckets.is_sorted_by(|a, b| a < b), "{}", metric.name);
            }
        }
    }

    /// `docs/metrics.md`.
    fn document() -> String {
        let mut text = "# Metrics\n\nEvery node serves them at `--metrics-listen` (port 9090) as `/metrics`. This page is written by\n\
             `SIDA_REWRITE=1 cargo test -p sida-telemetry`; the source is `crates/telemetry/src/names.rs`.\n\n\
             | metric | kind | labels | on | meaning |\n|---|---|---|---|---|\n"
            .to_owned();
        for metric in CATALOGUE {
            let kind = match metric.kind {
                Kind::Counter => "counter".to_owned(),
                Kind::Gauge => "gauge".to_owned(),
                Kind::Histogram(buckets) => format!("histogram, {} to {}", buckets[0], buckets[buckets.len() - 1]),
            };
            let (name, labels, on, help) = (metric.name, metric.labels.join(", "), metric.on.name(), metric.help);
            writeln!(text, "| `{name}` | {kind} | {labels} | {on} | {help} |").unwrap();
        }
        text
    }

    #[test]
    fn the_document_lists_every_metric() {
        // Broken: whoever reads the documents would look for metrics that do not exist, or miss those that do.
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
        if env::var_os("SIDA_REWRITE").is_some() {
            fs::write(file, document()).unwrap();
        }
        assert_eq!(document(), fs::read_to_string(file).unwrap());
    }
}
