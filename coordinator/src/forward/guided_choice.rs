//! The choice in `guided` mode: the router's own, where all of its experts were planned for the sequence, and otherwise the
//! most probable that were. Whom a row may go to follows from the hash table of its own sequence, and from nothing that
//! runs beside it, so an answer is the same alone and in a batch. Called by `expert_choice`.

use std::ops::Range;

use sida_model::{Stack, router};
use sida_routing::{HashTable, LayerId, Permitted, Routes};

/// The rows that a sequence has in a pass, at one MoE layer.
pub(crate) struct GuidedRows<'t> {
    pub(crate) stack: Stack,
    pub(crate) layer: LayerId,
    /// What was predicted of the sequence. Its last tokens are those of the rows.
    pub(crate) table: &'t HashTable,
    /// Which rows of the pass.
    pub(crate) rows: Range<usize>,
}

impl GuidedRows<'_> {
    /// Makes the routes of these rows, which are the router's own, such that they lead to planned experts only.
    /// `probabilities` are the router's for all rows of the pass (rows, experts), row-major. Returns how many experts are
    /// not those that the router chose.
    pub(crate) fn route(&self, probabilities: &[f32], is_normalised: bool, routes: &mut Routes) -> u64 {
        let (tokens, top_k) = (self.table.shape().tokens, routes.top_k);
        let num_experts = probabilities.len() / routes.tokens().max(1);
        let permitted = |tokens| Permitted::planned(self.table, self.layer, tokens, num_experts);
        // All tokens of an encoder are read at once, so that each may use what was planned for any of them. A token of a
        // decoder knows of those behind it no more in a prompt or a target than where it is generated.
        let of_sequence = permitted(0..tokens);
        let mut rerouted = 0;
        for (token, row) in (tokens - self.rows.len()..).zip(self.rows.clone()) {
            let of_token;
            let permitted = match self.stack {
                Stack::Encoder => &of_sequence,
                Stack::Decoder => {
                    of_token = permitted(token..token + 1);
                    &of_token
                }
            };
            let at = row * top_k..(row + 1) * top_k;
            let (experts, weights) = (&mut routes.experts[at.clone()], &mut routes.weights[at]);
            // Most rows stay as they are, to the last bit.
            if permitted.contains_all(experts) {
                continue;
            }
            let own = experts.to_vec();
            let probabilities = &probabilities[row * num_experts..][..num_experts];
            router::choose_among(probabilities, |expert| permitted.contains(expert), experts, weights);
            if is_normalised {
                router::normalise(weights);
            }
            rerouted += experts.iter().filter(|expert| !own.contains(expert)).count() as u64;
        }
        rerouted
    }
}

#[cfg(test)]
mod tests {
    use sida_routing::{Digest, ExpertId, hash_table::Shape};

    use super::*;

    const LAYER: LayerId = LayerId(2);
    /// Three rows of four experts.
    const PROBABILITIES: [f32; 12] = [0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1, 0.1, 0.6, 0.2, 0.1];

    fn table(tokens: usize, experts: &[u16]) -> HashTable {
        let shape = Shape { first_layer: LAYER, layers: 1, tokens, top_k: experts.len() / tokens };
        let experts: Vec<_> = experts.iter().copied().map(ExpertId).collect();
        let alphas = vec![0.5; experts.len()];
        HashTable::new(Digest([0; 32]), Digest([1; 32]), shape, 4, experts, alphas).expect("valid")
    }

    fn routed(
        stack: Stack,
        table: &HashTable,
        rows: Range<usize>,
        top_k: usize,
        is_normalised: bool,
    ) -> (Vec<u16>, Vec<f32>, u64) {
        let mut routes = router::routes(top_k, is_normalised, &PROBABILITIES, 4);
        let guided = GuidedRows { stack, layer: LAYER, table, rows };
        let rerouted = guided.route(&PROBABILITIES, is_normalised, &mut routes);
        (routes.experts.into_iter().map(|expert| expert.expect("an expert").0).collect(), routes.weights, rerouted)
    }

    #[test]
    fn an_encoders_tokens_share_what_is_planned() {
        // Would break: a token misses an expert that its own sequence has in memory, or goes to one that it has not.
        let two = table(2, &[0, 2]);
        assert_eq!(routed(Stack::Encoder, &two, 0..2, 1, false), (vec![2, 0, 1], vec![0.3, 0.4, 0.6], 1));
        assert_eq!(routed(Stack::Encoder, &two, 1..3, 1, false), (vec![3, 0, 2], vec![0.4, 0.4, 0.2], 1));
    }

    #[test]
    fn a_decoders_token_has_its_own() {
        // Would break: what comes later in a prompt or a target changes what stands before it.
        let two = table(2, &[0, 2]);
        assert_eq!(routed(Stack::Decoder, &two, 0..2, 1, false), (vec![0, 2, 1], vec![0.1, 0.2, 0.6], 2));
        // The rows are the last tokens of a table that begins with earlier ones.
        let three = table(3, &[0, 3, 1]);
        assert_eq!(routed(Stack::Decoder, &three, 0..2, 1, false), (vec![3, 1, 1], vec![0.4, 0.3, 0.6], 1));
    }

    #[test]
    fn several_experts_are_weighed_together() {
        // Would break: the weights of a rerouted token do not add up to 1 where the model's do, or one of its experts that
        // were planned is left out.
        let one = table(1, &[0, 1, 3]);
        let (experts, weights, rerouted) = routed(Stack::Decoder, &one, 0..1, 2, false);
        assert_eq!((&experts[..2], &weights[..2], rerouted), (&[3, 1][..], &[0.4, 0.2][..], 1));
        let (experts, weights, _) = routed(Stack::Decoder, &one, 0..1, 2, true);
        assert_eq!((&experts[..2], &weights[..2]), (&[3, 1][..], &[0.4 / (0.4 + 0.2), 0.2 / (0.4 + 0.2)][..]));
    }

    #[test]
    fn what_was_planned_stays_as_it_is() {
        // Would break: an answer differs from the model's own although all of its experts were planned.
        let all = table(3, &[0, 1, 2, 3].repeat(3));
        for (top_k, is_normalised) in [(1, false), (2, false), (2, true)] {
            let own = router::routes(top_k, is_normalised, &PROBABILITIES, 4);
            let mut routes = own.clone();
            let guided = GuidedRows { stack: Stack::Decoder, layer: LAYER, table: &all, rows: 0..3 };
            assert_eq!((guided.route(&PROBABILITIES, is_normalised, &mut routes), &routes), (0, &own));
        }
    }
}
