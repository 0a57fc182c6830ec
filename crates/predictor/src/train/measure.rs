//! How often a predictor is right, on recorded routing it has not seen.

use std::ops::Range;

use sida_model::Stack;
use sida_routing::{HashTable, LayerId};

use super::Recording;
use crate::{HashPredictor, HitRate, PredictorError, PredictorState};

/// Sequences per call.
const BATCH: usize = 64;

/// What stands in a file before it is measured.
pub(super) fn unmeasured(layers: Range<u16>) -> Vec<HitRate> {
    layers.map(|layer| HitRate { layer: LayerId(layer), tokens: 0, top1: 0.0, top3: 0.0 }).collect()
}

/// The hit rate of every MoE layer: predicted experts against the router's first.
pub(super) fn hit_rates(predictor: &dyn HashPredictor, recording: &Recording) -> Result<Vec<HitRate>, PredictorError> {
    let mut rates = Vec::new();
    for stack in [Stack::Encoder, Stack::Decoder] {
        let layers = recording.shape.layers(stack);
        let recorded = recording.of_stack(stack);
        let mut counts = vec![[0u64; 2]; layers.len()];
        for (sequences, experts) in recorded.sequences.chunks(BATCH).zip(recorded.experts.chunks(BATCH)) {
            let tables = predict(predictor, stack, sequences)?;
            for (table, experts) in tables.iter().zip(experts) {
                for (n, of_token) in experts.chunks_exact(recorded.kept * layers.len().max(1)).enumerate() {
                    for (layer, counts) in layers.clone().zip(&mut counts) {
                        let truth = of_token[usize::from(layer - layers.start) * recorded.kept];
                        let rank = table.experts(LayerId(layer), n).iter().position(|&expert| expert == truth);
                        counts[0] += u64::from(rank == Some(0));
                        counts[1] += u64::from(rank.is_some_and(|rank| rank < 3));
                    }
                }
            }
        }
        let tokens = recorded.tokens() as u64;
        let share = |count: u64| count as f64 / tokens.max(1) as f64;
        rates.extend(layers.zip(counts).map(|(layer, [top1, top3])| HitRate {
            layer: LayerId(layer),
            tokens,
            top1: share(top1),
            top3: share(top3),
        }));
    }
    Ok(rates)
}

fn predict(
    predictor: &dyn HashPredictor,
    stack: Stack,
    sequences: &[Vec<u32>],
) -> Result<Vec<HashTable>, PredictorError> {
    let tokens: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    match stack {
        Stack::Encoder => predictor.encode(&tokens),
        Stack::Decoder => {
            let mut states = vec![PredictorState::default(); tokens.len()];
            predictor.decode(&mut states.iter_mut().collect::<Vec<_>>(), &tokens)
        }
    }
}
