//! The net of one stack, from token ids to logits.

use std::{ops::Range, sync::Arc};

use half::f16;
use sida_kernels::matmul::matmul;
use sida_model::Stack;

use super::{
    ATTENTION_WINDOW,
    input_attention::{InputAttention, InputMemory},
    recurrence::{Columns, Direction, Memory, Sequences},
    sparsemax::sparsemax,
};
use crate::{
    PredictorError, PredictorState,
    file::{Matrix, PredictorFile, matrix},
    stack_name,
};

/// Layers of LSTM.
pub(crate) const LSTM_LAYERS: usize = 2;
/// The widest net that is opened.
pub(crate) const WIDTH_MAX: usize = 2048;

/// Weights of one stack's net.
pub(crate) struct StackNet {
    /// Width of what is known of a token by itself.
    token_width: usize,
    /// (vocabulary, token width): ReLU(linear(embedding)) of each token.
    tokens: Vec<f16>,
    /// Width of everything else between embedding and head. Apart from that of tokens, which make up most of a file.
    width: usize,
    /// For each LSTM layer, forward and, in the encoder, backward.
    layers: Vec<Vec<Direction>>,
    /// (width, token width)
    residual: Matrix,
    /// Of a decoder's net that reads the input.
    input: Option<InputAttention>,
    /// (MoE layers x experts, width)
    head: Matrix,
    head_bias: Vec<f32>,
}

/// The directions of a stack's LSTM.
pub(crate) fn directions(stack: Stack) -> &'static [&'static str] {
    match stack {
        Stack::Encoder => &["forward", "backward"],
        Stack::Decoder => &["forward"],
    }
}

impl StackNet {
    /// Takes a stack's net out of a file; `None` where the stack has no MoE layers.
    pub(crate) fn from_file(file: &mut PredictorFile, stack: Stack) -> Result<Option<Self>, PredictorError> {
        let outputs = file.shape.layers(stack).len() * file.shape.num_experts;
        if outputs == 0 {
            return Ok(None);
        }
        let (name, directions) = (stack_name(stack), directions(stack));
        let residual = format!("{name}.residual");
        let is_width = |width: usize| (1..=WIDTH_MAX).contains(&width);
        let (width, token_width) = match *file.dimensions(&residual)? {
            [width, token_width]
                if is_width(width) && is_width(token_width) && width.is_multiple_of(directions.len()) =>
            {
                (width, token_width)
            }
            ref found => {
                let reason = format!("is {found:?}, expected an even width, and one of tokens, of at most {WIDTH_MAX}");
                return Err(file.refuse(&residual, reason));
            }
        };
        let tokens = file.halves(&format!("{name}.tokens"), &[file.shape.vocab_size, token_width])?;
        let mut layers = Vec::with_capacity(LSTM_LAYERS);
        for layer in 0..LSTM_LAYERS {
            let inputs = if layer == 0 { token_width } else { width };
            let read = |direction: &&str| {
                Direction::from_file(
                    file,
                    &format!("{name}.lstm.{layer}.{direction}"),
                    inputs,
                    width / directions.len(),
                )
            };
            layers.push(directions.iter().map(read).collect::<Result<_, _>>()?);
        }
        let input = match stack {
            Stack::Encoder => None,
            Stack::Decoder => InputAttention::from_file(file, name, width)?,
        };
        Ok(Some(Self {
            token_width,
            width,
            input,
            tokens,
            layers,
            residual: file.take_matrix(&residual, width, token_width)?,
            head: file.take_matrix(&format!("{name}.head"), outputs, width)?,
            head_bias: file.floats(&format!("{name}.head_bias"), &[outputs])?,
        }))
    }

    /// Whether it reads the model's input.
    pub(crate) fn reads_input(&self) -> bool {
        self.input.is_some()
    }

    /// The state of a sequence before its first token; see [`HashPredictor::start`](crate::HashPredictor::start).
    pub(crate) fn start(&self, states: &[f32]) -> Result<PredictorState, PredictorError> {
        let memory = self.input.as_ref().map(|input| input.remember(states)).transpose()?;
        Ok(PredictorState { values: Vec::new(), input: memory.map(Arc::new) })
    }

