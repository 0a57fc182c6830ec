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
    fairness::{self, Entry, Load, Turns},
};
use sida_rpc::Client;

use crate::{
    answer::request_error::RequestError,
    intake::{
        queue::{Announcement, Queue, Wait},
        request::Request,
        workload::Workload,
    },
};

/// A request waits only if its answer is expected within this share of the time that it has: what is measured is not exact.
const SHARE_OF_TIME: f64 = 0.8;

/// The queue.
/// Invariant: nobody asks the queue for anything while holding `turns`. Whoever enters it holds its lock already when these
/// are locked.
pub(crate) struct RequestQueue {
    queue: Arc<Queue<Waiting>>,
    limits: Limits,
    turns: Mutex<Turns<Option<Client>>>,
    workload: Arc<Workload>,
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

impl RequestQueue {
    /// An empty queue.
    pub(crate) fn new(limits: Limits, workload: Arc<Workload>) -> Self {
        Self { queue: Arc::new(Queue::new()), limits, turns: Mutex::default(), workload }
    }

    /// A request is going to be pushed soon: what arrives meanwhile waits for it.
    pub(crate) fn announce(&self) -> Announcement<Waiting> {
        self.queue.announce()
    }

    /// Lets a request wait for its turn, or says why it may not. Others of a client that holds more than its share may have to
    /// go for it; they are answered with an error.
    pub(crate) fn push(&self, request: Request) -> Result<(), RequestError> {
        let (mut displaced, mut coming) = (Vec::new(), Some(request));
        let entered = self.queue.enter(|waiting| self.enter(waiting, &mut coming, &mut displaced));
        for (displaced, retry_after) in displaced {
            displaced.request.fail(RequestError::ClientShare { share: self.limits.client_queue_share, retry_after });
        }
        let entered = entered.unwrap_or(Err(RequestError::ShuttingDown));
        // Of several texts of a call, whoever waits for this one may not be the one who is given the error.
        if let (Err(error), Some(refused)) = (&entered, coming) {
            refused.fail(error.clone());
        }
        entered
    }

    /// Takes `coming` among those that wait, unless it is refused.
    fn enter(
        &self,
        waiting: &mut VecDeque<Waiting>,
        coming: &mut Option<Request>,
        displaced: &mut Vec<(Waiting, Duration)>,
    ) -> Result<(), RequestError> {
        let Some(request) = coming.as_ref() else { return Ok(()) };
        let asks = Load { requests: 1, tokens: request.tokens_max() };
        let mut turns = self.turns.lock();
        if waiting.is_empty() {
            turns.rest();
        }
        if request.deadline.is_some() {
            let place = places(waiting, request, turns.turn(&request.client))[0];
            let ahead = self.workload.begun() + sequences(waiting.iter().take(place));
            let no_time = self.workload.no_time(request, ahead, SHARE_OF_TIME, Instant::now());
            no_time.map_or(Ok(()), Err)?;
        }
        self.make_room(waiting, request, asks, displaced)?;
        let turn = turns.comes(request.client.clone(), asks.tokens);
        if let Some(request) = coming.take() {
            insert(waiting, Waiting { request, turn, tokens: asks.tokens });
        }
        Ok(())
    }

    /// When somebody whose request is refused should come back: until half of what waits is begun there is room for more than one of
    /// those who ask again. All that wait are looked at, so this is asked of refusals only.
    fn retry_after(&self, waiting: &VecDeque<Waiting>, request: &Request) -> Duration {
        self.workload.retry_after(request, self.workload.begun() + sequences(waiting.iter()) / 2)
    }

    /// Sees to it that one more request may wait, or says why not.
    fn make_room(
        &self,
        waiting: &mut VecDeque<Waiting>,
        request: &Request,
        asks: Load,
        displaced: &mut Vec<(Waiting, Duration)>,
    ) -> Result<(), RequestError> {
        let Limits { queue_max, queue_tokens_max, client_queue_share: share, .. } = self.limits;
        loop {
            let retry_after = || self.retry_after(waiting, request);
            let of = match self.limits.enters(&loads(waiting), &request.client, asks) {
                Entry::Waits => return Ok(()),
                Entry::Displaces(of) => of.clone(),
                Entry::OverShare => return Err(RequestError::ClientShare { share, retry_after: retry_after() }),
                Entry::Full => return Err(RequestError::QueueFull { limit: queue_max, retry_after: retry_after() }),
                Entry::FullOfTokens => {
                    return Err(RequestError::QueueTokens { limit: queue_tokens_max, retry_after: retry_after() });
                }
            };
            let retry_after = retry_after();
            let newest = waiting.iter().rposition(|waiting| waiting.request.client == of);
            displaced.extend(newest.and_then(|at| waiting.remove(at)).map(|waiting| (waiting, retry_after)));
        }
    }

    /// Takes the first `choose(waiting)` requests, waiting for one, and begins them; none of them where the time that
    /// is left is too short for all. `None`: the queue is closed and empty.
    pub(crate) fn take(&self, choose: impl Fn(&VecDeque<Waiting>) -> usize) -> Option<Vec<Request>> {
        let taken = self.queue.take(Wait::Block, choose)?;
        if let Some(last) = taken.last() {
            self.turns.lock().taken(last.turn);
        }
        let now = Instant::now();
        Some(taken.into_iter().filter_map(|waiting| self.begin(waiting.request, now)).collect())
    }

