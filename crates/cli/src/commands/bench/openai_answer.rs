//! An answer in OpenAI's form, as it comes: messages of a stream with the time of each, or an embedding. Called by
//! [`super::openai`].

use std::{pin::pin, time::Duration, time::Instant};

use futures::StreamExt;
use http::{Response, header::CONTENT_TYPE};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::Value;
use sse_stream::SseStream;
use tokio::time;

use super::{
    answer::{Answer, Failure, Pace},
    http_client::{self, BodyError},
    workload::Method,
};

/// How long the end of a connection's answer is waited for after its last message, so that the connection can be used again.
const END_PATIENCE: Duration = Duration::from_millis(100);

const DONE: &str = "[DONE]";

/// A message of a stream, as far as it is measured.
#[derive(Debug, Deserialize)]
struct Message {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    content: Option<String>,
    /// What some servers call the thoughts of a model that thinks: tokens as others.
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Usage {
    #[serde(default)]
    completion_tokens: u64,
}

/// What came so far.
struct Progress {
    method: Method,
    pace: Pace,
    /// Messages with tokens: their number, where the server does not tell it.
    messages: u64,
    usage: Option<Usage>,
    is_finished: bool,
}

/// Reads a stream to its end.
pub(super) async fn streamed(method: Method, response: Response<Incoming>) -> Result<Answer, Failure> {
    let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("none").to_owned();
    if !kind.starts_with("text/event-stream") {
        return Err(Failure::new("malformed", format!("its content type is {kind}, expected text/event-stream")));
    }
    let mut events = pin!(SseStream::from_bytes_stream(http_client::pieces(response.into_body())));
    let mut progress = Progress::new(method);
    while let Some(event) = events.next().await {
        match event.map_err(failure)?.data {
            None => {}
            Some(data) if data.trim() == DONE => {
                // Whether it ends well is not of this answer, which is whole.
                let _ = time::timeout(END_PATIENCE, events.next()).await;
                progress.is_finished = true;
                break;
            }
            Some(data) => progress.take(&data, Instant::now())?,
        }
    }
    progress.into_answer()
}

/// The answer to an embedding.
pub(super) fn embedding(body: Value) -> Result<Answer, Failure> {
    let is_whole = body["data"][0]["embedding"].as_array().is_some_and(|numbers| !numbers.is_empty());
    if !is_whole {
        return Err(Failure::new("malformed", "the answer has no data[0].embedding"));
    }
    Ok(Answer { tokens: body["usage"]["prompt_tokens"].as_u64().unwrap_or(0), ..Answer::default() })
}

fn failure(error: sse_stream::Error) -> Failure {
    match error {
        sse_stream::Error::Body(error) => match error.downcast::<BodyError>() {
            Ok(error) => Failure::from(*error),
            Err(error) => Failure::new("broken", error.to_string()),
        },
        error => Failure::new("malformed", format!("no server-sent events: {error}")),
    }
}

impl Progress {
    fn new(method: Method) -> Self {
        Self { method, pace: Pace::default(), messages: 0, usage: None, is_finished: false }
    }

    /// One message, which came at a time.
    fn take(&mut self, data: &str, at: Instant) -> Result<(), Failure> {
        let message: Message = serde_json::from_str(data)
            .map_err(|error| Failure::new("malformed", format!("a message is no JSON: {error}")))?;
        if message.error.is_some() {
            return Err(Failure::new("error in stream", http_client::error_message(data)));
        }
        self.usage = message.usage.or(self.usage);
        let Some(choice) = message.choices.first() else { return Ok(()) };
        if choice.has_tokens(self.method) {
            self.pace.came(at);
            self.messages += 1;
        }
        self.is_finished |= choice.finish_reason.is_some();
        // An answer that ends at once has no text, and this is the first that its caller sees of it.
        if self.is_finished && self.pace.first.is_none() {
            self.pace.came(at);
        }
        Ok(())
    }

