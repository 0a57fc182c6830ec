//! What a peer of HTTP/2 sends beside its calls: pings, settings, priorities, windows, resets, frames with nothing in them.
//! Each costs the peer some bytes and the server a look, and HTTP/2 itself bounds none. So they are counted as they come,
//! and a connection that has little else does harm. A client needs some of them for what it is answered, which earns it
//! more. Put around a connection by [`crate::connection`], which has harmful ones end. Frames are read and written by turns.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, Take};

use crate::{peer::Peer, turn::Turn};

/// Of a frame: three bytes of its length, its kind, its flags, and its stream.
const HEAD_BYTES: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const PADDED: u8 = 8;
const ACK: u8 = 1;

/// Of a turn, a frame takes so many bytes beside its own: a call that begins, or a ping that is answered, costs about as much as
/// to read them.
const FRAME_COSTS: usize = 8 << 10;
/// What is read at once beyond the frame that has begun, so that a turn ends soon where frames are small.
const HEADS_AT_ONCE: usize = 256;
/// As so many idle frames counts one that has to be answered.
const ANSWERED: u32 = 8;
/// As so many one that goes on with something by nothing, for which no client has a reason.
const POINTLESS: u32 = 64;
/// A head has so many frames behind its first at most; HTTP/2 by itself takes no more, and one that goes on counts for more than
/// is borne.
const CONTINUATIONS_MAX: u32 = 5;
const ENDLESS: u32 = 1 << 16;

/// A connection whose frames are looked at as they are read.
pub(crate) struct Counted<IO> {
    /// Of which so much is read at once.
    io: Take<IO>,
    peer: Arc<Peer>,
    frames: Frames,
    turn: Turn,
}

impl<IO: AsyncRead> Counted<IO> {
    /// `io`, of which a client's first bytes, so many, are no frames.
    pub(crate) fn new(io: IO, peer: Arc<Peer>, turn: Turn, preface_bytes: usize) -> Self {
        let frames = Frames { to_skip: preface_bytes, head: [0; HEAD_BYTES], head_bytes: 0, continuations: 0 };
        Self { io: io.take(0), peer, frames, turn }
    }
}

/// Where in the frames of a connection its bytes are.
struct Frames {
    /// Bytes until the next head.
    to_skip: usize,
    /// The head that has come in part.
    head: [u8; HEAD_BYTES],
    head_bytes: usize,
    /// Frames one after the other that went on with the head of a call.
    continuations: u32,
}

/// Frames that began within some bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    all: usize,
    /// Those that do nothing for a call.
    idle: u32,
}

impl Frames {
    /// Looks at `bytes`, which are the next that came.
    fn see(&mut self, mut bytes: &[u8]) -> Seen {
        let mut seen = Seen::default();
        loop {
            let skipped = self.to_skip.min(bytes.len());
            self.to_skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return seen;
            }
            let taken = (HEAD_BYTES - self.head_bytes).min(bytes.len());
            self.head[self.head_bytes..][..taken].copy_from_slice(&bytes[..taken]);
            self.head_bytes += taken;
            bytes = &bytes[taken..];
            if self.head_bytes == HEAD_BYTES {
                let [a, b, c, kind, flags, ..] = self.head;
                let length = u32::from_be_bytes([0, a, b, c]);
                self.continuations = if kind == CONTINUATION { self.continuations + 1 } else { 0 };
                seen.all += 1;
                seen.idle += if self.continuations > CONTINUATIONS_MAX { ENDLESS } else { idle(length, kind, flags) };
                self.to_skip = length as usize;
                self.head_bytes = 0;
            }
        }
    }
}

