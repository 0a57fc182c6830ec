//! What is begun and not over, and how long answers take: what tells whether a request can be in time. What decides is pure
//! ([`sida_routing::pace`]); here is what it is told, by the scheduler and by the requests themselves.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_routing::{
    admission::Limits,
    pace::{Ahead, Pace},
};

use crate::{answer::request_error::RequestError, intake::request::Request};

/// Bounds of how long callers are asked to stay away; the first also while nothing was measured.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(100);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// The load of one model.
pub(crate) struct Workload {
    limits: Limits,
    /// Sequences of the requests that left the queue and are not over.
    begun: AtomicUsize,
    pace: Mutex<Pace>,
}

/// Counts the sequences of one request as begun, until it is dropped.
pub(crate) struct Begun {
    workload: Arc<Workload>,
    sequences: usize,
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.workload.begun.fetch_sub(self.sequences, Ordering::Relaxed);
    }
}

impl Begun {
    /// The request was answered after so many steps of those that it was allowed.
    pub(crate) fn answered(&self, steps: usize, allowed: usize) {
        self.workload.pace.lock().answered(steps, allowed);
    }
}

impl Workload {
    /// Of a model of which nothing is known yet.
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, begun: AtomicUsize::new(0), pace: Mutex::default() }
    }

    /// Counts a request as begun.
    pub(crate) fn begin(self: &Arc<Self>, request: &mut Request) {
        let sequences = request.places();
        self.begun.fetch_add(sequences, Ordering::Relaxed);
        request.begun = Some(Begun { workload: self.clone(), sequences });
    }

    /// Sequences that are begun.
    pub(crate) fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    /// A step of so many sequences took so long.
    pub(crate) fn step(&self, sequences: usize, took: Duration) {
        self.pace.lock().step(sequences, took);
    }

    /// Says that a request's answer would take more than `share` of the time that is left for it, behind so many
    /// sequences. Not of one that is alone, nor of one that would take longer than it was given if it were: the load is
    /// not to blame, and its caller may be content with what comes until then.
    pub(crate) fn no_time(
        &self,
        request: &Request,
        sequences: usize,
        share: f64,
        now: Instant,
    ) -> Option<RequestError> {
        let deadline = request.deadline.filter(|_| sequences > 0)?;
        let left = deadline.saturating_duration_since(now);
        let (time, alone) = (self.time_for(request, sequences)?, self.time_for(request, 0)?);
        let given = deadline.saturating_duration_since(request.accepted);
        (alone <= given && time > left.mul_f64(share)).then(|| {
            let retry_after = self.retry_after(request, sequences);
            RequestError::NoTime { time, left, retry_after }
        })
    }

    /// How long callers should stay away, if that is what a request would wait for.
    pub(crate) fn retry_after(&self, request: &Request, sequences: usize) -> Duration {
        let time = self.time_for(request, sequences);
        time.map_or(RETRY_AFTER_MIN, |time| time.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX))
    }

    fn time_for(&self, request: &Request, sequences: usize) -> Option<Duration> {
        let (own, steps) = (request.places(), request.work.steps_max());
        let places = self.limits.places(request.cost(), steps);
        self.pace.lock().time_for(Ahead { sequences, own, places, steps })
    }
}
