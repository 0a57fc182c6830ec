//! Prompts as they stand before their answers: their texts, and how likely each of their tokens was where that is asked
//! for. Those who compare models ask for nothing else, with `max_tokens` of 0 or 1.

use std::sync::Arc;

use futures::future::try_join_all;
use serde_json::Value;

use crate::{
    answer::{request_error::RequestError, trace::Trace},
    coordinator::read_prompt::{ReadPrompt, ReadPromptParams},
    doors::openai::{
        call::Call, door::Door, error::ApiError, log_probabilities::lists, sampling::Wanted, usage::Usage,
    },
    intake::prompt::Prompt,
};

/// A prompt as it stands before its answers.
pub(crate) struct Echo {
    pub(crate) text: String,
    /// Over its tokens, as completions tell it.
    pub(crate) logprobs: Option<Value>,
    tokens: usize,
    trace: Option<Trace>,
}

impl Echo {
    /// Adds what it took. Its tokens count here only where `it_is_all`: otherwise they count with the answer.
    pub(crate) fn add_usage(&self, usage: &mut Usage, it_is_all: bool) {
        usage.prompt_tokens += if it_is_all { self.tokens } else { 0 };
        self.trace.iter().for_each(|trace| usage.add(trace));
    }
}

/// The echoes of `prompts`, with how likely their tokens and so many others in their places were if `logprobs` says so.
pub(crate) async fn echoes(
    door: &Arc<Door>,
    call: &Call,
    prompts: &[Prompt],
    logprobs: Option<usize>,
    wanted: &Wanted,
) -> Result<Vec<Echo>, ApiError> {
    if logprobs.is_some() && door.coordinator.checkpoint().config().has_encoder() {
        let why = "with echo: the encoder of this model reads the prompt, and gives its tokens no probability";
        return Err(ApiError::unsupported("logprobs", why));
    }
    let refused = |error: RequestError| call.refused(&error, "prompt");
    door.coordinator.may_wait("prompts (their number)", prompts.len()).map_err(refused)?;
    let echoes = prompts.iter().zip(1..).map(|(prompt, number)| async move {
        echo(door, call, prompt, logprobs, wanted).await.map_err(|error| error.of_one(number, prompts.len()))
    });
    try_join_all(echoes).await.map_err(refused)
}

async fn echo(
    door: &Arc<Door>,
    call: &Call,
    prompt: &Prompt,
    logprobs: Option<usize>,
    wanted: &Wanted,
) -> Result<Echo, RequestError> {
    let text = match prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Tokens(tokens) => door.coordinator.detokenize(tokens).await?,
    };
    let params = ReadPromptParams {
        prompt: prompt.clone(),
        routing: wanted.routing,
        logprobs,
        deadline: call.deadline,
        trace: call.trace,
        client: call.client(),
        priority: wanted.priority,
    };
    let read = door.coordinator.read_prompt(params).await?;
    let tokens = read.tokens.len();
    let Some(others) = logprobs else {
        return Ok(Echo { text, logprobs: None, tokens, trace: read.trace });
    };
    let ReadPrompt { tokens: ids, offsets, logprobs, trace } = read;
    // Thousands of tokens with twenty others each become texts: not on a thread that serves connections.
    let (door, chars) = (door.clone(), text.chars().count());
    let written = tokio::task::spawn_blocking(move || {
        let likely = std::iter::once(None).chain(logprobs.iter().map(Some));
        // What the tokenizer makes of a text may be longer than it, such as by a blank before it.
        let offsets = offsets.into_iter().map(|offset| offset.min(chars));
        let tokens = ids.into_iter().zip(offsets).zip(likely).map(|((id, offset), likely)| (id, offset, likely));
        lists(&door, others > 0, tokens)
    });
    let logprobs = written.await.map_err(|_| RequestError::Panicked)?;
    Ok(Echo { text, logprobs: Some(logprobs), tokens, trace })
}
