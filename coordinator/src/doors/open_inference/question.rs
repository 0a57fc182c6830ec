//! What a request of the Open Inference Protocol asks for: text that goes on from its texts, or their embeddings. Which of the
//! two, the outputs that it names say.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use sida_proto::inference::{
    InferParameter, ModelInferRequest, infer_parameter::ParameterChoice,
    model_infer_request::InferRequestedOutputTensor,
};

use crate::doors::open_inference::{
    parameters,
    tensor::{Elements, elements, wrong},
};
use crate::doors::openai::{error::ApiError, sampling::Wanted};

/// Texts of one request at most.
const TEXTS_MAX: usize = 64;
/// The input that is answered.
pub(crate) const TEXT_INPUT: &str = "text_input";
/// Outputs of a generation, and that of an encoding.
pub(crate) const TEXT_OUTPUT: &str = "text_output";
pub(crate) const FINISH_REASON: &str = "finish_reason";
pub(crate) const EMBEDDING: &str = "embedding";
/// The one version of the one model.
pub(crate) const VERSION: &str = "1";

/// A request, checked as far as it can be without the model.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) texts: Vec<String>,
    /// Which outputs are wanted, in the order of the answer.
    pub(crate) outputs: Vec<&'static str>,
    /// How answers are to be made.
    pub(crate) wanted: Wanted,
    /// A response per token.
    pub(crate) streams: bool,
    /// Each response says whether it is the last.
    pub(crate) marks_last: bool,
    /// How long the answer is of use.
    pub(crate) timeout: Option<Duration>,
}

impl Question {
    /// What `request` asks for.
    pub(crate) fn of(mut request: ModelInferRequest) -> Result<Self, ApiError> {
        let given = request.raw_input_contents.len();
        if given != 0 && given != request.inputs.len() {
            let expected = format!("one for each of the {} inputs, or none", request.inputs.len());
            return Err(ApiError::field("raw_input_contents (their number)", given, expected));
        }
        let (mut texts, mut sampling, mut streams) = (None, None, false);
        for (place, input) in request.inputs.iter().enumerate() {
            match (input.name.as_str(), elements(input, request.raw_input_contents.get(place))?) {
                (TEXT_INPUT, Elements::Texts(found)) if texts.is_none() => texts = Some(found),
                ("sampling_parameters", Elements::Texts(found)) if sampling.is_none() => {
                    sampling = Some(one(found).ok_or_else(|| wrong(input, "no single element", "one"))?);
                }
                ("stream", Elements::Flags(found)) => {
                    streams = one(found).ok_or_else(|| wrong(input, "no single element", "one"))?;
                }
                _ => {
                    let expected = "once each: text_input and sampling_parameters (BYTES), stream (BOOL)";
                    return Err(wrong(input, format!("datatype {}", input.datatype), expected));
                }
            }
        }
        let missing = || ApiError::field_because("inputs", "inputs has no text_input, expected one of BYTES");
        let texts = texts.ok_or_else(missing)?;
        if !(1..=TEXTS_MAX).contains(&texts.len()) {
            return Err(ApiError::field("text_input (its elements)", texts.len(), format!("1 to {TEXTS_MAX}")));
        }
        let marks_last = flag(&mut request.parameters, "triton_enable_empty_final_response")?;
        let timeout = timeout(&mut request.parameters)?;
        Ok(Self {
            texts,
            outputs: outputs(&request.outputs)?,
            wanted: parameters::read(request.parameters, sampling.as_deref())?,
            streams,
            marks_last,
            timeout,
        })
    }

    /// Whether embeddings are asked for.
    pub(crate) fn embeds(&self) -> bool {
        self.outputs.contains(&EMBEDDING)
    }

    /// Until when the answer is of use to a caller who waits until `deadline`.
    pub(crate) fn deadline(&self, deadline: Option<Instant>, now: Instant) -> Option<Instant> {
        [deadline, self.timeout.map(|timeout| now + timeout)].into_iter().flatten().min()
    }
}

/// The outputs that are wanted: those of a generation unless others are named.
fn outputs(wanted: &[InferRequestedOutputTensor]) -> Result<Vec<&'static str>, ApiError> {
    let known = |wanted: &InferRequestedOutputTensor| {
        let found = [TEXT_OUTPUT, FINISH_REASON, EMBEDDING].into_iter().find(|name| *name == wanted.name);
        found.ok_or_else(|| {
            let expected = format!("{TEXT_OUTPUT}, {FINISH_REASON}, or {EMBEDDING} alone");
            ApiError::field("outputs", format!("{:?}", wanted.name), expected)
        })
    };
    let outputs: Vec<_> = wanted.iter().map(known).collect::<Result<_, _>>()?;
    match outputs.len() {
        0 => Ok(vec![TEXT_OUTPUT, FINISH_REASON]),
        several if several > 1 && outputs.contains(&EMBEDDING) => {
            Err(ApiError::field("outputs", outputs.join(" and "), format!("{EMBEDDING} alone")))
        }
        several if several > 2 => Err(ApiError::field("outputs (their number)", several, "each output once")),
        _ => Ok(outputs),
    }
}

