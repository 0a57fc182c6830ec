//! Several sequences as one answer: a request of P prompts with N answers of each has P times N of them, in that order. What
//! they become in JSON is the endpoint's; here they are begun, put together, or sent as they come.

use std::sync::Arc;

use axum::response::Response;
use futures::{
    StreamExt,
    stream::{self, BoxStream, Stream},
};
use serde_json::{Value, json};

use crate::{
    answer::{
        output::{FinishReason, Token},
        request_error::RequestError,
        token_stream::TokenStream,
    },
    doors::openai::{
        call::Call,
        door::{self, Door},
        error::ApiError,
        events::{EventForm, events},
        sampling::{EventOptions, Wanted},
        usage::Usage,
    },
    intake::{accept::GenerateParams, prompt::Prompt},
    measures,
};

/// How an endpoint writes an answer.
pub(crate) trait Form: Send + 'static {
    /// What ids begin with.
    const ID: &'static str;
    /// What a whole answer is called.
    const WHOLE: &'static str;
    /// What a part of one is called.
    const PART: &'static str;

    /// A part that comes before the first token of a sequence.
    fn opening(&mut self, index: usize) -> Option<Value>;
    /// The part that a token makes; `None` where it adds nothing yet.
    fn part(&mut self, index: usize, token: &Token) -> Option<Value>;
    /// A whole sequence.
    fn whole(&mut self, index: usize, tokens: &[Token]) -> Value;
}

/// Prompts whose answers are wanted.
pub(crate) struct Generation {
    pub(crate) prompts: Vec<Prompt>,
    /// What the endpoint calls them.
    pub(crate) prompt_field: &'static str,
    pub(crate) wanted: Wanted,
    /// How many likely tokens are told beside each, if any are.
    pub(crate) logprobs: Option<usize>,
    /// Whether there is anything to generate: otherwise what opens a sequence is all of it.
    pub(crate) generates: bool,
    /// What was taken before.
    pub(crate) usage: Usage,
}

/// A token of one of the sequences.
struct Piece {
    index: usize,
    token: Token,
}

/// What is said around every part of an answer.
struct Envelope {
    id: String,
    created: u64,
    model: String,
}

impl Envelope {
    fn around(&self, object: &str, choices: Vec<Value>) -> Value {
        let Self { id, created, model } = self;
        json!({"id": id, "object": object, "created": created, "model": model, "choices": choices})
    }
}

impl Generation {
    /// Answers, whole or in events.
    pub(crate) async fn answer<F: Form>(self, door: Arc<Door>, call: Call, form: F) -> Result<Response, ApiError> {
        let envelope =
            Envelope { id: format!("{}{}", F::ID, call.id), created: door::now(), model: door.model().to_owned() };
        let (field, choices, options) = (self.prompt_field, self.wanted.choices, self.wanted.events);
        let count = self.prompts.len() * choices;
        let (usage, ended) = (self.usage.clone(), if self.generates { 0 } else { count });
        let begun = if self.generates { self.begin(&door, &call).await } else { Ok(stream::empty().boxed()) };
        let pieces = begun.map_err(|error| call.refused(&error, field))?;
        match options {
            None => {
                let whole = whole(pieces, choices, count, usage, &envelope, form).await;
                whole.map(|answer| door::json(&answer)).map_err(|error| call.refused(&error, field))
            }
            Some(options) => {
                let refusing = call.clone();
                let parts = Parts { envelope, form, options, usage, choices, count, ended };
                let chunks = parts.of(pieces).map(move |chunk| chunk.map_err(|error| refusing.refused(&error, field)));
                Ok(events(chunks, &door, call, EventForm::OPENAI))
            }
        }
    }

    /// The tokens of all sequences, once the first of them is there: what fails before that still gets a status.
    async fn begin(
        self,
        door: &Door,
        call: &Call,
    ) -> Result<BoxStream<'static, Result<Piece, RequestError>>, RequestError> {
        let Self { prompts, wanted, logprobs, .. } = self;
        let choices = wanted.choices;
        let params = prompts.into_iter().map(|prompt| params(prompt, &wanted, logprobs, call));
        let streams = door.coordinator.generate_all(params.collect()).await?;
        let of_prompt = |(number, tokens): (usize, TokenStream)| {
            tokens.map(move |token| {
                let token = token?;
                Ok(Piece { index: number * choices + token.choice, token })
            })
        };
        let mut pieces = stream::select_all(streams.into_iter().enumerate().map(of_prompt)).boxed();
        let first = pieces.next().await.transpose()?;
        Ok(stream::iter(first.map(Ok)).chain(pieces).boxed())
    }
}

