//! An answer token by token, as its caller takes it.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use tokio::{sync::mpsc, time::Sleep};

use crate::answer::{output::Token, request_error::RequestError};

/// The tokens of a generation, those of several choices as they come. The last item of each choice carries `finish`; the
/// stream ends with that of the last choice, or with an error. Dropping it cancels the request.
pub struct TokenStream {
    /// `None` once the last item was given.
    pub(crate) tokens: Option<mpsc::UnboundedReceiver<Result<Token, RequestError>>>,
    /// Choices that have not ended.
    pub(crate) unfinished: usize,
    /// Completes when the answer is of no more use.
    pub(crate) deadline: Option<Pin<Box<Sleep>>>,
}

impl Stream for TokenStream {
    type Item = Result<Token, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(tokens) = &mut self.tokens else { return Poll::Ready(None) };
        let item = match tokens.poll_recv(cx) {
            // The scheduler ends every answer with `finish` or an error, unless a panic took it.
            Poll::Ready(item) => item.unwrap_or(Err(RequestError::Panicked)),
            Poll::Pending => match self.deadline.as_mut().map(|deadline| deadline.as_mut().poll(cx)) {
                Some(Poll::Ready(())) => Err(RequestError::DeadlineExceeded),
                Some(Poll::Pending) | None => return Poll::Pending,
            },
        };
        match &item {
            Ok(token) => self.unfinished -= usize::from(token.finish.is_some()),
            Err(_) => self.unfinished = 0,
        }
        if self.unfinished == 0 {
            self.tokens = None;
        }
        Poll::Ready(Some(item))
    }
}
