//! The rows of one MoE layer, to the experts and back. Who is asked for which rows, and when somebody else is, is decided
//! by `sida_routing::dispatch`; this carries it out.
//!
//! In reading order: `layer_rows` says whose rows they are and where they lie, `callers` who waits for them; `dispatch`
//! makes the calls and collects the answers; `driver` is what the decisions stand on; `calls` gathers the rows of a call;
//! `nodes` are those that can be asked: `here` calls nodes of this process and `remote` those of others. Beside that:
//! `probe` is the expert call behind the health check, and `experts_without_holder` counts experts whose holders are all
//! away.

pub(crate) mod callers;
pub(crate) mod calls;
pub(crate) mod dispatch;
pub(crate) mod driver;
pub(crate) mod experts_without_holder;
pub(crate) mod here;
pub(crate) mod layer_rows;
pub(crate) mod nodes;
pub(crate) mod probe;
pub(crate) mod remote;