fn params(prompt: Prompt, wanted: &Wanted, logprobs: Option<usize>, call: &Call) -> GenerateParams {
    GenerateParams {
        tool_calls: wanted.tool_calls.clone(),
        choices: wanted.choices,
        logprobs,
        deadline: call.deadline,
        trace: call.trace,
        client: call.client(),
        door: measures::door::Door::OpenAi,
        ..wanted.params(prompt)
    }
}

/// Adds what the sequence at `index` took. The prompt of its siblings is the same, and counted once.
fn add_usage(usage: &mut Usage, index: usize, choices: usize, token: &Token) -> bool {
    let Some(finish) = &token.finish else { return false };
    if index.is_multiple_of(choices) {
        usage.prompt_tokens += finish.prompt_tokens;
        usage.cached_tokens += finish.trace.cached_tokens;
    }
    usage.completion_tokens += finish.generated_tokens;
    usage.add(&finish.trace);
    true
}

async fn whole<F: Form>(
    mut pieces: BoxStream<'static, Result<Piece, RequestError>>,
    choices: usize,
    count: usize,
    mut usage: Usage,
    envelope: &Envelope,
    mut form: F,
) -> Result<Value, RequestError> {
    let mut sequences = vec![Vec::new(); count];
    while let Some(piece) = pieces.next().await {
        let Piece { index, token } = piece?;
        add_usage(&mut usage, index, choices, &token);
        sequences[index].push(token);
    }
    let whole = sequences.iter().enumerate().map(|(index, tokens)| form.whole(index, tokens)).collect();
    let mut answer = envelope.around(F::WHOLE, whole);
    answer["usage"] = usage.of_generation();
    Ok(answer)
}

/// An answer in parts.
struct Parts<F> {
    envelope: Envelope,
    form: F,
    options: EventOptions,
    usage: Usage,
    choices: usize,
    count: usize,
    /// Sequences that have ended.
    ended: usize,
}

impl<F: Form> Parts<F> {
    fn of(
        mut self,
        pieces: BoxStream<'static, Result<Piece, RequestError>>,
    ) -> impl Stream<Item = Result<Value, RequestError>> + Send + 'static {
        let openings = (0..self.count).filter_map(|index| self.form.opening(index)).collect::<Vec<_>>();
        let openings = openings.into_iter().map(|choice| self.chunk(vec![choice]));
        let openings: Vec<_> = openings.chain(self.last()).map(Ok).collect();
        let parts = pieces.flat_map(move |piece| {
            stream::iter(match piece {
                Ok(piece) => self.parts(&piece).into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            })
        });
        stream::iter(openings).chain(parts)
    }

    fn parts(&mut self, piece: &Piece) -> Vec<Value> {
        let part = self.form.part(piece.index, &piece.token);
        let mut chunks: Vec<Value> = part.map(|choice| self.chunk(vec![choice])).into_iter().collect();
        if add_usage(&mut self.usage, piece.index, self.choices, &piece.token) {
            self.ended += 1;
            chunks.extend(self.last());
        }
        chunks
    }

    /// What ends the answer, if it is over and its usage is asked for.
    fn last(&self) -> Option<Value> {
        (self.ended == self.count && self.options.include_usage).then(|| {
            let mut last = self.envelope.around(F::PART, Vec::new());
            last["usage"] = self.usage.of_generation();
            last
        })
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        let mut chunk = self.envelope.around(F::PART, choices);
        if self.options.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

/// Why a sequence ended, as OpenAI says it; null while it goes on.
pub(crate) fn finish_reason(token: &Token) -> Value {
    match token.finish.as_ref().map(|finish| finish.reason) {
        None => Value::Null,
        Some(FinishReason::End | FinishReason::Stop) => "stop".into(),
        Some(FinishReason::Length) => "length".into(),
    }
}
