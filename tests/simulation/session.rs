//! A process's session with the store: registered under a lease that it keeps, listing and watching. The
//! beliefs are `sida_routing::membership::Members`; this only carries messages.

use std::{collections::BTreeMap, time::Duration};

use sida_routing::{NodeId, Placement, membership::Members};

use crate::{
    core::Core,
    etcd::{Change, Key, LEASE, Listed, Op, Record, Reply, Value},
    event::{Actor, Message, Micros, Timer},
};

/// How often everything is listed anew.
pub(crate) const RELIST: Micros = 2_000_000;
const TICK: Micros = 500_000;
/// A store that has not answered for so long is away.
const PATIENCE: Micros = 1_000_000;

/// What a session learned.
#[derive(Clone, Debug)]
pub(crate) enum News {
    /// A placement in the store, and the revision of its change.
    Placement(Placement, u64),
    Members,
    /// Who leads, with the revision that created the leader's key, as of a revision.
    Leader(Option<(Actor, u64)>, u64),
    Elected(u64),
    Written(Placement, u64),
    Outdated,
}

pub(crate) struct Session {
    actor: Actor,
    node: NodeId,
    /// What this process says of itself.
    pub(crate) record: Record,
    registered: Option<Record>,
    pub(crate) lease: Option<u64>,
    outstanding: BTreeMap<u64, (Micros, Op)>,
    next_id: u64,
    pub(crate) members: Members<Record>,
    pub(crate) is_connected: bool,
    is_watching: bool,
    /// When the last question was asked that the store has answered.
    answered: Micros,
}

impl Session {
    pub(crate) fn new(core: &mut Core, actor: Actor, node: NodeId, record: Record) -> Self {
        core.timer_in(0, actor, Timer::Session);
        core.timer_in(RELIST, actor, Timer::Relist);
        Self {
            actor,
            node,
            record,
            registered: None,
            lease: None,
            outstanding: BTreeMap::new(),
            next_id: 0,
            members: Members::new(Duration::from_micros(LEASE)),
            is_connected: false,
            is_watching: false,
            answered: 0,
        }
    }

    pub(crate) fn send(&mut self, core: &mut Core, op: Op) {
        let id = self.next_id;
        self.next_id += 1;
        self.outstanding.insert(id, (core.now, op.clone()));
        core.send(self.actor, Actor::Etcd, Message::Store { id, op });
    }

    /// Whether what is known is of now. A process that was stopped goes on with beliefs of before, while what
    /// happened meanwhile waits to be read; it must not act on them.
    pub(crate) fn is_fresh(&self, core: &Core) -> bool {
        self.is_connected && core.now < self.answered + PATIENCE
    }

    /// Whether something of the kind is under way.
    pub(crate) fn is_asking(&self, is_it: impl Fn(&Op) -> bool) -> bool {
        self.outstanding.values().any(|(_, op)| is_it(op))
    }

    pub(crate) fn tick(&mut self, core: &mut Core) {
        core.timer_in(TICK, self.actor, Timer::Session);
        if self.outstanding.values().any(|&(sent, _)| core.now >= sent + PATIENCE) {
            if self.is_connected {
                let actor = self.actor;
                core.note(|| format!("{actor:?}: the store is away"));
            }
            self.is_connected = false;
            self.outstanding.clear();
        }
        if !self.is_connected && !self.is_asking(|op| matches!(op, Op::List)) {
            self.send(core, Op::List);
        }
        match self.lease {
            Some(lease) => self.send(core, Op::KeepAlive { lease }),
            None => self.register(core),
        }
        if self.registered.as_ref() != Some(&self.record) {
            self.register(core);
        }
    }

    pub(crate) fn relist(&mut self, core: &mut Core) {
        core.timer_in(RELIST, self.actor, Timer::Relist);
        if self.is_connected {
            self.send(core, Op::List);
        }
    }

    /// Registers what the record says now. One at a time: of two under way the store may take the older last.
    pub(crate) fn register(&mut self, core: &mut Core) {
        if !self.is_asking(|op| matches!(op, Op::Register { .. })) {
            let (node, record) = (self.node.clone(), self.record.clone());
            self.send(core, Op::Register { lease: self.lease, node, record });
        }
    }

    pub(crate) fn on_reply(&mut self, core: &mut Core, id: u64, reply: Reply) -> Vec<News> {
        let Some((sent, op)) = self.outstanding.remove(&id) else { return Vec::new() };
        self.answered = self.answered.max(sent);
        match (op, reply) {
            (Op::Register { record, .. }, Reply::Registered { lease }) => {
                self.lease = Some(lease);
                if record != self.record {
                    self.register(core);
                }
                self.registered = Some(record);
            }
            (op, Reply::LeaseLost) => {
                let lost = match op {
                    Op::Register { lease, .. } => lease,
                    Op::KeepAlive { lease } | Op::Campaign { lease } => Some(lease),
                    _ => None,
                };
                // Not a newer one, granted while this was under way.
                if lost.is_some() && lost == self.lease {
                    (self.lease, self.registered) = (None, None);
                    self.register(core);
                }
            }
            (_, Reply::Listed(listed)) => return self.on_list(core, listed),
            (_, Reply::Compacted) => self.is_watching = false,
            (_, Reply::Elected { elected }) => return vec![News::Elected(elected)],
            (Op::Write { placement, .. }, Reply::Written { revision }) => {
                return vec![News::Written(placement, revision)];
            }
            (_, Reply::Outdated) => return vec![News::Outdated],
            _ => {}
        }
        Vec::new()
    }

    fn on_list(&mut self, core: &mut Core, listed: Listed) -> Vec<News> {
        let Listed { revision, members, leader, placement } = listed;
        if !self.is_connected {
            (self.is_connected, self.is_watching) = (true, false);
            self.members.reconnected(core.time());
        }
        if !self.is_watching {
            self.is_watching = true;
            self.send(core, Op::Watch { from: revision + 1 });
        }
        if !members.iter().any(|(node, record)| (node, Some(record)) == (&self.node, self.registered.as_ref())) {
            // The store has something else, or nothing: register again at the next tick.
            self.registered = None;
        }
        self.members.listed(core.time(), revision, members);
        let mut news = vec![News::Members, News::Leader(leader, revision)];
        news.extend(placement.map(|(placement, changed)| News::Placement(placement, changed)));
        news
    }

    pub(crate) fn on_change(&mut self, core: &mut Core, change: Change) -> Vec<News> {
        let Change { revision, key, value } = change;
        match (key, value) {
            (Key::Member(node), Some(Value::Member(record))) => {
                self.members.put(revision, node, record);
                vec![News::Members]
            }
            (Key::Member(node), _) => {
                self.members.deleted(core.time(), revision, &node);
                vec![News::Members]
            }
            (_, Some(Value::Placement(placement))) => vec![News::Placement(placement, revision)],
            // The next list tells who leads; nobody needs to know at once but those who would stand.
            _ => Vec::new(),
        }
    }

    /// The watch was ended by a compaction: list, and watch from there.
    pub(crate) fn on_compacted(&mut self, core: &mut Core) {
        self.is_watching = false;
        self.send(core, Op::List);
    }
}
