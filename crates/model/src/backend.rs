//! What computes the dense part of a model: the processor or a GPU. Whoever runs the model drives passes through it and
//! brings the rows of MoE layers to their experts and back. Chosen once, where a coordinator starts; everything above is
//! generic over it.
//!
//! ```text
//! let mut pass = backend.begin(stack, ids, &spans, sequences, beside)?;
//! while let Some(layer) = backend.advance(&mut pass)? {
//!     let routes = backend.routes(&mut pass)?;
//!     /* rows(&mut pass) go to their experts */ backend.add(&mut pass, &results)?;
//! }
//! let passed = backend.finish(pass)?;
//! ```

use std::{ops::Range, sync::Arc};

use sida_routing::{ExpertId, Group, LayerId, Routes};

use crate::{CacheSize, ModelConfig, ModelError, ResidentExperts, RowsOnDevice, RowsWindow, Spans, Stack, StillWanted};

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

    /// What sequences take of its memory.
    fn cache_size(&self) -> CacheSize;

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
        beside: Beside<'s>,
    ) -> Result<Self::Pass<'s>, ModelError>;

    /// Goes on to the next MoE layer whose rows must leave. There x = norm(h); then come [`Backend::routes`],
    /// [`Backend::rows`], and the results. `None` after the last block. [`ModelError::GivenUp`], where that is looked for:
    /// nobody waits for the pass any more, and it is to be dropped.
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

    /// The mean of the encoder's states over each of the sequences that `spans` of its pass names: (sequences, d_model),
    /// row-major. Added row by row, so that the bits depend on the sequence alone.
    fn means(&mut self, states: &Self::States, spans: &Spans) -> Result<Vec<f32>, ModelError>;

    /// What the last norm makes of the states that a pass of the decoder left: the states of a model without an encoder.
    fn last_hidden(&mut self, states: Self::States) -> Result<Self::States, ModelError>;

    /// Sequences before their first token; `states` are the encoder's, if there is one. Each takes all of its memory now; one
    /// that finds none is an error by itself, and the others start.
    fn start(
        &mut self,
        states: Option<&Self::States>,
        sequences: &[NewSequence],
    ) -> Result<Vec<Result<Self::Sequence, ModelError>>, ModelError>;

    /// Another sequence that goes on from here: what scoring several targets of one input needs. Shares what came from the
    /// encoder.
    fn fork(&self, sequence: &Self::Sequence) -> Result<Self::Sequence, ModelError>;

    /// Another sequence that goes on from the first `tokens` of this one, with room for `tokens_max` in all, as if it had
    /// started with that room and these tokens had been decoded. Takes all of its memory now.
    fn fork_prefix(
        &self,
        sequence: &Self::Sequence,
        tokens: usize,
        tokens_max: usize,
    ) -> Result<Self::Sequence, ModelError>;

    /// Gives back the room of a sequence that gets no more tokens, where that costs next to nothing, and says how many bytes
    /// its own tokens take from then on.
    fn trim(&self, sequence: &mut Self::Sequence) -> u64;

    /// Scores of every token of the vocabulary after these rows, ascending, of what the decoder's last pass left:
    /// (rows, vocab_size), row-major.
    fn logits(&mut self, states: &Self::States, rows: &[usize]) -> Result<Vec<f32>, ModelError>;

    /// The most likely token after each of these rows, never the one that is banned for it, where that is chosen beside the
    /// logits; a row's is none where no logit is a number. `None`: ask for the logits.
    fn best_tokens(
        &mut self,
        _states: &Self::States,
        _wanted: &[Wanted],
    ) -> Option<Result<Vec<Option<u32>>, ModelError>> {
        None
    }

    /// The device that passes run on, for whoever may have experts there. `None`: the processor.
    fn device(&mut self) -> Option<RowsOnDevice<'_>> {
        None
    }

    /// The memory that rows are in, for expert-nodes of this machine. `None`: the host's; an error: it cannot be shared.
    fn rows_window(&self) -> Option<Result<RowsWindow, ModelError>> {
        None
    }
}

/// A sequence that is to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSequence {
    /// The rows of its input in the encoder's states; none where there is no encoder.
    pub rows: Range<usize>,
    /// The most tokens that will be decoded.
    pub tokens_max: usize,
}

/// What a backend may compute with a pass, or leave undone, if it can.
#[derive(Clone, Default)]
pub struct Beside<'a> {
    /// What [`Backend::best_tokens`] will be asked for.
    pub wanted: &'a [Wanted],
    /// Whether anybody still waits for the pass.
    pub still_wanted: StillWanted<'a>,
    /// Experts on the device of the pass: it goes through MoE layers all of whose chosen experts are resident there.
    pub experts: Option<Arc<dyn ResidentExperts>>,
}

/// A row whose next token is wanted: the most likely one that is not banned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which row of the pass.
    pub row: u32,
    /// The token that cannot be next.
    pub banned: Option<u32>,
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
    pub experts: Vec<ExpertId>,
}

impl PassedLayer {
    /// How many rows went to each expert, ascending by expert.
    pub fn groups(&self) -> Vec<Group> {
        let mut rows = vec![0; self.experts.iter().max().map_or(0, |most| usize::from(most.0) + 1)];
        self.experts.iter().for_each(|expert| rows[usize::from(expert.0)] += 1);
        let used = rows.into_iter().enumerate().filter(|&(_, rows)| rows > 0);
        used.map(|(expert, rows)| Group { expert: ExpertId(expert as u16), rows }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An expert would be named twice, which residency refuses, or its rows would be counted for another.
    #[test]
    fn experts_are_named_once() {
        let groups = |experts: &[u16]| {
            let experts = experts.iter().copied().map(ExpertId).collect();
            PassedLayer { layer: LayerId(0), experts }.groups()
        };
        let expected = [(0, 2), (3, 3), (7, 1)].map(|(expert, rows)| Group { expert: ExpertId(expert), rows });
        assert_eq!(groups(&[3, 0, 3, 7, 0, 3]), expected);
        assert!(groups(&[]).is_empty());
    }
}
