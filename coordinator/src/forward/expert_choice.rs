//! Which experts the rows of a batch go to at an MoE layer. A batch mixes requests of different routing modes, so the
//! choice is made row by row: first the router chooses for all rows that want it, then rows of `guided` requests whose
//! experts were not planned choose again among those that were, and the rows of `hash` requests are overwritten from their
//! hash tables. Where recorded routes are replayed, they stand in the place of the router's choice before all that.

use std::ops::Range;

use sida_model::{Backend, ModelError, Spans, Stack, router};
use sida_routing::{ExpertId, HashTable, LayerId, Routes};

use crate::{
    answer::{
        request_error::RequestError,
        routing_mode::{Alpha, RoutingMode},
        trace::{ExpertSets, HashCounts},
    },
    forward::guided_choice::GuidedRows,
    intake::replay::ReplayedRows,
    predict::noted_labels::NotedLabels,
};

/// How the rows that one sequence (or one target of a scored request) has in a batch are routed, and what came of it.
pub(crate) struct SequenceRouting {
    /// The routing mode of the request.
    mode: RoutingMode,
    /// Whether the request is predicted.
    pub(crate) is_predicted: bool,
    /// The hash table; without one a pass runs `exact`.
    table: Option<HashTable>,
    /// How many rows there are. They are the last tokens of the table, which may begin with earlier ones.
    rows: usize,
    /// Recorded routes that are replayed for them.
    replayed: Option<ReplayedRows>,
    /// What the router chose for them at each MoE layer that it was asked at: (rows, top_k).
    chosen: Vec<(LayerId, Vec<Option<ExpertId>>)>,
    /// Where what the router gave them is noted for predictor-nodes that learn.
    pub(crate) noted: Option<NotedLabels>,
    /// The experts that the rows went to.
    pub(crate) experts: ExpertSets,
    /// How often the table named the experts that the router chose, at each MoE layer.
    pub(crate) hash: Vec<(LayerId, HashCounts)>,
    /// How many experts of `guided` rows are not those that the router chose freely.
    pub(crate) rerouted: u64,
    /// Why the result of these rows cannot be used. The rest of the batch is sound.
    pub(crate) failure: Option<RequestError>,
}

impl SequenceRouting {
    /// So many rows of a request in `mode`.
    pub(crate) fn new(mode: RoutingMode, is_predicted: bool, rows: usize, experts: ExpertSets) -> Self {
        let (table, replayed, chosen, noted, hash, rerouted, failure) = Default::default();
        Self { mode, is_predicted, table, rows, replayed, chosen, noted, experts, hash, rerouted, failure }
    }

    /// The same, with recorded routes, if there are some, in the place of what the router chooses.
    pub(crate) fn replaying(self, replayed: Option<ReplayedRows>) -> Self {
        Self { replayed, ..self }
    }

    /// Takes the prediction for the rows, before the pass or after it. A table that names fewer experts per token than
    /// the `top_k` of the model cannot choose them.
    pub(crate) fn predicted(&mut self, table: Option<HashTable>, top_k: usize) {
        let chooses = self.mode != RoutingMode::Exact;
        self.table = table.filter(|table| !chooses || table.shape().top_k >= top_k);
    }

    /// The prediction, if it was made.
    pub(crate) fn table(&self) -> Option<&HashTable> {
        self.table.as_ref()
    }

    /// The prediction, if it was made, and the mode that says how much of it is planned.
    pub(crate) fn planned(&self) -> Option<(RoutingMode, &HashTable)> {
        Some((self.mode, self.table.as_ref()?))
    }

    /// Compares the table, if there is one by now, with what the router chose; what came of it at each layer.
    pub(crate) fn compare(&mut self) -> &[(LayerId, HashCounts)] {
        let chosen = std::mem::take(&mut self.chosen);
        let Some(table) = &self.table else { return &[] };
        let first_token = table.shape().tokens - self.rows;
        let compare =
            |(layer, chosen): (LayerId, Vec<_>)| (layer, count(table, layer, first_token, self.rows, &chosen));
        let before = self.hash.len();
        self.hash.extend(chosen.into_iter().map(compare));
        &self.hash[before..]
    }

    /// Whether the router chooses the experts of these rows among all.
    pub(crate) fn is_routed(&self) -> bool {
        self.replayed.is_none() && matches!(self.chooser(), Chooser::Router)
    }

    /// Whether the router chooses the experts of these rows, or gives their factors.
    fn wants_router(&self) -> bool {
        !matches!(self.chooser(), Chooser::Table(_, Alpha::Predicted))
    }

    fn chooser(&self) -> Chooser<'_> {
        match (self.mode, &self.table) {
            (RoutingMode::Guided, Some(table)) => Chooser::RouterAmong(table),
            (RoutingMode::Hash { alpha }, Some(table)) => Chooser::Table(table, alpha),
            (RoutingMode::Exact, _) | (_, None) => Chooser::Router,
        }
    }
}

