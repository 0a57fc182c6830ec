//! How often a predictor is right, and how sure it may be, on recorded routing it has not seen.

use std::ops::Range;

use half::f16;
use sida_model::Stack;
use sida_routing::{ExpertId, HashTable, LayerId};

use super::Recording;
use crate::{HashPredictor, HitRate, PredictorError, PredictorShape, PredictorState, calibration::Calibration};

/// Sequences per call.
const BATCH: usize = 64;

/// What stands in a file before it is measured.
pub(super) fn unmeasured(layers: Range<u16>) -> Vec<HitRate> {
    layers.map(|layer| HitRate { layer: LayerId(layer), tokens: 0, top1: 0.0, top3: 0.0 }).collect()
}

/// What stands in a file before it is calibrated: what the net says is taken as it is.
pub(super) fn uncalibrated(layers: Range<u16>) -> Vec<Calibration> {
    layers.map(|layer| Calibration::none(LayerId(layer))).collect()
}

/// How sure a predictor that is not calibrated may be of what it predicts, in every MoE layer.
pub(super) fn calibration(
    predictor: &dyn HashPredictor,
    recording: &Recording,
) -> Result<Vec<Calibration>, PredictorError> {
    let num_experts = recording.shape.num_experts;
    let mut pairs = vec![Vec::new(); layers(&recording.shape).len()];
    each_entry(predictor, recording, |layer, Entry { experts, alphas, routed, probabilities }| {
        // What was not kept of the router's probabilities is small, and shared by all other experts.
        let others = (1.0 - probabilities.iter().sum::<f32>()).max(0.0) / (num_experts - routed.len()).max(1) as f32;
        for (expert, &alpha) in experts.iter().zip(alphas) {
            let kept = routed.iter().position(|routed| routed == expert);
            pairs[layer].push((alpha, kept.map_or(others, |at| probabilities[at])));
        }
    })?;
    Ok(layers(&recording.shape).zip(pairs).map(|(layer, pairs)| Calibration::fit(LayerId(layer), pairs)).collect())
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
        HitRate { layer: LayerId(layer), tokens, top1: share(top1), top3: share(top3) }
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
