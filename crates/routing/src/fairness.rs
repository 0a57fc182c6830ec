//! Whose request is next, and who may still wait: how clients share a queue. Nothing here knows what a
//! client is: two requests are of one client if what stands for it is equal.
//!
//! Requests have turns, in which they are taken. A client's request gets the turn behind its own last one, as many tokens
//! later as that one asks for; or the turn that is being taken now, if that is later (start-time fair queueing). So a client
//! that sends a thousand requests has turns far ahead, one that sends its first is taken next, and as long as several wait, each gets
//! about as many tokens as another. One client alone is served in order of arrival.

use std::{collections::HashMap, hash::Hash, iter::Sum};

use crate::admission::Limits;

/// What waits, or asks to: requests, and the tokens that they bring and may be given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// How many requests.
    pub requests: usize,
    /// Tokens of their prompts, and of the longest answers that they may get.
    pub tokens: usize,
}

impl Load {
    fn and(self, other: Self) -> Self {
        let tokens = self.tokens.saturating_add(other.tokens);
        Self { requests: self.requests.saturating_add(other.requests), tokens }
    }
}

impl Sum for Load {
    fn sum<I: Iterator<Item = Self>>(loads: I) -> Self {
        loads.fold(Self::default(), Self::and)
    }
}

/// What becomes of a request that comes to the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<C> {
    /// It waits.
    Waits,
    /// It waits once the newest request of this client is gone, and perhaps more: ask again.
    Displaces(C),
    /// Others wait, and its client has its share of the queue.
    OverShare,
    /// As many requests wait as may.
    Full,
    /// As many tokens wait as may.
    FullOfTokens,
}

impl Limits {
    /// Whether a request that `asks` so much may wait, where each client's `waiting` requests are those (each client once).
    ///
    /// While others wait, no client gets more than its share. What it filled the queue with before others came makes room for
    /// them, down to its share. Who has nothing there yet may always send one.
    pub fn enters<C: Copy + PartialEq>(&self, waiting: &[(C, Load)], client: C, asks: Load) -> Entry<C> {
        let all: Load = waiting.iter().map(|(_, load)| *load).sum();
        let own: Load = waiting.iter().filter(|(of, _)| *of == client).map(|(_, load)| *load).sum();
        let is_within = own.requests == 0 || self.is_within_share(own.and(asks));
        if !is_within && all.requests > own.requests {
            return Entry::OverShare;
        }
        let full = match all.and(asks) {
            _ if all.requests == 0 => return Entry::Waits,
            Load { requests, .. } if requests > self.queue_max => Entry::Full,
            Load { tokens, .. } if tokens > self.queue_tokens_max => Entry::FullOfTokens,
            _ => return Entry::Waits,
        };
        let others = waiting.iter().filter(|(of, load)| *of != client && !self.is_within_share(*load));
        let largest = others.max_by(|(_, a), (_, b)| self.part(*a).total_cmp(&self.part(*b)));
        match largest {
            Some((of, _)) if is_within => Entry::Displaces(*of),
            _ => full,
        }
    }

    /// Whether that is no more than one client may hold while others wait. One request is.
    fn is_within_share(&self, load: Load) -> bool {
        load.requests <= 1 || self.part(load) <= self.client_queue_share
    }

    /// How much of the queue that is, by what there is less room for.
    fn part(&self, load: Load) -> f64 {
        let requests = load.requests as f64 / self.queue_max.max(1) as f64;
        requests.max(load.tokens as f64 / self.queue_tokens_max.max(1) as f64)
    }
}

/// Which of its client's places a request gets, among those whose priorities are `own`, in order: before all that are
/// less urgent, and behind all others. The lower a priority, the more urgent. What a client calls urgent delays nobody
/// but itself.
pub fn place(own: impl IntoIterator<Item = i32>, priority: i32) -> usize {
    own.into_iter().take_while(|own| *own <= priority).count()
}

/// The turns of a queue's requests.
#[derive(Clone, Debug)]
pub struct Turns<C> {
    /// The latest turn that was taken.
    now: u64,
    /// The turn behind the last request of each client; of nobody whose turns are over.
    next: HashMap<C, u64>,
}

impl<C> Default for Turns<C> {
    fn default() -> Self {
        Self { now: 0, next: HashMap::new() }
    }
}

impl<C: Eq + Hash> Turns<C> {
    /// The turn that a request of this client would get now.
    pub fn turn(&self, client: &C) -> u64 {
        self.next.get(client).map_or(self.now, |next| self.now.max(*next))
    }

    /// The turn of a request that comes now and asks for so many tokens. Requests are taken in order of their turns, and of
    /// their arrival where these are equal.
    pub fn comes(&mut self, client: C, tokens: usize) -> u64 {
        let turn = self.turn(&client);
        self.next.insert(client, turn.saturating_add(tokens.max(1) as u64));
        turn
    }

