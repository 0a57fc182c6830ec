//! How an answer is to be made, as both endpoints that generate take it: the fields of OpenAI's API, and those that servers of
//! open models have added to it. What a request leaves out is the model's own, as in `sida.v1`.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{
    answer::{
        grammar::ToolCalls,
        routing_mode::{Alpha, RoutingMode},
        sampling::Sampling,
    },
    doors::openai::{
        error::ApiError,
        fields::{Fields, number, whole},
        response_format,
    },
    intake::{accept::GenerateParams, prompt::Prompt},
};

/// Answers of one prompt at most; the coordinator's limits may be lower.
const CHOICES_MAX: usize = 128;

/// How answers are to be made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// Answers of each prompt.
    pub(crate) choices: usize,
    /// 0: as many as the model or the server says.
    pub(crate) tokens_max: usize,
    pub(crate) tokens_min: Option<usize>,
    pub(crate) ignore_eos: bool,
    pub(crate) sampling: Sampling,
    pub(crate) stop: Vec<String>,
    /// What an answer follows, if it is to be more than a text.
    pub(crate) json_schema: Option<String>,
    /// The tools that it has to call instead.
    pub(crate) tool_calls: Option<ToolCalls>,
    pub(crate) routing: RoutingMode,
    /// The lower, the sooner it is its turn among those of the same client.
    pub(crate) priority: i32,
    /// `None`: the answer comes whole.
    pub(crate) events: Option<EventOptions>,
}

/// How an answer comes in events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EventOptions {
    /// Ends with what the answer took.
    pub(crate) include_usage: bool,
}

impl Wanted {
    /// Takes all of these fields. `tokens_max` is the endpoint's, which has its own names for it.
    pub(crate) fn read(fields: &mut Fields, tokens_max: Option<usize>) -> Result<Self, ApiError> {
        let choices = fields.read("n", "1 to 128", |value| {
            usize::try_from(whole(value)?).ok().filter(|n| (1..=CHOICES_MAX).contains(n))
        })?;
        let choices = choices.unwrap_or(1);
        fields.refuse("best_of", "only as many answers as n asks for are made", |value| {
            whole(value) == Some(choices as i128)
        })?;
        Ok(Self {
            choices,
            tokens_max: tokens_max.unwrap_or(0),
            tokens_min: fields.count("min_tokens")?,
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
            sampling: sampling(fields)?,
            stop: fields.read("stop", "a text or a list of texts", texts)?.unwrap_or_default(),
            json_schema: response_format::read(fields)?,
            tool_calls: None,
            routing: routing(fields)?,
            priority: priority(fields)?,
            events: events(fields)?,
        })
    }

    /// The request for one answer to `prompt` as it is wanted.
    pub(crate) fn params(&self, prompt: Prompt) -> GenerateParams {
        GenerateParams {
            prompt,
            routing: self.routing,
            max_tokens: self.tokens_max,
            min_tokens: self.tokens_min,
            ignore_eos: self.ignore_eos,
            sampling: self.sampling.clone(),
            stop: self.stop.clone(),
            json_schema: self.json_schema.clone(),
            priority: self.priority,
            ..GenerateParams::default()
        }
    }
}

/// Takes the field that says how urgent a request is among those of the same client: the lower, the more.
pub(crate) fn priority(fields: &mut Fields) -> Result<i32, ApiError> {
    let number = |value: &Value| i32::try_from(whole(value)?).ok();
    Ok(fields.read("priority", "a whole number of 32 bits", number)?.unwrap_or(0))
}

/// Takes a field that says how many tokens there may be: at least one. What is too many is refused by the coordinator, which knows
/// how many are not.
pub(crate) fn tokens_max(fields: &mut Fields, field: &'static str) -> Result<Option<usize>, ApiError> {
    let count = |value: &Value| usize::try_from(whole(value)?).ok().filter(|&count| count > 0);
    fields.read(field, "a whole number of at least 1, below 2^64", count)
}

fn sampling(fields: &mut Fields) -> Result<Sampling, ApiError> {
    let top_k = |value: &Value| match whole(value)? {
        // What other servers take for all.
        -1 => Some(0),
        top_k => usize::try_from(top_k).ok(),
    };
    // A negative seed is as good as any.
    let seed = |value: &Value| {
        let seed = whole(value)?;
        u64::try_from(seed).ok().or_else(|| i64::try_from(seed).ok().map(|seed| seed as u64))
    };
    Ok(Sampling {
        temperature: fields.number("temperature")?,
        top_k: fields.read("top_k", "a whole number, 0 or -1 for all", top_k)?,
        top_p: fields.number("top_p")?,
        seed: fields.read("seed", "a whole number of 64 bits", seed)?,
        min_p: fields.number("min_p")?,
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(0.0),
        repetition_penalty: fields.number("repetition_penalty")?,
        logit_bias: fields
            .read("logit_bias", "an object of numbers of 32 bits by token ids", logit_bias)?
            .unwrap_or_default(),
    })
}

fn logit_bias(value: &Value) -> Option<BTreeMap<u32, f32>> {
    let entry = |(token, bias): (&String, &Value)| Some((token.parse().ok()?, number(bias)?));
    value.as_object()?.iter().map(entry).collect()
}

/// One text, or a list of them.
pub(crate) fn texts(value: &Value) -> Option<Vec<String>> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match value {
        Value::Array(values) => values.iter().map(text).collect(),
        one => Some(vec![text(one)?]),
    }
}

