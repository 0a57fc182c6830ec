//! Maths and weights of a Mixture-of-Experts model, cut at the MoE seam: everything dense is here as a
//! [`Backbone`], a single expert as an [`ExpertShape`] over bytes that somebody else keeps. Used by the
//! coordinator (backbone), the expert-nodes (experts) and the hash predictors (the model to learn from).
//!
//! Invariant: synchronous, no tokio and no network. Every numeric kernel computes each row by itself in a
//! fixed order, so a row's bits do not depend on its batch, on the number of threads or on the node.
//!
//! In reading order. What a model is: [`error`], [`config`], [`family`], and [`spec`], the model as data.
//! Where its bytes are: [`bounded_file`], [`mistaken_file`], `weight_files`, `safetensors_dtype`, [`manifest`], `model_name`, [`checkpoint`], [`names`], [`tokenizer`].
//! How conversations become texts: [`chat_template`], `template_functions`.
//! Its weights by block: [`position_bias`], [`backbone`], `tensor_check`. What it computes, an equation a line: [`forward`].
//! Who computes it: [`backend`]. On the processor, with the arithmetic of [`sida_kernels`]: by several threads in
//! [`mod@side_by_side`] and `pieces`; [`spans`], [`kv_cache`], [`linear`], `loader`, `cpu_operations`, [`router`],
//! [`cpu_backend`]. On a GPU (feature `cuda`): [`cuda`], [`device_name`] and [`precision`].
//! Experts: [`expert`], [`expert_store`]; on another device than the processor, [`expert_device`], and in another process,
//! [`window`](mod@window). Experts beside a pass on its
//! device: [`resident`]. All of it at once: [`reference`](mod@reference).
//! Making checkpoints: [`convert`], [`synth`], `fresh_directory`, `shards`.

pub mod backbone;
pub mod backend;
mod block_matrix;
pub mod blocks;
pub mod bounded_file;
pub mod cache_size;
pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod cpu_backend;
mod cpu_operations;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device_name;
pub mod error;
pub mod expert;
pub mod expert_device;
pub mod expert_slot;
pub mod expert_store;
pub mod family;
pub mod forward;
pub mod fresh_directory;
pub mod generation;
pub mod kv_cache;
pub mod linear;
pub mod loader;
pub mod manifest;
pub mod mistaken_file;
mod model_name;
pub mod names;
mod packed;
mod pieces;
pub mod position_bias;
pub mod precision;
pub mod reference;
mod regular_file;
pub mod resident;
mod rotary;
pub mod router;
mod safetensors_dtype;
mod shards;
pub mod side_by_side;
pub mod spans;
pub mod spec;
pub mod synth;
mod template_functions;
mod tensor_check;
pub mod tokenizer;
mod weight_files;
pub mod window;

pub use backbone::Backbone;
pub use backend::{Backend, Beside, MoeRows, NewSequence, Passed, PassedLayer, Wanted};
pub use blocks::BlockFormats;
pub use cache_size::CacheSize;
pub use chat_template::{ChatError, ChatMessage, ChatTemplate, TemplateValue};
pub use checkpoint::{Checkpoint, TensorBytes};
pub use config::{ModelConfig, Stack};
pub use cpu_backend::CpuBackend;
pub use device_name::{DeviceName, DeviceNameError};
pub use error::ModelError;
pub use expert::{ExpertScratch, ExpertShape};
pub use expert_device::{DeviceError, ExpertDevice, ExpertDeviceOptions, RowsOnDevice, SlotRows, SlotRun, Urgency};
pub use expert_slot::ExpertSlot;
pub use expert_store::ExpertStore;
pub use generation::{GenerationConfig, TokenRule};
pub use kv_cache::CpuSequence;
pub use precision::{Precision, PrecisionError};
pub use reference::{Reference, RoutedLayer};
pub use resident::{DeviceSlots, ResidentExperts, Residents};
pub use sida_kernels::{
    StoredDType,
    still_wanted::{GivenUp, StillWanted},
};
pub use spans::Spans;
pub use spec::ModelSpec;
pub use tokenizer::Tokenizer;
pub use window::{ExpertWindow, ResultsWindow, RowsWindow, WindowHandle};
