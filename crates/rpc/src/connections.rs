//! The connections of a server: never more than its limit and an eighth of it that are on their way out, and none keeps
//! others out by being silent. When all places are taken and another connection comes, [`room`] says who has to go.
//! Filled by [`crate::accept`].

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{self, Instant},
};

use crate::{
    peer::Peer,
    shortage::{Short, Shortage},
    who_leaves::{Origin, Room, Staying, idlest, room},
};

/// Everybody who is connected.
#[derive(Debug)]
pub(crate) struct Connections {
    limit: usize,
    /// The server's, for the log.
    port: u16,
    /// How many may be on their way out beside as many as the limit: who takes time for a farewell shall not hold up
    /// others.
    leaving_max: usize,
    open: Mutex<Open>,
    /// Told when a connection goes or its last call ends. One waits for it: whoever accepts.
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Open {
    peers: HashMap<u64, Arc<Peer>>,
    next: u64,
    /// Those that were asked to leave for others and are there still, in the order in which they were.
    leaving: VecDeque<u64>,
    shortage: Shortage,
    /// Who was refused last, and until when others of the same origin are without another look at everybody.
    refused: Option<(Origin, Instant)>,
    /// Who can be spared next, and until when that is so without another look at everybody.
    spared: VecDeque<u64>,
    spared_until: Option<Instant>,
}

/// How long a look at everybody counts: whoever is refused, or leaves for another, may come again at once.
const SEEN_FOR: Duration = Duration::from_millis(10);
/// How many can be spared by one look.
const SPARED_MAX: usize = 64;

/// The place of one connection; free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) peer: Arc<Peer>,
    key: u64,
    connections: Arc<Connections>,
}

/// What became of trying to take a place.
enum Try {
    Taken(Place),
    Refused,
    Later,
}

impl Connections {
    /// None yet, and never more than `limit` that stay.
    pub(crate) fn new(limit: usize, port: u16) -> Arc<Self> {
        let leaving_max = (limit / 8).max(1);
        Arc::new(Self { limit, port, leaving_max, open: Mutex::default(), changed: Arc::default() })
    }

    /// A place for one more, which comes from `origin`. Waits for it while all are taken; `None`: it is refused.
    pub(crate) async fn place(self: &Arc<Self>, origin: Origin) -> Option<Place> {
        let mut waits = false;
        loop {
            match self.try_place(origin) {
                Try::Taken(place) => {
                    if waits {
                        self.open().shortage.lasts(Instant::now());
                    }
                    return Some(place);
                }
                Try::Refused => return None,
                Try::Later if !waits => {
                    self.open().shortage.waits();
                    waits = true;
                }
                Try::Later => {}
            }
            self.changed.notified().await;
        }
    }

    /// A place, if one is free or somebody leaves for it.
    fn try_place(self: &Arc<Self>, origin: Origin) -> Try {
        let mut open = self.open();
        let leaving = open.leaving.len();
        if open.peers.len() - leaving >= self.limit {
            let now = Instant::now();
            if open.refused.is_some_and(|(refused, until)| refused == origin && now < until) {
                open.shortage.refuses();
                return Try::Refused;
            }
            if open.shortage.begins(now) {
                tracing::warn!(
                    port = self.port,
                    limit = self.limit,
                    "all places for connections are taken: those without a call are asked to leave, and further ones wait while all have one"
                );
            }
            let spared = match open.next_spared(now) {
                Some(spared) => spared,
                None => match open.look(origin, now) {
                    Room::Of(spared) => spared,
                    Room::None => {
                        open.refused = Some((origin, now + SEEN_FOR));
                        open.shortage.refuses();
                        return Try::Refused;
                    }
                    Room::Later => return Try::Later,
                },
            };
            // As many as may are on their way out: some of them are gone soon.
            if leaving >= self.leaving_max {
                open.spared.push_front(spared);
                open.cut_farewells_short(now);
                return Try::Later;
            }
            open.asked_to_leave(spared);
        }
        if open.peers.len() >= self.limit + self.leaving_max {
            return Try::Later;
        }
        let (key, peer) = (open.next, Arc::new(Peer::new(origin, self.changed.clone())));
        open.next += 1;
        open.peers.insert(key, peer.clone());
        Try::Taken(Place { peer, key, connections: self.clone() })
    }

    /// Asks a connection that can be spared to leave, unless one that was asked is still on its way out.
    pub(crate) fn make_room(&self) {
        let mut open = self.open();
        let (seen, keys): (Vec<Staying>, Vec<u64>) = open.staying(Instant::now()).into_iter().unzip();
        if open.leaving.is_empty() {
            idlest(&seen, 1).into_iter().for_each(|index| open.asked_to_leave(keys[index]));
        }
    }

