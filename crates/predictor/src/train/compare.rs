//! Two predictors beside each other, on what routers chose for prompts.

use std::sync::Arc;

use sida_model::Stack;
use sida_routing::{HashTable, Labels, LayerId, learning::Gain};

use super::descent;
use crate::{HashPredictor, PredictorError, PredictorShape, PredictorState};

/// Sequences of one call.
const BATCH: usize = 64;

/// Two predictors beside each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    /// What each sequence says.
    pub gains: Vec<Gain>,
    /// First choices of the predictor that serves that were right.
    pub serving: u64,
    /// And of the candidate.
    pub candidate: u64,
    /// Of so many: tokens in layers.
    pub entries: u64,
}

/// What each of `sequences` says of a candidate, beside the predictor that serves; and the first choices of either that were
/// right, and of how many. On one thread.
pub fn compare(
    serving: &dyn HashPredictor,
    candidate: &dyn HashPredictor,
    shape: &PredictorShape,
    sequences: &[Arc<Labels>],
) -> Result<Compared, PredictorError> {
    let worker = descent::workers(1)?;
    worker[0].install(|| {
        let mut tested = Compared { gains: Vec::new(), serving: 0, candidate: 0, entries: 0 };
        for labels in sequences.chunks(BATCH) {
            let [before, after] = [serving, candidate].map(|predictor| hits(predictor, shape, labels));
            for ((labels, before), after) in labels.iter().zip(before?).zip(after?) {
                tested.gains.push(Gain { first: after.first - before.first, any: after.any - before.any });
                tested.serving += before.first as u64;
                tested.candidate += after.first as u64;
                tested.entries += (labels.experts().len() / labels.kept()) as u64;
            }
        }
        Ok(tested)
    })
}

/// How often a predictor names the router's first choice of a sequence: first, or at all.
struct Hits {
    first: i64,
    any: i64,
}

fn hits(
    predictor: &dyn HashPredictor,
    shape: &PredictorShape,
    labels: &[Arc<Labels>],
) -> Result<Vec<Hits>, PredictorError> {
    let stack = shape.prompt_stack();
    let layers = shape.layers(stack);
    let prompts: Vec<&[u32]> = labels.iter().map(|labels| labels.tokens()).collect();
    let tables = match stack {
        Stack::Encoder => predictor.encode(&prompts)?,
        Stack::Decoder => {
            let mut states = vec![PredictorState::default(); prompts.len()];
            predictor.decode(&mut states.iter_mut().collect::<Vec<_>>(), &prompts)?
        }
    };
    let of_sequence = |(labels, table): (&Arc<Labels>, &HashTable)| {
        let mut hits = Hits { first: 0, any: 0 };
        for (at, routed) in labels.experts().chunks_exact(labels.kept()).enumerate() {
            let (token, layer) = (at / layers.len(), LayerId(layers.start + (at % layers.len()) as u16));
            let rank = table.experts(layer, token).iter().position(|expert| *expert == routed[0]);
            hits.first += i64::from(rank == Some(0));
            hits.any += i64::from(rank.is_some());
        }
        hits
    };
    Ok(labels.iter().zip(&tables).map(of_sequence).collect())
}
