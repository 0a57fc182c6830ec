//! The descent: batches, threads, learning rate, AdamW.

use std::{collections::BTreeMap, ops::ControlFlow, panic::resume_unwind};

use candle_core::{Result, Tensor, Var, backprop::GradStore};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use half::f16;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use rayon::{ThreadPool, ThreadPoolBuilder};
use sida_model::Stack;

use super::{
    Recording, TrainOptions, TrainProgress,
    distillation::{distillation, targets},
    lstm_net::LstmNet,
    record::StackRecording,
    transformer_net::TransformerInTraining,
};
use crate::{Net, PredictorError, file::Tensors};

/// Share of all steps over which the learning rate rises.
const WARM_UP: f64 = 0.05;
/// Gradients are scaled down to this norm.
const GRADIENT_NORM_MAX: f64 = 1.0;
/// Batches become smaller where an epoch would be fewer steps: with few of them nothing is learnt.
const STEPS_PER_EPOCH_MIN: usize = 300;
/// Threads that train, at most: each adds a batch to every step, and larger steps learn less per token.
const WORKERS_MAX: usize = 16;

/// A net in training.
pub(super) trait Learnt: Sync {
    /// All that is trained.
    fn weights(&self) -> Vec<Var>;
    /// Logits (tokens, MoE layers x experts) of sequences of one length, one after another; of a decoder behind an encoder,
    /// with the encoder's states of each.
    fn logits(&self, sequences: &[&[u32]], inputs: &[&[f16]]) -> Result<Tensor>;
    /// Adds what the net that serves reads.
    fn store(&self, tensors: &mut Tensors) -> Result<()>;
}

/// Trains a stack's net and adds it to a file that is about to be written.
pub(super) fn learn(
    recording: &Recording,
    stack: Stack,
    options: &TrainOptions,
    tensors: &mut Tensors,
    on_progress: &mut dyn FnMut(TrainProgress),
) -> std::result::Result<(), PredictorError> {
    let recorded = recording.of_stack(stack);
    let layers = recording.shape.layers(stack).len();
    let mut random = StdRng::seed_from_u64(options.seed);
    let outputs = layers * recording.shape.num_experts;
    let widths = (options.width, options.token_width);
    let net = fresh(options.net, recorded, stack, outputs, widths, &mut random)?;
    let descent = Descent { recording, stack, options, workers: workers(rayon::current_num_threads())? };
    descent.run(&*net, &mut random, &mut |progress| {
        on_progress(progress);
        ControlFlow::Continue(())
    })?;
    net.store(tensors)?;
    Ok(())
}

/// One descent of a net.
pub(super) struct Descent<'d> {
    pub(super) recording: &'d Recording,
    pub(super) stack: Stack,
    pub(super) options: &'d TrainOptions,
    /// One batch each to every step.
    pub(super) workers: Vec<ThreadPool>,
}

impl Descent<'_> {
    /// Trains until all passes are done, or `on_step` breaks it off, which is an error.
    pub(super) fn run(
        &self,
        net: &dyn Learnt,
        random: &mut StdRng,
        on_step: &mut dyn FnMut(TrainProgress) -> ControlFlow<()>,
    ) -> std::result::Result<(), PredictorError> {
        let Self { recording, stack, options, workers } = self;
        let (stack, recorded) = (*stack, recording.of_stack(*stack));
        let (layers, num_experts) = (recording.shape.layers(stack).len(), recording.shape.num_experts);
        let weights = net.weights();
        let settings = ParamsAdamW { beta2: 0.98, weight_decay: 0.01, ..ParamsAdamW::default() };
        let mut optimizer = AdamW::new(weights.clone(), settings)?;
        let batch_tokens = options.batch_tokens.min(recorded.tokens() / (STEPS_PER_EPOCH_MIN * workers.len())).max(1);
        let tokens_total = (recorded.tokens() * options.epochs) as u64;
        let mut tokens_done = 0;
        for _ in 0..options.epochs {
            for batches in batches(recorded, batch_tokens, random).chunks(workers.len()) {
                let tokens = tokens(recorded, batches);
                let (loss, mut gradients) = gradients(net, recorded, num_experts, batches, tokens * layers, workers)?;
                clip(&weights, &mut gradients)?;
                let progress = tokens_done as f64 / tokens_total as f64;
                optimizer.set_learning_rate(options.learning_rate * schedule(progress));
                optimizer.step(&gradients)?;
                tokens_done += tokens as u64;
                if on_step(TrainProgress { stack, tokens_done, tokens_total, loss }).is_break() {
                    return Err(PredictorError::GivenUp);
                }
            }
        }
        Ok(())
    }
}

