//! A response that tells somebody of the call's status, wherever that stands: among the headers of a refusal, or in the
//! trailers after the last message. Used by [`crate::trace`] and [`crate::outcome`].

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{Code, Status, body::Body};

/// Metadata key of a call's status.
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Is told of a call's status, and dropped when the response is sent or nobody takes it any more.
pub(crate) trait Watcher: Send + Unpin + 'static {
    fn ended_with(&mut self, code: Code);
}

/// `response`, of whose status `watcher` is told.
pub(crate) fn watched(response: Response<Body>, mut watcher: impl Watcher) -> Response<Body> {
    tell(&mut watcher, response.headers());
    response.map(|inner| Body::new(WatchedBody { inner, watcher }))
}

fn tell(watcher: &mut impl Watcher, headers: &HeaderMap) {
    let code = headers.get(&GRPC_STATUS).and_then(|value| value.to_str().ok()?.parse::<i32>().ok());
    if let Some(code) = code {
        watcher.ended_with(Code::from_i32(code));
    }
}

struct WatchedBody<W> {
    inner: Body,
    watcher: W,
}

impl<W: Watcher> HttpBody for WatchedBody<W> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            tell(&mut self.watcher, trailers);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
