//! The name of every metric, its labels and what it means, in one place, so that dashboards, alerts and code
//! cannot drift apart. Nodes record by these names; `describe` gives Prometheus its HELP lines.
//!
//! A process may hold several nodes (the embedded cluster), so a series that speaks of one node's state
//! carries [`NODE`].

use ::metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Label: the gRPC method, as `Generate`.
pub const METHOD: &str = "method";
/// Label: the gRPC status code, as `OK` or `DEADLINE_EXCEEDED`.
pub const CODE: &str = "code";
/// Label: the name of a node.
pub const NODE: &str = "node";
/// Label: an MoE layer's number.
pub const LAYER: &str = "layer";
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

/// Counter {method, code}: requests answered.
pub const REQUESTS_TOTAL: &str = "sida_requests_total";
/// Gauge: requests being worked on.
pub const REQUESTS_INFLIGHT: &str = "sida_requests_inflight";
/// Gauge: requests waiting for a place in a batch.
pub const REQUESTS_QUEUED: &str = "sida_requests_queued";
/// Histogram {method}: from acceptance to the last byte.
pub const REQUEST_DURATION_SECONDS: &str = "sida_request_duration_seconds";
/// Histogram: from acceptance to the first token.
pub const TIME_TO_FIRST_TOKEN_SECONDS: &str = "sida_time_to_first_token_seconds";
/// Histogram: mean time between the tokens of a request after its first.
pub const TIME_PER_OUTPUT_TOKEN_SECONDS: &str = "sida_time_per_output_token_seconds";
/// Histogram: time in the queue.
pub const QUEUE_DURATION_SECONDS: &str = "sida_queue_duration_seconds";
/// Counter {kind = prompt|generated}: tokens read and written.
pub const TOKENS_TOTAL: &str = "sida_tokens_total";
/// Histogram: tokens per step of the forward loop.
pub const BATCH_TOKENS: &str = "sida_batch_tokens";
/// Histogram {phase = predict|load|backbone|experts|output}: time of one step in each phase.
pub const PHASE_DURATION_SECONDS: &str = "sida_phase_duration_seconds";
/// Counter {layer, outcome = top1|hit|miss}: the routed expert was the table's first choice, another of its
/// k, or none of them.
pub const HASH_PREDICTIONS_TOTAL: &str = "sida_hash_predictions_total";
/// Histogram {node}: one call to an expert-node, as the coordinator sees it.
pub const DISPATCH_DURATION_SECONDS: &str = "sida_dispatch_duration_seconds";
/// Counter {reason}: calls that went to another holder.
pub const FAILOVERS_TOTAL: &str = "sida_failovers_total";
/// Counter: calls that could have gone to another holder and did not, since too many had failed lately.
pub const RETRIES_REFUSED_TOTAL: &str = "sida_retries_refused_total";
/// Gauge {node}: a coordinator's breaker before an expert-node: 0 closed, 1 on probation, 2 open.
pub const BREAKER_STATE: &str = "sida_breaker_state";
/// Gauge: epoch of the placement in use.
pub const PLACEMENT_EPOCH: &str = "sida_placement_epoch";

/// Gauge: 1 while etcd answers, 0 while it does not. Only where etcd keeps the membership, as the four below.
pub const ETCD_CONNECTED: &str = "sida_etcd_connected";
/// Counter: how often etcd was lost.
pub const ETCD_DISCONNECTS_TOTAL: &str = "sida_etcd_disconnects_total";
/// Gauge {role}: members that this node sees.
pub const MEMBERS: &str = "sida_members";
/// Gauge: 1 on the coordinator that writes the placement.
pub const PLACEMENT_LEADER: &str = "sida_placement_leader";
/// Counter {outcome = written|refused}: placements written, and those that etcd refused because another
/// coordinator leads.
pub const PLACEMENT_WRITES_TOTAL: &str = "sida_placement_writes_total";

/// Gauge {node}: bytes of resident experts; never above the budget.
pub const EXPERT_RESIDENT_BYTES: &str = "sida_expert_resident_bytes";
/// Gauge {node}: bytes that experts may take.
pub const EXPERT_BUDGET_BYTES: &str = "sida_expert_budget_bytes";
/// Gauge {node, layer}: resident experts.
pub const EXPERTS_RESIDENT: &str = "sida_experts_resident";
/// Counter {node, kind = prefetch|demand}: loads ahead of use, and loads that a call waited for.
pub const EXPERT_LOADS_TOTAL: &str = "sida_expert_loads_total";
/// Histogram {node, kind = prefetch|demand}: one load from the store to its slot.
pub const EXPERT_LOAD_DURATION_SECONDS: &str = "sida_expert_load_duration_seconds";
/// Counter {node}: experts dropped to make room.
pub const EXPERT_EVICTIONS_TOTAL: &str = "sida_expert_evictions_total";
/// Gauge {node}: bytes of experts that are resident and in no plan.
pub const EXPERT_IDLE_BYTES: &str = "sida_expert_idle_bytes";
/// Counter {node}: rows computed.
pub const EXPERT_ROWS_TOTAL: &str = "sida_expert_rows_total";
/// Histogram {node}: computing one call, loads left out.
pub const EXPERT_COMPUTE_DURATION_SECONDS: &str = "sida_expert_compute_duration_seconds";

