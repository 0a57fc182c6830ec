//! What the Open Inference Protocol asks of a model's past: how many requests came by it, and where their time went.

use std::time::{Duration, SystemTime};

/// How often something happened, and for how long in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Timed {
    pub(crate) count: u64,
    pub(crate) time: Duration,
}

/// The requests of that protocol so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct InferenceCounts {
    /// When the last one was answered.
    pub(crate) last: Option<SystemTime>,
    /// Texts that were answered.
    pub(crate) texts: u64,
    /// Requests that were answered, and that were not.
    pub(crate) success: Timed,
    pub(crate) fail: Timed,
    /// Of those that were: how long they waited, and were computed.
    pub(crate) queue: Timed,
    pub(crate) compute: Timed,
}

impl Timed {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.time += time;
    }
}

impl InferenceCounts {
    /// A request with so many texts was answered at a time, after it `took` so long and waited for so much of that.
    pub(crate) fn answered(&mut self, at: SystemTime, texts: usize, took: Duration, queued: Duration) {
        self.last = Some(at);
        self.texts += texts as u64;
        self.success.add(took);
        self.queue.add(queued);
        self.compute.add(took.saturating_sub(queued));
    }

    /// A request was not answered, after so long.
    pub(crate) fn failed(&mut self, took: Duration) {
        self.fail.add(took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_add_up() {
        // Would break: a dashboard of Triton shows another latency than its clients have.
        let mut counts = InferenceCounts::default();
        let (second, at) = (Duration::from_secs(1), SystemTime::UNIX_EPOCH);
        counts.answered(at, 2, 5 * second, 2 * second);
        counts.answered(at + second, 1, second, 3 * second);
        counts.failed(second);
        let timed = |count, seconds| Timed { count, time: seconds * second };
        assert_eq!((counts.texts, counts.last), (3, Some(at + second)));
        assert_eq!((counts.success, counts.fail), (timed(2, 6), timed(1, 1)));
        assert_eq!((counts.queue, counts.compute), (timed(2, 5), timed(2, 3)));
    }
}
