//! An accepted request: what is asked for, until when, and where the answer goes.

use std::time::Instant;

use sida_routing::admission::Cost;
use sida_rpc::Client;
use sida_telemetry::{Span, counter, names};
use tokio::sync::{mpsc, oneshot};

use crate::{
    answer::{
        grammar::Grammar,
        output::{Encoding, Pooling, Scores, Token},
        request_error::RequestError,
        routing_mode::RoutingMode,
        sampling::SamplerSettings,
    },
    intake::{client_uses::LetIn, replay::ReplayedSequence, workload::Begun},
    measures::door::Door,
};

/// A request that was checked and tokenized.
pub(crate) struct Request {
    /// The prompt. Invariant: not empty, every id within the vocabulary.
    pub(crate) tokens: Vec<u32>,
    /// Who chooses the experts of its tokens.
    pub(crate) mode: RoutingMode,
    /// What is asked for, and where the answer goes.
    pub(crate) work: Work,
    /// Memory that is reserved for its keys and values while it runs.
    pub(crate) cache_bytes: u64,
    /// When the request came in.
    pub(crate) accepted: Instant,
    /// When the answer is of no more use.
    pub(crate) deadline: Option<Instant>,
    /// Who asks: those who ask much take turns with the others.
    pub(crate) client: Option<Client>,
    /// The lower, the sooner it is its turn among those of the same client.
    pub(crate) priority: i32,
    /// Counts it as begun, from when it leaves the queue until it is over.
    pub(crate) begun: Option<Begun>,
    /// What its client's limits let it have; `None` of one without limits. Given up before its caller learns that it is over,
    /// who may ask again at once.
    pub(crate) let_in: Option<LetIn>,
    /// Whether hash tables are made for its tokens; decided when it is prepared.
    pub(crate) is_predicted: bool,
    /// Recorded routes in the place of the router's choice, where such are measured.
    pub(crate) replayed: Option<ReplayedSequence>,
    /// The span from the request's coming in to its answer; ends with the request.
    pub(crate) span: Span,
}

/// What is asked for, and the channel for the answer. A receiver that is gone means that the client is.
pub(crate) enum Work {
    /// States: the encoder's, or without one the last hidden states.
    Encode { options: EncodeOptions, reply: oneshot::Sender<Result<Encoding, RequestError>> },
    /// The likelihood of each target (token ids, the end included where an encoder reads, never empty).
    /// With how many of the most likely tokens each of its tokens is told, if it is. The sender is taken when it is used.
    Score {
        targets: Vec<Vec<u32>>,
        top_count: Option<usize>,
        reply: Option<oneshot::Sender<Result<Scores, RequestError>>>,
    },
    /// Tokens, one message each. Unbounded, so that a slow client never holds up the scheduler; `tokens_max` and the number
    /// of choices bound it.
    Generate { options: GenerateOptions, reply: mpsc::UnboundedSender<Result<Token, RequestError>> },
}

/// How states are answered. Checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EncodeOptions {
    pub(crate) pooling: Pooling,
    /// Divides the pooled row by its length.
    pub(crate) normalize: bool,
    /// Tokens that were cut off the prompt.
    pub(crate) truncated_tokens: usize,
}

/// How a text is generated. Checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct GenerateOptions {
    /// Tokens at most, at least 1.
    pub(crate) tokens_max: usize,
    /// No end before so many tokens: neither of the sequence nor by a stop text.
    pub(crate) tokens_min: usize,
    /// Goes on after an end of sequence.
    pub(crate) ignore_eos: bool,
    /// Answers that are drawn, at least 1.
    pub(crate) choices: usize,
    /// How many of the most likely tokens are told with each token, if its log-probability is.
    pub(crate) logprobs: Option<usize>,
    pub(crate) sampling: SamplerSettings,
    /// What the answer is held to.
    pub(crate) grammar: Option<Grammar>,
    /// By which door it came.
    pub(crate) door: Door,
    pub(crate) stop: Vec<String>,
}

impl Work {
    /// How many sequences are decoded for it.
    pub(crate) fn sequences(&self) -> usize {
        match self {
            Work::Encode { .. } => 0,
            Work::Score { targets, .. } => targets.len(),
            Work::Generate { options, .. } => options.choices.max(1),
        }
    }

