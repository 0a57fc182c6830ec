//! The requests that wait to be prepared, in the order of their clients' turns. What decides is pure
//! ([`sida_routing::fairness`]); here its decisions are carried out under the lock of one [`Queue`].

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_routing::{
    admission::Limits,
    fairness::{DrainRate, Entry, Load, Turns},
};
use sida_rpc::Client;

use crate::{
    answer::request_error::RequestError,
    intake::{
        queue::{Announcement, Queue, Wait},
        request::Request,
    },
};

/// Bounds of how long callers are asked to stay away; the first also while nothing was measured.
const RETRY_AFTER_MIN: Duration = Duration::from_millis(100);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// A request is refused for its deadline only if what waits before it takes so many times as long as it has left: what was
/// measured lately may be slower than what comes.
const HASTE: u32 = 2;

/// The queue.
/// Invariant: nobody asks the queue for anything while holding `turns` or `drain`. Whoever enters it holds its lock already
/// when these are locked.
pub(crate) struct RequestQueue {
    queue: Arc<Queue<Waiting>>,
    limits: Limits,
    turns: Mutex<Turns<Option<Client>>>,
    drain: Mutex<Drain>,
}

/// A request with its turn.
pub(crate) struct Waiting {
    pub(crate) request: Request,
    turn: u64,
    tokens: usize,
}

impl Waiting {
    fn load(&self) -> Load {
        Load { requests: 1, tokens: self.tokens }
    }
}

/// How fast requests leave.
#[derive(Default)]
struct Drain {
    rate: DrainRate,
    /// When the last ones left, if others stayed.
    since: Option<Instant>,
}

impl RequestQueue {
    /// An empty queue.
    pub(crate) fn new(limits: Limits) -> Self {
        Self { queue: Arc::new(Queue::new()), limits, turns: Mutex::default(), drain: Mutex::default() }
    }

    /// A request is going to be pushed soon: what arrives meanwhile waits for it.
    pub(crate) fn announce(&self) -> Announcement<Waiting> {
        self.queue.announce()
    }

    /// Lets a request wait for its turn, or says why it may not. Others of a client that holds more than its share may have to
    /// go for it; they are answered with an error.
    pub(crate) fn push(&self, request: Request) -> Result<(), RequestError> {
        let mut displaced = Vec::new();
        let entered = self.queue.enter(|waiting| self.enter(waiting, request, &mut displaced));
        for (displaced, retry_after) in displaced {
            displaced.request.fail(RequestError::ClientShare { share: self.limits.client_queue_share, retry_after });
        }
        entered.unwrap_or(Err(RequestError::ShuttingDown))
    }

    fn enter(
        &self,
        waiting: &mut VecDeque<Waiting>,
        request: Request,
        displaced: &mut Vec<(Waiting, Duration)>,
    ) -> Result<(), RequestError> {
        let asks = Load { requests: 1, tokens: request.tokens_max() };
        let retry_after = self.retry_after(waiting);
        let mut turns = self.turns.lock();
        if waiting.is_empty() {
            turns.rest();
        }
        let mut after = turns.clone();
        let turn = after.comes(request.client.clone(), asks.tokens);
        let ahead = waiting.iter().take_while(|waiting| waiting.turn <= turn).map(|waiting| waiting.tokens).sum();
        self.check_deadline(&request, ahead, retry_after)?;
        self.make_room(waiting, &request, asks, retry_after, displaced)?;
        *turns = after;
        let at = waiting.partition_point(|waiting| waiting.turn <= turn);
        waiting.insert(at, Waiting { request, turn, tokens: asks.tokens });
        Ok(())
    }

    /// Sees to it that one more request may wait, or says why not.
    fn make_room(
        &self,
        waiting: &mut VecDeque<Waiting>,
        request: &Request,
        asks: Load,
        retry_after: Duration,
        displaced: &mut Vec<(Waiting, Duration)>,
    ) -> Result<(), RequestError> {
        let Limits { queue_max, queue_tokens_max, client_queue_share: share, .. } = self.limits;
        loop {
            let of = match self.limits.enters(&loads(waiting), &request.client, asks) {
                Entry::Waits => return Ok(()),
                Entry::Displaces(of) => of.clone(),
                Entry::OverShare => return Err(RequestError::ClientShare { share, retry_after }),
                Entry::Full => return Err(RequestError::QueueFull { limit: queue_max, retry_after }),
                Entry::FullOfTokens => return Err(RequestError::QueueTokens { limit: queue_tokens_max, retry_after }),
            };
            let newest = waiting.iter().rposition(|waiting| waiting.request.client == of);
            displaced.extend(newest.and_then(|at| waiting.remove(at)).map(|waiting| (waiting, retry_after)));
        }
    }

