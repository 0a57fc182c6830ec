//! The scheduler, on the forward thread: again and again it lets prepared requests join the running batch, prefills
//! them, decodes one step of all sequences, and lets finished ones go. `routing::admission` decides who joins,
//! `forward` computes, and `sequence` makes text of the output.
//!
//! A step that fails, or panics, costs the requests that were in it and no others.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crossbeam_channel::Sender;
use sida_model::{Backend, Spans, Stack, Tokenizer, Wanted};
use sida_routing::{
    admission::{Cost, Limits},
    gathering::Gathering,
    prefill::Feed,
};
use sida_telemetry::{Span, TraceContext};
use tokio::runtime::Handle;

use crate::{
    answer::{
        answer_text::TokenText,
        catch_panic::catch_panic,
        hash_layers::HashLayers,
        request_error::RequestError,
        routing_mode::RoutingMode,
        trace::{ExpertSets, Trace},
    },
    forward::{batch::Batch, costs::Costs, expert_choice::SequenceRouting, forward::Forward},
    intake::{
        queue::{Queue, Wait},
        request::Request,
        workload::Workload,
    },
    measures::{metrics::Metrics, statistics::Statistics},
    predict::{
        beside::{Patience, PredictBeside, Predicted},
        predict::Predict,
        preload::Preload,
    },
    schedule::{
        batch_span::BatchSpan,
        postprocess::StepOutput,
        prefixes::Prefixes,
        prepare::Prepared,
        sequence::{Branch, Decoding, Sequence},
    },
};

/// Everything that the forward thread works with.
pub(crate) struct Scheduler<B: Backend> {
    pub(crate) limits: Limits,
    pub(crate) workload: Arc<Workload>,
    pub(crate) prepared: Arc<Queue<Prepared>>,
    pub(crate) forward: Forward<B>,
    pub(crate) predict: Arc<Predict>,
    pub(crate) preload: Arc<Preload>,
    pub(crate) predict_beside: PredictBeside,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) statistics: Arc<Statistics>,
    pub(crate) metrics: Arc<Metrics>,
    /// Where text is made while a device computes; `None`: it is made here.
    pub(crate) texts: Option<Sender<Vec<TokenText>>>,
    /// Where answers are handed to their callers.
    pub(crate) runtime: Handle,
    /// The running batch.
    pub(crate) running: Vec<Sequence<B>>,
    /// What sequences that are over have left for others.
    pub(crate) prefixes: Prefixes<B>,
    /// How long a batch waits for more requests when nothing runs, and since when nothing does.
    pub(crate) gathering: Gathering,
    pub(crate) idle_since: Instant,
    /// Whether traces tell layer by layer what was predicted.
    pub(crate) evaluates: bool,
    /// Memory for the encoder states of a batch, kept from batch to batch.
    pub(crate) values: Vec<f32>,
}

impl<B: Backend> Scheduler<B> {
    /// Runs until the queue is closed and everything in it was answered.
    pub(crate) fn run(mut self) {
        while let Some(joining) = self.schedule() {
            let taking_part = self.running.len() + joining.len();
            if self.running.is_empty() {
                let waited = self.waited(joining.first());
                self.gathering.begins(joining.len(), waited);
            }
            self.note_inflight(&joining);
            self.statistics.step_begins();
            let (begun, mut sequences) = (Instant::now(), self.places());
            let outcome = catch_panic(|| {
                sequences += self.prefill(joining);
                self.step();
                Ok(())
            });
            if sequences > 0 {
                self.workload.step(sequences, begun.elapsed());
            }
            // The callers of requests that were joining see their channels end.
            if let Err(error) = outcome {
                self.fail_running(&error);
            }
            self.statistics.step_ended();
            self.note_inflight(&[]);
            if self.running.is_empty() {
                self.idle_since = Instant::now();
                self.gathering.idle(taking_part, self.prepared.len());
            }
        }
    }