    /// How many steps it takes at most.
    pub(crate) fn steps_max(&self) -> usize {
        match self {
            Work::Encode { .. } | Work::Score { .. } => 1,
            Work::Generate { options, .. } => options.tokens_max,
        }
    }

    /// The most tokens that each of these sequences has in the decoder, beside a prompt that it reads: the start token, or the
    /// prompt's last, stands in the place of the last one, which is not fed.
    pub(crate) fn decoded_tokens_max(&self) -> usize {
        match self {
            Work::Encode { .. } => 0,
            Work::Score { targets, .. } => targets.iter().map(Vec::len).max().unwrap_or(0),
            Work::Generate { options, .. } => options.tokens_max,
        }
    }
}

impl Request {
    /// How much of a batch's limits the request takes.
    pub(crate) fn cost(&self) -> Cost {
        // All choices of an answer begin with one row.
        let begun = usize::from(matches!(self.work, Work::Generate { .. }));
        let (tokens, sequences) = (self.tokens_brought() + begun, self.work.sequences());
        Cost { tokens, sequences, cache_bytes: self.cache_bytes }
    }

    /// The tokens that it brings: its prompt's, and those of the answers that it asks the likelihood of.
    pub(crate) fn tokens_brought(&self) -> usize {
        let targets = match &self.work {
            Work::Encode { .. } | Work::Generate { .. } => 0,
            Work::Score { targets, .. } => targets.iter().map(Vec::len).sum(),
        };
        self.tokens.len() + targets
    }

    /// How many sequences it counts as among those that are computed at the same time. A prompt whose states are asked
    /// for is one as well.
    pub(crate) fn places(&self) -> usize {
        self.work.sequences().max(1)
    }

    /// Notes that the answer is complete, after so many steps and of so many tokens.
    pub(crate) fn answered(&self, steps: usize, generated: usize) {
        if let Some(begun) = &self.begun {
            begun.answered(steps, self.work.steps_max());
        }
        if let Some(client) = &self.client {
            let tokens = self.tokens_brought() + generated;
            counter!(names::CLIENT_TOKENS_TOTAL, names::CLIENT => client.label().to_string()).increment(tokens as u64);
        }
    }

    /// The most tokens that it takes: those that it brings, and those that may be generated.
    pub(crate) fn tokens_max(&self) -> usize {
        let generated = match &self.work {
            Work::Generate { options, .. } => options.tokens_max.saturating_mul(self.work.sequences()),
            Work::Encode { .. } | Work::Score { .. } => 0,
        };
        self.tokens_brought().saturating_add(generated)
    }

    /// What it takes of a batch, and nothing once nobody waits for the request any more: it is let through to be answered, and never keeps
    /// those behind it waiting for memory.
    pub(crate) fn cost_at(&self, now: Instant) -> Cost {
        match self.over(now) {
            Some(_) => Cost::default(),
            None => self.cost(),
        }
    }

    /// Why the request need not be worked on any more, if that is so.
    pub(crate) fn over(&self, now: Instant) -> Option<RequestError> {
        let gone = match &self.work {
            Work::Encode { reply, .. } => reply.is_closed(),
            Work::Score { reply, .. } => reply.as_ref().is_none_or(oneshot::Sender::is_closed),
            Work::Generate { reply, .. } => reply.is_closed(),
        };
        // Who waits until the deadline and no longer goes away then, too.
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            Some(RequestError::DeadlineExceeded)
        } else if gone {
            Some(RequestError::Cancelled)
        } else {
            None
        }
    }

    /// Answers with the error that ended the batch which the request was in, unless nobody waits for it anyway.
    pub(crate) fn fail_with_batch(self, error: &RequestError) {
        let reason = self.over(Instant::now()).unwrap_or_else(|| error.clone());
        self.fail(reason);
    }

    /// Answers with an error. The caller may have gone, which is no error.
    pub(crate) fn fail(mut self, error: RequestError) {
        self.span.fail(&error);
        self.let_in = None;
        match self.work {
            Work::Encode { reply, .. } => drop(reply.send(Err(error))),
            Work::Score { reply, .. } => {
                if let Some(reply) = reply {
                    drop(reply.send(Err(error)));
                }
            }
            Work::Generate { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}