    /// Refuses what cannot be begun before its deadline, as far as was measured. What finds nobody waiting is never refused.
    fn check_deadline(&self, request: &Request, ahead: usize, retry_after: Duration) -> Result<(), RequestError> {
        let Some(deadline) = request.deadline.filter(|_| ahead > 0) else { return Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        match self.drain.lock().rate.time_for(ahead) {
            Some(wait) if wait / HASTE > left => Err(RequestError::NoTime { wait, left, retry_after }),
            _ => Ok(()),
        }
    }

    /// How long callers should stay away: until half of what waits has left, so that there is room for more than one of them.
    fn retry_after(&self, waiting: &VecDeque<Waiting>) -> Duration {
        let half = waiting.iter().map(|waiting| waiting.tokens).sum::<usize>() / 2;
        let time = self.drain.lock().rate.time_for(half);
        time.map_or(RETRY_AFTER_MIN, |time| time.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX))
    }

    /// Takes the first `choose(waiting)` requests, waiting for one. `None`: the queue is closed and empty.
    pub(crate) fn take(&self, choose: impl Fn(&VecDeque<Waiting>) -> usize) -> Option<Vec<Request>> {
        let taken = self.queue.take(Wait::Block, choose)?;
        if let Some(last) = taken.last() {
            let (tokens, stay) = (taken.iter().map(|waiting| waiting.tokens).sum(), self.queue.len());
            self.turns.lock().taken(last.turn);
            self.drain.lock().left(tokens, stay, Instant::now());
        }
        Some(taken.into_iter().map(|waiting| waiting.request).collect())
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Refuses all further requests; those that wait can still be taken.
    pub(crate) fn close(&self) {
        self.queue.close();
    }
}

impl Drain {
    /// Requests of so many tokens left, and so many others stay.
    fn left(&mut self, tokens: usize, stay: usize, now: Instant) {
        if let Some(since) = self.since {
            self.rate.note(tokens, now.saturating_duration_since(since));
        }
        // While nobody waits, what passes until the next leaves says nothing of how fast they can.
        self.since = (stay > 0).then_some(now);
    }
}

/// What each client has waiting.
fn loads(waiting: &VecDeque<Waiting>) -> Vec<(&Option<Client>, Load)> {
    let mut loads = HashMap::<&Option<Client>, Load>::new();
    for waiting in waiting {
        let load = loads.entry(&waiting.request.client).or_default();
        *load = [*load, waiting.load()].into_iter().sum();
    }
    loads.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::{borrow::Cow, sync::mpsc, thread};

    use sida_telemetry::Span;
    use tokio::sync::oneshot;

    use super::*;
    use crate::{
        answer::routing_mode::RoutingMode,
        intake::request::{EncodeOptions, Work},
    };

    fn request() -> Request {
        let (reply, _) = oneshot::channel();
        Request {
            tokens: vec![1],
            readings: 1,
            mode: RoutingMode::Exact,
            work: Work::Encode { options: EncodeOptions::default(), reply },
            cache_bytes: 0,
            accepted: Instant::now(),
            deadline: None,
            client: None,
            span: Span::of_caller(None, || Cow::Borrowed("test")),
        }
    }

    #[test]
    fn those_who_enter_and_those_who_leave_never_stop_each_other() {
        // Would break: a request that comes while others are taken hangs, and every one after it.
        const REQUESTS: usize = 10_000;
        let limits = Limits {
            tokens_max: 1,
            sequences_max: 1,
            cache_bytes_max: 0,
            queue_max: REQUESTS,
            queue_tokens_max: REQUESTS,
            client_queue_share: 1.0,
        };
        let queue = Arc::new(RequestQueue::new(limits));
        let (done, all_taken) = mpsc::channel();
        let taking = queue.clone();
        thread::spawn(move || {
            let mut taken = 0;
            while taken < REQUESTS {
                taken += taking.take(|_| 1).expect("it is open").len();
            }
            done.send(()).expect("somebody waits");
        });
        for _ in 0..2 {
            let entering = queue.clone();
            thread::spawn(move || (0..REQUESTS / 2).for_each(|_| entering.push(request()).expect("there is room")));
        }
        all_taken.recv_timeout(Duration::from_secs(60)).expect("all are taken");
    }
}
