//! One file per command. Each has its arguments, which `command_line` lists, and a `run` that does it.

pub(crate) mod ask;
pub(crate) mod bench;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod coordinator;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod expert_node;
pub(crate) mod inspect;
pub(crate) mod predictor_node;
pub(crate) mod status;
pub(crate) mod synth;
pub(crate) mod train_predictor;
pub(crate) mod up;
pub(crate) mod verify;
