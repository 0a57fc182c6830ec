//! The LSTM net of one stack in training: its weights in one vector, the loss of a batch and its gradient.
//! A batch holds sequences of one length, so there is no padding to mask, and what is learnt is what
//! `StackNet` computes.

use std::ops::Range;

use rand::{Rng, rngs::StdRng};
use sida_model::Stack;

use super::{
    gradients::{Attention, LstmScan, Scanned, distillation, linear, linear_backward, relu_backward},
    record::StackRecording,
};
use crate::{
    file::Tensors,
    lstm::{
        ATTENTION_WINDOW,
        recurrence::Direction,
        stack_net::{LSTM_LAYERS, directions},
    },
    stack_name,
};

/// A net's form. Its weights are a vector of [`LstmNet::weights`] values, its gradient another one.
pub(super) struct LstmNet {
    stack: Stack,
    num_experts: usize,
    width: usize,
    /// MoE layers x experts.
    outputs: usize,
    /// (vocabulary, d_model), of root mean square 1; not trained.
    embedding: Vec<f32>,
    d_model: usize,
    parts: Parts,
}

/// Where each matrix (outputs, inputs) and bias is in the vector.
struct Parts {
    token: Range<usize>,
    token_bias: Range<usize>,
    /// For each layer and direction.
    lstm: Vec<Vec<LstmParts>>,
    residual: Range<usize>,
    head: Range<usize>,
    head_bias: Range<usize>,
    len: usize,
}

struct LstmParts {
    input: Range<usize>,
    hidden: Range<usize>,
    bias: Range<usize>,
}

impl Parts {
    fn new(d_model: usize, width: usize, directions: usize, outputs: usize) -> Self {
        let mut len = 0;
        let mut part = |values: usize| {
            len += values;
            len - values..len
        };
        let side = width / directions;
        let (token, token_bias) = (part(width * d_model), part(width));
        let lstm = (0..LSTM_LAYERS)
            .map(|_| {
                let mut direction = |_| LstmParts {
                    input: part(4 * side * width),
                    hidden: part(4 * side * side),
                    bias: part(4 * side),
                };
                (0..directions).map(&mut direction).collect()
            })
            .collect();
        let (residual, head, head_bias) = (part(width * width), part(outputs * width), part(outputs));
        Self { token, token_bias, lstm, residual, head, head_bias, len }
    }
}

/// What a pass forward leaves for the pass backward. Rows are step by step up to the attention, then sequence
/// by sequence.
struct Passed {
    /// (rows, d_model)
    embedded: Vec<f32>,
    /// (rows, width)
    x: Vec<f32>,
    /// For each LSTM layer, its input (rows, width) and its directions.
    lstm: Vec<(Vec<f32>, Vec<Scanned>)>,
    /// (rows, width)
    outputs: Vec<f32>,
    x_by_sequence: Vec<f32>,
    /// (rows, width): what the head sees.
    summary: Vec<f32>,
}

impl LstmNet {
    pub(super) fn new(
        recorded: &StackRecording,
        stack: Stack,
        layers: usize,
        num_experts: usize,
        width: usize,
    ) -> Self {
        let mean_square =
            recorded.embedding.iter().map(|value| value * value).sum::<f32>() / recorded.embedding.len() as f32;
        let scale = 1.0 / mean_square.sqrt().max(1e-9);
        let outputs = layers * num_experts;
        Self {
            stack,
            num_experts,
            width,
            outputs,
            embedding: recorded.embedding.iter().map(|value| value * scale).collect(),
            d_model: recorded.d_model,
            parts: Parts::new(recorded.d_model, width, directions(stack).len(), outputs),
        }
    }

    /// First weights: uniform within the inverse root of the number of inputs, PyTorch's default; forget gates
    /// start open, so that gradients reach far back.
    pub(super) fn weights(&self, random: &mut StdRng) -> Vec<f32> {
        let mut weights = vec![0.0; self.parts.len];
        let mut fill = |part: &Range<usize>, inputs: usize| {
            let bound = (inputs as f32).powf(-0.5);
            weights[part.clone()].iter_mut().for_each(|weight| *weight = random.random_range(-bound..bound));
        };
        fill(&self.parts.token, self.d_model);
        fill(&self.parts.residual, self.width);
        fill(&self.parts.head, self.width);
        for parts in self.parts.lstm.iter().flatten() {
            fill(&parts.input, self.width);
            fill(&parts.hidden, self.side());
        }
        for parts in self.parts.lstm.iter().flatten() {
            weights[parts.bias.start + self.side()..][..self.side()].fill(1.0);
        }
        weights
    }