    /// Counts a request as begun, unless nobody waits for its answer or it would come too late.
    fn begin(&self, mut request: Request, now: Instant) -> Option<Request> {
        let no_time = || self.workload.no_time(&request, self.workload.begun(), 1.0, now);
        if let Some(reason) = request.over(now).or_else(no_time) {
            request.fail(reason);
            return None;
        }
        self.workload.begin(&mut request);
        if let Some(let_in) = &mut request.let_in {
            let_in.begins();
        }
        Some(request)
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

/// Lets a request wait in the place that it gets. Those of its client that it goes before get one later each, with the
/// turns of these places.
fn insert(waiting: &mut VecDeque<Waiting>, request: Waiting) {
    let places = places(waiting, &request.request, request.turn);
    waiting.insert(places[places.len() - 1], request);
    for pair in places.windows(2).rev() {
        waiting.swap(pair[0], pair[1]);
        let turn = waiting[pair[0]].turn;
        waiting[pair[0]].turn = std::mem::replace(&mut waiting[pair[1]].turn, turn);
    }
}

/// The place that a request gets, with those behind it of its client's requests that are less urgent, and the one that
/// its turn adds, which is the last.
fn places(waiting: &VecDeque<Waiting>, request: &Request, turn: u64) -> Vec<usize> {
    let is_own = |at: &usize| waiting[*at].request.client == request.client;
    let mut own: Vec<usize> = (0..waiting.len()).filter(is_own).collect();
    let place = fairness::place(own.iter().map(|&at| waiting[at].request.priority), request.priority);
    own.drain(..place);
    own.push(waiting.partition_point(|waiting| waiting.turn <= turn));
    own
}

/// How many sequences those have.
fn sequences<'w>(waiting: impl Iterator<Item = &'w Waiting>) -> usize {
    waiting.map(|waiting| waiting.request.places()).sum()
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
pub(crate) mod tests {
    use std::{borrow::Cow, sync::mpsc, thread};

    use sida_telemetry::Span;
    use tokio::sync::oneshot;

    use super::*;
    use crate::{
        answer::routing_mode::RoutingMode,
        intake::request::{EncodeOptions, Work},
    };

    pub(crate) fn request() -> Request {
        let (reply, answer) = oneshot::channel();
        // Somebody waits for the answer until the test is over.
        std::mem::forget(answer);
        Request {
            tokens: vec![1],
            mode: RoutingMode::Exact,
            work: Work::Encode { options: EncodeOptions::default(), reply },
            cache_bytes: 0,
            begun: None,
            let_in: None,
            is_predicted: true,
            replayed: None,
            accepted: Instant::now(),
            deadline: None,
            client: None,
            priority: 0,
            span: Span::of_caller(None, || Cow::Borrowed("test")),
        }
    }

    #[test]
    fn urgent_requests_go_first_among_their_clients_own() {
        // Would break: a client's urgent request waits for its batch job, or keeps another client's request from its turn.
        let waiting = |turn, client: &'static str, priority, tokens| Waiting {
            request: Request { client: Some(Client::of_key(client)), priority, tokens: vec![1; tokens], ..request() },
            turn,
            tokens,
        };
        let mut all = VecDeque::new();
        for (turn, client, priority, tokens) in [
            (0, "a", 0, 1),
            (0, "b", 0, 2),
            (1, "a", 0, 3),
            (2, "b", 0, 4),
            (4, "a", -1, 5),
            (9, "a", 7, 6),
            (9, "a", 0, 7),
        ] {
            insert(&mut all, waiting(turn, client, priority, tokens));
        }
        let found: Vec<_> = all.iter().map(|one| (one.turn, one.tokens, one.request.tokens.len())).collect();
        assert_eq!(found, [(0, 5, 5), (0, 2, 2), (1, 1, 1), (2, 4, 4), (4, 3, 3), (9, 7, 7), (9, 6, 6)]);
        assert_eq!(places(&all, &waiting(20, "c", -9, 1).request, 20), [7]);
    }

    fn queue(requests: usize) -> RequestQueue {
        let limits = Limits {
            tokens_max: 1,
            prefill_tokens_max: 1,
            sequences_max: 1,
            cache_bytes_max: 0,
            queue_max: requests,
            queue_tokens_max: requests,
            client_queue_share: 1.0,
        };
        RequestQueue::new(limits, Arc::new(Workload::new(limits)))
    }

    #[test]
    fn who_waits_for_a_refused_request_is_told_why() {
        // Would break: a call of several texts that comes when the queue is full, or closed, is answered as a panic.
        let queue = queue(1);
        queue.push(request()).expect("there is room");
        let refused = || {
            let (reply, mut answer) = oneshot::channel();
            let work = Work::Encode { options: EncodeOptions::default(), reply };
            let told = queue.push(Request { work, ..request() }).expect_err("no room");
            let answered = answer.try_recv().expect("an answer").expect_err("an error");
            assert_eq!(answered.to_string(), told.to_string());
            told
        };
        assert!(matches!(refused(), RequestError::QueueFull { .. } | RequestError::QueueTokens { .. }));
        queue.close();
        assert!(matches!(refused(), RequestError::ShuttingDown));
    }

    #[test]
    fn those_who_enter_and_those_who_leave_never_stop_each_other() {
        // Would break: a request that comes while others are taken hangs, and every one after it.
        const REQUESTS: usize = 10_000;
        let queue = Arc::new(queue(REQUESTS));
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
