//! What an answer took: tokens as OpenAI counts them, and as `sida` in it what happened on the way, over all sequences of the
//! answer: counts are added, times are the longest.

use std::time::Duration;

use serde_json::{Value, json};

use crate::answer::{
    routing_mode::{Alpha, RoutingMode},
    trace::{HashCounts, Timings, Trace},
};

/// What an answer took so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) cached_tokens: usize,
    mode: RoutingMode,
    unpredicted: bool,
    hash: HashCounts,
    rerouted: u64,
    demand_loads: u64,
    failovers: u64,
    timings: Timings,
}

impl Usage {
    /// Adds what one of its sequences took.
    pub(crate) fn add(&mut self, trace: &Trace) {
        self.mode = trace.mode;
        self.unpredicted |= trace.unpredicted;
        self.hash.add(trace.hash);
        self.rerouted += trace.rerouted;
        self.demand_loads += trace.demand_loads;
        self.failovers += trace.failovers;
        let (all, one) = (self.timings, trace.timings);
        self.timings = Timings {
            queue: all.queue.max(one.queue),
            predict: all.predict.max(one.predict),
            load: all.load.max(one.load),
            backbone: all.backbone.max(one.backbone),
            experts: all.experts.max(one.experts),
            total: all.total.max(one.total),
        };
    }

    /// As it stands in an answer that generates.
    pub(crate) fn of_generation(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "sida": self.on_the_way(),
        })
    }

    /// As it stands in an answer that does not.
    pub(crate) fn of_reading(&self) -> Value {
        json!({"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens, "sida": self.on_the_way()})
    }

    fn on_the_way(&self) -> Value {
        let (mode, alpha) = match self.mode {
            RoutingMode::Exact => ("exact", None),
            RoutingMode::Guided => ("guided", None),
            RoutingMode::Hash { alpha } => ("hash", Some(alpha_name(alpha))),
        };
        let microseconds = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        json!({
            "routing": {"mode": mode, "alpha": alpha},
            "unpredicted": self.unpredicted,
            "hash_hits": self.hash.hits,
            "hash_top1_hits": self.hash.top1_hits,
            "hash_misses": self.hash.misses,
            "rerouted": self.rerouted,
            "demand_loads": self.demand_loads,
            "failovers": self.failovers,
            "timings_us": {
                "queue": microseconds(self.timings.queue),
                "predict": microseconds(self.timings.predict),
                "load": microseconds(self.timings.load),
                "backbone": microseconds(self.timings.backbone),
                "experts": microseconds(self.timings.experts),
                "total": microseconds(self.timings.total),
            },
        })
    }
}

fn alpha_name(alpha: Alpha) -> &'static str {
    match alpha {
        Alpha::Router => "router",
        Alpha::Predicted => "predicted",
    }
}
