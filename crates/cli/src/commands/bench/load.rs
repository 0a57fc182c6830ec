//! The load itself: clients that each send the next call as soon as their last is answered (a closed loop), or requests that
//! are sent when they are due, whatever became of earlier ones (an open loop). Knows nothing of what a request is, so that it
//! can be tested without a model. Called by `bench`.
//!
//! A client whose server asks to be left alone for a while, or cannot be reached, leaves it alone, as clients do that are no load
//! generators; an open loop waits for nobody.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use tokio::{
    sync::mpsc::{UnboundedSender, unbounded_channel},
    task::JoinSet,
    time::{self, MissedTickBehavior},
};

use super::{
    answer::{Answer, Call, Failure, Reply},
    samples::Samples,
    slo::Slo,
};

/// How requests are sent, and how long each may take.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) pattern: Pattern,
    /// A request that is not answered by then has failed, so that nothing is waited for without end.
    pub(crate) timeout: Duration,
    /// What makes an answer a good one.
    pub(crate) slo: Slo,
}

/// Who decides when the next request is sent.
#[derive(Clone, Debug)]
pub(crate) enum Pattern {
    /// The answers do.
    Closed(Closed),
    /// The schedule does.
    Open(Open),
}

/// Clients that wait for their answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Closed {
    /// Clients, each with one call under way.
    pub(crate) concurrency: usize,
    /// Requests of a call: sent together, and the call lasts until all are answered.
    pub(crate) batch: usize,
    /// When to stop calling.
    pub(crate) until: Until,
}

/// A schedule that waits for nobody.
#[derive(Clone, Debug)]
pub(crate) struct Open {
    /// When requests are due, from the start of the run; in order.
    pub(crate) times: Arc<[Duration]>,
    /// Requests that are due earlier are sent and not counted.
    pub(crate) counts_from: Duration,
    /// So many requests under way at most: one that is due beyond it is not sent and has failed, since what more of them hold
    /// would be taken from what is measured.
    pub(crate) under_way_max: usize,
}

/// When a load ends. Calls under way are waited for and counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Until {
    /// After so many requests; in a closed loop rounded up to whole calls.
    Requests(u64),
    /// After so much time.
    Elapsed(Duration),
}

/// How often a person sees where the run stands.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Runs `load`; `request` answers a client's request of a number, counted from `first`. What was seen so far and how many
/// requests are under way is told to `tell` while it runs. Returns what was seen and the number that comes next.
pub(crate) async fn run<F, A>(
    load: &Load,
    first: u64,
    request: Arc<F>,
    mut tell: impl FnMut(&Samples, u64, Duration),
) -> (Samples, u64)
where
    F: Fn(usize, u64) -> A + Send + Sync + 'static,
    A: Future<Output = Result<Answer, Failure>> + Send + 'static,
{
    let (calls, mut ended) = unbounded_channel();
    let start = Instant::now();
    let counts_from = start + load.pattern.counts_from();
    let sent = Arc::new(AtomicU64::new(0));
    let mut senders = JoinSet::new();
    let sender = Sender { request, first, timeout: load.timeout, sent: sent.clone(), calls };
    match &load.pattern {
        Pattern::Closed(closed) => {
            let numbers = Arc::new(AtomicU64::new(0));
            for client in 0..closed.concurrency {
                senders.spawn(sender.clone().call_in_turn(*closed, client, start, numbers.clone()));
            }
        }
        Pattern::Open(open) => _ = senders.spawn(sender.clone().call_when_due(open.clone(), start)),
    }
    drop(sender);
    let mut samples = Samples::new(load.slo);
    let mut replies = 0;
    let mut ticks = time::interval(TELL_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            call = ended.recv() => {
                let Some(call) = call else { break };
                replies += call.replies.len() as u64;
                if call.due >= counts_from {
                    samples.add(&call, counts_from);
                }
            }
            _ = ticks.tick() => {
                tell(&samples, sent.load(Ordering::Relaxed).saturating_sub(replies), start.elapsed());
            }
        }
    }
    // A panic of a sender is one of ours, and not to be taken for the end of the run.
    senders.join_all().await;
    samples.wall = counts_from.elapsed();
    (samples, first + replies)
}

