//! A sequence: one request between its prefill and its answer, with the decoder's caches, what was generated, and how
//! it ends. A generated text has one branch for each of its choices, and one for all of them until the first token is
//! chosen; a scored request has one per target, and where the decoder reads the prompt itself, one for all of them until it
//! is read. All share the cross-attention keys and values of the prompt. Kept and stepped by the scheduler.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use sida_model::Backend;
use sida_routing::{admission::Cost, prefill::Feed};
use sida_telemetry::spans;

use crate::{
    answer::{
        answer_text::TokenText,
        output::{Finish, Scores, Token},
        request_error::RequestError,
        score,
        trace::Trace,
    },
    forward::{costs::Costs, expert_choice::SequenceRouting},
    intake::{
        request::{Request, Work},
        request_span,
    },
    measures::metrics::Metrics,
    predict::{noted_labels::NotedLabels, predict::Progress},
    schedule::generation::{Chosen, Generation, NextTokens, Writing},
};

/// A request that is being decoded.
pub(crate) struct Sequence<B: Backend> {
    pub(crate) request: Request,
    pub(crate) trace: Trace,
    pub(crate) branches: Vec<Branch<B>>,
    pub(crate) decoding: Decoding,
}

/// One run of tokens after the prompt.
pub(crate) struct Branch<B: Backend> {
    /// The decoder's caches.
    pub(crate) state: B::Sequence,
    /// What the predictor knows of the branch, and has yet to see.
    pub(crate) progress: Arc<Progress>,
    /// The tokens that the caches hold. Invariant: as many as `state` has decoded.
    pub(crate) past: Vec<u32>,
    /// The tokens that the next steps compute.
    pub(crate) feed: Vec<u32>,
    /// How many of them the next one does, or the last one did.
    pub(crate) rows: usize,
    /// Where what the routers choose for its prompt is noted, until that is read.
    pub(crate) noted: Option<NotedLabels>,
}

/// What is done with the decoder's output.
pub(crate) enum Decoding {
    /// The next token of each choice is chosen, step after step.
    Generate(Box<Generation>),
    /// The prompt of a scored request is read, but for its last token; then its targets branch off.
    ReadPrompt,
    /// The likelihood of the targets, one per branch, is read off a single step.
    Score,
}

/// Whether a sequence takes part in the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SequenceStatus {
    /// The next step computes the token that was chosen.
    Running,
    /// The request was answered.
    Finished,
}

impl<B: Backend> Branch<B> {
    /// A branch with the tokens that it begins with.
    pub(crate) fn new(state: B::Sequence, progress: Progress, feed: Vec<u32>) -> Self {
        Self { state, progress: Arc::new(progress), past: Vec::new(), feed, rows: 0, noted: None }
    }

    /// The same past, with other tokens to come.
    fn fork(&self, backend: &B, feed: Vec<u32>) -> Result<Self, RequestError> {
        let branch = Self::new(backend.fork(&self.state)?, self.progress.fork(), feed);
        Ok(Self { past: self.past.clone(), ..branch })
    }

    /// The tokens that the next step computes.
    pub(crate) fn fed(&self) -> &[u32] {
        &self.feed[..self.rows]
    }

    /// Takes note that a step has computed them.
    fn advance(&mut self) {
        self.past.extend(self.feed.drain(..self.rows));
    }
}

impl<B: Backend> Sequence<B> {
    /// A request whose prompt is encoded, with its branches. Those of a generated text are one, which begins with what it
    /// feeds.
    pub(crate) fn new(request: Request, trace: Trace, branches: Vec<Branch<B>>) -> Self {
        let decoding = match &request.work {
            Work::Generate { options, .. } => {
                let decoder_tokens = branches.first().map(|branch| [&branch.past[..], &branch.feed].concat());
                Decoding::Generate(Box::new(Generation::new(options, &decoder_tokens.unwrap_or_default())))
            }
            Work::Score { .. } | Work::Encode { .. } => Decoding::Score,
        };
        Self { request, trace, branches, decoding }
    }

    /// A scored request whose prompt the decoder reads: the targets branch off this one, which feeds all of the prompt
    /// but its last token.
    pub(crate) fn reading_prompt(request: Request, trace: Trace, branch: Branch<B>) -> Self {
        Self { request, trace, branches: vec![branch], decoding: Decoding::ReadPrompt }
    }

    /// What each branch has to feed.
    pub(crate) fn feeds(&self) -> impl Iterator<Item = Feed> {
        let reads_prompt = match &self.decoding {
            Decoding::Generate(generation) => generation.generated == 0,
            Decoding::ReadPrompt => true,
            Decoding::Score => false,
        };
        let feed = move |branch: &Branch<B>| match branch.feed.len() {
            rows if reads_prompt => Feed::Prompt(rows),
            rows => Feed::Whole(rows),
        };
        self.branches.iter().map(feed)
    }

