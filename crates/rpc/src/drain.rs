//! The end of a node. After shutdown the calls in flight may finish, but not for ever: at the drain limit this
//! layer ends what is left with UNAVAILABLE, which tells the caller to try another node; without it the
//! connection would break under the call. Put in place by [`crate::server`].

use http::Request;
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body};

use crate::{
    around::Within,
    ending::{Ending, ResponseFuture, ends_by},
    status::{Fault, Reason},
};

/// Services whose streams only watch this node and never end by themselves: nothing is lost when they end at
/// shutdown, and waiting for them would make every drain take its whole limit.
const WATCHERS: [&str; 2] = ["/grpc.health.", "/grpc.reflection."];

/// When calls have to end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drain {
    /// Cancelled at shutdown, after health said NOT_SERVING.
    pub(crate) shutdown: CancellationToken,
    /// Cancelled at the drain limit.
    pub(crate) limit: CancellationToken,
}

impl Drain {
    /// Ends a call that outlives the drain.
    pub(crate) fn ended<S: Within>(&self, inner: &mut S, request: Request<Body>) -> ResponseFuture<S::Error> {
        let watches = WATCHERS.iter().any(|watcher| request.uri().path().starts_with(watcher));
        let end = if watches { self.shutdown.clone() } else { self.limit.clone() };
        let ending = async move {
            end.cancelled().await;
            Status::from(Fault::new(Reason::ShuttingDown, "this node is shutting down"))
        };
        ends_by(inner.call(request), Box::pin(ending) as Ending)
    }
}