impl Pattern {
    fn counts_from(&self) -> Duration {
        match self {
            Self::Closed(_) => Duration::ZERO,
            Self::Open(open) => open.counts_from,
        }
    }
}

/// What sends requests and hands on what became of them.
struct Sender<F> {
    request: Arc<F>,
    first: u64,
    timeout: Duration,
    sent: Arc<AtomicU64>,
    calls: UnboundedSender<Call>,
}

impl<F> Clone for Sender<F> {
    fn clone(&self) -> Self {
        let (request, sent, calls) = (self.request.clone(), self.sent.clone(), self.calls.clone());
        Self { request, first: self.first, timeout: self.timeout, sent, calls }
    }
}

impl<F, A> Sender<F>
where
    F: Fn(usize, u64) -> A + Send + Sync + 'static,
    A: Future<Output = Result<Answer, Failure>> + Send + 'static,
{
    /// One client of a closed loop: takes the next call's number until the load ends.
    async fn call_in_turn(self, load: Closed, client: usize, start: Instant, numbers: Arc<AtomicU64>) {
        let batch = load.batch as u64;
        loop {
            let number = numbers.fetch_add(1, Ordering::Relaxed);
            let is_over = match load.until {
                Until::Requests(requests) => number * batch >= requests,
                Until::Elapsed(limit) => start.elapsed() >= limit,
            };
            if is_over {
                return;
            }
            let due = Instant::now();
            let Some(pause) = self.call(due, client, number * batch..(number + 1) * batch).await else {
                continue;
            };
            // No longer than a request may take, and not beyond the end.
            let until_end = match load.until {
                Until::Requests(_) => Duration::MAX,
                Until::Elapsed(limit) => limit.saturating_sub(start.elapsed()),
            };
            time::sleep(pause.min(self.timeout).min(until_end)).await;
        }
    }

    /// The schedule of an open loop.
    async fn call_when_due(self, load: Open, start: Instant) {
        let mut under_way = JoinSet::new();
        for (number, time) in load.times.iter().enumerate() {
            let due = start + *time;
            time::sleep_until(due.into()).await;
            while let Some(ended) = under_way.try_join_next() {
                ended.expect("a request that panics is a fault of ours");
            }
            if under_way.len() >= load.under_way_max {
                self.leave_out(due, under_way.len());
                continue;
            }
            let sender = self.clone();
            under_way.spawn(async move { sender.call(due, number, number as u64..number as u64 + 1).await });
        }
        under_way.join_all().await;
    }

    /// A request that is due while too many are under way.
    fn leave_out(&self, due: Instant, under_way: usize) {
        self.sent.fetch_add(1, Ordering::Relaxed);
        let failure = Failure::new("not sent", format!("{under_way} requests were under way already"));
        let ended = Instant::now();
        self.end(due, ended, vec![Reply { ended, result: Err(failure) }]);
    }

    /// Sends requests together and waits for all of them. How long the server is then left alone, if it is.
    async fn call(&self, due: Instant, client: usize, numbers: std::ops::Range<u64>) -> Option<Duration> {
        self.sent.fetch_add(numbers.end - numbers.start, Ordering::Relaxed);
        let sent = Instant::now();
        let replies = join_all(numbers.map(|number| self.reply(client, self.first + number))).await;
        self.end(due, sent, replies)
    }

    async fn reply(&self, client: usize, number: u64) -> Reply {
        let answer = time::timeout(self.timeout, (self.request)(client, number)).await;
        let late = |_| Err(Failure::new("timeout", format!("not answered within {:?}", self.timeout)));
        Reply { ended: Instant::now(), result: answer.unwrap_or_else(late) }
    }

    fn end(&self, due: Instant, sent: Instant, replies: Vec<Reply>) -> Option<Duration> {
        let call = Call { due, sent, replies };
        let pause = call.pause();
        // Whoever runs the load waits for the last sender.
        let _ = self.calls.send(call);
        pause
    }
}

#[cfg(test)]
mod tests;
