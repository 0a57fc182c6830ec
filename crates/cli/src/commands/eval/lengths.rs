//! What single examples need of the experts, by the length of their prompt: the longer a text, the more experts its tokens
//! use, and the less there is to be saved.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::commands::eval::{
    answered::Answered,
    memory::{self, MemoryRow},
    moe_layers::MoeLayers,
};

/// Of the examples whose prompts have so many tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct LengthRow {
    /// More than half as many as this, and not more than it.
    pub(crate) tokens_max: usize,
    /// How many there are on average.
    pub(crate) tokens_mean: f64,
    /// Each example as a batch of its own.
    #[serde(flatten)]
    pub(crate) row: MemoryRow,
}

/// For each group of layers, length and kind of plan; lengths that no prompt has are left out.
pub(crate) fn of(answers: &[Answered], layers: &MoeLayers) -> Vec<LengthRow> {
    let mut by_length: BTreeMap<usize, Vec<Answered>> = BTreeMap::new();
    for answer in answers {
        by_length.entry(answer.prompt_tokens.next_power_of_two()).or_default().push(answer.clone());
    }
    let rows = by_length.into_iter().flat_map(|(tokens_max, answers)| {
        let tokens = answers.iter().map(|answer| answer.prompt_tokens).sum::<usize>();
        let tokens_mean = tokens as f64 / answers.len() as f64;
        memory::of(&answers, layers, &[1]).into_iter().map(move |row| LengthRow { tokens_max, tokens_mean, row })
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::eval::{
        answered::{Layer, tests::answered},
        memory::Planned,
        moe_layers::{GroupName, tests::layers},
    };

    #[test]
    fn prompts_are_counted_with_those_of_their_length() {
        // Would break: what long texts need is told of short ones, or a length at the edge belongs to two rows or none.
        let answer = |prompt_tokens, used: &[u16]| {
            let layer = Layer { used: used.to_vec(), named: vec![(0, 0)], ..Layer::default() };
            Answered { prompt_tokens, layers: vec![layer], ..answered(&[-1.0]) }
        };
        let answers = [answer(8, &[0, 1]), answer(9, &[0, 1, 2]), answer(5, &[0]), answer(16, &[3]), answer(1, &[2])];
        let rows = of(&answers, &layers(1, 0));
        let found: Vec<_> = rows
            .iter()
            .filter(|of| matches!(of.row.plan, Planned::Depth(_)))
            .map(|LengthRow { tokens_max, tokens_mean, row }| {
                (*tokens_max, *tokens_mean, row.plan, row.batches, row.needed_bytes, row.set_recall)
            })
            .collect();
        let expected = [
            (1, 1.0, Planned::Depth(0), 1, 10.0, 0.0),
            (1, 1.0, Planned::Depth(1), 1, 10.0, 0.0),
            (8, 6.5, Planned::Depth(0), 2, 15.0, 0.0),
            (8, 6.5, Planned::Depth(1), 2, 15.0, 2.0 / 3.0),
            (16, 12.5, Planned::Depth(0), 2, 20.0, 0.0),
            (16, 12.5, Planned::Depth(1), 2, 20.0, 0.25),
        ];
        assert_eq!(found, expected);
        assert!(rows.iter().all(|of| of.row.layers == GroupName::Encoder && of.row.batch == 1));
    }
}
