//! The end of a node. After shutdown the calls in flight may finish, but not for ever: at the drain limit this
//! layer ends what is left with UNAVAILABLE, which tells the caller to try another node; without it the
//! connection would break under the call. Put in place by [`crate::server`].

use std::task::{Context, Poll};

use http::{Request, Response};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use crate::{
    ending::{Ending, ResponseFuture, ends_by},
    status::{Fault, Reason},
};

/// Services whose streams only watch this node and never end by themselves: nothing is lost when they end at
/// shutdown, and waiting for them would make every drain take its whole limit.
const WATCHERS: [&str; 2] = ["/grpc.health.", "/grpc.reflection."];

/// Makes [`DrainService`]s.
#[derive(Clone, Debug)]
pub struct DrainLayer {
    /// Cancelled at shutdown, after health said NOT_SERVING.
    pub shutdown: CancellationToken,
    /// Cancelled at the drain limit.
    pub limit: CancellationToken,
}

/// Ends calls that outlive the drain.
#[derive(Clone, Debug)]
pub struct DrainService<S> {
    inner: S,
    tokens: DrainLayer,
}

impl<S> Layer<S> for DrainLayer {
    type Service = DrainService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        DrainService { inner, tokens: self.clone() }
    }
}

impl<S> Service<Request<Body>> for DrainService<S>
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
        let watches = WATCHERS.iter().any(|watcher| request.uri().path().starts_with(watcher));
        let end = if watches { self.tokens.shutdown.clone() } else { self.tokens.limit.clone() };
        let ending = async move {
            end.cancelled().await;
            Status::from(Fault::new(Reason::ShuttingDown, "this node is shutting down"))
        };
        ends_by(self.inner.call(request), Box::pin(ending) as Ending)
    }
}
