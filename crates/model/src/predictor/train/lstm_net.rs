//! Learns the LSTM net of one stack with candle's gradients: truncated distillation on the router's most
//! probable experts plus cross-entropy with the chosen one (SiDA, section 3.3).
//!
//! A batch holds sequences of one length, so there is no padding to mask and what is learnt is what
//! [`StackNet`](crate::predictor::lstm) computes.

use std::{collections::BTreeMap, sync::Mutex};

use candle_core::{D, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, ops::log_softmax};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

use super::{
    Recording, TrainOptions, TrainProgress,
    autograd::{LstmScan, SparsemaxRows},
    record::StackRecording,
};
use crate::{
    Stack,
    predictor::{
        PredictorError,
        file::Tensors,
        lstm::{
            ATTENTION_WINDOW,
            recurrence::Direction,
            stack_net::{LSTM_LAYERS, directions},
        },
        stack_name,
    },
    tensor_rows::rows,
};

/// Share of all steps over which the learning rate rises.
const WARM_UP: f64 = 0.05;
/// Gradients are scaled down to this norm.
const GRADIENT_NORM_MAX: f64 = 1.0;
const WEIGHT_DECAY: f64 = 0.01;
/// A score that sparsemax gives no weight to.
const UNSEEN: f32 = -1e4;

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
    let net = TrainedNet::new(recorded, stack, layers * recording.shape.num_experts, options.width, &mut random)?;
    let mut optimizer = AdamW::new(
        net.variables(),
        ParamsAdamW { beta1: 0.9, beta2: 0.98, weight_decay: WEIGHT_DECAY, ..Default::default() },
    )?;
    let tokens_total = (recorded.tokens() * options.epochs) as u64;
    let mut tokens_done = 0;
    for _ in 0..options.epochs {
        for batch in batches(recorded, options.batch_tokens, &mut random) {
            let progress = tokens_done as f64 / tokens_total as f64;
            optimizer.set_learning_rate(options.learning_rate * schedule(progress));
            let loss = net.loss(recorded, &batch, recording.shape.num_experts)?;
            let mut gradients = loss.backward()?;
            clip(&mut gradients, &net.variables())?;
            optimizer.step(&gradients)?;
            tokens_done += (batch.len() * recorded.sequences[batch[0]].len()) as u64;
            on_progress(TrainProgress { stack, tokens_done, tokens_total, loss: loss.to_scalar()? });
        }
    }
    Ok(net.store(stack, tensors)?)
}

/// Rises linearly, then falls to 0 with a cosine.
fn schedule(progress: f64) -> f64 {
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos());
    cosine * ((progress + 1e-3) / WARM_UP).min(1.0)
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

