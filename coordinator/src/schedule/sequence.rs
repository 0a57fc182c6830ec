//! A sequence: one request between its prefill and its answer, with the decoder's caches, what was generated, and how
//! it ends. A generated text has one branch; a scored request has one per target, and all of them share the
//! cross-attention keys and values of the prompt. Kept and stepped by the scheduler.

use std::{ops::Range, sync::Arc, time::Instant};

use parking_lot::Mutex;
use sida_model::{Backend, GenerationConfig, ModelConfig, TokenRule, Tokenizer};
use sida_telemetry::spans;

use crate::{
    answer::{
        answer_text::{AnswerText, TokenText},
        output::{Finish, FinishReason, Scores, TargetScore, Token},
        request_error::RequestError,
        sampler::Sampler,
        score,
        trace::Trace,
    },
    forward::{costs::Costs, expert_choice::SequenceRouting},
    intake::{
        request::{GenerateOptions, Request, Work},
        request_span,
    },
    measures::metrics::Metrics,
    predict::predict::Progress,
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
    /// The tokens that the next step computes.
    pub(crate) feed: Vec<u32>,
}

/// What is done with the decoder's output.
pub(crate) enum Decoding {
    /// The next token of the one branch is chosen, step after step.
    Generate(Box<Generation>),
    /// The likelihood of the targets, one per branch, is read off a single step.
    Score,
}

/// A text as it is generated.
pub(crate) struct Generation {
    options: GenerateOptions,
    sampler: Sampler,
    text: Arc<Mutex<AnswerText>>,
    generated: usize,
    first_token_at: Option<Instant>,
}

/// What a decode step says of the next token.
#[derive(Debug)]
pub(crate) enum NextToken<'s> {
    /// The token that the device chose, as [`Generation::best_but`] says; none if no logit is a number.
    Chosen(Option<u32>),
    /// The logits to choose from: (vocab_size).
    Logits(&'s mut [f32]),
}

/// Whether a sequence takes part in the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SequenceStatus {
    /// The next step computes the token that was chosen.
    Running,
    /// The request was answered.
    Finished,
}

impl<B: Backend> Sequence<B> {
    /// A request whose prompt is encoded, with its branches.
    pub(crate) fn new(request: Request, trace: Trace, branches: Vec<Branch<B>>) -> Self {
        let decoding = match &request.work {
            Work::Generate { options, .. } => Decoding::Generate(Box::new(Generation::new(options))),
            Work::Score { .. } | Work::Encode { .. } => Decoding::Score,
        };
        Self { request, trace, branches, decoding }
    }

    /// Takes the next token, or chooses it from the logits, and feeds it to the next step unless the text ends here. Its
    /// text is streamed, or else, `beside` the next step, returned to be written if it has no stop texts.
    pub(crate) fn advance(
        &mut self,
        next_token: NextToken<'_>,
        config: &ModelConfig,
        tokenizer: &Tokenizer,
        metrics: &Metrics,
        beside: bool,
    ) -> Result<(SequenceStatus, Option<TokenText>), RequestError> {
        let (Decoding::Generate(generation), Work::Generate { reply, .. }) = (&mut self.decoding, &self.request.work)
        else {
            return Ok((SequenceStatus::Finished, None));
        };
        let chosen = match next_token {
            NextToken::Chosen(token) => token,
            NextToken::Logits(logits) => {
                generation.rule(&config.generation).apply(logits);
                generation.sampler.next(logits)
            }
        };
        let id = chosen.ok_or(RequestError::NotANumber)?;
        generation.generated += 1;
        let last = generation.ends_with(id, &config.generation);
        let is_beside = beside && generation.options.stop.is_empty();
        let (text, reason) = match is_beside {
            true => (String::new(), last),
            false => {
                let may_stop = generation.generated >= generation.options.tokens_min;
                generation.text.lock().add(id, last, may_stop, tokenizer)?
            }
        };
        metrics.generated_tokens.increment(1);
        let now = Instant::now();
        if generation.first_token_at.is_none() {
            generation.first_token_at = Some(now);
            let waited = now - self.request.accepted;
            metrics.time_to_first_token_seconds.record(waited);
            self.request.span.set("sida.time_to_first_token_us", spans::microseconds(waited));
        }
        let finish = reason.map(|reason| {
            generation.record_pace(now, metrics);
            self.trace.timings.total = now - self.request.accepted;
            request_span::describe_answer(&mut self.request.span, generation.generated, reason);
            Finish {
                reason,
                prompt_tokens: self.request.tokens.len(),
                generated_tokens: generation.generated,
                trace: self.trace.clone(),
            }
        });
        self.branches[0].feed = vec![id];
        let mut status = if finish.is_some() { SequenceStatus::Finished } else { SequenceStatus::Running };
        if is_beside {
            let token = TokenText { text: generation.text.clone(), id, finish, reply: reply.clone() };
            return Ok((status, Some(token)));
        }
        if reply.send(Ok(Token { text, id, finish })).is_err() {
            status = SequenceStatus::Finished;
        }
        Ok((status, None))
    }

