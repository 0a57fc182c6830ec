//! An expert-node: follows the placement, loads what is placed on it, says so, and answers calls that are not
//! of the past.

use std::{collections::BTreeSet, ops::Range, time::Duration};

use rand::Rng;
use sida_routing::{
    ExpertKey, Placement,
    failover::{Blame, CallFailure, silence::HEARTBEAT},
    membership::{Verdict, is_stale, judge},
};

use crate::{
    coordinator::{MODEL, node_name},
    core::Core,
    etcd::{Op, Record},
    event::{Actor, Message, Micros, Timer, Work},
    session::{News, Session},
};

/// What it takes to load an expert.
const LOAD: Range<Micros> = 5000..40_000;

pub(crate) struct ExpertNode {
    me: Actor,
    session: Session,
    placement: Option<Placement>,
    loaded: BTreeSet<ExpertKey>,
    /// Being loaded for the placement.
    loading: Option<ExpertKey>,
    /// Calls it works at: coordinator and call.
    working: BTreeSet<(usize, u64)>,
    /// An expert that no call finds here: its file cannot be read.
    pub(crate) unreadable: Option<ExpertKey>,
    /// It was told to leave, and ends once this is over.
    pub(crate) has_left: bool,
}

impl ExpertNode {
    pub(crate) fn start(core: &mut Core, index: usize, weight: f64) -> Self {
        let me = Actor::Node(index);
        let record = Record { is_expert_node: true, weight, is_leaving: false, ready_epoch: 0 };
        Self {
            me,
            session: Session::new(core, me, node_name(index), record),
            placement: None,
            loaded: BTreeSet::new(),
            loading: None,
            working: BTreeSet::new(),
            unreadable: None,
            has_left: false,
        }
    }

    pub(crate) fn on_timer(&mut self, core: &mut Core, timer: Timer) {
        match timer {
            Timer::Session => self.session.tick(core),
            Timer::Relist => self.session.relist(core),
            Timer::Loaded { key } => {
                self.loaded.insert(key);
                self.loading = None;
                self.load(core);
            }
            Timer::Worked { coordinator, call, work } => {
                self.working.remove(&(coordinator, call));
                let Work { keys, loads, load, compute } = work;
                let answer = match self.unreadable.filter(|key| keys.contains(key)) {
                    Some(key) => {
                        let failure =
                            CallFailure::Refused { blame: Blame::Expert, message: format!("cannot load {key}") };
                        Message::Refused { call, failure, newer: None }
                    }
                    None => {
                        self.loaded.extend(keys);
                        Message::Done { call, loads, load, compute }
                    }
                };
                core.send(self.me, Actor::Coordinator(coordinator), answer);
            }
            Timer::Heartbeat { coordinator, call } => {
                if self.working.contains(&(coordinator, call)) {
                    core.send(self.me, Actor::Coordinator(coordinator), Message::Alive);
                    let heartbeat = HEARTBEAT.as_micros() as Micros;
                    core.timer_in(heartbeat, self.me, Timer::Heartbeat { coordinator, call });
                }
            }
            Timer::Leave => self.leave_now(core),
            other => unreachable!("an expert-node has no alarm for {other:?}"),
        }
    }

    pub(crate) fn on_message(&mut self, core: &mut Core, from: Actor, message: Message) {
        let news = match message {
            Message::StoreReply { id, reply } => self.session.on_reply(core, id, reply),
            Message::Watched(change) => self.session.on_change(core, change),
            Message::WatchCompacted => {
                self.session.on_compacted(core);
                Vec::new()
            }
            Message::Connect => return core.send(self.me, from, Message::Connected),
            Message::Call { call, keys, epoch } => return self.on_call(core, from, call, keys, epoch),
            other => unreachable!("{from:?} does not send {other:?}"),
        };
        for news in news {
            if let News::Placement(placement, _) = news {
                self.adopt(core, placement);
            }
        }
    }

