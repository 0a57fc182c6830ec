//! Checkpoints whose experts get tokens by Zipf's law: in every MoE layer the expert of rank r is chosen by a share of
//! all tokens that is proportional to 1 / r^skew. Called by [`super::synth`].
//!
//! Problem: a Switch router has no bias, and random rows make all experts about equally popular. Longer rows win more
//! often, but never more than half of the time: half of the tokens point away from any row.
//!
//! Idea: coordinate 0 of every embedding is a constant, and row 0 of whatever adds to the hidden states (every `o` and
//! `wo`) is 0, so that it is the same in every layer, and column 0 of a router is a bias. The other columns are random, so that a token's
//! logits are independent normal values; with which biases the largest of them follows the law is a one-dimensional
//! integral and a fixed point ([`biases`]).
//!
//! The logits must then be what the integral takes them for, whatever words there are (of which the most frequent may be
//! 7% of all):
//!
//! - Mean 0. What relu lets through has a mean, which `wo` would turn into a bias of every layer after it: its columns come
//!   in pairs of opposite sign. So do embeddings, id by id, and the mean of the frequent words nearly cancels.
//! - A known deviation, relative to the constant coordinate. It is that of the hidden states, to which every part adds a
//!   known variance ([`adapted`]).
//! - Not decided by the word alone: embeddings are short beside what attention adds, and attention is sharp, so that a token
//!   consists mostly of those few that each head picks for it, by what they are and by where.

use std::{
    io::{self, Write},
    iter,
};

use half::bf16;

use super::{
    random::{Normal, Signs, StreamSeed, shuffled},
    shape::{Fill, Weight},
};
use crate::shards::TensorSpec;

/// Coordinate 0 of all hidden states: exact in bf16, and so small that it hardly shows to other parts than routers.
const CONSTANT: f64 = 0.125;
/// Of the other coordinates of an embedding.
const EMBEDDING_DEVIATION: f64 = 0.5;
/// Of attention's scores by what tokens are; transformers' is 1, which is about the mean of all.
const CONTENT_SCORE_DEVIATION: f64 = 6.0;
/// Of attention's scores by how far tokens are apart.
const POSITION_SCORE_DEVIATION: f64 = 5.0;
/// What sharp attention adds: 1 if each head took one token, 1 / tokens if it took the mean. It is 0.74 among 28 tokens
/// and less among more, of which this is a middle: exponents are at most a tenth off among 256.
const ATTENTION_VARIANCE: f64 = 0.70;
/// Of what relu lets through, for each of its values. Little, since a frequent word and its opposite do not cancel there.
const FEED_FORWARD_DEVIATION: f64 = 0.5;
/// What a dense block adds: half of all values pass relu.
const DENSE_VARIANCE: f64 = 0.5 * FEED_FORWARD_DEVIATION * FEED_FORWARD_DEVIATION;
/// What an expert adds: as a dense block, times the square of its probability, which is 0.1 to 0.7 on average.
const EXPERT_VARIANCE: f64 = 0.3 * DENSE_VARIANCE;
/// Of a token's logits, without the bias. The larger it is, the surer is a router of its choice.
const LOGIT_DEVIATION: f64 = 2.0;

/// The tensors of a shape, filled so that routers can follow the law. Their order is that of the forward pass.
pub(super) fn adapted(mut weights: Vec<Weight>) -> Vec<Weight> {
    const EMBEDDED: f64 = EMBEDDING_DEVIATION * EMBEDDING_DEVIATION;
    // Of one coordinate of the hidden states.
    let mut variance = EMBEDDED;
    for Weight { spec, fill } in &mut weights {
        let part = spec.name.trim_end_matches(".weight").rsplit('.').next().unwrap_or_default();
        *fill = match (part, *fill) {
            ("shared", _) => Fill::Embedding,
            ("relative_attention_bias", _) => Fill::Normal(POSITION_SCORE_DEVIATION),
            ("q", Fill::Normal(deviation)) => Fill::Normal(CONTENT_SCORE_DEVIATION * deviation),
            ("o", Fill::Normal(deviation)) => {
                variance += ATTENTION_VARIANCE;
                Fill::Output { deviation, signs: Signs::Free }
            }
            ("classifier", _) => Fill::Biased { unit: variance.sqrt() },
            ("wo", _) => {
                variance += match spec.name.as_str() {
                    name if name.contains(".expert_0.") => EXPERT_VARIANCE,
                    name if name.contains(".experts.") => 0.0,
                    _ => DENSE_VARIANCE,
                };
                let deviation = FEED_FORWARD_DEVIATION * (spec.shape[1] as f64).powf(-0.5);
                Fill::Output { deviation, signs: Signs::Paired }
            }
            ("final_layer_norm", fill) => {
                // It is the first that a stack's tensors are listed with.
                variance = EMBEDDED;
                fill
            }
            (_, fill) => fill,
        };
    }
    weights
}

