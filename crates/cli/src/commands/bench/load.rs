//! The load itself: clients that each send the next request as soon as the last one is answered. Knows
//! nothing of what a request is, so that it can be tested without a model. Called by `bench`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::join_all;
use tokio::task::JoinSet;

use super::figures::{Sample, Samples};

/// How much is asked, and how many at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Load {
    /// Clients, each with one call under way.
    pub(crate) concurrency: usize,
    /// Requests of a call: sent together, and the call lasts until all are answered.
    pub(crate) batch: usize,
    /// When to stop calling.
    pub(crate) until: Until,
}

/// When a load ends. Calls under way are waited for and counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Until {
    /// After so many requests, rounded up to whole calls.
    Requests(u64),
    /// After so much time.
    Elapsed(Duration),
}

/// Runs `load`; `request` answers a client's request of a number, counted from `first`, or tells the code of its
/// failure. Returns what was seen and the number that comes next.
pub(crate) async fn run<F, Answer>(load: Load, first: u64, request: Arc<F>) -> (Samples, u64)
where
    F: Fn(usize, u64) -> Answer + Send + Sync + 'static,
    Answer: Future<Output = Result<Sample, String>> + Send + 'static,
{
    let calls = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let mut clients = JoinSet::new();
    for number in 0..load.concurrency {
        let (calls, request) = (calls.clone(), request.clone());
        clients.spawn(client(load, first, start, calls, move |of| request(number, of)));
    }
    let mut samples = Samples::default();
    for client in clients.join_all().await {
        samples.merge(client);
    }
    samples.wall = start.elapsed();
    let sent = samples.requests + samples.failures.values().sum::<u64>();
    (samples, first + sent)
}

/// One client: takes the next call's number until the load ends.
async fn client<F, Answer>(load: Load, first: u64, start: Instant, calls: Arc<AtomicU64>, request: F) -> Samples
where
    F: Fn(u64) -> Answer,
    Answer: Future<Output = Result<Sample, String>>,
{
    let batch = load.batch as u64;
    let mut samples = Samples::default();
    loop {
        let call = calls.fetch_add(1, Ordering::Relaxed);
        let is_over = match load.until {
            Until::Requests(requests) => call * batch >= requests,
            Until::Elapsed(limit) => start.elapsed() >= limit,
        };
        if is_over {
            return samples;
        }
        let sent = Instant::now();
        let answers = join_all((0..batch).map(|i| request(first + call * batch + i))).await;
        let latency = sent.elapsed();
        let mut answered = Vec::with_capacity(answers.len());
        let all_answered = answers.iter().all(Result::is_ok);
        for answer in answers {
            match answer {
                Ok(sample) => answered.push(sample),
                Err(code) => samples.failed(code),
            }
        }
        // The time of a call that failed in part says nothing about how long answering takes.
        if all_answered {
            samples.answered(latency, &answered);
        } else {
            samples.requests += answered.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    async fn seen(load: Load, first: u64) -> (Vec<u64>, Samples, u64) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = seen.clone();
        let request = Arc::new(move |_, number| {
            record.lock().unwrap().push(number);
            async move {
                tokio::task::yield_now().await;
                if number == 13 {
                    Err("Unavailable".to_owned())
                } else {
                    Ok(Sample { tokens: 2, ..Default::default() })
                }
            }
        });
        let (samples, next) = run(load, first, request).await;
        let mut numbers = seen.lock().unwrap().clone();
        numbers.sort_unstable();
        (numbers, samples, next)
    }

    #[tokio::test]
    async fn every_request_is_sent_once() {
        // Broken: clients would repeat or skip texts, and two runs would not measure the same work.
        let load = Load { concurrency: 3, batch: 1, until: Until::Requests(10) };
        let (numbers, samples, next) = seen(load, 0).await;
        assert_eq!(numbers, (0..10).collect::<Vec<_>>());
        assert_eq!((samples.requests, samples.total.tokens, next), (10, 20, 10));
        assert_eq!(samples.latencies_ms.len(), 10);
    }

    #[tokio::test]
    async fn a_batch_has_one_latency() {
        // Broken: the latency of a batch, which is what other systems are compared by, would be that of a request.
        let load = Load { concurrency: 1, batch: 4, until: Until::Requests(8) };
        let (numbers, samples, next) = seen(load, 0).await;
        assert_eq!((numbers.len(), samples.requests, samples.latencies_ms.len(), next), (8, 8, 2, 8));
    }

    #[tokio::test]
    async fn failures_are_counted_and_not_timed() {
        // Broken: refused requests, which return at once, would make the service look fast.
        let load = Load { concurrency: 1, batch: 4, until: Until::Requests(4) };
        let (_, samples, next) = seen(load, 12).await;
        assert_eq!((samples.requests, samples.latencies_ms.len(), next), (3, 0, 16));
        assert_eq!(samples.failures["Unavailable"], 1);
    }

    #[tokio::test]
    async fn time_ends_it() {
        // Broken: `--duration` would never end.
        let load = Load { concurrency: 2, batch: 1, until: Until::Elapsed(Duration::from_millis(5)) };
        let (numbers, samples, _) = seen(load, 100).await;
        assert!(!numbers.is_empty() && samples.wall >= Duration::from_millis(5));
    }
}
