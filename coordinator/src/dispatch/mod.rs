//! The rows of one MoE layer, to the experts and back.
//!
//! In reading order: `layer_rows` says whose rows they are and where they lie, `callers` who waits for them; `dispatch`
//! sends and collects; `assignment` assigns rows to the `nodes`, cut into `calls`; `here` calls nodes of this process and
//! `remote` those of others; `outstanding` says how long an answer is waited for, and `node_wait` what happens when no node
//! is left to ask. Beside that: `probe` is the expert call behind the health check, and `experts_without_holder` counts experts whose
//! holders are all away.

pub(crate) mod assignment;
pub(crate) mod callers;
pub(crate) mod calls;
pub(crate) mod dispatch;
pub(crate) mod experts_without_holder;
pub(crate) mod here;
pub(crate) mod layer_rows;
pub(crate) mod node_wait;
pub(crate) mod nodes;
pub(crate) mod outstanding;
pub(crate) mod probe;
pub(crate) mod remote;
