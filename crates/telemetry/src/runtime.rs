//! How busy the threads are that carry bytes and time: tokio tells, [`crate::metrics::Metrics::keep_up`] asks it every few
//! seconds. Threads that are always busy mean that something computes on them.

use std::time::{Duration, Instant};

use metrics::Gauge;
use tokio::runtime::{Handle, RuntimeMetrics};

use crate::{gauge, names};

/// The gauges, and what they were computed from last.
pub(crate) struct RuntimeMeasures {
    runtime: RuntimeMetrics,
    /// When it was looked last, and how long all workers together had been busy until then.
    last: (Instant, Duration),
    busy: Gauge,
    tasks: Gauge,
    queued: Gauge,
}

impl RuntimeMeasures {
    /// Of the runtime that this is called in.
    pub(crate) fn of_current() -> Self {
        let runtime = Handle::current().metrics();
        gauge!(names::RUNTIME_WORKERS).set(runtime.num_workers() as f64);
        let last = (Instant::now(), busy(&runtime));
        let (tasks, queued) = (gauge!(names::RUNTIME_TASKS), gauge!(names::RUNTIME_QUEUED_TASKS));
        Self { runtime, last, busy: gauge!(names::RUNTIME_BUSY_RATIO), tasks, queued }
    }

    /// Sets the gauges.
    pub(crate) fn look(&mut self) {
        let now = (Instant::now(), busy(&self.runtime));
        let possible = (now.0 - self.last.0).as_secs_f64() * self.runtime.num_workers() as f64;
        if possible > 0.0 {
            self.busy.set((now.1.saturating_sub(self.last.1).as_secs_f64() / possible).min(1.0));
        }
        self.last = now;
        self.tasks.set(self.runtime.num_alive_tasks() as f64);
        self.queued.set(self.runtime.global_queue_depth() as f64);
    }
}

fn busy(runtime: &RuntimeMetrics) -> Duration {
    (0..runtime.num_workers()).map(|worker| runtime.worker_total_busy_duration(worker)).sum()
}
