//! What was asked of the model by the Open Inference Protocol so far, as that tells it by gRPC and by HTTP.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use sida_proto::inference::{InferStatistics, ModelStatistics, StatisticDuration};

use crate::{
    answer::trace::Timings,
    coordinator::Coordinator,
    doors::open_inference::question::VERSION,
    measures::inference_counts::{InferenceCounts, Timed},
};

/// Notes that a request with so many texts was answered, whose sequences took these times.
pub(crate) fn answered(coordinator: &Coordinator, begun: Instant, timings: &[Timings]) {
    let queued = timings.iter().map(|timings| timings.queue).max().unwrap_or_default();
    let mut counts = coordinator.statistics().open_inference.lock();
    counts.answered(SystemTime::now(), timings.len(), begun.elapsed(), queued);
}

/// Notes that a request was not.
pub(crate) fn failed(coordinator: &Coordinator, begun: Instant) {
    coordinator.statistics().open_inference.lock().failed(begun.elapsed());
}

/// All of it.
pub(crate) fn message(coordinator: &Coordinator) -> ModelStatistics {
    let InferenceCounts { last, texts, success, fail, queue, compute } =
        *coordinator.statistics().open_inference.lock();
    let timed = |Timed { count, time }: Timed| StatisticDuration {
        count,
        ns: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
    };
    let last = last.and_then(|last| last.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    ModelStatistics {
        name: coordinator.checkpoint().name().to_owned(),
        version: VERSION.to_owned(),
        last_inference: u64::try_from(last.as_millis()).unwrap_or(u64::MAX),
        inference_count: texts,
        execution_count: success.count,
        inference_stats: Some(InferStatistics {
            success: Some(timed(success)),
            fail: Some(timed(fail)),
            queue: Some(timed(queue)),
            compute_infer: Some(timed(compute)),
        }),
    }
}

/// The same, as JSON.
pub(crate) fn json(coordinator: &Coordinator) -> Value {
    let ModelStatistics { name, version, last_inference, inference_count, execution_count, inference_stats } =
        message(coordinator);
    let InferStatistics { success, fail, queue, compute_infer } = inference_stats.unwrap_or_default();
    let timed = |timed: Option<StatisticDuration>| {
        let StatisticDuration { count, ns } = timed.unwrap_or_default();
        json!({"count": count, "ns": ns})
    };
    let stats = json!({
        "success": timed(success), "fail": timed(fail), "queue": timed(queue), "compute_infer": timed(compute_infer),
    });
    json!({"model_stats": [{
        "name": name, "version": version, "last_inference": last_inference, "inference_count": inference_count,
        "execution_count": execution_count, "inference_stats": stats, "batch_stats": [],
    }]})
}
