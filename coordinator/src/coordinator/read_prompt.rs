//! A prompt by itself: its tokens, where their texts begin, and how likely each was given those before it. That is a score
//! of all of its tokens but the first, which only a decoder that reads the prompt can give.

use std::time::Instant;

use sida_rpc::Client;
use sida_telemetry::TraceContext;
use tokio::sync::oneshot;

use crate::{
    answer::{
        detokenize::Detokenizer,
        output::{Scores, TokenLogprobs},
        request_error::RequestError,
        routing_mode::RoutingMode,
        trace::Trace,
    },
    coordinator::{
        Coordinator,
        submit::{Asked, Terms, TokenizedPrompt},
        until,
    },
    intake::{
        generation_check,
        prompt::{Prompt, PromptTokens},
        request::Work,
    },
};

/// A request to read a prompt.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReadPromptParams {
    pub(crate) prompt: Prompt,
    /// Who chooses the experts of its tokens.
    pub(crate) routing: RoutingMode,
    /// Tells of each token but the first how likely it was, and of so many most likely ones in its place, 0 to 20. `None`:
    /// nothing is computed.
    pub(crate) logprobs: Option<usize>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) trace: Option<TraceContext>,
    pub(crate) client: Option<Client>,
    pub(crate) priority: i32,
}

/// A prompt that was read.
#[derive(Debug, Default)]
pub(crate) struct ReadPrompt {
    /// At least one.
    pub(crate) tokens: Vec<u32>,
    /// Characters of the text before each token.
    pub(crate) offsets: Vec<usize>,
    /// How likely each token but the first was; none where that is not asked for.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// What happened on the way, if anything was computed.
    pub(crate) trace: Option<Trace>,
}

impl Coordinator {
    /// Reads a prompt. Of a model with an encoder the caller must not ask how likely its tokens were.
    pub(crate) async fn read_prompt(&self, params: ReadPromptParams) -> Result<ReadPrompt, RequestError> {
        let ReadPromptParams { prompt, routing: mode, logprobs, deadline, trace, client, priority } = params;
        let deadline = self.deadline(deadline);
        let top_count = generation_check::logprobs(logprobs)?;
        let request_span = self.begin_span("score", trace, client.as_ref())?;
        let asked = Asked { prompt, truncates: false, behind: 0, target_bytes: 0 };
        let (tokens_reply, tokens) = oneshot::channel();
        let (reply, scores) = oneshot::channel();
        let queue = move |this: &Self, prompt: TokenizedPrompt| {
            let ids = prompt.tokens.ids.clone();
            let (offsets, (first, others)) = (this.offsets(&ids)?, ids.split_at(1));
            let (first, targets) = (first.to_vec(), vec![others.to_vec()]);
            // The caller may have gone, which is no error.
            drop(tokens_reply.send((ids, offsets)));
            if top_count.is_none() || targets[0].is_empty() {
                return Ok(());
            }
            let prompt = TokenizedPrompt { tokens: PromptTokens { ids: first, truncated: 0 }, ..prompt };
            let work = Work::Score { targets, top_count, reply: Some(reply) };
            this.submit(prompt, Terms { mode, deadline, client, priority, together: None }, work)
        };
        let read = async {
            self.tokenize_then(request_span, asked, queue).await?;
            let (tokens, offsets) = tokens.await.map_err(|_| RequestError::Panicked)?;
            if top_count.is_none() || tokens.len() == 1 {
                return Ok(ReadPrompt { tokens, offsets, ..ReadPrompt::default() });
            }
            let Scores { targets, trace } = scores.await.unwrap_or(Err(RequestError::Panicked))?;
            let logprobs = targets.into_iter().flat_map(|target| target.logprobs).collect();
            Ok(ReadPrompt { tokens, offsets, logprobs, trace: Some(trace) })
        };
        until(deadline, read).await
    }

    /// Characters of the text of tokens before each of them.
    fn offsets(&self, tokens: &[u32]) -> Result<Vec<usize>, RequestError> {
        let (mut detokenizer, mut offset) = (Detokenizer::default(), 0);
        let before = |&token: &u32| {
            let (at, added) = (offset, detokenizer.push(token, |ids| self.inner.tokenizer.decode(ids))?);
            offset += added.chars().count();
            Ok(at)
        };
        tokens.iter().map(before).collect()
    }
}
