//! The parameters of a request of the Open Inference Protocol: of the request itself, or of the JSON object in its input
//! `sampling_parameters`, which is how clients of Triton's language models say them. They are those of the HTTP door.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use sida_proto::inference::{InferParameter, infer_parameter::ParameterChoice};

use crate::doors::openai::{
    error::ApiError,
    fields::Fields,
    sampling::{Wanted, tokens_max},
};

/// Reads them from both places; what is in both counts as the JSON has it. One answer is made of each text, whole or token by
/// token as another input says.
pub(crate) fn read(
    parameters: HashMap<String, InferParameter>,
    sampling_parameters: Option<&str>,
) -> Result<Wanted, ApiError> {
    with(
        parameters.into_iter().map(|(name, value)| (name, json(value.parameter_choice))).collect(),
        sampling_parameters,
    )
}

/// The same where the request's own are JSON already.
pub(crate) fn with(mut all: Map<String, Value>, sampling_parameters: Option<&str>) -> Result<Wanted, ApiError> {
    if let Some(text) = sampling_parameters {
        let object = |error| ApiError::field("sampling_parameters", format!("no JSON object ({error})"), "one");
        let more: Map<String, Value> = serde_json::from_str(text).map_err(object)?;
        all.extend(more.into_iter().map(|(name, value)| match name.as_str() {
            "stop" => (name, value),
            _ => (name, number(value)),
        }));
    }
    if let Some(name) =
        ["n", "best_of", "stream", "stream_options", "routing"].into_iter().find(|name| all.contains_key(*name))
    {
        return Err(ApiError::unsupported(name, "this protocol has no such parameter"));
    }
    let routing = [("routing_mode", "mode"), ("alpha", "alpha")];
    let routing = routing.into_iter().filter_map(|(name, within)| Some((within.to_owned(), all.remove(name)?)));
    let routing: Map<String, Value> = routing.collect();
    if !routing.is_empty() {
        all.insert("routing".to_owned(), Value::Object(routing));
    }
    let mut fields = Fields::of(Value::Object(all), "")?;
    let tokens_max = tokens_max(&mut fields, "max_tokens")?;
    let wanted = Wanted::read(&mut fields, tokens_max)?;
    fields.end()?;
    Ok(wanted)
}

/// The value of a parameter; null where it has none.
pub(crate) fn json(choice: Option<ParameterChoice>) -> Value {
    match choice {
        None => Value::Null,
        Some(ParameterChoice::BoolParam(value)) => value.into(),
        Some(ParameterChoice::Int64Param(value)) => value.into(),
        Some(ParameterChoice::Uint64Param(value)) => value.into(),
        // JSON has no such numbers; their names are refused as texts.
        Some(ParameterChoice::DoubleParam(value)) if !value.is_finite() => json!(value.to_string()),
        Some(ParameterChoice::DoubleParam(value)) => value.into(),
        Some(ParameterChoice::StringParam(value)) => value.into(),
    }
}

/// A value that clients write as a text although it is a number or a flag, as that.
fn number(value: Value) -> Value {
    let parsed = value.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
    parsed.filter(|parsed| parsed.is_number() || parsed.is_boolean()).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::routing_mode::{Alpha, RoutingMode};

    fn parameter(choice: ParameterChoice) -> InferParameter {
        InferParameter { parameter_choice: Some(choice) }
    }

    #[test]
    fn both_places_are_read() {
        // Would break: what a client asks for is left out without a word.
        let parameters = HashMap::from([
            ("max_tokens".to_owned(), parameter(ParameterChoice::Int64Param(7))),
            ("temperature".to_owned(), parameter(ParameterChoice::DoubleParam(0.5))),
            ("routing_mode".to_owned(), parameter(ParameterChoice::StringParam("hash".to_owned()))),
        ]);
        let sampling = r#"{"temperature": "0.25", "seed": 3, "stop": "7", "top_k": "4"}"#;
        let asked = read(parameters, Some(sampling)).expect("all are served").params("text".into());
        assert_eq!(asked.max_tokens, 7);
        let sampling = &asked.sampling;
        assert_eq!((sampling.temperature, sampling.top_k, sampling.seed), (Some(0.25), Some(4), Some(3)));
        assert_eq!(asked.stop, ["7"]);
        assert_eq!(asked.routing, RoutingMode::Hash { alpha: Alpha::Router });
        let guided = read(HashMap::new(), Some(r#"{"routing_mode": "guided"}"#)).expect("served").params("text".into());
        assert_eq!(guided.routing, RoutingMode::Guided);
    }

    #[test]
    fn what_is_not_served_is_named() {
        // Would break: a parameter that changes the answer is ignored, or its error does not say which it was.
        for (sampling, named) in [
            (r#"{"best_of": 3}"#, "best_of"),
            (r#"{"n": 2}"#, "n"),
            (r#"{"priority": "high"}"#, "priority"),
            (r#"{"max_tokens": -1}"#, "max_tokens"),
            (r#"{"max_tokens": 1e99}"#, "max_tokens"),
            (r#"{"routing_mode": "fast"}"#, "routing.mode"),
            (r#"{"temperature": "warm"}"#, "temperature"),
            ("[]", "sampling_parameters"),
            ("{", "sampling_parameters"),
        ] {
            let error = read(HashMap::new(), Some(sampling)).expect_err(sampling).json();
            assert_eq!(error["error"]["param"], named, "{error}");
        }
        let nan = HashMap::from([("temperature".to_owned(), parameter(ParameterChoice::DoubleParam(f64::NAN)))]);
        assert_eq!(read(nan, None).expect_err("no number").json()["error"]["param"], "temperature");
    }
}