/// A net of these outputs, width and token width of which nothing is trained.
pub(super) fn fresh(
    net: Net,
    recorded: &StackRecording,
    stack: Stack,
    outputs: usize,
    widths: (usize, usize),
    random: &mut StdRng,
) -> Result<Box<dyn Learnt>> {
    Ok(match (stack, net) {
        (Stack::Encoder, Net::Transformer) => Box::new(TransformerInTraining::new(recorded, outputs, widths, random)?),
        _ => Box::new(LstmNet::new(recorded, stack, outputs, widths, random)?),
    })
}

/// The summed loss of sequences of one length, in nats.
fn loss(net: &dyn Learnt, recorded: &StackRecording, num_experts: usize, batch: &[usize]) -> Result<Tensor> {
    let sequences: Vec<&[u32]> = batch.iter().map(|&index| &recorded.sequences[index][..]).collect();
    let inputs = batch.iter().filter_map(|&index| recorded.inputs.get(index).map(Vec::as_slice));
    let logits = net.logits(&sequences, &inputs.collect::<Vec<_>>())?.reshape(((), num_experts))?;
    distillation(&logits, &targets(recorded, batch, num_experts)?)
}

/// So many pools of one thread, but not too many. The products of such a net are too small to be cut up:
/// waking a thread takes longer. So each worker does a batch of its own.
pub(super) fn workers(threads: usize) -> std::result::Result<Vec<ThreadPool>, PredictorError> {
    let pool = |_| {
        let pool = ThreadPoolBuilder::new().num_threads(1).build();
        pool.map_err(|error| PredictorError::Threads { reason: error.to_string() })
    };
    (0..threads.min(WORKERS_MAX)).map(pool).collect()
}

/// The mean loss of a step's `entries` (tokens in layers) and its gradients, one batch a worker.
fn gradients(
    net: &dyn Learnt,
    recorded: &StackRecording,
    num_experts: usize,
    batches: &[Vec<usize>],
    entries: usize,
    workers: &[ThreadPool],
) -> Result<(f32, GradStore)> {
    let of_batch = |batch: &[usize]| {
        let loss = (loss(net, recorded, num_experts, batch)? / entries as f64)?;
        Ok((loss.to_scalar::<f32>()?, loss.backward()?))
    };
    let results: Vec<Result<(f32, GradStore)>> = std::thread::scope(|scope| {
        let mut running = Vec::new();
        for (batch, worker) in batches.iter().zip(workers) {
            running.push(scope.spawn(|| worker.install(|| of_batch(batch))));
        }
        running.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let (mut sum, mut gradients) = (0.0, GradStore::default());
    for result in results {
        let (loss, part) = result?;
        sum += loss;
        gradients.extend(part)?;
    }
    Ok((sum, gradients))
}

/// Indices of sequences of one length each, in random order.
fn batches(recorded: &StackRecording, batch_tokens: usize, random: &mut StdRng) -> Vec<Vec<usize>> {
    let mut by_length: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (index, tokens) in recorded.sequences.iter().enumerate().filter(|(_, tokens)| !tokens.is_empty()) {
        by_length.entry(tokens.len()).or_default().push(index);
    }
    let mut batches = Vec::new();
    for (length, mut indices) in by_length {
        indices.shuffle(random);
        batches.extend(indices.chunks((batch_tokens / length).max(1)).map(<[usize]>::to_vec));
    }
    batches.shuffle(random);
    batches
}

fn tokens(recorded: &StackRecording, batches: &[Vec<usize>]) -> usize {
    batches.iter().flatten().map(|&index| recorded.sequences[index].len()).sum()
}

/// Rises linearly, then falls to 0 with a cosine.
fn schedule(progress: f64) -> f64 {
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos());
    cosine * ((progress + 1e-3) / WARM_UP).min(1.0)
}

/// Scales gradients down to [`GRADIENT_NORM_MAX`] where all of them together are longer.
fn clip(weights: &[Var], gradients: &mut GradStore) -> Result<()> {
    let mut squares = 0.0;
    for gradient in weights.iter().filter_map(|weight| gradients.get(weight)) {
        squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let scale = GRADIENT_NORM_MAX / squares.sqrt();
    if scale < 1.0 {
        for weight in weights {
            if let Some(gradient) = gradients.remove(weight) {
                gradients.insert(weight, (gradient * scale)?);
            }
        }
    }
    Ok(())
}
