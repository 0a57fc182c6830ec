//! Preload: hints to expert-nodes, ahead of the rows, which of their experts the hash tables of a batch name. A hint is
//! taken back when its batch is done. Losing a hint costs time, never correctness, so nothing here waits and nothing
//! here fails.
//!
//! Of a request in `exact` mode those experts are named that are likely enough to be used; in `hash` those that its tables
//! name first, which it will use; in `guided` all that its tables name, since those are what its router may choose. Where all
//! experts are resident there is nothing to hint.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use sida_cluster::Cluster;
use sida_routing::{ExpertKey, HashTable, Plan, PlanId, PlanScope};

use crate::{
    answer::routing_mode::RoutingMode,
    dispatch::nodes::{Link, Nodes},
};

/// Gives hints.
pub(crate) struct Preload {
    nodes: Arc<Nodes>,
    /// Keeps count of which experts are wanted: the writer of the placement gives more holders to those wanted most.
    cluster: Cluster,
    /// How likely a batch in `exact` uses what is hinted, at least; an infinite chance gives no hints, also in `hash`.
    chance: f64,
    /// Experts that the model's routers choose for a token.
    top_k: usize,
    next_id: AtomicU64,
}

/// A hint that was given. Dropping it takes the hint back.
pub(crate) struct Hint {
    id: PlanId,
    links: Vec<Arc<Link>>,
}

#[cfg(test)]
impl Hint {
    /// One that nobody was given.
    pub(crate) fn of_nobody() -> Self {
        Self { id: PlanId(0), links: Vec::new() }
    }
}

impl Drop for Hint {
    fn drop(&mut self) {
        self.links.iter().for_each(|link| link.release(self.id));
    }
}

impl Preload {
    pub(crate) fn new(nodes: Arc<Nodes>, cluster: Cluster, chance: f64, top_k: usize) -> Self {
        Self { nodes, cluster, chance, top_k, next_id: AtomicU64::new(1) }
    }

    /// Tells every node which of its experts the tokens of `tables`, each with the mode of its request, will use when their
    /// batch begins, or use by now if it has `begun`.
    pub(crate) fn announce<'a>(
        &self,
        tables: impl IntoIterator<Item = (RoutingMode, &'a HashTable)>,
        begun: bool,
    ) -> Hint {
        let tables: Vec<_> = tables.into_iter().collect();
        self.note_demand(tables.iter().map(|&(_, table)| table));
        self.hint(tables, begun)
    }

    /// Tells every node which of its experts the batch of `tables` uses, which begins now. This hint replaces those
    /// that were announced for its requests: only all tables together say in which order the experts are used.
    pub(crate) fn begin<'a>(&self, tables: impl IntoIterator<Item = (RoutingMode, &'a HashTable)>) -> Hint {
        self.hint(tables, true)
    }

    /// Counts towards the demand for experts what was never announced.
    pub(crate) fn note_demand<'a>(&self, tables: impl IntoIterator<Item = &'a HashTable>) {
        self.cluster.note_demand(tables);
    }

    fn hint<'a>(&self, tables: impl IntoIterator<Item = (RoutingMode, &'a HashTable)>, begins: bool) -> Hint {
        let id = PlanId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let tables = tables.into_iter().filter_map(|(mode, table)| Some((table, self.scope_of(mode)?)));
        let tables: Vec<(&HashTable, PlanScope)> = tables.collect();
        let roster = self.nodes.roster();
        if tables.is_empty() || roster.all_resident() {
            return Hint { id, links: Vec::new() };
        }
        let plan = Plan::from_tables(id, &tables, self.top_k);
        let now = self.nodes.clock().now();
        let mut shares: Vec<Vec<ExpertKey>> = vec![Vec::new(); roster.links.len()];
        for key in plan.experts {
            if let Some(node) = roster.first_asked(key, now) {
                shares[node].push(key);
            }
        }
        let mut links = Vec::new();
        for (link, experts) in roster.links.iter().zip(shares).filter(|(_, experts)| !experts.is_empty()) {
            link.plan(Plan { id, experts, begins }, roster.placement.epoch());
            links.push(link.clone());
        }
        Hint { id, links }
    }

    /// How much is hinted of the tables of a request in `mode`; `None` if nothing is.
    fn scope_of(&self, mode: RoutingMode) -> Option<PlanScope> {
        let hints = self.chance.is_finite();
        match mode {
            RoutingMode::Guided => Some(PlanScope::Everything),
            RoutingMode::Exact => hints.then_some(PlanScope::Likely(self.chance)),
            RoutingMode::Hash { .. } => hints.then_some(PlanScope::FirstChoices),
        }
    }
}
