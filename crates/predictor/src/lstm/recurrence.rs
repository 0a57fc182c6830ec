//! One direction of one LSTM layer over many sequences at once. Sequences are rows one after another;
//! step t handles the t-th token of every sequence that is long enough, so there is no padding to leak into
//! a result, and the recurrent product of a step is one product of several rows.

use std::ops::Range;

use sida_kernels::matmul::matmul;

use super::activation;
use crate::{
    PredictorError,
    file::{Matrix, PredictorFile, Tensors},
};

/// Where each sequence's rows are, the longest first.
pub(crate) struct Sequences {
    /// Invariant: lengths descend.
    pub(crate) rows: Vec<Range<usize>>,
    /// For each of `rows`, which sequence of the caller it is.
    pub(crate) order: Vec<usize>,
    /// Rows of all.
    pub(crate) total: usize,
}

impl Sequences {
    /// Of sequences of these lengths, one after another.
    pub(crate) fn new(lengths: impl Iterator<Item = usize>) -> Self {
        let mut total = 0;
        let mut rows: Vec<(usize, Range<usize>)> = lengths
            .map(|len| {
                total += len;
                total - len..total
            })
            .enumerate()
            .collect();
        rows.sort_by_key(|(_, rows)| std::cmp::Reverse(rows.len()));
        let (order, rows) = rows.into_iter().unzip();
        Self { rows, order, total }
    }
}

/// Weights of one direction of one layer. Gates are in the order i, f, g, o, as PyTorch has them.
pub(crate) struct Direction {
    /// (4 width, inputs)
    input: Matrix,
    /// (4 width, width)
    hidden: Matrix,
    /// (4 width)
    bias: Vec<f32>,
}

/// What a layer remembers of each sequence: (sequences, width), in the order of [`Sequences::rows`].
pub(crate) struct Memory {
    pub(crate) hidden: Vec<f32>,
    pub(crate) cell: Vec<f32>,
}

impl Memory {
    /// Before the first token.
    pub(crate) fn new(sequences: usize, width: usize) -> Self {
        Self { hidden: vec![0.0; sequences * width], cell: vec![0.0; sequences * width] }
    }
}

/// Columns of an output matrix that a direction writes.
pub(crate) struct Columns<'a> {
    /// (rows, width)
    pub(crate) values: &'a mut [f32],
    pub(crate) width: usize,
    pub(crate) first: usize,
}

impl Direction {
    /// Takes `{prefix}.input`, `.hidden` and `.bias` out of a file.
    pub(crate) fn from_file(
        file: &mut PredictorFile,
        prefix: &str,
        inputs: usize,
        width: usize,
    ) -> Result<Self, PredictorError> {
        Ok(Self {
            input: file.take_matrix(&format!("{prefix}.input"), 4 * width, inputs)?,
            hidden: file.take_matrix(&format!("{prefix}.hidden"), 4 * width, width)?,
            bias: file.floats(&format!("{prefix}.bias"), &[4 * width])?,
        })
    }

    /// Adds one to a file that is about to be written: what [`Direction::from_file`] takes.
    pub(crate) fn store(tensors: &mut Tensors, prefix: &str, (input, hidden, bias): (&[f32], &[f32], &[f32])) {
        let gates = bias.len();
        tensors.floats(&format!("{prefix}.input"), &[gates, input.len() / gates], input);
        tensors.floats(&format!("{prefix}.hidden"), &[gates, gates / 4], hidden);
        tensors.floats(&format!("{prefix}.bias"), &[gates], bias);
    }

    /// Width of its hidden state.
    pub(crate) fn width(&self) -> usize {
        self.hidden.cols
    }

    /// Runs over all sequences, forward or from their ends; x (rows, inputs). Leaves each sequence's last
    /// state in `memory`.
    pub(crate) fn scan(&self, x: &[f32], sequences: &Sequences, reverse: bool, memory: &mut Memory, out: Columns<'_>) {
        let width = self.width();
        let mut from_input = vec![0.0; sequences.total * 4 * width];
        matmul(x, self.input.by_ref(), &mut from_input); // (rows, inputs) @ W^T -> (rows, 4 width)
        let mut gates = vec![0.0; sequences.rows.len() * 4 * width];
        let steps = sequences.rows.first().map_or(0, |rows| rows.len());
        for step in 0..steps {
            let active = sequences.rows.partition_point(|rows| rows.len() > step);
            let gates = &mut gates[..active * 4 * width];
            matmul(&memory.hidden[..active * width], self.hidden.by_ref(), gates);
            for (sequence, gates) in gates.chunks_exact_mut(4 * width).enumerate() {
                let rows = &sequences.rows[sequence];
                let row = if reverse { rows.end - 1 - step } else { rows.start + step };
                let from_input = &from_input[row * 4 * width..][..4 * width];
                for ((gate, from_input), bias) in gates.iter_mut().zip(from_input).zip(&self.bias) {
                    *gate += from_input + bias;
                }
                let hidden = &mut memory.hidden[sequence * width..][..width];
                activation::step(gates, &mut memory.cell[sequence * width..][..width], hidden);
                out.values[row * out.width + out.first..][..width].copy_from_slice(hidden);
            }
        }
    }
}
