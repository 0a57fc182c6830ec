//! The load itself: clients that each send the next call as soon as their last is answered (a closed loop), or requests that
//! are sent when they are due, whatever became of earlier ones (an open loop). Knows nothing of what a request is, so that it
//! can be tested without a model. Called by `bench`.
//!
//! A client whose server asks to be left alone for a while leaves it alone, as clients do that are no load generators; an open loop
//! waits for nobody.

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
            let Some(retry_after) = self.call(due, client, number * batch..(number + 1) * batch).await else {
                continue;
            };
            // No longer than a request may take, and not beyond the end.
            let until_end = match load.until {
                Until::Requests(_) => Duration::MAX,
                Until::Elapsed(limit) => limit.saturating_sub(start.elapsed()),
            };
            time::sleep(retry_after.min(self.timeout).min(until_end)).await;
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

    /// Sends requests together and waits for all of them. How long the server then asks to be left alone, if it does.
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
        let retry_after = call.retry_after();
        // Whoever runs the load waits for the last sender.
        let _ = self.calls.send(call);
        retry_after
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::sync::Semaphore;

    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn closed(concurrency: usize, batch: usize, until: Until) -> Load {
        Load {
            pattern: Pattern::Closed(Closed { concurrency, batch, until }),
            timeout: ms(10_000),
            slo: Slo::default(),
        }
    }

    fn open(times: impl Iterator<Item = Duration>, counts_from: Duration, under_way_max: usize) -> Load {
        let open = Open { times: times.collect(), counts_from, under_way_max };
        Load { pattern: Pattern::Open(open), timeout: ms(10_000), slo: Slo::default() }
    }

    /// The numbers that were asked, in order, and when; each takes a moment, and 13 fails.
    async fn seen(load: &Load, first: u64) -> (Vec<u64>, Samples, u64) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = seen.clone();
        let request = Arc::new(move |_, number| {
            record.lock().unwrap().push(number);
            async move {
                time::sleep(ms(1)).await;
                if number == 13 {
                    Err(Failure::new("Unavailable", "no expert-node"))
                } else {
                    Ok(Answer { tokens: 2, ..Answer::default() })
                }
            }
        });
        let (samples, next) = run(load, first, request, |_, _, _| {}).await;
        let mut numbers = seen.lock().unwrap().clone();
        numbers.sort_unstable();
        (numbers, samples, next)
    }

    #[tokio::test]
    async fn every_request_is_sent_once() {
        // Broken: clients would repeat or skip texts, and two runs would not measure the same work.
        let every_ms = || (0..10).map(ms);
        for load in [closed(3, 1, Until::Requests(10)), open(every_ms(), Duration::ZERO, 100)] {
            let (numbers, samples, next) = seen(&load, 0).await;
            assert_eq!(numbers, (0..10).collect::<Vec<_>>());
            assert_eq!((samples.requests, samples.tokens, next), (10, 20, 10));
            assert_eq!(samples.calls_ms.len(), 10);
        }
    }

    #[tokio::test]
    async fn a_batch_has_one_latency() {
        // Broken: the latency of a batch, which is what other systems are compared by, would be that of a request.
        let (numbers, samples, next) = seen(&closed(1, 4, Until::Requests(8)), 0).await;
        assert_eq!((numbers.len(), samples.requests, samples.calls_ms.len(), next), (8, 8, 2, 8));
    }

    #[tokio::test]
    async fn failed_requests_have_their_numbers() {
        // Broken: the next round would ask texts again that this one has asked.
        let (_, samples, next) = seen(&closed(1, 4, Until::Requests(4)), 12).await;
        assert_eq!((samples.requests, samples.failed_requests(), samples.calls_ms.len(), next), (3, 1, 0, 16));
    }

    #[tokio::test]
    async fn time_ends_it() {
        // Broken: `--duration` would never end.
        let (numbers, samples, _) = seen(&closed(2, 1, Until::Elapsed(ms(5))), 100).await;
        assert!(!numbers.is_empty() && samples.wall >= ms(5));
    }

    #[tokio::test]
    async fn a_client_that_is_asked_to_wait_waits_and_a_schedule_does_not() {
        // Would break: a closed loop floods a server that asks to be left alone, so that most of its requests are refusals; or an
        // open loop waits, and leaves out the very requests that a busy server turns away.
        let asked_at = |load: Load, retry_after: Duration| async move {
            let (start, asked) = (Instant::now(), Arc::new(Mutex::new(Vec::new())));
            let record = asked.clone();
            let request = Arc::new(move |_, _| {
                record.lock().unwrap().push(start.elapsed());
                async move { Err(Failure::new("429", "later").with_retry_after(Some(retry_after))) }
            });
            let (samples, _) = run(&load, 0, request, |_, _, _| {}).await;
            let asked = asked.lock().unwrap().clone();
            assert_eq!(samples.told_to_wait, asked.len() as u64);
            asked
        };
        let asked = asked_at(closed(1, 1, Until::Requests(3)), ms(30)).await;
        assert!(asked[1] >= ms(30) && asked[2] >= ms(60), "{asked:?}");
        // No longer than a request may take, not beyond the end, and in an open loop not at all: else this would take hours.
        let hour = ms(3_600_000);
        let hasty = Load { timeout: ms(20), ..closed(1, 1, Until::Requests(3)) };
        assert_eq!(asked_at(hasty, hour).await.len(), 3);
        let patient = Load { timeout: 2 * hour, ..closed(1, 1, Until::Elapsed(ms(50))) };
        assert!(!asked_at(patient, hour).await.is_empty());
        let schedule = Load { timeout: 2 * hour, ..open((0..3).map(ms), Duration::ZERO, 100) };
        assert_eq!(asked_at(schedule, hour).await.len(), 3);
    }

    #[tokio::test]
    async fn what_is_never_answered_is_given_up() {
        // Broken: one request that a server forgets would keep the command for ever.
        for load in [closed(2, 1, Until::Requests(2)), open([ms(0), ms(1)].into_iter(), Duration::ZERO, 100)] {
            let load = Load { timeout: ms(20), ..load };
            let request = Arc::new(|_, _| std::future::pending::<Result<Answer, Failure>>());
            let (samples, next) = run(&load, 0, request, |_, _, _| {}).await;
            assert_eq!((samples.requests, samples.failures["timeout"].count, next), (0, 2, 2));
        }
    }

    #[tokio::test]
    async fn a_slow_server_does_not_slow_the_schedule() {
        // Broken: a server that is too slow would be asked less, and the time that callers wait in its queue be left out: the
        // load would be a closed loop by another name.
        let (count, service) = (200, ms(4));
        // Ten times what it can do.
        let load = open((0..count).map(|number| number * service / 10), Duration::ZERO, 1000);
        let (one_at_a_time, sent) = (Arc::new(Semaphore::new(1)), Arc::new(Mutex::new(Vec::new())));
        let record = sent.clone();
        let start = Instant::now();
        let request = Arc::new(move |_, _| {
            record.lock().unwrap().push(start.elapsed());
            let one_at_a_time = one_at_a_time.clone();
            async move {
                let _turn = one_at_a_time.acquire().await;
                time::sleep(service).await;
                Ok(Answer::default())
            }
        });
        let (samples, _) = run(&load, 0, request, |_, _, _| {}).await;
        let (all, whole) = (samples.e2e.percentiles().unwrap(), (count * service).as_secs_f64() * 1e3);
        // The last is due after 80 ms, and a server that were waited for would see it after 800.
        let last = sent.lock().unwrap()[count as usize - 1];
        assert!(last < ms(400), "the last was sent after {last:?}");
        assert!(samples.late.quantile_ms(0.5) < 100.0, "{:?}", samples.late.percentiles());
        assert!(all.max > 0.85 * whole && all.p50 > 0.4 * whole && all.min < 0.2 * whole, "{all:?}");
    }

    #[tokio::test]
    async fn warm_up_is_sent_and_not_counted() {
        // Broken: the first requests, which find nothing warm, would be in the figures; or not be sent at all.
        let load = open((0..10).map(|number| ms(number * 10)), ms(40), 100);
        let (numbers, samples, next) = seen(&load, 0).await;
        assert_eq!((numbers.len(), samples.requests, next), (10, 6, 10));
        assert!(samples.wall >= ms(50) && samples.wall < ms(95) + ms(200), "{:?}", samples.wall);
        assert!(samples.seen[0].due_s < 0.02, "{:?}", samples.seen[0]);
    }

    #[tokio::test]
    async fn what_is_under_way_is_bounded_and_told() {
        // Broken: a server that never answers would take all memory of this machine, or requests be left out without a word.
        let load = Load { timeout: ms(100), ..open((0..5).map(|_| ms(0)), Duration::ZERO, 3) };
        let request = Arc::new(|_, _| std::future::pending::<Result<Answer, Failure>>());
        let (samples, next) = run(&load, 0, request, |_, _, _| {}).await;
        assert_eq!((samples.failures["not sent"].count, samples.failures["timeout"].count, next), (2, 3, 5));
        assert!(samples.failures["not sent"].example.contains("3 requests"));
    }
}
