//! Ends calls whose key was taken out of the file of keys while they were open, by UNAUTHENTICATED: who may not call may not
//! have the rest of an answer either. Put in place by [`crate::server`], within what lets calls in.

use http::Request;
use tonic::{Status, body::Body};

use crate::{
    around::Within,
    authentication::KeyTakenAway,
    ending::{Ending, ResponseFuture, ends_by},
};

/// Ends calls that have no key any more.
pub(crate) fn ended_without_key<S: Within>(inner: &mut S, request: Request<Body>) -> ResponseFuture<S::Error> {
    let Some(event) = request.extensions().get::<KeyTakenAway>().cloned() else {
        return Box::pin(inner.call(request));
    };
    let ending = async move {
        event.happens().await;
        Status::from(event.fault())
    };
    ends_by(inner.call(request), Box::pin(ending) as Ending)
}
