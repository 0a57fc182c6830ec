//! A request whose message cannot be read is its caller's mistake, and is refused as one. tonic refuses it before any
//! handler sees it, with INTERNAL, which elsewhere says that something is wrong with the node. Put in place by
//! [`crate::server`].
//!
//! Such a refusal is told apart by having no details: whatever our own handlers say carries a [`Reason`].

use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use crate::{
    ending::ResponseFuture,
    status::{Fault, Reason},
};

/// Makes [`UnreadableService`]s.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UnreadableLayer;

/// Says whose mistake an unreadable message is.
#[derive(Clone, Debug)]
pub(crate) struct UnreadableService<S> {
    inner: S,
}

impl<S> Layer<S> for UnreadableLayer {
    type Service = UnreadableService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        UnreadableService { inner }
    }
}

impl<S> Service<Request<Body>> for UnreadableService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let response = self.inner.call(request);
        Box::pin(async {
            let response = response.await?;
            // A response that has a status among its headers has no messages.
            match Status::from_header_map(response.headers()).and_then(|status| fault(&status)) {
                Some(fault) => Ok(Status::from(fault).into_http()),
                None => Ok(response),
            }
        })
    }
}

/// What is said instead of `status`, if that is a refusal of a message that cannot be read.
fn fault(status: &Status) -> Option<Fault> {
    let is_unreadable = status.code() == Code::Internal && status.details().is_empty();
    is_unreadable
        .then(|| Fault::new(Reason::MalformedMessage, format!("the request cannot be read: {}", status.message())))
}
