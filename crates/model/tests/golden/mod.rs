//! golden.json as tests/parity/make_golden.py writes it. The files beside switch-tiny-64 and switch-mini-8 are
//! older and lack the optional fields.

use std::{collections::HashMap, path::Path};

use serde::Deserialize;

/// For each router module, by its name in transformers, one value per token.
pub(crate) type Stacked<T> = HashMap<String, Vec<T>>;

#[derive(Deserialize)]
pub(crate) struct Golden {
    #[serde(default)]
    pub(crate) enforce_capacity: bool,
    pub(crate) cases: Vec<Case>,
}

#[derive(Deserialize)]
pub(crate) struct Case {
    pub(crate) text: Option<String>,
    pub(crate) input_ids: Vec<u32>,
    pub(crate) encoder: EncoderStates,
    pub(crate) first_step_top5: Vec<(u32, f64)>,
    pub(crate) first_step_logits: Option<Logits>,
    pub(crate) greedy_ids: Vec<u32>,
    pub(crate) encoder_experts: Stacked<u16>,
    pub(crate) encoder_probs: Option<Stacked<f32>>,
    pub(crate) encoder_dropped: Option<Stacked<usize>>,
    pub(crate) decoder_experts: Stacked<u16>,
    pub(crate) decoder_probs: Option<Stacked<f32>>,
    pub(crate) forced: Option<Forced>,
}

#[derive(Deserialize)]
pub(crate) struct EncoderStates {
    pub(crate) mean: f64,
    pub(crate) std: f64,
    pub(crate) first8: Vec<f64>,
    pub(crate) last8: Vec<f64>,
}

#[derive(Deserialize)]
pub(crate) struct Logits {
    /// Which tokens; all of them where there are none.
    pub(crate) ids: Option<Vec<u32>>,
    pub(crate) logits: Vec<f64>,
    pub(crate) sum: Option<f64>,
    pub(crate) abs_sum: Option<f64>,
}

#[derive(Deserialize)]
pub(crate) struct Forced {
    pub(crate) decoder_input_ids: Vec<u32>,
    pub(crate) last_logits: Logits,
    pub(crate) experts: Stacked<u16>,
    pub(crate) dropped: Option<Stacked<usize>>,
}

impl Golden {
    pub(crate) fn open(path: &Path) -> Self {
        let json = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_slice(&json).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}
