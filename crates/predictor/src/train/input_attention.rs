//! The decoder's attention to the model's input in training: its weights, and one operation with a gradient of its own.
//! Inputs of a batch have several lengths. Padding them would take a mask and several times the work; so each sequence is
//! attended by itself, and the inputs lie one after another.

use std::{ops::Range, sync::OnceLock};

use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor, Var, bail};
use half::f16;
use rand::rngs::StdRng;
use sida_kernels::{lanes, norm::softmax};

use super::{
    lstm_net::{uniform, values},
    recurrence::values_of,
};
use crate::{
    file::Tensors,
    lstm::input_attention::{KEYS, OUTPUT, QUERY, VALUES},
};

/// How many places of the input a token looks at.
pub(super) const HEADS: usize = 4;
/// What a head compares, and what it brings. Wider heads were hardly better (docs/decisions/0026).
pub(super) const HEAD_WIDTH: usize = 16;

/// Its weights; widths of keys and values are those of all heads together.
pub(super) struct InputAttention {
    /// (width, key width)
    query: Var,
    /// (d_model, key width)
    keys: Var,
    /// (d_model, value width)
    values: Var,
    /// (value width, width)
    output: Var,
    /// What the encoder's states are multiplied by, so that their root mean square is 1.
    scale: f64,
}

impl InputAttention {
    /// For a net of this width and states (tokens, d_model) of this size.
    pub(super) fn new(width: usize, d_model: usize, size: f64, random: &mut StdRng) -> Result<Self> {
        let all = HEADS * HEAD_WIDTH;
        Ok(Self {
            query: uniform(&[width, all], width, random)?,
            keys: uniform(&[d_model, all], d_model, random)?,
            values: uniform(&[d_model, all], d_model, random)?,
            output: uniform(&[all, width], all, random)?,
            scale: 1.0 / size.max(1e-9),
        })
    }

    /// All that is trained.
    pub(super) fn weights(&self) -> [&Var; 4] {
        [&self.query, &self.keys, &self.values, &self.output]
    }

    /// queries (sequences x steps, width) -> what they find in their inputs (sequences x steps, width). Each input is the
    /// encoder's states (tokens, d_model).
    pub(super) fn forward(&self, queries: &Tensor, inputs: &[&[f16]]) -> Result<Tensor> {
        let d_model = self.keys.dim(0)?;
        let states: Vec<f32> = inputs.iter().flat_map(|states| states.iter()).map(|state| state.to_f32()).collect();
        let states = (Tensor::from_vec(states, ((), d_model), &Device::Cpu)? * self.scale)?;
        let (keys, values) = (states.matmul(&self.keys)?, states.matmul(&self.values)?);
        let query = (queries.matmul(&self.query)? * (HEAD_WIDTH as f64).powf(-0.5))?;
        let lengths = inputs.iter().map(|states| states.len() / d_model).collect();
        attend(&query, &keys, &values, HEADS, lengths)?.matmul(&self.output)
    }

    /// Adds what the net that serves reads.
    pub(super) fn store(&self, stack: &str, tensors: &mut Tensors) -> Result<()> {
        let heads = |weights: &Tensor| weights.t()?.reshape((HEADS, HEAD_WIDTH, ()));
        let scaled = |weights: &Var| weights.as_tensor() * self.scale;
        let parts = [
            (QUERY, heads(&self.query)?),
            (KEYS, heads(&scaled(&self.keys)?)?),
            (VALUES, heads(&scaled(&self.values)?)?),
            (OUTPUT, self.output.t()?),
        ];
        for (part, tensor) in parts {
            tensors.floats(&format!("{stack}.{part}"), tensor.dims(), &values(&tensor)?);
        }
        Ok(())
    }
}

/// Softmax attention of queries (rows, key width) over keys (tokens, key width), which finds of values (tokens, value
/// width): (rows, value width). Rows are shared out evenly among the sequences, whose inputs have `lengths` tokens.
fn attend(query: &Tensor, keys: &Tensor, values: &Tensor, heads: usize, lengths: Vec<usize>) -> Result<Tensor> {
    let operation = Attention { heads, lengths, weights: OnceLock::new() };
    query.contiguous()?.apply_op3(&keys.contiguous()?, &values.contiguous()?, operation)
}

struct Attention {
    heads: usize,
    lengths: Vec<usize>,
    /// Of each row, head by head, the weights of its input's tokens, from the pass forward.
    weights: OnceLock<Vec<f32>>,
}

/// One row in one head: where its values are.
struct Entry {
    /// Of query and of the gradient to it.
    query: Range<usize>,
    /// Of what is found.
    found: Range<usize>,
    /// The tokens of its input.
    tokens: Range<usize>,
    /// Of the weights of these tokens.
    weights: Range<usize>,
    head: usize,
}

