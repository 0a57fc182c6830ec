//! What etcd holds of the cluster, as far as this node has read it: a listing at one revision, and the changes that a
//! watch told since. No etcd here, so that every order of events can be tried.

use std::{collections::BTreeMap, sync::Arc};

use sida_proto::wire::{PlacementRecord, decode};
use sida_routing::NodeId;

use super::keys::{Keys, Kind};
use crate::member_record::MemberRecord;

/// One key, as it is now.
#[derive(Clone, Debug)]
pub(super) struct Entry<'a> {
    pub(super) key: &'a [u8],
    pub(super) value: &'a [u8],
    pub(super) create_revision: i64,
    pub(super) mod_revision: i64,
    pub(super) lease: i64,
}

/// What happened to one key.
#[derive(Clone, Debug)]
pub(super) enum Change<'a> {
    Put(Entry<'a>),
    Delete { key: &'a [u8], mod_revision: i64 },
}

/// The key by which one coordinator leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leader {
    pub(super) node: NodeId,
    /// Names this leadership: another one of the same node has another.
    pub(super) create_revision: i64,
    pub(super) lease: i64,
}

/// The placement as it stands in etcd.
#[derive(Clone, Debug, Default)]
pub(super) struct Stored {
    /// `None`: there is none, or nobody can read it.
    pub(super) record: Option<Arc<PlacementRecord>>,
    /// 0: there is none.
    pub(super) mod_revision: i64,
}

/// See the file's head.
#[derive(Clone, Debug)]
pub(super) struct Listing {
    keys: Keys,
    /// Everything up to this revision is known.
    pub(super) revision: i64,
    pub(super) members: BTreeMap<NodeId, MemberRecord>,
    pub(super) leader: Option<Leader>,
    pub(super) placement: Stored,
}

impl Listing {
    /// Everything under the prefix at `revision`.
    pub(super) fn new<'a>(keys: &Keys, revision: i64, entries: impl IntoIterator<Item = Entry<'a>>) -> Self {
        let (members, leader, placement) = Default::default();
        let mut listing = Self { keys: keys.clone(), revision: 0, members, leader, placement };
        listing.apply(revision, entries.into_iter().map(Change::Put));
        listing
    }

    /// Applies what a watch told, the store being at `revision` then. What was known already changes nothing: a
    /// watch may tell things again that a listing has told since.
    pub(super) fn apply<'a>(&mut self, revision: i64, changes: impl IntoIterator<Item = Change<'a>>) {
        for change in changes {
            match change {
                Change::Put(entry) if entry.mod_revision > self.revision => self.put(&entry),
                Change::Delete { key, mod_revision } if mod_revision > self.revision => self.delete(key, mod_revision),
                _ => {}
            }
        }
        self.revision = self.revision.max(revision);
    }

    fn put(&mut self, entry: &Entry<'_>) {
        match self.keys.kind(entry.key) {
            Some(Kind::Member(name)) => match MemberRecord::decode(name, entry.value) {
                Ok(record) => drop(self.members.insert(NodeId::from(name), record)),
                Err(error) => {
                    tracing::error!(name, %error, "a member's record in etcd cannot be read; it is no member");
                    self.members.remove(&NodeId::from(name));
                }
            },
            // This node may know its own leadership and its own writes before the watch tells what was before them.
            Some(Kind::Leader) if self.is_news_of_leader(entry.mod_revision) => {
                let node = NodeId::from(String::from_utf8_lossy(entry.value).into_owned());
                self.leader = Some(Leader { node, create_revision: entry.create_revision, lease: entry.lease });
            }
            Some(Kind::Placement) if entry.mod_revision > self.placement.mod_revision => {
                let record = decode::placement(entry.value)
                    .inspect_err(|error| tracing::error!(%error, "the placement in etcd cannot be read"));
                self.placement = Stored { record: record.ok().map(Arc::new), mod_revision: entry.mod_revision };
            }
            Some(Kind::Leader | Kind::Placement) => {}
            None => {}
        }
    }

    fn delete(&mut self, key: &[u8], mod_revision: i64) {
        match self.keys.kind(key) {
            Some(Kind::Member(name)) => drop(self.members.remove(&NodeId::from(name))),
            Some(Kind::Leader) if self.is_news_of_leader(mod_revision) => self.leader = None,
            Some(Kind::Placement) if mod_revision > self.placement.mod_revision => self.placement = Stored::default(),
            Some(Kind::Leader | Kind::Placement) | None => {}
        }
    }

    fn is_news_of_leader(&self, mod_revision: i64) -> bool {
        self.leader.as_ref().is_none_or(|leader| mod_revision > leader.create_revision)
    }
}

#[cfg(test)]
mod tests {
    use sida_routing::Digest;

    use super::*;
    use crate::member::{Address, Member, Role};

    fn record(ready_epoch: u64) -> Vec<u8> {
        let address = Address::Grpc("127.0.0.1:1".into());
        let member = Member { node: "x".into(), role: Role::ExpertNode, address, weight: 1.0 };
        MemberRecord { member, model: Digest([1; 32]), ready_epoch }.encode()
    }

    fn entry<'a>(key: &'a str, value: &'a [u8], mod_revision: i64) -> Entry<'a> {
        Entry { key: key.as_bytes(), value, create_revision: 3, mod_revision, lease: 9 }
    }