/// Who chooses the experts of some rows.
enum Chooser<'t> {
    /// The router, among all of the layer.
    Router,
    /// The router, among those that this table names.
    RouterAmong(&'t HashTable),
    /// The table. The factors come from there.
    Table(&'t HashTable, Alpha),
}

/// The rows of a pass at an MoE layer.
#[derive(Clone, Copy)]
pub(crate) struct MoeLayerRows<'p> {
    pub(crate) stack: Stack,
    pub(crate) layer: LayerId,
    /// The rows of each sequence.
    pub(crate) spans: &'p Spans,
}

/// The routes of all rows at the MoE layer that a pass has come to, with a routing for each sequence. Notes in each
/// routing what the router chose.
pub(crate) fn routes<B: Backend>(
    backend: &mut B,
    pass: &mut B::Pass<'_>,
    at: MoeLayerRows<'_>,
    routings: &mut [SequenceRouting],
) -> Result<Routes, ModelError> {
    let MoeLayerRows { stack, layer, spans } = at;
    let (top_k, num_experts, is_normalised) =
        (backend.config().top_k, backend.config().num_experts, backend.config().is_normalised());
    let mut routes = match routings.iter().any(SequenceRouting::wants_router) {
        true => backend.routes(pass)?,
        false => Routes { top_k, experts: vec![None; spans.rows() * top_k], weights: vec![0.0; spans.rows() * top_k] },
    };
    for (routing, rows) in routings.iter().zip(spans.ranges()) {
        if let Some(replayed) = &routing.replayed {
            replay(replayed, layer, rows, backend.probabilities(pass)?, is_normalised, &mut routes);
        }
    }
    note_choice(layer, &routes, spans, routings);
    for (routing, rows) in routings.iter_mut().zip(spans.ranges()) {
        if let Some(noted) = &mut routing.noted {
            noted.note(layer, &backend.probabilities(pass)?[rows.start * num_experts..rows.end * num_experts]);
        }
    }
    for (routing, rows) in routings.iter_mut().zip(spans.ranges()) {
        match routing.chooser() {
            Chooser::Router => {}
            Chooser::RouterAmong(table) => {
                let guided = GuidedRows { stack, layer, table, rows };
                routing.rerouted += guided.route(backend.probabilities(pass)?, is_normalised, &mut routes);
            }
            Chooser::Table(table, alpha) => {
                let probabilities = match alpha {
                    Alpha::Router => Some(backend.probabilities(pass)?),
                    Alpha::Predicted => None,
                };
                let first_token = table.shape().tokens - routing.rows;
                for (token, row) in (first_token..).zip(rows) {
                    let row_probabilities = probabilities.map(|all| &all[row * num_experts..][..num_experts]);
                    let at = row * top_k..(row + 1) * top_k;
                    let (experts, weights) = (&mut routes.experts[at.clone()], &mut routes.weights[at]);
                    predicted(table, layer, token, row_probabilities, experts, weights);
                    if is_normalised {
                        router::normalise(weights);
                    }
                }
            }
        }
    }
    Ok(routes)
}

/// Notes in each routing what the router chose for its rows at an MoE layer, where the router was asked.
pub(crate) fn note_choice(layer: LayerId, routes: &Routes, spans: &Spans, routings: &mut [SequenceRouting]) {
    for (routing, rows) in routings.iter_mut().zip(spans.ranges()) {
        if routing.wants_router() {
            let chosen = routes.experts[rows.start * routes.top_k..rows.end * routes.top_k].to_vec();
            routing.chosen.push((layer, chosen));
        }
    }
}

/// Makes the routes of some rows those that were recorded, scaled by the router's `probabilities` (rows, experts) of them.
/// Where fewer experts of a token were recorded than the router chooses, it goes to those only, and where none were to those that
/// the router chose.
fn replay(
    replayed: &ReplayedRows,
    layer: LayerId,
    rows: Range<usize>,
    probabilities: &[f32],
    is_normalised: bool,
    routes: &mut Routes,
) {
    let (top_k, num_experts) = (routes.top_k, probabilities.len() / routes.tokens().max(1));
    for (index, row) in rows.enumerate() {
        let recorded = replayed.experts(layer, index);
        if recorded.is_empty() {
            continue;
        }
        let probabilities = &probabilities[row * num_experts..][..num_experts];
        let at = row * top_k..(row + 1) * top_k;
        let (experts, weights) = (&mut routes.experts[at.clone()], &mut routes.weights[at]);
        experts.fill(None);
        weights.fill(0.0);
        for (k, &expert) in recorded.iter().take(top_k).enumerate() {
            (experts[k], weights[k]) = (Some(expert), probabilities[usize::from(expert.0)]);
        }
        if is_normalised {
            router::normalise(weights);
        }
    }
}

