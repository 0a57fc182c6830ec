//! How likely tokens were, as OpenAI's two endpoints that generate write it.

use std::{iter::repeat_n, sync::Arc};

use serde_json::{Map, Value, json};

use crate::{
    answer::output::{Token, TokenLogprobs},
    doors::openai::door::Door,
};

/// Those of completions: lists over the tokens of a choice, or of a part of it.
pub(crate) struct CompletionLogprobs {
    door: Arc<Door>,
    /// Whether likely tokens are told beside each.
    tells_others: bool,
    /// Characters of each sequence so far.
    offsets: Vec<usize>,
}

impl CompletionLogprobs {
    /// Of so many `choices` of each prompt, which begin behind as many characters as `offsets` has for it, with `others` likely
    /// tokens beside each.
    pub(crate) fn new(door: Arc<Door>, offsets: &[usize], choices: usize, others: usize) -> Self {
        let offsets = offsets.iter().flat_map(|&offset| repeat_n(offset, choices)).collect();
        Self { door, tells_others: others > 0, offsets }
    }

    /// Those of the next tokens of the sequence at `index`.
    pub(crate) fn of(&mut self, index: usize, tokens: &[Token]) -> Value {
        let offset = &mut self.offsets[index];
        let told = tokens.iter().filter_map(|token| {
            let found = token.logprobs.as_ref()?;
            let at = *offset;
            *offset += token.text.chars().count();
            Some((token.id, at, Some(found)))
        });
        lists(&self.door, self.tells_others, told)
    }
}

/// The four lists over tokens: of each its id, the characters before it, and how likely it was, unless it is the first of a
/// prompt; and if that is told what was likely in its place.
pub(crate) fn lists<'a>(
    door: &Door,
    tells_others: bool,
    tokens: impl Iterator<Item = (u32, usize, Option<&'a TokenLogprobs>)>,
) -> Value {
    let (mut texts, mut logprobs, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (id, offset, found) in tokens {
        // Several tokens may have the same text, such as a part of a character: the likeliest of them is told.
        let mut top = Map::new();
        for likely in found.map_or(&[][..], |found| &found.top) {
            top.entry(text(door, likely.id)).or_insert_with(|| number(likely.logprob));
        }
        texts.push(text(door, id));
        logprobs.push(found.map(|found| number(found.logprob)));
        tops.push((!top.is_empty()).then_some(top));
        offsets.push(offset);
    }
    let tops = tells_others.then_some(tops);
    json!({"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets})
}

/// The lists of an answer behind those of its prompt, if it has some.
pub(crate) fn joined(before: Option<Value>, answer: Value) -> Value {
    let (Some(Value::Object(mut all)), Value::Object(answer)) = (before, answer.clone()) else { return answer };
    for (name, list) in answer {
        // A list of what else was likely is in both or in neither.
        if let (Some(Value::Array(before)), Value::Array(mut list)) = (all.get_mut(&name), list) {
            before.append(&mut list);
        }
    }
    Value::Object(all)
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
