//! Members that are not listed right after etcd came back: their leases may have run out while nobody could renew
//! them, so they get the time of a lease to register again before anybody takes them for dead. Asked by `follow`.

use std::{collections::BTreeMap, time::Duration};

use sida_routing::NodeId;
use tokio::time::Instant;

use crate::member_record::MemberRecord;

/// Who was there before, and who is kept until when.
#[derive(Debug, Default)]
pub(super) struct Grace {
    before: BTreeMap<NodeId, MemberRecord>,
    kept: BTreeMap<NodeId, Instant>,
}

impl Grace {
    /// A listing right after a new connection: who was there before and is not listed is kept for `ttl`.
    pub(super) fn reconnected(&mut self, listed: &BTreeMap<NodeId, MemberRecord>, now: Instant, ttl: Duration) {
        let missing = self.before.keys().filter(|node| !listed.contains_key(*node));
        self.kept = missing.map(|node| (node.clone(), now + ttl)).collect();
    }

    /// Who counts as a member now, and when that changes by itself.
    pub(super) fn members(
        &mut self,
        listed: &BTreeMap<NodeId, MemberRecord>,
        now: Instant,
    ) -> (&BTreeMap<NodeId, MemberRecord>, Option<Instant>) {
        self.kept.retain(|node, until| *until > now && !listed.contains_key(node));
        let mut members = listed.clone();
        for node in self.kept.keys() {
            if let Some(record) = self.before.get(node) {
                members.insert(node.clone(), record.clone());
            }
        }
        self.before = members;
        (&self.before, self.kept.values().min().copied())
    }
}

#[cfg(test)]
mod tests {
    use sida_routing::Digest;

    use super::*;
    use crate::member::{Address, Member, Role};

    fn listed(names: &[&str]) -> BTreeMap<NodeId, MemberRecord> {
        let record = |name: &&str| {
            let node = NodeId::from(*name);
            let address = Address::Grpc("127.0.0.1:1".into());
            let member = Member { node: node.clone(), role: Role::ExpertNode, address, weight: 1.0 };
            (node, MemberRecord { member, model: Digest([1; 32]), ready_epoch: 0 })
        };
        names.iter().map(record).collect()
    }

    fn names(members: &BTreeMap<NodeId, MemberRecord>) -> Vec<&str> {
        members.keys().map(NodeId::as_str).collect()
    }

    #[test]
    fn who_could_not_renew_gets_time_to_register_again() {
        // Broken: when etcd comes back after a minute, the first node to register would be given every expert.
        let (start, ttl) = (Instant::now(), Duration::from_secs(5));
        let mut grace = Grace::default();
        assert_eq!(names(grace.members(&listed(&["a", "b", "c"]), start).0), ["a", "b", "c"]);
        grace.reconnected(&listed(&["a"]), start, ttl);
        let (members, again) = grace.members(&listed(&["a"]), start);
        assert_eq!((names(members), again), (vec!["a", "b", "c"], Some(start + ttl)));
        // b registers; c does not.
        let later = start + ttl / 2;
        assert_eq!(names(grace.members(&listed(&["a", "b"]), later).0), ["a", "b", "c"]);
        let (members, again) = grace.members(&listed(&["a", "b"]), start + ttl);
        assert_eq!((names(members), again), (vec!["a", "b"], None));
        // Who goes while etcd is there goes at once, also who was kept before.
        assert_eq!(names(grace.members(&listed(&["b"]), start + ttl).0), ["b"]);
    }
}
