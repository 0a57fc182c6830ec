//! The trace span of a request, with OpenTelemetry's `gen_ai` attributes: what was asked for when it begins, what was
//! answered when it ends.

use std::{borrow::Cow, time::Instant};

use sida_rpc::Client;
use sida_telemetry::{
    Span, TraceContext,
    spans::{Array, Value},
};

use crate::{answer::output::FinishReason, intake::request::GenerateOptions};

/// The span of a request that is not accepted yet. [`crate::coordinator`] begins it; then it belongs to the request.
pub(crate) struct RequestSpan {
    /// When the request came in.
    pub(crate) begun: Instant,
    pub(crate) span: Span,
}

impl RequestSpan {
    /// Begins the span of a `client`'s request for an `operation` of a `model`, within the caller's trace if there is one.
    pub(crate) fn begin(
        operation: &'static str,
        model: &str,
        caller: Option<TraceContext>,
        client: Option<&Client>,
    ) -> Self {
        let span = Span::of_caller(caller, || Cow::Owned(format!("{operation} {model}")));
        let span = span.with("gen_ai.operation.name", operation).with("gen_ai.provider.name", "sida");
        let mut request_span = Self { begun: Instant::now(), span };
        if request_span.span.is_recorded() {
            request_span.span.set("gen_ai.request.model", model.to_owned());
            if let Some(client) = client {
                request_span.span.set("sida.client", client.to_string());
            }
        }
        request_span
    }

    /// Notes how a text is to be generated.
    pub(crate) fn describe(&mut self, options: &GenerateOptions) {
        let span = &mut self.span;
        span.set("gen_ai.request.max_tokens", options.tokens_max as i64);
        span.set("gen_ai.request.temperature", f64::from(options.sampling.temperature));
        span.set("gen_ai.request.top_p", f64::from(options.sampling.top_p));
        span.set("gen_ai.request.top_k", options.sampling.top_k as f64);
        span.set("gen_ai.request.frequency_penalty", f64::from(options.sampling.frequency_penalty));
        span.set("gen_ai.request.presence_penalty", f64::from(options.sampling.presence_penalty));
        if options.choices > 1 {
            span.set("gen_ai.request.choice.count", options.choices as i64);
        }
        if let Some(seed) = options.sampling.seed {
            span.set("gen_ai.request.seed", seed.cast_signed());
        }
    }
}

/// Notes the length of the prompt.
pub(crate) fn describe_prompt(span: &mut Span, tokens: usize) {
    span.set("gen_ai.usage.input_tokens", tokens as i64);
}

/// Notes the length of the answer, of all its choices, and why each of them ended.
pub(crate) fn describe_answer(span: &mut Span, tokens: usize, reasons: &[FinishReason]) {
    span.set("gen_ai.usage.output_tokens", tokens as i64);
    let name = |reason: &FinishReason| match reason {
        FinishReason::End | FinishReason::Stop => "stop".into(),
        FinishReason::Length => "length".into(),
    };
    span.set("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons.iter().map(name).collect())));
}
