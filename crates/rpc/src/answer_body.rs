//! The body of an answer, on its way to a peer who may take it slowly, or not at all. It goes out in pieces, and a
//! piece that is not taken in time ends the answer: HTTP/2 lets a peer answer pings and take nothing for ever, while
//! the answer lies in memory and its connection has a call. Put around every answer by [`crate::connection`].
//!
//! Whoever writes to a connection asks a body for more when it has room for more. So a peer is slow from when a piece was
//! handed out until the next is asked for, and not while the body itself waits for what is computed.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::rt::Executor;
use tokio::time::{self, Sleep};
use tonic::{Status, body::Body};

use crate::peer::OpenCall;

/// Bytes of a piece. Large, as what nodes send each other; a peer that takes it whole just in time takes 2 KiB a second.
const PIECE_BYTES: usize = 128 << 10;

tokio::task_local! {
    /// How far the answer is that this task sends.
    static PROGRESS: Arc<Progress>;
}

/// How often a body was asked for more, and handed something out. While the second is behind the first, or nothing was
/// asked yet, nobody waits for the peer.
#[derive(Debug, Default)]
struct Progress {
    asked: AtomicU64,
    /// `asked` as it was when a piece was handed out; 0 before.
    handed_out: AtomicU64,
}

impl Progress {
    fn ask(&self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
    }

    fn hand_out(&self) {
        self.handed_out.store(self.asked.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// The piece, by number, that the peer has not taken.
    fn untaken(&self) -> Option<u64> {
        let handed_out = self.handed_out.load(Ordering::Relaxed);
        (handed_out > 0 && handed_out == self.asked.load(Ordering::Relaxed)).then_some(handed_out)
    }
}

/// Runs the tasks that send HTTP/2's answers, and ends one whose peer takes nothing for `stall_timeout`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AnswerExecutor {
    pub(crate) stall_timeout: Duration,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for AnswerExecutor {
    fn execute(&self, future: F) {
        let (progress, stall_timeout) = (Arc::default(), self.stall_timeout);
        tokio::spawn(Sending { future: Box::pin(future), progress, stall_timeout, stalled: None });
    }
}

/// Sends one answer.
struct Sending<F> {
    future: Pin<Box<F>>,
    progress: Arc<Progress>,
    stall_timeout: Duration,
    /// The piece that the peer has not taken, and how long it may lie.
    stalled: Option<(u64, Pin<Box<Sleep>>)>,
}

impl<F: Future<Output = ()>> Future for Sending<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let future = this.future.as_mut();
        if PROGRESS.sync_scope(this.progress.clone(), || future.poll(cx)).is_ready() {
            return Poll::Ready(());
        }
        let Some(piece) = this.progress.untaken() else {
            this.stalled = None;
            return Poll::Pending;
        };
        if this.stalled.as_ref().is_none_or(|(stalled, _)| *stalled != piece) {
            this.stalled = Some((piece, Box::pin(time::sleep(this.stall_timeout))));
        }
        let is_over = this.stalled.as_mut().is_some_and(|(_, limit)| limit.as_mut().poll(cx).is_ready());
        if !is_over {
            return Poll::Pending;
        }
        // Dropping what sends it resets its stream. Other calls of the connection go on.
        tracing::debug!(limit = ?this.stall_timeout, "an answer is given up: its peer takes nothing of it");
        Poll::Ready(())
    }
}

/// A body that goes out in pieces, while which the call is open.
pub(crate) struct AnswerBody {
    inner: Body,
    /// What is left of a frame that was too large for one piece.
    rest: Bytes,
    call: OpenCall,
}

