//! Recorded routes in the place of the router's choice: which of them each sequence replays. A measurement has them replayed
//! ([`crate::CoordinatorConfig::recorded_routes`]); answers are nobody's then. `expert_choice` puts them into a pass.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use sida_routing::{ExpertId, LayerId, RecordedRoutes};

/// A recording that every request replays, each from a place of its own.
pub(crate) struct Replay {
    routes: Arc<RecordedRoutes>,
    /// Sequences that were given a place.
    sequences: AtomicU64,
}

/// What a request replays.
#[derive(Clone, Debug)]
pub(crate) struct ReplayedSequence {
    routes: Arc<RecordedRoutes>,
    /// Of its first branch; the others follow.
    number: u64,
}

/// What some rows of one branch replay, which follow each other.
pub(crate) struct ReplayedRows {
    sequence: ReplayedSequence,
    /// Tokens of the prompt.
    prompt_tokens: usize,
    /// The place in the sequence of the first of them.
    first: usize,
}

impl Replay {
    pub(crate) fn new(routes: Arc<RecordedRoutes>) -> Self {
        Self { routes, sequences: AtomicU64::new(0) }
    }

    /// What the next request replays, which has so many branches.
    pub(crate) fn sequence(&self, branches: usize) -> ReplayedSequence {
        let number = self.sequences.fetch_add(branches as u64, Ordering::Relaxed);
        ReplayedSequence { routes: self.routes.clone(), number }
    }
}

impl ReplayedSequence {
    /// What the rows of a branch replay whose first is in the place `first` of a sequence that begins with so many tokens of
    /// a prompt.
    pub(crate) fn rows(&self, branch: usize, first: usize, prompt_tokens: usize) -> ReplayedRows {
        let sequence = Self { routes: self.routes.clone(), number: self.number.wrapping_add(branch as u64) };
        ReplayedRows { sequence, prompt_tokens, first }
    }
}

impl ReplayedRows {
    /// The experts of one of the rows at a layer.
    pub(crate) fn experts(&self, layer: LayerId, row: usize) -> &[ExpertId] {
        let ReplayedSequence { routes, number } = &self.sequence;
        routes.of_sequence(*number, self.first + row, self.prompt_tokens, layer)
    }
}
