//! Sequences in the decoder of a model on a GPU: their caches on the device, which a sequence takes along when it joins or
//! leaves a batch, and the passes that fill them.

use std::{iter::zip, sync::Arc};

use super::{
    arguments::Sequence,
    buffer::DeviceBuffer,
    dense::DeviceDense,
    error::CudaError,
    pass::{BatchShape, Pass},
    scratch::Packet,
};
use crate::{Backend, ModelError, NewSequence, Spans, cache_size::room};

/// A sequence in the decoder: its caches, and the keys and values of its input. All of its memory was taken when it
/// started.
#[derive(Debug)]
pub struct DeviceSequence {
    /// (blocks, capacity, 2 * kv_inner)
    cache: DeviceBuffer<u8>,
    capacity: usize,
    position: usize,
    /// (blocks, input_rows, 2 * inner)
    input: Arc<DeviceBuffer<u8>>,
    input_rows: usize,
}

impl DeviceSequence {
    /// How many tokens were decoded.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes of its own tokens' caches, with their room.
    pub(super) fn own_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Counts `tokens` new tokens as decoded.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.position += tokens;
    }
}

impl DeviceDense {
    /// As [`Backend::start`], of the `rows` that the last encoding left, none where there is no encoder.
    pub(super) fn start_sequences(
        &self,
        rows: usize,
        new: &[NewSequence],
    ) -> Result<Vec<Result<DeviceSequence, CudaError>>, CudaError> {
        self.check_rows(rows)?;
        if let Some(new) = new.iter().find(|new| new.rows.end > rows) {
            let (expected, found) = (vec![rows], vec![new.rows.end]);
            return Err(ModelError::Shape { what: "rows of an input, their last", expected, found }.into());
        }
        self.gpu.enter()?;
        let started: Vec<_> = new.iter().map(|new| self.take_memory(new)).collect();
        let shape = BatchShape { rows, sequences: new.len(), ..BatchShape::default() };
        let pass = Pass::new(self.machine(), shape, Packet::plan(&self.scratch, 0, 0, 0), 0);
        let row_bytes = 2 * self.config.inner_dim() * self.precision.size();
        // No pass is under way, so its memory is free for the keys and values of all rows.
        let all = &self.scratch.qkv;
        let blocks = self.backbone.decoder.blocks.iter().enumerate();
        for (block, cross) in blocks.filter_map(|(block, weights)| Some((block, weights.cross.as_ref()?))) {
            pass.cross_keys(&cross.keys_values, all.address())?;
            for (new, sequence) in zip(new, &started) {
                let Ok(sequence) = sequence else { continue };
                let bytes = new.rows.len() * row_bytes;
                let from = all.slice(new.rows.start * row_bytes..new.rows.end * row_bytes);
                self.gpu.copy(from, sequence.input.slice(block * bytes..(block + 1) * bytes))?;
            }
        }
        Ok(started)
    }

    /// All memory of a sequence that is to start.
    fn take_memory(&self, new: &NewSequence) -> Result<DeviceSequence, CudaError> {
        let size = self.cache_size();
        let take = |bytes: u64| self.gpu.allocate("caches", usize::try_from(bytes).unwrap_or(usize::MAX));
        Ok(DeviceSequence {
            cache: take(size.of_tokens(new.tokens_max))?,
            capacity: room(new.tokens_max),
            position: 0,
            input: Arc::new(take(size.of_input(new.rows.len()))?),
            input_rows: new.rows.len(),
        })
    }

    /// Another sequence that goes on from the beginning: what scoring several targets of one input needs. Shares what
    /// came from the encoder.
    pub(super) fn fork_sequence(&self, sequence: &DeviceSequence) -> Result<DeviceSequence, CudaError> {
        self.gpu.enter()?;
        let cache = self.gpu.allocate("caches", sequence.cache.len())?;
        self.gpu.copy(sequence.cache.all(), cache.all())?;
        Ok(DeviceSequence { cache, input: sequence.input.clone(), ..*sequence })
    }

    /// As [`Backend::fork_prefix`].
    pub(super) fn fork_sequence_prefix(
        &self,
        sequence: &DeviceSequence,
        tokens: usize,
        tokens_max: usize,
    ) -> Result<DeviceSequence, CudaError> {
        let capacity = room(tokens_max);
        let most = sequence.position.min(capacity);
        if tokens > most {
            let (expected, found) = (vec![most], vec![tokens]);
            let what = "tokens of a sequence's beginning, at most";
            return Err(ModelError::Shape { what, expected, found }.into());
        }
        self.gpu.enter()?;
        let bytes = usize::try_from(self.cache_size().of_tokens(tokens_max)).unwrap_or(usize::MAX);
        let cache = self.gpu.allocate("caches", bytes)?;
        // Each block's rows lie one after another, with the room of their own sequence behind them.
        let blocks = self.backbone.decoder.blocks.len();
        let row_bytes = bytes / (blocks * capacity);
        for block in 0..blocks {
            let rows = |capacity: usize| {
                let first = block * capacity * row_bytes;
                first..first + tokens * row_bytes
            };
            self.gpu.copy(sequence.cache.slice(rows(sequence.capacity)), cache.slice(rows(capacity)))?;
        }
        Ok(DeviceSequence {
            cache,
            capacity,
            position: tokens,
            input: sequence.input.clone(),
            input_rows: sequence.input_rows,
        })
    }

    /// What the device is told of sequences that get new tokens as `spans` says. Refuses those that would need
    /// more room than was taken.
    pub(super) fn describe(
        &self,
        spans: &Spans,
        sequences: &[&mut DeviceSequence],
    ) -> Result<Vec<Sequence>, CudaError> {
        if sequences.len() != spans.len() {
            let (expected, found) = (vec![spans.len()], vec![sequences.len()]);
            return Err(ModelError::Shape { what: "decoder states [sequences]", expected, found }.into());
        }
        let row_values = 2 * self.config.inner_dim();
        let mut described = Vec::with_capacity(spans.len());
        for (sequence, range) in sequences.iter().zip(spans.ranges()) {
            let tokens = sequence.position + range.len();
            if tokens > sequence.capacity {
                let (expected, found) = (vec![sequence.capacity], vec![tokens]);
                return Err(ModelError::Shape { what: "tokens of a sequence, at most", expected, found }.into());
            }
            described.push(Sequence {
                cache: sequence.cache.address(),
                cross: sequence.input.address(),
                cross_stride: (sequence.input_rows * row_values) as u64,
                capacity: sequence.capacity as i32,
                input_rows: sequence.input_rows as i32,
                first_row: range.start as i32,
                rows: range.len() as i32,
                position: sequence.position as i32,
                unused: 0,
            });
        }
        Ok(described)
    }
}
