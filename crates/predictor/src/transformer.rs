//! A net for the encoder that is a small transformer: the whole input is known, so nothing has to be read in order, and
//! attention with a bias by distance finds the neighbours that decide. For the same time it is right more often than the
//! LSTM that runs both ways, and its products have many rows (docs/decisions/0026).
//!
//! Token embedding -> linear and ReLU (stored for each token) -> linear -> blocks of self-attention and two linear layers,
//! each behind a norm and added to what it reads -> norm -> one linear head per MoE layer. Made of the row-wise kernels that
//! serve the model: a prediction does not depend on the batch.

use std::ops::Range;

use half::f16;
use sida_kernels::{
    matmul::matmul,
    norm::{rms_norm, softmax},
};
use sida_model::Stack;

use crate::{
    PredictorError,
    file::{Matrix, PredictorFile, matrix},
    lstm::stack_net::WIDTH_MAX,
    stack_name,
};

/// A net of more blocks is refused.
const BLOCKS_MAX: usize = 8;
/// A bias that tells further distances apart is refused.
const DISTANCE_MAX: usize = 1024;
/// What the norms add to the mean square.
pub(crate) const EPSILON: f32 = 1e-6;
/// Rows whose scores are in memory at a time: an input may be long.
const ROWS: usize = 64;

/// Its weights.
pub(crate) struct TransformerNet {
    token_width: usize,
    /// (vocabulary, token width)
    tokens: Vec<f16>,
    /// (width, token width)
    input: Matrix,
    blocks: Vec<Block>,
    norm: Vec<f32>,
    /// (MoE layers x experts, width)
    head: Matrix,
    head_bias: Vec<f32>,
}

/// Self-attention, then two linear layers with ReLU between them.
struct Block {
    attention_norm: Vec<f32>,
    heads: Vec<Head>,
    /// (width, heads x value width)
    output: Matrix,
    linear_norm: Vec<f32>,
    /// (inner width, width)
    up: Matrix,
    /// (width, inner width)
    down: Matrix,
}

/// The weights of one head.
struct Head {
    /// (key width, width)
    query: Matrix,
    /// (key width, width)
    keys: Matrix,
    /// (value width, width)
    values: Matrix,
    /// What is added to the score of a token so far away: from as many before as it tells apart to as many behind.
    distances: Vec<f32>,
}

/// The name of a part of a block.
pub(crate) fn block_part(block: usize, part: &str) -> String {
    format!("{}.block.{block}.{part}", stack_name(Stack::Encoder))
}

impl TransformerNet {
    /// Takes it out of a file; `None` where the encoder has no MoE layers.
    pub(crate) fn from_file(file: &mut PredictorFile) -> Result<Option<Self>, PredictorError> {
        let outputs = file.shape.layers(Stack::Encoder).len() * file.shape.num_experts;
        if outputs == 0 {
            return Ok(None);
        }
        let name = stack_name(Stack::Encoder);
        let input = format!("{name}.input");
        let (width, token_width) = match *file.dimensions(&input)? {
            [width, token_width] if [width, token_width].iter().all(|width| (1..=WIDTH_MAX).contains(width)) => {
                (width, token_width)
            }
            ref found => {
                let reason = format!("is {found:?}, expected a width, and one of tokens, of at most {WIDTH_MAX}");
                return Err(file.refuse(&input, reason));
            }
        };
        let mut blocks = Vec::new();
        while blocks.len() < BLOCKS_MAX && file.has(&block_part(blocks.len(), "query")) {
            blocks.push(Block::from_file(file, blocks.len(), width)?);
        }
        Ok(Some(Self {
            token_width,
            tokens: file.halves(&format!("{name}.tokens"), &[file.shape.vocab_size, token_width])?,
            input: file.take_matrix(&input, width, token_width)?,
            blocks,
            norm: file.floats(&format!("{name}.norm"), &[width])?,
            head: file.take_matrix(&format!("{name}.head"), outputs, width)?,
            head_bias: file.floats(&format!("{name}.head_bias"), &[outputs])?,
        }))
    }

    /// Logits (rows, MoE layers, experts) of whole sequences. Ids must be within the vocabulary.
    pub(crate) fn encode(&self, sequences: &[&[u32]]) -> Vec<f32> {
        let ids = sequences.iter().flat_map(|tokens| tokens.iter());
        let tokens = ids.flat_map(|&id| &self.tokens[id as usize * self.token_width..][..self.token_width]);
        let tokens: Vec<f32> = tokens.map(|value| value.to_f32()).collect();
        let mut x = product(&tokens, &self.input); // (rows, width)
        let mut total = 0;
        let spans: Vec<Range<usize>> = sequences
            .iter()
            .map(|tokens| {
                total += tokens.len();
                total - tokens.len()..total
            })
            .collect();
        for block in &self.blocks {
            block.pass(&mut x, &spans);
        }
        let mut logits = product(&normed(&x, &self.norm), &self.head);
        for row in logits.chunks_exact_mut(self.head.rows) {
            row.iter_mut().zip(&self.head_bias).for_each(|(logit, bias)| *logit += bias);
        }
        logits
    }
}

