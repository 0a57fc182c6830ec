//! What becomes of a step's output: every sequence that was in it gets its next tokens, its scores, or the reason of its
//! failure, and goes on or leaves. Called by the scheduler after each step.

use std::time::Instant;

use rayon::prelude::*;
use sida_model::{Backend, Spans};

use crate::{
    answer::{answer_text::TokenText, catch_panic::catch_panic, request_error::RequestError},
    forward::{costs::Costs, expert_choice::SequenceRouting},
    schedule::{
        generation::{NextTokens, PARALLEL_MIN, Writing},
        scheduler::Scheduler,
        sequence::{self, Decoding, Sequence, SequenceStatus},
    },
};

/// The output of a decode step.
pub(super) struct StepOutput<B: Backend> {
    /// A row for each token; `spans` has the rows of each branch.
    pub(super) states: B::States,
    pub(super) spans: Spans,
    /// The next tokens of sequences that take the most likely one but for one, where the device chose it.
    pub(super) tokens: Option<Vec<Option<u32>>>,
    /// Logits of all other sequences that generate: (sequences, vocab_size).
    pub(super) logits: Vec<f32>,
}

/// What became of a sequence that generates, unless it failed, and the texts that are still to be made of its tokens.
type Advanced<B> = (Option<(Sequence<B>, SequenceStatus)>, Vec<TokenText>);

impl<B: Backend> Scheduler<B> {
    /// Gives every sequence its share of a step: the next tokens, its scores, or the reason of its failure.
    pub(super) fn postprocess(&mut self, mut routings: Vec<SequenceRouting>, output: StepOutput<B>, costs: &Costs) {
        let start = Instant::now();
        let StepOutput { states, spans, tokens, mut logits } = output;
        let mut tokens = tokens.map(Vec::into_iter);
        let (mut logits, vocab_size) = (&mut logits[..], self.forward.config().vocab_size);
        let mut branches_before = 0;
        let mut texts = Vec::with_capacity(self.running.len());
        for mut sequence in std::mem::take(&mut self.running) {
            let branches = branches_before..branches_before + sequence.branches.len();
            branches_before = branches.end;
            sequence::absorb_costs(&mut sequence.trace, costs);
            let mut failure = None;
            for routing in &mut routings[branches.clone()] {
                sequence::absorb(&mut sequence.trace, routing);
                failure = failure.or(routing.failure.take());
            }
            match &sequence.decoding {
                Decoding::ReadPrompt => self.read_on(sequence, failure),
                Decoding::Generate(_) if !sequence.is_fed_whole() => self.read_on(sequence, failure),
                Decoding::Generate(generation) => {
                    let next = match &mut tokens {
                        Some(tokens) if generation.best_but(&self.forward.config().generation).is_some() => {
                            let chosen: Vec<_> = tokens.take(branches.len()).collect();
                            (chosen.len() == branches.len()).then_some(NextTokens::Chosen(chosen))
                        }
                        _ => logits.split_off_mut(..branches.len() * vocab_size).map(NextTokens::Logits),
                    };
                    let next = next.filter(|_| failure.is_none());
                    texts.push((sequence, next.ok_or(failure.unwrap_or(RequestError::NotANumber))));
                }
                Decoding::Score => {
                    let rows = branches.map(|branch| spans.range(branch));
                    let scored = match failure {
                        None => catch_panic(|| sequence.answer_score(self.forward.backend(), &states, rows)),
                        Some(failure) => Err(failure),
                    };
                    match scored {
                        Ok(()) => {
                            self.statistics.outcomes.answered();
                            self.keep(sequence);
                        }
                        Err(error) => {
                            self.note_failure(&error);
                            sequence.request.fail(error);
                        }
                    }
                }
            }
        }
        let (config, tokenizer, metrics) = (self.forward.config(), &*self.tokenizer, &*self.metrics);
        let outcomes = &self.statistics.outcomes;
        let is_beside = self.texts.is_some();
        let writing = Writing { config, tokenizer, is_beside };
        let advance = |(mut sequence, next): (Sequence<B>, Result<NextTokens<'_>, RequestError>)| match next
            .and_then(|next| catch_panic(|| sequence.advance(next, writing, metrics)))
        {
            Ok((status, texts)) => {
                outcomes.answered();
                (Some((sequence, status)), texts)
            }
            Err(error) => {
                if error.is_ours() {
                    outcomes.failed(&error);
                }
                sequence.request.fail(error);
                (None, Vec::new())
            }
        };
        let is_much = !is_beside || texts.iter().any(|(_, next)| matches!(next, Ok(NextTokens::Logits(_))));
        let advanced: Vec<Advanced<B>> = match is_much && texts.len() >= PARALLEL_MIN {
            true => texts.into_par_iter().with_min_len(PARALLEL_MIN / 4).map(advance).collect(),
            false => texts.into_iter().map(advance).collect(),
        };
        let (advanced, texts): (Vec<_>, Vec<_>) = advanced.into_iter().unzip();
        for (sequence, status) in advanced.into_iter().flatten() {
            match status {
                SequenceStatus::Running => self.go_on(sequence, Sequence::branch_out),
                SequenceStatus::Finished => drop(self.keep(sequence)),
            }
        }
        if let Some(thread) = &self.texts {
            // It ends after this one does.
            drop(thread.send(texts.into_iter().flatten().collect()));
        }
        self.metrics.phases.output.record(start.elapsed());
    }

    /// Goes on with a prompt some of whose rows are computed, unless that failed.
    fn read_on(&mut self, sequence: Sequence<B>, failure: Option<RequestError>) {
        self.go_on(sequence, |sequence, backend| failure.map_or_else(|| sequence.read_on(backend), Err));
    }
}
