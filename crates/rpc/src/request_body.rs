//! The body of a request, from a peer who may send it slowly: as long as one waits for it, there is a limit, and its
//! memory counts as soon as it is announced. Large ones come at a pace. What counts as slow is the time in which nothing is there to be read
//! although somebody wants to read, so that a node which is busy blames nobody. Put around every request by
//! [`crate::connection`].
//!
//! A stream of gRPC messages may be silent between two of them for as long as it likes, and each has the limit for
//! itself. Its messages are told apart by the five bytes before each: whether it is compressed, and its length.

use std::{
    error::Error,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{self, Instant, Sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Status;

use crate::{
    receiving::{LARGE_BYTES, Share},
    server::MESSAGE_BYTES_MAX,
    status::{Fault, Reason},
};

/// Bytes before each message of gRPC; the last four are its length.
const HEAD_BYTES: usize = 5;

/// What a body is to its reader, who keeps all of a unit until it is whole.
#[derive(Debug)]
pub(crate) enum Unit {
    /// One request.
    Body { bytes: usize },
    /// One request, a message of gRPC.
    Message(Messages),
    /// Any number of messages of gRPC.
    Messages(Messages),
}

impl Unit {
    /// Whether what comes next belongs to what has begun.
    fn has_begun(&self) -> bool {
        match self {
            Self::Body { .. } | Self::Message(_) => true,
            Self::Messages(messages) => messages.head_bytes > 0,
        }
    }

    /// Bytes that its reader keeps, or makes room for.
    fn bytes(&self) -> usize {
        match self {
            Self::Body { bytes } => *bytes,
            Self::Message(messages) | Self::Messages(messages) => messages.announced.min(MESSAGE_BYTES_MAX),
        }
    }

    fn read(&mut self, data: &[u8]) {
        match self {
            Self::Body { bytes } => *bytes += data.len(),
            Self::Message(messages) | Self::Messages(messages) => messages.read(data),
        }
    }
}

/// Where in a stream of messages its reader is.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    head: [u8; HEAD_BYTES],
    /// How much of a head has come.
    head_bytes: usize,
    /// The length of the message behind a whole head.
    announced: usize,
    /// What is missing of it.
    missing: usize,
}

impl Messages {
    fn read(&mut self, mut bytes: &[u8]) {
        while bytes.has_remaining() {
            if self.head_bytes < HEAD_BYTES {
                self.head[self.head_bytes] = bytes.get_u8();
                self.head_bytes += 1;
                if self.head_bytes == HEAD_BYTES {
                    let [_, length @ ..] = self.head;
                    self.announced = u32::from_be_bytes(length) as usize;
                    self.missing = self.announced;
                }
            } else {
                let read = bytes.len().min(self.missing);
                bytes.advance(read);
                self.missing -= read;
            }
            if self.head_bytes == HEAD_BYTES && self.missing == 0 {
                (self.head_bytes, self.announced) = (0, 0);
            }
        }
    }
}

/// A body that ends with an error when its peer is late, or when others need the memory that it takes.
pub(crate) struct RequestBody<B = Incoming> {
    inner: B,
    unit: Unit,
    limit: Duration,
    /// What is left of the limit.
    patience: Duration,
    share: Share,
    waiting: Option<Waiting>,
    /// Bytes of a unit that have come.
    came: usize,
    /// While others have their turn, whose requests are as large.
    pausing: Option<Pin<Box<Sleep>>>,
}

/// While nothing is there to be read.
struct Waiting {
    since: Instant,
    late: Pin<Box<Sleep>>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<B> RequestBody<B> {
    /// `inner`, of which each `unit` has to come within `limit` and takes its `share` of memory.
    pub(crate) fn new(inner: B, unit: Unit, limit: Duration, share: Share) -> Self {
        Self { inner, unit, limit, patience: limit, share, waiting: None, came: 0, pausing: None }
    }

    fn read(&mut self, data: &[u8]) {
        self.unit.read(data);
        self.share.takes(self.unit.bytes());
        self.came += data.len();
        if self.came > LARGE_BYTES {
            self.pausing = self.share.comes(data.len()).map(|until| Box::pin(time::sleep_until(until)));
        }
        // The next has a limit of its own.
        if !self.unit.has_begun() {
            self.patience = self.limit;
            self.came = 0;
        }
    }

    /// Whether it has to end, and why, while it waits for more.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        let (patience, share) = (self.patience, &self.share);
        let waiting = self.waiting.get_or_insert_with(|| Waiting {
            since: Instant::now(),
            late: Box::pin(time::sleep(patience)),
            ended: Box::pin(share.ended.clone().cancelled_owned()),
        });
        if waiting.ended.as_mut().poll(cx).is_ready() {
            return Poll::Ready(crowded_out());
        }
        if self.unit.has_begun() && waiting.late.as_mut().poll(cx).is_ready() {
            let message = format!("the request did not come within {:?}", self.limit);
            return Poll::Ready(Fault::new(Reason::DeadlineExceeded, message));
        }
        Poll::Pending
    }
}

fn crowded_out() -> Fault {
    Fault::new(Reason::QueueFull, "too much is being received, of which this request is the largest part")
}

impl<B> HttpBody for RequestBody<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Some(pausing) = &mut self.pausing {
            ready!(pausing.as_mut().poll(cx));
            self.pausing = None;
        }
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) {
            if let Some(Waiting { since, .. }) = self.waiting.take() {
                self.patience = self.patience.saturating_sub(since.elapsed());
            }
            if let Some(Ok(frame)) = &frame
                && let Some(data) = frame.data_ref()
            {
                self.read(data);
                if self.share.ended.is_cancelled() {
                    return Poll::Ready(Some(Err(refusal(crowded_out()))));
                }
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        self.poll_end(cx).map(|fault| Some(Err(refusal(fault))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// `fault` as an error that gRPC sends as its status, and in which [`why_unread`] finds it.
fn refusal(fault: Fault) -> Box<dyn Error + Send + Sync> {
    let mut status = Status::from(fault.clone());
    status.set_source(Arc::new(fault));
    status.into()
}

/// Why the server did not read a request to its end, if `error`, met while it was read, says that.
pub fn why_unread<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Fault> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(fault) = error.downcast_ref() {
            return Some(fault);
        }
        cause = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::{Stream, StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody};

    use super::*;
    use crate::receiving::Receiving;

    /// So long that a machine that stands still for a moment makes nobody late.
    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(40);

    type Bytewise = StreamBody<Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, Infallible>> + Send>>>;

    /// Each part after `pause`; `None` never comes.
    fn slow(pause: Duration, parts: Vec<Option<&'static [u8]>>) -> Bytewise {
        let frames = stream::iter(parts).then(move |part| async move {
            time::sleep(pause).await;
            match part {
                Some(bytes) => Ok(Frame::data(Bytes::from_static(bytes))),
                None => std::future::pending().await,
            }
        });
        StreamBody::new(Box::pin(frames))
    }

    fn stream() -> Unit {
        Unit::Messages(Messages::default())
    }

    /// How many bytes come before the end, or before it is late.
    async fn read(inner: Bytewise, unit: Unit, limit: Duration) -> Result<usize, usize> {
        let share = Receiving::new(usize::MAX, None).share();
        let (mut body, mut bytes) = (RequestBody::new(inner, unit, limit, share), 0);
        while let Some(frame) = time::timeout(LONG, body.frame()).await.expect("it ends") {
            match frame {
                Ok(frame) => bytes += frame.data_ref().unwrap().len(),
                Err(error) => {
                    assert_eq!(why_unread(&*error).map(Fault::reason), Some(Reason::DeadlineExceeded), "{error}");
                    return Err(bytes);
                }
            }
        }
        Ok(bytes)
    }

    #[tokio::test]
    async fn a_body_comes_in_time_or_is_late() {
        // Would break: whoever sends a byte now and then holds a call, and its place, for ever; or an upload is cut off
        // that comes in time.
        let bytewise = |bytes| slow(SHORT, vec![Some(&b"a"[..]); bytes]);
        assert_eq!(read(bytewise(3), Unit::Body { bytes: 0 }, LONG).await, Ok(3));
        let came = read(bytewise(1000), Unit::Body { bytes: 0 }, 5 * SHORT).await.unwrap_err();
        assert!(came <= 5, "the limit is for all of it, {came} bytes came");
        assert_eq!(read(slow(Duration::ZERO, vec![None]), Unit::Body { bytes: 0 }, SHORT).await, Err(0));
    }

    #[tokio::test]
    async fn a_stream_may_be_silent_between_messages_and_not_within_one() {
        // Would break: a lane that has nothing to send for a minute ends, or one that stops within a message never does.
        let message = Some(&b"\0\0\0\0\x02ab"[..]);
        assert_eq!(read(slow(5 * SHORT, vec![message; 3]), stream(), SHORT).await, Ok(21));
        let halves = vec![Some(&b"\0\0\0"[..]), Some(b"\0\x02ab"), Some(b"\0\0\0\0\0")];
        assert_eq!(read(slow(SHORT, halves), stream(), LONG).await, Ok(12));
        for (begun, came) in [(&b"\0"[..], 8), (b"\0\0\0\0\x02ab\0\0\0\0\x02a", 20), (b"\x01\xff\xff\xff\xff", 12)] {
            let parts = slow(Duration::ZERO, vec![message, Some(begun), None]);
            assert_eq!(read(parts, stream(), SHORT).await, Err(came), "{begun:?}");
        }
    }

    #[tokio::test]
    async fn who_reads_late_blames_nobody() {
        // Would break: a node that is busy for a minute refuses what its peers sent long ago.
        let parts = slow(Duration::ZERO, vec![Some(b"a"); 2]);
        let mut body = RequestBody::new(parts, Unit::Body { bytes: 0 }, SHORT, Receiving::new(0, None).share());
        for _ in 0..2 {
            time::sleep(5 * SHORT).await;
            assert!(body.frame().await.unwrap().is_ok());
        }
    }

    #[tokio::test]
    async fn large_requests_come_at_a_pace_and_small_ones_as_they_are_sent() {
        // Would break: many large requests keep all others from the processors, or every request waits for them.
        const PART: &[u8] = &[0; LARGE_BYTES / 4];
        let worth = 5 * SHORT;
        let receiving = Receiving::new(usize::MAX, Some((LARGE_BYTES as f64 / worth.as_secs_f64()) as u32));
        let takes = async |parts| {
            let (begun, mut pauses) = (Instant::now(), 0);
            let parts = slow(Duration::ZERO, vec![Some(PART); parts]);
            let mut body = RequestBody::new(parts, Unit::Body { bytes: 0 }, LONG, receiving.share());
            while let Some(frame) = body.frame().await {
                frame.expect("it waits no time for its peer");
                pauses += usize::from(body.pausing.is_some());
            }
            (begun.elapsed(), pauses)
        };
        assert_eq!(takes(4).await.1, 0, "it is small");
        let (alone, pauses) = takes(12).await;
        assert!(alone > worth && pauses == 8, "two more times as much: {alone:?}, {pauses}");
        let ((one, _), (other, _)) = tokio::join!(takes(8), takes(8));
        assert!(one.max(other) > worth, "{one:?} and {other:?}");
    }

    #[tokio::test]
    async fn what_is_announced_counts_before_it_comes() {
        // Would break: heads of five bytes, each of which makes its reader take 64 MiB, fill all memory; or who is
        // crowded out by others waits on.
        const MIB: usize = 1 << 20;
        let receiving = Receiving::new(3 * MIB, None);
        let large = slow(Duration::ZERO, vec![Some(b"\0\0\x20\0\0"), None]);
        let mut large = RequestBody::new(large, Unit::Message(Messages::default()), LONG, receiving.share());
        assert!(large.frame().await.unwrap().is_ok());
        let mut other = receiving.share();
        other.takes(3 * MIB / 2);
        let error = time::timeout(LONG, large.frame()).await.expect("it ends").unwrap().unwrap_err();
        assert_eq!(why_unread(&*error).map(Fault::reason), Some(Reason::QueueFull), "{error}");
        let status = error.downcast::<Status>().unwrap();
        assert_eq!((Reason::of(&status), other.ended.is_cancelled()), (Some(Reason::QueueFull), false));
        let whole = slow(Duration::ZERO, vec![Some(b"\0\0\0\0\x01a"), Some(b"\0\0\0\x01\0"), None]);
        let mut whole = RequestBody::new(whole, stream(), LONG, receiving.share());
        for announced in [0, 256] {
            whole.frame().await.unwrap().unwrap();
            assert_eq!(whole.unit.bytes(), announced, "a message that is whole is its handler's");
        }
    }
}
