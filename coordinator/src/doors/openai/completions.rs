//! `/v1/completions`: one or several prompts, as texts or token ids, and what follows them.

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
        door::Door,
        echo::{self, Echo},
        error::ApiError,
        fields::{Fields, token_id, whole},
        generation::{Form, Generation, finish_reason},
        log_probabilities::{CompletionLogprobs, joined},
        sampling::{Wanted, tokens_max},
        usage::Usage,
    },
    intake::prompt::Prompt,
};

/// Prompts of one request at most.
const PROMPTS_MAX: usize = 128;
/// Sequences of one request at most: its prompts times the answers of each.
const SEQUENCES_MAX: usize = 128;
/// Likely tokens told beside each at most, as the coordinator has it.
const LOGPROBS_MAX: i128 = 20;
/// What a prompt may be.
const PROMPT_EXPECTED: &str = "a text, a list of texts, a list of token ids, or a list of such lists";

/// What is asked for.
pub(crate) struct CompletionRequest {
    prompts: Vec<Prompt>,
    echo: bool,
    /// Whether there is an answer behind the echo.
    generates: bool,
    logprobs: Option<usize>,
    wanted: Wanted,
}

impl CompletionRequest {
    /// Takes all of its fields.
    pub(crate) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let prompts = fields.read("prompt", PROMPT_EXPECTED, prompts)?;
        let prompts = prompts.ok_or_else(|| ApiError::missing("prompt", PROMPT_EXPECTED))?;
        if !(1..=PROMPTS_MAX).contains(&prompts.len()) {
            return Err(ApiError::field(
                "prompt",
                format!("a list of {}", prompts.len()),
                format!("1 to {PROMPTS_MAX}"),
            ));
        }
        fields.refuse("suffix", "the model only goes on from what it read", |value| value == "")?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        let logprobs =
            fields.read("logprobs", "0 to 20", |value| whole(value).filter(|top| (0..=LOGPROBS_MAX).contains(top)))?;
        // Nothing but the prompt itself is an answer, too: it is asked for to have how likely its tokens are.
        let max_tokens = if echo { fields.count("max_tokens")? } else { tokens_max(fields, "max_tokens")? };
        let generates = max_tokens != Some(0);
        let wanted = Wanted::read(fields, max_tokens)?;
        let sequences = prompts.len() * wanted.choices;
        if sequences > SEQUENCES_MAX {
            let expected = format!("at most {SEQUENCES_MAX} answers of all {} prompts", prompts.len());
            return Err(ApiError::field("n", wanted.choices, expected));
        }
        Ok(Self { prompts, echo, generates, logprobs: logprobs.map(|top| top as usize), wanted })
    }
}

/// Answers.
pub(crate) async fn completions(
    State(door): State<Arc<Door>>,
    Extension(call): Extension<Call>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = body::fields(request).await?;
    door.check_model(&mut fields)?;
    let CompletionRequest { prompts, echo, generates, logprobs, wanted } = CompletionRequest::read(&mut fields)?;
    fields.end()?;
    let (mut echoes, mut usage) = (Vec::new(), Usage::default());
    if echo {
        let echoed = echo::echoes(&door, &call, &prompts, logprobs, &wanted).await?;
        echoed.iter().for_each(|echo| echo.add_usage(&mut usage, !generates));
        echoes = echoed;
    }
    let offsets: Vec<usize> = match echoes.is_empty() {
        true => vec![0; prompts.len()],
        false => echoes.iter().map(|echo| echo.text.chars().count()).collect(),
    };
    let choices = wanted.choices;
    let logprobs_of = logprobs.map(|others| CompletionLogprobs::new(door.clone(), &offsets, choices, others));
    let form = CompletionForm { echoes, choices, generates, logprobs: logprobs_of };
    let generation = Generation { prompts, prompt_field: "prompt", wanted, logprobs, generates, usage };
    generation.answer(door, call, form).await
}

/// One prompt, or several.
pub(crate) fn prompts(value: &Value) -> Option<Vec<Prompt>> {
    match value {
        Value::String(text) => Some(vec![Prompt::Text(text.clone())]),
        Value::Array(values) if values.first().is_some_and(Value::is_number) => Some(vec![tokens(value)?]),
        Value::Array(values) => values
            .iter()
            .map(|value| match value {
                Value::String(text) => Some(Prompt::Text(text.clone())),
                other => tokens(other),
            })
            .collect(),
        _ => None,
    }
}

