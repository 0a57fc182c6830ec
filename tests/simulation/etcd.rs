//! A model of etcd as far as the cluster uses it: one log of revisions, leases, transactions that compare,
//! lists, and watches whose events may come late, twice or never, or be compacted away.

use std::collections::BTreeMap;

use rand::Rng;
use sida_routing::{NodeId, Placement};

use crate::{
    core::Core,
    event::{Actor, Message, Micros},
};

/// How long a registration outlives its process.
pub(crate) const LEASE: Micros = 3_000_000;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Key {
    Member(NodeId),
    Leader,
    Placement,
}

/// What a member says of itself.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    pub(crate) is_expert_node: bool,
    pub(crate) weight: f64,
    pub(crate) is_leaving: bool,
    pub(crate) ready_epoch: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Member(Record),
    Leader(Actor),
    Placement(Placement),
}

/// A change of one key; `None` deletes it.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    pub(crate) key: Key,
    pub(crate) value: Option<Value>,
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// Puts a member record under a lease, a new one where there is none yet.
    Register {
        lease: Option<u64>,
        node: NodeId,
        record: Record,
    },
    KeepAlive {
        lease: u64,
    },
    Revoke {
        lease: u64,
    },
    List,
    Watch {
        from: u64,
    },
    /// Creates the leader's key unless there is one; its creation is what elects. Asking again changes nothing.
    Campaign {
        lease: u64,
    },
    /// Writes the placement if the leader's key was created, and the placement's changed, by these revisions.
    Write {
        elected: u64,
        replaces: u64,
        placement: Placement,
    },
}

#[derive(Clone, Debug)]
pub(crate) enum Reply {
    Registered { lease: u64 },
    LeaseLost,
    Kept,
    Listed(Listed),
    Watching,
    Compacted,
    Elected { elected: u64 },
    NotElected,
    Written { revision: u64 },
    Outdated,
}

/// Everything, as of a revision.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) revision: u64,
    pub(crate) members: Vec<(NodeId, Record)>,
    /// Who leads, and the revision that created its key.
    pub(crate) leader: Option<(Actor, u64)>,
    /// The placement and the revision of its last change.
    pub(crate) placement: Option<(Placement, u64)>,
}

struct Entry {
    value: Value,
    created: u64,
    changed: u64,
    lease: Option<u64>,
}

pub(crate) struct Etcd {
    revision: u64,
    entries: BTreeMap<Key, Entry>,
    /// Lease -> when it ends.
    leases: BTreeMap<u64, Micros>,
    next_lease: u64,
    log: Vec<Change>,
    compacted: u64,
    /// Watcher -> (its life, when its last event arrives: a stream keeps its order).
    watchers: BTreeMap<Actor, (u32, Micros)>,
    pub(crate) is_up: bool,
    /// When it went away last.
    stopped: Micros,
}

impl Etcd {
    pub(crate) fn new() -> Self {
        Self {
            revision: 1,
            entries: BTreeMap::new(),
            leases: BTreeMap::new(),
            next_lease: 1,
            log: Vec::new(),
            compacted: 0,
            watchers: BTreeMap::new(),
            is_up: true,
            stopped: 0,
        }
    }

    /// The placement that is stored.
    pub(crate) fn placement(&self) -> Option<&Placement> {
        match self.entries.get(&Key::Placement).map(|entry| &entry.value) {
            Some(Value::Placement(placement)) => Some(placement),
            _ => None,
        }
    }

    /// It stops answering; connections break.
    pub(crate) fn stop(&mut self, core: &Core) {
        if !self.is_up {
            return;
        }
        (self.is_up, self.stopped) = (false, core.now);
        self.watchers.clear();
    }

    /// It answers again. Leases begin anew, as with a new leader of etcd; or those that nobody could keep
    /// meanwhile have run out.
    pub(crate) fn start(&mut self, core: &mut Core, leases_run_out: bool) {
        if self.is_up {
            return;
        }
        self.is_up = true;
        let have_run_out = leases_run_out && core.now >= self.stopped + LEASE;
        let ends = if have_run_out { core.now } else { core.now + LEASE };
        self.leases.values_mut().for_each(|end| *end = ends);
    }

    /// Forgets the log: watches that have not got so far must list again.
    pub(crate) fn compact(&mut self, core: &mut Core) {
        self.compacted = self.revision;
        self.log.clear();
        for (watcher, (life, _)) in std::mem::take(&mut self.watchers) {
            core.send_to_life(Actor::Etcd, watcher, life, Message::WatchCompacted);
        }
    }

    /// Ends leases whose time has come; before anything else happens.
    pub(crate) fn expire(&mut self, core: &mut Core) {
        if !self.is_up {
            return;
        }
        while let Some((&lease, _)) = self.leases.iter().find(|&(_, &ends)| ends <= core.now) {
            core.note(|| format!("etcd: lease {lease} ends"));
            self.revoke(core, lease);
        }
    }

    fn revoke(&mut self, core: &mut Core, lease: u64) {
        self.leases.remove(&lease);
        let keys: Vec<Key> =
            self.entries.iter().filter(|(_, e)| e.lease == Some(lease)).map(|(key, _)| key.clone()).collect();
        if !keys.is_empty() {
            self.revision += 1;
        }
        for key in keys {
            self.entries.remove(&key);
            self.changed(core, key, None);
        }
    }

    pub(crate) fn handle(&mut self, core: &mut Core, from: Actor, life: u32, id: u64, op: Op) {
        let reply = self.apply(core, from, life, op);
        core.send_to_life(Actor::Etcd, from, life, Message::StoreReply { id, reply });
    }