impl AnswerBody {
    /// `inner` as the answer to `call`.
    pub(crate) fn new(inner: Body, mut call: OpenCall) -> Self {
        call.is_answered = inner.is_end_stream();
        Self { inner, rest: Bytes::new(), call }
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.rest.is_empty() {
            match std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx)).transpose()? {
                None => return Poll::Ready(None),
                Some(frame) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
            }
        }
        let piece = self.rest.split_to(self.rest.len().min(PIECE_BYTES));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        // There is none where HTTP/1.1 is spoken, of whose connection the writing is watched.
        let _ = PROGRESS.try_with(|progress| progress.ask());
        let piece = self.poll_piece(cx);
        match &piece {
            Poll::Ready(Some(Ok(frame))) if frame.is_data() => {
                let _ = PROGRESS.try_with(|progress| progress.hand_out());
                self.call.hands_out(frame.data_ref().map_or(0, Bytes::len));
                self.call.is_answered = self.is_end_stream();
            }
            Poll::Ready(_) => self.call.is_answered = true,
            Poll::Pending => {}
        }
        piece
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (inner, rest) = (self.inner.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + rest);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use http_body_util::{BodyExt, Full};
    use tokio::sync::oneshot;

    use super::*;
    use crate::peer::Peer;

    const LIMIT: Duration = Duration::from_millis(50);

    fn answer(bytes: Bytes) -> (AnswerBody, Arc<Peer>) {
        let peer = Arc::new(Peer::new(IpAddr::from([127, 0, 0, 1]).into(), Arc::default()));
        let inner = Body::new(Full::new(bytes).map_err(|never| match never {}));
        (AnswerBody::new(inner, peer.call()), peer)
    }

    #[tokio::test]
    async fn an_answer_is_whole_in_pieces() {
        // Would break: a large answer loses its order or its end, or is handed out at once, so that nobody sees whether
        // it is taken.
        let bytes: Bytes = (0..3 * PIECE_BYTES + 5).map(|byte| byte as u8).collect();
        let (mut body, peer) = answer(bytes.clone());
        assert_eq!(body.size_hint().exact(), Some(bytes.len() as u64));
        let mut found = Vec::new();
        for left in [3, 2, 1, 0] {
            assert!(!body.is_end_stream());
            let piece = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert!(
                piece.len() <= PIECE_BYTES
                    && body.size_hint().exact() == Some((bytes.len() - found.len() - piece.len()) as u64)
            );
            found.extend_from_slice(&piece);
            assert_eq!(body.is_end_stream(), left == 0);
        }
        assert!(found == bytes && peer.seen(time::Instant::now()).is_busy);
        drop(body);
        assert!(!peer.seen(time::Instant::now()).is_busy);
    }

    #[tokio::test]
    async fn an_answer_that_nobody_takes_is_given_up() {
        // Would break: a peer that answers pings and reads nothing holds an answer in memory, and its place, for ever.
        let started = time::Instant::now();
        let (mut body, peer) = answer(vec![0; 3 * PIECE_BYTES].into());
        AnswerExecutor { stall_timeout: LIMIT }.execute(async move {
            body.frame().await.unwrap().unwrap();
            std::future::pending().await
        });
        time::timeout(Duration::from_secs(60), peer.quiet_for(Duration::ZERO, started)).await.expect("it is given up");
        assert!(started.elapsed() >= LIMIT);
    }

    #[tokio::test]
    async fn an_answer_that_is_computed_slowly_is_not_given_up() {
        // Would break: a client that waits for a long prompt loses its answer.
        let peer = Arc::new(Peer::new(IpAddr::from([127, 0, 0, 1]).into(), Arc::default()));
        let frames = futures::stream::unfold(0, |frame| async move {
            time::sleep(3 * LIMIT).await;
            (frame < 3).then_some((Ok::<_, Status>(Frame::data(Bytes::from_static(b"x"))), frame + 1))
        });
        let mut body = AnswerBody::new(Body::new(http_body_util::StreamBody::new(frames)), peer.call());
        let (whole, is_whole) = oneshot::channel();
        AnswerExecutor { stall_timeout: LIMIT }.execute(async move {
            let mut frames = 0;
            while let Some(frame) = body.frame().await {
                frames += frame.map_or(0, |_| 1);
            }
            let _ = whole.send(frames);
        });
        assert_eq!(is_whole.await, Ok(3));
    }

    #[test]
    fn a_piece_is_untaken_until_the_next_is_asked_for() {
        // Would break: a peer is blamed for what is not computed yet, or never.
        let progress = Progress::default();
        assert_eq!(progress.untaken(), None);
        progress.ask();
        assert_eq!(progress.untaken(), None, "nothing was there");
        progress.ask();
        progress.hand_out();
        assert_eq!(progress.untaken(), Some(2));
        progress.ask();
        progress.hand_out();
        assert_eq!(progress.untaken(), Some(3), "another piece has a limit of its own");
        progress.ask();
        assert_eq!(progress.untaken(), None);
    }
}
