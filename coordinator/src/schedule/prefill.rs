//! Prefill: the prompts of requests that join the running batch are computed in one pass of the encoder. Requests for
//! states are answered then; all others become sequences. Where there is no encoder, a prompt is the first that its sequence
//! feeds to the decoder, in the step that follows, and only prompts whose states are asked for have a pass here. Called by
//! the scheduler between two steps.

use std::time::Instant;

use sida_model::{Backend, NewSequence, Spans, Stack};
use sida_telemetry::{Span, spans};

use crate::{
    answer::{
        catch_panic::catch_panic,
        encoding::{self, EncodedTokens},
        output::{Encoding, Pooling},
        request_error::RequestError,
        trace::Trace,
    },
    forward::{batch::Batch, costs::Costs, expert_choice::SequenceRouting},
    intake::{
        request::{EncodeOptions, Request, Work},
        request_span,
    },
    predict::{predict::Progress, prompt_tables::PromptTable},
    schedule::{
        batch_span::BatchSpan,
        prepare::Prepared,
        scheduler::{Scheduler, describe},
        sequence::{self, Branch, Sequence, scored_tokens},
    },
};

/// A request that joins now: with its trace so far, and how its prompt is routed.
struct Joining {
    request: Request,
    trace: Trace,
    routing: SequenceRouting,
    table: PromptTable,
}

impl<B: Backend> Scheduler<B> {
    /// Computes the prompts of requests that join, answers those that asked for states, and starts the sequences of the
    /// others. Says how many sequences have joined.
    pub(crate) fn prefill(&mut self, joining: Vec<Prepared>) -> usize {
        let now = Instant::now();
        let joining = self.in_shares(joining);
        let (mut sequences, running) = (0, self.places());
        let mut join = |prepared| {
            let joining = self.join(prepared, running + sequences, now)?;
            sequences += joining.request.places();
            Some(joining)
        };
        let joining = joining.into_iter().filter_map(&mut join).collect();
        self.compute(joining);
        sequences
    }

    fn compute(&mut self, joining: Vec<Joining>) {
        if self.forward.config().has_encoder() {
            return self.compute_prompts(joining);
        }
        let asks_for_states = |joining: &Joining| matches!(joining.request.work, Work::Encode { .. });
        let (prompts, others): (Vec<Joining>, Vec<Joining>) = joining.into_iter().partition(asks_for_states);
        self.make_room(prompts.iter().map(|joining| joining.request.cache_bytes).sum());
        self.compute_prompts(prompts);
        others.into_iter().for_each(|joining| self.start_with_prompt(joining));
    }

    /// Notes that a request joins so many sequences, unless nobody waits for it any more or it would come too late.
    fn join(&self, prepared: Prepared, sequences: usize, now: Instant) -> Option<Joining> {
        let Prepared { mut request, table, at } = prepared;
        if let Some(reason) = request.over(now).or_else(|| self.workload.no_time(&request, sequences, 1.0, now)) {
            request.fail(reason);
            return None;
        }
        let (predicted, took) = table.begin();
        let mut trace = self.trace(&request);
        trace.timings.predict = took;
        trace.timings.queue = (now - request.accepted).saturating_sub(took);
        self.metrics.queue_seconds.record(trace.timings.queue);
        spans::record(request.span.context(), "join", at, now);
        request_span::describe_prompt(&mut request.span, request.tokens.len());
        let mut routing = self.routing(&request, 0, 0..request.tokens.len());
        routing.predicted(predicted, self.forward.config().top_k);
        routing.noted = self.predict.notes(request.mode, request.tokens.len());
        Some(Joining { request, trace, routing, table })
    }