/// Takes a flag out of the parameters.
fn flag(parameters: &mut HashMap<String, InferParameter>, name: &'static str) -> Result<bool, ApiError> {
    match parameters.remove(name).map(|parameter| parameter.parameter_choice) {
        None => Ok(false),
        Some(Some(ParameterChoice::BoolParam(value))) => Ok(value),
        Some(other) => Err(ApiError::field(name, parameters::json(other), "a bool_param")),
    }
}

/// Takes the time that the answer may take out of the parameters: microseconds, 0 for any.
fn timeout(parameters: &mut HashMap<String, InferParameter>) -> Result<Option<Duration>, ApiError> {
    let microseconds = match parameters.remove("timeout").map(|parameter| parameter.parameter_choice) {
        None => 0,
        Some(Some(ParameterChoice::Uint64Param(value))) => value,
        Some(Some(ParameterChoice::Int64Param(value))) if value >= 0 => value.unsigned_abs(),
        Some(other) => return Err(ApiError::field("timeout", parameters::json(other), "microseconds, 0 or more")),
    };
    // More than a century is no limit, and could not be added to the time of day.
    Ok((1..1 << 52).contains(&microseconds).then(|| Duration::from_micros(microseconds)))
}

fn one<T>(elements: Vec<T>) -> Option<T> {
    <[T; 1]>::try_from(elements).ok().map(|[element]| element)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use sida_proto::inference::{InferTensorContents, model_infer_request::InferInputTensor};

    use super::*;

    fn texts(name: &str, texts: &[&'static str]) -> InferInputTensor {
        let bytes_contents = texts.iter().map(|text| Bytes::from_static(text.as_bytes())).collect();
        InferInputTensor {
            name: name.to_owned(),
            datatype: "BYTES".to_owned(),
            shape: vec![texts.len() as i64],
            contents: Some(InferTensorContents { bytes_contents, ..Default::default() }),
            ..Default::default()
        }
    }

    fn asking(inputs: Vec<InferInputTensor>, outputs: &[&str]) -> ModelInferRequest {
        let output = |name: &&str| InferRequestedOutputTensor { name: (*name).to_owned(), ..Default::default() };
        ModelInferRequest { inputs, outputs: outputs.iter().map(output).collect(), ..Default::default() }
    }

    #[test]
    fn outputs_say_what_is_asked_for() {
        // Would break: who asks for embeddings gets text, or the other way round.
        let question = |outputs: &[&str]| Question::of(asking(vec![texts("text_input", &["a", "b"])], outputs));
        let all = question(&[]).expect("a generation");
        assert_eq!((all.texts.len(), all.embeds(), all.outputs), (2, false, vec![TEXT_OUTPUT, FINISH_REASON]));
        assert!(question(&[EMBEDDING]).expect("an encoding").embeds());
        for outputs in [&[EMBEDDING, TEXT_OUTPUT][..], &["logits"], &[TEXT_OUTPUT; 3]] {
            let error = question(outputs).expect_err("no such answer");
            assert!(error.message().starts_with("outputs"), "{error:?}");
        }
    }

    #[test]
    fn what_is_missing_or_too_much_is_named() {
        // Would break: a caller is not told which of his inputs was wrong.
        let input = || texts("text_input", &["a"]);
        let many = InferInputTensor { name: "text_input".to_owned(), ..texts("", &["a"; TEXTS_MAX + 1]) };
        let raw = ModelInferRequest { raw_input_contents: vec![Bytes::new(); 2], ..asking(vec![input()], &[]) };
        for (request, named) in [
            (asking(vec![], &[]), "text_input"),
            (asking(vec![input(), input()], &[]), "text_input"),
            (asking(vec![input(), texts("prompt", &["a"])], &[]), "prompt"),
            (asking(vec![input(), texts("sampling_parameters", &["{}", "{}"])], &[]), "sampling_parameters"),
            (asking(vec![input(), texts("stream", &["yes"])], &[]), "stream"),
            (asking(vec![many], &[]), "text_input"),
            (raw, "raw_input_contents"),
        ] {
            let error = Question::of(request).expect_err(named).json().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_timeout_is_a_deadline() {
        // Would break: an answer is computed for who waits no longer, or none for who waits for ever.
        let with = |choice| {
            let timeout = InferParameter { parameter_choice: Some(choice) };
            let parameters = HashMap::from([("timeout".to_owned(), timeout)]);
            Question::of(ModelInferRequest { parameters, ..asking(vec![texts("text_input", &["a"])], &[]) })
        };
        let now = Instant::now();
        let second = with(ParameterChoice::Int64Param(1_000_000)).expect("a second");
        assert_eq!(second.deadline(None, now), Some(now + Duration::from_secs(1)));
        assert_eq!(second.deadline(Some(now), now), Some(now));
        for never in [0, u64::MAX] {
            assert_eq!(with(ParameterChoice::Uint64Param(never)).expect("no limit").deadline(None, now), None);
        }
        assert!(with(ParameterChoice::Int64Param(-1)).is_err());
    }
}
