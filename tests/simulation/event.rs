//! What can happen in the simulated cluster, and who it happens to.

use std::{fmt, time::Duration};

use sida_routing::{ExpertKey, Placement, failover::CallFailure};

use crate::{etcd, faults::Fault};

/// Simulated time since the begin, in microseconds.
pub(crate) type Micros = u64;

/// A simulated process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Actor {
    Etcd,
    Coordinator(usize),
    Node(usize),
}

/// Something at a moment.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A message arrives. `life` is that of the receiver when it was sent: a restarted process has other
    /// connections.
    Deliver { from: Actor, to: Actor, life: u32, message: Message },
    /// A process's own alarm.
    Timer { actor: Actor, life: u32, timer: Timer },
    /// Something breaks, or is mended.
    Fault(Fault),
}

/// What processes send each other.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    Store {
        id: u64,
        op: etcd::Op,
    },
    StoreReply {
        id: u64,
        reply: etcd::Reply,
    },
    Watched(etcd::Change),
    WatchCompacted,
    Connect,
    Connected,
    /// The connection broke: its process ended, or somebody reset it.
    LaneLost,
    Call {
        call: u64,
        keys: Vec<ExpertKey>,
        epoch: u64,
    },
    Alive,
    /// A call is computed. So many of its experts were loaded for it, and that and computing took so long.
    Done {
        call: u64,
        loads: u32,
        load: Duration,
        compute: Duration,
    },
    /// A call is refused; for a newer placement with that.
    Refused {
        call: u64,
        failure: CallFailure,
        newer: Option<Placement>,
    },
}

/// What a call takes on a node.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub(crate) keys: Vec<ExpertKey>,
    /// How many of them must be loaded first, and how long that and computing take.
    pub(crate) loads: u32,
    pub(crate) load: Duration,
    pub(crate) compute: Duration,
}

/// What processes wake up for.
#[derive(Clone, Debug)]
pub(crate) enum Timer {
    /// Keep the lease alive, look whether the store still answers.
    Session,
    /// List everything anew.
    Relist,
    /// Decide on the placement, if elected.
    Decide,
    /// Let the demand fade.
    Demand,
    /// Connect what is not connected.
    Connect,
    /// A client sends the next request.
    Arrival,
    /// Look whether calls of a request are to be given up.
    Look { request: u64 },
    /// An expert-node has loaded the next expert of its placement.
    Loaded { key: ExpertKey },
    /// An expert-node is done with a call.
    Worked { coordinator: usize, call: u64, work: Work },
    /// An expert-node says that it is still at a call.
    Heartbeat { coordinator: usize, call: u64 },
    /// An expert-node that was told to leave has waited for long enough.
    Leave,
}

/// As a line of the trace: placements by their epoch.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => write!(f, "{fault:?}"),
            Self::Timer { actor, timer, .. } => write!(f, "{actor:?} wakes: {timer:?}"),
            Self::Deliver { from, to, message, .. } => write!(f, "{from:?} -> {to:?}: {message}"),
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store { id, op: etcd::Op::Write { placement, .. } } => write!(f, "{id} writes {}", placement.epoch()),
            Self::Store { id, op } => write!(f, "{id} {op:?}"),
            Self::StoreReply { id, reply: etcd::Reply::Listed(listed) } => {
                let (members, epoch) = (listed.members.len(), listed.placement.as_ref().map(|(p, _)| p.epoch()));
                write!(f, "{id} revision {}: {members} members, {:?} leads, {epoch:?}", listed.revision, listed.leader)
            }
            Self::Watched(etcd::Change { revision, value: Some(etcd::Value::Placement(placement)), .. }) => {
                write!(f, "revision {revision}: epoch {}", placement.epoch())
            }
            Self::Refused { call, newer: Some(newer), .. } => {
                write!(f, "call {call} is of the past: {}", newer.epoch())
            }
            other => write!(f, "{other:?}"),
        }
    }
}
