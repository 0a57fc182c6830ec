//! What batches need of the experts, and what plans would have resident: figures that depend on the data, the model and the
//! predictor alone, and on no machine. Examples are taken as batches in their order.
//!
//! A batch needs the experts that its rows went to. A plan names those that the hash tables hold likely: each token's
//! likeliest, or its likeliest two, and so on; or those that the batch is likely enough to use.
//! Resident is both together, since what was not planned is loaded when it is asked for.

use std::collections::BTreeSet;

use serde::Serialize;
use sida_routing::LayerForecast;

use crate::commands::eval::{
    answered::Answered,
    moe_layers::{Group, GroupName, MoeLayers},
};

/// What a plan names.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Planned {
    /// So many experts of each token and layer, the likeliest. 0: nothing is planned, so that resident is what is needed, as by
    /// perfect foresight.
    Depth(usize),
    /// Experts that are used with this chance or a greater one, as in `exact` mode.
    Chance(f64),
}

/// A plan of nothing.
pub(crate) const FORESIGHT: Planned = Planned::Depth(0);
/// Of plans by chance, those that are told of.
const CHANCES: [f64; 6] = [0.5, 0.3, 0.2, 0.1, 0.05, 0.02];

/// Of the batches of one size, the layers of a group, and plans of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct MemoryRow {
    pub(crate) layers: GroupName,
    /// Examples of a batch.
    pub(crate) batch: usize,
    #[serde(flatten)]
    pub(crate) plan: Planned,
    pub(crate) batches: usize,
    /// Bytes of all experts of the layers.
    pub(crate) all_bytes: u64,
    /// Bytes of the experts that a batch needs, on average.
    pub(crate) needed_bytes: f64,
    /// Bytes of the experts that its plan names, on average.
    pub(crate) planned_bytes: f64,
    /// Bytes of both together, on average, and of the batch that has most.
    pub(crate) resident_bytes: f64,
    pub(crate) resident_bytes_peak: u64,
    /// The share of all experts' bytes that is not resident, on average, and in the batch that has most.
    pub(crate) saved: f64,
    pub(crate) saved_peak: f64,
    /// Of the experts that batches needed, the share that was planned.
    pub(crate) set_recall: f64,
    /// Bytes planned over bytes needed.
    pub(crate) planned_over_needed: f64,
}

/// For each group of layers, size of a batch and kind of plan: none, one expert of each token, three or as many as are named,
/// and then by chance. A batch that would not be full is left out, and so is a size that no batch reaches.
pub(crate) fn of(answers: &[Answered], layers: &MoeLayers, batches: &[usize]) -> Vec<MemoryRow> {
    let depth_max = answers.iter().flat_map(|answer| &answer.layers).flat_map(|layer| &layer.named);
    let depth_max = depth_max.map(|&(_, place)| place + 1).max().unwrap_or(0);
    let by_depth = (0..=depth_max.min(3)).filter(|&depth| depth <= 1 || depth == depth_max.min(3)).map(Planned::Depth);
    let by_chance = CHANCES.into_iter().filter(|_| depth_max > 0).map(Planned::Chance);
    let plans: Vec<Planned> = by_depth.chain(by_chance).collect();
    let mut rows = Vec::new();
    for group in layers.groups() {
        for &batch in batches.iter().filter(|&&batch| (1..=answers.len()).contains(&batch)) {
            rows.extend(plans.iter().map(|&plan| row(answers, layers, &group, batch, plan)));
        }
    }
    rows
}

fn row(answers: &[Answered], layers: &MoeLayers, group: &Group, batch: usize, plan: Planned) -> MemoryRow {
    let (mut needed, mut planned, mut both, mut peak, mut foretold) = (0, 0, 0, 0, 0);
    let full = answers.chunks_exact(batch);
    let batches = full.len();
    for batch in full {
        let mut resident = 0;
        for layer in group.layers.clone() {
            let sets = Sets::of(batch, layer, layers.num_experts, plan);
            let hit = sets.needed.intersection(&sets.planned).count();
            needed += sets.needed.len();
            planned += sets.planned.len();
            foretold += hit;
            resident += sets.needed.len() + sets.planned.len() - hit;
        }
        both += resident;
        peak = peak.max(resident);
    }
    let mean = |experts: usize| experts as f64 * layers.expert_bytes as f64 / batches as f64;
    let (all_bytes, resident_bytes) = (layers.bytes(&group.layers), mean(both));
    let resident_bytes_peak = peak as u64 * layers.expert_bytes;
    MemoryRow {
        layers: group.name,
        batch,
        plan,
        batches,
        all_bytes,
        needed_bytes: mean(needed),
        planned_bytes: mean(planned),
        resident_bytes,
        resident_bytes_peak,
        saved: 1.0 - resident_bytes / all_bytes as f64,
        saved_peak: 1.0 - resident_bytes_peak as f64 / all_bytes as f64,
        set_recall: foretold as f64 / needed.max(1) as f64,
        planned_over_needed: planned as f64 / needed.max(1) as f64,
    }
}

/// Experts of one layer.
struct Sets {
    needed: BTreeSet<u16>,
    planned: BTreeSet<u16>,
}

impl Sets {
    fn of(batch: &[Answered], layer: usize, num_experts: usize, plan: Planned) -> Self {
        let layers = || batch.iter().filter_map(|answer| answer.layers.get(layer));
        let planned = match plan {
            Planned::Depth(depth) => {
                let named = layers().flat_map(|layer| &layer.named).filter(|&&(_, place)| place < depth);
                named.map(|&(expert, _)| expert).collect()
            }
            Planned::Chance(chance) => {
                let mut forecast = LayerForecast::new(num_experts);
                layers().for_each(|layer| forecast.join(&layer.forecast));
                forecast.likely(chance).into_iter().map(|named| named.expert.0).collect()
            }
        };
        Self { needed: layers().flat_map(|layer| layer.used.iter().copied()).collect(), planned }
    }
}