    /// A request with this turn was taken.
    pub fn taken(&mut self, turn: u64) {
        self.now = self.now.max(turn);
        self.next.retain(|_, next| *next > self.now);
    }

    /// Nobody waits: what clients have had does not count any more.
    pub fn rest(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        tokens_max: 100,
        prefill_tokens_max: 100,
        sequences_max: 4,
        cache_bytes_max: 1000,
        queue_max: 10,
        queue_tokens_max: 1000,
        client_queue_share: 0.5,
    };

    fn load(requests: usize, tokens: usize) -> Load {
        Load { requests, tokens }
    }

    /// The queue as it is kept: in order of turns, and of arrival among equals.
    #[derive(Default)]
    struct Queue {
        turns: Turns<u8>,
        /// (turn, client, number of arrival, tokens)
        waiting: Vec<(u64, u8, usize, usize)>,
        arrived: usize,
    }

    impl Queue {
        fn push(&mut self, client: u8, tokens: usize) {
            if self.waiting.is_empty() {
                self.turns.rest();
            }
            let expected = self.turns.turn(&client);
            let turn = self.turns.comes(client, tokens);
            assert_eq!(turn, expected, "asking takes nothing");
            let at = self.waiting.partition_point(|waiting| waiting.0 <= turn);
            self.waiting.insert(at, (turn, client, self.arrived, tokens));
            self.arrived += 1;
        }

        fn take(&mut self) -> Option<(u8, usize, usize)> {
            let (turn, client, number, tokens) = (!self.waiting.is_empty()).then(|| self.waiting.remove(0))?;
            self.turns.taken(turn);
            Some((client, number, tokens))
        }
    }

    #[test]
    fn a_flood_delays_others_by_a_request() {
        // Would break: one client with a thousand requests makes all others wait for all of them.
        let mut queue = Queue::default();
        (0..1000).for_each(|_| queue.push(0, 100));
        assert_eq!(queue.take().map(|taken| taken.0), Some(0));
        queue.push(1, 100);
        queue.push(1, 100);
        let order: Vec<u8> = (0..6).filter_map(|_| queue.take()).map(|taken| taken.0).collect();
        assert_eq!(order, [1, 0, 1, 0, 0, 0]);
        // Another that was away is no creditor: it is next, and then takes turns as everybody does.
        (0..3).for_each(|_| queue.push(2, 100));
        let order: Vec<u8> = (0..6).filter_map(|_| queue.take()).map(|taken| taken.0).collect();
        assert!(order[..2].contains(&2) && order.iter().filter(|client| **client == 2).count() == 3, "{order:?}");
    }

    #[test]
    fn urgent_requests_go_before_their_clients_others() {
        // Would break: what is urgent waits for a batch job; or requests of one priority overtake each other.
        assert_eq!(place([0, 0, 0], 0), 3);
        assert_eq!(place([0, 0, 0], -1), 0);
        assert_eq!(place([-5, -1, 0, 7], 0), 3);
        assert_eq!(place([], i32::MAX), 0);
    }

    #[test]
    fn turns_go_by_tokens() {
        // Would break: who sends long texts gets more of the model than who sends short ones.
        let mut queue = Queue::default();
        (0..10).for_each(|_| queue.push(0, 400));
        (0..40).for_each(|_| queue.push(1, 100));
        let mut given = BTreeMap::<u8, usize>::new();
        for (client, _, tokens) in (0..25).filter_map(|_| queue.take()) {
            *given.entry(client).or_default() += tokens;
        }
        assert!(given[&0].abs_diff(given[&1]) <= 400, "{given:?}");
    }

    #[test]
    fn a_client_alone_may_fill_the_queue() {
        // Would break: the share of a client is kept free for others who do not come.
        assert_eq!(LIMITS.enters(&[(0, load(9, 10))], 0, load(1, 1)), Entry::Waits);
        assert_eq!(LIMITS.enters(&[(0, load(10, 10))], 0, load(1, 1)), Entry::Full);
        assert_eq!(LIMITS.enters(&[(0, load(2, 990))], 0, load(1, 10)), Entry::Waits);
        assert_eq!(LIMITS.enters(&[(0, load(2, 990))], 0, load(1, 11)), Entry::FullOfTokens);
        assert_eq!(LIMITS.enters(&[], 0, load(1, 5000)), Entry::Waits, "larger than the queue, and nothing is there");
    }