/// As how many frames that do nothing for a call a frame counts. Heads of calls, and what goes on with them, have limits of
/// their own.
fn idle(length: u32, kind: u8, flags: u8) -> u32 {
    match kind {
        DATA if flags & END_STREAM == 0 && length == 0 => POINTLESS,
        // Padding may be all that there is.
        DATA => u32::from(flags & END_STREAM == 0 && flags & PADDED != 0),
        CONTINUATION if length == 0 => POINTLESS,
        HEADERS | CONTINUATION => 0,
        SETTINGS | PING if flags & ACK == 0 => ANSWERED,
        _ => 1,
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Counted<IO> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.turn.poll_goes_on(cx));
        let at_once = self.frames.to_skip + HEADS_AT_ONCE;
        self.io.set_limit(at_once as u64);
        let before = into.filled().len();
        let read = ready!(Pin::new(&mut self.io).poll_read(cx, into));
        let bytes = &into.filled()[before..];
        let seen = self.frames.see(bytes);
        self.turn.takes(bytes.len() + seen.all * FRAME_COSTS);
        if seen.idle > 0 && !self.peer.sends_idle_frames(seen.idle) {
            // HTTP/2 would have the last word, and the peer would come again at once. Whoever serves the connection ends it.
            into.set_filled(before);
            return Poll::Pending;
        }
        Poll::Ready(read)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Counted<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.turn.poll_goes_on(cx));
        let written = Pin::new(self.io.get_mut()).poll_write(cx, bytes);
        if let Poll::Ready(Ok(bytes)) = written {
            self.turn.takes(bytes);
        }
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.turn.poll_goes_on(cx));
        let written = Pin::new(self.io.get_mut()).poll_write_vectored(cx, slices);
        if let Poll::Ready(Ok(bytes)) = written {
            self.turn.takes(bytes);
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.get_ref().is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.io.get_mut()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.io.get_mut()).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: usize, kind: u8, flags: u8) -> Vec<u8> {
        let [_, a, b, c] = u32::try_from(length).unwrap().to_be_bytes();
        [&[a, b, c, kind, flags, 0, 0, 0, 1][..], &vec![0; length]].concat()
    }

    #[test]
    fn frames_are_told_apart_however_they_come() {
        // Would break: a payload is taken for frames, so that an honest client is ended; or a flood that comes in odd pieces is
        // not seen.
        let sent = [
            b"preface".to_vec(),
            frame(6, 4, 0),
            frame(40, HEADERS, 4),
            frame(300, DATA, 0),
            frame(0, DATA, 0),
            frame(0, CONTINUATION, 0),
            frame(8, 6, 0),
            frame(8, 6, 1),
            frame(4, 8, 0),
            frame(5, 2, 0),
            frame(4, 3, 0),
            frame(20, DATA, PADDED),
            frame(0, DATA, END_STREAM),
            frame(3, 77, 0),
        ];
        let bytes = sent.concat();
        for piece in [1, 2, 7, 9, 10, 100, bytes.len()] {
            let mut frames = Frames { to_skip: 7, head: [0; HEAD_BYTES], head_bytes: 0, continuations: 0 };
            let seen: Vec<Seen> = bytes.chunks(piece).map(|piece| frames.see(piece)).collect();
            let (all, idle): (usize, u32) =
                (seen.iter().map(|seen| seen.all).sum(), seen.iter().map(|seen| seen.idle).sum());
            assert_eq!((all, idle), (sent.len() - 1, 6 + 2 * ANSWERED + 2 * POINTLESS), "in pieces of {piece}");
            let goes_on = [frame(9, HEADERS, 0), frame(9, CONTINUATION, 0).repeat(CONTINUATIONS_MAX as usize)].concat();
            let idle_in = |frames: &mut Frames, bytes: &[u8]| {
                bytes.chunks(piece).map(|piece| frames.see(piece).idle).sum::<u32>()
            };
            assert_eq!([&goes_on, &goes_on].map(|head| idle_in(&mut frames, head)), [0, 0], "two long heads");
            assert_eq!(idle_in(&mut frames, &frame(9, CONTINUATION, 0)), ENDLESS);
        }
    }
}
