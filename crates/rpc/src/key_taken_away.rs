//! Ends calls whose key was taken out of the file of keys while they were open, by UNAUTHENTICATED: who may not call may not
//! have the rest of an answer either. Put in place by [`crate::server`], within what lets calls in.

use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::{
    authentication::KeyTakenAway,
    ending::{Ending, ResponseFuture, ends_by},
};

/// Makes [`KeyTakenAwayService`]s.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KeyTakenAwayLayer;

/// Ends calls that have no key any more.
#[derive(Clone, Debug)]
pub(crate) struct KeyTakenAwayService<S> {
    inner: S,
}

impl<S> Layer<S> for KeyTakenAwayLayer {
    type Service = KeyTakenAwayService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        KeyTakenAwayService { inner }
    }
}

impl<S> Service<Request<Body>> for KeyTakenAwayService<S>
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
        let Some(event) = request.extensions().get::<KeyTakenAway>().cloned() else {
            return Box::pin(self.inner.call(request));
        };
        let ending = async move {
            event.happens().await;
            Status::from(event.fault())
        };
        ends_by(self.inner.call(request), Box::pin(ending) as Ending)
    }
}
