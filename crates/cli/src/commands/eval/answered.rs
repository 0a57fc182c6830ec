//! What came back for one example: how likely its texts were, which experts they used, and which the hash tables named.
//! Made of an answer of the coordinator; all figures are made of these.

use std::time::Duration;

use sida_coordinator::{HashCounts, Scores};
use sida_routing::LayerForecast;

/// An example's answer.
#[derive(Clone, Debug)]
pub(crate) struct Answered {
    /// Tokens of the prompt.
    pub(crate) prompt_tokens: usize,
    /// One per target.
    pub(crate) scores: Vec<Score>,
    /// Whether a part of it had no hash table.
    pub(crate) unpredicted: bool,
    /// From acceptance to the answer.
    pub(crate) total: Duration,
    /// Of it, waiting for experts to be loaded.
    pub(crate) load: Duration,
    /// Of each MoE layer.
    pub(crate) layers: Vec<Layer>,
}

/// How likely a text was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Score {
    /// Sum over its tokens of ln p.
    pub(crate) log_likelihood: f64,
    pub(crate) tokens: usize,
}

/// What an MoE layer used, and what was foretold of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Layer {
    /// How the hash tables fared against the router.
    pub(crate) counts: HashCounts,
    /// Experts that rows went to, ascending.
    pub(crate) used: Vec<u16>,
    /// Experts that hash tables named, ascending, each with its best place: 0 the likeliest.
    pub(crate) named: Vec<(u16, usize)>,
    /// What they let expect.
    pub(crate) forecast: LayerForecast,
}

impl Answered {
    /// Which target is the likeliest: the answer among choices. Of two that are alike the first.
    pub(crate) fn choice(&self) -> usize {
        let better = |best: usize, at: usize| {
            if self.scores[at].log_likelihood > self.scores[best].log_likelihood { at } else { best }
        };
        (0..self.scores.len()).fold(0, better)
    }

    /// Of what a coordinator that evaluates answered to a prompt of so many tokens.
    pub(crate) fn of(prompt_tokens: usize, Scores { targets, trace }: Scores) -> Self {
        let scores =
            targets.iter().map(|target| Score { log_likelihood: target.log_likelihood.into(), tokens: target.tokens });
        let foretold = trace.hash_layers.expect("a coordinator that evaluates");
        let layers = trace.experts.layers().zip(foretold.counts()).map(|((layer, used), counts)| Layer {
            counts: *counts,
            used: used.into_iter().map(|expert| expert.0).collect(),
            named: foretold.named(layer).map(|(expert, place)| (expert.0, place)).collect(),
            forecast: foretold.forecast(layer).clone(),
        });
        Self {
            prompt_tokens,
            scores: scores.collect(),
            unpredicted: trace.unpredicted,
            total: trace.timings.total,
            load: trace.timings.load,
            layers: layers.collect(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An answer with these log-likelihoods of texts of two tokens each, which used nothing.
    pub(crate) fn answered(log_likelihoods: &[f64]) -> Answered {
        let score = |&log_likelihood: &f64| Score { log_likelihood, tokens: 2 };
        let scores = log_likelihoods.iter().map(score).collect();
        Answered {
            prompt_tokens: 1,
            scores,
            unpredicted: false,
            total: Duration::ZERO,
            load: Duration::ZERO,
            layers: Vec::new(),
        }
    }

    #[test]
    fn the_likeliest_choice_is_the_answer() {
        // Would break: accuracy is that of another answer, or differs from run to run where two are equally likely.
        assert_eq!(answered(&[-2.0, -1.0, -3.0]).choice(), 1);
        assert_eq!(answered(&[-1.0, -1.0]).choice(), 0);
        assert_eq!(answered(&[f64::NEG_INFINITY, -9.0]).choice(), 1);
    }
}
