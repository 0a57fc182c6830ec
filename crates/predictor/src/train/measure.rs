//! How often a predictor is right, and how sure it may be, on recorded routing it has not seen.

use std::ops::Range;

use half::f16;
use sida_model::Stack;
use sida_routing::{ExpertId, HashTable, LayerId};

use super::Recording;
use crate::{HashPredictor, HitRate, PredictorError, PredictorShape, PredictorState, calibration::Calibration};

/// Sequences per call.
const BATCH: usize = 64;
/// Chances that are looked at together: those that differ by less than a twentieth.
const RELIABILITY_BINS: usize = 20;

/// What stands in a file before it is measured.
pub(super) fn unmeasured(layers: Range<u16>) -> Vec<HitRate> {
    layers.map(|layer| HitRate { layer: LayerId(layer), tokens: 0, top1: 0.0, top3: 0.0, chance_error: None }).collect()
}

/// What stands in a file before it is calibrated: what the net says is taken as it is.
pub(super) fn uncalibrated(layers: Range<u16>) -> Vec<Calibration> {
    layers.map(|layer| Calibration::none(LayerId(layer))).collect()
}

/// How sure a predictor that is not calibrated may be of what it predicts, in every MoE layer: of the router's probability of
/// an expert, and of the router's choosing it. Adds to `hit_rates` how wrong the latter is.
pub(super) fn calibrations(
    predictor: &dyn HashPredictor,
    recording: &Recording,
    hit_rates: &mut [HitRate],
) -> Result<(Vec<Calibration>, Vec<Calibration>), PredictorError> {
    let (num_experts, chosen) = (recording.shape.num_experts, recording.shape.chosen);
    let layers = layers(&recording.shape);
    let (mut routed, mut chances) = (vec![Vec::new(); layers.len()], vec![Vec::new(); layers.len()]);
    each_entry(predictor, recording, |layer, Entry { experts, alphas, routed: kept, probabilities }| {
        // What was not kept of the router's probabilities is small, and shared by all other experts.
        let others = (1.0 - probabilities.iter().sum::<f32>()).max(0.0) / (num_experts - kept.len()).max(1) as f32;
        for (expert, &predicted) in experts.iter().zip(alphas) {
            let place = kept.iter().position(|kept| kept == expert);
            routed[layer].push((predicted, place.map_or(others, |at| probabilities[at])));
            chances[layer].push((predicted, f32::from(u8::from(place.is_some_and(|at| at < chosen)))));
        }
    })?;
    for (rate, pairs) in hit_rates.iter_mut().zip(&chances) {
        rate.chance_error = chance_error(pairs);
    }
    let fit = |(layer, pairs)| Calibration::fit(LayerId(layer), pairs);
    Ok((layers.clone().zip(routed).map(fit).collect(), layers.zip(chances).map(fit).collect()))
}

/// By how much chances are wrong that were calibrated with other texts: each half of the pairs with the other half. In bins of
/// about the same chance, what was expected too much or too little, over what was chosen.
fn chance_error(pairs: &[(f32, f32)]) -> Option<f64> {
    let halves = pairs.split_at(pairs.len() / 2);
    let (mut wrong, mut chosen) = (0.0, 0.0);
    for (others, own) in [halves, (halves.1, halves.0)] {
        let calibration = Calibration::fit(LayerId(0), others.to_vec());
        let mut bins = [0.0; RELIABILITY_BINS];
        for &(predicted, found) in own {
            let chance = f64::from(calibration.at(predicted));
            let bin = (chance * RELIABILITY_BINS as f64) as usize;
            bins[bin.min(RELIABILITY_BINS - 1)] += chance - f64::from(found);
            chosen += f64::from(found);
        }
        wrong += bins.iter().map(|bin: &f64| bin.abs()).sum::<f64>();
    }
    (chosen > 0.0).then(|| wrong / chosen)
}

/// The hit rate of every MoE layer: predicted experts against the router's first.
pub(super) fn hit_rates(predictor: &dyn HashPredictor, recording: &Recording) -> Result<Vec<HitRate>, PredictorError> {
    let mut counts = vec![[0u64; 2]; layers(&recording.shape).len()];
    each_entry(predictor, recording, |layer, Entry { experts, routed, .. }| {
        let rank = experts.iter().position(|&expert| expert == routed[0]);
        counts[layer][0] += u64::from(rank == Some(0));
        counts[layer][1] += u64::from(rank.is_some_and(|rank| rank < 3));
    })?;
    let rate = |(layer, [top1, top3]): (u16, [u64; 2])| {
        let is_encoders = recording.shape.encoder_layers.contains(&layer);
        let tokens = recording.of_stack(if is_encoders { Stack::Encoder } else { Stack::Decoder }).tokens() as u64;
        let share = |count: u64| count as f64 / tokens.max(1) as f64;
        HitRate { layer: LayerId(layer), tokens, top1: share(top1), top3: share(top3), chance_error: None }
    };
    Ok(layers(&recording.shape).zip(counts).map(rate).collect())
}

/// All MoE layers, those of the encoder first.
fn layers(shape: &PredictorShape) -> Range<u16> {
    shape.encoder_layers.start..shape.decoder_layers.end
}

/// A token in a layer: what was predicted, and what the router gave, the likeliest first.
struct Entry<'e> {
    experts: &'e [ExpertId],
    alphas: &'e [f32],
    routed: &'e [ExpertId],
    probabilities: &'e [f32],
}

/// Shows every entry of a recording, with its layer's number among all.
fn each_entry(
    predictor: &dyn HashPredictor,
    recording: &Recording,
    mut show: impl FnMut(usize, Entry<'_>),
) -> Result<(), PredictorError> {
    for stack in [Stack::Encoder, Stack::Decoder] {
        let (of_stack, recorded) = (recording.shape.layers(stack), recording.of_stack(stack));
        let routed = recorded.experts.chunks(BATCH).zip(recorded.probabilities.chunks(BATCH));
        for (n, (sequences, (experts, probabilities))) in recorded.sequences.chunks(BATCH).zip(routed).enumerate() {
            let inputs = recorded.inputs.get(n * BATCH..n * BATCH + sequences.len()).unwrap_or_default();
            let tables = predict(predictor, stack, sequences, inputs)?;
            for (table, (experts, probabilities)) in tables.iter().zip(experts.iter().zip(probabilities)) {
                let entries = experts.chunks_exact(recorded.kept).zip(probabilities.chunks_exact(recorded.kept));
                for (at, (routed, probabilities)) in entries.enumerate() {
                    let (token, layer) = (at / of_stack.len(), LayerId(of_stack.start + (at % of_stack.len()) as u16));
                    let (experts, alphas) = (table.experts(layer, token), table.alphas(layer, token));
                    show(usize::from(layer.0), Entry { experts, alphas, routed, probabilities });
                }
            }
        }
    }
    Ok(())
}

fn predict(
    predictor: &dyn HashPredictor,
    stack: Stack,
    sequences: &[Vec<u32>],
    inputs: &[Vec<f16>],
) -> Result<Vec<HashTable>, PredictorError> {
    let tokens: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    match stack {
        Stack::Encoder => predictor.encode(&tokens),
        Stack::Decoder => {
            let started =
                |input: &Vec<f16>| predictor.start(&input.iter().map(|state| state.to_f32()).collect::<Vec<_>>());
            let mut states = inputs.iter().map(started).collect::<Result<Vec<_>, _>>()?;
            // Where there is no encoder there are no inputs.
            states.resize(tokens.len(), PredictorState::default());
            predictor.decode(&mut states.iter_mut().collect::<Vec<_>>(), &tokens)
        }
    }
}
