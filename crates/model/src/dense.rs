//! The dense part of a model, on the processor or on a GPU, walked block by block: every MoE layer stops at its gate, and
//! whoever runs the model sends the rows to the experts and adds what comes back. What a coordinator computes with.
//!
//! On the processor a walk owns its hidden states; on a GPU they stay there, one walk at a time, and what a finished
//! walk left is there until the next one begins.

use std::sync::Arc;

use sida_routing::{LayerId, Routes};

#[cfg(feature = "cuda")]
use crate::cuda::{Choice, DeviceDense, Gpu};
use crate::{
    Backbone, Checkpoint, DeviceName, ModelConfig, ModelError, MoeGate, Precision, RouterKind, RowsOnDevice,
    RowsWindow, Spans, Stack, elementwise,
    feed_forward::FeedForward,
    router,
    tensor_rows::{from_rows, rows},
    walk::{At, Caches, Left, SequenceState, States, Walk},
};

/// The dense part of a model.
#[derive(Debug)]
pub struct Dense {
    place: Place,
}

#[derive(Debug)]
enum Place {
    Cpu(Arc<Backbone>),
    #[cfg(feature = "cuda")]
    Gpu(Box<DeviceDense>),
}

/// How a model's dense part is put on a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DenseOptions {
    /// Which.
    pub device: DeviceName,
    /// What a GPU computes in; `None`: as the embeddings are stored.
    pub precision: Option<Precision>,
    /// Rows of a batch at most.
    pub rows_max: usize,
}

impl Dense {
    /// Loads the weights. `on_progress` gets bytes done and bytes in all, as far as they are known.
    pub fn load(
        checkpoint: &Checkpoint,
        options: DenseOptions,
        on_progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let place = match options.device {
            DeviceName::Cpu => Place::Cpu(Arc::new(Backbone::load(checkpoint, on_progress)?)),
            #[cfg(feature = "cuda")]
            DeviceName::Cuda(ordinal) => {
                let stored = checkpoint.dtype(&crate::names::embedding(checkpoint, Stack::Encoder))?;
                let precision = options.precision.unwrap_or(Precision::of_weights(stored));
                let gpu = Gpu::open(ordinal)?;
                Place::Gpu(Box::new(DeviceDense::open(gpu, checkpoint, precision, options.rows_max)?))
            }
            #[cfg(not(feature = "cuda"))]
            device => return Err(crate::DeviceError::not_built(device).into()),
        };
        Ok(Self { place })
    }

    /// Another way to the same weights, for another thread. `None` on a device, where one walk at a time has its memory.
    pub fn another(&self) -> Option<Self> {
        match &self.place {
            Place::Cpu(backbone) => Some(Self { place: Place::Cpu(backbone.clone()) }),
            #[cfg(feature = "cuda")]
            Place::Gpu(_) => None,
        }
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        match &self.place {
            Place::Cpu(backbone) => backbone.config(),
            #[cfg(feature = "cuda")]
            Place::Gpu(device) => device.config(),
        }
    }

    /// How many blocks a stack has.
    pub fn blocks(&self, stack: Stack) -> usize {
        self.config().sparse(stack).len()
    }

    /// Begins a walk: h = the embeddings of `ids`, which `spans` cuts into sequences. `states` are the decoder's, in the
    /// same order, and none for the encoder.
    pub fn begin(
        &mut self,
        stack: Stack,
        ids: &[u32],
        spans: &Spans,
        states: &mut [&mut SequenceState],
    ) -> Result<Walk, ModelError> {
        let at = match &mut self.place {
            Place::Cpu(backbone) => At::Cpu { h: backbone.embed(stack, ids)?, x: None, block: 0, probabilities: None },
            #[cfg(feature = "cuda")]
            Place::Gpu(device) => {
                device.begin(stack, ids, spans, &mut SequenceState::on_device(states))?;
                At::Gpu { choice: Choice::default(), probabilities: Vec::new() }
            }
        };
        #[cfg(not(feature = "cuda"))]
        let _ = (spans, states);
        Ok(Walk { stack, next: 0, at })
    }

