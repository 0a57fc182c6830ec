//! The decoder's attention to the model's input. What a decoder's routers choose depends on what its cross-attention brings
//! them from the encoder's output, which is known before the first step: so the net looks there, too.
//!
//! The encoder's states are projected to keys and values once per sequence ([`InputMemory`]). Each step then costs a
//! softmax over the input for each head, by the row-wise kernels that serve the model, so that it does not depend on the
//! batch.

use std::ops::Range;

use sida_kernels::{matmul::matmul, norm::softmax};

use crate::{
    PredictorError,
    file::{Matrix, PredictorFile, matrix},
};

/// The names of its tensors, after the stack's.
pub(crate) const QUERY: &str = "input.query";
pub(crate) const KEYS: &str = "input.keys";
pub(crate) const VALUES: &str = "input.values";
pub(crate) const OUTPUT: &str = "input.output";

/// Its weights.
pub(crate) struct InputAttention {
    d_model: usize,
    heads: Vec<Head>,
    /// (width, heads x value width)
    output: Matrix,
}

/// The weights of one head.
struct Head {
    /// (key width, width of the net)
    query: Matrix,
    /// (key width, d_model)
    keys: Matrix,
    /// (value width, d_model)
    values: Matrix,
}

/// What the net keeps of a sequence's input.
#[derive(Debug, PartialEq)]
pub(crate) struct InputMemory {
    tokens: usize,
    heads: Vec<HeadMemory>,
}

/// Of one head.
#[derive(Debug, PartialEq)]
struct HeadMemory {
    /// (tokens, key width)
    keys: Vec<f32>,
    /// (value width, tokens)
    values: Vec<f32>,
}

impl InputAttention {
    /// Takes it out of a file, for a net of this width. `None` if the file has none, as those that were written before
    /// there was any.
    pub(crate) fn from_file(
        file: &mut PredictorFile,
        stack: &str,
        width: usize,
    ) -> Result<Option<Self>, PredictorError> {
        let [query, keys, values, output] = [QUERY, KEYS, VALUES, OUTPUT].map(|part| format!("{stack}.{part}"));
        if !file.has(&query) {
            return Ok(None);
        }
        let Some(d_model) = file.shape.encoder_width else {
            return Err(file.refuse(&query, "reads an encoder's states, and the model has no encoder".to_owned()));
        };
        let (heads, key_width) = file.head_extent(&query, width)?;
        let (value_heads, value_width) = file.head_extent(&values, d_model)?;
        if value_heads != heads {
            return Err(file.refuse(&values, format!("has {value_heads} heads, and {query} has {heads}")));
        }
        let query = file.take_matrices(&query, heads, key_width, width)?;
        let keys = file.take_matrices(&keys, heads, key_width, d_model)?;
        let values = file.take_matrices(&values, heads, value_width, d_model)?;
        let output = file.take_matrix(&output, width, heads * value_width)?;
        let parts = query.into_iter().zip(keys).zip(values);
        let heads = parts.map(|((query, keys), values)| Head { query, keys, values }).collect();
        Ok(Some(Self { d_model, heads, output }))
    }

    /// What is kept of an input of which the encoder has made `states` (tokens, d_model), finite and of at least one token.
    pub(crate) fn remember(&self, states: &[f32]) -> Result<InputMemory, PredictorError> {
        let d_model = self.d_model;
        let refuse = |reason| Err(PredictorError::Input { reason });
        if states.is_empty() || !states.len().is_multiple_of(d_model) {
            return refuse(format!("has {} values, expected some rows of {d_model}", states.len()));
        }
        if !states.iter().all(|value| value.is_finite()) {
            return refuse("holds a value that is not finite".to_owned());
        }
        let tokens = states.len() / d_model;
        let of_head = |head: &Head| {
            let (mut keys, mut values) = (vec![0.0; tokens * head.keys.rows], vec![0.0; head.values.rows * tokens]);
            matmul(states, head.keys.by_ref(), &mut keys); // (tokens, d_model) @ K^T -> (tokens, key width)
            matmul(head.values.values(), matrix(states, tokens, d_model), &mut values); // V @ states^T -> (value width, tokens)
            HeadMemory { keys, values }
        };
        Ok(InputMemory { tokens, heads: self.heads.iter().map(of_head).collect() })
    }

    /// Adds to `rows` (n, width) what they find in the input by `queries` (n, width). Each range of rows is a sequence,
    /// which has the memory of the same place.
    pub(crate) fn add(&self, queries: &[f32], sequences: &[(Range<usize>, &InputMemory)], rows: &mut [f32]) {
        let (width, found_width) = (self.output.rows, self.output.cols);
        let n = rows.len() / width;
        let mut found = vec![0.0; n * found_width]; // (n, heads x value width)
        let mut scores = Vec::new();
        for (at, head) in self.heads.iter().enumerate() {
            let (key_width, value_width) = (head.query.rows, head.values.rows);
            let scale = (key_width as f32).powf(-0.5);
            let mut query = vec![0.0; n * key_width];
            matmul(queries, head.query.by_ref(), &mut query); // (n, width) @ Q^T -> (n, key width)
            query.iter_mut().for_each(|value| *value *= scale);
            let mut of_head = vec![0.0; n * value_width];
            for (rows, memory) in sequences {
                let (tokens, HeadMemory { keys, values }) = (memory.tokens, &memory.heads[at]);
                scores.clear();
                scores.resize(rows.len() * tokens, 0.0);
                matmul(
                    &query[rows.start * key_width..rows.end * key_width],
                    matrix(keys, tokens, key_width),
                    &mut scores,
                );
                softmax(&mut scores, tokens);
                let of_head = &mut of_head[rows.start * value_width..rows.end * value_width];
                matmul(&scores, matrix(values, value_width, tokens), of_head); // (rows, tokens) @ values^T
            }
            for (found, of_head) in found.chunks_exact_mut(found_width).zip(of_head.chunks_exact(value_width)) {
                found[at * value_width..][..value_width].copy_from_slice(of_head);
            }
        }
        let mut out = vec![0.0; rows.len()];
        matmul(&found, self.output.by_ref(), &mut out);
        rows.iter_mut().zip(&out).for_each(|(row, out)| *row += out);
    }
}
