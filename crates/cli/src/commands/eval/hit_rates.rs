//! How often the hash table named the experts that the router chose, layer by layer and of each stack.

use serde::Serialize;
use sida_coordinator::HashCounts;

use crate::commands::eval::{
    answered::Answered,
    moe_layers::{GroupName, MoeLayers},
};

/// Of one layer, or of all layers of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct HitRate {
    pub(crate) stack: GroupName,
    /// Of the stack; `None` where all its layers are meant.
    pub(crate) block: Option<usize>,
    /// Choices of the router: tokens, times the experts of each.
    pub(crate) choices: u64,
    /// The share of them that was the table's first choice.
    pub(crate) top1: f64,
    /// The share that was among its first three.
    pub(crate) top3: f64,
    /// The share that it named at all.
    pub(crate) named: f64,
}

/// Of every layer, and of each stack. Of nothing where no router ran, or no table was there.
pub(crate) fn of(answers: &[Answered], layers: &MoeLayers) -> Vec<HitRate> {
    let mut rates = Vec::new();
    for group in layers.groups() {
        let counts = |layer: usize| answers.iter().filter_map(move |answer| answer.layers.get(layer));
        if group.name != GroupName::All {
            rates.extend(group.layers.clone().filter_map(|layer| {
                let counts = counts(layer).map(|layer| layer.counts);
                rate(counts, layers.stack(layer), Some(layers.blocks[layer]))
            }));
        }
        rates.extend(rate(group.layers.flat_map(counts).map(|layer| layer.counts), group.name, None));
    }
    rates
}

fn rate(counts: impl Iterator<Item = HashCounts>, stack: GroupName, block: Option<usize>) -> Option<HitRate> {
    let (mut sum, mut choices) = (HashCounts::default(), 0);
    for HashCounts { hits, top1_hits, top3_hits, misses } in counts {
        sum.hits += hits;
        sum.top1_hits += top1_hits;
        sum.top3_hits += top3_hits;
        choices += hits + misses;
    }
    let share = |count: u64| count as f64 / choices as f64;
    let rate = HitRate {
        stack,
        block,
        choices,
        top1: share(sum.top1_hits),
        top3: share(sum.top3_hits),
        named: share(sum.hits),
    };
    (choices > 0).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::eval::{
        answered::{Layer, tests::answered},
        moe_layers::tests::layers,
    };

    fn answer(counts: &[(u64, u64, u64, u64)]) -> Answered {
        let layer = |&(top1_hits, top3_hits, hits, misses): &(u64, u64, u64, u64)| Layer {
            counts: HashCounts { hits, top1_hits, top3_hits, misses },
            ..Layer::default()
        };
        Answered { layers: counts.iter().map(layer).collect(), ..answered(&[-1.0]) }
    }

    #[test]
    fn rates_are_of_all_choices_of_a_layer() {
        // Would break: a layer's rate is another's, short texts count as much as long ones, or misses are left out.
        let answers =
            [answer(&[(1, 2, 3, 1), (0, 0, 0, 4), (5, 5, 5, 5)]), answer(&[(3, 4, 4, 2), (1, 2, 4, 0), (0, 0, 0, 0)])];
        let found = of(&answers, &layers(2, 1));
        let rate =
            |stack, block, choices, [top1, top3, named]: [f64; 3]| HitRate { stack, block, choices, top1, top3, named };
        let expected = [
            rate(GroupName::Encoder, Some(1), 10, [0.4, 0.6, 0.7]),
            rate(GroupName::Encoder, Some(3), 8, [0.125, 0.25, 0.5]),
            rate(GroupName::Encoder, None, 18, [5.0 / 18.0, 8.0 / 18.0, 11.0 / 18.0]),
            rate(GroupName::Decoder, Some(1), 10, [0.5, 0.5, 0.5]),
            rate(GroupName::Decoder, None, 10, [0.5, 0.5, 0.5]),
            rate(GroupName::All, None, 28, [10.0 / 28.0, 13.0 / 28.0, 16.0 / 28.0]),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn without_tables_there_is_no_rate() {
        // Would break: a mode in which no router runs is told to miss every expert.
        assert_eq!(of(&[answer(&[(0, 0, 0, 0)])], &layers(1, 0)), []);
        assert_eq!(of(&[], &layers(1, 1)), []);
    }
}
