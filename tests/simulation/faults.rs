//! What breaks in a run, and when it is mended again: drawn from the seed before the run begins. After
//! [`FAULTS_END`] everything is whole.

use rand::Rng;
use sida_routing::{ExpertId, ExpertKey, LayerId};

use crate::{
    core::Core,
    event::{Actor, Event, Micros},
};

/// Faults begin when the cluster has had time to start.
const FAULTS_BEGIN: Micros = 6_000_000;
/// From here on nothing is broken.
pub(crate) const FAULTS_END: Micros = 26_000_000;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    /// SIGKILL.
    Kill(Actor),
    /// Starts what is not running.
    Start(Actor),
    /// SIGSTOP.
    Stop(Actor),
    /// SIGCONT.
    Resume(Actor),
    /// SIGTERM to an expert-node.
    Leave(Actor),
    /// Messages between the two are lost, without a word.
    Cut(Actor, Actor),
    Mend(Actor, Actor),
    /// Messages between the two take that much longer, one way.
    Slow(Actor, Actor, Micros),
    Fast(Actor, Actor),
    /// Calls to the node for the expert fail.
    Unreadable(usize, ExpertKey),
    Readable(usize),
    /// The connection between the two breaks.
    Reset(Actor, Actor),
    StoreAway,
    /// It is back; with the leases that nobody could keep, or without.
    StoreBack {
        leases_run_out: bool,
    },
    Compact,
    /// The share of watch events that are lost from now on, in percent.
    WatchLoss(u32),
    /// All is mended: load stays as it is, so that the placement can come to rest.
    End,
}

/// Draws the faults of a run.
pub(crate) fn schedule(core: &mut Core, coordinators: usize, nodes: usize) {
    let processes = (0..coordinators).map(Actor::Coordinator).chain((0..nodes).map(Actor::Node));
    for actor in processes {
        let start = core.rng.random_range(0..2_500_000);
        core.push(start, Event::Fault(Fault::Start(actor)));
    }
    let mut at = FAULTS_BEGIN;
    // Some runs break something all the time, others leave time to recover.
    let pause_max = core.rng.random_range(300_000..4_000_000);
    loop {
        at += core.rng.random_range(50_000..pause_max);
        if at >= FAULTS_END {
            break;
        }
        let (fault, mend, lasts_max) = draw(core, coordinators, nodes);
        let lasts = core.rng.random_range(20_000..lasts_max);
        core.push(at, Event::Fault(fault));
        if let Some(mend) = mend {
            core.push((at + lasts).min(FAULTS_END), Event::Fault(mend));
        }
    }
    core.push(FAULTS_END + 1, Event::Fault(Fault::End));
}

/// A fault, what mends it, and how long it lasts at most.
fn draw(core: &mut Core, coordinators: usize, nodes: usize) -> (Fault, Option<Fault>, Micros) {
    let (rng, extent) = (&mut core.rng, core.shape.extent);
    let at = rng.random_range(0..nodes);
    let node = Actor::Node(at);
    let coordinator = Actor::Coordinator(rng.random_range(0..coordinators));
    let either = if rng.random_bool(0.5) { node } else { coordinator };
    match rng.random_range(0..100) {
        0..20 => (Fault::Kill(node), Some(Fault::Start(node)), 6_000_000),
        20..35 => (Fault::Stop(node), Some(Fault::Resume(node)), 6_000_000),
        35..42 => (Fault::Leave(node), Some(Fault::Start(node)), 9_000_000),
        42..52 => (Fault::Cut(coordinator, node), Some(Fault::Mend(coordinator, node)), 6_000_000),
        52..60 => (Fault::Cut(Actor::Etcd, either), Some(Fault::Mend(Actor::Etcd, either)), 8_000_000),
        60..66 => {
            let more = rng.random_range(5_000..40_000);
            (Fault::Slow(coordinator, node, more), Some(Fault::Fast(coordinator, node)), 4_000_000)
        }
        66..70 => (Fault::Reset(coordinator, node), None, 1_000_000),
        70..74 => {
            let layer = LayerId(rng.random_range(0..extent.moe_layers as u16));
            // One that is asked for all the time.
            let key = ExpertKey { layer, expert: ExpertId(0) };
            (Fault::Unreadable(at, key), Some(Fault::Readable(at)), 4_000_000)
        }
        74..81 => (Fault::Stop(coordinator), Some(Fault::Resume(coordinator)), 8_000_000),
        81..87 => (Fault::Kill(coordinator), Some(Fault::Start(coordinator)), 6_000_000),
        87..92 => {
            let leases_run_out = rng.random_bool(0.5);
            (Fault::StoreAway, Some(Fault::StoreBack { leases_run_out }), 8_000_000)
        }
        92..96 => (Fault::Compact, None, 1_000_000),
        _ => (Fault::WatchLoss(rng.random_range(10..100)), Some(Fault::WatchLoss(0)), 6_000_000),
    }
}