    /// Starts the sequence of a request whose prompt the decoder reads, in the steps that follow.
    fn start_with_prompt(&mut self, Joining { request, mut trace, mut routing, .. }: Joining) {
        let (tokens, is_scored) = (request.tokens.len(), matches!(request.work, Work::Score { .. }));
        let tokens_max = tokens + request.work.decoded_tokens_max();
        let (state, cached) = match self.start_from_prefix(&request, tokens_max) {
            Ok(started) => started,
            Err(error) => {
                self.note_failure(&error);
                return request.fail(error);
            }
        };
        trace.cached_tokens = cached;
        // Targets branch off the last token.
        let (past, feed) = request.tokens[..tokens - usize::from(is_scored)].split_at(cached);
        let progress = self.predict.start(request.mode, None);
        progress.follow(past);
        // What another request has computed no router is asked about again.
        let noted = routing.noted.take().filter(|_| past.is_empty());
        let branch = Branch { past: past.to_vec(), noted, ..Branch::new(state, progress, feed.to_vec()) };
        match is_scored {
            // A prompt of one token is read already, and so may be a longer one.
            true => self.go_on(Sequence::reading_prompt(request, trace, branch), Sequence::read_on),
            false => self.running.push(Sequence::new(request, trace, vec![branch])),
        }
    }

    /// Computes prompts in one pass: of the encoder, or, if there is none, of the decoder.
    fn compute_prompts(&mut self, joining: Vec<Joining>) {
        let mut requests = Vec::with_capacity(joining.len());
        let mut routings = Vec::with_capacity(joining.len());
        let mut tables = Vec::with_capacity(joining.len());
        for Joining { request, trace, routing, table } in joining {
            routings.push(routing);
            requests.push((request, trace));
            tables.push(table);
        }
        if requests.is_empty() {
            return;
        }
        let mut span = BatchSpan::begin("encode", requests.iter().map(|(request, _)| request.span.context()));
        let within = span.as_ref().map(BatchSpan::context);
        let hint = {
            let _span = within.map(|within| Span::below(within, "preload"));
            self.preload.begin(routings.iter().filter_map(SequenceRouting::planned))
        };
        // Those that are there have their hint by now.
        let is_late = |routing: &SequenceRouting| routing.is_predicted && routing.table().is_none();
        let late = tables.into_iter().zip(&routings).map(|(table, routing)| is_late(routing).then_some(table));
        let late: Vec<Option<PromptTable>> = late.collect();
        let spans = Spans::new(requests.iter().map(|(request, _)| request.tokens.len()));
        let ids: Vec<u32> = requests.iter().flat_map(|(request, _)| request.tokens.iter().copied()).collect();
        self.metrics.batch_tokens.record(ids.len() as f64);
        describe(&mut span, requests.len(), ids.len());
        let mut costs = Costs::of_pass(within);
        let forward = &mut self.forward;
        let callers: Vec<&Request> = requests.iter().map(|(request, _)| request).collect();
        let begun = Instant::now();
        let outcome = catch_panic(|| {
            let (ids, routings, wanted) = (&ids[..], &mut routings[..], &[][..]);
            if forward.config().has_encoder() {
                let (stack, spans, sequences) = (Stack::Encoder, spans.clone(), Vec::new());
                let batch = Batch { stack, ids, spans, sequences, wanted, routings, requests: &callers };
                return forward.pass(batch, &mut costs);
            }
            let new = spans.ranges().map(|rows| NewSequence { rows: 0..0, tokens_max: rows.len() });
            let started = start_all(forward.backend(), None, &new.collect::<Vec<_>>());
            let mut sequences = started.into_iter().collect::<Result<Vec<_>, _>>()?;
            let (stack, spans, sequences) = (Stack::Decoder, spans.clone(), sequences.iter_mut().collect());
            let batch = Batch { stack, ids, spans, sequences, wanted, routings, requests: &callers };
            let states = forward.pass(batch, &mut costs)?;
            Ok(forward.backend().last_hidden(states)?)
        });
        drop(hint);
        self.take_late_tables(late, &mut requests, &mut routings);
        self.note_predictions(&mut routings);
        for ((request, _), routing) in requests.iter().zip(&mut routings) {
            if let Some(noted) = routing.noted.take().filter(|_| outcome.is_ok() && routing.failure.is_none()) {
                self.predict.teach(&request.tokens, noted);
            }
        }
        // Threads that compute have requests to read meanwhile: on processors, waiting cost 8% of the throughput.
        if self.forward.is_on_device() {
            self.gathering.note(ids.len(), begun.elapsed());
        }
        match outcome {
            Ok(states) => self.start_sequences(requests, &routings, &states, &spans, costs, span),
            Err(error) => {
                self.note_failure(&error);
                costs.record(&self.metrics.phases);
                requests.into_iter().for_each(|(request, _)| request.fail_with_batch(&error));
            }
        }
    }

