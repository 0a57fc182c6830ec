//! The LSTM net of one stack in training: its weights, its pass forward, and the file's tensors. A batch
//! holds sequences of one length, so there is no padding to mask, and what is learnt is what `StackNet`
//! computes.

use candle_core::{Device, Tensor, Var};
use half::f16;
use rand::{Rng, rngs::StdRng};
use sida_model::Stack;

use super::{
    attention::attend,
    descent::Learnt,
    from_file::{self, extent, transposed},
    input_attention::InputAttention,
    linear::Linear,
    lstm_layer::LstmLayer,
    record::StackRecording,
};
use crate::{
    PredictorError,
    file::{PredictorFile, Tensors},
    lstm::{
        ATTENTION_WINDOW,
        recurrence::Direction,
        stack_net::{LSTM_LAYERS, directions},
    },
    stack_name,
};

type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

/// A net whose weights are variables.
pub(super) struct LstmNet {
    stack: Stack,
    /// (vocabulary, d_model), of root mean square 1, or what an earlier net knew of tokens, (vocabulary, token width); not trained.
    embedding: Tensor,
    token: Linear,
    layers: Vec<LstmLayer>,
    /// (token width, width)
    residual: Var,
    /// Of a decoder behind an encoder.
    input: Option<InputAttention>,
    /// Its outputs are MoE layers x experts.
    head: Linear,
}

impl LstmNet {
    /// First weights are uniform within the inverse root of the number of inputs, PyTorch's default; forget gates
    /// start open, so that gradients reach far back.
    pub(super) fn new(
        recorded: &StackRecording,
        stack: Stack,
        outputs: usize,
        (width, token_width): (usize, usize),
        random: &mut StdRng,
    ) -> Result<Self> {
        let d_model = recorded.d_model;
        let directions = directions(stack).len();
        let side = width / directions;
        let mut layer = |inputs: usize| {
            let input = Linear {
                weights: uniform(&[directions, inputs, 4 * side], inputs, random)?,
                bias: Var::from_tensor(&open_forget_gates(directions, side)?)?,
            };
            Ok(LstmLayer { input, hidden: uniform(&[directions, 4 * side, side], side, random)? })
        };
        Ok(Self {
            stack,
            embedding: embedding(recorded)?,
            layers: (0..LSTM_LAYERS).map(|n| layer(if n == 0 { token_width } else { width })).collect::<Result<_>>()?,
            token: Linear { weights: uniform(&[d_model, token_width], d_model, random)?, bias: zeros(token_width)? },
            residual: uniform(&[token_width, width], token_width, random)?,
            input: input(recorded, width, random)?,
            head: Linear { weights: uniform(&[width, outputs], width, random)?, bias: zeros(outputs)? },
        })
    }
}

impl LstmNet {
    /// A net that learns on: as it is in a file that was opened before.
    pub(super) fn from_file(file: &mut PredictorFile, stack: Stack) -> Result<Self, PredictorError> {
        let name = stack_name(stack);
        let outputs = file.shape.layers(stack).len() * file.shape.num_experts;
        let (width, token_width) = extent(file, &format!("{name}.residual"))?;
        let (embedding, token) = from_file::tokens(file, &format!("{name}.tokens"), token_width)?;
        let side = width / directions(stack).len();
        let mut layers = Vec::with_capacity(LSTM_LAYERS);
        for layer in 0..LSTM_LAYERS {
            let inputs = if layer == 0 { token_width } else { width };
            layers.push(LstmLayer::from_file(
                file,
                &format!("{name}.lstm.{layer}"),
                directions(stack),
                (inputs, side),
            )?);
        }
        Ok(Self {
            stack,
            embedding,
            token,
            layers,
            residual: transposed(file, &format!("{name}.residual"), &[width, token_width])?,
            // Only nets that are told what prompts became of learn on, and these read no input.
            input: None,
            head: from_file::head(file, name, (outputs, width))?,
        })
    }
}

impl Learnt for LstmNet {
    fn weights(&self) -> Vec<Var> {
        let layers = self.layers.iter().flat_map(|layer| [&layer.input.weights, &layer.input.bias, &layer.hidden]);
        let others = [&self.token.weights, &self.token.bias, &self.residual, &self.head.weights, &self.head.bias];
        let input = self.input.iter().flat_map(InputAttention::weights);
        layers.chain(others).chain(input).cloned().collect()
    }

