//! Prepares the next batch: takes the queued requests that fit one, fills their hash tables, and hints them to
//! expert-nodes. Runs on its own thread, one batch ahead at most, so that the next batch is predicted and its experts
//! are loaded while the scheduler computes this one.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use sida_routing::{
    HashTable,
    admission::{Cost, Limits},
};
use sida_telemetry::spans;

use crate::{
    answer::request_error::RequestError,
    intake::{
        queue::Queue,
        request::Request,
        request_queue::{RequestQueue, Waiting},
    },
    measures::metrics::Metrics,
    predict::{
        predict::Predict,
        preload::{Hint, Preload},
    },
    schedule::batch_span::BatchSpan,
};

/// A request that can join the running batch at any step.
pub(crate) struct Prepared {
    pub(crate) request: Request,
    /// The hash table of the encoder's layers; `None` runs unpredicted.
    pub(crate) table: Option<HashTable>,
    /// The hint that was given for this request and those prepared with it; taken back when the last of them joins a
    /// batch.
    pub(crate) hint: Arc<Hint>,
    /// When the request was ready to join.
    pub(crate) at: Instant,
    /// How long the prediction took, for all requests that were prepared together.
    pub(crate) predict: Duration,
}

/// What the preparing thread works with.
pub(crate) struct Prepare {
    pub(crate) limits: Limits,
    pub(crate) predict: Arc<Predict>,
    pub(crate) preload: Arc<Preload>,
    pub(crate) requests: Arc<RequestQueue>,
    pub(crate) prepared: Arc<Queue<Prepared>>,
    pub(crate) metrics: Arc<Metrics>,
}

impl Prepare {
    /// Runs until the queue of requests is closed and empty; then closes that of prepared ones.
    pub(crate) fn run(self) {
        let limits = self.limits;
        let choose = |waiting: &VecDeque<Waiting>| {
            let now = Instant::now();
            limits.joining(Cost::default(), waiting.iter().map(|waiting| waiting.request.cost_at(now)))
        };
        while let Some(batch) = self.requests.take(choose) {
            self.metrics.requests_queued.set(self.requests.len() as f64);
            if batch.is_empty() {
                continue;
            }
            // The callers of requests that are lost in a panic see their channels end.
            match catch_unwind(AssertUnwindSafe(|| self.prepare(batch))) {
                Ok(batch) => self.hand_over(batch),
                Err(_) => tracing::error!("preparing a batch panicked; its requests are answered with an error"),
            }
        }
        self.prepared.close();
    }

    fn prepare(&self, batch: Vec<Request>) -> Vec<Prepared> {
        let start = Instant::now();
        for request in &batch {
            spans::record(request.span.context(), "queue", request.accepted, start);
        }
        let contexts = || batch.iter().map(|request| request.span.context());
        let sequences: Vec<&[u32]> = batch.iter().map(|request| request.tokens.as_slice()).collect();
        let predicting = BatchSpan::begin("predict", contexts());
        let tables = self.predict.encode(&sequences, predicting.as_ref().map(BatchSpan::context));
        drop(predicting);
        let predict = start.elapsed();
        self.metrics.phases.predict.record(predict);
        let preloading = BatchSpan::begin("preload", contexts());
        let planned = batch.iter().zip(&tables).filter_map(|(request, table)| Some((request.mode, table.as_ref()?)));
        let hint = Arc::new(self.preload.announce(planned));
        drop(preloading);
        let at = Instant::now();
        let together = |(request, table)| Prepared { request, table, hint: hint.clone(), at, predict };
        batch.into_iter().zip(tables).map(together).collect()
    }

    /// Hands prepared requests to the scheduler; waits while a whole batch is ready already.
    fn hand_over(&self, batch: Vec<Prepared>) {
        let limits = self.limits;
        let fits = |waiting: &VecDeque<Prepared>, next: &Prepared| {
            let costs = waiting.iter().chain([next]).map(|prepared| prepared.request.cost());
            limits.joining(Cost::default(), costs) == waiting.len() + 1
        };
        for refused in self.prepared.push_all(batch, fits) {
            refused.request.fail(RequestError::ShuttingDown);
        }
    }
}
