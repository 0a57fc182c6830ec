//! How likely tokens were, as OpenAI's two endpoints that generate write it.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::{answer::output::Token, doors::openai::door::Door};

/// Those of completions: lists over the tokens of a choice, or of a part of it.
pub(crate) struct CompletionLogprobs {
    door: Arc<Door>,
    /// Characters of each sequence so far.
    offsets: Vec<usize>,
}

impl CompletionLogprobs {
    /// Of so many sequences.
    pub(crate) fn new(door: Arc<Door>, sequences: usize) -> Self {
        Self { door, offsets: vec![0; sequences] }
    }

    /// Those of the next tokens of the sequence at `index`.
    pub(crate) fn of(&mut self, index: usize, tokens: &[Token]) -> Value {
        let offset = &mut self.offsets[index];
        let (mut texts, mut logprobs, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for token in tokens {
            let Some(found) = &token.logprobs else { continue };
            // Several tokens may have the same text, such as a part of a character: the likeliest of them is told.
            let mut top = Map::new();
            for likely in &found.top {
                top.entry(text(&self.door, likely.id)).or_insert_with(|| number(likely.logprob));
            }
            texts.push(text(&self.door, token.id));
            logprobs.push(number(found.logprob));
            tops.push((!top.is_empty()).then_some(top));
            offsets.push(*offset);
            *offset += token.text.chars().count();
        }
        let tops = tops.iter().any(Option::is_some).then_some(tops);
        json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
    }
}

/// Those of a chat: an entry a token.
pub(crate) fn chat_logprobs(door: &Door, tokens: &[Token]) -> Value {
    let entry = |id: u32, logprob: f32| {
        let text = text(door, id);
        json!({"token": text, "logprob": number(logprob), "bytes": text.as_bytes()})
    };
    let content = tokens.iter().filter_map(|token| {
        let found = token.logprobs.as_ref()?;
        let mut told = entry(token.id, found.logprob);
        told["top_logprobs"] = found.top.iter().map(|likely| entry(likely.id, likely.logprob)).collect();
        Some(told)
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// The text of a token by itself. One that has none, as the tokenizer says, is told by its id.
fn text(door: &Door, id: u32) -> String {
    door.coordinator.token_text(id).unwrap_or_else(|_| format!("token_id:{id}"))
}

/// JSON has no infinity: what is all but impossible is told as the least number that a f32 has.
fn number(logprob: f32) -> Value {
    logprob.max(f32::MIN).into()
}
