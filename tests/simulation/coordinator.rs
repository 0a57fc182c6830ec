//! A coordinator: follows the membership, stands for election, writes the placement while elected, and serves
//! requests (`requests.rs`). Every decision is one of `sida_routing`'s.

use std::{collections::BTreeMap, rc::Rc, time::Duration};

use sida_routing::{
    Demand, Digest, Extent, Placement, Policy,
    dispatch::Outlook,
    failover::{LaneHealth, RetryBudget},
    membership::{Decision, Pace, Standing, Verdict, Writer, judge},
};

use crate::{
    core::Core,
    etcd::{LEASE, Op, Record},
    event::{Actor, Message, Micros, Timer},
    requests::{Request, Sent},
    session::{News, Session},
};

pub(crate) const MODEL: Digest = Digest([7; 32]);

/// How large a cluster is, and how its placement follows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) extent: Extent,
    pub(crate) policy: Policy,
    pub(crate) pace: Pace,
}

/// Few experts, so that everything is touched by everything.
pub(crate) const SMALL: Shape = Shape {
    extent: Extent { moe_layers: 2, num_experts: 12, replicas: 2 },
    policy: Policy { replicas: 2, hot_replicas_max: 1, moves_max: 8 },
    pace: Pace {
        moves_per_minute: 1200,
        step_interval: Duration::from_millis(250),
        absence_borne: Duration::from_micros(LEASE),
        gather: Duration::from_millis(1000),
    },
};
const CONNECT: Micros = 100_000;

/// All expert-nodes and the placement on them at one moment.
pub(crate) struct Roster {
    pub(crate) placement: Placement,
    /// By index into the placement's nodes: which node that is.
    pub(crate) nodes: Vec<usize>,
}

/// A term as the writer of the placement.
struct Term {
    /// The revision that created the leader's key.
    elected: u64,
    writer: Writer,
    /// When it decides again.
    alarm: Option<Micros>,
    /// The placement that what is being written was decided on.
    writing: Option<Option<Placement>>,
}

pub(crate) struct Coordinator {
    pub(crate) me: Actor,
    session: Session,
    pub(crate) roster: Option<Rc<Roster>>,
    /// Epoch, and revision of its change, of the stored placement.
    stored: (u64, u64),
    term: Option<Term>,
    demand: Demand,
    /// By node: the way to it.
    pub(crate) lanes: Vec<LaneHealth>,
    pub(crate) budget: RetryBudget,
    pub(crate) retries: u64,
    pub(crate) first_calls: u64,
    pub(crate) requests: BTreeMap<u64, Request>,
    /// Calls on their way.
    pub(crate) sent: BTreeMap<u64, Sent>,
    pub(crate) next_id: u64,
    /// Whether nodes that are away are worth waiting for, as the layers so far found it.
    pub(crate) outlook: Outlook,
}

pub(crate) fn node_name(node: usize) -> sida_routing::NodeId {
    format!("expert-node-{node}").into()
}

impl Coordinator {
    pub(crate) fn start(core: &mut Core, index: usize, nodes: usize) -> Self {
        let me = Actor::Coordinator(index);
        let record = Record { is_expert_node: false, weight: 1.0, is_leaving: false, ready_epoch: 0 };
        let session = Session::new(core, me, format!("coordinator-{index}").into(), record);
        core.timer_in(0, me, Timer::Connect);
        core.timer_in(1_000_000, me, Timer::Demand);
        core.timer_in(10_000, me, Timer::Arrival);
        Self {
            me,
            session,
            roster: None,
            stored: (0, 0),
            term: None,
            demand: Demand::new(core.shape.extent.moe_layers, core.shape.extent.num_experts),
            lanes: vec![LaneHealth::unknown(); nodes],
            budget: RetryBudget::new(0.2, 10.0),
            retries: 0,
            first_calls: 0,
            requests: BTreeMap::new(),
            sent: BTreeMap::new(),
            next_id: 0,
            outlook: Outlook::default(),
        }
    }

    pub(crate) fn on_timer(&mut self, core: &mut Core, timer: Timer) {
        match timer {
            Timer::Session => {
                self.session.tick(core);
                if !self.session.is_connected
                    && let Some(term) = &mut self.term
                {
                    // Whether it was written the next list tells.
                    term.writing = None;
                }
                self.stand(core);
            }
            Timer::Relist => self.session.relist(core),
            Timer::Decide => {
                if let Some(term) = &mut self.term
                    && term.alarm.is_some_and(|alarm| alarm <= core.now)
                {
                    term.alarm = None;
                    self.decide(core);
                }
            }
            Timer::Demand => {
                core.timer_in(1_000_000, self.me, Timer::Demand);
                if !core.is_quiet {
                    self.demand.decay(0.9);
                    self.demand.settle();
                }
                self.session.members.expire(core.time());
                self.decide(core);
            }
            Timer::Connect => {
                core.timer_in(CONNECT, self.me, Timer::Connect);
                for node in 0..self.lanes.len() {
                    if self.lanes[node].is_lost(core.time()) {
                        self.disconnected(core, node);
                    }
                    if !self.lanes[node].is_connected() {
                        core.send(self.me, Actor::Node(node), Message::Connect);
                    }
                }
            }
            Timer::Arrival => self.arrive(core),
            Timer::Look { request } => self.look(core, request),
            other => unreachable!("a coordinator has no alarm for {other:?}"),
        }
    }

