//! Who counts as a member now, from lists and watch events of the membership store. Kept by every node's session
//! with it.
//!
//! The problem: a member is there as long as its lease lives, and leases die for two reasons. Its node is gone:
//! then it must be dropped at once. Or the store was away, for all nodes alike, and came back without the
//! leases; then everybody is alive, and dropping them would move every expert twice. So after a reconnect
//! absence means nothing for one lease's time, in which whoever is alive registers again.
//!
//! Events may come late, repeatedly, or not at all. The store numbers every change, so what is older than what
//! is known is passed over, and a list settles what was lost.

use std::{collections::BTreeMap, time::Duration};

use crate::NodeId;

/// What is known of the members; `M` is what a member says of itself.
#[derive(Clone, Debug)]
pub struct Members<M> {
    lease: Duration,
    entries: BTreeMap<NodeId, Entry<M>>,
    /// Revision of the last list: it holds every change up to this one.
    listed: u64,
    /// Revision of the last change applied. Invariant: at least `listed`.
    revision: u64,
    /// Until then the absent still count.
    bear_until: Duration,
}

#[derive(Clone, Debug)]
struct Entry<M> {
    member: M,
    /// Of the change that brought it.
    revision: u64,
    /// Gone, or not in the last list, at a time when that means little.
    is_absent: bool,
}

impl<M: PartialEq> Members<M> {
    /// Nobody known. `lease` is how long a registration outlives its node.
    pub fn new(lease: Duration) -> Self {
        Self { lease, entries: BTreeMap::new(), listed: 0, revision: 0, bear_until: Duration::ZERO }
    }

    /// The store can be reached again, after a time without it (or for the first time). Whoever is known still
    /// counts for one lease's time. Revisions begin anew, for the store may have been set up afresh.
    pub fn reconnected(&mut self, now: Duration) {
        self.bear_until = now + self.lease;
        (self.listed, self.revision) = (0, 0);
        self.entries.values_mut().for_each(|entry| entry.revision = 0);
    }

    /// Everybody who is registered, as of `revision` of the store. An answer that is older than what is known
    /// is passed over. Returns whether anything changed.
    pub fn listed(&mut self, now: Duration, revision: u64, members: impl IntoIterator<Item = (NodeId, M)>) -> bool {
        if revision < self.revision {
            return false;
        }
        (self.listed, self.revision) = (revision, revision);
        let mut registered: BTreeMap<NodeId, M> = members.into_iter().collect();
        let mut changed = false;
        let bears = now < self.bear_until;
        self.entries.retain(|node, entry| {
            match registered.remove(node) {
                Some(member) => {
                    changed |= entry.member != member || entry.is_absent;
                    *entry = Entry { member, revision, is_absent: false };
                }
                None => {
                    changed |= !bears;
                    entry.is_absent = true;
                }
            }
            bears || !entry.is_absent
        });
        changed |= !registered.is_empty();
        let entry = |member| Entry { member, revision, is_absent: false };
        self.entries.extend(registered.into_iter().map(|(node, member)| (node, entry(member))));
        changed
    }

    /// A member registered or changed, by the change of that revision. Returns whether that is news.
    pub fn put(&mut self, revision: u64, node: NodeId, member: M) -> bool {
        if self.is_old(revision, &node) {
            return false;
        }
        self.revision = revision;
        let entry = Entry { member, revision, is_absent: false };
        let is_same = self.entries.get(&node).is_some_and(|old| old.member == entry.member && !old.is_absent);
        self.entries.insert(node, entry);
        !is_same
    }

    /// A member's registration went, by the change of that revision. Returns whether that is news.
    pub fn deleted(&mut self, now: Duration, revision: u64, node: &NodeId) -> bool {
        if self.is_old(revision, node) {
            return false;
        }
        self.revision = revision;
        if now < self.bear_until {
            if let Some(entry) = self.entries.get_mut(node) {
                (entry.is_absent, entry.revision) = (true, revision);
            }
            return false;
        }
        self.entries.remove(node).is_some()
    }

    /// Drops those who have been borne for long enough. Returns whether there were any; call it when
    /// [`Members::changes_at`] comes.
    pub fn expire(&mut self, now: Duration) -> bool {
        let before = self.entries.len();
        if now >= self.bear_until {
            self.entries.retain(|_, entry| !entry.is_absent);
        }
        self.entries.len() < before
    }

    /// Everybody who counts at `now`, by ascending name.
    pub fn counting(&self, now: Duration) -> impl Iterator<Item = (&NodeId, &M)> {
        let bears = now < self.bear_until;
        let counting = self.entries.iter().filter(move |(_, entry)| bears || !entry.is_absent);
        counting.map(|(node, entry)| (node, &entry.member))
    }

    /// When somebody will cease to count if nothing is heard of them.
    pub fn changes_at(&self) -> Option<Duration> {
        self.entries.values().any(|entry| entry.is_absent).then_some(self.bear_until)
    }