    fn ready(listing: &Listing) -> Vec<(&str, u64)> {
        listing.members.iter().map(|(node, record)| (node.as_str(), record.ready_epoch)).collect()
    }

    #[test]
    fn what_is_told_again_changes_nothing() {
        // Broken: a watch that lags behind a listing would bring back a member that is dead.
        let keys = Keys::new("c");
        let (e0, e1) = (keys.member("e0"), keys.member("e1"));
        let (old, new) = (record(1), record(2));
        let mut listing = Listing::new(&keys, 10, [entry(&e0, &new, 8)]);
        assert_eq!(ready(&listing), [("e0", 2)]);
        listing.apply(9, [Change::Put(entry(&e0, &old, 4)), Change::Put(entry(&e1, &old, 5))]);
        listing.apply(9, [Change::Delete { key: e0.as_bytes(), mod_revision: 7 }]);
        assert_eq!((ready(&listing), listing.revision), (vec![("e0", 2)], 10));
        // All of one transaction, then the same again.
        for _ in 0..2 {
            let delete = Change::Delete { key: e0.as_bytes(), mod_revision: 11 };
            listing.apply(11, [Change::Put(entry(&e1, &old, 11)), delete]);
            assert_eq!((ready(&listing), listing.revision), (vec![("e1", 1)], 11));
        }
    }

    #[test]
    fn a_leader_is_known_by_its_lease_and_its_first_revision() {
        // Broken: a coordinator would write by a leadership that it has lost.
        let keys = Keys::new("c");
        let mut listing = Listing::new(&keys, 10, [entry(&keys.leader(), b"c0", 4)]);
        let leader = Leader { node: "c0".into(), create_revision: 3, lease: 9 };
        assert_eq!(listing.leader, Some(leader));
        listing.apply(11, [Change::Delete { key: keys.leader().as_bytes(), mod_revision: 11 }]);
        assert_eq!(listing.leader, None);
    }

    #[test]
    fn what_this_node_has_done_itself_stays_done() {
        // Broken: a coordinator that was just elected would not write, or would write after a placement of before.
        let keys = Keys::new("c");
        let mut listing = Listing::new(&keys, 10, [entry(&keys.leader(), b"c0", 4)]);
        listing.leader = Some(Leader { node: "c1".into(), create_revision: 12, lease: 7 });
        listing.placement.mod_revision = 13;
        listing.apply(11, [Change::Delete { key: keys.leader().as_bytes(), mod_revision: 11 }]);
        listing.apply(12, [Change::Put(entry(&keys.placement(), b"", 12))]);
        assert_eq!(listing.leader.as_ref().map(|leader| leader.create_revision), Some(12));
        assert_eq!(listing.placement.mod_revision, 13);
        listing.apply(14, [Change::Delete { key: keys.leader().as_bytes(), mod_revision: 14 }]);
        assert_eq!(listing.leader, None);
    }

    #[test]
    fn what_is_gone_is_gone_and_what_is_later_stands() {
        // Broken: a placement or a leader that was replaced, or removed, would be believed for ever.
        let keys = Keys::new("c");
        let (leader, placement) = (keys.leader(), keys.placement());
        let mut listing = Listing::new(&keys, 10, [entry(&leader, b"c0", 4), entry(&placement, b"", 5)]);
        assert_eq!((listing.placement.mod_revision, listing.placement.record.is_some()), (5, false));
        let next = Entry { create_revision: 11, lease: 8, ..entry(&leader, b"c1", 11) };
        listing.apply(12, [Change::Put(next), Change::Put(entry(&placement, b"", 12))]);
        assert_eq!(listing.leader, Some(Leader { node: "c1".into(), create_revision: 11, lease: 8 }));
        assert_eq!(listing.placement.mod_revision, 12);
        // What the watch tells of before a list's revision, or again, is passed over.
        listing.leader.as_mut().unwrap().create_revision = 14;
        listing.placement.mod_revision = 14;
        let told = [Change::Put(entry(&leader, b"c0", 14)), Change::Put(entry(&placement, b"", 14))];
        listing.apply(14, told);
        assert_eq!(listing.leader.as_ref().map(|leader| leader.node.as_str()), Some("c1"));
        assert_eq!(listing.placement.mod_revision, 14);
        listing.revision = 13;
        listing.apply(14, [Change::Delete { key: placement.as_bytes(), mod_revision: 14 }]);
        assert_eq!(listing.placement.mod_revision, 14, "a removal of before this node's own write");
        listing.apply(15, [Change::Delete { key: placement.as_bytes(), mod_revision: 15 }]);
        assert_eq!(listing.placement.mod_revision, 0);
    }

    #[test]
    fn what_cannot_be_read_is_not_there() {
        // Broken: one damaged key would end every node, or a damaged placement would never be written anew.
        let keys = Keys::new("c");
        let (e0, later) = (keys.member("e0"), "/sida/c/later");
        let good = record(1);
        let mut listing = Listing::new(&keys, 9, [entry(&e0, &good, 4), entry(later, b"x", 5)]);
        listing.apply(12, [Change::Put(entry(&e0, b"{}", 11)), Change::Put(entry(&keys.placement(), &[0xff], 12))]);
        assert!(listing.members.is_empty() && listing.placement.record.is_none());
        assert_eq!(listing.placement.mod_revision, 12);
    }
}
