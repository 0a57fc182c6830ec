//! Expert calls to nodes of other processes, over one gRPC stream per node: a lane.
//!
//! In reading order: `lane` sends calls and hands back answers; `lane_connection` keeps it connected; `lane_call` is what
//! goes down and comes back; `lane_window` says whether rows may stay in GPU memory that both processes see;
//! `call_deadline` says how long an answer may take; `call_failure` lists the ways in which a call fails.

pub(crate) mod call_deadline;
pub(crate) mod call_failure;
pub(crate) mod lane;
pub(crate) mod lane_call;
pub(crate) mod lane_connection;
pub(crate) mod lane_window;
