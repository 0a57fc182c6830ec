//! `/v1/embeddings`: one or several texts, or lists of token ids, as vectors: the mean over the states of their tokens, which
//! has the length 1 unless the request asks for it as it is.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    response::Response,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::{
    answer::{output::Pooling, routing_mode::RoutingMode},
    doors::openai::{
        body,
        call::Call,
        completions,
        door::{self, Door},
        error::ApiError,
        fields::Fields,
        sampling,
        usage::Usage,
    },
    intake::{accept::EncodeParams, prompt::Prompt},
};

/// What an input may be.
const INPUT_EXPECTED: &str = "a text, a list of texts, a list of token ids, or a list of such lists";

/// What is asked for.
pub(crate) struct EmbeddingRequest {
    inputs: Vec<Prompt>,
    /// Whether vectors are told as their bytes.
    in_base64: bool,
    truncate: bool,
    normalize: bool,
    routing: RoutingMode,
    priority: i32,
}

impl EmbeddingRequest {
    /// Takes all of its fields. `width` is that of the model's vectors.
    pub(crate) fn read(fields: &mut Fields, width: usize) -> Result<Self, ApiError> {
        let inputs = fields.read("input", INPUT_EXPECTED, completions::prompts)?;
        let inputs = inputs.ok_or_else(|| ApiError::missing("input", INPUT_EXPECTED))?;
        let format = fields.text("encoding_format")?;
        let in_base64 = match format.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(other) => return Err(ApiError::field("encoding_format", other, "float or base64")),
        };
        match fields.count("dimensions")? {
            Some(asked) if asked != width => {
                return Err(ApiError::field("dimensions", asked, format!("{width}, the width of the model's vectors")));
            }
            _ => {}
        }
        Ok(Self {
            inputs,
            in_base64,
            truncate: fields.flag("truncate")?.unwrap_or(false),
            normalize: fields.flag("normalize")?.unwrap_or(true),
            routing: sampling::routing(fields)?,
            priority: sampling::priority(fields)?,
        })
    }
}

/// Answers.
pub(crate) async fn embeddings(
    State(door): State<Arc<Door>>,
    Extension(call): Extension<Call>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = body::fields(request).await?;
    door.check_model(&mut fields)?;
    let width = door.coordinator.checkpoint().config().d_model;
    let EmbeddingRequest { inputs, in_base64, truncate, normalize, routing, priority } =
        EmbeddingRequest::read(&mut fields, width)?;
    fields.end()?;
    let params = inputs.into_iter().map(|prompt| EncodeParams {
        prompt,
        routing,
        pooling: Pooling::Mean,
        truncate,
        normalize,
        deadline: call.deadline,
        trace: call.trace,
        client: call.client(),
        priority,
    });
    let encodings = door.coordinator.encode_all(params.collect()).await;
    let encodings = encodings.map_err(|error| call.refused(&error, "input"))?;
    let mut usage = Usage::default();
    let mut data = Vec::with_capacity(encodings.len());
    for (index, encoding) in encodings.iter().enumerate() {
        usage.prompt_tokens += encoding.prompt_tokens;
        usage.add(&encoding.trace);
        let embedding = vector(&encoding.states, in_base64);
        data.push(json!({"object": "embedding", "index": index, "embedding": embedding}));
    }
    let answer = json!({"object": "list", "data": data, "model": door.model(), "usage": usage.of_reading()});
    Ok(door::json(&answer))
}

/// A vector as numbers, or as the base64 of its bytes: float32, the least byte first.
fn vector(states: &[f32], in_base64: bool) -> Value {
    match in_base64 {
        false => states.into(),
        true => {
            let bytes: Vec<u8> = states.iter().flat_map(|state| state.to_le_bytes()).collect();
            BASE64_STANDARD.encode(bytes).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_is_told_in_two_ways() {
        // Would break: OpenAI's client, which asks for base64, gets other numbers than one that asks for numbers.
        assert_eq!(vector(&[1.0, -0.5], false), json!([1.0, -0.5]));
        assert_eq!(vector(&[1.0, -0.5], true), json!("AACAPwAAAL8="));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        // Would break: an index of vectors of another width is filled with the model's.
        let read = |value: Value| EmbeddingRequest::read(&mut Fields::of(value, "").unwrap(), 64);
        let refused = |value: Value| {
            read(value).err().expect("a refusal").json()["error"]["param"].as_str().expect("a field").to_owned()
        };
        assert_eq!(refused(json!({})), "input");
        assert_eq!(refused(json!({"input": {"text": "a"}})), "input");
        assert_eq!(refused(json!({"input": "a", "dimensions": 32})), "dimensions");
        assert_eq!(refused(json!({"input": "a", "encoding_format": "int8"})), "encoding_format");
        let request =
            read(json!({"input": ["a", [1, 2]], "dimensions": 64, "encoding_format": "base64"})).ok().unwrap();
        assert!(request.in_base64 && request.normalize && !request.truncate && request.inputs.len() == 2);
    }
}
