//! A call that ends early: with a proper gRPC status when something happens (its time is up, the node ends),
//! whether the response has begun or not. Used by [`crate::deadline`] and [`crate::drain`].
//!
//! Before the response has begun the handler is dropped and the status is the response; afterwards the
//! handler's stream is dropped and the status goes out as its trailers. Either way the handler learns of it by
//! being dropped.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::{Status, body::Body};

/// Completes with the status to end a call with. Must not complete twice.
pub(crate) type Ending = Pin<Box<dyn Future<Output = Status> + Send>>;

/// A response on its way.
pub(crate) type ResponseFuture<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

/// `response`, unless `ending` comes first; its body likewise.
pub(crate) fn ends_by<E: 'static>(
    response: impl Future<Output = Result<Response<Body>, E>> + Send + 'static,
    mut ending: Ending,
) -> ResponseFuture<E> {
    Box::pin(async move {
        tokio::select! {
            // An answer that is there already is worth more than its being late by a moment.
            biased;
            response = response => Ok(response?.map(|inner| {
                Body::new(EndingBody { open: (!inner.is_end_stream()).then_some((inner, ending)) })
            })),
            status = &mut ending => Ok(status.into_http()),
        }
    })
}

/// A response body that ends by its [`Ending`].
struct EndingBody {
    /// `None` once the last frame is out.
    open: Option<(Body, Ending)>,
}

impl HttpBody for EndingBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let Some((inner, ending)) = &mut self.open else { return Poll::Ready(None) };
        match Pin::new(inner).poll_frame(cx) {
            Poll::Ready(None) => {
                self.open = None;
                Poll::Ready(None)
            }
            Poll::Ready(frame) => Poll::Ready(frame),
            Poll::Pending => match ending.as_mut().poll(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(status) => {
                    self.open = None;
                    Poll::Ready(Some(trailers(status)))
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.open.as_ref().is_none_or(|(inner, _)| inner.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        // The trailers may come at any time, so nothing is promised.
        SizeHint::default()
    }
}

fn trailers(status: Status) -> Result<Frame<Bytes>, Status> {
    let mut headers = HeaderMap::new();
    status.add_header(&mut headers)?;
    Ok(Frame::trailers(headers))
}
