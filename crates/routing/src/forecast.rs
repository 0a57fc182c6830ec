//! Which experts of a layer are worth planning. A hash table says how likely each token uses each expert that it names; from
//! that follows how likely a batch uses an expert at all. What is likelier than some chance is planned, in whichever layer and
//! batch it is: so of all plans that hold as many experts in the long run, none is expected to hold more of what is used.
//!
//! Tokens are taken to choose independently of each other. What a token's named experts do not add up to is shared evenly by
//! those that its table does not name for it.

use crate::{ExpertId, HashTable, LayerId};

/// What is expected to be used of the experts of one MoE layer. Made by adding tokens; two can be joined, in any order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerForecast {
    /// By expert: the chance that no token uses it.
    unused: Vec<f32>,
    /// By expert: whether a table names it. None else can be planned.
    is_named: Vec<bool>,
}

/// An expert that a table names, and the chance that it is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Named {
    /// Which expert.
    pub expert: ExpertId,
    /// From 0 to 1.
    pub chance: f32,
}

impl LayerForecast {
    /// Nothing is expected of any of so many experts.
    pub fn new(num_experts: usize) -> Self {
        Self { unused: vec![1.0; num_experts], is_named: vec![false; num_experts] }
    }

    /// Adds all tokens of a table that speaks of the layer, whose router chooses `top_k` experts for each. A table without
    /// chances is taken to know what it names first.
    /// Panics if the table does not speak of the layer, or names an expert that the layer does not have.
    pub fn add(&mut self, table: &HashTable, layer: LayerId, top_k: usize) {
        for token in 0..table.shape().tokens {
            let experts = table.experts(layer, token);
            match table.chances(layer, token) {
                Some(chances) => self.add_token(experts, chances, top_k),
                None => self.add_certain(experts, top_k),
            }
            experts.iter().for_each(|expert| self.is_named[usize::from(expert.0)] = true);
        }
    }

    /// Adds a token that uses the first `top_k` of these.
    pub fn add_certain(&mut self, experts: &[ExpertId], top_k: usize) {
        for expert in experts.iter().take(top_k) {
            self.unused[usize::from(expert.0)] = 0.0;
            self.is_named[usize::from(expert.0)] = true;
        }
    }

    /// Adds a token that uses `top_k` experts, of which these have these chances.
    fn add_token(&mut self, experts: &[ExpertId], chances: &[f32], top_k: usize) {
        let others = self.unused.len().saturating_sub(experts.len()).max(1);
        let missing = (top_k as f32 - chances.iter().sum::<f32>()).max(0.0);
        // Not so much that it could not be taken out again.
        let unused_by_token = 1.0 - (missing / others as f32).min(0.5);
        self.unused.iter_mut().for_each(|unused| *unused *= unused_by_token);
        for (expert, chance) in experts.iter().zip(chances) {
            self.unused[usize::from(expert.0)] *= (1.0 - chance) / unused_by_token;
        }
    }

    /// Adds what another one expects of the same layer.
    pub fn join(&mut self, other: &Self) {
        self.unused.iter_mut().zip(&other.unused).for_each(|(own, other)| *own *= other);
        self.is_named.iter_mut().zip(&other.is_named).for_each(|(own, other)| *own |= other);
    }

    /// The experts that tables name, the likeliest to be used first; of equal ones the lower id first.
    pub fn named(&self) -> Vec<Named> {
        let chances = (0u16..)
            .zip(&self.unused)
            .map(|(expert, unused)| Named { expert: ExpertId(expert), chance: chance(*unused) });
        let mut named: Vec<Named> =
            chances.zip(&self.is_named).filter(|(_, is_named)| **is_named).map(|(named, _)| named).collect();
        named.sort_by(|a, b| b.chance.total_cmp(&a.chance));
        named
    }

