//! One pass of a batch through the model.
//!
//! In reading order: `batch` is what goes through together; `forward` decides whether it goes whole or as micro-batches;
//! `pass_runner` takes it from layer to layer; `expert_choice` says which experts each row goes to at an MoE layer, and
//! `guided_choice` how the router chooses among those that were planned; `costs` and `route_measures` note what that took
//! and where rows went.

pub(crate) mod batch;
pub(crate) mod costs;
pub(crate) mod expert_choice;
pub(crate) mod forward;
pub(crate) mod guided_choice;
pub(crate) mod pass_runner;
pub(crate) mod route_measures;