    /// Answers a scored request: `rows` are the rows of each branch in `states`.
    pub(crate) fn answer_score(
        &mut self,
        backend: &mut B,
        states: &B::States,
        rows: impl Iterator<Item = Range<usize>>,
    ) -> Result<(), RequestError> {
        let Work::Score { targets, reply } = &mut self.request.work else { return Ok(()) };
        let mut scores = Vec::with_capacity(targets.len());
        for (target, rows) in targets.iter().zip(rows) {
            // The last tokens that were fed are the target's but for its own last, behind what comes before it.
            let log_likelihood = score::log_likelihood(backend, states, rows.end - target.len(), target)?;
            if log_likelihood.is_nan() {
                return Err(RequestError::NotANumber);
            }
            scores.push(TargetScore { log_likelihood: log_likelihood as f32, tokens: target.len() });
        }
        self.trace.timings.total = self.request.accepted.elapsed();
        if let Some(reply) = reply.take() {
            // The caller may have gone, which is no error.
            drop(reply.send(Ok(Scores { targets: scores, trace: self.trace.clone() })));
        }
        Ok(())
    }
}

impl Generation {
    fn new(options: &GenerateOptions) -> Self {
        Self {
            sampler: Sampler::new(options.sampling.clone()),
            text: Arc::new(Mutex::new(AnswerText::new(options.stop.clone()))),
            options: options.clone(),
            generated: 0,
            first_token_at: None,
        }
    }

    /// What the next token may be.
    fn rule<'a>(&self, model: &'a GenerationConfig) -> TokenRule<'a> {
        model.token_rule(self.generated, self.options.tokens_min, self.options.tokens_max)
    }

    /// Whether the next token is the most likely one but for at most one, and which that is: then a device can choose it.
    /// `None`: it is chosen from the logits.
    pub(crate) fn best_but(&self, model: &GenerationConfig) -> Option<Option<u32>> {
        if self.sampler.is_greedy() { self.rule(model).banned() } else { None }
    }

    /// Why the answer ends with this token, if it does, whatever its text is.
    fn ends_with(&self, id: u32, model: &GenerationConfig) -> Option<FinishReason> {
        if model.is_end(id) && !self.options.ignore_eos {
            Some(FinishReason::End)
        } else {
            (self.generated >= self.options.tokens_max).then_some(FinishReason::Length)
        }
    }

    fn record_pace(&self, now: Instant, metrics: &Metrics) {
        if let (Some(first), Some(others)) = (self.first_token_at, self.generated.checked_sub(1).filter(|&n| n > 0)) {
            metrics.time_per_output_token_seconds.record((now - first) / others as u32);
        }
    }
}

/// Notes in a request's trace how a pass routed its rows.
pub(crate) fn absorb(trace: &mut Trace, routing: &SequenceRouting) {
    trace.unpredicted |= routing.table().is_none();
    trace.hash.add(routing.hash);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::sampler::SamplerSettings;

    #[test]
    fn a_device_chooses_only_where_one_token_is_banned() {
        // Would break: a GPU's greedy choice is a token that is never to be written.
        let generation = |tokens_min, temperature| {
            let sampling = SamplerSettings { temperature, ..SamplerSettings::default() };
            Generation::new(&GenerateOptions { tokens_max: 9, tokens_min, sampling, ..GenerateOptions::default() })
        };
        let one_end = GenerationConfig::plain(0, vec![1]);
        let two_ends = GenerationConfig::plain(0, vec![1, 5]);
        assert_eq!(generation(0, 0.0).best_but(&one_end), Some(None));
        assert_eq!(generation(2, 0.0).best_but(&one_end), Some(Some(1)));
        assert_eq!(generation(0, 0.5).best_but(&one_end), None, "it is drawn");
        assert_eq!(generation(0, 0.0).best_but(&two_ends), Some(None));
        assert_eq!(generation(2, 0.0).best_but(&two_ends), None);
        let suppressed = GenerationConfig { suppress_tokens: vec![7], ..one_end.clone() };
        assert_eq!(generation(0, 0.0).best_but(&suppressed), Some(Some(7)));
        assert_eq!(generation(2, 0.0).best_but(&suppressed), None);
        let forced = GenerationConfig { forced_bos_token_id: Some(3), ..one_end };
        assert_eq!(generation(0, 0.0).best_but(&forced), None);
    }
}
