//! `/v1/chat/completions`: a conversation, written as the model's chat template wants it, and what the assistant says next.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Extension,
    extract::{Request, State},
    response::Response,
};
use serde_json::{Value, json};

use crate::{
    answer::output::{FinishReason, Token},
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
        tool_calls::{Callable, Reader, Said},
        tools::Tools,
        usage::Usage,
    },
    intake::prompt::Prompt,
};

/// Likely tokens told beside each at most.
const LOGPROBS_MAX: i128 = 20;

/// What is asked for.
pub(crate) struct ChatRequest {
    conversation: Conversation,
    tools: Option<Tools>,
    logprobs: Option<usize>,
    wanted: Wanted,
}

impl ChatRequest {
    /// Takes all of its fields; `body` is their text.
    pub(crate) fn read(fields: &mut Fields, body: &[u8]) -> Result<Self, ApiError> {
        refuse_others(fields)?;
        let tools = Tools::read(fields, body)?;
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
        let mut wanted = Wanted::read(fields, max_tokens)?;
        if let Some(tools) = &tools {
            tools.apply(&mut wanted)?;
        }
        Ok(Self { conversation, tools, logprobs, wanted })
    }
}

/// Refuses what would change the answer and is not served.
fn refuse_others(fields: &mut Fields) -> Result<(), ApiError> {
    let old = "it is the older form of tools: say tools and tool_choice";
    fields.refuse("functions", old, |value| value.as_array().is_some_and(Vec::is_empty))?;
    fields.refuse("function_call", old, |value| value == "none" || value == "auto")?;
    fields.refuse("modalities", "answers are texts", |value| *value == json!(["text"]))?;
    fields.refuse("audio", "answers are texts", |_| false)?;
    fields.refuse("prediction", "no text is taken for an answer before it is generated", |_| false)?;
    fields.refuse("reasoning_effort", "give what the model's template knows in chat_template_kwargs", |_| false)?;
    fields.refuse("verbosity", "the model does not know it", |_| false)?;
    fields.refuse("web_search_options", "nothing is searched here", |_| false)
}

/// Answers.
pub(crate) async fn chat_completions(
    State(door): State<Arc<Door>>,
    Extension(call): Extension<Call>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = body::text(request).await?;
    let mut fields = body::parsed(&body)?;
    door.check_model(&mut fields)?;
    let ChatRequest { conversation, tools, logprobs, wanted } = ChatRequest::read(&mut fields, &body)?;
    fields.end()?;
    if let Some(tools) = &tools {
        tools.check(&door)?;
    }
    let shown = tools.as_ref().map_or(&[][..], |tools| &tools.shown);
    let written = conversation.written(&door, shown)?;
    // The template has written what a text begins with.
    let tokens = door.coordinator.tokenize(&written, false).await;
    let tokens = tokens.map_err(|error| call.refused(&error, "messages"))?;
    let prompts = vec![Prompt::Tokens(tokens)];
    let form = ChatForm {
        door: logprobs.is_some().then(|| door.clone()),
        id: call.id.clone(),
        tools: tools.map(|tools| tools.callable()),
        readers: BTreeMap::new(),
    };
    let usage = Usage::default();
    let generation = Generation { prompts, prompt_field: "messages", wanted, logprobs, generates: true, usage };
    generation.answer(door, call, form).await
}

/// How messages are written.
struct ChatForm {
    /// By which tokens become texts, where their probabilities are told.
    door: Option<Arc<Door>>,
    /// Of the request: ids of calls are made of it.
    id: Arc<str>,
    /// The tools that may be called, if any may be.
    tools: Option<Callable>,
    /// Of each answer that is being streamed.
    readers: BTreeMap<usize, Reader>,
}

/// What a model said, as OpenAI's messages have it.
#[derive(Default)]
struct Message {
    text: String,
    calls: Vec<Value>,
}

impl ChatForm {
    fn logprobs(&self, tokens: &[Token]) -> Option<Value> {
        self.door.as_ref().map(|door| chat_logprobs(door, tokens))
    }
}

/// What was `said` in the answer at `index`, of which `before` calls were told already.
fn message(id: &str, index: usize, before: usize, said: Vec<Said>) -> Message {
    let mut message = Message::default();
    for said in said {
        match said {
            Said::Text(text) => message.text += &text,
            Said::Call { name, arguments } => {
                let number = before + message.calls.len();
                let function = json!({"name": name, "arguments": arguments});
                let call_id = format!("call-{id}-{index}-{number}");
                message.calls.push(json!({"index": number, "id": call_id, "type": "function", "function": function}));
            }
        }
    }
    message
}

/// Why an answer ended that has called tools, or not.
fn reason(token: &Token, calls: usize) -> Value {
    match finish_reason(token) {
        reason if reason == "stop" && calls > 0 => "tool_calls".into(),
        reason => reason,
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
        let mut calls = 0;
        let Message { text, calls: new } = match &self.tools {
            None => Message { text: token.text.clone(), calls: Vec::new() },
            Some(callable) => {
                let reader = self.readers.entry(index).or_insert_with(|| Reader::new(callable.clone()));
                let before = reader.calls();
                let said = reader.read(&token.text, token.finish.as_ref().map(|finish| finish.reason));
                calls = reader.calls();
                message(&self.id, index, before, said)
            }
        };
        if text.is_empty() && new.is_empty() && token.finish.is_none() && logprobs.is_none() {
            return None;
        }
        let mut delta = if text.is_empty() { json!({}) } else { json!({"content": text}) };
        if !new.is_empty() {
            delta["tool_calls"] = new.into();
        }
        Some(json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason(token, calls)}))
    }

    fn whole(&mut self, index: usize, tokens: &[Token]) -> Value {
        let text: String = tokens.iter().map(|token| token.text.as_str()).collect();
        let said = match &self.tools {
            None => vec![Said::Text(text)],
            Some(callable) => {
                let last = tokens.last().and_then(|token| token.finish.as_ref());
                // An answer that breaks off is no whole one.
                Reader::new(callable.clone()).read(&text, Some(last.map_or(FinishReason::End, |finish| finish.reason)))
            }
        };
        let Message { text, mut calls } = message(&self.id, index, 0, said);
        let reason = tokens.last().map_or(Value::Null, |token| reason(token, calls.len()));
        // Parts have a number that says what they belong to; here each stands for itself.
        calls.iter_mut().filter_map(Value::as_object_mut).for_each(|call| drop(call.remove("index")));
        let mut message = json!({"role": "assistant", "content": text, "refusal": null});
        if !calls.is_empty() {
            message["content"] = if text.is_empty() { Value::Null } else { text.into() };
            message["tool_calls"] = calls.into();
        }
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
            let body = request.to_string();
            let read = ChatRequest::read(&mut Fields::of(request, "").unwrap(), body.as_bytes());
            read.err().map(|error| error.json()["error"]["param"].as_str().unwrap_or_default().to_owned())
        };
        for (field, value) in [
            ("functions", json!([{"name": "f"}])),
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
