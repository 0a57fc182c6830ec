//! Labels: what the routers of a stack chose for the tokens of one sequence, which is the truth about every prediction for
//! it. Noted by coordinators in `exact`, learnt from by predictor-nodes.

use thiserror::Error;

use crate::ExpertId;

/// Experts that are kept of a token in a layer, at most.
pub const KEPT_MAX: usize = 16;
/// By how much probabilities may add up to more than 1: they were rounded.
const SLACK: f32 = 1e-3;

/// A sequence, and the likeliest experts of each of its tokens in every MoE layer of a stack.
#[derive(Clone, Debug, PartialEq)]
pub struct Labels {
    tokens: Vec<u32>,
    kept: usize,
    /// (tokens, layers, kept), the likeliest first.
    experts: Vec<ExpertId>,
    /// Parallel to `experts`: the router's probabilities.
    probabilities: Vec<f32>,
}

/// What labels speak of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LabelsExtent {
    /// MoE layers of the stack.
    pub layers: usize,
    /// Experts of each layer.
    pub num_experts: usize,
    /// Experts that are kept of each token in each layer.
    pub kept: usize,
}

/// Why labels are refused.
#[derive(Debug, Error, PartialEq)]
#[allow(missing_docs)]
pub enum LabelsError {
    #[error("labels keep {kept} experts of each token and layer, expected 1 to {max}")]
    Kept { kept: usize, max: usize },
    #[error(
        "labels of {tokens} tokens x {layers} layers x {kept} experts need {expected} entries, found {experts} experts and \
         {probabilities} probabilities"
    )]
    Length { tokens: usize, layers: usize, kept: usize, expected: usize, experts: usize, probabilities: usize },
    #[error("labels name expert {expert}, the model has {num_experts} per layer")]
    Expert { expert: u16, num_experts: usize },
    #[error("labels name expert {expert} twice for one token and layer")]
    Twice { expert: u16 },
    #[error("labels hold the probabilities {probabilities:?}, expected some that fall and add up to at most 1")]
    Probabilities { probabilities: Vec<f32> },
}

impl Labels {
    /// Checks every entry of `experts` and `probabilities`, (tokens, layers, kept).
    pub fn new(
        tokens: Vec<u32>,
        extent: LabelsExtent,
        experts: Vec<ExpertId>,
        probabilities: Vec<f32>,
    ) -> Result<Self, LabelsError> {
        let LabelsExtent { layers, num_experts, kept } = extent;
        let max = KEPT_MAX.min(num_experts);
        if !(1..=max).contains(&kept) {
            return Err(LabelsError::Kept { kept, max });
        }
        let expected = tokens.len().saturating_mul(layers).saturating_mul(kept);
        if experts.len() != expected || probabilities.len() != expected {
            let (tokens, experts, probabilities) = (tokens.len(), experts.len(), probabilities.len());
            return Err(LabelsError::Length { tokens, layers, kept, expected, experts, probabilities });
        }
        for (experts, probabilities) in experts.chunks_exact(kept).zip(probabilities.chunks_exact(kept)) {
            for (at, &ExpertId(expert)) in experts.iter().enumerate() {
                if usize::from(expert) >= num_experts {
                    return Err(LabelsError::Expert { expert, num_experts });
                }
                if experts[..at].contains(&ExpertId(expert)) {
                    return Err(LabelsError::Twice { expert });
                }
            }
            let is_finite = probabilities.iter().all(|probability| (0.0..=1.0).contains(probability));
            let falls = probabilities.is_sorted_by(|a, b| a >= b);
            if !is_finite || !falls || probabilities.iter().sum::<f32>() > 1.0 + SLACK {
                return Err(LabelsError::Probabilities { probabilities: probabilities.to_vec() });
            }
        }
        Ok(Self { tokens, kept, experts, probabilities })
    }

    /// The sequence.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many experts are kept of each token in each layer.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// (tokens, layers, kept), the likeliest first.
    pub fn experts(&self) -> &[ExpertId] {
        &self.experts
    }

    /// The router's probabilities of [`Labels::experts`].
    pub fn probabilities(&self) -> &[f32] {
        &self.probabilities
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: LabelsExtent = LabelsExtent { layers: 2, num_experts: 4, kept: 2 };

    fn labels(extent: LabelsExtent, experts: [u16; 4], probabilities: [f32; 4]) -> Result<Labels, LabelsError> {
        Labels::new(vec![7], extent, experts.map(ExpertId).to_vec(), probabilities.to_vec())
    }

    /// A net would learn from numbers that no router gave, or index beyond its outputs.
    #[test]
    fn what_no_router_gives_is_refused() {
        let good = [0.5, 0.25, 0.9, 0.1];
        let taken = labels(EXTENT, [3, 1, 0, 2], good).unwrap();
        assert_eq!((taken.tokens(), taken.kept(), taken.probabilities()), (&[7][..], 2, &good[..]));
        assert_eq!(labels(EXTENT, [3, 4, 0, 2], good), Err(LabelsError::Expert { expert: 4, num_experts: 4 }));
        assert_eq!(labels(EXTENT, [3, 1, 2, 2], good), Err(LabelsError::Twice { expert: 2 }));
        for wrong in [
            [0.5, 0.25, 0.9, 0.2],
            [0.25, 0.5, 0.9, 0.1],
            [0.5, 0.25, f32::NAN, 0.1],
            [0.5, f32::NAN, 0.9, 0.1],
            [0.5, 0.25, 0.9, -0.1],
            [0.5, 0.25, f32::INFINITY, 0.1],
        ] {
            assert!(matches!(labels(EXTENT, [3, 1, 0, 2], wrong), Err(LabelsError::Probabilities { .. })), "{wrong:?}");
        }
        for (extent, layers) in [(EXTENT, 1), (EXTENT, 3), (EXTENT, usize::MAX)] {
            let extent = LabelsExtent { layers, ..extent };
            assert!(matches!(labels(extent, [3, 1, 0, 2], good), Err(LabelsError::Length { .. })), "{layers}");
        }
        for kept in [0, 5, usize::MAX] {
            let extent = LabelsExtent { kept, ..EXTENT };
            assert_eq!(labels(extent, [3, 1, 0, 2], good), Err(LabelsError::Kept { kept, max: 4 }));
        }
    }
}
