//! What an answer is made of. Everything above names these types; they name nothing above them.
//!
//! In reading order: `output` lists the answers, `trace` what happened on the way to one, `hash_layers` how it was
//! predicted, `routing_mode` who chose its experts; `request_error` says why there is none, `fault` how that looks on
//! the wire, and `catch_panic` makes a panic one of these reasons. `sampling` says how the next token is to be chosen,
//! `adjustments` changes its logits, `grammar` holds it to a schema or says by `grammar_refusal` why not, `sampler` picks
//! it, and `logprobs` tells how likely it was. `detokenize` makes text of it, `stop_text` ends the text, and `answer_text` is all of it, on a thread
//! of its own where that pays, and `token_stream` how its caller takes it; `score` and `encoding` answer requests that generate nothing.

pub(crate) mod adjustments;
pub(crate) mod answer_text;
pub(crate) mod catch_panic;
pub(crate) mod detokenize;
pub(crate) mod encoding;
pub(crate) mod fault;
pub(crate) mod grammar;
pub(crate) mod grammar_refusal;
pub(crate) mod hash_layers;
pub(crate) mod logprobs;
pub(crate) mod output;
pub(crate) mod request_error;
pub(crate) mod routing_mode;
pub(crate) mod sampler;
pub(crate) mod sampling;
pub(crate) mod score;
pub(crate) mod stop_text;
pub(crate) mod token_stream;
pub(crate) mod trace;