    /// Waits for the tables that were not there when the pass began, to see how the predictions fared.
    fn take_late_tables(
        &self,
        tables: Vec<Option<PromptTable>>,
        requests: &mut [(Request, Trace)],
        routings: &mut [SequenceRouting],
    ) {
        let start = Instant::now();
        for ((table, (_, trace)), routing) in tables.into_iter().zip(requests).zip(routings) {
            let Some(table) = table else { continue };
            routing.predicted(table.wait(), self.forward.config().top_k);
            trace.timings.predict += start.elapsed();
        }
    }

    /// The requests in an order in which their prompts can be cut into micro-batches of about equally many rows.
    fn in_shares(&mut self, joining: Vec<Prepared>) -> Vec<Prepared> {
        let micro_batches = self.forward.parts();
        if micro_batches == 1 {
            return joining;
        }
        let spans = Spans::new(joining.iter().map(|prepared| prepared.request.tokens.len()));
        let mut joining: Vec<_> = joining.into_iter().map(Some).collect();
        let order = spans.shares(micro_batches).concat();
        order.into_iter().filter_map(|at| joining[at].take()).collect()
    }

    /// Takes requests whose prompts are computed, one for each of `routings` and `spans`, by a pass with these costs
    /// and this span: answers those that asked for encoder states, and starts the sequences of the others.
    fn start_sequences(
        &mut self,
        mut requests: Vec<(Request, Trace)>,
        routings: &[SequenceRouting],
        states: &B::States,
        spans: &Spans,
        mut costs: Costs,
        span: Option<BatchSpan>,
    ) {
        let computed = || {
            let all = requests.iter().zip(routings).zip(spans.ranges());
            let computed = all.filter(|((_, routing), _)| routing.failure.is_none());
            computed.map(|(((request, _), _), rows)| (&request.work, rows))
        };
        let pooling = |work: &Work| if let Work::Encode { options, .. } = work { Some(options.pooling) } else { None };
        let wants = |wanted| computed().any(|(work, _)| pooling(work) == Some(wanted));
        let (wants_rows, wants_means) = (wants(Pooling::None), wants(Pooling::Mean));
        let sequences = computed().filter(|(work, _)| pooling(work).is_none());
        let sequences = sequences.map(|(work, rows)| NewSequence { rows, tokens_max: work.decoded_tokens_max() });
        let sequences: Vec<NewSequence> = sequences.collect();
        let mut buffer = std::mem::take(&mut self.values);
        let start = Instant::now();
        let is_told = |request: &Request| request.is_predicted && !matches!(request.work, Work::Encode { .. });
        let wants_inputs = self.predict.reads_input() && requests.iter().any(|(request, _)| is_told(request));
        let backend = self.forward.backend();
        let read = catch_panic(|| {
            let rows = if wants_rows || wants_inputs { backend.values(states, &mut buffer)? } else { &[] };
            let means = if wants_means { backend.means(states, spans)? } else { Vec::new() };
            Ok((rows, means))
        });
        let mut started = start_all(backend, Some(states), &sequences).into_iter();
        costs.dense_since(start);
        costs.record(&self.metrics.phases);
        drop(span);
        for ((_, trace), routing) in requests.iter_mut().zip(routings) {
            sequence::absorb(trace, routing);
            sequence::absorb_costs(trace, &costs);
        }
        let d_model = self.forward.config().d_model;
        let mut encodings = Vec::new();
        for (at, ((request, trace), routing)) in requests.into_iter().zip(routings).enumerate() {
            match (&routing.failure, &request.work) {
                (Some(failure), _) => request.fail(failure.clone()),
                (None, Work::Encode { options, .. }) => match &read {
                    Ok((rows, means)) => {
                        let (values, range) = match options.pooling {
                            Pooling::None => (*rows, spans.range(at)),
                            Pooling::Mean => (&means[..], at..at + 1),
                        };
                        let values = &values[range.start * d_model..range.end * d_model];
                        let encoding = self.encoding(&request, *options, trace, values);
                        encodings.push((request, encoding));
                    }
                    Err(error) => {
                        self.note_failure(error);
                        request.fail(error.clone());
                    }
                },
                (None, _) => {
                    let rows = spans.range(at);
                    let input = read.as_ref().ok().filter(|_| wants_inputs && request.is_predicted);
                    let input = input.map(|(states, _)| &states[rows.start * d_model..rows.end * d_model]);
                    let progress = self.predict.start(request.mode, input);
                    let state = started.next().expect("one for each");
                    match state.and_then(|state| self.branches(&request, state, &progress)) {
                        Ok(branches) => self.running.push(Sequence::new(request, trace, branches)),
                        Err(error) => {
                            self.note_failure(&error);
                            request.fail(error);
                        }
                    }
                }
            }
        }
        self.values = buffer;
        if encodings.len() == 1 {
            encodings.into_iter().for_each(|(request, encoding)| answer_encoding(request, encoding));
        } else if !encodings.is_empty() {
            // Each answer wakes the task of its caller, which takes a thread outside the runtime much longer than one within.
            let answer =
                async { encodings.into_iter().for_each(|(request, encoding)| answer_encoding(request, encoding)) };
            self.runtime.spawn(answer);
        }
    }

