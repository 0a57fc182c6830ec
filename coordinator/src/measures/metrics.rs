//! Handles on the metrics of [`sida_telemetry::names`] that are recorded on a request's way, so that recording costs no
//! look-up. What happens once in a while is recorded where it happens, by its name; metrics with a label for each
//! layer, expert or node lie with the code that knows these.

use metrics::{Counter, Gauge, Histogram};
use sida_telemetry::{
    counter, gauge, histogram,
    names::{self, On},
};

use crate::measures::door::ByDoor;

/// The handles. Made once, after the recorder is installed.
pub(crate) struct Metrics {
    pub(crate) requests_queued: Gauge,
    pub(crate) requests_inflight: Gauge,
    pub(crate) cache_reserved_bytes: Gauge,
    pub(crate) cache_budget_bytes: Gauge,
    pub(crate) prefix_cache_bytes: Gauge,
    pub(crate) prefix_cache_queried_tokens: Counter,
    pub(crate) prefix_cache_hit_tokens: Counter,
    pub(crate) queue_seconds: Histogram,
    pub(crate) time_to_first_token_seconds: ByDoor<Histogram>,
    pub(crate) time_per_output_token_seconds: ByDoor<Histogram>,
    pub(crate) batch_tokens: Histogram,
    pub(crate) prompt_tokens: Counter,
    pub(crate) generated_tokens: Counter,
    pub(crate) predictions_missing: Counter,
    pub(crate) rerouted_experts: Counter,
    pub(crate) phases: Phases,
}

/// `sida_phase_duration_seconds`.
pub(crate) struct Phases {
    pub(crate) predict: Histogram,
    pub(crate) load: Histogram,
    pub(crate) backbone: Histogram,
    pub(crate) experts: Histogram,
    pub(crate) output: Histogram,
}

impl Metrics {
    /// Makes every handle, so that every series exists from then on.
    pub(crate) fn new() -> Self {
        names::declare(On::Coordinator);
        names::declare(On::Placed);
        let tokens = |kind| counter!(names::TOKENS_TOTAL, names::KIND => kind);
        let phase = |phase| histogram!(names::PHASE_DURATION_SECONDS, names::PHASE => phase);
        Self {
            requests_queued: gauge!(names::REQUESTS_QUEUED),
            requests_inflight: gauge!(names::REQUESTS_INFLIGHT),
            cache_reserved_bytes: gauge!(names::CACHE_RESERVED_BYTES),
            cache_budget_bytes: gauge!(names::CACHE_BUDGET_BYTES),
            prefix_cache_bytes: gauge!(names::PREFIX_CACHE_BYTES),
            prefix_cache_queried_tokens: counter!(names::PREFIX_CACHE_QUERIED_TOKENS_TOTAL),
            prefix_cache_hit_tokens: counter!(names::PREFIX_CACHE_HIT_TOKENS_TOTAL),
            queue_seconds: histogram!(names::QUEUE_DURATION_SECONDS),
            time_to_first_token_seconds: ByDoor::new(
                |door| histogram!(names::TIME_TO_FIRST_TOKEN_SECONDS, names::DOOR => door.label()),
            ),
            time_per_output_token_seconds: ByDoor::new(
                |door| histogram!(names::TIME_PER_OUTPUT_TOKEN_SECONDS, names::DOOR => door.label()),
            ),
            batch_tokens: histogram!(names::BATCH_TOKENS),
            prompt_tokens: tokens("prompt"),
            generated_tokens: tokens("generated"),
            predictions_missing: counter!(names::PREDICTIONS_MISSING_TOTAL),
            rerouted_experts: counter!(names::REROUTED_EXPERTS_TOTAL),
            phases: Phases {
                predict: phase("predict"),
                load: phase("load"),
                backbone: phase("backbone"),
                experts: phase("experts"),
                output: phase("output"),
            },
        }
    }
}