    /// Logits (rows, MoE layers, experts) of whole sequences. Ids must be within the vocabulary.
    pub(crate) fn encode(&self, sequences: &[&[u32]]) -> Vec<f32> {
        let spans = Sequences::new(sequences.iter().map(|tokens| tokens.len()));
        let x = self.embed(sequences);
        let mut memories: Vec<Vec<Memory>> = self.fresh_memories(spans.rows.len());
        let outputs = self.recur(&x, &spans, &mut memories);
        let mut attended = vec![0.0; outputs.len()];
        for rows in &spans.rows {
            let keys = &outputs[rows.start * self.width..rows.end * self.width];
            self.attend(keys, rows.len(), |_| 0..rows.len(), &mut attended[rows.start * self.width..][..keys.len()]);
        }
        self.add_residual(&x, &mut attended);
        self.head(&attended)
    }

    /// Logits (rows, MoE layers, experts) of the next tokens of sequences; advances their states.
    /// Ids must be within the vocabulary. On an error no state is changed.
    pub(crate) fn decode(
        &self,
        states: &mut [&mut PredictorState],
        sequences: &[&[u32]],
    ) -> Result<Vec<f32>, PredictorError> {
        let spans = Sequences::new(sequences.iter().map(|tokens| tokens.len()));
        let inputs = self.inputs(states, &spans)?;
        let mut memories = self.fresh_memories(spans.rows.len());
        let mut windows: Vec<Vec<f32>> = Vec::with_capacity(states.len());
        for (slot, &sequence) in spans.order.iter().enumerate() {
            windows.push(self.restore(states[sequence], slot, &mut memories)?);
        }
        let x = self.embed(sequences);
        let outputs = self.recur(&x, &spans, &mut memories);
        let mut attended = vec![0.0; outputs.len()];
        for (slot, rows) in spans.rows.iter().enumerate() {
            let new = &outputs[rows.start * self.width..rows.end * self.width];
            let keys = &mut windows[slot];
            let before = keys.len() / self.width;
            keys.extend_from_slice(new);
            let seen = |row: usize| (before + row + 1).saturating_sub(ATTENTION_WINDOW)..before + row + 1;
            self.attend(keys, rows.len(), seen, &mut attended[rows.start * self.width..][..new.len()]);
            let forgotten = (keys.len() / self.width).saturating_sub(ATTENTION_WINDOW) * self.width;
            keys.drain(..forgotten);
        }
        for (slot, &sequence) in spans.order.iter().enumerate() {
            states[sequence].values = self.save(slot, &memories, &windows[slot]);
        }
        self.add_residual(&x, &mut attended);
        if let Some(input) = &self.input {
            let queries: Vec<f32> = outputs.iter().zip(&attended).map(|(output, attended)| output + attended).collect();
            let inputs: Vec<_> = spans.rows.iter().cloned().zip(inputs.iter().map(|memory| &**memory)).collect();
            input.add(&queries, &inputs, &mut attended);
        }
        Ok(self.head(&attended))
    }

    /// What is kept of the input of each sequence, in the order of the spans; none where the net reads no input.
    fn inputs(
        &self,
        states: &[&mut PredictorState],
        spans: &Sequences,
    ) -> Result<Vec<Arc<InputMemory>>, PredictorError> {
        if self.input.is_none() {
            return Ok(Vec::new());
        }
        let unknown =
            || PredictorError::Input { reason: "is read by this net, and the state of a sequence has none".to_owned() };
        let of_sequence = |&sequence: &usize| states[sequence].input.clone().ok_or_else(unknown);
        spans.order.iter().map(of_sequence).collect()
    }

    /// (rows, token width)
    fn embed(&self, sequences: &[&[u32]]) -> Vec<f32> {
        let ids = sequences.iter().flat_map(|tokens| tokens.iter());
        let tokens = ids.flat_map(|&id| &self.tokens[id as usize * self.token_width..][..self.token_width]);
        tokens.map(|value| value.to_f32()).collect()
    }

