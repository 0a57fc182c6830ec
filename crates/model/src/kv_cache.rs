//! What one sequence has left behind in the decoder: the keys and values of its tokens in every block, and
//! those of the encoder's output. A sequence takes its state along when it joins or leaves a batch.

use std::sync::Arc;

use crate::{
    ModelError,
    cache_size::room,
    spec::{BlockSpec, StackSpec},
};

/// Keys and values of one sequence in one block's self-attention.
#[derive(Debug)]
pub(crate) struct KvCache {
    /// (tokens, 2 * kv_inner): a token's keys, then its values.
    rows: Vec<f32>,
    width: usize,
}

impl KvCache {
    fn new(kv_inner: usize, tokens: usize) -> Result<Self, ModelError> {
        let width = 2 * kv_inner;
        Ok(Self { rows: reserved(tokens.saturating_mul(width))?, width })
    }

    /// Sets the rows from `position` on to the keys and values at the end of each row of `qkv`, rows of `width` values, and
    /// forgets what was after them: a step that failed can be run again.
    pub(crate) fn write(&mut self, position: usize, qkv: &[f32], width: usize) {
        self.rows.truncate(position * self.width);
        for row in qkv.chunks_exact(width) {
            self.rows.extend_from_slice(&row[width - self.width..]);
        }
    }

    /// (tokens, 2 * kv_inner)
    pub(crate) fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// The same rows, with the same room.
    fn fork(&self) -> Result<Self, ModelError> {
        self.copied(&self.rows, self.rows.capacity())
    }

    /// The first rows, so many, with room for others.
    fn fork_prefix(&self, tokens: usize, room: usize) -> Result<Self, ModelError> {
        self.copied(&self.rows[..tokens * self.width], room.saturating_mul(self.width))
    }

    fn copied(&self, values: &[f32], room: usize) -> Result<Self, ModelError> {
        let mut rows = reserved(room)?;
        rows.extend_from_slice(values);
        Ok(Self { rows, width: self.width })
    }
}

/// A sequence in the decoder of a model on the processor. Made by [`crate::Backend::start`].
#[derive(Debug)]
pub struct CpuSequence {
    position: usize,
    /// One per block.
    /// Invariant: each holds the tokens before `position`, and those of a step that has not been advanced.
    pub(crate) caches: Vec<KvCache>,
    /// Keys and values of the encoder's output, one (tokens, 2 * kv_inner) per block that attends to it; never changed.
    pub(crate) cross: Arc<[Vec<f32>]>,
}

impl CpuSequence {
    /// Takes room for `tokens_max` tokens in the decoder's blocks.
    pub(crate) fn new(decoder: &StackSpec, cross: Vec<Vec<f32>>, tokens_max: usize) -> Result<Self, ModelError> {
        let cache = |block: &BlockSpec| KvCache::new(block.attention.kv_inner(), room(tokens_max));
        let caches = decoder.blocks.iter().map(cache).collect::<Result<_, _>>()?;
        Ok(Self { position: 0, caches, cross: cross.into() })
    }

    /// How many tokens were decoded.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes that it takes: for its own tokens, and for its input, which those that were forked from it share.
    pub fn bytes(&self) -> (u64, u64) {
        let bytes = |values: usize| (values * size_of::<f32>()) as u64;
        let own = self.caches.iter().map(|cache| bytes(cache.rows.capacity())).sum();
        (own, self.cross.iter().map(|rows| bytes(rows.capacity())).sum())
    }

    /// Counts `tokens` new tokens as decoded. To be called once all blocks have attended.
    pub fn advance(&mut self, tokens: usize) {
        self.position += tokens;
    }

    /// Another sequence that goes on from here: what scoring several targets of one input needs. Shares what
    /// came from the encoder.
    pub fn fork(&self) -> Result<Self, ModelError> {
        let caches = self.caches.iter().map(KvCache::fork).collect::<Result<_, _>>()?;
        Ok(Self { position: self.position, caches, cross: self.cross.clone() })
    }

    /// As [`crate::Backend::fork_prefix`].
    pub fn fork_prefix(&self, tokens: usize, tokens_max: usize) -> Result<Self, ModelError> {
        if tokens > self.position {
            let (expected, found) = (vec![self.position], vec![tokens]);
            return Err(ModelError::Shape { what: "tokens of a sequence's beginning, at most", expected, found });
        }
        let caches = self.caches.iter().map(|cache| cache.fork_prefix(tokens, room(tokens_max)));
        Ok(Self { position: tokens, caches: caches.collect::<Result<_, _>>()?, cross: self.cross.clone() })
    }

    /// As [`crate::Backend::trim`].
    pub(crate) fn trim(&mut self) {
        for KvCache { rows, width } in &mut self.caches {
            rows.truncate(self.position * *width);
            rows.shrink_to_fit();
        }
    }
}

/// Memory for so many values and no more, or an error where there is none.
pub(crate) fn reserved(values: usize) -> Result<Vec<f32>, ModelError> {
    let mut memory = Vec::new();
    let bytes = values.saturating_mul(size_of::<f32>());
    memory.try_reserve_exact(values).map_err(|_| ModelError::OutOfMemory { what: "keys and values", bytes })?;
    Ok(memory)
}
