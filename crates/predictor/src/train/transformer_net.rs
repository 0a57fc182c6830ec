//! The transformer of the encoder in training: its weights, its pass forward, and the file's tensors. A batch holds
//! sequences of one length, so there is no padding to mask, and what is learnt is what
//! [`TransformerNet`](crate::transformer::TransformerNet) computes.

use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::ops::softmax;
use half::f16;
use rand::rngs::StdRng;
use sida_model::Stack;

use super::{
    descent::Learnt,
    from_file::{self, extent, transposed},
    linear::Linear,
    lstm_net::{embedding, uniform, values, zeros},
    record::StackRecording,
};
use crate::{
    PredictorError,
    file::{PredictorFile, Tensors},
    stack_name,
    transformer::{EPSILON, block_part},
};

type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

/// Blocks of attention and linear layers.
const BLOCKS: usize = 2;
/// Heads of a block, if the width can be shared out among them.
const HEADS: usize = 4;
/// The inner width of the linear layers, in widths.
const INNER: usize = 2;
/// The furthest distance that the bias of a score tells apart.
const DISTANCE: usize = 64;

/// A net whose weights are variables.
pub(super) struct TransformerInTraining {
    /// (vocabulary, d_model), of root mean square 1, or what an earlier net knew of tokens, (vocabulary, token width); not trained.
    embedding: Tensor,
    token: Linear,
    /// (token width, width)
    input: Var,
    blocks: Vec<Block>,
    norm: Var,
    head: Linear,
}

/// Weights are (inputs, outputs).
struct Block {
    heads: usize,
    attention_norm: Var,
    query: Var,
    keys: Var,
    values: Var,
    output: Var,
    /// (heads, 2 DISTANCE + 1)
    distances: Var,
    linear_norm: Var,
    up: Var,
    down: Var,
}

impl TransformerInTraining {
    /// First weights are uniform within the inverse root of the number of inputs; the further a token, the less it counts.
    pub(super) fn new(
        recorded: &StackRecording,
        outputs: usize,
        (width, token_width): (usize, usize),
        random: &mut StdRng,
    ) -> Result<Self> {
        let d_model = recorded.d_model;
        let heads = if width.is_multiple_of(HEADS) { HEADS } else { 1 };
        let ones = || Var::ones(width, DType::F32, &Device::Cpu);
        let mut block = || {
            let mut square = || uniform(&[width, width], width, random);
            let (query, keys, values, output) = (square()?, square()?, square()?, square()?);
            let (attention_norm, linear_norm, distances) = (ones()?, ones()?, distances(heads)?);
            let up = uniform(&[width, INNER * width], width, random)?;
            let down = uniform(&[INNER * width, width], INNER * width, random)?;
            Ok(Block { heads, attention_norm, query, keys, values, output, distances, linear_norm, up, down })
        };
        Ok(Self {
            embedding: embedding(recorded)?,
            blocks: (0..BLOCKS).map(|_| block()).collect::<Result<_>>()?,
            token: Linear { weights: uniform(&[d_model, token_width], d_model, random)?, bias: zeros(token_width)? },
            input: uniform(&[token_width, width], token_width, random)?,
            norm: ones()?,
            head: Linear { weights: uniform(&[width, outputs], width, random)?, bias: zeros(outputs)? },
        })
    }

    /// A net that learns on: as it is in a file that was opened before.
    pub(super) fn from_file(file: &mut PredictorFile) -> Result<Self, PredictorError> {
        let name = stack_name(Stack::Encoder);
        let outputs = file.shape.layers(Stack::Encoder).len() * file.shape.num_experts;
        let (width, token_width) = extent(file, &format!("{name}.input"))?;
        let (embedding, token) = from_file::tokens(file, &format!("{name}.tokens"), token_width)?;
        let mut blocks = Vec::new();
        while file.has(&block_part(blocks.len(), "query")) {
            blocks.push(Block::from_file(file, blocks.len(), width)?);
        }
        Ok(Self {
            embedding,
            token,
            input: transposed(file, &format!("{name}.input"), &[width, token_width])?,
            blocks,
            norm: Var::from_vec(file.floats(&format!("{name}.norm"), &[width])?, width, &Device::Cpu)?,
            head: from_file::head(file, name, (outputs, width))?,
        })
    }
}

impl Learnt for TransformerInTraining {
    fn weights(&self) -> Vec<Var> {
        let others =
            [&self.token.weights, &self.token.bias, &self.input, &self.norm, &self.head.weights, &self.head.bias];
        self.blocks.iter().flat_map(|block| block.weights()).chain(others).cloned().collect()
    }

    fn logits(&self, sequences: &[&[u32]], _inputs: &[&[f16]]) -> Result<Tensor> {
        let (count, steps) = (sequences.len(), sequences[0].len());
        let ids = Tensor::from_vec(sequences.concat(), count * steps, &Device::Cpu)?;
        let tokens = self.token.forward(&self.embedding.index_select(&ids, 0)?)?.relu()?;
        let mut x = tokens.matmul(&self.input)?; // (rows, width)
        let distances = by_distance(steps)?;
        for block in &self.blocks {
            x = block.forward(&x, count, &distances)?;
        }
        self.head.forward(&normed(&x, &self.norm)?)
    }