    /// The summed loss of a batch, in nats, and its gradient.
    pub(super) fn gradient(&self, weights: &[f32], recorded: &StackRecording, batch: &[usize]) -> (f32, Vec<f32>) {
        let (sequences, steps) = (batch.len(), recorded.sequences[batch[0]].len());
        let (passed, mut logits) = self.forward(weights, recorded, batch);
        let experts = batch.iter().flat_map(|&index| recorded.experts[index].chunks_exact(recorded.kept));
        let probabilities = batch.iter().flat_map(|&index| recorded.probabilities[index].chunks_exact(recorded.kept));
        let loss = distillation(&mut logits, self.num_experts, experts.zip(probabilities));
        (loss, self.backward(weights, &passed, &logits, sequences, steps))
    }

    /// Logits (sequences x steps, outputs), sequence by sequence.
    fn forward(&self, weights: &[f32], recorded: &StackRecording, batch: &[usize]) -> (Passed, Vec<f32>) {
        let (sequences, steps) = (batch.len(), recorded.sequences[batch[0]].len());
        let part = |part: &Range<usize>| &weights[part.clone()];
        let ids = (0..steps).flat_map(|step| batch.iter().map(move |&index| recorded.sequences[index][step] as usize));
        let embedded: Vec<f32> =
            ids.flat_map(|id| &self.embedding[id * self.d_model..][..self.d_model]).copied().collect();
        let mut x = linear(&embedded, part(&self.parts.token), part(&self.parts.token_bias), self.width);
        x.iter_mut().for_each(|value| *value = value.max(0.0));
        let mut outputs = x.clone();
        let mut lstm = Vec::new();
        for layer in &self.parts.lstm {
            let scan = |(n, parts): (usize, &LstmParts)| {
                let gates = linear(&outputs, part(&parts.input), part(&parts.bias), 4 * self.side());
                self.scan(sequences, n).forward(gates, part(&parts.hidden))
            };
            let sides: Vec<Scanned> = layer.iter().enumerate().map(scan).collect();
            let joined = join(&sides.iter().map(|side| &side.hidden[..]).collect::<Vec<_>>(), self.side());
            lstm.push((std::mem::replace(&mut outputs, joined), sides));
        }
        let outputs = swap(&outputs, steps, self.width);
        let x_by_sequence = swap(&x, steps, self.width);
        let mut summary = self.attention(steps).forward(&outputs);
        let residual = linear(&x_by_sequence, part(&self.parts.residual), &[], self.width);
        summary.iter_mut().zip(&residual).for_each(|(sum, residual)| *sum += residual);
        let logits = linear(&summary, part(&self.parts.head), part(&self.parts.head_bias), self.outputs);
        (Passed { embedded, x, lstm, outputs, x_by_sequence, summary }, logits)
    }

    fn backward(&self, weights: &[f32], passed: &Passed, grad: &[f32], sequences: usize, steps: usize) -> Vec<f32> {
        let parts = &self.parts;
        let mut gradient = Gradient { weights, sums: vec![0.0; weights.len()] };
        let none = 0..0;
        let summary = gradient.linear(&passed.summary, &parts.head, &parts.head_bias, grad, self.outputs);
        let residual = gradient.linear(&passed.x_by_sequence, &parts.residual, &none, &summary, self.width);
        let outputs = self.attention(steps).backward(&passed.outputs, &summary);
        let mut grad = swap(&outputs, sequences, self.width);
        for (layer, (input, sides)) in parts.lstm.iter().zip(&passed.lstm).rev() {
            let mut grad_input = vec![0.0; input.len()];
            for (n, (parts, scanned)) in layer.iter().zip(sides).enumerate() {
                let own: Vec<f32> = grad
                    .chunks_exact(self.width)
                    .flat_map(|row| &row[n * self.side()..][..self.side()])
                    .copied()
                    .collect();
                let sums = &mut gradient.sums[parts.hidden.clone()];
                let gates = self.scan(sequences, n).backward(scanned, &weights[parts.hidden.clone()], &own, sums);
                let part = gradient.linear(input, &parts.input, &parts.bias, &gates, 4 * self.side());
                grad_input.iter_mut().zip(&part).for_each(|(sum, part)| *sum += part);
            }
            grad = grad_input;
        }
        let residual = swap(&residual, sequences, self.width);
        grad.iter_mut().zip(&residual).for_each(|(sum, residual)| *sum += residual);
        relu_backward(&passed.x, &mut grad);
        gradient.linear(&passed.embedded, &parts.token, &parts.token_bias, &grad, self.width);
        gradient.sums
    }

