//! Requests of one call, which are let in together or not at all: what a client may use is looked at once all of them are read,
//! so that nothing is charged for a call that is refused, and what can never be let in is told so before any of it is begun.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::intake::{queue::Announcement, request::Request, request_queue::Waiting};

/// The requests of a call, as far as they are read.
pub(crate) struct Together {
    requests: usize,
    read: Mutex<Vec<Read>>,
}

/// A request that is read, and not let in yet.
pub(crate) struct Read {
    pub(crate) request: Request,
    /// Tells the queue that it is about to come, where it is waited for.
    pub(crate) announced: Option<Announcement<Waiting>>,
}

impl Together {
    /// Of a call of so many requests. Whoever waits for their answers holds it until then: where one of them is not read, the
    /// others are given up with it.
    pub(crate) fn new(requests: usize) -> Arc<Self> {
        Arc::new(Self { requests, read: Mutex::new(Vec::with_capacity(requests)) })
    }

    /// Adds a request that was read. All of them, once it is the last. Before that nobody is to wait for them: another text of
    /// the call may take long to be read.
    pub(crate) fn add(&self, mut request: Read) -> Option<Vec<Read>> {
        let mut read = self.read.lock();
        let is_last = read.len() + 1 == self.requests;
        request.announced.take_if(|_| !is_last);
        read.push(request);
        is_last.then(|| std::mem::take(&mut *read))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::{queue::Queue, request_queue::tests::request};

    #[test]
    fn nobody_waits_for_a_call_that_is_not_read_yet() {
        // Would break: requests of all clients wait until the longest text of somebody's call is tokenized.
        let queue = Arc::new(Queue::new());
        let announced = || Arc::strong_count(&queue) - 1;
        let call = Together::new(2);
        assert!(call.add(Read { request: request(), announced: Some(queue.announce()) }).is_none());
        assert_eq!(announced(), 0);
        let all = call.add(Read { request: request(), announced: Some(queue.announce()) }).expect("all are read");
        assert_eq!((all.len(), announced()), (2, 1), "they come with the last");
    }
}