    /// Waits until a shortage of places is over, and tells what it has cost. Never ends while there is none.
    pub(crate) async fn shortage_over(&self) -> Short {
        loop {
            let over_at = self.open().shortage.over_at();
            match over_at {
                Some(over_at) => time::sleep_until(over_at).await,
                None => std::future::pending().await,
            }
            if let Some(short) = self.open().shortage.over(Instant::now()) {
                return short;
            }
        }
    }

    /// Ends a shortage, if there is one, and tells what it has cost.
    pub(crate) fn end_shortage(&self) -> Option<Short> {
        self.open().shortage.end(Instant::now())
    }

    /// Asks all of them to leave.
    pub(crate) fn close(&self) {
        self.open().peers.values().for_each(|peer| peer.leave.cancel());
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // A panic while it was held leaves a whole map: nothing but inserting and removing is done under it.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Everybody who was not asked to leave, by key.
    fn staying(&self, now: Instant) -> Vec<(Staying, u64)> {
        let peers = self.peers.iter().filter(|(_, peer)| !peer.leave.is_cancelled());
        peers.map(|(key, peer)| (peer.seen(now), *key)).collect()
    }

    /// Looks at everybody to see who makes room for a newcomer, and keeps those who can be spared after it.
    fn look(&mut self, newcomer: Origin, now: Instant) -> Room<u64> {
        let (seen, keys): (Vec<Staying>, Vec<u64>) = self.staying(now).into_iter().unzip();
        match room(&seen, newcomer, SPARED_MAX) {
            Room::Of(spared) => {
                let mut spared = spared.into_iter().map(|index| keys[index]);
                let Some(first) = spared.next() else { return Room::Later };
                (self.spared, self.spared_until) = (spared.collect(), Some(now + SEEN_FOR));
                Room::Of(first)
            }
            Room::None => Room::None,
            Room::Later => Room::Later,
        }
    }

    /// One that could be spared at the last look at everybody, and still can, if that was just now. To look at a thousand
    /// connections for each of thousands of newcomers took a fifth of what the server did for them.
    fn next_spared(&mut self, now: Instant) -> Option<u64> {
        if self.spared_until.is_none_or(|until| now >= until) {
            return None;
        }
        let is_spared = |peer: &Arc<Peer>| {
            let seen = peer.seen(now);
            !peer.leave.is_cancelled() && !seen.is_busy && !seen.is_in_use
        };
        std::iter::from_fn(|| self.spared.pop_front()).find(|key| self.peers.get(key).is_some_and(is_spared))
    }

    fn asked_to_leave(&mut self, key: u64) {
        self.peers[&key].displace();
        self.leaving.push_back(key);
        self.shortage.closes();
    }

    /// Ends half of those that leave, those that were asked first, unless some that were ended are about to go: whoever
    /// has no call any more, else one that has. So farewells are the shorter the more others come, and not each of
    /// those waits.
    fn cut_farewells_short(&mut self, now: Instant) {
        let leaving = || self.leaving.iter().map(|key| &self.peers[key]);
        if leaving().any(|peer| peer.expelled.is_cancelled()) {
            return;
        }
        let half = self.leaving.len().div_ceil(2);
        let quiet: Vec<_> = leaving().filter(|peer| !peer.seen(now).is_busy).take(half).collect();
        let cut = if quiet.is_empty() { leaving().take(1).collect() } else { quiet };
        cut.into_iter().for_each(|peer| peer.expelled.cancel());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.connections.open();
        open.peers.remove(&self.key);
        open.leaving.retain(|key| *key != self.key);
        drop(open);
        self.connections.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn here(last: u8) -> Origin {
        IpAddr::from([127, 0, 0, last]).into()
    }

    async fn is_pending<T>(future: impl Future<Output = T>) -> bool {
        tokio::select! {
            biased;
            _ = future => false,
            () = std::future::ready(()) => true,
        }
    }

    #[tokio::test]
    async fn no_more_than_the_limit_and_silent_ones_make_room() {
        // Would break: memory and descriptors have no bound, or a few silent peers keep everybody out.
        let connections = Connections::new(2, 0);
        let (silent, busy) = (connections.place(here(1)).await.unwrap(), connections.place(here(2)).await.unwrap());
        let call = busy.peer.call();
        let third = connections.place(here(3)).await.unwrap();
        assert!(
            silent.peer.leave.is_cancelled() && !busy.peer.leave.is_cancelled(),
            "its place is the third's at once"
        );
        let third_call = third.peer.call();
        let fourth = connections.place(here(4));
        tokio::pin!(fourth);
        assert!(is_pending(&mut fourth).await, "one is on its way out, and no more may be");
        drop(silent);
        assert!(is_pending(&mut fourth).await, "all who stay have a call");
        assert!(!busy.peer.leave.is_cancelled() && !third.peer.leave.is_cancelled());
        drop(call);
        let fourth = fourth.await.unwrap();
        assert!(busy.peer.leave.is_cancelled(), "its call has ended while another waited");
        connections.close();
        assert!(third.peer.leave.is_cancelled() && fourth.peer.leave.is_cancelled());
        drop(third_call);
    }

    #[tokio::test]
    async fn who_has_most_places_with_calls_leaves_one_to_another() {
        // Would break: a machine that opens calls on every connection and never ends them keeps all others out.
        let connections = Connections::new(8, 0);
        let mut greedy = Vec::new();
        for _ in 0..8 {
            let place = connections.place(here(1)).await.unwrap();
            greedy.push((place.peer.call(), place));
        }
        assert!(connections.place(here(1)).await.is_none(), "one more of its own would keep others waiting");
        connections.place(here(2)).await.unwrap();
        let leaving = |(_, place): &&(_, Place)| place.peer.leave.is_cancelled();
        assert_eq!(greedy.iter().filter(leaving).count(), 1);
    }

    #[tokio::test]
    async fn farewells_are_short_while_many_come() {
        // Would break: peers that do not leave when they are asked to hold up everybody who comes after them.
        let connections = Connections::new(8 * 2, 0);
        let mut places = Vec::new();
        for _ in 0..18 {
            places.push(connections.place(here(1)).await.unwrap());
        }
        let late_call = places[0].peer.call();
        let cut = |places: &[Place]| -> Vec<usize> {
            let cut = places.iter().enumerate().filter(|(_, place)| place.peer.expelled.is_cancelled());
            cut.map(|(index, _)| index).collect()
        };
        assert_eq!(cut(&places), Vec::<usize>::new(), "the first two have time to leave");
        for _ in 0..2 {
            assert!(is_pending(connections.place(here(1))).await);
            assert_eq!(cut(&places), [1], "the first has a call, and one place is enough");
        }
        places.remove(1);
        places.push(connections.place(here(1)).await.unwrap());
        let call = places[1].peer.call();
        assert!(is_pending(connections.place(here(1))).await);
        assert_eq!(cut(&places), [0], "all who leave have calls, and it was asked first");
        drop((late_call, call));
    }

    #[tokio::test]
    async fn one_look_at_everybody_serves_several_newcomers() {
        // Would break: each of ten thousand newcomers looks at everybody, or one that has begun to ask since has to leave.
        let connections = Connections::new(16, 0);
        let mut places = Vec::new();
        for _ in 0..17 {
            places.push(connections.place(here(1)).await.unwrap());
        }
        let leaving = |places: &[Place]| -> Vec<usize> {
            let leaving = places.iter().enumerate().filter(|(_, place)| place.peer.leave.is_cancelled());
            leaving.map(|(index, _)| index).collect()
        };
        assert_eq!(leaving(&places), [0]);
        assert_eq!(connections.open().spared, [1, 2, 3, 4, 5, 6, 7]);
        let call = places[1].peer.call();
        let begun = Instant::now();
        places.push(connections.place(here(2)).await.unwrap());
        if begun.elapsed() < SEEN_FOR / 2 {
            assert_eq!(connections.open().spared, [3, 4, 5, 6, 7]);
        }
        assert_eq!(leaving(&places), [0, 2], "1 has a call by now");
        drop(call);
    }

    #[tokio::test]
    async fn a_shortage_is_told_of_when_it_is_over() {
        // Would break: the log never says that a shortage has ended, or how many it has cost.
        let connections = Connections::new(1, 0);
        connections.open().shortage = Shortage::new(Duration::from_millis(50));
        assert!(is_pending(connections.shortage_over()).await);
        let mut places = vec![connections.place(here(1)).await.unwrap()];
        places.push(connections.place(here(1)).await.unwrap());
        assert!(is_pending(connections.place(here(1))).await, "one is leaving, which is all that may");
        let short = time::timeout(Duration::from_secs(60), connections.shortage_over()).await.expect("it is over");
        assert_eq!((short.waited, short.closed, short.refused), (1, 1, 0));
        assert!(is_pending(connections.shortage_over()).await, "it is told once");
    }
}
