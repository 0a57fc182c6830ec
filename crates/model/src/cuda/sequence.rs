//! Sequences in the decoder of a model on a GPU: their caches on the device, which a sequence takes along when it joins or
//! leaves a batch, and the passes that fill them.

use std::sync::Arc;

use super::{
    arguments::Sequence,
    dense::DeviceDense,
    device::DeviceMemory,
    error::CudaError,
    pass::{BatchShape, Pass},
    scratch::Packet,
};
use crate::{ModelError, Spans};

/// A cache begins with room for so many tokens, and doubles when it is full.
const CACHE_TOKENS_FIRST: usize = 64;

/// A sequence in the decoder: its caches, and its share of the keys and values of its input.
#[derive(Debug)]
pub struct DeviceSequence {
    /// (blocks, capacity, 2 * inner)
    cache: DeviceMemory,
    capacity: usize,
    position: usize,
    input: Arc<DeviceMemory>,
    /// Where its rows begin in block 0 of `input`, and from one block to the next, in values.
    input_first: u64,
    input_stride: u64,
    input_rows: usize,
}

impl DeviceSequence {
    /// How many tokens were decoded.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Counts `tokens` new tokens as decoded.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.position += tokens;
    }
}

impl DeviceDense {
    /// As [`crate::Backend::start`]: keys and values of the states that the last encoding left, for every block.
    pub(super) fn start_sequences(&self, spans: &Spans) -> Result<Vec<DeviceSequence>, CudaError> {
        let rows = spans.rows();
        self.check_rows(rows)?;
        self.gpu.enter()?;
        let (width, value) = (2 * self.config.inner_dim(), self.precision.size());
        let stride = rows * width;
        let blocks = &self.backbone.decoder.blocks;
        let input = Arc::new(self.gpu.allocate("caches", blocks.len() * stride * value)?);
        let shape = BatchShape { rows, sequences: spans.len(), longest: 0, wanted: 0 };
        let pass = Pass::new(self.machine(), shape, Packet::plan(&self.scratch, 0, 0, 0), 0);
        for (block, cross) in blocks.iter().enumerate().filter_map(|(at, block)| Some((at, block.cross.as_ref()?))) {
            pass.cross_keys(&cross.keys_values, input.address() + (block * stride * value) as u64)?;
        }
        let sequence = |range: std::ops::Range<usize>| {
            Ok(DeviceSequence {
                cache: self.gpu.allocate("caches", self.cache_bytes(CACHE_TOKENS_FIRST))?,
                capacity: CACHE_TOKENS_FIRST,
                position: 0,
                input: input.clone(),
                input_first: (range.start * width) as u64,
                input_stride: stride as u64,
                input_rows: range.len(),
            })
        };
        spans.ranges().map(sequence).collect()
    }

    /// Another sequence that goes on from the beginning: what scoring several targets of one input needs. Shares what
    /// came from the encoder.
    pub(super) fn fork_sequence(&self, sequence: &DeviceSequence) -> Result<DeviceSequence, CudaError> {
        self.gpu.enter()?;
        let cache = self.gpu.allocate("caches", self.cache_bytes(sequence.capacity))?;
        self.gpu.copy(sequence.cache.address(), cache.address(), self.cache_bytes(sequence.capacity))?;
        Ok(DeviceSequence { cache, input: sequence.input.clone(), ..*sequence })
    }

    /// What the device is told of sequences that get new tokens as `spans` says. Makes room for them.
    pub(super) fn describe(
        &self,
        spans: &Spans,
        sequences: &mut [&mut DeviceSequence],
    ) -> Result<Vec<Sequence>, CudaError> {
        if sequences.len() != spans.len() {
            let (expected, found) = (vec![spans.len()], vec![sequences.len()]);
            return Err(ModelError::Shape { what: "decoder states [sequences]", expected, found }.into());
        }
        self.gpu.enter()?;
        let value = self.precision.size() as u64;
        let mut described = Vec::with_capacity(spans.len());
        for (sequence, range) in sequences.iter_mut().zip(spans.ranges()) {
            self.make_room(sequence, range.len())?;
            described.push(Sequence {
                cache: sequence.cache.address(),
                cross: sequence.input.address() + sequence.input_first * value,
                cross_stride: sequence.input_stride,
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

    fn cache_bytes(&self, tokens: usize) -> usize {
        self.config.decoder_layers * tokens * 2 * self.config.inner_dim() * self.precision.size()
    }

    /// Doubles a cache until it has room for `tokens` more.
    fn make_room(&self, sequence: &mut DeviceSequence, tokens: usize) -> Result<(), CudaError> {
        let mut capacity = sequence.capacity;
        while capacity < sequence.position + tokens {
            capacity *= 2;
        }
        if capacity == sequence.capacity {
            return Ok(());
        }
        let cache = self.gpu.allocate("caches", self.cache_bytes(capacity))?;
        let block = |capacity| self.cache_bytes(capacity) / self.config.decoder_layers;
        for index in 0..self.config.decoder_layers {
            let (old, new) = (index * block(sequence.capacity), index * block(capacity));
            let (from, to) = (sequence.cache.address() + old as u64, cache.address() + new as u64);
            self.gpu.copy(from, to, block(sequence.position))?;
        }
        (sequence.cache, sequence.capacity) = (cache, capacity);
        Ok(())
    }
}