    /// The place in its sequence, the prompt included, of the first token that a branch feeds. (Of a model without an encoder.)
    pub(crate) fn place(&self, branch: &Branch<B>) -> usize {
        let prompt = self.request.tokens.len();
        match &self.decoding {
            Decoding::Generate(generation) => (prompt + generation.generated).saturating_sub(branch.feed.len()),
            // The last token of the prompt is fed with each target.
            Decoding::ReadPrompt => (prompt - 1).saturating_sub(branch.feed.len()),
            Decoding::Score => prompt - 1,
        }
    }

    /// What it takes of the next step beside the rows of its prompt, and of the memory.
    pub(crate) fn cost(&self) -> Cost {
        let tokens = match (&self.decoding, &self.request.work) {
            (Decoding::ReadPrompt, Work::Score { targets, .. }) => targets.iter().map(Vec::len).sum(),
            (Decoding::Score, _) => self.branches.iter().map(|branch| branch.feed.len()).sum(),
            _ => self.branches.len(),
        };
        Cost { tokens, sequences: self.places(), cache_bytes: self.request.cache_bytes }
    }

    /// Whether what it has computed has led to an answer, or the beginning of one: then others may begin with it. Until then
    /// it is not known to be numbers.
    pub(crate) fn is_sound(&self) -> bool {
        match (&self.decoding, &self.request.work) {
            (Decoding::Generate(generation), _) => generation.generated > 0,
            (Decoding::Score, Work::Score { reply, .. }) => reply.is_none(),
            _ => false,
        }
    }

    /// Whether the step computes all that its branches feed.
    pub(crate) fn is_fed_whole(&self) -> bool {
        self.branches.iter().all(|branch| branch.rows == branch.feed.len())
    }

    /// Takes note that a step has computed some rows of the prompt, of which nothing was asked yet. Where it is read,
    /// targets branch off.
    pub(crate) fn read_on(&mut self, backend: &B) -> Result<(), RequestError> {
        self.branches.iter_mut().for_each(Branch::advance);
        if self.branches.iter().all(|branch| branch.feed.is_empty()) { self.branch_out(backend) } else { Ok(()) }
    }

    /// How many places it takes among the running sequences: also for choices that have no branch of their own yet.
    pub(crate) fn places(&self) -> usize {
        match &self.decoding {
            Decoding::Generate(generation) => generation.choices.len().max(self.branches.len()),
            Decoding::ReadPrompt => self.request.places(),
            Decoding::Score => self.branches.len(),
        }
    }

    /// Takes or chooses the next token of each choice, and feeds it to the next step unless the choice ends here. Texts are
    /// streamed, or else, `beside` the next step, returned to be written if there are no stop texts.
    pub(crate) fn advance(
        &mut self,
        next: NextTokens<'_>,
        writing: Writing<'_>,
        metrics: &Metrics,
    ) -> Result<(SequenceStatus, Vec<TokenText>), RequestError> {
        let (Decoding::Generate(generation), Work::Generate { reply, .. }) = (&mut self.decoding, &self.request.work)
        else {
            return Ok((SequenceStatus::Finished, Vec::new()));
        };
        let is_beside = writing.is_beside && generation.options.stop.is_empty();
        let chosen = generation.advance(next, Writing { is_beside, ..writing })?;
        metrics.generated_tokens.increment(chosen.len() as u64);
        let now = Instant::now();
        let first_token_at = *generation.first_token_at.get_or_insert_with(|| {
            let waited = now - self.request.accepted;
            metrics.time_to_first_token_seconds.of(generation.options.door).record(waited);
            self.request.span.set("sida.time_to_first_token_us", spans::microseconds(waited));
            now
        });
        let (mut texts, mut going, mut fed, mut is_gone) = (Vec::new(), Vec::new(), Vec::new(), false);
        if chosen.iter().all(|chosen| chosen.reason.is_some())
            && let Some(let_in) = self.request.let_in.take()
        {
            let generated = generation.ended_tokens + chosen.len() * generation.generated;
            let_in.ends(self.request.tokens_brought() + generated);
        }
        let choices = std::mem::take(&mut generation.choices);
        for (choice, Chosen { id, logprobs, text, reason }) in choices.into_iter().zip(chosen) {
            let finish = reason.map(|reason| {
                record_pace(now - first_token_at, generation, metrics);
                self.trace.timings.total = now - self.request.accepted;
                generation.ended_tokens += generation.generated;
                generation.ended.push(reason);
                Finish {
                    reason,
                    prompt_tokens: self.request.tokens.len(),
                    generated_tokens: generation.generated,
                    trace: self.trace.clone(),
                }
            });
            fed.push(finish.is_none().then_some(id));
            let token = Token { text, id, choice: choice.index, logprobs, finish };
            let goes_on = token.finish.is_none();
            if is_beside {
                texts.push(TokenText { text: choice.text.clone(), token, reply: reply.clone() });
            } else {
                is_gone |= reply.send(Ok(token)).is_err();
            }
            if goes_on {
                going.push(choice);
            }
        }
        generation.choices = going;
        let is_over = generation.choices.is_empty();
        if is_over {
            self.request.answered(generation.generated, generation.ended_tokens);
            request_span::describe_answer(&mut self.request.span, generation.ended_tokens, &generation.ended);
        }
        self.feed(fed);
        let status = if is_over || is_gone { SequenceStatus::Finished } else { SequenceStatus::Running };
        Ok((status, texts))
    }