    /// The requests that join now. Waits while there is nothing to do; `None` ends the thread.
    fn schedule(&self) -> Option<Vec<Prepared>> {
        let running: Cost = self.running.iter().map(Sequence::cost).sum();
        let limits = self.limits;
        let choose = |waiting: &VecDeque<Prepared>| {
            let now = Instant::now();
            limits.joining_step(running, waiting.iter().map(|prepared| prepared.request.cost_at(now)))
        };
        let wait = if self.running.is_empty() { Wait::Block } else { Wait::Poll };
        let patience = |waiting: &VecDeque<Prepared>| self.gathering.wait(waiting.len(), self.waited(waiting.front()));
        match self.prepared.take_patiently(wait, choose, patience) {
            Some(joining) => Some(joining),
            None if self.running.is_empty() => None,
            None => Some(Vec::new()),
        }
    }

    /// Places that the running sequences take.
    pub(crate) fn places(&self) -> usize {
        self.running.iter().map(Sequence::places).sum()
    }

    /// How long a batch whose first request this is has waited for others, since nothing runs any more.
    fn waited(&self, first: Option<&Prepared>) -> Duration {
        first.map_or(Duration::ZERO, |first| first.at.max(self.idle_since).elapsed())
    }

    fn note_inflight(&self, joining: &[Prepared]) {
        let requests = self.running.len() + joining.len();
        let all = self.running.iter().map(|s| &s.request).chain(joining.iter().map(|prepared| &prepared.request));
        self.metrics.cache_reserved_bytes.set(all.map(|request| request.cache_bytes).sum::<u64>() as f64);
        self.metrics.prefix_cache_bytes.set(self.prefixes.kept.bytes() as f64);
        self.statistics.inflight.store(requests, Ordering::Relaxed);
        self.metrics.requests_inflight.set(requests as f64);
    }

    /// One step of the decoder over every running sequence.
    fn step(&mut self) {
        let now = Instant::now();
        let over: Vec<_> = self.running.extract_if(.., |sequence| sequence.request.over(now).is_some()).collect();
        over.into_iter().for_each(|sequence| self.let_go(sequence));
        if self.running.is_empty() {
            return;
        }
        let mut span = BatchSpan::begin("decode", self.running.iter().map(|sequence| sequence.request.span.context()));
        let within = span.as_ref().map(BatchSpan::context);
        let scheduling = within.map(|within| Span::below(within, "schedule"));
        self.share_rows();
        describe(&mut span, self.running.len(), self.running.iter().flat_map(|s| &s.branches).map(|b| b.rows).sum());
        let mut routings = self.routings();
        self.begin_notes(&mut routings);
        let patience = match self.running.iter().all(|sequence| sequence.request.mode == RoutingMode::Exact) {
            true => Patience::Short,
            false => Patience::Long,
        };
        self.begin_prediction(patience, within);
        drop(scheduling);
        let before = (patience == Patience::Long).then(|| self.take_prediction(patience, &mut routings));
        let mut costs = Costs::of_pass(within);
        let outcome = self.decode(&mut routings, &mut costs);
        let _settling = within.map(|within| Span::below(within, "output"));
        costs.record(&self.metrics.phases);
        let after = self.take_prediction(Patience::Short, &mut routings);
        let waited = self.predict_beside.waited();
        self.metrics.phases.predict.record(waited);
        self.running.iter_mut().for_each(|sequence| sequence.trace.timings.predict += waited);
        self.note_predictions(&mut routings);
        // The hints are taken back: the step is over.
        drop((before, after));
        match outcome {
            Ok(output) => {
                self.end_notes(&mut routings);
                self.postprocess(routings, output, &costs);
            }
            // The pass was given up: nobody waits for any of them.
            Err(RequestError::Cancelled) => {
                std::mem::take(&mut self.running).into_iter().for_each(|sequence| self.let_go(sequence));
            }
            Err(error) => self.fail_running(&error),
        }
    }

