//! Counts the requests of `sida.v1.Inference`, of the Open Inference Protocol and of the HTTP door by how they ended, and their time: all that came to this
//! node, also those that were refused before a service saw them.

use std::time::Duration;

use axum::http::Method;
use sida_rpc::{Client, Outcome};
use sida_telemetry::{counter, histogram, names};
use tonic::Code;

use crate::measures::door::Door;

/// The services whose requests are counted, as paths begin, and the methods of each.
const METHODS: [(&str, &[&str]); 2] = [
    ("/sida.v1.Inference/", &["Generate", "Score", "Encode"]),
    ("/inference.GRPCInferenceService/", &["ModelInfer", "ModelStreamInfer"]),
];
/// The paths of the HTTP door whose requests are counted, and as what.
const HTTP_METHODS: [(&str, &str); 3] = [
    ("/v1/completions", "completions"),
    ("/v1/chat/completions", "chat/completions"),
    ("/v1/embeddings", "embeddings"),
];
/// What requests of the Open Inference Protocol are counted as that come by HTTP, which is what their paths end with.
const OPEN_INFERENCE_METHODS: [&str; 3] = ["infer", "generate", "generate_stream"];
/// Codes whose counts are exported from the start, since alerts ask for their rates.
const COUNTED_CODES: [Code; 7] = [
    Code::Ok,
    Code::Cancelled,
    Code::InvalidArgument,
    Code::DeadlineExceeded,
    Code::ResourceExhausted,
    Code::Internal,
    Code::Unavailable,
];

/// Exports the metrics of gRPC before anything is counted.
pub(crate) fn register() {
    METHODS.iter().flat_map(|(_, methods)| *methods).for_each(|method| register_method(Door::GRPC, method));
}

/// Exports the metrics of the HTTP door before anything is counted.
pub(crate) fn register_http() {
    HTTP_METHODS.iter().for_each(|(_, method)| register_method(Door::OPENAI, method));
    OPEN_INFERENCE_METHODS.iter().for_each(|method| register_method(Door::OPEN_INFERENCE, method));
}

fn register_method(door: &'static str, method: &'static str) {
    drop(histogram!(names::REQUEST_DURATION_SECONDS, names::DOOR => door, names::METHOD => method));
    for code in COUNTED_CODES.map(code_name) {
        let labels = [(names::DOOR, door), (names::METHOD, method), (names::CODE, code)];
        counter!(names::REQUESTS_TOTAL, &labels).increment(0);
    }
}

/// Counts a call that has ended.
pub(crate) fn count(outcome: Outcome<'_>) {
    if let Some(method) = method(outcome.path) {
        count_as(Door::GRPC, method, outcome.code, outcome.took, outcome.client);
    }
}

/// Counts a request of the HTTP door that has ended.
pub(crate) fn count_http(method: &'static str, code: Code, took: Duration, client: Option<&Client>) {
    let door = if OPEN_INFERENCE_METHODS.contains(&method) { Door::OPEN_INFERENCE } else { Door::OPENAI };
    count_as(door, method, code, took, client);
}

fn count_as(door: &'static str, method: &'static str, code: Code, took: Duration, client: Option<&Client>) {
    let code = code_name(code);
    let labels = [(names::DOOR, door), (names::METHOD, method), (names::CODE, code)];
    counter!(names::REQUESTS_TOTAL, &labels).increment(1);
    histogram!(names::REQUEST_DURATION_SECONDS, names::DOOR => door, names::METHOD => method).record(took);
    let client = client.map_or_else(|| "".into(), Client::label);
    counter!(names::CLIENT_REQUESTS_TOTAL, names::CLIENT => client.to_string(), names::CODE => code).increment(1);
}

/// What a request of the HTTP door is counted as, if it is.
pub(crate) fn http_method(method: &Method, path: &str) -> Option<&'static str> {
    if method != Method::POST {
        return None;
    }
    if let Some((_, ending)) = path.strip_prefix("/v2/models/").and_then(|path| path.rsplit_once('/')) {
        return OPEN_INFERENCE_METHODS.into_iter().find(|method| *method == ending);
    }
    HTTP_METHODS.into_iter().find(|(counted, _)| *counted == path).map(|(_, name)| name)
}

/// The method that a path calls, if its requests are counted.
fn method(path: &str) -> Option<&'static str> {
    METHODS.into_iter().find_map(|(service, methods)| {
        let called = path.strip_prefix(service)?;
        methods.iter().copied().find(|method| *method == called)
    })
}

/// A code as gRPC spells it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_are_counted() {
        // Would break: a caller makes metrics grow by calling what does not exist, or probes are counted as requests.
        assert_eq!(method("/sida.v1.Inference/Score"), Some("Score"));
        assert_eq!(method("/inference.GRPCInferenceService/ModelInfer"), Some("ModelInfer"));
        for other in ["/sida.v1.Inference/Model", "/sida.v1.Inference/x", "/sida.v1.Cluster/Status", "/", "Score"] {
            assert_eq!(method(other), None, "{other}");
        }
        assert_eq!(http_method(&Method::POST, "/v1/chat/completions"), Some("chat/completions"));
        assert_eq!(http_method(&Method::POST, "/v2/models/org/m/versions/1/infer"), Some("infer"));
        assert_eq!(http_method(&Method::POST, "/v2/models/m/generate"), Some("generate"));
        assert_eq!(http_method(&Method::POST, "/v2/models/m/config"), None);
        for (method, path) in [(Method::GET, "/v1/completions"), (Method::POST, "/tokenize"), (Method::POST, "/v1/x")] {
            assert_eq!(http_method(&method, path), None, "{method} {path}");
        }
    }
}
