//! What a load is, on requests made up here.

use std::sync::Mutex;

use tokio::sync::Semaphore;

use super::*;
use crate::commands::bench::http_client::CONNECT;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn closed(concurrency: usize, batch: usize, until: Until) -> Load {
    Load { pattern: Pattern::Closed(Closed { concurrency, batch, until }), timeout: ms(10_000), slo: Slo::default() }
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
        let failure = Failure::new("429", "later").with_retry_after(Some(retry_after));
        let (asked, told_to_wait) = refused_at(&load, failure).await;
        assert_eq!(told_to_wait, asked.len() as u64);
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
async fn a_server_that_cannot_be_reached_is_not_asked_at_every_turn() {
    // Broken: thousands of connections a second are tried, which says no more, and takes the machine from whoever starts the server.
    let (asked, told_to_wait) = refused_at(&closed(1, 1, Until::Requests(3)), Failure::new(CONNECT, "refused")).await;
    assert!(asked[1] >= ms(100) && asked[2] >= ms(200), "{asked:?}");
    assert_eq!(told_to_wait, 0);
}

/// When requests are sent to a server that fails all of them, and how many of them it told to wait.
async fn refused_at(load: &Load, failure: Failure) -> (Vec<Duration>, u64) {
    let (start, asked) = (Instant::now(), Arc::new(Mutex::new(Vec::new())));
    let record = asked.clone();
    let request = Arc::new(move |_, _| {
        record.lock().unwrap().push(start.elapsed());
        std::future::ready(Err(failure.clone()))
    });
    let (samples, _) = run(load, 0, request, |_, _, _| {}).await;
    let asked = asked.lock().unwrap().clone();
    (asked, samples.told_to_wait)
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