    /// Says how many rows of each branch this step computes.
    fn share_rows(&mut self) {
        let feeds: Vec<Feed> = self.running.iter().flat_map(Sequence::feeds).collect();
        let rows = self.limits.step_rows(&feeds);
        let branches = self.running.iter_mut().flat_map(|sequence| &mut sequence.branches);
        branches.zip(rows).for_each(|(branch, rows)| branch.rows = rows);
    }

    /// Lets a sequence take part in the next step once `then` is done, or answers it with the error of that.
    pub(crate) fn go_on(
        &mut self,
        mut sequence: Sequence<B>,
        then: impl FnOnce(&mut Sequence<B>, &B) -> Result<(), RequestError>,
    ) {
        match catch_panic(|| then(&mut sequence, self.forward.backend())) {
            Ok(()) => self.running.push(sequence),
            Err(error) => {
                self.note_failure(&error);
                sequence.request.fail(error);
            }
        }
    }

    /// Lets a sequence go that nobody waits for any more. Others may begin with what it had computed.
    fn let_go(&mut self, sequence: Sequence<B>) {
        self.keep(sequence).fail_with_batch(&RequestError::Cancelled);
    }

    fn fail_running(&mut self, error: &RequestError) {
        self.note_failure(error);
        self.running.drain(..).for_each(|sequence| sequence.request.fail_with_batch(error));
    }

    /// Notes an error that a request is answered with.
    pub(crate) fn note_failure(&self, error: &RequestError) {
        if error.is_ours() {
            self.statistics.outcomes.failed(error);
        }
    }

    /// How the rows of every branch are routed in this step's batch.
    fn routings(&self) -> Vec<SequenceRouting> {
        let of = |sequence: &Sequence<B>| {
            let routing = |(number, branch): (usize, &Branch<B>)| {
                let place = sequence.place(branch);
                self.routing(&sequence.request, number, place..place + branch.rows)
            };
            sequence.branches.iter().enumerate().map(routing).collect::<Vec<_>>()
        };
        self.running.iter().flat_map(of).collect()
    }

    /// Has what the routers choose in this step noted for prompts that predictor-nodes learn from.
    fn begin_notes(&mut self, routings: &mut [SequenceRouting]) {
        let branches = self.running.iter_mut().flat_map(|sequence| &mut sequence.branches);
        branches.zip(routings).for_each(|(branch, routing)| routing.noted = branch.noted.take());
    }

    /// Keeps what was noted until the prompt is read, and then has predictor-nodes told.
    fn end_notes(&mut self, routings: &mut [SequenceRouting]) {
        let branches = self.running.iter_mut().flat_map(|sequence| &mut sequence.branches);
        for (branch, routing) in branches.zip(routings).filter(|(_, routing)| routing.failure.is_none()) {
            match routing.noted.take() {
                Some(noted) if branch.rows == branch.feed.len() => {
                    self.predict.teach(&[&branch.past[..], &branch.feed].concat(), noted);
                }
                noted => branch.noted = noted,
            }
        }
    }

    /// Begins to predict what the new tokens of every branch will use whose request is predicted.
    fn begin_prediction(&mut self, patience: Patience, within: Option<TraceContext>) {
        let mut sequences = Vec::new();
        let predicted = self.running.iter().filter(|sequence| sequence.request.is_predicted);
        for branch in predicted.flat_map(|sequence| &sequence.branches) {
            branch.progress.feed(branch.fed());
            sequences.push(branch.progress.clone());
        }
        self.predict_beside.begin(sequences, patience, within);
    }

    /// Waits for the prediction, if it has not been taken yet, and gives every branch that is predicted its hash table.
    fn take_prediction(&mut self, patience: Patience, routings: &mut [SequenceRouting]) -> Option<Predicted> {
        let mut predicted = self.predict_beside.take(patience)?;
        let top_k = self.forward.config().top_k;
        let of_predicted = routings.iter_mut().filter(|routing| routing.is_predicted);
        for (routing, table) in of_predicted.zip(&mut predicted.tables) {
            routing.predicted(table.take(), top_k);
        }
        Some(predicted)
    }