/// Takes the field by which a request says who chooses experts.
pub(crate) fn routing(fields: &mut Fields) -> Result<RoutingMode, ApiError> {
    let Some(value) = fields.value("routing") else { return Ok(RoutingMode::Exact) };
    let mut options = Fields::of(value, "routing")?;
    let (mode, alpha) = (options.text("mode")?, options.text("alpha")?);
    options.end()?;
    if let (Some(alpha), None | Some("exact" | "guided")) = (&alpha, mode.as_deref()) {
        return Err(ApiError::field("routing.alpha", alpha, "none: the mode hash has one"));
    }
    let alpha = match alpha.as_deref() {
        None | Some("router") => Alpha::Router,
        Some("predicted") => Alpha::Predicted,
        Some(other) => return Err(ApiError::field("routing.alpha", other, "router or predicted")),
    };
    match mode.as_deref() {
        None | Some("exact") => Ok(RoutingMode::Exact),
        Some("guided") => Ok(RoutingMode::Guided),
        Some("hash") => Ok(RoutingMode::Hash { alpha }),
        Some(other) => Err(ApiError::field("routing.mode", other, "exact, guided or hash")),
    }
}

fn events(fields: &mut Fields) -> Result<Option<EventOptions>, ApiError> {
    let streams = fields.flag("stream")?.unwrap_or(false);
    let Some(value) = fields.value("stream_options") else { return Ok(streams.then(EventOptions::default)) };
    let mut options = Fields::of(value, "stream_options")?;
    let include_usage = options.flag("include_usage")?.unwrap_or(false);
    // Padding against eavesdroppers, which changes no answer.
    options.flag("include_obfuscation")?;
    options.end()?;
    match streams {
        true => Ok(Some(EventOptions { include_usage })),
        false => Err(ApiError::unsupported("stream_options", "it needs stream to be true")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<Wanted, ApiError> {
        let mut fields = Fields::of(value, "")?;
        let wanted = Wanted::read(&mut fields, None)?;
        fields.end()?;
        Ok(wanted)
    }

    #[test]
    fn fields_mean_what_openai_and_others_mean_by_them() {
        // Would break: an application gets another answer than the one it asked for, such as drawn from one token.
        let wanted = read(json!({
            "n": 2, "best_of": 2, "temperature": 0, "top_p": 0.5, "top_k": -1, "seed": -1, "stop": "x", "min_p": 0.1,
            "frequency_penalty": 1, "presence_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"7": -100},
            "routing": {"mode": "hash", "alpha": "predicted"}, "stream": true, "stream_options": {"include_usage": true},
            "priority": -3,
        }))
        .unwrap();
        let sampling = &wanted.sampling;
        assert_eq!((wanted.choices, sampling.temperature, sampling.top_p), (2, Some(0.0), Some(0.5)));
        assert_eq!((sampling.top_k, sampling.seed, wanted.stop), (Some(0), Some(u64::MAX), vec!["x".to_owned()]));
        assert_eq!((sampling.frequency_penalty, sampling.presence_penalty), (1.0, -1.0));
        assert_eq!((sampling.repetition_penalty, &sampling.logit_bias), (Some(1.5), &BTreeMap::from([(7, -100.0)])));
        assert_eq!((wanted.routing, wanted.priority), (RoutingMode::Hash { alpha: Alpha::Predicted }, -3));
        assert_eq!(wanted.events, Some(EventOptions { include_usage: true }));
        let plain = read(json!({"stop": ["a", "b"], "stream": false})).unwrap();
        assert_eq!((plain.choices, plain.stop.len(), plain.routing, plain.events), (1, 2, RoutingMode::Exact, None));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        // Would break: an absurd request is taken for another one.
        for (value, param) in [
            (json!({"n": 0}), "n"),
            (json!({"n": 1_000_000_000}), "n"),
            (json!({"best_of": 4}), "best_of"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"seed": 1.5}), "seed"),
            (json!({"priority": 1u64 << 31}), "priority"),
            (json!({"stop": [1]}), "stop"),
            (json!({"logit_bias": {"a": 1}}), "logit_bias"),
            (json!({"logit_bias": [1]}), "logit_bias"),
            (json!({"routing": {"mode": "fast"}}), "routing.mode"),
            (json!({"routing": {"mode": "Guided"}}), "routing.mode"),
            (json!({"routing": {"mode": "hash", "alpha": "none"}}), "routing.alpha"),
            (json!({"routing": {"alpha": "router"}}), "routing.alpha"),
            (json!({"routing": {"mode": "guided", "alpha": "router"}}), "routing.alpha"),
            (json!({"routing": {"beta": 1}}), "routing.beta"),
            (json!({"routing": "hash"}), "routing"),
            (json!({"stream_options": {"include_usage": true}}), "stream_options"),
            (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x"),
            (json!({"stream": "yes"}), "stream"),
        ] {
            assert_eq!(read(value.clone()).unwrap_err().json()["error"]["param"], param, "{value}");
        }
        let many = json!({"max_tokens": 1_u64 << 32});
        assert_eq!(tokens_max(&mut Fields::of(many, "").unwrap(), "max_tokens").unwrap(), Some(1 << 32));
        for value in [json!({"max_tokens": 0}), json!({"max_tokens": 1.5}), json!({"max_tokens": "9"})] {
            let mut fields = Fields::of(value, "").unwrap();
            assert_eq!(tokens_max(&mut fields, "max_tokens").unwrap_err().json()["error"]["param"], "max_tokens");
        }
    }
}
