//! How a request is submitted: its prompt is tokenized, it is made and checked, and it is queued.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use sida_model::DeviceName;
use sida_rpc::Client;
use sida_telemetry::Span;
use tokio::sync::oneshot;

use crate::{
    answer::{catch_panic::catch_panic, request_error::RequestError, routing_mode::RoutingMode},
    coordinator::{AWAITED_TEXT_BYTES_MAX, Coordinator},
    intake::{
        prompt::{Prompt, PromptTokens},
        queue::Announcement,
        request::{Request, Work},
        request_queue::Waiting,
        request_span::RequestSpan,
        together::{Read, Together},
    },
};

/// How a request is computed, for whom, and until when.
pub(super) struct Terms {
    pub(super) mode: RoutingMode,
    pub(super) deadline: Option<Instant>,
    pub(super) client: Option<Client>,
    pub(super) priority: i32,
    /// The requests that it comes with, if it is one of several of a call.
    pub(super) together: Option<Arc<Together>>,
}

/// What is to be tokenized for a request.
pub(super) struct Asked {
    pub(super) prompt: Prompt,
    /// Whether a prompt of too many tokens is cut.
    pub(super) truncates: bool,
    /// Tokens that come behind it at least, where the model reads it as it goes on.
    pub(super) behind: usize,
    /// Bytes of targets, which are tokenized with it.
    pub(super) target_bytes: usize,
}

/// A tokenized prompt whose request is not queued yet.
pub(super) struct TokenizedPrompt {
    pub(super) request_span: RequestSpan,
    pub(super) tokens: PromptTokens,
    /// Tells the queue that the request is about to come; `None` where the text was too long for others to wait for.
    pub(super) announced: Option<Announcement<Waiting>>,
}

impl Coordinator {
    /// Tokenizes a prompt in another task and hands it to `queue`. The task that asks does not tokenize, so that of
    /// several requests that one task sends all are announced before the first is tokenized. While processors have
    /// nothing to compute their threads do it, so that they are awake when the batch comes; a text of so many `bytes`
    /// that it would hold up others goes to a thread for blocking work.
    pub(super) async fn tokenize_then(
        &self,
        request_span: RequestSpan,
        asked: Asked,
        queue: impl FnOnce(&Self, TokenizedPrompt) -> Result<(), RequestError> + Send + 'static,
    ) -> Result<(), RequestError> {
        let Asked { prompt, truncates, behind, target_bytes } = asked;
        let is_short = prompt.text_bytes() + target_bytes <= AWAITED_TEXT_BYTES_MAX;
        let announced = is_short.then(|| self.inner.requests.announce());
        let (reply, queued) = oneshot::channel();
        let this = self.clone();
        let read = move || {
            let queued = catch_panic(|| {
                let span = Span::below(request_span.span.context(), "tokenize");
                let tokens = this.acceptance().prompt(prompt, truncates, behind)?;
                drop(span);
                queue(&this, TokenizedPrompt { request_span, tokens, announced })
            });
            // The caller may have gone, which is no error.
            drop(reply.send(queued));
        };
        let is_idle = self.inner.statistics.inflight.load(Ordering::Relaxed) == 0;
        let wakes_threads = is_idle && self.config().device == DeviceName::Cpu;
        match is_short {
            // A single computing thread may be waiting for an expert-node by the time the text could be tokenized.
            true if wakes_threads && rayon::current_num_threads() > 1 => rayon::spawn(read),
            true => drop(tokio::spawn(async { read() })),
            false => drop(tokio::task::spawn_blocking(read)),
        }
        queued.await.unwrap_or(Err(RequestError::Panicked))
    }

    /// Makes a request of a prompt that was read, and queues it; with others of its call once all of them are read.
    pub(super) fn submit(
        &self,
        prompt: TokenizedPrompt,
        Terms { mode, deadline, client, priority, together }: Terms,
        work: Work,
    ) -> Result<(), RequestError> {
        let inner = &self.inner;
        if inner.nodes.roster().links.is_empty() {
            return Err(RequestError::NoExpertNode);
        }
        let TokenizedPrompt { request_span, tokens: PromptTokens { ids: tokens, .. }, announced } = prompt;
        let cache_bytes = self.acceptance().cache_bytes(tokens.len(), &work)?;
        let (accepted, span) = (request_span.begun, request_span.span);
        let (begun, let_in, replayed) = (None, None, None);
        let mut request = Request {
            tokens,
            mode,
            work,
            cache_bytes,
            accepted,
            deadline,
            client,
            priority,
            begun,
            let_in,
            is_predicted: true,
            replayed,
            span,
        };
        request.replayed = inner.replay.as_ref().map(|replay| replay.sequence(request.places()));
        let read = Read { request, announced };
        match together {
            None => self.let_in(vec![read]),
            // Who comes last lets all of them in.
            Some(together) => together.add(read).map_or(Ok(()), |all| self.let_in(all)),
        }
    }

    /// Queues requests of one client, if it may have all of them; or else all of them fail.
    fn let_in(&self, all: Vec<Read>) -> Result<(), RequestError> {
        let inner = &self.inner;
        let tokens: Vec<usize> = all.iter().map(|read| read.request.tokens_max()).collect();
        let client = all.first().and_then(|read| read.request.client.clone());
        let mut outcome = inner.client_uses.come(client.as_ref(), &tokens);
        // An announcement stands until its request is queued, or has failed.
        for Read { mut request, announced: _announced } in all {
            let pushed = match &mut outcome {
                Ok(let_in) => {
                    request.let_in = let_in.remove(0);
                    let prompt_tokens = request.tokens.len() as u64;
                    inner.requests.push(request).map(|()| {
                        inner.statistics.requests.fetch_add(1, Ordering::Relaxed);
                        inner.metrics.prompt_tokens.increment(prompt_tokens);
                    })
                }
                Err(error) => {
                    request.fail(error.clone());
                    Ok(())
                }
            };
            if let Err(error) = pushed {
                outcome = Err(error);
            }
        }
        inner.metrics.requests_queued.set(inner.requests.len() as f64);
        outcome.map(drop)
    }
}
