//! Batches of random tokens, the same in every run and for every subject, so many that no cache of experts is warm from
//! the last time a batch came by.

use sida_model::Spans;

use super::settings::Case;

/// Different batches of a case. tests/bench/transformers_gpu.py makes the same.
const BATCHES: usize = 24;

/// The batches of one case.
pub(super) struct Inputs {
    pub(super) case: Case,
    pub(super) spans: Spans,
    /// The ids of each batch.
    pub(super) batches: Vec<Vec<u32>>,
}

impl Inputs {
    /// The n-th id is drawn with a frequency of about 1 / n (Zipf's law, as words are), from a linear
    /// congruential generator (Knuth's MMIX), which any language has in two lines.
    pub(super) fn new(case: &Case, vocab_size: usize) -> Self {
        let rows = case.sequences * case.tokens;
        let mut state = 1_u64;
        let mut id = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let share = (state >> 33) as f64 / (1_u64 << 31) as f64;
            1 + (vocab_size as f64 - 2.0).powf(share) as u32
        };
        let batches = (0..BATCHES).map(|_| (0..rows).map(|_| id()).collect()).collect();
        Self { case: *case, spans: Spans::new(vec![case.tokens; case.sequences]), batches }
    }
}