    /// The LSTM layers: x (rows, token width) -> (rows, width).
    fn recur(&self, x: &[f32], spans: &Sequences, memories: &mut [Vec<Memory>]) -> Vec<f32> {
        let mut x = std::borrow::Cow::Borrowed(x);
        for (directions, memories) in self.layers.iter().zip(memories) {
            let mut out = vec![0.0; spans.total * self.width];
            for (n, (direction, memory)) in directions.iter().zip(memories).enumerate() {
                let columns = Columns { values: &mut out, width: self.width, first: n * direction.width() };
                direction.scan(&x, spans, n == 1, memory, columns);
            }
            x = out.into();
        }
        x.into_owned()
    }

    /// Sparsemax attention of a sequence's last `rows` outputs over its outputs `keys` (n, width); row r sees
    /// `seen(r)` of them. out (rows, width).
    fn attend(&self, keys: &[f32], rows: usize, seen: impl Fn(usize) -> Range<usize>, out: &mut [f32]) {
        let width = self.width;
        let count = keys.len() / width;
        let scale = (width as f32).powf(-0.5);
        let mut scores = vec![0.0; rows * count];
        matmul(&keys[(count - rows) * width..], matrix(keys, count, width), &mut scores); // (rows, width) @ keys^T -> (rows, n)
        for (row, out) in out.chunks_exact_mut(width).enumerate() {
            let seen = seen(row);
            let scores = &mut scores[row * count..][seen.clone()];
            scores.iter_mut().for_each(|score| *score *= scale);
            sparsemax(scores);
            for (&mut weight, key) in scores.iter_mut().zip(keys[seen.start * width..].chunks_exact(width)) {
                if weight > 0.0 {
                    out.iter_mut().zip(key).for_each(|(out, key)| *out += weight * key);
                }
            }
        }
    }

    /// `attended += residual x`: x (rows, token width), attended (rows, width).
    fn add_residual(&self, x: &[f32], attended: &mut [f32]) {
        let mut residual = vec![0.0; attended.len()];
        matmul(x, self.residual.by_ref(), &mut residual);
        attended.iter_mut().zip(&residual).for_each(|(attended, residual)| *attended += residual);
    }

    /// (rows, width) -> logits (rows, MoE layers x experts).
    fn head(&self, rows: &[f32]) -> Vec<f32> {
        let mut logits = vec![0.0; rows.len() / self.width * self.head.rows];
        matmul(rows, self.head.by_ref(), &mut logits);
        for row in logits.chunks_exact_mut(self.head.rows) {
            row.iter_mut().zip(&self.head_bias).for_each(|(logit, bias)| *logit += bias);
        }
        logits
    }

    fn fresh_memories(&self, sequences: usize) -> Vec<Vec<Memory>> {
        let layer = |directions: &Vec<Direction>| {
            directions.iter().map(|direction| Memory::new(sequences, direction.width())).collect()
        };
        self.layers.iter().map(layer).collect()
    }

    /// Puts a sequence's state into its slot of the memories; returns the outputs it still attends to.
    /// A state is hidden and cell of each layer, then the window.
    fn restore(
        &self,
        state: &PredictorState,
        slot: usize,
        memories: &mut [Vec<Memory>],
    ) -> Result<Vec<f32>, PredictorError> {
        let width = self.width;
        if state.values.is_empty() {
            return Ok(Vec::new());
        }
        let fixed = 2 * LSTM_LAYERS * width;
        let window = state.values.len().checked_sub(fixed).filter(|window| window % width == 0);
        if !window.is_some_and(|window| (1..=ATTENTION_WINDOW).contains(&(window / width))) {
            let found = state.values.len();
            let reason = format!(
                "holds {found} values, expected {fixed} and 1 to {ATTENTION_WINDOW} times {width}: another predictor's"
            );
            return Err(PredictorError::State { reason });
        }
        for (memory, values) in memories.iter_mut().flatten().zip(state.values.chunks_exact(2 * width)) {
            memory.hidden[slot * width..][..width].copy_from_slice(&values[..width]);
            memory.cell[slot * width..][..width].copy_from_slice(&values[width..]);
        }
        Ok(state.values[fixed..].to_vec())
    }

    fn save(&self, slot: usize, memories: &[Vec<Memory>], window: &[f32]) -> Vec<f32> {
        let width = self.width;
        let layers = memories
            .iter()
            .flatten()
            .flat_map(|memory| [&memory.hidden[slot * width..][..width], &memory.cell[slot * width..][..width]]);
        layers.flatten().chain(window).copied().collect()
    }
}
