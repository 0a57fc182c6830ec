//! How much a connection carries until others have their turn. A peer that sends without a pause, or takes what it asked for as
//! soon as it comes, would otherwise be served for as long as tokio and hyper let a task go on, a MiB or some thousands of
//! frames, and all who share its thread wait as long. Asked before each read and write by [`crate::control_frames`] and
//! [`crate::http1_limits`].

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

/// The turn of a connection. All clones are one.
#[derive(Clone, Debug)]
pub(crate) struct Turn {
    bytes_max: usize,
    bytes_left: Arc<AtomicUsize>,
}

impl Turn {
    /// Turns of so many bytes.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, bytes_left: Arc::new(AtomicUsize::new(bytes_max)) }
    }

    /// `connection`, which has a new turn whenever its task does.
    pub(crate) fn of<F: Future>(&self, mut connection: Pin<&mut F>) -> impl Future<Output = F::Output> {
        std::future::poll_fn(move |cx| {
            self.bytes_left.store(self.bytes_max, Ordering::Relaxed);
            connection.as_mut().poll(cx)
        })
    }

    /// Whether more may be read or written now. Where the turn is over, the task comes again behind the others that are ready.
    pub(crate) fn poll_goes_on(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.bytes_left.load(Ordering::Relaxed) > 0 {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// What was carried costs as much as so many bytes.
    pub(crate) fn takes(&self, bytes: usize) {
        // One task has both.
        let left = self.bytes_left.load(Ordering::Relaxed);
        self.bytes_left.store(left.saturating_sub(bytes), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin};

    use futures::task::noop_waker;

    use super::*;

    /// Would break: one that sends without a pause is read without one, since who serves it asks again and again.
    #[test]
    fn who_has_read_enough_comes_again_later() {
        let waker = noop_waker();
        let mut cx = Context::from_waker(&waker);
        let turn = Turn::new(10);
        let mut reads = 0;
        let reading = poll_fn(|cx| {
            for _ in 0..9 {
                if turn.poll_goes_on(cx).is_ready() {
                    turn.takes(4);
                    reads += 1;
                }
            }
            Poll::<()>::Pending
        });
        let mut reading = pin!(reading);
        for _ in 0..5 {
            assert!(pin!(turn.of(reading.as_mut())).poll(&mut cx).is_pending());
        }
        assert_eq!(reads, 5 * 3);
    }
}
