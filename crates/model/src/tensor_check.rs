//! Whether a checkpoint's tensors are those that its config speaks of: each that is loaded is there, in its shape, with
//! weights in it. Asked by who wants to know without loading, such as `sida doctor`.
//!
//! The walk is that of loading itself ([`Backbone::load_with`]), into no memory: what is loaded cannot be forgotten here.

use std::sync::Arc;

use sida_kernels::position_bias::PositionBias;

use crate::{
    Backbone, Checkpoint, ExpertStore, ModelError,
    backbone::{Load, Memory},
};

impl Checkpoint {
    /// Refuses a checkpoint that cannot be loaded, by its headers. Of the weights it reads the small position biases, and
    /// copies of the embedding where there are several, which loading compares.
    pub fn check_tensors(self: &Arc<Self>) -> Result<(), ModelError> {
        Backbone::load_with(&mut Headers { checkpoint: self })?;
        ExpertStore::open(self.clone())?;
        Ok(())
    }
}

/// No memory: nothing is kept.
#[derive(Debug)]
struct Nowhere;

impl Memory for Nowhere {
    type Matrix = ();
    type Vector = ();
    type Bias = ();
}

/// Looks at the headers of what is to be loaded.
struct Headers<'a> {
    checkpoint: &'a Checkpoint,
}

impl Headers<'_> {
    fn check(&self, name: &str, shape: &[usize]) -> Result<(), ModelError> {
        self.checkpoint.check_shape(name, shape)?;
        self.checkpoint.dtype(name).map(drop)
    }
}

impl Load for Headers<'_> {
    type Memory = Nowhere;
    type Error = ModelError;

    fn checkpoint(&self) -> &Checkpoint {
        self.checkpoint
    }

    fn matrix(&mut self, parts: &[(String, usize)], inputs: usize) -> Result<(), ModelError> {
        parts.iter().try_for_each(|(name, outputs)| self.check(name, &[*outputs, inputs]))
    }

    fn router(&mut self, name: String, experts: usize, d_model: usize) -> Result<(), ModelError> {
        self.check(&name, &[experts, d_model])
    }

    fn vector(&mut self, name: &str, width: usize) -> Result<(), ModelError> {
        self.check(name, &[width])
    }

    fn vectors(&mut self, parts: &[(String, usize)]) -> Result<(), ModelError> {
        parts.iter().try_for_each(|(name, width)| self.check(name, &[*width]))
    }

    fn bias(&mut self, _: PositionBias) -> Result<(), ModelError> {
        Ok(())
    }
}
