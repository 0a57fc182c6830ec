//! `/tokenize` and `/detokenize`: what a text is to the model, and what tokens are to people. Their form is that of vLLM, since
//! OpenAI has none.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    response::Response,
};
use serde_json::json;

use crate::doors::openai::{
    body,
    call::Call,
    chat_messages::Conversation,
    door::{self, Door},
    error::ApiError,
    fields::{Fields, token_id},
};

/// What is to become tokens.
pub(crate) enum TokenizeRequest {
    /// A text, with what a text begins and ends with or without it.
    Text { text: String, special_tokens: bool },
    /// A conversation, as the model's template writes it.
    Conversation(Conversation),
}

impl TokenizeRequest {
    /// Takes all of its fields.
    pub(crate) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let special_tokens = fields.flag("add_special_tokens")?.unwrap_or(true);
        match (fields.text("prompt")?, Conversation::read(fields)?) {
            (Some(text), None) => Ok(Self::Text { text, special_tokens }),
            (None, Some(conversation)) => Ok(Self::Conversation(conversation)),
            (None, None) => Err(ApiError::missing("prompt", "a text, or messages in its place")),
            (Some(_), Some(_)) => Err(ApiError::unsupported("messages", "prompt is there, too")),
        }
    }
}

/// The tokens of a text or a conversation.
pub(crate) async fn tokenize(
    State(door): State<Arc<Door>>,
    Extension(call): Extension<Call>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = body::fields(request).await?;
    door.check_model(&mut fields)?;
    let asked = TokenizeRequest::read(&mut fields)?;
    fields.end()?;
    let (text, special_tokens, field) = match asked {
        TokenizeRequest::Text { text, special_tokens } => (text, special_tokens, "prompt"),
        TokenizeRequest::Conversation(conversation) => (conversation.written(&door, &[])?, false, "messages"),
    };
    let tokens = door.coordinator.tokenize(&text, special_tokens).await;
    let tokens = tokens.map_err(|error| call.refused(&error, field))?;
    let answer = json!({"count": tokens.len(), "max_model_len": door.tokens_max(), "tokens": tokens});
    Ok(door::json(&answer))
}

/// The text of tokens.
pub(crate) async fn detokenize(
    State(door): State<Arc<Door>>,
    Extension(call): Extension<Call>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = body::fields(request).await?;
    door.check_model(&mut fields)?;
    let tokens = read_tokens(&mut fields)?;
    fields.end()?;
    let text = door.coordinator.detokenize(&tokens).await;
    let text = text.map_err(|error| call.refused(&error, "tokens"))?;
    Ok(door::json(&json!({"prompt": text})))
}

/// Takes all fields of a request to detokenize.
pub(crate) fn read_tokens(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let expected = "a list of token ids";
    let tokens = fields.read("tokens", expected, |value| value.as_array()?.iter().map(token_id).collect())?;
    tokens.ok_or_else(|| ApiError::missing("tokens", expected))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn a_text_or_a_conversation() {
        // Would break: a request that means the one is answered for the other.
        let refused = |value: Value| {
            let read = TokenizeRequest::read(&mut Fields::of(value, "").unwrap());
            read.err().map(|error| error.json()["error"]["param"].as_str().unwrap_or_default().to_owned())
        };
        let messages = json!([{"role": "user", "content": "Hi"}]);
        assert_eq!(refused(json!({"prompt": "a", "add_special_tokens": false})), None);
        assert_eq!(refused(json!({"messages": messages})), None);
        assert_eq!(refused(json!({})).as_deref(), Some("prompt"));
        assert_eq!(refused(json!({"prompt": "a", "messages": messages})).as_deref(), Some("messages"));
        let mut fields = Fields::of(json!({"tokens": [1, -1]}), "").unwrap();
        assert_eq!(read_tokens(&mut fields).unwrap_err().json()["error"]["param"], "tokens");
    }
}