    fn store(&self, tensors: &mut Tensors) -> Result<()> {
        let name = stack_name(Stack::Encoder);
        let mut floats = |name: String, tensor: &Tensor| -> Result<()> {
            tensors.floats(&name, tensor.dims(), &values(tensor)?);
            Ok(())
        };
        floats(format!("{name}.tokens"), &self.token.forward(&self.embedding)?.relu()?)?;
        floats(format!("{name}.input"), &self.input.t()?)?;
        floats(format!("{name}.norm"), &self.norm)?;
        floats(format!("{name}.head"), &self.head.weights.t()?)?;
        floats(format!("{name}.head_bias"), &self.head.bias.flatten_all()?)?;
        for (n, block) in self.blocks.iter().enumerate() {
            let heads = |weights: &Var| weights.t()?.reshape((block.heads, (), weights.dim(0)?));
            for (part, tensor) in [
                ("attention_norm", block.attention_norm.as_tensor().clone()),
                ("query", heads(&block.query)?),
                ("keys", heads(&block.keys)?),
                ("values", heads(&block.values)?),
                ("output", block.output.t()?),
                ("distances", block.distances.as_tensor().clone()),
                ("linear_norm", block.linear_norm.as_tensor().clone()),
                ("up", block.up.t()?),
                ("down", block.down.t()?),
            ] {
                floats(block_part(n, part), &tensor)?;
            }
        }
        Ok(())
    }
}

impl Block {
    fn from_file(file: &mut PredictorFile, block: usize, width: usize) -> Result<Self, PredictorError> {
        let part = |name: &str| block_part(block, name);
        let (heads, distances) = extent(file, &part("distances"))?;
        if heads == 0 || !width.is_multiple_of(heads) || distances != 2 * DISTANCE + 1 {
            let reason = format!("is ({heads}, {distances}): only nets of {} distances can learn on", 2 * DISTANCE + 1);
            return Err(file.refuse(&part("distances"), reason));
        }
        let (inner, _) = extent(file, &part("up"))?;
        let of_heads = [heads, width / heads, width];
        let by_distance = file.floats(&part("distances"), &[heads, distances])?;
        let mut norm = |name| {
            Var::from_vec(file.floats(&part(name), &[width])?, width, &Device::Cpu).map_err(PredictorError::from)
        };
        let (attention_norm, linear_norm) = (norm("attention_norm")?, norm("linear_norm")?);
        let mut weights = |name, shape: &[usize]| transposed(file, &part(name), shape);
        Ok(Self {
            heads,
            attention_norm,
            query: weights("query", &of_heads)?,
            keys: weights("keys", &of_heads)?,
            values: weights("values", &of_heads)?,
            output: weights("output", &[width, width])?,
            distances: Var::from_vec(by_distance, (heads, distances), &Device::Cpu)?,
            linear_norm,
            up: weights("up", &[inner, width])?,
            down: weights("down", &[width, inner])?,
        })
    }

    fn weights(&self) -> [&Var; 9] {
        let Self { attention_norm, query, keys, values, output, distances, linear_norm, up, down, .. } = self;
        [attention_norm, query, keys, values, output, distances, linear_norm, up, down]
    }

    /// x (sequences x steps, width) -> the same.
    fn forward(&self, x: &Tensor, sequences: usize, by_distance: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let (steps, of_head) = (rows / sequences, width / self.heads);
        let read = normed(x, &self.attention_norm)?;
        // (sequences, heads, steps, width of a head)
        let part = |weights: &Var| {
            let product = read.matmul(weights)?.reshape((sequences, steps, self.heads, of_head))?;
            product.transpose(1, 2)?.contiguous()
        };
        let (query, keys, values) = (part(&self.query)?, part(&self.keys)?, part(&self.values)?);
        let scores = (query.matmul(&keys.t()?)? * (of_head as f64).powf(-0.5))?;
        let bias = self.distances.index_select(by_distance, 1)?.reshape((1, self.heads, steps, steps))?;
        let found = softmax(&scores.broadcast_add(&bias)?, D::Minus1)?.matmul(&values)?;
        let found = found.transpose(1, 2)?.reshape((rows, width))?;
        let x = (x + found.matmul(&self.output)?)?;
        let inner = normed(&x, &self.linear_norm)?.matmul(&self.up)?.relu()?;
        x + inner.matmul(&self.down)?
    }
}

/// For each step and each token that it sees, the place of their distance among [`Block::distances`].
fn by_distance(steps: usize) -> Result<Tensor> {
    let place = |step: usize, token: usize| (token + DISTANCE).saturating_sub(step).min(2 * DISTANCE) as u32;
    let places: Vec<u32> = (0..steps).flat_map(|step| (0..steps).map(move |token| place(step, token))).collect();
    Tensor::from_vec(places, steps * steps, &Device::Cpu)
}

/// Each head begins by looking half as far as the one after it.
fn distances(heads: usize) -> Result<Var> {
    let bias = |head: usize, place: usize| -(place.abs_diff(DISTANCE) as f32) * 0.5f32.powi(head as i32 + 1);
    let all = (0..heads).flat_map(|head| (0..2 * DISTANCE + 1).map(move |place| bias(head, place))).collect::<Vec<_>>();
    Var::from_vec(all, (heads, 2 * DISTANCE + 1), &Device::Cpu)
}

/// The norm of `rms_norm`: x (rows, width).
fn normed(x: &Tensor, weights: &Var) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(EPSILON))?.sqrt()?)?.broadcast_mul(weights)
}
