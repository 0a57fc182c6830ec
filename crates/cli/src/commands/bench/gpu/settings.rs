//! What is measured on a GPU. Made of the command line.

use sida_model::Precision;

/// Everything that can be chosen.
#[derive(Clone, Debug)]
pub(crate) struct GpuSettings {
    /// The device's number.
    pub(crate) ordinal: usize,
    /// A model's directory, or `synth:` and a published shape.
    pub(crate) model: String,
    /// How unevenly a made model's tokens choose experts (Zipf's exponent).
    pub(crate) skew: f64,
    /// What it computes in.
    pub(crate) precision: Precision,
    /// Shares of all experts, beside everything.
    pub(crate) budgets: Vec<f64>,
    /// Page-locked memory for experts.
    pub(crate) host_bytes: u64,
    /// Sequences of a batch.
    pub(crate) batches: Vec<usize>,
    /// Tokens of a sequence.
    pub(crate) input_tokens: Vec<usize>,
    /// Tokens generated.
    pub(crate) new_tokens: usize,
    /// Batches ahead of the one that begins whose plans are queued.
    pub(crate) lookahead: usize,
    /// Whether budgets are measured without residency, too.
    pub(crate) nothing_kept: bool,
    /// Share of right entries in the plans.
    pub(crate) hint_rate: f64,
    /// How often every subject has its turn.
    pub(crate) rounds: usize,
    /// How long a turn takes.
    pub(crate) seconds: f64,
    /// Whether passes of known shapes are replayed.
    pub(crate) graphs: bool,
    /// Whether experts in bf16 lie packed.
    pub(crate) packs: bool,
    /// Whether kernels are timed by themselves, too.
    pub(crate) kernels: bool,
}

/// What is asked of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// The encoder's states.
    Encode,
    /// So many tokens.
    Generate(usize),
}

/// One kind of batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) method: Method,
    pub(crate) sequences: usize,
    pub(crate) tokens: usize,
}

impl GpuSettings {
    /// Every kind of batch.
    pub(crate) fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for method in [Method::Encode, Method::Generate(self.new_tokens)] {
            if method == Method::Generate(0) {
                continue;
            }
            for &tokens in &self.input_tokens {
                cases.extend(self.batches.iter().map(|&sequences| Case { method, sequences, tokens }));
            }
        }
        cases
    }

    /// Rows of the largest batch.
    pub(crate) fn rows_max(&self) -> usize {
        let largest = |sizes: &[usize]| sizes.iter().copied().max().unwrap_or(1);
        largest(&self.batches) * largest(&self.input_tokens)
    }
}
