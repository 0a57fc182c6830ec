//! What a sequence takes of memory in the decoder: keys and values of its tokens and of its input. A pure function of
//! the model, so that it is known before a sequence starts, and is then taken whole: no step of a running sequence
//! takes memory. Several choices of one answer are sequences of their own from their first token on, and take theirs then.

use crate::{
    ModelSpec,
    spec::{AttentionSpec, Keys},
};

/// Room for tokens is taken in blocks of so many.
pub const BLOCK_TOKENS: usize = 64;

/// Bytes of keys and values in the decoder of one model, on one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSize {
    token_bytes: u64,
    input_token_bytes: u64,
    /// Whether the decoder reads the input: then it is among the tokens of each sequence.
    reads_input: bool,
}

impl CacheSize {
    /// Of a model whose keys and values are kept in `value_bytes` each.
    pub fn new(spec: &ModelSpec, value_bytes: usize) -> Self {
        let bytes = |attention: &AttentionSpec| (2 * attention.kv_inner() * value_bytes) as u64;
        let blocks = &spec.decoder.blocks;
        Self {
            token_bytes: blocks.iter().map(|b| &b.attention).filter(|a| a.keys == Keys::Cache).map(bytes).sum(),
            input_token_bytes: blocks.iter().filter_map(|block| block.cross.as_ref()).map(bytes).sum(),
            reads_input: !spec.has_encoder(),
        }
    }

    /// Of one sequence's own tokens, `tokens` at most.
    pub fn of_tokens(&self, tokens: usize) -> u64 {
        self.token_bytes.saturating_mul(room(tokens) as u64)
    }

    /// Of an input of so many tokens.
    pub fn of_input(&self, tokens: usize) -> u64 {
        self.input_token_bytes.saturating_mul(tokens as u64)
    }

    /// Of `sequences` that share an input and have at most `tokens` more each: what a request reserves.
    pub fn of_request(&self, input_tokens: usize, sequences: usize, tokens: usize) -> u64 {
        let tokens = tokens.saturating_add(if self.reads_input { input_tokens } else { 0 });
        self.of_input(input_tokens).saturating_add(self.of_tokens(tokens).saturating_mul(sequences as u64))
    }
}

/// How many tokens a sequence has room for that will have at most `tokens`: whole blocks, and no fewer than one.
pub fn room(tokens: usize) -> usize {
    tokens.max(1).div_ceil(BLOCK_TOKENS).saturating_mul(BLOCK_TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence would be given less room than it needs, or the arithmetic on a length from outside would overflow.
    #[test]
    fn room_is_whole_blocks() {
        assert_eq!([0, 1, 64, 65, 1024, 1025].map(room), [64, 64, 64, 128, 1024, 1088]);
        assert!(room(usize::MAX) >= usize::MAX - BLOCK_TOKENS);
        let size = CacheSize { token_bytes: 12, input_token_bytes: 10, reads_input: false };
        assert_eq!(size.of_request(3, 2, 65), 30 + 2 * 12 * 128);
        assert_eq!(size.of_request(usize::MAX, 2, usize::MAX), u64::MAX);
        let size = CacheSize { token_bytes: 12, input_token_bytes: 0, reads_input: true };
        assert_eq!(size.of_request(60, 2, 5), 2 * 12 * 128, "an input that the decoder reads is in each sequence");
    }
}
