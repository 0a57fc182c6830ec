//! What large requests take of a server while they come. Of memory: a limit for all of them, and where it is exceeded, the
//! request that takes most of it ends, so that a few large ones which come slowly keep no small one out. Of time: they come no
//! faster than at a pace for all of them, so that many that come fast leave a processor to the small ones. Charged by
//! [`crate::request_body`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::rate_limit::RateLimit;

/// A request up to this size is not counted: that would cost each more than it gains, and their number is bounded.
const SMALL_BYTES: usize = 64 << 10;

/// From this size on a request comes at the pace of large ones.
pub(crate) const LARGE_BYTES: usize = 256 << 10;

/// So far ahead of its pace a request may come: what a clock can tell apart.
const AHEAD: Duration = Duration::from_millis(2);

/// Everything that is being received.
#[derive(Debug)]
pub(crate) struct Receiving {
    limit: usize,
    /// Of large requests, in bytes; `None`: as they are sent.
    rate: Option<Mutex<RateLimit>>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    requests: HashMap<u64, (usize, CancellationToken)>,
    total: usize,
    next: u64,
}

/// What one request takes; given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    receiving: Arc<Receiving>,
    counted_as: Option<u64>,
    bytes: usize,
    /// Cancelled when this request has to end for others.
    pub(crate) ended: CancellationToken,
}

impl Receiving {
    /// Nothing yet, and no more than `limit` bytes. Large requests come at so many bytes a second all together, if that is
    /// said.
    pub(crate) fn new(limit: usize, bytes_per_second: Option<u32>) -> Arc<Self> {
        let rate = bytes_per_second.map(|rate| Mutex::new(RateLimit::new(rate.into(), AHEAD, Instant::now())));
        Arc::new(Self { limit, rate, held: Mutex::default() })
    }

    /// The share of a request of which nothing has come.
    pub(crate) fn share(self: &Arc<Self>) -> Share {
        Share { receiving: self.clone(), counted_as: None, bytes: 0, ended: CancellationToken::new() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // A panic while it was held leaves sums that are right: nothing but adding is done under it.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    fn set(&mut self, request: u64, bytes: usize) {
        if let Some((held, _)) = self.requests.get_mut(&request) {
            self.total = self.total - *held + bytes;
            *held = bytes;
        }
    }

    /// Ends the largest until the rest fits.
    fn fit(&mut self, limit: usize) {
        while self.total > limit
            && let Some(largest) =
                self.requests.iter().max_by_key(|(_, (bytes, _))| *bytes).map(|(request, _)| *request)
            && let Some((bytes, ended)) = self.requests.remove(&largest)
        {
            self.total -= bytes;
            ended.cancel();
        }
    }
}

impl Share {
    /// So many bytes came of a large request: until when it has to wait for others, if so.
    pub(crate) fn comes(&self, bytes: usize) -> Option<Instant> {
        let mut rate = self.receiving.rate.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        rate.takes(bytes as f64, Instant::now())
    }

    /// This request takes so many bytes now.
    pub(crate) fn takes(&mut self, bytes: usize) {
        if bytes == self.bytes || self.counted_as.is_none() && bytes <= SMALL_BYTES {
            return;
        }
        self.bytes = bytes;
        let mut held = self.receiving.held();
        let request = *self.counted_as.get_or_insert_with(|| {
            held.next += 1;
            let request = held.next;
            held.requests.insert(request, (0, self.ended.clone()));
            request
        });
        held.set(request, bytes);
        held.fit(self.receiving.limit);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Some(request) = self.counted_as {
            let mut held = self.receiving.held();
            held.set(request, 0);
            held.requests.remove(&request);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_ends_for_others() {
        // Would break: a few requests that come for ever fill all memory, or keep out all others.
        let receiving = Receiving::new(10 * SMALL_BYTES, None);
        let mut shares: Vec<Share> = (0..4).map(|_| receiving.share()).collect();
        let mut takes = |which: usize, parts: usize| {
            shares[which].takes(parts * SMALL_BYTES);
            shares.iter().map(|share| share.ended.is_cancelled()).collect::<Vec<_>>()
        };
        assert_eq!(takes(0, 4), [false; 4]);
        assert_eq!(takes(1, 5), [false; 4]);
        assert_eq!(takes(2, 1), [false; 4], "it is small");
        assert_eq!(takes(2, 2), [false, true, false, false]);
        assert_eq!(takes(1, 9), [false, true, false, false], "who was ended holds nothing");
        assert_eq!(takes(3, 4), [false, true, false, false], "it is full, and no more than full");
        assert_eq!(takes(2, 0), [false, true, false, false]);
        assert_eq!(takes(2, 6), [false, true, true, false], "whoever asks may be the largest");
        shares.truncate(1);
        assert_eq!(receiving.held().total, 4 * SMALL_BYTES);
        shares.clear();
        let held = receiving.held();
        assert_eq!((held.total, held.requests.len()), (0, 0));
    }

    #[test]
    fn one_that_is_larger_than_all_memory_ends() {
        // Would break: it stays, since there is no larger one.
        let receiving = Receiving::new(SMALL_BYTES, None);
        let mut share = receiving.share();
        share.takes(2 * SMALL_BYTES);
        assert!(share.ended.is_cancelled() && receiving.held().total == 0);
    }
}
