//! The hash function of SiDA: predicts, before the model runs, which experts every token will activate in
//! every MoE layer. The coordinator and the predictor-nodes call it; `sida train-predictor` makes it.
//!
//! A predictor is a file beside its model, and works for that model only. Prediction never decides what is
//! computed in `exact` mode, only what is in memory by then, so a poor one costs time and nothing else. But
//! its own output must not depend on the batch it was computed in, as `guided` and `hash` route by it: the nets are
//! made of the row-wise kernels of [`sida_kernels`] and know no padding.
//!
//! In reading order: [`file`](mod@file) (what is stored, checked), `made_for` (for which kind of model), [`state`] (a decoder's memory of its sequence and
//! input), [`entries`] (from logits to hash tables), [`calibration`] (what a net's confidence is worth), [`table`] (a
//! predefined hash), `learnt` (the nets that are trained), [`lstm`] (the paper's), `transformer` (another one for the
//! encoder), [`train`] (record routing, learn it, measure).

pub mod calibration;
pub mod entries;
mod error;
pub mod file;
mod learnt;
pub mod lstm;
mod made_for;
pub mod state;
pub mod table;
pub mod train;
pub(crate) mod transformer;

use std::{ops::Range, path::Path, sync::Arc};

use sida_model::{ModelConfig, Stack};
use sida_routing::{Digest, HashTable};

pub use self::{
    error::PredictorError,
    file::{HitRate, Net},
    made_for::MadeFor,
    state::PredictorState,
};
use self::{file::PredictorFile, learnt::LearntPredictor, table::TablePredictor};

/// The name of a model's predictor within the model's directory.
pub const FILE_NAME: &str = "predictor.safetensors";

/// Predicts hash tables for one model. Cheap to share; every call works on its own memory.
pub trait HashPredictor: Send + Sync {
    /// Which net it is: `transformer`, `lstm` or `table`.
    fn net(&self) -> &str;
    /// SHA-256 of its file.
    fn digest(&self) -> Digest;
    /// Experts per token and layer of the tables it makes.
    fn top_k(&self) -> usize;
    /// The model it predicts for.
    fn model_digest(&self) -> Digest;
    /// What was measured on held-out text when it was trained, one entry per MoE layer.
    fn hit_rates(&self) -> &[HitRate];
    /// One table per sequence for the encoder's MoE layers; the whole input is known, so it may look both ways.
    fn encode(&self, sequences: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError>;
    /// Whether [`HashPredictor::decode`] reads the model's input: then the state of each sequence has to come from
    /// [`HashPredictor::start`], or from a state that did.
    fn reads_input(&self) -> bool {
        false
    }
    /// The state, before its first token, of a sequence of whose input the encoder has made `states` (tokens, d_model).
    /// Takes a small part of the time that the encoder took for them.
    fn start(&self, _states: &[f32]) -> Result<PredictorState, PredictorError> {
        Ok(PredictorState::default())
    }
    /// One table per sequence for the decoder's MoE layers and the new tokens of that sequence, of which there
    /// is at least one. Advances the states; `states[i]` belongs to `tokens[i]`. On an error no state is changed.
    fn decode(&self, states: &mut [&mut PredictorState], tokens: &[&[u32]]) -> Result<Vec<HashTable>, PredictorError>;
}

/// Opens a predictor file for a model; refuses one of another model, or of another shape.
pub fn open(path: &Path, config: &ModelConfig, model: Digest) -> Result<Arc<dyn HashPredictor>, PredictorError> {
    open_shape(path, PredictorShape::of(config), model)
}

/// [`open`] with what it needs of the config.
fn open_shape(path: &Path, shape: PredictorShape, model: Digest) -> Result<Arc<dyn HashPredictor>, PredictorError> {
    let file = PredictorFile::read(path, shape, model)?;
    Ok(match file.metadata.net {
        Net::Table => Arc::new(TablePredictor::from_file(file)?),
        Net::Lstm | Net::Transformer => Arc::new(LearntPredictor::from_file(file)?),
    })
}

/// What a predictor must know of its model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PredictorShape {
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Experts of each MoE layer.
    pub num_experts: usize,
    /// Experts that a router chooses for each token.
    pub chosen: usize,
    /// The encoder's MoE layers.
    pub encoder_layers: Range<u16>,
    /// The decoder's MoE layers.
    pub decoder_layers: Range<u16>,
    /// Width of the encoder's states, which a decoder's net may read. None where there is no encoder.
    pub encoder_width: Option<usize>,
}

impl PredictorShape {
    /// Of a model.
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            vocab_size: config.vocab_size,
            num_experts: config.num_experts,
            encoder_layers: config.moe_layers(Stack::Encoder),
            decoder_layers: config.moe_layers(Stack::Decoder),
            chosen: config.top_k,
            encoder_width: config.has_encoder().then_some(config.d_model),
        }
    }

    /// The stack that reads prompts: the encoder, where there is one.
    pub fn prompt_stack(&self) -> Stack {
        if self.encoder_width.is_some() { Stack::Encoder } else { Stack::Decoder }
    }

    /// The MoE layers of a stack.
    pub fn layers(&self, stack: Stack) -> Range<u16> {
        match stack {
            Stack::Encoder => self.encoder_layers.clone(),
            Stack::Decoder => self.decoder_layers.clone(),
        }
    }

    /// Refuses tokens that the model does not have.
    fn check_tokens(&self, sequences: &[&[u32]]) -> Result<(), PredictorError> {
        let vocab_size = self.vocab_size;
        match sequences.iter().flat_map(|tokens| tokens.iter()).find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(PredictorError::Token { id, vocab_size }),
            None => Ok(()),
        }
    }
}

/// How a stack's tensors are called in a predictor file.
fn stack_name(stack: Stack) -> &'static str {
    match stack {
        Stack::Encoder => "encoder",
        Stack::Decoder => "decoder",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sida_model::Checkpoint;

    /// The first command of the README would run without its predictor, because model or code changed since it
    /// was trained.
    #[test]
    fn the_shipped_predictor_fits_the_shipped_model() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/switch-tiny-64");
        let checkpoint = Checkpoint::open(&model).unwrap();
        let predictor = open(&model.join(FILE_NAME), checkpoint.config(), checkpoint.digest()).unwrap();
        assert_eq!((predictor.net(), predictor.reads_input()), ("transformer", true));
        assert!(predictor.hit_rates().iter().all(|rate| rate.top3 > 0.6 && rate.tokens > 0));
        let table = &predictor.encode(&[&[5, 6, 7, 1]]).unwrap()[0];
        assert_eq!((table.shape().layers, table.shape().tokens, table.shape().top_k), (3, 4, 3));
    }
}
