//! What will be needed next: hash tables, and the hints to expert-nodes that are made of them.
//!
//! In reading order: `need` says which requests are predicted; `predict` fills the hash tables, by a predictor in this process
//! or by `remote_predictor`, which asks predictor-nodes; `preload` tells expert-nodes which experts the tables name; `beside`
//! does both for the decoder's steps while they are computed, and `prompt_tables` lets prompts that need no table begin before
//! they are predicted. `teacher` tells predictor-nodes that learn what the routers chose, which `noted_labels` notes.

pub(crate) mod beside;
pub(crate) mod need;
pub(crate) mod noted_labels;
pub(crate) mod predict;
pub(crate) mod preload;
pub(crate) mod prompt_tables;
pub(crate) mod remote_predictor;
pub(crate) mod teacher;