    /// Adds what `StackNet` reads.
    pub(super) fn store(&self, weights: &[f32], tensors: &mut Tensors) {
        let (name, width, side) = (stack_name(self.stack), self.width, self.side());
        let part = |part: &Range<usize>| &weights[part.clone()];
        let mut tokens = linear(&self.embedding, part(&self.parts.token), part(&self.parts.token_bias), width);
        tokens.iter_mut().for_each(|value| *value = value.max(0.0));
        tensors.floats(&format!("{name}.tokens"), &[tokens.len() / width, width], &tokens);
        for (layer, sides) in self.parts.lstm.iter().enumerate() {
            for (direction, parts) in directions(self.stack).iter().zip(sides) {
                let weights = (part(&parts.input), part(&parts.hidden), part(&parts.bias));
                debug_assert_eq!(weights.2.len(), 4 * side);
                Direction::store(tensors, &format!("{name}.lstm.{layer}.{direction}"), weights);
            }
        }
        tensors.floats(&format!("{name}.residual"), &[width, width], part(&self.parts.residual));
        tensors.floats(&format!("{name}.head"), &[self.outputs, width], part(&self.parts.head));
        tensors.floats(&format!("{name}.head_bias"), &[self.outputs], part(&self.parts.head_bias));
    }

    /// Width of one direction.
    fn side(&self) -> usize {
        self.width / directions(self.stack).len()
    }

    fn scan(&self, sequences: usize, direction: usize) -> LstmScan {
        LstmScan { sequences, width: self.side(), reverse: direction == 1 }
    }

    fn attention(&self, steps: usize) -> Attention {
        let window = match self.stack {
            Stack::Encoder => None,
            Stack::Decoder => Some(ATTENTION_WINDOW),
        };
        Attention { steps, width: self.width, window }
    }
}

/// The gradient of all weights, being summed up.
struct Gradient<'a> {
    weights: &'a [f32],
    sums: Vec<f32>,
}

impl Gradient<'_> {
    /// [`linear_backward`] of one part; an empty `bias` stands for none.
    fn linear(
        &mut self,
        x: &[f32],
        part: &Range<usize>,
        bias: &Range<usize>,
        grad: &[f32],
        outputs: usize,
    ) -> Vec<f32> {
        let mut of_bias = vec![0.0; bias.len()];
        let of_part = &mut self.sums[part.clone()];
        let grad_x = linear_backward(x, &self.weights[part.clone()], grad, outputs, of_part, &mut of_bias);
        self.sums[bias.clone()].iter_mut().zip(&of_bias).for_each(|(sum, part)| *sum += part);
        grad_x
    }
}

/// Rows (outer, inner, width) -> (inner, outer, width): from step by step to sequence by sequence, or back.
fn swap(values: &[f32], outer: usize, width: usize) -> Vec<f32> {
    let inner = values.len() / width / outer;
    let rows = (0..inner).flat_map(|i| (0..outer).map(move |o| o * inner + i));
    rows.flat_map(|row| &values[row * width..][..width]).copied().collect()
}

/// Matrices (rows, width) side by side.
fn join(sides: &[&[f32]], width: usize) -> Vec<f32> {
    let rows = sides[0].len() / width;
    (0..rows).flat_map(|row| sides.iter().flat_map(move |side| &side[row * width..][..width])).copied().collect()
}
