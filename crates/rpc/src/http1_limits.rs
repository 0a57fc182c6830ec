//! How long an HTTP/1.1 peer may take: for the head of a request from its first byte, and for taking any byte of an answer.
//! hyper's own limit on heads would count the wait for the next request, too, which may be long on a connection that is kept;
//! and HTTP/2's pings, which find peers that are gone, do not exist here. Put around a connection by [`crate::connection`]; bytes
//! are read and written by turns.

use std::{
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
    time::{self, Instant, Sleep},
};

use crate::{peer::Peer, turn::Turn};

/// A connection that notes when a head begins, and ends when its peer takes nothing.
pub(crate) struct Watched<IO> {
    io: IO,
    peer: Arc<Peer>,
    /// When the first byte came since the last call ended.
    head_since: watch::Sender<Option<Instant>>,
    /// Runs while the peer takes nothing of what is to be sent.
    stalled: Option<Pin<Box<Sleep>>>,
    stall_limit: Duration,
    turn: Turn,
}

/// Tells of heads that take too long.
pub(crate) struct Heads {
    since: watch::Receiver<Option<Instant>>,
    peer: Arc<Peer>,
}

/// `io`, whose peer may leave bytes that are to be sent lie for `stall_limit`.
pub(crate) fn watched<IO>(io: IO, peer: Arc<Peer>, turn: Turn, stall_limit: Duration) -> (Watched<IO>, Heads) {
    // The peer has begun to speak: so it was told apart from one that speaks HTTP/2.
    let (head_since, since) = watch::channel(Some(Instant::now()));
    (Watched { io, peer: peer.clone(), head_since, stalled: None, stall_limit, turn }, Heads { since, peer })
}

impl Heads {
    /// Waits until a head has been coming for longer than `limit`.
    pub(crate) async fn too_slow(mut self, limit: Duration) {
        loop {
            let begun = *self.since.borrow_and_update();
            let late = async {
                match begun {
                    Some(begun) if self.is_coming(begun) => {
                        time::sleep_until(begun + limit).await;
                        if !self.is_coming(begun) {
                            std::future::pending().await
                        }
                    }
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                () = late => return,
                // The connection is gone when its sender is; whoever waits for this waits for that, too.
                changed = async { self.since.clone().changed().await } => if changed.is_err() {
                    std::future::pending().await
                },
            }
        }
    }

    /// Whether the head that began then is not complete yet: its call would be open, or have ended since.
    fn is_coming(&self, begun: Instant) -> bool {
        self.peer.quiet_since().is_some_and(|since| since <= begun)
    }
}

impl<IO> Watched<IO> {
    fn heard(&self) {
        let Some(quiet_since) = self.peer.quiet_since() else { return };
        self.head_since.send_if_modified(|begun| {
            let is_first = begun.is_none_or(|begun| begun < quiet_since);
            if is_first {
                *begun = Some(Instant::now());
            }
            is_first
        });
    }

    /// `written`, or an error where it has been pending for too long.
    fn in_time<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let limit = self.stall_limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(time::sleep(limit)));
        match stalled.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                let told = format!("the peer took nothing for {limit:?}");
                Poll::Ready(Err(io::Error::new(ErrorKind::TimedOut, told)))
            }
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Watched<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.turn.poll_goes_on(cx));
        let before = into.filled().len();
        let read = ready!(Pin::new(&mut self.io).poll_read(cx, into));
        let bytes = into.filled().len() - before;
        self.turn.takes(bytes);
        if bytes > 0 {
            self.heard();
        }
        Poll::Ready(read)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Watched<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.turn.poll_goes_on(cx));
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        if let Poll::Ready(Ok(bytes)) = written {
            self.turn.takes(bytes);
        }
        self.in_time(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.turn.poll_goes_on(cx));
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bytes);
        if let Poll::Ready(Ok(bytes)) = written {
            self.turn.takes(bytes);
        }
        self.in_time(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.in_time(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(60);

    fn peer() -> Arc<Peer> {
        Arc::new(Peer::new(IpAddr::from([127, 0, 0, 1]).into(), Arc::default()))
    }

    #[tokio::test]
    async fn a_head_that_does_not_end_is_late_and_a_pause_between_requests_is_not() {
        // Broken: whoever sends a byte now and then keeps a connection for ever, or one that is kept for the next request is
        // closed before it comes.
        let (mut client, server) = duplex(64);
        let peer = peer();
        let (mut io, heads) = watched(server, peer.clone(), Turn::new(64), LIMIT);
        let late = heads.too_slow(LIMIT);
        tokio::pin!(late);
        let call = peer.call();
        assert!(time::timeout(2 * LIMIT, &mut late).await.is_err(), "its first head was complete");
        drop(call);
        assert!(time::timeout(2 * LIMIT, &mut late).await.is_err(), "nothing of the next has come");
        client.write_all(b"G").await.unwrap();
        io.read_u8().await.unwrap();
        let call = peer.call();
        assert!(time::timeout(2 * LIMIT, &mut late).await.is_err(), "the second head was complete");
        drop(call);
        time::sleep(Duration::from_millis(2)).await;
        client.write_all(b"G").await.unwrap();
        io.read_u8().await.unwrap();
        time::timeout(10 * LIMIT, late).await.expect("the third head is not complete");
    }

    #[tokio::test]
    async fn who_takes_nothing_is_left() {
        // Broken: a reader who stops keeps an answer in memory, and its connection, for ever.
        let (_client, server) = duplex(4);
        let (mut io, _heads) = watched(server, peer(), Turn::new(64), LIMIT);
        let error = time::timeout(10 * LIMIT, io.write_all(b"more than four")).await.expect("it ends").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }
}