    pub(crate) fn on_message(&mut self, core: &mut Core, from: Actor, message: Message) {
        let news = match (from, message) {
            (_, Message::StoreReply { id, reply }) => self.session.on_reply(core, id, reply),
            (_, Message::Watched(change)) => self.session.on_change(core, change),
            (_, Message::WatchCompacted) => {
                self.session.on_compacted(core);
                Vec::new()
            }
            (Actor::Node(node), message) => return self.on_lane(core, node, message),
            (from, message) => unreachable!("{from:?} does not send {message:?}"),
        };
        for news in news {
            self.learn(core, news);
        }
    }

    fn learn(&mut self, core: &mut Core, news: News) {
        match news {
            News::Members => self.decide(core),
            News::Placement(placement, revision) => {
                if revision > self.stored.1 {
                    self.stored = (placement.epoch(), revision);
                }
                self.adopt(core, &placement);
                self.decide(core);
            }
            News::Leader(leader, revision) => {
                // A list may have been overtaken by the answer to the election.
                let is_over = |term: &Term| revision >= term.elected && leader != Some((self.me, term.elected));
                if self.term.as_ref().is_some_and(is_over) {
                    let me = self.me;
                    core.note(|| format!("{me:?} leads no more"));
                    self.term = None;
                }
                if leader.is_none() {
                    self.stand(core);
                }
            }
            News::Elected(elected) => {
                let me = self.me;
                core.note(|| format!("{me:?} leads by revision {elected}"));
                core.ledger.counts.elections += 1;
                if let Some(roster) = &self.roster {
                    self.demand.adopt(&roster.placement);
                }
                let writer = Writer::new(core.shape.policy, core.shape.pace, core.time());
                self.term = Some(Term { elected, writer, alarm: None, writing: None });
                self.decide(core);
            }
            News::Written(placement, revision) => {
                self.stored = (placement.epoch(), revision);
                if let Some(term) = &mut self.term
                    && let Some(decided_on) = term.writing.take()
                {
                    term.writer.written(core.time(), decided_on.as_ref(), &placement);
                }
                self.adopt(core, &placement);
                self.decide(core);
            }
            News::Outdated => {
                core.ledger.counts.refused_writes += 1;
                let me = self.me;
                core.note(|| format!("{me:?}: its write was refused"));
                if let Some(term) = &mut self.term {
                    term.writing = None;
                }
                self.session.send(core, Op::List);
            }
        }
    }

    /// Stands for election where nobody is known to lead. The store knows better.
    fn stand(&mut self, core: &mut Core) {
        let is_standing = self.session.is_asking(|op| matches!(op, Op::Campaign { .. }));
        if let Some(lease) = self.session.lease
            && self.term.is_none()
            && self.session.is_connected
            && !is_standing
        {
            self.session.send(core, Op::Campaign { lease });
        }
    }

    /// Takes a placement if it is newer.
    pub(crate) fn adopt(&mut self, core: &mut Core, offered: &Placement) {
        let current = self.placement().map(|placement| (placement, MODEL));
        match judge(current, offered, MODEL) {
            Verdict::Adopt => {
                let (me, life) = (self.me, core.life(self.me));
                core.note(|| format!("{me:?} adopts epoch {}", offered.epoch()));
                core.ledger.adopted(me, life, offered);
                let index = |name: &sida_routing::NodeId| (0..self.lanes.len()).find(|&node| node_name(node) == *name);
                let nodes = offered.nodes().iter().map(|name| index(name).expect("a node of ours")).collect();
                self.roster = Some(Rc::new(Roster { placement: offered.clone(), nodes }));
            }
            Verdict::Known | Verdict::Older => {}
            verdict @ (Verdict::Conflict | Verdict::OtherModel) => {
                let me = self.me;
                core.ledger.violated(|| format!("{me:?} judges epoch {} as {verdict:?}", offered.epoch()));
            }
        }
    }

    /// Decides on the placement, if elected and nothing is being written.
    fn decide(&mut self, core: &mut Core) {
        let Some(term) = &mut self.term else { return };
        if term.writing.is_some() || !self.session.is_fresh(core) {
            return;
        }
        let standing = |(node, record): (&sida_routing::NodeId, &Record)| Standing {
            node: node.clone(),
            weight: record.weight,
            is_leaving: record.is_leaving,
            ready_epoch: record.ready_epoch,
        };
        let counting = self.session.members.counting(core.time());
        let members: Vec<Standing> = counting.filter(|(_, record)| record.is_expert_node).map(standing).collect();
        let current = self.roster.as_ref().map(|roster| &roster.placement);
        let extent = core.shape.extent;
        let decision = term.writer.decide(core.time(), current, self.stored.0, extent, &members, &self.demand);
        match decision.expect("names and weights of ours") {
            Decision::Write(placement) => {
                let me = self.me;
                core.note(|| format!("{me:?} writes epoch {} on {} nodes", placement.epoch(), placement.nodes().len()));
                term.writing = Some(current.cloned());
                let write = Op::Write { elected: term.elected, replaces: self.stored.1, placement };
                self.session.send(core, write);
            }
            Decision::Wait(Some(until)) => {
                let until = Micros::try_from(until.as_micros()).expect("a time of this run") + 1;
                if term.alarm.is_none_or(|alarm| alarm <= core.now || alarm > until) {
                    term.alarm = Some(until);
                    core.timer_at(until, self.me, Timer::Decide);
                }
            }
            Decision::Wait(None) => {}
        }
    }

    /// What it acts on.
    pub(crate) fn placement(&self) -> Option<&Placement> {
        self.roster.as_ref().map(|roster| &roster.placement)
    }

    /// Rows for an expert are on their way.
    pub(crate) fn wanted(&mut self, key: sida_routing::ExpertKey) {
        self.demand.note(key, 100);
    }
}
