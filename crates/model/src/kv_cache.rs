//! What one sequence has left behind in the decoder: the keys and values of its tokens in every block, and
//! those of the encoder's output. A sequence takes its state along when it joins or leaves a batch.

use std::sync::Arc;

/// Room for this many tokens is taken at first; it doubles when it is full.
const TOKENS_FIRST: usize = 64;

/// Keys and values of one sequence in one block's self-attention.
#[derive(Clone, Debug)]
pub(crate) struct KvCache {
    /// (tokens, 2 * inner): a token's keys, then its values.
    rows: Vec<f32>,
    width: usize,
}

impl KvCache {
    fn new(inner: usize) -> Self {
        Self { rows: Vec::with_capacity(TOKENS_FIRST * 2 * inner), width: 2 * inner }
    }

    /// Sets the rows from `position` on to the keys and values at the end of each row of `qkv`
    /// (n, 3 * inner), and forgets what was after them: a step that failed can be run again.
    pub(crate) fn write(&mut self, position: usize, qkv: &[f32]) {
        self.rows.truncate(position * self.width);
        let inner = self.width / 2;
        for row in qkv.chunks_exact(3 * inner) {
            self.rows.extend_from_slice(&row[inner..]);
        }
    }

    /// (tokens, 2 * inner)
    pub(crate) fn rows(&self) -> &[f32] {
        &self.rows
    }
}

/// A sequence in the decoder of a model on the processor. Made by [`crate::Backend::start`].
#[derive(Clone, Debug)]
pub struct CpuSequence {
    position: usize,
    /// One per block.
    /// Invariant: each holds the tokens before `position`, and those of a step that has not been advanced.
    pub(crate) caches: Vec<KvCache>,
    /// Keys and values of the encoder's output, one (tokens, 2 * inner) per block; never changed.
    pub(crate) cross: Arc<[Vec<f32>]>,
}

impl CpuSequence {
    pub(crate) fn new(cross: Vec<Vec<f32>>, inner: usize) -> Self {
        let caches = cross.iter().map(|_| KvCache::new(inner)).collect();
        Self { position: 0, caches, cross: cross.into() }
    }

    /// How many tokens were decoded.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Counts `tokens` new tokens as decoded. To be called once all blocks have attended.
    pub fn advance(&mut self, tokens: usize) {
        self.position += tokens;
    }

    /// Another sequence that goes on from here: what scoring several targets of one input needs. Shares what
    /// came from the encoder.
    pub fn fork(&self) -> Self {
        self.clone()
    }
}