/// Routes one row by the hash table: to its first choices, scaled by the router's probabilities of them if given, by
/// the predicted ones otherwise.
fn predicted(
    table: &HashTable,
    layer: LayerId,
    token: usize,
    probabilities: Option<&[f32]>,
    experts: &mut [Option<ExpertId>],
    weights: &mut [f32],
) {
    let (chosen, alphas) = (table.experts(layer, token), table.alphas(layer, token));
    for (k, (expert, weight)) in experts.iter_mut().zip(weights.iter_mut()).enumerate() {
        *expert = Some(chosen[k]);
        *weight = probabilities.map_or(alphas[k], |p| p[usize::from(chosen[k].0)]);
    }
}

/// How a table's `rows` from `first_token` fared against the experts that the router chose, (rows, top_k).
fn count(
    table: &HashTable,
    layer: LayerId,
    first_token: usize,
    rows: usize,
    routed: &[Option<ExpertId>],
) -> HashCounts {
    let mut counts = HashCounts::default();
    let top_k = (routed.len() / rows.max(1)).max(1);
    for (at, expert) in routed.iter().enumerate() {
        let Some(expert) = expert else { continue };
        match table.experts(layer, first_token + at / top_k).iter().position(|e| e == expert) {
            Some(rank) => {
                counts.hits += 1;
                counts.top1_hits += u64::from(rank == 0);
                counts.top3_hits += u64::from(rank < 3);
            }
            None => counts.misses += 1,
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sida_routing::{Digest, RecordedRoutes, hash_table::Shape};

    use super::*;
    use crate::intake::replay::Replay;

    fn table() -> HashTable {
        let shape = Shape { first_layer: LayerId(2), layers: 1, tokens: 2, top_k: 2 };
        let experts = [3, 1, 0, 2].map(ExpertId).to_vec();
        HashTable::new(Digest([0; 32]), Digest([1; 32]), shape, 4, experts, vec![0.5, 0.25, 0.5, 0.5]).expect("valid")
    }

    #[test]
    fn table_against_router() {
        // Would break: the reported hit rate is not that of the routed experts.
        let routed = [Some(ExpertId(1)), Some(ExpertId(0))];
        let counts = count(&table(), LayerId(2), 0, 2, &routed);
        assert_eq!(counts, HashCounts { hits: 2, top1_hits: 1, top3_hits: 2, misses: 0 });
        assert_eq!(count(&table(), LayerId(2), 1, 1, &[Some(ExpertId(3))]).misses, 1);
    }

    #[test]
    fn recorded_experts_stand_in_the_place_of_the_routers() {
        // Would break: rows of a sequence that is not replayed go elsewhere, a row is scaled by the probability of an expert
        // that it does not go to, or the experts beyond those that were recorded are left from the router's choice.
        let tokens = [&[3, 0][..], &[1, 2], &[]].map(|token| vec![token.iter().copied().map(ExpertId).collect()]);
        let recorded = RecordedRoutes::new(Vec::new(), tokens.to_vec()).expect("three tokens");
        let replay_of_all = Replay::new(Arc::new(recorded));
        let replayed_from = |place| replay_of_all.sequence(0).rows(0, place, 0);
        let replayed = replayed_from(0);
        let own = Some(ExpertId(9));
        let mut routes = Routes { top_k: 3, experts: vec![own; 9], weights: vec![0.5; 9] };
        let row = [0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        replay(&replayed, LayerId(0), 1..3, &row.repeat(3), false, &mut routes);
        let expert = |expert| Some(ExpertId(expert));
        let experts = [own, own, own, expert(3), expert(0), None, expert(1), expert(2), None];
        assert_eq!(routes.experts, experts);
        assert_eq!(routes.weights, [0.5, 0.5, 0.5, 0.4, 0.1, 0.0, 0.2, 0.3, 0.0]);
        // Another row of the same sequence, of which nothing was recorded at this layer.
        let unrecorded = replayed_from(2);
        replay(&unrecorded, LayerId(0), 0..1, &row.repeat(3), false, &mut routes);
        assert_eq!(routes.experts, experts);
        replay(&replayed, LayerId(0), 0..1, &row.repeat(3), true, &mut routes);
        assert_eq!((routes.experts[0], routes.weights[2]), (expert(3), 0.0));
        assert!((routes.weights[..3].iter().sum::<f32>() - 1.0).abs() < 1e-6, "{:?}", routes.weights);
    }

    #[test]
    fn factor_of_the_predicted_expert() {
        // Would break: `hash` scales an expert by another expert's probability, or by the predictor's when the
        // router's was asked for.
        let (mut experts, mut weights) = ([None], [0.0]);
        let probabilities = [0.1, 0.2, 0.3, 0.4];
        predicted(&table(), LayerId(2), 0, Some(&probabilities), &mut experts, &mut weights);
        assert_eq!((experts[0], weights[0]), (Some(ExpertId(3)), 0.4));
        predicted(&table(), LayerId(2), 1, None, &mut experts, &mut weights);
        assert_eq!((experts[0], weights[0]), (Some(ExpertId(0)), 0.5));
    }
}
