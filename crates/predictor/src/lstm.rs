//! SiDA's hash function (section 3): token embedding -> linear and ReLU -> two LSTM layers -> sparsemax
//! self-attention -> residual -> one linear head per MoE layer.
//!
//! The encoder's input is known ahead, so its LSTM runs both ways and its attention sees the whole sequence.
//! The decoder's runs forward and attends to the last [`ATTENTION_WINDOW`] tokens, so its state is bounded.
//! The paper's attention has no scale; with one (width^-0.5) scores stay of a size that sparsemax spreads over
//! several tokens. The embedding with its linear layer and ReLU depends on the token alone: the file holds its
//! result for each token, which may be narrower than the net.
//!
//! A decoder behind an encoder attends to the encoder's output, too, which the paper's does not
//! (docs/decisions/0026).
//!
//! In reading order: `activation`, `sparsemax`, `recurrence` (LSTM layers over sequences of different
//! lengths without padding), `input_attention`, `stack_net` (the whole net of one stack).

pub(crate) mod activation;
pub(crate) mod input_attention;
pub(crate) mod recurrence;
pub(crate) mod sparsemax;
pub(crate) mod stack_net;

/// How many outputs the decoder's attention sees, the newest among them.
pub const ATTENTION_WINDOW: usize = 32;