    /// The experts that are used with this chance or a greater one, the likeliest first.
    pub fn likely(&self, chance: f64) -> Vec<Named> {
        let mut named = self.named();
        named.retain(|named| f64::from(named.chance) >= chance);
        named
    }
}

fn chance(unused: f32) -> f32 {
    (1.0 - unused).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Digest, hash_table::Shape};

    const NUM_EXPERTS: usize = 5;
    const LAYER: LayerId = LayerId(2);

    /// Tokens of one layer: two experts of each with their chances.
    type Tokens = Vec<[(u16, f32); 2]>;

    fn table(tokens: &Tokens) -> HashTable {
        let shape = Shape { first_layer: LAYER, layers: 1, tokens: tokens.len(), top_k: 2 };
        let entries = || tokens.iter().flatten();
        let experts: Vec<_> = entries().map(|&(expert, _)| ExpertId(expert)).collect();
        let alphas = vec![0.5; experts.len()];
        let table = HashTable::new(Digest([0; 32]), Digest([0; 32]), shape, NUM_EXPERTS, experts, alphas).unwrap();
        table.with_chances(entries().map(|&(_, chance)| chance).collect()).unwrap()
    }

    fn forecast(tokens: &Tokens) -> LayerForecast {
        let mut forecast = LayerForecast::new(NUM_EXPERTS);
        forecast.add(&table(tokens), LAYER, 1);
        forecast
    }

    /// The chance that each expert is used, summed over everything that may happen.
    fn by_enumeration(tokens: &Tokens) -> [f64; NUM_EXPERTS] {
        let mut chances = [0.0; NUM_EXPERTS];
        for outcome in 0..NUM_EXPERTS.pow(tokens.len() as u32) {
            let (mut chance, mut used, mut rest) = (1.0, [false; NUM_EXPERTS], outcome);
            for named in tokens {
                let expert = rest % NUM_EXPERTS;
                rest /= NUM_EXPERTS;
                let told = named.iter().find(|(named, _)| usize::from(*named) == expert);
                let missing = 1.0 - named.iter().map(|(_, chance)| f64::from(*chance)).sum::<f64>();
                chance *= told.map_or(missing / (NUM_EXPERTS - 2) as f64, |(_, chance)| f64::from(*chance));
                used[expert] = true;
            }
            chances.iter_mut().zip(used).filter(|(_, used)| *used).for_each(|(sum, _)| *sum += chance);
        }
        chances
    }

    fn experts(named: &[Named]) -> Vec<u16> {
        named.iter().map(|named| named.expert.0).collect()
    }

    /// Two different experts of a token, whose chances add up to 1 at most.
    fn token() -> impl Strategy<Value = [(u16, f32); 2]> {
        (0u16..5, 1u16..5, 0f32..=1.0, 0f32..=1.0)
            .prop_map(|(first, other, sum, share)| [(first, sum * share), ((first + other) % 5, sum * (1.0 - share))])
    }

    proptest! {
        #[test]
        fn chances_are_those_of_all_that_may_happen(tokens in prop::collection::vec(token(), 1..5)) {
            // Would break: what is seldom used is planned, or what is likely is not.
            let (found, expected) = (forecast(&tokens), by_enumeration(&tokens));
            for named in found.named() {
                prop_assert!((f64::from(named.chance) - expected[usize::from(named.expert.0)]).abs() < 1e-5);
            }
        }

        #[test]
        fn a_smaller_chance_only_adds(
            tokens in prop::collection::vec(token(), 1..9), chances in prop::collection::vec(0f64..=1.0, 2..6),
        ) {
            // Would break: who asks for less has more loaded, or what is likelier is loaded later or not at all.
            let found = forecast(&tokens);
            let mut chances = chances;
            chances.sort_by(|a, b| b.total_cmp(a));
            let plans: Vec<_> = chances.iter().map(|&chance| found.likely(chance)).collect();
            prop_assert!(plans.windows(2).all(|plans| plans[1].starts_with(&plans[0])));
            let mut sorted = found.named();
            sorted.sort_by(|a, b| b.chance.total_cmp(&a.chance).then(a.expert.0.cmp(&b.expert.0)));
            prop_assert_eq!(found.likely(0.0), sorted);
            prop_assert!(found.likely(f64::INFINITY).is_empty());
        }

        #[test]
        fn no_plan_of_two_batches_as_large_is_expected_to_hold_more(
            first in prop::collection::vec(token(), 1..4), last in prop::collection::vec(token(), 1..4), chance in 0f64..=1.0,
        ) {
            // Would break: memory and bandwidth go to experts of one batch that another one needs more.
            let (first, last) = (forecast(&first), forecast(&last));
            let sum = |set: &[Named]| set.iter().map(|named| named.chance).sum::<f32>();
            let planned = [first.likely(chance), last.likely(chance)].concat();
            let all = [first.named(), last.named()].concat();
            for set in 0u32..1 << all.len() {
                let of_set: Vec<Named> =
                    all.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1).map(|(_, named)| *named).collect();
                prop_assert!(of_set.len() > planned.len() || sum(&of_set) <= sum(&planned) * 1.0001);
            }
        }

        #[test]
        fn joined_forecasts_are_those_of_all_tokens(
            tokens in prop::collection::vec(token(), 2..9), cut in 1usize..8,
        ) {
            // Would break: an evaluation tells of other plans of a batch than those that are sent to expert-nodes.
            let (first, last) = tokens.split_at(cut.min(tokens.len() - 1));
            let mut joined = forecast(&last.to_vec());
            joined.join(&forecast(&first.to_vec()));
            let whole = forecast(&tokens);
            prop_assert_eq!(experts(&joined.named()).len(), whole.named().len());
            for named in whole.named() {
                let found = joined.named().into_iter().find(|found| found.expert == named.expert);
                prop_assert!((found.unwrap().chance - named.chance).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn what_a_token_does_not_name_is_shared_by_the_others() {
        // Would break: what one token names as hardly likely is never planned, however little is known of all the others.
        let found = forecast(&vec![[(0, 0.5), (1, 0.0)], [(2, 0.25), (3, 0.15)]]);
        let chance = |expert: u16| found.named().into_iter().find(|named| named.expert.0 == expert).unwrap().chance;
        assert!((chance(0) - (1.0 - 0.5 * 0.8)).abs() < 1e-6);
        assert!((chance(1) - 0.2).abs() < 1e-6);
        assert_eq!(experts(&found.likely(0.3)), [0, 2]);
    }

    #[test]
    fn a_table_without_chances_knows_what_it_names_first() {
        // Would break: predictor-nodes of an earlier build make no plans, or plans of all that they name.
        let tokens = vec![[(4, 0.0), (1, 0.0)], [(2, 0.0), (4, 0.0)]];
        let silent = table(&tokens).with_chances(Vec::new()).unwrap();
        let mut found = LayerForecast::new(NUM_EXPERTS);
        found.add(&silent, LAYER, 1);
        assert!([0.01, 1.0].iter().all(|&chance| experts(&found.likely(chance)) == [2, 4]));
        assert_eq!(experts(&found.likely(0.0)), [2, 4, 1]);
        found.add(&silent, LAYER, 2);
        assert_eq!(experts(&found.likely(0.9)), [1, 2, 4]);
    }

    #[test]
    fn many_tokens_leave_chances_between_0_and_1() {
        // Would break: a batch of long prompts ends its coordinator, or plans nothing.
        let mut found = forecast(&vec![[(0, 0.1), (1, 1e-4)]; 100_000]);
        assert!(found.named().iter().all(|named| named.chance > 0.99));
        found.join(&forecast(&vec![[(0, 0.0), (3, 0.0)]]));
        assert!(found.named().iter().all(|named| (0.0..=1.0).contains(&named.chance)));
    }
}
