//! How much a connection carries until others have their turn. A peer that sends without a pause, or takes what it asked for as
//! soon as it comes, would otherwise be served for as long as tokio and hyper let a task go on, a MiB or some thousands of
//! frames, and all who share its thread wait as long. Asked before each read and write by [`crate::control_frames`] and
//! [`crate::http1_limits`].

use std::{
    io,
    task::{Context, Poll},
};

/// What is left of a connection's turn.
#[derive(Debug)]
pub(crate) struct Turn {
    bytes_max: usize,
    bytes_left: usize,
}

impl Turn {
    /// Turns of so many bytes.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, bytes_left: bytes_max }
    }

    /// Whether more may be read or written now. Where the turn is over, the task comes again behind the others that are ready, and has a
    /// new one then.
    pub(crate) fn poll_goes_on(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.bytes_left > 0 {
            return Poll::Ready(());
        }
        self.ends();
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// What was carried costs as much as so many bytes.
    pub(crate) fn takes(&mut self, bytes: usize) {
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
    }

    /// Bytes were written, or are not taken now.
    pub(crate) fn wrote(&mut self, written: &Poll<io::Result<usize>>) {
        match written {
            Poll::Ready(written) => self.takes(*written.as_ref().unwrap_or(&0)),
            Poll::Pending => self.ends(),
        }
    }

    /// Nothing is there to be read, or nothing more is taken, so that others have their turn by themselves.
    pub(crate) fn ends(&mut self) {
        self.bytes_left = self.bytes_max;
    }
}

#[cfg(test)]
mod tests {
    use futures::task::noop_waker;

    use super::*;

    /// Would break: one that sends without a pause is read without one, and a connection that reads what it was sent now and then
    /// is interrupted.
    #[test]
    fn who_has_read_enough_comes_again_later() {
        let waker = noop_waker();
        let mut cx = Context::from_waker(&waker);
        let mut turn = Turn::new(10);
        for _ in 0..3 {
            for _ in 0..3 {
                assert!(turn.poll_goes_on(&mut cx).is_ready());
                turn.takes(4);
            }
            assert!(turn.poll_goes_on(&mut cx).is_pending());
        }
        for _ in 0..9 {
            assert!(turn.poll_goes_on(&mut cx).is_ready());
            turn.takes(9);
            turn.ends();
        }
    }
}