/// A list of token ids.
fn tokens(value: &Value) -> Option<Prompt> {
    value.as_array()?.iter().map(token_id).collect::<Option<_>>().map(Prompt::Tokens)
}

/// How completions are written.
struct CompletionForm {
    /// The prompts, where they stand before their answers; otherwise none.
    echoes: Vec<Echo>,
    choices: usize,
    /// Whether anything comes behind the echoes.
    generates: bool,
    logprobs: Option<CompletionLogprobs>,
}

impl CompletionForm {
    /// Why a sequence ended with this token: one of nothing but its echo has the length that it was to have.
    fn reason(&self, last: Option<&Token>) -> Value {
        match (last, self.generates) {
            (Some(token), _) => finish_reason(token),
            (None, true) => Value::Null,
            (None, false) => "length".into(),
        }
    }

    fn echo(&self, index: usize) -> Option<&Echo> {
        self.echoes.get(index / self.choices)
    }
}

impl Form for CompletionForm {
    const ID: &'static str = "cmpl-";
    const WHOLE: &'static str = "text_completion";
    const PART: &'static str = "text_completion";

    fn opening(&mut self, index: usize) -> Option<Value> {
        let Echo { text, logprobs, .. } = self.echo(index)?;
        let reason = self.reason(None);
        Some(json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}))
    }

    fn part(&mut self, index: usize, token: &Token) -> Option<Value> {
        let logprobs = self.logprobs.as_mut().map(|logprobs| logprobs.of(index, std::slice::from_ref(token)));
        if token.text.is_empty() && token.finish.is_none() && logprobs.is_none() {
            return None;
        }
        let reason = finish_reason(token);
        Some(json!({"index": index, "text": token.text, "logprobs": logprobs, "finish_reason": reason}))
    }

    fn whole(&mut self, index: usize, tokens: &[Token]) -> Value {
        let answer = tokens.iter().map(|token| token.text.as_str());
        let echo = self.echo(index);
        let text: String = echo.map(|echo| echo.text.as_str()).into_iter().chain(answer).collect();
        let before = echo.and_then(|echo| echo.logprobs.clone());
        let logprobs = self.logprobs.as_mut().map(|logprobs| joined(before, logprobs.of(index, tokens)));
        let reason = self.reason(tokens.last());
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_four_forms() {
        // Would break: a list of ids is answered as several prompts, or a list of texts as one.
        let text = |text: &str| Prompt::Text(text.to_owned());
        assert_eq!(prompts(&json!("a")), Some(vec![text("a")]));
        assert_eq!(prompts(&json!(["a", ""])), Some(vec![text("a"), text("")]));
        assert_eq!(prompts(&json!([1, 2])), Some(vec![Prompt::Tokens(vec![1, 2])]));
        let two = vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])];
        assert_eq!(prompts(&json!([[1], [2, 3]])), Some(two));
        for wrong in [json!(1), json!({}), json!([1, "a"]), json!([[1], [-2]]), json!([1.5]), json!([[["a"]]])] {
            assert_eq!(prompts(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        // Would break: an application that fills in the middle gets an answer that ignores what comes after.
        let refused = |value: Value| {
            let error = CompletionRequest::read(&mut Fields::of(value, "").unwrap()).err().expect("a refusal");
            error.json()["error"]["param"].as_str().unwrap_or_default().to_owned()
        };
        assert_eq!(refused(json!({})), "prompt");
        assert_eq!(refused(json!({"prompt": []})), "prompt");
        assert_eq!(refused(json!({"prompt": "a", "suffix": "b"})), "suffix");
        assert_eq!(refused(json!({"prompt": "a", "max_tokens": 0})), "max_tokens");
        assert_eq!(refused(json!({"prompt": "a", "max_tokens": -1, "echo": true})), "max_tokens");
        assert_eq!(refused(json!({"prompt": "a", "logprobs": 21})), "logprobs");
        assert_eq!(refused(json!({"prompt": ["a", "b"], "n": 65})), "n");
    }
}
