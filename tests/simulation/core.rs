//! What every simulated process works with: the time, the order of events, the one source of chance, the
//! network, the trace, and the ledger of what must hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    time::Duration,
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sida_routing::NodeId;

use crate::{
    coordinator::Shape,
    event::{Actor, Event, Message, Micros, Timer},
    ledger::Ledger,
};

pub(crate) struct Core {
    pub(crate) shape: Shape,
    pub(crate) now: Micros,
    /// By time, then by the order in which they came about.
    queue: BTreeMap<(Micros, u64), Event>,
    sequence: u64,
    pub(crate) rng: ChaCha8Rng,
    pub(crate) ledger: Ledger,
    trace: Option<String>,
    /// Pairs that do not reach each other, the lesser first.
    pub(crate) cut: BTreeSet<(Actor, Actor)>,
    /// Pairs whose messages take that much longer, the lesser first.
    pub(crate) slow: BTreeMap<(Actor, Actor), Micros>,
    /// Lives of the processes: how often each has started.
    pub(crate) lives: BTreeMap<Actor, u32>,
    /// The share of watch events that are lost.
    pub(crate) watch_loss: f64,
    /// All faults are over; the load is taken as it is.
    pub(crate) is_quiet: bool,
    /// Expert-nodes that run, reach the store (if it is there) and want to stay.
    pub(crate) fit: BTreeSet<NodeId>,
    /// Since when those of them are registered that have been so without being unfit since.
    pub(crate) well: BTreeMap<NodeId, Micros>,
    /// Requests that failed: whose, which, since when it was tried, and the nodes there were.
    pub(crate) failures: Vec<(Actor, u64, Micros, Vec<usize>)>,
}

impl Core {
    pub(crate) fn new(shape: Shape, seed: u64, traced: bool) -> Self {
        Self {
            shape,
            now: 0,
            queue: BTreeMap::new(),
            sequence: 0,
            rng: ChaCha8Rng::seed_from_u64(seed),
            ledger: Ledger::new(),
            trace: traced.then(String::new),
            cut: BTreeSet::new(),
            slow: BTreeMap::new(),
            lives: BTreeMap::new(),
            watch_loss: 0.0,
            is_quiet: false,
            fit: BTreeSet::new(),
            well: BTreeMap::new(),
            failures: Vec::new(),
        }
    }

    /// The time, as the decisions take it.
    pub(crate) fn time(&self) -> Duration {
        Duration::from_micros(self.now)
    }

    /// When the next event is due.
    pub(crate) fn next_at(&self) -> Option<Micros> {
        self.queue.first_key_value().map(|(&(at, _), _)| at)
    }

    pub(crate) fn pop(&mut self) -> Option<Event> {
        let ((at, _), event) = self.queue.pop_first()?;
        self.now = at;
        Some(event)
    }

    pub(crate) fn push(&mut self, at: Micros, event: Event) {
        self.sequence += 1;
        self.queue.insert((at.max(self.now), self.sequence), event);
    }

    pub(crate) fn timer_at(&mut self, at: Micros, actor: Actor, timer: Timer) {
        let life = self.life(actor);
        self.push(at, Event::Timer { actor, life, timer });
    }

    pub(crate) fn timer_in(&mut self, delay: Micros, actor: Actor, timer: Timer) {
        self.timer_at(self.now + delay, actor, timer);
    }

    pub(crate) fn life(&self, actor: Actor) -> u32 {
        self.lives.get(&actor).copied().unwrap_or(0)
    }

    /// Sends a message; it arrives, unless the way is cut by then.
    pub(crate) fn send(&mut self, from: Actor, to: Actor, message: Message) {
        self.send_to_life(from, to, self.life(to), message);
    }

    pub(crate) fn send_to_life(&mut self, from: Actor, to: Actor, life: u32, message: Message) {
        let arrives = self.now + self.latency(from, to);
        self.send_at(arrives, from, to, life, message);
    }

    pub(crate) fn send_at(&mut self, arrives: Micros, from: Actor, to: Actor, life: u32, message: Message) {
        self.push(arrives, Event::Deliver { from, to, life, message });
    }

    /// One way between two processes, now.
    pub(crate) fn latency(&mut self, a: Actor, b: Actor) -> Micros {
        self.rng.random_range(100..600) + self.slow.get(&pair(a, b)).copied().unwrap_or(0)
    }

    pub(crate) fn is_cut(&self, a: Actor, b: Actor) -> bool {
        self.cut.contains(&pair(a, b))
    }

    /// Writes a line into the trace, if there is one.
    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            writeln!(trace, "{:>11} {}", self.now, line()).expect("a string takes everything");
        }
    }

    pub(crate) fn take_trace(&mut self) -> String {
        self.trace.take().unwrap_or_default()
    }
}

pub(crate) fn pair(a: Actor, b: Actor) -> (Actor, Actor) {
    (a.min(b), a.max(b))
}
