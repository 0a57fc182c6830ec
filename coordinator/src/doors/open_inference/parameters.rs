//! The parameters of a generation, as a request of the Open Inference Protocol gives them: each a parameter of the request, or a
//! field of the JSON object in its input `sampling_parameters`, which is how clients of Triton's language models say them.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value};
use sida_proto::inference::{InferParameter, infer_parameter::ParameterChoice};

use crate::{
    answer::{
        request_error::RequestError,
        routing_mode::{Alpha, RoutingMode},
        sampling::Sampling,
    },
    intake::{accept::GenerateParams, prompt::Prompt},
};

/// Where errors say that a parameter was.
const FIELD: &str = "parameters";

/// How a text is generated. What is missing is as the model or the server has it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Parameters {
    max_tokens: usize,
    min_tokens: Option<usize>,
    ignore_eos: bool,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    frequency_penalty: f32,
    presence_penalty: f32,
    repetition_penalty: Option<f32>,
    seed: Option<u64>,
    stop: Stops,
    routing_mode: Mode,
    alpha: AlphaFrom,
}

/// One text to stop at, or several.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum Stops {
    One(String),
    Several(Vec<String>),
}

impl Default for Stops {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    #[default]
    Exact,
    Hash,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AlphaFrom {
    #[default]
    Router,
    Predicted,
}

impl Parameters {
    /// Reads them from both places. What is in both counts as the JSON has it.
    pub(crate) fn read(
        parameters: HashMap<String, InferParameter>,
        sampling_parameters: Option<&str>,
    ) -> Result<Self, RequestError> {
        let mut all: Map<String, Value> = parameters.into_iter().map(|(name, value)| (name, json(value))).collect();
        if let Some(text) = sampling_parameters {
            let more: Map<String, Value> = serde_json::from_str(text).map_err(|error| RequestError::Argument {
                field: "sampling_parameters",
                found: error.to_string(),
                expected: "a JSON object".to_owned(),
            })?;
            all.extend(more.into_iter().map(|(name, value)| match name.as_str() {
                "stop" => (name, value),
                _ => (name, number(value)),
            }));
        }
        serde_path_to_error::deserialize(Value::Object(all)).map_err(|error| RequestError::Argument {
            field: FIELD,
            found: error.to_string(),
            expected: "parameters that are served, each of its type".to_owned(),
        })
    }

    /// Who chooses the experts.
    pub(crate) fn routing(&self) -> RoutingMode {
        match (self.routing_mode, self.alpha) {
            (Mode::Exact, _) => RoutingMode::Exact,
            (Mode::Hash, AlphaFrom::Router) => RoutingMode::Hash { alpha: Alpha::Router },
            (Mode::Hash, AlphaFrom::Predicted) => RoutingMode::Hash { alpha: Alpha::Predicted },
        }
    }

    /// The request to go on from `text` so.
    pub(crate) fn generate(&self, text: String) -> GenerateParams {
        GenerateParams {
            prompt: Prompt::Text(text),
            routing: self.routing(),
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            ignore_eos: self.ignore_eos,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                frequency_penalty: self.frequency_penalty,
                presence_penalty: self.presence_penalty,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
                ..Sampling::default()
            },
            stop: match &self.stop {
                Stops::One(stop) => vec![stop.clone()],
                Stops::Several(stops) => stops.clone(),
            },
            ..GenerateParams::default()
        }
    }
}

fn json(parameter: InferParameter) -> Value {
    match parameter.parameter_choice {
        None => Value::Null,
        Some(ParameterChoice::BoolParam(value)) => value.into(),
        Some(ParameterChoice::Int64Param(value)) => value.into(),
        Some(ParameterChoice::Uint64Param(value)) => value.into(),
        Some(ParameterChoice::DoubleParam(value)) => value.into(),
        Some(ParameterChoice::StringParam(value)) => value.into(),
    }
}

/// A value that clients write as a text although it is a number, as a number.
fn number(value: Value) -> Value {
    let parsed = value.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
    parsed.filter(|parsed| parsed.is_number() || parsed.is_boolean()).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let read = Parameters::read(parameters, Some(sampling)).expect("all are served").generate("text".to_owned());
        assert_eq!(read.max_tokens, 7);
        assert_eq!((read.sampling.temperature, read.sampling.top_k, read.sampling.seed), (Some(0.25), Some(4), Some(3)));
        assert_eq!(read.stop, ["7"]);
        assert_eq!(read.routing, RoutingMode::Hash { alpha: Alpha::Router });
    }

    #[test]
    fn what_is_not_served_is_named() {
        // Would break: a parameter that changes the answer is ignored, or its error does not say which it was.
        for (sampling, named) in [
            (r#"{"best_of": 3}"#, "best_of"),
            (r#"{"max_tokens": -1}"#, "max_tokens"),
            (r#"{"max_tokens": 1e99}"#, "max_tokens"),
            (r#"{"routing_mode": "guided"}"#, "guided"),
            (r#"{"temperature": "warm"}"#, "temperature"),
            ("[]", "sampling_parameters"),
            ("{", "sampling_parameters"),
        ] {
            let error = Parameters::read(HashMap::new(), Some(sampling)).expect_err(sampling).to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
