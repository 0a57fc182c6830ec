//! What tonic refuses before any handler sees it, in words of ours and with a [`Reason`]. A message that cannot be read is its
//! caller's mistake, but tonic says INTERNAL, which elsewhere says that something is wrong with the node; and of a method that
//! is not served it says nothing. Put in place by [`crate::server`].
//!
//! Such a refusal is told apart by having no details: whatever our own handlers say carries a reason.

use http::Request;
use tonic::{Code, Status, body::Body};

use crate::{
    around::Within,
    ending::ResponseFuture,
    status::{Fault, Reason},
};

/// Says why a call was refused.
pub(crate) fn explained<S: Within>(inner: &mut S, request: Request<Body>) -> ResponseFuture<S::Error> {
    let called = request.uri().clone();
    let response = inner.call(request);
    Box::pin(async move {
        let response = response.await?;
        // A response that has a status among its headers has no messages.
        match Status::from_header_map(response.headers()).and_then(|status| fault(&status, called.path())) {
            Some(fault) => Ok(Status::from(fault).into_http()),
            None => Ok(response),
        }
    })
}

/// What is said instead of `status`, if tonic refused the call of `path` for what we say better.
fn fault(status: &Status, path: &str) -> Option<Fault> {
    let message = status.message();
    match status.code() {
        _ if !status.details().is_empty() => None,
        Code::Internal => Some(Fault::new(Reason::MalformedMessage, format!("the request cannot be read: {message}"))),
        Code::Unimplemented if message.is_empty() => {
            Some(Fault::new(Reason::Unsupported, format!("this node does not serve {path}")))
        }
        // Such as a compression that is not taken.
        Code::Unimplemented => Some(Fault::new(Reason::Unsupported, message)),
        _ => None,
    }
}
