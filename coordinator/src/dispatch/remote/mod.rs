//! Expert calls to nodes of other processes, over one gRPC stream per node: a lane.
//!
//! In reading order: `lane` sends calls and hands back answers; `lane_connection` keeps it connected; `lane_call` is what
//! goes down and comes back; `lane_window` says whether rows may stay in GPU memory that both processes see; `clock` tells
//! the time that lanes are judged in.

pub(crate) mod clock;
pub(crate) mod lane;
pub(crate) mod lane_call;
pub(crate) mod lane_connection;
pub(crate) mod lane_window;