    fn on_call(&mut self, core: &mut Core, from: Actor, call: u64, keys: Vec<ExpertKey>, epoch: u64) {
        let Actor::Coordinator(coordinator) = from else { unreachable!("{from:?} does not call") };
        let known = self.epoch();
        if is_stale(known, epoch) {
            let newer = self.placement.clone();
            return core.send(self.me, from, Message::Refused { call, failure: CallFailure::Stale, newer });
        }
        core.ledger.computes(self.me, known, epoch);
        let compute = core.rng.random_range(500..4000);
        let missing: Vec<&ExpertKey> = keys.iter().filter(|key| !self.loaded.contains(key)).collect();
        // They are loaded at the same time.
        let load = missing.iter().map(|_| core.rng.random_range(LOAD)).max().unwrap_or(0);
        let loads = missing.len() as u32;
        let (took, time) = (compute + load, Duration::from_micros);
        let work = Work { keys, loads, load: time(load), compute: time(compute) };
        self.working.insert((coordinator, call));
        core.timer_in(took, self.me, Timer::Worked { coordinator, call, work });
        let heartbeat = HEARTBEAT.as_micros() as Micros;
        if took > heartbeat {
            core.timer_in(heartbeat, self.me, Timer::Heartbeat { coordinator, call });
        }
    }

    fn adopt(&mut self, core: &mut Core, offered: Placement) {
        let me = self.me;
        let current = self.placement.as_ref().map(|placement| (placement, MODEL));
        match judge(current, &offered, MODEL) {
            Verdict::Adopt => {
                core.note(|| format!("{me:?} adopts epoch {}", offered.epoch()));
                let life = core.life(me);
                core.ledger.adopted(me, life, &offered);
                let name = self.name();
                let held: BTreeSet<ExpertKey> = offered.held_by(&name).collect();
                self.loaded.retain(|key| held.contains(key));
                self.placement = Some(offered);
                if self.session.record.is_leaving && held.is_empty() {
                    return self.leave_now(core);
                }
                self.load(core);
            }
            Verdict::Known | Verdict::Older => {}
            verdict @ (Verdict::Conflict | Verdict::OtherModel) => {
                core.ledger.violated(|| format!("{me:?} judges epoch {} as {verdict:?}", offered.epoch()));
            }
        }
    }

    /// Loads what is placed here, one by one; then says so.
    fn load(&mut self, core: &mut Core) {
        let Some(placement) = &self.placement else { return };
        if self.loading.is_some() {
            return;
        }
        let name = self.name();
        let missing = placement.held_by(&name).find(|key| !self.loaded.contains(key));
        match missing {
            Some(key) => {
                self.loading = Some(key);
                let load = core.rng.random_range(LOAD);
                core.timer_in(load, self.me, Timer::Loaded { key });
            }
            None => {
                self.session.record.ready_epoch = placement.epoch();
                self.session.register(core);
            }
        }
    }

    /// Asks to be relieved of what it holds, and ends when it is or after a while.
    pub(crate) fn leave(&mut self, core: &mut Core, grace: Micros) {
        self.session.record.is_leaving = true;
        self.session.register(core);
        core.timer_in(grace, self.me, Timer::Leave);
    }

    fn leave_now(&mut self, core: &mut Core) {
        if let Some(lease) = self.session.lease {
            self.session.send(core, Op::Revoke { lease });
        }
        self.has_left = true;
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.session.record.is_leaving
    }

    fn name(&self) -> sida_routing::NodeId {
        let Actor::Node(index) = self.me else { unreachable!("{:?} is an expert-node", self.me) };
        node_name(index)
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.placement.as_ref().map_or(0, Placement::epoch)
    }

    /// Whether it has loaded everything that `placement` places on it.
    pub(crate) fn has_loaded(&self, placement: &Placement) -> bool {
        placement.held_by(&self.name()).all(|key| self.loaded.contains(&key))
    }
}