    /// The answer to a request for encoder states, made of what it asked for of them: (rows, d_model).
    fn encoding(
        &self,
        request: &Request,
        options: EncodeOptions,
        mut trace: Trace,
        states: &[f32],
    ) -> Result<Encoding, RequestError> {
        trace.timings.total = request.accepted.elapsed();
        let d_model = self.forward.config().d_model;
        let EncodeOptions { normalize, truncated_tokens, .. } = options;
        let tokens = EncodedTokens { prompt_tokens: request.tokens.len(), truncated_tokens };
        let encoding = catch_panic(|| encoding::encoding(states.to_vec(), d_model, tokens, normalize, trace));
        match &encoding {
            Ok(_) => {
                self.statistics.outcomes.answered();
                request.answered(1, 0);
            }
            Err(error) => self.note_failure(error),
        }
        encoding
    }

    /// The branches of a sequence behind an encoder. Each begins with the decoder's start token, and goes on with all
    /// of its target but the last token where one is scored. All share the keys and values of the encoder's output, and what
    /// the predictor knows of it. A text that is generated begins with one branch, however many choices it has.
    fn branches(
        &mut self,
        request: &Request,
        state: B::Sequence,
        progress: &Progress,
    ) -> Result<Vec<Branch<B>>, RequestError> {
        let start = self.forward.config().generation.decoder_start_token_id;
        let feeds = match &request.work {
            Work::Score { targets, .. } => targets.iter().map(|target| scored_tokens(Some(start), target)).collect(),
            Work::Generate { .. } | Work::Encode { .. } => vec![vec![start]],
        };
        let backend = self.forward.backend();
        let mut states =
            catch_panic(|| Ok((1..feeds.len()).map(|_| backend.fork(&state)).collect::<Result<Vec<_>, _>>()?))?;
        states.push(state);
        let branches = states.into_iter().zip(feeds);
        Ok(branches.map(|(state, feed)| Branch::new(state, progress.fork(), feed)).collect())
    }
}

/// Starts sequences, or says for each why it has not started.
pub(crate) fn start_all<B: Backend>(
    backend: &mut B,
    states: Option<&B::States>,
    sequences: &[NewSequence],
) -> Vec<Result<B::Sequence, RequestError>> {
    if sequences.is_empty() {
        return Vec::new();
    }
    match catch_panic(|| Ok(backend.start(states, sequences)?)) {
        Ok(started) => started.into_iter().map(|sequence| sequence.map_err(RequestError::from)).collect(),
        Err(error) => sequences.iter().map(|_| Err(error.clone())).collect(),
    }
}

/// Answers a request for encoder states. The caller may have gone, which is no error.
fn answer_encoding(request: Request, encoding: Result<Encoding, RequestError>) {
    match (encoding, request) {
        (Ok(encoding), Request { work: Work::Encode { reply, .. }, let_in, .. }) => {
            drop(let_in);
            drop(reply.send(Ok(encoding)));
        }
        (Ok(_), _) => {}
        (Err(error), request) => request.fail(error),
    }
}