    /// Notes how the predictions for a pass that is over fared.
    pub(crate) fn note_predictions(&self, routings: &mut [SequenceRouting]) {
        self.forward.note_predictions(routings);
        let missing = routings.iter().filter(|routing| routing.is_predicted && routing.table().is_none()).count();
        self.metrics.predictions_missing.increment(missing as u64);
        self.metrics.rerouted_experts.increment(routings.iter().map(|routing| routing.rerouted).sum());
    }

    /// One pass of the decoder over the new tokens of every branch. For sequences that generate and whose prompts are
    /// read, the next token where the device chooses it, or else its logits.
    fn decode(&mut self, routings: &mut [SequenceRouting], costs: &mut Costs) -> Result<StepOutput<B>, RequestError> {
        let (forward, running, metrics) = (&mut self.forward, &mut self.running, &self.metrics);
        catch_panic(|| {
            let mut ids = Vec::new();
            let mut lengths = Vec::new();
            let mut sequences = Vec::new();
            let mut requests = Vec::new();
            let (mut last_rows, mut greedy, mut other_rows) = <(Vec<_>, Vec<_>, Vec<_>)>::default();
            for sequence in running.iter_mut() {
                let best_but = match &sequence.decoding {
                    Decoding::Generate(generation) if sequence.is_fed_whole() => {
                        Some(generation.best_but(&forward.config().generation))
                    }
                    Decoding::Generate(_) | Decoding::ReadPrompt | Decoding::Score => None,
                };
                for branch in &mut sequence.branches {
                    ids.extend_from_slice(branch.fed());
                    lengths.push(branch.rows);
                    sequences.push(&mut branch.state);
                    requests.push(&sequence.request);
                    let Some(best_but) = best_but else { continue };
                    last_rows.push(ids.len() - 1);
                    match best_but {
                        Some(banned) => greedy.push(Wanted { row: ids.len() as u32 - 1, banned }),
                        None => other_rows.push(ids.len() - 1),
                    }
                }
            }
            metrics.batch_tokens.record(ids.len() as f64);
            let spans = Spans::new(lengths);
            let batch = Batch {
                stack: Stack::Decoder,
                ids: &ids,
                spans: spans.clone(),
                sequences,
                wanted: &greedy,
                routings,
                requests: &requests,
            };
            let states = forward.pass(batch, costs)?;
            let start = Instant::now();
            let backend = forward.backend();
            let tokens = backend.best_tokens(&states, &greedy).transpose()?;
            let logits = backend.logits(&states, if tokens.is_some() { &other_rows } else { &last_rows })?;
            costs.dense_since(start);
            Ok(StepOutput { states, spans, tokens, logits })
        })
    }

    /// How the rows in these places of a request's sequence are routed, of the branch of a number.
    pub(crate) fn routing(&self, request: &Request, branch: usize, rows: Range<usize>) -> SequenceRouting {
        let config = self.forward.config();
        let experts = ExpertSets::new(config.moe_layer_count(), config.num_experts);
        let replayed = request.replayed.as_ref();
        let replayed = replayed.map(|replayed| replayed.rows(branch, rows.start, request.tokens.len()));
        SequenceRouting::new(request.mode, request.is_predicted, rows.len(), experts).replaying(replayed)
    }

    pub(crate) fn trace(&self, request: &Request) -> Trace {
        let config = self.forward.config();
        let (layers, num_experts) = (config.moe_layer_count(), config.num_experts);
        let hash_layers = self.evaluates.then(|| HashLayers::new(layers, num_experts, config.top_k));
        Trace { hash_layers, ..Trace::new(request.mode, layers, num_experts) }
    }
}

/// Notes in a pass's span how many sequences and tokens it computes.
pub(crate) fn describe(span: &mut Option<BatchSpan>, sequences: usize, tokens: usize) {
    if let Some(span) = span {
        span.lead().set("sida.batch.sequences", sequences as i64);
        span.lead().set("sida.batch.tokens", tokens as i64);
    }
}
