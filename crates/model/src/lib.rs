//! Maths and weights of a Mixture-of-Experts model, cut at the MoE seam: everything dense is here as a
//! [`Backbone`], a single expert as an [`ExpertShape`] over bytes that somebody else keeps. Used by the
//! coordinator (backbone), the expert-nodes (experts) and the hash predictors (kernels, and the model to learn from).
//!
//! Invariant: synchronous, no tokio and no network. Every numeric kernel computes each row by itself in a
//! fixed order, so a row's bits do not depend on its batch, on the number of threads or on the node.
//!
//! In reading order. What a model is: [`error`], [`dtype`], [`config`], [`family`].
//! Where its bytes are: [`bounded_file`], `weight_files`, [`manifest`], [`checkpoint`], [`names`], [`tokenizer`].
//! Arithmetic on slices: [`cpu`]; by several threads: [`mod@side_by_side`], `pieces`; on tensors: [`tensor_rows`], [`linear`], [`norm`], [`elementwise`].
//! The backbone: [`spans`], [`position_bias`], [`kv_cache`], `attention`, [`router`], [`feed_forward`],
//! [`encoder`], [`decoder`], `loader`, [`backbone`], and [`dense`] (the same wherever it is computed, by a [`walk`]). Experts: [`expert`], [`expert_store`].
//! All of it at once: [`reference`](mod@reference).
//! Experts on another device than the processor: [`expert_device`], and in another process: [`window`](mod@window). All of it on a GPU (feature `cuda`): [`cuda`],
//! [`device_name`] and [`precision`].
//! Making checkpoints: [`convert`], [`synth`], `fresh_directory`, `shards`.

mod attention;
pub mod backbone;
pub mod bounded_file;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decoder;
pub mod dense;
pub mod device_name;
pub mod dtype;
pub mod elementwise;
pub mod encoder;
pub mod error;
pub mod expert;
pub mod expert_device;
pub mod expert_slot;
pub mod expert_store;
pub mod family;
pub mod feed_forward;
mod fresh_directory;
pub mod kv_cache;
pub mod linear;
mod loader;
pub mod manifest;
pub mod names;
pub mod norm;
mod packed;
mod pieces;
pub mod position_bias;
pub mod precision;
pub mod reference;
pub mod router;
mod shards;
pub mod side_by_side;
pub mod spans;
pub mod synth;
pub mod tensor_rows;
pub mod tokenizer;
pub mod walk;
mod weight_files;
pub mod window;

pub use candle_core::{Device, Tensor};

pub use backbone::Backbone;
pub use checkpoint::{Checkpoint, TensorBytes};
pub use config::{ExpertKind, ModelConfig, RouterKind, Stack, StackKind};
pub use decoder::{Decoder, DecoderLayer};
pub use dense::{Dense, DenseOptions};
pub use device_name::{DeviceName, DeviceNameError};
pub use dtype::StoredDType;
pub use encoder::{Encoder, EncoderLayer};
pub use error::ModelError;
pub use expert::{ExpertScratch, ExpertShape};
pub use expert_device::{DeviceError, ExpertDevice, ExpertDeviceOptions, RowsOnDevice, SlotRows, SlotRun, Urgency};
pub use expert_slot::ExpertSlot;
pub use expert_store::ExpertStore;
pub use feed_forward::{DenseFeedForward, FeedForward, MoeGate};
pub use kv_cache::DecoderState;
pub use precision::{Precision, PrecisionError};
pub use reference::{Reference, RoutedLayer};
pub use spans::Spans;
pub use tokenizer::Tokenizer;
pub use walk::{SequenceState, States, Walk};
pub use window::{ExpertWindow, ResultsWindow, RowsWindow, WindowHandle};
