//! A layer that is a function: what is done around a call, of what is within and the request. Used by [`crate::server`] and
//! [`crate::http_server`].

use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service};

use crate::ending::ResponseFuture;

/// What can be within such a layer.
pub(crate) trait Within:
    Service<Request<Body>, Response = Response<Body>, Future: Send + 'static, Error: Send + 'static>
{
}

impl<S> Within for S where
    S: Service<Request<Body>, Response = Response<Body>, Future: Send + 'static, Error: Send + 'static>
{
}

/// Puts a function around what is within.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Around<F>(pub(crate) F);

/// What is within, and the function around it.
#[derive(Clone, Debug)]
pub(crate) struct AroundService<S, F> {
    inner: S,
    around: F,
}

impl<S, F: Clone> Layer<S> for Around<F> {
    type Service = AroundService<S, F>;

    fn layer(&self, inner: S) -> Self::Service {
        AroundService { inner, around: self.0.clone() }
    }
}

impl<S, F> Service<Request<Body>> for AroundService<S, F>
where
    S: Within,
    F: Fn(&mut S, Request<Body>) -> ResponseFuture<S::Error>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        (self.around)(&mut self.inner, request)
    }
}
