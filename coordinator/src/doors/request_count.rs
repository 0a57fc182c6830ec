//! Counts the requests of `sida.v1.Inference` by how they ended, and their time: all that came to this node, also those
//! that were refused before the service saw them.

use sida_rpc::{Client, Outcome};
use sida_telemetry::{counter, histogram, names};
use tonic::Code;

/// The service, as paths begin.
const SERVICE: &str = "/sida.v1.Inference/";
/// The methods whose requests are counted.
const METHODS: [&str; 3] = ["Generate", "Score", "Encode"];
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

/// Exports the metrics before anything is counted.
pub(crate) fn register() {
    for method in METHODS {
        drop(histogram!(names::REQUEST_DURATION_SECONDS, names::METHOD => method));
        for code in COUNTED_CODES.map(code_name) {
            counter!(names::REQUESTS_TOTAL, names::METHOD => method, names::CODE => code).increment(0);
        }
    }
}

/// Counts a call that has ended.
pub(crate) fn count(outcome: Outcome<'_>) {
    let Some(method) = method(outcome.path) else { return };
    let code = code_name(outcome.code);
    counter!(names::REQUESTS_TOTAL, names::METHOD => method, names::CODE => code).increment(1);
    histogram!(names::REQUEST_DURATION_SECONDS, names::METHOD => method).record(outcome.took);
    let client = outcome.client.map_or_else(|| "".into(), Client::label);
    counter!(names::CLIENT_REQUESTS_TOTAL, names::CLIENT => client.to_string(), names::CODE => code).increment(1);
}

/// The method that a path calls, if its requests are counted.
fn method(path: &str) -> Option<&'static str> {
    let called = path.strip_prefix(SERVICE)?;
    METHODS.into_iter().find(|method| *method == called)
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
        for other in ["/sida.v1.Inference/Model", "/sida.v1.Inference/x", "/sida.v1.Cluster/Status", "/", "Score"] {
            assert_eq!(method(other), None, "{other}");
        }
    }
}