fn clip(gradients: &mut candle_core::backprop::GradStore, variables: &[Var]) -> Result<()> {
    let mut squares = 0.0;
    for variable in variables {
        if let Some(gradient) = gradients.get(variable) {
            squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
    }
    let scale = GRADIENT_NORM_MAX / squares.sqrt();
    if scale < 1.0 {
        for variable in variables {
            if let Some(gradient) = gradients.remove(variable) {
                gradients.insert(variable, (gradient * scale)?);
            }
        }
    }
    Ok(())
}

/// A net in training. Matrices are (outputs, inputs).
struct TrainedNet {
    stack: Stack,
    width: usize,
    /// (vocabulary, d_model), of root mean square 1; not trained.
    embedding: Tensor,
    token: Var,
    token_bias: Var,
    /// For each layer and direction: input, hidden, bias.
    lstm: Vec<Vec<[Var; 3]>>,
    residual: Var,
    head: Var,
    head_bias: Var,
}

impl TrainedNet {
    fn new(recorded: &StackRecording, stack: Stack, outputs: usize, width: usize, random: &mut StdRng) -> Result<Self> {
        let d_model = recorded.embedding.dim(1)?;
        let mean_square = recorded.embedding.sqr()?.mean_all()?.to_scalar::<f32>()?;
        let embedding = (&recorded.embedding / f64::from(mean_square.sqrt().max(1e-9)))?;
        let direction_width = width / directions(stack).len();
        let mut lstm = Vec::new();
        for _ in 0..LSTM_LAYERS {
            let mut layer = Vec::new();
            for _ in directions(stack) {
                let input = uniform(&[4 * direction_width, width], width, random)?;
                let hidden = uniform(&[4 * direction_width, direction_width], direction_width, random)?;
                // Forget gates start open, so that gradients reach far back.
                let bias = (0..4 * direction_width).map(|at| if at / direction_width == 1 { 1.0 } else { 0.0f32 });
                layer.push([input, hidden, Var::from_vec(bias.collect(), 4 * direction_width, &Device::Cpu)?]);
            }
            lstm.push(layer);
        }
        Ok(Self {
            stack,
            width,
            embedding,
            token: uniform(&[width, d_model], d_model, random)?,
            token_bias: uniform(&[width], d_model, random)?,
            lstm,
            residual: uniform(&[width, width], width, random)?,
            head: uniform(&[outputs, width], width, random)?,
            head_bias: uniform(&[outputs], width, random)?,
        })
    }

    fn variables(&self) -> Vec<Var> {
        let single = [&self.token, &self.token_bias, &self.residual, &self.head, &self.head_bias];
        self.lstm.iter().flatten().flatten().chain(single).cloned().collect()
    }

    /// Nats per token and layer.
    fn loss(&self, recorded: &StackRecording, batch: &[usize], num_experts: usize) -> Result<Tensor> {
        let log_probabilities = log_softmax(&self.logits(recorded, batch)?.reshape(((), num_experts))?, D::Minus1)?;
        let kept = recorded.kept;
        let experts: Vec<u32> =
            batch.iter().flat_map(|&index| recorded.experts[index].iter().map(|expert| u32::from(expert.0))).collect();
        let probabilities: Vec<f32> =
            batch.iter().flat_map(|&index| recorded.probabilities[index].iter().copied()).collect();
        let entries = experts.len() / kept;
        let experts = Tensor::from_vec(experts, (entries, kept), &Device::Cpu)?;
        let probabilities = Tensor::from_vec(probabilities, (entries, kept), &Device::Cpu)?;
        let of_kept = log_probabilities.gather(&experts, 1)?; // (entries, kept)
        let chosen = of_kept.narrow(1, 0, 1)?.sum_all()?;
        let distilled = (of_kept * probabilities)?.sum_all()?;
        ((chosen + distilled)? * (-1.0 / entries as f64))?.reshape(())
    }

    /// Logits (sequences, tokens, layers x experts) of sequences of one length.
    fn logits(&self, recorded: &StackRecording, batch: &[usize]) -> Result<Tensor> {
        let (sequences, steps) = (batch.len(), recorded.sequences[batch[0]].len());
        // Step by step, as the LSTM takes them.
        let ids: Vec<u32> =
            (0..steps).flat_map(|step| batch.iter().map(move |&index| recorded.sequences[index][step])).collect();
        let ids = Tensor::from_vec(ids, sequences * steps, &Device::Cpu)?;
        let x = linear(&self.embedding.index_select(&ids, 0)?, &self.token, Some(&self.token_bias))?.relu()?;
        let mut outputs = x.clone();
        for layer in &self.lstm {
            let mut sides = Vec::new();
            for (n, [input, hidden, bias]) in layer.iter().enumerate() {
                let scan = LstmScan { sequences, reverse: n == 1, trace: Mutex::new(None) };
                sides.push(linear(&outputs, input, Some(bias))?.contiguous()?.apply_op2(hidden.as_tensor(), scan)?);
            }
            outputs = Tensor::cat(&sides, 1)?;
        }
        let by_sequence = |t: &Tensor| t.reshape((steps, sequences, self.width))?.transpose(0, 1)?.contiguous();
        let (x, outputs) = (by_sequence(&x)?, by_sequence(&outputs)?); // (sequences, steps, width)
        let scale = (self.width as f64).powf(-0.5);
        let scores = (outputs.matmul(&outputs.transpose(1, 2)?)? * scale)?;
        let scores = match self.stack {
            Stack::Encoder => scores,
            Stack::Decoder => scores.broadcast_add(&window_mask(steps)?)?,
        };
        let attended = scores.contiguous()?.apply_op1(SparsemaxRows)?.matmul(&outputs)?;
        let flat = |t: &Tensor| t.reshape((sequences * steps, self.width));
        let hidden = (flat(&attended)? + linear(&flat(&x)?, &self.residual, None)?)?;
        linear(&hidden, &self.head, Some(&self.head_bias))
    }

    /// Adds what `StackNet` reads.
    fn store(&self, stack: Stack, tensors: &mut Tensors) -> Result<()> {
        let name = stack_name(stack);
        let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        let tokens = linear(&self.embedding, &self.token, Some(&self.token_bias))?.relu()?;
        rows(&tokens, |values| tensors.floats(&format!("{name}.tokens"), tokens.dims(), values))?;
        for (layer, sides) in self.lstm.iter().enumerate() {
            for (direction, [input, hidden, bias]) in directions(stack).iter().zip(sides) {
                let weights = (&values(input)?[..], &values(hidden)?[..], &values(bias)?[..]);
                Direction::store(tensors, &format!("{name}.lstm.{layer}.{direction}"), weights);
            }
        }
        for (part, weights) in [("residual", &self.residual), ("head", &self.head), ("head_bias", &self.head_bias)] {
            tensors.floats(&format!("{name}.{part}"), weights.dims(), &values(weights)?);
        }
        Ok(())
    }
}

/// 0 where a step (row) sees another one, as in [`ATTENTION_WINDOW`].
fn window_mask(steps: usize) -> Result<Tensor> {
    let seen = |row: usize, key: usize| key <= row && key + ATTENTION_WINDOW > row;
    let mask: Vec<f32> = (0..steps * steps).map(|at| if seen(at / steps, at % steps) { 0.0 } else { UNSEEN }).collect();
    Tensor::from_vec(mask, (1, steps, steps), &Device::Cpu)
}

/// `x W^T + b`: x (n, inputs), W (outputs, inputs)
fn linear(x: &Tensor, weights: &Tensor, bias: Option<&Var>) -> Result<Tensor> {
    let product = x.matmul(&weights.t()?)?;
    match bias {
        Some(bias) => product.broadcast_add(bias.as_tensor()),
        None => Ok(product),
    }
}

/// Uniform within the inverse root of the number of inputs, PyTorch's default.
fn uniform(shape: &[usize], inputs: usize, random: &mut StdRng) -> Result<Var> {
    let bound = (inputs as f32).powf(-0.5);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.random_range(-bound..bound)).collect();
    Var::from_vec(values, shape, &Device::Cpu)
}
