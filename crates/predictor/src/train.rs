//! Makes a predictor for a model: records the routing of the user's text, learns it, and measures on text
//! that was held out. Called by `sida train-predictor`; CPU only, a few minutes for a small model.
//!
//! In reading order: `texts` (what to learn from), `record` (what the routers do with it), `table_net`
//! (counting); `linear`, `recurrence`, `lstm_layer`, `attention`, `input_attention`, `distillation`, `lstm_net` and `transformer_net` (what is learnt, on tensors whose
//! gradients candle finds), `descent` (learning it); `measure`; `from_file` and `further`
//! (a net that serves learns on from what routers chose since) and `compare` (whether it is better then).

mod attention;
mod compare;
mod descent;
mod distillation;
#[cfg(test)]
mod finite_differences;
mod from_file;
mod further;
mod input_attention;
mod linear;
mod lstm_layer;
mod lstm_net;
mod measure;
mod record;
mod recurrence;
mod table_net;
mod texts;
mod transformer_net;

use std::path::Path;

use sida_model::Stack;

use crate::{
    HitRate, Net, PredictorError,
    calibration::TOKENS_MIN,
    file::{Metadata, PredictorFile, TOP_K_MAX, Tensors},
};

pub use self::{
    compare::{Compared, compare},
    further::{FurtherOptions, check_trainable, further},
    record::{RecordOptions, Recording},
    texts::{Text, Texts},
};

/// How a predictor is trained. The defaults suit a model of a few million parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// Which net.
    pub net: Net,
    /// Experts per token and layer that it will predict.
    pub top_k: usize,
    /// Width of the net, even.
    pub width: usize,
    /// Width of what the net knows of a token by itself.
    pub token_width: usize,
    /// Passes of the net over the recorded tokens.
    pub epochs: usize,
    /// Tokens of one batch, at most; a step takes a batch for each thread.
    pub batch_tokens: usize,
    /// The largest learning rate; it rises over the first steps and falls to 0 with a cosine.
    pub learning_rate: f64,
    /// Weights and the order of batches start from it; with as many threads it gives the same net.
    pub seed: u64,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            net: Net::Transformer,
            top_k: 3,
            width: 128,
            token_width: 48,
            epochs: 6,
            batch_tokens: 2048,
            learning_rate: 4e-3,
            seed: 0,
        }
    }
}

impl TrainOptions {
    /// Refuses options that cannot train a predictor of a model with so many experts per layer.
    pub fn check(&self, num_experts: usize) -> Result<(), PredictorError> {
        let top_k_max = TOP_K_MAX.min(num_experts);
        let refuse = |field, found: usize, expected: String| {
            Err(PredictorError::Option { field, found: found.to_string(), expected })
        };
        if !(1..=top_k_max).contains(&self.top_k) {
            return refuse("top_k (--predicted)", self.top_k, format!("1 to {top_k_max}"));
        }
        let width_max = crate::lstm::stack_net::WIDTH_MAX;
        if !(2..=width_max).contains(&self.width) || !self.width.is_multiple_of(2) {
            return refuse("width", self.width, format!("an even number up to {width_max}"));
        }
        if !(1..=width_max).contains(&self.token_width) {
            return refuse("token_width", self.token_width, format!("1 to {width_max}"));
        }
        for (field, found) in [("epochs", self.epochs), ("batch_tokens", self.batch_tokens)] {
            if found == 0 {
                return refuse(field, found, "at least 1".to_owned());
            }
        }
        Ok(())
    }
}

/// How far training is; for a progress bar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainProgress {
    /// The stack whose net is being trained.
    pub stack: Stack,
    /// Tokens seen, of all passes.
    pub tokens_done: u64,
    /// Tokens of all passes.
    pub tokens_total: u64,
    /// The loss of the last step, in nats per token and layer.
    pub loss: f32,
}

