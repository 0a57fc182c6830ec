//! The descent: batches, threads, learning rate, AdamW.

use std::{collections::BTreeMap, panic::resume_unwind};

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use rayon::{ThreadPool, ThreadPoolBuilder};
use sida_model::Stack;

use super::{Recording, TrainOptions, TrainProgress, lstm_net::LstmNet, record::StackRecording};
use crate::{PredictorError, file::Tensors};

/// Share of all steps over which the learning rate rises.
const WARM_UP: f64 = 0.05;
/// Gradients are scaled down to this norm.
const GRADIENT_NORM_MAX: f32 = 1.0;
/// Batches become smaller where an epoch would be fewer steps: with few of them nothing is learnt.
const STEPS_PER_EPOCH_MIN: usize = 300;
/// Threads that train, at most: each adds a batch to every step, and larger steps learn less per token.
const WORKERS_MAX: usize = 8;

/// Trains a stack's LSTM net and adds it to a file that is about to be written.
pub(super) fn learn(
    recording: &Recording,
    stack: Stack,
    options: &TrainOptions,
    tensors: &mut Tensors,
    on_progress: &mut dyn FnMut(TrainProgress),
) -> Result<(), PredictorError> {
    let recorded = recording.of_stack(stack);
    let layers = recording.shape.layers(stack).len();
    let mut random = StdRng::seed_from_u64(options.seed);
    let net = LstmNet::new(recorded, stack, layers, recording.shape.num_experts, options.width);
    let mut weights = net.weights(&mut random);
    let mut optimizer = AdamW::new(weights.len());
    let workers = workers()?;
    let batch_tokens = options.batch_tokens.min(recorded.tokens() / (STEPS_PER_EPOCH_MIN * workers.len())).max(1);
    let tokens_total = (recorded.tokens() * options.epochs) as u64;
    let mut tokens_done = 0;
    for _ in 0..options.epochs {
        for batches in batches(recorded, batch_tokens, &mut random).chunks(workers.len()) {
            let tokens = tokens(recorded, batches);
            let (loss, mut gradient) = gradient(&net, &weights, recorded, batches, &workers);
            let entries = (tokens * layers) as f32;
            clip(&mut gradient, 1.0 / entries);
            let progress = tokens_done as f64 / tokens_total as f64;
            optimizer.step(&mut weights, &gradient, (options.learning_rate * schedule(progress)) as f32);
            tokens_done += tokens as u64;
            on_progress(TrainProgress { stack, tokens_done, tokens_total, loss: loss / entries });
        }
    }
    net.store(&weights, tensors);
    Ok(())
}

/// One pool of one thread for each thread there is. The products of such a net are too small to be cut up:
/// waking a thread takes longer. So each worker does a batch of its own.
fn workers() -> Result<Vec<ThreadPool>, PredictorError> {
    let pool = |_| {
        let pool = ThreadPoolBuilder::new().num_threads(1).build();
        pool.map_err(|error| PredictorError::Threads { reason: error.to_string() })
    };
    (0..rayon::current_num_threads().min(WORKERS_MAX)).map(pool).collect()
}

/// The summed loss and gradient of the batches of one step, one batch a worker.
fn gradient(
    net: &LstmNet,
    weights: &[f32],
    recorded: &StackRecording,
    batches: &[Vec<usize>],
    workers: &[ThreadPool],
) -> (f32, Vec<f32>) {
    let results: Vec<(f32, Vec<f32>)> = std::thread::scope(|scope| {
        let mut running = Vec::new();
        for (batch, worker) in batches.iter().zip(workers) {
            running.push(scope.spawn(move || worker.install(|| net.gradient(weights, recorded, batch))));
        }
        running.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let mut results = results.into_iter();
    let (mut loss, mut sum) = results.next().unwrap_or_default();
    for (part_loss, part) in results {
        loss += part_loss;
        sum.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part);
    }
    (loss, sum)
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

/// Scales a gradient, and further down where it is longer than [`GRADIENT_NORM_MAX`] then.
fn clip(gradient: &mut [f32], scale: f32) {
    let norm = gradient.iter().map(|value| value * value).sum::<f32>().sqrt() * scale;
    let scale = scale * (GRADIENT_NORM_MAX / norm.max(1e-9)).min(1.0);
    gradient.iter_mut().for_each(|value| *value *= scale);
}

/// AdamW (Loshchilov and Hutter, 2019).
struct AdamW {
    mean: Vec<f32>,
    square: Vec<f32>,
    steps: i32,
}

impl AdamW {
    const MEAN_DECAY: f32 = 0.9;
    const SQUARE_DECAY: f32 = 0.98;
    const WEIGHT_DECAY: f32 = 0.01;

    fn new(weights: usize) -> Self {
        Self { mean: vec![0.0; weights], square: vec![0.0; weights], steps: 0 }
    }

    fn step(&mut self, weights: &mut [f32], gradient: &[f32], rate: f32) {
        self.steps += 1;
        let mean_scale = 1.0 / (1.0 - Self::MEAN_DECAY.powi(self.steps));
        let square_scale = 1.0 / (1.0 - Self::SQUARE_DECAY.powi(self.steps));
        for (((weight, gradient), mean), square) in
            weights.iter_mut().zip(gradient).zip(&mut self.mean).zip(&mut self.square)
        {
            *mean = Self::MEAN_DECAY * *mean + (1.0 - Self::MEAN_DECAY) * gradient;
            *square = Self::SQUARE_DECAY * *square + (1.0 - Self::SQUARE_DECAY) * gradient * gradient;
            let direction = *mean * mean_scale / ((*square * square_scale).sqrt() + 1e-8);
            *weight -= rate * (direction + Self::WEIGHT_DECAY * *weight);
        }
    }
}