impl Attention {
    /// Every row in every head, in order.
    fn entries(&self, rows: usize, key_width: usize, value_width: usize) -> impl Iterator<Item = Entry> {
        let (heads, steps) = (self.heads, rows / self.lengths.len().max(1));
        let ends = self.lengths.iter().scan(0, |end, &tokens| {
            *end += tokens;
            Some(*end - tokens..*end)
        });
        let inputs = ends
            .enumerate()
            .flat_map(move |(n, tokens)| (n * steps..(n + 1) * steps).map(move |row| (row, tokens.clone())));
        let entries = inputs.flat_map(move |(row, tokens)| (0..heads).map(move |head| (row, head, tokens.clone())));
        let mut weight = 0;
        entries.map(move |(row, head, tokens)| {
            weight += tokens.len();
            let part = |width: usize| {
                let of_head = width / heads;
                row * width + head * of_head..row * width + (head + 1) * of_head
            };
            Entry {
                query: part(key_width),
                found: part(value_width),
                weights: weight - tokens.len()..weight,
                tokens,
                head,
            }
        })
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "input-attention"
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        of_query: &Layout,
        keys: &CpuStorage,
        of_keys: &Layout,
        values: &CpuStorage,
        of_values: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (query, keys, values) =
            (values_of(query, of_query)?, values_of(keys, of_keys)?, values_of(values, of_values)?);
        let ((rows, key_width), (_, value_width)) = (of_query.shape().dims2()?, of_values.shape().dims2()?);
        let (mut found, mut weights) = (vec![0.0; rows * value_width], Vec::new());
        for entry in self.entries(rows, key_width, value_width) {
            let (query, found) = (&query[entry.query], &mut found[entry.found]);
            let tokens = entry.tokens;
            let keys = of_head(keys, &tokens, key_width, entry.head, query.len());
            weights.extend(keys.map(|key| lanes::dot(query, key)));
            let weights = &mut weights[entry.weights];
            softmax(weights, tokens.len());
            let values = of_head(values, &tokens, value_width, entry.head, found.len());
            weights.iter().zip(values).for_each(|(&weight, value)| add(found, weight, value));
        }
        if self.weights.set(weights).is_err() {
            bail!("an operation passes forward once");
        }
        Ok((CpuStorage::F32(found), (rows, value_width).into()))
    }

    fn bwd(
        &self,
        query: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        _found: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(weights) = self.weights.get() else { bail!("a pass backward without one forward") };
        let ((rows, key_width), (_, value_width)) = (query.dims2()?, values.dims2()?);
        let [of_query, of_keys, of_values, of_found] =
            [query, keys, values, grad].map(|tensor| tensor.flatten_all()?.to_vec1::<f32>());
        let (of_query, of_keys, of_values, of_found) = (of_query?, of_keys?, of_values?, of_found?);
        let mut grad_query = vec![0.0; of_query.len()];
        let (mut grad_keys, mut grad_values) = (vec![0.0; of_keys.len()], vec![0.0; of_values.len()]);
        let mut grad_weights = Vec::new();
        for entry in self.entries(rows, key_width, value_width) {
            let (query, grad_query) = (&of_query[entry.query.clone()], &mut grad_query[entry.query]);
            let (grad, weights, tokens) = (&of_found[entry.found], &weights[entry.weights], entry.tokens);
            let values = of_head(&of_values, &tokens, value_width, entry.head, grad.len());
            grad_weights.clear();
            grad_weights.extend(values.map(|value| lanes::dot(grad, value)));
            // Softmax passes on what its weights are told, less what all of them are told in the mean.
            let mean: f32 = weights.iter().zip(&grad_weights).map(|(weight, grad)| weight * grad).sum();
            for ((n, &weight), grad_weight) in weights.iter().enumerate().zip(&grad_weights) {
                let (token, score) = (tokens.start + n, weight * (grad_weight - mean));
                let key =
                    token * key_width + entry.head * query.len()..token * key_width + (entry.head + 1) * query.len();
                add(grad_query, score, &of_keys[key.clone()]);
                add(&mut grad_keys[key], score, query);
                let value = token * value_width + entry.head * grad.len();
                add(&mut grad_values[value..value + grad.len()], weight, grad);
            }
        }
        let like = |values: Vec<f32>, tensor: &Tensor| Tensor::from_vec(values, tensor.shape(), tensor.device());
        Ok((Some(like(grad_query, query)?), Some(like(grad_keys, keys)?), Some(like(grad_values, values)?)))
    }
}

/// What a head has of each of these tokens, out of rows of `width`.
fn of_head<'a>(
    rows: &'a [f32],
    tokens: &Range<usize>,
    width: usize,
    head: usize,
    head_width: usize,
) -> impl Iterator<Item = &'a [f32]> {
    let rows = rows[tokens.start * width..tokens.end * width].chunks_exact(width);
    rows.map(move |row| &row[head * head_width..][..head_width])
}

/// `sum += factor * values`.
fn add(sum: &mut [f32], factor: f32, values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
}

#[cfg(test)]
mod tests {
    use super::{
        super::finite_differences::{check, distance, values},
        *,
    };

    /// Two sequences of two steps, with inputs of three and five tokens.
    fn parts() -> [Var; 3] {
        [values(&[4, 6], 1), values(&[8, 6], 2), values(&[8, 4], 3)]
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        // Would break: training goes in some other direction than down.
        let [query, keys, values] = parts();
        check(&[&query, &keys, &values], || distance(&attend(&query, &keys, &values, 2, vec![3, 5]).unwrap()));
    }

    #[test]
    fn a_row_attends_to_its_own_input_by_softmax() {
        // Would break: what is learnt of a sequence comes from the text of another, or in other shares than are served.
        let rows = |tensor: &Tensor| tensor.to_vec2::<f32>().unwrap();
        let [query, keys, values] = parts();
        let found = rows(&attend(&query, &keys, &values, 2, vec![3, 5]).unwrap());
        let (query, keys, values) = (rows(&query), rows(&keys), rows(&values));
        for (row, found) in found.iter().enumerate() {
            let tokens = if row < 2 { 0..3 } else { 3..8 };
            for (at, found) in found.iter().enumerate() {
                let head = at / 2 * 3..at / 2 * 3 + 3;
                let product = |key: &Vec<f32>| head.clone().map(|part| key[part] * query[row][part]).sum::<f32>().exp();
                let weights: Vec<f32> = keys[tokens.clone()].iter().map(product).collect();
                let all: f32 = weights.iter().sum();
                let expected: f32 =
                    weights.iter().zip(&values[tokens.clone()]).map(|(w, value)| w / all * value[at]).sum();
                assert!((found - expected).abs() < 1e-5, "row {row}: {found}, not {expected}");
            }
        }
    }
}
