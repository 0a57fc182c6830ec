//! Prepares the next batch: takes the queued requests that fit one, fills their hash tables, and hints them to
//! expert-nodes. Runs on its own thread, one batch ahead at most, so that the next batch is predicted and its experts
//! are loaded while the scheduler computes this one. Where the scheduler has nothing else to do, a batch in `exact` begins at
//! once, and is predicted meanwhile; one in the other modes, which choose by the tables, waits for them. So does one that
//! predictor-nodes predict: it would hold up the running sequences for as long as they fail to answer.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use sida_routing::admission::{Cost, Limits};
use sida_telemetry::{TraceContext, spans};

use crate::{
    answer::{request_error::RequestError, routing_mode::RoutingMode},
    intake::{
        queue::Queue,
        request::Request,
        request_queue::{RequestQueue, Waiting},
    },
    measures::metrics::Metrics,
    predict::{
        need::Need,
        predict::Predict,
        preload::Preload,
        prompt_tables::{Promise, PromptTable, promise},
    },
    schedule::batch_span::BatchSpan,
};

/// A request that can join the running batch at any step.
pub(crate) struct Prepared {
    pub(crate) request: Request,
    /// The hash table of its prompt's pass, which may still be made.
    pub(crate) table: PromptTable,
    /// When the request was ready to join.
    pub(crate) at: Instant,
}

/// What a prediction needs of a request that may have left for the scheduler.
struct Prompt {
    mode: RoutingMode,
    tokens: Vec<u32>,
    trace: TraceContext,
    is_predicted: bool,
}

impl Prompt {
    fn of(request: &Request, predict: &Predict) -> Self {
        let mode = request.mode;
        let is_predicted = request.is_predicted && predict.predicts_prompt(&request.work);
        // Where it is not predicted, nothing is needed of it.
        let tokens = if is_predicted { request.tokens.clone() } else { Vec::new() };
        Self { mode, tokens, trace: request.span.context(), is_predicted }
    }
}

/// What the preparing thread works with.
pub(crate) struct Prepare {
    pub(crate) limits: Limits,
    pub(crate) need: Arc<Need>,
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
            if catch_unwind(AssertUnwindSafe(|| self.prepare(batch))).is_err() {
                tracing::error!(
                    "preparing a batch panicked; its requests run unpredicted, or are answered with an error"
                );
            }
        }
        self.prepared.close();
    }

    fn prepare(&self, mut batch: Vec<Request>) {
        let start = Instant::now();
        for request in &batch {
            spans::record(request.span.context(), "queue", request.accepted, start);
        }
        let predicted = self.need.of_batch(batch.iter().map(|request| request.mode));
        batch.iter_mut().zip(predicted).for_each(|(request, is_predicted)| request.is_predicted = is_predicted);
        let prompts: Vec<Prompt> = batch.iter().map(|request| Prompt::of(request, &self.predict)).collect();
        let (promise, tables) = promise(batch.len());
        let at = Instant::now();
        let mut prepared =
            batch.into_iter().zip(tables).map(|(request, table)| Prepared { request, table, at }).collect();
        if prompts.iter().all(|prompt| !prompt.is_predicted) {
            drop(promise);
            return self.hand_over(prepared);
        }
        if self.predict.is_at_hand() && prompts.iter().all(|prompt| prompt.mode == RoutingMode::Exact) {
            // Whoever has begun will wait for its table, so nothing here waits for room before the tables are made.
            prepared = self.prepared.push_fitting(prepared, self.fits());
        }
        self.predict(&prompts, promise);
        self.hand_over(prepared);
    }

    fn predict(&self, prompts: &[Prompt], promise: Promise) {
        let predicted = || prompts.iter().filter(|prompt| prompt.is_predicted);
        let contexts = || predicted().map(|prompt| prompt.trace);
        let sequences: Vec<&[u32]> = predicted().map(|prompt| prompt.tokens.as_slice()).collect();
        let predicting = BatchSpan::begin("predict", contexts());
        let start = Instant::now();
        let made = self.predict.encode(&sequences, predicting.as_ref().map(BatchSpan::context));
        drop(predicting);
        let took = start.elapsed();
        let had = predicted().zip(&made).filter_map(|(prompt, table)| table.as_ref().map(|_| prompt.mode));
        self.need.took(had, took);
        let mut made = made.into_iter();
        let table = |prompt: &Prompt| if prompt.is_predicted { made.next().flatten() } else { None };
        let tables = prompts.iter().map(table).collect();
        self.metrics.phases.predict.record(took);
        promise.keep(tables, took, |tables, begun| {
            let _preloading = BatchSpan::begin("preload", contexts());
            let planned = prompts.iter().zip(tables).filter_map(|(prompt, table)| Some((prompt.mode, table.as_ref()?)));
            self.preload.announce(planned, begun)
        });
    }

    /// Hands prepared requests to the scheduler; waits while a whole batch is ready already.
    fn hand_over(&self, mut prepared: Vec<Prepared>) {
        let at = Instant::now();
        prepared.iter_mut().for_each(|prepared| prepared.at = at);
        for refused in self.prepared.push_all(prepared, self.fits()) {
            refused.request.fail(RequestError::ShuttingDown);
        }
    }

    /// Whether a request belongs to one batch with those that are ready.
    fn fits(&self) -> impl Fn(&VecDeque<Prepared>, &Prepared) -> bool + use<> {
        let limits = self.limits;
        move |waiting, next| {
            let costs = waiting.iter().chain([next]).map(|prepared| prepared.request.cost());
            limits.joining(Cost::default(), costs) == waiting.len() + 1
        }
    }
}