    /// Goes on through dense layers to the next MoE layer. There x = norm(h), and the router chooses; then come
    /// [`Dense::routes`], [`Dense::rows`] and [`Dense::add`]. `None` after the last block. `states` are those that the walk
    /// began with.
    pub fn advance(
        &mut self,
        walk: &mut Walk,
        spans: &Spans,
        states: &mut [&mut SequenceState],
    ) -> Result<Option<LayerId>, ModelError> {
        let blocks = self.blocks(walk.stack);
        if let (Stack::Encoder, Place::Cpu(backbone), At::Cpu { h, .. }) = (walk.stack, &self.place, &mut walk.at) {
            let (advanced, sparse) = backbone.encoder().advance(h, walk.next, spans)?;
            *h = advanced;
            walk.next = sparse.map_or(blocks, |block| block + 1);
            return sparse.map_or(Ok(None), |block| self.feed_forward(walk, block));
        }
        #[cfg(feature = "cuda")]
        if let (Place::Gpu(device), At::Gpu { choice, probabilities }) = (&mut self.place, &mut walk.at) {
            let (next, layer) = device.advance(walk.next)?;
            walk.next = next;
            if layer.is_some() {
                (*choice, *probabilities) = (device.choice()?, Vec::new());
            }
            return Ok(layer);
        }
        while walk.next < blocks {
            let block = walk.next;
            walk.next += 1;
            self.attend(walk, block, spans, states)?;
            if let Some(layer) = self.feed_forward(walk, block)? {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }

    /// The attention of a block: h += attention(norm(h)).
    fn attend(
        &self,
        walk: &mut Walk,
        block: usize,
        spans: &Spans,
        states: &mut [&mut SequenceState],
    ) -> Result<(), ModelError> {
        match (&self.place, &mut walk.at) {
            (Place::Cpu(backbone), At::Cpu { h, .. }) => {
                *h = match walk.stack {
                    Stack::Encoder => backbone.encoder().layers()[block].attend(h, spans)?,
                    Stack::Decoder => {
                        backbone.decoder().layers()[block].attend(h, &mut SequenceState::here(states), spans)?
                    }
                };
                Ok(())
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("a device advances by itself"),
        }
    }

    /// What follows in a block that is dense: h += feed_forward(norm(h)). In a sparse one x = norm(h).
    fn feed_forward(&mut self, walk: &mut Walk, number: usize) -> Result<Option<LayerId>, ModelError> {
        match (&mut self.place, &mut walk.at) {
            (Place::Cpu(backbone), At::Cpu { h, x, block, probabilities }) => {
                match gate(backbone, walk.stack, number) {
                    FeedForward::Dense(dense) => {
                        *h = dense.forward(h)?;
                        Ok(None)
                    }
                    FeedForward::Moe(gate) => {
                        (*x, *block, *probabilities) = (Some(gate.normed(h)?), number, None);
                        Ok(Some(gate.id()))
                    }
                }
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("a device advances by itself"),
        }
    }

    /// The router's choice for the rows of the MoE layer at hand. Enforces no capacity.
    pub fn routes(&self, walk: &mut Walk) -> Result<Routes, ModelError> {
        #[cfg(feature = "cuda")]
        if let At::Gpu { choice, .. } = &walk.at {
            let experts = choice.experts.iter().map(|&expert| Some(sida_routing::ExpertId(expert))).collect();
            return Ok(Routes { top_k: 1, experts, weights: choice.alpha.clone() });
        }
        let (kind, num_experts): (RouterKind, usize) = (self.config().router, self.config().num_experts);
        Ok(router::routes(&kind, self.probabilities(walk)?, num_experts))
    }

    /// The router's probabilities for those rows: (rows, experts), row-major.
    pub fn probabilities<'w>(&self, walk: &'w mut Walk) -> Result<&'w [f32], ModelError> {
        match (&self.place, &mut walk.at) {
            (Place::Cpu(backbone), At::Cpu { x, block, probabilities, .. }) => {
                if probabilities.is_none() {
                    let (FeedForward::Moe(gate), Some(x)) = (gate(backbone, walk.stack, *block), x) else {
                        unreachable!("a router is asked at an MoE layer")
                    };
                    *probabilities = Some(MoeGate::probabilities(gate, x)?);
                }
                Ok(probabilities.as_deref().expect("computed above"))
            }
            #[cfg(feature = "cuda")]
            (Place::Gpu(device), At::Gpu { probabilities, .. }) => {
                if probabilities.is_empty() {
                    *probabilities = device.router_logits()?;
                    crate::cpu::norm::softmax(probabilities, device.config().num_experts);
                }
                Ok(probabilities)
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("a walk is of the model that began it"),
        }
    }

    /// Calls `work` with the rows (tokens, d_model) of the MoE layer at hand, which are in this machine's memory.
    pub fn rows<T>(&mut self, walk: &Walk, work: impl FnOnce(&[f32]) -> T) -> Result<T, ModelError> {
        match (&mut self.place, &walk.at) {
            (Place::Cpu(_), At::Cpu { x, .. }) => {
                Ok(rows(x.as_ref().expect("rows are asked for at an MoE layer"), work)?)
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("rows on a device are asked for by rows_on_device"),
        }
    }

    /// Those rows where they are on a device: see [`RowsOnDevice`]. `None`: they are in this machine's memory.
    pub fn rows_on_device(&mut self) -> Option<RowsOnDevice<'_>> {
        match &mut self.place {
            Place::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Place::Gpu(device) => Some(RowsOnDevice { dense: device }),
        }
    }

    /// The memory that rows are in, for expert-nodes of this machine. `None`: not a device's; an error: the device does not
    /// let it be shared.
    pub fn rows_window(&self) -> Option<Result<RowsWindow, ModelError>> {
        match &self.place {
            Place::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Place::Gpu(device) => {
                let shared = device.shared_rows().map_err(ModelError::from);
                Some(shared.map(|shared| RowsWindow { shared: Arc::new(shared) }))
            }
        }
    }

    /// h += out (rows, d_model), what became of those.
    pub fn add(&mut self, walk: &mut Walk, out: Vec<f32>) -> Result<(), ModelError> {
        match (&mut self.place, &mut walk.at) {
            (Place::Cpu(_), At::Cpu { h, .. }) => {
                let d_model = h.dim(1)?;
                *h = elementwise::add(h, &from_rows(out, d_model)?)?;
                Ok(())
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("what becomes of rows on a device is added by RowsOnDevice"),
        }
    }

    /// Ends a walk: the norm after the last block. The decoder's `states` advance by the tokens of `spans`.
    pub fn finish(
        &mut self,
        walk: Walk,
        spans: &Spans,
        states: &mut [&mut SequenceState],
    ) -> Result<States, ModelError> {
        match (&mut self.place, walk.at) {
            (Place::Cpu(backbone), At::Cpu { h, .. }) => {
                for (state, range) in SequenceState::here(states).into_iter().zip(spans.ranges()) {
                    state.advance(range.len());
                }
                Ok(States(Left::Cpu(match walk.stack {
                    Stack::Encoder => backbone.encoder().finish(&h)?,
                    Stack::Decoder => backbone.decoder().finish(&h)?,
                })))
            }
            #[cfg(feature = "cuda")]
            (Place::Gpu(device), At::Gpu { .. }) => {
                device.finish(spans, &mut SequenceState::on_device(states))?;
                Ok(States(Left::Gpu { rows: spans.rows() }))
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("a walk is of the model that began it"),
        }
    }

    /// The encoder's states (tokens, d_model), row-major, in memory that is kept in `buffer` for the next time.
    pub fn values<'b>(&mut self, states: &States, buffer: &'b mut Vec<f32>) -> Result<&'b [f32], ModelError> {
        match (&mut self.place, &states.0) {
            (Place::Cpu(_), Left::Cpu(states)) => {
                rows(states, |values| {
                    buffer.clear();
                    buffer.extend_from_slice(values);
                })?;
                Ok(buffer)
            }
            #[cfg(feature = "cuda")]
            (Place::Gpu(device), Left::Gpu { rows }) => {
                let values = rows * device.config().d_model;
                if buffer.len() < values {
                    buffer.resize(values, 0.0);
                }
                device.write_states(&mut buffer[..values])?;
                Ok(&buffer[..values])
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("states are of the model that made them"),
        }
    }

    /// Sequences before their first token, of the encoder's states, which `spans` cuts.
    pub fn start(&mut self, states: &States, spans: &Spans) -> Result<Vec<SequenceState>, ModelError> {
        match (&mut self.place, &states.0) {
            (Place::Cpu(backbone), Left::Cpu(states)) => {
                let started = backbone.decoder().start_batch(states, spans)?;
                Ok(started.into_iter().map(|state| SequenceState(Caches::Cpu(state))).collect())
            }
            #[cfg(feature = "cuda")]
            (Place::Gpu(device), Left::Gpu { .. }) => {
                Ok(device.start(spans)?.into_iter().map(|state| SequenceState(Caches::Gpu(state))).collect())
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("states are of the model that made them"),
        }
    }

    /// Another sequence that goes on from here: what scoring several targets of one input needs.
    pub fn fork(&self, state: &SequenceState) -> Result<SequenceState, ModelError> {
        match (&self.place, &state.0) {
            (Place::Cpu(_), Caches::Cpu(state)) => Ok(SequenceState(Caches::Cpu(state.fork()))),
            #[cfg(feature = "cuda")]
            (Place::Gpu(device), Caches::Gpu(state)) => Ok(SequenceState(Caches::Gpu(device.fork(state)?))),
            #[cfg(feature = "cuda")]
            _ => unreachable!("a sequence is of the model that started it"),
        }
    }

    /// The most likely token after each of these rows of the decoder's last walk, never the one that is banned for it, if a
    /// device chooses it where the logits are; a row's is none where no logit is a number. `None`: ask for the logits.
    pub fn best_tokens(
        &mut self,
        _wanted: &[u32],
        _banned: &[Option<u32>],
    ) -> Option<Result<Vec<Option<u32>>, ModelError>> {
        match &mut self.place {
            Place::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Place::Gpu(device) => Some(device.best_tokens(_wanted, _banned).map_err(ModelError::from)),
        }
    }

    /// Scores of every token of the vocabulary after these rows, ascending, of the decoder's last walk:
    /// (rows, vocab_size), row-major.
    pub fn logits(&mut self, states: &States, wanted: &[usize]) -> Result<Vec<f32>, ModelError> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        match (&mut self.place, &states.0) {
            (Place::Cpu(backbone), Left::Cpu(states)) => {
                let d_model = backbone.config().d_model;
                Ok(rows(states, |states| match wanted.len() * d_model == states.len() {
                    true => backbone.logits_of(states),
                    false => backbone.logits_of(&gather(states, d_model, wanted)),
                })?)
            }
            #[cfg(feature = "cuda")]
            (Place::Gpu(device), Left::Gpu { .. }) => {
                Ok(device.logits(&wanted.iter().map(|&row| row as u32).collect::<Vec<_>>())?)
            }
            #[cfg(feature = "cuda")]
            _ => unreachable!("states are of the model that made them"),
        }
    }
}

fn gate(backbone: &Backbone, stack: Stack, block: usize) -> &FeedForward {
    match stack {
        Stack::Encoder => backbone.encoder().layers()[block].feed_forward(),
        Stack::Decoder => backbone.decoder().layers()[block].feed_forward(),
    }
}

/// The rows of `h` (tokens, d_model) at `wanted`.
fn gather(h: &[f32], d_model: usize, wanted: &[usize]) -> Vec<f32> {
    wanted.iter().flat_map(|row| &h[row * d_model..][..d_model]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence would be continued from another one's logits.
    #[test]
    fn rows_are_the_wanted_ones() {
        let h: Vec<f32> = (0..8).map(|v| v as f32).collect();
        assert_eq!(gather(&h, 2, &[1, 3]), [2.0, 3.0, 6.0, 7.0]);
    }
}
