//! `/v1/chat/completions`: a conversation, written as the model's chat template wants it, and what the assistant says next.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    response::Response,
};
use serde_json::{Value, json};

use crate::{
    answer::output::Token,
    doors::openai::{
        body,
        call::Call,
        chat_messages::Conversation,
        door::Door,
        error::ApiError,
        fields::{Fields, whole},
        generation::{Form, Generation, finish_reason},
        log_probabilities::chat_logprobs,
        sampling::{Wanted, tokens_max},
        usage::Usage,
    },
    intake::prompt::Prompt,
};

/// Likely tokens told beside each at most.
const LOGPROBS_MAX: i128 = 20;

/// What is asked for.
pub(crate) struct ChatRequest {
    conversation: Conversation,
    logprobs: Option<usize>,
    wanted: Wanted,
}

impl ChatRequest {
    /// Takes all of its fields.
    pub(crate) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        refuse_others(fields)?;
        let conversation = Conversation::read(fields)?;
        let conversation = conversation.ok_or_else(|| ApiError::missing("messages", "a list of messages"))?;
        let is_wanted = fields.flag("logprobs")?.unwrap_or(false);
        let top = fields
            .read("top_logprobs", "0 to 20", |value| whole(value).filter(|top| (0..=LOGPROBS_MAX).contains(top)))?;
        if top.is_some_and(|top| top > 0) && !is_wanted {
            return Err(ApiError::unsupported("top_logprobs", "it needs logprobs to be true"));
        }
        let logprobs = is_wanted.then_some(top.unwrap_or(0) as usize);
        let old_name = tokens_max(fields, "max_tokens")?;
        let max_tokens = tokens_max(fields, "max_completion_tokens")?.or(old_name);
        Ok(Self { conversation, logprobs, wanted: Wanted::read(fields, max_tokens)? })
    }
}

/// Refuses what would change the answer and is not served.
fn refuse_others(fields: &mut Fields) -> Result<(), ApiError> {
    let tools = "tools are not served";
    for field in ["tools", "functions"] {
        fields.refuse(field, tools, |value| value.as_array().is_some_and(Vec::is_empty))?;
    }
    for field in ["tool_choice", "function_call"] {
        fields.refuse(field, tools, |value| value == "none" || value == "auto")?;
    }
    // It speaks of tools, of which there are none.
    fields.flag("parallel_tool_calls")?;
    fields.refuse("modalities", "answers are texts", |value| *value == json!(["text"]))?;
    fields.refuse("audio", "answers are texts", |_| false)?;
    fields.refuse("prediction", "no text is taken for an answer before it is generated", |_| false)?;
    fields.refuse("reasoning_effort", "give what the model's template knows in chat_template_kwargs", |_| false)?;
    fields.refuse("verbosity", "the model does not know it", |_| false)?;
    fields.refuse("web_search_options", tools, |_| false)
}

/// Answers.
pub(crate) async fn chat_completions(
    State(door): State<Arc<Door>>,
    Extension(call): Extension<Call>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = body::fields(request).await?;
    door.check_model(&mut fields)?;
    let ChatRequest { conversation, logprobs, wanted } = ChatRequest::read(&mut fields)?;
    fields.end()?;
    let written = conversation.written(&door)?;
    // The template has written what a text begins with.
    let tokens = door.coordinator.tokenize(&written, false).await;
    let tokens = tokens.map_err(|error| call.refused(&error, "messages"))?;
    let prompts = vec![Prompt::Tokens(tokens)];
    let form = ChatForm { door: logprobs.is_some().then(|| door.clone()) };
    let usage = Usage::default();
    let generation = Generation { prompts, prompt_field: "messages", wanted, logprobs, generates: true, usage };
    generation.answer(door, call, form).await
}

/// How messages are written.
struct ChatForm {
    /// By which tokens become texts, where their probabilities are told.
    door: Option<Arc<Door>>,
}

impl ChatForm {
    fn logprobs(&self, tokens: &[Token]) -> Option<Value> {
        self.door.as_ref().map(|door| chat_logprobs(door, tokens))
    }
}

impl Form for ChatForm {
    const ID: &'static str = "chatcmpl-";
    const WHOLE: &'static str = "chat.completion";
    const PART: &'static str = "chat.completion.chunk";

    fn opening(&mut self, index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        Some(json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}))
    }

    fn part(&mut self, index: usize, token: &Token) -> Option<Value> {
        let logprobs = self.logprobs(std::slice::from_ref(token));
        if token.text.is_empty() && token.finish.is_none() && logprobs.is_none() {
            return None;
        }
        let delta = if token.text.is_empty() { json!({}) } else { json!({"content": token.text}) };
        Some(json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason(token)}))
    }

    fn whole(&mut self, index: usize, tokens: &[Token]) -> Value {
        let text: String = tokens.iter().map(|token| token.text.as_str()).collect();
        let reason = tokens.last().map_or(Value::Null, finish_reason);
        let message = json!({"role": "assistant", "content": text, "refusal": null});
        json!({"index": index, "message": message, "logprobs": self.logprobs(tokens), "finish_reason": reason})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        // Would break: an agent believes that its tools or its schema were seen.
        let refused = |field: &str, value: Value| {
            let mut request = json!({"messages": [{"role": "user", "content": "Hi"}]});
            request[field] = value;
            let read = ChatRequest::read(&mut Fields::of(request, "").unwrap());
            read.err().map(|error| error.json()["error"]["param"].as_str().unwrap_or_default().to_owned())
        };
        for (field, value) in [
            ("tools", json!([{"type": "function"}])),
            ("tool_choice", json!("required")),
            ("modalities", json!(["text", "audio"])),
            ("reasoning_effort", json!("low")),
            ("top_logprobs", json!(3)),
            ("logprobs", json!(3)),
        ] {
            assert_eq!(refused(field, value.clone()).as_deref(), Some(field), "{value}");
        }
        for (field, value) in [
            ("tools", json!([])),
            ("tool_choice", json!("none")),
            ("response_format", json!({"type": "json_object"})),
            ("modalities", json!(["text"])),
            ("parallel_tool_calls", json!(true)),
            ("top_logprobs", json!(0)),
        ] {
            assert_eq!(refused(field, value.clone()), None, "{field} {value}");
        }
    }
}
