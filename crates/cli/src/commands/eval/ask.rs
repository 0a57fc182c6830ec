//! Asks a cluster in this process all examples in one routing mode: the way of every request, by `Score`.

use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt, stream};
use sida_coordinator::{Coordinator, PromptTokens, RequestError, ScoreParams, cut_prompt};
use sida_rpc::{Fault, Reason};
use tonic::{Code, Status};

use crate::{
    bad_configuration::BadConfiguration,
    commands::eval::{answered::Answered, modes::Mode, task::Example},
};

/// An example, ready to be asked.
pub(crate) struct Question<'e> {
    pub(crate) example: &'e Example,
    tokens: Vec<u32>,
    /// Tokens that were cut off the prompt.
    pub(crate) cut_tokens: usize,
}

/// What asking came to.
pub(crate) enum Asked {
    /// The answers, in the order of the questions, and how long all of them took together.
    Answers(Vec<Answered>, Duration),
    /// The coordinator does not serve the mode, and why.
    NotServed(String),
}

/// Makes questions of examples: tokens of texts, not more than there may be.
pub(crate) async fn questions<'e>(
    coordinator: &Coordinator,
    examples: &'e [Example],
    prompt_tokens_max: Option<usize>,
) -> anyhow::Result<Vec<Question<'e>>> {
    let generation = &coordinator.checkpoint().config().generation;
    let mut questions = Vec::with_capacity(examples.len());
    for example in examples {
        let tokens = coordinator.tokenize(&example.prompt, true).await;
        let tokens = tokens.map_err(|error| refused(example, error))?;
        let PromptTokens { ids, truncated } =
            cut_prompt(tokens, prompt_tokens_max.unwrap_or(usize::MAX), |id| generation.is_end(id));
        questions.push(Question { example, tokens: ids, cut_tokens: truncated });
    }
    Ok(questions)
}

/// Asks all questions, `concurrency` at a time, and tells after each that it is answered. The answers do not depend on how
/// many are asked at a time.
pub(crate) async fn all<'q>(
    coordinator: &Coordinator,
    questions: &'q [Question<'q>],
    mode: &Mode,
    concurrency: usize,
    answered: impl Fn(),
) -> anyhow::Result<Asked> {
    let start = Instant::now();
    let ask = |question: &'q Question<'q>| {
        let params = ScoreParams {
            prompt: question.tokens.clone().into(),
            targets: question.example.wanted.targets(),
            routing: mode.routing,
            ..ScoreParams::default()
        };
        async move {
            match coordinator.score(params).await {
                Ok(scores) => Ok(Answered::of(question.tokens.len(), scores)),
                Err(error) => Err((question.example, error)),
            }
        }
    };
    let answers = stream::iter(questions.iter().map(ask)).buffered(concurrency).inspect_ok(|_| answered());
    match answers.try_collect().await {
        Ok(answers) => Ok(Asked::Answers(answers, start.elapsed())),
        Err((_, error)) if is_unserved(&error) => Ok(Asked::NotServed(error.to_string())),
        Err((example, error)) => Err(refused(example, error)),
    }
}

/// Whether the coordinator does not serve what was asked for, whatever the text is.
fn is_unserved(error: &RequestError) -> bool {
    matches!(Reason::of(&status(error)), Some(Reason::Unsupported | Reason::NoPredictor))
}

/// An error as callers by gRPC have it.
fn status(error: &RequestError) -> Status {
    Fault::from(error.clone()).into()
}

/// An error with the line that it is about. What the coordinator refuses is wrong in the data.
fn refused(example: &Example, error: RequestError) -> anyhow::Error {
    match status(&error).code() {
        Code::InvalidArgument => BadConfiguration::because(example.place.to_string(), error).into(),
        _ => anyhow::Error::new(error).context(example.place.to_string()),
    }
}