    fn into_answer(self) -> Result<Answer, Failure> {
        if !self.is_finished {
            let message = format!("the stream ended after {} messages, before it was finished", self.messages);
            return Err(Failure::new("cut off", message));
        }
        let tokens = self.usage.map_or(self.messages, |usage| usage.completion_tokens);
        Ok(Answer { tokens, pace: self.pace, ..Answer::default() })
    }
}

impl Choice {
    /// A chat begins with a message that only says who speaks, and any stream may end with one that only says why. A completion
    /// has no other messages without text than those of tokens that are none.
    fn has_tokens(&self, method: Method) -> bool {
        let is_text = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        match (method, &self.delta) {
            (Method::Chat, Some(delta)) => {
                [&delta.content, &delta.reasoning_content, &delta.reasoning].into_iter().any(is_text)
            }
            (Method::Chat, None) => false,
            _ => is_text(&self.text) || (self.text.is_some() && self.finish_reason.is_none()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(method: Method, messages: &[&str]) -> Result<Answer, Failure> {
        let start = Instant::now();
        let mut progress = Progress::new(method);
        for (number, message) in messages.iter().enumerate() {
            progress.take(message, start + Duration::from_millis(10 * number as u64))?;
        }
        progress.into_answer()
    }

    #[test]
    fn the_first_token_is_the_first_with_text() {
        // Broken: the message that only names the role would be taken for the first token, and every server look quick.
        let answer = read(
            Method::Chat,
            &[
                r#"{"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}], "usage": null}"#,
                r#"{"choices": [{"delta": {"reasoning_content": "so"}}]}"#,
                r#"{"choices": [{"delta": {"content": "ja"}}]}"#,
                r#"{"choices": [{"delta": {"content": "wohl"}}]}"#,
                r#"{"choices": [{"delta": {}, "finish_reason": "stop"}]}"#,
                r#"{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}"#,
            ],
        )
        .unwrap();
        assert_eq!((answer.tokens, answer.pace.gaps.len()), (5, 2));
        assert_eq!(answer.pace.per_token(answer.tokens), Some(Duration::from_millis(5)));
    }

    #[test]
    fn tokens_are_messages_where_nobody_counts_them() {
        // Broken: servers that do not know `stream_options` would have generated nothing.
        let messages = [
            r#"{"choices": [{"text": "a", "finish_reason": null}]}"#,
            r#"{"choices": [{"text": "", "finish_reason": null}]}"#,
            r#"{"choices": [{"text": "b", "finish_reason": "length"}]}"#,
        ];
        let answer = read(Method::Generate, &messages).unwrap();
        assert_eq!((answer.tokens, answer.pace.gaps.len()), (3, 2));
        let with_end = [messages[0], r#"{"choices": [{"text": "", "finish_reason": "stop"}]}"#];
        assert_eq!(read(Method::Generate, &with_end).unwrap().tokens, 1);
    }

    #[test]
    fn an_answer_that_ends_at_once_has_a_first_message() {
        // Broken: it has no time to the first token, counts as one that came too late for `--slo ttft`, and what the table says of
        // that time is only that of the others.
        let at_once = [r#"{"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}"#];
        let chat_at_once = [r#"{"choices": [{"delta": {}, "finish_reason": "stop"}]}"#];
        for (method, messages) in [(Method::Generate, at_once), (Method::Chat, chat_at_once)] {
            assert!(read(method, &messages).unwrap().pace.first.is_some());
        }
    }

    #[test]
    fn what_is_no_answer_fails_by_a_code() {
        // Broken: half an answer would be counted as a quick one.
        let code = |messages: &[&str]| read(Method::Generate, messages).unwrap_err().code;
        assert_eq!(code(&[]), "cut off");
        assert_eq!(code(&[r#"{"choices": [{"text": "a"}]}"#]), "cut off");
        assert_eq!(code(&["{"]), "malformed");
        assert_eq!(code(&["[1]"]), "malformed");
        assert_eq!(code(&[r#"{"choices": [{"text": 5}]}"#]), "malformed");
        assert_eq!(code(&[r#"{"usage": {"completion_tokens": -1}}"#]), "malformed");
        let told = read(Method::Generate, &[r#"{"error": {"message": "out of memory", "code": 500}}"#]).unwrap_err();
        assert_eq!((told.code.as_str(), told.message.as_str()), ("error in stream", "out of memory"));
    }

    #[test]
    fn embeddings_are_looked_at() {
        // Broken: an answer without numbers would be counted as one.
        let answer = embedding(json!({"data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 6}}));
        assert_eq!(answer.map(|answer| answer.tokens), Ok(6));
        assert!(embedding(json!({"data": [{"embedding": [0.5]}]})).is_ok());
        for wrong in [json!({}), json!([]), json!({"data": []}), json!({"data": [{"embedding": []}]})] {
            assert_eq!(embedding(wrong).unwrap_err().code, "malformed");
        }
    }
}