    /// The last change known: what a watch goes on from.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether a change is already known. Those of one transaction have one revision.
    fn is_old(&self, revision: u64, node: &NodeId) -> bool {
        let of_node = self.entries.get(node).map_or(0, |entry| entry.revision);
        revision <= self.listed || revision < self.revision || revision <= of_node
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEASE: Duration = Duration::from_secs(5);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn names(members: &Members<u32>, now: Duration) -> Vec<String> {
        members.counting(now).map(|(node, member)| format!("{node}{member}")).collect()
    }

    fn list(names: &[&str]) -> Vec<(NodeId, u32)> {
        names.iter().map(|&name| (name.into(), 0)).collect()
    }

    /// Connected for long, with a and b.
    fn members() -> Members<u32> {
        let mut members = Members::new(LEASE);
        members.reconnected(s(0));
        assert!(members.listed(s(0), 10, list(&["a", "b"])));
        members
    }

    #[test]
    fn the_dead_are_dropped_at_once() {
        // Broken: requests would be sent to a dead node for longer than its lease.
        let mut members = members();
        assert!(members.deleted(s(60), 11, &"a".into()));
        assert_eq!(names(&members, s(60)), ["b0"]);
        assert!(members.listed(s(70), 12, list(&["c"])));
        assert_eq!(names(&members, s(70)), ["c0"]);
        assert_eq!(members.changes_at(), None);
    }

    #[test]
    fn after_a_reconnect_the_absent_count_for_one_lease() {
        // Broken: an outage of the store would move every expert, twice.
        let mut members = members();
        members.reconnected(s(100));
        assert!(!members.listed(s(101), 3, list(&[])), "a store set up afresh");
        assert!(!members.deleted(s(102), 4, &"b".into()));
        assert_eq!(names(&members, s(104)), ["a0", "b0"]);
        assert_eq!(members.changes_at(), Some(s(105)));
        assert!(members.put(5, "a".into(), 1));
        assert!(!members.expire(s(104)));
        assert!(members.expire(s(105)));
        assert_eq!(names(&members, s(105)), ["a1"]);
        assert_eq!(members.changes_at(), None);
    }

    #[test]
    fn absence_is_not_borne_again_and_again() {
        // Broken: a node that died while the store was away would count for ever.
        let mut members = members();
        members.reconnected(s(100));
        members.listed(s(101), 20, list(&["a"]));
        members.listed(s(104), 21, list(&["a"]));
        assert_eq!(names(&members, s(105)), ["a0"]);
        assert!(members.listed(s(106), 22, list(&["a"])));
        assert!(!members.listed(s(107), 23, list(&["a"])));
    }

    #[test]
    fn late_and_repeated_events_change_nothing() {
        // Broken: a dead node would come back to life by an old message, or a live one vanish.
        let mut members = members();
        assert!(!members.put(9, "a".into(), 7), "older than the list");
        assert!(members.put(11, "a".into(), 1));
        assert!(members.put(11, "b".into(), 1), "of one transaction");
        assert!(!members.put(11, "b".into(), 2));
        assert!(members.deleted(s(60), 12, &"a".into()));
        assert!(!members.put(11, "a".into(), 1));
        assert!(!members.deleted(s(60), 12, &"a".into()));
        assert!(!members.listed(s(60), 11, list(&["a", "b"])), "an answer that was overtaken");
        assert_eq!(names(&members, s(60)), ["b1"]);
        assert!(!members.put(13, "b".into(), 1), "a change that changes nothing");
        assert_eq!(members.revision(), 13, "a watch goes on from here");
        assert!(members.listed(s(60), 13, list(&["c"])), "a list that has all of it");
        assert_eq!(names(&members, s(60)), ["c0"]);
    }

    #[test]
    fn a_list_tells_what_is_news() {
        // Broken: a coordinator would go on with an old address, or look at everything again with every list.
        let mut members = members();
        assert!(!members.listed(s(60), 11, list(&["a", "b"])));
        assert!(members.listed(s(60), 12, [("a".into(), 1), ("b".into(), 0)]), "another member under the same name");
        members.reconnected(s(100));
        assert!(!members.listed(s(101), 1, list(&["b"])));
        assert!(members.listed(s(102), 2, [("a".into(), 1), ("b".into(), 0)]), "one that was absent is back");
        assert_eq!(members.changes_at(), None);
    }

    #[test]
    fn the_absent_are_borne_to_the_moment() {
        // Broken: at the moment at which a node is to be dropped nobody would drop it, nor wake up again to do so.
        let absent = || {
            let mut members = members();
            members.reconnected(s(100));
            assert!(!members.deleted(s(104), 11, &"a".into()));
            members
        };
        assert_eq!(
            (names(&absent(), s(104)), names(&absent(), s(105))),
            (vec!["a0".into(), "b0".into()], vec!["b0".into()])
        );
        assert!(absent().expire(s(105)));
        assert!(absent().listed(s(105), 12, list(&["b"])));
        assert!(absent().deleted(s(105), 12, &"b".into()));
    }

    proptest! {
        #[test]
        fn a_list_settles_everything(
            events in prop::collection::vec((0u8..4, 0u64..40, 0u8..4, 0u32..3, 0u64..4), 0..60),
            listed in prop::collection::btree_map(0u8..4, 0u32..3, 0..4),
        ) {
            // Broken: what a watch lost would stay lost.
            let mut members = Members::new(LEASE);
            let mut now = Duration::ZERO;
            let name = |node: u8| NodeId::from(format!("n{node}"));
            for (event, revision, node, member, passed) in events {
                now += s(passed);
                match event {
                    0 => members.reconnected(now),
                    1 => _ = members.put(revision, name(node), member),
                    2 => _ = members.deleted(now, revision, &name(node)),
                    _ => _ = members.listed(now, revision, [(name(node), member)]),
                }
                prop_assert!(members.revision >= members.listed);
                let counted = members.counting(now).count();
                let expired = members.clone().expire(now);
                prop_assert!(members.counting(now).count() == counted || expired);
            }
            now += LEASE;
            let expected: Vec<_> = listed.iter().map(|(&node, member)| format!("n{node}{member}")).collect();
            members.listed(now, 1000, listed.into_iter().map(|(node, member)| (name(node), member)));
            prop_assert_eq!(names(&members, now), expected);
        }
    }
}