/// Embeddings (ids, d_model): the constant, then normal values, of opposite sign for the two ids of a pair.
pub(super) fn write_embeddings(
    normal: &Normal,
    stream: StreamSeed,
    shape: &[usize],
    file: &mut dyn Write,
) -> io::Result<()> {
    for id in 0..shape[0] {
        let deviation = if id % 2 == 0 { EMBEDDING_DEVIATION } else { -EMBEDDING_DEVIATION };
        let row = normal.values(stream.child(id as u64 / 2), shape[1]);
        let values = iter::once(CONSTANT).chain(row[1..].iter().map(|value| value * deviation));
        let bytes: Vec<u8> = values.flat_map(|value| bf16::from_f64(value).to_le_bytes()).collect();
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// What adds to the hidden states (d_model, columns): nothing to coordinate 0.
pub(super) fn write_output(
    normal: &Normal,
    stream: StreamSeed,
    spec: &TensorSpec,
    (deviation, signs): (f64, Signs),
    file: &mut dyn Write,
) -> io::Result<()> {
    let row_bytes = spec.dtype.bytes(spec.shape[1]);
    file.write_all(&vec![0; row_bytes])?;
    normal.write_bf16(stream, deviation, signs, spec.bytes() - row_bytes as u64, file)
}

/// Router weights (experts, d_model): the bias, in a unit that is the deviation of a logit, then normal values. Which
/// expert has which bias is shuffled.
pub(super) fn write_router(
    normal: &Normal,
    stream: StreamSeed,
    shape: &[usize],
    (biases, unit): (&[f64], f64),
    file: &mut dyn Write,
) -> io::Result<()> {
    for (expert, bias) in shuffled(stream, biases.to_vec()).into_iter().enumerate() {
        let row = normal.values(stream.child(expert as u64), shape[1]);
        // Of one length, since a longer row would win more often.
        let length = row[1..].iter().map(|value| value * value).sum::<f64>().sqrt();
        let values = iter::once(bias * unit / CONSTANT).chain(row[1..].iter().map(|value| value / length));
        let bytes: Vec<u8> = values.flat_map(|value| ((value * LOGIT_DEVIATION) as f32).to_le_bytes()).collect();
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// The share of each rank, 1 / rank^skew of the sum of all.
pub(super) fn shares(experts: usize, skew: f64) -> Vec<f64> {
    let weights: Vec<f64> = (1..=experts).map(|rank| (rank as f64).powf(-skew)).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

/// What must be added to independent standard normal values, that of the first rank first, for each to be the largest as
/// often as the law says. Newton's method, one rank at a time, half of each step.
pub(super) fn biases(experts: usize, skew: f64) -> Vec<f64> {
    /// Of the logarithm of a share.
    const ERROR_MAX: f64 = 1e-3;
    const ROUNDS_MAX: usize = 500;
    let (shares, cumulative) = (shares(experts, skew), Cumulative::new());
    let mut biases = vec![0.0; experts];
    for _ in 0..ROUNDS_MAX {
        let mut error: f64 = 0.0;
        for (rank, (won, slope)) in wins(&cumulative, &biases).into_iter().enumerate() {
            let missing = (shares[rank] / won).ln();
            error = error.max(missing.abs());
            biases[rank] += (0.5 * missing / slope).clamp(-1.0, 1.0);
        }
        if error < ERROR_MAX {
            break;
        }
    }
    // They matter by their differences only: as they are, most tokens' logits are around 0.
    let mean: f64 = biases.iter().zip(&shares).map(|(bias, share)| bias * share).sum();
    biases.iter().map(|bias| bias - mean).collect()
}

/// For each normal value, of deviation 1 around its bias: how often it is the largest, the integral over z of
/// density(z - own bias) times P(every other one is below z); and by which factor of itself that grows with the bias.
fn wins(cumulative: &Cumulative, biases: &[f64]) -> Vec<(f64, f64)> {
    const STEP: f64 = 1.0 / 16.0;
    let lowest = biases.iter().copied().fold(f64::INFINITY, f64::min) - Cumulative::END;
    let highest = biases.iter().copied().fold(f64::NEG_INFINITY, f64::max) + Cumulative::END;
    let mut wins = vec![(0.0, 0.0); biases.len()];
    for point in 0..((highest - lowest) / STEP) as usize {
        let z = lowest + point as f64 * STEP;
        let below: Vec<f64> = biases.iter().map(|bias| cumulative.at(z - bias)).collect();
        let all_below: f64 = below.iter().product();
        if all_below > 0.0 {
            for ((won, growth), (bias, below)) in wins.iter_mut().zip(biases.iter().zip(&below)) {
                let mass = density(z - bias) * (all_below / below) * STEP;
                *won += mass;
                *growth += mass * (z - bias);
            }
        }
    }
    wins.into_iter().map(|(won, growth)| (won, growth / won)).collect()
}

/// Of the standard normal distribution.
fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() * 0.398_942_280_401_432_7
}

/// The share of standard normal values below x.
struct Cumulative(Vec<f64>);

impl Cumulative {
    const END: f64 = 9.0;
    const PER_UNIT: f64 = 512.0;

    fn new() -> Self {
        let steps = (2.0 * Self::END * Self::PER_UNIT) as usize;
        let middle = |step: usize| (step as f64 + 0.5) / Self::PER_UNIT - Self::END;
        let sum = |below: &mut f64, step: usize| {
            let start = *below;
            *below += density(middle(step)) / Self::PER_UNIT;
            Some(start)
        };
        Self((0..steps + 2).scan(0.0, sum).collect())
    }

    fn at(&self, x: f64) -> f64 {
        let place = (x.clamp(-Self::END, Self::END) + Self::END) * Self::PER_UNIT;
        let (step, part) = (place as usize, place.fract());
        self.0[step] + part * (self.0[step + 1] - self.0[step])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Experts would be hot by another law than the one that was asked for.
    #[test]
    fn biases_win_as_often_as_the_law_says() {
        for (experts, skew) in [(1, 1.0), (2, 4.0), (8, 0.5), (64, 1.0), (128, 3.0)] {
            let wins = wins(&Cumulative::new(), &biases(experts, skew));
            let total: f64 = wins.iter().map(|(won, _)| won).sum();
            assert!((total - 1.0).abs() < 1e-3, "{experts} experts win {total}");
            for ((won, _), share) in wins.iter().zip(shares(experts, skew)) {
                assert!((won / share - 1.0).abs() < 0.01, "{experts} experts, skew {skew}: {won} is not {share}");
            }
        }
    }
}
