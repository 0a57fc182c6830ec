//! Answers as the Open Inference Protocol has them: the wanted outputs of texts, of tokens, or of embeddings, as raw bytes.

use std::collections::HashMap;

use bytes::Bytes;
use sida_proto::{
    inference::{
        InferParameter, ModelInferResponse, ModelStreamInferResponse, infer_parameter::ParameterChoice,
        model_infer_response::InferOutputTensor,
    },
    wire::rows,
};

use crate::answer::output::{Encoding, FinishReason};
use crate::doors::open_inference::{
    question::{EMBEDDING, TEXT_OUTPUT, VERSION},
    tensor::{output, text_output},
};

/// What every response to a request carries.
#[derive(Clone, Debug)]
pub(crate) struct Envelope {
    pub(crate) model: String,
    pub(crate) id: String,
}

/// A text, or a part of one, and how it ended; `None`: not yet.
pub(crate) struct Generated {
    pub(crate) text: String,
    pub(crate) finish: Option<FinishReason>,
}

impl Envelope {
    /// The wanted `outputs` of a generation, an element for each of `texts`.
    pub(crate) fn generation(&self, outputs: &[&str], texts: &[Generated]) -> ModelInferResponse {
        self.response(outputs.iter().map(|&name| match name {
            TEXT_OUTPUT => text_output(name, texts.iter().map(|generated| generated.text.as_str())),
            _ => text_output(name, texts.iter().map(|generated| finish_name(generated.finish))),
        }))
    }

    /// The embeddings, a row each.
    pub(crate) fn embeddings(&self, encodings: Vec<Encoding>) -> ModelInferResponse {
        let d_model = encodings.first().map_or(0, |encoding| encoding.d_model);
        let shape = vec![encodings.len() as i64, d_model as i64];
        let states = encodings.into_iter().flat_map(|encoding| encoding.states).collect();
        self.response([(output(EMBEDDING, "FP32", shape), rows::into_payload(states))])
    }

    /// Why a request of a stream was not answered, or not to its end.
    pub(crate) fn error(&self, message: String) -> ModelStreamInferResponse {
        ModelStreamInferResponse { error_message: message, infer_response: Some(self.response([])) }
    }

    fn response(&self, outputs: impl IntoIterator<Item = (InferOutputTensor, Bytes)>) -> ModelInferResponse {
        let (outputs, raw_output_contents) = outputs.into_iter().unzip();
        ModelInferResponse {
            model_name: self.model.clone(),
            model_version: VERSION.to_owned(),
            id: self.id.clone(),
            outputs,
            raw_output_contents,
            ..Default::default()
        }
    }
}

/// One response of a stream, which says whether it is the last where its caller asked for that.
pub(crate) fn streamed(mut response: ModelInferResponse, marks_last: bool, is_last: bool) -> ModelStreamInferResponse {
    if marks_last {
        let is_last = InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(is_last)) };
        response.parameters = HashMap::from([("triton_final_response".to_owned(), is_last)]);
    }
    ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) }
}

/// How an answer ended, as applications of language models call it; empty while it goes on.
fn finish_name(finish: Option<FinishReason>) -> &'static str {
    match finish {
        None => "",
        Some(FinishReason::End | FinishReason::Stop) => "stop",
        Some(FinishReason::Length) => "length",
    }
}
