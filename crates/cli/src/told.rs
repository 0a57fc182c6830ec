//! Errors as a person reads them: with every cause, on one line. Used by `main`, and by commands that go on after an error.

use std::{error::Error, fmt, io};

use sida_rpc::ClientError;
use tonic::Status;

/// Words by which an error speaks of TLS.
const OF_TLS: [&str; 4] = ["tls", "ssl", "certificate", "handshake"];

/// An error and its causes.
pub(crate) fn told(error: &anyhow::Error) -> String {
    joined(String::new(), error.chain())
}

/// A status, and what lies at the bottom of it: what the connection said, such as that a certificate is missing.
pub(crate) fn told_status(status: &Status) -> String {
    let causes = std::iter::successors(status.source(), |&cause| cause.source());
    joined(status.message().to_owned(), causes.last().into_iter())
}

/// The context of an error of the first call on a connection.
#[derive(Debug)]
pub(crate) struct FirstCall;

impl fmt::Display for FirstCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the first call on the connection failed")
    }
}

/// Whether the answer was one of HTTP for people or browsers: the first byte of a message of gRPC says how it is compressed.
pub(crate) fn may_be_of_http(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Status>().is_some_and(|status| status.message().contains("invalid compression flag"))
}

/// Whether the ends of a connection may not agree on TLS: the error speaks of it; or the connection broke at its first call,
/// which is all that a client without TLS sees of a server with it; or while it was made, which a client with TLS sees of a server
/// without.
pub(crate) fn may_be_of_tls(error: &anyhow::Error) -> bool {
    if let Some(ClientError::Connect { address, error }) = error.downcast_ref() {
        return address.starts_with("https://") && !is_of_nobody(error);
    }
    let Some(status) = error.downcast_ref::<Status>() else { return false };
    let told = told_status(status).to_lowercase();
    let broke = status.source().is_some();
    OF_TLS.iter().any(|word| told.contains(word)) || (broke && error.downcast_ref::<FirstCall>().is_some())
}

/// Whether nobody took the connection.
fn is_of_nobody(error: &(dyn Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |&cause| cause.source());
    causes.any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    })
}

/// What came before, and what each cause adds. Many errors tell their cause themselves; it is not told twice.
fn joined<'a>(told: String, causes: impl Iterator<Item = &'a (dyn Error + 'static)>) -> String {
    causes.fold(told, |told, cause| {
        let cause = cause.to_string();
        match told.as_str() {
            "" => cause,
            earlier if earlier.contains(&cause) => told,
            _ => format!("{told}: {cause}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        // Broken: an error would repeat itself, or its cause would be lost.
        let denied = || io::Error::other("permission denied");
        let error = anyhow::Error::new(denied()).context("cannot read config.json: permission denied");
        assert_eq!(told(&error), "cannot read config.json: permission denied");
        assert_eq!(told(&anyhow::Error::new(denied()).context("model m")), "model m: permission denied");
        let mut status = Status::unavailable("error trying to connect");
        status.set_source(std::sync::Arc::new(denied()));
        assert_eq!(told_status(&status), "error trying to connect: permission denied");
    }

    #[test]
    fn tls_is_spoken_of_where_it_may_be_the_cause() {
        // Broken: whoever asks a coordinator that ended would look for certificates, or whoever forgot https:// for a bug.
        let broken = |cause: &str| {
            let mut status = Status::unknown("transport error");
            status.set_source(std::sync::Arc::new(io::Error::other(cause.to_owned())));
            anyhow::Error::new(status)
        };
        assert!(may_be_of_tls(&broken("received fatal alert: CertificateRequired")));
        assert!(!may_be_of_tls(&broken("Connection refused (os error 111)")));
        assert!(!may_be_of_tls(&broken("stream closed because of a broken pipe")));
        assert!(may_be_of_tls(&broken("stream closed because of a broken pipe").context(FirstCall)));
        assert!(!may_be_of_tls(&anyhow::Error::new(Status::unavailable("no expert-node")).context(FirstCall)));
    }
}