/// Histogram: predicting one request's tables.
pub const PREDICT_DURATION_SECONDS: &str = "sida_predict_duration_seconds";
/// Counter: tokens predicted for.
pub const PREDICT_TOKENS_TOTAL: &str = "sida_predict_tokens_total";

/// Gives the installed recorder the meaning and unit of every metric. Called once, by
/// [`crate::metrics::install`].
pub(crate) fn describe() {
    for (name, unit, help) in COUNTERS {
        describe_counter!(*name, *unit, *help);
    }
    for (name, unit, help) in GAUGES {
        describe_gauge!(*name, *unit, *help);
    }
    for (name, unit, help) in HISTOGRAMS {
        describe_histogram!(*name, *unit, *help);
    }
}

/// A metric's name, unit and help text.
type Described = (&'static str, Unit, &'static str);

const COUNTERS: &[Described] = &[
    (REQUESTS_TOTAL, Unit::Count, "Requests answered, by method and gRPC status code."),
    (TOKENS_TOTAL, Unit::Count, "Tokens read (prompt) and written (generated)."),
    (HASH_PREDICTIONS_TOTAL, Unit::Count, "Routed experts that the hash table named first, named, or missed."),
    (FAILOVERS_TOTAL, Unit::Count, "Expert calls that went to another holder."),
    (RETRIES_REFUSED_TOTAL, Unit::Count, "Expert calls that were not made again, since too many had failed lately."),
    (ETCD_DISCONNECTS_TOTAL, Unit::Count, "How often etcd was lost."),
    (PLACEMENT_WRITES_TOTAL, Unit::Count, "Placements written to etcd, or refused by it."),
    (EXPERT_LOADS_TOTAL, Unit::Count, "Experts loaded ahead of use (prefetch) or while a call waited (demand)."),
    (EXPERT_EVICTIONS_TOTAL, Unit::Count, "Experts dropped to make room."),
    (EXPERT_ROWS_TOTAL, Unit::Count, "Rows computed by experts."),
    (PREDICT_TOKENS_TOTAL, Unit::Count, "Tokens predicted for."),
];

const GAUGES: &[Described] = &[
    (REQUESTS_INFLIGHT, Unit::Count, "Requests being worked on."),
    (REQUESTS_QUEUED, Unit::Count, "Requests waiting for a place in a batch."),
    (BREAKER_STATE, Unit::Count, "Breaker before an expert-node: 0 closed, 1 on probation, 2 open."),
    (PLACEMENT_EPOCH, Unit::Count, "Epoch of the placement in use."),
    (ETCD_CONNECTED, Unit::Count, "1 while etcd answers."),
    (MEMBERS, Unit::Count, "Members of the cluster that this node sees, by role."),
    (PLACEMENT_LEADER, Unit::Count, "1 on the coordinator that writes the placement."),
    (EXPERT_RESIDENT_BYTES, Unit::Bytes, "Bytes of resident experts."),
    (EXPERT_BUDGET_BYTES, Unit::Bytes, "Bytes that resident experts may take."),
    (EXPERTS_RESIDENT, Unit::Count, "Resident experts by layer."),
    (EXPERT_IDLE_BYTES, Unit::Bytes, "Bytes of experts that are resident and not planned."),
];

pub(crate) const HISTOGRAMS: &[Described] = &[
    (REQUEST_DURATION_SECONDS, Unit::Seconds, "Time of a request, from acceptance to its last byte."),
    (TIME_TO_FIRST_TOKEN_SECONDS, Unit::Seconds, "Time from acceptance to the first token."),
    (TIME_PER_OUTPUT_TOKEN_SECONDS, Unit::Seconds, "Mean time between the tokens of a request."),
    (QUEUE_DURATION_SECONDS, Unit::Seconds, "Time of a request in the queue."),
    (BATCH_TOKENS, Unit::Count, "Tokens per step of the forward loop."),
    (PHASE_DURATION_SECONDS, Unit::Seconds, "Time of one step by phase."),
    (DISPATCH_DURATION_SECONDS, Unit::Seconds, "One expert call, as the coordinator sees it."),
    (EXPERT_LOAD_DURATION_SECONDS, Unit::Seconds, "One expert's load from the store to its slot."),
    (EXPERT_COMPUTE_DURATION_SECONDS, Unit::Seconds, "Computing one expert call."),
    (PREDICT_DURATION_SECONDS, Unit::Seconds, "Predicting the hash tables of one call."),
];