impl Block {
    fn from_file(file: &mut PredictorFile, block: usize, width: usize) -> Result<Self, PredictorError> {
        let part = |name: &str| block_part(block, name);
        let (heads, key_width) = file.head_extent(&part("query"), width)?;
        let (value_heads, value_width) = file.head_extent(&part("values"), width)?;
        if value_heads != heads {
            let reason = format!("has {value_heads} heads, and {} has {heads}", part("query"));
            return Err(file.refuse(&part("values"), reason));
        }
        let distances = match *file.dimensions(&part("distances"))? {
            [found, distances] if found == heads && distances % 2 == 1 && distances <= 2 * DISTANCE_MAX + 1 => {
                distances
            }
            ref found => {
                let reason = format!("is {found:?}, expected ({heads}, an odd number up to {})", 2 * DISTANCE_MAX + 1);
                return Err(file.refuse(&part("distances"), reason));
            }
        };
        let inner = match *file.dimensions(&part("up"))? {
            [inner, _] if (1..=4 * WIDTH_MAX).contains(&inner) => inner,
            ref found => {
                let reason = format!("is {found:?}, expected (at most {}, {width})", 4 * WIDTH_MAX);
                return Err(file.refuse(&part("up"), reason));
            }
        };
        let query = file.take_matrices(&part("query"), heads, key_width, width)?;
        let keys = file.take_matrices(&part("keys"), heads, key_width, width)?;
        let values = file.take_matrices(&part("values"), heads, value_width, width)?;
        let by_distance = file.floats(&part("distances"), &[heads, distances])?;
        let parts = query.into_iter().zip(keys).zip(values).zip(by_distance.chunks_exact(distances));
        let head = |(((query, keys), values), distances): (_, &[f32])| Head {
            query,
            keys,
            values,
            distances: distances.to_vec(),
        };
        Ok(Self {
            attention_norm: file.floats(&part("attention_norm"), &[width])?,
            heads: parts.map(head).collect(),
            output: file.take_matrix(&part("output"), width, heads * value_width)?,
            linear_norm: file.floats(&part("linear_norm"), &[width])?,
            up: file.take_matrix(&part("up"), inner, width)?,
            down: file.take_matrix(&part("down"), width, inner)?,
        })
    }

    /// x (rows, width) of sequences in place.
    fn pass(&self, x: &mut [f32], spans: &[Range<usize>]) {
        let width = self.output.rows;
        let read = normed(x, &self.attention_norm);
        let found_width = self.output.cols;
        let mut found = vec![0.0; x.len() / width * found_width];
        let value_width = found_width / self.heads.len();
        for rows in spans {
            let read = &read[rows.start * width..rows.end * width];
            let found = &mut found[rows.start * found_width..rows.end * found_width];
            for (at, head) in self.heads.iter().enumerate() {
                let of_head = head.attend(read, width);
                for (found, of_head) in found.chunks_exact_mut(found_width).zip(of_head.chunks_exact(value_width)) {
                    found[at * value_width..][..value_width].copy_from_slice(of_head);
                }
            }
        }
        add(x, &product(&found, &self.output));
        let mut inner = product(&normed(x, &self.linear_norm), &self.up);
        inner.iter_mut().for_each(|value| *value = value.max(0.0));
        add(x, &product(&inner, &self.down));
    }
}

impl Head {
    /// What each row of a sequence finds in it: read (rows, width) -> (rows, value width).
    fn attend(&self, read: &[f32], width: usize) -> Vec<f32> {
        let (rows, key_width, value_width) = (read.len() / width, self.query.rows, self.values.rows);
        let scale = (key_width as f32).powf(-0.5);
        let (query, keys) = (product(read, &self.query), product(read, &self.keys));
        let mut values = vec![0.0; value_width * rows];
        matmul(self.values.values(), matrix(read, rows, width), &mut values); // V @ read^T -> (value width, rows)
        let mut found = vec![0.0; rows * value_width];
        let mut scores = vec![0.0; ROWS.min(rows) * rows];
        let furthest = self.distances.len() / 2;
        for first in (0..rows).step_by(ROWS) {
            let last = rows.min(first + ROWS);
            let scores = &mut scores[..(last - first) * rows];
            matmul(&query[first * key_width..last * key_width], matrix(&keys, rows, key_width), scores);
            for (row, scores) in (first..last).zip(scores.chunks_exact_mut(rows)) {
                for (token, score) in scores.iter_mut().enumerate() {
                    let distance = (token + furthest).saturating_sub(row).min(2 * furthest);
                    *score = *score * scale + self.distances[distance];
                }
            }
            softmax(scores, rows);
            let found = &mut found[first * value_width..last * value_width];
            matmul(scores, matrix(&values, value_width, rows), found); // (rows, tokens) @ values^T
        }
        found
    }
}

/// x (n, inputs) @ weights^T -> (n, outputs).
fn product(x: &[f32], weights: &Matrix) -> Vec<f32> {
    let mut out = vec![0.0; x.len() / weights.cols * weights.rows];
    matmul(x, weights.by_ref(), &mut out);
    out
}

fn normed(x: &[f32], norm: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    rms_norm(x, norm, EPSILON, &mut out);
    out
}

fn add(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}