    fn logits(&self, sequences: &[&[u32]], inputs: &[&[f16]]) -> Result<Tensor> {
        let (count, steps) = (sequences.len(), sequences[0].len());
        let ids: Vec<u32> = (0..steps).flat_map(|step| sequences.iter().map(move |tokens| tokens[step])).collect();
        let embedded = self.embedding.index_select(&Tensor::from_vec(ids, steps * count, &Device::Cpu)?, 0)?;
        let x = self.token.forward(&embedded)?.relu()?; // (steps x sequences, token width)
        let residual = x.matmul(&self.residual)?;
        let mut outputs = x.reshape((steps, count, ()))?;
        for layer in &self.layers {
            outputs = layer.forward(&outputs)?;
        }
        let window = match self.stack {
            Stack::Encoder => None,
            Stack::Decoder => Some(ATTENTION_WINDOW),
        };
        let outputs = outputs.transpose(0, 1)?.contiguous()?; // (sequences, steps, width)
        let residual = residual.reshape((steps, count, ()))?.transpose(0, 1)?.contiguous()?;
        let mut attended = (attend(&outputs, window)? + residual)?.flatten_to(1)?;
        if let Some(input) = &self.input {
            let queries = (outputs.flatten_to(1)? + &attended)?;
            attended = (input.forward(&queries, inputs)? + attended)?;
        }
        self.head.forward(&attended)
    }

    fn store(&self, tensors: &mut Tensors) -> Result<()> {
        let name = stack_name(self.stack);
        let mut floats = |part: &str, tensor: &Tensor| -> Result<()> {
            tensors.floats(&format!("{name}.{part}"), tensor.dims(), &values(tensor)?);
            Ok(())
        };
        floats("tokens", &self.token.forward(&self.embedding)?.relu()?)?;
        floats("residual", &self.residual.t()?)?;
        floats("head", &self.head.weights.t()?)?;
        floats("head_bias", &self.head.bias.flatten_all()?)?;
        if let Some(input) = &self.input {
            input.store(name, tensors)?;
        }
        for (n, layer) in self.layers.iter().enumerate() {
            for (d, direction) in directions(self.stack).iter().enumerate() {
                let input = values(&layer.input.weights.get(d)?.t()?)?;
                let [hidden, bias] = [&layer.hidden, &layer.input.bias].map(|part| values(&part.get(d)?));
                Direction::store(tensors, &format!("{name}.lstm.{n}.{direction}"), (&input, &hidden?, &bias?));
            }
        }
        Ok(())
    }
}

/// What attends to the inputs, if there are any.
fn input(recorded: &StackRecording, width: usize, random: &mut StdRng) -> Result<Option<InputAttention>> {
    let (mut squares, mut count) = (0.0, 0usize);
    for state in recorded.inputs.iter().flatten() {
        squares += f64::from(state.to_f32().powi(2));
        count += 1;
    }
    let size = (squares / count.max(1) as f64).sqrt();
    (count > 0).then(|| InputAttention::new(width, recorded.d_model, size, random)).transpose()
}

/// Weights of so many inputs.
pub(super) fn uniform(shape: &[usize], inputs: usize, random: &mut StdRng) -> Result<Var> {
    let bound = (inputs as f32).powf(-0.5);
    let values = (0..shape.iter().product()).map(|_| random.random_range(-bound..bound)).collect::<Vec<f32>>();
    Var::from_vec(values, shape, &Device::Cpu)
}

/// What the tokens of a stack are to the model, scaled to a root mean square of 1: (vocabulary, d_model).
pub(super) fn embedding(recorded: &StackRecording) -> Result<Tensor> {
    let embedding = Tensor::from_slice(&recorded.embedding, ((), recorded.d_model), &Device::Cpu)?;
    let size = embedding.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt().max(1e-9);
    embedding / f64::from(size)
}

/// A bias (1, outputs).
pub(super) fn zeros(outputs: usize) -> Result<Var> {
    Var::zeros((1, outputs), candle_core::DType::F32, &Device::Cpu)
}

/// Biases (directions, 1, 4 side): 1 for the forget gates, the second of four, 0 for the others.
fn open_forget_gates(directions: usize, side: usize) -> Result<Tensor> {
    let bias: Vec<f32> = (0..4 * side).map(|at| f32::from(at / side == 1)).collect();
    Tensor::from_vec(bias, (1, 1, 4 * side), &Device::Cpu)?.repeat((directions, 1, 1))
}

/// Row by row.
pub(super) fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}
