//! What a walk through the dense part of a model holds, on the processor or on a GPU: the hidden states on the way, the
//! states that it leaves, and what is kept of a sequence from one to the next. Made by [`crate::Dense`].

use candle_core::Tensor;

#[cfg(feature = "cuda")]
use crate::cuda::{Choice, DeviceSequence};
use crate::{DecoderState, ModelError, Stack};

/// A walk through a stack.
#[derive(Debug)]
pub struct Walk {
    pub(crate) stack: Stack,
    /// The first block that was not walked.
    pub(crate) next: usize,
    pub(crate) at: At,
}

#[derive(Debug)]
pub(crate) enum At {
    Cpu {
        h: Tensor,
        /// Of the MoE layer at hand: the rows, and the router's probabilities once somebody asked.
        x: Option<Tensor>,
        block: usize,
        probabilities: Option<Vec<f32>>,
    },
    #[cfg(feature = "cuda")]
    Gpu {
        /// Of the MoE layer at hand, and all that its router said once somebody asked.
        choice: Choice,
        probabilities: Vec<f32>,
    },
}

/// What a walk left: a row for each token.
#[derive(Debug)]
pub struct States(pub(crate) Left);

#[derive(Debug)]
pub(crate) enum Left {
    /// (tokens, d_model), normed.
    Cpu(Tensor),
    #[cfg(feature = "cuda")]
    Gpu { rows: usize },
}

impl States {
    /// What walks with the parts of a batch left, as one. On a device there is one walk at a time.
    pub fn join(mut parts: Vec<States>) -> Result<States, ModelError> {
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let here = parts.iter().map(|States(left)| match left {
            Left::Cpu(states) => states,
            #[cfg(feature = "cuda")]
            Left::Gpu { .. } => unreachable!("a device's walk is a whole batch's"),
        });
        Ok(States(Left::Cpu(Tensor::cat(&here.collect::<Vec<_>>(), 0)?)))
    }
}

/// A sequence's state in the decoder, wherever its caches are.
#[derive(Debug)]
pub struct SequenceState(pub(crate) Caches);

#[derive(Debug)]
pub(crate) enum Caches {
    Cpu(DecoderState),
    #[cfg(feature = "cuda")]
    Gpu(DeviceSequence),
}

impl SequenceState {
    pub(crate) fn here<'s>(states: &'s mut [&mut Self]) -> Vec<&'s mut DecoderState> {
        let here = |state: &'s mut &mut Self| match &mut state.0 {
            Caches::Cpu(state) => state,
            #[cfg(feature = "cuda")]
            Caches::Gpu(_) => unreachable!("a sequence is of the model that started it"),
        };
        states.iter_mut().map(here).collect()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn on_device<'s>(states: &'s mut [&mut Self]) -> Vec<&'s mut DeviceSequence> {
        let there = |state: &'s mut &mut Self| match &mut state.0 {
            Caches::Gpu(state) => state,
            Caches::Cpu(_) => unreachable!("a sequence is of the model that started it"),
        };
        states.iter_mut().map(there).collect()
    }
}