#[cfg(test)]
mod tests {
    use sida_routing::{Digest, ExpertId, HashTable, LayerId, hash_table::Shape};

    use super::*;
    use crate::commands::eval::{
        answered::{Layer, tests::answered},
        moe_layers::tests::layers,
    };

    /// Experts that were used, and those that were named.
    type Of<'a> = (&'a [u16], &'a [(u16, usize)]);

    fn answer(of_layers: &[Of<'_>]) -> Answered {
        let layer = |&(used, named): &Of<'_>| Layer { used: used.to_vec(), named: named.to_vec(), ..Layer::default() };
        Answered { layers: of_layers.iter().map(layer).collect(), ..answered(&[-1.0]) }
    }

    /// Two layers of four experts of ten bytes, the first of the encoder.
    fn answers() -> [Answered; 3] {
        [
            answer(&[(&[0, 1], &[(0, 0), (2, 1)]), (&[3], &[(3, 1), (1, 0)])]),
            answer(&[(&[1], &[(1, 0), (3, 1)]), (&[3], &[(3, 0), (2, 1)])]),
            answer(&[(&[0, 1, 2, 3], &[]), (&[0, 1, 2, 3], &[])]),
        ]
    }

    fn found(name: GroupName, batch: usize, depth: usize) -> MemoryRow {
        found_of(&answers(), name, batch, Planned::Depth(depth))
    }

    fn found_of(answers: &[Answered], name: GroupName, batch: usize, plan: Planned) -> MemoryRow {
        let rows = of(answers, &layers(1, 1), &[1, 2]);
        let is_asked = |row: &&MemoryRow| (row.layers, row.batch, row.plan) == (name, batch, plan);
        *rows.iter().find(is_asked).unwrap()
    }

    #[test]
    fn a_batch_needs_each_expert_once() {
        // Would break: memory saved is told too low or too high: rows that share an expert are counted twice, batches that
        // are not full are counted, or an expert that is planned and needed takes two places.
        let row = found(GroupName::Encoder, 2, 1);
        let expected = MemoryRow {
            layers: GroupName::Encoder,
            batch: 2,
            plan: Planned::Depth(1),
            batches: 1,
            all_bytes: 40,
            needed_bytes: 20.0,
            planned_bytes: 20.0,
            resident_bytes: 20.0,
            resident_bytes_peak: 20,
            saved: 0.5,
            saved_peak: 0.5,
            set_recall: 1.0,
            planned_over_needed: 1.0,
        };
        assert_eq!(row, expected);
        let deeper = found(GroupName::Encoder, 2, 2);
        assert_eq!((deeper.resident_bytes, deeper.saved, deeper.planned_over_needed), (40.0, 0.0, 2.0));
    }

    #[test]
    fn means_and_peaks_are_over_batches() {
        // Would break: what has to be reserved for the largest batch is told as what an average one takes.
        let row = found(GroupName::Decoder, 1, 1);
        // Needed 3, 3 and all four; planned 1, 3 and none.
        assert_eq!((row.batches, row.needed_bytes, row.planned_bytes), (3, 20.0, 20.0 / 3.0));
        assert_eq!((row.resident_bytes, row.resident_bytes_peak), (70.0 / 3.0, 40));
        assert_eq!(row.set_recall, 1.0 / 6.0);
    }

    #[test]
    fn both_stacks_together_are_their_sum() {
        // Would break: memory saved with encoder and decoder is the mean of two shares of unlike bytes.
        for (batch, depth) in [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)] {
            let [encoder, decoder, all] =
                [GroupName::Encoder, GroupName::Decoder, GroupName::All].map(|name| found(name, batch, depth));
            assert!((encoder.resident_bytes + decoder.resident_bytes - all.resident_bytes).abs() < 1e-9);
            assert_eq!(all.all_bytes, 80);
        }
        assert_eq!(found(GroupName::All, 1, 0).planned_bytes, 0.0);
    }

    #[test]
    fn what_is_likely_is_so_of_the_whole_batch() {
        // Would break: an evaluation tells of the plans of single examples in place of those of their batch, which hold what
        // several of them may use.
        let mut answers = answers();
        for answer in &mut answers[..2] {
            let shape = Shape { first_layer: LayerId(0), layers: 1, tokens: 1, top_k: 2 };
            let experts = [0, 2].map(ExpertId).to_vec();
            let table = HashTable::new(Digest([0; 32]), Digest([0; 32]), shape, 4, experts, vec![0.5; 2]);
            let table = table.and_then(|table| table.with_chances(vec![0.4, 0.0])).unwrap();
            let forecast = &mut answer.layers[0].forecast;
            *forecast = LayerForecast::new(4);
            forecast.add(&table, LayerId(0), 1);
        }
        let planned = |batch, chance| {
            let row = found_of(&answers, GroupName::Encoder, batch, Planned::Chance(chance));
            (row.planned_bytes * row.batches as f64 / 10.0, row.set_recall)
        };
        // The first needs two, the second another one; what is planned is used by the first alone.
        assert_eq!(planned(1, 0.5), (0.0, 0.0));
        assert_eq!(planned(1, 0.3), (2.0, 1.0 / 7.0));
        assert_eq!(planned(2, 0.5), (1.0, 0.5));
    }

    #[test]
    fn sizes_that_no_batch_reaches_are_left_out() {
        // Would break: a mean of nothing is told as a number.
        let rows = of(&answers(), &layers(1, 1), &[4, 0]);
        assert_eq!(rows, []);
    }
}
