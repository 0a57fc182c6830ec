//! What stands where in etcd: everything of one cluster under one prefix, so that several share an etcd and a role
//! can be given to exactly one.
//!
//! ```text
//! /sida/{cluster}/members/{node}   a member, under its lease
//! /sida/{cluster}/leader           who writes the placement, under its lease
//! /sida/{cluster}/placement        who holds what
//! ```

/// The keys of one cluster.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    prefix: String,
}

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind<'a> {
    /// The member of this name.
    Member(&'a str),
    Leader,
    Placement,
}

impl Keys {
    pub(super) fn new(cluster: &str) -> Self {
        Self { prefix: format!("/sida/{cluster}/") }
    }

    /// What all of them begin with.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(super) fn member(&self, node: &str) -> String {
        format!("{}members/{node}", self.prefix)
    }

    pub(super) fn leader(&self) -> String {
        format!("{}leader", self.prefix)
    }

    pub(super) fn placement(&self) -> String {
        format!("{}placement", self.prefix)
    }

    /// What `key` is for; `None`: nothing that this version knows.
    pub(super) fn kind<'a>(&self, key: &'a [u8]) -> Option<Kind<'a>> {
        match std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)? {
            "leader" => Some(Kind::Leader),
            "placement" => Some(Kind::Placement),
            other => other.strip_prefix("members/").map(Kind::Member),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_again() {
        // Broken: a node would write where nobody reads, or read the keys of another cluster.
        let keys = Keys::new("prod");
        assert_eq!(keys.kind(keys.member("e0").as_bytes()), Some(Kind::Member("e0")));
        assert_eq!(keys.kind(keys.leader().as_bytes()), Some(Kind::Leader));
        assert_eq!(keys.kind(keys.placement().as_bytes()), Some(Kind::Placement));
        for other in ["/sida/prod/later", "/sida/prod2/leader", "/sida/prod", "leader"] {
            assert_eq!(keys.kind(other.as_bytes()), None, "{other}");
        }
        assert_eq!(keys.kind(&[0xff]), None);
        assert_eq!(keys.prefix(), "/sida/prod/", "other versions and people look here");
        assert_eq!((keys.member("e0"), keys.leader()), ("/sida/prod/members/e0".into(), "/sida/prod/leader".into()));
        assert_eq!(keys.placement(), "/sida/prod/placement");
    }
}
