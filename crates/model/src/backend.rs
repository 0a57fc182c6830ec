//! What computes the dense part of a model: the processor or a GPU. Whoever runs the model drives passes through it and
//! brings the rows of MoE layers to their experts and back. Chosen once, where a coordinator starts; everything above is
//! generic over it.
//!
//! ```text
//! let mut pass = backend.begin(stack, ids, &spans, sequences)?;
//! while let Some(layer) = backend.advance(&mut pass)? {
//!     let routes = backend.routes(&mut pass)?;
//!     /* rows(&mut pass) go to their experts */ backend.add(&mut pass, &results)?;
//! }
//! let passed = backend.finish(pass)?;
//! ```

use sida_routing::{LayerId, Routes};

use crate::{ModelConfig, ModelError, RowsOnDevice, RowsWindow, Spans, Stack};

/// The dense part of a model, loaded.
///
/// A pass stops at every MoE layer whose rows must leave for their experts. A backend that has experts beside it may go
/// through layers whose experts are all there: [`Backend::advance`] does not return those, and what their routers chose is
/// told at the end, in [`Passed::layers`].
pub trait Backend: Sized + Send + 'static {
    /// A pass under way, through one stack, with all new tokens of some sequences, whose caches it holds until it ends.
    type Pass<'s>: Send;
    /// What a pass left: a row for each token. Some backends keep it until the next pass begins and no longer.
    type States: Send;
    /// A sequence in the decoder: its caches, and the keys and values of its input.
    type Sequence: Send;

    /// What the model is.
    fn config(&self) -> &ModelConfig;

    /// Another way to the same weights, for another thread. `None` where one pass at a time has the backend's memory.
    fn another(&self) -> Option<Self>;

    /// Begins a pass: h = the embeddings of `ids`, which `spans` cuts into sequences. `sequences` are the decoder's, in the
    /// same order, and none for the encoder.
    fn begin<'s>(
        &mut self,
        stack: Stack,
        ids: &[u32],
        spans: &Spans,
        sequences: Vec<&'s mut Self::Sequence>,
    ) -> Result<Self::Pass<'s>, ModelError>;

    /// Goes on to the next MoE layer whose rows must leave. There x = norm(h); then come [`Backend::routes`],
    /// [`Backend::rows`], and the results. `None` after the last block.
    fn advance(&mut self, pass: &mut Self::Pass<'_>) -> Result<Option<LayerId>, ModelError>;

    /// The router's choice for the rows of that layer. Enforces no capacity.
    fn routes(&mut self, pass: &mut Self::Pass<'_>) -> Result<Routes, ModelError>;

    /// The router's probabilities for them: (rows, experts), row-major.
    fn probabilities<'p>(&mut self, pass: &'p mut Self::Pass<'_>) -> Result<&'p [f32], ModelError>;

    /// Those rows, x (rows, d_model), where they are.
    fn rows<'p>(&'p mut self, pass: &'p mut Self::Pass<'_>) -> MoeRows<'p>;

    /// h += out (rows, d_model), what experts made of rows that were in the host's memory.
    fn add(&mut self, pass: &mut Self::Pass<'_>, out: &[f32]) -> Result<(), ModelError>;

    /// Ends a pass. The decoder's sequences advance by their new tokens.
    fn finish(&mut self, pass: Self::Pass<'_>) -> Result<Passed<Self::States>, ModelError>;

    /// What passes with the parts of a batch left, as one. Refused where [`Backend::another`] is `None`.
    fn join(&mut self, parts: Vec<Self::States>) -> Result<Self::States, ModelError>;

    /// The encoder's states (tokens, d_model), row-major, in memory that is kept in `buffer` for the next time.
    fn values<'b>(&mut self, states: &Self::States, buffer: &'b mut Vec<f32>) -> Result<&'b [f32], ModelError>;

    /// Sequences before their first token, of the encoder's states, which `spans` cuts.
    fn start(&mut self, states: &Self::States, spans: &Spans) -> Result<Vec<Self::Sequence>, ModelError>;

    /// Another sequence that goes on from here: what scoring several targets of one input needs. Shares what came from the
    /// encoder.
    fn fork(&self, sequence: &Self::Sequence) -> Result<Self::Sequence, ModelError>;

    /// Scores of every token of the vocabulary after these rows, ascending, of what the decoder's last pass left:
    /// (rows, vocab_size), row-major.
    fn logits(&mut self, states: &Self::States, rows: &[usize]) -> Result<Vec<f32>, ModelError>;

    /// The most likely token after each of these rows, never the one that is banned for it, where that is chosen beside the
    /// logits; a row's is none where no logit is a number. `None`: ask for the logits.
    fn best_tokens(
        &mut self,
        _states: &Self::States,
        _rows: &[u32],
        _banned: &[Option<u32>],
    ) -> Option<Result<Vec<Option<u32>>, ModelError>> {
        None
    }

    /// The memory that rows are in, for expert-nodes of this machine. `None`: the host's; an error: it cannot be shared.
    fn rows_window(&self) -> Option<Result<RowsWindow, ModelError>> {
        None
    }
}

/// Where the rows of an MoE layer are.
pub enum MoeRows<'p> {
    /// In the host's memory: (rows, d_model). What becomes of them goes to [`Backend::add`].
    Host(&'p [f32]),
    /// On a device, where what becomes of them is added, too.
    Device(RowsOnDevice<'p>),
}

/// A pass that ended.
#[derive(Debug)]
pub struct Passed<S> {
    /// What it left.
    pub states: S,
    /// The MoE layers that it went through by itself, in order.
    pub layers: Vec<PassedLayer>,
}

/// An MoE layer whose rows did not leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedLayer {
    /// Which.
    pub layer: LayerId,
    /// The expert that its router chose for each row.
    pub experts: Vec<u16>,
}