    fn apply(&mut self, core: &mut Core, from: Actor, life: u32, op: Op) -> Reply {
        match op {
            Op::Register { lease, node, record } => {
                let lease = lease.unwrap_or(self.next_lease);
                if lease == self.next_lease {
                    self.next_lease += 1;
                } else if !self.leases.contains_key(&lease) {
                    return Reply::LeaseLost;
                }
                self.leases.insert(lease, core.now + LEASE);
                self.put(core, Key::Member(node), Value::Member(record), Some(lease));
                Reply::Registered { lease }
            }
            Op::KeepAlive { lease } => match self.leases.get_mut(&lease) {
                Some(ends) => {
                    *ends = core.now + LEASE;
                    Reply::Kept
                }
                None => Reply::LeaseLost,
            },
            Op::Revoke { lease } => {
                self.revoke(core, lease);
                Reply::Kept
            }
            Op::List => Reply::Listed(self.list()),
            Op::Watch { from: first } => self.watch(core, from, life, first),
            Op::Campaign { lease } => {
                if !self.leases.contains_key(&lease) {
                    return Reply::LeaseLost;
                }
                if let Some(leader) = self.entries.get(&Key::Leader) {
                    // Its own key: it was elected, and the answer was lost.
                    let is_own = leader.lease == Some(lease);
                    return if is_own { Reply::Elected { elected: leader.created } } else { Reply::NotElected };
                }
                self.put(core, Key::Leader, Value::Leader(from), Some(lease));
                Reply::Elected { elected: self.revision }
            }
            Op::Write { elected, replaces, placement } => {
                let leader = self.entries.get(&Key::Leader).map(|entry| entry.created);
                let changed = self.entries.get(&Key::Placement).map_or(0, |entry| entry.changed);
                if leader != Some(elected) || changed != replaces {
                    return Reply::Outdated;
                }
                let leader = self.entries.get(&Key::Leader).map(|entry| &entry.value);
                if leader != Some(&Value::Leader(from)) {
                    core.ledger.violated(|| format!("{from:?} writes epoch {} and does not lead", placement.epoch()));
                }
                // Whoever has been well for so long has had time to register again, whatever happened to the store.
                let is_well = |node: &NodeId| core.well.get(node).is_some_and(|since| core.now >= since + 2 * LEASE);
                let dropped = |before: &Placement| -> Option<NodeId> {
                    before.nodes().iter().find(|node| is_well(node) && !placement.nodes().contains(node)).cloned()
                };
                if let Some(node) = self.placement().and_then(dropped) {
                    core.ledger.violated(|| format!("{from:?} drops {node}, which is well"));
                }
                core.ledger.written(from, self.placement(), &placement);
                self.put(core, Key::Placement, Value::Placement(placement), None);
                Reply::Written { revision: self.revision }
            }
        }
    }

    fn list(&self) -> Listed {
        let (mut members, mut leader, mut placement) = (Vec::new(), None, None);
        for (key, entry) in &self.entries {
            match (key, &entry.value) {
                (Key::Member(node), Value::Member(record)) => members.push((node.clone(), record.clone())),
                (_, Value::Leader(actor)) => leader = Some((*actor, entry.created)),
                (_, Value::Placement(stored)) => placement = Some((stored.clone(), entry.changed)),
                (_, Value::Member(_)) => unreachable!("members are under member keys"),
            }
        }
        Listed { revision: self.revision, members, leader, placement }
    }

    fn watch(&mut self, core: &mut Core, watcher: Actor, life: u32, from: u64) -> Reply {
        if from <= self.compacted {
            return Reply::Compacted;
        }
        self.watchers.insert(watcher, (life, core.now));
        let missed: Vec<Change> = self.log.iter().filter(|change| change.revision >= from).cloned().collect();
        missed.into_iter().for_each(|change| self.tell(core, watcher, &change));
        Reply::Watching
    }

    fn put(&mut self, core: &mut Core, key: Key, value: Value, lease: Option<u64>) {
        self.revision += 1;
        let revision = self.revision;
        let created = self.entries.get(&key).map_or(revision, |entry| entry.created);
        self.entries.insert(key.clone(), Entry { value: value.clone(), created, changed: revision, lease });
        self.changed(core, key, Some(value));
    }

    fn changed(&mut self, core: &mut Core, key: Key, value: Option<Value>) {
        let change = Change { revision: self.revision, key, value };
        let watchers: Vec<Actor> = self.watchers.keys().copied().collect();
        watchers.into_iter().for_each(|watcher| self.tell(core, watcher, &change));
        self.log.push(change);
    }

    fn tell(&mut self, core: &mut Core, watcher: Actor, change: &Change) {
        let Some((life, last)) = self.watchers.get_mut(&watcher) else { return };
        if core.rng.random_bool(core.watch_loss) {
            return;
        }
        let late = if core.rng.random_bool(0.1) { core.rng.random_range(0..1_500_000) } else { 0 };
        let mut arrives = core.now + core.latency(Actor::Etcd, watcher) + late;
        arrives = arrives.max(*last);
        *last = arrives;
        let life = *life;
        core.send_at(arrives, Actor::Etcd, watcher, life, Message::Watched(change.clone()));
        if core.rng.random_bool(0.05) {
            let again = arrives + core.rng.random_range(0..3_000_000);
            core.send_at(again, Actor::Etcd, watcher, life, Message::Watched(change.clone()));
        }
    }
}