/// Trains a net on `train`, measures it on `held_out`, and writes it with what was measured to `path`.
/// Both recordings must be of one model. Returns the hit rate of each MoE layer. Takes three times as long where
/// candle starts threads of its own: `CANDLE_CPU_MASK=0` in the environment keeps it from that.
pub fn train(
    train: &Recording,
    held_out: &Recording,
    options: &TrainOptions,
    path: &Path,
    on_progress: &mut dyn FnMut(TrainProgress),
) -> Result<Vec<HitRate>, PredictorError> {
    options.check(train.shape.num_experts)?;
    if train.encoder.tokens() + train.decoder.tokens() == 0 {
        return Err(PredictorError::Texts { reason: "nothing was recorded".to_owned() });
    }
    let mut tensors = Tensors::default();
    for stack in [Stack::Encoder, Stack::Decoder] {
        if train.shape.layers(stack).is_empty() {
            continue;
        }
        match options.net {
            Net::Table => {
                table_net::learn(train, stack, options.top_k).store(stack, &train.shape, options.top_k, &mut tensors)
            }
            Net::Lstm | Net::Transformer => descent::learn(train, stack, options, &mut tensors, on_progress)?,
        }
    }
    let layers = train.shape.encoder_layers.start..train.shape.decoder_layers.end;
    let metadata = Metadata {
        net: options.net,
        model: train.model,
        top_k: options.top_k,
        hit_rates: measure::unmeasured(layers.clone()),
        alphas: measure::uncalibrated(layers.clone()),
        chances: measure::uncalibrated(layers),
    };
    write_measured(tensors, metadata, held_out, path)
}

/// Measures the predictor in the file `from` on text that it has not seen, and writes it with what was measured to
/// `to`, whole or not at all: its hit rates, and what its confidence is worth. Returns the hit rate of each MoE layer. Refused
/// where too little is held out to say what the confidence is worth; then nothing is written.
pub fn calibrate(from: &Path, held_out: &Recording, to: &Path) -> Result<Vec<HitRate>, PredictorError> {
    for (stack, name) in [(Stack::Encoder, "encoder"), (Stack::Decoder, "decoder")] {
        let tokens = held_out.of_stack(stack).tokens();
        if !held_out.shape.layers(stack).is_empty() && tokens < TOKENS_MIN {
            let reason = format!("{tokens} held-out tokens of the {name}, expected {TOKENS_MIN} or more");
            return Err(PredictorError::TooFewHeldOut { reason });
        }
    }
    measured(from, held_out, to)
}

/// [`calibrate`] with however little is held out: layers of which nothing is keep what was said of them, and those of which there
/// is too little their calibration.
fn measured(from: &Path, held_out: &Recording, to: &Path) -> Result<Vec<HitRate>, PredictorError> {
    // What is refused is refused before anything is written.
    crate::open_shape(from, held_out.shape.clone(), held_out.model)?;
    let file = PredictorFile::read(from, held_out.shape.clone(), held_out.model)?;
    let metadata = file.metadata.clone();
    write_measured(file.into_tensors(), metadata, held_out, to)
}

/// Writes a predictor to `to`, with what was measured of it in place of what `metadata` says.
fn write_measured(
    tensors: Tensors,
    mut metadata: Metadata,
    held_out: &Recording,
    to: &Path,
) -> Result<Vec<HitRate>, PredictorError> {
    let before = metadata.clone();
    let layers = held_out.shape.encoder_layers.start..held_out.shape.decoder_layers.end;
    (metadata.alphas, metadata.chances) = (measure::uncalibrated(layers.clone()), measure::uncalibrated(layers));
    // What is measured is what will be served: a file, opened as any other. Until it is measured the one that may be
    // there stays.
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let unmeasured = to.with_file_name(format!(".{name}.{}.unmeasured", std::process::id()));
    tensors.write(&metadata, &unmeasured)?;
    let predictor = crate::open_shape(&unmeasured, held_out.shape.clone(), held_out.model);
    let removed = std::fs::remove_file(&unmeasured);
    removed.map_err(|source| PredictorError::Write { path: unmeasured, source })?;
    let predictor = predictor?;
    metadata.hit_rates = measure::hit_rates(&*predictor, held_out)?;
    (metadata.alphas, metadata.chances) = measure::calibrations(&*predictor, held_out, &mut metadata.hit_rates)?;
    for (at, rate) in metadata.hit_rates.iter_mut().enumerate().filter(|(_, rate)| rate.tokens < TOKENS_MIN as u64) {
        if rate.tokens == 0 {
            *rate = before.hit_rates[at];
        }
        (metadata.alphas[at], metadata.chances[at]) = (before.alphas[at].clone(), before.chances[at].clone());
    }
    tensors.write(&metadata, to)?;
    Ok(metadata.hit_rates)
}

#[cfg(test)]
mod tests;