    /// Feeds the next token of each choice to its branch, and drops the branches of those that have ended unless all have.
    /// Where one branch has decided for several choices, it is left with all of their tokens for [`Sequence::branch_out`].
    fn feed(&mut self, fed: Vec<Option<u32>>) {
        self.branches.iter_mut().for_each(Branch::advance);
        if fed.iter().all(Option::is_none) {
            return;
        }
        if let ([branch], [_, _, ..]) = (&mut self.branches[..], &fed[..]) {
            branch.feed = fed.into_iter().flatten().collect();
            return;
        }
        let mut fed = fed.into_iter();
        self.branches.retain_mut(|branch| match fed.next().flatten() {
            Some(token) => {
                branch.feed = vec![token];
                true
            }
            None => false,
        });
    }

    /// Gives each choice a branch of its own, once the first tokens are chosen, and each target, once the prompt is read.
    pub(crate) fn branch_out(&mut self, backend: &B) -> Result<(), RequestError> {
        let Self { request, branches, decoding, .. } = self;
        let [first] = &mut branches[..] else { return Ok(()) };
        let mut feeds: Vec<Vec<u32>> = match (&decoding, &request.work) {
            (Decoding::ReadPrompt, Work::Score { targets, .. }) => {
                let last = request.tokens.last().copied();
                targets.iter().map(|target| scored_tokens(last, target)).collect()
            }
            (Decoding::Generate(generation), _) if generation.choices.len() > 1 => {
                first.feed.iter().map(|&token| vec![token]).collect()
            }
            _ => return Ok(()),
        };
        let others = feeds.split_off(1).into_iter().map(|feed| first.fork(backend, feed));
        let others = others.collect::<Result<Vec<_>, _>>()?;
        first.feed = feeds.remove(0);
        branches.extend(others);
        if let Decoding::ReadPrompt = decoding {
            *decoding = Decoding::Score;
        }
        Ok(())
    }

    /// Answers a scored request: `rows` are the rows of each branch in `states`.
    pub(crate) fn answer_score(
        &mut self,
        backend: &mut B,
        states: &B::States,
        rows: impl Iterator<Item = Range<usize>>,
    ) -> Result<(), RequestError> {
        let Work::Score { targets, top_count, reply } = &mut self.request.work else { return Ok(()) };
        let mut scores = Vec::with_capacity(targets.len());
        for (target, rows) in targets.iter().zip(rows) {
            // The last tokens that were fed are the target's but for its own last, behind what comes before it.
            scores.push(score::score(backend, states, rows.end - target.len(), target, *top_count)?);
        }
        self.branches.iter_mut().for_each(Branch::advance);
        self.trace.timings.total = self.request.accepted.elapsed();
        let reply = reply.take();
        self.request.answered(1, 0);
        self.request.let_in = None;
        if let Some(reply) = reply {
            // The caller may have gone, which is no error.
            drop(reply.send(Ok(Scores { targets: scores, trace: self.trace.clone() })));
        }
        Ok(())
    }
}

/// What is fed so that a target can be scored: the token before it, and all of it but its last.
pub(crate) fn scored_tokens(before: Option<u32>, target: &[u32]) -> Vec<u32> {
    before.into_iter().chain(target[..target.len() - 1].iter().copied()).collect()
}

/// Notes how fast the tokens behind the first came.
fn record_pace(since_first: Duration, generation: &Generation, metrics: &Metrics) {
    if let Some(others) = generation.generated.checked_sub(1).filter(|&others| others > 0) {
        metrics.time_per_output_token_seconds.of(generation.options.door).record(since_first / others as u32);
    }
}

/// Notes in a request's trace how a pass routed its rows.
pub(crate) fn absorb(trace: &mut Trace, routing: &SequenceRouting) {
    trace.unpredicted |= routing.table().is_none();
    routing.hash.iter().for_each(|&(_, counts)| trace.hash.add(counts));
    if let Some(layers) = &mut trace.hash_layers {
        routing.hash.iter().for_each(|&(layer, counts)| layers.add(layer, counts));
        routing.table().into_iter().for_each(|table| layers.note(table));
    }
    trace.rerouted += routing.rerouted;
    trace.experts.union(&routing.experts);
}

/// Adds a pass's costs to the trace of a request that was in it.
pub(crate) fn absorb_costs(trace: &mut Trace, costs: &Costs) {
    trace.timings.backbone += costs.backbone;
    trace.timings.experts += costs.experts;
    trace.timings.load += costs.load;
    trace.demand_loads += costs.demand_loads;
    trace.failovers += costs.failovers;
}
