//! Maths and weights of a Mixture-of-Experts model, cut at the MoE seam: everything dense is here as a
//! [`Backbone`], a single expert as an [`ExpertShape`] over bytes that somebody else keeps. Used by the
//! coordinator (backbone), the expert-nodes (experts) and the predictor-nodes (hash predictors).
//!
//! Invariant: synchronous, no tokio and no network. Every numeric kernel computes each row by itself in a
//! fixed order, so a row's bits do not depend on its batch, on the number of threads or on the node.
//!
//! In reading order. What a model is: [`error`], [`dtype`], [`bounded_file`], [`config`], [`family`].
//! Where its bytes are: [`checkpoint`], [`tokenizer`].

pub mod bounded_file;
pub mod config;
pub mod convert;
pub mod dtype;
pub mod error;
pub mod family;
mod fresh_directory;
pub mod manifest;
mod shards;
pub mod synth;

pub use candle_core::{Device, Tensor};

pub use config::{ExpertKind, ModelConfig, RouterKind, Stack, StackKind};
pub use dtype::StoredDType;
pub use error::ModelError;
