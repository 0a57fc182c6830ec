//! The connections of a server: never more than its limit, and none keeps others out by being silent. When all places
//! are taken and another connection comes, the one without a call for the longest time has to leave. Filled by
//! [`crate::accept`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::Notify, time::Instant};

use crate::peer::Peer;

/// Everybody who is connected.
#[derive(Debug)]
pub(crate) struct Connections {
    limit: usize,
    open: Mutex<Open>,
    /// Told when a connection goes or its last call ends. One waits for it: whoever accepts.
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Open {
    peers: HashMap<u64, Arc<Peer>>,
    next: u64,
}

/// The place of one connection; free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) peer: Arc<Peer>,
    key: u64,
    connections: Arc<Connections>,
}

impl Connections {
    /// None yet, and never more than `limit`.
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, open: Mutex::default(), changed: Arc::default() })
    }

    /// A place for one more. Waits for it while all are taken.
    pub(crate) async fn place(self: &Arc<Self>) -> Place {
        let mut told = false;
        loop {
            if let Some(place) = self.free_place() {
                return place;
            }
            if !self.make_room() && !told {
                tracing::warn!(limit = self.limit, "connections wait: all places are taken, each with an open call");
                told = true;
            }
            self.changed.notified().await;
        }
    }

    fn free_place(self: &Arc<Self>) -> Option<Place> {
        let mut open = self.open();
        if open.peers.len() >= self.limit {
            return None;
        }
        let (key, peer) = (open.next, Arc::new(Peer::new(self.changed.clone())));
        open.next += 1;
        open.peers.insert(key, peer.clone());
        Some(Place { peer, key, connections: self.clone() })
    }

    /// Asks the connection that has been without a call for the longest time to leave, unless one that was asked is
    /// still on its way out. False if there is neither.
    pub(crate) fn make_room(&self) -> bool {
        let open = self.open();
        let quiet = |peer: &Arc<Peer>| Some((peer.quiet_since()?, peer.leave.clone()));
        let quiet: Vec<_> = open.peers.values().filter_map(quiet).collect();
        let Some(longest) = longest_quiet(quiet.iter().map(|(since, leave)| (*since, leave.is_cancelled()))) else {
            return !quiet.is_empty();
        };
        quiet[longest].1.cancel();
        true
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

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.open().peers.remove(&self.key);
        self.connections.changed.notify_one();
    }
}

/// Of connections without a call, each with the time since when and whether it is leaving already: which has to leave.
/// None while one is leaving, since its place is free soon.
fn longest_quiet(quiet: impl Iterator<Item = (Instant, bool)> + Clone) -> Option<usize> {
    if quiet.clone().any(|(_, is_leaving)| is_leaving) {
        return None;
    }
    quiet.enumerate().min_by_key(|(_, (since, _))| *since).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time;

    use super::*;

    #[test]
    fn who_was_silent_for_the_longest_time_leaves() {
        // Broken: a connection that is used would be closed for one that is not, or many for one newcomer.
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(longest_quiet([(at(5), false), (at(3), false), (at(9), false)].into_iter()), Some(1));
        assert_eq!(longest_quiet([(at(5), false), (at(3), true)].into_iter()), None);
        assert_eq!(longest_quiet([].into_iter()), None);
    }

    #[tokio::test]
    async fn no_more_than_the_limit_and_silent_ones_make_room() {
        // Broken: memory and descriptors would have no bound, or a few silent peers would keep everybody out.
        let connections = Connections::new(2);
        let (silent, busy) = (connections.place().await, connections.place().await);
        let call = busy.peer.call();
        let third = connections.place();
        tokio::pin!(third);
        let short = Duration::from_millis(30);
        assert!(time::timeout(short, &mut third).await.is_err(), "three places of two");
        assert!(silent.peer.leave.is_cancelled() && !busy.peer.leave.is_cancelled());
        drop(silent);
        let third = time::timeout(short, third).await.expect("its place is free");
        let third_call = third.peer.call();
        let fourth = connections.place();
        tokio::pin!(fourth);
        assert!(time::timeout(short, &mut fourth).await.is_err());
        assert!(!busy.peer.leave.is_cancelled() && !third.peer.leave.is_cancelled(), "both have a call");
        drop(call);
        assert!(time::timeout(short, &mut fourth).await.is_err());
        assert!(busy.peer.leave.is_cancelled(), "its call has ended while another waits");
        connections.close();
        assert!(third.peer.leave.is_cancelled());
        drop(third_call);
    }
}