    #[test]
    fn others_get_their_place() {
        // Would break: whoever comes first with many requests keeps all others out until they are answered.
        let full = [(0, load(10, 100))];
        assert_eq!(LIMITS.enters(&full, 1, load(1, 10)), Entry::Displaces(0));
        assert_eq!(LIMITS.enters(&[(0, load(6, 10)), (1, load(1, 10))], 0, load(1, 1)), Entry::OverShare);
        assert_eq!(LIMITS.enters(&[(0, load(4, 10)), (1, load(1, 10))], 0, load(1, 1)), Entry::Waits);
        let tokens = [(0, load(2, 700)), (1, load(1, 300))];
        assert_eq!(LIMITS.enters(&tokens, 1, load(1, 100)), Entry::Displaces(0));
        assert_eq!(LIMITS.enters(&tokens, 1, load(1, 300)), Entry::OverShare);
        // Nobody loses what is within a share.
        let two = [(0, load(5, 10)), (1, load(5, 10))];
        assert_eq!(LIMITS.enters(&two, 2, load(1, 1)), Entry::Full);
        let whole = Limits { client_queue_share: 1.0, ..LIMITS };
        assert_eq!(whole.enters(&full, 1, load(1, 10)), Entry::Full);
    }

    proptest! {
        #[test]
        fn nobody_starves_and_nobody_overtakes_himself(
            steps in prop::collection::vec(prop::option::of((0u8..4, 0usize..300)), 1..300),
        ) {
            // Would break: a request waits for ever, or a client's later request is taken before its earlier one.
            let mut queue = Queue::default();
            let mut last = BTreeMap::new();
            let mut take = |queue: &mut Queue| -> Result<bool, TestCaseError> {
                let Some((client, number, _)) = queue.take() else { return Ok(false) };
                prop_assert!(last.insert(client, number).is_none_or(|last| last < number));
                Ok(true)
            };
            for step in steps {
                match step {
                    Some((client, tokens)) => queue.push(client, tokens),
                    None => drop(take(&mut queue)?),
                }
            }
            while take(&mut queue)? {}
            prop_assert_eq!(last.len() <= 4, true);
            prop_assert!(queue.waiting.is_empty());
        }

        #[test]
        fn a_client_alone_is_served_in_order_of_arrival(
            steps in prop::collection::vec(prop::option::of(0usize..300), 1..100),
        ) {
            // Would break: where there is one client, or nobody is known, order changes for nothing.
            let mut queue = Queue::default();
            let mut taken = Vec::new();
            for step in steps {
                match step {
                    Some(tokens) => queue.push(0, tokens),
                    None => taken.extend(queue.take().map(|taken| taken.1)),
                }
            }
            while let Some((_, number, _)) = queue.take() {
                taken.push(number);
            }
            prop_assert!(taken.iter().copied().eq(0..taken.len()));
        }

        #[test]
        fn the_delay_by_others_is_bounded(
            floods in prop::collection::vec((0u8..3, 1usize..200), 1..200),
            before in 0usize..50,
            tokens in 1usize..200,
        ) {
            // Would break: how long a client's first request waits depends on how much others have sent.
            let mut queue = Queue::default();
            floods.iter().for_each(|&(client, tokens)| queue.push(client, tokens));
            for _ in 0..before {
                queue.take();
            }
            queue.push(9, tokens);
            let mut ahead = BTreeMap::<u8, usize>::new();
            while let Some((client, ..)) = queue.take() {
                if client == 9 {
                    break;
                }
                *ahead.entry(client).or_default() += 1;
            }
            // What was due already when it came: a request of each, each of whose turns is that being taken.
            prop_assert!(ahead.values().all(|&requests| requests <= 1), "{:?}", ahead);
        }

        #[test]
        fn the_queue_stays_within_its_limits(asks in prop::collection::vec((0u8..5, 1usize..600), 1..200)) {
            // Would break: the queue grows without end, or a client that is within its share loses a request.
            let mut held = BTreeMap::<u8, Vec<usize>>::new();
            for (client, tokens) in asks {
                loop {
                    let loads: Vec<(u8, Load)> = held
                        .iter()
                        .map(|(of, tokens)| (*of, load(tokens.len(), tokens.iter().sum())))
                        .filter(|(_, load)| load.requests > 0)
                        .collect();
                    match LIMITS.enters(&loads, client, load(1, tokens)) {
                        Entry::Waits => held.entry(client).or_default().push(tokens),
                        Entry::Displaces(of) => {
                            prop_assert!(of != client);
                            let theirs = held.get_mut(&of).expect("who is displaced was there");
                            prop_assert!(!LIMITS.is_within_share(load(theirs.len(), theirs.iter().sum())));
                            theirs.pop();
                            continue;
                        }
                        Entry::OverShare | Entry::Full | Entry::FullOfTokens => {}
                    }
                    break;
                }
                let all: Vec<usize> = held.values().flatten().copied().collect();
                prop_assert!(all.len() <= LIMITS.queue_max);
                prop_assert!(all.len() == 1 || all.iter().sum::<usize>() <= LIMITS.queue_tokens_max);
            }
        }
    }
}
